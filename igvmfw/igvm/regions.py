"""An image's directives → the guest's memory on one platform, as regions that do not overlap.

A file may lay several things on one address: required memory spans the pages in it, and a page or
a parameter area may come after another.  What comes later in the file lies on top, as it does when
a loader follows it; required memory lies below everything.  Memory that is laid out by nothing but
initialization headers (relocatable regions, page tables to relocate) belongs to pages as well, and
is not told apart.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from igvmfw.igvm.headers import (
    U64_SPACE,
    ErrorRange,
    PageData,
    Parameter,
    ParameterArea,
    ParameterInsert,
    RequiredMemory,
    VpContext,
)
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.spec import PAGE_SIZE, HeaderType, PageDataType, PlatformType
from igvmfw.platforms import Platform

_WITH_VMSA = (PlatformType.SEV_ES, PlatformType.SEV_SNP)  # others' contexts lie in no memory
_BELOW_ALL = -1
MAX_NAMED = 8  # parameters or VMSAs of one page that its name lists


class RegionKind(StrEnum):
    """What the memory of a region is to the guest."""

    MEASURED = "measured"
    ZERO = "zero"  # measured too
    UNMEASURED = "unmeasured"
    SECRETS = "secrets"
    CPUID = "cpuid"
    PARAMETERS = "parameters"
    VMSA = "vmsa"
    ERROR_RANGE = "error-range"
    REQUIRED = "required"
    UNKNOWN = "unknown"  # a page data type that the format does not have


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Memory of one kind; addresses and sizes in bytes, `end` is the first byte behind it."""

    start: int
    end: int
    kind: RegionKind
    name: str | None = None

    @property
    def size(self) -> int:
        """Bytes of guest memory."""
        return self.end - self.start


class Landmark(NamedTuple):
    """A part of the memory that has a name of its own; `end` as of a Region.

    With `whole` the region around `start` has the name, if it has none, else exactly the range.
    """

    start: int
    end: int
    name: str
    whole: bool = False


class _Span(NamedTuple):
    start: int
    end: int
    rank: int  # the highest lies on top
    kind: RegionKind
    name: str | None


_PAGE_KINDS = {
    PageDataType.SECRETS: RegionKind.SECRETS,
    PageDataType.CPUID_DATA: RegionKind.CPUID,
    PageDataType.CPUID_XF: RegionKind.CPUID,
}
_PARAMETER_NAMES = {
    HeaderType.VP_COUNT_PARAMETER: "VP count",
    HeaderType.ENVIRONMENT_INFO_PARAMETER: "environment",
    HeaderType.MEMORY_MAP: "memory map",
    HeaderType.MMIO_RANGES: "MMIO ranges",
    HeaderType.COMMAND_LINE: "command line",
    HeaderType.DEVICE_TREE: "device tree",
}


def find_regions(
    image: IgvmFile, platform: Platform, landmarks: Iterable[Landmark] = ()
) -> tuple[Region, ...]:
    """The memory of a platform by rising address; the cost grows with the headers alone.

    Args:
        image: The file.
        platform: Whose memory.
        landmarks: Names for parts of it (landmarks.py); they divide regions of pages.
    Raises:
        IgvmError: The image does not have the platform.
    """
    laid = _merged(_flat(list(_spans(image, platform))))
    return tuple(_named(laid, tuple(landmarks)))


def page_kind(page: PageData) -> RegionKind:
    """The kind of the memory that a page fills."""
    if page.data_type != PageDataType.NORMAL:
        return _PAGE_KINDS.get(page.data_type, RegionKind.UNKNOWN)  # type: ignore[call-overload,no-any-return]
    if page.unmeasured or page.shared:
        return RegionKind.UNMEASURED
    return RegionKind.MEASURED if page.file_offset else RegionKind.ZERO


