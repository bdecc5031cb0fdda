"""An IGVM file: fixed header, checksum, sections; read without copying its data, and written.

Source: igvm_defs 0.5.0, src/lib.rs (module documentation, IGVM_FIXED_HEADER*,
IGVM_VHS_VARIABLE_HEADER).
"""

import zlib
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Self

from igvmfw.errors import IgvmError
from igvmfw.igvm.headers import (
    HEADERS,
    Extent,
    Header,
    PageData,
    RawHeader,
    SupportedPlatform,
    VpContext,
)
from igvmfw.igvm.reader import Buffer, Layout
from igvmfw.igvm.rules import AnyHeader, Problem, Rules
from igvmfw.igvm.spec import (
    MAGIC,
    OPTIONAL_BIT,
    PAGE_SIZE,
    PLATFORM_TYPES,
    PLATFORM_WORDS,
    RANGES,
    Architecture,
    HeaderType,
    PlatformType,
    Section,
    type_name,
)
from igvmfw.platforms import Platform
from igvmfw.records import Record

FIXED_V1 = Layout("IIIIII")
FIXED_V2 = Layout("IIIIIIII")
VARIABLE = Layout("II")
_PAGE = Layout("8x" + PageData.LAYOUT.codes)  # a page, behind its type and length
_PAGE_START = Layout(f"II{PageData.LAYOUT.size}x")  # these two alone
_IS_PAGE = (int(PageData.TYPE), PageData.LAYOUT.size).__eq__
CHECKSUM_OFFSET = 20  # of the checksum within the fixed header, in bytes
MAX_FILE = (1 << 32) - 1  # bytes: total_file_size is a u32


class FixedHeader(Record):
    """The fixed header's fields; sizes and offsets in bytes.

    Source: IGVM_FIXED_HEADER and IGVM_FIXED_HEADER_V2.
    """

    revision: int
    architecture: Architecture
    page_size: int
    variable_header_offset: int
    variable_header_size: int
    total_file_size: int
    checksum: int

    @property
    def file_data_offset(self) -> int:
        """Where the file data begins."""
        return self.variable_header_offset + self.variable_header_size


