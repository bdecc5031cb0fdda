"""Models → what people and programs read: text, tables, JSON.  Nothing here prints."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from igvmfw.errors import IgvmError
from igvmfw.igvm.headers import Header, PageData, RawHeader, VpContext
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.ovmf import TDX_METADATA_GUID, OvmfTables, SectionKind
from igvmfw.igvm.payload import Payload
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import (
    PageDataFlags,
    PageDataType,
    PlatformType,
    Section,
    section_of,
    type_name,
)
from igvmfw.igvm.summary import (
    RESET_ENTRY,
    Summary,
    context_registers,
    data_size,
    entries_text,
    summarize,
)
from igvmfw.platforms import Platform

_Masks = tuple[tuple[Platform, int], ...]  # a file's platforms with their compatibility masks
_UNITS = [
    (f"{prefix}iB", 1 << 10 * power)
    for power, prefix in zip(range(6, 0, -1), "EPTGMK", strict=True)
]
_ENUMS = {"platform_type": PlatformType, "data_type": PageDataType}


def size_text(size: int) -> str:
    """A size in bytes as people write it."""
    for unit, factor in _UNITS:
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size} bytes"


def header_dict(image: IgvmFile, header: AnyHeader) -> dict[str, Any]:
    """A variable header for JSON: `type` is the IGVM_VHT name, fields are igvm_defs'."""
    if isinstance(header, RawHeader):
        return {"type": type_name(header.type), "body": header.body.hex()}
    fields: dict[str, Any] = {"type": type_name(header.type)}
    for name, value in header.fields().items():
        fields[name] = _value(name, value)
    try:
        size = data_size(image, header)
        if size:
            fields["data_size"] = size
        if isinstance(header, VpContext):
            fields["registers"] = context_registers(image, header)
    except IgvmError as error:
        fields["error"] = str(error)
    return fields


def _value(name: str, value: int | bytes) -> int | str:
    if isinstance(value, bytes):
        return value.decode(errors="replace") if name == "text" else value.hex()
    known = _ENUMS.get(name)
    if known is not None and value in known._value2member_map_:
        return known(value).name
    return value


def inspection(
    image: IgvmFile, name: str, payload: Payload, *, pages: bool = False
) -> dict[str, Any]:
    """The document of `inspect --json` for one file (schemas/inspect.json)."""
    document: dict[str, Any] = {
        "file": name,
        "size": len(image.content),
        "revision": image.revision,
        "architecture": image.architecture.name,
        "page_size": image.page_size,
        "platforms": [header_dict(image, header) for header in image.platforms],
        "initialization": [header_dict(image, header) for header in image.initializations],
        "directives": dict(_directive_counts(image)),
        "summaries": [_summary_dict(image, summary, payload) for summary in summarize(image)],
        "payload": {**payload_dict(payload), "ovmf": _ovmf_dict(payload.tables)},
        "problems": [problem._asdict() for problem in image.problems],
    }
    if pages:
        document["pages"] = [header_dict(image, header) for header in image.directives]
    return document


def _directive_counts(image: IgvmFile) -> Counter[str]:
    """How many directives there are of each type, by name."""
    counts: Counter[int] = Counter()
    if image.pages:  # thousands, known already
        counts[PageData.TYPE] = len(image.pages)
    counts.update(h.type for h in image.others if section_of(h.type) is Section.DIRECTIVE)
    return Counter({type_name(kind): count for kind, count in counts.items()})


def payload_dict(payload: Payload) -> dict[str, Any]:
    """What a file carries, for JSON."""
    return {
        "firmware": payload.firmware,
        "svsm": payload.svsm,
        "svsm_version": payload.svsm_version,
        "vtpm": payload.vtpm,
        "uefi_variables": payload.uefi_variables,
        "persistence": payload.persistence,
    }


def _ovmf_dict(tables: OvmfTables | None) -> dict[str, Any] | None:
    """What an OVMF was built for, by its GUIDed tables."""
    if tables is None:
        return None
    return {
        "sev_es_reset_address": tables.reset_address,
        "sev_snp": tables.find(SectionKind.SNP_SECRETS) is not None,
        "svsm_calling_area": tables.find(SectionKind.SVSM_CAA) is not None,
        "kernel_hashes": tables.find(SectionKind.SNP_KERNEL_HASHES) is not None,
        "tdx": TDX_METADATA_GUID in tables.guids,
        "igvm_parameters": tables.find(SectionKind.IGVM_PARAM_AREA) is not None,
    }


def _summary_dict(image: IgvmFile, summary: Summary, payload: Payload) -> dict[str, Any]:
    from igvmfw.igvm.landmarks import named_regions  # not for the text

    return {
        "platform": summary.platform.value,
        "compatibility_mask": summary.mask,
        "policy": summary.policy,
        "measured_bytes": summary.measured,
        "zero_bytes": summary.zero,
        "unmeasured_bytes": summary.unmeasured,
        "special": list(summary.special),
        "parameters": list(summary.parameters),
        "required_memory_end": summary.required_memory,
        "vp_contexts": [
            {"vp_index": context.vp_index, "entry": context.entry} for context in summary.contexts
        ],
        "id_block": summary.id_block,
        "regions": [
            {"gpa": region.start, "size": region.size, "kind": region.kind, "name": region.name}
            for region in named_regions(image, summary.platform, payload)
        ],
    }


