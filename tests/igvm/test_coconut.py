"""Real COCONUT-SVSM images: what is in them, what QEMU makes of them, what they measure."""

import lzma
import re
import subprocess
from pathlib import Path

import pytest

from igvmfw.check import check_image
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import Vmm, launch_digest
from igvmfw.igvm.payload import identify
from igvmfw.platforms import Platform
from igvmfw.qemu.acceptance import acceptance_of
from igvmfw.qemu.emulator import probe

DATA = Path(__file__).parents[1] / "data" / "coconut"
VERSION = "2026.07-devel-113-gf4bc4bcd+"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("coconut-qemu-native.igvm", tmp_path_factory)


@pytest.fixture(scope="module")
def snp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("coconut-qemu-vtpm-snp-ovmf.igvm", tmp_path_factory)


def unpacked(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("coconut") / name
    path.write_bytes(lzma.decompress((DATA / f"{name}.xz").read_bytes()))
    return path


def test_the_svsm_its_version_and_its_services_are_found(native: Path, snp: Path) -> None:
    plain = identify(IgvmFile.parse(native.read_bytes()))
    assert (plain.platform, plain.svsm, plain.svsm_version) == (
        Platform.NATIVE, "COCONUT-SVSM", VERSION,
    )  # fmt: skip
    assert (plain.firmware, plain.vtpm, plain.persistence) == (None, False, False)
    full = identify(IgvmFile.parse(snp.read_bytes()))
    assert (full.platform, full.svsm, full.svsm_version) == (
        Platform.SEV_SNP, "COCONUT-SVSM", VERSION,
    )  # fmt: skip
    assert (full.firmware, full.vtpm, full.persistence) == ("OVMF", True, False)


def test_reading_and_writing_gives_the_same_bytes(native: Path, snp: Path) -> None:
    for path in (native, snp):
        data = path.read_bytes()
        assert IgvmFile.parse(data).write() == data


def test_check_names_the_header_that_qemu_names(native: Path, igvm_qemu: Path) -> None:
    emulator = probe(igvm_qemu)
    image = IgvmFile.parse(native.read_bytes())
    findings = check_image(image, Platform.NATIVE, acceptance_of(emulator.version))
    first = next(finding for finding in findings if finding.rule == "header-unknown")
    done = subprocess.run(
        [igvm_qemu, "-machine", "q35,igvm-cfg=igvm0", "-m", "512", "-nodefaults", "-display",
         "none", "-vga", "none", "-L", "/usr/share/seabios", "-S",
         "-object", f"igvm-cfg,id=igvm0,file={native}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    said = re.search(r"IGVM: Unknown header type .*\(type 0x\w+\)", done.stderr)
    assert said is not None, done.stderr
    assert said.group() in first.message


def test_the_digest_is_the_reference_crates(snp: Path, reference: Path) -> None:
    done = subprocess.run(
        [reference], input=str(snp), capture_output=True, text=True, check=True, timeout=60
    )
    stated = set(re.findall(r"\tdigest \w+ 2 ([0-9a-f]{96})", done.stdout))
    image = IgvmFile.parse(snp.read_bytes())
    assert {launch_digest(image, Platform.SEV_SNP, vmm=Vmm.SPEC).hex()} == stated
