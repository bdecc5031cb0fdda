"""The guest's memory as regions: against the reference crate's reading, and page by page."""

import lzma
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import (
    Header,
    MemoryMap,
    PageData,
    ParameterInsert,
    RequiredMemory,
    VpCount,
)
from igvmfw.igvm.image import IgvmFile, assemble, serialize
from igvmfw.igvm.landmarks import named_regions
from igvmfw.igvm.payload import identify
from igvmfw.igvm.regions import Landmark, RegionKind, find_regions
from igvmfw.igvm.spec import PLATFORM_TYPES
from igvmfw.igvm.summary import vcpus_text
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from tests.igvm import digests, samples

COCONUT = Path(__file__).parents[1] / "data" / "coconut"
PAGE = 0x1000
WRAPPED = (Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)
TYPES = {1: "secrets", 2: "cpuid", 3: "cpuid"}


def coconut(name: str) -> bytes:
    return lzma.decompress((COCONUT / f"{name}.igvm.xz").read_bytes())


@pytest.fixture(params=["native", "snp", "ovmf", "parameters", "igvm-wrap"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    """Files of three makers."""
    if request.param == "native":
        return coconut("coconut-qemu-native")
    if request.param == "snp":
        return coconut("coconut-qemu-vtpm-snp-ovmf")
    if request.param == "ovmf":
        return wrap(request.getfixturevalue("ovmf_bytes"), WRAPPED, vcpus=2)
    firmware: Path = request.getfixturevalue("ovmf_with_parameters")
    if request.param == "parameters":
        return wrap(firmware.read_bytes(), WRAPPED)
    output = tmp_path / "peer.igvm"
    subprocess.run(
        [request.getfixturevalue("peers") / "igvm-wrap", "--input", firmware, "--output", output,
         "--snp"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return output.read_bytes()


def stated(verdict: str) -> dict[int, Counter[str]]:
    """Pages of each kind by platform type, as the reference crate reads the file."""
    masks: dict[int, int] = {}
    areas: dict[str, int] = {}
    pages: dict[int, Counter[str]] = {}
    for line in verdict.split("\t"):
        kind, *words = line.split()
        if kind == "SUPPORTED_PLATFORM":
            masks[int(words[0])] = int(words[2])
            pages[int(words[2])] = Counter()
        elif kind == "PARAMETER_AREA":
            areas[words[1]] = int(words[0]) // PAGE
        elif kind == "PAGE_DATA":
            _, mask, flags, data_type, content = words
            zero = content.startswith("0:")
            name = TYPES.get(int(data_type), "zero" if zero else "measured")
            name = "unmeasured" if int(data_type) == 0 and int(flags) & 6 else name
            count(pages, masks, int(mask), name, 1)
        elif kind == "PARAMETER_INSERT":
            count(pages, masks, int(words[1]), "parameters", areas[words[2]])
    return pages


def count(
    pages: dict[int, Counter[str]], masks: dict[int, int], mask: int, name: str, number: int
) -> None:
    for own, platform in masks.items():
        if own & mask:
            pages[platform][name] += number


def test_pages_of_each_kind_are_those_the_reference_crate_reads(
    data: bytes, reference: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file.igvm"
    file.write_bytes(data)
    (verdict,) = digests.verdicts(reference, [file])
    expected = stated(verdict)
    image = IgvmFile.parse(data)
    assert {PLATFORM_TYPES[word] for word in image.supported} == set(expected)
    for platform in image.supported:
        own: Counter[str] = Counter()
        for region in named_regions(image, platform, identify(image)):
            if region.kind not in (RegionKind.REQUIRED, RegionKind.VMSA):
                own[region.kind.value] += region.size // PAGE
        assert own == expected[PLATFORM_TYPES[platform]]
        assert own["measured"] > 100


def test_coconuts_memory_has_the_names_of_what_is_in_it() -> None:
    image = IgvmFile.parse(coconut("coconut-qemu-vtpm-snp-ovmf"))
    regions = named_regions(image, Platform.SEV_SNP, identify(image))
    named = {region.name: region for region in regions if region.name}
    assert named["COCONUT-SVSM kernel"].start == 0x800_0000
    assert named["start of vCPU 0"].start == 0x1_0000  # EIP 0x10002
    assert named["OVMF reset vector"].end == 1 << 32
    assert named["of vCPU 0"].start == 0xFFFF_FFFF_F000
    assert {"MADT", "memory map", "device tree", "VP count, environment"} <= set(named)
    assert "OVMF SEC memory" not in named  # the SVSM's pages lie there at launch
    required = [region for region in regions if region.kind is RegionKind.REQUIRED]
    assert required[-1].end == 0x900_0000


def test_ovmfs_parts_are_where_its_own_tables_say(ovmf: Path, ovmf_bytes: bytes) -> None:
    image = IgvmFile.parse(wrap(ovmf_bytes, WRAPPED, vcpus=2))
    named = {r.name: r for r in named_regions(image, Platform.SEV_SNP, identify(image))}
    # the headers of the volumes themselves: length at 32, signature at 40
    start = (1 << 32) - len(ovmf_bytes)
    for name in ("OVMF variable store", "OVMF main volume", "OVMF SEC volume"):
        place = named[name].start - start
        assert ovmf_bytes[place + 40 : place + 44] == b"_FVH"
    assert named["OVMF secrets"].kind is RegionKind.SECRETS
    assert named["OVMF CPUID"].kind is RegionKind.CPUID
    mirrored = named["OVMF's end, mirrored"]
    assert (mirrored.start, mirrored.end) == (0xE_0000, 0x10_0000)
    regions = named_regions(image, Platform.SEV_ES, identify(image))
    assert [r.name for r in regions if r.kind is RegionKind.VMSA] == ["of vCPUs 0, 1"]
    image = IgvmFile.parse(wrap(ovmf_bytes, [Platform.SEV_ES], vcpus=64))
    regions = named_regions(image, Platform.SEV_ES, identify(image))
    assert [r.name for r in regions if r.kind is RegionKind.VMSA] == ["of vCPUs 0 to 63"]


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([0], "vCPU 0"),
        ([1, 0], "vCPUs 0, 1"),
        ([5, 3, 4, 0, 4], "vCPUs 0, 3 to 5"),
        (range(0, 40, 2), "vCPUs 0, 2, 4, 6, 8, 10, 12, 14, 12 more"),
    ],
)
def test_virtual_processors_for_people(indices: Sequence[int], text: str) -> None:
    assert vcpus_text(indices) == text


def made(headers: list[Header]) -> IgvmFile:
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.NATIVE, 1))
    builder.add_parameter_area(0, 2 * PAGE)
    builder.add(MemoryMap(0, 0))
    builder.add(VpCount(0, PAGE))
    base = IgvmFile.parse(builder.build())
    body = serialize((*base.headers, *headers))  # the builder takes nothing that breaks a rule
    return IgvmFile.parse(assemble(base.fixed, b"", body, b""), lenient=True)


LAID = st.one_of(
    st.builds(
        lambda gpa, flags, kind: PageData(gpa * PAGE, 1, 0, flags, kind),
        st.integers(0, 30), st.sampled_from([0, 2, 4]), st.integers(0, 3),
    ),
    st.builds(lambda gpa: ParameterInsert(gpa * PAGE, 1, 0), st.integers(0, 30)),
    st.builds(
        lambda gpa, size: RequiredMemory(gpa * PAGE, 1, size * PAGE),
        st.integers(0, 30), st.integers(0, 12),
    ),
)  # fmt: skip


@given(st.lists(LAID, max_size=30))
def test_regions_are_what_page_by_page_painting_gives(headers: list[Header]) -> None:
    painted: dict[int, RegionKind] = {}
    for header in headers:
        if isinstance(header, RequiredMemory):
            for gpa in range(header.gpa, header.gpa + header.number_of_bytes, PAGE):
                painted[gpa] = RegionKind.REQUIRED
    special = {1: RegionKind.SECRETS, 2: RegionKind.CPUID, 3: RegionKind.CPUID}
    for header in headers:
        if isinstance(header, PageData):
            plain = RegionKind.UNMEASURED if header.flags else RegionKind.ZERO
            painted[header.gpa] = special.get(header.data_type, plain)
        elif isinstance(header, ParameterInsert):
            painted[header.gpa] = painted[header.gpa + PAGE] = RegionKind.PARAMETERS
    regions = find_regions(made(headers), Platform.NATIVE)
    seen = {gpa: r.kind for r in regions for gpa in range(r.start, r.end, PAGE)}
    assert seen == painted
    assert sum(r.size for r in regions) == len(painted) * PAGE  # none overlaps another
    assert list(regions) == sorted(regions, key=lambda region: region.start)


def test_the_end_of_the_address_space_is_the_end_of_a_region() -> None:
    image = made([RequiredMemory((1 << 64) - PAGE, 1, 0xFFFF_F000)])
    (region,) = find_regions(image, Platform.NATIVE)
    assert region.end == 1 << 64


def test_landmarks_divide_and_name() -> None:
    image = made([PageData(gpa * PAGE, 1, 0) for gpa in range(8)])
    marks = [
        Landmark(PAGE, 3 * PAGE, "lower"),
        Landmark(2 * PAGE, 4 * PAGE, "upper"),  # the later lies on top
        Landmark(6 * PAGE, 60 * PAGE, "beyond"),
        Landmark(0x10, 0x11, "start", whole=True),
        Landmark(PAGE + 1, PAGE + 2, "unused", whole=True),
    ]
    found = [(r.start // PAGE, r.end // PAGE, r.name)
             for r in find_regions(image, Platform.NATIVE, marks)]  # fmt: skip
    assert found == [
        (0, 1, "start"), (1, 2, "lower"), (2, 4, "upper"), (4, 6, None), (6, 8, "beyond"),
    ]  # fmt: skip


def test_a_damaged_file_is_mapped_as_far_as_it_can_be_read() -> None:
    data = coconut("coconut-qemu-native")
    image = IgvmFile.parse(data[: len(data) // 2], lenient=True)
    regions = named_regions(image, Platform.NATIVE, identify(made([])))
    assert any(region.kind is RegionKind.MEASURED for region in regions)
    assert not any(re.search("kernel", region.name or "") for region in regions)
