"""Asking a QEMU what it is, and whether it takes IGVM files.

Source: QEMU's --version (system/vl.c, version()) and `-object TYPE,help` (qom/object_interfaces.c),
which exits 0 only for an object type that is built in.  `igvm-cfg` is there since QEMU 10.1, where
it was built with libigvm.
"""

import contextlib
import os
import re
import select
import signal
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from igvmfw import rooted
from igvmfw.errors import EmulatorError
from igvmfw.qemu.acceptance import ANY_RELEASE, Acceptance, acceptance_of

FIRST_IGVM = (10, 1, 0)
VARIABLE = "IGVMFW_QEMU"  # of the environment
TIMEOUT = 20.0  # seconds; it answers in some milliseconds, on a loaded host later
_MAX_ANSWER = 1 << 16  # bytes
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_VERSION = re.compile(r"QEMU emulator version (\d+)\.(\d+)(?:\.(\d+))?")
_PROPERTY = re.compile(r"^\s+([\w.-]+)=<", re.M)
_REMEDY = "IGVM needs QEMU 10.1 or newer built with libigvm: Fedora's and openSUSE's packages are"

# where distributions put an emulator that is not in PATH: Fedora's and RHEL's, older Debian's
_ELSEWHERE = ("/usr/libexec/qemu-kvm", "/usr/lib/qemu-kvm", "/usr/bin/qemu-kvm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulator:
    """One QEMU binary.

    Attributes:
        path: Where it is.
        version: Major, minor, micro.
        igvm: Whether it takes IGVM files.
    """

    path: Path
    version: tuple[int, int, int]
    igvm: bool

    @property
    def version_text(self) -> str:
        """The version as QEMU writes it, such as 10.2.2."""
        return ".".join(map(str, self.version))

    @property
    def acceptance(self) -> Acceptance:
        """What it takes of an IGVM file.

        A build that takes IGVM files before QEMU did, such as COCONUT-SVSM's, goes by no release.

        Raises:
            UsageError: It is too old, and takes none.
        """
        if self.igvm and self.version < FIRST_IGVM:
            return ANY_RELEASE
        return acceptance_of(self.version)

    def require_igvm(self) -> None:
        """Refuse an emulator that cannot take IGVM files.

        Raises:
            EmulatorError: It cannot, with what to install instead.
        """
        if self.igvm:
            return
        why = (
            f"QEMU {self.version_text} is too old to take IGVM files"
            if self.version < FIRST_IGVM
            else f"QEMU {self.version_text} was built without IGVM support"
        )
        raise EmulatorError(why, where=str(self.path), hint=_REMEDY)


def named() -> Path | None:
    """The emulator that the environment names: one's own, where none that is installed will do."""
    path = os.environ.get(VARIABLE)
    return Path(path) if path else None


def find(architecture: str = "x86_64", root: Path = rooted.HOST) -> tuple[Path, ...]:
    """The emulators of a host: those in PATH, then where distributions hide one.

    Args:
        architecture: The emulation target, as in `qemu-system-ARCHITECTURE`.
        root: The host's root directory; in another one PATH is the system's usual one.
    """
    name = f"qemu-system-{architecture}"
    directories = os.get_exec_path() if root == rooted.HOST else os.defpath.split(":")
    candidates = [os.path.join(directory, name) for directory in directories]
    candidates += _ELSEWHERE if architecture == "x86_64" else ()
    paths = (path if root == rooted.HOST else rooted.resolve(root, path) for path in candidates)
    return tuple(Path(p) for p in dict.fromkeys(map(str, paths)) if _is_program(p))


def _is_program(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def probe(path: Path, *, seconds: float = TIMEOUT) -> Emulator:
    """Ask an emulator for its version and for IGVM.

    Args:
        path: The binary, or a script that runs one.
        seconds: How long to wait for each of the two answers.
    Raises:
        EmulatorError: It cannot be run, does not answer in time, or is not QEMU.
    """
    answer = run_bounded(path, "--version", seconds=seconds)
    found = _VERSION.search(answer.stdout)
    if answer.returncode != 0 or found is None:
        raise EmulatorError(
            f"does not answer as QEMU does: {_first_line(answer)}",
            where=str(path),
            hint="name a qemu-system-x86_64",
        )
    help_ = run_bounded(path, "-object", "igvm-cfg,help", seconds=seconds)
    igvm = help_.returncode == 0 and "file=" in help_.stdout
    major, minor, micro = (int(part or 0) for part in found.groups())
    return Emulator(path=path, version=(major, minor, micro), igvm=igvm)


def may_run(path: Path) -> bool:
    """Whether an emulator can be asked by who runs this: nobody else can have put it there.

    libvirt runs an emulator as a user without rights; root must not run what others write.
    """
    try:
        info = path.stat()
    except OSError:
        return True  # asking it says what is wrong
    return info.st_uid in (0, os.geteuid()) and not info.st_mode & _WRITABLE_BY_OTHERS


def host_acceptance(path: Path | None = None) -> Acceptance:
    """What a QEMU of this host takes of an IGVM file.

    Args:
        path: The QEMU to ask; None takes the one that the environment names in IGVMFW_QEMU, else
            the first of this host that takes IGVM files, and without one the newest release that
            igvmfw knows.
    Raises:
        EmulatorError: The named one cannot be run, is not QEMU, or takes no IGVM files.
    """
    path = path or named()
    if path is not None:
        emulator = probe(path)
        emulator.require_igvm()
        return emulator.acceptance
    for candidate in find():
        try:
            emulator = probe(candidate)
        except EmulatorError:
            continue  # not the one to ask; naming it says what is wrong with it
        if emulator.igvm:
            return emulator.acceptance
    return ANY_RELEASE


def machine_properties(path: Path, machine: str | None) -> frozenset[str]:
    """The properties that a machine type has in an emulator.

    Source: `-machine TYPE,help` (system/vl.c, machine_help_func), one `name=<type>` to a line.

    Args:
        path: The binary, or a script that runs one.
        machine: The machine type or its alias; None for QEMU's default on x86.
    Raises:
        EmulatorError: It cannot be run, does not answer in time, or has no such machine.
    """
    name = (machine or "pc").replace(",", ",,")
    answer = run_bounded(path, "-machine", f"{name},help", seconds=TIMEOUT)
    if answer.returncode != 0 or "-machine options:" not in answer.stdout:
        # to an unknown machine type it answers with the list of those it has, and exit status 0
        why = f": {_first_line(answer)}" if answer.returncode else ""
        raise EmulatorError(
            f"has no machine type {machine or 'pc'!r}{why}",
            where=str(path),
            hint="use a machine type that -machine help lists",
        )
    return frozenset(_PROPERTY.findall(answer.stdout))


def run_bounded(path: Path, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a program that is not trusted to end, or to say little.

    Args:
        path: The program.
        arguments: Its arguments.
        seconds: How long it may take; then it is ended, with all it started.
    Returns:
        Its exit status, and what it said on either output, up to 64 KiB.
    Raises:
        EmulatorError: It cannot be run, or takes longer.
    """
    environment = {"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)}
    try:
        process = subprocess.Popen(
            [str(path), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise EmulatorError(
            f"cannot run: {error.strerror or error}",
            where=str(path),
            hint="install QEMU, or name another emulator",
        ) from None
    except ValueError as error:  # NUL, or a surrogate
        raise EmulatorError(
            f"cannot run: no program has this name: {error}",
            where=str(path),
            hint="name another emulator",
        ) from None
    deadline = time.monotonic() + seconds
    with process:
        try:
            output = _read_answer(process, deadline)
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise EmulatorError(
                f"did not answer within {seconds:.0f} seconds", where=str(path)
            ) from None
        finally:
            # with all it started: what goes on running would keep its output open
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, code, output.decode(errors="replace"), "")


def _read_answer(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """All that it says, up to a bound; what says more than that is no QEMU, and is not waited for.

    Raises:
        subprocess.TimeoutExpired: It goes on longer than that.
    """
    assert process.stdout is not None
    output = b""
    while len(output) < _MAX_ANSWER:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            raise subprocess.TimeoutExpired(process.args, 0)
        part = os.read(process.stdout.fileno(), _MAX_ANSWER)
        if not part:
            return output
        output += part
    process.kill()
    return output


def _first_line(answer: subprocess.CompletedProcess[str]) -> str:
    text = answer.stdout.strip()
    return text.splitlines()[0][:120] if text else f"exit status {answer.returncode}, no output"
