"""What is looked at before a domain with an IGVM file is started: by libvirt's hook, and by launch.

A start that would fail, or launch something else than was chosen, is refused with the reason.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from igvmfw import files, state, upkeep
from igvmfw.check import check_image
from igvmfw.commandline import check_arguments, gives_file
from igvmfw.errors import IgvmfwError, OutputError, RefusedError
from igvmfw.findings import Guest, Severity
from igvmfw.igvm.image import IgvmFile
from igvmfw.machine import check_host
from igvmfw.platforms import Platform
from igvmfw.qemu.acceptance import ANY_RELEASE
from igvmfw.qemu.emulator import may_run, probe
from igvmfw.select import DEFAULT_POLICY, check_policy
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import File, OnChange, Record

_MAX_ENTRIES = 512

Warn = Callable[[str], None]


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
        # libvirt hands a hook no such variable (virCommandAddEnvPassCommon)
        runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
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


def check_start(
    domain: Domain,
    *,
    warn: Warn,
    root: Path = Path("/"),
    emulator: str | None = None,
    cache: Cache | None = None,
) -> None:
    """See that a domain can be started with the IGVM file that was chosen for it.

    Args:
        domain: What is about to be started; one without igvmfw's record is fine.
        warn: Gets what does not stop the start.
        root: The host's root directory, for what the kernel says about itself.
        emulator: The QEMU that a domain gets which names none; None where that is not known.
        cache: What was found before; None looks at everything anew.
    Raises:
        RefusedError: QEMU would get another file or none, or other firmware beside it; the guest's
            platform or policy is another since; the file changed, QEMU would not take it, or the
            host cannot do the platform.
        InputError: The file is missing, unreadable or damaged, or the domain's record is, or the
            state of its vTPM is missing or empty.
        EmulatorError: The emulator does not take IGVM files, or cannot give the vTPM its state.
    """
    record = Record.find(domain)
    file = None if record is None else record.file
    if file is None:
        return
    platform = check_domain(domain, file)
    upkeep.check(domain, warn=warn)
    check_host(platform, root)
    with files.content_of(file.path) as content:
        try:
            image = IgvmFile.parse(content)
        except IgvmfwError as error:
            raise error.within(file.path) from None
        sha256 = hashlib.sha256(content).hexdigest()
        _check_change(domain, file, sha256, warn)
        if platform in DEFAULT_POLICY:
            policy = None if domain.security is None else domain.security.policy
            check_policy(policy, image, platform, file.path)
        path = domain.emulator or emulator
        judged = _Judged(
            image=image,
            path=file.path,
            sha256=sha256,
            platform=platform,
            domain=domain,
            emulator=None if path is None else Path(path),
        )
        judged.check(cache)


def check_domain(domain: Domain, file: File) -> Platform:
    """See that a domain is still the one that a file was chosen for; nothing is opened.

    Args:
        domain: The domain.
        file: What its record says.
    Returns:
        The guest's platform.
    Raises:
        RefusedError: QEMU would get another file or none, or other firmware beside it, or the
            guest's platform is another.
    """
    _check_given(domain, file)
    security = domain.security
    platform = Platform.NATIVE if security is None else security.platform
    if platform is not file.platform:
        raise RefusedError(
            f"the IGVM file of {domain.name} was chosen for {file.platform}, the guest is now "
            f"{platform}",
            where="<launchSecurity>",
            hint="put <launchSecurity> back, or define the domain again with igvmfw",
        )
    return platform


def _check_given(domain: Domain, file: File) -> None:
    """What is checked below has to be what QEMU gets, and all that it gets."""
    os = domain.os
    other = os.loader.element if os.loader is not None else os.variables
    if other is not None or os.firmware is not None:
        what = f"firmware={os.firmware!r}" if other is None else f"<{other.tag}>"
        raise RefusedError(
            f"{domain.name} has {what} beside the IGVM file {file.path}, which QEMU does not take",
            where="<os>",
            hint="remove it with virsh edit, or remove igvmfw's element from <metadata> and the "
            "IGVM file from <qemu:commandline>",
        )
    check_arguments(domain, ours=True)
    if not gives_file(domain, file.path):
        raise RefusedError(
            f"{domain.name} records the IGVM file {file.path}, which QEMU is not given",
            where="<qemu:commandline>",
            hint="define the domain again with igvmfw, or remove igvmfw's element from <metadata>",
        )


def _check_change(domain: Domain, file: File, sha256: str, warn: Warn) -> None:
    if sha256 == file.sha256:
        return
    changed = RefusedError(
        f"the file changed since {domain.name} was defined: its SHA-256 is {sha256}, "
        f"recorded is {file.sha256}",
        where=file.path,
        hint="if the change is meant, define the domain again with igvmfw",
    )
    if file.on_change is OnChange.REFUSE:
        raise changed
    warn(str(changed))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """A file, and what it is judged for: the guest, and the QEMU that will get it."""

    image: IgvmFile
    path: str
    sha256: str
    platform: Platform
    domain: Domain
    emulator: Path | None

    def check(self, cache: Cache | None) -> None:
        """Judge it by the rules of that QEMU, unless it was found fit before."""
        identity = None if self.emulator is None else _identity(self.emulator)
        if cache is None or identity is None:
            self._judge()
            return
        key: dict[str, object] = {
            "igvmfw": _code(),
            "sha256": self.sha256,
            "platform": self.platform.value,
            "vcpus": self.domain.vcpus,
            "memory": self.domain.memory,
            "emulator": identity,
            "machine": self.domain.os.machine,
            "state": state.recorded(self.domain) is not None,
        }
        if not cache.has(key):
            self._judge()
            cache.add(key)

    def _judge(self) -> None:
        release = ANY_RELEASE
        if self.emulator is not None and may_run(self.emulator):
            found = probe(self.emulator)
            found.require_igvm()
            release = found.acceptance
            upkeep.check_emulator(self.domain, self.emulator)
        guest = Guest(vcpus=self.domain.vcpus, memory=self.domain.memory)
        for finding in check_image(self.image, self.platform, release, guest):
            if finding.severity is Severity.ERROR:
                at = "" if finding.header_index is None else f": {finding.where}"
                raise RefusedError(
                    f"{release.name} would not launch this {self.platform} guest: "
                    f"{finding.message}",
                    where=f"{self.path}{at}",
                    hint=finding.remedy,
                )


def _code() -> str:
    """What changes when igvmfw does, be its version the same: a mended rule judges anew."""
    digest = hashlib.sha256()
    for directory, names, modules in os.walk(Path(__file__).parent):
        names.sort()
        for name in sorted(modules):
            if name.endswith(".py"):
                info = os.stat(os.path.join(directory, name))
                digest.update(f"{info.st_ino} {info.st_size} {info.st_ctime_ns}\n".encode())
    return digest.hexdigest()


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
