"""Bounds-checked reading of little-endian structures: the only caller of `struct`."""

from collections.abc import Iterator
from struct import Struct, error
from typing import Any

from igvmfw.errors import IgvmError

Buffer = bytes | bytearray | memoryview


class Layout:
    """A packed little-endian structure: `struct` codes without padding.

    Reading outside the data raises IgvmError that names the offset, never struct.error.
    """

    __slots__ = ("_struct", "codes", "pack", "size", "unpack_from")

    def __init__(self, codes: str) -> None:
        self.codes = codes
        self._struct = Struct("<" + codes)
        self.size = self._struct.size
        # for loops over thousands of headers or pages whose bounds the caller has checked
        self.unpack_from = self._struct.unpack_from
        self.pack = self._struct.pack

    def read(self, data: Buffer, offset: int = 0, what: str = "structure") -> tuple[Any, ...]:
        """Unpack the structure at a byte offset.

        Raises:
            IgvmError: The structure does not lie within the data.
        """
        try:
            if offset < 0:
                raise error
            return self._struct.unpack_from(data, offset)
        except error:
            raise IgvmError(
                f"{what} needs {self.size} bytes, {max(0, len(data) - offset)} are left",
                where=f"offset 0x{offset:x}",
            ) from None

    def iter_unpack(self, data: memoryview, start: int, end: int) -> Iterator[tuple[Any, ...]]:
        """Unpack the structure over and over, from `start` on, as often as it fits before `end`."""
        count = max(0, min(end, len(data)) - start) // self.size
        return self._struct.iter_unpack(data[start : start + count * self.size])

    def write(self, *values: int | bytes) -> bytes:
        """Pack values.

        Raises:
            IgvmError: A value does not fit its field.
        """
        try:
            return self._struct.pack(*values)
        except error as problem:
            raise IgvmError(f"value does not fit its field: {problem}") from None


U32 = Layout("I")
U64 = Layout("Q")


def guid(text: str) -> bytes:
    """A GUID as UEFI stores it: the first three parts little-endian.

    The module `uuid` does it, too, but finds out about the host as it is imported, which takes as
    long as reading a small file.

    Source: UEFI 2.10, appendix A.
    """
    *numbers, rest, node = map(bytes.fromhex, text.split("-"))
    return b"".join(number[::-1] for number in numbers) + rest + node
