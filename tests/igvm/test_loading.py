"""Regions and discards, against the same told step by step (QEMU: tests/system/test_measure.py)."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import PageData, ParameterArea, ParameterInsert, RequiredMemory
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.loading import find_discards, loaded_regions
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import PAGE_SIZE, PageDataFlags
from igvmfw.platforms import Platform
from tests.igvm import samples

MASK = 2
GPAS = st.integers(0, 11).map(lambda number: number * PAGE_SIZE)
MASKS = st.sampled_from([0, 1, MASK, 3])
FLAGS = st.sampled_from([0, int(PageDataFlags.UNMEASURED)])
PAGES = st.builds(PageData, GPAS, MASKS, st.just(0), FLAGS)
REQUIRED = st.builds(
    RequiredMemory, GPAS, MASKS, st.integers(0, 4).map(lambda number: number * PAGE_SIZE)
)
HEADERS = st.lists(st.one_of(PAGES, PAGES, REQUIRED, GPAS), max_size=14)


def image_of(items: Sequence[AnyHeader | int]) -> IgvmFile:
    """A file of these headers; a number is an area of two pages that is inserted there."""
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.NATIVE, 1))
    builder.add(samples.platform(Platform.SEV_SNP, MASK))
    for index, item in enumerate(items):
        if isinstance(item, int):
            builder.add(ParameterArea(2 * PAGE_SIZE, index))
            builder.add(ParameterInsert(item, MASK, index))
        else:
            builder.add(item)
    return IgvmFile.parse(builder.build())


def told(image: IgvmFile) -> tuple[list[tuple[int, int]], set[int]]:
    """As QEMU goes through a file: the regions it loads, and the required memory that discards."""
    regions: list[tuple[int, int]] = []
    loaded: set[int] = set()
    discards: set[int] = set()
    region: list[PageData] = []
    joins = False  # the header before this one is the region's last page

    def load() -> None:
        if region:
            regions.append((region[0].gpa, region[-1].gpa + PAGE_SIZE))
            loaded.update(page.gpa for page in region)
            region.clear()

    for index, header in enumerate(image.headers):
        mask = getattr(header, "compatibility_mask", MASK)
        if mask == 0:
            continue
        match header:
            case PageData() if mask & MASK:
                if not (joins and region[-1].is_continued_by(header)):
                    load()
                region.append(header)
            case ParameterInsert() if mask & MASK:
                loaded |= {header.gpa, header.gpa + PAGE_SIZE}
            case RequiredMemory() if mask & MASK:
                end = header.gpa + header.number_of_bytes
                if loaded.intersection(range(header.gpa, end, PAGE_SIZE)):
                    discards.add(index)
            case _:
                pass
        joins = isinstance(header, PageData) and bool(mask & MASK)
    load()
    return regions, discards


@given(HEADERS)
def test_regions_are_those_of_a_loader_that_goes_step_by_step(
    items: list[AnyHeader | int],
) -> None:
    image = image_of(items)
    regions = list(loaded_regions(image, MASK))
    assert [(region.start, region.end) for region in regions] == told(image)[0]
    assert all(image.headers[region.first][0] == region.start for region in regions)


@given(HEADERS)
def test_discards_are_found_where_there_are_some(items: list[AnyHeader | int]) -> None:
    image = image_of(items)
    found = find_discards(image, MASK)
    expected = told(image)[1]
    assert {discard.header_index for discard in found} <= expected
    assert bool(found) == bool(expected)
