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
from itertools import count
from typing import NamedTuple

from igvmfw.errors import RefusedError, UsageError
from igvmfw.igvm.guestpages import ZERO_PAGE, GuestPages, PageSource
from igvmfw.igvm.headers import PageData, ParameterInsert, SnpIdBlock, VpContext
from igvmfw.igvm.image import IgvmFile, mask_in
from igvmfw.igvm.loading import find_discards
from igvmfw.igvm.measure_spec import mrtd, vbs_boot_digest
from igvmfw.igvm.reader import Layout
from igvmfw.igvm.spec import (
    PAGE_SIZE,
    SEV_VMSA_GPA,
    PageDataType,
)
from igvmfw.igvm.vpcontext import SEV_FEATURE_SNP_ACTIVE, Segment, Vmsa
from igvmfw.igvm.wrap import MAX_VCPUS, RESET_ADDRESS, reset_vmsa
from igvmfw.platforms import Platform

MEASURED = (Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)  # where QEMU launches them
WITH_DIGEST = (*MEASURED, Platform.TDX, Platform.VSM)


class Vmm(StrEnum):
    """Whose order of measuring is meant."""

    QEMU = "qemu"
    SPEC = "spec"


def default_vmm(platform: Platform) -> Vmm:
    """QEMU where it launches the platform from an IGVM file, else the file's own order."""
    return Vmm.QEMU if platform in MEASURED else Vmm.SPEC


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
    """Pages handed over in one go: the guest address of the first, and their places in the file.

    An offset of 0 is a page of zeroes.
    """

    gpa: int
    page_type: PageType
    offsets: list[int]
    content: memoryview

    @property
    def pages(self) -> list[memoryview | bytes]:
        """The contents, 4 KiB each."""
        return [self.page(offset) for offset in self.offsets]

    def page(self, offset: int) -> memoryview | bytes:
        """The contents of the page at an offset."""
        return self.content[offset : offset + PAGE_SIZE] if offset else ZERO_PAGE


def launch_digest(
    image: IgvmFile,
    platform: Platform,
    *,
    vcpus: int = 1,
    cpu_signature: int | None = None,
    vmm: Vmm | None = None,
) -> bytes:
    """The launch digest: 48 bytes for SEV-SNP and TDX (MRTD), 32 for SEV, SEV-ES and VSM.

    Args:
        image: The file.
        platform: native and cca have no digest of this kind.
        vcpus: Of the guest; the file's own order knows only those that the file has.
        cpu_signature: CPUID leaf 1 EAX of the guest's CPU model; needed where a vCPU has no VP
            context in the file, because it starts with its signature in RDX.
        vmm: Whose order; by default QEMU's where it launches the platform from an IGVM file, else
            the file's own.
    Raises:
        IgvmError: The file lacks the platform, breaks a rule of the format, or names more memory
            without data than igvmfw measures.
        RefusedError: QEMU would not launch the file on the platform, or with other contents.
        UsageError: The platform has no digest, or none with this VMM; the vCPU count is out of
            bounds, or a signature is needed.
    """
    vmm = vmm or default_vmm(platform)
    _check_request(platform, vcpus, vmm)
    if image.problems:  # read leniently: no loader takes it
        raise image.problems[0].error()
    if platform is Platform.TDX:
        return mrtd(image)
    if platform is Platform.VSM:
        return vbs_boot_digest(image)
    if platform is Platform.SEV_SNP:
        return _snp_digest(image, vcpus, cpu_signature, vmm)
    digest = hashlib.sha256()
    for update in launch_updates(image, platform, vmm):
        for offset in update.offsets:
            digest.update(update.page(offset))
    if platform is Platform.SEV_ES and vmm is Vmm.QEMU:
        for vmsa in launch_vmsas(image, platform, vcpus, cpu_signature):
            digest.update(vmsa.content)
    return digest.digest()


def _check_request(platform: Platform, vcpus: int, vmm: Vmm) -> None:
    if platform not in WITH_DIGEST:
        raise UsageError(
            f"a {platform} launch has no digest that igvmfw computes",
            hint=f"only: {', '.join(WITH_DIGEST)}",
        )
    if vmm is Vmm.QEMU and platform not in MEASURED:
        raise UsageError(
            f"QEMU launches no {platform} guest from an IGVM file: there is no such digest",
            hint=f"leave the VMM out, or name {Vmm.SPEC}, for the digest in the file's own order",
        )
    if not 1 <= vcpus <= MAX_VCPUS:
        raise UsageError(f"{vcpus} vCPUs: must be 1 to {MAX_VCPUS}")


