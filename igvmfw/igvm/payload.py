"""What an IGVM file carries: OVMF, an SVSM, its services; read from the guest's memory.

No header names the payload.  The memory of one platform is put together by guest address, because
pages lie in the file in any order, several may share one place, and what is looked for crosses
page borders.  A file's text outside that platform's memory never counts.

Source of the marks: builds of COCONUT-SVSM (its log messages and crate paths), and OVMF's GUIDed
table (ovmf.py).
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from igvmfw.errors import FirmwareError, IgvmError
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

TABLES = 64 << 10  # bytes at the firmware's end in which OVMF's tables usually lie
STRIDE = 32 * PAGE_SIZE  # bytes searched at once, at most; what a processor's cache holds
MAX_UNFOLDED = 8  # times the file's size that is searched; few pages of real files share their data
MAX_MARKS = 4  # pages named for an SVSM; its kernel is one

_SVSM = b"! COCONUT-SVSM Version: "
_UNRELEASED = b"-devel-"
_RELEASE_LENGTH = len("2026.01")
_VERSION = re.compile(rb"20\d\d\.\d\d%b\d+-g[0-9a-f]{7,40}\+?" % _UNRELEASED)


def _text(mark: bytes) -> Callable[[bytes], object]:
    return lambda window: mark in window


_SERVICES: Mapping[str, tuple[Callable[[bytes], object], ...]] = {
    "vtpm": tuple(map(_text, (b"svsm::protocols::vtpm", b"kernel/src/vtpm/", b"TPM_Manufacture"))),
    "uefi_variables": (_text(b"uefi mm protocol failed to initialize"),),
    # one expression for two that begin alike: the search goes from one C to the next
    "persistence": (re.compile(b"CocoonFs|CCFSMKFS").search, _text(b"kernel/src/persistence.rs")),
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
        IgvmError: The file does not have the platform, its data cannot be read, or it unfolds to
            more memory than igvmfw looks at.
    """
    if platform is None:
        if not image.supported:
            return Payload()
        platform = image.supported[0]
    pages = _memory(image, platform)
    start = _firmware_start(pages)
    tables = _tables(image, pages, start)
    firmware = "OVMF" if tables is not None else None
    # text alone proves nothing: the other marks count only beside the SVSM's own, and without it
    # nobody has to look for them
    marked = next((gpa for gpa, window in _windows(image, pages) if _SVSM in window), None)
    if marked is None:
        return Payload(platform=platform, firmware=firmware, tables=tables)
    if not start <= marked < FOUR_GIB:
        pages = {gpa: page for gpa, page in pages.items() if not start <= gpa < FOUR_GIB}
    svsm = _svsm(window for _, window in _windows(image, pages))
    return svsm.replace(platform=platform, firmware=firmware, tables=tables)


def _svsm(windows: Iterable[bytes]) -> Payload:
    """The SVSM that lies in some memory: its version and services."""
    version = b""
    services: set[str] = set()
    for window in windows:
        version = version or _version(window)
        for name, searches in _SERVICES.items():
            if name not in services and any(found(window) for found in searches):
                services.add(name)
    return Payload(
        svsm="COCONUT-SVSM",
        svsm_version=version.decode() or None,
        vtpm="vtpm" in services,
        uefi_variables="uefi_variables" in services,
        persistence="persistence" in services,
    )


def _version(window: bytes) -> bytes:
    at = window.find(_UNRELEASED)  # many times as fast as the expression
    while at >= 0:
        if match := _VERSION.match(window, max(0, at - _RELEASE_LENGTH)):
            return match.group()
        at = window.find(_UNRELEASED, at + 1)
    return b""


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


def _windows(image: IgvmFile, pages: dict[int, PageData]) -> Iterator[tuple[int, bytes]]:
    """The memory by falling address, in windows that overlap, each with its address.

    A program's texts lie behind its code: what is looked for is found soon.  Pages that follow
    each other in memory and in the file go together.  Equal windows are given once: a small file
    can name one page a million times.

    Raises:
        IgvmError: They are many times as large as the file, whose pages overlap in its data.
    """
    left = MAX_UNFOLDED * len(image.content)
    spans: dict[tuple[int, int, int], int] = {}  # tail's end, place and size → address
    before = expected = 0  # where the preceding extent ends: in the file, if it has data; in memory
    for gpa, offset, size in _extents(pages):
        start = before if gpa == expected else 0
        before, expected = offset and offset + size, gpa + size
        if offset:
            spans.setdefault((start, offset, size), gpa)
    for (start, offset, size), gpa in reversed(spans.items()):
        left -= size
        if left < 0:
            raise IgvmError(
                f"the file unfolds to more memory than igvmfw looks at, {MAX_UNFOLDED} times its "
                "size: its pages overlap in the file's data",
                hint="do not use this file: it is damaged, or made to keep its readers busy",
            )
        tail = image.content[start - OVERLAP : start] if start else b""
        yield gpa, b"".join((tail, image.content[offset : offset + size]))


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
    pages = _memory(image, platform)
    return _joined(image, pages, _firmware_start(pages))


def _firmware_start(pages: dict[int, PageData]) -> int:
    """Where the memory begins that ends right below 4 GiB without a gap; 4 GiB: there is none."""
    start = FOUR_GIB
    while start - PAGE_SIZE in pages and FOUR_GIB - start <= MAX_FIRMWARE:
        start -= PAGE_SIZE
    return start


def _joined(image: IgvmFile, pages: dict[int, PageData], start: int) -> bytes:
    """The memory from an address to 4 GiB."""
    firmware = {gpa: pages[gpa] for gpa in range(start, FOUR_GIB, PAGE_SIZE)}
    return b"".join(
        image.data_at(Extent(offset, size)) if offset else ZERO_PAGE
        for _, offset, size in _extents(firmware)
    )


def _tables(image: IgvmFile, pages: dict[int, PageData], start: int) -> OvmfTables | None:
    for begin in (max(start, FOUR_GIB - TABLES), start):
        try:
            return find_tables(_joined(image, pages, begin))
        except FirmwareError:
            continue  # they begin further in front, or an attacker made them
    return None
