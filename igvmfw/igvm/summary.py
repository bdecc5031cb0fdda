"""What an image does on one platform, in figures a person asks for."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from igvmfw.errors import IgvmError
from igvmfw.igvm.headers import (
    GuestPolicy,
    PageData,
    Parameter,
    ParameterArea,
    ParameterInsert,
    RawHeader,
    RequiredMemory,
    SnpIdBlock,
    VpContext,
)
from igvmfw.igvm.image import IgvmFile, mask_in
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import PAGE_SIZE, PageDataType, PlatformType, type_name
from igvmfw.igvm.vpcontext import Vmsa, parse_cca, parse_native, parse_vbs
from igvmfw.platforms import Platform
from igvmfw.records import Record

_EFER_LMA = 1 << 10
_CR0_PE = 1 << 0
_MAX_U32, _MAX_U64 = (1 << 32) - 1, (1 << 64) - 1
_WITH_VMSA = (PlatformType.SEV_ES, PlatformType.SEV_SNP)
_NO_REGISTERS = bytes(PAGE_SIZE)
RESET_ENTRY = "architectural reset"
MAX_RUNS = 8  # runs of processors that are listed


class VpEntry(Record):
    """Where a virtual processor starts.

    Attributes:
        vp_index: The processor.
        entry: Mode and address, for people.
    """

    vp_index: int
    entry: str


def vcpus_text(indices: Sequence[int]) -> str:
    """Virtual processors for people: vCPU 0, or vCPUs 0, 2 to 5; at most MAX_RUNS, then how many.

    Args:
        indices: At least one, in any order.
    """
    ordered = sorted(set(indices))
    runs: list[list[int]] = []
    for index in ordered:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    texts = [
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run))
        for run in runs[:MAX_RUNS]
    ]
    if more := sum(map(len, runs[MAX_RUNS:])):
        texts.append(f"{more} more")
    return f"vCPU{'s' * (len(ordered) > 1)} {', '.join(texts)}"


def entries_text(contexts: Iterable[VpEntry]) -> Iterator[str]:
    """A line for each start, with the processors that start there one after the other."""
    for entry, group in groupby(contexts, attrgetter("entry")):
        yield f"{vcpus_text([context.vp_index for context in group])}: {entry}"


class Summary(Record):
    """One platform of an image; all sizes in bytes of guest memory.

    Attributes:
        platform: The platform.
        mask: Its compatibility mask.
        policy: The guest policy that the file states.
        measured: What is in the launch digest.
        zero: Of `measured`, the pages without data.
        unmeasured: What is loaded, and is not in the digest.
        special: Pages that the processor fills, such as secrets and CPUID.
        parameters: What the launcher fills in, in areas that are inserted on the platform.
        required_memory: Where the memory that the file requires ends; 0: it requires none.
        contexts: The virtual processors that the file sets.
        id_block: Whether it has an ID block.
    """

    platform: Platform
    mask: int
    policy: int | None
    measured: int
    zero: int
    unmeasured: int
    special: tuple[str, ...]
    parameters: tuple[str, ...]
    required_memory: int
    contexts: tuple[VpEntry, ...]
    id_block: bool


def summarize(image: IgvmFile) -> tuple[Summary, ...]:
    """Sum up what an image does on each of its platforms, in file order."""
    kinds = _count_pages(image)
    return tuple(_summary(image, platform, kinds) for platform in image.supported)


def _summary(image: IgvmFile, platform: Platform, kinds: "_PageCounts") -> Summary:
    mask = image.mask_of(platform)
    sizes, special = _page_sizes(kinds, mask)
    policy: int | None = None
    contexts: dict[int, VpContext] = {}
    parameters: list[str] = []
    sizes_of_areas: dict[int, int] = {}
    inside: dict[int, list[str]] = {}  # by area: its parameters, which carry no mask
    id_block = False
    for header in image.others:
        if not mask & mask_in(header):
            continue
        match header:
            case ParameterArea():
                sizes_of_areas[header.parameter_area_index] = header.number_of_bytes
            case Parameter():
                inside.setdefault(header.parameter_area_index, []).append(type_name(header.type))
            case ParameterInsert():
                sizes["unmeasured"] += sizes_of_areas.get(header.parameter_area_index, 0)
                parameters += inside.pop(header.parameter_area_index, ())
            case GuestPolicy():
                policy = header.policy
            case RequiredMemory():
                sizes["required"] = max(sizes["required"], header.gpa + header.number_of_bytes)
            case SnpIdBlock():
                id_block = True
            case VpContext():
                contexts[header.vp_index] = header
            case _:
                pass
    return Summary(
        platform=platform,
        mask=mask,
        policy=policy,
        measured=sizes["measured"],
        zero=sizes["zero"],
        unmeasured=sizes["unmeasured"],
        special=tuple(f"{count} {name}" for name, count in special.items()),
        parameters=tuple(parameters),
        required_memory=sizes["required"],
        contexts=tuple(
            VpEntry(vp_index=index, entry=entry_point(image, contexts[index]))
            for index in sorted(contexts)
        ),
        id_block=id_block,
    )


_ATTRIBUTES = PageData.getter("compatibility_mask", "flags", "data_type")


class _PageCounts(NamedTuple):
    """How many pages there are, and how many of them without data, by mask, flags and data type.

    Thousands of pages have a handful of these in common, which are judged instead of the pages.
    """

    all: Counter[tuple[int, int, int]]
    zero: Counter[tuple[int, int, int]]


def _count_pages(image: IgvmFile) -> _PageCounts:
    zero = (page for page in image.pages if not page.file_offset)
    return _PageCounts(Counter(map(_ATTRIBUTES, image.pages)), Counter(map(_ATTRIBUTES, zero)))


def _page_sizes(counts: _PageCounts, mask: int) -> tuple[Counter[str], Counter[str]]:
    """Bytes of a platform's pages by what becomes of them, and how many are of special types."""
    sizes: Counter[str] = Counter()
    special: Counter[str] = Counter()
    for attributes, count in counts.all.items():
        own, flags, data_type = attributes
        if not own & mask:
            continue
        page = PageData(0, own, 0, flags, data_type)
        size = count * page.guest_size
        if data_type != PageDataType.NORMAL:
            special[f"{page.type_name.lower()} page"] += count
        elif page.unmeasured or page.shared:
            sizes["unmeasured"] += size
        else:
            sizes["measured"] += size
            sizes["zero"] += counts.zero[attributes] * page.guest_size
    return sizes, special


