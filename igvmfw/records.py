"""Immutable records with named fields, cheap to declare and to make.

They are for headers, of which a file has thousands, and for what `inspect` and `list` load, which
so need not load `dataclasses` and, with it, `inspect` and `ast`.  Elsewhere frozen dataclasses do.
"""

from collections import namedtuple
from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar, Self, dataclass_transform

# A frozen dataclass compiles code of its own as it is declared, which for all headers took half of
# a start of `inspect`, and sets its fields one by one, which thousands of pages wait for.  A named
# tuple is as fast, but equals every other tuple of the same values.
_MOST_FIELDS = 16
_names = [f"field{index}" for index in range(_MOST_FIELDS)]
_place: Any = namedtuple("_place", _names)  # type: ignore[misc]
# what reads the Nth value of any tuple, at C's speed
_READERS = tuple(vars(_place)[name] for name in _names)


class _Slotless(type):
    """Keeps records from having a dictionary, in which an attribute could be set."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> "_Slotless":
        return super().__new__(cls, name, bases, {"__slots__": ()} | namespace)


@dataclass_transform(frozen_default=True)
class Record(tuple[Any, ...], metaclass=_Slotless):
    """A tuple whose values have the names, and the order, of its class's annotations.

    Declared and made as a frozen dataclass is; equal to a record of its own class only.
    """

    _names: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}

    make: ClassVar[Callable[[Iterable[Any]], Self]]  # of all values, unchecked: for long loops

    def __init_subclass__(cls) -> None:
        cls.make = partial(tuple.__new__, cls)  # type: ignore[assignment]
        kinds = cls.__annotations__.items()
        own = [name for name, kind in kinds if getattr(kind, "__origin__", None) is not ClassVar]
        cls._names = tuple(dict.fromkeys((*cls._names, *own)))
        cls._defaults = cls._defaults | {n: vars(cls)[n] for n in own if n in vars(cls)}
        if len(cls._names) > len(_READERS):
            raise TypeError(f"{cls.__name__}: a record has at most {_MOST_FIELDS} fields")
        for name, reader in zip(cls._names, _READERS, strict=False):
            setattr(cls, name, reader)

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """A record of values in order, by name, and by default."""
        if named or len(values) != len(cls._names):
            given = dict(zip(cls._names, values, strict=False)) | named
            full = cls._defaults | given
            if len(values) + len(named) != len(given) or full.keys() != set(cls._names):
                raise TypeError(f"{cls.__name__} takes the values {', '.join(cls._names)}")
            values = tuple(full[name] for name in cls._names)
        return tuple.__new__(cls, values)

    @classmethod
    def getter(cls, *names: str) -> "itemgetter[Any]":
        """What takes some of the values, at least two, out of a record, as a tuple."""
        return itemgetter(*map(cls._names.index, names))

    def replace(self, **changes: Any) -> Self:
        """The record with other values for some names."""
        return type(self)(**self.fields() | changes)

    def fields(self) -> dict[str, Any]:
        """The values by name, in order."""
        return dict(zip(self._names, self, strict=True))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and tuple.__eq__(self, other)

    __hash__ = tuple.__hash__

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.fields().items())
        return f"{type(self).__name__}({fields})"
