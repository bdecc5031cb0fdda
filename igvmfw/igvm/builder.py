"""Building IGVM files: headers and their data, put together by the format's rules."""

from igvmfw.errors import IgvmError
from igvmfw.igvm.headers import (
    CorimDocument,
    CorimSignature,
    PageData,
    ParameterArea,
    VpContext,
)
from igvmfw.igvm.image import (
    MAX_FILE,
    FixedHeader,
    IgvmFile,
    assemble,
    fixed_size,
    serialize,
)
from igvmfw.igvm.reader import Buffer
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import PAGE_SIZE, Architecture, section_of


class ImageBuilder:
    """Puts an IGVM file together: headers in any order of sections, data stored once.

    Equal data shares one place in the file; pages of zeroes take none, as the format allows.
    """

    def __init__(self, *, revision: int = 2, architecture: Architecture = Architecture.X64) -> None:
        """Start an empty file.

        Args:
            revision: 1, or 2 (which SEV and SEV-ES platforms and native VP contexts need).
            architecture: Of the guest; revision 1 knows X64 only.
        """
        self._fixed = FixedHeader(
            revision=revision, architecture=architecture, page_size=PAGE_SIZE,
            variable_header_offset=0, variable_header_size=0, total_file_size=0, checksum=0,
        )  # fmt: skip
        self._headers: list[tuple[AnyHeader, bytes]] = []

    def add(self, header: AnyHeader) -> None:
        """Add a header without file data."""
        self._headers.append((header, b""))

    def add_page(
        self, gpa: int, mask: int, data: Buffer = b"", *, flags: int = 0, data_type: int = 0
    ) -> None:
        """Add one page of guest memory; data shorter than the page is filled up with zeroes."""
        content = bytes(data).ljust(PAGE_SIZE, b"\0")
        header = PageData(gpa, mask, 0, flags, data_type)
        self._headers.append((header, content if any(content) else b""))

    def add_vp_context(self, mask: int, vp_index: int, data: Buffer, *, gpa: int = 0) -> None:
        """Add the initial state of a virtual processor, up to one page."""
        header = VpContext(gpa, mask, 0, vp_index)
        self._headers.append((header, bytes(data).ljust(PAGE_SIZE, b"\0")))

    def add_parameter_area(self, index: int, size: int, data: Buffer = b"") -> None:
        """Add a parameter area of `size` bytes with initial contents."""
        content = bytes(data).ljust(size, b"\0") if any(data) else b""
        self._headers.append((ParameterArea(size, index), content))

    def build(self) -> bytes:
        """The file's bytes.

        Raises:
            IgvmError: What was added breaks a rule of the format.
        """
        self._headers.sort(key=lambda item: section_of(item[0].type) or 0)
        sizes = (8 + len(header.write()) + 7 & ~7 for header, _ in self._headers)
        start = fixed_size(self._fixed.revision) + sum(sizes)
        data = bytearray()
        places: dict[bytes, int] = {}
        headers: list[AnyHeader] = []
        for header, content in self._headers:
            if content:
                if content not in places:
                    places[content] = start + len(data)
                    data += content
                if places[content] > MAX_FILE:
                    raise IgvmError("the file would exceed 4 GiB, which the format cannot say")
                header = _placed(header, places[content])
            headers.append(header)
        result = assemble(self._fixed, b"", serialize(tuple(headers)), data)
        IgvmFile.parse(result)  # one set of rules for reading and for writing
        return result


def _placed(header: AnyHeader, offset: int) -> AnyHeader:
    assert isinstance(header, PageData | ParameterArea | VpContext | CorimDocument | CorimSignature)
    return header.replace(file_offset=offset)
