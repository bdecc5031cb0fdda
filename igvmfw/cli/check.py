"""The command check: would QEMU launch a file, and would the guest be what the file says?"""

import argparse
from pathlib import Path
from typing import Any

from igvmfw.check import LAUNCHED, check_image, refuses
from igvmfw.cli import Command
from igvmfw.cli.image import count
from igvmfw.cli.options import one_of
from igvmfw.cli.output import emit_folded, emit_json, warn
from igvmfw.errors import IgvmfwError, UsageError
from igvmfw.files import content_of
from igvmfw.findings import Finding, Guest
from igvmfw.igvm.image import IgvmFile
from igvmfw.platforms import Platform
from igvmfw.qemu.acceptance import ANY_RELEASE, Acceptance, acceptance_of
from igvmfw.qemu.emulator import host_acceptance

MAX_ALIKE = 5  # findings of one rule that are shown: a file may have thousands of pages


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an IGVM file; - is standard input")
    parser.add_argument(
        "--platform",
        type=one_of(Platform),
        action="append",
        metavar="P",
        help="the guest's platform; may be repeated (default: every one the file has)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--qemu", metavar="VERSION", help="a QEMU release, such as 10.2")
    group.add_argument(
        "--emulator",
        type=Path,
        metavar="PATH",
        help="a QEMU binary, which is asked (default: this host's, where one takes IGVM, else the "
        "newest release known)",
    )
    parser.add_argument("--vcpus", type=count, metavar="N", help="vCPUs of the guest")
    parser.add_argument("--memory", type=count, metavar="MIB", help="memory of the guest, in MiB")
    parser.add_argument("--json", action="store_true", help="one JSON document")


def _check(args: argparse.Namespace) -> int:
    qemu = _release(args)
    guest = Guest(vcpus=args.vcpus, memory=args.memory << 20 if args.memory else None)
    with content_of(args.file) as data:
        try:
            image = IgvmFile.parse(data)
            platforms = args.platform or list(image.supported)
            results = {
                platform: check_image(image, platform, qemu, guest) for platform in platforms
            }
        except IgvmfwError as error:
            raise error.within(args.file) from None
    if qemu is ANY_RELEASE:
        warn(
            "no QEMU of this host takes IGVM files: judged as by the newest release known "
            f"({qemu.name}); 'igvmfw doctor' says what is missing, --qemu names another release"
        )
    if args.json:
        emit_json(_document(args.file, qemu, results))
    else:
        for platform, findings in results.items():
            _show(platform, findings, qemu)
    return int(any(refuses(findings) for findings in results.values()))


def _release(args: argparse.Namespace) -> Acceptance:
    if args.qemu:
        parts = args.qemu.split(".")
        if not 2 <= len(parts) <= 3 or not all(p.isdecimal() and len(p) < 4 for p in parts):
            raise UsageError(f"--qemu {args.qemu}: not a version", hint="such as 10.2")
        return acceptance_of(tuple(map(int, parts)))
    return host_acceptance(args.emulator)


def _show(platform: Platform, findings: list[Finding], qemu: Acceptance) -> None:
    if refuses(findings):
        verdict = "must not be launched" if platform in LAUNCHED else "cannot be launched"
    else:
        verdict = "would be launched" if findings else "would be launched as it is"
    by = "some release of QEMU" if qemu is ANY_RELEASE else qemu.name
    emit_folded(f"{platform}: {verdict} by {by}")
    alike: dict[str, list[Finding]] = {}
    for finding in findings:
        alike.setdefault(finding.rule, []).append(finding)
        if len(alike[finding.rule]) <= MAX_ALIKE:
            emit_folded(f"  {finding.severity} [{finding.rule}] {finding.where}: {finding.message}")
            emit_folded(f"    {finding.remedy}")
    for rule, group in alike.items():
        if len(group) > MAX_ALIKE:
            more, last = len(group) - MAX_ALIKE, group[-1].where
            emit_folded(f"  and {more} more [{rule}], the last at {last}; --json has them all")


def _document(
    name: str, qemu: Acceptance, results: dict[Platform, list[Finding]]
) -> dict[str, Any]:
    return {
        "file": name,
        "qemu": ".".join(map(str, qemu.version)),
        "platforms": [
            {
                "platform": platform.value,
                "taken": not refuses(findings),
                "findings": [
                    {
                        "rule": finding.rule,
                        "severity": finding.severity.value,
                        "header_index": finding.header_index,
                        "file_offset": finding.file_offset,
                        "message": finding.message,
                        "remedy": finding.remedy,
                    }
                    for finding in findings
                ],
            }
            for platform, findings in results.items()
        ],
    }


COMMANDS = {"check": Command(_arguments, _check)}