def context_registers(image: IgvmFile, header: VpContext) -> dict[str, object]:
    """The registers of a VP context by name; segments as objects of their parts.

    Raises:
        IgvmError: The context's data cannot be read.
    """
    kind = image.type_of(header.compatibility_mask)
    if kind in _WITH_VMSA:
        registers = Vmsa.parse(image.data_of(header)).registers()
        return {
            name: value._asdict() if isinstance(value, tuple) else value
            for name, value in registers.items()
        }
    if kind in (PlatformType.NATIVE, PlatformType.SEV):
        return {k: v for k, v in parse_native(image.data_of(header)).items() if v}
    if kind == PlatformType.CCA:
        return dict(parse_cca(image.data_of(header)))
    if kind == PlatformType.VSM_ISOLATION:
        context = parse_vbs(image.content[header.file_offset :], image.architecture)
        return {register.name: register.value for register in context.registers}
    return {}


class _Start(NamedTuple):
    """The first instruction of a processor, and its mode; the address in bytes."""

    address: int
    text: str


def entry_point(image: IgvmFile, header: VpContext) -> str:
    """Where a VP context lets its processor start, and in which mode."""
    try:
        start = _start(image, header)
    except IgvmError as error:  # of a file that was read leniently
        return f"unreadable: {error.message}"
    return RESET_ENTRY if start is None else start.text


def find_entry_address(image: IgvmFile, header: VpContext) -> int | None:
    """The address, in bytes, of the first instruction by a VP context; None where it says none.

    It is the guest physical address as long as the context's page tables map it to itself.
    """
    try:
        start = _start(image, header)
    except IgvmError:
        return None
    return None if start is None else start.address


def _start(image: IgvmFile, header: VpContext) -> _Start | None:
    """Where a VP context lets its processor start; None: it sets no register.

    Raises:
        IgvmError: The context's data cannot be read.
    """
    registers = _start_registers(image, header)
    if not registers:
        return None
    if "pc" in registers or "Pc" in registers:
        pc = _number(registers, "pc", "Pc")
        return _Start(pc, f"PC 0x{pc:x}")
    rip, base = _number(registers, "rip", "Rip"), _code_base(registers)
    if _number(registers, "efer", "Efer") & _EFER_LMA:
        return _Start(rip, f"64-bit mode, RIP 0x{rip:x}")  # which has no use for the base
    address = (base + rip) & _MAX_U32
    if _number(registers, "cr0", "Cr0") & _CR0_PE:
        of_base = f"CS base 0x{base:x}, " if base else ""
        return _Start(address, f"32-bit protected mode, {of_base}EIP 0x{rip:x}")
    return _Start(address, f"real mode, CS base 0x{base:x}, IP 0x{rip:x}")


def _start_registers(image: IgvmFile, header: VpContext) -> dict[str, object]:
    """The registers that say where a processor starts, and maybe others; empty where none is set.

    A file may have 65536 contexts: of a VMSA's hundred registers only these are read.
    """
    if image.type_of(header.compatibility_mask) not in _WITH_VMSA:
        return context_registers(image, header)
    vmsa = Vmsa.parse(image.data_of(header))
    if vmsa.content == _NO_REGISTERS:
        return {}
    registers: dict[str, object] = {name: vmsa.register(name) for name in ("rip", "efer", "cr0")}
    return {**registers, "cs": vmsa.segment("cs")._asdict()}


def _number(registers: dict[str, object], *names: str) -> int:
    value = next((registers[name] for name in names if name in registers), 0)
    return value if isinstance(value, int) else 0


def _code_base(registers: dict[str, object]) -> int:
    segment = registers.get("cs")
    if isinstance(segment, dict):
        return int(segment["base"])
    # of a VSM context the segment's 16 bytes, which begin with the base
    return _number(registers, "code_base", "Cs") & _MAX_U64


def data_size(image: IgvmFile, header: AnyHeader) -> int:
    """Bytes of file data that a header takes."""
    if isinstance(header, RawHeader):
        return 0
    if isinstance(header, VpContext):
        if image.type_of(header.compatibility_mask) == PlatformType.VSM_ISOLATION:
            return parse_vbs(image.content[header.file_offset :], image.architecture).size
        return PAGE_SIZE
    extent = header.extent()
    return extent.size if extent is not None else 0
