"""The stand-in for a SEV host: built, put before an emulator, and its record read.

The stand-in (sevsim/) is preloaded into QEMU.  libvirt starts emulators with an environment of its
own making, so the emulator it is given is a script that sets what the stand-in needs.
"""

import hashlib
import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.testbed.cache import CACHE

SOURCES = Path(__file__).parent / "sevsim"
COMPILE = "gcc -shared -fPIC -O2 -Wall -Wextra -Werror".split()
LIBRARIES = ["-ldl", "-lpthread", "-lcrypto"]
PAGE_SIZE = 4096
API_VERSION = (1, 55, 21)  # major, minor, build, as the stand-in's firmware states them
DEVICE = Path("/dev/sev")


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One LAUNCH_UPDATE: what QEMU handed over.

    `page_type` is SNP_LAUNCH_UPDATE's (1 normal, 3 zero, 4 unmeasured, 5 secrets, 6 CPUID), None
    for SEV and SEV-ES.  `gpa` is None where the memory was not yet part of the guest.
    """

    gpa: int | None
    data: bytes
    page_type: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredVcpu:
    """A vCPU's VMSA as KVM would have it encrypted and measured."""

    index: int
    page: bytes
    registers: Mapping[str, int]  # a segment's parts as "cs.base", "cs.attrib", …


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRecord:
    """What a launch consisted of, in the order measured."""

    operations: tuple[str, ...]
    vm_type: int  # 0 is the default type, 2 SEV, 3 SEV-ES, 4 SEV-SNP
    sev_features: int
    policy: int | None
    updates: tuple[Update, ...]
    vcpus: tuple[MeasuredVcpu, ...]
    digest: bytes | None  # 32 bytes for SEV and SEV-ES, 48 for SEV-SNP; None before it is final
    measurement: bytes | None  # SEV, SEV-ES: HMAC and nonce, as LAUNCH_MEASURE returns them
    id_block: bytes | None
    id_auth: bytes | None

    @property
    def data(self) -> bytes:
        """All bytes handed over by LAUNCH_UPDATE, in order."""
        return b"".join(update.data for update in self.updates)


@dataclass(frozen=True, slots=True, kw_only=True)
class SevEmulator:
    """An emulator that finds itself on a SEV host.

    `path` goes into a domain's <emulator>, or is run directly.  Only its latest launch is kept on
    record: domains that run at the same time need one emulator each.
    """

    path: Path
    records: Path
    tik: bytes  # the transport integrity key that signs SEV's and SEV-ES' measurement

    def forget(self) -> None:
        """Drop the record of the latest launch, so that the next one cannot be taken for it."""
        (self.records / "launch.jsonl").unlink(missing_ok=True)

    def record(self) -> LaunchRecord:
        """The latest launch, as far as it got.

        Raises:
            FileNotFoundError: No guest has begun its launch.
        """
        return parse_record(self.records)

    def wait_for(self, operation: str, *, seconds: float = 30) -> LaunchRecord:
        """The latest launch, once it has come to an operation such as "finish".

        Raises:
            TimeoutError: It has not within `seconds`.
        """
        deadline = time.monotonic() + seconds
        log = self.records / "launch.jsonl"
        while time.monotonic() < deadline:
            if log.exists() and b"\n" in log.read_bytes():  # its first step stands there whole
                record = self.record()
                if operation in record.operations:
                    return record
            time.sleep(0.05)
        raise TimeoutError(f"the launch has not come to {operation!r} in {seconds} s")


def build_library() -> Path:
    """Compile the stand-in into the cache, unless it is there; returns the shared object.

    Raises:
        FileNotFoundError: There is no gcc.
        RuntimeError: It does not compile, with gcc's messages.
    """
    sources = sorted(SOURCES.glob("*.[ch]"))
    key = hashlib.sha256(
        b"\0".join([*(s.read_bytes() for s in sources), *map(os.fsencode, COMPILE)])
    )
    library = CACHE / f"sevsim-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="sevsim.") as work:
        built = Path(work) / library.name
        units = [str(source) for source in sources if source.suffix == ".c"]
        command = [*COMPILE, "-o", str(built), *units, *LIBRARIES]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if run.returncode:
            raise RuntimeError(f"the SEV stand-in does not compile:\n{run.stderr}")
        built.rename(library)
    return library


def make_emulator(directory: Path, qemu: Path, *, tik: bytes = bytes(16)) -> SevEmulator:
    """Write the script that runs `qemu` on the stand-in.

    Args:
        directory: Where script and record go; the emulator's user must be able to write there.
        qemu: The emulator to run.
        tik: 16 bytes.
    """
    records = directory / "launch"
    records.mkdir(parents=True, exist_ok=True)
    settings = {
        "SEVSIM_RECORD": str(records),
        "SEVSIM_TIK": tik.hex(),
        "LD_PRELOAD": str(build_library()),
    }
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
    path = directory / "qemu-system-x86_64-sev"
    path.write_text(f'#!/bin/sh\nexport {exports}\nexec {shlex.quote(str(qemu))} "$@"\n')
    path.chmod(0o755)
    return SevEmulator(path=path, records=records, tik=tik)


def parse_record(records: Path) -> LaunchRecord:
    """Read the record that a launch left in a directory."""
    lines = (records / "launch.jsonl").read_text().split("\n")[:-1]  # whole lines only
    steps = [json.loads(line) for line in lines]
    merged: dict[str, Any] = {}
    for step in steps:
        merged |= step
    return LaunchRecord(
        operations=tuple(step["op"] for step in steps),
        vm_type=merged["vm_type"],
        sev_features=merged["sev_features"],
        policy=merged.get("policy"),
        updates=_updates(steps, (records / "data.bin").read_bytes()),
        vcpus=_vcpus(steps, (records / "vmsa.bin").read_bytes()),
        digest=_bytes(merged, "digest"),
        measurement=_bytes(merged, "measurement"),
        id_block=_bytes(merged, "id_block"),
        id_auth=_bytes(merged, "id_auth"),
    )


def _bytes(step: Mapping[str, Any], name: str) -> bytes | None:
    return bytes.fromhex(step[name]) if name in step else None


def _updates(steps: list[dict[str, Any]], data: bytes) -> tuple[Update, ...]:
    updates = []
    place = 0
    for step in steps:
        if "len" not in step:
            continue
        part = data[place : place + step["len"]]
        place += step["len"]
        # the guest's memory may change after it was handed over, the record must not
        assert hashlib.sha256(part).hexdigest() == step["sha256"]
        updates.append(Update(gpa=step.get("gpa"), data=part, page_type=step.get("type")))
    return tuple(updates)


def _vcpus(steps: list[dict[str, Any]], pages: bytes) -> tuple[MeasuredVcpu, ...]:
    measured = [step for step in steps if step["op"] == "vmsa"]
    return tuple(
        MeasuredVcpu(
            index=step["vcpu"],
            page=pages[place * PAGE_SIZE : (place + 1) * PAGE_SIZE],
            registers=step["registers"],
        )
        for place, step in enumerate(measured)
    )
