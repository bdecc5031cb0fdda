"""Where domains come from and where they run: virt-install, a user's session, another host."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from igvmfw.virt.domain import Domain
from igvmfw.virt.record import Record
from tests.parts import need
from tests.system.daemons import Daemon
from tests.system.guests import Result, domain, igvmfw, wrap
from tests.testbed.cache import CACHE
from tests.testbed.standin import SevEmulator, make_emulator

HERE_ALONE = pytest.mark.parametrize("running", ["host"], indirect=True)
VIRT_INSTALL = Path("/usr/bin/virt-install")
# as root on the other host would have it: netcat to libvirt's socket, whatever is asked for
SSH = """\
#!/bin/sh
exec {python} -c '
import os, socket, sys, threading
there = socket.socket(socket.AF_UNIX)
there.connect(sys.argv[1])
def up():
    while data := os.read(0, 65536):
        there.sendall(data)
    there.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while data := there.recv(65536):
    os.write(1, data)
' {socket}
"""


def virt_install(daemon: Daemon, emulator: Path, *words: str) -> str:
    """What virt-install makes of a machine without disks."""
    need(VIRT_INSTALL.exists(), "virt-install (virtinst)")
    common = (
        "--virt-type kvm --name guest --memory 512 --vcpus 2 --machine q35 --import --print-xml"
    )
    common += " --disk none --network none --graphics none --osinfo detect=off,require=off"
    boot, *others = words
    command = [str(VIRT_INSTALL), "--connect", daemon.uri, *common.split()]
    command += ["--boot", f"{boot},emulator={emulator}", *others]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def piped(text: str, *words: str | Path) -> Result:
    command = [sys.executable, "-m", "igvmfw", *map(str, words), "-"]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, timeout=120
    )
    return Result(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.fixture
def root(ovmf: Path, tmp_path: Path) -> Path:
    """A tree with one firmware installed."""
    root = tmp_path / "root"
    (root / "usr/share/igvm").mkdir(parents=True)
    words = [word for p in ("native", "sev", "sev-es") for word in ("--platform", p)]
    file = wrap(ovmf, root / "usr/share/igvm/ovmf.igvm", *words, "--vcpus", "2")
    installed = igvmfw("install", "--root", root, file)
    assert installed.code == 0, installed.err
    return root


@HERE_ALONE
@pytest.mark.parametrize("form", ["firmware", "loader"])
def test_what_virt_install_prints_is_defined_and_starts(
    daemon: Daemon, igvm_qemu: Path, root: Path, form: str
) -> None:
    file = root / "usr/share/igvm/ovmf.igvm"
    boot = "firmware=igvm" if form == "firmware" else f"loader={file},loader.type=igvm"
    printed = virt_install(daemon, igvm_qemu, boot)
    defined = piped(printed, "define", "-c", daemon.uri, "--root", root)
    assert defined.code == 0, defined.err
    assert defined.out == "Domain 'guest' defined\n"
    started = igvmfw("start", "-c", daemon.uri, "--paused", "guest")
    assert started.code == 0, started.err
    assert f"file={file}" in daemon.virsh("dumpxml", "guest").out


@HERE_ALONE
def test_the_uefi_that_virt_install_insists_on_becomes_igvm(
    daemon: Daemon, igvm_qemu: Path, root: Path, tmp_path: Path
) -> None:
    need(shutil.which("gcc") is not None, "gcc, for the SEV stand-in")
    host: SevEmulator = make_emulator(tmp_path, igvm_qemu)
    printed = virt_install(daemon, host.path, "uefi", "--launchSecurity", "type=sev")
    asked = Domain.parse(printed.encode())
    assert asked.security is not None
    assert asked.security.policy in (0x03, 0x07)
    words = ("-c", daemon.uri, "--root", root, "--no-lock-memory", "--igvm")
    defined = piped(printed, "define", *words)
    assert defined.code == 0, defined.err
    # what virt-install stated is what is launched; started as any domain is
    assert daemon.virsh("start", "--paused", "guest").err == ""
    assert host.wait_for("measure").policy == asked.security.policy
    # and the way back
    stored = tmp_path / "stored.xml"
    stored.write_text(daemon.virsh("dumpxml", "--inactive", "guest").out)
    back = Domain.parse(igvmfw("restore", stored).out.encode())
    assert Record.find(back) is None
    assert back.arguments == ()
    assert (back.os.firmware, back.os.loader is None) == (
        asked.os.firmware,
        asked.os.loader is None,
    )


@pytest.fixture
def remote(daemon: Daemon, tmp_path: Path) -> str:
    """The URI of a daemon that is, for all that libvirt's client knows, on another host."""
    ssh = tmp_path / "ssh"
    socket = daemon.root / "run/libvirt/libvirt-sock"
    ssh.write_text(SSH.format(python=sys.executable, socket=socket))
    ssh.chmod(0o755)
    return f"qemu+ssh://there.example/system?command={ssh}&socket={socket}&proxy=netcat"


