"""The hook with a real libvirtd: an allowed start, and each refusal as virsh prints it."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igvmfw import statefile
from igvmfw.qemu import emulator
from tests.parts import need
from tests.system import vtpm
from tests.system.daemons import Daemon, install_hook, serving
from tests.system.guests import domain, igvmfw, wrap
from tests.testbed.cache import SUITES
from tests.testbed.standin import make_emulator

HERE_ALONE = pytest.mark.parametrize("running", ["host"], indirect=True)


@pytest.fixture
def native(daemon: Daemon, igvm_qemu: Path, ovmf: Path, tmp_path: Path) -> Path:
    """The file of a plain guest that is defined as `guest`."""
    file = wrap(ovmf, tmp_path / "native.igvm")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file))
    defined = igvmfw("define", "-c", daemon.uri, xml)
    assert defined.code == 0, defined.err
    return file


def refused(daemon: Daemon, name: str = "guest") -> str:
    """What virsh says of a start that the hook stops."""
    result = daemon.virsh("start", name)
    assert result.code == 1
    assert "Hook script execution failed" in result.err
    assert f"{name} prepare begin" in result.err
    said = result.err.partition("unexpected exit status 1: ")[2].strip()
    assert len(said.splitlines()) == 1, said
    assert said.startswith("igvmfw: error: ")
    assert daemon.virsh("domstate", name).out.strip() == "shut off"
    return said.removeprefix("igvmfw: error: ")


def test_a_guest_whose_file_is_as_chosen_starts(daemon: Daemon, native: Path) -> None:
    assert daemon.virsh("start", "--paused", "guest").err == ""
    # what was found fit is kept where nobody else can put anything
    kept = daemon.root / "run/igvmfw"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert [entry.stat().st_mode & 0o777 for entry in kept.iterdir()] == [0o600]
    assert daemon.virsh("destroy", "guest").code == 0
    assert daemon.virsh("start", "--paused", "guest").err == ""
    assert len(list(kept.iterdir())) == 1


@pytest.mark.parametrize("suite", [None, *SUITES[-1:]])
def test_a_reload_has_libvirt_look_for_it(
    suite: str | None, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    with serving(suite, hook=False) as daemon:
        file = wrap(ovmf, tmp_path / "native.igvm")
        xml = tmp_path / "guest.xml"
        xml.write_text(domain(igvm_qemu, file))
        assert igvmfw("define", "-c", daemon.uri, xml).code == 0
        install_hook(daemon.hook, daemon.python)
        file.write_bytes(file.read_bytes()[:-1])
        assert "Hook script" not in daemon.virsh("start", "guest").err
        daemon.virsh("destroy", "guest")
        daemon.reload()
        deadline = time.monotonic() + 30
        while "Hook script" not in daemon.virsh("start", "guest").err:
            daemon.virsh("destroy", "guest")
            assert time.monotonic() < deadline
        assert "the file should have" in refused(daemon)


def test_a_missing_file(daemon: Daemon, native: Path) -> None:
    kept = native.rename(native.with_suffix(".kept"))
    assert refused(daemon) == f"{native}: cannot read: No such file or directory (check the path)"
    # a start that was stopped leaves nothing behind
    kept.rename(native)
    assert daemon.virsh("start", "--paused", "guest").err == ""


def test_a_directory_in_its_place(daemon: Daemon, native: Path) -> None:
    native.unlink()
    native.mkdir()
    said = refused(daemon)
    assert said == f"{native}: cannot read: Is a directory (name a file inside it)"


def test_a_damaged_record(daemon: Daemon, native: Path) -> None:
    text = daemon.virsh("dumpxml", "--inactive", "guest").out
    edited = native.with_name("edited.xml")
    edited.write_text(re.sub("(?<=sha256=.)[0-9a-f]{4}", "zzzz", text))
    assert daemon.virsh("define", edited).code == 0
    said = refused(daemon)
    assert "igvmfw's record in <metadata> is damaged" in said
    assert said.endswith(
        "(remove igvmfw's element from <metadata> and let igvmfw rewrite the domain anew)"
    )


def test_a_changed_file(daemon: Daemon, native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(native.read_bytes())
    data[-1] ^= 1  # file data: the checksum covers headers alone
    native.write_bytes(data)
    said = refused(daemon)
    assert said.startswith(f"{native}: the file changed since guest was defined: its SHA-256 is ")
    assert "define the domain again with igvmfw" in said
    # the recorded choice
    xml = native.with_name("guest.xml")
    assert daemon.virsh("undefine", "guest").code == 0
    again = igvmfw("define", "-c", daemon.uri, "--on-change", "warn", xml)
    assert again.code == 0, again.err
    # is kept where the domain is changed by other means
    monkeypatch.setenv("EDITOR", "sed -i s/>262144</>327680</")
    edited = igvmfw("edit", "-c", daemon.uri, "--no-lock-memory", "guest")
    assert edited.code == 0, edited.err
    assert "327680 KiB" in daemon.virsh("dominfo", "guest").out
    data[-2] ^= 1
    native.write_bytes(data)
    assert daemon.virsh("start", "--paused", "guest").err == ""


def test_a_damaged_file(daemon: Daemon, native: Path) -> None:
    data = bytearray(native.read_bytes())
    data[48] ^= 1  # within the first variable header
    native.write_bytes(data)
    said = refused(daemon)
    assert said.startswith(f"{native}: ")
    assert "CRC-32 of the headers" in said


def test_a_file_that_qemu_is_not_given(daemon: Daemon, native: Path) -> None:
    text = daemon.virsh("dumpxml", "--inactive", "guest").out
    other = text.replace(f"file={native}", f"file={native}.other")
    assert other != text
    edited = native.with_name("edited.xml")
    edited.write_text(other)
    assert daemon.virsh("define", edited).code == 0
    said = refused(daemon)
    assert f"guest records the IGVM file {native}, which QEMU is not given" in said
    assert "define the domain again with igvmfw" in said


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "</qemu:commandline>",
            "<qemu:arg value='-object'/><qemu:arg value='igvm-cfg,id=x,file={other}'/>"
            "<qemu:arg value='-machine'/><qemu:arg value='igvm-cfg=x'/></qemu:commandline>",
            "igvm-cfg,id=x,file={other} in <qemu:commandline> names an IGVM file already",
        ),
        ("igvm-cfg=igvm0", "usb=off", "guest records the IGVM file {file}, which QEMU is not"),
        (
            "</type>",
            "</type><loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>",
            "<os>: guest has <loader> beside the IGVM file {file}, which QEMU does not take",
        ),
    ],
)
def test_firmware_that_was_put_in_by_other_means(
    daemon: Daemon, native: Path, old: str, new: str, words: str
) -> None:
    places = {"file": native, "other": native.with_suffix(".other")}
    text = daemon.virsh("dumpxml", "--inactive", "guest").out
    assert text.count(old) == 1
    edited = native.with_name("edited.xml")
    edited.write_text(text.replace(old, new.format(**places)))
    assert daemon.virsh("define", edited).err == ""
    assert words.format(**places) in refused(daemon)
    if "<loader" in new:
        for command in ("dumpxml", "edit"):  # what was asked for cannot be shown
            shown = igvmfw(command, "-c", daemon.uri, "guest")
            assert (shown.code, shown.out) == (3, "")
            assert "error: domain 'guest': line " in shown.err
            assert "other firmware was put into <os>" in shown.err
            assert "with virsh edit" in shown.err
    daemon.virsh("undefine", "--nvram", "guest")


@HERE_ALONE
def test_an_emulator_without_igvm(daemon: Daemon, native: Path) -> None:
    plain = Path("/usr/bin/qemu-system-x86_64")
    need(plain.exists(), "the distribution's QEMU")
    if emulator.probe(plain).igvm:
        pytest.skip("this distribution's QEMU takes IGVM files")
    text = daemon.virsh("dumpxml", "--inactive", "guest").out
    before, _, rest = text.partition("<emulator>")
    edited = native.with_name("edited.xml")
    machine = re.sub(r"machine='[^']*'", "machine='q35'", before)
    edited.write_text(f"{machine}<emulator>{plain}{rest[rest.index('</emulator>') :]}")
    defined = daemon.virsh("define", edited)
    assert defined.code == 0, defined.err
    said = refused(daemon)
    assert said.startswith(f"{plain}: QEMU ")
    assert "IGVM needs QEMU 10.1 or newer built with libigvm" in said


@pytest.fixture
def sev(daemon: Daemon, igvm_qemu: Path, ovmf: Path, tmp_path: Path) -> Path:
    """The file of a SEV-ES guest with two vCPUs, on the stand-in for a SEV host."""
    need(shutil.which("gcc") is not None, "gcc, for the SEV stand-in")
    host = make_emulator(tmp_path, igvm_qemu)
    file = wrap(ovmf, tmp_path / "es.igvm", "--platform", "sev-es", "--vcpus", "2")
    xml = tmp_path / "guest.xml"
    protected = "<launchSecurity type='sev'><policy>0x5</policy></launchSecurity>"
    xml.write_text(domain(host.path, file, vcpus=2, security=protected))
    # a libvirtd that is not the system's own may not lift limits everywhere that tests run
    defined = igvmfw("define", "-c", daemon.uri, "--no-lock-memory", xml)
    assert defined.code == 0, defined.err
    return file


def test_a_protected_guest_starts(daemon: Daemon, sev: Path) -> None:
    assert daemon.virsh("start", "--paused", "guest").err == ""


def test_a_host_without_the_platform(daemon: Daemon, sev: Path) -> None:
    (daemon.root / "dev/sev").unlink()
    said = refused(daemon)
    assert said.startswith("/dev/sev: this host cannot launch sev-es guests: the device is missing")
    (daemon.root / "dev/sev").touch()
    switches = daemon.root / "module/kvm_amd/parameters"
    switches.mkdir(parents=True)
    (switches / "sev").write_text("Y\n")
    (switches / "sev_es").write_text("N\n")
    said = refused(daemon)
    assert said.startswith("/sys/module/kvm_amd/parameters/sev_es: this host cannot launch sev-es ")
    assert "KVM has sev_es=N (turn it on in the BIOS and for kvm_amd, or start" in said


def test_a_platform_that_was_edited_away(daemon: Daemon, sev: Path) -> None:
    text = daemon.virsh("dumpxml", "--inactive", "guest").out
    edited = sev.with_name("edited.xml")
    edited.write_text(text.replace("<policy>0x0005</policy>", "<policy>0x0001</policy>"))
    assert daemon.virsh("define", edited).code == 0
    said = refused(daemon)
    assert "IGVM file of guest was chosen for sev-es, the guest is now sev" in said
    assert said.endswith("(put <launchSecurity> back, or define the domain again with igvmfw)")


def test_a_file_that_qemu_refuses_for_this_guest(daemon: Daemon, sev: Path) -> None:
    assert daemon.virsh("setvcpus", "guest", "1", "--config").code == 0
    said = refused(daemon)
    assert said.startswith(f"{sev}: header ")
    assert "QEMU 10.2 would not launch this sev-es guest: " in said
    assert "vCPU 1" in said


@HERE_ALONE
@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ("/nowhere/python3", "/nowhere/python3: "),
        ("/bin/false", ""),
        ("{bare}", "No module named 'igvmfw'"),
    ],
)
def test_a_hook_that_fails_stops_igvmfws_domains_alone(
    daemon: Daemon, native: Path, tmp_path: Path, python: str, reason: str
) -> None:
    if python == "{bare}":
        python = str(tmp_path / "bare/bin/python3")
        made = [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")]
        subprocess.run(made, check=True, timeout=120)
    install_hook(daemon.hook, python)
    said = refused(daemon)
    assert said.startswith("cannot check the IGVM firmware of guest: ")
    assert reason in said
    assert f"install igvmfw for {python} or correct that path in /etc/libvirt/hooks" in said
    assert "touch /etc/libvirt/hooks/igvmfw.off has domains started unchecked" in said
    start_foreign(daemon, tmp_path)
    # and so it does
    daemon.off.touch()
    assert daemon.virsh("start", "--paused", "guest").err == ""


def start_foreign(daemon: Daemon, directory: Path) -> str:
    """Start a domain that knows nothing of igvmfw, and says a lot; returns its XML as it runs."""
    padding = "".join(f"<x:note number='{number}'>note</x:note>" for number in range(200))
    xml = directory / "foreign.xml"
    xml.write_text(
        "<domain type='qemu'><name>foreign</name>"
        "<title>xmlns='urn:igvmfw:domain:1' is what igvmfw writes</title>"
        f"<metadata><x:notes xmlns:x='urn:example:1'>{padding}</x:notes></metadata>"
        "<memory unit='MiB'>64</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"
    )
    started = daemon.virsh("create", "--paused", xml)
    assert started.code == 0, started.err
    return daemon.virsh("dumpxml", "foreign").out


@HERE_ALONE
def test_what_a_foreign_domain_pays(
    daemon: Daemon, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = start_foreign(daemon, tmp_path).encode()
    own = daemon.virsh("dumpxml", "guest").out.encode()
    started = tmp_path / "python-was-started"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ntouch {started}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    install_hook(daemon.hook, str(python))

    def cost(xml: bytes, times: int) -> float:
        begin = time.monotonic()
        for _ in range(times):
            words = [str(daemon.hook), "guest", "prepare", "begin", "-"]
            done = subprocess.run(words, input=xml, capture_output=True, check=True, env={})
            assert (done.stdout, done.stderr) == (b"", b"")
        return (time.monotonic() - begin) / times * 1000

    used_here = Path("/run/igvmfw").exists()
    cheap = cost(foreign, 100)
    assert not started.exists()
    try:
        dear = cost(own, 5)
    finally:  # it ran on the host itself
        if not used_here:
            shutil.rmtree("/run/igvmfw", ignore_errors=True)
    assert started.exists()
    with capsys.disabled():
        print(
            f"\nthe hook takes {cheap:.1f} ms for a foreign domain of {len(foreign) >> 10} KiB, "
            f"{dear:.0f} ms for one with an IGVM file of {native.stat().st_size >> 20} MiB"
        )


# a way to a daemon as ssh is one
RELAY = """\
#!/usr/bin/python3
import os, select, socket
peer = socket.socket(socket.AF_UNIX)
peer.connect({socket!r})
while True:
    for ready in select.select([0, peer], [], [])[0]:
        data = os.read(0, 65536) if ready == 0 else peer.recv(65536)
        if not data:
            raise SystemExit
        peer.sendall(data) if ready == 0 else os.write(1, data)
