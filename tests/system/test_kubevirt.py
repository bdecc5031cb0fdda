"""What KubeVirt's hook answers, given to real libvirt as virt-launcher gives it, and started."""

import json
import subprocess
from pathlib import Path

import pytest

from igvmfw.platforms import Platform
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import Record
from tests.system.guests import wrap
from tests.test_kubevirt import domain, hook, vmi
from tests.testbed.standin import SevEmulator

GUEST = "default_igvm-guest"


def virsh(uri: str, *words: str | Path) -> str:
    command = ["virsh", "-q", "-c", uri, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def define(uri: str, emulator: Path, platform: str, file: Path, folder: Path) -> Domain:
    """Through the hook, then into libvirt; virt-launcher defines without the schema."""
    written = domain(platform, emulator=emulator, machine="q35")
    written = written.replace("1073741824", "268435456")
    xml = folder / "domain.xml"
    xml.write_bytes(hook(vmi(platform, file, file.parent), written))
    virsh(uri, "define", xml)
    return Domain.parse(virsh(uri, "dumpxml", "--inactive", GUEST).encode())


def test_a_plain_guest_starts(
    uri: str, kvm: None, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    file = wrap(ovmf, tmp_path / "ovmf.igvm")
    defined = define(uri, igvm_qemu, "native", file, tmp_path)
    assert f"igvm-cfg,id=igvm0,file={file}" in defined.arguments
    virsh(uri, "start", "--paused", GUEST)
    devices = json.loads(
        virsh(uri, "qemu-monitor-command", GUEST, '{"execute": "qom-get", "arguments": '
              '{"path": "/objects/igvm0", "property": "file"}}')
    )  # fmt: skip
    assert devices["return"] == str(file)


@pytest.mark.parametrize("platform", [Platform.SEV, Platform.SEV_ES])
def test_a_protected_guest_is_launched_as_recorded(
    uri: str, sev_emulator: SevEmulator, ovmf: Path, tmp_path: Path, platform: Platform
) -> None:
    file = wrap(ovmf, tmp_path / "ovmf.igvm", "--platform", platform, "--vcpus", "2")
    defined = define(uri, sev_emulator.path, platform, file, tmp_path)
    virsh(uri, "start", "--paused", GUEST)
    launched = sev_emulator.wait_for("measure")
    kept = Record.find(defined)
    assert kept is not None
    assert kept.file is not None
    assert launched.digest is not None
    assert kept.file.measurement == launched.digest.hex()
    assert launched.policy == (0x5 if platform is Platform.SEV_ES else 0x1)
