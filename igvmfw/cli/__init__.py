"""The command line: the only part that prints and exits.

`COMMANDS` names every command with the module that implements it.  A module is imported only when
its command runs, so that no command pays for another's imports.  Each module has, per command, an
entry in its own `COMMANDS` table: a function that adds the arguments and one that runs.
"""

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, NoReturn

from igvmfw import __version__
from igvmfw.cli import output
from igvmfw.cli.options import CONNECT
from igvmfw.errors import IgvmfwError, UsageError

EXIT_INTERNAL = 70  # EX_SOFTWARE of sysexits.h: not one of the contract's answers
_QUIET = "print no notes and no progress, only results, warnings and errors"
_CONNECT = "libvirt's URI, here or after the command, for those that ask libvirt"
_UNSET = argparse.SUPPRESS
_COLLECT_AFTER = 50_000  # objects
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Command(NamedTuple):
    """One command: how its arguments are declared, and what runs it (returning the exit code)."""

    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class _Listed(NamedTuple):
    module: str
    help: str


COMMANDS = {
    "inspect": _Listed("igvmfw.cli.image", "show what is inside IGVM files"),
    "check": _Listed("igvmfw.cli.check", "say whether QEMU would launch an IGVM file"),
    "measure": _Listed("igvmfw.cli.image", "compute the launch digest of an IGVM file"),
    "wrap": _Listed("igvmfw.cli.image", "turn a raw OVMF image into an IGVM file"),
    "describe": _Listed("igvmfw.cli.firmware", "write the firmware descriptor of an IGVM file"),
    "validate": _Listed("igvmfw.cli.firmware", "check firmware descriptors against the schema"),
    "install": _Listed("igvmfw.cli.firmware", "install descriptors of IGVM files"),
    "uninstall": _Listed("igvmfw.cli.firmware", "remove installed descriptors"),
    "refresh": _Listed(
        "igvmfw.cli.firmware", "bring vendor descriptors in line with the IGVM files present"
    ),
    "list": _Listed("igvmfw.cli.listing", "list the available IGVM firmware"),
    "rewrite": _Listed("igvmfw.cli.domain", "turn a domain XML that asks for IGVM into libvirt's"),
    "restore": _Listed("igvmfw.cli.domain", "give a rewritten domain XML its request back"),
    "define": _Listed("igvmfw.cli.domain", "define a domain from XML, as virsh define"),
    "create": _Listed("igvmfw.cli.domain", "start a transient domain from XML, as virsh create"),
    "start": _Listed("igvmfw.cli.domain", "start a defined domain, as virsh start"),
    "edit": _Listed("igvmfw.cli.domain", "edit a defined domain's request, as virsh edit"),
    "dumpxml": _Listed("igvmfw.cli.domain", "print a domain with its request, as virsh dumpxml"),
    "undefine": _Listed("igvmfw.cli.domain", "remove a domain's definition, as virsh undefine"),
    "verify": _Listed("igvmfw.cli.verify", "verify what a running domain was launched from"),
    "doctor": _Listed("igvmfw.cli.doctor", "show what this host has and lacks, with remedies"),
}


class _Parser(argparse.ArgumentParser):
    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.dest == "command" and value not in COMMANDS:
            raise UsageError(f"there is no command {value!r}", hint=_meant(str(value), COMMANDS))
        super()._check_value(action, value)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see '{self.prog} --help'")

    def _print_message(self, message: str, file: object = None) -> None:
        output.emit(message.rstrip("\n"))  # argparse would not mind a full disk


def build_parser(
    loaded: Collection[str] = tuple(COMMANDS), known: Collection[str] = tuple(COMMANDS)
) -> argparse.ArgumentParser:
    """The argument parser.

    Args:
        loaded: The commands that get their arguments.
        known: The commands that there are; each costs a start as much as reading a small file.
    """
    parser = _Parser(
        prog="igvmfw",
        description="IGVM firmware for libvirt guests: inspect, describe, choose, launch.",
        epilog="exit status: 0 fine, 1 the answer is no, 2 usage, 3 bad input, "
        "4 the environment lacks something",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"igvmfw {__version__}")
    parser.add_argument("-q", "--quiet", action="store_true", help=_QUIET)
    parser.add_argument(*CONNECT, metavar="URI", help=_CONNECT)
    # with `prog` argparse need not format the usage to find it out, for which it loads much
    groups = parser.add_subparsers(
        prog=parser.prog, dest="command", metavar="COMMAND", required=True
    )
    for name in known:
        listed = COMMANDS[name]
        sub = groups.add_parser(
            name,
            help=listed.help,
            description=f"{listed.help[0].upper()}{listed.help[1:]}.",
            allow_abbrev=False,
        )
        # before the command or after it, as people remember it; the default is the one above
        sub.add_argument("-q", "--quiet", action="store_true", default=_UNSET, help=_QUIET)
        if name in loaded:
            load(name).arguments(sub)
    return parser


def load(name: str) -> Command:
    """Import the module of a command and return the command."""
    module = importlib.import_module(COMMANDS[name].module)
    command: Command = module.COMMANDS[name]
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the contract and never raises on bad input."""
    # a file's thousands of headers hold no cycles, but the collector would look through them again
    # and again: a tenth of the time of `inspect`
    gc.set_threshold(_COLLECT_AFTER)
    output.prepare_streams()
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if "_ARGCOMPLETE" in os.environ:  # set by the shells' completion scripts
            completed: int = importlib.import_module("igvmfw.cli.completion").complete()
            return completed
        try:
            code = _run(words)
        except SystemExit:  # --help and --version have been printed
            output.flush()
            raise
        output.flush()
        return code
    except IgvmfwError as error:
        output.abandon()
        output.report(error)
        return error.exit_code
    except BrokenPipeError:
        # the reader went away (`igvmfw list | head -1`): nothing is left to say, also not at exit
        output.abandon()
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if os.environ.get("IGVMFW_DEBUG"):
            raise
        return _fail(
            f"internal error: {type(error).__name__}: {error} "
            "(this is a bug in igvmfw; set IGVMFW_DEBUG=1 for the traceback and report it)",
            EXIT_INTERNAL,
        )


def _run(words: Sequence[str]) -> int:
    named = [word for word in words if word in COMMANDS][:1]
    # what stands before a command may be an option's value: then argparse says which it is
    parser = build_parser(named, named if words[:1] == named else COMMANDS)
    args, rest = parser.parse_known_args(words)
    if rest:
        raise UsageError(
            f"unrecognized arguments: {' '.join(rest)}",
            hint=f"see '{parser.prog} {args.command} --help'",
        )
    output.set_quiet(args.quiet)
    if args.connect is not None and "asks_libvirt" not in args:
        raise UsageError(f"{args.command} asks no libvirt", hint="leave --connect out")
    return load(args.command).run(args)


def _meant(word: str, known: Collection[str]) -> str:
    """What somebody who mistyped a word may have meant, else where to look."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else "see 'igvmfw --help'"


def _fail(message: str, code: int) -> int:
    output.abandon()
    output.complain(message)
    return code
