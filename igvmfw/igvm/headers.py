"""The directives, and with them all headers: the table type → class.

Fields stand in the order of the layout and are named as in igvm_defs 0.5.0 (src/lib.rs,
IGVM_VHS_*).
"""

from collections.abc import Iterator

from igvmfw.igvm.header import Breach, Extent, Header, RawHeader, aligned, zero
from igvmfw.igvm.initialization import (
    CcaPolicy,
    CorimDocument,
    CorimSignature,
    GuestPolicy,
    PageTableRelocation,
    RelocatableRegion,
    SupportedPlatform,
    VersionString,
)
from igvmfw.igvm.reader import Layout
from igvmfw.igvm.spec import (
    LARGE_PAGE_SIZE,
    PAGE_SIZE,
    HeaderType,
    PageDataFlags,
    PageDataType,
    RequiredMemoryFlags,
)

__all__ = [
    "HEADERS",
    "Breach",
    "CcaPolicy",
    "CommandLine",
    "CorimDocument",
    "CorimSignature",
    "DeviceTree",
    "EnvironmentInfo",
    "ErrorRange",
    "Extent",
    "GuestPolicy",
    "Header",
    "Madt",
    "MemoryMap",
    "MmioRanges",
    "PageData",
    "PageTableRelocation",
    "Parameter",
    "ParameterArea",
    "ParameterInsert",
    "Pptt",
    "RawHeader",
    "RelocatableRegion",
    "RequiredMemory",
    "Slit",
    "SnpIdBlock",
    "Srat",
    "SupportedPlatform",
    "VbsMeasurement",
    "VersionString",
    "VpContext",
    "VpCount",
]


class ParameterArea(Header):
    """IGVM_VHS_PARAMETER_AREA: a buffer that parameters are written to before its insertion."""

    TYPE = HeaderType.PARAMETER_AREA
    LAYOUT = Layout("QII")
    number_of_bytes: int
    parameter_area_index: int
    file_offset: int = 0

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from aligned("size", self.number_of_bytes)

    def extent(self) -> Extent | None:  # noqa: D102
        return Extent(self.file_offset, self.number_of_bytes) if self.file_offset else None


# plain numbers: an IntFlag's & makes a member, which thousands of pages would wait for
_IS_2MB_PAGE = int(PageDataFlags.IS_2MB_PAGE)
_UNMEASURED = int(PageDataFlags.UNMEASURED)
_SHARED = int(PageDataFlags.SHARED)


class PageData(Header):
    """IGVM_VHS_PAGE_DATA: one page of guest memory."""

    TYPE = HeaderType.PAGE_DATA
    LAYOUT = Layout("QIIIHH")
    gpa: int
    compatibility_mask: int
    file_offset: int
    flags: int = 0
    data_type: int = 0
    reserved: int = 0

    @property
    def is_2mb_page(self) -> bool:
        """The page covers 2 MiB of guest memory."""
        return bool(self.flags & _IS_2MB_PAGE)

    @property
    def unmeasured(self) -> bool:
        """The page is not part of the launch measurement."""
        return bool(self.flags & _UNMEASURED)

    @property
    def shared(self) -> bool:
        """The page stays visible to the host, and unmeasured."""
        return bool(self.flags & _SHARED)

    @property
    def guest_size(self) -> int:
        """Bytes of guest memory the page covers."""
        return LARGE_PAGE_SIZE if self.flags & _IS_2MB_PAGE else PAGE_SIZE

    @property
    def type_name(self) -> str:
        """The data type as igvm_defs names it, or its number."""
        known = self.data_type in PageDataType._value2member_map_
        return PageDataType(self.data_type).name if known else f"type {self.data_type}"

    def is_continued_by(self, following: "PageData") -> bool:
        """Whether the other page goes on where this one ends, alike in all but its contents.

        QEMU's rule for the pages it hands over together (backends/igvm.c,
        qigvm_page_attrs_equal and qigvm_process_mem_page).
        """
        # asked of every page: the fields of both at once, not one after the other
        gpa, mask, place, flags, kind, _ = self
        next_gpa, next_mask, next_place, next_flags, next_kind, _ = following
        return (
            next_gpa == gpa + (LARGE_PAGE_SIZE if flags & _IS_2MB_PAGE else PAGE_SIZE)
            and next_mask == mask
            and next_flags == flags
            and next_kind == kind
            and bool(next_place) is bool(place)
        )

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from aligned("GPA", self.gpa, self.guest_size)
        if self.data_type > PageDataType.CPUID_XF:
            yield Breach("page-type", f"unknown page data type {self.data_type}")
        yield from zero("reserved", self.reserved)

    def extent(self) -> Extent | None:  # noqa: D102
        return Extent(self.file_offset, PAGE_SIZE) if self.file_offset else None


class ParameterInsert(Header):
    """IGVM_VHS_PARAMETER_INSERT: puts a parameter area into guest memory."""

    TYPE = HeaderType.PARAMETER_INSERT
    LAYOUT = Layout("QII")
    gpa: int
    compatibility_mask: int
    parameter_area_index: int

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from aligned("GPA", self.gpa)


