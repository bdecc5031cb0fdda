"""Wrapping, judged by igvm-inspect, igvm-wrap and sev-snp-measure."""

import contextlib
import struct
import subprocess
import uuid
from collections import Counter
from pathlib import Path

import pytest
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vmsa import VMSA

from igvmfw.errors import FirmwareError, UsageError
from igvmfw.igvm.headers import GuestPolicy, PageData, VpContext
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.vpcontext import Vmsa
from igvmfw.igvm.wrap import RESET_ADDRESS, reset_vmsa, wrap
from igvmfw.platforms import Platform

NATIVE, SEV, SEV_ES, SNP = (
    Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP,
)  # fmt: skip


def inspect(peers: Path, file: Path) -> list[str]:
    """igvm-inspect's lines; it exits 0 on damaged files, so what it says of errors counts too."""
    done = subprocess.run(
        [peers / "igvm-inspect", file], capture_output=True, text=True, check=True, timeout=60
    )
    assert "ERROR" not in done.stderr, done.stderr
    assert done.stdout
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "platforms", [[NATIVE], [SEV], [SEV_ES], [SNP], [NATIVE, SEV, SEV_ES, SNP]], ids=str
)
def test_igvm_inspect_reads_it(
    platforms: list[Platform], ovmf_bytes: bytes, peers: Path, tmp_path: Path
) -> None:
    file = tmp_path / "wrapped.igvm"
    file.write_bytes(wrap(ovmf_bytes, platforms, vcpus=4))
    lines = inspect(peers, file)
    shown = [line.split()[1].rstrip(",") for line in lines if line.startswith("platform:")]
    assert shown == [platform.upper().replace("-", "_") for platform in platforms]
    contexts = Counter(line.split(":")[0] for line in lines if "VpContext" in line)
    assert contexts["SnpVpContext"] == 4 * (SEV_ES in platforms) + (SNP in platforms)


