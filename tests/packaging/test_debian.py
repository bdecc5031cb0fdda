"""The Debian packages: built, installed, used and purged by the real tools, in newer releases.

A test has the root of a release to itself, with that release's Python, libvirt, QEMU and OVMF.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from igvmfw.refresh import vendor_directories
from tests.conftest import QEMU_CONF
from tests.packaging.documents import dead_references
from tests.testbed.cache import SUITES
from tests.testbed.package_root import PackageRoot

CHECKOUT = Path(__file__).parents[2]
DEBIAN = CHECKOUT / "packaging/debian"
FIRMWARE = "/usr/share/qemu/firmware"
OUR_PACKAGES = ("dh-igvmfw", "igvmfw", "python3-igvmfw")
# a path of every kind that the packages have, and none that they should not have
PLACES = {
    "/etc/apparmor.d/abstractions/libvirt-qemu.d/igvmfw",
    "/etc/libvirt/hooks/qemu.d/igvmfw",
    "/usr/bin/dh_igvmfw",
    "/usr/bin/igvmfw",
    "/usr/share/bash-completion/completions/igvmfw",
    "/usr/share/fish/vendor_completions.d/igvmfw.fish",
    "/usr/share/igvmfw/descriptors/edk2-ovmf.json",
    "/usr/share/man/man1/dh_igvmfw.1.gz",
    "/usr/share/man/man1/igvmfw-refresh.1.gz",
    "/usr/share/man/man1/igvmfw.1.gz",
    "/usr/share/perl5/Debian/Debhelper/Sequence/igvmfw.pm",
    "/usr/share/zsh/vendor-completions/_igvmfw",
}
# libvirt's own choice for a domain that leaves it to libvirt; argv is the driver's root
ASK_AUTOSELECTION = """
import sys, libvirt
libvirt.virEventRegisterDefaultImpl()
connection = libvirt.open("qemu:///embed?root=" + sys.argv[1])
xml = "<domain type='qemu'><name>g</name><memory>65536</memory><os firmware='efi'>"
xml += "<type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features></domain>"
print(connection.domainXMLToNative("qemu-argv", xml))
"""
CONTROL = """\
Source: {name}
Maintainer: nobody <nobody@localhost>
Build-Depends: debhelper-compat (= 13), dh-sequence-igvmfw

Package: {name}
Architecture: all
Depends: ${{misc:Depends}}
Breaks: ${{igvmfw:Breaks}}
Description: an IGVM file
"""
CHANGELOG = """\
{name} ({version}) unstable; urgency=medium

  * An IGVM file.

 -- nobody <nobody@localhost>  Wed, 25 Nov 2026 00:00:00 +0000
