"""An image and an emulator → what would happen: refused, damaged by QEMU, or another guest.

QEMU's own checks are those of backends/igvm.c and target/i386/sev.c (10.2.2 unless a rule names
another release); where QEMU has no check and writes out of bounds, there is a rule instead, and no
such file must ever be given to it.  docs/check.md documents every rule id.
"""

from collections.abc import Callable, Iterator
from typing import Any

from igvmfw.check_context import check_context
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
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import (
    LARGE_PAGE_SIZE,
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
MAX_AREAS = 256 << 20  # bytes, all of a file together
LAUNCHED = (Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)
_SEV_FAMILY = (Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)


_Located = tuple[int, int, AnyHeader]


def check_image(
    image: IgvmFile, platform: Platform, qemu: Acceptance, guest: Guest | None = None
) -> list[Finding]:
    """What would happen if this QEMU launched a guest of a platform from the file.

    Args:
        image: The file.
        platform: The guest's.
        qemu: The release.
        guest: What is known of the guest.
    """
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
        self._pages: set[int] = set()  # addresses of pages of 4 KiB
        self._frames: set[int] = set()  # of 2 MiB, with any page
        self._large: set[int] = set()  # of 2 MiB, as one page
        self._id_blocks = 0
        self._contexts: set[int] = set()
        self._policy: int | None = None

    def run(self) -> Iterator[Finding]:
        """All findings, in the order QEMU would come across them."""
        for result in (*self._choose_platform(), *self._launched()):
            yield self._finding(result, None)
        if not self._mask:
            return
        located = list(
            zip(
                range(len(self._image.headers)),
                self._image.header_offsets,
                self._image.headers,
                strict=True,
            )
        )
        directives = 0
        for place in located:
            header = place[2]
            if isinstance(header, SupportedPlatform):
                continue
            directives += section_of(header.type) is Section.DIRECTIVE
            for result in self._header(header):
                yield self._finding(result, place)
        if not directives:
            yield self._finding(error("empty", "the file has no directives", "rebuild it"), None)
        for result in self._whole_file():
            yield self._finding(result, None)

    def _finding(self, result: Result, place: _Located | None) -> Finding:
        rule, severity, message, remedy = result
        return Finding(
            rule=rule,
            severity=severity,
            platform=self._platform,
            header_index=None if place is None else place[0],
            file_offset=None if place is None else place[1],
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
        if isinstance(header, ParameterArea):
            yield from self._area(header)
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
        yield from self._memory(page.gpa, page.guest_size, "the page")
        frame = page.gpa // LARGE_PAGE_SIZE
        taken = self._frames if page.is_2mb_page else self._large
        if frame in taken or page.gpa in self._pages:
            yield self._twice(page.gpa)
        self._frames.add(frame)
        if page.is_2mb_page:
            self._large.add(frame)
        else:
            self._pages.add(page.gpa)

    def _twice(self, gpa: int) -> Result:
        message = f"guest memory at 0x{gpa:x} is loaded twice"
        if self._platform in _SEV_FAMILY:
            return error(
                "page-twice",
                f"{message}: memory that is encrypted cannot be encrypted again",
                "rebuild the image without overlapping pages",
            )
        return warning("page-twice", f"{message}: the later one wins", "rebuild the image")

    def _memory(self, gpa: int, size: int, what: str) -> Iterator[Result]:
        """As qigvm_prepare_memory: within RAM, or where nothing is."""
        for start, end, device in _DEVICES:
            if gpa < end and start < gpa + size:
                yield error(
                    "memory-device",
                    f"{what} at 0x{gpa:x} lies on the {device} (0x{start:x}): 'Could not prepare "
                    "memory … due to existing non-RAM region'",
                    "rebuild the image for QEMU's memory layout",
                )
        if gpa + size > 1 << 52:
            yield error(
                "memory-range",
                f"{what} at 0x{gpa:x} is beyond any guest's address space",
                "rebuild the image",
            )
        memory = self._guest.memory
        if memory is not None and gpa < min(memory, _LOW_RAM) < gpa + size:
            yield error(
                "memory-border",
                f"{what} at 0x{gpa:x} crosses the end of the guest's memory: "
                "'region size exceeded'",
                f"give the guest more than {(gpa + size) >> 20} MiB",
            )

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
            return
        if header.byte_offset + 4 > size:
            yield error(
                "parameter-outside",
                f"{name} at byte {header.byte_offset} of an area of {size} bytes: QEMU does not "
                "check this, and would write outside its memory",
                "do not use this file: it is damaged, or made to attack the host",
            )

    def _insert(self, insert: ParameterInsert) -> Iterator[Result]:
        size = self._areas.get(insert.parameter_area_index, 0)
        if self._platform in (Platform.SEV, Platform.SEV_ES):
            yield plain(f"the parameter area at 0x{insert.gpa:x}")
        if size:
            yield from self._memory(insert.gpa, size, "the parameter area")

    def _required(self, required: RequiredMemory) -> Iterator[Result]:
        if required.number_of_bytes == 0:
            return
        yield from self._memory(required.gpa, required.number_of_bytes, "required memory")
        end = required.gpa + required.number_of_bytes
        memory = self._guest.memory
        if memory is not None and end > memory:
            yield warning(
                "memory-required",
                f"the file needs memory up to 0x{end:x}, the guest has {memory >> 20} MiB",
                f"give the guest at least {-(-end >> 20)} MiB",
            )

    def _context(self, header: VpContext) -> Iterator[Result]:
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


# bound methods kept in the object would make a cycle, and the file would stay mapped
_HANDLERS: dict[type, Callable[[_Check, Any], Iterator[Result]]] = {
    PageData: _Check._page,
    VpContext: _Check._context,
    ParameterInsert: _Check._insert,
    RequiredMemory: _Check._required,
    SnpIdBlock: _Check._id_block,
}

# what stands below 4 GiB on q35 and pc and is no RAM (hw/i386/x86-common.c, hw/pci-host/q35.c)
_DEVICES = (
    (0xB000_0000, 0xC000_0000, "PCI configuration space"),
    (0xFEC0_0000, 0xFEC0_1000, "I/O APIC"),
    (0xFED0_0000, 0xFED0_1000, "HPET"),
    (0xFEE0_0000, 0xFEE1_0000, "local APIC"),
)
_LOW_RAM = 0x8000_0000  # bytes below the hole on q35 with the usual amount of memory
