"""The memory map as people see it: the picture as other programs render it, the terminal's text."""

import io
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from lxml import etree
from PIL import Image, ImageFont

from igvmfw.drawing import INKS, NAMESPACE, SHADES, Theme, draw
from igvmfw.files import STDIN
from igvmfw.igvm.headers import ErrorRange, PageData, RequiredMemory
from igvmfw.igvm.image import IgvmFile, assemble, serialize
from igvmfw.igvm.payload import Payload
from igvmfw.igvm.regions import RegionKind
from igvmfw.memorymap import MAX_ROWS, MemoryMap, map_memory
from igvmfw.platforms import Platform
from igvmfw.textmap import map_lines
from tests import pictures
from tests.igvm import samples
from tests.parts import need

FONTS = Path("/usr/share/fonts/truetype/dejavu")
SVG = f"{{{NAMESPACE}}}"
HOSTILE = 'x<&"\x1b]0;\x07]]>\udcff' + "ü" * 300


def hostile(count: int = 1000) -> MemoryMap:
    """A map of far more regions than anyone draws, up to the end of the address space."""
    base = IgvmFile.parse(samples.small(*list(Platform)[:4]))
    pages = [PageData(i << 40, 15, 0, i % 2 * 2, i % 4) for i in range(1, count)]
    last = RequiredMemory((1 << 64) - 0x1000, 15, 0xFFFF_F000)
    body = serialize((*base.headers, *pages, last))
    data = assemble(base.fixed, b"", body, bytes(4096))
    image = IgvmFile.parse(data, lenient=True)
    return map_memory(image, HOSTILE, Payload())


