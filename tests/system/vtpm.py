"""Domains whose firmware keeps the state of its vTPM, and an emulator that can give it to them."""

import json
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.system.guests import Result, igvmfw, wrap

SIZE = 8 << 20
STORAGE: dict[str, object] = {
    "interface": "virtio-blk-mmio",
    "format": "raw",
    "size-bytes": SIZE,
}
# QEMU without the slots of COCONUT-SVSM's: what names them is left out, and the disk goes to the
# bus that there is; all else is as the domain has it
EMULATOR = """\
#!/usr/bin/python3 -I
import os, sys
words = sys.argv[1:]
if words[:1] == ["-machine"] and words[1].endswith(",help"):
    print("  x-svsm-virtio-mmio=<bool>")
    {planes}
    sys.stdout.flush()
for place, word in enumerate(words):
    if words[place - 1] == "-machine":
        parts = [part for part in word.split(",") if part not in {left_out}]
        words[place] = ",".join(parts)
    if words[place - 1] == "-device" and word.startswith("virtio-blk-device,"):
        words[place] = word.replace("virtio-blk-device", "virtio-blk-pci").replace(",plane=0", "")
pairs = list(zip(words, words[1:] + [""]))
drop = [i for i, pair in enumerate(pairs) if pair == ("-machine", "")]
words = [word for i, word in enumerate(words) if i not in drop and i - 1 not in drop]
os.execv({qemu!r}, [{qemu!r}, *words])
"""


def emulator(directory: Path, qemu: Path, *, planes: bool = False) -> Path:
    """An emulator that has the machine property for the SVSM's disk."""
    path = directory / ("qemu-planes" if planes else "qemu-slots")
    left_out = {"x-svsm-virtio-mmio=on", "device-plane=2"}
    text = EMULATOR.format(
        qemu=str(qemu),
        left_out=left_out,
        planes='print("  device-plane=<uint32>")' if planes else "",
    )
    path.write_text(text)
    path.chmod(0o755)
    return path


def firmware(root: Path, ovmf: Path, *words: str, storage: dict[str, object] = STORAGE) -> Path:
    """A root with an IGVM file whose descriptor asks for storage."""
    file = root / "usr/share/svsm/svsm.igvm"
    file.parent.mkdir(parents=True)
    wrap(ovmf, file, *(words or ("--platform", "native")))
    directory = root / "etc/qemu/firmware"
    directory.mkdir(parents=True)
    descriptor = {
        "description": "a firmware with a vTPM",
        "interface-types": ["uefi"],
        "mapping": {
            "device": "igvm",
            "filename": "/usr/share/svsm/svsm.igvm",
            "x-vtpm-storage": storage,
        },
        "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
        "features": ["amd-sev-snp", "vtpm"] if "sev-snp" in words else ["vtpm"],
        "tags": [],
    }
    (directory / "50-svsm.json").write_text(json.dumps(descriptor))
    return file


def domain(qemu: Path, *, name: str = "guest", id_: str | None = None, more: str = "") -> str:
    """A domain that asks for firmware with a vTPM."""
    stated = f"<uuid>{id_}</uuid>" if id_ else ""
    return f"""\
<domain type='kvm'>
  <name>{name}</name>
  {stated}
  <memory unit='MiB'>256</memory>
  <os firmware='igvm'>
    <type arch='x86_64' machine='q35'>hvm</type>
    <firmware>
      <feature enabled='yes' name='vtpm'/>
    </firmware>
  </os>
  <features>
    <acpi/>
  </features>
  <devices>
    <emulator>{qemu}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
  {more}
</domain>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """An embedded driver, with firmware to choose from and an emulator."""

    uri: str
    embedded: Path
    root: Path
    qemu: Path
    work: Path

    @property
    def states(self) -> Path:
        return self.embedded / "lib/qemu/igvmfw"

    def state(self, id_: str) -> Path:
        return self.states / f"libvirt-{id_}.raw"

    def run(self, command: str, *words: str | Path) -> Result:
        return igvmfw(command, "-c", self.uri, *words)

    def define(self, text: str, *words: str) -> Result:
        xml = self.work / "guest.xml"
        xml.write_text(text)
        return self.run("define", "--root", self.root, *words, xml)

    def create(self, text: str, *words: str) -> Result:
        xml = self.work / "guest.xml"
        xml.write_text(text)
        return self.run("create", "--root", self.root, *words, xml)

    def virsh(self, *words: str | Path) -> str:
        command = ["virsh", "-q", "-c", self.uri, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stop(self, name: str = "guest") -> None:
        """End a guest, as one does that shuts down."""
        pid = int((self.embedded / "run/qemu" / f"{name}.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(300):
            if not Path(f"/proc/{pid}").exists():
                return
            time.sleep(0.1)
        raise TimeoutError(f"guest {name} does not end")

    def defined(self, name: str = "guest") -> str:
        """What libvirt keeps of a domain."""
        return (self.embedded / "etc/qemu" / f"{name}.xml").read_text()

    def blocks(self, name: str = "guest") -> list[dict[str, Any]]:
        """What QEMU itself says of its disks."""
        answer = self.virsh("qemu-monitor-command", name, '{"execute":"query-block"}')
        devices: list[dict[str, Any]] = json.loads(answer)["return"]
        return devices


def uuid_in(xml: str) -> str:
    """The UUID of a domain."""
    found = re.search(r"<uuid>(.*)</uuid>", xml)
    assert found is not None
    return str(uuid.UUID(found.group(1)))


def arguments(xml: str) -> Sequence[str]:
    """What stands in <qemu:commandline>."""
    from igvmfw.virt.domain import Domain

    return Domain.parse(xml.encode()).arguments
