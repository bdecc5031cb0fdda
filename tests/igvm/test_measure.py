"""Launch digests: whose order, what an ID block states, and what is not measured at all."""

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from igvmfw.cli import main
from igvmfw.errors import IgvmError, RefusedError, UsageError
from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import (
    ErrorRange,
    GuestPolicy,
    PageData,
    ParameterInsert,
    RequiredMemory,
    SnpIdBlock,
)
from igvmfw.igvm.image import IgvmFile, assemble, serialize
from igvmfw.igvm.measure import Vmm, default_vmm, launch_digest, stated_digest
from igvmfw.igvm.spec import SEV_VMSA_GPA, PageDataFlags, PageDataType
from igvmfw.igvm.wrap import RESET_ADDRESS, reset_vmsa
from igvmfw.platforms import Platform
from igvmfw.qemu.cpus import signature
from tests.igvm import samples
from tests.system.test_measure import CPU, launch
from tests.testbed.standin import SevEmulator

SCHEMA = Path(__file__).parents[2] / "schemas" / "measure.json"
LARGE = 2 << 20
SNP, TDX, VSM = Platform.SEV_SNP, Platform.TDX, Platform.VSM
ALL = (Platform.SEV, Platform.SEV_ES, SNP, TDX, VSM)
Fill = Callable[[ImageBuilder], None]


def built(platform: Platform, *fill: Fill) -> IgvmFile:
    """An image for one platform, mask 1."""
    builder = ImageBuilder()
    builder.add(samples.platform(platform, 1, highest_vtl=2 if platform is VSM else 0))
    if platform is SNP:
        builder.add(GuestPolicy(0x30000, 1))
    for part in fill:
        part(builder)
    return IgvmFile.parse(builder.build())


def page(gpa: int, data: bytes = samples.PAGE, mask: int = 1, flags: int = 0) -> Fill:
    return lambda builder: builder.add_page(gpa, mask, data, flags=flags)


def insertion(gpa: int, size: int = 4096, index: int = 0) -> Fill:
    def fill(builder: ImageBuilder) -> None:
        builder.add_parameter_area(index, size)
        builder.add(ParameterInsert(gpa, 1, index))

    return fill


def id_block(ld: bytes, mask: int = 1) -> SnpIdBlock:
    empty = SnpIdBlock.parse(bytes(SnpIdBlock.LAYOUT.size))
    return empty.replace(compatibility_mask=mask, ld=ld, version=1, id_key_algorithm=1)


def spec(image: IgvmFile, platform: Platform) -> bytes:
    return launch_digest(image, platform, vmm=Vmm.SPEC)


@pytest.mark.parametrize("platform", ALL)
def test_a_2_mib_page_is_measured_as_its_512_pages(platform: Platform) -> None:
    large = built(platform, page(LARGE, flags=PageDataFlags.IS_2MB_PAGE))
    rest = [page(LARGE + gpa, b"") for gpa in range(4096, LARGE, 4096)]
    small = built(platform, page(LARGE), *rest)
    assert spec(large, platform) == spec(small, platform)


@pytest.mark.parametrize("platform", ALL)
def test_every_measured_byte_counts_and_no_other(platform: Platform) -> None:
    fill = (page(0x1000), page(0x2000, b"unmeasured", flags=PageDataFlags.UNMEASURED))
    digest = spec(built(platform, *fill), platform)
    changed = bytearray(samples.PAGE)
    changed[-1] ^= 1
    assert spec(built(platform, page(0x1000, bytes(changed)), fill[1]), platform) != digest
    other = page(0x2000, b"other", flags=PageDataFlags.UNMEASURED)
    assert spec(built(platform, fill[0], other), platform) == digest


def test_qemu_does_not_see_headers_of_no_platform() -> None:
    # two pages that QEMU joins are handed over after the area that is inserted behind them
    joined = built(SNP, page(0x1000), page(0x2000), insertion(0x10_0000), vmsa)
    between = built(
        SNP, page(0x1000), page(0x9000, mask=0), page(0x2000), insertion(0x10_0000), vmsa
    )
    apart = built(
        SNP,
        page(0x1000),
        lambda builder: builder.add(RequiredMemory(0x20_0000, 1, 4096)),
        page(0x2000),
        insertion(0x10_0000),
        vmsa,
    )
    assert launch_digest(joined, SNP) == launch_digest(between, SNP)
    assert launch_digest(joined, SNP) != launch_digest(apart, SNP)


