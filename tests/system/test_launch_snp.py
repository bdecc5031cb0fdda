"""SEV-SNP guests from an IGVM file, through a libvirt that knows them."""

from pathlib import Path

import pytest

from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import launch_digest
from igvmfw.platforms import Platform
from igvmfw.qemu.cpus import signature
from tests.system.guests import domain, igvmfw, wrap
from tests.testbed.standin import SevEmulator

CPU = "EPYC-Milan"
MODEL = f"<cpu mode='custom' match='exact' check='none'><model>{CPU}</model></cpu>"
SECURITY = "<launchSecurity type='sev-snp'><policy>0x30000</policy></launchSecurity>"


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_guest_starts_and_is_measured_as_its_file_says(
    newer_libvirt: str, sev_emulator: SevEmulator, ovmf: Path, tmp_path: Path, vcpus: int
) -> None:
    file = wrap(ovmf, sev_emulator.path.parent / "snp.igvm", "--platform", "sev-snp")
    xml = tmp_path / "guest.xml"
    name = f"snp-{vcpus}"
    asked = domain(sev_emulator.path, file, name=name, vcpus=vcpus, security=SECURITY)
    xml.write_text(asked.replace("<features>", f"{MODEL}<features>"))
    created = igvmfw("create", "-c", newer_libvirt, xml)
    assert created.code == 0, created.err

    record = sev_emulator.wait_for("snp_finish")
    assert record.policy == 0x30000
    assert len(record.vcpus) == vcpus
    image = IgvmFile.parse(file.read_bytes())
    expected = launch_digest(image, Platform.SEV_SNP, vcpus=vcpus, cpu_signature=signature(CPU))
    assert record.digest == expected
