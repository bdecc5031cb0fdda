"""The catalogue against libvirt itself: the same tree, mounted over the host's directories.

In a mount namespace of its own, libvirt's embedded driver is asked which firmware it offers; its
domain capabilities list the executables in order of choice.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from igvmfw import presets
from igvmfw.install import FIRST_TOLERANT_LIBVIRT, Level, choose_place
from igvmfw.qemu.catalog import State, glob_matches, load, search_path
from igvmfw.resources import template_names
from tests.parts import need, need_libvirt
from tests.privilege import NOBODY, without_privilege
from tests.qemu.test_catalog import SYSTEM, USER, VENDOR, put
from tests.qemu.test_descriptor import igvm_document
from tests.system.daemons import serving
from tests.system.guests import igvmfw, wrap
from tests.testbed.cache import SUITES

OWN = "usr/share/igvmfw/firmware"

# run inside the namespace: argv is libvirt's root directory
ASK_LIBVIRT = """
import sys, libvirt
libvirt.virEventRegisterDefaultImpl()
connection = libvirt.open("qemu:///embed?root=" + sys.argv[1])
print(connection.getDomainCapabilities(None, "x86_64", "q35", "qemu"))
"""
# the emulator's command line for a domain that leaves the choice to libvirt
ASK_AUTOSELECTION = """
import sys, libvirt
libvirt.virEventRegisterDefaultImpl()
connection = libvirt.open("qemu:///embed?root=" + sys.argv[1])
xml = "<domain type='qemu'><name>g</name><memory>65536</memory><os firmware='efi'>"
xml += "<type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features></domain>"
print(connection.domainXMLToNative("qemu-argv", xml))
"""
MOUNTS = """
mkdir -p /etc/qemu
mount --bind "$1/usr/share/qemu/firmware" /usr/share/qemu/firmware
mount --bind "$1/etc/qemu" /etc/qemu
exec "$2" -c "$3" "$4"
"""


def flash(root: Path, name: str, machines: list[str] | None = None) -> str:
    """A descriptor of a flash firmware whose files exist, as libvirt lists only such."""
    for kind in ("code", "vars"):
        (root / f"{name}-{kind}.fd").write_bytes(b"firmware")
    document: dict[str, Any] = igvm_document()
    document["mapping"] = {
        "device": "flash",
        "executable": {"filename": str(root / f"{name}-code.fd"), "format": "raw"},
        "nvram-template": {"filename": str(root / f"{name}-vars.fd"), "format": "raw"},
    }
    document["targets"][0]["machines"] = machines or ["pc-q35-*"]
    return json.dumps(document)


def igvm() -> str:
    document = {**igvm_document(), "features": ["amd-sev", "vtpm"]}
    document["mapping"] = {
        "device": "igvm",
        "filename": "/usr/share/igvm/x.igvm",
        "x-vtpm-storage": {"interface": "pflash", "format": "raw", "size-bytes": 1},
    }
    return json.dumps(document)


def build_tree(root: Path) -> None:
    tree: list[tuple[str, str, str]] = [
        (VENDOR, "50-both.json", flash(root, "vendor-both")),
        (SYSTEM, "50-both.json", flash(root, "system-both")),
        (VENDOR, "60-masked.json", flash(root, "masked")),
        (SYSTEM, "60-masked.json", ""),
        (VENDOR, "10-first.json", flash(root, "first")),
        (SYSTEM, "90-last.json", flash(root, "last")),
        (SYSTEM, "9-as-text.json", flash(root, "as-text")),
        (VENDOR, "20-pc-only.json", flash(root, "pc-only", ["pc-i440fx-*"])),
        (VENDOR, "21-bracket.json", flash(root, "bracket", ["pc-[q]35-*"])),
        (VENDOR, "22-question.json", flash(root, "question", ["pc-q3?-*"])),
        (VENDOR, ".30-hidden.json", flash(root, "hidden")),
        (VENDOR, "80-under-directory.json", flash(root, "under-directory")),
        (OWN, "55-igvm.json", igvm()),
    ]
    for directory, name, content in tree:
        put(root, directory, name, content)
    (root / SYSTEM / "80-under-directory.json").mkdir()
    (root / SYSTEM / "50-link.json").symlink_to("90-last.json")


def ask_libvirt(
    root: Path, embed_root: Path, question: str = ASK_LIBVIRT, *, mounts: str = MOUNTS
) -> subprocess.CompletedProcess[str]:
    need(os.geteuid() == 0, "root, for a mount namespace")
    need_libvirt()
    answer = subprocess.run(
        ["unshare", "-m", "sh", "-ec", mounts, "-", root, sys.executable, question, embed_root],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    need("Operation not permitted" not in answer.stderr, "the right to make a mount namespace")
    need("no connection driver" not in answer.stderr, "libvirt's QEMU driver")
    return answer


def offered_by_libvirt(root: Path, embed_root: Path) -> tuple[str, list[str]]:
    """The concrete machine type, and the executables in order of choice."""
    return offered_in(ask_libvirt(root, embed_root))


def offered_in(answer: subprocess.CompletedProcess[str]) -> tuple[str, list[str]]:
    assert answer.returncode == 0, answer.stderr
    capabilities = ET.fromstring(answer.stdout)
    values = capabilities.iterfind("os/loader/value")
    return capabilities.findtext("machine") or "", [Path(v.text or "").name for v in values]


def autoselected(root: Path, embed_root: Path) -> list[str]:
    """The firmware files of a domain that leaves the choice to libvirt."""
    answer = ask_libvirt(root, embed_root, ASK_AUTOSELECTION)
    assert answer.returncode == 0, answer.stderr
    return re.findall(r'"filename":"([^"]*\.fd)"', answer.stdout)


def offered_by_catalog(root: Path, machine: str, *, user: bool = False) -> list[str]:
    found = load(search_path(root, user=user), root)
    names = [
        Path(entry.descriptor.mapping.filename).name
        for entry in found.entries
        if entry.state is State.OTHER_DEVICE and entry.descriptor is not None
        if any(glob_matches(g, machine) for t in entry.descriptor.targets for g in t.machines)
    ]
    return list(dict.fromkeys(names))  # libvirt leaves out a file that an earlier one named


def tolerant() -> bool:
    import libvirt

    version = libvirt.getVersion()
    parts = (version // 1_000_000, version // 1000 % 1000, version % 1000)
    return parts >= FIRST_TOLERANT_LIBVIRT


def test_libvirt_offers_the_same_in_the_same_order(tmp_path: Path, embed_root: Path) -> None:
    build_tree(tmp_path)
    machine, offered = offered_by_libvirt(tmp_path, embed_root)
    assert offered_by_catalog(tmp_path, machine) == offered
    assert [offered[0], offered[-1], len(offered)] == ["first-code.fd", "as-text-code.fd", 6]
    assert load(search_path(tmp_path, user=False)).available[0].name == "55-igvm.json"


@pytest.mark.parametrize("level", [Level.SYSTEM, Level.VENDOR])
def test_what_igvmfw_installs_leaves_libvirts_choice_alone(
    tmp_path: Path, embed_root: Path, level: Level
) -> None:
    build_tree(tmp_path)
    before = autoselected(tmp_path, embed_root)
    assert f"{tmp_path}/first-code.fd" in before
    place = choose_place(level)  # beside the libvirt of this host
    for name in template_names():
        directory = str(place.directory.relative_to("/"))
        put(tmp_path, directory, f"05-{name}.json", presets.load(name).write())
    assert autoselected(tmp_path, embed_root) == before
    found = load(search_path(tmp_path, user=False), tmp_path)
    assert [entry.name[:3] for entry in found.available] == ["05-", "05-", "55-"]


@pytest.mark.parametrize(
    ("content", "complaint"), [(igvm(), "unknown device type"), ("{", "unable to parse json file")]
)
def test_what_an_older_libvirt_makes_of_one_descriptor_it_cannot_read(
    tmp_path: Path, embed_root: Path, content: str, complaint: str
) -> None:
    """The reason for igvmfw's own directories: one such file takes all firmware away."""
    build_tree(tmp_path)
    machine, before = offered_by_libvirt(tmp_path, embed_root)
    put(tmp_path, VENDOR, "56-unreadable.json", content)
    if tolerant():
        assert offered_by_libvirt(tmp_path, embed_root) == (machine, before)
    else:
        answer = ask_libvirt(tmp_path, embed_root)
        assert answer.returncode != 0
        assert re.search(f"{complaint}.*56-unreadable.json", answer.stderr)
    # igvmfw itself goes on in either case
    assert offered_by_catalog(tmp_path, machine) == before


