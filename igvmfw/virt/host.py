"""Connections to libvirt, what a host offers, and libvirt's errors as ours."""

import contextlib
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from igvmfw.errors import LibvirtError, OutputError
from igvmfw.virt import embedded, keeping
from igvmfw.virt.document import Document
from igvmfw.virt.domain import Domain

_LOG_VARIABLES = ("LIBVIRT_DEBUG", "LIBVIRT_LOG_FILTERS", "LIBVIRT_LOG_OUTPUTS")
_ID = re.compile("[0-9]{1,9}")
_UUID = re.compile("[0-9A-Fa-f]{8}-?([0-9A-Fa-f]{4}-?){3}[0-9A-Fa-f]{12}")
_CAP_SYS_RESOURCE = 24  # linux/capability.h
# remedies for what libvirt and QEMU say, by a part of the message
_REMEDIES = (
    (
        r"Failed to parse (user|group) '",
        "this libvirt was built to run guests as that user, which does not exist here: install "
        "libvirt-daemon-system (Debian, Ubuntu), or make it with useradd --system --user-group",
    ),
    (
        r"driver\.pid|[Ff]ailed to acquire pid file",
        "another process has this embedded driver's directory open: wait for it, or use another",
    ),
    (
        r"Cannot open embedded driver .* already open",
        "a process can use one directory in its lifetime: begin another process",
    ),
    (
        r"socket path.*too long",
        "use a shorter directory for the embedded driver: QEMU's sockets lie below it",
    ),
    (
        r"already exists with uuid",
        "to define that domain anew, put its <uuid> into the XML, which igvmfw dumpxml shows; to "
        "change it, use igvmfw edit",
    ),
    (
        r"is already defined with uuid",
        "to rename that domain, use virsh domrename; for another domain, remove <uuid>",
    ),
    (
        r"cannot undefine domain with nvram",
        "--nvram removes the file of UEFI variables, --keep-nvram keeps it",
    ),
    (r"managed save image exists", "--managed-save removes the saved state, too"),
    (r"cannot delete inactive domain with \d+ snapshot", "give --snapshots-metadata, too"),
    (r"cannot delete inactive domain with \d+ checkpoint", "give --checkpoints-metadata, too"),
    (
        r"virConnectGetDomainCapabilities",  # not supported by the connection driver
        "IGVM firmware is for guests of QEMU: give a qemu:// URI with -c",
    ),
    (r"^Domain not found", "virsh list --all shows those there are; is it another URI's (-c)?"),
    (r"Cannot check QEMU binary", "name a QEMU that is there in the domain's <emulator>"),
    (r"Failed to connect socket", "start libvirtd or virtqemud, or give another URI with -c"),
    (
        # as it is read, and as the schema has it, which names no value
        r"attribute 'type' in element 'launchSecurity': 'sev-snp'|Extra element launchSecurity ",
        "this libvirt does not know such a guest: SEV-SNP needs libvirt 10.5 or newer",
    ),
    (
        r"-no-acpi: invalid option",
        "this libvirt is older than this QEMU: put <features><acpi/></features> into the domain",
    ),
    (
        r"End of file while reading|client socket is closed|Cannot recv data: : |Broken pipe",
        "the connection was lost, perhaps after libvirt had done what it was asked: look with "
        "virsh list --all before trying again",
    ),
    (r"does not accept value 'igvm-cfg'", "this QEMU has no IGVM: name another in <emulator>"),
    (
        r"does not describe a compatible supported platform",
        "the file has not the guest's platform: choose another file",
    ),
    (
        r"cannot limit locked memory",
        "libvirt may not lift the limit on locked memory here: give it the capability "
        "CAP_SYS_RESOURCE, or prepare the domain with --no-lock-memory",
    ),
    (
        r"failed to register region .*Cannot allocate memory",
        "the guest may not lock its memory: put <memoryBacking><locked/></memoryBacking> into it",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a host offers to a domain.

    Attributes:
        emulator: The QEMU binary that libvirt takes.
        igvm: Whether libvirt itself chooses IGVM firmware, so that a request can be passed on as
            it stands.
        sev: Whether SEV guests can be started.
        sev_es: Whether SEV-ES guests can be started.
        sev_snp: Whether SEV-SNP guests can be started.
    """

    emulator: str | None
    igvm: bool
    sev: bool
    sev_es: bool
    sev_snp: bool = False

    @classmethod
    def parse(cls, xml: str) -> "Capabilities":
        """From libvirt's domain capabilities.

        Source: docs/formatdomaincaps.rst; maxESGuests is what virt-install goes by, too.
        """
        root = Document.parse(xml.encode()).root
        sev = root.find("features/sev")
        supported = sev is not None and sev.get("supported") == "yes"
        guests = root.findtext("features/sev/maxESGuests", "0").strip()
        values = [
            value.text
            for path in ("os/enum[@name='firmware']", "os/loader/enum[@name='type']")
            for value in root.findall(f"{path}/value")
        ]
        kinds = root.findall("features/launchSecurity/enum[@name='sectype']/value")
        return cls(
            emulator=root.findtext("path"),
            igvm="igvm" in values,
            sev=supported,
            sev_es=supported and guests.isdigit() and int(guests) > 0,
            sev_snp="sev-snp" in [kind.text for kind in kinds],
        )


@dataclass(frozen=True, slots=True)
class Connection:
    """An open connection to libvirt; `native` is libvirt-python's own object."""

    native: Any

    @property
    def uri(self) -> str:
        """The URI that libvirt uses."""
        with translated():
            uri: str = self.native.getURI()
        return uri

    @property
    def version(self) -> tuple[int, int, int]:
        """The release of the libvirt that answers, which is not always the library's here."""
        with translated():
            number: int = self.native.getLibVersion()
        return number // 1_000_000, number // 1000 % 1000, number % 1000

    @property
    def is_remote(self) -> bool:
        """Whether guests run on another host, where files cannot be looked at from here."""
        return self.host is not None

    @property
    def host(self) -> str | None:
        """The other host that guests run on; None for this one."""
        return urlsplit(self.uri).hostname or None

    @property
    def is_system(self) -> bool:
        """Whether guests belong to the system, not to the user who runs this."""
        return urlsplit(self.uri).path == "/system"

    @property
    def may_lock_memory(self) -> bool:
        """Whether libvirt can lift the limit on the memory that a guest locks.

        The system's daemon can.  The driver of a user, or in this process, can where the limit is
        none, or with CAP_SYS_RESOURCE (setrlimit(2)); elsewhere `<locked/>` stops every start,
        while without it a guest starts that fits into the limit.
        """
        if self.is_remote or self.is_system:
            return True
        if resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] == resource.RLIM_INFINITY:
            return True
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            effective = next(line for line in status if line.startswith("CapEff:"))
        return bool(int(effective.split()[1], 16) >> _CAP_SYS_RESOURCE & 1)

    def capabilities(
        self, *, emulator: str | None, machine: str | None, kind: str | None
    ) -> Capabilities:
        """What the host offers to an x86_64 domain.

        Args:
            emulator: The QEMU binary; None for libvirt's default.
            machine: The machine type; None for QEMU's default.
            kind: The domain's type, such as kvm; None for libvirt's default.
        Raises:
            LibvirtError: The host cannot run such a domain at all.
        """
        with translated():
            xml: str = self.native.getDomainCapabilities(emulator, "x86_64", machine, kind, 0)
        return Capabilities.parse(xml)

    @property
    def state_directory(self) -> Path | None:
        """Where guests keep the state of their vTPMs; None where only the host itself knows."""
        return keeping.state_directory(self.uri)

    def owner(self, domain: Domain) -> tuple[int, int] | None:
        """The user and group that a domain's QEMU runs as; None for the one that runs libvirt.

        Raises:
            DomainError: The domain names a user or group that this host does not have.
        """
        with translated():
            xml: str = self.native.getCapabilities()
        return keeping.owner(domain, xml)

    def find(self, name: str, *, by_id: bool = False) -> Any:
        """A domain by its UUID or name, in the order in which virsh tries them.

        Args:
            name: The UUID or name.
            by_id: Take it for the ID of a running domain first.
        Raises:
            LibvirtError: There is none.
        """
        with translated(f"domain '{name}'"):
            import libvirt

            if by_id and _ID.fullmatch(name):
                with contextlib.suppress(libvirt.libvirtError):
                    return self.native.lookupByID(int(name))
            if _UUID.fullmatch(name):
                with contextlib.suppress(libvirt.libvirtError):
                    return self.native.lookupByUUIDString(name)
            return self.native.lookupByName(name)


@contextlib.contextmanager
def connect(uri: str | None = None) -> Iterator[Connection]:
    """Open a connection, closed at the end of the `with` block.

    Args:
        uri: Any URI of libvirt; None for its default (LIBVIRT_DEFAULT_URI, its configuration, or
            what it finds).  For the embedded driver, its directory and event loop are looked after.
    Raises:
        LibvirtError: libvirt-python is missing, or libvirt cannot be reached.
        OutputError: The embedded driver's directory cannot be made.
        UsageError: The embedded driver's URI names no directory.
    """
    wanted = uri or default_uri()
    root = embedded.root_of(wanted) if wanted else None
    if root is not None:
        with _logging_to(embedded.prepare(root)):
            libvirt = _library()
    else:
        libvirt = _library()
    with contextlib.ExitStack() as stack:
        if root is not None:
            libvirt.virEventRegisterDefaultImpl()
            loop = embedded.EventLoop(libvirt)
            loop.start()
            stack.callback(loop.stop)
        with translated(wanted or "libvirt"):
            native = libvirt.open(wanted)
        stack.callback(_close, native)
        yield Connection(native)


def default_uri() -> str | None:
    """The URI that the environment names, as virsh takes it."""
    variables = ("VIRSH_DEFAULT_CONNECT_URI", "LIBVIRT_DEFAULT_URI")
    return next(filter(None, map(os.environ.get, variables)), None)


@contextlib.contextmanager
def _logging_to(log: Path) -> Iterator[None]:
    """Have libvirt log to a file: without a daemon it would to stderr.

    It reads the variable once, as the library is loaded, and takes a space for the end of a path.
    """
    if any(os.environ.get(name) for name in _LOG_VARIABLES):
        yield
        return
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OutputError(
            f"cannot write libvirt's own messages: {error.strerror or error}",
            where=str(log),
            hint="name a directory that you may write to",
        ) from None
    os.environ["LIBVIRT_LOG_OUTPUTS"] = f"3:file:/proc/self/fd/{fd}"
    try:
        yield
    finally:
        del os.environ["LIBVIRT_LOG_OUTPUTS"]
        os.close(fd)


@contextlib.contextmanager
def translated(where: str = "libvirt") -> Iterator[None]:
    """Turn libvirt's errors into ours, with a remedy where there is a known one.

    Args:
        where: What libvirt was asked about.
    Raises:
        LibvirtError: What libvirt said.
    """
    libvirt = _library()
    try:
        yield
    except libvirt.libvirtError as error:
        message = (error.get_error_message() or str(error)).strip()
        hint = next((hint for part, hint in _REMEDIES if re.search(part, message, re.S)), None)
        raise LibvirtError(message, where=where, hint=hint) from None


def _library() -> Any:
    try:
        import libvirt
    except (ImportError, SystemError) as error:  # SystemError: libvirt itself did not initialize
        raise LibvirtError(
            f"libvirt-python cannot be loaded: {error}",
            hint="install python3-libvirt (Debian, Ubuntu, Fedora, openSUSE), or igvmfw[libvirt] "
            "with pip",
        ) from None
    # libvirt-python raises what went wrong; by default libvirt prints it as well
    libvirt.registerErrorHandler(lambda context, error: None, None)
    return libvirt


def _close(native: Any) -> None:
    import libvirt

    with contextlib.suppress(libvirt.libvirtError):
        native.close()
