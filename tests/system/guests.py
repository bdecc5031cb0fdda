"""Domains, files and commands for tests with real guests."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a command left."""

    code: int
    out: str
    err: str


def igvmfw(*words: str | Path) -> Result:
    """Run a command in a process of its own: its guests have to outlive it."""
    command = [sys.executable, "-m", "igvmfw", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    return Result(code=done.returncode, out=done.stdout, err=done.stderr)


def wrap(firmware: Path, file: Path, *words: str) -> Path:
    """Make an IGVM file of a raw firmware image."""
    result = igvmfw("wrap", firmware, "-o", file, *words)
    assert result.code == 0, result.err
    return file


def domain(
    emulator: Path,
    file: Path,
    *,
    kind: str = "kvm",
    name: str = "guest",
    machine: str = "q35",
    vcpus: int = 1,
    security: str = "",
    serial: Path | None = None,
) -> str:
    """A domain that asks for an IGVM file by path."""
    port = f"<serial type='file'><source path='{serial}'/></serial>" if serial else ""
    return f"""\
<domain type='{kind}'>
  <name>{name}</name>
  <memory unit='MiB'>256</memory>
  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <loader type='igvm'>{escape(str(file))}</loader>
  </os>
  <features>
    <acpi/>
  </features>
  <devices>
    <emulator>{emulator}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {port}
  </devices>
  {security}
</domain>
"""


def wait_for(file: Path, text: bytes, *, seconds: float) -> bytes:
    """What a serial console has printed, once a text is in it.

    Raises:
        TimeoutError: It has not come within `seconds`; with what came instead.
    """
    deadline = time.monotonic() + seconds
    seen = b""
    while time.monotonic() < deadline:
        seen = file.read_bytes() if file.exists() else b""
        if text in seen:
            return seen
        time.sleep(0.2)
    raise TimeoutError(f"no {text!r} within {seconds} s, but {seen[-300:]!r}")
