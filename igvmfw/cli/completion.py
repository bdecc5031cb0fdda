"""Answers to a shell that completes a command line.

The shells' scripts (packaging/make-completion) call igvmfw with `_ARGCOMPLETE` set, and argcomplete
finds the word that is being written.  What stands here is which values a word can have: a table by
what the help calls it, so that a new option that says FILE or DIR needs nothing here.

A shell waits meanwhile.  So nothing is asked over a network, nothing is started, and a daemon that
does not answer is given up.
"""

import argparse
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from igvmfw import rooted
from igvmfw.cli import COMMANDS, build_parser
from igvmfw.errors import HostError, IgvmfwError
from igvmfw.platforms import Platform

PATIENCE = 1.5  # seconds that libvirt gets
_MAX_FILES = 10_000  # of one directory: more than anybody reads
INACTIVE, ACTIVE, ANY = 2, 1, 0  # virConnectListAllDomainsFlags

Values = Mapping[str, str]  # each with what it means, where that says more than the value
Completer = Callable[[str, argparse.Namespace], Values]


def complete() -> int:
    """Answer the shell; argcomplete ends the process.

    Returns:
        Never, unless it is not a shell that asks.
    Raises:
        HostError: argcomplete is not installed.
    """
    try:
        import argcomplete
        from argcomplete.completers import SuppressCompleter
    except ImportError:
        raise HostError(
            "completion needs argcomplete",
            hint="install python3-argcomplete, or igvmfw[completion] with pip",
        ) from None
    written = os.environ.get("COMP_LINE", "").split()
    parser = build_parser([word for word in written if word in COMMANDS][:1])
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, sub in action.choices.items():
                _attach(command, sub)
    argcomplete.autocomplete(
        parser,
        always_complete_options=False,  # options are many: who wants one begins with a dash
        default_completer=SuppressCompleter(),
    )
    return 1


