"""What an IGVM file carries: OVMF, an SVSM, its services; read from the guest's memory.

No header names the payload.  The memory of one platform is put together by guest address, because
pages lie in the file in any order, several may share one place, and what is looked for crosses
page borders.  A file's text outside that platform's memory never counts.

Source of the marks: builds of COCONUT-SVSM (its log messages and crate paths), and OVMF's GUIDed
table (ovmf.py).
"""

import itertools
import re
from collections.abc import Iterable, Iterator

from igvmfw.errors import FirmwareError
from igvmfw.igvm.headers import Extent, PageData
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.ovmf import OvmfTables, find_tables
from igvmfw.igvm.spec import PAGE_SIZE
from igvmfw.platforms import Platform
from igvmfw.records import Record

FOUR_GIB = 1 << 32
MAX_FIRMWARE = 64 << 20  # bytes below 4 GiB that are looked at as firmware
OVERLAP = 128  # bytes of the preceding page searched along; longer than any mark
ZERO_PAGE = bytes(PAGE_SIZE)

STRIDE = 256 * PAGE_SIZE  # bytes searched at once, at most
MAX_MARKS = 4  # pages named for an SVSM; its kernel is one

_SVSM = b"! COCONUT-SVSM Version: "
_UNRELEASED = b"-devel-"
_VERSION = re.compile(rb"20\d\d\.\d\d%b\d+-g[0-9a-f]{7,40}\+?" % _UNRELEASED)
_SERVICES = {
    "vtpm": (b"svsm::protocols::vtpm", b"kernel/src/vtpm/", b"TPM_Manufacture"),
    "uefi_variables": (b"uefi mm protocol failed to initialize",),
    "persistence": (b"CocoonFs", b"CCFSMKFS", b"kernel/src/persistence.rs"),
}


class Payload(Record):
    """What was found in the memory of one platform.

    Attributes:
        platform: The platform; None where nothing was looked at.
        firmware: "OVMF", or None.
        svsm: "COCONUT-SVSM", or None.
        svsm_version: As the SVSM states it.
        vtpm: Whether the SVSM has a virtual TPM.
        uefi_variables: Whether the SVSM has a store of UEFI variables.
        persistence: Whether these keep their state on a disk.
        tables: The GUIDed tables of OVMF.
    """

    platform: Platform | None = None
    firmware: str | None = None
    svsm: str | None = None
    svsm_version: str | None = None
    vtpm: bool = False
    uefi_variables: bool = False
    persistence: bool = False
    tables: OvmfTables | None = None


def identify(image: IgvmFile, platform: Platform | None = None) -> Payload:
    """Find out what a file carries.

    Args:
        image: The file.
        platform: Whose memory to look at; the file's first platform where None.
    Raises:
        IgvmError: The file does not have the platform, or its data cannot be read.
    """
    if platform is None:
        if not image.supported:
            return Payload()
        platform = image.supported[0]
    pages = _memory(image, platform)
    below_4g = _below_4g(image, pages)
    tables = _tables(below_4g)
    firmware = "OVMF" if tables is not None else None
    # what is put together already is not again, but for its ends, which a mark may cross
    first, last = FOUR_GIB - len(below_4g) + PAGE_SIZE, FOUR_GIB - PAGE_SIZE
    rest = {gpa: page for gpa, page in pages.items() if not first <= gpa < last}
    # text alone proves nothing: the other marks count only beside the SVSM's own, and without it
    # nobody has to look for them
    if any(_SVSM in window for window in _windows(image, rest)):
        svsm = _svsm(_windows(image, rest))
    elif _SVSM in below_4g:
        svsm = _svsm(itertools.chain([below_4g], _windows(image, rest)))
    else:
        return Payload(platform=platform, firmware=firmware, tables=tables)
    return svsm.replace(platform=platform, firmware=firmware, tables=tables)


