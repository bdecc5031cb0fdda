"""What a person sees on a terminal: progress, colours, narrow windows; and what a log gets."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.terminal import SECONDS, terminal
from tests.doctor import hosts
from tests.fuzz.shapes import pages_apart
from tests.igvm import samples

BAR = re.compile("[━╸╺]{5}")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.igvm"
    path.write_bytes(samples.small())
    return path


def has_count(text: str) -> bool:
    return re.search(r"inspecting: \d+ of \d+ files", text) is not None


def test_long_work_has_a_bar_that_goes_without_a_trace(small: Path, tmp_path: Path) -> None:
    with terminal() as seen, (tmp_path / "out").open("wb") as out:
        seen.start("inspect", *[small] * 3000, stdout=out)
        screen = seen.wait_for(lambda text: BAR.search(text) is not None)
        assert has_count(screen)
        assert len(screen.splitlines()) == 1
        assert seen.wait() == 0
        assert seen.text == ""
        assert not seen.screen.cursor.hidden
    assert (tmp_path / "out").read_text().count("small.igvm: IGVM revision") == 3000


def test_short_work_has_none(small: Path, tmp_path: Path) -> None:
    with terminal() as seen, (tmp_path / "out").open("wb") as out:
        seen.start("inspect", "--json", small, stdout=out)
        assert seen.wait() == 0
        assert seen.raw == b""


def test_results_on_the_same_terminal_are_progress_enough(small: Path) -> None:
    with terminal() as seen:
        seen.start("inspect", *[small] * 2000)
        assert seen.wait() == 0
        assert b"\x1b" not in seen.raw


@pytest.mark.parametrize("where", ["before", "after"])
def test_quiet_has_none(small: Path, tmp_path: Path, where: str) -> None:
    words = ["-q", "inspect"] if where == "before" else ["inspect", "--quiet"]
    with terminal() as seen, (tmp_path / "out").open("wb") as out:
        seen.start(*words, *[small] * 2000, tmp_path / "missing", stdout=out)
        assert seen.wait() == 3
        # warnings stay
        assert seen.text.startswith("igvmfw: warning: ")
        assert b"\x1b" not in seen.raw


def test_warnings_stand_above_the_bar(small: Path, tmp_path: Path) -> None:
    missing = tmp_path / "[red]missing"
    files = [*[small] * 2000, missing, *[small] * 2000]
    with terminal(columns=200) as seen, (tmp_path / "out").open("wb") as out:
        seen.start("inspect", *files, stdout=out)
        screen = seen.wait_for(lambda text: "warning" in text and BAR.search(text) is not None)
        first, second = screen.splitlines()
        assert first.startswith(f"igvmfw: warning: {missing}: cannot read")
        assert has_count(second)
        assert seen.wait() == 3
        assert len(seen.text.splitlines()) == 1


@pytest.mark.parametrize("columns", [20, 40])
def test_a_narrow_terminal_has_one_line(columns: int, small: Path, tmp_path: Path) -> None:
    with terminal(columns=columns) as seen, (tmp_path / "out").open("wb") as out:
        seen.start("inspect", *[small] * 3000, stdout=out)
        screen = seen.wait_for(lambda text: text.startswith("inspecting: "))
        assert len(screen.splitlines()) == 1
        assert seen.wait() == 0
        assert seen.text == ""


def test_no_colour_where_none_is_wanted(small: Path, tmp_path: Path) -> None:
    colour = re.compile(rb"\x1b\[[0-9;]*[1-9][0-9]*m")
    with terminal() as seen, (tmp_path / "out").open("wb") as out:
        seen.start("inspect", *[small] * 3000, stdout=out, environment={"NO_COLOR": "1"})
        seen.wait_for(has_count)
        assert seen.wait() == 0
        assert colour.search(re.sub(rb"\x1b\[1m", b"", seen.raw)) is None
    for variables, coloured in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        with terminal(lines=200) as seen:
            seen.start("-q", "doctor", "--root", tmp_path, environment=variables)
            assert seen.wait() == 1
            assert (colour.search(seen.raw) is not None) is coloured


def test_an_interrupt_leaves_nothing(small: Path, tmp_path: Path) -> None:
    """Neither on the terminal nor in the file system."""
    root = tmp_path / "root"
    vendor = root / "usr/share/igvm"
    vendor.mkdir(parents=True)
    shutil.copy(small, vendor / "0.igvm")
    for number in range(1, 60_000):  # more than are looked at before the interrupt comes
        os.link(vendor / "0.igvm", vendor / f"{number}.igvm")
    with terminal() as seen:
        seen.start("refresh", "--root", root)
        seen.wait_for(lambda text: BAR.search(text) is not None)
        seen.type(b"\x03")
        assert seen.wait() == 130, seen.text
        assert seen.text.replace("^C", "") in (
            "igvmfw: error: interrupted",
            "\nigvmfw: error: interrupted",
        )
        assert not seen.screen.cursor.hidden
    left = [path for path in (root / "usr/share/qemu").rglob("*") if path.is_file()]
    assert all(path.suffix == ".json" and not path.name.startswith(".") for path in left)


def test_an_end_by_signal_gives_the_cursor_back() -> None:
    read, write = os.pipe()
    try:
        with terminal() as seen:
            seen.start("measure", "-", stdin=read)  # waits for its input
            seen.wait_for(lambda text: "measuring -" in text)
            seen.process.send_signal(signal.SIGTERM)
            assert seen.wait() == 128 + signal.SIGTERM
            assert seen.text == ""
            assert not seen.screen.cursor.hidden
    finally:
        os.close(read)
        os.close(write)


def test_a_files_name_drives_no_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x\x1b]0;OWNED\x07\x1b[31mred\n.igvm"
    path.write_bytes(pages_apart(4 << 20))  # which take seconds to measure
    with terminal(columns=300) as seen:
        seen.start("measure", path, "--platform", "sev-snp", "--cpu", "EPYC-v4")
        assert seen.wait() == 0
        bar = seen.raw.partition(b"measuring ")[2].partition(b"igvm")[0]
        assert bar.endswith(rb"/x\x1b]0;OWNED\x07\x1b[31mred\n.")
        assert seen.screen.title == ""


def test_a_log_gets_plain_lines() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "igvmfw", "measure", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"},
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        begin = time.monotonic()
        assert process.stderr.readline() == b"igvmfw: measuring -\n"
        assert time.monotonic() - begin < SECONDS
        process.stdin.close()
        assert b"\x1b" not in process.stderr.read()
    assert process.returncode == 3


@pytest.mark.parametrize("words", [["inspect"], ["check", "--qemu", "10.2"], ["list", "--all"]])
def test_text_fits_the_terminal(words: list[str], ovmf: Path, tmp_path: Path) -> None:
    """At any width, nothing that has a space in it goes over the edge."""
    from igvmfw.cli import main

    file = tmp_path / "root/usr/share/igvm/a-rather-long-name.igvm"
    file.parent.mkdir(parents=True)
    made = ["wrap", str(ovmf), "-o", str(file), "--platform", "native", "--platform", "sev-es"]
    assert main(made) == 0
    assert main(["refresh", "--root", str(tmp_path / "root")]) == 0
    given = ["--root", tmp_path / "root"] if words[0] == "list" else [file]
    plain = subprocess.run(
        [sys.executable, "-m", "igvmfw", *words, *map(str, given)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for columns in (20, 40, 80):
        with terminal(columns=columns, lines=200) as seen:
            seen.start("-q", *words, *given)
            assert seen.wait() == 0
            for line in seen.raw.decode().split("\r\n"):
                assert len(line) <= columns or " " not in line.strip(), line
            # nothing is lost
            told = set(re.findall(r"[\w./-]+", seen.raw.decode()))
            assert told >= {w for w in re.findall(r"[\w./-]+", plain) if not w.isupper()}


def test_doctor_fits_too(tmp_path: Path) -> None:
    hosts.host(tmp_path, devices=())
    hosts.write(tmp_path / "etc/qemu/firmware/51-a\n  ok  forged.json", "{")
    with terminal(columns=40, lines=300) as seen:
        seen.start("-q", "doctor", "--root", tmp_path)
        assert seen.wait() == 1
        plain = re.sub(r"\x1b\[[0-9]*m", "", seen.raw.decode())
        assert r"51-a\n" in plain
        for line in plain.split("\r\n"):
            # commands stay whole, to be copied
            assert len(line) <= 40 or "→" in line or " " not in line.strip(), line