def _attach(command: str, parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if action.nargs == 0 or action.choices is not None:
            continue  # has no value, or argcomplete knows which
        completer = completer_of(command, action)
        if completer is not None:
            action.completer = _adapted(completer)  # type: ignore[attr-defined]


def _adapted(completer: Completer) -> Callable[..., Values]:
    def ask(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Values:
        try:
            return completer(prefix, parsed_args)
        except (IgvmfwError, OSError):
            return {}  # the command itself will say what is wrong

    return ask


def completer_of(command: str, action: argparse.Action) -> Completer | None:
    """What completes a value; None where it is free.

    Args:
        command: The command's name.
        action: The argument or option, as the parser declares it.
    """
    shown = str(action.metavar or action.dest)
    kind = re.match(r"[A-Z]*", shown)
    return (
        _BY_COMMAND.get((command, action.dest))
        or _BY_METAVAR.get(shown)
        or _BY_METAVAR.get(kind[0] if kind else "")
    )


def _words(*words: str) -> Completer:
    return lambda prefix, args: dict.fromkeys(words, "")


def _files(*suffixes: str) -> Completer:
    """Files with one of the suffixes and directories; where there are none such, every file."""

    def find(prefix: str, args: argparse.Namespace) -> Values:
        every = list(_entries(prefix))
        kind = [path for path in every if path.endswith((*suffixes, "/"))]
        return dict.fromkeys(kind if kind and suffixes else every, "")

    return find


def _directories(prefix: str, args: argparse.Namespace) -> Values:
    return {path: "" for path in _entries(prefix) if path.endswith("/")}


def _entries(prefix: str) -> Iterator[str]:
    """What the directory that is written so far holds, each as it would be written."""
    folder, slash, begun = prefix.rpartition("/")
    with os.scandir(os.path.expanduser(folder + slash) or ".") as found:
        for entry in itertools.islice(found, _MAX_FILES):
            if entry.name.startswith(begun) and (begun or entry.name[0] != "."):
                yield folder + slash + entry.name + "/" * entry.is_dir()


def _installed(prefix: str, args: argparse.Namespace) -> Values:
    """The descriptors that `uninstall` would remove, by name; or paths."""
    from igvmfw.install import Into, Level, choose_place
    from igvmfw.provenance import is_untouched
    from igvmfw.qemu import catalog

    if "/" in prefix:
        return _files(catalog.SUFFIX, ".igvm")(prefix, args)
    root: Path = getattr(args, "root", rooted.HOST)
    level = getattr(args, "level", Level.SYSTEM)
    places = [choose_place(level, root=root, into=into) for into in (Into.QEMU, Into.IGVMFW)]
    found = catalog.load([place.directory for place in places], root)
    names = {
        entry.name: entry.descriptor.mapping.filename
        for entry in found.available
        if entry.descriptor is not None and is_untouched(entry.descriptor)
    }
    if any(name.startswith(prefix) for name in names):
        return names
    return {re.sub(r"^\d\d-", "", name).removesuffix(catalog.SUFFIX): names[name] for name in names}


def _features(prefix: str, args: argparse.Namespace) -> Values:
    from igvmfw.qemu.schema import Profile, known_features

    return dict.fromkeys(known_features(Profile.IGVMFW), "")


def _interfaces(prefix: str, args: argparse.Namespace) -> Values:
    from igvmfw.qemu.schema import known_interfaces

    return dict.fromkeys(known_interfaces(), "")


def _machines(prefix: str, args: argparse.Namespace) -> Values:
    from igvmfw.describe import MACHINE_FAMILIES
    from igvmfw.qemu.acceptance import RELEASES

    globs = ["*", *(f"{release.version[0]}.{release.version[1]}" for release in RELEASES)]
    return {family + glob: "" for family in MACHINE_FAMILIES for glob in globs}


def _releases(prefix: str, args: argparse.Namespace) -> Values:
    from igvmfw.qemu.acceptance import RELEASES

    return {".".join(map(str, release.version)): "" for release in RELEASES}


def _models(prefix: str, args: argparse.Namespace) -> Values:
    from igvmfw.qemu.cpus import MODELS

    return dict.fromkeys(MODELS, "")


def domains(flags: int) -> Completer:
    """The names of domains, from a libvirt of this host.

    Args:
        flags: virConnectListAllDomainsFlags; 0 for all.
    """

    def ask(prefix: str, args: argparse.Namespace) -> Values:
        uri = getattr(args, "connect", None) or _default_uri()
        if uri is not None and not _is_asked(uri):
            return {}
        found: dict[str, str] = {}
        # a thread, as libvirt waits for a silent daemon in C; argcomplete's exit ends it
        worker = threading.Thread(target=_list_domains, args=(uri, flags, found), daemon=True)
        worker.start()
        worker.join(PATIENCE)
        return dict(found)

    return ask


def _default_uri() -> str | None:
    """The URI that libvirt would take, as far as that is written down; it probes otherwise."""
    for name in ("VIRSH_DEFAULT_CONNECT_URI", "LIBVIRT_DEFAULT_URI"):
        if os.environ.get(name):
            return os.environ[name]
    from igvmfw.qemu.catalog import user_base

    folder = "/etc" if os.geteuid() == 0 else f"/{user_base()}"
    try:
        with open(f"{folder}/libvirt/libvirt.conf", encoding="utf-8") as file:
            found = re.search(r'^\s*uri_default\s*=\s*"([^"]+)"', file.read(1 << 16), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return found and found[1]


def _is_asked(uri: str) -> bool:
    """Whether a libvirt is on this host, and there already.

    An alias may stand for any URI, and to open the embedded driver is to start it.
    """
    try:
        parts = urlsplit(uri)
        remote = bool(parts.hostname)
    except ValueError:
        return False
    return bool(parts.scheme) and not remote and parts.path != "/embed"


def _list_domains(uri: str | None, flags: int, found: dict[str, str]) -> None:
    try:
        import libvirt
    except (ImportError, SystemError):
        return
    libvirt.registerErrorHandler(lambda context, error: None, None)
    try:
        connection = libvirt.openReadOnly(uri)  # asks nobody for a password
        found.update((domain.name(), "") for domain in connection.listAllDomains(flags))
    except libvirt.libvirtError:
        return


_IGVM = _files(".igvm")
_XML = _files(".xml")
_ANY_FILE = _files()

_BY_METAVAR: dict[str, Completer] = {
    "DESCRIPTOR": _files(".json"),
    "DIR": _directories,
    "DOMAIN": domains(ANY),
    "DOMAIN.xml": _XML,
    "F": _features,
    "FILE": _IGVM,
    "FIRMWARE": _files(".fd", ".bin"),
    "MODEL": _models,
    "NAME|FILE": _installed,
    "OUT": _ANY_FILE,
    "P": _words(*Platform),
    "PATH": _ANY_FILE,
    "URI": _words("qemu:///system", "qemu:///session", "qemu:///embed?root="),
    "VERSION": _releases,
}
_BY_COMMAND: dict[tuple[str, str], Completer] = {
    **{(command, "igvm"): _IGVM for command in ("rewrite", "define", "create")},
    **{(command, "domain"): _XML for command in ("rewrite", "restore")},
    **{(command, "file"): _XML for command in ("define", "create")},
    **{(command, "interface"): _interfaces for command in ("describe", "install")},
    **{(command, "feature"): _features for command in ("describe", "install")},
    **{(command, "machine"): _machines for command in ("describe", "install")},
    ("measure", "platform"): _words("sev", "sev-es", "sev-snp", "tdx", "vsm"),
    ("start", "domain"): domains(INACTIVE),
    ("verify", "domain"): domains(ACTIVE),
    ("verify", "tik"): _ANY_FILE,
    ("wrap", "platform"): _words("native", "sev", "sev-es", "sev-snp"),
    ("wrap", "vars"): _files(".fd"),
}
