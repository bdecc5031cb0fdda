"""Commands on IGVM files themselves: inspect, measure, wrap."""

import argparse
import contextlib
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from igvmfw.cli import Command
from igvmfw.cli.options import one_of
from igvmfw.cli.output import (
    emit,
    emit_bytes,
    emit_folded,
    emit_json,
    emit_map,
    note,
    one_line,
    warn,
)
from igvmfw.cli.progress import progress
from igvmfw.cli.workers import each
from igvmfw.errors import IgvmfwError, InputError, OutputError, UsageError
from igvmfw.files import STDIN, content_of, write_output
from igvmfw.igvm.image import IgvmFile
from igvmfw.platforms import Platform

if TYPE_CHECKING:
    from igvmfw.igvm.payload import Payload

SHA384_SIZE = 48  # bytes


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="an IGVM file; - is standard input"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--pages", action="store_true", help="also every directive")
    parser.add_argument(
        "--lenient",
        action="store_true",
        help="show a file that breaks the format's rules as far as it can be read",
    )
    parser.add_argument(
        "--map",
        metavar="OUT",
        help="also draw the guest's memory as the file lays it out: into OUT.svg, or with - as "
        "text behind what is printed",
    )
    parser.add_argument(
        "--theme",
        choices=("auto", "light", "dark"),
        default="auto",
        help="the colours of OUT.svg (default auto: as the reader's screen is set)",
    )


class _Seen(NamedTuple):
    """What there is to say of one file."""

    text: str = ""
    document: dict[str, Any] | None = None
    code: int = 0
    failure: IgvmfwError | None = None


def _inspect(args: argparse.Namespace) -> int:
    _check_map(args)
    prints_more = args.map is not None or (args.pages and not args.json)
    in_order = map if prints_more or STDIN in args.files else each
    documents = []
    code = 0
    with progress("inspecting", "files", prints=not args.json) as shown:
        for seen in shown.over(in_order(partial(_look, args), args.files), len(args.files)):
            code = max(code, seen.code)
            if seen.failure is not None:
                if len(args.files) == 1:
                    raise seen.failure
                warn(str(seen.failure))  # one bad file hides none of the others
            elif args.json:
                documents.append(seen.document)
            elif seen.text:
                emit_folded(seen.text)
    if args.json:
        emit_json(documents if len(args.files) > 1 else documents[0])
    return code


def _look(args: argparse.Namespace, name: str) -> _Seen:
    """Read one file; what --pages and --map add to a text may be much, and is printed at once."""
    from igvmfw.images import find_payload
    from igvmfw.report import inspection, inspection_text, page_runs

    try:
        with content_of(name) as data:
            image = IgvmFile.parse(data, lenient=args.lenient)
            payload = find_payload(image)
            code = 3 if image.problems else 0
            if args.json:
                document = inspection(image, name, payload, pages=args.pages)
                text = ""
            else:
                document, text = None, inspection_text(image, one_line(name), payload)
            if text and (args.pages or args.map is not None):
                emit_folded(text)
                text = ""
                for line in page_runs(image) if args.pages else ():
                    emit_folded(line)
            if args.map is not None:
                _map(args, image, name, payload)
            return _Seen(text=text, document=document, code=code)
    except OutputError:
        raise
    except IgvmfwError as error:
        known = error.where and error.where.startswith(name)
        return _Seen(code=error.exit_code, failure=error if known else error.within(name))


def _check_map(args: argparse.Namespace) -> None:
    """Refuse what --map cannot mean, above all a name that may be that of an IGVM file."""
    if args.map is None:
        return
    if args.map == STDIN:
        if args.json:
            raise UsageError(
                "--map - prints text, --json one document",
                hint="leave one out: the document has the regions too, below summaries",
            )
    elif not args.map.endswith(".svg"):
        raise UsageError(
            f"--map {args.map}: the picture's name must end in .svg",
            hint="--map OUT.svg FILE, or --map - FILE for text",
        )
    elif len(args.files) > 1:
        raise UsageError("--map draws one file into one picture", hint="name one FILE, or --map -")
    else:
        _keep_inputs(f"--map {args.map}: the picture", args.map, *args.files)
        _keep_image(args.map)


