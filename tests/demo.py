"""The main job, shown step by step: a distribution's OVMF starts guests as an IGVM file.

Everything happens below .demo/ in the checkout, which each run makes anew; only what the test bed
builds is kept, in the cache.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.testbed.cache import printed
from tests.testbed.standin import DEVICE, make_emulator

CHECKOUT = Path(__file__).resolve().parent.parent
DEMO = CHECKOUT / ".demo"
ROOT = DEMO / "root"
LIBVIRT = DEMO / "v"
ROOM = 60  # bytes for libvirt's directory: QEMU's sockets lie up to 45 below it, Linux takes 107
IMAGE = ROOT / "usr/share/igvm/OVMF.igvm"
OVMF = Path("/usr/share/ovmf/OVMF.fd")
# the boot manager's last word: with a boot option (OVMF has a shell of its own), or without
BOOT_MANAGER = re.compile(r"BdsDxe: (?:starting Boot\w+|No bootable option)[^\r\n\x1b]*")

NATIVE = """\
<domain type='qemu'>
  <name>demo</name>
  <memory unit='MiB'>256</memory>
  <os firmware='igvm'>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    <serial type='file'><source path='{serial}'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""
SEV_ES = """\
<domain type='kvm'>
  <name>demo-sev-es</name>
  <memory unit='MiB'>256</memory>
  <vcpu>2</vcpu>
  <os firmware='igvm'>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <features><acpi/></features>
  <launchSecurity type='sev'>
    <cbitpos>0</cbitpos>
    <reducedPhysBits>1</reducedPhysBits>
    <policy>0x7</policy>
  </launchSecurity>
  <devices>
    <emulator>{emulator}</emulator>
    <memballoon model='none'/>
  </devices>
</domain>
"""

_step = 0


def step(title: str) -> None:
    """Begin a step of the demonstration."""
    global _step
    _step += 1
    print(f"\n\033[1m{_step}. {title}\033[0m" if sys.stdout.isatty() else f"\n{_step}. {title}")


def igvmfw(*words: str | Path, quiet: bool = False) -> str:
    """Run a command of igvmfw as a person would; its output is shown and returned."""
    command = ["igvmfw", *map(str, words)]
    shown = [word.removeprefix(f"{CHECKOUT}/") for word in command]
    print(f"$ {shlex.join(shown)}")
    program = Path(sys.executable).with_name("igvmfw")
    done = subprocess.run(
        [program, *command[1:]], stdout=subprocess.PIPE, text=True, check=False, timeout=120
    )
    if not quiet:
        print(done.stdout, end="")
    if done.returncode:
        sys.exit(f"demo: the command failed with exit status {done.returncode}")
    return done.stdout


@contextlib.contextmanager
def embedded() -> Iterator[str]:
    """The URI of libvirt's embedded driver; by way of a link where the checkout lies too deep."""
    LIBVIRT.mkdir()
    with tempfile.TemporaryDirectory(prefix="igvmfw-") as near:
        way = LIBVIRT
        if len(os.fsencode(LIBVIRT)) > ROOM:
            way = Path(near) / "v"
            way.symlink_to(LIBVIRT)
        try:
            yield f"qemu:///embed?root={way}"
        finally:
            end_guests()


