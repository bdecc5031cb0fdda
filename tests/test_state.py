"""Which file a domain's state is, and what becomes of the domain."""

import dataclasses
import os
import re
from pathlib import Path

import pytest

from igvmfw.commandline import state_arguments
from igvmfw.errors import DomainError, EmulatorError, RefusedError
from igvmfw.platforms import Platform
from igvmfw.qemu.descriptor import StorageInterface, VtpmStorage
from igvmfw.rewrite import as_request, restore, rewrite
from igvmfw.select import Choice
from igvmfw.state import check_domain, check_size, plan, recorded
from igvmfw.virt.domain import Domain
from igvmfw.virt.keeping import owner, state_directory
from igvmfw.virt.record import State
from tests.privilege import without_privilege
from tests.virt.choices import canonical

ID = "6ecf0a42-5b5b-4c0b-9d5e-1f1f0a9e0001"
STATE = State(interface="virtio-blk-mmio", size=8 << 20, path=f"/s/libvirt-{ID}.raw")
CHOICE = Choice(path="/f.igvm", sha256="0" * 64, platform=Platform.NATIVE, features=("vtpm",))
XML = f"""<domain type='kvm'>
  <name>guest</name>
  <uuid>{ID}</uuid>
  <os firmware='igvm'>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <devices/>
</domain>
"""
ARGUMENTS = (
    "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>{}"
    "</qemu:commandline>"
)


def asking(*values: str, text: str = XML) -> Domain:
    """A domain that asks for IGVM firmware, with arguments of its own."""
    inner = "".join(f"<qemu:arg value='{value}'/>" for value in values)
    if values:
        text = text.replace("</domain>", ARGUMENTS.format(inner) + "</domain>")
    return Domain.parse(text.encode())


def storage(**changed: object) -> VtpmStorage:
    stated: dict[str, object] = {
        "interface": "virtio-blk-mmio",
        "format": "raw",
        "size-bytes": 8 << 20,
        **changed,
    }
    return VtpmStorage.from_dict(stated)


@pytest.mark.parametrize("spelled", [ID, ID.upper(), ID.replace("-", ""), f"\n  {ID} "], ids=repr)
def test_the_file_is_named_by_the_uuid_as_libvirt_spells_it(spelled: str) -> None:
    domain = Domain.parse(XML.replace(ID, spelled).encode())
    planned = plan(domain, storage(template="/t"), Path("/s"))
    assert planned == State(
        interface="virtio-blk-mmio", size=8 << 20, path=f"/s/libvirt-{ID}.raw", template="/t"
    )


@pytest.mark.parametrize("uuid", [" ", "x", "../../etc/passwd", f"{ID}0", "６" * 32])
def test_what_is_no_uuid(uuid: str) -> None:
    domain = Domain.parse(XML.replace(ID, uuid).encode())
    with pytest.raises(DomainError, match="no UUID"):
        plan(domain, storage(), Path("/s"))


def test_what_cannot_be_planned() -> None:
    domain = asking()
    with pytest.raises(RefusedError, match="'qcow2'"):
        plan(domain, storage(format="qcow2"), Path("/s"))
    with pytest.raises(RefusedError, match="4096 bytes"):
        plan(domain, storage(**{"size-bytes": 4096}), Path("/s"))
    with pytest.raises(RefusedError, match="that host"):
        plan(domain, storage(), None)
    pflash = plan(domain, storage(interface="pflash"), Path("/s"))
    assert (pflash.interface, pflash.path) == (StorageInterface.PFLASH, None)


def test_rewriting_again_changes_nothing_and_restore_gives_the_request_back() -> None:
    domain = asking("-msg", "timestamp=on")
    once = rewrite(domain, CHOICE, state=STATE).domain
    assert recorded(once) == STATE
    assert once.arguments == (
        "-msg", "timestamp=on", "-object", "igvm-cfg,id=igvm0,file=/f.igvm", "-machine",
        "igvm-cfg=igvm0", *state_arguments(STATE),
    )  # fmt: skip
    assert rewrite(once, CHOICE, state=STATE).domain is once
    for back in (as_request(once), restore(once)):
        assert canonical(back.document.tree) == canonical(domain.document.tree)


