"""Commands on domains: rewrite and restore, and virsh's, which know requests for IGVM firmware."""

import argparse
import contextlib
import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from igvmfw import files
from igvmfw.cli import Command
from igvmfw.cli.editor import asks_again, editing
from igvmfw.cli.options import connect_option, named_argument, optional_value, root_option
from igvmfw.cli.output import emit, emit_bytes, emit_json, note, warn
from igvmfw.errors import IgvmfwError, RefusedError
from igvmfw.launch import (
    check_start,
    create,
    define,
    fetch,
    recorded,
    start,
    started,
    undefine,
)
from igvmfw.manager import prepare
from igvmfw.rewrite import Rewritten, as_request, convert, restore
from igvmfw.state import recorded as state_of
from igvmfw.virt.document import MAX_BYTES
from igvmfw.virt.domain import Domain
from igvmfw.virt.host import Connection, connect
from igvmfw.virt.record import File, OnChange

_TAKE_FROM_CATALOGUE = "\0"  # nothing that can be typed
_DOMAIN = "its name, UUID, or ID where it runs"


def _igvm_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--igvm",
        metavar="[=PATH]",
        type=_igvm_path,
        help="turn a bios or efi domain into an IGVM one first; --igvm alone has the file chosen, "
        "--igvm=PATH names it",
    )
    optional_value(parser, "--igvm", _TAKE_FROM_CATALOGUE)


def _igvm_path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError(
            "no path after '=': name a file, or give --igvm alone to have one chosen"
        )
    return text


def _choice_arguments(parser: argparse.ArgumentParser) -> None:
    root_option(
        parser,
        "choose among the firmware descriptors and files below DIR; a file that the domain names "
        "is this host's",
    )
    parser.add_argument(
        "--lock-memory",
        action=argparse.BooleanOptionalAction,
        help="add <memoryBacking><locked/> to SEV and SEV-ES guests, or do not (default: as "
        "recorded in the domain, else add it)",
    )
    parser.add_argument(
        "--on-change",
        choices=[choice.value for choice in OnChange],
        help="what a start does when the IGVM file is no longer the one chosen now (default: as "
        "recorded in the domain, else refuse)",
    )


def _connect_arguments(parser: argparse.ArgumentParser) -> None:
    connect_option(
        parser,
        "libvirt's URI, as virsh takes it; also qemu:///embed?root=DIR, which needs no daemon",
    )


def _rewrite_arguments(parser: argparse.ArgumentParser) -> None:
    _restore_arguments(parser)
    _igvm_argument(parser)
    _choice_arguments(parser)
    connect_option(parser, "ask this libvirt what its host offers")


def _rewrite(args: argparse.Namespace) -> int:
    before = _read_domain(args.domain)
    if args.connect is None:
        rewritten = _prepare(before, args, None, args.domain)
    else:
        with connect(args.connect) as connection:
            rewritten = _prepare(before, args, connection, args.domain)
    _report(rewritten)
    _print_domain(before, rewritten.domain, args)
    return 0


def _restore_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "domain", nargs="?", default=files.STDIN, metavar="DOMAIN", help="an XML file (default: -)"
    )
    parser.add_argument("--diff", action="store_true", help="print the difference instead")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="write to a file")


def _restore(args: argparse.Namespace) -> int:
    before = _read_domain(args.domain)
    with _within(args.domain):
        after = restore(before)
    if after is before:
        note("not rewritten by igvmfw: unchanged")
    _print_domain(before, after, args)
    return 0


