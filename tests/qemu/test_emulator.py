import os
import shutil
import time
from pathlib import Path

import pytest

from igvmfw.errors import EmulatorError
from igvmfw.qemu import emulator
from igvmfw.qemu.acceptance import ANY_RELEASE
from tests.parts import need


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_distributions_emulator_answers() -> None:
    found = shutil.which("qemu-system-x86_64")
    need(found is not None, "qemu-system-x86_64 in PATH")
    probed = emulator.probe(Path(str(found)))
    assert probed.version >= (7, 0, 0)
    assert probed.version_text in emulator.run_bounded(probed.path, "--version", seconds=10).stdout


def test_an_emulator_with_igvm(igvm_qemu: Path) -> None:
    probed = emulator.probe(igvm_qemu)
    assert probed.igvm
    assert probed.version >= emulator.FIRST_IGVM
    probed.require_igvm()


def test_a_build_that_takes_igvm_files_before_qemu_did(tmp_path: Path) -> None:
    """COCONUT-SVSM's QEMU is such a one."""
    fork = script(tmp_path / "qemu", "echo 'QEMU emulator version 9.1.50'; echo '  file=<string>'")
    assert emulator.probe(fork).acceptance == ANY_RELEASE
    assert emulator.host_acceptance(fork) == ANY_RELEASE


def test_properties_of_a_machine(igvm_qemu: Path) -> None:
    found = shutil.which("qemu-system-x86_64")
    need(found is not None, "qemu-system-x86_64 in PATH")
    ours = emulator.machine_properties(igvm_qemu, "q35")
    assert {"igvm-cfg", "confidential-guest-support", "vmport"} <= ours
    theirs = emulator.machine_properties(Path(str(found)), None)
    assert {"confidential-guest-support", "vmport"} <= theirs
    assert "igvm-cfg" not in emulator.machine_properties(igvm_qemu, "microvm")
    # COCONUT-SVSM's QEMU alone has it, and its output has the same form
    for properties in (ours, theirs):
        assert "x-svsm-virtio-mmio" not in properties
    for machine in ("no-such", "q35,help", "-version"):
        with pytest.raises(EmulatorError, match="has no machine type"):
            emulator.machine_properties(igvm_qemu, machine)


def test_find_follows_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        script(directory / "qemu-system-x86_64", "exit 1")
    (second / "qemu-system-aarch64").write_text("not executable")
    monkeypatch.setenv("PATH", f"{second}:{first}")
    found = emulator.find()
    assert found[:2] == (second / "qemu-system-x86_64", first / "qemu-system-x86_64")
    assert emulator.find("aarch64") == ()


ANSWERS = """
case "$*" in
    --version) echo "QEMU emulator version {version} (Debian 1:{version}+dfsg-1)" ;;
    *) {igvm} ;;
esac
"""


@pytest.mark.parametrize(
    ("version", "igvm", "expected", "complaint"),
    [
        ("10.2.2", "echo '  file=<string>'", (10, 2, 2), None),
        ("11.0", "echo '  file=<string>'", (11, 0, 0), None),
        ("10.2.0", "exit 1", (10, 2, 0), "built without IGVM"),
        ("7.2.22", "exit 1", (7, 2, 22), "too old"),
        ("10.2.0", "true", (10, 2, 0), "built without IGVM"),
    ],
)
def test_versions_and_igvm(
    tmp_path: Path,
    version: str,
    igvm: str,
    expected: tuple[int, int, int],
    complaint: str | None,
) -> None:
    path = script(tmp_path / "qemu", ANSWERS.format(version=version, igvm=igvm))
    probed = emulator.probe(path)
    assert probed.version == expected
    assert probed.igvm is (complaint is None)
    if complaint is None:
        probed.require_igvm()
    else:
        with pytest.raises(EmulatorError, match=complaint) as caught:
            probed.require_igvm()
        assert caught.value.where == str(path)
        assert "libigvm" in str(caught.value)


@pytest.mark.parametrize("text", ["exit 0", "echo hello; exit 0", "echo gone >&2; exit 3"])
def test_what_is_not_qemu(tmp_path: Path, text: str) -> None:
    with pytest.raises(EmulatorError, match="does not answer as QEMU does"):
        emulator.probe(script(tmp_path / "qemu", text))


def test_what_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(EmulatorError, match="cannot run: No such file"):
        emulator.probe(tmp_path / "missing")
    plain = tmp_path / "plain"
    plain.write_text("text")
    with pytest.raises(EmulatorError, match="cannot run: Permission denied"):
        emulator.probe(plain)


def _is_left(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    "text", ["exec sleep 30", "sleep 30 & echo hello; sleep 30", "sleep 30 & exit 0"]
)
def test_an_emulator_that_hangs(tmp_path: Path, text: str) -> None:
    """Also one whose children hold its output open; none of them is left."""
    pids = tmp_path / "pids"
    path = script(tmp_path / "qemu", f"echo $$ > {pids}\n{text}")
    with pytest.raises(EmulatorError, match="did not answer within 1 seconds"):
        emulator.probe(path, seconds=1)
    deadline = time.monotonic() + 30
    while _is_left(int(pids.read_text())):  # who is killed is gone when somebody has reaped it
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_emulator_that_never_stops_talking(tmp_path: Path) -> None:
    with pytest.raises(EmulatorError, match="does not answer as QEMU does: y"):
        emulator.probe(script(tmp_path / "qemu", "exec yes"))


@pytest.mark.parametrize(("mode", "may"), [(0o755, True), (0o775, False), (0o757, False)])
def test_one_that_others_can_write_to_is_not_to_be_run(
    tmp_path: Path, mode: int, may: bool
) -> None:
    path = script(tmp_path / "qemu", "true")
    path.chmod(mode)
    assert emulator.may_run(path) is may


def test_the_environment_does_not_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/nowhere.so")
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    path = script(tmp_path / "qemu", 'echo "QEMU emulator version 9.0.0 $LD_PRELOAD $LC_ALL"')
    assert emulator.run_bounded(path, seconds=10).stdout.split()[-1] == "C"
