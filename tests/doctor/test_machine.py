"""Judging machines that are not this one."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from igvmfw.doctor.checks import examine
from igvmfw.doctor.facts import Account, Facts
from igvmfw.doctor.gather import gather
from igvmfw.doctor.line import ALL, Line, Status, Topic, is_fit
from igvmfw.machine import look
from igvmfw.platforms import Platform
from tests.doctor import hosts

GUEST = Account(name="libvirt-qemu", uid=64055, gids=frozenset({64055, 104}))
OK, MISSING, WRONG, UNKNOWN = Status.OK, Status.MISSING, Status.WRONG, Status.UNKNOWN


def facts_of(root: Path) -> Facts:
    return gather("qemu:///system", root=root)


def judged(facts: Facts, topic: Topic = Topic.MACHINE) -> dict[str, Line]:
    return {line.name: line for line in examine(facts, ALL) if line.topic is topic}


def test_a_host_that_has_everything(tmp_path: Path) -> None:
    facts = facts_of(hosts.host(tmp_path))
    root = replace(GUEST, uid=0)
    lines = judged(replace(facts, account=root))
    assert {name: line.status for name, line in lines.items() if line.status is not OK} == {}
    assert lines["guests-sev"].found == "410 sev guests at a time"
    assert lines["guests-sev-es"].found == "99 sev-es and sev-snp guests at a time"
    assert is_fit(list(lines.values()), ALL)
    assert not any(line.remedy for line in lines.values())


def test_identifiers_are_the_processors_where_cgroups_say_nothing(tmp_path: Path) -> None:
    lines = judged(facts_of(hosts.host(tmp_path, capacity=None)))
    assert lines["guests-sev"].found.startswith("410 ")
    assert lines["guests-sev-es"].found.startswith("99 ")


CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[Status, str, str]]]] = {
    "an older processor": (
        {
            "flags": ["sme", "sev", "sev_es"],
            "cpuid": hosts.ROME,
            "parameters": {"sev": "Y", "sev_es": "Y", "sev_snp": "N"},
        },
        {
            "processor-sev-es": (OK, "", ""),
            "processor-sev-snp": (MISSING, "this processor has no sev-snp", "generation 7003"),
            "kvm-sev-snp": (MISSING, "sev_snp=N", "mend processor-sev-snp first"),
        },
    ),
    "off in the BIOS": (
        {
            "flags": [],
            "parameters": {"sev": "N", "sev_es": "N", "sev_snp": "N"},
            "devices": ["kvm"],
        },
        {
            "processor-sev": (WRONG, "BIOS or kernel keep it off", "SMEE"),
            "processor-sev-snp": (WRONG, "BIOS or kernel keep it off", "RMP"),
            "dev-sev": (MISSING, "/dev/sev does not exist", "mend processor-sev first"),
        },
    ),
    "off in the BIOS, and the processor cannot be asked": (
        {"flags": [], "cpuid": None},
        {"processor-sev": (OK, "kvm_amd has it on", "")},
    ),
    "nobody can tell why": (
        {"flags": [], "cpuid": None, "parameters": {"sev": "N"}},
        {"processor-sev": (MISSING, "dev/cpu/0/cpuid: No such file", "SMEE")},
    ),
    "off for KVM": (
        {"parameters": {"sev": "Y", "sev_es": "0", "sev_snp": "N"}},
        {
            "kvm-sev": (OK, "sev=Y", ""),
            "kvm-sev-es": (WRONG, "sev_es=0", "options kvm_amd sev=1 sev_es=1 >"),
            "kvm-sev-snp": (WRONG, "sev_snp=N", "options kvm_amd sev=1 sev_es=1 sev_snp=1 >"),
        },
    ),
    "an old kernel": (
        {"kernel": "6.1.0-40-amd64", "parameters": {"sev": "Y", "sev_es": "Y"}},
        {"kvm-sev-snp": (MISSING, "6.1.0-40-amd64", "Linux 6.11")},
    ),
    "no module": (
        {"modules": ["kvm"], "parameters": {}, "devices": []},
        {
            "kvm": (MISSING, "/dev/kvm does not exist", "modprobe kvm_amd"),
            "kvm-sev": (MISSING, "kvm_amd is not in the kernel", "modprobe kvm_amd"),
            "ccp": (MISSING, "is not in the kernel", "modprobe ccp"),
            "dev-sev": (MISSING, "/dev/sev does not exist", "modprobe ccp"),
        },
    ),
    "another vendor": (
        {
            "vendor": "GenuineIntel",
            "flags": ["vmx"],
            "cpuid": None,
            "modules": [],
            "parameters": {},
            "devices": [],
        },
        {
            "processor-sev": (MISSING, "GenuineIntel", "AMD EPYC"),
            "kvm": (MISSING, "", "modprobe kvm_intel"),
        },
    ),
    "a virtual machine": (
        {"flags": ["hypervisor"], "cpuid": (0, 0, 0, 0), "parameters": {}},
        {"processor-sev": (MISSING, "virtual machine", "below it")},
    ),
    "all identifiers are SEV-ES'": (
        {"capacity": "sev 0\nsev_es 509\n"},
        {
            "guests-sev": (MISSING, "no address space identifiers", "ASID space limit"),
            "guests-sev-es": (OK, "509", ""),
        },
    ),
    "cgroups that make no sense": (
        {"capacity": "\xff\n\nsev\nsev_es many\n\x1b[2J 1 1", "cpuid": None},
        {"guests-sev": (UNKNOWN, "misc.capacity has no sev", "")},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_host_that_lacks_something(case: str, tmp_path: Path) -> None:
    options, expected = CASES[case]
    lines = judged(facts_of(hosts.host(tmp_path, **options)))
    for name, (status, found, remedy) in expected.items():
        line = lines[name]
        assert line.status is status, line
        assert found in line.found
        assert remedy in (line.remedy or "")
        assert (line.remedy is None) == (status in (OK, UNKNOWN))


@pytest.mark.parametrize(
    ("mode", "owner", "namespaces", "status"),
    [
        (0o660, (0, 104), None, OK),
        (0o606, (0, 0), None, OK),
        (0o600, (64055, 0), '[ "mount" ]', OK),
        # libvirt makes one for each guest, of the guest's owner
        (0o600, (0, 0), None, OK),
        (0o600, (0, 0), '[ "mount" ]', OK),
        (0o600, (0, 0), "[]", WRONG),
        (0o600, (0, 0), '[] # was "mount"', WRONG),
        (0o600, (0, 0), '[ "unmount" ]', WRONG),
        (0o066, (64055, 0), "[ ]", WRONG),
    ],
)
def test_who_can_open_the_device(
    tmp_path: Path, mode: int, owner: tuple[int, int], namespaces: str | None, status: Status
) -> None:
    root = hosts.host(tmp_path)
    for name in ("sev", "kvm"):
        (root / "dev" / name).chmod(mode)
        os.chown(root / "dev" / name, *owner)
    if namespaces is not None:
        hosts.write(
            root / "etc/libvirt/qemu.conf", f"#namespaces = []\nnamespaces = {namespaces}\n"
        )
    lines = judged(replace(facts_of(root), account=GUEST))
    assert lines["dev-sev"].status is status
    # of /dev/kvm guests get what the host has
    shared = (mode, owner) in [(0o660, (0, 104)), (0o606, (0, 0)), (0o600, (64055, 0))]
    assert lines["kvm"].status is (OK if shared else WRONG)


def test_a_file_in_the_devices_place(tmp_path: Path) -> None:
    root = hosts.host(tmp_path, devices=["kvm"])
    (root / "dev/sev").touch()
    line = judged(facts_of(root))["dev-sev"]
    assert line.status is WRONG
    assert "no device" in line.found


def test_an_empty_root_is_all_unknown_or_missing(tmp_path: Path) -> None:
    lines = examine(facts_of(tmp_path), ALL)
    assert {line.status for line in lines if line.topic is Topic.MACHINE} == {MISSING, UNKNOWN}
    assert not is_fit(lines, [Platform.NATIVE])


def test_this_machine_is_read_as_the_kernel_says_it() -> None:
    machine = look()
    cpuinfo = Path("/proc/cpuinfo").read_text()
    assert machine.kernel == os.uname().release
    assert machine.processor is not None
    for flag in ("svm", "sev", "sev_es", "sev_snp", "hypervisor"):
        assert (flag in machine.flags) is (
            re.search(rf"^flags.* {flag}( |$)", cpuinfo, re.M) is not None
        )
    if machine.cpuid is not None:  # the device's answer is CPUID's
        assert machine.cpuid_problem is None