def end_guests() -> None:
    """Stop the guests of this demonstration, of an interrupted run too."""
    for file in LIBVIRT.glob("run/qemu/*.pid"):
        if file.name == "driver.pid":
            continue  # the driver's own: of the process that has this directory open
        try:
            os.kill(int(file.read_text()), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def boot_manager(serial: Path, seconds: float = 180) -> str:
    """The boot manager's line on a serial console, as soon as it is there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        content = serial.read_text(errors="replace") if serial.exists() else ""
        found = BOOT_MANAGER.search(content)
        if found:
            return found.group()
        time.sleep(0.2)
    sys.exit(f"demo: the boot manager did not speak on {serial} within {seconds:.0f} s")


def firmware() -> None:
    """Steps from the raw image to the list of available firmware."""
    step("The distribution's OVMF becomes an IGVM file")
    IMAGE.parent.mkdir(parents=True)
    every = ("native", "sev", "sev-es", "sev-snp")
    platforms = [word for name in every for word in ("--platform", name)]
    igvmfw("wrap", OVMF, "-o", IMAGE, *platforms, "--vcpus", "2")
    step("What is inside")
    igvmfw("inspect", IMAGE)
    step("Its firmware descriptor, as QEMU's firmware.json has it")
    igvmfw("describe", IMAGE)
    step("Installed, in a private root")
    igvmfw("install", "--root", ROOT, IMAGE)
    step("What a domain can choose from")
    igvmfw("list", "--root", ROOT)


def native_guest(uri: str, emulator: Path) -> None:
    """A plain guest, up to its firmware's last line."""
    serial = DEMO / "serial.log"
    domain = DEMO / "demo.xml"
    domain.write_text(NATIVE.format(emulator=emulator, serial=serial))
    step("A domain asks for firmware='igvm': what unmodified libvirt gets instead")
    igvmfw("rewrite", "--root", ROOT, "--diff", domain)
    step("Defined and started by libvirt's embedded driver (TCG, as on any machine)")
    igvmfw("define", "-c", uri, "--root", ROOT, domain)
    igvmfw("start", "-c", uri, "demo")
    print("waiting for the firmware (about 20 s) …")
    print(boot_manager(serial))


def sev_es_guest(uri: str, qemu: Path) -> None:
    """A SEV-ES guest on the stand-in host, up to its measurement."""
    step("A SEV-ES guest with 2 vCPUs, on a stand-in for a SEV host")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        print("left out: no access to /dev/kvm, which the stand-in needs")
        return
    made = not DEVICE.exists()
    if made and not os.access(DEVICE.parent, os.W_OK):
        print(f"left out: there is no {DEVICE}, and only root can make a stand-in for it")
        return
    if made:
        DEVICE.touch()
    try:
        emulator = make_emulator(DEMO / "sev", qemu)
        domain = DEMO / "demo-sev-es.xml"
        domain.write_text(SEV_ES.format(emulator=emulator.path))
        igvmfw("create", "-c", uri, "--root", ROOT, "--paused", domain)
        record = emulator.wait_for("measure")
        step("What QEMU handed over to be measured, recorded by the stand-in")
        print(f"operations    {' '.join(record.operations)}")
        print(f"policy        0x{record.policy or 0:x}")
        print(f"encrypted     {len(record.data)} bytes in {len(record.updates)} updates")
        print(f"vCPUs         {len(record.vcpus)}, each with its VMSA")
        assert record.digest is not None
        print(f"launch digest {record.digest.hex()}")
        computed = igvmfw("measure", IMAGE, "--platform", "sev-es", "--vcpus", "2", "--bare")
        if computed.strip() != record.digest.hex():
            sys.exit("demo: the recorded digest is not the computed one")
        print("the same: what was launched is what the file says")
    finally:
        if made:
            DEVICE.unlink(missing_ok=True)


def main() -> None:
    """Run the whole demonstration."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # what comes next may take a while, in a log too
    if not OVMF.exists():
        sys.exit(f"demo: {OVMF} is missing: install the package ovmf (make demo does)")
    qemu = printed("build-qemu.sh")
    if not qemu.exists():
        sys.exit("demo: there is no QEMU with IGVM support: run make demo, which builds one")
    end_guests()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    started = time.monotonic()
    print(f"QEMU with IGVM support: {qemu}")
    firmware()
    with embedded() as uri:
        native_guest(uri, qemu)
        sev_es_guest(uri, qemu)
    print(f"\nEverything above is in {DEMO}; it took {time.monotonic() - started:.0f} s.")
    print(f"The guest's firmware: {boot_manager(DEMO / 'serial.log')}")


if __name__ == "__main__":
    main()