class IgvmFile(Record):
    """A file as read: every header in file order, the data still where it was.

    Attributes:
        fixed: The fixed header.
        headers: The variable headers.
        header_offsets: Where each of them begins, in bytes from the file's beginning.
        content: The whole file, a view that is only valid as long as its source is.
        problems: What is wrong with the file; empty unless it was read leniently.
        platforms: The headers of its supported platforms, in file order.
        platform_types: The type that each of their compatibility masks stands for.
        pages: The PAGE_DATA headers, in file order.
        others: All headers but these, in file order.
    """

    fixed: FixedHeader
    headers: tuple[AnyHeader, ...]
    header_offsets: tuple[int, ...]
    content: memoryview
    problems: tuple[Problem, ...]
    platforms: tuple[SupportedPlatform, ...]
    platform_types: Mapping[int, int]
    pages: tuple[PageData, ...]
    others: tuple[AnyHeader, ...]

    @classmethod
    def parse(cls, data: Buffer, *, lenient: bool = False) -> Self:
        """Read an IGVM file.

        Args:
            data: The whole file; nothing but the headers is looked at.
            lenient: Go on after a broken rule as far as the file can be read, and keep what is
                wrong in `problems`.
        Raises:
            IgvmError: The file breaks a rule of the format (when lenient: it has no fixed header).
        """
        content = memoryview(data)
        problems: list[Problem] = []

        def found(problem: Problem) -> None:
            if not lenient:
                raise problem.error()
            problems.append(problem)

        fixed = _read_fixed(content)
        for problem in _fixed_problems(fixed, content):
            found(problem)
        headers: list[AnyHeader] = []
        offsets: list[int] = []
        end = min(fixed.file_data_offset, len(content))
        stopped = _read_headers(content, fixed.variable_header_offset, end, headers, offsets)
        if stopped is not None:
            found(stopped)
        rules = Rules(
            architecture=fixed.architecture,
            content=content,
            file_data_offset=fixed.file_data_offset,
        )
        for problem in rules.check(headers, offsets):
            found(problem)
        others = tuple([header for header in headers if type(header) is not PageData])
        platforms = tuple(header for header in others if isinstance(header, SupportedPlatform))
        return cls(
            fixed=fixed,
            headers=tuple(headers),
            header_offsets=tuple(offsets),
            content=content,
            problems=tuple(problems),
            platforms=platforms,
            platform_types={p.compatibility_mask: p.platform_type for p in platforms},
            pages=tuple([header for header in headers if type(header) is PageData]),
            others=others,
        )

    def write(self) -> bytes:
        """The file's bytes again, with size and checksum computed anew.

        Raises:
            IgvmError: A header's value does not fit, or the file would exceed 4 GiB.
        """
        body = serialize(self.headers)
        fixed = self.fixed
        gap = bytes(self.content[fixed_size(fixed.revision) : fixed.variable_header_offset])
        return assemble(fixed, gap, body, self.file_data)

    @property
    def revision(self) -> int:
        """The format's revision, 1 or 2."""
        return self.fixed.revision

    @property
    def architecture(self) -> Architecture:
        """The processor architecture the file is for."""
        return self.fixed.architecture

    @property
    def page_size(self) -> int:
        """The page size of the file, in bytes."""
        return self.fixed.page_size

    @property
    def file_data(self) -> memoryview:
        """The file data section."""
        return self.content[self.fixed.file_data_offset :]

    def section(self, section: Section) -> Iterator[AnyHeader]:
        """The headers of a section, in file order."""
        wanted = RANGES[section]
        return (header for header in self.headers if header.type & ~OPTIONAL_BIT in wanted)

    @property
    def initializations(self) -> tuple[AnyHeader, ...]:
        """The initialization headers, in file order."""
        return tuple(self.section(Section.INITIALIZATION))

    @property
    def directives(self) -> tuple[AnyHeader, ...]:
        """The directives, in file order."""
        return tuple(self.section(Section.DIRECTIVE))

    @property
    def supported(self) -> tuple[Platform, ...]:
        """The platforms the file has, as words, in file order."""
        types = dict.fromkeys(header.platform_type for header in self.platforms)
        return tuple(
            PLATFORM_WORDS[PlatformType(number)]
            for number in types
            if number in PlatformType._value2member_map_
        )

    def find_platform(self, platform: Platform) -> SupportedPlatform | None:
        """The header of a platform, or None where the file does not have it."""
        wanted = PLATFORM_TYPES[platform]
        return next((item for item in self.platforms if item.platform_type == wanted), None)

    def type_of(self, mask: int) -> int | None:
        """The platform type that has a compatibility mask; None where no platform has it."""
        return self.platform_types.get(mask)

    def mask_of(self, platform: Platform) -> int:
        """The compatibility mask of a platform; every file assigns its own.

        Raises:
            IgvmError: The file does not have the platform.
        """
        found = self.find_platform(platform)
        if found is None:
            have = ", ".join(self.supported) or "none"
            raise IgvmError(f"the file has no platform {platform}, only: {have}")
        return found.compatibility_mask

    def for_platform(self, platform: Platform) -> Iterator[AnyHeader]:
        """The initialization headers and directives that apply to a platform, in file order.

        Parameters and their areas carry no mask: they apply to every platform.
        """
        mask = self.mask_of(platform)
        for header in self.headers:
            if not isinstance(header, SupportedPlatform) and mask & mask_in(header):
                yield header

    def data_of(self, header: AnyHeader) -> memoryview:
        """The file data of a header; empty where it has none.

        Raises:
            IgvmError: The data does not lie within the file data.
        """
        if isinstance(header, VpContext):
            return self.data_at(Extent(header.file_offset, PAGE_SIZE))
        extent = header.extent() if isinstance(header, Header) else None
        return self.data_at(extent) if extent is not None else memoryview(b"")

    def data_at(self, extent: Extent) -> memoryview:
        """A part of the file data, addressed from the file's start.

        Raises:
            IgvmError: It does not lie within the file data.
        """
        start, size = extent
        if start < self.fixed.file_data_offset or start + size > len(self.content):
            raise IgvmError(
                f"data of 0x{size:x} bytes at 0x{start:x} is outside the file data "
                f"(0x{self.fixed.file_data_offset:x} to 0x{len(self.content):x})"
            )
        return self.content[start : start + size]


def mask_in(header: AnyHeader) -> int:
    """The compatibility mask a header carries; all bits where it carries none."""
    mask: int = getattr(header, "compatibility_mask", 0xFFFF_FFFF)
    return mask


def fixed_size(revision: int) -> int:
    """The size of the fixed header, in bytes."""
    return FIXED_V1.size if revision == 1 else FIXED_V2.size


def _read_fixed(content: memoryview) -> FixedHeader:
    if content[:4] != MAGIC.to_bytes(4, "little"):
        raise _not_igvm(content)
    _, revision, offset, size, total, checksum = FIXED_V1.read(content, 0, "fixed header")
    architecture, page_size = Architecture.X64, PAGE_SIZE
    if revision == 2:
        number, page_size = FIXED_V2.read(content, 0, "fixed header of revision 2")[6:]
        if number not in Architecture._value2member_map_:
            raise IgvmError(f"unknown architecture {number} [architecture]", where="offset 0x18")
        architecture = Architecture(number)
    elif revision != 1:
        raise IgvmError(
            f"format revision {revision} is not known, only 1 and 2 [revision]", where="offset 0x4"
        )
    return FixedHeader(
        revision=revision,
        architecture=architecture,
        page_size=page_size,
        variable_header_offset=offset,
        variable_header_size=size,
        total_file_size=total,
        checksum=checksum,
    )


def _not_igvm(content: memoryview) -> IgvmError:
    from igvmfw.kinds import kind_of  # only what goes wrong has to pay for it

    kind = kind_of(content)
    if kind is None:
        what = f"it begins with {bytes(content[:4])!r}, not b'IGVM'"
    else:
        what = f"it is {kind.name}"
    hint = None if kind is None else kind.remedy
    return IgvmError(f"not an IGVM file: {what}", where="offset 0x0", hint=hint)


