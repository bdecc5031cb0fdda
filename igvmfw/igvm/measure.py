"""An image, a platform and its vCPUs → the launch digest that the processor will report.

Two orders exist.  A loader that follows the file measures directive by directive (`Vmm.SPEC`).
QEMU gathers pages into regions that it hands over when the next one begins, inserts parameter areas
at once, and KVM measures the VMSAs last, one per vCPU whether the file has it or not
(`Vmm.QEMU`; backends/igvm.c and target/i386/sev.c of QEMU 10.2, arch/x86/kvm/svm/sev.c of Linux).

Sources for the digests: AMD SEV API, LAUNCH_UPDATE_DATA and LAUNCH_MEASURE (SHA-256 of the bytes);
SEV-SNP firmware ABI, section 8.17.2, PAGE_INFO (a chain of SHA-384).
"""

import hashlib
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from igvmfw.errors import IgvmError, RefusedError, UsageError
from igvmfw.igvm.headers import PageData, ParameterArea, ParameterInsert, VpContext
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.reader import Layout
from igvmfw.igvm.spec import (
    PAGE_SIZE,
    SEV_VMSA_GPA,
    PageDataType,
)
from igvmfw.igvm.vpcontext import SEV_FEATURE_SNP_ACTIVE, Segment, Vmsa
from igvmfw.igvm.wrap import MAX_VCPUS, RESET_ADDRESS, reset_vmsa
from igvmfw.platforms import Platform

ZERO_PAGE = bytes(PAGE_SIZE)
MAX_INSERT = 1 << 30  # bytes of one parameter area: more is no parameter, and would take minutes
MEASURED = (Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)


class Vmm(StrEnum):
    """Whose order of measuring is meant."""

    QEMU = "qemu"
    SPEC = "spec"


class PageType(NamedTuple):
    """A PAGE_TYPE of SNP_LAUNCH_UPDATE, and whether the contents are measured with it."""

    number: int
    measured: bool


NORMAL = PageType(1, True)
VMSA = PageType(2, True)
UNMEASURED = PageType(4, False)
SECRETS = PageType(5, False)
CPUID = PageType(6, False)


class Update(NamedTuple):
    """Pages handed over in one go: guest address, and either one source per page or a count."""

    gpa: int
    page_type: PageType
    pages: list[memoryview | bytes]


def launch_digest(
    image: IgvmFile,
    platform: Platform,
    *,
    vcpus: int = 1,
    cpu_signature: int | None = None,
    vmm: Vmm = Vmm.QEMU,
) -> bytes:
    """The launch digest: 32 bytes for SEV and SEV-ES, 48 for SEV-SNP.

    Args:
        image: The file.
        platform: sev, sev-es or sev-snp; the others have no digest of this kind.
        vcpus: Of the guest.
        cpu_signature: CPUID leaf 1 EAX of the guest's CPU model; needed where a vCPU has no VP
            context in the file, because it starts with its signature in RDX.
        vmm: Whose order.
    Raises:
        IgvmError: The file lacks the platform, or its data cannot be read.
        RefusedError: QEMU would not launch the file on the platform.
        UsageError: The platform has no digest, the vCPU count is out of bounds, or a signature is
            needed.
    """
    if platform not in MEASURED:
        raise UsageError(
            f"a {platform} launch has no digest that igvmfw computes",
            hint=f"only: {', '.join(MEASURED)}",
        )
    if not 1 <= vcpus <= MAX_VCPUS:
        raise UsageError(f"{vcpus} vCPUs: must be 1 to {MAX_VCPUS}")
    if platform is Platform.SEV_SNP:
        return _snp_digest(image, vcpus, cpu_signature, vmm)
    digest = hashlib.sha256()
    for update in launch_updates(image, platform, vmm):
        for page in update.pages:
            digest.update(page)
    if platform is Platform.SEV_ES:
        for vmsa in launch_vmsas(image, platform, vcpus, cpu_signature, vmm):
            digest.update(vmsa.content)
    return digest.digest()


_PAGE_INFO_HEAD = 48  # bytes of a digest
_PAGE_INFO_TAIL = Layout("HBBIQ")
_PAGE_INFO_SIZE = 2 * _PAGE_INFO_HEAD + _PAGE_INFO_TAIL.size


