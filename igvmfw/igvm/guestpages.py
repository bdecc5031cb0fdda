"""Directives → pages of guest memory, by their places in the file.

A file names more guest memory than it has data for: parameter areas, error ranges, and the rest of
2 MiB pages, whose data covers their first 4 KiB.  A header of a few bytes can name gigabytes so,
and each of these pages costs hashing; hence the bound.
"""

from collections.abc import Sequence
from typing import NamedTuple

from igvmfw.errors import IgvmError
from igvmfw.igvm.headers import ErrorRange, PageData, ParameterArea, ParameterInsert
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.spec import PAGE_SIZE, U64_SPACE

ZERO_PAGE = bytes(PAGE_SIZE)
MAX_UNBACKED = 256 << 20  # bytes a launch may name without data; real files stay below 16 MiB


class GuestPages(NamedTuple):
    """Pages of 4 KiB that follow each other: the guest address of the first, in bytes, and of each
    its place in the file, in bytes; 0 is a page of zeroes."""

    gpa: int
    offsets: list[int]


class PageSource:
    """The guest pages of one file's directives, and how many without data it has named so far.

    All methods raise IgvmError where the pages exceed `MAX_UNBACKED`, or the address space.
    """

    def __init__(self, image: IgvmFile) -> None:
        self._left = MAX_UNBACKED
        self._sizes = {
            header.parameter_area_index: header.number_of_bytes
            for header in image.others
            if isinstance(header, ParameterArea)
        }

    def region(self, headers: Sequence[PageData]) -> GuestPages:
        """The pages of headers that follow each other in guest memory, all of one size.

        A page of 2 MiB is 512 of 4 KiB: its data, then zeroes.
        """
        gpa, rest = headers[0].gpa, headers[0].guest_size - PAGE_SIZE
        if not rest:
            return GuestPages(gpa, [header.file_offset for header in headers])
        offsets: list[int] = []
        for header in headers:
            offsets += (header.file_offset, *self._zeroes(header.gpa, rest))
        return GuestPages(gpa, offsets)

    def inserted(self, header: ParameterInsert) -> GuestPages:
        """The pages of a parameter area at its insertion."""
        size = self._sizes[header.parameter_area_index]
        return GuestPages(header.gpa, self._zeroes(header.gpa, size))

    def error_range(self, header: ErrorRange) -> GuestPages:
        """The pages of an error range."""
        return GuestPages(header.gpa, self._zeroes(header.gpa, header.size_bytes))

    def _zeroes(self, gpa: int, size: int) -> list[int]:
        self._left -= size
        if self._left < 0:
            raise IgvmError(
                f"the file names more than {MAX_UNBACKED >> 20} MiB of guest memory without data "
                f"(parameter areas, error ranges, 2 MiB pages), 0x{size:x} bytes of it at "
                f"0x{gpa:x}: igvmfw measures no such file"
            )
        if gpa + size > U64_SPACE:
            raise IgvmError(f"0x{size:x} bytes at 0x{gpa:x} end outside the address space")
        return [0] * (size // PAGE_SIZE)