def _spans(image: IgvmFile, platform: Platform) -> Iterator[_Span]:
    """What the headers lay out, in file order; pages that continue each other as one."""
    areas: dict[int, tuple[int, list[str]]] = {}
    contexts: dict[int, list[int]] = {}
    run: tuple[int, int, int, RegionKind] | None = None  # start, end, rank, kind
    with_vmsa = image.find_platform(platform)
    takes_vmsa = with_vmsa is not None and with_vmsa.platform_type in _WITH_VMSA
    for rank, header in enumerate(image.for_platform(platform)):
        if type(header) is PageData:
            kind = page_kind(header)
            end = header.gpa + header.guest_size
            if run is not None and run[1] == header.gpa and run[3] is kind:
                run = (run[0], end, rank, kind)
            else:
                if run is not None:
                    yield _span(*run)
                run = (header.gpa, end, rank, kind)
            continue
        if run is not None:
            yield _span(*run)
            run = None
        match header:
            case ParameterArea():
                areas[header.parameter_area_index] = (header.number_of_bytes, [])
            case Parameter():
                _, names = areas.get(header.parameter_area_index, (0, []))
                names.append(_parameter_name(header.type))
            case ParameterInsert():
                size, names = areas.get(header.parameter_area_index, (0, []))
                kind = RegionKind.PARAMETERS
                yield _span(header.gpa, header.gpa + size, rank, kind, _listed(names) or None)
            case RequiredMemory():
                end = header.gpa + header.number_of_bytes
                yield _span(header.gpa, end, _BELOW_ALL, RegionKind.REQUIRED)
            case ErrorRange():
                end = header.gpa + header.size_bytes
                yield _span(header.gpa, end, rank, RegionKind.ERROR_RANGE)
            case VpContext() if takes_vmsa:
                contexts.setdefault(header.gpa, []).append(header.vp_index)
    if run is not None:
        yield _span(*run)
    for gpa, indices in contexts.items():
        plural = "s" * (len(indices) > 1)
        name = f"of vCPU{plural} {_listed([str(index) for index in sorted(indices)])}"
        yield _span(gpa, gpa + PAGE_SIZE, len(image.headers), RegionKind.VMSA, name)


def _span(start: int, end: int, rank: int, kind: RegionKind, name: str | None = None) -> _Span:
    return _Span(start, min(end, U64_SPACE), rank, kind, name)


def _parameter_name(header_type: int) -> str:
    kind = HeaderType(header_type)
    return _PARAMETER_NAMES.get(kind, kind.name)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join([*names[:MAX_NAMED], *([f"{more} more"] if more > 0 else [])])


def _flat(spans: list[_Span]) -> Iterator[Region]:
    """The topmost span at each address, in pieces that end wherever another one begins."""
    spans = sorted(span for span in spans if span.start < span.end)
    waiting: list[tuple[int, int]] = []  # negative rank, index: the topmost comes first
    index = at = 0
    while index < len(spans) or waiting:
        if not waiting:
            at = max(at, spans[index].start)
        while index < len(spans) and spans[index].start <= at:
            heapq.heappush(waiting, (-spans[index].rank, index))
            index += 1
        while waiting and spans[waiting[0][1]].end <= at:
            heapq.heappop(waiting)
        if not waiting:
            continue
        top = spans[waiting[0][1]]
        following = spans[index].start if index < len(spans) else U64_SPACE
        until = min(top.end, following)
        yield Region(start=at, end=until, kind=top.kind, name=top.name)
        at = until


def _merged(regions: Iterable[Region]) -> Iterator[Region]:
    """Neighbours that are alike as one."""
    current: Region | None = None
    for region in regions:
        if current is not None and (current.end, current.kind, current.name) == (
            region.start, region.kind, region.name,
        ):  # fmt: skip
            current = Region(
                start=current.start, end=region.end, kind=region.kind, name=region.name
            )
            continue
        if current is not None:
            yield current
        current = region
    if current is not None:
        yield current


def _named(regions: Iterable[Region], landmarks: Sequence[Landmark]) -> Iterator[Region]:
    """Regions divided where landmarks begin and end; those that have a name keep it."""
    spans = [
        _Span(mark.start, mark.end, rank, RegionKind.UNKNOWN, mark.name)
        for rank, mark in enumerate(landmarks)
        if not mark.whole
    ]
    ranges = list(_merged(_flat(spans)))
    points = sorted((mark.start, mark.name) for mark in landmarks if mark.whole)
    nearest = point = 0
    for region in regions:
        while nearest < len(ranges) and ranges[nearest].end <= region.start:
            nearest += 1
        for part in _divided(region, ranges, nearest):
            while point < len(points) and points[point][0] < part.start:
                point += 1
            if part.name is None and point < len(points) and points[point][0] < part.end:
                yield _with_name(part, part.start, part.end, points[point][1])
            else:
                yield part


def _divided(region: Region, ranges: Sequence[Region], nearest: int) -> Iterator[Region]:
    at = region.start
    if region.name is None and region.kind not in (RegionKind.REQUIRED, RegionKind.VMSA):
        while nearest < len(ranges) and ranges[nearest].start < region.end:
            mark = ranges[nearest]
            begin, end = max(mark.start, at), min(mark.end, region.end)
            if at < begin:
                yield _with_name(region, at, begin, None)
            yield _with_name(region, begin, end, mark.name)
            at = end
            nearest += 1
    if at < region.end:
        yield _with_name(region, at, region.end, region.name)


def _with_name(region: Region, start: int, end: int, name: str | None) -> Region:
    return Region(start=start, end=end, kind=region.kind, name=name)