def _keep_image(name: str) -> None:
    """See that a picture replaces no IGVM file, whatever its name ends in."""
    from igvmfw.kinds import IGVM, kind_of

    with contextlib.suppress(InputError), content_of(name) as there:  # mostly there is nothing
        if kind_of(there) is IGVM:
            raise UsageError(
                f"--map {name}: the picture would replace an IGVM file", hint="give it another name"
            )


def _map(args: argparse.Namespace, image: IgvmFile, name: str, payload: "Payload") -> None:
    from igvmfw.memorymap import map_memory

    title = "standard input" if name == STDIN else Path(name).name
    memory = map_memory(image, title, payload)
    if args.map == STDIN:
        emit_map(memory)
        return
    from igvmfw.drawing import Theme, draw

    write_output(Path(args.map), draw(memory, theme=Theme(args.theme)))


def _measure_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an IGVM file; - is standard input")
    parser.add_argument(
        "--platform",
        type=one_of(Platform),
        metavar="P",
        help="sev, sev-es, sev-snp, tdx or vsm; may be left out where the file has one of the "
        "first three, or of the last two alone",
    )
    parser.add_argument(
        "--vcpus",
        type=count,
        default=1,
        metavar="N",
        help="vCPUs of the guest (default 1); the file's own order takes those that the file has",
    )
    parser.add_argument(
        "--cpu",
        metavar="MODEL",
        help="the guest's CPU model as QEMU names it (EPYC-Milan), or FAMILY/MODEL/STEPPING",
    )
    parser.add_argument(
        "--vmm",
        choices=("qemu", "spec"),
        help="whose order: QEMU's with KVM (default where QEMU launches the platform), or the "
        "file's own (the only one for tdx and vsm)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="one JSON document")
    group.add_argument("--bare", action="store_true", help="the digest in hexadecimal alone")


def _measure(args: argparse.Namespace) -> int:
    from igvmfw.igvm.measure import Vmm, default_vmm, launch_digest, stated_digest
    from igvmfw.qemu.cpus import signature

    cpu = signature(args.cpu) if args.cpu else None
    with progress("measuring", args.file), content_of(args.file) as data:
        try:
            image = IgvmFile.parse(data)
            platform = args.platform or _only_platform(image)
            vmm = Vmm(args.vmm) if args.vmm else default_vmm(platform)
            digest = launch_digest(image, platform, vcpus=args.vcpus, cpu_signature=cpu, vmm=vmm)
            stated = stated_digest(image) if platform is Platform.SEV_SNP else None
        except IgvmfwError as error:
            raise error.within(args.file) from None
    differs = stated is not None and stated != digest
    if args.bare:
        emit(digest.hex())
        if stated is not None and differs:
            warn(f"{args.file}: {_id_block_text(stated, digest)}")
    elif args.json:
        emit_json(
            {
                "file": args.file,
                "platform": platform.value,
                "vcpus": args.vcpus,
                "cpu_signature": cpu,
                "vmm": vmm.value,
                "algorithm": "sha384" if len(digest) == SHA384_SIZE else "sha256",
                "digest": digest.hex(),
                "id_block": {"ld": stated.hex(), "matches": not differs} if stated else None,
            }
        )
    else:
        vcpus = f"{args.vcpus} vCPU{'s' * (args.vcpus > 1)}"
        order = vcpus if vmm is Vmm.QEMU else "file order"
        emit(one_line(f"{digest.hex()}  {platform}  {order}  {args.file}"))
        if stated is not None:
            emit(_id_block_text(stated, digest))
    return int(differs)


def _only_platform(image: IgvmFile) -> Platform:
    """The platform that is meant where none is named.

    Raises:
        UsageError: The file leaves it open.
    """
    from igvmfw.igvm.measure import MEASURED, WITH_DIGEST

    for known in (MEASURED, WITH_DIGEST):
        candidates = [item for item in image.supported if item in known]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            break
    raise UsageError(
        f"which platform? The file has: {', '.join(image.supported)}",
        hint="name it with --platform",
    )


def _id_block_text(stated: bytes, digest: bytes) -> str:
    if stated == digest:
        return "the ID block states this digest"
    return f"the ID block states another digest, a launch with this one is refused: {stated.hex()}"


def _wrap_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "firmware", metavar="FIRMWARE", help="a raw firmware image, such as OVMF.fd"
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the IGVM file")
    parser.add_argument(
        "--platform",
        type=one_of(Platform),
        action="append",
        metavar="P",
        help="native, sev, sev-es or sev-snp; may be repeated (default: native)",
    )
    parser.add_argument(
        "--vars", metavar="FILE", help="a variable store to load below the firmware (OVMF_VARS.fd)"
    )
    parser.add_argument(
        "--vcpus",
        type=count,
        default=1,
        metavar="N",
        help="vCPUs that get a VMSA on SEV-ES (default 1)",
    )
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="[P=]VALUE",
        help="the guest policy; with several platforms P says whose (default: sev-snp=0x30000)",
    )


