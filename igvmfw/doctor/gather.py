"""The edge of `doctor`: looks at a host, and keeps what cannot be seen as such.

Nothing here is raised, and nothing waits without an end: libvirt is asked in a thread that is left
alone when it does not answer, other programs are ended.
"""

import contextlib
import importlib.util
import os
import pwd
import queue
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from igvmfw import files, rooted
from igvmfw.doctor import hooks
from igvmfw.doctor.apparmor import is_leftover
from igvmfw.doctor.apparmor import load as load_rules
from igvmfw.doctor.facts import (
    Account,
    Confinement,
    Facts,
    Found,
    Libvirt,
    Manager,
)
from igvmfw.errors import EmulatorError, IgvmfwError
from igvmfw.install import find_libvirt
from igvmfw.inventory import Row, take
from igvmfw.machine import Text, look
from igvmfw.qemu import emulator
from igvmfw.qemu.catalog import load, search_path
from igvmfw.virt.host import connect

_PATIENCE = 20.0  # seconds for libvirt: it asks an emulator that it does not know yet
_ANSWER = 5.0  # seconds for an emulator
_MAX_EMULATORS = 16
_MAX_CONFIGURATION = 1 << 20  # bytes
_QEMU_CONF = "etc/libvirt/qemu.conf"
# as libvirt's src/util/virconf.c reads them: a string, or a list of those over any lines
_STRING = r"""(?:"[^"\n]*"|'[^'\n]*')"""
_SETTING = re.compile(
    r"^[ \t]*(user|namespaces|security_driver)[ \t]*=[ \t]*"
    rf"({_STRING}|\[[^\[\]=#]*\])[ \t]*(?:[#;].*)?$",
    re.M,
)
_APPARMOR = "etc/apparmor.d"
_GUESTS = "abstractions/libvirt-qemu"  # there: the rules for all guests
_USERS = {Manager.APT: "libvirt-qemu"}  # Debian's and Ubuntu's; everywhere else it is qemu
_DENIED = re.compile(r"Permission denied|authentication|polkit|access denied", re.I)

Step = Callable[[str], None]


def gather(uri: str, *, root: Path = rooted.HOST, step: Step = lambda what: None) -> Facts:
    """Look at a host.

    Args:
        uri: libvirt's, of this host.
        root: Another root directory; what runs is not asked then, only files are looked at.
        step: Told what comes next.
    """
    manager, distribution = _distribution(root)
    step("processor and kernel")
    machine = look(root)
    settings, unread = _settings(root)
    name = _user(uri, settings, manager)
    step(f"libvirt at {uri}")
    module, libvirt = _ask_libvirt(uri, root)
    step("emulators")
    emulators = tuple(_emulators(libvirt, root))
    step("descriptors and IGVM files")
    catalog = load(search_path(root, user=os.geteuid() != 0), root)
    rows = take(catalog, root)
    step("the hook")
    hook, hook_problem = hooks.find(root)
    return Facts(
        root=root,
        privileged=os.geteuid() == 0,
        manager=manager,
        distribution=distribution,
        machine=machine,
        module=module,
        environment=sys.executable if sys.prefix != sys.base_prefix else None,
        libvirt=libvirt,
        account=_account(name, root),
        account_name=name,
        settings=settings,
        settings_problem=unread,
        emulators=emulators,
        catalog=catalog,
        rows=rows,
        hook=hook,
        hook_problem=hook_problem,
        daemons=tuple(hooks.daemons(root)),
        confinement=_confinement(root, rows),
    )


def _text(root: Path, name: str) -> Text:
    try:
        path = rooted.resolve(root, name)
        if not path.exists():
            return Text()
        return Text(text=files.read_text(path, limit=_MAX_CONFIGURATION).decode(errors="replace"))
    except IgvmfwError as error:
        return Text(problem=error.message)
    except OSError as error:
        return Text(problem=error.strerror or str(error))


def _distribution(root: Path) -> tuple[Manager, str]:
    """By os-release(5)."""
    text = _text(root, "etc/os-release").text or _text(root, "usr/lib/os-release").text or ""
    pairs = (line.partition("=") for line in text.splitlines())
    said = {name: _unquoted(value) for name, _, value in pairs}
    words = [said.get("ID", ""), *said.get("ID_LIKE", "").split()]
    known = {
        Manager.APT: {"debian", "ubuntu"},
        Manager.DNF: {"fedora", "rhel", "centos"},
        Manager.ZYPPER: {"suse", "opensuse"},
    }
    found = (manager for word in words for manager, names in known.items() if word in names)
    return next(found, Manager.UNKNOWN), said.get("PRETTY_NAME", "an unknown distribution")


def _unquoted(text: str) -> str:
    with contextlib.suppress(ValueError):
        return " ".join(shlex.split(text))
    return text


def _settings(root: Path) -> tuple[dict[str, tuple[str, ...]], str | None]:
    found = _text(root, _QEMU_CONF)
    settings: dict[str, tuple[str, ...]] = {}
    for name, value in _SETTING.findall((found.text or "").replace("\r", "\n")):
        strings = tuple(string[1:-1] for string in re.findall(_STRING, value))
        settings.setdefault(name, strings)  # libvirt takes the first
    return settings, found.problem


