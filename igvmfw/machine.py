"""What the processor and the kernel of a host say about launching protected guests.

One place for it: the hook asks whether one platform can be launched, `doctor` shows everything.

Sources: AMD64 Architecture Programmer's Manual, volume 3, E.4.17 (CPUID Fn8000_001F); Linux:
arch/x86/kernel/cpu/amd.c (the flags of /proc/cpuinfo go where the BIOS has memory encryption off),
arch/x86/kvm/svm/sev.c (kvm_amd's parameters say whether KVM has a platform, also where the
processor or the BIOS is the reason), drivers/crypto/ccp/sev-dev.c (/dev/sev),
Documentation/admin-guide/cgroup-v2.rst (misc.capacity).
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from igvmfw.errors import RefusedError
from igvmfw.platforms import Platform

# kvm_amd's switch for each platform, which is the processor's flag in /proc/cpuinfo as well
PARAMETERS = {Platform.SEV: "sev", Platform.SEV_ES: "sev_es", Platform.SEV_SNP: "sev_snp"}
DEVICE = "dev/sev"
_MODULE = "sys/module/kvm_amd"
_CAPACITIES = ("sys/fs/cgroup/misc.capacity", "sys/fs/cgroup/misc/misc.capacity")  # v2, v1
_MAX_READ = 1 << 20  # bytes; /proc/cpuinfo of the largest host stays below for its first processor
_CPUID_LEAF = 0x8000001F
_CPUID_BITS = {Platform.SEV: 1, Platform.SEV_ES: 3, Platform.SEV_SNP: 4}  # of EAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What a file of the kernel says.

    Attributes:
        text: The content; None where there is none to see.
        problem: Why there is none, where the file is there and cannot be read.
    """

    text: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A device file.

    Attributes:
        device: Whether it is a character device.
        mode: Permission bits.
        uid: Owner.
        gid: Group.
    """

    device: bool
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpuid:
    """What CPUID Fn8000_001F says, whatever BIOS and kernel make of it.

    Attributes:
        platforms: What the processor has.
        guests: Address space identifiers (ASIDs), one per guest.
        first_sev: The lowest ASID for SEV without SEV-ES; those below are SEV-ES' and SEV-SNP's.
    """

    platforms: frozenset[Platform]
    guests: int
    first_sev: int

    @classmethod
    def parse(cls, data: bytes) -> "Cpuid":
        """From the 16 bytes of EAX, EBX, ECX and EDX."""
        eax, _, ecx, edx = (int.from_bytes(data[at : at + 4], "little") for at in (0, 4, 8, 12))
        has = (platform for platform, bit in _CPUID_BITS.items() if eax >> bit & 1)
        return cls(platforms=frozenset(has), guests=ecx, first_sev=edx)

    def asids(self, platform: Platform) -> int:
        """How many guests of a platform can run at a time."""
        low = max(0, self.first_sev - 1)
        return max(0, self.guests - low) if platform is Platform.SEV else min(low, self.guests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The facts.

    Attributes:
        kernel: The kernel's release; empty where it is not known.
        processor: /proc/cpuinfo's fields of the first processor; None where it cannot be read.
        cpuid: What the processor itself says; None where it cannot be asked.
        cpuid_problem: Why it cannot.
        kvm_amd: Whether KVM for AMD's processors is.
        parameters: kvm_amd's switches, by name; a name is missing where the kernel knows it not.
        ccp: Whether the driver of AMD's secure processor is in the kernel.
        capacity: cgroups' misc.capacity.
        kvm_node: /dev/kvm.
        sev_node: /dev/sev.
    """

    kernel: str = ""
    processor: Mapping[str, str] | None = None
    cpuid: Cpuid | None = None
    cpuid_problem: str | None = None
    kvm_amd: bool = False
    parameters: Mapping[str, Text]
    ccp: bool = False
    capacity: Text = Text()
    kvm_node: Node | None = None
    sev_node: Node | None = None

    @property
    def flags(self) -> frozenset[str]:
        """The processor's features, as the kernel lists them."""
        return frozenset((self.processor or {}).get("flags", "").split())

    @property
    def capacities(self) -> Mapping[str, int]:
        """How many guests of a kind can run at a time, by cgroups' name: sev and sev_es."""
        pairs = (line.split() for line in (self.capacity.text or "").splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}

    def switch(self, platform: Platform) -> bool | None:
        """Whether kvm_amd has a platform on; None where it does not say."""
        value = self.parameters.get(PARAMETERS[platform], Text()).text
        return None if not value else value.upper() not in ("N", "0")


