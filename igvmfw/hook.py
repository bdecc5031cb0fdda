"""libvirt's hook: looks at a domain's IGVM firmware before QEMU is started, and refuses if need be.

libvirt calls /etc/libvirt/hooks/qemu.d/igvmfw, a shell script, which runs this module for domains
that carry igvmfw's record: `python3 -I -m igvmfw.hook NAME prepare begin -`, with the domain's XML
on standard input.  A non-zero exit stops the start, and what stands on standard error reaches
virsh's user (docs/hooks.rst of libvirt).  A hook must not call libvirt, which waits for it.

A domain that igvmfw has chosen a file for relies on this check: where the check itself fails, the
start is refused.  No other domain is ever stopped.
"""

import contextlib
import hashlib
import json
import os
import stat
import sys
import syslog
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from igvmfw import __version__, files
from igvmfw.errors import IgvmfwError, OutputError, RefusedError
from igvmfw.platforms import Platform

if TYPE_CHECKING:  # the hook starts without them, and says so where they are missing
    from igvmfw.igvm.image import IgvmFile
    from igvmfw.virt.domain import Domain
    from igvmfw.virt.record import File

EXIT_INTERNAL = 70  # EX_SOFTWARE of sysexits.h
_MAX_XML = 16 << 20  # bytes; what libvirt itself takes is smaller
_MAX_ENTRIES = 512
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# kvm_amd's switch for each platform (arch/x86/kvm/svm/sev.c)
_PARAMETERS = {Platform.SEV: "sev", Platform.SEV_ES: "sev_es", Platform.SEV_SNP: "sev_snp"}

Warn = Callable[[str], None]


def check_start(
    domain: "Domain",
    *,
    warn: Warn,
    root: Path = Path("/"),
    cache: "Cache | None" = None,
) -> None:
    """See that a domain can be started with the IGVM file that was chosen for it.

    Args:
        domain: What libvirt is about to start; one without igvmfw's record is fine.
        warn: Gets what does not stop the start.
        root: The host's root directory, for what the kernel says about itself.
        cache: What was found before; None looks at everything anew.
    Raises:
        RefusedError: The file changed, QEMU would not take it, or the host cannot do the platform.
        InputError: The file is missing, unreadable or damaged, or the domain's record is.
        EmulatorError: The emulator does not take IGVM files.
    """
    from igvmfw.igvm.image import IgvmFile
    from igvmfw.virt.record import Record

    record = Record.find(domain)
    file = None if record is None else record.file
    if file is None:
        return
    _check_argument(domain, file)
    _check_state(domain)
    security = domain.security
    platform = Platform.NATIVE if security is None else security.platform
    check_host(platform, root)
    with files.mapped(file.path) as content:
        try:
            image = IgvmFile.parse(content)
        except IgvmfwError as error:
            raise error.within(file.path) from None
        sha256 = hashlib.sha256(content).hexdigest()
        _check_change(domain, file, sha256, warn)
        _check_emulator(domain, image, platform, cache, where=file.path, sha256=sha256)


def check_host(platform: Platform, root: Path = Path("/")) -> None:
    """See that the host can launch guests of a platform.

    Source: Linux, arch/x86/kvm/svm/sev.c (the parameters say whether KVM has the platform, also
    where the processor or the BIOS is the reason) and drivers/crypto/ccp/sev-dev.c (/dev/sev).

    Args:
        platform: The guest's; only SEV, SEV-ES and SEV-SNP need anything.
        root: The host's root directory.
    Raises:
        RefusedError: It cannot.
    """
    if platform not in _PARAMETERS:
        return
    parameter = root / "sys/module/kvm_amd/parameters" / _PARAMETERS[platform]
    try:
        value = parameter.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        value = ""  # another KVM, which has no such switch
    if value.upper() in ("N", "0"):
        raise RefusedError(
            f"this host cannot launch {platform} guests: KVM has {_PARAMETERS[platform]}={value}",
            where=str(parameter),
            hint="turn it on in the BIOS and for kvm_amd, or start the guest on another host",
        )
    device = root / "dev/sev"
    if not device.exists():
        raise RefusedError(
            f"this host cannot launch {platform} guests: the device is missing",
            where=str(device),
            hint="load the module ccp and turn SEV on in the BIOS, or start the guest on another "
            "host",
        )


def _check_argument(domain: "Domain", file: "File") -> None:
    """What is checked below has to be what QEMU gets."""
    from igvmfw.commandline import object_argument

    if object_argument(file.path) not in domain.arguments:
        raise RefusedError(
            f"{domain.name} records the IGVM file {file.path}, which QEMU is not given",
            where="<qemu:commandline>",
            hint="define the domain again with igvmfw, or remove igvmfw's element from <metadata>",
        )


def _check_state(domain: "Domain") -> None:
    """The state of the firmware's vTPM: the domain's own, and there."""
    from igvmfw.state import check_domain, recorded
    from igvmfw.upkeep import check_present

    kept = recorded(domain)
    if kept is not None:
        check_domain(domain, kept)
        check_present(domain, kept)


def _check_change(domain: "Domain", file: "File", sha256: str, warn: Warn) -> None:
    from igvmfw.launch import changed_file
    from igvmfw.virt.record import OnChange

    changed = changed_file(domain, file, sha256)
    if changed is None:
        return
    if file.on_change is OnChange.REFUSE:
        raise changed
    warn(str(changed))


