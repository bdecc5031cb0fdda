"""What is where in a platform's memory, by name: OVMF's parts, and an SVSM's kernel.

Names only help to read a map.  They are looked for where an honest build has them, in time that
grows with the file alone; what is damaged has no name.

Source: ovmf.py, uefi.py and payload.py, which name theirs.
"""

from collections.abc import Iterator

from igvmfw.errors import IgvmError
from igvmfw.igvm.headers import PageData, VpContext
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.ovmf import OvmfTables, SectionKind
from igvmfw.igvm.payload import (
    FOUR_GIB,
    Payload,
    find_svsm_marks,
    firmware_image,
    identify,
)
from igvmfw.igvm.regions import Landmark, Region, find_regions
from igvmfw.igvm.spec import PAGE_SIZE
from igvmfw.igvm.summary import find_entry_address
from igvmfw.igvm.uefi import find_volumes
from igvmfw.platforms import Platform

MIB = 1 << 20
MIRRORED = 128 << 10  # bytes that QEMU, and `wrap`, show below 1 MiB too
_SECTIONS = {
    SectionKind.SNP_SEC_MEM: "OVMF SEC memory",
    SectionKind.SNP_SECRETS: "OVMF secrets",
    SectionKind.SNP_CPUID: "OVMF CPUID",
    SectionKind.SVSM_CAA: "OVMF SVSM calling area",
    SectionKind.SNP_KERNEL_HASHES: "OVMF kernel hashes",
    SectionKind.IGVM_PARAM_AREA: "OVMF parameter area",
    SectionKind.IGVM_HOB_AREA: "OVMF HOB list",
}


def named_regions(image: IgvmFile, platform: Platform, known: Payload) -> tuple[Region, ...]:
    """The memory of a platform with names, as far as the data of a damaged file can be read.

    Args:
        image: The file.
        platform: Whose memory.
        known: What was found in the memory of one of the file's platforms, not looked for again.
    Raises:
        IgvmError: The image does not have the platform, or its data cannot be read though no
            rule was broken.
    """
    landmarks: tuple[Landmark, ...] = ()
    try:
        payload = known if known.platform is platform else identify(image, platform)
        landmarks = _landmarks(image, platform, payload)
    except IgvmError:
        if not image.problems:
            raise
    return find_regions(image, platform, landmarks)


def _landmarks(image: IgvmFile, platform: Platform, payload: Payload) -> tuple[Landmark, ...]:
    found: list[Landmark] = []
    if payload.tables is not None:
        if payload.svsm is None:  # else the SVSM lays out what OVMF's tables ask for, later
            found += _of_tables(payload.tables)
        found += _of_firmware(image, platform)
    if payload.svsm is not None:
        found += (
            Landmark(gpa, gpa + PAGE_SIZE, f"{payload.svsm} kernel", whole=True)
            for gpa in find_svsm_marks(image, platform)
        )
    found += _entry(image, platform)
    return tuple(found)


def _entry(image: IgvmFile, platform: Platform) -> Iterator[Landmark]:
    mask = image.mask_of(platform)
    for header in image.headers:
        if (
            type(header) is VpContext
            and header.compatibility_mask & mask
            and header.vp_index == 0
            and (address := find_entry_address(image, header)) is not None
        ):
            yield Landmark(address, address + 1, "start of vCPU 0", whole=True)
            return


def _of_tables(tables: OvmfTables) -> Iterator[Landmark]:
    for section in tables.sections:
        name = _SECTIONS.get(section.kind)  # type: ignore[call-overload]
        if name is not None:
            yield Landmark(section.base, section.base + section.size, name)


def _of_firmware(image: IgvmFile, platform: Platform) -> Iterator[Landmark]:
    firmware = firmware_image(image, platform)
    start = FOUR_GIB - len(firmware)
    for volume in find_volumes(firmware):
        begin, end = start + volume.offset, start + volume.offset + volume.size
        if volume.variables:
            yield Landmark(begin, end, "OVMF variable store")
        elif end == FOUR_GIB:
            yield Landmark(begin, end, "OVMF SEC volume")
        else:
            yield Landmark(begin, end, "OVMF main volume")
    yield Landmark(FOUR_GIB - PAGE_SIZE, FOUR_GIB, "OVMF reset vector")
    if _mirrors(image, platform, firmware[-MIRRORED:]):
        yield Landmark(MIB - MIRRORED, MIB, "OVMF's end, mirrored")


def _mirrors(image: IgvmFile, platform: Platform, end: bytes) -> bool:
    """Whether the firmware's last bytes lie right below 1 MiB as well."""
    mask = image.mask_of(platform)
    expected = range(MIB - MIRRORED, MIB, PAGE_SIZE)
    low: dict[int, PageData] = {
        header.gpa: header
        for header in image.headers
        if type(header) is PageData and header.gpa in expected and header.compatibility_mask & mask
    }
    try:
        content = b"".join(
            bytes(image.data_of(low[gpa])) if low[gpa].file_offset else bytes(PAGE_SIZE)
            for gpa in expected
        )
    except (KeyError, IgvmError):
        return False
    return content == end
