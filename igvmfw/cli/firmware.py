"""Commands on firmware descriptors: describe, validate, install, uninstall, refresh."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igvmfw import files
from igvmfw.cli import Command
from igvmfw.cli.options import one_of, root_option
from igvmfw.cli.output import emit, emit_json, is_quiet, note, one_line, warn
from igvmfw.cli.progress import progress
from igvmfw.describe import Description, Stated
from igvmfw.description import describe_file
from igvmfw.errors import DescriptorError, IgvmfwError, InputError, UsageError
from igvmfw.install import (
    DEFAULT_PRIORITY,
    VENDOR_PRIORITY,
    Action,
    Into,
    Kind,
    Level,
    Place,
    all_locked,
    carry_out,
    choose_place,
    file_name,
    find_installed,
    locked,
    overriding,
    plan_install,
    plan_uninstall,
)
from igvmfw.qemu import jsontext
from igvmfw.qemu.catalog import SUFFIX
from igvmfw.qemu.descriptor import Descriptor
from igvmfw.qemu.schema import QEMU_VERSIONS, Profile, Violation, check_schema

_DONE = {
    Kind.WRITE: "written",
    Kind.REMOVE: "removed",
    Kind.UNCHANGED: "unchanged",
    Kind.KEEP: "kept",
}


def _profile_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        type=one_of(Profile),
        choices=tuple(Profile),
        default=Profile.IGVMFW,
        metavar="PROFILE",
        help="upstream: what QEMU's firmware.json has; igvmfw (default): with vtpm as well",
    )


def _priority(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number within 0 to 99")
    return int(text)


def _describe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="an IGVM file")
    _profile_option(parser)
    for option, text in {
        "--interface": "what the firmware gives the guest: uefi, bios, … (default: from the file)",
        "--feature": "a feature that the file cannot tell, such as acpi-s3",
        "--machine": "machine types, such as 'pc-q35-10.*' (default: all that take IGVM files)",
    }.items():
        parser.add_argument(
            option, action="append", default=[], metavar="WORD", help=f"{text}; may be repeated"
        )
    parser.add_argument("--description", metavar="TEXT", help="the text for people")
    parser.add_argument(
        "--priority",
        type=_priority,
        metavar="NN",
        help=f"the file name's prefix, lower is chosen first (default {DEFAULT_PRIORITY}, with "
        f"--vendor {VENDOR_PRIORITY})",
    )
    root_option(parser)
    parser.add_argument(
        "--explain", action="store_true", help="say why each item is in the descriptor"
    )


def _stated(args: argparse.Namespace) -> Stated:
    return Stated(
        interface_types=tuple(args.interface),
        features=tuple(args.feature),
        machines=tuple(args.machine),
        description=args.description,
    )


def _explain(described: Description) -> None:
    width = max(len(reason.item) for reason in described.reasons)
    for reason in described.reasons:
        note(f"{reason.item:{width}}  {reason.text}")


def _describe_arguments(parser: argparse.ArgumentParser) -> None:
    _describe_options(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="write to a file, or to files named after the priority in a directory",
    )


def _describe(args: argparse.Namespace) -> int:
    into_directory = args.output is not None and args.output.is_dir()
    if len(args.files) > 1 and not into_directory:
        raise UsageError(
            "several files need a directory to write to", hint="name one with -o DIRECTORY"
        )
    described: dict[str, Description] = {}
    with progress("describing", "files") as shown:
        for path in shown.over(args.files, len(args.files)):
            described[path] = describe_file(
                path, root=args.root, profile=args.profile, stated=_stated(args)
            )
    outputs: dict[Path, bytes] = {}
    for path, found in described.items():
        if args.explain:
            _explain(found)
        if args.output is None:
            emit(found.descriptor.write().decode().rstrip("\n"))
            continue
        output = args.output
        if into_directory:
            output /= file_name(Path(path).stem, _or_default(args.priority, DEFAULT_PRIORITY))
        if output in outputs:
            raise UsageError(f"two of the files would both become {output}")
        outputs[output] = found.descriptor.write()
    for output, data in outputs.items():
        files.write_output(output, data)
        note(f"written {output}")
    return 0


def _or_default(priority: int | None, default: int) -> int:
    return default if priority is None else priority


def _validate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="DESCRIPTOR", help="a descriptor; - is standard input"
    )
    _profile_option(parser)
    parser.add_argument(
        "--qemu",
        choices=QEMU_VERSIONS,
        metavar="VERSION",
        help=f"which firmware.json: {', '.join(QEMU_VERSIONS)}; implies --profile upstream",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")


def _validate(args: argparse.Namespace) -> int:
    profile = Profile.UPSTREAM if args.qemu else args.profile
    qemu = args.qemu or QEMU_VERSIONS[-1]
    code = 0
    documents = []
    for name in args.files:
        try:
            violations = _judge(name, profile, qemu)
        except InputError as error:
            if len(args.files) == 1 and not args.json:
                raise
            warn(str(error))
            code = max(code, error.exit_code)
            documents.append({"file": name, "valid": False, "error": str(error), "violations": []})
            continue
        documents.append(_verdict(name, violations))
        code = max(code, 1 if violations else 0)
        if not args.json:
            for violation in violations:
                emit(one_line(f"{name}: {violation}"))
            if not violations:
                emit(one_line(f"{name}: valid"))
    if args.json:
        emit_json({"profile": profile.value, "qemu": qemu, "descriptors": documents})
    return code


def _judge(name: str, profile: Profile, qemu: str) -> tuple[Violation, ...]:
    data = files.read_text(name, limit=jsontext.MAX_SIZE)
    try:
        document = jsontext.parse(data)
    except DescriptorError as error:
        raise error.within(name) from None
    if violations := check_schema(document, profile, qemu):
        return violations
    try:
        Descriptor.from_dict(document)
    except DescriptorError as error:  # what no schema says, such as a name that no file can have
        return (Violation(where=error.where or "", message=error.message),)
    return ()


def _verdict(name: str, violations: Sequence[Violation]) -> dict[str, Any]:
    found = [{"where": v.where, "message": v.message} for v in violations]
    return {"file": name, "valid": not violations, "error": None, "violations": found}


def _place_options(parser: argparse.ArgumentParser) -> None:
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--user",
        dest="level",
        action="store_const",
        const=Level.USER,
        default=Level.SYSTEM,
        help="in the user's own directory instead of /etc",
    )
    level.add_argument(
        "--vendor",
        dest="level",
        action="store_const",
        const=Level.VENDOR,
        help="in /usr/share, as a package does",
    )
    _into_option(parser)
    _run_options(parser)


def _into_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--into",
        type=one_of(Into),
        choices=tuple(Into),
        default=Into.AUTO,
        metavar="WHOSE",
        help="qemu's directory, igvmfw's, or auto (default): qemu's, unless the libvirt there "
        "would stumble over an IGVM descriptor",
    )


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do not")
    parser.add_argument("--json", action="store_true", help="one JSON document")


def _install_arguments(parser: argparse.ArgumentParser) -> None:
    _describe_options(parser)
    parser.add_argument(
        "--name", metavar="NAME", help="the descriptor's name without priority (default: FILE's)"
    )
    _place_options(parser)


def _install(args: argparse.Namespace) -> int:
    if args.name is not None and len(args.files) > 1:
        raise UsageError("--name is for one FILE")
    priority = VENDOR_PRIORITY if args.level is Level.VENDOR else DEFAULT_PRIORITY
    priority = _or_default(args.priority, priority)
    place = choose_place(args.level, root=args.root, into=args.into)
    described: dict[str, Description] = {}
    with progress("describing", "files") as shown:
        for path in shown.over(args.files, len(args.files)):
            stem = (args.name or Path(path).stem).removesuffix(SUFFIX)
            name = file_name(stem, priority)
            if name in described:
                raise UsageError(f"two of the files would both become {name}")
            described[name] = describe_file(
                path,
                root=args.root,
                profile=args.profile,
                stated=_stated(args),
                note_time=_notes_times(),
            )
    if args.explain:
        for found in described.values():
            _explain(found)

    def plan() -> list[Action]:
        return [plan_install(place, name, d.descriptor) for name, d in described.items()]

    actions = plan()  # what is refused is refused before anything is made
    if not args.dry_run:
        with locked(place, create=True):
            actions = plan()
            carry_out(place, actions)
    if place.note is not None:
        note(place.note)
    for name in described:
        for path in overriding(place, name):
            warn(f"{path} is more specific, so {name} takes no effect for who reads that directory")
    return _report(actions, args)


def _uninstall_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="+",
        metavar="NAME|FILE",
        help="a descriptor's name, or the path of it or of its IGVM file",
    )
    root_option(parser)
    _place_options(parser)


def _uninstall(args: argparse.Namespace) -> int:
    intos = (Into.QEMU, Into.IGVMFW) if args.into is Into.AUTO else (args.into,)
    places = [choose_place(args.level, root=args.root, into=into) for into in intos]
    with all_locked(() if args.dry_run else places):
        actions: dict[Path, Action] = {}  # by the file without links: both places may have it
        for word in args.words:
            for place, path in _meant(places, word):
                actions.setdefault(place.real_directory / path.name, plan_uninstall(place, path))
        if not args.dry_run:
            carry_out(places[0], actions.values())
    code = _report(list(actions.values()), args)
    return 1 if any(a.kind is Kind.KEEP for a in actions.values()) else code


def _meant(places: Sequence[Place], word: str) -> list[tuple[Place, Path]]:
    found = []
    failed: InputError | None = None
    for place in places:
        try:
            found += [(place, path) for path in find_installed(place, word)]
        except InputError as error:
            failed = failed or error
    if not found and failed is not None:
        raise failed
    return found


def _refresh_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directories",
        nargs="*",
        metavar="DIR",
        help="where to look for *.igvm (default: where packages put them below /usr/share)",
    )
    _profile_option(parser)
    parser.add_argument(
        "--all", action="store_true", help="read every file, also one that looks unchanged"
    )
    parser.add_argument(
        "--remove",
        action="store_true",
        help="remove all that refresh wrote and nobody edited, as before igvmfw itself is removed",
    )
    root_option(parser)
    _into_option(parser)
    _run_options(parser)


def _refresh(args: argparse.Namespace) -> int:
    from igvmfw.refresh import refresh, remove_all, vendor_directories

    if args.remove and (args.directories or args.all):
        raise UsageError("--remove goes with neither --all nor directories")
    for name in args.directories:
        if not os.path.isdir(name):
            raise InputError("is no directory", where=name, hint="check the path")
    directories = [Path(name) for name in args.directories] or vendor_directories(args.root)
    place = choose_place(Level.VENDOR, root=args.root, into=args.into)
    if args.remove:
        return _report(remove_all(place, dry_run=args.dry_run).actions, args)
    with progress("looking at", "IGVM files") as shown:
        done = refresh(
            place,
            directories,
            profile=args.profile,
            everything=args.all,
            note_time=_notes_times(),
            dry_run=args.dry_run,
            progress=shown,
        )
    for problem in done.problems:
        warn(str(problem))
    if place.note is not None and any(a.kind is Kind.WRITE for a in done.actions):
        note(place.note)
    changes = [action for action in done.actions if action.kind is not Kind.UNCHANGED]
    _report(changes if is_quiet() and not args.json else done.actions, args, done.problems)
    # a file that needs a word from a person, or is for no QEMU, is no failure of this run
    return max((p.exit_code for p in done.problems if isinstance(p, InputError)), default=0)


def _notes_times() -> bool:
    """Not while an image is built that shall come out the same each time."""
    return not os.environ.get("SOURCE_DATE_EPOCH")


def _report(
    actions: Sequence[Action], args: argparse.Namespace, problems: Sequence[IgvmfwError] = ()
) -> int:
    if args.json:
        document = {
            "dry_run": args.dry_run,
            "actions": [
                {"action": a.kind.value, "path": str(a.path), "reason": a.reason} for a in actions
            ],
            "problems": [str(problem) for problem in problems],
        }
        emit_json(document)
        return 0
    for action in actions:
        done = f"would be {_DONE[action.kind]}" if args.dry_run else _DONE[action.kind]
        emit(one_line(f"{done:9}  {action.path}  ({action.reason})"))
    return 0


COMMANDS = {
    "describe": Command(_describe_arguments, _describe),
    "validate": Command(_validate_arguments, _validate),
    "install": Command(_install_arguments, _install),
    "uninstall": Command(_uninstall_arguments, _uninstall),
    "refresh": Command(_refresh_arguments, _refresh),
}
