"""From a domain that asks for IGVM firmware to a guest, through libvirt."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from igvmfw import files, preflight, rooted, statefile, upkeep
from igvmfw.commandline import object_argument
from igvmfw.errors import EmulatorError, IgvmfwError, LibvirtError, PlatformError, UsageError
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import MEASURED, launch_digest
from igvmfw.platforms import Platform
from igvmfw.qemu.catalog import Entry
from igvmfw.rewrite import Rewritten, as_request, request_of, rewrite
from igvmfw.select import Candidate, Choice, candidates, check_platform, confirm
from igvmfw.virt.domain import Domain, Request
from igvmfw.virt.host import Capabilities, Connection, translated
from igvmfw.virt.record import File, OnChange, Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a domain is prepared.

    Attributes:
        entries: The firmware descriptors, in order of choice.
        root: The root directory that the descriptors' files are in.
        lock_memory: Let SEV and SEV-ES guests lock their memory; None leaves it as recorded.
        may_lock_memory: Whether libvirt can let them on their host.
        on_change: What a start does when the file is another by then; None leaves it as recorded.
        states: Where guests keep the state of their vTPMs; None when it is not known.
        remote: Whether the domain will run on another host, whose QEMU cannot be asked from here.
        uuid: For a domain without, where its vTPM's state needs one; None for a new one.
    """

    entries: Sequence[Entry] = ()
    root: Path = rooted.HOST
    lock_memory: bool | None = None
    may_lock_memory: bool = True
    on_change: OnChange | None = None
    states: Path | None = None
    remote: bool = False
    uuid: str | None = None


def prepare(
    domain: Domain, options: Options, *, capabilities: Capabilities | None = None
) -> Rewritten:
    """Choose a domain's firmware and rewrite the domain for libvirt.

    Args:
        domain: Any domain; one that asks for no IGVM firmware stays as it is.
        options: Where to choose from.
        capabilities: Of the host that will run it; None when that is not known.
    Raises:
        NoFirmwareError: No descriptor matches.
        RefusedError: The file is not for this guest, or the guest cannot take it.
        InputError: The domain or the file is damaged, or the file cannot be read.
    """
    request = request_of(domain)
    if request is None:
        return Rewritten(domain=domain)
    if capabilities is not None and capabilities.igvm:
        return Rewritten(
            domain=as_request(domain),
            changes=("passed on as it stands: this libvirt chooses IGVM firmware itself",),
        )
    sev_es = None if capabilities is None else capabilities.sev_es
    candidate, choice = _choose(domain, request, options, sev_es)
    state = None
    if candidate.storage is not None:
        stated = domain.emulator or (capabilities and capabilities.emulator)
        where = upkeep.Place(
            directory=options.states,
            emulator=Path(stated) if stated and not options.remote else None,
            root=options.root,
            uuid=options.uuid,
        )
        domain, state = upkeep.plan_for(domain, choice.platform, candidate.storage, where)
    return rewrite(
        domain,
        choice,
        lock_memory=options.lock_memory,
        may_lock_memory=options.may_lock_memory,
        on_change=options.on_change,
        state=state,
    )


def _choose(
    domain: Domain, request: Request, options: Options, sev_es: bool | None
) -> tuple[Candidate, Choice]:
    """The first that matches, with its file read; for plain guests, the first that is for them."""
    unfit: PlatformError | None = None
    for candidate in candidates(request, options.entries, sev_es=sev_es, root=options.root):
        if candidate.descriptor is not None:
            path = rooted.resolve(options.root, candidate.path)
            candidate = dataclasses.replace(candidate, path=str(path))
        object_argument(candidate.path)  # a path that QEMU will not get is not opened here either
        try:
            return candidate, read(candidate, request, domain)
        except PlatformError as error:
            unfit = error
            if candidate.descriptor is None or request.platform is not Platform.NATIVE:
                break
    assert unfit is not None  # there is always one, or an error
    raise unfit


def read(candidate: Candidate, request: Request, domain: Domain) -> Choice:
    """Read a candidate's file and judge it.

    Args:
        candidate: What was chosen by descriptor or path.
        request: What the domain asks for.
        domain: The domain, for its memory and vCPUs.
    Raises:
        InputError: The file cannot be read, or is damaged.
        PlatformError: It does not have the guest's platform.
        RefusedError: It is not for this guest.
    """
    with files.content_of(candidate.path) as content:
        try:
            image = IgvmFile.parse(content)
            check_platform(candidate, image)  # before the file is hashed
            choice = confirm(
                candidate,
                request,
                image,
                sha256=hashlib.sha256(content).hexdigest(),
                memory=domain.memory,
            )
            return dataclasses.replace(
                choice, measurement=_measurement(image, choice.platform, domain)
            )
        except IgvmfwError as error:
            if error.where is None or not error.where.startswith(candidate.path):
                error.within(candidate.path)
            raise


