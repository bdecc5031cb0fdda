"""Numbers and enums of the IGVM file format.

Source: igvm_defs 0.5.0, src/lib.rs (the format's reference), with the features `unstable` and
`corim`; names are the specification's.
"""

from enum import IntEnum, IntFlag

from igvmfw.platforms import Platform as PlatformWord

MAGIC = 0x4D564749  # "IGVM", little endian
PAGE_SIZE = 4096  # bytes; the only page size the reference crate reads
LARGE_PAGE_SIZE = 2 << 20  # bytes
U64_SPACE = 1 << 64  # bytes of guest address space that a file can name
OPTIONAL_BIT = 1 << 31  # in a header's type: a loader that does not know it may go on


class Section(IntEnum):
    """The three sections of variable headers, in the order they must have in a file."""

    PLATFORM = 0
    INITIALIZATION = 1
    DIRECTIVE = 2

    @property
    def title(self) -> str:
        """The section's name in sentences."""
        return self.name.lower()


# the header types of each
RANGES = {
    Section.PLATFORM: range(0x1, 0x101),
    Section.INITIALIZATION: range(0x101, 0x201),
    Section.DIRECTIVE: range(0x301, 0x401),
}


def section_of(header_type: int) -> Section | None:
    """The section a header type belongs to (the optional bit ignored), if any."""
    number = header_type & ~OPTIONAL_BIT
    return next((section for section, types in RANGES.items() if number in types), None)


class Architecture(IntEnum):
    """IgvmArchitecture: the fixed header's architecture, revision 2 (revision 1 is X64)."""

    X64 = 0
    AARCH64 = 1


class HeaderType(IntEnum):
    """IgvmVariableHeaderType: the names of IGVM_VHT_* without the prefix."""

    SUPPORTED_PLATFORM = 0x1
    GUEST_POLICY = 0x101
    RELOCATABLE_REGION = 0x102
    PAGE_TABLE_RELOCATION_REGION = 0x103
    CORIM_DOCUMENT = 0x104
    CORIM_SIGNATURE = 0x105
    CCA_POLICY = 0x106
    VERSION_STRING = 0x107
    PARAMETER_AREA = 0x301
    PAGE_DATA = 0x302
    PARAMETER_INSERT = 0x303
    VP_CONTEXT = 0x304
    REQUIRED_MEMORY = 0x305
    RESERVED_DO_NOT_USE = 0x306
    VP_COUNT_PARAMETER = 0x307
    SRAT = 0x308
    MADT = 0x309
    MMIO_RANGES = 0x30A
    SNP_ID_BLOCK = 0x30B
    MEMORY_MAP = 0x30C
    ERROR_RANGE = 0x30D
    COMMAND_LINE = 0x30E
    SLIT = 0x30F
    PPTT = 0x310
    VBS_MEASUREMENT = 0x311
    DEVICE_TREE = 0x312
    ENVIRONMENT_INFO_PARAMETER = 0x313


def type_name(header_type: int) -> str:
    """A header type as people read it: the specification's name, or the number."""
    number = header_type & ~OPTIONAL_BIT
    known = HeaderType._value2member_map_.get(number)
    name = known.name if known is not None else f"0x{number:X}"
    return f"{name} (optional)" if header_type & OPTIONAL_BIT else name


class PlatformType(IntEnum):
    """IgvmPlatformType: the platform a compatibility mask stands for."""

    NATIVE = 0
    VSM_ISOLATION = 1
    SEV_SNP = 2
    TDX = 3
    SEV = 4
    SEV_ES = 5
    CCA = 6


PLATFORM_WORDS = {
    PlatformType.NATIVE: PlatformWord.NATIVE,
    PlatformType.VSM_ISOLATION: PlatformWord.VSM,
    PlatformType.SEV_SNP: PlatformWord.SEV_SNP,
    PlatformType.TDX: PlatformWord.TDX,
    PlatformType.SEV: PlatformWord.SEV,
    PlatformType.SEV_ES: PlatformWord.SEV_ES,
    PlatformType.CCA: PlatformWord.CCA,
}
PLATFORM_TYPES = {word: kind for kind, word in PLATFORM_WORDS.items()}

PLATFORM_VERSION = 1  # of every platform type so far
VTLS = (0, 1, 2)


class PageDataType(IntEnum):
    """IgvmPageDataType: what a page is for."""

    NORMAL = 0
    SECRETS = 1
    CPUID_DATA = 2
    CPUID_XF = 3


class PageDataFlags(IntFlag):
    """IgvmPageDataFlags."""

    IS_2MB_PAGE = 1 << 0
    UNMEASURED = 1 << 1
    SHARED = 1 << 2


class RelocatableRegionFlags(IntFlag):
    """IGVM_VHF_RELOCATABLE_REGION_*."""

    IS_VTL2 = 1 << 0
    APPLY_PC = 1 << 1
    APPLY_GDTR = 1 << 2


class RequiredMemoryFlags(IntFlag):
    """RequiredMemoryFlags."""

    VTL2_PROTECTABLE = 1 << 0


class SnpPolicy(IntFlag):
    """Bits of a SEV-SNP guest policy (SEV-SNP firmware ABI, section 4.3); low 16: ABI version."""

    SMT = 1 << 16
    RESERVED_MUST_BE_ONE = 1 << 17
    MIGRATE_MA = 1 << 18
    DEBUG = 1 << 19
    SINGLE_SOCKET = 1 << 20


SEV_VMSA_GPA = 0xFFFF_FFFF_F000  # where KVM places a VMSA (KVM_VMSA_GPA in QEMU's sev.c)
