"""Raw firmware → IGVM image for native, SEV, SEV-ES and SEV-SNP guests.

The image puts into guest memory what QEMU does with a raw firmware: the binary below 4 GiB, its
last 128 KiB also below 1 MiB, and the areas that OVMF's own tables name.  Parameters come first
and VP contexts last, so that the file's order is the order in which QEMU and KVM measure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from igvmfw.errors import FirmwareError, UsageError
from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import (
    GuestPolicy,
    MemoryMap,
    ParameterInsert,
    SupportedPlatform,
    VpCount,
)
from igvmfw.igvm.ovmf import OvmfTables, SectionKind, find_tables
from igvmfw.igvm.reader import Buffer
from igvmfw.igvm.spec import (
    PAGE_SIZE,
    PLATFORM_TYPES,
    PLATFORM_VERSION,
    SEV_VMSA_GPA,
    PageDataType,
    SnpPolicy,
)
from igvmfw.igvm.vpcontext import SEV_FEATURE_SNP_ACTIVE, Segment, Vmsa
from igvmfw.kinds import EMPTY, FIRMWARE, JSON, XML, kind_of
from igvmfw.platforms import Platform

FOUR_GIB = 1 << 32
LOW_END = 1 << 20
LOW_SIZE = 128 << 10  # bytes mirrored below 1 MiB
MAX_FIRMWARE = 64 << 20  # bytes; OVMF has 2 or 4 MiB
MAX_VCPUS = 4096
RESET_ADDRESS = 0xFFFF_FFF0
RESET_VECTOR = FOUR_GIB - RESET_ADDRESS  # bytes: what the first instruction may take
PARAMETER_AREA = 0  # index of the only area

WRAPPED = (Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)
DEFAULT_POLICY = {Platform.SEV_SNP: int(SnpPolicy.SMT | SnpPolicy.RESERVED_MUST_BE_ONE)}

_SNP_SECTIONS = {
    SectionKind.SNP_SEC_MEM: PageDataType.NORMAL,
    SectionKind.SNP_SECRETS: PageDataType.SECRETS,
    SectionKind.SNP_CPUID: PageDataType.CPUID_DATA,
    SectionKind.SVSM_CAA: PageDataType.NORMAL,
    SectionKind.SNP_KERNEL_HASHES: PageDataType.NORMAL,
}


@dataclass(frozen=True, slots=True)
class _Page:
    data: bytes
    data_type: PageDataType = PageDataType.NORMAL


_ZERO = _Page(b"")
_Memory = dict[int, _Page]  # guest physical address → page


def wrap(
    firmware: Buffer,
    platforms: Sequence[Platform],
    *,
    variables: Buffer = b"",
    vcpus: int = 1,
    policies: Mapping[Platform, int] | None = None,
) -> bytes:
    """An IGVM file that launches a raw firmware image.

    Args:
        firmware: The image, such as OVMF.fd (code with variable store) or OVMF_CODE.fd.
        platforms: Any of native, sev, sev-es and sev-snp; mask bits follow their order.
        variables: A variable store to load right below the firmware, such as OVMF_VARS.fd.
        vcpus: Virtual processors with a VMSA on SEV-ES; those beyond the first start at the
            address in OVMF's SEV-ES reset block.
        policies: Guest policies by platform.  SEV-SNP has one in any case (default 0x30000: SMT
            allowed, no debugging); on SEV and SEV-ES QEMU takes the policy from its own
            configuration, the file's is what tools read.
    Raises:
        FirmwareError: The image is of another kind or has no valid size, no processor could start
            in it, or it lacks the tables a platform needs.
        UsageError: No platform, a platform that cannot be wrapped, one named twice, or a vCPU
            count out of bounds.
    """
    _check_request(platforms, vcpus, policies or {})
    _check_raw("firmware", firmware)
    if variables:
        _check_raw("variable store", variables)
    _check_reset_vector(firmware)
    tables = find_tables(firmware)
    _check_tables(tables, platforms, vcpus)

    masks = {platform: 1 << index for index, platform in enumerate(platforms)}
    builder = ImageBuilder()
    for platform, mask in masks.items():
        builder.add(SupportedPlatform(mask, 0, PLATFORM_TYPES[platform], PLATFORM_VERSION, 0))
    for platform, policy in ({**DEFAULT_POLICY, **(policies or {})}).items():
        if platform in masks:
            builder.add(GuestPolicy(policy, masks[platform]))
    inserted = _add_parameters(builder, tables, masks)
    memory = {
        platform: _memory(firmware, variables, tables, platform, inserted) for platform in masks
    }
    _add_pages(builder, memory, masks)
    if Platform.SEV_SNP in masks:
        vmsa = reset_vmsa(RESET_ADDRESS, sev_features=SEV_FEATURE_SNP_ACTIVE)
        builder.add_vp_context(masks[Platform.SEV_SNP], 0, vmsa.content, gpa=SEV_VMSA_GPA)
    if Platform.SEV_ES in masks:
        for index in range(vcpus):
            address = RESET_ADDRESS if index == 0 else _reset_address(tables)
            vmsa = reset_vmsa(address, sev_features=0)
            builder.add_vp_context(masks[Platform.SEV_ES], index, vmsa.content, gpa=SEV_VMSA_GPA)
    return builder.build()


def reset_vmsa(address: int, *, sev_features: int, rdx: int = 0) -> Vmsa:
    """The state KVM gives a SEV-ES or SEV-SNP processor that starts at an address in real mode.

    It is the architectural reset state as KVM encrypts it: EFER.SVME and CR4.MCE are set by KVM,
    CR0's cache bits cleared.  Sources: AMD64 APM volume 2, section 14.1.3; Linux
    arch/x86/kvm/svm/svm.c (init_vmcb, svm_set_cr0, svm_set_cr4, svm_set_efer).

    Args:
        address: Of the first instruction; CS is its upper 16 bits.
        sev_features: SEV_FEATURES of the VMSA.
        rdx: The processor's signature, which a processor without a context of its own starts with.
    """
    data = Segment(0, 0x93, 0xFFFF, 0)
    table = Segment(0, 0, 0xFFFF, 0)
    return Vmsa.build(
        {
            "cs": Segment(0xF000, 0x9B, 0xFFFF, address & 0xFFFF_0000),
            **dict.fromkeys(("es", "ss", "ds", "fs", "gs"), data),
            "gdtr": table,
            "idtr": table,
            "ldtr": Segment(0, 0x82, 0xFFFF, 0),
            "tr": Segment(0, 0x8B, 0xFFFF, 0),
            "rip": address & 0xFFFF,
            "rdx": rdx,
            "rflags": 0x2,
            "efer": 0x1000,
            "cr0": 0x10,
            "cr4": 0x40,
            "dr6": 0xFFFF_0FF0,
            "dr7": 0x400,
            "g_pat": 0x0007_0406_0007_0406,
            "xcr0": 0x1,
            "mxcsr": 0x1F80,
            "x87_fcw": 0x37F,
            "sev_features": sev_features,
        }
    )


def _check_request(
    platforms: Sequence[Platform], vcpus: int, policies: Mapping[Platform, int]
) -> None:
    known = ", ".join(WRAPPED)
    if not platforms:
        raise UsageError("no platform to wrap the firmware for", hint=f"name one of: {known}")
    for platform in (*platforms, *policies):
        if platform not in WRAPPED:
            raise UsageError(f"firmware cannot be wrapped for {platform}", hint=f"only: {known}")
    if len(set(platforms)) != len(platforms):
        raise UsageError("a platform is named twice")
    for platform in policies:
        if platform not in platforms:
            raise UsageError(
                f"a policy for {platform}, which the file is not wrapped for",
                hint=f"add --platform {platform}, or leave the policy out",
            )
    if not 1 <= vcpus <= MAX_VCPUS:
        raise UsageError(f"{vcpus} vCPUs: must be 1 to {MAX_VCPUS}")


def _check_raw(what: str, data: Buffer) -> None:
    kind = kind_of(data)
    if kind not in (None, EMPTY, FIRMWARE, XML, JSON):  # one byte of raw code proves no text
        raise FirmwareError(f"the {what} is no raw image: it is {kind.name}", hint=kind.remedy)
    size = len(data)
    if not size or size % PAGE_SIZE or size > MAX_FIRMWARE:
        raise FirmwareError(
            f"the {what} has {size} bytes: must be a multiple of {PAGE_SIZE}, at most "
            f"{MAX_FIRMWARE}",
            hint="is it a raw firmware image such as OVMF.fd?",
        )


def _check_reset_vector(firmware: Buffer) -> None:
    vector = bytes(firmware[-RESET_VECTOR:])
    if vector.count(0) == len(vector) or vector.count(0xFF) == len(vector):
        raise FirmwareError(
            f"the firmware's last {RESET_VECTOR} bytes are blank: no processor can start there",
            hint="take the code, such as OVMF_CODE.fd; a variable store goes into --vars",
        )


def _check_tables(tables: OvmfTables | None, platforms: Sequence[Platform], vcpus: int) -> None:
    if Platform.SEV_SNP in platforms and (
        tables is None or tables.find(SectionKind.SNP_SECRETS) is None
    ):
        raise FirmwareError(
            "the firmware does not say where SEV-SNP's secrets and CPUID pages go (no SEV metadata "
            "in its table)",
            hint="take an OVMF built with SEV-SNP support, such as Debian's /usr/share/ovmf/OVMF.fd"
            " or /usr/share/OVMF/OVMF_CODE.fd",
        )
    if Platform.SEV_ES in platforms and vcpus > 1:
        _reset_address(tables)


def _reset_address(tables: OvmfTables | None) -> int:
    if tables is None or tables.reset_address is None:
        raise FirmwareError(
            "the firmware has no SEV-ES reset block: nothing says where further vCPUs start",
            hint="use --vcpus 1, or an OVMF with SEV-ES support",
        )
    return tables.reset_address


def _add_parameters(
    builder: ImageBuilder, tables: OvmfTables | None, masks: Mapping[Platform, int]
) -> frozenset[Platform]:
    """Fill OVMF's parameter area; returns the platforms that get it.

    SEV and SEV-ES do not: their loader leaves unmeasured pages in plain text, which the guest
    would read as noise.  They get a measured page of zeroes there, OVMF's sign for "no memory
    map", and the firmware asks QEMU's fw_cfg instead.
    """
    area = tables.find(SectionKind.IGVM_PARAM_AREA) if tables else None
    plain = {Platform.NATIVE, Platform.SEV_SNP}.intersection(masks)
    if tables is None or area is None or not plain:
        return frozenset()
    if area.base % PAGE_SIZE or area.size % PAGE_SIZE:
        raise FirmwareError(f"OVMF's parameter area 0x{area.base:x} is not made of whole pages")
    builder.add_parameter_area(PARAMETER_AREA, area.size)
    memory_map = tables.find(SectionKind.IGVM_PARAM_MEMORY_MAP)
    vp_count = tables.find(SectionKind.IGVM_PARAM_VP_COUNT)
    for part, parameter in ((memory_map, MemoryMap), (vp_count, VpCount)):
        if part is None:
            continue
        if part.base + part.size > area.size:
            raise FirmwareError(
                f"OVMF places a parameter at 0x{part.base:x} of an area of 0x{area.size:x} bytes"
            )
        builder.add(parameter(PARAMETER_AREA, part.base))
    mask = sum(masks[platform] for platform in plain)
    builder.add(ParameterInsert(area.base, mask, PARAMETER_AREA))
    return frozenset(plain)


def _memory(
    firmware: Buffer,
    variables: Buffer,
    tables: OvmfTables | None,
    platform: Platform,
    inserted: frozenset[Platform],
) -> _Memory:
    """All pages of a platform; what comes later replaces what stood at the same address."""
    memory: _Memory = {}
    sections = tables.sections if tables else ()
    if platform is Platform.SEV_SNP:
        for section in sections:
            data_type = _SNP_SECTIONS.get(section.kind)  # type: ignore[call-overload]
            if data_type is not None:
                page = _Page(b"", data_type)
                memory.update(dict.fromkeys(_page_range(section.base, section.size), page))
    for section in sections:
        pages = _page_range(section.base, section.size)
        if section.kind == SectionKind.IGVM_PARAM_AREA:
            if platform in inserted:
                for gpa in pages:
                    memory.pop(gpa, None)
            else:
                memory.update(dict.fromkeys(pages, _ZERO))
        elif section.kind == SectionKind.IGVM_HOB_AREA:
            memory.update(dict.fromkeys(pages, _ZERO))
    image = memoryview(firmware)
    _place(memory, LOW_END - min(LOW_SIZE, len(image)), image[-LOW_SIZE:])
    _place(memory, FOUR_GIB - len(image), image)
    _place(memory, FOUR_GIB - len(image) - len(variables), memoryview(variables))
    return memory


def _page_range(base: int, size: int) -> range:
    return range(base & ~(PAGE_SIZE - 1), base + size, PAGE_SIZE)


def _place(memory: _Memory, base: int, data: memoryview) -> None:
    for offset in range(0, len(data), PAGE_SIZE):
        memory[base + offset] = _Page(bytes(data[offset : offset + PAGE_SIZE]))


def _add_pages(
    builder: ImageBuilder, memory: Mapping[Platform, _Memory], masks: Mapping[Platform, int]
) -> None:
    """Add every page once for all platforms that have the same, by mask and then by address."""
    shared: dict[tuple[int, _Page], int] = {}
    for platform, pages in memory.items():
        for gpa, page in pages.items():
            shared[gpa, page] = shared.get((gpa, page), 0) | masks[platform]
    for (gpa, page), mask in sorted(shared.items(), key=lambda item: (item[1], item[0][0])):
        builder.add_page(gpa, mask, page.data, data_type=page.data_type)
