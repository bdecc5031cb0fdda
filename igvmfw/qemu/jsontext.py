"""Reading JSON that someone else wrote, within bounds, and naming the place of what is wrong.

RFC 8259 leaves duplicate members, numbers beyond the range of a double and lone surrogates to the
reader.  Each of them lets two programs see two different documents in one file, so each is refused.
"""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn, TypeVar

from igvmfw.errors import DescriptorError

MAX_SIZE = 1 << 20  # bytes; libvirt's limit (src/qemu/qemu_firmware.c, DOCUMENT_SIZE)
MAX_DEPTH = 32  # nested arrays and objects; a descriptor needs 4

T = TypeVar("T")


def parse(data: bytes) -> object:
    """Parse one JSON document.

    Args:
        data: UTF-8 text, at most MAX_SIZE bytes.
    Raises:
        DescriptorError: Not UTF-8, not JSON, or beyond a bound; `where` has line and column where
            the text itself is wrong.
    """
    if len(data) > MAX_SIZE:
        raise DescriptorError(f"larger than {MAX_SIZE} bytes, the most libvirt reads too")
    if not data.strip():
        raise DescriptorError("the file is empty", hint="expected a JSON object")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        from igvmfw.kinds import IGVM, JSON, kind_of  # only what goes wrong has to pay for it

        kind = kind_of(data)
        if kind is None or kind is JSON:
            raise DescriptorError(
                "not UTF-8 text", where=f"byte {error.start}", hint="JSON is UTF-8: save it as such"
            ) from None
        raise DescriptorError(
            f"not a descriptor: it is {kind.name}",
            where="byte 0",
            hint="'igvmfw describe' makes its descriptor" if kind is IGVM else kind.remedy,
        ) from None
    try:
        document = json.loads(
            text,
            object_pairs_hook=_unique_members,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        raise DescriptorError(
            f"not JSON: {error.msg}", where=f"line {error.lineno} column {error.colno}"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # Python refuses integers of thousands of digits
        raise DescriptorError("a number has more digits than any reader takes") from None
    _check_bounds(document)
    return document


def _unique_members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise DescriptorError(
            f"member {_shown(twice)} occurs twice in one object",
            hint="readers differ in which one they take: remove one",
        )
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise DescriptorError(f"not JSON: {name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise DescriptorError(f"the number {text[:40]} is out of range")
    return number


def _too_deep() -> DescriptorError:
    return DescriptorError(f"nested deeper than {MAX_DEPTH} levels")


def _check_bounds(document: object) -> None:
    level = [document]
    for _ in range(MAX_DEPTH + 1):
        below: list[object] = []
        nested = False
        for value in level:
            if isinstance(value, dict):
                nested = True
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                nested = True
                below += value
            elif isinstance(value, str):
                _check_text(value)
        if not nested:
            return
        level = below
    raise _too_deep()


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DescriptorError(
            f"the string {_shown(text)} holds half a surrogate pair, which is no character"
        ) from None


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")


@contextlib.contextmanager
def at(step: str) -> Iterator[None]:
    """Prefix the JSON path of an error that passes with one step, such as `targets` or `[0]`.

    So a path like `targets[0].machines` grows while the error unwinds, and no reader carries one.
    """
    try:
        yield
    except DescriptorError as error:
        inner = error.where or ""
        error.where = step + (inner if not inner or inner.startswith("[") else f".{inner}")
        raise


class Members:
    """The members of one JSON object, taken one by one; what is left is unknown to the reader.

    Args:
        value: What should be a JSON object.
    Raises:
        DescriptorError: It is something else.
    """

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise DescriptorError(f"expected an object, found {kind(value)}")
        self._left: dict[str, object] = dict(value)

    def take(self, name: str, read: Callable[[object], T]) -> T:
        """A member that must be there.

        Raises:
            DescriptorError: It is missing, or `read` refuses it.
        """
        if name not in self._left:
            raise DescriptorError(f"member '{name}' is missing")
        with at(name):
            return read(self._left.pop(name))

    def take_optional(self, name: str, read: Callable[[object], T]) -> T | None:
        """A member that may be missing: then None.

        Raises:
            DescriptorError: `read` refuses it.
        """
        return self.take(name, read) if name in self._left else None

    def rest(self) -> Mapping[str, object]:
        """The members nobody took."""
        return self._left


def text(value: object) -> str:
    """A JSON string.

    Raises:
        DescriptorError: It is something else.
    """
    if not isinstance(value, str):
        raise DescriptorError(f"expected a string, found {kind(value)}")
    return value


def file_name(value: object) -> str:
    """A JSON string that can name a file.

    Raises:
        DescriptorError: It is something else, empty, or has a NUL character.
    """
    name = text(value)
    if not name:
        raise DescriptorError("the file name is empty")
    if "\0" in name:
        raise DescriptorError("the file name has a NUL character")
    return name


def array(read: Callable[[object], T]) -> Callable[[object], tuple[T, ...]]:
    """A reader of JSON arrays whose elements `read` reads."""

    def read_array(value: object) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise DescriptorError(f"expected an array, found {kind(value)}")
        elements = []
        for index, element in enumerate(value):
            with at(f"[{index}]"):
                elements.append(read(element))
        return tuple(elements)

    return read_array


def kind(value: object) -> str:
    """What a JSON value is, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "an array"
    return "an object" if isinstance(value, dict) else "a number"
