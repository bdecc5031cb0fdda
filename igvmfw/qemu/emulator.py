"""Asking a QEMU what it is, and whether it takes IGVM files.

Source: QEMU's --version (system/vl.c, version()) and `-object TYPE,help` (qom/object_interfaces.c),
which exits 0 only for an object type that is built in.  `igvm-cfg` is there since QEMU 10.1, where
it was built with libigvm.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from igvmfw.errors import EmulatorError

FIRST_IGVM = (10, 1, 0)
_TIMEOUT = 20.0  # seconds; it answers in some milliseconds, on a loaded host later
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


def find(architecture: str = "x86_64") -> tuple[Path, ...]:
    """The emulators of this host: those in PATH, then where distributions hide one.

    Args:
        architecture: The emulation target, as in `qemu-system-ARCHITECTURE`.
    """
    name = f"qemu-system-{architecture}"
    in_path = (shutil.which(name, path=d) for d in os.get_exec_path())
    elsewhere = (p for p in _ELSEWHERE if architecture == "x86_64" and os.access(p, os.X_OK))
    return tuple(Path(p) for p in dict.fromkeys([*filter(None, in_path), *elsewhere]))


def probe(path: Path) -> Emulator:
    """Ask an emulator for its version and for IGVM.

    Args:
        path: The binary, or a script that runs one.
    Raises:
        EmulatorError: It cannot be run, does not answer in time, or is not QEMU.
    """
    answer = _run(path, "--version")
    found = _VERSION.search(answer.stdout)
    if answer.returncode != 0 or found is None:
        raise EmulatorError(
            f"does not answer as QEMU does: {_first_line(answer)}",
            where=str(path),
            hint="name a qemu-system-x86_64",
        )
    help_ = _run(path, "-object", "igvm-cfg,help")
    igvm = help_.returncode == 0 and "file=" in help_.stdout
    major, minor, micro = (int(part or 0) for part in found.groups())
    return Emulator(path=path, version=(major, minor, micro), igvm=igvm)


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
    answer = _run(path, "-machine", f"{name},help")
    if answer.returncode != 0:
        raise EmulatorError(
            f"does not tell of the machine {machine or 'pc'}: {_first_line(answer)}",
            where=str(path),
            hint="use a machine type that -machine help lists",
        )
    return frozenset(_PROPERTY.findall(answer.stdout))


def _run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)}
    try:
        return subprocess.run(
            [str(path), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EmulatorError(
            f"did not answer within {_TIMEOUT:.0f} seconds", where=str(path)
        ) from None
    except OSError as error:
        raise EmulatorError(
            f"cannot run: {error.strerror or error}",
            where=str(path),
            hint="install QEMU, or name another emulator",
        ) from None


def _first_line(answer: subprocess.CompletedProcess[str]) -> str:
    text = (answer.stdout + answer.stderr).strip()
    return text.splitlines()[0][:120] if text else f"exit status {answer.returncode}, no output"
