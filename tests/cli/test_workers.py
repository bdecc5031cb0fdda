"""Many files are shared among processes: nobody sees it but by the time it takes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igvmfw.cli.workers import MANY, each
from igvmfw.errors import DescriptorError, HostError
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from tests.cli.terminal import terminal
from tests.igvm import samples

COMMAND = [sys.executable, "-m", "igvmfw", "inspect"]


@pytest.fixture
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Many files of two kinds, among them one that is damaged and one that is missing."""
    kinds = (samples.small(Platform.SEV_SNP), samples.small(Platform.SEV, Platform.NATIVE))
    names = [f"{number}.igvm" for number in range(MANY + 50)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(kinds[number % 3 == 0])
    (tmp_path / names[77]).write_bytes(kinds[0][:-1])
    (tmp_path / names[MANY]).unlink()
    return [str(tmp_path / name) for name in names]


def inspect(*words: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_many_files_are_told_of_as_few_are(files: list[str]) -> None:
    few = [inspect(*files[start : start + 50]) for start in range(0, len(files), 50)]
    many = inspect(*files)
    assert many.stdout == "".join(done.stdout for done in few)
    warnings = [line for line in many.stderr.splitlines() if "inspecting" not in line]
    assert warnings == "".join(done.stderr for done in few).splitlines()
    assert files[77] in warnings[0]
    assert files[MANY] in warnings[1]
    assert many.returncode == 3

    documents = json.loads(inspect("--json", *files).stdout)
    assert documents == [
        document
        for start in range(0, len(files), 50)
        for document in json.loads(inspect("--json", *files[start : start + 50]).stdout)
    ]


def test_an_interrupt_ends_all(ovmf: Path, tmp_path: Path) -> None:
    image = tmp_path / "ovmf.igvm"
    image.write_bytes(wrap(ovmf.read_bytes(), [Platform.SEV]))
    with terminal() as seen, (tmp_path / "out").open("wb") as out:
        seen.start("inspect", *[image] * 15_000, stdout=out)
        seen.wait_for(lambda text: "inspecting" in text)
        seen.type(b"\x03")
        assert seen.wait() == 130
        assert seen.text.replace("^C", "").strip() == "igvmfw: error: interrupted"


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def test_nothing_is_left_of_one_that_is_killed(files: list[str], tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen([*COMMAND, *files * 100], stdout=out, stderr=out)
        deadline = time.monotonic() + 60
        while len(left := children(process.pid)) < 2:
            assert time.monotonic() < deadline, "no process shares the work"
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in left):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.01)


def doubled(number: int) -> int:
    return 2 * number


def refusing(number: int) -> int:
    if number == MANY:
        raise DescriptorError("no", where="here")
    return number


def dying(number: int) -> int:
    if number == MANY:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.usefixtures("two_processors")
def test_results_come_in_order() -> None:
    assert list(each(doubled, range(5 * MANY))) == list(range(0, 10 * MANY, 2))


@pytest.mark.usefixtures("two_processors")
def test_an_error_is_raised_where_the_results_go() -> None:
    with pytest.raises(DescriptorError, match=r"^here: no$"):
        list(each(refusing, range(2 * MANY)))


@pytest.mark.usefixtures("two_processors")
def test_a_process_that_is_killed_is_named() -> None:
    with pytest.raises(HostError, match="was ended from outside"):
        list(each(dying, range(2 * MANY)))
