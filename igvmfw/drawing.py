"""A memory map → a picture: one SVG document that needs nothing else.

No scripts, no links, no fonts of its own; light or dark as the reader's screen is, by CSS alone.
Every region carries its kind as a letter, so that colour is never all that tells kinds apart.  The
colours of the kinds are those of Okabe and Ito, "Color Universal Design" (2008), which stay apart
for colour-blind readers.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple
from xml.etree import ElementTree

from igvmfw.igvm.regions import Region, RegionKind
from igvmfw.igvm.spec import PAGE_SIZE
from igvmfw.memorymap import KINDS, Column, MemoryMap, Row, label_of, pages_text
from igvmfw.report import size_text

NAMESPACE = "http://www.w3.org/2000/svg"
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Theme(StrEnum):
    """Which colours: those of the reader's screen, or always the same."""

    AUTO = "auto"
    LIGHT = "light"
    DARK = "dark"


class Shade(NamedTuple):
    """The colours of a kind: behind its letter, the letter, and behind the text by theme."""

    stripe: str
    letter: str
    light: str
    dark: str


SHADES = {
    RegionKind.MEASURED: Shade("#0072b2", "#ffffff", "#cfe4f4", "#123f5e"),
    RegionKind.ZERO: Shade("#56b4e9", "#000000", "#eaf5fc", "#1b3342"),
    RegionKind.UNMEASURED: Shade("#e69f00", "#000000", "#fbe9c6", "#4d3809"),
    RegionKind.SECRETS: Shade("#d55e00", "#000000", "#f9dcc5", "#582b0a"),
    RegionKind.CPUID: Shade("#cc79a7", "#000000", "#f5dfea", "#4c2a3f"),
    RegionKind.PARAMETERS: Shade("#009e73", "#000000", "#cdebe1", "#0c4535"),
    RegionKind.VMSA: Shade("#f0e442", "#000000", "#fbf8cd", "#47430e"),
    RegionKind.ERROR_RANGE: Shade("#333333", "#ffffff", "#d9d9d9", "#3d3d3d"),
    RegionKind.REQUIRED: Shade("#a3a9b2", "#000000", "#f3f4f6", "#23272e"),
    RegionKind.UNKNOWN: Shade("#7a5c3e", "#ffffff", "#ece3da", "#3a2d20"),
}
# by class: (property, light, dark)
INKS: dict[str, tuple[str, str, str]] = {
    "page": ("fill", "#ffffff", "#0f1318"),
    "panel": ("fill", "#f6f8fa", "#181d24"),
    "text": ("fill", "#1b1f24", "#e8ebef"),
    "soft": ("fill", "#4b545f", "#b3bcc7"),
    "line": ("stroke", "#d3d9e0", "#343c46"),
    "fold": ("stroke", "#7b8794", "#8b96a3"),
}

# all in pixels
MARGIN = 24
TITLE, BODY, SMALL = 19.0, 12.5, 11.0
STRIPE = 20
GUTTER = 12  # between columns
FOLD = 30  # height of a gap
LEADING = 16  # from one line of small text to the next
MAX_TITLE = 100  # characters
_WIDE, _NARROW = "mwMW@%—", "iljtfrI.,:;'|!()[]/ "


def text_width(text: str, size: float, *, mono: bool = False) -> float:
    """How wide a text is at most, in pixels; DejaVu's metrics, which other fonts stay below."""
    if mono:
        return len(text) * size * 0.61
    units = 0.0
    for character in text:
        if character in _WIDE:
            units += 1.0
        elif character in _NARROW:
            units += 0.42
        else:
            units += 0.72 if character.isupper() else 0.64 if character < "\x7f" else 1.0
    return units * size


def fitted(text: str, width: float, size: float) -> str:
    """A text, cut with an ellipsis where it is wider than it may be, in pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrapped(text: str, width: float, size: float) -> Iterator[str]:
    """A text in lines of at most some pixels."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if line and text_width(longer, size) > width:
            yield line
            line = word
        else:
            line = longer
    if line:
        yield fitted(line, width, size)