"""
PROFILE = """\
abi <abi/3.0>,
include <tunables/global>
profile libvirt-{uuid} flags=(attach_disconnected) {{
  include <abstractions/libvirt-qemu>
}}
"""
UUID = "01234567-89ab-cdef-0123-456789abcdef"
NATIVE, SEV, SEV_ES = Platform.NATIVE, Platform.SEV, Platform.SEV_ES


@dataclass(frozen=True, slots=True, kw_only=True)
class DebRoot(PackageRoot):
    """A root where Debian packages are built and installed."""

    def apt(self, *words: str) -> str:
        """Run apt-get, which succeeds."""
        return self.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qy", *words)

    def vendor(self, version: str, *platforms: Platform, name: str = "vendor") -> str:
        """Build a package that ships an IGVM file and knows nothing of igvmfw; its path."""
        tree = self.shared / f"{name}-{version}"
        file = tree / f"usr/share/igvm/{name}.igvm"
        file.parent.mkdir(parents=True)
        file.write_bytes(image(platforms))
        (tree / "DEBIAN").mkdir()
        (tree / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\n"
            "Maintainer: nobody <nobody@localhost>\nDescription: an IGVM file\n"
        )
        inner = f"/shared/{tree.name}"
        self.run("dpkg-deb", "--root-owner-group", "--build", inner, f"{inner}.deb")
        return f"{inner}.deb"

    def source(self, name: str, version: str, files: dict[str, str], *platforms: Platform) -> None:
        """Lay out a source package whose build uses dh_igvmfw."""
        tree = self.shared / name
        (tree / "debian/source").mkdir(parents=True, exist_ok=True)
        texts = {
            "control": CONTROL.format(name=name),
            "changelog": CHANGELOG.format(name=name, version=version),
            "source/format": "3.0 (native)\n",
            "rules": "#!/usr/bin/make -f\n%:\n\tdh $@\n",
            "install": f"{name}.igvm usr/share/igvm\n",
        }
        for place, text in {**texts, **files}.items():
            (tree / "debian" / place).write_text(text)
        (tree / "debian/rules").chmod(0o755)
        (tree / f"{name}.igvm").write_bytes(image(platforms))

    def build(self, name: str) -> subprocess.CompletedProcess[str]:
        """Build a source package in /shared."""
        command = f"cd /shared/{name} && dpkg-buildpackage --no-sign --build=binary 2>&1"
        return self.try_run("sh", "-c", command)

    def listed(self) -> dict[str, list[str]]:
        """The descriptors that igvmfw lists in the root, with their platforms."""
        rows = json.loads(self.try_run("igvmfw", "list", "--json").stdout)["firmware"]
        assert all(row["file_state"] == "present" for row in rows)
        return {row["path"]: row["platforms"] for row in rows}

    def autoselected(self) -> list[str]:
        """The firmware files of a domain that leaves the choice to libvirt."""
        self.run("mkdir", "-p", "/tmp/embed/etc")
        self.run("tee", "/tmp/embed/etc/qemu.conf", stdin=QEMU_CONF)
        said = self.run("python3", "-c", ASK_AUTOSELECTION, "/tmp/embed")
        return re.findall(r'"filename":"([^"]*\.fd)"', said)


def image(platforms: Iterable[Platform]) -> bytes:
    return wrap(Path("/usr/share/ovmf/OVMF.fd").read_bytes(), tuple(platforms))


@pytest.fixture(scope="module", params=SUITES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DebRoot:
    """The root that our packages were built in, from a copy of the checkout, into /shared/out."""
    root = DebRoot(kind=f"deb-{request.param}", directory=tmp_path_factory.mktemp("build"))
    made = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "target", "*.egg-info")
    shutil.copytree(CHECKOUT, root.shared / "igvmfw", ignore=made)
    root.run("/shared/igvmfw/packaging/build-deb", "/shared/out")
    return root


@pytest.fixture(scope="module")
def installation(built: DebRoot, tmp_path_factory: pytest.TempPathFactory) -> DebRoot:
    """The root with our packages installed by apt, and /shared/bare, the files it had before."""
    root = DebRoot(kind=built.kind, directory=tmp_path_factory.mktemp("installed"))
    shutil.copytree(built.shared / "out", root.shared / "out")
    root.apt("check")  # makes apt's own files
    bare = root.files()
    debs = sorted(f"/shared/out/{path.name}" for path in (root.shared / "out").glob("*.deb"))
    assert len(debs) == len(OUR_PACKAGES)
    said = root.apt("install", *debs)
    assert "igvmfw: " not in said
    (root.shared / "bare").write_text("\n".join(bare))
    return root


@pytest.fixture
def root(installation: DebRoot, tmp_path: Path, ovmf: Path) -> Iterator[DebRoot]:
    """A root of a test's own with our packages installed."""
    directory = tmp_path / "root"
    # the changes with their whiteouts, which are devices, and attributes
    subprocess.run(["cp", "-a", str(installation.directory), str(directory)], check=True)
    yield replace(installation, directory=directory)
    shutil.rmtree(directory)


