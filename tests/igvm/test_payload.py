"""What a file carries is read from one platform's memory, never from the file's text."""

import pytest

from igvmfw.errors import IgvmError
from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.payload import identify
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from tests.fuzz.shapes import pages_at_every_place
from tests.igvm import samples

SVSM = b"! COCONUT-SVSM Version: "
VERSION = b"2026.07-devel-113-gf4bc4bcd+"
VTPM = b"svsm::protocols::vtpm"


def svsm_file(*, split: int = 0, mask: int = 1, spread: bool = False) -> bytes:
    """A file whose marks begin `split` bytes before a page's end."""
    text = SVSM + b"\0" * 200 + VERSION + b" " + b"\0" * 100 + VTPM
    memory = b"x" * (4096 - split) + text.ljust(8192, b"x")
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.NATIVE, 1))
    builder.add(samples.platform(Platform.SEV_SNP, 2))
    pages = [memory[start : start + 4096] for start in range(0, len(memory) // 4096 * 4096, 4096)]
    order = list(enumerate(pages))
    if spread:
        order.reverse()  # places in the file do not follow the addresses
    for index, page in order:
        builder.add_page(0x800_0000 + index * 4096, mask, page)
    return builder.build()


def test_marks_are_found_across_page_borders_and_in_any_file_order() -> None:
    for split in range(1, len(SVSM) + 1, 5):
        for spread in (False, True):
            data = svsm_file(split=split, spread=spread)
            payload = identify(IgvmFile.parse(data), Platform.NATIVE)
            assert payload.svsm == "COCONUT-SVSM", (split, spread)
            assert payload.svsm_version == VERSION.decode()
            assert payload.vtpm


def test_another_platforms_memory_does_not_count() -> None:
    image = IgvmFile.parse(svsm_file(mask=2))
    assert identify(image, Platform.NATIVE).svsm is None
    assert identify(image, Platform.SEV_SNP).svsm == "COCONUT-SVSM"


def test_services_count_only_beside_the_svsm() -> None:
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.NATIVE, 1))
    builder.add_page(0x1000, 1, VTPM + b" " + VERSION)
    payload = identify(IgvmFile.parse(builder.build()))
    assert (payload.svsm, payload.svsm_version, payload.vtpm) == (None, None, False)


def test_a_file_that_unfolds_to_much_more_than_itself_is_refused() -> None:
    """32 bytes name 4 KiB that differ from all others: 7 MB would be searched for half a minute."""
    image = IgvmFile.parse(pages_at_every_place(64 << 10))
    with pytest.raises(IgvmError, match="unfolds to more memory than igvmfw looks at"):
        identify(image)


def test_ovmf_is_known_by_its_table(ovmf_bytes: bytes) -> None:
    image = IgvmFile.parse(wrap(ovmf_bytes, [Platform.NATIVE]))
    assert identify(image).firmware == "OVMF"
    assert identify(image).svsm is None
    blank = bytes(4080) + b"\xf4" * 16  # code where a processor starts, and no table
    raw = wrap(ovmf_bytes[:-4096] + blank, [Platform.NATIVE])
    assert identify(IgvmFile.parse(raw)).firmware is None
