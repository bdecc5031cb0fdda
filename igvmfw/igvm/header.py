"""What all variable headers have in common, and those that igvmfw does not know.

Reserved fields are kept, so that writing gives back what was read.  Positional on purpose: a file
holds thousands of headers, each built straight from its unpacked layout.
"""

from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Self

from igvmfw.igvm.reader import Buffer, Layout
from igvmfw.igvm.spec import PAGE_SIZE, HeaderType
from igvmfw.records import Record


class Breach(Record):
    """A rule that a header breaks: the rule's id, and what was found."""

    rule: str
    message: str


class Extent(NamedTuple):
    """The part of the file a header takes its data from, in bytes from the file's start."""

    offset: int
    size: int


class Header(Record):
    """Base of all variable headers."""

    TYPE: ClassVar[HeaderType]
    LAYOUT: ClassVar[Layout]
    type: ClassVar[int]  # as it stands in the file

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.type = getattr(cls, "TYPE", 0)  # 0: of a base of several headers

    @classmethod
    def parse(cls, body: Buffer) -> Self:
        """Read the header from its content (without type, length and padding).

        Raises:
            IgvmError: The content is shorter than the structure.
        """
        return cls.make(cls.LAYOUT.read(body, 0, cls.TYPE.name))

    def write(self) -> bytes:
        """The header's content as it stands in a file.

        Raises:
            IgvmError: A field's value does not fit.
        """
        return self.LAYOUT.write(*self)

    def breaches(self) -> Iterator[Breach]:
        """The rules this header breaks on its own, without regard to the rest of the file."""
        return iter(())

    def extent(self) -> Extent | None:
        """The file data this header takes; None for none, or for a size only the data tells."""
        return None


def aligned(name: str, value: int, to: int = PAGE_SIZE) -> Iterator[Breach]:
    """The breach of an address or a size, in bytes, that is no multiple of another."""
    if value % to:
        yield Breach("alignment", f"{name} 0x{value:x} is not a multiple of 0x{to:x}")


def zero(name: str, value: int) -> Iterator[Breach]:
    """The breach of a field that must be zero and is not."""
    if value:
        yield Breach("reserved", f"{name} is 0x{value:x}, must be zero")


class RawHeader(Record):
    """A header igvmfw does not know, or marked optional: kept as it stands in the file."""

    type: int
    body: bytes

    def write(self) -> bytes:
        """The header's content, unchanged."""
        return self.body