@pytest.mark.parametrize("place", [0, 1])
def test_a_newer_libvirt_goes_on_choosing_beside_them(
    place: int, tmp_path: Path, igvm_qemu: Path, ovmf: Path
) -> None:
    """In QEMU's own directories, where igvmfw puts them beside such a libvirt."""
    need(place < len(SUITES), "a distribution with one more release and its libvirt")
    for directory in (SYSTEM, VENDOR):
        (tmp_path / directory).mkdir(parents=True)
    build_tree(tmp_path)
    xml = tmp_path / "guest.xml"
    xml.write_text(
        "<domain type='qemu'><name>g</name><memory>65536</memory><os firmware='efi'>"
        "<type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>"
        f"<devices><emulator>{igvm_qemu}</emulator></devices></domain>"
    )
    with serving(SUITES[place], firmware=tmp_path) as daemon:

        def chosen() -> list[str]:
            answer = daemon.virsh("domxml-to-native", "qemu-argv", xml)
            assert answer.code == 0, answer.err
            return re.findall(r'"filename":"([^"]*\.fd)"', answer.out)

        before = chosen()
        assert f"{tmp_path}/first-code.fd" in before
        documents = {name: presets.load(name).write().decode() for name in template_names()}
        documents["vtpm"] = igvm()
        file = wrap(ovmf, tmp_path / "ovmf.igvm", "--platform", "native", "--platform", "sev-snp")
        documents["made"] = igvmfw("describe", file).out
        assert '"amd-sev-snp"' in documents["made"]
        for directory in (SYSTEM, VENDOR):
            for name, text in documents.items():
                put(tmp_path, directory, f"05-{directory[:3]}-{name}.json", text)
        assert chosen() == before
    names = [entry.name for entry in load(search_path(tmp_path, user=False), tmp_path).available]
    assert len(names) == 2 * len(documents) + 1