def _snp_digest(image: IgvmFile, vcpus: int, signature: int | None, vmm: Vmm) -> bytes:
    digest = bytes(_PAGE_INFO_HEAD)
    empty = bytes(_PAGE_INFO_HEAD)

    def extend(page_type: PageType, contents: bytes, gpa: int) -> bytes:
        tail = _PAGE_INFO_TAIL.write(_PAGE_INFO_SIZE, page_type.number, 0, 0, gpa)
        return hashlib.sha384(digest + contents + tail).digest()

    for update in launch_updates(image, Platform.SEV_SNP, vmm):
        gpa = update.gpa
        for page in update.pages:
            contents = hashlib.sha384(page).digest() if update.page_type.measured else empty
            digest = extend(update.page_type, contents, gpa)
            gpa += PAGE_SIZE
    if vmm is Vmm.QEMU:
        for vmsa in launch_vmsas(image, Platform.SEV_SNP, vcpus, signature, vmm):
            digest = extend(VMSA, hashlib.sha384(vmsa.content).digest(), SEV_VMSA_GPA)
    return digest


def launch_updates(image: IgvmFile, platform: Platform, vmm: Vmm) -> Iterator[Update]:
    """What a loader hands over to be measured, in its order.

    On SEV and SEV-ES only what is encrypted and measured; on SEV-SNP all pages, and for
    `Vmm.SPEC` also the VMSAs where the file has them.

    Raises:
        IgvmError: The file lacks the platform, or its data cannot be read.
        RefusedError: The loader would not take the file.
    """
    snp = platform is Platform.SEV_SNP
    updates = (
        _in_qemu_order(image, platform) if vmm is Vmm.QEMU else _in_file_order(image, platform)
    )
    for update in updates:
        if not snp and update.page_type in (SECRETS, CPUID):
            raise RefusedError(
                f"the file has a page at 0x{update.gpa:x} of a type that only SEV-SNP knows",
                hint=f"QEMU refuses it for {platform}; use another image",
            )
        if snp or update.page_type is NORMAL:
            yield update


def _in_file_order(image: IgvmFile, platform: Platform) -> Iterator[Update]:
    sizes = _area_sizes(image)
    for header in image.for_platform(platform):
        if isinstance(header, PageData):
            if not header.shared:
                yield _region(image, [header])
        elif isinstance(header, ParameterInsert):
            yield _insert(header, sizes)
        elif isinstance(header, VpContext) and platform is Platform.SEV_SNP:
            yield Update(header.gpa, VMSA, [image.data_of(header)])


def _in_qemu_order(image: IgvmFile, platform: Platform) -> Iterator[Update]:
    """Regions as qigvm_process_mem_page forms them: flushed only when the next one begins."""
    sizes = _area_sizes(image)
    mask = image.mask_of(platform)
    region: list[PageData] = []
    last = -1
    for index, header in enumerate(image.headers):
        if isinstance(header, PageData) and header.compatibility_mask & mask:
            if region and (index != last + 1 or not _joins(region[-1], header)):
                yield _region(image, region)
                region = []
            region.append(header)
            last = index
        elif isinstance(header, ParameterInsert) and header.compatibility_mask & mask:
            yield _insert(header, sizes)
    if region:
        yield _region(image, region)


def _joins(page: PageData, following: PageData) -> bool:
    return (
        following.gpa == page.gpa + page.guest_size
        and following.flags == page.flags
        and following.data_type == page.data_type
        and following.compatibility_mask == page.compatibility_mask
        and (following.file_offset == 0) == (page.file_offset == 0)
    )


