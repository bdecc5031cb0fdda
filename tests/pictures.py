"""The pictures in docs/: `python -m tests.pictures` (`make pictures`) draws them anew.

Those of COCONUT's image are pinned by tests/test_memorymap.py; that of OVMF is of the OVMF at hand.
"""

import lzma
import re
from pathlib import Path

from igvmfw.drawing import draw
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.payload import identify
from igvmfw.igvm.wrap import WRAPPED, wrap
from igvmfw.memorymap import MemoryMap, map_memory
from igvmfw.textmap import map_lines

TOP = Path(__file__).parents[1]
IMAGES = TOP / "docs" / "images"
PAGE = TOP / "docs" / "inspect.md"
COCONUT = "coconut-qemu-vtpm-snp-ovmf.igvm"
OVMF = Path("/usr/share/ovmf/OVMF.fd")
WIDTH = 100  # characters, as `inspect` prints into a pipe
BLOCK = r"(<!-- terminal map: {} -->\n+```text\n).*?(```)"


def memory_of(data: bytes, name: str) -> MemoryMap:
    image = IgvmFile.parse(data)
    return map_memory(image, name, identify(image))


def coconut() -> MemoryMap:
    data = (TOP / "tests" / "data" / "coconut" / f"{COCONUT}.xz").read_bytes()
    return memory_of(lzma.decompress(data), COCONUT)


def wrapped_ovmf() -> MemoryMap:
    return memory_of(wrap(OVMF.read_bytes(), WRAPPED, vcpus=2), "OVMF.igvm")


def terminal(memory: MemoryMap) -> str:
    lines = map_lines(memory, width=WIDTH)
    return "".join("".join(text for text, _ in line).rstrip() + "\n" for line in lines)


def with_terminal_map(page: str, name: str, memory: MemoryMap) -> str:
    """The page with the map behind the comment that names it."""
    pattern, block = BLOCK.format(re.escape(name)), terminal(memory)
    return re.sub(pattern, lambda match: match[1] + block + match[2], page, flags=re.DOTALL)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "coconut.svg").write_bytes(draw(coconut()))
    (IMAGES / "ovmf.svg").write_bytes(draw(wrapped_ovmf()))
    text = with_terminal_map(PAGE.read_text(), "coconut", coconut())
    PAGE.write_text(with_terminal_map(text, "ovmf", wrapped_ovmf()))