def define(connection: Connection, domain: Domain, *, validate: bool = False) -> str:
    """Define a prepared domain; returns its name.

    A state that its vTPM is to have is made last: an interruption leaves no state without domain,
    and defining the domain again goes on from there.

    Args:
        connection: Where.
        domain: What `prepare` gave.
        validate: Let libvirt check the XML against its schema.
    Raises:
        LibvirtError: libvirt refuses it.
        OutputError: The domain is defined, but its vTPM's state cannot be made.
        RefusedError: The domain is defined, but something else is in the place of the state.
    """
    with translated(f"domain '{domain.name}'"):
        import libvirt

        flags = libvirt.VIR_DOMAIN_DEFINE_VALIDATE if validate else 0
        name: str = connection.native.defineXMLFlags(_text(domain), flags).name()
    try:
        upkeep.make(connection, domain)
    except IgvmfwError as error:
        error.message = f"{name} is defined, but will not start: {error.message}"
        raise
    return name


def create(
    connection: Connection, domain: Domain, *, paused: bool = False, validate: bool = False
) -> str:
    """Start a prepared domain that is gone when it stops; returns its name.

    A state that its vTPM keeps stays then, for the next domain with this UUID.

    Args:
        connection: Where.
        domain: What `prepare` gave.
        paused: Leave the processors stopped.
        validate: Let libvirt check the XML against its schema.
    Raises:
        IgvmfwError: What would make the start fail, or launch something else than was chosen, as
            the hook finds it, before libvirt is asked.
        OutputError: The vTPM's state cannot be made.
        RefusedError: Something else is in the place of the state.
        LibvirtError: libvirt or QEMU refuses it.
    """
    made = upkeep.make(connection, domain)
    try:
        check_start(connection, domain)
        with translated(f"domain '{domain.name}'"):
            import libvirt

            flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
            flags |= libvirt.VIR_DOMAIN_START_VALIDATE if validate else 0
            name: str = connection.native.createXML(_text(domain), flags).name()
    except BaseException:
        # an interrupt can come when the guest runs already, and a lost connection leaves it open
        if made is not None and _is_gone(connection, domain):
            statefile.remove(made)
        raise
    return name


def _is_gone(connection: Connection, domain: Domain) -> bool:
    """Whether libvirt says that it has no such domain, so that nothing has its vTPM's state."""
    import libvirt

    try:
        connection.native.lookupByUUIDString(domain.uuid)
    except libvirt.libvirtError as error:
        return bool(error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)
    return False


def start(
    connection: Connection,
    name: str,
    *,
    paused: bool = False,
    bypass_cache: bool = False,
    force_boot: bool = False,
    warn: Callable[[str], None] = lambda message: None,
) -> Domain:
    """Start a defined domain; returns what libvirt has of it.

    Args:
        connection: Where.
        name: The domain's name or UUID.
        paused: Leave the processors stopped.
        bypass_cache: Do not use the host's cache when loading a saved state.
        force_boot: Drop a saved state and boot anew.
        warn: Gets what does not stop the start, such as a changed file, or another host.
    Raises:
        IgvmfwError: What would make the start fail, or launch something else than was chosen, as
            the hook finds it, before libvirt is asked.
        LibvirtError: There is no such domain, or libvirt or QEMU refuses it.
    """
    native = connection.find(name)
    with translated(f"domain '{name}'"):
        import libvirt

        if native.isActive():
            raise LibvirtError("already running", where=f"domain '{name}'")
        flags = (
            (libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)
            | (libvirt.VIR_DOMAIN_START_BYPASS_CACHE if bypass_cache else 0)
            | (libvirt.VIR_DOMAIN_START_FORCE_BOOT if force_boot else 0)
        )
        domain = Domain.parse(native.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE).encode())
        if recorded(domain) is not None and connection.is_remote:
            warn(f"the IGVM file and QEMU are on {connection.host}: not checked from here")
        check_start(connection, domain, warn=warn)
        native.createWithFlags(flags)
    return domain


def fetch(
    connection: Connection,
    name: str,
    *,
    inactive: bool = False,
    security_info: bool = False,
    update_cpu: bool = False,
    migratable: bool = False,
) -> Domain:
    """What libvirt has of a domain.

    Args:
        connection: Where.
        name: The domain's ID, UUID or name.
        inactive: What the next start will use, also while it runs.
        security_info: With passwords and the like.
        update_cpu: With the CPU model brought in line with the host.
        migratable: In the form that can be sent to another host.
    Raises:
        LibvirtError: There is no such domain, or reading it is not allowed.
    """
    native = connection.find(name, by_id=True)
    with translated(f"domain '{name}'"):
        import libvirt

        flags = (
            (libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0)
            | (libvirt.VIR_DOMAIN_XML_SECURE if security_info else 0)
            | (libvirt.VIR_DOMAIN_XML_UPDATE_CPU if update_cpu else 0)
            | (libvirt.VIR_DOMAIN_XML_MIGRATABLE if migratable else 0)
        )
        return Domain.parse(native.XMLDesc(flags).encode())