def payload_text(payload: Payload) -> str:
    """What a file carries, in one line."""
    parts = []
    if payload.svsm:
        parts.append(f"{payload.svsm} {payload.svsm_version or '(version unknown)'}")
        if payload.vtpm:
            parts.append("vTPM")
        if payload.uefi_variables:
            parts.append("UEFI variable service")
        if payload.persistence:
            parts.append("persistent storage")
    if payload.firmware:
        parts.append(f"{payload.firmware} (UEFI)")
    return ", ".join(parts) or "unknown"


def inspection_text(image: IgvmFile, name: str, payload: Payload) -> str:
    """What `inspect` tells a person about one file."""
    lines = [
        f"{name}: IGVM revision {image.revision}, {image.architecture.name}, "
        f"{size_text(len(image.content))}",
        f"  payload        {payload_text(payload)}",
    ]
    for summary in summarize(image):
        lines += _summary_lines(summary)
    counts = _directive_counts(image).most_common()
    listed = ", ".join(f"{count} {kind}" for kind, count in counts)
    lines.append(f"  directives     {listed or 'none'}")
    for problem in image.problems:
        where = "" if problem.header_index is None else f"header {problem.header_index}, "
        lines.append(
            f"  problem        {where}offset 0x{problem.file_offset:x}: {problem.message} "
            f"[{problem.rule}]"
        )
    return "\n".join(lines)


def _summary_lines(summary: Summary) -> Iterator[str]:
    platform = summary.platform
    policy = "" if summary.policy is None else f", policy 0x{summary.policy:x}"
    block = ", signed ID block" if summary.id_block else ""
    yield f"  platform       {platform} (mask 0x{summary.mask:x}{policy}{block})"
    zero = f" ({size_text(summary.zero)} of it zero)" if summary.zero else ""
    verb = "loaded" if platform is Platform.NATIVE else "measured"
    memory = [f"{size_text(summary.measured)} {verb}{zero}"]
    if summary.unmeasured:
        memory.append(f"{size_text(summary.unmeasured)} unmeasured")
    yield f"    memory       {', '.join([*memory, *summary.special])}"
    if summary.required_memory:
        yield f"    needs        guest memory up to 0x{summary.required_memory:x}"
    if summary.parameters:
        yield f"    parameters   {', '.join(summary.parameters)}"
    if not summary.contexts:
        yield f"    entry        {RESET_ENTRY}"
    for line in entries_text(summary.contexts):
        yield f"    entry        {line}"


def page_runs(image: IgvmFile) -> Iterator[str]:
    """The directives in file order as text, pages that continue each other on one line."""
    first: PageData | None = None
    previous: PageData | None = None
    count = 0
    masks: _Masks = tuple((word, image.mask_of(word)) for word in image.supported)

    def run() -> str:
        assert first is not None
        return _run_line(masks, first, count)

    for header in image.directives:
        if isinstance(header, PageData):
            if previous is not None and previous.is_continued_by(header):
                count += 1
            else:
                if first is not None:
                    yield run()
                first, count = header, 1
            previous = header
            continue
        if first is not None:
            yield run()
            first = previous = None
        yield _directive_line(masks, header)
    if first is not None:
        yield run()


def _names_of(masks: _Masks, mask: int) -> str:
    names = [platform for platform, own in masks if own & mask]
    return ",".join(names) or f"mask 0x{mask:x} of no platform"


def _run_line(masks: _Masks, page: PageData, count: int) -> str:
    end = page.gpa + count * page.guest_size
    flags = PageDataFlags(page.flags & 7)
    words = [flag.name.lower() for flag in PageDataFlags if flag in flags and flag.name]
    if page.file_offset == 0 and page.data_type == PageDataType.NORMAL:
        words.append("zero")
    tail = f" ({', '.join(words)})" if words else ""
    names = _names_of(masks, page.compatibility_mask)
    pages = f"{count} page{'s' * (count > 1)}"
    return f"    PAGE_DATA  0x{page.gpa:x}-0x{end - 1:x}  {pages}  {page.type_name}{tail}  {names}"


def _directive_line(masks: _Masks, header: AnyHeader) -> str:
    if not isinstance(header, Header):
        return f"    {type_name(header.type)}  {len(header.body)} bytes"
    fields = [
        f"{name} 0x{value:x}"
        for name, value in header.fields().items()
        if isinstance(value, int) and name not in ("compatibility_mask", "reserved", "file_offset")
    ]
    mask = getattr(header, "compatibility_mask", None)
    if mask is not None:
        fields.append(_names_of(masks, mask))
    return f"    {type_name(header.type)}  {'  '.join(fields)}"
