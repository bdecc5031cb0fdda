"""Standard streams as shells give them: closed, full, left by their reader, in any encoding."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from tests.igvm import samples
from tests.qemu.test_descriptor import igvm_document
from tests.virt import domains

IGVMFW = f"{sys.executable} -m igvmfw"
FULL = "igvmfw: error: standard output: cannot write: No space left on device (check where it goes"
CLOSED = "igvmfw: error: standard output: cannot write: Bad file descriptor (check where it goes"
DOMAIN = "<domain type='kvm'><name>é</name><os><type arch='x86_64'>hvm</type></os></domain>"
# commands that print a result, by their words after the folder's files were made
PRINTING = (
    "--help",
    "--version",
    "inspect small.igvm",
    "inspect --pages --json small.igvm",
    "inspect small.igvm small.igvm",
    "check --qemu 10.2 small.igvm",
    "measure --platform sev small.igvm",
    "measure --bare --platform sev small.igvm",
    "wrap OVMF.fd -o -",
    "describe small.igvm",
    "validate descriptor.json",
    "validate --json descriptor.json",
    "install --dry-run --root . small.igvm",
    "refresh --dry-run --root .",
    "list --root . --all",
    "list --root . --all --json",
    "rewrite domain.xml",
    "restore domain.xml",
    "doctor --root .",
    "doctor --root . --json",
)


@pytest.fixture
def folder(tmp_path: Path, ovmf: Path) -> Path:
    file = tmp_path / "small.igvm"
    file.write_bytes(wrap(ovmf.read_bytes(), [Platform.NATIVE, Platform.SEV]))
    vendor = tmp_path / "usr/share/igvm/vendor.igvm"
    vendor.parent.mkdir(parents=True)
    vendor.write_bytes(file.read_bytes())
    (tmp_path / "OVMF.fd").symlink_to(ovmf)
    document = igvm_document()
    (tmp_path / "descriptor.json").write_text(json.dumps(document))
    installed = tmp_path / "etc/qemu/firmware/10-é.json"
    installed.parent.mkdir(parents=True)
    document["description"] = "é"
    installed.write_text(json.dumps(document))
    (tmp_path / "domain.xml").write_text(DOMAIN, encoding="utf-8")
    return tmp_path


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash, whose pipelines fail as any of their parts does."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        check=False,
        cwd=folder,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("words", PRINTING)
def test_a_result_that_cannot_be_written(words: str, folder: Path) -> None:
    full = shell(f"{IGVMFW} {words} >/dev/full", folder)
    assert full.returncode == 4
    assert FULL in full.stderr.decode().splitlines()[-1]
    closed = shell(f"{IGVMFW} {words} >&-", folder)
    assert closed.returncode == 4
    assert CLOSED in closed.stderr.decode().splitlines()[-1]
    assert shell(f"{IGVMFW} {words} >&- 2>&- <&-", folder).returncode == 4
    for done in (full, closed):
        assert b"Traceback" not in done.stderr
        assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("words", "unbuffered"), [*((words, "") for words in PRINTING), ("inspect small.igvm", "1")]
)
def test_a_reader_who_goes(words: str, unbuffered: str, folder: Path) -> None:
    """No word about it, and nothing that a script would take for a failure."""
    done = shell(f"{IGVMFW} {words} | exec true", folder, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode in (0, 1)  # who goes late enough lets the answer through
    assert b"Broken" not in done.stderr
    assert b"Exception" not in done.stderr


@pytest.mark.parametrize(
    ("redirections", "status"),
    [("2>/dev/full", 3), ("2>&-", 3), ("2>&1 >/dev/null | exec true", 3), ("2>&- <&-", 3)],
)
def test_messages_that_nobody_reads(redirections: str, status: int, folder: Path) -> None:
    """The work goes on, and its exit status says how it went."""
    command = f"{IGVMFW} inspect missing.igvm small.igvm {redirections}"
    done = shell(command, folder)
    assert done.returncode == status
    assert b"Traceback" not in done.stderr + done.stdout
    if ">/dev/null" not in redirections:
        assert done.stdout.startswith(b"small.igvm: IGVM revision")


def test_a_file_that_is_opened_never_gets_what_was_meant_for_a_stream(folder: Path) -> None:
    """With its standard streams closed, a process gives their numbers to what it opens."""
    before = (folder / "small.igvm").read_bytes()
    done = shell(f"{IGVMFW} wrap OVMF.fd -o out.igvm >&- 2>&- <&-", folder)
    assert done.returncode == 0
    assert (folder / "out.igvm").read_bytes().startswith(b"IGVM")
    assert shell(f"{IGVMFW} inspect small.igvm >&- 2>&- <&-", folder).returncode == 4
    assert (folder / "small.igvm").read_bytes() == before


def test_standard_input_that_is_closed(folder: Path) -> None:
    done = shell(f"{IGVMFW} inspect - <&-", folder)
    assert done.returncode == 3
    assert done.stderr.startswith(b"igvmfw: error: -: ")


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
@pytest.mark.parametrize("words", PRINTING)
def test_any_encoding(words: str, environment: dict[str, str], folder: Path) -> None:
    """Nothing fails for a character, and a document stays one."""
    done = shell(f"{IGVMFW} {words}", folder, **environment)
    assert done.returncode in (0, 1), done.stderr
    assert b"internal error" not in done.stderr
    if "--json" in words and "validate" not in words:
        assert json.loads(done.stdout)
    if words.startswith(("rewrite domain", "restore")):
        assert DOMAIN.encode() in done.stdout


def test_names_that_are_no_text(folder: Path) -> None:
    name = os.fsdecode(b"\xff\x1b[2J.igvm")
    (folder / "small.igvm").rename(folder / name)
    for encoding in ("utf-8", "ascii"):
        done = shell(f"{IGVMFW} inspect *.igvm", folder, PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr
        assert b"\x1b" not in done.stdout
        assert rb"\udcff\x1b[2J.igvm: IGVM" in done.stdout


def test_quiet_drops_notes_alone(folder: Path) -> None:
    for words in ("-q wrap", "wrap -q", "--quiet wrap"):
        done = shell(f"{IGVMFW} {words} OVMF.fd -o out.igvm", folder)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    told = shell(f"{IGVMFW} wrap OVMF.fd -o out.igvm", folder)
    assert told.stderr.startswith(b"wrote out.igvm")
    loud = shell(f"{IGVMFW} -q inspect missing.igvm small.igvm", folder)
    assert loud.stderr.startswith(b"igvmfw: warning: missing.igvm: ")
    assert loud.stdout
    assert shell(f"{IGVMFW} -q inspect missing.igvm", folder).stderr.startswith(b"igvmfw: error: ")


WRITING = ["wrap", "describe", "rewrite", "map"]


def writing(command: str, tmp_path: Path, output: Path) -> list[str]:
    """The command that writes a file of its kind to some place."""
    image, firmware, domain = (tmp_path / name for name in ("a.igvm", "raw.fd", "domain.xml"))
    image.write_bytes(samples.small())
    firmware.write_bytes(bytes(4096 - 16) + b"\xf4" * 16)  # hlt where a processor starts
    domain.write_text(domains.EFI)
    words = {
        "wrap": ["wrap", firmware, "-o", output],
        "describe": ["describe", "--interface", "uefi", image, "-o", output],
        "rewrite": ["rewrite", domain, "-o", output],
        "map": ["inspect", "--map", output, image],
    }[command]
    return [sys.executable, "-m", "igvmfw", *map(str, words)]


@pytest.mark.parametrize("command", WRITING)
def test_a_pipe_or_device_takes_the_output_and_stays(command: str, tmp_path: Path) -> None:
    """As root a command told to write to /dev/null would else put a file in its place."""
    whole, pipe = tmp_path / "whole.svg", tmp_path / "pipe.svg"
    subprocess.run(writing(command, tmp_path, whole), check=True, capture_output=True)
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        subprocess.run(writing(command, tmp_path, pipe), check=True, capture_output=True)
        assert reader.communicate(timeout=60)[0] == whole.read_bytes()
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


@pytest.mark.parametrize("command", WRITING)
def test_a_link_stays_one_and_what_it_leads_to_is_written(command: str, tmp_path: Path) -> None:
    link, target = tmp_path / "link.svg", tmp_path / "there"
    link.symlink_to(target)
    for _ in range(2):  # a new file, and an old one
        subprocess.run(writing(command, tmp_path, link), check=True, capture_output=True)
        assert link.is_symlink()
        assert target.stat().st_size
        target.write_bytes(b"")
