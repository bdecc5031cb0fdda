"""Small IGVM files for unit tests, made by the project's own writer."""

from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import (
    CorimDocument,
    CorimSignature,
    GuestPolicy,
    MemoryMap,
    PageTableRelocation,
    ParameterInsert,
    RelocatableRegion,
    RequiredMemory,
    SupportedPlatform,
    VersionString,
    VpCount,
)
from igvmfw.igvm.reader import U32
from igvmfw.igvm.spec import PLATFORM_TYPES, SEV_VMSA_GPA, Architecture
from igvmfw.igvm.vpcontext import VBS_REGISTER, build_native
from igvmfw.igvm.wrap import RESET_ADDRESS, reset_vmsa
from igvmfw.platforms import Platform

PAGE = bytes(range(256)) * 16
FOUR_GIB = 1 << 32


def platform(word: Platform, mask: int, *, highest_vtl: int = 0) -> SupportedPlatform:
    return SupportedPlatform(mask, highest_vtl, PLATFORM_TYPES[word], 1, 0)


def small(*words: Platform, revision: int = 2) -> bytes:
    """A file with a page of data, a page of zeroes and a parameter area for the platforms."""
    words = words or (Platform.NATIVE,)
    builder = ImageBuilder(revision=revision)
    for index, word in enumerate(words):
        builder.add(platform(word, 1 << index))
    if Platform.SEV_SNP in words:
        builder.add(GuestPolicy(0x30000, 1 << words.index(Platform.SEV_SNP)))
    mask = (1 << len(words)) - 1
    builder.add_parameter_area(0, 4096)
    builder.add(MemoryMap(0, 0))
    builder.add(VpCount(0, 2048))
    builder.add(ParameterInsert(0x10_0000, mask, 0))
    builder.add_page(0x1000, mask, PAGE)
    builder.add_page(0x2000, mask)
    for index, word in enumerate(words):
        if word in (Platform.SEV_ES, Platform.SEV_SNP):
            features = int(word is Platform.SEV_SNP)
            vmsa = reset_vmsa(RESET_ADDRESS, sev_features=features)
            builder.add_vp_context(1 << index, 0, vmsa.content, gpa=SEV_VMSA_GPA)
    return builder.build()


def rich() -> bytes:
    """A file with nearly every header an x64 file can have."""
    builder = ImageBuilder()
    builder.add(platform(Platform.NATIVE, 1))
    builder.add(platform(Platform.VSM, 2, highest_vtl=2))
    builder.add(platform(Platform.TDX, 8))
    builder.add(GuestPolicy(0x30000, 8))
    builder.add(RelocatableRegion(2, 0, 2, 7, 0x1000, 0x4000, 0x2000, 0, 0x10000))
    builder.add(PageTableRelocation(2, 0, 2, 0, 0x8000, 0x2000, 0x1000))
    builder.add(CorimDocument(8, 0, 0))
    builder.add(CorimSignature(8, 0, 0))
    builder.add(VersionString(b"release 7\xc3\xa4"))
    builder.add(RequiredMemory(0x20_0000, 11, 0x10_0000, 1))
    builder.add_page(0x1000, 11, PAGE, flags=2)
    builder.add_page(0x2000, 1, b"short")
    builder.add_vp_context(1, 0, build_native({"rip": 0xFFF0, "cr0": 0x10}))
    register = VBS_REGISTER.write(2, 0x20010, bytes(11), (0x4000).to_bytes(16, "little"))
    builder.add_vp_context(2, 0, U32.write(1) + register)
    return builder.build()


def cca() -> bytes:
    """A file for Arm CCA."""
    builder = ImageBuilder(architecture=Architecture.AARCH64)
    builder.add(platform(Platform.CCA, 4))
    builder.add_page(0x4000_0000, 4, PAGE)
    builder.add_vp_context(4, 0, (0x4000_0000).to_bytes(8, "little") * 10)
    return builder.build()
