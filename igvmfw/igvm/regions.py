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
    ErrorRange,
    PageData,
    Parameter,
    ParameterArea,
    ParameterInsert,
    RequiredMemory,
    VpContext,
)
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import PAGE_SIZE, U64_SPACE, HeaderType, PageDataType, PlatformType
from igvmfw.igvm.summary import vcpus_text
from igvmfw.platforms import Platform

_WITH_VMSA = (PlatformType.SEV_ES, PlatformType.SEV_SNP)  # others' contexts lie in no memory
_BELOW_ALL = -1
MAX_NAMED = 8  # parameters of one page that its name lists


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
    marks = tuple(landmarks)
    return tuple(_named(laid, marks) if marks else laid)


def page_kind(page: PageData) -> RegionKind:
    """The kind of the memory that a page fills."""
    if page.data_type != PageDataType.NORMAL:
        return _PAGE_KINDS.get(page.data_type, RegionKind.UNKNOWN)  # type: ignore[call-overload,no-any-return]
    if page.unmeasured or page.shared:
        return RegionKind.UNMEASURED
    return RegionKind.MEASURED if page.file_offset else RegionKind.ZERO


def _spans(image: IgvmFile, platform: Platform) -> Iterator[_Span]:
    """What the headers lay out, in file order; pages that continue each other as one."""
    other = _Others(image, platform)
    run: _Span | None = None
    for rank, header in enumerate(image.for_platform(platform)):
        if type(header) is PageData:
            kind = page_kind(header)
            end = header.gpa + header.guest_size
            if run is not None and run.end == header.gpa and run.kind is kind:
                run = _Span(run.start, end, rank, kind, None)
                continue
            if run is not None:
                yield run
            run = _Span(header.gpa, end, rank, kind, None)
        else:
            if run is not None:
                yield run
                run = None
            yield from other.spans(header, rank)
    if run is not None:
        yield run
    yield from other.contexts(len(image.headers))


class _Others:
    """What headers other than pages lay out."""

    def __init__(self, image: IgvmFile, platform: Platform) -> None:
        self._areas: dict[int, tuple[int, list[str]]] = {}  # by index: size, what is in it
        self._contexts: dict[int, list[int]] = {}  # by address: whose
        declared = image.find_platform(platform)
        self._has_vmsa = declared is not None and declared.platform_type in _WITH_VMSA

    def spans(self, header: AnyHeader, rank: int) -> Iterator[_Span]:
        """The memory of one header."""
        match header:
            case ParameterArea():
                self._areas[header.parameter_area_index] = (header.number_of_bytes, [])
            case Parameter():
                _, names = self._areas.get(header.parameter_area_index, (0, []))
                names.append(_parameter_name(header.type))
            case ParameterInsert():
                size, names = self._areas.get(header.parameter_area_index, (0, []))
                name = _listed(names) or None
                yield _Span(header.gpa, header.gpa + size, rank, RegionKind.PARAMETERS, name)
            case RequiredMemory():
                end = header.gpa + header.number_of_bytes
                yield _Span(header.gpa, end, _BELOW_ALL, RegionKind.REQUIRED, None)
            case ErrorRange():
                end = header.gpa + header.size_bytes
                yield _Span(header.gpa, end, rank, RegionKind.ERROR_RANGE, None)
            case VpContext() if self._has_vmsa:
                self._contexts.setdefault(header.gpa, []).append(header.vp_index)
            case _:
                pass

    def contexts(self, rank: int) -> Iterator[_Span]:
        """The VMSAs, all at their end: KVM gives those of every processor one address."""
        for gpa, indices in self._contexts.items():
            name = f"of {vcpus_text(indices)}"
            yield _Span(gpa, gpa + PAGE_SIZE, rank, RegionKind.VMSA, name)


def _parameter_name(header_type: int) -> str:
    kind = HeaderType(header_type)
    return _PARAMETER_NAMES.get(kind, kind.name)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join([*names[:MAX_NAMED], *([f"{more} more"] if more > 0 else [])])


def _flat(spans: list[_Span]) -> Iterator[_Span]:
    """The topmost span at each address, in pieces that end wherever another one begins."""
    spans = [
        span if span.end <= U64_SPACE else span._replace(end=U64_SPACE)
        for span in spans
        if span.start < span.end
    ]
    spans.sort(key=lambda span: span.start)
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
        yield _Span(at, until, top.rank, top.kind, top.name)
        at = until


def _merged(spans: Iterable[_Span]) -> Iterator[Region]:
    """Neighbours that are alike as one."""
    start = end = 0
    kind, name = RegionKind.UNKNOWN, None
    for span in spans:
        if span.start == end and span.kind is kind and span.name == name:
            end = span.end
            continue
        if end:
            yield Region(start=start, end=end, kind=kind, name=name)
        start, end, _, kind, name = span
    if end:
        yield Region(start=start, end=end, kind=kind, name=name)


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
