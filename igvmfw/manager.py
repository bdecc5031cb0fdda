"""What commands and managers ask for in one call: the steps put together, warnings as data."""

import contextlib
import dataclasses
import os
from pathlib import Path

from igvmfw import launch, rooted
from igvmfw.errors import IgvmfwError, LibvirtError
from igvmfw.qemu import catalog
from igvmfw.rewrite import Rewritten, check_guest, request_of
from igvmfw.upkeep import unfinished
from igvmfw.virt.domain import Domain
from igvmfw.virt.host import Connection
from igvmfw.virt.keeping import state_directory
from igvmfw.virt.record import File, OnChange


def prepare(
    domain: Domain,
    connection: Connection | None = None,
    *,
    root: Path = rooted.HOST,
    user: bool | None = None,
    lock_memory: bool | None = None,
    on_change: OnChange | None = None,
) -> Rewritten:
    """Choose a domain's firmware among this host's, and rewrite the domain for libvirt.

    Args:
        domain: Any domain; one that asks for no IGVM firmware stays as it is.
        connection: Where it will run; None when that is not known.
        root: Choose among the descriptors and files below this directory.
        user: Look into the user's own descriptor directories too; None does so where guests are
            the user's: on a connection that is not the system's, and without one unless root runs
            this.
        lock_memory: Let SEV and SEV-ES guests lock their memory, where libvirt may allow it; None
            leaves it as recorded, and is to let them where nothing is.
        on_change: What a start does when the file is another by then; None leaves it as recorded,
            and is to refuse where nothing is.  Both are looked for also in the definition that
            this one is to replace.
    Returns:
        The domain for `define` or `create`.  What could not be done or checked is among its
        warnings; when the call fails, it is in the error's notes.
    Raises:
        NoFirmwareError: No descriptor matches; each candidate is named with its reasons.
        RefusedError: The file is not for this guest, or the guest cannot take it.
        InputError: The domain or the file is damaged, or the file cannot be read.
        LibvirtError: The host cannot run such a domain at all.
    """
    if request_of(domain) is None:
        return Rewritten(domain=domain)
    warnings: list[str] = []
    capabilities = None
    may_lock_memory = True
    former = _chosen_before(connection, domain)
    if former is not None:
        lock_memory = former.lock_memory if lock_memory is None else lock_memory
        on_change = on_change or former.on_change
    if connection is not None:
        try:
            capabilities = connection.capabilities(
                emulator=domain.emulator, machine=domain.os.machine, kind=domain.type
            )
        except LibvirtError:
            check_guest(domain)  # says better what libvirt cannot run either
            raise
        if connection.is_remote:
            warnings.append(f"the firmware is chosen and checked here, not on {connection.host}")
        pinned = domain.security is not None and domain.security.type == "sev"
        may_lock_memory = connection.may_lock_memory
        if lock_memory is not False and pinned and not may_lock_memory:
            warnings.append(
                "<locked/> left out: libvirt may not lift the limit on locked memory here; a "
                "SEV guest starts if its memory fits into the limit (ulimit -l)"
            )
    if user is None:
        user = os.geteuid() != 0 if connection is None else not connection.is_system
    found = catalog.load(catalog.search_path(root, user=user), root)
    warnings += [str(problem) for problem in found.problems]
    options = launch.Options(
        entries=found.entries,
        root=root,
        lock_memory=lock_memory,
        may_lock_memory=may_lock_memory,
        on_change=on_change,
        states=state_directory(None if connection is None else connection.uri),
        remote=connection is not None and connection.is_remote,
        uuid=None if connection is None else unfinished(connection, domain),
    )
    try:
        rewritten = launch.prepare(domain, options, capabilities=capabilities)
    except IgvmfwError as error:
        for warning in warnings:
            error.add_note(warning)
        raise
    return dataclasses.replace(rewritten, warnings=(*warnings, *rewritten.warnings))


def _chosen_before(connection: Connection | None, domain: Domain) -> File | None:
    """What was chosen for the domain, or else for the definition that a request will replace."""
    file = launch.recorded(domain)
    if file is None and connection is not None:
        with contextlib.suppress(IgvmfwError):
            former = launch.fetch(connection, domain.uuid, inactive=True) if domain.uuid else None
            file = None if former is None else launch.recorded(former)
    return file
