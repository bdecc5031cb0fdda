"""The digest computed from a file is the one of a launch: QEMU's, recorded by the SEV stand-in."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from igvmfw.errors import RefusedError
from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import GuestPolicy, RequiredMemory
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import Vmm, launch_digest, launch_updates, launch_vmsas
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from igvmfw.qemu.cpus import signature
from tests.igvm import samples
from tests.parts import need
from tests.testbed.cache import printed
from tests.testbed.standin import LaunchRecord, SevEmulator, make_emulator

CPU = "EPYC-v4"
OBJECTS = {
    Platform.SEV: "sev-guest,id=sev0,policy=1",
    Platform.SEV_ES: "sev-guest,id=sev0,policy=5",
    Platform.SEV_SNP: "sev-snp-guest,id=sev0,policy=0x30000",
}


def launch(
    emulator: SevEmulator, file: Path, platform: Platform, vcpus: int, tmp_path: Path
) -> LaunchRecord:
    """Launch a guest from a file, up to the end of its measuring."""
    guest = f"{OBJECTS[platform]},cbitpos=0,reduced-phys-bits=1"
    snp = platform is Platform.SEV_SNP
    command = [
        str(emulator.path), "-accel", "kvm", "-cpu", CPU, "-smp", str(vcpus), "-m", "512",
        "-machine", "q35,confidential-guest-support=sev0,igvm-cfg=igvm0",
        "-object", guest, "-object", f"igvm-cfg,id=igvm0,file={file}",
        "-nodefaults", "-display", "none", "-vga", "none", "-L", "/usr/share/seabios",
        *([] if snp else ["-S"]),  # SEV-SNP's updates happen when the guest begins to run
    ]  # fmt: skip
    log = tmp_path / "qemu.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        for _ in range(40):
            try:
                return emulator.wait_for("snp_finish" if snp else "measure", seconds=0.5)
            except TimeoutError:
                assert process.poll() is None, log.read_text()
        raise AssertionError(f"no launch: {log.read_text()}")
    finally:
        process.kill()
        process.wait()


# QEMU 11.0 cannot launch the others (docs/check.md, sev-launch)
LAUNCHES = [*(("10.2", platform) for platform in OBJECTS), ("11.0", Platform.SEV_SNP)]


@pytest.mark.parametrize("vcpus", [1, 2, 5])
@pytest.mark.parametrize(("release", "platform"), LAUNCHES)
@pytest.mark.parametrize("image", ["wrapped", "small"])
def test_digest_is_the_launch_records(
    platform: Platform,
    vcpus: int,
    image: str,
    release: str,
    dev_sev: None,
    ovmf: Path,
    tmp_path: Path,
) -> None:
    qemu = printed("build-qemu.sh", release)
    need(qemu.exists(), f"QEMU {release} with IGVM support")
    sev_emulator = make_emulator(tmp_path, qemu)
    file = tmp_path / "guest.igvm"
    if image == "wrapped":
        data = wrap(ovmf.read_bytes(), [Platform.NATIVE, platform], vcpus=vcpus)
    else:  # a parameter area, pages of zeroes; a VP context for vCPU 0 alone
        data = samples.small(Platform.NATIVE, platform)
    file.write_bytes(data)
    parsed = IgvmFile.parse(data)
    record = launch(sev_emulator, file, platform, vcpus, tmp_path)
    cpu = signature(CPU)

    expected = list(launch_updates(parsed, platform, Vmm.QEMU))
    if platform is not Platform.SEV_SNP:
        # QEMU's own bytes, hashed by nobody but the standard library
        measured = b"".join(bytes(page) for update in expected for page in update.pages)
        assert hashlib.sha256(record.data).digest() == hashlib.sha256(measured).digest()
    assert [len(update.data) for update in record.updates] == [
        4096 * len(update.pages) for update in expected
    ]
    if platform is not Platform.SEV:
        vmsas = list(launch_vmsas(parsed, platform, vcpus, cpu))
        assert [vcpu.page for vcpu in record.vcpus] == [vmsa.content for vmsa in vmsas]
    assert record.digest is not None
    assert record.digest == launch_digest(parsed, platform, vcpus=vcpus, cpu_signature=cpu)


def with_required(*, after: bool, pending: bool = False) -> bytes:
    """A SEV-SNP file with required memory before or after the page in it."""
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.SEV_SNP, 1))
    builder.add(GuestPolicy(0x30000, 1))
    addresses = (0x5000, 0x10_0000) if pending else (0x10_0000, 0x5000)
    if not after:
        builder.add(RequiredMemory(0x10_0000, 1, 0x4000))
    for gpa in addresses:
        builder.add_page(gpa, 1, samples.PAGE)
    if after:
        builder.add(RequiredMemory(0x10_0000, 1, 0x4000))
    return builder.build()


@pytest.mark.parametrize("release", ["10.2", "11.0"])
@pytest.mark.parametrize(
    ("after", "pending", "discarded"),
    [(False, False, False), (True, True, False), (True, False, True)],
)
def test_required_memory_discards_what_was_loaded_before(
    after: bool, pending: bool, discarded: bool, release: str, dev_sev: None, tmp_path: Path
) -> None:
    """QEMU launches zeroes then, so that no digest of the file's contents would be the launch's."""
    qemu = printed("build-qemu.sh", release)
    need(qemu.exists(), f"QEMU {release} with IGVM support")
    file = tmp_path / "guest.igvm"
    file.write_bytes(with_required(after=after, pending=pending))
    image = IgvmFile.parse(file.read_bytes())
    record = launch(make_emulator(tmp_path, qemu), file, Platform.SEV_SNP, 1, tmp_path)
    (page,) = [update.data for update in record.updates if update.gpa == 0x10_0000]
    assert any(page) != discarded
    if discarded:
        with pytest.raises(RefusedError, match="QEMU launches zeroes"):
            launch_digest(image, Platform.SEV_SNP, cpu_signature=signature(CPU))
    else:
        own = launch_digest(image, Platform.SEV_SNP, cpu_signature=signature(CPU))
        assert record.digest == own


def test_one_changed_byte_changes_the_digest(
    sev_emulator: SevEmulator, ovmf: Path, tmp_path: Path
) -> None:
    data = bytearray(wrap(ovmf.read_bytes(), [Platform.SEV]))
    before = launch_digest(IgvmFile.parse(data), Platform.SEV)
    data[-1] ^= 1  # file data: no checksum covers it
    file = tmp_path / "changed.igvm"
    file.write_bytes(data)
    record = launch(sev_emulator, file, Platform.SEV, 1, tmp_path)
    assert record.digest == launch_digest(IgvmFile.parse(data), Platform.SEV)
    assert record.digest != before