"""
VTPM_ID = "6ecf0a42-5b5b-4c0b-9d5e-1f1f0a9e0001"


@pytest.fixture
def with_state(daemon: Daemon, igvm_qemu: Path, ovmf: Path, tmp_path: Path) -> Path:
    """The state of a defined domain's vTPM, where the daemon's guests keep it."""
    vtpm.firmware(tmp_path / "root", ovmf)
    xml = tmp_path / "guest.xml"
    xml.write_text(vtpm.domain(vtpm.emulator(tmp_path, igvm_qemu), id_=VTPM_ID))
    # the daemon has a /var of its own, in which only rewrite's output can be used
    made = tmp_path / "made.xml"
    rewritten = igvmfw("rewrite", "--root", tmp_path / "root", "-o", made, xml)
    assert rewritten.code == 0, rewritten.err
    assert daemon.virsh("define", "--validate", made).err == ""
    state = daemon.root / f"var/lib/libvirt/qemu/igvmfw/libvirt-{VTPM_ID}.raw"
    shutil.rmtree(state.parent, ignore_errors=True)
    return state


@HERE_ALONE
def test_the_state_of_a_vtpm(daemon: Daemon, with_state: Path) -> None:
    inner = f"/var/lib/libvirt/qemu/igvmfw/{with_state.name}"
    assert refused(daemon).startswith(f"{inner}: the state of guest's vTPM is missing (")
    statefile.make(with_state, size=vtpm.SIZE, initial=b"CCFSMKFS")
    assert daemon.virsh("start", "--paused", "guest").err == ""
    answer = daemon.virsh("qemu-monitor-command", "guest", '{"execute":"query-block"}').out
    assert f'"file":"{inner}"' in answer
    assert daemon.virsh("destroy", "guest").code == 0
    with_state.rename(with_state.with_suffix(".bak"))
    with_state.symlink_to(with_state.with_suffix(".bak").name)
    assert "is a link or no regular file" in refused(daemon)


@HERE_ALONE
def test_an_emulator_that_cannot_give_a_vtpm_its_state(
    daemon: Daemon, with_state: Path, igvm_qemu: Path, tmp_path: Path
) -> None:
    statefile.make(with_state, size=vtpm.SIZE, initial=b"CCFSMKFS")
    text = daemon.virsh("dumpxml", "--inactive", "guest").out
    xml = tmp_path / "other.xml"
    xml.write_text(re.sub("<emulator>.*</emulator>", f"<emulator>{igvm_qemu}</emulator>", text))
    assert daemon.virsh("define", xml).err == ""
    said = refused(daemon)
    assert said.startswith(f"{igvm_qemu}: the machine pc-q35-")
    assert "x-svsm-virtio-mmio" in said


@HERE_ALONE
def test_the_state_of_a_vtpm_on_another_host(
    daemon: Daemon, with_state: Path, tmp_path: Path
) -> None:
    """A URI with a host's name is another host to igvmfw, whatever lies behind it."""
    relay = tmp_path / "relay"
    relay.write_text(RELAY.format(socket=str(daemon.root / "run/libvirt/libvirt-sock")))
    relay.chmod(0o755)
    uri = f"qemu+ext://elsewhere/system?command={relay}"
    shown = igvmfw("dumpxml", "-c", uri, "guest")
    assert shown.code == 0, shown.err
    xml = tmp_path / "shown.xml"
    xml.write_text(shown.out)
    defined = igvmfw("define", "-c", uri, "--root", tmp_path / "root", xml)
    assert defined.code == 4
    assert "guest is defined, but will not start: the state of guest's vTPM cannot be made" in (
        defined.err
    )
    assert with_state.name in defined.err
    assert not with_state.exists()
    assert igvmfw("undefine", "-c", uri, "guest").code == 1
    refused_ = igvmfw("undefine", "-c", uri, "--nvram", "guest")
    assert refused_.code == 4
    assert "--keep-nvram" in refused_.err
    assert igvmfw("undefine", "-c", uri, "--keep-nvram", "guest").code == 0