def _svsm(windows: Iterable[bytes]) -> Payload:
    """The SVSM that lies in some memory: its version and services."""
    version = b""
    services: set[str] = set()
    for window in windows:
        # the plain search first: it is many times as fast
        if not version and _UNRELEASED in window and (match := _VERSION.search(window)):
            version = match.group()
        for name, marks in _SERVICES.items():
            if name not in services and any(mark in window for mark in marks):
                services.add(name)
    return Payload(
        svsm="COCONUT-SVSM",
        svsm_version=version.decode() or None,
        vtpm="vtpm" in services,
        uefi_variables="uefi_variables" in services,
        persistence="persistence" in services,
    )


def _memory(image: IgvmFile, platform: Platform) -> dict[int, PageData]:
    """The pages of a platform by guest address; a later one replaces an earlier one."""
    mask = image.mask_of(platform)
    return {page.gpa: page for page in image.pages if page.compatibility_mask & mask}


def _extents(pages: dict[int, PageData]) -> Iterator[tuple[int, int, int]]:
    """Pages that follow each other in memory and in the file as one; pages of zeroes alone.

    Yields address, place in the file and size, each in bytes, by rising address.
    """
    start = offset = size = 0
    for gpa in sorted(pages):
        place = pages[gpa].file_offset
        if size and gpa == start + size and place == offset + size and offset and size < STRIDE:
            size += PAGE_SIZE
            continue
        if size:
            yield start, offset, size
        start, offset, size = gpa, place, PAGE_SIZE
    if size:
        yield start, offset, size


def _windows(image: IgvmFile, pages: dict[int, PageData]) -> Iterator[bytes]:
    """The memory by rising address, in windows that overlap.

    Pages that follow each other in memory and in the file go together.  Equal windows are given
    once: a small file can name one page a million times.
    """
    seen: set[tuple[int, int, int]] = set()
    before = expected = 0  # where the preceding extent ends: in the file, if it has data; in memory
    for gpa, offset, size in _extents(pages):
        start = before if gpa == expected else 0
        before, expected = offset and offset + size, gpa + size
        if offset and (start, offset, size) not in seen:
            seen.add((start, offset, size))
            tail = image.content[start - OVERLAP : start] if start else b""
            yield b"".join((tail, image.content[offset : offset + size]))


def find_svsm_marks(image: IgvmFile, platform: Platform) -> tuple[int, ...]:
    """The guest addresses, in bytes, of the pages in which the SVSM's mark begins; few at most.

    Raises:
        IgvmError: The file does not have the platform.
    """
    places = list(itertools.islice(_places(image.content, _SVSM), MAX_MARKS))
    return tuple(
        gpa
        for gpa, page in _memory(image, platform).items()
        if any(page.file_offset <= place < page.file_offset + PAGE_SIZE for place in places)
    )[:MAX_MARKS]


def _places(content: memoryview, mark: bytes) -> Iterator[int]:
    for start in range(0, len(content), STRIDE):
        window = bytes(content[start : start + STRIDE + len(mark) - 1])
        at = window.find(mark)
        while at >= 0:
            yield start + at
            at = window.find(mark, at + 1)


def firmware_image(image: IgvmFile, platform: Platform) -> bytes:
    """The memory of a platform that ends right below 4 GiB, where its firmware lies.

    Args:
        image: The file.
        platform: Whose memory.
    Raises:
        IgvmError: The file does not have the platform, or its data cannot be read.
    """
    return _below_4g(image, _memory(image, platform))


def _below_4g(image: IgvmFile, pages: dict[int, PageData]) -> bytes:
    start = FOUR_GIB - PAGE_SIZE
    while start in pages and FOUR_GIB - start <= MAX_FIRMWARE:
        start -= PAGE_SIZE
    firmware = {gpa: pages[gpa] for gpa in range(start + PAGE_SIZE, FOUR_GIB, PAGE_SIZE)}
    return b"".join(
        image.data_at(Extent(offset, size)) if offset else ZERO_PAGE
        for _, offset, size in _extents(firmware)
    )


def _tables(firmware: bytes) -> OvmfTables | None:
    try:
        return find_tables(firmware)
    except FirmwareError:
        return None  # no OVMF that could be launched: an attacker's, or none