def look(root: Path = Path("/")) -> Machine:
    """Gather the facts; what cannot be seen is left open, nothing is raised.

    Args:
        root: The host's root directory.
    """
    cpuid, problem = _read_cpuid(root / "dev/cpu/0/cpuid")
    return Machine(
        kernel=(_read(root / "proc/sys/kernel/osrelease").text or ""),
        processor=_processor(_read(root / "proc/cpuinfo").text),
        cpuid=cpuid,
        cpuid_problem=problem,
        kvm_amd=(root / _MODULE).is_dir(),
        parameters=_parameters(root),
        ccp=(root / "sys/module/ccp").is_dir(),
        capacity=_capacity(root),
        kvm_node=_node(root / "dev/kvm"),
        sev_node=_node(root / DEVICE),
    )


def check_host(platform: Platform, root: Path = Path("/")) -> None:
    """See that the host can launch guests of a platform.

    Args:
        platform: The guest's; only SEV, SEV-ES and SEV-SNP need anything.
        root: The host's root directory.
    Raises:
        RefusedError: It cannot.
    """
    if platform not in PARAMETERS:
        return
    machine = Machine(parameters=_parameters(root), sev_node=_node(root / DEVICE))
    name = PARAMETERS[platform]
    if machine.switch(platform) is False:
        raise RefusedError(
            f"this host cannot launch {platform} guests: KVM has "
            f"{name}={machine.parameters[name].text}",
            where=str(root / _MODULE / "parameters" / name),
            hint="turn it on in the BIOS and for kvm_amd, or start the guest on another host",
        )
    if machine.sev_node is None:
        raise RefusedError(
            f"this host cannot launch {platform} guests: the device is missing",
            where=str(root / DEVICE),
            hint="load the module ccp and turn SEV on in the BIOS, or start the guest on another "
            "host",
        )


def _read(path: Path) -> Text:
    try:
        with path.open("rb") as stream:
            return Text(text=stream.read(_MAX_READ).decode("ascii", "replace").strip())
    except FileNotFoundError:
        return Text()
    except OSError as error:
        return Text(problem=f"{path}: {error.strerror or error}")


def _parameters(root: Path) -> dict[str, Text]:
    found = {name: _read(root / _MODULE / "parameters" / name) for name in PARAMETERS.values()}
    return {name: text for name, text in found.items() if text != Text()}


def _capacity(root: Path) -> Text:
    found = (_read(root / name) for name in _CAPACITIES)
    return next((text for text in found if text != Text()), Text())


def _processor(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _read_cpuid(path: Path) -> tuple[Cpuid | None, str | None]:
    """Ask the first processor, through the device of the module cpuid (cpuid(4))."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return None, f"{path}: {error.strerror or error}"
    try:
        # a leaf is the device's offset; a tree of files that stands for a host has the leaf alone
        at = _CPUID_LEAF if stat.S_ISCHR(os.fstat(fd).st_mode) else 0
        data = os.pread(fd, 16, at)
    except OSError as error:
        return None, f"{path}: {error.strerror or error}"
    finally:
        os.close(fd)
    return (Cpuid.parse(data), None) if len(data) == 16 else (None, f"{path}: no answer")


def _node(path: Path) -> Node | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return Node(
        device=stat.S_ISCHR(info.st_mode),
        mode=stat.S_IMODE(info.st_mode),
        uid=info.st_uid,
        gid=info.st_gid,
    )