def _user(uri: str, settings: Mapping[str, tuple[str, ...]], manager: Manager) -> str:
    """Who runs QEMU: the system's daemon has a user for it, other drivers are the caller's."""
    if not uri.partition("?")[0].endswith("/system"):
        return _user_name(os.geteuid())
    return "".join(settings.get("user", ())).lstrip("+") or _USERS.get(manager, "qemu")


def _account(name: str, root: Path) -> Account | None:
    """The user as this host knows it; another root's users are not looked up."""
    if root != rooted.HOST:
        return None
    try:
        user = pwd.getpwnam(name)
        groups = os.getgrouplist(name, user.pw_gid)
    except (KeyError, OSError):
        return None
    return Account(name=name, uid=user.pw_uid, gids=frozenset(groups))


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _ask_libvirt(uri: str, root: Path) -> tuple[str | None, Libvirt]:
    version = find_libvirt(root)
    module = None
    if importlib.util.find_spec("libvirt") is None:
        module = "it is not installed"
    if root != rooted.HOST:
        return module, Libvirt(uri=uri, version=version, asked=False)
    if module is not None:
        return module, Libvirt(uri=uri, version=version, failure="its Python module is missing")
    answers: queue.SimpleQueue[Libvirt] = queue.SimpleQueue()
    # a daemon thread: one that waits in libvirt for ever must not keep the process from ending
    thread = threading.Thread(
        target=lambda: answers.put(_converse(uri, version)), name="libvirt", daemon=True
    )
    thread.start()
    try:
        return None, answers.get(timeout=_PATIENCE)
    except queue.Empty:
        failure = f"no answer within {_PATIENCE:.0f} seconds"
        return None, Libvirt(uri=uri, version=version, failure=failure)


def _converse(uri: str, version: tuple[int, int, int] | None) -> Libvirt:
    answered = None
    try:
        with connect(uri) as connection:
            answered = connection.version
            capabilities = connection.capabilities(emulator=None, machine=None, kind=None)
        return Libvirt(uri=uri, version=version, answered=answered, capabilities=capabilities)
    except IgvmfwError as error:
        return Libvirt(
            uri=uri,
            version=version,
            answered=answered,
            failure=error.message,
            remedy=error.hint,
            denied=bool(_DENIED.search(error.message)),
        )


def _emulators(libvirt: Libvirt, root: Path) -> Iterator[Found]:
    origins: dict[Path, str] = {}
    if libvirt.capabilities is not None and libvirt.capabilities.emulator is not None:
        origins[Path(libvirt.capabilities.emulator)] = "libvirt's default"
    own = emulator.named()
    if own is not None and root == rooted.HOST:
        origins.setdefault(own, emulator.VARIABLE)
    for path in emulator.find(root=root):
        origins.setdefault(path, "in PATH, or where distributions put it")
    known: set[str] = set()
    for path, origin in list(origins.items())[:_MAX_EMULATORS]:
        real = os.path.realpath(path)  # /bin is /usr/bin
        if real not in known:
            known.add(real)
            yield _probe(path, origin, root)


def _probe(path: Path, origin: str, root: Path) -> Found:
    why = None
    if root != rooted.HOST:
        why = "not run, as it belongs to another root"
    elif not emulator.may_run(path):
        why = "not run, as others than its owner can write to it"
    if why is not None:
        return Found(path=path, origin=origin, problem=why, untried=True)
    try:
        return Found(path=path, origin=origin, emulator=emulator.probe(path, seconds=_ANSWER))
    except EmulatorError as error:
        return Found(path=path, origin=origin, problem=error.message)


def _confinement(root: Path, rows: tuple[Row, ...]) -> Confinement:
    apparmor = _text(root, "sys/module/apparmor/parameters/enabled")
    stock = _text(root, f"{_APPARMOR}/{_GUESTS}")
    return Confinement(
        apparmor=None if apparmor.problem else (apparmor.text or "").strip() == "Y",
        abstraction=stock != Text(),
        rules=load_rules(_GUESTS, lambda name: _rule_texts(root, name)),
        selinux=(_text(root, "sys/fs/selinux/enforce").text or "").strip() == "1",
        types=dict(_types(root, rows)),
    )


def _rule_texts(root: Path, name: str) -> Iterator[Text]:
    """A file of AppArmor's rules, or those in a directory."""
    path = f"{_APPARMOR}/{name}"
    try:
        names = os.listdir(rooted.resolve(root, path))
    except (OSError, IgvmfwError):
        yield _text(root, path)
        return
    for name in sorted(name for name in names if not is_leftover(name)):
        if not rooted.resolve(root, f"{path}/{name}").is_dir():
            yield _text(root, f"{path}/{name}")


def _types(root: Path, rows: tuple[Row, ...]) -> Iterator[tuple[str, str]]:
    for row in rows:
        if row.entry.descriptor is None or row.state is None:
            continue
        name = row.entry.descriptor.mapping.filename
        with contextlib.suppress(OSError, IgvmfwError):
            label = os.getxattr(rooted.resolve(root, name), "security.selinux")
            parts = label.rstrip(b"\0").decode(errors="replace").split(":")
            if len(parts) >= 3:
                yield name, parts[2]
