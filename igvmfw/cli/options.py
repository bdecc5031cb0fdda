"""Options that several commands have."""

import argparse
import os
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from igvmfw import rooted
from igvmfw.errors import InputError

_Word = TypeVar("_Word", bound=StrEnum)

_ROOT = (
    "for the guests of another root directory: files are below it, and descriptors name them as "
    "seen from in there"
)


def one_of(words: Iterable[_Word]) -> Callable[[str], _Word]:
    """An argument that is one of an enum's words; a wrong one is answered with all of them."""
    known = {word.value: word for word in words}

    def parse(text: str) -> _Word:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(known)}")
        return known[text]

    return parse


def root_option(parser: argparse.ArgumentParser, said: str = _ROOT) -> None:
    """Declare --root.

    Args:
        parser: Gets the option.
        said: Its help, where the command means less by it.
    """
    parser.add_argument(
        "--root",
        type=_root,
        default=rooted.HOST,
        metavar="DIR",
        help=said,
    )


def _root(text: str) -> Path:
    if not os.path.isdir(text):
        raise InputError("is no directory", where=text, hint="--root needs one")
    return Path(os.path.abspath(text))
