"""The command `list`: which IGVM firmware there is, in order of choice."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from igvmfw import files
from igvmfw.cli import Command
from igvmfw.cli.options import one_of, root_option
from igvmfw.cli.output import emit, emit_folded, emit_json, one_line, warn, width
from igvmfw.cli.progress import progress
from igvmfw.errors import DomainError, IgvmfwError, NegativeError, UsageError
from igvmfw.install import FIRST_TOLERANT_LIBVIRT, find_libvirt
from igvmfw.inventory import FileState, Row, take
from igvmfw.platforms import Platform
from igvmfw.qemu.catalog import QEMU_DIRECTORY, Catalog, State, load, search_path
from igvmfw.qemu.descriptor import VtpmStorage
from igvmfw.report import payload_dict, payload_text, size_text

if TYPE_CHECKING:  # lxml is for --for alone
    from igvmfw.select import Candidate
    from igvmfw.verdict import Verdict
    from igvmfw.virt.domain import Domain, Request

_HEADINGS = ("NAME", "PLATFORMS", "FEATURES", "PAYLOAD", "FILE", "STATE")
_LISTS = ("platforms", "features")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--platform",
        type=one_of(Platform),
        metavar="P",
        help="only for this platform: native, sev, sev-es, sev-snp or tdx",
    )
    parser.add_argument(
        "--feature",
        action="append",
        default=[],
        metavar="F",
        help="only with this feature; may be repeated",
    )
    parser.add_argument(
        "--for",
        dest="domain",
        metavar="DOMAIN.xml",
        help="which one this domain would get, and why not each other one; - is standard input; a "
        "file that the domain names is this host's, also with --root",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also shadowed, masked and broken ones, and those of other firmware",
    )
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument(
        "--user",
        action="store_true",
        default=os.geteuid() != 0,
        help="with the user's own, as libvirt's session daemon (default unless root)",
    )
    whose.add_argument(
        "--system",
        dest="user",
        action="store_false",
        help="without them, as libvirt's system daemon (default for root)",
    )
    root_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document")


def _list(args: argparse.Namespace) -> int:
    if args.domain is not None:
        return _list_for_domain(args)
    found = load(search_path(args.root, user=args.user), args.root)
    _warn(found, args)
    rows = _take(found, args)
    shown = [row for row in rows if _is_shown(row, args)]
    if args.json:
        emit_json(_document(shown, found))
    elif shown:
        _print_table([_HEADINGS, *(_cells(row) for row in shown)])
        for row in shown:
            if row.problem is not None:
                warn(row.problem)
    elif any(row.entry.state is State.AVAILABLE for row in rows):
        warn("no IGVM firmware has all that was asked for; 'igvmfw list' shows what there is")
    else:
        warn("no IGVM firmware found; 'igvmfw install FILE' adds some")
    return 0 if shown else 1


def _take(found: Catalog, args: argparse.Namespace) -> tuple[Row, ...]:
    with progress("reading", "descriptors' files") as shown:
        return take(found, args.root, progress=shown)


def _warn(found: Catalog, args: argparse.Namespace) -> None:
    for problem in found.problems:
        warn(str(problem))
    for entry in found.entries:
        if entry.state is State.BROKEN:
            warn(str(entry.error))
    libvirt = find_libvirt(args.root)
    if libvirt is None or libvirt >= FIRST_TOLERANT_LIBVIRT:
        return
    for entry in found.available:
        if str(entry.path.parent).endswith(QEMU_DIRECTORY):
            warn(
                f"{entry.path}: libvirt {'.'.join(map(str, libvirt))} finds no firmware at all "
                "for its domains while this is there: 'igvmfw install' knows a better place"
            )


def _is_shown(row: Row, args: argparse.Namespace) -> bool:
    if not args.all and row.entry.state is not State.AVAILABLE:
        return False
    if args.platform is not None and args.platform not in row.platforms:
        return False
    descriptor = row.entry.descriptor
    features = descriptor.features if descriptor is not None else ()
    return all(feature in features for feature in args.feature)


def _state(row: Row) -> str:
    if row.entry.state is State.AVAILABLE and row.state is not None:
        return row.state.value
    return row.entry.state.value


def _cells(row: Row) -> tuple[str, ...]:
    descriptor = row.entry.descriptor
    if descriptor is None:
        return (row.entry.name, "-", "-", "-", str(row.entry.path), _state(row))
    return (
        row.entry.name,
        ",".join(row.platforms) or "-",
        ",".join(descriptor.features) or "-",
        payload_text(row.payload) if row.payload is not None else "-",
        descriptor.mapping.filename,
        _state(row),
    )


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; where a terminal is narrower, one cell a line."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    columns = width()
    if columns is not None and sum(widths) + 2 * (len(widths) - 1) > columns:
        labels = [heading.lower() for heading in rows[0]]
        indent = max(map(len, labels)) + 4
        for name, *fields in rows[1:]:
            emit_folded(name)
            for label, cell in zip(labels[1:], fields, strict=True):
                spaced = cell.replace(",", ", ") if label in _LISTS else cell
                emit_folded(f"  {label:{indent - 2}}{spaced}")
        return
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        emit("  ".join(cells).rstrip())


def _document(rows: Sequence[Row], found: Catalog) -> dict[str, Any]:
    return {
        "firmware": [_row_dict(row) for row in rows],
        "problems": [str(problem) for problem in found.problems],
    }


def _row_dict(row: Row) -> dict[str, Any]:
    entry = row.entry
    descriptor = entry.descriptor
    return {
        "name": entry.name,
        "path": str(entry.path),
        "state": entry.state.value,
        "overridden_by": None if entry.overridden_by is None else str(entry.overridden_by),
        "error": None if entry.error is None else str(entry.error),
        "file_state": None if row.state is None else row.state.value,
        "file_problem": row.problem,
        "platforms": [platform.value for platform in row.platforms],
        "payload": None if row.payload is None else payload_dict(row.payload),
        "descriptor": None if descriptor is None else descriptor.to_dict(),
    }


def _list_for_domain(args: argparse.Namespace) -> int:
    from igvmfw.rewrite import request_of
    from igvmfw.verdict import judge
    from igvmfw.virt.document import MAX_BYTES
    from igvmfw.virt.domain import Domain

    if args.platform is not None or args.feature:
        raise UsageError("--for takes platform and features from the domain")
    try:
        domain = Domain.parse(files.read_text(args.domain, limit=MAX_BYTES))
        request = request_of(domain)
    except DomainError as error:
        raise error.within(args.domain) from None
    if request is None:
        raise NegativeError(
            "the domain asks for no IGVM firmware",
            where=args.domain,
            hint="<os firmware='igvm'> or <loader type='igvm'> would",
        )
    found = load(search_path(args.root, user=args.user), args.root)
    rows = _take(found, args)
    judgement = judge(request, found.entries, unfit=_unfit(request, rows), root=args.root)
    _warn(found, args)
    candidate = judgement.candidate
    problem = _problem(candidate, domain, found, args)
    shown = [
        (row, verdict)
        for row, verdict in zip(rows, judgement.verdicts, strict=True)
        if args.all or row.entry.state in (State.AVAILABLE, State.BROKEN)
    ]
    if args.json:
        document = _document([row for row, _ in shown], found)
        for described, (_, verdict) in zip(document["firmware"], shown, strict=True):
            described |= {"chosen": verdict.chosen, "reasons": list(verdict.reasons)}
        emit_json(document | {"file": _path(candidate), "file_problem": problem})
    else:
        for _, verdict in shown:
            emit_folded(one_line(_verdict_line(verdict, candidate)))
        if candidate is not None and request.path is not None:
            storage = _storage(candidate.storage)
            emit_folded(one_line(f"* {request.path}: named by the domain{storage}"))
    if problem is not None:
        warn(problem)
    return 1 if candidate is None or problem is not None else 0


def _unfit(request: "Request", rows: Sequence[Row]) -> set[str]:
    """The descriptors of files that are not for plain guests, as only the files can tell."""
    if request.platform is not Platform.NATIVE:
        return set()
    read = (FileState.PRESENT, FileState.CHANGED)
    return {
        row.entry.name
        for row in rows
        if row.entry.state is State.AVAILABLE
        and row.state in read
        and Platform.NATIVE not in row.platforms
    }


def _problem(
    candidate: "Candidate | None", domain: "Domain", found: Catalog, args: argparse.Namespace
) -> str | None:
    """Why the domain would be refused with the chosen file, as `rewrite` would."""
    from igvmfw.launch import Options, prepare
    from igvmfw.virt.keeping import state_directory

    if candidate is None:
        return "no descriptor matches the domain; 'igvmfw install FILE' adds one"
    options = Options(entries=found.entries, root=args.root, states=state_directory(None))
    try:
        prepare(domain, options)
    except IgvmfwError as error:
        if error.where is None or error.where.startswith(("line ", "<")):
            error.within("standard input" if args.domain == files.STDIN else args.domain)
        return str(error)
    return None


def _path(candidate: "Candidate | None") -> str | None:
    return None if candidate is None else candidate.path


def _storage(storage: VtpmStorage | None) -> str:
    if storage is None:
        return ""
    return f", keeps its vTPM's state: {storage.interface}, {size_text(storage.size_bytes)}"


def _verdict_line(verdict: "Verdict", candidate: "Candidate | None") -> str:
    if verdict.chosen and candidate is not None:
        storage = _storage(candidate.storage)
        return f"* {verdict.entry.name}: chosen, {candidate.path}{storage}"
    return f"  {verdict.entry.name}: {'; '.join(verdict.reasons)}"


COMMANDS = {"list": Command(_arguments, _list)}
