"""VP contexts as QEMU and KVM take them: a part of check.py.

Source: QEMU, target/i386/sev.c (cgs_set_guest_state, check_vmsa_supported, check_sev_features) and
target/i386/igvm.c (qigvm_x86_set_vp_context).
"""

from collections.abc import Iterator

from igvmfw.findings import Guest, Result, error, warning
from igvmfw.igvm.headers import VpContext
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import as_kvm_measures
from igvmfw.igvm.spec import PLATFORM_WORDS, SEV_VMSA_GPA, PlatformType
from igvmfw.igvm.vpcontext import SEV_FEATURE_SNP_ACTIVE, VMSA_FIELDS, Vmsa
from igvmfw.platforms import Platform
from igvmfw.qemu.acceptance import Acceptance

_WITH_VMSA = (PlatformType.SEV_ES, PlatformType.SEV_SNP)


def check_context(
    image: IgvmFile, header: VpContext, platform: Platform, qemu: Acceptance, guest: Guest
) -> Iterator[Result]:
    """What becomes of one VP context that applies to the platform."""
    index = header.vp_index
    if guest.vcpus is not None and index >= guest.vcpus:
        yield error(
            "context-index",
            f"the file sets vCPU {index}, the guest has {guest.vcpus}",
            f"give the guest at least {index + 1} vCPUs",
        )
    kind = image.type_of(header.compatibility_mask)
    if platform is Platform.NATIVE:
        yield from _native(index, qemu)
    elif platform is Platform.SEV:
        yield error(
            "context-sev",
            "QEMU refuses a VP context for a SEV guest: 'attempt to configure initial VMSA, but "
            "SEV-ES is not supported'",
            "rebuild the image without it: a SEV guest starts from the reset state",
        )
    elif kind in _WITH_VMSA:
        yield from _vmsa(image, header, platform)
    else:
        word = PLATFORM_WORDS[PlatformType(kind)] if kind is not None else "unknown"
        yield error(
            "context-form",
            f"a context in the form of {word} would be read as a VMSA",
            f"use a file made for {platform}",
        )


def has_tail(image: IgvmFile, header: VpContext) -> bool:
    """Whether a VMSA has more than its save area, on whatever platform; libigvm refuses that."""
    if image.type_of(header.compatibility_mask) not in _WITH_VMSA:
        return False
    return bool(bytes(image.data_of(header)[_SAVE_AREA:]).strip(b"\0"))


def _native(index: int, qemu: Acceptance) -> Iterator[Result]:
    if not qemu.native_context:
        yield error(
            "context-native",
            f"{qemu.name} takes no VP context for a native guest",
            "use QEMU 10.2 or newer",
        )
    elif index:
        yield error(
            "context-index",
            f"a context for vCPU {index}: 'context can be set for BSP only' on a native guest",
            "rebuild the image with a context for vCPU 0 alone",
        )


def _vmsa(image: IgvmFile, header: VpContext, platform: Platform) -> Iterator[Result]:
    if header.gpa != SEV_VMSA_GPA:
        yield error(
            "vmsa-gpa",
            f"the VMSA's GPA is 0x{header.gpa:x}; KVM has it at 0x{SEV_VMSA_GPA:x} alone",
            "rebuild the image for QEMU",
        )
    vmsa = Vmsa.parse(image.data_of(header))
    snp = platform is Platform.SEV_SNP
    yield from _features(vmsa.register("sev_features"), platform)
    unsynchronised = _unsynchronised(vmsa)
    if unsynchronised:
        yield error(
            "vmsa-registers",
            f"the VMSA sets {', '.join(unsynchronised)}, which QEMU cannot hand to KVM",
            "rebuild the image without them",
        )
        return
    measured = as_kvm_measures(vmsa, platform, vmsa.register("sev_features"))
    before, after = vmsa.registers(), measured.registers()
    changed = [name for name in VMSA_FIELDS if before.get(name) != after.get(name)]
    if not snp:  # KVM leaves the FPU out of every SEV-ES guest's VMSA
        changed = [name for name in changed if name not in ("mxcsr", "x87_fcw")]
    if changed:
        yield warning(
            "vmsa-measured",
            f"KVM measures the VMSA of vCPU {header.vp_index} with other values of "
            f"{', '.join(changed)}",
            "the launch digest is the one `measure` computes for QEMU, not the file's own",
        )


def _features(features: int, platform: Platform) -> Iterator[Result]:
    snp = platform is Platform.SEV_SNP
    if bool(features & SEV_FEATURE_SNP_ACTIVE) != snp:
        yield error(
            "vmsa-features",
            f"SEV_FEATURES is 0x{features:x}: bit 0 must be {'set' if snp else 'clear'} on "
            f"{platform}",
            "rebuild the image for this platform",
        )
    elif features & ~SEV_FEATURE_SNP_ACTIVE and not snp:
        yield error(
            "vmsa-features",
            f"SEV_FEATURES is 0x{features:x}: QEMU takes none on {platform}",
            "rebuild the image without SEV features",
        )
    elif features & ~SEV_FEATURE_SNP_ACTIVE:
        yield warning(
            "vmsa-features",
            f"SEV_FEATURES is 0x{features:x}: the host's KVM must support all of them",
            "look at the host's kernel and processor",
        )


_SYNCHRONISED = frozenset(
    "es cs ss ds fs gs gdtr idtr ldtr tr efer cr0 cr3 cr4 xcr0 dr6 dr7 rax rcx rdx rbx rsp rbp rsi "
    "rdi r8 r9 r10 r11 r12 r13 r14 r15 rip rflags g_pat x87_fcw mxcsr sev_features".split()
)  # what check_vmsa_supported clears before it wants all the rest to be zero
_SAVE_AREA = 0x670  # bytes of the save area that QEMU looks at


def _unsynchronised(vmsa: Vmsa) -> list[str]:
    found = [name for name in vmsa.registers() if name not in _SYNCHRONISED]
    rest = bytearray(vmsa.content[:_SAVE_AREA])
    for offset, layout in VMSA_FIELDS.values():
        rest[offset : offset + layout.size] = bytes(layout.size)
    return [*found, "reserved or FPU bytes"] if any(rest) else found