def _wrap(args: argparse.Namespace) -> int:
    from igvmfw.igvm.wrap import wrap

    platforms = args.platform or [Platform.NATIVE]
    policies = dict(_policy(text, platforms) for text in args.policy)
    if args.firmware == STDIN and args.vars == STDIN:
        raise UsageError("firmware and variable store cannot both be standard input")
    _keep_inputs(f"-o {args.output}: the IGVM file", args.output, args.firmware, args.vars)
    with progress("wrapping", args.firmware), content_of(args.firmware) as firmware:
        variables = b""
        if args.vars:
            with content_of(args.vars) as view:
                variables = bytes(view)
        try:
            result = wrap(
                firmware, platforms, variables=variables, vcpus=args.vcpus, policies=policies
            )
        except IgvmfwError as error:
            raise error if isinstance(error, UsageError) else error.within(args.firmware) from None
    if args.output == STDIN:
        emit_bytes(result)
    else:
        write_output(Path(args.output), result)
        note(f"wrote {args.output}: {len(result)} bytes for {', '.join(platforms)}")
    return 0


def _keep_inputs(result: str, output: str, *inputs: str | None) -> None:
    """See that the result replaces nothing that it is made of."""
    for name in inputs:
        if name is None or STDIN in (name, output):
            continue
        with contextlib.suppress(OSError):  # what is missing is reported where it is used
            if os.path.samefile(name, output):
                raise UsageError(
                    f"{result} would replace {name}, which it is made of",
                    hint="give it another name",
                )


def _policy(text: str, platforms: list[Platform]) -> tuple[Platform, int]:
    name, _, number = text.rpartition("=")
    protected = [platform for platform in platforms if platform is not Platform.NATIVE]
    if not name and len(protected) != 1:
        raise UsageError(
            f"--policy {text}: whose policy? The file is for {', '.join(platforms)}",
            hint="say P=VALUE, such as sev-snp=0x30000",
        )
    try:
        value = int(number, 0)
    except ValueError:
        raise UsageError(
            f"--policy {text}: {number!r} is not a number", hint="0x30000, or decimal"
        ) from None
    if not 0 <= value < 1 << 64:
        raise UsageError(f"--policy {text}: the policy has 64 bits")
    if name and name not in tuple(Platform):
        raise UsageError(
            f"--policy {text}: {name!r} is no platform", hint=f"one of {', '.join(platforms)}"
        )
    return (Platform(name) if name else protected[0]), value


def count(text: str) -> int:
    """An argument that is a count of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count of 1 or more")
    return value


COMMANDS = {
    "inspect": Command(_inspect_arguments, _inspect),
    "measure": Command(_measure_arguments, _measure),
    "wrap": Command(_wrap_arguments, _wrap),
}