# as MOUNTS, but as a user without privilege, whose own directory libvirt then reads, too
AS_USER = """
mkdir -p /etc/qemu
mount --bind "$1/usr/share/qemu/firmware" /usr/share/qemu/firmware
mount --bind "$1/etc/qemu" /etc/qemu
export XDG_CONFIG_HOME="$1/home/user/.config" HOME="$1/home/user"
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all "$2" -c "$3" "$4"
"""


@pytest.fixture
def users_tree(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A root that everybody may read, with a home directory."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/user/.config")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        build_tree(root)
        for name in ("cache", "run"):
            (root / "home/user" / name).mkdir(parents=True)
        yield root


def test_a_users_own_directory_comes_first_as_for_libvirt(users_tree: Path) -> None:
    tree = [
        ("50-both.json", flash(users_tree, "user-both")),  # over the system's and the vendor's
        ("10-first.json", ""),  # masks the vendor's
        ("60-masked.json", flash(users_tree, "user-masked")),  # reaches over the system's mask
        ("05-user.json", flash(users_tree, "user-first")),
    ]
    for name, content in tree:
        put(users_tree, USER, name, content)
    machine, offered = offered_to_a_user(users_tree)
    ours = offered_by_catalog(users_tree, machine, user=True)
    assert ours == offered
    assert offered[0] == "user-first-code.fd"
    assert {"user-both-code.fd", "user-masked-code.fd"} < set(offered)
    assert not {"first-code.fd", "system-both-code.fd", "masked-code.fd"} & set(offered)


@pytest.mark.parametrize("kind", ["dangling link", "unreadable file"])
def test_what_stops_libvirt_is_named_and_hides_no_other(users_tree: Path, kind: str) -> None:
    machine, before = offered_to_a_user(users_tree)
    path = users_tree / SYSTEM / "30-broken.json"
    if kind == "dangling link":
        path.symlink_to("/nowhere/at/all")
    else:
        path.write_text("{}")
        path.chmod(0)
    answer = ask_as_user(users_tree)
    if answer.returncode == 0:  # a libvirt that goes on offers what it did before
        assert offered_in(answer)[1] == before
    else:
        assert path.name in answer.stderr
    with without_privilege():
        found = load(search_path(users_tree, user=True), users_tree)
    broken = {entry.path: entry.error for entry in found.entries if entry.state is State.BROKEN}
    assert broken.pop(path) is not None
    assert list(broken) == [users_tree / SYSTEM / "80-under-directory.json"]
    assert offered_by_catalog(users_tree, machine, user=True) == before


def ask_as_user(root: Path) -> subprocess.CompletedProcess[str]:
    driver = root / "home/user/driver"
    driver.mkdir(exist_ok=True)
    for path in (root / "home").rglob("*"):
        if path.is_dir():
            os.chown(path, NOBODY, NOBODY)
    answer = ask_libvirt(root, driver, mounts=AS_USER)
    need("failed to execute" not in answer.stderr, "a Python that every user may run")
    return answer


def offered_to_a_user(root: Path) -> tuple[str, list[str]]:
    return offered_in(ask_as_user(root))
