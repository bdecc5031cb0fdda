"""Judging descriptors, hook, emulators and confinement, on trees of files and plain facts."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from igvmfw.cli import main
from igvmfw.doctor import remedies
from igvmfw.doctor.checks import examine
from igvmfw.doctor.facts import Confinement, Daemon, Facts, Found, Hook, Libvirt, Manager
from igvmfw.doctor.gather import gather
from igvmfw.doctor.line import ALL, Line, Status, Topic, is_fit
from igvmfw.platforms import Platform
from igvmfw.qemu.emulator import Emulator
from igvmfw.virt.host import Capabilities
from tests.doctor.hosts import write
from tests.igvm import samples
from tests.parts import need
from tests.qemu.test_descriptor import igvm_document
from tests.testbed.cache import printed

CHECKOUT = Path(__file__).parents[2]

OK, MISSING, WRONG, UNKNOWN = Status.OK, Status.MISSING, Status.WRONG, Status.UNKNOWN


def facts_of(root: Path) -> Facts:
    return gather("qemu:///system", root=root)


def judged(facts: Facts, topic: Topic) -> dict[str, Line]:
    return {line.name: line for line in examine(facts, ALL) if line.topic is topic}


def describe(root: Path, name: str, file: str) -> Path:
    import json

    path = root / "etc/qemu/firmware" / name
    document = igvm_document()
    document["mapping"]["filename"] = file
    write(path, json.dumps(document))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    file = tmp_path / "usr/share/igvm/ok.igvm"
    file.parent.mkdir(parents=True)
    file.write_bytes(samples.small(Platform.NATIVE, Platform.SEV_ES))
    describe(tmp_path, "10-ok.json", "/usr/share/igvm/ok.igvm")
    return tmp_path


def test_descriptors_that_can_be_used(root: Path) -> None:
    lines = judged(facts_of(root), Topic.FIRMWARE)
    assert lines["for-native"].status is OK
    assert lines["for-sev-es"].found == "10-ok.json"
    assert lines["for-sev-snp"].status is MISSING
    assert "igvmfw wrap" in str(lines["for-sev-snp"].remedy)
    assert is_fit(list(lines.values()), ALL)  # a domain can name a file


def test_descriptors_that_cannot(root: Path) -> None:
    gone = describe(root, "20-gone.json", "/usr/share/igvm/gone.igvm")
    damaged = describe(root, "30-damaged.json", "/usr/share/igvm/damaged.igvm")
    (root / "usr/share/igvm/damaged.igvm").write_bytes(b"\x1b]0;title\x07")
    broken = root / "etc/qemu/firmware/40-broken.json"
    broken.write_text("{")
    lines = judged(facts_of(root), Topic.FIRMWARE)
    for path, found, remedy in (
        (gone, "/usr/share/igvm/gone.igvm does not exist", "igvmfw uninstall"),
        (damaged, "/usr/share/igvm/damaged.igvm", "install the package"),
        (broken, "", "igvmfw validate"),
    ):
        line = lines[str(path)]
        assert line.status is WRONG
        assert found in line.found
        assert remedy in str(line.remedy)
        assert line.fails([Platform.NATIVE])
    assert lines["for-native"].found == "10-ok.json"


def test_names_with_blanks_in_remedies(root: Path) -> None:
    changed = root / "srv/a b.igvm"
    changed.parent.mkdir()
    shutil.copy(root / "usr/share/igvm/ok.igvm", changed)
    assert main(["install", "--root", str(root), str(changed), "--interface", "uefi"]) == 0
    changed.write_bytes(samples.small(Platform.SEV))
    gone = describe(root, "20 'x'.json", "/usr/share/igvm/gone.igvm")
    broken = root / "etc/qemu/firmware/40 broken.json"
    broken.write_text("{")
    facts = facts_of(root)
    words = [shlex.split(str(line.remedy)) for line in judged(facts, Topic.FIRMWARE).values()]
    assert ["if", "the", "change", "is", "meant:", "igvmfw", "install", "/srv/a b.igvm"] in words
    assert ["igvmfw", "uninstall", str(gone)] in words
    assert ["igvmfw", "validate", str(broken)] in words
    facts = replace(
        facts,
        libvirt=replace(facts.libvirt, version=(9, 0, 0)),
        confinement=Confinement(selinux=True, types={"/srv/a b.igvm": "x_t"}),
    )
    line = judged(facts, Topic.LIBVIRT)["igvm-descriptors"]
    assert len(shlex.split(str(line.remedy))) == 7  # two commands of three words each, and &&
    line = judged(facts, Topic.CONFINEMENT)["selinux"]
    assert shlex.split(str(line.remedy))[-1] == "/srv/a b.igvm"


@pytest.mark.parametrize(("version", "status"), [((9, 0, 0), WRONG), ((10, 7, 0), OK)])
def test_a_libvirt_that_stumbles(root: Path, version: tuple[int, int, int], status: Status) -> None:
    facts = facts_of(root)
    libvirt = replace(facts.libvirt, version=version)
    line = judged(replace(facts, libvirt=libvirt), Topic.LIBVIRT)["igvm-descriptors"]
    assert line.status is status
    if status is WRONG:
        assert "10-ok.json" in line.found
        assert "igvmfw uninstall" in str(line.remedy)


@pytest.mark.parametrize(
    ("libvirt", "status", "words"),
    [
        (Libvirt(uri="U", version=None, failure="x"), MISSING, "apt install libvirt-daemon-system"),
        (
            Libvirt(uri="U", version=(9, 0, 0), failure="no answer within 20 seconds"),
            WRONG,
            "systemctl enable --now libvirtd.socket",
        ),
        (Libvirt(uri="U", version=(9, 0, 0), failure="no", denied=True), UNKNOWN, "as root"),
        (Libvirt(uri="U", version=(9, 0, 0), failure="bad user", remedy="do"), WRONG, "do"),
        (Libvirt(uri="U", answered=(12, 8, 0)), OK, ""),
    ],
)
def test_libvirts_answers(root: Path, libvirt: Libvirt, status: Status, words: str) -> None:
    facts = replace(facts_of(root), manager=Manager.APT, libvirt=libvirt)
    line = judged(facts, Topic.LIBVIRT)["connection"]
    assert line.status is status
    assert words in str(line.remedy)


def test_what_libvirt_offers(root: Path) -> None:
    offered = Capabilities(emulator=None, igvm=False, sev=True, sev_es=False, sev_snp=False)
    libvirt = Libvirt(uri="U", answered=(9, 0, 0), capabilities=offered)
    lines = judged(replace(facts_of(root), libvirt=libvirt), Topic.LIBVIRT)
    assert lines["offers-sev"].status is OK
    assert "cache/libvirt/qemu/capabilities" in str(lines["offers-sev-es"].remedy)
    assert lines["offers-sev-snp"].remedy == "install libvirt 10.5.0 or newer"


@pytest.mark.parametrize(
    ("versions", "status", "words"),
    [
        (((10, 2, 2),), OK, "/10.2.2 launches"),
        (((11, 0, 1), (10, 1, 0)), OK, "/10.1.0 launches"),
        (((11, 0, 1),), MISSING, "QEMU 11.0 cannot launch"),
        (((11, 0, 0), (11, 1, 0)), UNKNOWN, "of QEMU 11.0, QEMU 11.1 it is not known"),
    ],
)
def test_emulators_that_cannot_launch_every_guest(
    root: Path, versions: tuple[tuple[int, int, int], ...], status: Status, words: str
) -> None:
    """As `check` and the start of a guest judge them."""
    found = tuple(
        Found(path=path, origin="x", emulator=Emulator(path=path, version=version, igvm=True))
        for version in versions
        for path in [Path("/") / ".".join(map(str, version))]
    )
    facts = replace(facts_of(root), emulators=found)
    lines = judged(facts, Topic.EMULATOR)
    assert lines["sev-launch"].status is status
    assert words in lines["sev-launch"].found
    for platform in ALL:
        concerned = platform in (Platform.SEV, Platform.SEV_ES)
        assert is_fit(list(lines.values()), [platform]) is not (concerned and status is MISSING)


NOW = 1_000_000.0
HOOK = Hook(executable=True, off=False, changed=NOW, python="/usr/bin/python3")
EARLY, LATE = (
    Daemon(name="virtqemud", pid=7, started=NOW - 5),
    Daemon(name="virtqemud", pid=8, started=NOW + 5),
)


@pytest.mark.parametrize(
    ("hook", "daemons", "name", "status", "remedy"),
    [
        (None, (EARLY,), "installed", MISSING, "systemctl reload virtqemud"),
        (HOOK, (LATE,), "active", OK, ""),
        (HOOK, (), "active", OK, ""),
        (HOOK, (LATE, EARLY), "active", UNKNOWN, "systemctl reload virtqemud"),
        # there was another hook, and with that all are taken up
        (replace(HOOK, others=NOW - 9), (EARLY,), "active", OK, ""),
        (replace(HOOK, executable=False), (LATE,), "installed", WRONG, "chmod 755"),
        (replace(HOOK, off=True), (LATE,), "installed", WRONG, "rm /etc/libvirt/hooks/igvmfw.off"),
        (replace(HOOK, failure="No module named 'igvmfw'"), (LATE,), "python", WRONG, "python="),
        (replace(HOOK, unseen="not run"), (LATE,), "python", UNKNOWN, ""),
    ],
)
def test_the_hook(
    root: Path,
    hook: Hook | None,
    daemons: tuple[Daemon, ...],
    name: str,
    status: Status,
    remedy: str,
) -> None:
    line = judged(replace(facts_of(root), hook=hook, daemons=daemons), Topic.HOOK)[name]
    assert line.status is status
    assert remedy in (line.remedy or "")


def test_apparmor_and_the_files(root: Path) -> None:
    """The rules are those of libvirt's own profile (Debian's libvirt-daemon-system)."""
    write(root / "sys/module/apparmor/parameters/enabled", "Y\n")
    folder = root / "etc/apparmor.d/abstractions"
    stock = "  /usr/share/OVMF/** rk,\n  /usr/share/qemu/** rk,\n  /usr/share/misc/sgabios.bin r,\n"
    stock += "  include if exists <abstractions/libvirt-qemu.d>\n"
    write(folder / "libvirt-qemu", stock)
    line = judged(facts_of(root), Topic.CONFINEMENT)["apparmor"]
    assert line.status is WRONG
    assert "/usr/share/igvm/ok.igvm" in line.found
    # the remedy is a command: what it writes is what is looked for
    command = str(line.remedy).replace("/etc/apparmor.d", str(root / "etc/apparmor.d"))
    subprocess.run(["sh", "-c", command], check=True)
    # the file without -local is the package's
    assert (folder / "libvirt-qemu.d/igvmfw-local").read_text() == "/usr/share/igvm/** r,\n"
    assert judged(facts_of(root), Topic.CONFINEMENT)["apparmor"].status is OK
    write(root / "etc/libvirt/qemu.conf", 'security_driver = "none"\n')
    [line] = judged(facts_of(root), Topic.CONFINEMENT).values()
    assert line.name == "security-driver"


DOCUMENTED = re.search(
    r"echo '(.* r,)' >/etc/apparmor.d/(\S+)", (CHECKOUT / "docs/sev-es.md").read_text()
)
assert DOCUMENTED is not None
LOCAL = "local/abstractions/libvirt-qemu"
IN_GUESTS = "abstractions/libvirt-qemu.d"


@pytest.mark.parametrize(
    ("name", "rule", "file", "status"),
    [
        (
            f"{IN_GUESTS}/igvmfw",
            (CHECKOUT / "packaging/apparmor/igvmfw").read_text(),
            "/usr/share/igvm/ok.igvm",
            OK,
        ),
        (DOCUMENTED[2], DOCUMENTED[1], "/usr/share/igvm/ok.igvm", OK),
        (LOCAL, "/srv/** r,", "/srv/ok.igvm", OK),
        (f"{IN_GUESTS}/x", "/usr/share/igvm/* r,", "/usr/share/igvm/sub/ok.igvm", WRONG),
        (f"{IN_GUESTS}/x.dpkg-old", "/srv/** r,", "/srv/ok.igvm", WRONG),
        (f"{IN_GUESTS}/x", "/srv/** r,\ndeny /srv/o* r,", "/srv/ok.igvm", WRONG),
        (f"{IN_GUESTS}/x", "/srv/{a r,", "/srv/ok.igvm", UNKNOWN),
        (f"{IN_GUESTS}/x", "@{images}/*.igvm r,", "/srv/ok.igvm", UNKNOWN),
    ],
)
def test_rules_of_apparmor(tmp_path: Path, name: str, rule: str, file: str, status: Status) -> None:
    """Beside libvirt's own, as Debian's sid has them."""
    root = printed("roots.sh", "sid")
    need(root.is_dir(), "a root with Debian's sid")
    write(tmp_path / "sys/module/apparmor/parameters/enabled", "Y\n")
    folder = tmp_path / "etc/apparmor.d"
    stock = root / "etc/apparmor.d/abstractions/libvirt-qemu"
    write(folder / "abstractions/libvirt-qemu", stock.read_text())
    write(folder / name, f"{rule}\n")
    describe(tmp_path, "10-ok.json", file)
    line = judged(facts_of(tmp_path), Topic.CONFINEMENT)["apparmor"]
    assert line.status is status, line.found
    assert status is OK or file in line.found
    assert (line.remedy is not None) is (status is WRONG)


@pytest.mark.parametrize(
    ("text", "unconfined"),
    [
        ('security_driver = "none"', True),
        ("  security_driver=[ 'none' ]; # really", True),
        ('security_driver = [\n  "none",\n]  # was "apparmor"', True),
        ('security_driver = "none"\nsecurity_driver = "apparmor"', True),
        ('security_driver = "apparmor" # was "none"', False),
        ('security_driver = [ "apparmor", "none" ]', False),
        ('#security_driver = "none"', False),
        ('security_driver = "none', False),
        ("security_driver = [" * 50_000, False),
    ],
    ids=range(9),
)
def test_who_confines_guests(root: Path, text: str, unconfined: bool) -> None:
    """As libvirt reads its configuration."""
    write(root / "sys/module/apparmor/parameters/enabled", "Y\n")
    write(root / "etc/libvirt/qemu.conf", f"{text}\n")
    [line] = judged(facts_of(root), Topic.CONFINEMENT).values()
    assert (line.found == "qemu.conf leaves guests unconfined") is unconfined


@pytest.mark.parametrize(
    ("text", "user"),
    [('"root" # x', "root"), ("'+107';", "107"), ('"a b"  ', "a b"), ("", "libvirt-qemu")],
)
def test_the_user_of_guests(root: Path, text: str, user: str) -> None:
    write(root / "etc/os-release", "ID=debian\n")
    write(root / "etc/libvirt/qemu.conf", f"user = {text}\n")
    assert facts_of(root).account_name == user


@pytest.mark.parametrize(("kind", "status"), [("usr_t", OK), ("user_home_t", WRONG)])
def test_selinux_and_the_files(root: Path, kind: str, status: Status) -> None:
    found = Confinement(selinux=True, types={"/usr/share/igvm/ok.igvm": kind})
    line = judged(replace(facts_of(root), confinement=found), Topic.CONFINEMENT)["selinux"]
    assert line.status is status
    assert (line.remedy is None) is (status is OK)


@pytest.mark.parametrize(
    ("text", "manager"),
    [
        ("ID=debian", Manager.APT),
        ("ID=ubuntu\nID_LIKE=debian", Manager.APT),
        ("ID=fedora", Manager.DNF),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"', Manager.DNF),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"', Manager.ZYPPER),
        ("ID=gentoo", Manager.UNKNOWN),
        ("ID='\x00", Manager.UNKNOWN),
    ],
)
def test_the_distribution(tmp_path: Path, text: str, manager: Manager) -> None:
    write(tmp_path / "etc/os-release", text)
    assert facts_of(tmp_path).manager is manager


def test_debians_packages_are_there() -> None:
    need(shutil.which("apt-cache") is not None, "apt-cache")
    for name in remedies.package_names(Manager.APT):
        shown = subprocess.run(["apt-cache", "show", name], capture_output=True, check=False)
        assert shown.returncode == 0, name


def test_processes_that_are_none(tmp_path: Path) -> None:
    """/proc changes while it is read, and a name may hold anything."""
    write(tmp_path / "proc/stat", "cpu 1\nbtime 1000\n")
    ticks = os.sysconf("SC_CLK_TCK")
    tail = f"S {' '.join(['0'] * 18)} {5 * ticks} 0"
    (tmp_path / "etc/libvirt/hooks").mkdir(parents=True)
    for pid, name, text in (
        ("10", "libvirtd", f"10 (libvirtd) {tail}"),
        ("11", "a) S (b", f"11 (a) S (b) {tail}"),
        ("12", "libvirtd", "12 (libvirtd"),
        ("13", "virtqemud", ""),
        ("self", "libvirtd", f"14 (libvirtd) {tail}"),
    ):
        write(tmp_path / "proc" / pid / "comm", f"{name}\n")
        write(tmp_path / "proc" / pid / "stat", text)
        (tmp_path / "proc" / pid / "root").symlink_to(tmp_path)
    (tmp_path / "proc/15").mkdir()
    write(tmp_path / "proc/16/comm", "libvirtd\n")  # of another container, with other hooks
    (tmp_path / "proc/16/root").symlink_to(tmp_path / "proc")
    [daemon] = facts_of(tmp_path).daemons
    assert daemon == Daemon(name="libvirtd", pid=10, started=1005.0)
