"""Options that several commands have."""

import argparse
import os
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from igvmfw import rooted
from igvmfw.errors import InputError, UsageError

_Word = TypeVar("_Word", bound=StrEnum)

CONNECT = ("-c", "--connect")
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
    parser.add_argument("--root", type=_root, default=rooted.HOST, metavar="DIR", help=said)


def connect_option(parser: argparse.ArgumentParser, text: str) -> None:
    """Declare --connect, which may stand before the command as well."""
    parser.add_argument(*CONNECT, metavar="URI", default=argparse.SUPPRESS, help=text)
    parser.set_defaults(asks_libvirt=True)


def named_argument(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """Declare what a command is about; as with virsh, its name may stand before it as an option."""
    parser.add_argument(name, metavar=name.upper(), help=text)
    option = f"--{name}"

    def change(words: list[str]) -> list[str]:
        return [word.removeprefix(f"{option}=") for word in words if word != option]

    _change_words(parser, change)


def optional_value(parser: argparse.ArgumentParser, option: str, value: str) -> None:
    """Let an option take a value after '=' only, as getopt_long has it.

    argparse would take the next word as the value, `-` for standard input included.

    Args:
        parser: A command's.
        option: The option.
        value: What it has by itself.
    """

    def change(words: list[str]) -> list[str]:
        return [f"{option}={value}" if word == option else word for word in words]

    _change_words(parser, change)
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        words = list(args)
        parsed, rest = parse(words, namespace)
        if rest and option in words:
            raise UsageError(
                f"one argument too many: {' '.join(rest)}",
                hint=f"a file for {option} is joined to it by '=': {option}=PATH",
            )
        return parsed, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _change_words(
    parser: argparse.ArgumentParser, change: Callable[[list[str]], list[str]]
) -> None:
    """Change a command's words, up to `--`, before they are parsed."""
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        words = list(args)
        end = words.index("--") if "--" in words else len(words)
        return parse(change(words[:end]) + words[end:], namespace)

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _root(text: str) -> Path:
    if not os.path.isdir(text):
        raise InputError("is no directory", where=text, hint="--root needs one")
    return Path(os.path.abspath(text))