@HERE_ALONE
def test_on_another_host_is_said_what_cannot_be_checked(
    daemon: Daemon, remote: str, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    file = wrap(ovmf, tmp_path / "ovmf.igvm")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file))
    defined = igvmfw("define", "-c", remote, xml)
    assert defined.code == 0, defined.err
    assert "the firmware is chosen and checked here, not on there.example" in defined.err
    started = igvmfw("start", "-c", remote, "--paused", "guest")
    assert started.code == 0, started.err
    assert "the IGVM file and QEMU are on there.example: not checked from here" in started.err
    shown = igvmfw("dumpxml", "-c", remote, "guest")
    assert str(file) in shown.out
    unknown = igvmfw("verify", "-c", remote, "guest")
    assert (unknown.code, unknown.out) == (1, "")
    assert "a native guest is not measured by SEV" in unknown.err
    assert daemon.virsh("destroy", "guest").code == 0
    # the other host looks by itself, where it has the hook
    file.unlink()
    refused = igvmfw("start", "-c", remote, "guest")
    assert refused.code == 4
    assert f"igvmfw: error: {file}: cannot read" in refused.err
    assert igvmfw("undefine", "-c", remote, "guest").code == 0


# a way to another host that is cut at a call, before it gets there or before the answer comes; a
# call has its length and, as the fourth number, what is called (docs/kbase/internals/rpc.rst)
CUT = """\
#!{python}
import os, select, socket, struct
there = socket.socket(socket.AF_UNIX)
there.connect({socket!r})
sent = b""
while True:
    for ready in select.select([0, there], [], [])[0]:
        if ready is there:
            os.write(1, there.recv(65536))
            continue
        sent += os.read(0, 65536)
        while len(sent) > 16 and len(sent) >= (size := struct.unpack(">I", sent[:4])[0]):
            called = struct.unpack(">I", sent[12:16])[0] == {call}
            if not (called and {before}):
                there.sendall(sent[:size])
            if called:
                raise SystemExit
            sent = sent[size:]
"""


@HERE_ALONE
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("command", "call"),  # src/remote/remote_protocol.x
    [("define", 350), ("start", 196), ("undefine", 231), ("dumpxml", 14)],
)
def test_a_connection_that_is_lost(
    daemon: Daemon,
    igvm_qemu: Path,
    ovmf: Path,
    tmp_path: Path,
    command: str,
    call: int,
    before: bool,
) -> None:
    file = wrap(ovmf, tmp_path / "ovmf.igvm")
    xml, relay = tmp_path / "guest.xml", tmp_path / "relay"
    xml.write_text(domain(igvm_qemu, file))
    if command != "define":
        assert igvmfw("define", "-c", daemon.uri, xml).code == 0
    socket = f"{daemon.root}/run/libvirt/libvirt-sock"
    values = {"python": sys.executable, "socket": socket, "call": call, "before": before}
    relay.write_text(CUT.format(**values))
    relay.chmod(0o755)
    uri = f"qemu+ext://there.example/system?command={relay}"
    lost = igvmfw(command, "-c", uri, xml if command == "define" else "guest")
    assert (lost.code, lost.out) == (4, "")
    *warnings, said = lost.err.splitlines()
    assert all(line.startswith("igvmfw: warning: ") for line in warnings)
    assert said.startswith("igvmfw: error: domain 'guest': ")
    assert "(the connection was lost, perhaps after libvirt had done" in said


