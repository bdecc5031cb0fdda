"""Image → the rows and columns of a memory map: what a drawing and a table of it have in common.

Addresses go down the page, platforms stand side by side, and each row is a range of addresses in
which no platform changes.  Ranges that no platform uses are folded into one row of their own.
"""

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.landmarks import named_regions
from igvmfw.igvm.payload import Payload
from igvmfw.igvm.regions import Region, RegionKind
from igvmfw.igvm.spec import PAGE_SIZE
from igvmfw.igvm.summary import RESET_ENTRY, Summary, entries_text, summarize
from igvmfw.platforms import Platform
from igvmfw.report import payload_text, size_text

MAX_ROWS = 200  # more are counted, not shown; real files have below 40
MAX_ENTRIES = 3  # starts of virtual processors that are told


class KindText(NamedTuple):
    """How a kind of region is told: the letter that stands for it, its name, what it means."""

    letter: str
    title: str
    meaning: str


KINDS = {
    RegionKind.MEASURED: KindText("M", "measured", "pages with data, in the launch measurement"),
    RegionKind.ZERO: KindText("Z", "zero", "pages of zeroes, in the launch measurement"),
    RegionKind.UNMEASURED: KindText("U", "unmeasured", "pages outside the launch measurement"),
    RegionKind.SECRETS: KindText("S", "secrets", "keys, filled in by the processor"),
    RegionKind.CPUID: KindText("C", "CPUID", "values that the processor checks"),
    RegionKind.PARAMETERS: KindText("P", "parameters", "filled in by the loader at launch"),
    RegionKind.VMSA: KindText("V", "VMSA", "initial state of virtual processors"),
    RegionKind.ERROR_RANGE: KindText("E", "error range", "where the guest reports errors"),
    RegionKind.REQUIRED: KindText("R", "required memory", "must be there; the file fills none"),
    RegionKind.UNKNOWN: KindText("?", "unknown type", "pages of a type that is not known"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One platform; the texts are for its head and its foot."""

    platform: Platform
    regions: tuple[Region, ...]
    mask: str
    total: str
    entries: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A range of addresses, in bytes, with each column's region in it; none in any is a gap."""

    start: int
    end: int
    cells: tuple[Region | None, ...]

    @property
    def is_gap(self) -> bool:
        """No platform uses the range."""
        return not any(self.cells)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryMap:
    """A file's memory as it is shown; `hidden` counts the regions that are left out at the end."""

    title: str
    subtitle: str
    payload: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    hidden: int

    @property
    def kinds(self) -> tuple[RegionKind, ...]:
        """The kinds that occur, in the order of the legend."""
        found = {cell.kind for row in self.rows for cell in row.cells if cell is not None}
        return tuple(kind for kind in KINDS if kind in found)


def map_memory(image: IgvmFile, name: str, payload: Payload) -> MemoryMap:
    """Lay out a file's memory.

    Args:
        image: The file; one that was read leniently is mapped as far as it can be read.
        name: The file's name, as the title.
        payload: What it carries.
    """
    columns = tuple(_column(image, summary, payload) for summary in summarize(image))
    rows = tuple(_rows([column.regions for column in columns]))
    end = rows[-1].end if rows else 0
    hidden = sum(
        len(column.regions) - bisect_left(column.regions, end, key=lambda region: region.start)
        for column in columns
    )
    return MemoryMap(
        title=name,
        subtitle=f"IGVM revision {image.revision}, {image.architecture.name}, "
        f"{size_text(len(image.content))}",
        payload=payload_text(payload),
        columns=columns,
        rows=rows,
        hidden=hidden,
    )


def label_of(region: Region) -> str:
    """A region in a few words."""
    title = KINDS[region.kind].title
    if region.name is None:
        return title
    return f"{title} {region.name}" if region.kind is RegionKind.VMSA else region.name


def pages_text(region: Region) -> str:
    """How many pages of 4 KiB a region has."""
    count = -(-region.size // PAGE_SIZE)
    return f"{count:,} page{'s' * (count != 1)}"


def _column(image: IgvmFile, summary: Summary, payload: Payload) -> Column:
    platform = summary.platform
    policy = "" if summary.policy is None else f", policy 0x{summary.policy:x}"
    verb = "loaded" if platform is Platform.NATIVE else "measured"
    entries = list(entries_text(summary.contexts))
    more = len(entries) - MAX_ENTRIES
    if more > 0:
        entries[MAX_ENTRIES:] = [f"{more} more start{'s' * (more > 1)} elsewhere"]
    return Column(
        platform=platform,
        regions=named_regions(image, platform, payload),
        mask=f"mask 0x{summary.mask:x}{policy}",
        total=f"{size_text(summary.measured)} {verb}",
        entries=tuple(entries) or (RESET_ENTRY,),
    )


def _rows(columns: Sequence[Sequence[Region]]) -> Iterator[Row]:
    """One row for each range between two addresses at which some column changes, the first ones."""
    edges = sorted(
        {
            edge
            for regions in columns
            for region in regions[: MAX_ROWS + 1]
            for edge in (region.start, region.end)
        }
    )[: MAX_ROWS + 1]
    nearest = [0] * len(columns)
    for start, end in itertools.pairwise(edges):
        cells: list[Region | None] = []
        for index, regions in enumerate(columns):
            while nearest[index] < len(regions) and regions[nearest[index]].end <= start:
                nearest[index] += 1
            region = regions[nearest[index]] if nearest[index] < len(regions) else None
            cells.append(region if region is not None and region.start <= start else None)
        yield Row(start=start, end=end, cells=tuple(cells))
