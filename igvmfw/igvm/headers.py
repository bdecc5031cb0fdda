"""One record per variable header: parse, check, write; and the table type → class.

Fields stand in the order of the layout and are named as in igvm_defs 0.5.0 (src/lib.rs,
IGVM_VHS_*); reserved fields are kept, so that writing gives back what was read.  Positional on
purpose: a file holds thousands of them, each built straight from its unpacked layout.
"""

from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Self

from igvmfw.igvm.reader import Buffer, Layout
from igvmfw.igvm.spec import (
    LARGE_PAGE_SIZE,
    PAGE_SIZE,
    PLATFORM_VERSION,
    HeaderType,
    PageDataFlags,
    PageDataType,
    PlatformType,
    RelocatableRegionFlags,
    RequiredMemoryFlags,
)
from igvmfw.records import Record

U64_SPACE = 1 << 64


class Breach(NamedTuple):
    """A rule that a header breaks: the rule's id, and what was found."""

    rule: str
    message: str


class Extent(NamedTuple):
    """The part of the file a header takes its data from, in bytes from the file's start."""

    offset: int
    size: int


class Header(Record):
    """Base of all variable headers."""

    TYPE: ClassVar[HeaderType]
    LAYOUT: ClassVar[Layout]
    type: ClassVar[int]  # as it stands in the file

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.type = getattr(cls, "TYPE", 0)  # 0: of a base of several headers

    @classmethod
    def parse(cls, body: Buffer) -> Self:
        """Read the header from its content (without type, length and padding).

        Raises:
            IgvmError: The content is shorter than the structure.
        """
        return cls.make(cls.LAYOUT.read(body, 0, cls.TYPE.name))

    def write(self) -> bytes:
        """The header's content as it stands in a file.

        Raises:
            IgvmError: A field's value does not fit.
        """
        return self.LAYOUT.write(*self)

    def breaches(self) -> Iterator[Breach]:
        """The rules this header breaks on its own, without regard to the rest of the file."""
        return iter(())

    def extent(self) -> Extent | None:
        """The file data this header takes; None for none, or for a size only the data tells."""
        return None


def _aligned(name: str, value: int, to: int = PAGE_SIZE) -> Iterator[Breach]:
    if value % to:
        yield Breach("alignment", f"{name} 0x{value:x} is not a multiple of 0x{to:x}")


def _zero(name: str, value: int) -> Iterator[Breach]:
    if value:
        yield Breach("reserved", f"{name} is 0x{value:x}, must be zero")


class RawHeader(Record):
    """A header igvmfw does not know, or marked optional: kept as it stands in the file."""

    type: int
    body: bytes

    def write(self) -> bytes:
        """The header's content, unchanged."""
        return self.body


class SupportedPlatform(Header):
    """IGVM_VHS_SUPPORTED_PLATFORM: a platform, and the mask other headers name it by."""

    TYPE = HeaderType.SUPPORTED_PLATFORM
    LAYOUT = Layout("IBBHQ")
    compatibility_mask: int
    highest_vtl: int
    platform_type: int
    platform_version: int
    shared_gpa_boundary: int

    def breaches(self) -> Iterator[Breach]:  # noqa: D102 - inherited
        if self.compatibility_mask.bit_count() != 1:
            yield Breach(
                "platform-mask", f"compatibility mask 0x{self.compatibility_mask:x} is not one bit"
            )
        if self.highest_vtl not in (0, 2):
            yield Breach("vtl", f"highest VTL is {self.highest_vtl}, must be 0 or 2")
        if self.platform_type not in PlatformType._value2member_map_:
            yield Breach("platform-type", f"unknown platform type {self.platform_type}")
        elif self.platform_version != PLATFORM_VERSION:
            yield Breach(
                "platform-version", f"platform version is {self.platform_version}, must be 1"
            )
        if self.platform_type in (PlatformType.NATIVE, PlatformType.VSM_ISOLATION):
            yield from _zero("shared GPA boundary", self.shared_gpa_boundary)


class GuestPolicy(Header):
    """IGVM_VHS_GUEST_POLICY: the isolation policy, in the platform's own encoding."""

    TYPE = HeaderType.GUEST_POLICY
    LAYOUT = Layout("QII")
    policy: int
    compatibility_mask: int
    reserved: int = 0

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from _zero("reserved", self.reserved)


class RelocatableRegion(Header):
    """IGVM_VHS_RELOCATABLE_REGION: memory that a loader may move as a whole."""

    TYPE = HeaderType.RELOCATABLE_REGION
    LAYOUT = Layout("IHBBQQQQQ")
    compatibility_mask: int
    vp_index: int
    vtl: int
    flags: int
    relocation_alignment: int
    relocation_region_gpa: int
    relocation_region_size: int
    minimum_relocation_gpa: int
    maximum_relocation_gpa: int

    @property
    def is_vtl2(self) -> bool:
        """The region describes VTL 2."""
        return bool(self.flags & RelocatableRegionFlags.IS_VTL2)

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        if self.vtl > 2:
            yield Breach("vtl", f"VTL is {self.vtl}, must be 0, 1 or 2")
        yield from _aligned("region size", self.relocation_region_size)
        yield from _aligned("relocation alignment", self.relocation_alignment)
        if self.relocation_alignment == 0:
            yield Breach("relocation", "relocation alignment is zero")
        else:
            for name, value in (
                ("region GPA", self.relocation_region_gpa),
                ("minimum GPA", self.minimum_relocation_gpa),
                ("maximum GPA", self.maximum_relocation_gpa),
            ):
                yield from _aligned(name, value, self.relocation_alignment)
        yield from _region("region", self.relocation_region_gpa, self.relocation_region_size)


