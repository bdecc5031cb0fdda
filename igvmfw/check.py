"""An image and an emulator → what would happen: refused, damaged by QEMU, or another guest.

QEMU's own checks are those of backends/igvm.c and target/i386/sev.c (10.2.2 unless a rule names
another release); where QEMU has no check and writes out of bounds, there is a rule instead, and no
such file must ever be given to it.  docs/check.md documents every rule id.
"""

from collections.abc import Callable, Iterator
from typing import Any

from igvmfw.check_context import check_context, has_tail
from igvmfw.check_memory import MemoryCheck, find_crossing
from igvmfw.findings import (
    Finding,
    Guest,
    Result,
    Severity,
    error,
    plain,
    unparsable,
    warning,
)
from igvmfw.igvm.headers import (
    CorimDocument,
    CorimSignature,
    GuestPolicy,
    PageData,
    Parameter,
    ParameterArea,
    ParameterInsert,
    RawHeader,
    RequiredMemory,
    SnpIdBlock,
    SupportedPlatform,
    VersionString,
    VpContext,
)
from igvmfw.igvm.image import IgvmFile, mask_in
from igvmfw.igvm.loading import find_discards, loaded_regions
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import (
    OPTIONAL_BIT,
    HeaderType,
    PageDataType,
    Section,
    SnpPolicy,
    section_of,
    type_name,
)
from igvmfw.platforms import Platform
from igvmfw.qemu.acceptance import RELEASES, Acceptance

MAX_AREA = 64 << 20  # bytes; QEMU allocates what the file says, up to 4 GiB each
MAX_CONTEXTS = 4096  # the most vCPUs of q35 (hw/i386/pc_q35.c, max_cpus)
# bytes of a MADT: its header, I/O APIC, interrupt overrides and NMI, together; then those of a CPU,
# and of one behind the 255 whose APIC ids fit into a byte (hw/i386/acpi-common.c, acpi_build_madt)
MADT_FIXED, MADT_CPU, MADT_FAR_CPU, MADT_CPUS = 118, 8, 16, 255
MAX_AREAS = 256 << 20  # bytes, all of a file together
LAUNCHED = (Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)


def check_image(
    image: IgvmFile, platform: Platform, qemu: Acceptance, guest: Guest | None = None
) -> list[Finding]:
    """What would happen if this QEMU launched a guest of a platform from the file.

    Args:
        image: The file.
        platform: The guest's.
        qemu: The release.
        guest: What is known of the guest.
    Raises:
        IgvmError: The file breaks a rule of the format, and was read leniently.
    """
    if image.problems:
        raise image.problems[0].error()
    found = _Check(image, platform, qemu, guest or Guest())
    return list(found.run())


def refuses(findings: list[Finding]) -> bool:
    """Whether one of them stops the launch.

    Args:
        findings: Of a check.
    """
    return any(finding.severity is Severity.ERROR for finding in findings)