def stated_digest(image: IgvmFile) -> bytes | None:
    """The launch digest that the file's ID block states for SEV-SNP; None where it has no block.

    The firmware refuses a launch that comes to another digest.

    Raises:
        IgvmError: The file lacks the platform.
        RefusedError: The file has more than one block, and a launch takes one.
    """
    headers = image.for_platform(Platform.SEV_SNP)
    stated = [header.ld for header in headers if isinstance(header, SnpIdBlock)]
    if len(stated) > 1:
        raise RefusedError(
            f"the file has {len(stated)} ID blocks for {Platform.SEV_SNP}, a launch takes one",
            hint="QEMU refuses it; sign the image anew",
        )
    return stated[0] if stated else None


_DIGEST = 48  # bytes of a SHA-384
_PAGE_KIND = Layout("HBBI")  # PAGE_INFO between its two digests and its address
_PAGE_INFO = Layout(f"{_DIGEST}s{_DIGEST}s{_PAGE_KIND.size}sQ")


def _snp_digest(image: IgvmFile, vcpus: int, signature: int | None, vmm: Vmm) -> bytes:
    """The chain of PAGE_INFO structures; each place in the file is hashed once.

    Nearly all of the time goes into two calls of hashlib a page: as little as can be stands around
    them.
    """
    if vmm is Vmm.QEMU:
        _check_order(image)
    sha384, pack, content = hashlib.sha384, _PAGE_INFO.pack, image.content
    digest = nothing = bytes(_DIGEST)
    known = {0: sha384(ZERO_PAGE).digest()}
    for update in launch_updates(image, Platform.SEV_SNP, vmm):
        kind, measured = _page_kind(update.page_type), update.page_type.measured
        for gpa, offset in zip(count(update.gpa, PAGE_SIZE), update.offsets, strict=False):
            page = known.get(offset) if measured else nothing
            if page is None:
                page = known[offset] = sha384(content[offset : offset + PAGE_SIZE]).digest()
            digest = sha384(pack(digest, page, kind, gpa)).digest()
    if vmm is Vmm.QEMU:
        kind = _page_kind(VMSA)
        for vmsa in launch_vmsas(image, Platform.SEV_SNP, vcpus, signature):
            page = sha384(vmsa.content).digest()
            digest = sha384(pack(digest, page, kind, SEV_VMSA_GPA)).digest()
    return digest


def _page_kind(page_type: PageType) -> bytes:
    """What PAGE_INFO has between digests and address: no IMI page, no permissions of VMPLs."""
    return _PAGE_KIND.write(_PAGE_INFO.size, page_type.number, 0, 0)


def _check_order(image: IgvmFile) -> None:
    for index, gpa in find_discards(image, image.mask_of(Platform.SEV_SNP)):
        raise RefusedError(
            f"required memory comes behind what is loaded into it, at 0x{gpa:x}: QEMU launches "
            "zeroes instead",
            where=f"header {index}, offset 0x{image.header_offsets[index]:x}",
            hint="rebuild the image with required memory before pages and parameter areas",
        )


def launch_updates(image: IgvmFile, platform: Platform, vmm: Vmm) -> Iterator[Update]:
    """What a loader hands over to be measured on SEV, SEV-ES or SEV-SNP, in its order.

    On SEV and SEV-ES only what is encrypted and measured; on SEV-SNP all pages.  For `Vmm.SPEC`
    also the VMSAs, where the file has them.

    Raises:
        IgvmError: The file lacks the platform, or names too much memory without data.
        RefusedError: The loader would not take the file.
    """
    snp = platform is Platform.SEV_SNP
    for update in _updates(image, platform, vmm):
        if not snp and update.page_type in (SECRETS, CPUID):
            raise RefusedError(
                f"the file has a page at 0x{update.gpa:x} of a type that only SEV-SNP knows",
                hint=f"QEMU refuses it for {platform}; use another image",
            )
        if snp or update.page_type.measured:
            yield update


