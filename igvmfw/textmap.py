"""A memory map → lines for a terminal: words with rich's styles, which go without their colours.

The rows are the drawing's.  Every region begins with the letter of its kind.  Where the platforms
do not fit side by side they follow each other.
"""

from collections.abc import Iterator, Sequence

from igvmfw.drawing import SHADES
from igvmfw.igvm.regions import Region
from igvmfw.memorymap import KINDS, MemoryMap, Row, label_of
from igvmfw.report import size_text

Line = list[tuple[str, str]]  # texts with a style each, as rich's Text.assemble takes them

LEAST = 29  # characters that a platform needs; below, platforms follow each other
MOST = 46  # more would only part names from sizes
_LETTER = 3
_ASCII = str.maketrans({"…": "~", "│": "|"})


def map_lines(memory: MemoryMap, *, width: int, ascii_only: bool = False) -> Iterator[Line]:
    """The map as lines without line ends.

    Args:
        memory: The map.
        width: Of the terminal, in characters; a line is longer only where `width` is below 40.
        ascii_only: For terminals whose locale has no more.
    """
    for line in _lines(memory, max(width, 40)):
        while line and not line[-1][0].strip():
            line.pop()
        if line:
            line[-1] = (line[-1][0].rstrip(), line[-1][1])
        yield [(_plain(text), style) for text, style in line] if ascii_only else line


def _plain(text: str) -> str:
    return text.translate(_ASCII).encode("ascii", "backslashreplace").decode()


def _lines(memory: MemoryMap, width: int) -> Iterator[Line]:
    axis = max((len(f"0x{row.end:x}") for row in memory.rows), default=0)
    count = len(memory.columns)
    most = max((width - axis) // (LEAST + 1), 1)
    tables = -(-count // most)
    together = -(-count // max(tables, 1)) or 1
    for first in range(0, count, together):
        chosen = range(first, min(first + together, count))
        if first:
            yield []
        yield from _table(memory, chosen, axis, width)
    if memory.hidden:
        yield [(f"… and {memory.hidden:,} more regions, which are not shown", "")]
    yield []
    yield from _legend(memory, width)


def _table(memory: MemoryMap, chosen: Sequence[int], axis: int, width: int) -> Iterator[Line]:
    each = min((width - axis) // len(chosen) - 1, MOST)
    head: Line = [(" " * axis, "")]
    for index in chosen:
        head.append((" " + f"{memory.columns[index].platform.value:<{each}}", "bold"))
    yield head
    rows = list(_folded(memory.rows, chosen))
    while rows and rows[0].is_gap:
        rows.pop(0)
    while rows and rows[-1].is_gap:
        rows.pop()
    before: tuple[Region | None, ...] = (None,) * len(chosen)
    for row in rows:
        line: Line = [(f"{f'0x{row.start:x}':>{axis}}", "dim")]
        if row.is_gap:
            text = f" ~ {size_text(row.end - row.start)} not laid out"
            line.append((text[: width - axis], "dim"))
        else:
            for region, above in zip(row.cells, before, strict=True):
                line += _cell(region, each, goes_on=region is above)
        yield line
        before = row.cells
    if rows:
        yield [(f"{f'0x{rows[-1].end:x}':>{axis}}", "dim")]


def _folded(rows: Sequence[Row], chosen: Sequence[int]) -> Iterator[Row]:
    """The rows of some columns; those in which they do not change as one."""
    current: Row | None = None
    for row in rows:
        cells = tuple(row.cells[index] for index in chosen)
        if current is not None and all(a is b for a, b in zip(current.cells, cells, strict=True)):
            current = Row(start=current.start, end=row.end, cells=cells)
            continue
        if current is not None:
            yield current
        current = Row(start=row.start, end=row.end, cells=cells)
    if current is not None:
        yield current


def _cell(region: Region | None, width: int, *, goes_on: bool) -> Line:
    if region is None:
        return [(" " * (width + 1), "")]
    shade = SHADES[region.kind]
    style = f"{shade.letter} on {shade.stripe}"
    if goes_on:
        return [(" ", ""), (" │ ", style), (" " * (width - _LETTER), "")]
    size = size_text(region.size)
    room = width - _LETTER - len(size) - 2
    label = label_of(region)
    if len(label) > room:
        label = label[: max(room - 1, 0)] + "…"
    return [
        (" ", ""),
        (f" {KINDS[region.kind].letter} ", f"bold {style}"),
        (f" {label:<{room}}", ""),
        (f" {size}", "dim"),
    ]


def _legend(memory: MemoryMap, width: int) -> Iterator[Line]:
    line: Line = []
    for kind in memory.kinds:
        shade, (letter, title, _) = SHADES[kind], KINDS[kind]
        words = [(f" {letter} ", f"bold {shade.letter} on {shade.stripe}"), (f" {title}  ", "")]
        if sum(len(text) for text, _ in (*line, *words)) > width:
            yield line
            line = []
        line += words
    yield line
