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
        parameters: What the launcher fills in.
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
    areas: dict[int, int] = {}
    id_block = False
    for header in image.others:
        if not mask & mask_in(header):
            continue
        match header:
            case ParameterArea():
                areas[header.parameter_area_index] = header.number_of_bytes
            case ParameterInsert():
                sizes["unmeasured"] += areas.get(header.parameter_area_index, 0)
            case Parameter():
                parameters.append(type_name(header.type))
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
    if kind in (PlatformType.SEV_ES, PlatformType.SEV_SNP):
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


def entry_point(image: IgvmFile, header: VpContext) -> str:
    """Where a VP context lets its processor start, and in which mode."""
    try:
        registers = context_registers(image, header)
    except IgvmError as error:  # of a file that was read leniently
        return f"unreadable: {error.message}"
    if not registers:
        return RESET_ENTRY
    if "pc" in registers or "Pc" in registers:
        return f"PC 0x{_number(registers, 'pc', 'Pc'):x}"
    rip = _number(registers, "rip", "Rip")
    if _number(registers, "efer", "Efer") & _EFER_LMA:
        return f"64-bit mode, RIP 0x{rip:x}"
    if _number(registers, "cr0", "Cr0") & _CR0_PE:
        return f"32-bit protected mode, EIP 0x{rip:x}"
    return f"real mode, CS base 0x{_code_base(registers):x}, IP 0x{rip:x}"


def find_entry_address(image: IgvmFile, header: VpContext) -> int | None:
    """The address, in bytes, of the first instruction by a VP context; None where it says none.

    It is the guest physical address as long as the context's page tables map it to itself.
    """
    try:
        registers = context_registers(image, header)
    except IgvmError:
        return None
    if not registers:
        return None
    if "pc" in registers or "Pc" in registers:
        return _number(registers, "pc", "Pc")
    rip = _number(registers, "rip", "Rip")
    protected = _number(registers, "cr0", "Cr0") & _CR0_PE
    return rip if protected else _code_base(registers) + rip


def _number(registers: dict[str, object], *names: str) -> int:
    value = next((registers[name] for name in names if name in registers), 0)
    return value if isinstance(value, int) else 0


def _code_base(registers: dict[str, object]) -> int:
    segment = registers.get("cs")
    return segment["base"] if isinstance(segment, dict) else _number(registers, "code_base")


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