# the newest lintian knows most
@pytest.mark.parametrize("built", SUITES[-1:], indirect=True)
def test_lintian_finds_nothing(built: DebRoot) -> None:
    (changes,) = (built.shared / "out").glob("*.changes")
    checked = built.try_run(
        "lintian", "--allow-root", "--no-cfg", "--display-info", "--fail-on", "error,warning,info",
        f"/shared/out/{changes.name}",
    )  # fmt: skip
    assert (checked.returncode, checked.stdout) == (0, ""), checked.stderr


def test_the_packages_own_tests(root: DebRoot) -> None:
    """What a release's archive runs for every change of Python, libvirt, QEMU or OVMF."""
    (dsc,) = (root.shared / "out").glob("*.dsc")
    done = root.try_run(
        "autopkgtest", "--no-built-binaries", f"/shared/out/{dsc.name}", "--", "null"
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    summary = re.findall(r"(?m)^(?:\S+ +)?([a-z-]+) +PASS\b", done.stdout + done.stderr)
    written = re.findall(r"(?m)^Tests: (\S+)", (DEBIAN / "tests/control").read_text())
    assert set(written) <= set(summary)


def test_files_are_where_debian_has_them(root: DebRoot) -> None:
    shipped = set(root.run("dpkg", "-L", *OUR_PACKAGES).split())
    assert shipped >= PLACES
    outside = ("/usr/bin/", "/usr/lib/python3/dist-packages/igvmfw", "/usr/share/", "/etc/")
    files = {path for path in shipped if not any(p.startswith(f"{path}/") for p in shipped)}
    assert [path for path in files if path != "/." and not path.startswith(outside)] == []
    conffiles = root.run("dpkg-query", "-W", "-f", "${Conffiles}", "igvmfw")
    assert {line.split()[0] for line in conffiles.splitlines() if line} == {
        path for path in PLACES if path.startswith("/etc/")
    }


def test_the_documentation_is_whole(root: DebRoot) -> None:
    assert dead_references(root, "/usr/share/doc/igvmfw") == ""


def test_an_igvm_file_of_another_package(root: DebRoot) -> None:
    """Installed, upgraded and removed, by the triggers alone; libvirt goes on as before."""
    own_choice = root.autoselected()
    assert any("OVMF_CODE" in file for file in own_choice)
    installed = root.files()
    path = f"{FIRMWARE}/70-igvm-vendor.json"
    root.apt("install", root.vendor("1", NATIVE))
    assert root.listed() == {path: ["native"]}
    assert root.run("igvmfw", "validate", path) == f"{path}: valid\n"
    assert root.autoselected() == own_choice
    root.apt("install", root.vendor("2", NATIVE, SEV))
    assert root.listed() == {path: ["native", "sev"]}
    root.apt("remove", "vendor")
    assert root.listed() == {}
    assert root.files() == installed


def test_a_package_that_is_built_with_dh_igvmfw(root: DebRoot) -> None:
    """It brings its descriptor, which the triggers leave alone; before it had one of theirs."""
    own_choice = root.autoselected()
    root.apt("install", root.vendor("1", NATIVE, name="mine"))
    assert list(root.listed()) == [f"{FIRMWARE}/70-igvm-mine.json"]
    line = 'usr/share/igvm/mine.igvm --feature acpi-s3 --description "Mine, by name"\n'
    root.source("mine", "2", {"mine.igvmfw": "# what no file tells\n" + line}, SEV, SEV_ES)
    done = root.build("mine")
    assert done.returncode == 0, done.stdout
    package = "/shared/mine_2_all.deb"
    path = f"{FIRMWARE}/60-igvm-mine.json"
    assert path in root.run("dpkg-deb", "--contents", package)
    fields = root.run("dpkg-deb", "--field", package, "Breaks")
    assert fields.strip() == "libvirt-daemon-driver-qemu (<< 10.7.0~)"
    root.apt("install", package)
    assert root.listed() == {path: ["sev", "sev-es"]}
    document = json.loads(root.run("cat", path))
    assert document["mapping"]["filename"] == "/usr/share/igvm/mine.igvm"
    assert document["features"] == ["acpi-s3", "amd-sev", "amd-sev-es"]
    assert document["description"] == "Mine, by name"
    assert root.autoselected() == own_choice
    # built twice, it is the same
    first = (root.shared / "mine_2_all.deb").read_bytes()
    assert root.build("mine").returncode == 0
    assert (root.shared / "mine_2_all.deb").read_bytes() == first
    # without igvmfw, the descriptor of the package stays
    root.apt("purge", *OUR_PACKAGES)
    assert path in root.run("dpkg", "-L", "mine")
    assert root.run("dpkg", "--verify", "mine") == ""


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"broken.igvmfw": "usr/share/igvm/no.igvm\n"}, "igvmfw:1: usr/share/igvm/no.igvm is no"),
        ({"broken.igvmfw": "usr/share/igvm/broken.igvm --feature none\n"}, "none"),
        ({"rules": "#!/usr/bin/make -f\n%:\n\tdh $@\noverride_dh_auto_install:\n"
                   "\ttruncate -s 1000 broken.igvm\n"}, "broken.igvm"),
        ({"60-x.json": "{", "install": "debian/60-x.json usr/share/qemu/firmware\n"}, "is no JSON"),
        ({"60-x.json": json.dumps({"mapping": {"device": "igvm", "filename": "/nowhere.igvm"}}),
          "install": "debian/60-x.json usr/share/qemu/firmware\n"}, "is a required property"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("built", SUITES[-1:], indirect=True)
def test_what_is_wrong_fails_the_build(
    root: DebRoot, files: dict[str, str], complaint: str
) -> None:
    root.source("broken", "1", files, NATIVE)
    done = root.build("broken")
    assert done.returncode != 0
    assert complaint in done.stdout


@pytest.mark.parametrize("built", SUITES[-1:], indirect=True)
def test_a_descriptor_that_the_package_has_already_is_judged_and_kept(root: DebRoot) -> None:
    root.source("other", "1", {}, NATIVE)
    file = "/shared/other/debian/tree/usr/share/igvm/other.igvm"
    root.run("install", "-D", "-m", "644", "/shared/other/other.igvm", file)
    output = "/shared/other/debian/50-y.json"
    root.run("igvmfw", "describe", "--root", "/shared/other/debian/tree", file, "-o", output)
    install = "other.igvm usr/share/igvm\ndebian/50-y.json usr/share/qemu/firmware\n"
    (root.shared / "other/debian/install").write_text(install)
    done = root.build("other")
    assert done.returncode == 0, done.stdout
    contents = root.run("dpkg-deb", "--contents", "/shared/other_1_all.deb")
    assert re.findall(r"\S+\.json", contents) == [f".{FIRMWARE}/50-y.json"]


def test_purging_leaves_nothing(root: DebRoot) -> None:
    bare = set((root.shared / "bare").read_text().split("\n"))
    vendor = {"/usr/share/igvm", "/usr/share/igvm/vendor.igvm"}
    root.apt("install", root.vendor("1", NATIVE))
    root.run("install", "-d", "-m", "700", "/run/igvmfw")  # as the hook does
    root.run("touch", "/run/igvmfw/entry")
    into = ["--into", "igvmfw", "--name", "mine"]
    root.run("igvmfw", "install", *into, "/usr/share/igvm/vendor.igvm")
    root.run("cp", "/usr/share/igvm/vendor.igvm", "/etc/igvmfw/mine.igvm")
    root.run("touch", "/etc/libvirt/hooks/igvmfw.off")
    root.apt("remove", "igvmfw")
    left = root.files() - bare
    assert f"{FIRMWARE}/70-igvm-vendor.json" not in left
    assert "/etc/libvirt/hooks/qemu.d/igvmfw" in left
    # it stays for a while, and is in nobody's way
    xml = "<domain xmlns:igvmfw='urn:igvmfw:domain:1'/>"
    hook = "/etc/libvirt/hooks/qemu.d/igvmfw"
    assert root.run(hook, "guest", "prepare", "begin", "-", stdin=xml) == ""
    root.apt("purge", *OUR_PACKAGES)
    apt = {"/var/lib/apt/lists/auxfiles"}  # apt itself makes it when it is first run
    # an image is the administrator's
    mine = {"/etc/igvmfw", "/etc/igvmfw/mine.igvm"}
    assert root.files() - bare - vendor - apt == mine
    assert bare - root.files() == set()


def test_igvmfw_that_comes_later_and_what_was_edited(root: DebRoot) -> None:
    root.apt("install", root.vendor("1", NATIVE))
    root.apt("remove", "igvmfw")
    path = f"{FIRMWARE}/70-igvm-vendor.json"
    assert root.try_run("test", "-e", path).returncode == 1
    (deb,) = (root.shared / "out").glob("igvmfw_*.deb")
    root.apt("install", f"/shared/out/{deb.name}")
    assert list(root.listed()) == [path]
    root.run("sed", "-i", "s/OVMF for/My OVMF for/", path)
    assert f"kept       {path}" in root.apt("remove", "igvmfw")
    assert "My OVMF for" in root.run("cat", path)


def test_a_damaged_file_of_another_package_stops_nothing(root: DebRoot) -> None:
    package = root.vendor("1", NATIVE)
    tree = package.removesuffix(".deb")
    root.run("truncate", "-s", "1000", f"{tree}/usr/share/igvm/vendor.igvm")
    root.run("dpkg-deb", "--root-owner-group", "--build", tree, package)
    assert "/usr/share/igvm/vendor.igvm: " in root.apt("install", package)
    assert root.run("dpkg", "--audit") == ""
    assert root.try_run("igvmfw", "list").stdout == ""


def test_the_confinement_of_guests(root: DebRoot) -> None:
    """As a part of libvirt's abstraction, it compiles, and gives each guest its own state alone."""
    (root.shared / "profile").write_text(PROFILE.format(uuid=UUID))
    parse = ["apparmor_parser", "--skip-kernel-load", "--skip-cache"]
    rules = root.run(*parse, "--debug", "/shared/profile")
    state = "/var/lib/libvirt/qemu/igvmfw"
    permitted = re.findall(rf"(\S+) priority=\S+\s+Name:\s+\(({state}\S*)\)", rules)
    # what stands before the colon is for a file's owner, after it for others
    assert permitted == [("rwak:", f"{state}/libvirt-{UUID}.raw")]
    # the parser's own regular expressions
    said = root.run(*parse, "--dump", "rule-exprs", "/shared/profile")
    readable = re.findall(r"aare: \S+\.igvm +-> +(\S+)", said)
    own = [Path("/usr/local/share/igvm"), Path("/etc/igvmfw"), Path("/var/lib/libvirt/igvm")]
    for directory in (*vendor_directories(), *own):
        for file in (f"{directory}/a.igvm", f"{directory}/a/b.igvm"):
            assert any(re.fullmatch(rule, file) for rule in readable), file
    for file in ("/etc/a.igvm", "/home/a.igvm", "/usr/share/igvm/a.igvm.key"):
        assert not any(re.fullmatch(rule, file) for rule in readable), file


def test_the_triggers_are_for_all_vendor_directories() -> None:
    lines = (DEBIAN / "igvmfw.triggers").read_text().splitlines()
    interests = [shlex.split(line, comments=True) for line in lines]
    watched = {words[1] for words in interests if words}
    assert {str(path) for path in vendor_directories()} <= watched
    assert all(words[0] == "interest-noawait" for words in interests if words)
