"""The order in which QEMU loads a file's memory, and what it loses by that order.

QEMU gathers pages into regions: one is loaded when a page comes that does not join it, or at the
end.  For a SEV-SNP guest it then hands nothing over before the guest starts, and required memory
that comes in between is made private, which discards what was loaded there: the guest gets pages of
zeroes.  (Huge pages are not discarded; a file does not know what the guest's memory is made of.)

Source: QEMU 10.2 and 11.0, backends/igvm.c (qigvm_process_mem_page,
qigvm_directive_required_memory) and accel/kvm/kvm-all.c (kvm_convert_memory); seen with both.
"""

import heapq
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

from igvmfw.igvm.headers import PageData, ParameterArea, ParameterInsert, RequiredMemory
from igvmfw.igvm.image import IgvmFile, mask_in


class LoadedRegion(NamedTuple):
    """Pages that are loaded at once: guest addresses in bytes, `end` behind the last page.

    `first` is the index of the header of the first page, and `loaded` of the header at which QEMU
    loads the region, counted over all headers.
    """

    start: int
    end: int
    first: int
    loaded: int


class Discard(NamedTuple):
    """Required memory that discards: the index of its header, and one guest address, in bytes."""

    header_index: int
    gpa: int


def loaded_regions(image: IgvmFile, mask: int) -> Iterator[LoadedRegion]:
    """The regions of the platform that has a compatibility mask, in the order they are loaded in.

    QEMU numbers the headers that libigvm gives it, which leaves out those that apply to no
    platform; pages of neighbouring numbers join.
    """
    start = first = 0
    before: PageData | None = None
    number = last = -1
    for index, header in enumerate(image.headers):
        applies = mask_in(header)
        number += applies != 0
        if type(header) is not PageData or not applies & mask:
            continue
        if before is None or number != last + 1 or not before.is_continued_by(header):
            if before is not None:
                yield LoadedRegion(start, before.gpa + before.guest_size, first, index)
            start, first = header.gpa, index
        before, last = header, number
    if before is not None:
        yield LoadedRegion(start, before.gpa + before.guest_size, first, len(image.headers))


def prepared_regions(image: IgvmFile, mask: int) -> list[LoadedRegion]:
    """All that QEMU looks for memory for, in its order: what it loads, and required memory."""
    required = (
        LoadedRegion(header.gpa, header.gpa + header.number_of_bytes, index, index)
        for index, header in enumerate(image.headers)
        if isinstance(header, RequiredMemory) and header.compatibility_mask & mask
    )
    return sorted((*_loads(image, mask), *required), key=attrgetter("loaded"))


def find_discards(image: IgvmFile, mask: int) -> tuple[Discard, ...]:
    """The required memory that would discard pages or parameters of a SEV-SNP guest, by header.

    Args:
        image: The file.
        mask: The compatibility mask of the platform that the guest takes.
    """
    if not any(isinstance(header, RequiredMemory) for header in image.others):
        return ()
    required = [
        (header.gpa, header.gpa + header.number_of_bytes, index, True)
        for index, header in enumerate(image.headers)
        if isinstance(header, RequiredMemory) and header.compatibility_mask & mask
    ]
    if not required:
        return ()
    loaded = [(region.start, region.end, region.loaded, False) for region in _loads(image, mask)]
    found: dict[int, int] = {}
    # one pass by address: of all that begins at or before it, the required memory that comes last
    # in the file and what is loaded first
    latest: list[tuple[int, int]] = []
    earliest: list[tuple[int, int]] = []
    for start, end, index, is_required in sorted(required + loaded):
        if start == end:
            continue
        for heap in (latest, earliest):
            while heap and heap[0][1] <= start:
                heapq.heappop(heap)
        if is_required:
            if earliest and earliest[0][0] < index:
                found.setdefault(index, start)
            heapq.heappush(latest, (-index, end))
        else:
            if latest and index < -latest[0][0]:
                found.setdefault(-latest[0][0], start)
            heapq.heappush(earliest, (index, end))
    return tuple(Discard(index, found[index]) for index in sorted(found))


def _loads(image: IgvmFile, mask: int) -> Iterator[LoadedRegion]:
    """All that is loaded: regions of pages, and parameter areas at their insertion."""
    yield from loaded_regions(image, mask)
    sizes: dict[int, int] = {}
    for index, header in enumerate(image.headers):
        if isinstance(header, ParameterArea):
            sizes[header.parameter_area_index] = header.number_of_bytes
        elif isinstance(header, ParameterInsert) and header.compatibility_mask & mask:
            end = header.gpa + sizes.get(header.parameter_area_index, 0)
            yield LoadedRegion(header.gpa, end, index, index)