def _region(image: IgvmFile, pages: list[PageData]) -> Update:
    first = pages[0]
    page_type = {
        PageDataType.SECRETS: SECRETS,
        PageDataType.CPUID_DATA: CPUID,
        PageDataType.CPUID_XF: CPUID,
    }.get(PageDataType(first.data_type), UNMEASURED if first.unmeasured else NORMAL)
    contents: list[memoryview | bytes] = []
    for page in pages:
        contents.append(image.data_of(page) if page.file_offset else ZERO_PAGE)
        # data covers 4 KiB; the rest of a 2 MiB page is zero
        contents += [ZERO_PAGE] * (page.guest_size // PAGE_SIZE - 1)
    return Update(first.gpa, page_type, contents)


def _area_sizes(image: IgvmFile) -> dict[int, int]:
    return {
        header.parameter_area_index: header.number_of_bytes
        for header in image.headers
        if isinstance(header, ParameterArea)
    }


def _insert(header: ParameterInsert, sizes: dict[int, int]) -> Update:
    size = sizes[header.parameter_area_index]
    if size > MAX_INSERT:
        raise IgvmError(
            f"parameter area {header.parameter_area_index} has {size} bytes, no loader takes more "
            f"than {MAX_INSERT}"
        )
    return Update(header.gpa, UNMEASURED, [ZERO_PAGE] * (size // PAGE_SIZE))


def launch_vmsas(
    image: IgvmFile,
    platform: Platform,
    vcpus: int,
    cpu_signature: int | None,
    vmm: Vmm,
) -> Iterator[Vmsa]:
    """The VMSA of each vCPU as it is measured, vCPU 0 first.

    Raises:
        RefusedError: The file has a context for a vCPU that the guest does not have.
        UsageError: A vCPU has no context, and no signature is given.
    """
    mask = image.mask_of(platform)
    contexts: dict[int, Vmsa] = {}
    for header in image.headers:
        if isinstance(header, VpContext) and header.compatibility_mask & mask:
            contexts[header.vp_index] = Vmsa.parse(image.data_of(header))
    if vmm is Vmm.SPEC:
        yield from (contexts[index] for index in sorted(contexts))
        return
    beyond = [index for index in contexts if index >= vcpus]
    if beyond:
        raise RefusedError(
            f"the file sets vCPU {max(beyond)}, the guest has only {vcpus}",
            hint=f"give the guest at least {max(beyond) + 1} vCPUs, or use another image",
        )
    features = contexts[0]["sev_features"] if 0 in contexts else 0
    if platform is Platform.SEV_SNP:
        features |= SEV_FEATURE_SNP_ACTIVE
    for index in range(vcpus):
        if index in contexts:
            yield as_kvm_measures(contexts[index], platform, features)
            continue
        if cpu_signature is None:
            raise UsageError(
                f"the file has no VP context for vCPU {index}: its initial RDX is the CPU's "
                "signature, which the digest depends on",
                hint="name the guest's CPU model with --cpu",
            )
        reset = reset_vmsa(RESET_ADDRESS, sev_features=features, rdx=cpu_signature)
        yield as_kvm_measures(reset, platform, features)


_SYNCED = (
    "dr6 dr7 cr0 cr3 rsp rax rcx rdx rbx rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15 rip xcr0 g_pat"
).split()
_FPU = ("mxcsr", "x87_fcw")
_CR0_CACHE = 1 << 30 | 1 << 29  # CD and NW, which KVM clears for a guest
_CR4_MCE = 1 << 6
_EFER_SVME = 1 << 12


def as_kvm_measures(vmsa: Vmsa, platform: Platform, sev_features: int) -> Vmsa:
    """A VP context as it comes out of QEMU and KVM: what KVM_SEV_LAUNCH_UPDATE_VMSA encrypts.

    QEMU copies the registers it knows into the vCPU (sev_apply_cpu_context), and KVM writes the
    VMSA from the vCPU (sev_es_sync_vmsa): EFER.SVME and CR4.MCE appear, CR0's cache bits go, the
    table registers keep base and limit only, TR gets LDTR's base (QEMU's mistake), and the features
    are those of vCPU 0.  The FPU's registers are measured on SEV-SNP only: for SEV-ES QEMU creates
    a VM of KVM's default type (legacy-vm-type=auto, which libvirt leaves alone), where KVM does not
    write them.
    """
    names = [*_SYNCED, *_FPU] if platform is Platform.SEV_SNP else _SYNCED
    registers: dict[str, int | Segment] = {name: vmsa[name] for name in names}
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"):
        segment = vmsa.segment(name)
        registers[name] = segment._replace(attrib=segment.attrib & 0xFFF)
    registers["tr"] = vmsa.segment("tr")._replace(base=vmsa.segment("ldtr").base)
    for name in ("gdtr", "idtr"):
        table = vmsa.segment(name)
        registers[name] = Segment(0, 0, table.limit, table.base)
    registers["cr0"] = vmsa["cr0"] & ~_CR0_CACHE
    registers["cr4"] = vmsa["cr4"] | _CR4_MCE
    registers["efer"] = vmsa["efer"] | _EFER_SVME
    registers["rflags"] = vmsa["rflags"] | 2
    registers["cpl"] = vmsa.segment("ss").attrib >> 5 & 3
    registers["sev_features"] = sev_features
    return Vmsa.build(registers)