@pytest.mark.parametrize("platforms", [[NATIVE], [SNP], [NATIVE, SNP]], ids=str)
@pytest.mark.parametrize("image", ["ovmf", "ovmf_with_parameters"])
def test_pages_are_those_of_igvm_wrap(
    platforms: list[Platform],
    image: str,
    peers: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    firmware: Path = request.getfixturevalue(image)
    ours, theirs = tmp_path / "ours.igvm", tmp_path / "theirs.igvm"
    ours.write_bytes(wrap(firmware.read_bytes(), platforms))
    flags = ["--native" if NATIVE in platforms else "--no-native"]
    flags += ["--snp"] if SNP in platforms else []
    subprocess.run(
        [peers / "igvm-wrap", *flags, "-i", firmware, "-o", theirs], check=True, timeout=60,
        capture_output=True,
    )  # fmt: skip
    # what differs, and why:
    #   highest_vtl: igvm-wrap says 2; igvm_defs wants 0 where a platform has no VTLs
    #   the SNP VMSA: ours holds what KVM will make of it (CR4.MCE, RFLAGS bit 1, LDTR), so that
    #     the file's own digest is the launch's; it stands last, where KVM measures it
    #   mask bits of SNP alone: igvm-wrap always takes bit 1
    own, other = (IgvmFile.parse(file.read_bytes()) for file in (ours, theirs))
    for platform in platforms:
        assert memory(own, platform) == memory(other, platform)
        assert others(own, platform) == others(other, platform)
    if platforms == [NATIVE, SNP]:  # the same masks: an independent reader sees the same pages
        assert pages_shown(inspect(peers, ours)) == pages_shown(inspect(peers, theirs))


def memory(image: IgvmFile, platform: Platform) -> dict[int, tuple[int, int, bytes]]:
    pages: dict[int, tuple[int, int, bytes]] = {}
    for header in image.for_platform(platform):
        if isinstance(header, PageData):
            assert header.gpa not in pages
            data = bytes(image.data_of(header)).ljust(4096, b"\0")
            pages[header.gpa] = (header.flags, header.data_type, data)
    return pages


def others(image: IgvmFile, platform: Platform) -> list[str]:
    """Everything of a platform but its pages and contexts; masks are each file's own."""
    left = [
        header
        for header in image.for_platform(platform)
        if not isinstance(header, PageData | VpContext)
    ]
    return sorted(
        str(h.replace(compatibility_mask=0) if hasattr(h, "compatibility_mask") else h)
        for h in left
    )


def pages_shown(lines: list[str]) -> list[str]:
    shown = [line.replace(", empty", "") for line in lines if line.startswith("PageData")]
    assert shown
    return shown


@pytest.mark.parametrize(
    "flags", [[], ["--snp"], ["--no-native", "--snp"], ["--flat32"], ["--snp", "--flat32"]], ids=str
)
def test_what_igvm_wrap_writes_is_written_back_byte_for_byte(
    flags: list[str], ovmf: Path, peers: Path, tmp_path: Path
) -> None:
    file = tmp_path / "theirs.igvm"
    subprocess.run(
        [peers / "igvm-wrap", *flags, "-i", ovmf, "-o", file], check=True, timeout=60,
        capture_output=True,
    )  # fmt: skip
    data = file.read_bytes()
    assert IgvmFile.parse(data).write() == data


def test_parameters_reach_native_and_snp_but_not_sev(ovmf_with_parameters: Path) -> None:
    image = IgvmFile.parse(wrap(ovmf_with_parameters.read_bytes(), [NATIVE, SEV, SEV_ES, SNP]))
    names = {
        platform: [type(h).__name__ for h in image.for_platform(platform)]
        for platform in image.supported
    }
    inserts = {platform for platform, kinds in names.items() if "ParameterInsert" in kinds}
    assert inserts == {NATIVE, SNP}
    (insert,) = (h for h in image.headers if type(h).__name__ == "ParameterInsert")
    area: int = insert.gpa  # type: ignore[union-attr]
    # a measured page of zeroes is how OVMF learns on SEV that no memory map was given
    assert memory(image, SEV)[area] == (0, 0, bytes(4096))
    assert area not in memory(image, SNP)


def test_vmsas_are_those_of_sev_snp_measure(ovmf_bytes: bytes) -> None:
    reset_block = 0x0080_B004  # of Debian's OVMF.fd; read from its table by the next assertion
    image = IgvmFile.parse(wrap(ovmf_bytes, [SEV_ES, SNP], vcpus=3))
    own = [bytes(image.data_of(h)) for h in image.for_platform(SEV_ES) if isinstance(h, VpContext)]
    assert Vmsa.parse(own[1]).segment("cs").base | Vmsa.parse(own[1]).register("rip") == reset_block
    expected = VMSA(SevMode.SEV_ES, reset_block, 0, 0).pages(3)
    assert own == [bytes(page) for page in expected]
    snp = [bytes(image.data_of(h)) for h in image.for_platform(SNP) if isinstance(h, VpContext)]
    assert snp == [bytes(page) for page in VMSA(SevMode.SEV_SNP, 0, 0, 1).pages(1)]
    signed = reset_vmsa(RESET_ADDRESS, sev_features=1, rdx=0x00A0_0F11)
    assert signed.content == bytes(next(VMSA(SevMode.SEV_SNP, 0, 0x00A0_0F11, 1).pages(1)))


def test_policy_by_option(ovmf_bytes: bytes) -> None:
    def policies(given: dict[Platform, int]) -> dict[int, int]:
        image = IgvmFile.parse(wrap(ovmf_bytes, [SEV, SNP], policies=given))
        return {
            h.compatibility_mask: h.policy
            for h in image.initializations
            if isinstance(h, GuestPolicy)
        }

    assert policies({}) == {2: 0x30000}
    assert policies({SEV: 3, SNP: 0xB0000}) == {1: 3, 2: 0xB0000}


def test_variable_store_goes_right_below_the_firmware(ovmf_bytes: bytes) -> None:
    variables = bytes(range(256)) * 64
    image = IgvmFile.parse(wrap(ovmf_bytes, [NATIVE], variables=variables))
    base = (1 << 32) - len(ovmf_bytes) - len(variables)
    pages = memory(image, NATIVE)
    assert b"".join(pages[base + at][2] for at in range(0, 16384, 4096)) == variables


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, (64 << 20) + 4096])
def test_what_is_no_firmware_is_refused(size: int) -> None:
    with pytest.raises(FirmwareError, match="must be a multiple of 4096"):
        wrap(bytes(size), [NATIVE])


