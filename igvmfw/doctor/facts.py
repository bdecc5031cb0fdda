"""What is known about a host before anything is judged."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from igvmfw.doctor.apparmor import Rules
from igvmfw.inventory import Row
from igvmfw.machine import Machine
from igvmfw.qemu.catalog import Catalog
from igvmfw.qemu.emulator import Emulator
from igvmfw.virt.host import Capabilities

HOOKS = "etc/libvirt/hooks"
HOOK = f"{HOOKS}/qemu.d/igvmfw"
HOOK_OFF = f"{HOOKS}/igvmfw.off"


class Manager(StrEnum):
    """The distribution's package manager, which its package names go with."""

    APT = "apt"
    DNF = "dnf"
    ZYPPER = "zypper"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Libvirt:
    """libvirt as it answers.

    Attributes:
        uri: What was asked.
        version: Of the library in the file system; None where there is none.
        answered: The release of what answered; None where nothing did.
        capabilities: What it offers to a domain; None where it did not say.
        failure: Why there is no answer, or none about what it offers.
        remedy: What libvirt's error is mended with.
        denied: Whether who asks is not allowed to.
        asked: Whether it was asked at all: another root's libvirt does not run here.
    """

    uri: str
    version: tuple[int, int, int] | None = None
    answered: tuple[int, int, int] | None = None
    capabilities: Capabilities | None = None
    failure: str | None = None
    remedy: str | None = None
    denied: bool = False
    asked: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An emulator that was found.

    Attributes:
        path: Where.
        origin: By what it was found, for people.
        emulator: What it answered; None where it did not.
        problem: Why it did not.
        untried: Whether it was not asked on purpose.
    """

    path: Path
    origin: str
    emulator: Emulator | None = None
    problem: str | None = None
    untried: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """A running daemon of libvirt that starts guests.

    Attributes:
        name: libvirtd or virtqemud.
        pid: Its process.
        started: Seconds since the epoch.
    """

    name: str
    pid: int
    started: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """The hook as installed.

    Attributes:
        executable: Whether libvirt would run it.
        off: Whether it was told to let every start pass.
        changed: When the file was last put there or changed, in seconds since the epoch.
        others: When the oldest of the other hooks for QEMU was; None where there is none.
        python: The interpreter it names; None where it names none.
        failure: Why igvmfw cannot be loaded by that one; None where it can, or nobody looked.
        unseen: Why nobody looked.
    """

    executable: bool
    off: bool
    changed: float
    others: float | None = None
    python: str | None = None
    failure: str | None = None
    unseen: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The user that QEMU runs as, with its groups."""

    name: str
    uid: int
    gids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What keeps guests apart from the host's files.

    Attributes:
        apparmor: Whether AppArmor is on; None where that cannot be seen.
        abstraction: Whether /etc/apparmor.d/abstractions/libvirt-qemu is there.
        rules: AppArmor's rules for all guests, which that file has or includes.
        selinux: Whether SELinux enforces its policy.
        types: SELinux' type of each IGVM file that could be seen.
    """

    apparmor: bool | None = False
    abstraction: bool = False
    rules: Rules = field(default_factory=Rules)
    selinux: bool = False
    types: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is judged.

    Attributes:
        root: The root directory that was looked at.
        privileged: Whether root looked.
        manager: The package manager.
        distribution: The distribution's name, for people.
        machine: Processor and kernel.
        module: Why libvirt's Python module cannot be loaded; None where it can.
        environment: igvmfw's interpreter, where it is a virtual environment's: the distribution's
            has not igvmfw then, nor need this one have the distribution's modules.
        libvirt: libvirt.
        account: The user that QEMU runs as; None where it does not exist.
        account_name: The name of that user.
        settings: What /etc/libvirt/qemu.conf sets, by name: a string, or those of a list.
        settings_problem: Why that could not be read; None where it could, or is not there.
        emulators: In the order found.
        catalog: The descriptors.
        rows: The same with their files.
        hook: The hook; None where it is not installed.
        hook_problem: Why nobody can see whether it is.
        daemons: Running ones.
        confinement: AppArmor and SELinux.
    """

    root: Path
    privileged: bool
    manager: Manager
    distribution: str
    machine: Machine
    module: str | None
    environment: str | None = None
    libvirt: Libvirt
    account: Account | None
    account_name: str
    settings: Mapping[str, tuple[str, ...]]
    settings_problem: str | None
    emulators: tuple[Found, ...]
    catalog: Catalog
    rows: tuple[Row, ...]
    hook: Hook | None
    hook_problem: str | None = None
    daemons: tuple[Daemon, ...]
    confinement: Confinement