def undefine(
    connection: Connection,
    name: str,
    *,
    nvram: bool | None = None,
    tpm: bool | None = None,
    managed_save: bool = False,
    snapshots_metadata: bool = False,
    checkpoints_metadata: bool = False,
) -> str:
    """Remove a domain's definition; returns its name.

    Args:
        connection: Where.
        name: The domain's ID, UUID or name.
        nvram: Remove the file of UEFI variables and the state of the firmware's vTPM (True) or
            keep them (False), where there are any.
        tpm: Remove the state of the TPM that libvirt emulates (True) or keep it (False); None does
            what libvirt does by itself.
        managed_save: Remove a saved state.
        snapshots_metadata: Remove what libvirt knows of snapshots.
        checkpoints_metadata: Remove what libvirt knows of checkpoints.
    Raises:
        LibvirtError: There is no such domain, or libvirt refuses.
        RefusedError: The vTPM has a state, and `nvram` does not say what shall become of it.
        OutputError: The state cannot be removed from here.
    """
    native = connection.find(name, by_id=True)
    kept = upkeep.find(connection, fetch(connection, name, inactive=True))
    upkeep.check_undefine(name, kept, nvram=nvram)
    with translated(f"domain '{name}'"):
        import libvirt

        nvram_flag = {
            None: 0,
            True: libvirt.VIR_DOMAIN_UNDEFINE_NVRAM,
            False: libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM,
        }[nvram]
        tpm_flag = {
            None: 0,
            True: libvirt.VIR_DOMAIN_UNDEFINE_TPM,
            False: libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM,
        }[tpm]
        flags = (
            nvram_flag
            | tpm_flag
            | (libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE if managed_save else 0)
            | (libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA if snapshots_metadata else 0)
            | (libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA if checkpoints_metadata else 0)
        )
        removed: str = native.name()
        native.undefineFlags(flags)
    if nvram and kept is not None:
        statefile.remove(kept.path)  # last: libvirt may refuse
    return removed


def recorded(domain: Domain) -> File | None:
    """The IGVM file that a rewritten domain was given; None for any other domain.

    Args:
        domain: Such as `prepare` made it, or libvirt has it.
    Raises:
        DomainError: igvmfw's record in the domain is damaged.
    """
    record = Record.find(domain)
    return None if record is None else record.file


def started(connection: Connection, domain: Domain) -> File | None:
    """The IGVM file of a domain as it is now, with the launch digest for its vCPUs of now.

    Both may differ from what was recorded: vCPUs can be edited, a changed file may be allowed.

    Args:
        connection: Where the domain is.
        domain: What libvirt has of it.
    Returns:
        None for a domain that was not rewritten; without digest where the file cannot be read.
    Raises:
        DomainError: igvmfw's record in the domain is damaged.
    """
    file = recorded(domain)
    if file is None:
        return None
    if not connection.is_remote:
        with contextlib.suppress(IgvmfwError), files.content_of(file.path) as content:
            image = IgvmFile.parse(content)
            sha256 = hashlib.sha256(content).hexdigest()
            measurement = _measurement(image, file.platform, domain)
            return dataclasses.replace(file, sha256=sha256, measurement=measurement)
    return dataclasses.replace(file, measurement=None)


def check_start(
    connection: Connection, domain: Domain, *, warn: Callable[[str], None] = lambda message: None
) -> None:
    """See that a prepared domain can be started, as libvirt's hook does.

    On another host only the domain itself can be looked at; libvirt and QEMU there find out.

    Args:
        connection: Where the domain is to run.
        domain: What `prepare` gave, or what libvirt has of it.
        warn: Gets what does not stop the start.
    Raises:
        RefusedError: QEMU would get another file, the guest's platform or policy is another
            since, the file changed, QEMU would not take it, the host cannot do the platform, or
            the vTPM's state is not the domain's.
        InputError: The file is missing, unreadable or damaged, or the domain's record is, or the
            vTPM's state is missing.
        EmulatorError: The emulator does not take IGVM files, or cannot give the vTPM its state.
    """
    file = recorded(domain)
    if file is None:
        return
    if connection.is_remote:
        preflight.check_domain(domain, file)
        upkeep.check(domain, here=False)
        return
    emulator = domain.emulator
    if emulator is None:
        emulator = connection.capabilities(
            emulator=None, machine=domain.os.machine, kind=domain.type
        ).emulator
    try:
        preflight.check_start(domain, emulator=emulator, warn=warn)
    except EmulatorError as error:
        if error.hint:
            error.hint += f"; name another in <emulator> of {domain.name}"
        raise


def _measurement(image: IgvmFile, platform: Platform, domain: Domain) -> str | None:
    if platform not in MEASURED:
        return None
    try:
        return launch_digest(image, platform, vcpus=domain.vcpus).hex()
    except UsageError:
        return None  # depends on the CPU model of the host that will run it


def _text(domain: Domain) -> str:
    return domain.write().decode("utf-8-sig")