def _check_emulator(
    domain: "Domain",
    image: "IgvmFile",
    platform: Platform,
    cache: "Cache | None",
    *,
    where: str,
    sha256: str,
) -> None:
    """Judge the file by the rules of the QEMU that will get it."""
    from igvmfw.state import recorded

    path = None if domain.emulator is None else Path(domain.emulator)
    identity = None if path is None else _identity(path)
    key: dict[str, object] = {
        "igvmfw": __version__,
        "sha256": sha256,
        "platform": platform.value,
        "vcpus": domain.vcpus,
        "memory": domain.memory,
        "emulator": identity,
        "machine": domain.os.machine,
        "state": recorded(domain) is not None,
    }
    known = cache if identity is not None else None
    if known is not None and known.has(key):
        return
    _judge(domain, image, platform, path, where)
    if known is not None:
        known.add(key)


def _judge(
    domain: "Domain", image: "IgvmFile", platform: Platform, emulator: Path | None, where: str
) -> None:
    from igvmfw.check import check_image
    from igvmfw.findings import Guest, Severity
    from igvmfw.qemu.acceptance import RELEASES, acceptance_of
    from igvmfw.qemu.emulator import probe
    from igvmfw.upkeep import check_emulator

    release = RELEASES[-1]
    if emulator is not None and _may_run(emulator):
        found = probe(emulator)
        found.require_igvm()
        release = acceptance_of(found.version)
        check_emulator(domain, emulator)
    guest = Guest(vcpus=domain.vcpus, memory=domain.memory)
    for finding in check_image(image, platform, release, guest):
        if finding.severity is Severity.ERROR:
            raise RefusedError(
                f"{release.name} would not launch this {platform} guest: {finding.message}",
                where=where if finding.header_index is None else f"{where}: {finding.where}",
                hint=finding.remedy,
            )


def _may_run(emulator: Path) -> bool:
    """Whether to ask an emulator for its version.

    The hook is root, libvirt runs an emulator as a user without rights: one that others than root
    can write to must not be run here.
    """
    try:
        info = emulator.stat()
    except OSError:
        return True  # asking it says what is wrong
    return info.st_uid in (0, os.geteuid()) and not info.st_mode & _WRITABLE_BY_OTHERS


def _identity(emulator: Path) -> tuple[int, ...] | None:
    """What changes when an emulator is replaced; None for a script, which may run any other."""
    try:
        with emulator.open("rb") as stream:
            if stream.read(2) == b"#!":
                return None
            info = os.fstat(stream.fileno())
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


@dataclass(frozen=True, slots=True)
class Cache:
    """Which files were found fit for which emulators and guests: one small file each.

    Only what passed is kept, under the hash of what was looked at.  Nothing is taken from a
    directory or file that another user owns or may open.
    """

    directory: Path

    @classmethod
    def of_user(cls) -> "Cache | None":
        """The cache of who runs this: gone with the next boot, or with the session."""
        if os.geteuid() == 0:
            return cls(Path("/run/igvmfw"))
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
        return cls(Path(runtime) / "igvmfw") if runtime.startswith("/") else None

    def has(self, key: Mapping[str, object]) -> bool:
        """Whether this was found fit before."""
        text = _canonical(key)
        try:
            if not self._is_ours(os.lstat(self.directory), stat.S_IFDIR | 0o700):
                return False
            fd = os.open(self._entry(text), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        with os.fdopen(fd, "rb") as stream:
            if not self._is_ours(os.fstat(fd), stat.S_IFREG | 0o600):
                return False
            return stream.read(len(text) + 1) == text

    def add(self, key: Mapping[str, object]) -> None:
        """Keep that this was found fit; what cannot be kept is found out again next time."""
        text = _canonical(key)
        with contextlib.suppress(OSError, OutputError):
            self.directory.mkdir(mode=0o700, exist_ok=True)
            if not self._is_ours(os.lstat(self.directory), stat.S_IFDIR | 0o700):
                return
            entries = list(self.directory.iterdir())
            for entry in entries if len(entries) >= _MAX_ENTRIES else ():
                entry.unlink()
            files.write_atomic(self._entry(text), text, mode=0o600)

    def _entry(self, text: bytes) -> Path:
        return self.directory / hashlib.sha256(text).hexdigest()

    @staticmethod
    def _is_ours(info: os.stat_result, mode: int) -> bool:
        return info.st_uid == os.geteuid() and info.st_mode == mode


def _canonical(key: Mapping[str, object]) -> bytes:
    return json.dumps(key, sort_keys=True).encode()


def main(arguments: list[str]) -> int:
    """Run the hook as libvirt calls it; returns the exit status.

    Args:
        arguments: The domain's name, the operation, its stage, and one more.
    """
    if arguments[1:2] != ["prepare"]:
        return 0  # `reconnect` above all: to fail there would end a running guest
    try:
        from igvmfw.virt.domain import Domain

        domain = Domain.parse(sys.stdin.buffer.read(_MAX_XML))
        check_start(domain, warn=_warn, cache=Cache.of_user())
    except IgvmfwError as error:
        _say("error", str(error))
        return error.exit_code
    except Exception as error:
        _say(
            "error",
            f"cannot check the IGVM firmware of {arguments[0]}: {type(error).__name__}: {error} "
            "(a bug, or igvmfw is not installed completely; to start domains unchecked, take the "
            "hook /etc/libvirt/hooks/qemu.d/igvmfw away)",
        )
        return EXIT_INTERNAL
    return 0


def _warn(message: str) -> None:
    _say("warning", message)
    # libvirt drops what a hook says that lets a domain pass
    syslog.openlog("igvmfw")
    syslog.syslog(syslog.LOG_WARNING, message)


def _say(kind: str, message: str) -> None:
    """One line, with everything escaped that could drive a terminal."""
    line = " ".join(message.split())
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    sys.stderr.write(f"igvmfw: {kind}: {shown}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
