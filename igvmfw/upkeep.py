"""What happens to the state of a vTPM while its domain is defined, started and undefined."""

import contextlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from igvmfw import cocoonfs, rooted, state, statefile
from igvmfw.errors import EmulatorError, IgvmfwError, OutputError, RefusedError
from igvmfw.platforms import Platform
from igvmfw.qemu import emulator, svsmdisk
from igvmfw.qemu.descriptor import VtpmStorage
from igvmfw.virt.domain import Domain
from igvmfw.virt.host import Connection, translated
from igvmfw.virt.record import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a domain is going to run, as far as its vTPM's state is concerned.

    Attributes:
        directory: Where guests keep their states there; None when it is not known.
        emulator: The QEMU that will run it, where it is known and can be asked from here.
        root: The root directory that the descriptor's files are in.
        uuid: For a domain without; None for a new one.
    """

    directory: Path | None = None
    emulator: Path | None = None
    root: Path = rooted.HOST
    uuid: str | None = None


def plan_for(
    domain: Domain, platform: Platform, storage: VtpmStorage, where: Place
) -> tuple[Domain, State]:
    """Plan the state of a domain, which gets a UUID where it has none: the file is named by it.

    Args:
        domain: The domain.
        platform: The guest's.
        storage: What the firmware's descriptor asks for.
        where: Where it is going to run.
    Raises:
        RefusedError: Nothing can be planned for what the descriptor asks for.
        DomainError: The domain's UUID is none.
    """
    if storage.template is not None:
        template = rooted.resolve(where.root, storage.template)
        storage = storage.replace(template=str(template))
    if domain.uuid is None:
        domain = domain.copy()
        domain.add_uuid(where.uuid or str(uuid.uuid4()))
    planes = platform is Platform.SEV_SNP and _has_planes(domain, where.emulator)
    return domain, state.plan(domain, storage, where.directory, planes=planes)


def _has_planes(domain: Domain, path: Path | None) -> bool:
    if path is None:
        return False
    with contextlib.suppress(EmulatorError):  # the check before a start says what is wrong with it
        return svsmdisk.PLANE in emulator.machine_properties(path, domain.os.machine)
    return False


def unfinished(connection: Connection, domain: Domain) -> str | None:
    """The UUID of a domain whose definition was interrupted before its vTPM's state was made.

    libvirt gave it the UUID, so that its XML, defined again as it is, would be another domain of
    the same name, which libvirt refuses.

    Args:
        connection: Where the domain is.
        domain: What is to be defined.
    Returns:
        None where there is no such domain, or where that cannot be seen.
    """
    if connection.is_remote or domain.uuid is not None or domain.name is None:
        return None
    with contextlib.suppress(IgvmfwError, PermissionError):
        native = connection.find(domain.name)
        with translated():
            text: str = native.XMLDesc(0)
        found = Domain.parse(text.encode())
        kept = state.recorded(found)
        if kept is not None and kept.path is not None:
            state.check_domain(found, kept)
            if statefile.look(Path(kept.path)) is None:
                return found.uuid
    return None


def make(connection: Connection, domain: Domain) -> Path | None:
    """Make the state that was planned for a domain, where it has none yet.

    Args:
        connection: Where the domain is.
        domain: What `prepare` gave.
    Returns:
        The file, where it was made.
    Raises:
        OutputError: The file cannot be made, above all on another host.
        RefusedError: Something is in the file's place that is no state.
        InputError: The descriptor's template cannot be read.
    """
    kept = state.recorded(domain)
    if kept is None or kept.path is None:
        return None
    state.check_domain(domain, kept)
    if connection.is_remote:
        raise OutputError(
            f"the state of {domain.name}'s vTPM cannot be made on another host from here",
            where=kept.path,
            hint="the domain starts once it is there: define it on that host with igvmfw, or put "
            "a state there",
        )
    salt = os.urandom(cocoonfs.SALT_SIZE)
    path = Path(kept.path)
    made = statefile.make(
        path,
        size=kept.size,
        initial=cocoonfs.creation_header(kept.size, salt),
        template=None if kept.template is None else Path(kept.template),
        # only root can give files away, and asking can have libvirt look at every emulator
        owner=connection.owner(domain) if os.geteuid() == 0 else None,
    )
    return path if made else None


def check(
    domain: Domain, *, here: bool = True, warn: Callable[[str], None] = lambda message: None
) -> None:
    """See that a rewritten domain's vTPM has its state, before a guest is started.

    Args:
        domain: The domain.
        here: Whether it runs on this host; what lies on another, or where this user may not look,
            cannot be seen.
        warn: Gets what does not stop a start.
    Raises:
        EmulatorError: The firmware asks for what no QEMU has.
        RefusedError: QEMU is not given the domain's own state, or it is no file.
        DomainError: The state is missing or empty, or the record is damaged.
    """
    kept = state.recorded(domain)
    if kept is None:
        return
    state.check_domain(domain, kept)
    svsmdisk.check_interface(kept.interface)
    if not here or kept.path is None:
        return
    with contextlib.suppress(PermissionError):
        info = statefile.look(Path(kept.path))
        if info is None:
            raise state.missing(kept.path, domain.name)
        problem = state.check_size(kept, info.st_size, domain.name)
        if problem is not None:
            warn(problem)


def check_emulator(domain: Domain, path: Path) -> None:
    """See that an emulator can give a rewritten domain's firmware the state of its vTPM.

    Args:
        domain: The domain.
        path: Its emulator.
    Raises:
        EmulatorError: It cannot.
    """
    kept = state.recorded(domain)
    if kept is None:
        return
    svsmdisk.check_interface(kept.interface)
    properties = emulator.machine_properties(path, domain.os.machine)
    state.check_emulator(domain, kept, properties, str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The state of a domain that is about to be undefined.

    Attributes:
        path: The file.
        removable: Whether it can be removed from here.
    """

    path: Path
    removable: bool