def test_what_the_user_gave_qemu_in_the_same_words_is_not_taken_out() -> None:
    pair = ("-global", "virtio-mmio.force-legacy=false")
    assert pair[1] in state_arguments(STATE)
    domain = asking(*pair, "-no-user-config")
    once = rewrite(domain, CHOICE, state=STATE).domain
    assert once.arguments.count(pair[1]) == 2
    assert restore(once).write() == domain.write()
    assert rewrite(once, CHOICE).domain.arguments == rewrite(domain, CHOICE).domain.arguments


def test_other_firmware_takes_the_disk_along_or_away() -> None:
    moved = State(interface="virtio-blk-mmio", size=1 << 20, path="/other/a,b.raw", planes=True)
    once = rewrite(asking(), CHOICE, state=STATE).domain
    twice = rewrite(once, CHOICE, state=moved).domain
    assert twice.arguments[-8:] == (
        "-machine", "x-svsm-virtio-mmio=on,kernel-irqchip=split,device-plane=2",
        "-global", "virtio-mmio.force-legacy=false",
        "-drive", "file=/other/a,,b.raw,format=raw,if=none,id=svsm_storage,cache=none",
        "-device", "virtio-blk-device,drive=svsm_storage,plane=0",
    )  # fmt: skip
    assert len(twice.arguments) == len(once.arguments)
    assert recorded(twice) == moved
    without = rewrite(twice, CHOICE).domain
    assert recorded(without) is None
    assert without.arguments == rewrite(asking(), CHOICE).domain.arguments


@pytest.mark.parametrize(
    "words",
    [
        ("-machine", "x-svsm-virtio-mmio=on"),
        ("-M", "q35,x-svsm-virtio-mmio=off"),
        ("-drive", "if=none,id=svsm_storage,file=/x"),
        ("-device", "virtio-blk-device,drive=svsm_storage"),
        ("-blockdev", "driver=file,filename=/x,node-name=svsm_storage"),
        ("-M", "device_plane=1"),
        ("-set", "drive.svsm_storage.file=/x"),
        ("--set", "drive.svsm_storage.snapshot=on"),
        ("-global", "virtio-mmio.force-legacy=true"),
        ("-global", "driver=virtio-mmio,property=force-legacy,value=on"),
    ],
)
def test_a_disk_of_the_users_own(words: tuple[str, str]) -> None:
    with pytest.raises(RefusedError, match="is for the state of a vTPM already"):
        rewrite(asking(*words), CHOICE, state=STATE)
    # nor beside igvmfw's own words, before or behind them
    own = rewrite(asking(), CHOICE, state=STATE).domain
    own.add_arguments(*words)
    with pytest.raises(RefusedError, match="is for the state of a vTPM already"):
        check_domain(own, STATE)
    with pytest.raises(RefusedError, match="is for the state of a vTPM already"):
        rewrite(own, CHOICE, state=STATE)
    # firmware that asks for none leaves it to the user
    assert words[1] in rewrite(asking(*words), CHOICE).domain.arguments


def test_a_state_that_would_be_forgotten() -> None:
    with pytest.raises(RefusedError, match="-snapshot in <qemu:commandline> has QEMU forget"):
        rewrite(asking("-snapshot"), CHOICE, state=STATE)


def test_the_interrupt_controller_is_the_planes_alone() -> None:
    words = ("-machine", "kernel-irqchip=on")
    rewrite(asking(*words), CHOICE, state=STATE)
    planes = dataclasses.replace(STATE, planes=True)
    with pytest.raises(RefusedError, match="is for the state of a vTPM already"):
        rewrite(asking(*words), CHOICE, state=planes)


def test_arguments_that_someone_changed() -> None:
    text = rewrite(asking(), CHOICE, state=STATE).domain.write().decode()
    changed = Domain.parse(text.replace("cache=none", "cache=unsafe").encode())
    with pytest.raises(RefusedError, match="not given as the firmware needs it"):
        check_domain(changed, STATE)
    with pytest.raises(RefusedError, match="already"):
        rewrite(changed, CHOICE, state=STATE)
    dropped = re.sub("<qemu:arg value='-drive'/>\\s*<qemu:arg value='file=[^>]*>", "", text)
    mended = rewrite(Domain.parse(dropped.encode()), CHOICE, state=STATE).domain
    check_domain(mended, STATE)