@HERE_ALONE
def test_a_guest_of_another_host_is_verified_with_a_file_of_ones_own(
    daemon: Daemon, remote: str, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    need(shutil.which("gcc") is not None, "gcc, for the SEV stand-in")
    host = make_emulator(tmp_path, igvm_qemu, tik=bytes(range(16)))
    file = wrap(ovmf, tmp_path / "sev.igvm", "--platform", "sev")
    xml, tik = tmp_path / "guest.xml", tmp_path / "tik.bin"
    tik.write_bytes(host.tik)
    security = "<launchSecurity type='sev'><policy>0x1</policy></launchSecurity>"
    xml.write_text(domain(host.path, file, security=security))
    created = igvmfw("create", "-c", remote, "--no-lock-memory", "--paused", xml)
    assert created.code == 0, created.err
    unnamed = igvmfw("verify", "-c", remote, "--tik", tik, "guest")
    assert (unnamed.code, unnamed.out) == (2, "")
    assert f"{file} is on the host of guest, not here (name your own copy" in unnamed.err
    yes = igvmfw("verify", "-c", remote, "--tik", tik, "--file", file, "guest")
    assert yes.code == 0, yes.out + yes.err


@pytest.fixture
def session() -> Iterator[str]:
    """The URI of the daemon of a user without rights."""
    need(os.geteuid() == 0, "root, to become another user")
    need(shutil.which("libvirtd", path="/usr/sbin:/usr/bin") is not None, "libvirtd")
    nobody = pwd.getpwnam("nobody")
    home = Path(tempfile.mkdtemp(prefix="igvmfw-u-", dir="/tmp"))
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    names = ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
    environment = {name: str(home) for name in names} | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            ["libvirtd"],
            env=environment,
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
            stdout=log,
            stderr=log,
        )
    try:
        socket = home / "libvirt/libvirt-sock"
        for _ in range(300):
            if socket.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert socket.exists(), (home / "log").read_text()
        yield f"qemu+unix:///session?socket={socket}"
    finally:
        process.terminate()
        process.wait(timeout=30)
        shutil.rmtree(home, ignore_errors=True)


def test_a_users_session(
    session: str, ovmf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a QEMU that takes no IGVM files, as far as it goes without."""
    emulator = Path("/usr/bin/qemu-system-x86_64")
    need(emulator.exists(), f"the distribution's QEMU ({emulator})")
    file = wrap(ovmf, tmp_path / "ovmf.igvm")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(emulator, file, kind="qemu"))
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", session)
    defined = igvmfw("define", "--validate", xml)
    assert defined.code == 0, defined.err
    shown = Domain.parse(igvmfw("dumpxml", "guest").out.encode()).request()
    assert shown is not None
    assert shown.path == str(file)
    monkeypatch.setenv("VISUAL", "sed -i s/>262144</>327680</")
    assert igvmfw("edit", "guest").out == "Domain 'guest' edited\n"
    assert igvmfw("undefine", "guest").out == "Domain 'guest' has been undefined\n"


@pytest.fixture
def readable() -> Iterator[Path]:
    """A directory that every user may read."""
    with tempfile.TemporaryDirectory(prefix="igvmfw-r-", dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


def test_a_guest_in_a_users_session(
    session: str, ovmf: Path, igvm_qemu: Path, readable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = readable / igvm_qemu.relative_to(igvm_qemu.parents[1])
    # the test bed's lies where only its maker may look; a distribution's is too large to copy
    if igvm_qemu.is_relative_to(CACHE):
        shutil.copytree(igvm_qemu.parents[1], readable, dirs_exist_ok=True)
    else:
        emulator = igvm_qemu
    file = wrap(ovmf, readable / "ovmf.igvm")
    xml = readable / "guest.xml"
    xml.write_text(domain(emulator, file, kind="qemu"))
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", session)
    defined = igvmfw("define", xml)
    assert defined.code == 0, defined.err
    assert "will not start" not in defined.err
    started = igvmfw("start", "--paused", "guest")
    assert started.code == 0, started.err
    try:
        processes = [
            entry
            for entry in Path("/proc").glob("[0-9]*")
            if f"igvm-cfg,id=igvm0,file={file}" in _command(entry)
        ]
        (guest,) = processes
        assert guest.stat().st_uid == pwd.getpwnam("nobody").pw_uid
        shown = Domain.parse(igvmfw("dumpxml", "guest").out.encode()).request()
        assert shown is not None
        assert shown.path == str(file)
    finally:
        subprocess.run(["virsh", "-q", "-c", session, "destroy", "guest"], check=True, timeout=60)
    assert igvmfw("undefine", "guest").code == 0


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:  # it has ended
        return ""