@pytest.mark.parametrize("platform", [Platform.SEV, Platform.SEV_ES, SNP])
def test_rare_pages_are_measured_as_qemu_hands_them_over(
    platform: Platform, sev_emulator: SevEmulator, tmp_path: Path
) -> None:
    image = built(
        platform,
        page(LARGE, flags=PageDataFlags.IS_2MB_PAGE),
        page(2 * LARGE, b"", flags=PageDataFlags.IS_2MB_PAGE),
        page(0x1000),
        page(0x9000, mask=0),  # libigvm does not give it to QEMU: both neighbours are one region
        page(0x2000),
        insertion(0x10_0000),
        page(0x3000, flags=PageDataFlags.SHARED),
        page(0x4000, flags=PageDataFlags.UNMEASURED),
    )
    file = tmp_path / "rare.igvm"
    file.write_bytes(image.content)
    record = launch(sev_emulator, file, platform, 2, tmp_path)
    own = launch_digest(image, platform, vcpus=2, cpu_signature=signature(CPU))
    assert record.digest == own


def vmsa(builder: ImageBuilder) -> None:
    content = reset_vmsa(RESET_ADDRESS, sev_features=1).content
    builder.add_vp_context(1, 0, content, gpa=SEV_VMSA_GPA)


def test_the_default_is_qemus_order_where_qemu_launches_the_platform() -> None:
    assert [default_vmm(platform) for platform in ALL] == [Vmm.QEMU] * 3 + [Vmm.SPEC] * 2
    for platform in (TDX, VSM):
        with pytest.raises(UsageError, match="QEMU launches no"):
            launch_digest(built(platform), platform, vmm=Vmm.QEMU)


@pytest.mark.parametrize("platform", [Platform.NATIVE, Platform.CCA])
def test_what_has_no_digest_is_said_to_have_none(platform: Platform) -> None:
    image = IgvmFile.parse(samples.cca() if platform is Platform.CCA else samples.small())
    for vmm in (None, *Vmm):
        with pytest.raises(UsageError, match="no digest"):
            launch_digest(image, platform, vmm=vmm)


def test_page_types_of_sev_snp_are_refused_elsewhere() -> None:
    def secrets(builder: ImageBuilder) -> None:
        builder.add_page(0x1000, 1, data_type=PageDataType.SECRETS)

    for platform in (Platform.SEV, Platform.SEV_ES, VSM):
        with pytest.raises(RefusedError):
            spec(built(platform, secrets), platform)


@pytest.mark.parametrize("platform", ALL)
def test_memory_without_data_is_bounded(platform: Platform) -> None:
    areas = [insertion(index << 32, 0x1000_0000, index) for index in range(2)]
    assert spec(built(platform, areas[0]), platform)  # 256 MiB
    with pytest.raises(IgvmError, match="256 MiB"):
        spec(built(platform, *areas), platform)
    with pytest.raises(IgvmError, match="address space"):
        spec(built(platform, insertion((1 << 64) - 4096, 8192)), platform)
    if platform is VSM:
        with pytest.raises(IgvmError, match="256 MiB"):
            spec(built(VSM, lambda builder: builder.add(ErrorRange(0, 1, 0xFFFF_F000))), VSM)


def test_a_file_that_breaks_a_rule_has_no_digest() -> None:
    image = IgvmFile.parse(samples.small(SNP))
    damaged = assemble(image.fixed, b"", serialize((*image.headers, PageData(1, 1, 0))), b"")
    lenient = IgvmFile.parse(damaged, lenient=True)
    for vmm in Vmm:
        with pytest.raises(IgvmError):
            launch_digest(lenient, SNP, vmm=vmm)


def signed(ld: bytes) -> IgvmFile:
    return built(SNP, page(0x1000), vmsa, lambda builder: builder.add(id_block(ld)))