def test_a_state_that_lost_what_was_in_it() -> None:
    for size in (STATE.size, STATE.size + 1):
        assert check_size(STATE, size, "guest") is None
    assert f"has 4096 bytes, recorded are {8 << 20}" in (check_size(STATE, 4096, "guest") or "")
    with pytest.raises(DomainError, match="guest's vTPM is empty"):
        check_size(STATE, 0, "guest")


def test_whose_state_it_is() -> None:
    domain = rewrite(asking(), CHOICE, state=STATE).domain
    check_domain(domain, STATE)
    text = domain.write().decode()
    clone = Domain.parse(text.replace(ID, ID.replace("6", "7"), 1).encode())
    with pytest.raises(RefusedError, match="another domain's"):
        check_domain(clone, STATE)
    pflash = State(interface="pflash", size=1)
    with pytest.raises(EmulatorError, match="pflash"):
        check_domain(rewrite(asking(), CHOICE, state=pflash).domain, pflash)


@pytest.mark.parametrize(
    ("found", "damaged"),
    [
        ("size='8388608'", "size='8388608k'"),
        ("size='8388608'", "size='0'"),
        ("size='8388608'", f"size='{'9' * 40}'"),
        ("size='8388608'", ""),
        ("interface='virtio-blk-mmio'", ""),
        (f"path='/s/libvirt-{ID}.raw'", "path='s'"),
        (f"path='/s/libvirt-{ID}.raw'", "path='/s' template='x'"),
    ],
)
def test_a_damaged_record(found: str, damaged: str) -> None:
    text = rewrite(asking(), CHOICE, state=STATE).domain.write().decode()
    assert found in text
    domain = Domain.parse(text.replace(found, damaged).encode())
    with pytest.raises(DomainError, match="record in <metadata> is damaged"):
        recorded(domain)
    with pytest.raises(DomainError, match="record in <metadata> is damaged"):
        as_request(domain)


def test_where_states_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/u/conf")
    system = Path("/var/lib/libvirt/qemu/igvmfw")
    session = Path("/home/u/conf/libvirt/qemu/igvmfw")
    assert state_directory("qemu:///system") == system
    assert state_directory("qemu+ssh://root@host/system") == system
    with without_privilege():
        assert state_directory("qemu:///session") == session
        assert state_directory(None) == session
    assert state_directory("qemu+ssh://host/session") is None
    assert state_directory("qemu:///embed?root=/r") == Path("/r/lib/qemu/igvmfw")
    if os.geteuid() == 0:  # whose own session is the system's driver
        assert state_directory("qemu:///session") == state_directory(None) == system
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/u")
    with without_privilege():
        expected = Path("/home/u/.config/libvirt/qemu/igvmfw")
        assert state_directory("qemu:///session") == expected


# as libvirt 9.0 prints it, shortened to what is read
CAPABILITIES = """<capabilities><host>
  <secmodel><model>apparmor</model><doi>0</doi></secmodel>
  <secmodel><model>dac</model><doi>0</doi>
    <baselabel type='kvm'>+64055:+106</baselabel>
    <baselabel type='qemu'>+64055:+107</baselabel>
  </secmodel></host></capabilities>"""


@pytest.mark.parametrize(
    ("kind", "label", "expected"),
    [
        ("kvm", "", (64055, 106)),
        ("qemu", "", (64055, 107)),
        ("kvm", "<seclabel type='static' model='dac'><label>+7:+8</label></seclabel>", (7, 8)),
        ("kvm", "<seclabel type='static' model='dac'><label>root:root</label></seclabel>", (0, 0)),
        ("kvm", "<seclabel type='dynamic' model='dac'><label>+7:+8</label></seclabel>",
         (64055, 106)),
        ("kvm", "<seclabel type='static' model='selinux'><label>a:b</label></seclabel>",
         (64055, 106)),
    ],
)  # fmt: skip
def test_whom_qemu_runs_as(kind: str, label: str, expected: tuple[int, int]) -> None:
    text = XML.replace("<devices/>", label).replace("'kvm'", f"'{kind}'", 1)
    assert owner(Domain.parse(text.encode()), CAPABILITIES) == expected


def test_whom_qemu_runs_as_where_nobody_says() -> None:
    assert owner(asking(), "<capabilities><host/></capabilities>") is None
    wrong = "<seclabel type='static' model='dac'><label>no-such-user:x</label></seclabel>"
    with pytest.raises(DomainError, match="no-such-user"):
        owner(Domain.parse(XML.replace("<devices/>", wrong).encode()), CAPABILITIES)