class _Check:
    """One pass over the headers as QEMU makes it, with the state it keeps."""

    def __init__(self, image: IgvmFile, platform: Platform, qemu: Acceptance, guest: Guest) -> None:
        self._image = image
        self._platform = platform
        self._qemu = qemu
        self._guest = guest
        self._mask = 0
        self._areas: dict[int, int] = {}
        self._allocated = 0
        self._memory = MemoryCheck(platform, guest)
        self._id_blocks = 0
        self._contexts: set[int] = set()
        self._judged = 0  # contexts
        self._policy: int | None = None

    def run(self) -> Iterator[Finding]:
        """All findings, in the order QEMU would come across them."""
        for result in (*self._choose_platform(), *self._launched()):
            yield self._finding(result, None)
        if not self._mask:
            return
        directives = 0
        found: list[tuple[int, Result]] = []
        for index, header in enumerate(self._image.headers):
            if isinstance(header, SupportedPlatform):
                continue
            directives += section_of(header.type) is Section.DIRECTIVE and mask_in(header) != 0
            found += ((index, result) for result in self._header(header))
        found += self._loaded()
        for index, result in sorted(found, key=lambda item: item[0]):
            yield self._finding(result, index)
        if not directives:
            yield self._finding(error("empty", "the file has no directives", "rebuild it"), None)
        for result in self._whole_file():
            yield self._finding(result, None)

    def _loaded(self) -> Iterator[tuple[int, Result]]:
        """What becomes of pages as QEMU loads them, by the index of the header it is about."""
        for region in loaded_regions(self._image, self._mask):
            size = region.end - region.start
            for result in self._memory.placed(region.start, size, "a region of pages"):
                yield region.first, result
        yield from find_crossing(self._image, self._mask, self._guest.memory)
        if self._platform is not Platform.SEV_SNP:
            return
        for discard in find_discards(self._image, self._mask):
            result = error(
                "required-late",
                f"required memory comes behind what is loaded into it, at 0x{discard.gpa:x}: QEMU "
                "makes it private then, and the guest gets pages of zeroes",
                "rebuild the image with required memory before pages and parameter areas",
            )
            yield discard.header_index, result

    def _finding(self, result: Result, index: int | None) -> Finding:
        rule, severity, message, remedy = result
        return Finding(
            rule=rule,
            severity=severity,
            platform=self._platform,
            header_index=index,
            file_offset=None if index is None else self._image.header_offsets[index],
            message=message,
            remedy=remedy,
        )

    def _choose_platform(self) -> Iterator[Result]:
        """As qigvm_supported_platform_compat_mask: the guest's own, else a weaker one it takes."""
        have = ", ".join(self._image.supported) or "none"
        if self._platform not in LAUNCHED:
            yield error(
                "platform-unsupported",
                f"{self._qemu.name} launches no {self._platform} guest from an IGVM file",
                f"use one of: {', '.join(LAUNCHED)}",
            )
            return
        own = self._image.find_platform(self._platform)
        if own is not None:
            self._mask = own.compatibility_mask
            return
        order = {
            Platform.NATIVE: (),
            Platform.SEV: (Platform.NATIVE,),
            Platform.SEV_ES: (Platform.SEV, Platform.NATIVE),
            Platform.SEV_SNP: (Platform.SEV_ES, Platform.SEV, Platform.NATIVE),
        }[self._platform]
        for weaker in order:
            fallback = self._image.find_platform(weaker)
            if fallback is not None:
                yield error(
                    "platform-fallback",
                    f"the file has no platform {self._platform} (only {have}): QEMU would take "
                    f"what it has for {weaker}",
                    f"use a file made for {self._platform}",
                )
                self._mask = fallback.compatibility_mask
                return
        yield error(
            "platform-missing",
            f"the file has no platform {self._platform}, only: {have}; QEMU says 'IGVM file does "
            "not describe a compatible supported platform'",
            f"use a file made for {self._platform}",
        )

    def _launched(self) -> Iterator[Result]:
        """Whether the release gets through a launch of the platform at all."""
        if self._platform not in (Platform.SEV, Platform.SEV_ES) or self._qemu.sev_launch:
            return
        said = "'LAUNCH_UPDATE … Guest state is invalid'"
        if self._qemu.sev_launch is None:
            yield warning(
                "sev-launch",
                f"QEMU 11.0 cannot launch {self._platform} guests from an IGVM file, older "
                "releases can; of newer ones it is not known",
                f"where a launch fails with {said}, use QEMU 10.1 or 10.2",
            )
        else:
            yield error(
                "sev-launch",
                f"{self._qemu.name} has the launch of {self._platform} guests measured before it "
                f"loads the IGVM file, which the processor then refuses: {said}",
                "use QEMU 10.1 or 10.2, or a SEV-SNP guest",
            )

    def _header(self, header: AnyHeader) -> Iterator[Result]:
        if isinstance(header, RawHeader) or header.type & OPTIONAL_BIT:
            yield unparsable(f"header type {type_name(header.type)}")
            return
        if isinstance(header, VersionString | CorimDocument | CorimSignature):
            yield unparsable(f"a {type_name(header.type)} header")
            return
        if isinstance(header, VpContext) and has_tail(self._image, header):
            yield unparsable("a VMSA that does not end in zeroes (from byte 0x670 on)")
            return
        if not mask_in(header):
            return  # libigvm leaves it out
        if HeaderType(header.type).name not in self._qemu.headers:
            yield error(
                "header-unknown",
                f"{self._qemu.name} does not handle {type_name(header.type)} and stops, whatever "
                f"the platform: 'IGVM: Unknown header type encountered when processing file: (type "
                f"0x{header.type:X})'",
                self._newer(HeaderType(header.type).name),
            )
            return
        if isinstance(header, GuestPolicy):
            if header.compatibility_mask & self._mask:
                self._policy = header.policy
            return
        if isinstance(header, Parameter):
            yield from self._parameter(header)  # carries no mask: handled on every platform
            return
        handler = _HANDLERS.get(type(header))
        if handler is not None and mask_in(header) & self._mask:
            yield from handler(self, header)

    @staticmethod
    def _newer(name: str) -> str:
        release = next((item for item in RELEASES if name in item.headers), None)
        if release is not None:
            return f"use {release.name} or newer, or an image without this header"
        return "no QEMU release takes it yet: use the QEMU the image was made for, or another image"

    def _page(self, page: PageData) -> Iterator[Result]:
        platform = self._platform
        if page.data_type != PageDataType.NORMAL:
            kind = PageDataType(page.data_type).name
            if platform in (Platform.SEV, Platform.SEV_ES):
                yield error(
                    "page-type",
                    f"QEMU refuses a {kind} page on {platform}",
                    "use an image made for this platform: such pages are SEV-SNP's",
                )
            elif platform is Platform.NATIVE:
                yield warning(
                    "page-type-native",
                    f"the {kind} page at 0x{page.gpa:x} becomes ordinary memory on a native guest",
                    "leave it out of the native platform's mask",
                )
        elif page.unmeasured and platform in (Platform.SEV, Platform.SEV_ES):
            yield plain(f"the unmeasured page at 0x{page.gpa:x}")
        if page.shared:
            yield warning(
                "page-shared",
                f"QEMU does not know the flag `shared` and loads the page at 0x{page.gpa:x} as a "
                "private, measured one",
                "the launch digest is not the one of the file's own order",
            )
        yield from self._memory.page(page)

    def _area(self, area: ParameterArea) -> Iterator[Result]:
        size = area.number_of_bytes
        self._areas[area.parameter_area_index] = size
        self._allocated += size
        if size > MAX_AREA or self._allocated > MAX_AREAS:
            yield error(
                "area-size",
                f"parameter area {area.parameter_area_index} has {size} bytes: QEMU allocates what "
                "the file says, in 32 bits",
                "rebuild the image: parameters take some pages",
            )
        elif size == 0:
            yield error(
                "area-size",
                f"parameter area {area.parameter_area_index} is empty: any parameter in it is "
                "written outside",
                "rebuild the image",
            )
        if area.file_offset:
            yield warning(
                "area-contents",
                f"QEMU ignores the initial contents of parameter area {area.parameter_area_index}",
                "load them with page data",
            )

    def _parameter(self, header: Parameter) -> Iterator[Result]:
        size = self._areas.get(header.parameter_area_index, 0)
        name = type_name(header.type)
        if header.type in (HeaderType.MEMORY_MAP, HeaderType.MADT):
            if header.byte_offset:
                yield warning(
                    "parameter-offset",
                    f"QEMU writes {name} at the area's begin, not at {header.byte_offset}",
                    "place it first in its area",
                )
            if header.type == HeaderType.MADT:
                yield from self._madt(size)
            return
        if header.byte_offset + 4 > size:
            yield error(
                "parameter-outside",
                f"{name} at byte {header.byte_offset} of an area of {size} bytes: QEMU does not "
                "check this, and would write outside its memory",
                "do not use this file: it is damaged, or made to attack the host",
            )

    def _madt(self, size: int) -> Iterator[Result]:
        vcpus = self._guest.vcpus or 0
        far = max(0, vcpus - MADT_CPUS)  # at least; ids of some topologies have gaps
        needed = MADT_FIXED + MADT_CPU * (vcpus - far) + MADT_FAR_CPU * far
        if needed > size:
            yield error(
                "madt-size",
                f"the MADT of {vcpus} vCPUs has {needed} bytes, the area for it {size}: 'MADT size "
                "exceeds parameter area defined in IGVM file'",
                "give the guest fewer vCPUs, or rebuild the image with a larger area",
            )

    def _insert(self, insert: ParameterInsert) -> Iterator[Result]:
        size = self._areas.get(insert.parameter_area_index, 0)
        if self._platform in (Platform.SEV, Platform.SEV_ES):
            yield plain(f"the parameter area at 0x{insert.gpa:x}")
        if self._allocated <= MAX_AREAS:
            yield from self._memory.area(insert.gpa, size)

    def _required(self, required: RequiredMemory) -> Iterator[Result]:
        yield from self._memory.required(required)
        if required.vtl2_protectable:
            yield warning(
                "required-vtl",
                f"QEMU has no VTLs: the required memory at 0x{required.gpa:x} is not protected "
                "for VTL 2",
                "do not rely on it",
            )

    def _context(self, header: VpContext) -> Iterator[Result]:
        self._judged += 1
        if self._judged > MAX_CONTEXTS:  # as many that are refused would keep igvmfw busy
            if self._judged == MAX_CONTEXTS + 1:
                yield error(
                    "context-index",
                    f"more than {MAX_CONTEXTS} VP contexts: no guest of QEMU has as many vCPUs",
                    "rebuild the image",
                )
            return
        if header.vp_index in self._contexts:
            yield warning(
                "context-twice",
                f"a second VP context for vCPU {header.vp_index}: QEMU takes the later one",
                "rebuild the image",
            )
        self._contexts.add(header.vp_index)
        yield from check_context(self._image, header, self._platform, self._qemu, self._guest)

    def _id_block(self, header: SnpIdBlock) -> Iterator[Result]:
        self._id_blocks += 1
        if self._id_blocks > 1:
            yield error(
                "id-block-twice",
                "'IGVM: Multiple ID blocks encountered in IGVM file'",
                "rebuild the image with one",
            )

    def _whole_file(self) -> Iterator[Result]:
        if len(self._image.file_data) == 0:
            yield unparsable("no file data")
        if self._platform is Platform.SEV_SNP:
            if not self._policy and self._qemu.keeps_policy:
                if self._id_blocks:
                    yield error(
                        "policy-missing",
                        "the file has an ID block and no guest policy: QEMU puts policy 0 into the "
                        "block, and the processor wants it to be the guest's",
                        "rebuild the image with the policy that its ID block was signed for",
                    )
                return  # the domain's own counts
            if self._policy is None:
                yield error(
                    "policy-missing",
                    "the file has no guest policy: QEMU launches with policy 0, which SEV-SNP "
                    "refuses, whatever the domain says",
                    "rebuild the image with a policy (0x30000 is the usual one)",
                )
            elif not self._policy & SnpPolicy.RESERVED_MUST_BE_ONE:
                yield error(
                    "policy-invalid",
                    f"bit 17 of the guest policy 0x{self._policy:x} must be one",
                    "rebuild the image with a valid policy",
                )
        elif self._platform in (Platform.SEV, Platform.SEV_ES) and self._policy is not None:
            yield warning(
                "policy-ignored",
                f"QEMU does not take the policy 0x{self._policy:x} from the file on "
                f"{self._platform}",
                "write it into the domain's <policy>",
            )
        vcpus = self._guest.vcpus
        if self._platform is Platform.SEV_ES and vcpus is not None and self._contexts:
            missing = [index for index in range(vcpus) if index not in self._contexts]
            if missing:
                yield warning(
                    "context-missing",
                    f"no VP context for vCPU {missing[0]}: it starts at the reset vector, where "
                    "OVMF expects the first vCPU alone",
                    f"wrap the firmware with --vcpus {vcpus}",
                )


# bound methods kept in the object would make a cycle, and the file would stay in memory
_HANDLERS: dict[type, Callable[[_Check, Any], Iterator[Result]]] = {
    PageData: _Check._page,
    VpContext: _Check._context,
    ParameterArea: _Check._area,
    ParameterInsert: _Check._insert,
    RequiredMemory: _Check._required,
    SnpIdBlock: _Check._id_block,
}
