"""The digests of platforms that QEMU launches from no IGVM file: TDX's MRTD, VBS' boot digest.

Both follow the file's own order.  Sources: Intel TDX module base specification, TDH.MEM.PAGE.ADD
and TDH.MR.EXTEND (MRTD); the crate igvm 0.5.0, src/measurement (which directives count, and VBS'
structures, VBS_VM_BOOT_MEASUREMENT_CHUNK, which are described nowhere else).
"""

import hashlib
from collections.abc import Iterator
from itertools import count

from igvmfw.errors import RefusedError
from igvmfw.igvm.guestpages import ZERO_PAGE, GuestPages, PageSource
from igvmfw.igvm.headers import ErrorRange, PageData, ParameterInsert, VpContext
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.reader import Buffer, Layout
from igvmfw.igvm.spec import PAGE_SIZE, Architecture, PageDataType
from igvmfw.igvm.vpcontext import VbsRegister, parse_vbs
from igvmfw.platforms import Platform

_CHUNK = 256  # bytes that one TDH.MR.EXTEND measures
_PAGE_ADD = Layout("16sQ104x")
_MR_EXTEND = Layout("16sQ104x256s" * (PAGE_SIZE // _CHUNK))
_ADD, _EXTEND = b"MEM.PAGE.ADD", b"MR.EXTEND"


def mrtd(image: IgvmFile) -> bytes:
    """The MRTD of a TDX guest, 48 bytes.

    Every page is added, those with measured contents are also extended, in 16 chunks.  The state
    of the virtual processors is fixed by the TDX module.

    Raises:
        IgvmError: The file lacks the platform, or names too much memory.
    """
    digest = hashlib.sha384()
    source = PageSource(image)
    for header in image.for_platform(Platform.TDX):
        if isinstance(header, PageData) and not header.shared:
            pages, measured = source.region([header]), not header.unmeasured
        elif isinstance(header, ParameterInsert):
            pages, measured = source.inserted(header), False
        else:
            continue
        for gpa, offset in zip(count(pages.gpa, PAGE_SIZE), pages.offsets, strict=False):
            digest.update(_PAGE_ADD.write(_ADD, gpa))
            if measured:
                digest.update(_extension(gpa, _page(image, offset)))
    return digest.digest()


def _page(image: IgvmFile, offset: int) -> Buffer:
    return image.content[offset : offset + PAGE_SIZE] if offset else ZERO_PAGE


def _extension(gpa: int, page: Buffer) -> bytes:
    contents = bytes(page)
    values: list[int | bytes] = []
    for start in range(0, PAGE_SIZE, _CHUNK):
        values += (_EXTEND, gpa + start, contents[start : start + _CHUNK])
    return _MR_EXTEND.write(*values)


# both begin with byte count, type and a reserved word
_GPA_PAGE = Layout("IIQ QQ".replace(" ", ""))  # metadata, page number; the page follows
_VP_REGISTER = Layout("IIQ IBBHII16s".replace(" ", ""))
_TYPE_REGISTER, _TYPE_PAGE = 0, 2
_READABLE, _WRITABLE, _UNMEASURED = 1 << 0, 1 << 1, 1 << 2  # bits of the metadata


def vbs_boot_digest(image: IgvmFile) -> bytes:
    """The boot digest of a guest that VBS (VSM) isolates, 32 bytes.

    A chain of SHA-256 over the pages in the file's order, then over the registers of VP 0.

    Raises:
        IgvmError: The file lacks the platform, or names too much memory.
        RefusedError: It has a page of a type that VBS does not know.
    """
    digest = bytes(hashlib.sha256().digest_size)
    for pages, metadata in _vbs_pages(image):
        for number, offset in zip(count(pages.gpa // PAGE_SIZE), pages.offsets, strict=False):
            head = _GPA_PAGE.write(_GPA_PAGE.size + PAGE_SIZE, _TYPE_PAGE, 0, metadata, number)
            contents = ZERO_PAGE if metadata & _UNMEASURED else _page(image, offset)
            digest = hashlib.sha256(b"".join((digest, head, contents))).digest()
    for header in image.for_platform(Platform.VSM):
        if isinstance(header, VpContext):
            context = parse_vbs(image.content[header.file_offset :], image.architecture)
            for register in context.registers:
                record = _register(register, context.vtl, image.architecture)
                digest = hashlib.sha256(digest + record).digest()
    return digest


def _vbs_pages(image: IgvmFile) -> Iterator[tuple[GuestPages, int]]:
    """The pages that are measured, with their metadata."""
    source = PageSource(image)
    for header in image.for_platform(Platform.VSM):
        if isinstance(header, PageData):
            if header.data_type != PageDataType.NORMAL:
                raise RefusedError(
                    f"the file has a page at 0x{header.gpa:x} of type "
                    f"{PageDataType(header.data_type).name}, which VBS does not know",
                    hint="use another image",
                )
            if not header.shared:
                yield source.region([header]), _UNMEASURED if header.unmeasured else 0
        elif isinstance(header, ParameterInsert):
            yield source.inserted(header), _UNMEASURED
        elif isinstance(header, ErrorRange):
            yield source.error_range(header), _READABLE | _WRITABLE | _UNMEASURED


_TABLES = ("Gdtr", "Idtr")
_SEGMENTS = ("Es", "Cs", "Ss", "Ds", "Fs", "Gs", "Tr")
_LOW = (1 << 64) - 1


def _register(register: VbsRegister, vtl: int, architecture: Architecture) -> bytes:
    """The record of a register, its value without the bits that its kind does not have."""
    value = register.value
    if architecture is Architecture.X64 and register.name in _TABLES:
        value = value >> 48 << 48  # limit and base stand behind 6 bytes of padding
    elif architecture is not Architecture.X64 or register.name not in _SEGMENTS:
        value &= _LOW
    return _VP_REGISTER.write(
        _VP_REGISTER.size, _TYPE_REGISTER, 0, 0, vtl, 0, 0, 0, register.number,
        value.to_bytes(16, "little"),
    )  # fmt: skip