def _fixed_problems(fixed: FixedHeader, content: memoryview) -> Iterator[Problem]:
    def problem(rule: str, message: str, offset: int) -> Problem:
        return Problem(rule, message, None, offset)

    if fixed.page_size != PAGE_SIZE:
        yield problem("page-size", f"page size is {fixed.page_size}, only 4096 is supported", 28)
    if fixed.total_file_size != len(content):
        yield problem(
            "file-size",
            f"the file should have {fixed.total_file_size} bytes, it has {len(content)}",
            16,
        )
    start = fixed.variable_header_offset
    if start < fixed_size(fixed.revision) or start % 8:
        yield problem(
            "variable-header-offset",
            f"variable headers at 0x{start:x}: must be a multiple of 8 behind the fixed header",
            8,
        )
    if fixed.file_data_offset > len(content):
        yield problem(
            "variable-header-size",
            f"variable headers end at 0x{fixed.file_data_offset:x}, the file at 0x{len(content):x}",
            12,
        )
    elif (found := _checksum(fixed, content)) != fixed.checksum:
        yield problem(
            "checksum", f"CRC-32 of the headers is {found:08x}, not {fixed.checksum:08x}", 20
        )


def _checksum(fixed: FixedHeader, content: memoryview) -> int:
    head = bytearray(content[: fixed_size(fixed.revision)])
    head[CHECKSUM_OFFSET : CHECKSUM_OFFSET + 4] = bytes(4)
    variable = content[fixed.variable_header_offset : fixed.file_data_offset]
    return zlib.crc32(variable, zlib.crc32(head))


def _read_headers(
    content: memoryview, start: int, end: int, headers: list[AnyHeader], offsets: list[int]
) -> Problem | None:
    """Read all variable headers into the lists; what stops the reading is returned.

    The loop runs thousands of times per file: it looks up what it needs before, and unpacks in
    place; pages that follow each other, nearly all of a file, are unpacked in bulk.
    """
    known = {int(kind): (cls, getattr(cls, "LAYOUT", None)) for kind, cls in HEADERS.items()}
    variable = VARIABLE.unpack_from
    position = start
    while position < end:
        if end - position < 8:
            return Problem(
                "truncated", f"{end - position} bytes left where a header needs 8", len(headers),
                position,
            )  # fmt: skip
        if pages := _read_pages(content, position, end):
            headers += pages
            after = position + _PAGE.size * len(pages)
            offsets += range(position, after, _PAGE.size)
            position = after
            continue
        kind, length = variable(content, position)
        body = position + 8
        after = body + ((length + 7) & ~7)
        if after > end:
            return Problem(
                "truncated",
                f"{type_name(kind)} of {length} bytes reaches beyond the variable headers' end "
                f"0x{end:x}",
                len(headers),
                position,
            )
        cls, layout = known.get(kind, (None, None))
        if cls is not None and layout is not None and layout.size == length:
            headers.append(cls.make(layout.unpack_from(content, body)))
        elif kind == HeaderType.VERSION_STRING and cls is not None:
            headers.append(cls.parse(content[body : body + length]))
        else:
            headers.append(RawHeader(kind, bytes(content[body : body + length])))
        offsets.append(position)
        position = after
    return None


def _read_pages(content: memoryview, start: int, end: int) -> list[PageData]:
    """The PAGE_DATA headers that follow each other from a place on; none where another is."""
    starts = _PAGE_START.iter_unpack(content, start, end)
    count = len(list(takewhile(_IS_PAGE, starts)))
    values = _PAGE.iter_unpack(content, start, start + count * _PAGE.size)
    return list(map(PageData.make, values))


def serialize(headers: tuple[AnyHeader, ...]) -> bytes:
    """The variable header section: type, length, content and padding of each header."""
    parts: list[bytes] = []
    for header in headers:
        body = header.write()
        parts += (VARIABLE.write(header.type, len(body)), body, bytes(-len(body) % 8))
    return b"".join(parts)


def assemble(fixed: FixedHeader, gap: bytes, body: bytes, data: Buffer) -> bytes:
    """A whole file of its parts, with sizes and checksum.

    Raises:
        IgvmError: The file would exceed 4 GiB.
    """
    offset = fixed_size(fixed.revision) + len(gap)
    total = offset + len(body) + len(data)
    if total > MAX_FILE:
        raise IgvmError(f"the file would have {total} bytes, the format allows {MAX_FILE}")

    def head(checksum: int) -> bytes:
        values = (MAGIC, fixed.revision, offset, len(body), total, checksum)
        if fixed.revision == 1:
            return FIXED_V1.write(*values)
        return FIXED_V2.write(*values, fixed.architecture, fixed.page_size)

    checksum = zlib.crc32(body, zlib.crc32(head(0)))
    return b"".join((head(checksum), gap, body, data))
