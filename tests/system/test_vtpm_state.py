"""The state of a vTPM with real libvirt and real QEMU: made, given to QEMU, kept, removed."""

import grp
import json
import os
import pwd
import signal
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from igvmfw.qemu import svsmdisk
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import NAMESPACE
from tests.parts import need
from tests.system.vtpm import SIZE, Host, arguments, domain, emulator, firmware, uuid_in

ID = "6ecf0a42-5b5b-4c0b-9d5e-1f1f0a9e0001"


@pytest.fixture(scope="module")
def slots(igvm_qemu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emulator that can give an SVSM its disk; one, as libvirt takes seconds to ask each."""
    return emulator(tmp_path_factory.mktemp("emulator"), igvm_qemu)


@pytest.fixture
def host(uri: str, embed_root: Path, slots: Path, ovmf: Path, tmp_path: Path, kvm: None) -> Host:
    firmware(tmp_path / "root", ovmf)
    return Host(uri=uri, embedded=embed_root, root=tmp_path / "root", qemu=slots, work=tmp_path)


def test_define_makes_the_state(host: Host) -> None:
    result = host.define(domain(host.qemu), "--validate")
    assert result.code == 0, result.err
    id_ = uuid_in(host.defined())
    state = host.state(id_)
    assert f"the firmware's vTPM keeps its state in {state}" in result.err
    info = state.stat()
    assert stat.filemode(info.st_mode) == "-rw-------"
    assert (info.st_uid, info.st_size) == (0, SIZE)  # qemu.conf of the test: QEMU runs as root
    assert info.st_blocks * 512 < SIZE // 100  # nothing but its beginning takes room
    assert state.read_bytes()[:8] == b"CCFSMKFS"
    assert stat.filemode(host.states.stat().st_mode) == "drwx--x--x"
    assert os.listdir(host.states) == [state.name]
    words = arguments(host.defined())
    assert list(words[4:]) == [
        "-machine", "x-svsm-virtio-mmio=on",
        "-global", "virtio-mmio.force-legacy=false",
        "-drive", f"file={state},format=raw,if=none,id=svsm_storage,cache=none",
        "-device", "virtio-blk-device,drive=svsm_storage",
    ]  # fmt: skip


def test_the_state_belongs_to_the_user_that_qemu_runs_as(host: Host) -> None:
    user = next((name for name in ("libvirt-qemu", "qemu") if _exists(name)), None)
    need(user is not None and os.geteuid() == 0, "root, and the user libvirt-qemu")
    # one that this user may run; it is not started
    qemu = Path("/usr/bin/qemu-system-x86_64")
    need(qemu.exists(), f"the distribution's QEMU ({qemu})")
    host.embedded.chmod(0o755)
    configuration = host.embedded / "etc/qemu.conf"
    text = configuration.read_text()
    assert 'user = "root"' in text
    configuration.write_text(text.replace('user = "root"', f'user = "{user}"'))
    assert host.define(domain(qemu, id_=ID)).code == 0
    info = host.state(ID).stat()
    assert pwd.getpwuid(info.st_uid).pw_name == user
    assert grp.getgrgid(info.st_gid).gr_name == "root"  # as qemu.conf says
    assert host.states.stat().st_uid == 0
    # a domain's own word counts more
    label = "<seclabel type='static' model='dac' relabel='no'><label>+1:+2</label></seclabel>"
    assert host.define(domain(qemu, id_=ID, more=label)).code == 0
    info = host.state(ID).stat()
    assert (info.st_uid, info.st_gid) == (1, 2)


def _exists(name: str) -> bool:
    return any(entry.pw_name == name for entry in pwd.getpwall())


# a directory that the API is told of: libvirt's own do not take every name, least a comma
DEFINE = """\
import sys
from pathlib import Path
from igvmfw.launch import Options, define, prepare
from igvmfw.qemu import catalog
from igvmfw.virt.domain import Domain
from igvmfw.virt.host import connect

uri, root, states, xml = sys.argv[1:]
entries = catalog.load(catalog.search_path(Path(root), user=False), Path(root)).entries
with connect(uri) as connection:
    options = Options(entries=entries, root=Path(root), states=Path(states))
    made = prepare(Domain.parse(Path(xml).read_bytes()), options)
    define(connection, made.domain)
"""


@pytest.mark.parametrize("name", ["plain", "a,b=c,,id=x & 'd' \"\u00fc\" <e>"])
def test_qemu_has_exactly_that_file(host: Host, name: str) -> None:
    """Through a path with everything that could mean something to QEMU or XML, too."""
    directory = host.work / name
    xml = host.work / "guest.xml"
    xml.write_text(domain(host.qemu, id_=ID))
    script = [sys.executable, "-c", DEFINE, host.uri, *map(str, (host.root, directory, xml))]
    subprocess.run(script, check=True, timeout=60)
    state = directory / host.state(ID).name
    started = host.run("start", "--paused", "guest")
    assert started.code == 0, started.err
    (disk,) = host.blocks()
    assert disk["device"] == "svsm_storage"
    assert disk["inserted"]["file"] == str(state)
    assert disk["inserted"]["drv"] == "raw"
    assert disk["inserted"]["cache"]["direct"]
    assert disk["inserted"]["image"]["virtual-size"] == SIZE


def test_the_arguments_are_those_of_qemu(igvm_qemu: Path, tmp_path: Path) -> None:
    """A machine that has virtio-mmio slots takes them as they are, but for the machine property."""
    state = tmp_path / "a,b.raw"
    state.write_bytes(bytes(SIZE))
    option, machine, *rest = svsmdisk.arguments(str(state))
    assert (option, machine) == ("-machine", "x-svsm-virtio-mmio=on")
    asked = [
        {"execute": "qmp_capabilities"},
        {"execute": "query-block"},
        {"execute": "qom-list", "arguments": {"path": "/machine/peripheral-anon"}},
        {"execute": "quit"},
    ]
    done = subprocess.run(
        [igvm_qemu, "-M", "microvm", "-S", "-nodefaults", "-display", "none", "-bios",
         "/usr/share/seabios/bios-microvm.bin", "-qmp", "stdio", *rest],
        input="".join(map(json.dumps, asked)), capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    _, _, blocks, devices, *_ = map(json.loads, done.stdout.splitlines())
    (disk,) = blocks["return"]
    assert disk["inserted"]["file"] == str(state)
    assert {"name": "device[0]", "type": "child<virtio-blk-device>"} in devices["return"]
    refused = subprocess.run(
        [igvm_qemu, "-M", "q35", option, machine], capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert "x-svsm-virtio-mmio' not found" in refused.stderr


def test_defining_again_keeps_the_state(host: Host) -> None:
    assert host.define(domain(host.qemu)).code == 0
    first = host.defined()
    state = host.state(uuid_in(first))
    state.write_bytes(b"COCOONFS" + state.read_bytes()[8:])
    written = state.stat()
    shown = host.run("dumpxml", "guest").out
    assert "svsm_storage" not in shown
    assert "urn:igvmfw" not in shown
    assert host.define(shown).code == 0
    assert host.defined() == first
    assert state.stat().st_ino == written.st_ino
    assert state.read_bytes()[:8] == b"COCOONFS"
    assert os.listdir(host.states) == [state.name]


def test_a_renamed_domain_keeps_it(host: Host) -> None:
    assert host.define(domain(host.qemu, id_=ID)).code == 0
    host.virsh("domrename", "guest", "other")
    started = host.run("start", "--paused", "other")
    assert started.code == 0, started.err
    (disk,) = host.blocks("other")
    assert disk["inserted"]["file"] == str(host.state(ID))
    host.stop("other")
    # its old name is free for another domain with a state of its own
    assert host.define(domain(host.qemu)).code == 0
    assert len(os.listdir(host.states)) == 2
    assert host.define(host.run("dumpxml", "other").out).code == 0
    assert len(os.listdir(host.states)) == 2


def test_an_edited_domain_keeps_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.define(domain(host.qemu, id_=ID)).code == 0
    inode = host.state(ID).stat().st_ino
    monkeypatch.setenv("VISUAL", "sed -i s/262144/524288/")
    edited = host.run("edit", "--root", host.root, "guest")
    assert edited.code == 0, edited.err
    assert "524288" in host.defined()
    assert host.state(ID).stat().st_ino == inode


def test_undefine_asks_what_shall_become_of_it(host: Host) -> None:
    assert host.define(domain(host.qemu, id_=ID)).code == 0
    state = host.state(ID)
    refused = host.run("undefine", "guest")
    assert refused.code == 1
    assert str(state) in refused.err
    assert "--nvram" in refused.err
    assert "--keep-nvram" in refused.err
    assert state.exists()
    assert "svsm_storage" in host.defined()

    kept = host.run("undefine", "--keep-nvram", "guest")
    assert kept.code == 0, kept.err
    state.write_bytes(b"COCOONFS" + state.read_bytes()[8:])
    # as for libvirt's own nvram, a domain with the same UUID gets it again
    assert host.define(domain(host.qemu, id_=ID)).code == 0
    assert state.read_bytes()[:8] == b"COCOONFS"

    removed = host.run("undefine", "--nvram", "guest")
    assert removed.code == 0, removed.err
    assert os.listdir(host.states) == []


def test_undefine_that_libvirt_refuses_removes_nothing(host: Host) -> None:
    assert host.define(domain(host.qemu, id_=ID)).code == 0
    snapshot = host.work / "snapshot.xml"
    snapshot.write_text(
        "<domainsnapshot><name>s</name><state>shutoff</state><creationTime>1</creationTime>"
        f"<memory snapshot='no'/><disks/>{host.virsh('dumpxml', 'guest')}</domainsnapshot>"
    )
    host.virsh("snapshot-create", "--redefine", "guest", snapshot)
    refused = host.run("undefine", "--nvram", "guest")
    assert refused.code == 4
    assert "(give --snapshots-metadata, too)" in refused.err
    assert host.state(ID).exists()
    assert host.run("undefine", "--nvram", "--snapshots-metadata", "guest").code == 0
    assert not host.state(ID).exists()


def test_undefine_of_a_domain_that_lost_its_record(host: Host) -> None:
    """The state is found by UUID, whatever became of the metadata."""
    assert host.define(domain(host.qemu, id_=ID)).code == 0
    restored = host.work / "restored.xml"
    restored.write_text(
        domain(host.qemu, id_=ID)
        .replace(" firmware='igvm'", "")
        .replace("<firmware>\n      <feature enabled='yes' name='vtpm'/>\n    </firmware>", "")
    )
    host.virsh("define", restored)
    assert host.run("undefine", "guest").code == 1
    assert host.run("undefine", "--nvram", "guest").code == 0
    assert not host.state(ID).exists()


def test_a_transient_guest_keeps_its_state(host: Host) -> None:
    created = host.create(domain(host.qemu, id_=ID), "--paused")
    assert created.code == 0, created.err
    state = host.state(ID)
    (disk,) = host.blocks()
    assert disk["inserted"]["file"] == str(state)
    inode = state.stat().st_ino
    host.stop()
    assert host.create(domain(host.qemu, id_=ID), "--paused").code == 0
    assert state.stat().st_ino == inode


def test_a_guest_that_does_not_start_leaves_nothing(host: Host) -> None:
    argument = (
        "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
        "<qemu:arg value='-no-such-option'/></qemu:commandline>"
    )
    created = host.create(domain(host.qemu, id_=ID, more=argument))
    assert created.code == 4
    assert "no-such-option" in created.err
    assert os.listdir(host.states) == []
    # a state that was there before stays
    assert host.define(domain(host.qemu, id_=ID)).code == 0
    assert host.run("undefine", "--keep-nvram", "guest").code == 0
    assert host.create(domain(host.qemu, id_=ID, more=argument)).code == 4
    assert host.state(ID).exists()


def test_an_interrupt_does_not_take_a_running_guests_state_away(host: Host) -> None:
    """It is noticed when libvirt has answered, and that is when the guest runs."""
    pid, qemu, xml = (host.work / name for name in ("pid", "interrupting", "guest.xml"))
    qemu.write_text(
        f'#!/bin/sh\ncase "$*" in *guest=guest*) kill -INT $(cat {pid});; esac\n'
        f'exec {host.qemu} "$@"\n'
    )
    qemu.chmod(0o755)
    xml.write_text(domain(qemu, id_=ID))
    script = (
        "import os, signal, sys\n"
        # what runs in the background may have been told to pass it over
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        "from igvmfw.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["create", "--paused", "-c", host.uri, "--root", str(host.root), str(xml)]
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.endswith("igvmfw: error: interrupted\n")
    (disk,) = host.blocks()
    assert disk["inserted"]["file"] == str(host.state(ID))
    assert host.state(ID).stat().st_size == SIZE


@pytest.mark.parametrize("dropped", ["request", "what is in the request", "request and file"])
def test_a_record_alone_makes_no_file(host: Host, dropped: str) -> None:
    """Otherwise a domain's author gets what root alone may read into a guest's disk."""
    secret, elsewhere, xml = (host.work / name for name in ("secret", "elsewhere", "guest.xml"))
    secret.write_bytes(b"secret")
    xml.write_text(domain(host.qemu, id_=ID))
    made = host.run("define", "--print-xml", "--root", host.root, xml)
    assert made.code == 0, made.err
    assert str(host.states) in made.out
    forged = Domain.parse(made.out.replace(str(host.states), str(elsewhere)).encode())
    ours = {"igvmfw": NAMESPACE}
    (record,) = forged.root.iterfind("metadata/igvmfw:domain", ours)
    (request,) = record.iterfind("igvmfw:request", ours)
    (file,) = record.iterfind("igvmfw:file", ours)
    if dropped == "what is in the request":
        request.clear()
    else:
        record.remove(request)
    if dropped == "request and file":
        record.remove(file)
    (state,) = record.iterfind("igvmfw:state", ours)
    state.set("template", str(secret))
    text = forged.write().decode()
    for result in (host.define(text), host.create(text, "--paused")):
        assert (result.code, result.out) == (3, ""), result.err
        assert "igvmfw's record in <metadata> is damaged" in result.err
    assert not elsewhere.exists()
    assert not host.states.exists()


def test_a_start_without_its_state_is_refused(host: Host) -> None:
    assert host.define(domain(host.qemu, id_=ID)).code == 0
    state = host.state(ID)
    target = host.work / "elsewhere"
    state.rename(target)
    refused = host.run("start", "guest")
    assert refused.code == 3
    assert f"{state}: the state of guest's vTPM is missing" in refused.err
    state.symlink_to(target)
    for command in ("start", "undefine --nvram"):
        refused = host.run(*command.split(), "guest")
        assert refused.code != 0
    again = host.define(host.run("dumpxml", "guest").out)
    assert again.code == 1
    assert "guest is defined, but will not start" in again.err
    assert state.is_symlink()
    assert target.stat().st_size == SIZE


def test_a_state_that_was_cut_short(host: Host) -> None:
    assert host.define(domain(host.qemu, id_=ID)).code == 0
    state = host.state(ID)
    os.truncate(state, 0)
    refused = host.run("start", "--paused", "guest")
    assert (refused.code, refused.out) == (3, "")
    assert f"{state}: the state of guest's vTPM is empty (put it back from a backup" in refused.err
    # what is there is never replaced
    again = host.define(host.run("dumpxml", "guest").out)
    assert "warning: the domain will not start" in again.err
    assert state.stat().st_size == 0
    os.truncate(state, SIZE // 2)
    started = host.run("start", "--paused", "guest")
    assert started.code == 0, started.err
    assert f"guest's vTPM has {SIZE // 2} bytes, recorded are {SIZE}: " in started.err


def test_a_clone_does_not_get_the_others_state(host: Host) -> None:
    assert host.define(domain(host.qemu, id_=ID)).code == 0
    clone = host.work / "clone.xml"
    other = str(uuid.uuid4())
    text = host.defined()
    clone.write_text(text.replace(ID, other, 1).replace("<name>guest<", "<name>clone<"))
    host.virsh("define", clone)  # as virt-clone does
    refused = host.run("start", "clone")
    assert refused.code == 1
    assert "another domain's" in refused.err
    assert host.run("undefine", "--nvram", "clone").code == 0
    assert host.state(ID).exists()
    host.virsh("define", clone)
    assert host.define(host.run("dumpxml", "clone").out).code == 0
    assert host.run("start", "--paused", "clone").code == 0
    (disk,) = host.blocks("clone")
    assert disk["inserted"]["file"] == str(host.state(other))


def test_an_emulator_without_the_slots_is_named(host: Host, igvm_qemu: Path) -> None:
    defined = host.define(domain(igvm_qemu, id_=ID))
    assert defined.code == 0
    assert "warning: the domain will not start" in defined.err
    assert "x-svsm-virtio-mmio" in defined.err
    for refused in (host.run("start", "guest"), host.create(domain(igvm_qemu, name="other"))):
        assert refused.code == 4
        for word in ("x-svsm-virtio-mmio", str(igvm_qemu), "COCONUT"):
            assert word in refused.err
    assert os.listdir(host.states) == [host.state(ID).name]


def test_firmware_that_keeps_its_state_in_pflash(
    uri: str, embed_root: Path, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    storage: dict[str, object] = {"interface": "pflash", "format": "raw", "size-bytes": 65536}
    firmware(tmp_path / "root", ovmf, storage=storage)
    host = Host(uri=uri, embedded=embed_root, root=tmp_path / "root", qemu=igvm_qemu, work=tmp_path)
    defined = host.define(domain(igvm_qemu, id_=ID))
    assert defined.code == 0
    assert (
        "warning: the domain will not start: the firmware keeps its vTPM's state in a pflash"
        in (defined.err)
    )
    assert not host.states.exists()
    started = host.run("start", "guest")
    assert started.code == 4
    assert "pflash" in started.err
    assert host.run("undefine", "guest").code == 0


def test_the_template_is_what_it_starts_as(
    uri: str, embed_root: Path, slots: Path, ovmf: Path, tmp_path: Path
) -> None:
    template = tmp_path / "root/usr/share/svsm/state.raw"
    storage = {"interface": "virtio-blk-mmio", "format": "raw", "size-bytes": 1 << 20,
               "template": "/usr/share/svsm/state.raw"}  # fmt: skip
    firmware(tmp_path / "root", ovmf, storage=storage)
    qemu = slots
    host = Host(uri=uri, embedded=embed_root, root=tmp_path / "root", qemu=qemu, work=tmp_path)
    missing = host.define(domain(qemu, id_=ID))
    assert missing.code == 3
    assert str(template) in missing.err
    assert not host.state(ID).exists()
    content = b"some" + bytes(200_000) + b"state"
    template.write_bytes(content)
    assert host.define(domain(qemu, id_=ID)).code == 0  # goes on where it stopped
    assert host.state(ID).read_bytes() == content.ljust(1 << 20, b"\0")
    assert host.run("undefine", "--nvram", "guest").code == 0
    template.write_bytes(bytes((1 << 20) + 1))
    large = host.define(domain(qemu, id_=ID))
    assert large.code == 1
    assert str(template) in large.err
    assert os.listdir(host.states) == []


INTERRUPTED = """\
import os, signal, sys
from igvmfw import launch, upkeep
from igvmfw.cli import main

upkeep.make = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


@pytest.mark.parametrize("id_", [ID, None], ids=["with UUID", "without"])
def test_an_interrupted_define_is_taken_up(host: Host, id_: str | None) -> None:
    xml = host.work / "guest.xml"
    xml.write_text(domain(host.qemu, id_=id_))
    words = ["define", "-c", host.uri, "--root", str(host.root), str(xml)]
    killed = subprocess.run([sys.executable, "-c", INTERRUPTED, *words], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    first = uuid_in(host.defined())
    assert not host.states.exists()
    refused = host.run("start", "guest")
    assert refused.code == 3
    assert "igvmfw define" in refused.err

    again = host.define(domain(host.qemu, id_=id_))
    assert again.code == 0, again.err
    assert uuid_in(host.defined()) == first
    assert os.listdir(host.states) == [host.state(first).name]
    assert host.run("start", "--paused", "guest").code == 0
    # one whose state is there is another domain, as for virsh
    if id_ is None:
        other = host.define(domain(host.qemu))
        assert other.code == 4
        assert "already exists with uuid" in other.err
        assert "<uuid>" in other.err


def test_json_and_dumpxml_name_the_file(host: Host) -> None:
    defined = host.define(domain(host.qemu, id_=ID), "--json")
    assert json.loads(defined.out)["vtpm_state"] == str(host.state(ID))
    assert str(host.state(ID)) in host.run("dumpxml", "guest").err