def test_an_id_block_states_the_digest() -> None:
    assert stated_digest(built(SNP, page(0x1000))) is None
    assert stated_digest(signed(b"\x05" * 48)) == b"\x05" * 48
    twice = built(SNP, *[lambda builder: builder.add(id_block(bytes(48)))] * 2)
    with pytest.raises(RefusedError, match="2 ID blocks"):
        stated_digest(twice)


@pytest.mark.parametrize("right", [True, False])
def test_the_firmware_takes_a_launch_only_with_the_stated_digest(
    right: bool, sev_emulator: SevEmulator, tmp_path: Path
) -> None:
    digest = launch_digest(signed(bytes(48)), SNP, cpu_signature=signature(CPU))
    image = signed(digest if right else bytes(48))
    assert launch_digest(image, SNP) == digest  # the block itself is not measured
    file = tmp_path / "signed.igvm"
    file.write_bytes(image.content)
    record = launch(sev_emulator, file, SNP, 1, tmp_path)
    assert record.digest == digest
    assert record.id_block is not None
    assert (record.id_block[:48] == digest) is right
    # the stand-in answers a wrong one as the firmware does, and QEMU ends
    assert ("SNP_LAUNCH_FINISH" in (tmp_path / "qemu.log").read_text()) is not right


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def document(out: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(out)
    jsonschema.validate(found, json.loads(SCHEMA.read_bytes()))
    return found


def test_measure_answers_no_where_the_id_block_states_another_digest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "signed.igvm"
    digest = launch_digest(signed(bytes(48)), SNP)
    for ld, code in ((digest, 0), (bytes(48), 1)):
        file.write_bytes(signed(ld).content)
        assert run(capsys, "measure", "--bare", file)[:2] == (code, f"{digest.hex()}\n")
        found, out, _ = run(capsys, "measure", "--json", file)
        assert found == code
        assert document(out)["id_block"] == {"ld": ld.hex(), "matches": code == 0}
        found, out, err = run(capsys, "measure", file)
        assert (found, err) == (code, "")
        assert ("states this digest" in out) is (code == 0)
        assert (ld.hex() in out.splitlines()[-1]) is (code == 1)
    assert bytes(48).hex() in run(capsys, "measure", "--bare", file)[2]


def test_measure_takes_tdx_and_vsm_in_the_files_order(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "rich.igvm"
    file.write_bytes(samples.rich())
    for platform, algorithm in ((TDX, "sha384"), (VSM, "sha256")):
        code, out, _ = run(capsys, "measure", "--json", file, "--platform", platform)
        assert code == 0
        found = document(out)
        assert (found["vmm"], found["algorithm"], found["id_block"]) == ("spec", algorithm, None)
        assert "file order" in run(capsys, "measure", file, "--platform", platform)[1]
        code, _, err = run(capsys, "measure", file, "--platform", platform, "--vmm", "qemu")
        assert code == 2
        assert err.startswith("igvmfw: error: ")


@pytest.mark.parametrize(
    ("platforms", "chosen"),
    [((Platform.NATIVE, SNP, TDX), SNP), ((Platform.NATIVE, TDX), TDX), ((TDX, VSM), None),
     ((SNP, Platform.SEV, TDX), None), ((Platform.NATIVE,), None)],
)  # fmt: skip
def test_the_platform_may_be_left_out_where_it_is_clear(
    platforms: tuple[Platform, ...],
    chosen: Platform | None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    builder = ImageBuilder()
    for index, platform in enumerate(platforms):
        builder.add(samples.platform(platform, 1 << index))
    if SNP in platforms:
        builder.add_vp_context(1 << platforms.index(SNP), 0, bytes(4096), gpa=SEV_VMSA_GPA)
    builder.add_page(0x1000, 0xFF, samples.PAGE)
    file = tmp_path / "file.igvm"
    file.write_bytes(builder.build())
    code, out, err = run(capsys, "measure", "--json", file)
    if chosen is None:
        assert code == 2
        assert "--platform" in err
    else:
        assert code == 0
        assert document(out)["platform"] == chosen