def all_kinds() -> MemoryMap:
    """A map with every kind of region."""
    base = IgvmFile.parse(samples.small(Platform.SEV_SNP))
    pages = [PageData((i + 16) << 12, 1, 0, i % 2 * 2, i // 2) for i in range(10)]
    others = ErrorRange(0x20_0000, 1, 0x2000), RequiredMemory(0x40_0000, 1, 0x4000_0000)
    body = serialize((*base.headers, *pages, *others))
    data = assemble(base.fixed, b"", body, bytes(base.file_data))
    return map_memory(IgvmFile.parse(data, lenient=True), "kinds.igvm", Payload())


def one_page() -> MemoryMap:
    return pictures.memory_of(samples.cca(), "one-page.igvm")


@pytest.fixture(params=["coconut", "ovmf", "one-page", "kinds", "hostile"])
def memory(request: pytest.FixtureRequest) -> MemoryMap:
    if request.param == "ovmf":
        request.getfixturevalue("ovmf")
        return pictures.wrapped_ovmf()
    makers = {"coconut": pictures.coconut, "one-page": one_page, "kinds": all_kinds}
    return makers.get(request.param, hostile)()


def rendered(svg: bytes) -> Image.Image:
    """The picture as librsvg draws it."""
    need(shutil.which("rsvg-convert") is not None, "rsvg-convert (librsvg2-bin)")
    done = subprocess.run(["rsvg-convert"], input=svg, capture_output=True, timeout=60, check=True)
    assert not done.stderr
    return Image.open(io.BytesIO(done.stdout)).convert("RGB")


def font_of(text: etree._Element) -> ImageFont.FreeTypeFont:
    names = (text.get("class") or "").split()
    family = "DejaVuSansMono" if "mono" in names else "DejaVuSans"
    path = FONTS / f"{family}{'-Bold' if 'bold' in names else ''}.ttf"
    need(path.exists(), "DejaVu's fonts (fonts-dejavu-core)")
    return ImageFont.truetype(str(path), 64)


def text_boxes(root: etree._Element) -> Iterator[tuple[float, float, float, float, str]]:
    """Where every text stands, by the metrics of the font it is rendered in."""
    for text in root.iter(f"{SVG}text"):
        size = float(text.get("font-size") or 0)
        left, top, right, bottom = font_of(text).getbbox(text.text or "", anchor="ls")
        x, y, scale = float(text.get("x") or 0), float(text.get("y") or 0), size / 64
        anchor = {"end": right - left, "middle": (right - left) / 2}
        x -= anchor.get(text.get("text-anchor") or "", 0) * scale
        yield x, y + top * scale, x + (right - left) * scale, y + bottom * scale, text.text or ""


def test_every_text_is_on_the_canvas_and_over_no_other(memory: MemoryMap) -> None:
    root = etree.fromstring(draw(memory))
    width, height = float(root.get("width") or 0), float(root.get("height") or 0)
    boxes = sorted(text_boxes(root), key=lambda box: box[1])
    assert len(boxes) > 10
    for left, top, right, bottom, text in boxes:
        assert left >= 0, text
        assert top >= 0, text
        assert right <= width, text
        assert bottom <= height, text
    for index, one in enumerate(boxes):
        for other in boxes[index + 1 :]:
            if other[1] >= one[3]:
                break  # and all others stand lower still
            assert one[2] <= other[0] or other[2] <= one[0], f"{one} lies over {other}"


def test_every_label_is_within_its_region(memory: MemoryMap) -> None:
    root = etree.fromstring(draw(memory))
    for group in root.iter(f"{SVG}g"):
        box = group.find(f"{SVG}rect[@class='box']")
        if box is None:
            continue  # of the legend
        x, y, width, height = (float(box.get(name) or 0) for name in ("x", "y", "width", "height"))
        for left, top, right, bottom, text in text_boxes(group):
            assert x <= left, text
            assert right <= x + width, text
            assert y <= top, text
            assert bottom <= y + height, text


@pytest.mark.parametrize("theme", list(Theme))
def test_librsvg_renders_every_kind_in_its_colour(memory: MemoryMap, theme: Theme) -> None:
    svg = draw(memory, theme=theme)
    root = etree.fromstring(svg)
    picture = rendered(svg)
    assert picture.size == (
        round(float(root.get("width") or 0)), round(float(root.get("height") or 0)),
    )  # fmt: skip
    counted = cast("list[tuple[int, tuple[int, int, int]]]", picture.getcolors(1 << 24))
    colours = {f"#{bytes(colour).hex()}": number for number, colour in counted}
    dark = theme is Theme.DARK
    page = INKS["page"][2 if dark else 1]
    assert max(colours, key=lambda colour: colours[colour]) in (
        page,
        INKS["panel"][2 if dark else 1],
    )
    for kind in memory.kinds:
        shade = SHADES[kind]
        assert colours.get(shade.stripe, 0) > 50, kind
        assert colours.get(shade.dark if dark else shade.light, 0) > 200, kind


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [1, 2])
def test_texts_have_the_contrast_that_wcag_asks_for(theme: int) -> None:
    for ink in ("text", "soft"):
        behind = [INKS["page"][theme], INKS["panel"][theme]]
        behind += [shade[theme + 1] for shade in SHADES.values()]
        for colour in behind:
            assert contrast(INKS[ink][theme], colour) >= 4.5, (ink, colour)
    for kind, shade in SHADES.items():
        assert contrast(shade.letter, shade.stripe) >= 4.5, kind


def test_a_dark_screen_gets_the_dark_colours_and_no_others() -> None:
    memory = all_kinds()
    assert set(memory.kinds) == set(RegionKind)

    def rules(theme: Theme) -> list[str]:
        style = etree.fromstring(draw(memory, theme=theme)).findtext(f"{SVG}style") or ""
        return [line.strip() for line in style.split("\n") if line.strip()]

    start = next(i for i, rule in enumerate(rules(Theme.AUTO)) if rule.startswith("@media"))
    auto = rules(Theme.AUTO)
    assert auto[:start] == rules(Theme.LIGHT)
    assert auto[start] == "@media (prefers-color-scheme: dark) {"
    assert auto[start + 1 : -1] == rules(Theme.DARK)[-len(auto[start + 1 : -1]) :]


def test_the_picture_needs_nothing_else_and_does_nothing(memory: MemoryMap) -> None:
    svg = draw(memory)
    root = etree.fromstring(svg)
    names = {etree.QName(element).localname for element in root.iter()}
    assert names <= {"svg", "title", "style", "g", "rect", "line", "polyline", "text"}
    attributes = {name for element in root.iter() for name in element.attrib}
    assert not [name for name in attributes if "href" in str(name) or str(name).startswith("on")]
    assert b"url(" not in svg
    assert b"@import" not in svg
    assert b"\x1b" not in svg


def test_a_hostile_file_gives_a_bounded_picture_that_says_so() -> None:
    small, large = hostile(1000), hostile(5000)
    assert len(large.rows) == MAX_ROWS
    drawn = draw(large)
    assert abs(len(drawn) - len(draw(small))) < 2000
    assert len(drawn) < 1 << 20
    assert re.search(rb"and [\d,]+ more regions", drawn)
    assert len(list(map_lines(large, width=100))) < 2 * MAX_ROWS + 20  # two tables of two columns


def test_docs_show_what_is_drawn_now() -> None:
    """`make pictures` brings them up to date."""
    assert (pictures.IMAGES / "coconut.svg").read_bytes() == draw(pictures.coconut())
    page = pictures.PAGE.read_text()
    assert "COCONUT-SVSM kernel   " in page
    assert pictures.with_terminal_map(page, "coconut", pictures.coconut()) == page
    # the OVMF is the one at hand: what it has is the same everywhere, sizes are not
    shown = page.partition("<!-- terminal map: ovmf -->")[2]
    for text in (" native ", " sev-es ", "S  OVMF secrets", "V  VMSA of vCPUs 0, 1 "):
        assert text in shown
    ovmf = etree.fromstring((pictures.IMAGES / "ovmf.svg").read_bytes())
    heads = {text.text for text in ovmf.iter(f"{SVG}text") if text.get("font-size") == "15"}
    assert heads == {"native", "sev", "sev-es", "sev-snp"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.igvm"
    path.write_bytes(
        samples.small(Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)
    )
    return path


def inspected(*words: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS",)}
    return subprocess.run(
        [sys.executable, "-m", "igvmfw", "inspect", *map(str, words)],
        capture_output=True, timeout=60, check=False, env={**clean, **environment},
    )  # fmt: skip


def on_a_terminal(file: Path, **environment: str) -> bytes:
    """What `inspect --map -` writes to a terminal."""
    ours, theirs = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "igvmfw", "inspect", "--map", "-", file], stdout=theirs,
        env={**clean, "TERM": "xterm-256color", **environment},
    )  # fmt: skip
    os.close(theirs)
    parts: list[bytes] = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side is closed
            part = b""
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return b"".join(parts)


def test_a_terminal_gets_colours_unless_it_wants_none(file: Path) -> None:
    assert b"\x1b[" in on_a_terminal(file)
    plain = on_a_terminal(file, NO_COLOR="1")
    assert not re.search(rb"\x1b\[[0-9;]*[34]8;", plain)  # bold and dim may stay
    assert b" measured" in plain
    assert b"\x1b" not in inspected("--map", "-", file).stdout


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 150, 300])
def test_no_line_is_longer_than_the_terminal_is_wide(file: Path, columns: int) -> None:
    out = inspected("--map", "-", file, COLUMNS=str(columns)).stdout.decode()
    summary = inspected(file).stdout.decode()
    assert out.startswith(summary)
    lines = out.removeprefix(summary).splitlines()
    assert max(map(len, lines)) <= columns
    for platform in ("native", "sev", "sev-es", "sev-snp"):
        assert re.search(rf"^ .*\b{platform}\b", "\n".join(lines), re.MULTILINE)
    assert not [line for line in lines if line != line.rstrip()]


