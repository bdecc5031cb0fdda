"""doctor beside a real libvirt: a daemon with the hook, and a host that seems to have SEV."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from igvmfw.machine import look
from igvmfw.platforms import Platform
from tests.parts import need_libvirt
from tests.system.daemons import Daemon, install_hook, serving
from tests.testbed.standin import SevEmulator


@pytest.fixture
def running() -> Iterator[Daemon]:
    with serving() as daemon:
        yield daemon


def doctor(*words: str, before: tuple[str, ...] = (), **environment: str) -> dict[str, Any]:
    """The lines, by name."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "igvmfw", "doctor", "--json", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
        env={**os.environ, **environment},
    )
    assert done.returncode in (0, 1), done.stderr
    return {line["name"]: line for line in json.loads(done.stdout)["lines"]}


def test_a_daemon_and_its_hook(running: Daemon) -> None:
    need_libvirt()
    pid = (running.root / "run/libvirtd.pid").read_text().strip()
    inside = ("nsenter", f"--target={pid}", "--mount")

    def inspect() -> dict[str, Any]:
        return doctor("-c", running.uri, before=inside)

    lines = inspect()
    assert lines["connection"]["status"] == "ok"
    said = running.virsh("version").out
    assert lines["connection"]["found"].split()[1] in said
    assert [lines[name]["status"] for name in ("installed", "python", "active")] == ["ok"] * 3
    assert f"libvirtd (process {pid})" in lines["active"]["found"]
    # a hook that came after the daemon
    install_hook(running.hook, "/bin/false")
    lines = inspect()
    assert lines["active"]["status"] == "unknown"
    assert lines["active"]["remedy"] == "systemctl reload libvirtd"
    assert lines["python"]["status"] == "wrong"
    assert "/bin/false cannot load igvmfw" in lines["python"]["found"]
    running.off.touch()
    assert inspect()["installed"]["remedy"] == "rm /etc/libvirt/hooks/igvmfw.off"
    running.hook.chmod(0o644)
    assert inspect()["installed"]["remedy"] == "chmod 755 /etc/libvirt/hooks/qemu.d/igvmfw"
    running.hook.unlink()
    lines = inspect()
    assert lines["installed"]["status"] == "missing"
    assert not lines["installed"]["fails"]
    # seen from outside, this daemon has nothing to do with the host's hooks
    assert f"process {pid}" not in json.dumps(doctor("-c", running.uri))


@pytest.mark.usefixtures("dev_sev")
def test_a_host_that_seems_to_have_sev(uri: str, sev_emulator: SevEmulator, tmp_path: Path) -> None:
    """libvirt's own words about the stand-in, which is its default emulator here."""
    (tmp_path / "qemu-system-x86_64").symlink_to(sev_emulator.path)
    lines = doctor("-c", uri, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert lines["offers-sev"]["status"] == "ok"
    # how many SEV-ES guests can run, libvirt asks the processor itself (CPUID)
    cpuid = look().cpuid
    own = cpuid is not None and cpuid.asids(Platform.SEV_ES) > 0
    assert (lines["offers-sev-es"]["status"] == "ok") is own
    assert lines["igvm"]["status"] == "ok"
    assert lines["kvm"]["status"] == "ok"  # root's embedded driver runs QEMU as root
    # what stands for the device is a file: libvirt does not mind, a guest would
    assert lines["dev-sev"]["status"] == ("ok" if Path("/dev/sev").is_char_device() else "wrong")
