"""Valid or damaged files of one kind of header over and over: what costs time where anything does.

Each is made for a size of its headers in bytes; its file data is small, and named by all of them.
"""

from collections.abc import Callable, Sequence

from igvmfw.igvm.headers import (
    ErrorRange,
    GuestPolicy,
    PageData,
    PageTableRelocation,
    ParameterArea,
    ParameterInsert,
    RawHeader,
    RelocatableRegion,
    RequiredMemory,
    SupportedPlatform,
    VersionString,
    VpContext,
    VpCount,
)
from igvmfw.igvm.image import FixedHeader, assemble, fixed_size, serialize
from igvmfw.igvm.reader import U32
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import (
    OPTIONAL_BIT,
    PAGE_SIZE,
    PLATFORM_TYPES,
    SEV_VMSA_GPA,
    Architecture,
    PageDataFlags,
)
from igvmfw.igvm.vpcontext import VBS_REGISTER
from igvmfw.platforms import Platform

WORDS = (
    Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP, Platform.TDX, Platform.VSM,
)  # fmt: skip
ALL = (1 << len(WORDS)) - 1
NATIVE, SEV_ES, SNP, VSM = (1 << WORDS.index(word) for word in (WORDS[0], WORDS[2], *WORDS[3:6:2]))
FOUR_GIB = 1 << 32
CONTEXT = U32.write(1) + VBS_REGISTER.write(2, 0x20010, bytes(11), bytes(16))

Part = Callable[[int, int], Sequence[AnyHeader]]  # of an index, and where the file data begins


def _file(size: int, *parts: Part, data: bytes = bytes(PAGE_SIZE), platforms: bool = True) -> bytes:
    """The parts one after the other, each repeated until their headers have the size."""
    start: list[AnyHeader] = []
    if platforms:
        start += [
            SupportedPlatform(1 << n, 0, PLATFORM_TYPES[w], 1, 0) for n, w in enumerate(WORDS)
        ]
        start.append(GuestPolicy(0x30000, SNP))

    def headers(offset: int) -> tuple[AnyHeader, ...]:
        count = size // sum(len(serialize(tuple(part(0, 0)))) for part in parts)
        return (*start, *(h for part in parts for n in range(count) for h in part(n, offset)))

    fixed = FixedHeader(
        revision=2, architecture=Architecture.X64, page_size=PAGE_SIZE, variable_header_offset=0,
        variable_header_size=0, total_file_size=0, checksum=0,
    )  # fmt: skip
    offset = fixed_size(2) + len(serialize(headers(0)))
    return assemble(fixed, b"", serialize(headers(offset)), data)


def pages_apart(size: int) -> bytes:
    return _file(size, lambda n, offset: [PageData(n * 8192, ALL, 0)])


def pages_of_one_place(size: int) -> bytes:
    return _file(size, lambda n, offset: [PageData(n * 4096, ALL, offset)])


def pages_at_odd_places(size: int) -> bytes:
    data = b"! COCONUT-SVSM Version: ".ljust(2 * PAGE_SIZE, b"2")
    return _file(size, lambda n, offset: [PageData(n * 4096, ALL, offset + n % 4096)], data=data)


def pages_at_every_place(size: int) -> bytes:
    """Each page's data begins one byte behind the preceding one's: no two windows are alike."""
    data = b"! COCONUT-SVSM Version: " + b"-devel-" * (size // 224 + 1200)
    return _file(size, lambda n, offset: [PageData(n * 4096, ALL, offset + n)], data=data)


def large_pages(size: int) -> bytes:
    flags = PageDataFlags.IS_2MB_PAGE
    return _file(size, lambda n, offset: [PageData(n << 21, ALL, offset, flags)])


def firmware_pages(size: int) -> bytes:
    def page(n: int, offset: int) -> list[AnyHeader]:
        return [PageData(FOUR_GIB - 4096 * (n + 1), ALL, offset)]

    return _file(size, page, data=b"_FVH" * 1024)


def required_where_no_guest_has_memory(size: int) -> bytes:
    def required(n: int, offset: int) -> list[AnyHeader]:
        gpa = 0xF000_0000 - n * 8192
        return [RequiredMemory(gpa, ALL, 8192), RequiredMemory(gpa + 4096, ALL, 4096)]

    return _file(size, required)


def areas(size: int) -> bytes:
    def area(n: int, offset: int) -> list[AnyHeader]:
        return [ParameterArea(0xFFFF_F000, n), ParameterInsert(n << 32, ALL, n)]

    return _file(size, area)


def error_ranges(size: int) -> bytes:
    return _file(size, lambda n, offset: [ErrorRange(n << 32, VSM, 0x1000_0000)])


def relocations(size: int) -> bytes:
    def region(n: int, offset: int) -> list[AnyHeader]:
        return [RelocatableRegion(0xFFFF_FFFF, 0, 2, 0, 4096, n * 8192, 4096, 0, 0)]

    return _file(size, region, lambda n, offset: [VpContext(0, VSM, offset, 0)], data=CONTEXT)


def page_tables_of_no_platform(size: int) -> bytes:
    def table(n: int, offset: int) -> list[AnyHeader]:
        return [PageTableRelocation(0, 0, 0, 0, n * 8192, 4096, 4096)]

    def insertion(n: int, offset: int) -> list[AnyHeader]:
        return [ParameterArea(0, n), ParameterInsert(0, 1, n)]

    return _file(size, table, insertion)


def register_lists(size: int) -> bytes:
    register = VBS_REGISTER.write(2, 0x20010, bytes(11), bytes(16))
    count = size // 32
    data = U32.write(count) + register * count
    return _file(size, lambda n, offset: [VpContext(0, VSM, offset, 0)], data=data)


def native_contexts(size: int) -> bytes:
    return _file(size, lambda n, offset: [VpContext(0, NATIVE, offset, n & 0xFFFF)])


def vmsas(size: int) -> bytes:
    def context(n: int, offset: int) -> list[AnyHeader]:
        return [VpContext(SEV_VMSA_GPA, mask, offset, n & 0xFFFF) for mask in (SEV_ES, SNP)]

    return _file(size, context)


def platforms(size: int) -> bytes:
    def platform(n: int, offset: int) -> list[AnyHeader]:
        return [SupportedPlatform(n, 0, n % 9, 1, 0)]

    return _file(
        size, platform, lambda n, offset: [PageData(n * 8192, n, 0, 0, 7)], platforms=False
    )


def optional_headers(size: int) -> bytes:
    return _file(size, lambda n, offset: [RawHeader(OPTIONAL_BIT | 0x302, b"")])


def headers_without_content(size: int) -> bytes:
    return _file(size, lambda n, offset: [RawHeader(0x302, b"")])


def version_strings(size: int) -> bytes:
    return _file(size, lambda n, offset: [VersionString(b"\xff")])


def parameters(size: int) -> bytes:
    return _file(size, lambda n, offset: [ParameterArea(4096, n), VpCount(n, 0)])


SHAPES = (
    pages_apart, pages_of_one_place, pages_at_odd_places, pages_at_every_place, large_pages,
    firmware_pages, required_where_no_guest_has_memory, areas, error_ranges, relocations,
    page_tables_of_no_platform, register_lists, native_contexts, vmsas, platforms, optional_headers,
    headers_without_content, version_strings, parameters,
)  # fmt: skip
