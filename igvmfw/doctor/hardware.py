"""Judging processor, kernel and devices."""

import os
from collections.abc import Iterator
from shlex import quote

from igvmfw.doctor import remedies
from igvmfw.doctor.facts import Account, Facts
from igvmfw.doctor.line import ALL, PROTECTED, Line, Status, Topic
from igvmfw.machine import PARAMETERS, Machine, Node
from igvmfw.platforms import Platform

_AMD = "AuthenticAMD"
_KERNELS = {Platform.SEV: "4.16", Platform.SEV_ES: "5.11", Platform.SEV_SNP: "6.11"}
_BIOS = {
    Platform.SEV: "turn SMEE (SME) and SVM on in the BIOS, and boot without mem_encrypt=off",
    Platform.SEV_ES: "turn SEV-ES on in the BIOS: 'SEV-ES ASID space limit' above 1",
    Platform.SEV_SNP: "turn SEV-SNP, 'SNP memory (RMP table) coverage' and the IOMMU on in the BIOS"
    ", and look at: dmesg | grep -i -e sev -e rmp",
}
_OTHER_HOST = "use a host with an AMD EPYC processor of the generation {} or newer"
_GENERATIONS = {Platform.SEV: 7001, Platform.SEV_ES: 7002, Platform.SEV_SNP: 7003}


def machine_lines(facts: Facts) -> Iterator[Line]:
    """What is judged of the machine."""
    machine = facts.machine
    yield _kernel(machine)
    for platform in PROTECTED:
        yield _processor(machine, platform)
    yield _kvm(facts)
    for platform in PROTECTED:
        yield _switch(machine, platform)
    for platform in (Platform.SEV, Platform.SEV_ES):
        yield _asids(machine, platform)
    yield _ccp(machine)
    yield _sev_device(facts)


def _line(
    name: str,
    status: Status,
    found: str,
    remedy: str | None = None,
    platforms: tuple[Platform, ...] = ALL,
) -> Line:
    shown = None if status is Status.OK else remedy
    return Line(
        topic=Topic.MACHINE,
        name=name,
        status=status,
        found=found,
        remedy=shown,
        platforms=platforms,
    )


def _kernel(machine: Machine) -> Line:
    if machine.processor is None or not machine.kernel:
        return _line("kernel", Status.UNKNOWN, "/proc says neither kernel nor processor")
    model = machine.processor.get("model name", "unknown processor")
    where = ", in a virtual machine" if "hypervisor" in machine.flags else ""
    return _line("kernel", Status.OK, f"Linux {machine.kernel}, {model}{where}")


def _has(machine: Machine, platform: Platform) -> str | None:
    """By what one sees that processor and kernel have a platform; None where one does not."""
    if PARAMETERS[platform] in machine.flags:
        return "the kernel lists it among the processor's features"
    # kernels before 6.9 list no flag for SEV-SNP
    return "kvm_amd has it on" if machine.switch(platform) else None


def _processor(machine: Machine, platform: Platform) -> Line:
    name = f"processor-{platform}"
    whom = (platform,)
    if machine.processor is None:
        return _line(name, Status.UNKNOWN, "/proc/cpuinfo cannot be read", platforms=whom)
    if how := _has(machine, platform):
        return _line(name, Status.OK, how, platforms=whom)
    vendor = machine.processor.get("vendor_id", "an unknown vendor")
    other = _OTHER_HOST.format(_GENERATIONS[platform])
    if vendor != _AMD:
        found = f"the processor is of {vendor}, and only AMD's have {platform}"
        return _line(name, Status.MISSING, found, other, whom)
    if "hypervisor" in machine.flags:
        found = f"this virtual machine is not given {platform}"
        return _line(name, Status.MISSING, found, "use the machine below it, not a guest", whom)
    if machine.cpuid is None:
        found = (
            f"the kernel lists no {PARAMETERS[platform]}; whether the processor has it cannot be "
            f"seen ({machine.cpuid_problem}; as root: modprobe cpuid)"
        )
        return _line(name, Status.MISSING, found, f"{_BIOS[platform]}; else {other}", whom)
    if platform in machine.cpuid.platforms:
        found = "the processor has it, and BIOS or kernel keep it off"
        return _line(name, Status.WRONG, found, _BIOS[platform], whom)
    return _line(name, Status.MISSING, f"this processor has no {platform}", other, whom)


def _kvm(facts: Facts) -> Line:
    machine = facts.machine
    node = machine.kvm_node
    if node is None:
        vendor = (machine.processor or {}).get("vendor_id")
        module = "kvm_amd" if vendor == _AMD else "kvm_intel"
        remedy = f"modprobe {module}; where that fails, turn virtualization on in the BIOS"
        return _line("kvm", Status.MISSING, "/dev/kvm does not exist", remedy)
    if not node.device:
        remedy = f"rm /dev/kvm; the device comes with the module: {remedies.RELOAD_KVM}"
        return _line("kvm", Status.WRONG, "/dev/kvm is no device", remedy)
    opens = _may_open(node, facts.account)
    found = f"/dev/kvm ({_mode(node)}), {_who(opens, facts)}"
    # libvirt gives its guests a copy with the same owner and mode
    remedy = "chgrp kvm /dev/kvm && chmod 660 /dev/kvm"
    remedy += f" && usermod -aG kvm {quote(facts.account_name)}"
    return _line("kvm", _opened(opens), found, remedy)


def _may_open(node: Node, account: Account | None) -> bool | None:
    """Whether a user can read and write a device; None where the user is not known."""
    if account is None:
        return None
    if account.uid == 0:
        return True
    shift = 6 if account.uid == node.uid else 3 if node.gid in account.gids else 0
    return node.mode >> shift & 6 == 6


