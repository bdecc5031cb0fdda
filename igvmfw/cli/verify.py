"""The command verify: was a running domain launched from its IGVM file?"""

import argparse
import base64
from typing import Any

from igvmfw import files
from igvmfw.cli import Command
from igvmfw.cli.options import connect_option, named_argument
from igvmfw.cli.output import emit, emit_json, warn
from igvmfw.errors import UsageError
from igvmfw.platforms import Platform
from igvmfw.verify import Measurement, Verification, read_tik, verify
from igvmfw.virt.host import connect


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare the measurement of a running SEV or SEV-ES domain with its IGVM file. Exit status "
        "0 says that it is verified; 1 that it is not, also where there is nothing to verify with: "
        "no TIK, or SEV-SNP, whose guests are verified by their attestation report."
    )
    named_argument(parser, "domain", "its name, UUID or ID")
    connect_option(parser, "libvirt's URI, as virsh takes it")
    parser.add_argument(
        "--tik",
        metavar="FILE",
        help="the owner's transport integrity key, as sevctl session writes it: 16 bytes, or these "
        "in base64; - is standard input",
    )
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="the owner's own copy of the IGVM file (default: the file the domain was given, as it "
        "is now)",
    )
    parser.add_argument(
        "--cpu",
        metavar="MODEL",
        help="the guest's CPU model, or FAMILY/MODEL/STEPPING (default: what the domain says); "
        "matters where the file does not set all vCPUs",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")


def _verify(args: argparse.Namespace) -> int:
    if args.tik == args.file == files.STDIN:
        raise UsageError("--tik and --file cannot both be standard input", hint="name one of them")
    tik = None if args.tik is None else read_tik(args.tik)
    with connect(args.connect) as connection:
        result = verify(connection, args.domain, path=args.file, tik=tik, cpu=args.cpu)
    name = result.launch.domain.name or args.domain
    for warning in result.warnings:
        warn(warning)
    if args.json:
        emit_json(_document(name, result))
    else:
        _show(name, result)
    return 0 if result.verified else 1


def _show(name: str, result: Verification) -> None:
    launch = result.launch
    emit(f"{name}: {'verified' if result.verified else 'not verified'}")
    for reason in result.reasons:
        emit(f"  {reason}")
    facts = [("file", result.path), ("platform", launch.platform), ("vCPUs", launch.domain.vcpus)]
    if result.cpu_signature is not None:
        facts.append(("CPU signature", f"0x{result.cpu_signature:x}"))
    if launch.policy is not None:
        facts.append(("policy", f"0x{launch.policy:x}"))
    facts.append(("launch digest", result.digest.hex()))
    if launch.measurement is not None:
        facts.append(("measurement", _blob(launch.measurement)))
        major, minor = launch.measurement.api
        facts.append(("SEV API, build", f"{major}.{minor}, {launch.measurement.build}"))
    for label, value in facts:
        emit(f"  {label:<15} {value}")


def _blob(measurement: Measurement) -> str:
    """As libvirt and virt-qemu-sev-validate write it."""
    return base64.b64encode(measurement.signature + measurement.nonce).decode()


def _document(name: str, result: Verification) -> dict[str, Any]:
    launch = result.launch
    measurement = launch.measurement and {
        "measurement": _blob(launch.measurement),
        "api_major": launch.measurement.api[0],
        "api_minor": launch.measurement.api[1],
        "build_id": launch.measurement.build,
    }
    return {
        "domain": name,
        "verified": result.verified,
        "reasons": list(result.reasons),
        "warnings": list(result.warnings),
        "file": result.path,
        "sha256": result.sha256,
        "platform": launch.platform.value,
        "vcpus": launch.domain.vcpus,
        "cpu_signature": result.cpu_signature,
        "policy": launch.policy,
        "algorithm": "sha384" if launch.platform is Platform.SEV_SNP else "sha256",
        "digest": result.digest.hex(),
        "launch": measurement,
    }


COMMANDS = {"verify": Command(_arguments, _verify)}
