"""The command doctor: what a host has and lacks for launching guests from IGVM files."""

import argparse
from collections.abc import Sequence
from urllib.parse import urlsplit

from igvmfw.cli import Command
from igvmfw.cli.options import connect_option, one_of, root_option
from igvmfw.cli.output import (
    emit,
    emit_json,
    emit_styled,
    fold,
    is_quiet,
    note,
    one_line,
    styled,
    width,
)
from igvmfw.cli.progress import progress
from igvmfw.doctor.checks import examine
from igvmfw.doctor.gather import gather
from igvmfw.doctor.line import ALL, Line, Status, is_fit
from igvmfw.errors import UsageError
from igvmfw.platforms import Platform
from igvmfw.virt.host import default_uri

_SYSTEM = "qemu:///system"
_STYLES = {
    Status.OK: "good",
    Status.MISSING: "bad",
    Status.WRONG: "bad",
    Status.UNKNOWN: "doubtful",
}
_STATUS_WIDTH = max(map(len, Status))


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show what this host has, lacks and has wrong for launching guests from IGVM files, each "
        "with what mends it. It works without root, and says what it could not see. Exit status "
        "1 says that guests of the platforms asked for cannot be launched: something that they "
        "need is missing, or something is wrong. Lines about other platforms do not count then."
    )
    parser.add_argument(
        "--platform",
        type=one_of(ALL),
        action="append",
        metavar="P",
        help="only what guests of this platform need: native, sev, sev-es or sev-snp; may be "
        "repeated (default: show all, and count what native guests need)",
    )
    connect_option(
        parser, f"libvirt's URI, of this host (default: as virsh's variables say, else {_SYSTEM})"
    )
    root_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON document")


def _doctor(args: argparse.Namespace) -> int:
    uri = args.connect or default_uri() or _SYSTEM
    _require_local(uri)
    with progress("looking at") as shown:
        facts = gather(uri, root=args.root, step=shown.say)
    asked = args.platform or [Platform.NATIVE]
    lines = examine(facts, args.platform or ALL)
    if args.json:
        emit_json(
            {
                "distribution": facts.distribution,
                "privileged": facts.privileged,
                "platforms": [platform.value for platform in asked],
                "fit": is_fit(lines, asked),
                "lines": [_line_dict(line, asked) for line in lines],
            }
        )
    else:
        _show(lines, asked)
        if not facts.privileged and not is_quiet():
            note("not run as root: what is unknown for a lack of permission, root can see")
    return int(not is_fit(lines, asked))


def _require_local(uri: str) -> None:
    try:
        host = urlsplit(uri).hostname
    except ValueError:
        host = None  # libvirt says what is wrong with it
    if host:
        raise UsageError(
            "is another host, and this one would be looked at",
            where=uri,
            hint="run 'igvmfw doctor' there",
        )


def _line_dict(line: Line, asked: Sequence[Platform]) -> dict[str, object]:
    return {
        "topic": line.topic.value,
        "name": line.name,
        "status": line.status.value,
        "found": line.found,
        "remedy": line.remedy,
        "platforms": [platform.value for platform in line.platforms],
        "fails": line.fails(asked),
    }


def _show(lines: Sequence[Line], asked: Sequence[Platform]) -> None:
    columns = width()
    if columns is None:
        for line in lines:
            remedy = f"; remedy: {line.remedy}" if line.remedy else ""
            text = f"{line.topic} {line.name}: {line.found}{remedy}"
            emit(f"{line.status:{_STATUS_WIDTH}}  {one_line(text)}")
    else:
        _show_on_terminal(lines, columns)
    verdict = "can" if is_fit(lines, asked) else "cannot"
    counted = [line.name for line in lines if line.fails(asked)]
    why = f" ({', '.join(dict.fromkeys(counted))})" if counted else ""
    unseen = sum(line.status is Status.UNKNOWN for line in lines)
    hidden = f"; {unseen} could not be seen" if unseen else ""
    text = f"{', '.join(asked)} guests {verdict} be launched from IGVM files here{why}{hidden}"
    emit(one_line(text) if columns is None else fold(one_line(text), columns))


def _show_on_terminal(lines: Sequence[Line], columns: int) -> None:
    indent = _STATUS_WIDTH + 4
    topic = None
    for line in lines:
        if line.topic is not topic:
            topic = line.topic
            emit_styled(styled(topic.value, "strong"))
        text = f"  {line.status:{_STATUS_WIDTH}}  {one_line(f'{line.name}: {line.found}')}"
        folded = fold(text, columns, indent=indent)
        mark = styled(line.status.value, _STYLES[line.status])
        emit_styled(folded.replace(line.status.value, mark, 1))
        if line.remedy:
            # a command has to stay one line to be copied; the terminal wraps it
            emit_styled(f"{' ' * min(indent, columns // 4)}→ {one_line(line.remedy)}")


COMMANDS = {"doctor": Command(_arguments, _doctor)}