def find(connection: Connection, domain: Domain) -> Kept | None:
    """The state that a domain has, by its UUID, also when its firmware was another since.

    Args:
        connection: Where the domain is.
        domain: What libvirt has of it.
    Returns:
        None where there is none; where that cannot be seen, what the domain's record says.
    """
    recorded = None
    with contextlib.suppress(IgvmfwError):
        recorded = state.recorded(domain)
    unseen = None
    if recorded is not None and recorded.path is not None:
        unseen = Kept(path=Path(recorded.path), removable=False)
    directory = connection.state_directory
    if connection.is_remote or directory is None or domain.uuid is None:
        return unseen
    path = state.path_of(directory, domain.uuid)
    try:
        found = statefile.look(path)
    except PermissionError:
        return unseen
    except RefusedError:
        return Kept(path=path, removable=False)
    if found is None:
        return None
    return Kept(path=path, removable=os.access(directory, os.W_OK | os.X_OK))


def check_undefine(name: str, kept: Kept | None, *, nvram: bool | None) -> None:
    """See that it was said what shall become of a state, and that it can be done.

    libvirt asks the same of a domain with a file of UEFI variables.

    Args:
        name: The domain's name.
        kept: Its state.
        nvram: Whether it shall be removed (True) or kept (False); None when nothing was said.
    Raises:
        RefusedError: Nothing was said.
        OutputError: It cannot be removed from here.
    """
    if kept is None or nvram is False:
        return
    if nvram is None:
        raise RefusedError(
            f"cannot undefine {name}, whose vTPM has a state",
            where=str(kept.path),
            hint="--nvram removes it, --keep-nvram keeps it for a domain with the same UUID",
        )
    if not kept.removable:
        raise OutputError(
            f"cannot remove the state of {name}'s vTPM from here",
            where=str(kept.path),
            hint="run igvmfw as root on the guest's host, or keep the state with --keep-nvram",
        )