@pytest.mark.parametrize("blank", [b"\0", b"\xff"])
def test_firmware_that_no_processor_starts_in_is_refused(blank: bytes, ovmf_bytes: bytes) -> None:
    variables = Path("/usr/share/OVMF/OVMF_VARS.fd").read_bytes()
    for data in (variables, blank * 4096, ovmf_bytes[:-16] + blank * 16):
        with pytest.raises(FirmwareError, match="no processor can start there") as caught:
            wrap(data, [NATIVE])
        assert "--vars" in str(caught.value)


@pytest.mark.parametrize(("head", "words"), [
    (b"QFI\xfb", ("a qcow2 image", "qemu-img convert -O raw")),
    (b"\x1f\x8b\x08", ("compressed with gzip", "gzip -d")),
    (b"IGVM", ("an IGVM file",)),
])  # fmt: skip
def test_another_kind_of_file_is_no_firmware(head: bytes, words: tuple[str, ...]) -> None:
    data = head.ljust(65536, b"\1")  # whole pages, as firmware has
    for firmware, variables in ((data, b""), (bytes(4095) + b"\1", data)):
        with pytest.raises(FirmwareError) as caught:
            wrap(firmware, [NATIVE], variables=variables)
        assert all(word in str(caught.value) for word in words)


def test_a_platform_without_its_tables_is_refused() -> None:
    blank = bytes((1 << 20) - 16) + b"\xf4" * 16  # hlt where a processor starts
    with pytest.raises(FirmwareError, match="SEV-SNP"):
        wrap(blank, [SNP])
    with pytest.raises(FirmwareError, match="reset block"):
        wrap(blank, [SEV_ES], vcpus=2)
    wrap(blank, [SEV_ES])  # one vCPU needs no table
    for wrong in ([], [Platform.TDX], [SEV, SEV]):
        with pytest.raises(UsageError):
            wrap(blank, wrong)


def with_sections(*sections: tuple[int, int, int]) -> bytes:
    """Firmware of nothing but a first instruction and its table, with a list of SEV sections."""
    image = bytearray((1 << 20) - 16) + b"\xf4" * 16  # hlt
    place, end = 0x1000, len(image) - 32
    body = struct.pack("<4sIII", b"ASEV", 16 + 12 * len(sections), 1, len(sections))
    body += b"".join(struct.pack("<III", *section) for section in sections)
    image[place : place + len(body)] = body
    metadata, footer = (
        uuid.UUID(text).bytes_le
        for text in ("dc886566-984a-4798-a75e-5585a7bf67cc", "96b582de-1fb2-45f7-baea-a366c55a082d")
    )
    table = struct.pack("<IH16sH16s", len(image) - place, 22, metadata, 40, footer)
    image[end - len(table) : end] = table
    return bytes(image)


def test_firmware_cannot_ask_for_memory_without_bounds() -> None:
    """A section of 12 bytes names megabytes, each page of which would become a header."""
    secrets = (0x80_0000, 0x1000, 2)
    IgvmFile.parse(wrap(with_sections(secrets, (0x100_0000, 2 << 20, 1)), [SNP]))
    many = ((index * (2 << 20), 2 << 20, 1) for index in range(40))
    with pytest.raises(FirmwareError, match="more than firmware needs"):
        wrap(with_sections(secrets, *many), [SNP])


def test_damaged_tables_are_refused_or_ignored_but_never_crash(ovmf_bytes: bytes) -> None:
    tail = 0x900  # bytes that hold the table and the lists it points to
    data = bytearray(ovmf_bytes)
    for position in range(len(data) - tail, len(data), 11):
        data[position] ^= 0xFF
        with contextlib.suppress(FirmwareError):
            IgvmFile.parse(wrap(data, [SEV_ES, SNP], vcpus=2))
        data[position] ^= 0xFF