def _opened(opens: bool | None) -> Status:
    return {True: Status.OK, False: Status.WRONG, None: Status.UNKNOWN}[opens]


def _mode(node: Node) -> str:
    return f"owner {node.uid}:{node.gid}, mode {node.mode:o}"


def _who(opens: bool | None, facts: Facts) -> str:
    user = facts.account_name
    if opens is None:
        why = "does not exist here" if str(facts.root) == os.sep else "is of another root"
        return f"QEMU's user {user} {why}: whether it can open it cannot be seen"
    return f"QEMU's user {user} can{'' if opens else 'not'} open it"


def _switch(machine: Machine, platform: Platform) -> Line:
    parameter = PARAMETERS[platform]
    name = f"kvm-{platform}"
    whom = (platform,)
    if not machine.kvm_amd:
        found = "kvm_amd is not in the kernel"
        remedy = _after_processor(machine, platform) or "modprobe kvm_amd"
        return _line(name, Status.MISSING, found, remedy, whom)
    text = machine.parameters.get(parameter)
    if text is None:
        found = f"this kernel's kvm_amd has no {parameter}: {machine.kernel}"
        remedy = f"boot Linux {_KERNELS[platform]} or newer (or a distribution's with backports)"
        return _line(name, Status.MISSING, found, remedy, whom)
    if text.problem is not None:
        return _line(name, Status.UNKNOWN, text.problem, platforms=whom)
    found = f"kvm_amd has {parameter}={text.text}"
    if machine.switch(platform):
        return _line(name, Status.OK, found, platforms=whom)
    if first := _after_processor(machine, platform):
        found += ", as the processor's feature is not there"
        return _line(name, Status.MISSING, found, first, whom)
    needed = [PARAMETERS[p] for p in PROTECTED[: PROTECTED.index(platform) + 1]]
    remedy = f"{remedies.switch_on(needed)}; where it stays off: {_BIOS[platform]}"
    return _line(name, Status.WRONG, found, remedy, whom)


def _after_processor(machine: Machine, platform: Platform) -> str | None:
    """The remedy of what cannot be there while the processor's feature is not."""
    if _processor(machine, platform).status in (Status.OK, Status.UNKNOWN):
        return None
    return f"mend processor-{platform} first"


def _asids(machine: Machine, platform: Platform) -> Line:
    parameter = PARAMETERS[platform]
    name = f"guests-{platform}"
    # SEV-SNP's guests take SEV-ES' identifiers
    whom = (platform,) if platform is Platform.SEV else (Platform.SEV_ES, Platform.SEV_SNP)
    known = machine.capacities.get(parameter)
    if known is None and machine.cpuid is not None and machine.cpuid.platforms:
        known = machine.cpuid.asids(platform)
    if known is None:
        found = machine.capacity.problem or (
            "no misc.capacity of cgroups, which says how many can run"
            if machine.capacity.text is None
            else f"misc.capacity has no {parameter}"
        )
        if machine.cpuid_problem:
            found += f"; {machine.cpuid_problem}"
        return _line(name, Status.UNKNOWN, found, platforms=whom)
    kinds = " and ".join(word.value for word in whom)
    if known:
        return _line(name, Status.OK, f"{known} {kinds} guests at a time", platforms=whom)
    remedy = "lower 'SEV-ES ASID space limit' in the BIOS" if platform is Platform.SEV else None
    found = f"no address space identifiers (ASIDs) are left to {kinds} guests"
    return _line(name, Status.MISSING, found, remedy or _BIOS[platform], whom)


def _ccp(machine: Machine) -> Line:
    if machine.ccp or (machine.sev_node is not None and machine.sev_node.device):
        return _line("ccp", Status.OK, "the secure processor has its driver", platforms=PROTECTED)
    found = "the driver of AMD's secure processor is not in the kernel"
    remedy = _after_processor(machine, Platform.SEV) or "modprobe ccp"
    return _line("ccp", Status.MISSING, found, remedy, PROTECTED)


def _sev_device(facts: Facts) -> Line:
    node = facts.machine.sev_node
    if node is None:
        remedy = "modprobe ccp" if not facts.machine.ccp else "dmesg | grep -i -e ccp -e sev"
        remedy += "; where there is none after that, turn SEV on in the BIOS"
        remedy = _after_processor(facts.machine, Platform.SEV) or remedy
        return _line("dev-sev", Status.MISSING, "/dev/sev does not exist", remedy, PROTECTED)
    if not node.device:
        found = "/dev/sev is no device, but some other file"
        remedy = "rm /dev/sev; the device comes with the module: modprobe -r ccp && modprobe ccp"
        return _line("dev-sev", Status.WRONG, found, remedy, PROTECTED)
    opens = _may_open(node, facts.account)
    found = f"/dev/sev ({_mode(node)}), {_who(opens, facts)}"
    if opens:
        return _line("dev-sev", Status.OK, found, platforms=PROTECTED)
    # src/security/security_dac.c: libvirt gives it to the guest's user where the guest has a /dev
    # of its own, and leaves the host's alone
    if facts.settings_problem is not None:
        found += "; whether libvirt gives it to guests cannot be seen (/etc/libvirt/qemu.conf: "
        found += f"{facts.settings_problem})"
        return _line("dev-sev", Status.UNKNOWN, found, platforms=PROTECTED)
    if "namespaces" not in facts.settings or "mount" in facts.settings["namespaces"]:
        found += ", and libvirt gives each guest one of its own that it can"
        return _line("dev-sev", Status.OK, found, platforms=PROTECTED)
    remedy = f"setfacl -m {quote(f'u:{facts.account_name}:rw')} /dev/sev, or 'mount' among the "
    remedy += "namespaces of /etc/libvirt/qemu.conf"
    return _line("dev-sev", _opened(opens), found, remedy, PROTECTED)