def _define_arguments(parser: argparse.ArgumentParser) -> None:
    _connect_arguments(parser)
    named_argument(parser, "file", "the domain's XML; - is standard input")
    _igvm_argument(parser)
    _choice_arguments(parser)
    parser.add_argument(
        "--validate", action="store_true", help="let libvirt check the XML against its schema"
    )
    parser.add_argument(
        "--print-xml", action="store_true", help="print the XML libvirt would get, and stop there"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")


def _define(args: argparse.Namespace) -> int:
    domain = _read_domain(args.file)
    with connect(args.connect) as connection:
        rewritten = _prepare(domain, args, connection, args.file)
        if args.print_xml:
            return _print_xml(rewritten)
        _report(rewritten)
        name = _define_checked(connection, rewritten, validate=args.validate)
    _done(args, rewritten.domain, name, "defined", recorded(rewritten.domain))
    return 0


def _define_checked(connection: Connection, rewritten: Rewritten, *, validate: bool) -> str:
    """Define, and say what would stop a start: it may be put right until then."""
    name = define(connection, rewritten.domain, validate=validate)
    try:
        check_start(connection, rewritten.domain)
    except IgvmfwError as error:
        warn(f"the domain will not start: {error}")
    return name


def _create_arguments(parser: argparse.ArgumentParser) -> None:
    _define_arguments(parser)
    parser.add_argument("--paused", action="store_true", help="leave the processors stopped")


def _create(args: argparse.Namespace) -> int:
    domain = _read_domain(args.file)
    with connect(args.connect) as connection:
        rewritten = _prepare(domain, args, connection, args.file)
        if args.print_xml:
            return _print_xml(rewritten)
        _report(rewritten)
        name = create(connection, rewritten.domain, paused=args.paused, validate=args.validate)
    _done(args, rewritten.domain, name, "created", recorded(rewritten.domain))
    return 0


def _start_arguments(parser: argparse.ArgumentParser) -> None:
    _connect_arguments(parser)
    named_argument(parser, "domain", "its name or UUID")
    parser.add_argument("--paused", action="store_true", help="leave the processors stopped")
    parser.add_argument(
        "--bypass-cache", action="store_true", help="avoid the host's cache when loading"
    )
    parser.add_argument("--force-boot", action="store_true", help="drop a saved state")
    parser.add_argument("--json", action="store_true", help="one JSON document")


def _start(args: argparse.Namespace) -> int:
    with connect(args.connect) as connection:
        domain = start(
            connection,
            args.domain,
            paused=args.paused,
            bypass_cache=args.bypass_cache,
            force_boot=args.force_boot,
            warn=warn,
        )
        # the digest takes a while, and is shown in JSON alone
        file = started(connection, domain) if args.json else recorded(domain)
    _done(args, domain, domain.name or args.domain, "started", file)
    return 0


def _edit_arguments(parser: argparse.ArgumentParser) -> None:
    _connect_arguments(parser)
    named_argument(parser, "domain", _DOMAIN)
    _choice_arguments(parser)
    parser.set_defaults(igvm=None)
    parser.add_argument(
        "--skip-validate", action="store_true", help="do not check the XML against the schema"
    )


def _edit(args: argparse.Namespace) -> int:
    what = f"domain '{args.domain}'"
    with connect(args.connect) as connection:
        stored = fetch(connection, args.domain, inactive=True, security_info=True)
        with _within(what):
            shown = as_request(stored).write()
        with editing(shown, what) as text:
            while True:
                edited = text.edited(limit=MAX_BYTES)
                if edited == shown and args.on_change is None and args.lock_memory is None:
                    note(f"Domain '{args.domain}' was not changed")
                    return 0
                try:
                    name = _redefine(connection, args, stored, edited)
                except IgvmfwError as error:
                    if not asks_again(error):
                        raise
                else:
                    emit(f"Domain '{name}' edited")
                    return 0


def _redefine(
    connection: Connection, args: argparse.Namespace, stored: Domain, edited: bytes
) -> str:
    what = f"domain '{args.domain}'"
    now = fetch(connection, args.domain, inactive=True, security_info=True)
    if now.write() != stored.write():
        raise RefusedError(
            "somebody else changed the domain meanwhile", where=what, hint="edit it again"
        )
    with _within(what):
        domain = Domain.parse(edited)
    rewritten = _prepare(domain, args, connection, what)
    _report(rewritten)
    return _define_checked(connection, rewritten, validate=not args.skip_validate)


def _dumpxml_arguments(parser: argparse.ArgumentParser) -> None:
    _connect_arguments(parser)
    named_argument(parser, "domain", _DOMAIN)
    parser.add_argument("--inactive", action="store_true", help="what the next start will use")
    parser.add_argument("--security-info", action="store_true", help="with passwords")
    parser.add_argument("--update-cpu", action="store_true", help="with the host's CPU features")
    parser.add_argument("--migratable", action="store_true", help="as sent to another host")


def _dumpxml(args: argparse.Namespace) -> int:
    with connect(args.connect) as connection:
        domain = fetch(
            connection,
            args.domain,
            inactive=args.inactive,
            security_info=args.security_info,
            update_cpu=args.update_cpu,
            migratable=args.migratable,
        )
    with _within(f"domain '{args.domain}'"):
        emit_bytes(as_request(domain).write())
    state = state_of(domain)
    if state is not None and state.path is not None:
        note(f"the firmware's vTPM keeps its state in {state.path}")
    return 0


def _undefine_arguments(parser: argparse.ArgumentParser) -> None:
    _connect_arguments(parser)
    named_argument(parser, "domain", _DOMAIN)
    nvram = parser.add_mutually_exclusive_group()
    nvram.add_argument(
        "--nvram",
        action="store_true",
        default=None,
        help="remove the file of UEFI variables, and the state of the firmware's vTPM",
    )
    nvram.add_argument("--keep-nvram", dest="nvram", action="store_false", help="keep them")
    tpm = parser.add_mutually_exclusive_group()
    tpm.add_argument(
        "--tpm",
        action="store_true",
        default=None,
        help="remove the state of the TPM that <tpm> has libvirt emulate",
    )
    tpm.add_argument("--keep-tpm", dest="tpm", action="store_false", help="keep it")
    parser.add_argument("--managed-save", action="store_true", help="remove a saved state")
    parser.add_argument(
        "--snapshots-metadata", action="store_true", help="remove what is known of snapshots"
    )
    parser.add_argument(
        "--checkpoints-metadata", action="store_true", help="remove what is known of checkpoints"
    )


def _undefine(args: argparse.Namespace) -> int:
    with connect(args.connect) as connection:
        name = undefine(
            connection,
            args.domain,
            nvram=args.nvram,
            tpm=args.tpm,
            managed_save=args.managed_save,
            snapshots_metadata=args.snapshots_metadata,
            checkpoints_metadata=args.checkpoints_metadata,
        )
    emit(f"Domain '{name}' has been undefined")
    return 0


def _read_domain(name: str) -> Domain:
    data = files.read_text(name, limit=MAX_BYTES)
    with _within(name):
        return Domain.parse(data)


@contextlib.contextmanager
def _within(name: str) -> Iterator[None]:
    """Put the XML's name before the place within it."""
    try:
        yield
    except IgvmfwError as error:
        if error.where is None or error.where.startswith(("line ", "byte ", "<")):
            error.within("standard input" if name == files.STDIN else name)
        raise


def _prepare(
    domain: Domain, args: argparse.Namespace, connection: Connection | None, name: str
) -> Rewritten:
    """Choose and rewrite, with what the host of a connection offers."""
    with _within(name):
        if args.igvm is not None:
            path = None if args.igvm == _TAKE_FROM_CATALOGUE else os.path.abspath(args.igvm)
            domain = convert(domain, path)
        return prepare(
            domain,
            connection,
            root=args.root,
            lock_memory=args.lock_memory,
            on_change=None if args.on_change is None else OnChange(args.on_change),
        )


def _report(rewritten: Rewritten) -> None:
    for warning in rewritten.warnings:
        warn(warning)
    for change in rewritten.changes:
        note(change)
    if recorded(rewritten.domain) is None and not rewritten.changes:
        note("no IGVM firmware asked for: unchanged")


def _print_domain(before: Domain, after: Domain, args: argparse.Namespace) -> None:
    if args.diff:
        lines = difflib.unified_diff(
            before.document.text().splitlines(),
            after.document.text().splitlines(),
            "standard input" if args.domain == files.STDIN else args.domain,
            "restored" if args.command == "restore" else "rewritten",
            lineterm="",
        )
        text = "".join(f"{line}\n" for line in lines).encode()
    else:
        text = after.write()
    if args.output is not None:
        files.write_output(args.output, text)
    else:
        # as it is, not through emit: this is for a file or libvirt, and must not change
        emit_bytes(text)


def _print_xml(rewritten: Rewritten) -> int:
    _report(rewritten)
    emit_bytes(rewritten.domain.write())
    return 0


def _done(
    args: argparse.Namespace, domain: Domain, name: str, verb: str, file: File | None
) -> None:
    if args.json:
        igvm = file and {
            "path": file.path,
            "sha256": file.sha256,
            "platform": file.platform.value,
            "descriptor": file.descriptor,
            "measurement": file.measurement,
        }
        state = state_of(domain)
        emit_json(
            {"domain": name, "igvm": igvm, "vtpm_state": None if state is None else state.path}
        )
    else:
        emit(f"Domain '{name}' {verb}")
        if file is not None:
            note(f"firmware: {file.path} ({file.platform})")


COMMANDS = {
    "rewrite": Command(_rewrite_arguments, _rewrite),
    "restore": Command(_restore_arguments, _restore),
    "define": Command(_define_arguments, _define),
    "create": Command(_create_arguments, _create),
    "start": Command(_start_arguments, _start),
    "edit": Command(_edit_arguments, _edit),
    "dumpxml": Command(_dumpxml_arguments, _dumpxml),
    "undefine": Command(_undefine_arguments, _undefine),
}