def _region(name: str, gpa: int, size: int) -> Iterator[Breach]:
    if size == 0:
        yield Breach("relocation", f"{name} is empty")
    elif gpa + size > U64_SPACE:
        yield Breach("relocation", f"{name} 0x{gpa:x} + 0x{size:x} ends outside the address space")


class PageTableRelocation(Header):
    """IGVM_VHS_PAGE_TABLE_RELOCATION: the page tables to fix up when regions move."""

    TYPE = HeaderType.PAGE_TABLE_RELOCATION_REGION
    LAYOUT = Layout("IHBBQQQ")
    compatibility_mask: int
    vp_index: int
    vtl: int
    reserved: int
    gpa: int
    size: int
    used_size: int

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from _zero("reserved", self.reserved)
        if self.vtl > 2:
            yield Breach("vtl", f"VTL is {self.vtl}, must be 0, 1 or 2")
        yield from _aligned("GPA", self.gpa)
        yield from _aligned("size", self.size)
        yield from _aligned("used size", self.used_size)
        if self.used_size > self.size:
            yield Breach(
                "relocation", f"used size 0x{self.used_size:x} exceeds size 0x{self.size:x}"
            )
        yield from _region("page table region", self.gpa, self.size)


class _CorimData(Header):
    LAYOUT = Layout("IIII")
    compatibility_mask: int
    file_offset: int
    size_bytes: int
    reserved: int

    def breaches(self) -> Iterator[Breach]:
        yield from _zero("reserved", self.reserved)

    def extent(self) -> Extent | None:
        return Extent(self.file_offset, self.size_bytes) if self.file_offset else None


class CorimDocument(_CorimData):
    """IGVM_VHS_CORIM_DATA of a CORIM_DOCUMENT: reference values, as CBOR in the file data."""

    TYPE = HeaderType.CORIM_DOCUMENT
    compatibility_mask: int
    file_offset: int
    size_bytes: int
    reserved: int = 0


class CorimSignature(_CorimData):
    """IGVM_VHS_CORIM_DATA of a CORIM_SIGNATURE: a COSE_Sign1 over the document."""

    TYPE = HeaderType.CORIM_SIGNATURE
    compatibility_mask: int
    file_offset: int
    size_bytes: int
    reserved: int = 0


class CcaPolicy(Header):
    """IGVM_VHS_CCA_POLICY: the policy of an Arm CCA realm."""

    TYPE = HeaderType.CCA_POLICY
    LAYOUT = Layout("IIQQBB6s")
    compatibility_mask: int
    reserved: int
    attributes_required_zeroes: int
    attributes_required_ones: int
    hash_algorithm: int
    lfa_policy: int
    reserved2: bytes = bytes(6)

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from _zero("reserved", self.reserved)
        yield from _zero("reserved2", int.from_bytes(self.reserved2, "little"))
        both = self.attributes_required_zeroes & self.attributes_required_ones
        if both:
            yield Breach("policy", f"attribute bits 0x{both:x} are required both zero and one")


class VersionString(Header):
    """VERSION_STRING: the owner's label of the file; the content is the UTF-8 text itself."""

    TYPE = HeaderType.VERSION_STRING
    text: bytes

    @classmethod
    def parse(cls, body: Buffer) -> Self:  # noqa: D102
        return cls(bytes(body))

    def write(self) -> bytes:  # noqa: D102
        return self.text

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        try:
            self.text.decode()
        except UnicodeDecodeError as error:
            yield Breach("version-string", f"not UTF-8: {error.reason} at byte {error.start}")


class ParameterArea(Header):
    """IGVM_VHS_PARAMETER_AREA: a buffer that parameters are written to before its insertion."""

    TYPE = HeaderType.PARAMETER_AREA
    LAYOUT = Layout("QII")
    number_of_bytes: int
    parameter_area_index: int
    file_offset: int = 0

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from _aligned("size", self.number_of_bytes)

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
        return (
            following.gpa == self.gpa + self.guest_size
            and following.flags == self.flags
            and following.data_type == self.data_type
            and following.compatibility_mask == self.compatibility_mask
            and (following.file_offset == 0) == (self.file_offset == 0)
        )

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from _aligned("GPA", self.gpa, self.guest_size)
        if self.data_type > PageDataType.CPUID_XF:
            yield Breach("page-type", f"unknown page data type {self.data_type}")
        yield from _zero("reserved", self.reserved)

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
        yield from _aligned("GPA", self.gpa)


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
        yield from _aligned("GPA", self.gpa)


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
        yield from _aligned("GPA", self.gpa)
        yield from _aligned("size", self.number_of_bytes)
        yield from _zero("reserved", self.reserved)


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
        yield from _aligned("GPA", self.gpa)
        yield from _aligned("size", self.size_bytes)


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
