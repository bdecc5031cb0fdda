"""The GUIDed tables at the end of an OVMF binary: where the firmware wants what.

Source: edk2, OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm (the table and its walk),
X64/OvmfSevMetadata.asm (SEV sections), X64/IgvmMetadata.asm (IGVM parameters).
"""

from collections.abc import Iterator
from enum import IntEnum

from igvmfw.errors import FirmwareError, IgvmError
from igvmfw.igvm.reader import U32, Buffer, Layout, guid
from igvmfw.records import Record

FOOTER_END = 32  # bytes from the table's end to the image's end
FOOTER_GUID = guid("96b582de-1fb2-45f7-baea-a366c55a082d")
SEV_ES_RESET_GUID = guid("00f771de-1a7e-4fcb-890e-68c77e2fb44e")
SEV_METADATA_GUID = guid("dc886566-984a-4798-a75e-5585a7bf67cc")
TDX_METADATA_GUID = guid("e47a6535-984a-4798-865e-4685a7bf8ec2")
IGVM_METADATA_GUID = guid("784fa70e-3176-4677-8a20-04b68699e374")

_ENTRY = Layout("H16s")
_LIST = Layout("4sIII")
_SECTION = Layout("III")
MAX_SECTIONS = 256
MAX_SECTIONS_SIZE = 64 << 20  # bytes, of all in a list; real ones are below 1 MiB


class SectionKind(IntEnum):
    """What a section of the metadata lists is for."""

    SNP_SEC_MEM = 0x1
    SNP_SECRETS = 0x2
    SNP_CPUID = 0x3
    SVSM_CAA = 0x4
    SNP_KERNEL_HASHES = 0x10
    IGVM_PARAM_AREA = 0x100
    IGVM_PARAM_MEMORY_MAP = 0x101
    IGVM_PARAM_VP_COUNT = 0x102
    IGVM_HOB_AREA = 0x200


class Section(Record):
    """A range the firmware names.

    `base` is a guest physical address, or for IGVM_PARAM_MEMORY_MAP and IGVM_PARAM_VP_COUNT an
    offset within the parameter area; `size` is in bytes.  `kind` is a SectionKind where it is
    known.
    """

    kind: int
    base: int
    size: int


class OvmfTables(Record):
    """What the tables of an OVMF binary say."""

    guids: tuple[bytes, ...]
    reset_address: int | None  # where SEV-ES application processors start
    sections: tuple[Section, ...]

    def find(self, kind: SectionKind) -> Section | None:
        """The first section of a kind, or None."""
        return next((section for section in self.sections if section.kind == kind), None)


def find_tables(firmware: Buffer) -> OvmfTables | None:
    """The tables of a raw firmware image, or None where it has none (it is not an OVMF).

    Args:
        firmware: The image; its last byte is the one below 4 GiB.
    Raises:
        FirmwareError: The tables are damaged.
    """
    try:
        return _find_tables(memoryview(firmware))
    except IgvmError as error:
        raise FirmwareError(f"damaged OVMF table: {error.message}", where=error.where) from None


def _find_tables(firmware: memoryview) -> OvmfTables | None:
    position = len(firmware) - FOOTER_END - _ENTRY.size
    if position < 0:
        return None
    length, key = _ENTRY.read(firmware, position)
    if key != FOOTER_GUID:
        return None
    start = position + _ENTRY.size - length
    if length < _ENTRY.size or start < 0:
        raise FirmwareError(f"the OVMF table's length {length} is wrong", where=f"0x{position:x}")
    entries = dict(_entries(firmware, start, position))
    reset = entries.get(SEV_ES_RESET_GUID)
    sections: list[Section] = []
    for key, magic in ((SEV_METADATA_GUID, b"ASEV"), (IGVM_METADATA_GUID, b"IGVM")):
        if key in entries:
            sections += _sections(firmware, entries[key], magic)
    return OvmfTables(
        guids=tuple(entries),
        reset_address=None if reset is None else U32.read(reset, 0, "SEV-ES reset block")[0],
        sections=tuple(sections),
    )


def _entries(firmware: memoryview, start: int, end: int) -> Iterator[tuple[bytes, memoryview]]:
    """The table's entries from its end backwards, as the firmware walks it."""
    while end > start:
        position = end - _ENTRY.size
        length, key = _ENTRY.read(firmware, position, "table entry")
        begin = end - length
        if length < _ENTRY.size or begin < start:
            raise FirmwareError(
                f"an entry of the OVMF table has length {length}", where=f"offset 0x{position:x}"
            )
        yield key, firmware[begin:position]
        end = begin


def _sections(firmware: memoryview, entry: memoryview, magic: bytes) -> Iterator[Section]:
    (from_end,) = U32.read(entry, 0, f"{magic.decode()} metadata entry")
    start = len(firmware) - from_end
    found, _, version, count = _LIST.read(firmware, start, f"{magic.decode()} metadata")
    if found != magic or version != 1 or count > MAX_SECTIONS:
        raise FirmwareError(
            f"{magic.decode()} metadata is damaged: {found!r}, version {version}, {count} sections",
            where=f"offset 0x{start:x}",
        )
    left = MAX_SECTIONS_SIZE
    for index in range(count):
        place = start + _LIST.size + index * _SECTION.size
        base, size, kind = _SECTION.read(firmware, place, "metadata section")
        left -= size
        if left < 0 or base + size > 1 << 32:
            raise FirmwareError(
                f"section {index} of the {magic.decode()} metadata (0x{base:x} + 0x{size:x}) is "
                "more than firmware needs, or ends above 4 GiB",
                where=f"offset 0x{place:x}",
            )
        if size:
            yield Section(kind=kind, base=base, size=size)