def draw(memory: MemoryMap, *, theme: Theme = Theme.AUTO) -> bytes:
    """The SVG document of a memory map; its size is bounded as the map's rows are.

    Args:
        memory: The map.
        theme: Which colours; AUTO follows prefers-color-scheme.
    """
    return _Drawing(memory, theme).document()


class _Drawing:
    """One picture from top to bottom; `_y` is where it goes on."""

    def __init__(self, memory: MemoryMap, theme: Theme) -> None:
        self._memory = memory
        self._theme = theme
        count = len(memory.columns)
        self._two_lines = count > 2  # narrow columns have the size below the name
        self._column = 196 if self._two_lines else 430 if count < 2 else 310
        addresses = [row.end for row in memory.rows]
        longest = max((len(f"0x{address:x}") for address in addresses), default=6)
        self._axis = int(text_width("0" * longest, SMALL, mono=True)) + 14
        columns = count * (self._column + GUTTER) - GUTTER
        self._width = max(2 * MARGIN + self._axis + columns, 2 * MARGIN + self._axis + 430)
        self._y = float(MARGIN)
        self._root = ElementTree.Element("svg", {"xmlns": NAMESPACE, "role": "img"})

    def document(self) -> bytes:
        self._sub(self._root, "title").text = f"Memory map of {_clean(self._memory.title)}"
        self._sub(self._root, "style").text = _style(self._theme, self._memory.kinds)
        background = self._sub(
            self._root, "rect", {"class": "page", "width": "100%", "height": "100%"}
        )
        self._head()
        self._columns()
        self._feet()
        self._legend()
        height = self._y + MARGIN - LEADING
        background.set("height", _number(height))
        size = {"width": _number(self._width), "height": _number(height)}
        for name, value in {**size, "viewBox": f"0 0 {size['width']} {size['height']}"}.items():
            self._root.set(name, value)
        ElementTree.indent(self._root)
        content: bytes = ElementTree.tostring(self._root, encoding="utf-8", xml_declaration=True)
        return content + b"\n"

    def _head(self) -> None:
        memory, width = self._memory, self._width - 2 * MARGIN
        title = fitted(_clean(memory.title)[:MAX_TITLE], width, TITLE * 1.1)
        self._y += TITLE
        self._text(MARGIN, self._y, title, TITLE, bold=True)
        payload = f"payload: {memory.payload}"
        for line in (memory.subtitle, *wrapped(payload, width, BODY)):
            self._y += 20
            self._text(MARGIN, self._y, fitted(line, width, BODY), BODY, "soft")
        self._y += 36
        for index, column in enumerate(memory.columns):
            x = self._x(index)
            self._text(x, self._y, column.platform.value, 15, bold=True)
            for offset, line in ((18, column.mask), (34, column.total)):
                text = fitted(line, self._column, SMALL)
                self._text(x, self._y + offset, text, SMALL, "soft")
        self._y += 50

    def _columns(self) -> None:
        rows = self._memory.rows
        heights = [self._row_height(row) for row in rows]
        tops = [self._y]
        for height in heights:
            tops.append(tops[-1] + height)
        end = tops[-1]
        for index in range(len(self._memory.columns)):
            box = self._box(self._x(index), self._y, self._column, end - self._y)
            self._sub(self._root, "rect", {"class": "panel", **box})
        for row, top in zip(rows, tops, strict=False):
            self._edge(row.start, top)
        if rows:
            self._edge(rows[-1].end, end)
        for index in range(len(self._memory.columns)):
            for first, last in _boxes(rows, index):
                region = rows[first].cells[index]
                if region is not None:
                    self._region(self._x(index), tops[first], tops[last], region)
        for row, top in zip(rows, tops, strict=False):
            if row.is_gap:
                self._fold(top, row)
        self._y = end + 14
        if self._memory.hidden:
            self._y += 8
            text = f"… and {self._memory.hidden:,} more regions, which are not drawn"
            self._text(self._x(0), self._y, text, BODY)
            self._y += 12

    def _row_height(self, row: Row) -> float:
        """Grows with the logarithm of the size: pages and gigabytes stand in one picture."""
        if row.is_gap:
            return FOLD
        pages = max((row.end - row.start) // PAGE_SIZE, 1)
        return (40 if self._two_lines else 26) + min(3.0 * (pages.bit_length() - 1), 45)

    def _edge(self, address: int, y: float) -> None:
        x = MARGIN + self._axis
        self._text(x - 12, y + 4, f"0x{address:x}", SMALL, "soft", mono=True, anchor="end")
        points = {"x1": x - 8, "x2": self._x(len(self._memory.columns)) - GUTTER, "y1": y, "y2": y}
        line = {name: _number(value) for name, value in points.items()}
        self._sub(self._root, "line", {"class": "line", **line})

    def _region(self, x: float, top: float, bottom: float, region: Region) -> None:
        group = self._sub(self._root, "g", {"class": region.kind.value})
        title = KINDS[region.kind].title
        self._sub(group, "title").text = (
            f"0x{region.start:x} to 0x{region.end - 1:x}, {size_text(region.size)} "
            f"({pages_text(region)}), {title}" + (f": {region.name}" if region.name else "")
        )
        inside = self._box(x + 1, top + 1, self._column - 2, bottom - top - 2)
        self._sub(group, "rect", {"class": "box", "rx": "3", **inside})
        stripe = self._box(x + 1, top + 1, STRIPE, bottom - top - 2)
        self._sub(group, "rect", {"class": "stripe", "rx": "3", **stripe})
        middle = (top + bottom) / 2
        letter = KINDS[region.kind].letter
        place = (x + 1 + STRIPE / 2, middle + 4)
        self._text(*place, letter, SMALL, "letter", bold=True, anchor="middle", parent=group)
        left, right = x + STRIPE + 9, x + self._column - 9
        size = size_text(region.size)
        if self._two_lines:
            label = fitted(label_of(region), right - left, BODY)
            self._text(left, middle - 2, label, BODY, parent=group)
            line = fitted(f"{size}, {pages_text(region)}", right - left, SMALL)
            self._text(left, middle + 13, line, SMALL, "soft", parent=group)
            return
        room = right - left - text_width(size, SMALL) - 12
        label = fitted(label_of(region), room, BODY)
        self._text(left, middle + 4, label, BODY, parent=group)
        self._text(right, middle + 4, size, SMALL, "soft", anchor="end", parent=group)

    def _fold(self, top: float, row: Row) -> None:
        """A gap: a band cut out of the columns between two broken lines."""
        left = MARGIN + self._axis - 8
        right = self._x(len(self._memory.columns)) - GUTTER
        band = self._box(left, top + 5, right - left, FOLD - 10)
        self._sub(self._root, "rect", {"class": "page", **band})
        for y in (top + 5, top + FOLD - 5):
            steps = int((right - left) // 8)
            points = " ".join(
                f"{_number(left + 8 * step)},{_number(y + (-2 if step % 2 else 2))}"
                for step in range(steps + 1)
            )
            self._sub(self._root, "polyline", {"class": "fold", "points": points})
        text = f"{size_text(row.end - row.start)} not laid out"
        text = fitted(text, right - left - 8, SMALL)
        middle = (left + 8 + right) / 2
        self._text(middle, top + FOLD / 2 + 4, text, SMALL, "soft", anchor="middle")

    def _feet(self) -> None:
        """Where the processors of each platform start."""
        lowest = self._y
        for index, column in enumerate(self._memory.columns):
            lowest = max(lowest, self._foot(self._x(index), column))
        self._y = lowest + 12

    def _foot(self, x: float, column: Column) -> float:
        y = self._y + 8
        self._text(x, y, "start", SMALL, bold=True)
        for entry in column.entries:
            for line in wrapped(entry, self._column, SMALL):
                y += LEADING
                self._text(x, y, line, SMALL, "soft")
        return y + 8

    def _legend(self) -> None:
        left, width = MARGIN, self._width - 2 * MARGIN
        points = {"x1": left, "x2": left + width, "y1": self._y, "y2": self._y}
        line = {name: _number(value) for name, value in points.items()}
        self._sub(self._root, "line", {"class": "line", **line})
        self._y += 14
        across = max(1, width // 400)
        each = width / across
        for index, kind in enumerate(self._memory.kinds):
            x, y = left + (index % across) * each, self._y + (index // across) * 24
            letter, title, meaning = KINDS[kind]
            group = self._sub(self._root, "g", {"class": kind.value})
            box = {"class": "stripe", "rx": "3", **self._box(x, y, STRIPE, 17)}
            self._sub(group, "rect", box)
            place = (x + STRIPE / 2, y + 12.5)
            self._text(*place, letter, SMALL, "letter", bold=True, anchor="middle", parent=group)
            text = fitted(f"{title}: {meaning}", each - STRIPE - 16, SMALL)
            self._text(x + STRIPE + 8, y + 12.5, text, SMALL)
        self._y += -(-len(self._memory.kinds) // across) * 24 + 16
        note = "Heights grow with the logarithm of the size. Addresses stand at the edges."
        self._text(left, self._y, fitted(note, width, SMALL), SMALL, "soft")
        self._y += LEADING

    def _x(self, index: int) -> float:
        return MARGIN + self._axis + index * (self._column + GUTTER)

    @staticmethod
    def _box(x: float, y: float, width: float, height: float) -> dict[str, str]:
        values = {"x": x, "y": y, "width": width, "height": height}
        return {name: _number(value) for name, value in values.items()}

    @staticmethod
    def _sub(
        parent: ElementTree.Element, tag: str, attributes: Mapping[str, str] | None = None
    ) -> ElementTree.Element:
        return ElementTree.SubElement(parent, tag, dict(attributes or {}))

    def _text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        ink: str = "text",
        *,
        bold: bool = False,
        mono: bool = False,
        anchor: str = "start",
        parent: ElementTree.Element | None = None,
    ) -> None:
        names = [ink, *(["mono"] if mono else []), *(["bold"] if bold else [])]
        attributes = {"class": " ".join(names), "x": _number(x), "y": _number(y)}
        attributes["font-size"] = _number(size)
        if anchor != "start":
            attributes["text-anchor"] = anchor
        owner = self._root if parent is None else parent
        self._sub(owner, "text", attributes).text = _clean(text)


def _boxes(rows: Sequence[Row], column: int) -> Iterator[tuple[int, int]]:
    """The rows from and before which a column's cell is one and the same region, or none."""
    first = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index].cells[column] is not rows[first].cells[column]:
            yield first, index
            first = index


def _style(theme: Theme, kinds: Sequence[RegionKind]) -> str:
    rules = [
        f"text {{ font-family: {SANS}; }}",
        f".mono {{ font-family: {MONO}; }}",
        ".bold { font-weight: 700; }",
        ".line, .fold { fill: none; stroke-width: 1; }",
        ".required .box { stroke-dasharray: 4 3; }",
    ]
    for kind in kinds:
        shade = SHADES[kind]
        rules.append(f".{kind.value} .stripe {{ fill: {shade.stripe}; }}")
        rules.append(f".{kind.value} .letter {{ fill: {shade.letter}; }}")
        rules.append(f".{kind.value} .box {{ stroke: {shade.stripe}; }}")
    rules += _inks(kinds, dark=theme is Theme.DARK)
    if theme is Theme.AUTO:
        inner = "\n".join(f"  {rule}" for rule in _inks(kinds, dark=True))
        rules.append(f"@media (prefers-color-scheme: dark) {{\n{inner}\n}}")
    return "\n" + "\n".join(rules) + "\n"


def _inks(kinds: Sequence[RegionKind], *, dark: bool) -> Iterator[str]:
    for name, (prop, bright, dim) in INKS.items():
        yield f".{name} {{ {prop}: {dim if dark else bright}; }}"
    for kind in kinds:
        shade = SHADES[kind]
        yield f".{kind.value} .box {{ fill: {shade.dark if dark else shade.light}; }}"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _clean(text: str) -> str:
    """What XML cannot hold, and what drives a terminal or turns a line, escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
