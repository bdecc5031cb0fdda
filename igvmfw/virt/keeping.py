"""Where a connection's guests keep what outlives them, and which user their QEMU runs as.

Source: libvirt, src/qemu/qemu_conf.c (virQEMUDriverConfigNew: the directories of the system's, the
user's and the embedded driver; the state of a vTPM lies beside `nvram`), docs/formatcaps.rst and
docs/formatdomain.rst ("Security label": the model dac is the owner that QEMU runs as).
"""

import contextlib
import grp
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from igvmfw.errors import DomainError
from igvmfw.virt import embedded
from igvmfw.virt.document import Document
from igvmfw.virt.domain import Domain, place

FOLDER = "igvmfw"
SYSTEM = Path("/var/lib/libvirt/qemu")


def state_directory(uri: str | None) -> Path | None:
    """Where the guests of a connection keep the state of their vTPMs.

    Args:
        uri: The connection's; None for the system's guests, or those of a user who is not root.
    Returns:
        None where only the host itself knows: the guests of a user there.
    Raises:
        UsageError: The embedded driver's URI names no directory.
    """
    if uri is None:
        return SYSTEM / FOLDER if os.geteuid() == 0 else _of_user()
    root = embedded.root_of(uri)
    if root is not None:
        return root / "lib/qemu" / FOLDER
    parts = urlsplit(uri)
    if parts.path == "/session" and parts.hostname:
        return None
    # root's own session is the system's driver in another process: it has its directories
    return _of_user() if parts.path == "/session" and os.geteuid() != 0 else SYSTEM / FOLDER


def _of_user() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME", "")
    home = Path(base) if base.startswith("/") else Path.home() / ".config"
    return home / "libvirt/qemu" / FOLDER


def owner(domain: Domain, capabilities: str) -> tuple[int, int] | None:
    """The user and group that a domain's QEMU runs as.

    Args:
        domain: The domain.
        capabilities: libvirt's capabilities of the host.
    Returns:
        None where libvirt does not say: QEMU runs as the one who runs libvirt.
    Raises:
        DomainError: The domain names a user or group that this host does not have.
    """
    for label in domain.root.findall("seclabel"):
        text = label.findtext("label") or ""
        if label.get("model") == "dac" and label.get("type") == "static" and text:
            return _parse(text, place(label))
    for model in Document.parse(capabilities.encode()).root.findall("host/secmodel"):
        if model.findtext("model") != "dac":
            continue
        labels = {label.get("type"): label.text or "" for label in model.findall("baselabel")}
        stated = labels.get(domain.type) or next(iter(labels.values()), "")
        return _parse(stated, "libvirt's capabilities") if stated else None
    return None


def _parse(label: str, where: str) -> tuple[int, int]:
    """`USER:GROUP`, each a name, or a number after an optional `+`."""
    user, _, group = label.strip().partition(":")
    uid = _number(user, lambda name: pwd.getpwnam(name).pw_uid)
    gid = _number(group, lambda name: grp.getgrnam(name).gr_gid)
    if uid is None or gid is None:
        raise DomainError(
            f"{label[:60]!r} is no user and group of this host", where=where, hint="write +UID:+GID"
        )
    return uid, gid


def _number(text: str, find: Callable[[str], int]) -> int | None:
    digits = text.removeprefix("+")
    if digits.isascii() and digits.isdigit() and len(digits) < 11:
        return int(digits)
    with contextlib.suppress(KeyError, ValueError):
        return find(text)
    return None
