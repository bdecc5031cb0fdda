"""The state of a vTPM: which file a domain's is, what it starts from, and whether it is usable.

Nothing here touches a file: `igvmfw.statefile` does.

A file is named after the domain's UUID, which stays when a domain is renamed, edited or defined
again; so no record has to be kept of it, and it is found again after anything that was interrupted.
"""

from collections.abc import Collection
from pathlib import Path

from igvmfw import cocoonfs
from igvmfw.commandline import check_disk, has_state
from igvmfw.errors import DomainError, IgvmfwError, RefusedError, UsageError
from igvmfw.qemu import svsmdisk
from igvmfw.qemu.descriptor import StorageInterface, VtpmStorage
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import Record, State


def path_of(directory: Path, uuid: str) -> Path:
    """The file of a domain's state.

    The name is also that of the AppArmor profile that libvirt gives the domain
    (src/security/security_apparmor.c, get_profile_name), for a rule that lets each guest open its
    own state alone.

    Args:
        directory: Where the connection's guests keep theirs.
        uuid: The domain's UUID, in libvirt's spelling.
    """
    return directory / f"libvirt-{uuid}.raw"


def plan(
    domain: Domain, storage: VtpmStorage, directory: Path | None, *, planes: bool = False
) -> State:
    """What firmware that keeps its vTPM's state needs.

    Args:
        domain: The domain; it has a UUID.
        storage: What the firmware's descriptor asks for.
        directory: Where the connection's guests keep their states; None when it is not known.
        planes: Whether QEMU is told which plane of the guest the disk belongs to.
    Raises:
        RefusedError: Nothing can be planned for what the descriptor asks for.
        DomainError: The domain's UUID is none.
    """
    if storage.interface is StorageInterface.PFLASH:
        return State(interface=storage.interface, size=storage.size_bytes)
    svsmdisk.check_format(storage.format)
    if storage.template is None:
        cocoonfs.check_size(storage.size_bytes)
    if directory is None:
        raise RefusedError(
            "cannot tell where that host's user keeps the state of a vTPM",
            hint="define the domain on that host itself, or for its system (…/system)",
        )
    uuid = domain.uuid
    if uuid is None:
        raise UsageError("a domain without UUID cannot have a vTPM's state")
    return State(
        interface=storage.interface,
        size=storage.size_bytes,
        path=str(path_of(directory, uuid)),
        template=storage.template,
        planes=planes,
    )


def recorded(domain: Domain) -> State | None:
    """Where a rewritten domain's vTPM keeps its state; None for one without.

    Raises:
        DomainError: Someone damaged the record.
    """
    record = Record.find(domain)
    return None if record is None else record.state


def check_domain(domain: Domain, state: State) -> None:
    """See that a domain is given its own state, and no other's.

    Args:
        domain: The domain, as libvirt has it.
        state: What its record says.
    Raises:
        EmulatorError: The firmware asks for what QEMU does not have.
        RefusedError: It is another domain's, QEMU is not given it, or is told more of it.
    """
    svsmdisk.check_interface(state.interface)
    again = "define the domain again: igvmfw dumpxml NAME | igvmfw define -"
    name = path_of(Path("/"), domain.uuid or "").name
    if state.path is None or Path(state.path).name != name:
        raise RefusedError(
            f"the vTPM's state that {domain.name} records is another domain's: its own would be "
            f"{name}",
            where=state.path,
            hint=f"a clone gets a state of its own: {again}",
        )
    if not has_state(domain, state):
        raise RefusedError(
            f"{domain.name} records this state of its vTPM, which QEMU is not given as the "
            "firmware needs it",
            where=state.path,
            hint=again,
        )
    check_disk(domain, state)


def check_emulator(
    domain: Domain, state: State, properties: Collection[str], emulator: str
) -> None:
    """See that an emulator can give the firmware the state of its vTPM.

    Args:
        domain: The domain.
        state: What its record says.
        properties: Of the domain's machine in the emulator.
        emulator: The emulator's path, for the message.
    Raises:
        EmulatorError: It cannot.
    """
    svsmdisk.check_interface(state.interface)
    svsmdisk.check_machine(properties, domain.os.machine, emulator)


def missing(path: str, name: str | None, *, where: str = "") -> IgvmfwError:
    """The error of a domain whose vTPM's state is not there.

    Args:
        path: The file.
        name: The domain's name.
        where: What else is known of it.
    """
    return DomainError(
        f"the state of {name or 'the domain'}'s vTPM is missing{where}",
        where=path,
        hint="put it back from a backup, or begin with a new one: igvmfw dumpxml NAME | igvmfw "
        "define -",
    )


def check_size(state: State, size: int, name: str | None) -> str | None:
    """See that a vTPM's state has not lost what was in it.

    One that is smaller than recorded may be whole: it stays as it is where the firmware's
    descriptor asks for more later.

    Args:
        state: What the domain's record says.
        size: The file's, in bytes.
        name: The domain's name.
    Returns:
        A warning, where the file is smaller than recorded.
    Raises:
        DomainError: The file is empty.
    """
    if size == 0:
        raise DomainError(
            f"the state of {name or 'the domain'}'s vTPM is empty",
            where=state.path,
            hint="put it back from a backup, or remove it and begin with a new one: igvmfw "
            "dumpxml NAME | igvmfw define -",
        )
    if size >= state.size:
        return None
    return (
        f"{state.path}: the state of {name or 'the domain'}'s vTPM has {size} bytes, recorded are "
        f"{state.size}: unless the descriptor asked for less when it was made, it was cut "
        "short: put it back from a backup"
    )