def _updates(image: IgvmFile, platform: Platform, vmm: Vmm) -> Iterator[Update]:
    """All updates: a region of pages is handed over when something follows that does not join it.

    QEMU (qigvm_process_mem_page) notices only pages, so that what else stands between two regions
    comes before the first.  It numbers the headers that libigvm gives it, which leaves out those
    that apply to no platform.
    """
    mask = image.mask_of(platform)
    in_file_order = vmm is Vmm.SPEC
    contexts = in_file_order and platform is not Platform.SEV
    source = PageSource(image)
    region: list[PageData] = []
    index = last = -1

    def flushed() -> Update:
        pages = source.region(region)
        page_type = _page_type(region[0])
        region.clear()
        return _update(image, page_type, pages)

    for header in image.headers:
        page = header if type(header) is PageData else None
        applies = mask_in(header) if page is None else page.compatibility_mask
        index += applies != 0
        if not applies & mask:
            continue
        if page is not None:
            if in_file_order and page.shared:
                continue
            if region and (index != last + 1 or not region[-1].is_continued_by(page)):
                yield flushed()
            region.append(page)
            last = index
        elif isinstance(header, ParameterInsert) or (contexts and isinstance(header, VpContext)):
            if in_file_order and region:
                yield flushed()
            if isinstance(header, ParameterInsert):
                yield _update(image, UNMEASURED, source.inserted(header))
            else:
                yield Update(header.gpa, VMSA, [header.file_offset], image.content)
    if region:
        yield flushed()


_SPECIAL = {
    PageDataType.SECRETS: SECRETS,
    PageDataType.CPUID_DATA: CPUID,
    PageDataType.CPUID_XF: CPUID,
}


def _page_type(page: PageData) -> PageType:
    special = _SPECIAL.get(page.data_type)  # type: ignore[call-overload]
    return special or (UNMEASURED if page.unmeasured else NORMAL)


def _update(image: IgvmFile, page_type: PageType, pages: GuestPages) -> Update:
    return Update(pages.gpa, page_type, pages.offsets, image.content)


def launch_vmsas(
    image: IgvmFile, platform: Platform, vcpus: int, cpu_signature: int | None
) -> Iterator[Vmsa]:
    """The VMSA of each vCPU as KVM measures it, vCPU 0 first.

    Raises:
        RefusedError: The file has a context for a vCPU that the guest does not have.
        UsageError: A vCPU has no context, and no signature is given.
    """
    mask = image.mask_of(platform)
    contexts: dict[int, VpContext] = {}
    for header in image.others:
        if isinstance(header, VpContext) and header.compatibility_mask & mask:
            contexts[header.vp_index] = header
    beyond = [index for index in contexts if index >= vcpus]
    if beyond:
        raise RefusedError(
            f"the file sets vCPU {max(beyond)}, the guest has only {vcpus}",
            hint=f"give the guest at least {max(beyond) + 1} vCPUs ('igvmfw measure' by --vcpus), "
            "or use another image",
        )
    boot = contexts.get(0)
    features = Vmsa.parse(image.data_of(boot)).register("sev_features") if boot else 0
    if platform is Platform.SEV_SNP:
        features |= SEV_FEATURE_SNP_ACTIVE
    reset: Vmsa | None = None
    for index in range(vcpus):
        if index in contexts:
            own = Vmsa.parse(image.data_of(contexts[index]))
            yield as_kvm_measures(own, platform, features)
            continue
        if cpu_signature is None:
            raise UsageError(
                f"the file has no VP context for vCPU {index}: its initial RDX is the CPU's "
                "signature, which the digest depends on",
                hint="name the guest's CPU model with --cpu",
            )
        if reset is None:
            state = reset_vmsa(RESET_ADDRESS, sev_features=features, rdx=cpu_signature)
            reset = as_kvm_measures(state, platform, features)
        yield reset


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
    registers: dict[str, int | Segment] = {name: vmsa.register(name) for name in names}
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"):
        segment = vmsa.segment(name)
        registers[name] = segment._replace(attrib=segment.attrib & 0xFFF)
    registers["tr"] = vmsa.segment("tr")._replace(base=vmsa.segment("ldtr").base)
    for name in ("gdtr", "idtr"):
        table = vmsa.segment(name)
        registers[name] = Segment(0, 0, table.limit, table.base)
    registers["cr0"] = vmsa.register("cr0") & ~_CR0_CACHE
    registers["cr4"] = vmsa.register("cr4") | _CR4_MCE
    registers["efer"] = vmsa.register("efer") | _EFER_SVME
    registers["rflags"] = vmsa.register("rflags") | 2
    registers["cpl"] = vmsa.segment("ss").attrib >> 5 & 3
    registers["sev_features"] = sev_features
    return Vmsa.build(registers)