def test_a_locale_without_utf_8_gets_ascii(file: Path) -> None:
    out = inspected("--map", "-", file, COLUMNS="60", PYTHONIOENCODING="ascii").stdout
    assert b"VMSA of vCPU 0" in out
    assert out.isascii()


def test_the_map_goes_into_the_file_whole_or_not_at_all(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.svg"
    done = inspected("--json", "--map", out, "--theme", "dark", file)
    assert done.returncode == 0
    assert done.stdout.startswith(b"{")
    root = etree.parse(out).getroot()
    assert root.findtext(f"{SVG}title") == "Memory map of small.igvm"
    damaged = tmp_path / "damaged.igvm"
    damaged.write_bytes(file.read_bytes()[:200])
    before = out.read_bytes()
    assert inspected("--map", out, damaged).returncode == 3
    assert out.read_bytes() == before
    assert inspected("--map", out, "--lenient", damaged).returncode == 3
    etree.parse(out)
    assert inspected("--map", tmp_path / "none" / "x.svg", file).returncode == 4
    assert {path.name for path in tmp_path.iterdir()} == {"map.svg", "small.igvm", "damaged.igvm"}


def test_a_map_never_overwrites_what_it_was_not_meant_for(file: Path) -> None:
    content = file.read_bytes()
    for words in (
        ["--map", file, file],
        ["--map", file],
        ["--map", "x.svg", file, file],
        ["--map", STDIN, "--json", file],
    ):
        done = inspected(*words)
        assert (done.returncode, done.stdout) == (2, b""), words
        assert done.stderr.count(b"\n") == 1
    assert file.read_bytes() == content


def test_a_reader_that_goes_away_is_no_error(file: Path) -> None:
    command = f"'{sys.executable}' -m igvmfw inspect --map - '{file}' | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
