"""The rules of the format that concern more than one header, or a header and the file.

Source: igvm_defs 0.5.0 (the structures' documentation) and the checks of the crate igvm 0.5.0
(src/lib.rs, validate_* and new_from_binary_split); docs/format.md lists where igvmfw differs.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from igvmfw.errors import IgvmError
from igvmfw.igvm.headers import (
    HEADERS,
    CcaPolicy,
    CorimDocument,
    CorimSignature,
    Extent,
    Header,
    PageData,
    PageTableRelocation,
    Parameter,
    ParameterArea,
    ParameterInsert,
    RawHeader,
    RelocatableRegion,
    SupportedPlatform,
    VersionString,
    VpContext,
)
from igvmfw.igvm.spec import (
    OPTIONAL_BIT,
    PAGE_SIZE,
    Architecture,
    PageDataType,
    PlatformType,
    Section,
    section_of,
    type_name,
)
from igvmfw.igvm.vpcontext import parse_cca, parse_native, parse_vbs

AnyHeader = Header | RawHeader
_IN_PAGE = PAGE_SIZE - 1
_LAST_DATA_TYPE = int(PageDataType.CPUID_XF)


class Problem(NamedTuple):
    """A rule of the format that a file breaks, and where.

    `header_index` counts all variable headers from 0, None for the fixed header; `file_offset` is
    in bytes.
    """

    rule: str
    message: str
    header_index: int | None
    file_offset: int

    def error(self) -> IgvmError:
        """The problem as an exception."""
        header = "" if self.header_index is None else f"header {self.header_index}, "
        return IgvmError(
            f"{self.message} [{self.rule}]", where=f"{header}offset 0x{self.file_offset:x}"
        )


class _Broken(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class _VpIdentity(NamedTuple):
    mask: int
    vp_index: int
    vtl: int


class Rules:
    """One pass over a file's headers, in order, with what earlier ones established.

    Args:
        architecture: Of the file.
        content: The whole file.
        file_data_offset: Where the file data begins, in bytes.
    """

    def __init__(
        self, *, architecture: Architecture, content: memoryview, file_data_offset: int
    ) -> None:
        self._architecture = architecture
        self._content = content
        self._data_start = file_data_offset
        self._section = Section.PLATFORM
        self._platforms: dict[int, int] = {}  # mask → platform type
        self._platform_types: set[int] = set()
        self._areas: dict[int, bool] = {}  # parameter area index → inserted
        self._regions: dict[int, list[tuple[int, int]]] = defaultdict(
            list
        )  # mask bit → [start,end)
        self._page_tables: list[PageTableRelocation] = []
        self._awaited: list[tuple[_VpIdentity, int, int]] = []  # with header index and offset
        self._contexts: dict[int, int] = defaultdict(int)  # VTL → masks with a context of VP 0
        self._documents = self._signatures = 0  # masks that have one
        self._version_string = False

    def check(self, headers: Sequence[AnyHeader], offsets: Sequence[int]) -> Iterator[Problem]:
        """All problems of the variable headers, in file order."""
        data_start, last_page = self._data_start, len(self._content) - PAGE_SIZE
        section = self._section
        for index, (header, offset) in enumerate(zip(headers, offsets, strict=True)):
            # thousands of pages per file: the usual one is found right in one expression
            if type(header) is PageData and section is Section.DIRECTIVE:
                gpa, _, place, flags, data_type, reserved = header
                if (
                    not (gpa & _IN_PAGE or flags & 1 or reserved)
                    and data_type <= _LAST_DATA_TYPE
                    and (not place or data_start <= place <= last_page)
                ):
                    continue
            for rule, message in self._header(header, offset):
                yield Problem(rule, message, index, offset)
            section = self._section
            if isinstance(header, RelocatableRegion | PageTableRelocation):
                identity = _VpIdentity(header.compatibility_mask, header.vp_index, header.vtl)
                self._awaited.append((identity, index, offset))
        if not self._platforms:
            yield Problem("no-platform", "the file supports no platform", None, data_start)
        for identity, index, offset in self._awaited:
            if identity.vp_index == 0 and identity.mask & self._contexts[identity.vtl]:
                continue
            yield Problem(
                "vp-context",
                f"no VP context for VP {identity.vp_index}, VTL {identity.vtl} that the "
                "relocation refers to",
                index,
                offset,
            )

    def _header(self, header: AnyHeader, offset: int) -> Iterator[tuple[str, str]]:
        yield from self._order(header)
        if isinstance(header, RawHeader):
            yield from self._raw(header)
            return
        yield from header.breaches()
        if any(self._padding(offset, header)):
            yield "padding", f"the padding behind {type_name(header.type)} is not zero"
        extent = header.extent()
        try:
            if extent is not None:
                self._data(extent)
            check = _CHECKS.get(type(header))
            if check is not None:
                check(self, header)
            elif isinstance(header, Parameter):
                self._parameter(header)
        except _Broken as broken:
            yield broken.rule, str(broken)

    def _order(self, header: AnyHeader) -> Iterator[tuple[str, str]]:
        section = section_of(header.type)
        if section is None:
            yield "header-type", f"header type 0x{header.type:x} belongs to no section"
        elif section < self._section:
            yield (
                "section-order",
                f"{section.title} header {type_name(header.type)} behind the first "
                f"{self._section.title} header",
            )
        else:
            self._section = section

    @staticmethod
    def _raw(header: RawHeader) -> Iterator[tuple[str, str]]:
        if header.type & OPTIONAL_BIT:
            return  # the format lets a loader pass over it
        known = HEADERS.get(header.type)
        if known is not None:
            yield (
                "header-size",
                f"{type_name(header.type)} has {len(header.body)} bytes, must have "
                f"{known.LAYOUT.size}",
            )
        elif section_of(header.type) is not None:
            yield "header-type", f"unknown header type {type_name(header.type)}"

    def _padding(self, offset: int, header: Header) -> memoryview:
        layout = getattr(header, "LAYOUT", None)
        length = layout.size if layout is not None else len(header.write())
        start = offset + 8 + length
        return self._content[start : start + (-length % 8)]

    def _data(self, extent: Extent) -> memoryview:
        start, size = extent
        end = len(self._content)
        if start < self._data_start or start + size > end:
            raise _Broken(
                "file-data",
                f"data of 0x{size:x} bytes at 0x{start:x} is outside the file data "
                f"(0x{self._data_start:x} to 0x{end:x})",
            )
        return self._content[start : start + size]

    def _platform(self, header: SupportedPlatform) -> None:
        kind = header.platform_type
        if kind in self._platform_types:
            raise _Broken("platform-twice", f"platform type {kind} is declared twice")
        needed = {PlatformType.CCA: Architecture.AARCH64, PlatformType.VSM_ISOLATION: None}
        wanted = needed.get(PlatformType(kind), Architecture.X64) if kind in range(7) else None
        self._platforms[header.compatibility_mask] = kind
        self._platform_types.add(kind)
        if wanted not in (None, self._architecture):
            raise _Broken(
                "platform-architecture",
                f"platform {PlatformType(kind).name} does not exist on {self._architecture.name}",
            )

    def _cca_policy(self, header: CcaPolicy) -> None:
        if self._architecture is not Architecture.AARCH64:
            raise _Broken("policy", "CCA_POLICY needs architecture AARCH64")
        for bit in _bits(header.compatibility_mask):
            if self._platforms.get(bit) != PlatformType.CCA:
                raise _Broken("policy", f"CCA_POLICY applies to mask 0x{bit:x}, which is not CCA")

    def _relocatable(self, header: RelocatableRegion) -> None:
        self._region(
            header.compatibility_mask, header.relocation_region_gpa, header.relocation_region_size
        )

    def _page_table(self, header: PageTableRelocation) -> None:
        if any(header.compatibility_mask & other.compatibility_mask for other in self._page_tables):
            raise _Broken("relocation", "a second page table region for the same platform")
        if header.compatibility_mask:
            self._page_tables.append(header)  # 32 at most: each has masks of its own
        self._region(header.compatibility_mask, header.gpa, header.size)

    def _region(self, mask: int, start: int, size: int) -> None:
        for bit in _bits(mask):
            regions = self._regions[bit]  # sorted, and none overlaps another
            place = bisect_left(regions, (start, start))
            for other_start, other_end in regions[max(place - 1, 0) : place + 1]:
                if start < other_end and other_start < start + size:
                    raise _Broken(
                        "relocation",
                        f"region 0x{start:x} + 0x{size:x} overlaps the one at 0x{other_start:x}",
                    )
            insort(regions, (start, start + size))

    def _corim_document(self, header: CorimDocument) -> None:
        if header.compatibility_mask & self._documents:
            raise _Broken("corim", "a second CoRIM document for the same platform")
        self._documents |= header.compatibility_mask

    def _corim_signature(self, header: CorimSignature) -> None:
        if header.compatibility_mask & self._signatures:
            raise _Broken("corim", "a second CoRIM signature for the same platform")
        if header.compatibility_mask & ~self._documents:
            raise _Broken("corim", "a CoRIM signature without a document before it")
        self._signatures |= header.compatibility_mask

    def _version(self, header: VersionString) -> None:
        if self._version_string:
            raise _Broken("version-string", "a second version string")
        self._version_string = True

    def _parameter_area(self, header: ParameterArea) -> None:
        index = header.parameter_area_index
        if index in self._areas:
            raise _Broken("parameter-area", f"parameter area {index} is declared twice")
        self._areas[index] = False

    def _parameter(self, header: Parameter) -> None:
        self._open_area(header.parameter_area_index)

    def _parameter_insert(self, header: ParameterInsert) -> None:
        index = header.parameter_area_index
        self._open_area(index)
        self._areas[index] = True
        for region in self._page_tables:
            if (
                region.compatibility_mask & header.compatibility_mask
                and region.gpa <= header.gpa < region.gpa + region.size
            ):
                raise _Broken("parameter-area", "a parameter area goes into a page table region")

    def _open_area(self, index: int) -> None:
        inserted = self._areas.get(index)
        if inserted is None:
            raise _Broken("parameter-area", f"parameter area {index} is not declared before")
        if inserted:
            raise _Broken("parameter-area", f"parameter area {index} was inserted before")

    def _vp_context(self, header: VpContext) -> None:
        kind = self._platforms.get(header.compatibility_mask)
        if kind in (None, PlatformType.TDX):
            raise _Broken(
                "vp-context",
                f"a VP context needs the mask of one platform that takes one, not "
                f"0x{header.compatibility_mask:x}",
            )
        if kind not in (PlatformType.SEV_ES, PlatformType.SEV_SNP) and header.gpa:
            raise _Broken("vp-context", f"GPA is 0x{header.gpa:x}, must be zero on this platform")
        try:
            self._context_data(header, kind)
        except IgvmError as error:
            raise _Broken("vp-context", error.message) from None

    def _context_data(self, header: VpContext, kind: int | None) -> None:
        if kind == PlatformType.VSM_ISOLATION:
            if header.vp_index:
                raise _Broken("vp-context", "a VSM context can be for VP 0 only")
            rest = self._data(Extent(header.file_offset, len(self._content) - header.file_offset))
            context = parse_vbs(rest, self._architecture)
            self._contexts[context.vtl] |= header.compatibility_mask
            return
        data = self._data(Extent(header.file_offset, PAGE_SIZE))
        if kind in (PlatformType.NATIVE, PlatformType.SEV):
            parse_native(data)
        elif kind == PlatformType.CCA:
            parse_cca(data)


# bound methods kept in the object would make a cycle, and the file would stay in memory
_CHECKS: dict[type, Callable[[Rules, Any], None]] = {
    SupportedPlatform: Rules._platform,
    CcaPolicy: Rules._cca_policy,
    RelocatableRegion: Rules._relocatable,
    PageTableRelocation: Rules._page_table,
    CorimDocument: Rules._corim_document,
    CorimSignature: Rules._corim_signature,
    VersionString: Rules._version,
    ParameterArea: Rules._parameter_area,
    ParameterInsert: Rules._parameter_insert,
    VpContext: Rules._vp_context,
}


def _bits(mask: int) -> Iterator[int]:
    while mask:
        bit = mask & -mask
        yield bit
        mask &= ~bit
