"""Whether libvirt's hook is installed, works, and was there when the daemon started.

Source: docs/hooks.rst of libvirt; src/util/virhook.c: the daemon looks whether there is a hook for
QEMU as it starts and as it is reloaded, and runs none until then where there was none.
"""

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from igvmfw import rooted
from igvmfw.doctor.facts import HOOK, HOOK_OFF, HOOKS, Daemon, Hook
from igvmfw.errors import EmulatorError, InputError
from igvmfw.qemu.emulator import may_run, run_bounded

_DAEMONS = ("libvirtd", "virtqemud")
_PYTHON = re.compile(r"^python=(\S+)\s*$", re.M)
_MAX_HOOK = 1 << 16  # bytes
_MAX_PROCESSES = 100_000
_ANSWER = 10.0  # seconds
_IMPORTED = "igvmfw.hook can be loaded"


def find(root: Path) -> tuple[Hook | None, str | None]:
    """The hook, and why nobody can see whether there is one."""
    try:
        path = rooted.resolve(root, HOOK)
        info = os.stat(path)
    except FileNotFoundError:
        return None, None
    except InputError as error:
        return None, error.message
    except OSError as error:
        return None, error.strerror
    if not stat.S_ISREG(info.st_mode):
        return None, "is no regular file"
    python, failure, unseen = _interpreter(path, root)
    return Hook(
        executable=bool(info.st_mode & 0o111),
        off=os.path.lexists(rooted.resolve(root, HOOK_OFF)),
        changed=info.st_ctime,
        others=_oldest_other(root, path),
        python=python,
        failure=failure,
        unseen=unseen,
    ), None


def _oldest_other(root: Path, own: Path) -> float | None:
    base = rooted.resolve(root, HOOKS)
    others = [base / "qemu"]
    with contextlib.suppress(OSError):
        others += [path for path in (base / "qemu.d").iterdir() if path.name != own.name]
    times = []
    for path in others:
        with contextlib.suppress(OSError):
            info = path.stat()
            if stat.S_ISREG(info.st_mode) and info.st_mode & 0o111:
                times.append(info.st_ctime)
    return min(times, default=None)


def _interpreter(path: Path, root: Path) -> tuple[str | None, str | None, str | None]:
    """The interpreter that the hook names, why it fails, and why that cannot be tried."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_HOOK).decode(errors="replace")
    except OSError as error:
        return None, None, error.strerror
    named = _PYTHON.search(text)
    if named is None:
        return None, None, "it names no interpreter in a line python="
    python = named.group(1)
    if root != rooted.HOST:
        return python, None, "not run, as it belongs to another root"
    if not may_run(Path(python)):
        return python, None, f"{python} was not run, as others than its owner can write to it"
    program = f"import igvmfw.hook; print({_IMPORTED!r})"
    try:
        answer = run_bounded(Path(python), "-I", "-c", program, seconds=_ANSWER)
    except EmulatorError as error:
        return python, error.message, None
    if answer.returncode == 0 and _IMPORTED in answer.stdout:
        return python, None, None
    lines = answer.stdout.strip().splitlines()
    return python, lines[-1][:200] if lines else f"exit status {answer.returncode}", None


def daemons(root: Path) -> Iterator[Daemon]:
    """The running daemons that see this root's hooks."""
    booted = _boot_time(root)
    try:
        names = [name for name in os.listdir(root / "proc") if name.isdecimal()]
    except OSError:
        return
    for name in names[:_MAX_PROCESSES]:
        directory = root / "proc" / name
        with contextlib.suppress(OSError, ValueError, IndexError):
            command = (directory / "comm").read_text(errors="replace").strip()
            if command not in _DAEMONS or not _sees(directory, root):
                continue
            # after the command, which is in parentheses and may hold any character: proc(5)
            fields = (directory / "stat").read_text(errors="replace").rpartition(")")[2].split()
            started = booted + int(fields[19]) / os.sysconf("SC_CLK_TCK")
            yield Daemon(name=command, pid=int(name), started=started)


def _boot_time(root: Path) -> float:
    """When the host was booted, in seconds since the epoch."""
    if root == rooted.HOST:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)  # btime has whole seconds
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/stat").read_text(errors="replace").splitlines():
            if line.startswith("btime "):
                return float(line.split()[1])
    return 0.0


def _sees(process: Path, root: Path) -> bool:
    """Whether a process has the same hooks: another container's daemon has others."""
    try:
        theirs = os.stat(process / "root" / HOOKS)
    except PermissionError:
        return True  # only root can look
    except OSError:
        return False
    with contextlib.suppress(OSError):
        return os.path.samestat(theirs, os.stat(rooted.resolve(root, HOOKS)))
    return False
