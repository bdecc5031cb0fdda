"""libvirt's embedded QEMU driver: guests without a daemon, in this process.

The driver needs an event loop that runs as long as a connection is open, and keeps everything it
has below one directory (docs/drvqemu.rst, "Embedded driver").  A guest started with it outlives
the process: QEMU goes on running, and the next one that opens the same directory finds it.  Only
one process at a time can have a directory open, and a process one directory in its lifetime.
"""

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

from igvmfw.errors import OutputError, UsageError

# What a root without a configuration gets.  The driver would otherwise reach for daemons that it
# does not have here: virtlogd for logs, and namespaces and cgroups that it may not set up.
_CONFIGURATION = """\
# Written by igvmfw, as there was none: libvirt's embedded driver works without any daemon.
# igvmfw never changes this file; see /etc/libvirt/qemu.conf for what can stand here.
stdio_handler = "file"
namespaces = []
security_driver = "none"
remember_owner = 0
cgroup_controllers = []
"""
_AS_ROOT = """\
user = "root"
group = "root"
"""


def root_of(uri: str) -> Path | None:
    """The directory of an embedded driver's URI; None for any other URI.

    Raises:
        UsageError: The URI names no absolute directory.
    """
    try:
        parts = urlsplit(uri)
        roots = [value for name, value in _parameters(parts.query) if name == "root"]
    except ValueError:
        return None  # libvirt says what is wrong with it
    if parts.scheme != "qemu" or parts.netloc or parts.path != "/embed":
        return None
    if len(roots) != 1 or not os.path.isabs(roots[0]):
        raise UsageError(
            "the embedded driver needs an absolute directory",
            where=uri,
            hint="write qemu:///embed?root=/some/directory",
        )
    return Path(roots[0])


def _parameters(query: str) -> Iterator[tuple[str, str]]:
    """As libvirt reads them (src/util/viruri.c, virURIParseParams): a plus is no space."""
    for part in re.split("[&;]", query):
        name, _, value = part.partition("=")
        yield unquote(name), unquote(value)


def prepare(root: Path) -> Path:
    """Make a root usable: its directory, and a configuration where there is none.

    Args:
        root: The directory that the driver keeps everything below.
    Returns:
        The file for libvirt's own messages.
    Raises:
        OutputError: The directory cannot be made, or is not writable.
    """
    try:
        for directory in (root / "etc", root / "log"):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        text = _CONFIGURATION + (_AS_ROOT if os.geteuid() == 0 else "")
        _write_new(root / "etc" / "qemu.conf", text.encode())
    except OSError as error:
        raise OutputError(
            f"cannot prepare the embedded driver's directory: {error.strerror or error}",
            where=str(root),
            hint="name a directory that you may write to",
        ) from None
    return root / "log" / "libvirt.log"


def _write_new(path: Path, data: bytes) -> None:
    """Write a whole file, or leave the one that is there."""
    if path.exists():
        return
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            os.fchmod(fd, 0o644)
            os.fsync(fd)
        # unlike a rename, a link never replaces what another process has put there meanwhile
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


@dataclass(slots=True)
class EventLoop:
    """libvirt's default event loop in a thread of its own."""

    libvirt: ModuleType
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Run the loop from now on; must happen before a connection is opened."""
        self._stopping.clear()
        # a daemon thread: a process that never closes its connection must still be able to end
        self._thread = threading.Thread(target=self._run, name="libvirt-events", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop, after the last connection was closed."""
        if self._thread is None:
            return
        self._stopping.set()
        # the loop sleeps until something happens; a timer that is not removed fires for ever
        self.libvirt.virEventAddTimeout(
            0, lambda timer, opaque: self.libvirt.virEventRemoveTimeout(timer), None
        )
        self._thread.join(timeout=5)
        self._thread = None

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.libvirt.virEventRunDefaultImpl()