class VpContext(Header):
    """IGVM_VHS_VP_CONTEXT: the initial state of a virtual processor, in the file data.

    The data is a VMSA (SEV-ES, SEV-SNP), IgvmNativeVpContextX64 (native, SEV), a register list
    (VSM) or IgvmVpContextAArch64Cca (CCA), each in a page of 4 KiB but for the list.
    """

    TYPE = HeaderType.VP_CONTEXT
    LAYOUT = Layout("QIIHH")
    gpa: int
    compatibility_mask: int
    file_offset: int
    vp_index: int
    reserved: int = 0

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from aligned("GPA", self.gpa)


class RequiredMemory(Header):
    """IGVM_VHS_REQUIRED_MEMORY: guest memory that must be present."""

    TYPE = HeaderType.REQUIRED_MEMORY
    LAYOUT = Layout("QIIII")
    gpa: int
    compatibility_mask: int
    number_of_bytes: int
    flags: int = 0
    reserved: int = 0

    @property
    def vtl2_protectable(self) -> bool:
        """The memory must take VTL 2 protections."""
        return bool(self.flags & RequiredMemoryFlags.VTL2_PROTECTABLE)

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from aligned("GPA", self.gpa)
        yield from aligned("size", self.number_of_bytes)
        yield from zero("reserved", self.reserved)


class Parameter(Header):
    """IGVM_VHS_PARAMETER: where in a parameter area the loader deposits a value or table."""

    LAYOUT = Layout("II")
    parameter_area_index: int
    byte_offset: int


class VpCount(Parameter):
    """VP_COUNT_PARAMETER: the number of virtual processors, a u32."""

    TYPE = HeaderType.VP_COUNT_PARAMETER


class Srat(Parameter):
    """SRAT: the ACPI table."""

    TYPE = HeaderType.SRAT


class Madt(Parameter):
    """MADT: the ACPI table."""

    TYPE = HeaderType.MADT


class MmioRanges(Parameter):
    """MMIO_RANGES: an IGVM_VHS_MMIO_RANGES."""

    TYPE = HeaderType.MMIO_RANGES


class MemoryMap(Parameter):
    """MEMORY_MAP: an array of IGVM_VHS_MEMORY_MAP_ENTRY."""

    TYPE = HeaderType.MEMORY_MAP


class CommandLine(Parameter):
    """COMMAND_LINE: null-terminated ASCII."""

    TYPE = HeaderType.COMMAND_LINE


class Slit(Parameter):
    """SLIT: the ACPI table."""

    TYPE = HeaderType.SLIT


class Pptt(Parameter):
    """PPTT: the ACPI table."""

    TYPE = HeaderType.PPTT


class DeviceTree(Parameter):
    """DEVICE_TREE: a flattened device tree."""

    TYPE = HeaderType.DEVICE_TREE


class EnvironmentInfo(Parameter):
    """ENVIRONMENT_INFO_PARAMETER: an IgvmEnvironmentInfo, a u32 of flags."""

    TYPE = HeaderType.ENVIRONMENT_INFO_PARAMETER


class SnpIdBlock(Header):
    """IGVM_VHS_SNP_ID_BLOCK: the owner's signed statement of the launch (SEV-SNP ABI, 8.18).

    Signatures and public keys are kept as their bytes: r and s of 72 bytes each; curve, reserved,
    qx and qy.
    """

    TYPE = HeaderType.SNP_ID_BLOCK
    LAYOUT = Layout("IB3s48s16s16sIIII144s152s144s152s")
    compatibility_mask: int
    author_key_enabled: int
    reserved: bytes
    ld: bytes
    family_id: bytes
    image_id: bytes
    version: int
    guest_svn: int
    id_key_algorithm: int
    author_key_algorithm: int
    id_key_signature: bytes
    id_public_key: bytes
    author_key_signature: bytes
    author_public_key: bytes


class ErrorRange(Header):
    """IGVM_VHS_ERROR_RANGE: shared memory in which the guest reports errors."""

    TYPE = HeaderType.ERROR_RANGE
    LAYOUT = Layout("QII")
    gpa: int
    compatibility_mask: int
    size_bytes: int

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from aligned("GPA", self.gpa)
        yield from aligned("size", self.size_bytes)


class VbsMeasurement(Header):
    """IGVM_VHS_VBS_MEASUREMENT: Hyper-V's signed boot measurement."""

    TYPE = HeaderType.VBS_MEASUREMENT
    LAYOUT = Layout("IIIIIIII64s256s512s")
    compatibility_mask: int
    version: int
    product_id: int
    module_id: int
    security_version: int
    policy_flags: int
    boot_digest_algo: int
    signing_algo: int
    boot_measurement_digest: bytes
    signature: bytes
    public_key: bytes


HEADERS: dict[int, type[Header]] = {
    cls.TYPE: cls
    for cls in (
        SupportedPlatform, GuestPolicy, RelocatableRegion, PageTableRelocation, CorimDocument,
        CorimSignature, CcaPolicy, VersionString, ParameterArea, PageData, ParameterInsert,
        VpContext, RequiredMemory, VpCount, Srat, Madt, MmioRanges, SnpIdBlock, MemoryMap,
        ErrorRange, CommandLine, Slit, Pptt, VbsMeasurement, DeviceTree, EnvironmentInfo,
    )
}  # fmt: skip
