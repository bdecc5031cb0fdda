"""The RPM packages: built, installed and removed by rpm, whose file triggers really run.

The root is Debian's with Debian's rpm and an rpm database of its own.  What Debian's packages bring
to it, a package without content provides, with the versions that are there: so rpm judges what ours
require.  Debian's Python learns where rpm distributions put Python packages.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from igvmfw import __version__
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from igvmfw.refresh import vendor_directories
from tests.packaging.documents import dead_references
from tests.parts import need
from tests.sources import rpmlint_settings
from tests.testbed.package_root import PackageRoot

CHECKOUT = Path(__file__).parents[2]
SPEC = CHECKOUT / "packaging/rpm/igvmfw.spec"
FIRMWARE = "/usr/share/qemu/firmware"

# run in the root: what its packages provide, in the words of Fedora's packages
PROVIDED = """
import importlib.metadata, subprocess, sys
print("Provides: /bin/sh", "Provides: /usr/bin/python3", sep="\\n")
print("Provides: python(abi) = %d.%d" % sys.version_info[:2])
for found in importlib.metadata.distributions():
    name = found.name.lower().replace("_", "-")
    for python in ("3", "%d.%d" % sys.version_info[:2]):
        print(f"Provides: python{python}dist({name}) = {found.version}")
shown = subprocess.run(["dpkg-query", "-W", "-f", "${Package} ${Version}\\n", "python3*"],
                       capture_output=True, text=True, check=True).stdout
for line in shown.splitlines():
    name, *version = line.split()
    if version:
        upstream = version[0].rpartition(":")[2]
        print(f"Provides: {name} = {upstream.rpartition(chr(45))[0] or upstream}")
"""
DEBIAN = """
Name: debian
Version: 1
Release: 1
Summary: What Debian's packages provide
License: MIT
BuildArch: noarch
{provides}
%description
What Debian's packages provide.
%install
mkdir -p %{{buildroot}}/usr/lib/python3/dist-packages %{{buildroot}}{site_packages}
mkdir -p %{{buildroot}}/usr/share/licenses
echo {site_packages} >%{{buildroot}}/usr/lib/python3/dist-packages/site-packages.pth
%files
/usr/lib/python3/dist-packages/site-packages.pth
%dir {site_packages}
%dir /usr/share/licenses
"""
VENDOR = """
Name: {name}
Version: {version}
Release: 1
Summary: An IGVM file
License: MIT
BuildArch: noarch
%description
An IGVM file.
%install
install -D -p -m 644 /shared/{source} %{{buildroot}}{path}
{install}
%files
%dir /usr/share/igvm
{path}
{files}
"""
LIBRARY = """
Name: libvirt-libs
Version: {release}
Release: 1
Summary: The name of libvirt's library, by which its release is told
License: MIT
BuildArch: noarch
%description
Nothing more.
%install
install -D /dev/null %{{buildroot}}/usr/lib64/libvirt.so.0.{release}
mkdir -p %{{buildroot}}/etc/libvirt
%files
/usr/lib64/libvirt.so.0.{release}
%dir %attr(0700, root, root) /etc/libvirt
"""
# as libvirt's own spec file has its directories
DRIVER = """
Name: libvirt-daemon-driver-qemu
Version: 1
Release: 1
Summary: The name of libvirt's driver
License: MIT
BuildArch: noarch
Requires: libvirt-libs
%description
Nothing more.
%install
mkdir -p %{buildroot}/etc/libvirt/hooks
%files
%dir /etc/libvirt/hooks
"""
DESCRIPTOR = """
Name: descriptor
Version: 1
Release: 1
Summary: The descriptor of another package's file
License: MIT
BuildArch: noarch
%description
Nothing more.
%install
install -D -t %{buildroot}/usr/share/igvm /usr/share/igvm/vendor.igvm
%igvmfw_descriptor /usr/share/igvm/vendor.igvm
rm -r %{buildroot}/usr/share/igvm
%files
%{igvmfw_firmwaredir}/60-vendor.json
"""
SITE_PACKAGES = (
    "import sysconfig; print(sysconfig.get_path('purelib', 'posix_prefix', {'base': '/usr'}))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RpmRoot(PackageRoot):
    """A root where rpm builds and installs packages."""

    kind: str = "rpm"

    def rpm(self, *words: str) -> str:
        """Run rpm, which succeeds."""
        return self.run("rpm", *words)

    def build(self, spec: str, *definitions: str) -> subprocess.CompletedProcess[str]:
        """Build packages into /shared/made from the text of a spec file."""
        (self.shared / "test.spec").write_text(spec)
        values = ["_topdir /shared/build", "_rpmdir /shared/made", "_binary_payload w1.gzdio"]
        words = [word for value in values for word in ("--define", value)]
        return self.try_run("rpmbuild", "-bb", *words, *definitions, "/shared/test.spec")

    def vendor(
        self,
        version: int,
        *platforms: Platform,
        name: str = "vendor",
        install: str = "",
        files: str = "",
    ) -> str:
        """Build a package that ships an IGVM file; its path in the root."""
        path = f"/usr/share/igvm/{name}.igvm"
        source = "-".join(platforms)
        (self.shared / source).write_bytes(image(*platforms))
        done = self.build(
            VENDOR.format(
                name=name,
                version=version,
                source=source,
                path=path,
                install=install,
                files=files,
            )
        )
        assert done.returncode == 0, done.stderr
        return f"/shared/made/noarch/{name}-{version}-1.noarch.rpm"

    def libvirt(self, release: str) -> list[str]:
        """Build packages with the names of libvirt's; their paths in the root."""
        for spec in (LIBRARY.format(release=release), DRIVER):
            done = self.build(spec)
            assert done.returncode == 0, done.stderr
        names = (f"libvirt-libs-{release}-1", "libvirt-daemon-driver-qemu-1-1")
        return [f"/shared/made/noarch/{name}.noarch.rpm" for name in names]

    def listed(self) -> dict[str, list[str]]:
        """The descriptors that igvmfw lists in the root, with their platforms."""
        rows = json.loads(self.try_run("igvmfw", "list", "--json").stdout)["firmware"]
        assert all(row["file_state"] == "present" for row in rows)
        return {row["path"]: row["platforms"] for row in rows}


def image(*platforms: Platform) -> bytes:
    return wrap(Path("/usr/share/ovmf/OVMF.fd").read_bytes(), platforms)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> RpmRoot:
    """A root with a copy of the checkout and what its packages need to be built."""
    root = RpmRoot(directory=tmp_path_factory.mktemp("build"))
    made = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "target", "*.egg-info")
    shutil.copytree(CHECKOUT, root.shared / "igvmfw", ignore=made)
    provides = root.run("python3", "-c", PROVIDED)
    site_packages = root.run("python3", "-c", SITE_PACKAGES).strip()
    debian = root.build(DEBIAN.format(provides=provides, site_packages=site_packages))
    assert debian.returncode == 0, debian.stderr
    root.rpm("-i", "/shared/made/noarch/debian-1-1.noarch.rpm")
    return root


@pytest.fixture(scope="module")
def packages(builder: RpmRoot) -> Path:
    """Our packages, and the one that stands for Debian."""
    builder.run("/shared/igvmfw/packaging/build-rpm", "/shared/made/noarch")
    return builder.shared / "made/noarch"


@pytest.fixture
def root(tmp_path: Path, packages: Path, ovmf: Path) -> RpmRoot:
    """A root with nothing of igvmfw; its packages are in /shared/packages."""
    made = RpmRoot(directory=tmp_path)
    shutil.copytree(packages, made.shared / "packages")
    made.rpm("-i", "/shared/packages/debian-1-1.noarch.rpm")
    return made


def ours(*names: str) -> list[str]:
    return [f"/shared/packages/{name}-{__version__}-1.noarch.rpm" for name in names]


PROGRAM = ours("igvmfw", "python3-igvmfw")
MACROS = ours("igvmfw-rpm-macros")
HOOK = ours("igvmfw-libvirt-hook")
NATIVE, SEV = Platform.NATIVE, Platform.SEV


def test_a_package_with_an_igvm_file_gets_its_descriptor(root: RpmRoot) -> None:
    """New, upgraded and erased, by the file triggers alone."""
    bare = root.files()
    assert root.rpm("-i", *PROGRAM) == ""
    installed = root.files()
    assert root.listed() == {}
    path = f"{FIRMWARE}/70-igvm-vendor.json"
    assert root.rpm("-i", root.vendor(1, NATIVE)) == ""
    assert root.listed() == {path: ["native"]}
    assert root.run("igvmfw", "validate", path) == f"{path}: valid\n"
    assert root.rpm("-U", root.vendor(2, NATIVE, SEV)) == ""
    assert root.listed() == {path: ["native", "sev"]}
    assert root.rpm("-e", "vendor") == ""
    assert root.files() == installed
    # nothing of what was installed has changed by being used
    assert root.rpm("-V", "igvmfw", "python3-igvmfw") == ""
    assert root.rpm("-e", "igvmfw", "python3-igvmfw") == ""
    assert root.files() == bare


def test_igvmfw_that_comes_later_describes_what_is_there_and_leaves_nothing(root: RpmRoot) -> None:
    root.rpm("-i", root.vendor(1, NATIVE))
    before = root.files()
    assert root.rpm("-i", *PROGRAM) == ""
    assert list(root.listed()) == [f"{FIRMWARE}/70-igvm-vendor.json"]
    assert root.rpm("-U", "--replacepkgs", *PROGRAM) == ""  # as for an upgrade
    assert list(root.listed()) == [f"{FIRMWARE}/70-igvm-vendor.json"]
    assert root.rpm("-e", "igvmfw", "python3-igvmfw") == ""
    assert root.files() == before


def test_both_in_one_transaction(root: RpmRoot) -> None:
    before = root.files()
    vendor = root.vendor(1, SEV)
    assert root.rpm("-i", vendor, *PROGRAM) == ""
    assert list(root.listed().values()) == [["sev"]]
    assert root.rpm("-e", "vendor", "igvmfw", "python3-igvmfw") == ""
    assert root.files() == before


def test_an_edited_descriptor_and_a_damaged_file_are_named_and_stop_nothing(root: RpmRoot) -> None:
    root.rpm("-i", *PROGRAM, root.vendor(1, NATIVE))
    path = f"{FIRMWARE}/70-igvm-vendor.json"
    root.run("sed", "-i", "s/OVMF for/My OVMF for/", path)
    damaged = root.vendor(1, SEV, name="damaged", install="truncate -s 1000 %{buildroot}/*/*/*/*")
    assert "damaged.igvm" in root.run("rpm", "-i", "--force", damaged)
    assert root.rpm("-e", "igvmfw", "python3-igvmfw") == ""
    assert "My OVMF for" in root.run("cat", path)


def test_a_package_that_brings_its_descriptor_keeps_it(root: RpmRoot) -> None:
    root.rpm("-i", *PROGRAM, *MACROS)
    options = "--feature acpi-s3 --description 'Mine, by name'"
    package = root.vendor(
        1,
        SEV,
        install=f"%igvmfw_descriptor /usr/share/igvm/vendor.igvm {options}",
        files=f"{FIRMWARE}/60-vendor.json",
    )
    path = f"{FIRMWARE}/60-vendor.json"
    assert path in root.rpm("-qpl", package).split()
    assert root.rpm("-i", package) == ""
    assert root.listed() == {path: ["sev"]}
    document = json.loads(root.run("cat", path))
    assert document["mapping"]["filename"] == "/usr/share/igvm/vendor.igvm"
    assert document["features"] == ["acpi-s3", "amd-sev"]
    assert document["description"] == "Mine, by name"
    assert root.run("igvmfw", "validate", path) == f"{path}: valid\n"
    assert root.rpm("-V", "vendor") == ""
    # the next version brings none: then it is refresh's to write
    assert root.rpm("-U", root.vendor(2, SEV)) == ""
    assert root.listed() == {f"{FIRMWARE}/70-igvm-vendor.json": ["sev"]}
    # and gives way when the package has its own again
    assert root.rpm("-U", "--oldpackage", package) == ""
    assert root.listed() == {path: ["sev"]}


def test_a_package_of_descriptors_alone(root: RpmRoot) -> None:
    root.rpm("-i", *PROGRAM, *MACROS, root.vendor(1, SEV))
    assert list(root.listed()) == [f"{FIRMWARE}/70-igvm-vendor.json"]
    done = root.build(DESCRIPTOR)
    assert done.returncode == 0, done.stderr
    assert root.rpm("-i", "/shared/made/noarch/descriptor-1-1.noarch.rpm") == ""
    assert list(root.listed()) == [f"{FIRMWARE}/60-vendor.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("/usr/share/igvm/none.igvm", "No such file"),
        ("/usr/share/igvm/vendor.igvm --feature nonsense", "unknown feature 'nonsense'"),
        ("", "names no file"),
    ],
)
def test_a_descriptor_that_cannot_be_made_ends_the_build(
    root: RpmRoot, arguments: str, message: str
) -> None:
    root.rpm("-i", *PROGRAM, *MACROS)
    with pytest.raises(AssertionError, match=message):
        root.vendor(1, SEV, install=f"%igvmfw_descriptor {arguments}")


def test_descriptors_follow_the_libvirt_that_is_installed(root: RpmRoot) -> None:
    """An old one gives up on all firmware when it meets an IGVM descriptor in QEMU's directory."""
    root.run("sh", "-c", "rm /usr/lib/*/libvirt.so.0.*")  # Debian's, which rpm knows nothing of
    root.rpm("-i", *PROGRAM, root.vendor(1, NATIVE))
    for release, directory in (("9000.0", "igvmfw"), ("10007.0", "qemu")):
        root.rpm("-U", root.libvirt(release)[0])
        assert list(root.listed()) == [f"/usr/share/{directory}/firmware/70-igvm-vendor.json"]


def test_what_the_packages_require_is_judged(root: RpmRoot) -> None:
    root.rpm("-e", "debian")
    refused = root.try_run("rpm", "-i", *PROGRAM)
    assert refused.returncode != 0
    for needed in ("lxml) >= 4.9", "jsonschema) >= 4.17", "rich) >= 13", "python(abi) = 3."):
        assert needed in refused.stderr
    alone = root.try_run("rpm", "-i", "--test", *ours("igvmfw"))
    assert f"python3-igvmfw = {__version__}-1 is needed" in alone.stderr


def test_what_is_installed_where(root: RpmRoot) -> None:
    root.rpm("-i", *PROGRAM, *MACROS, *HOOK, *root.libvirt("10007.0"))
    files = set(root.rpm("-ql", "igvmfw").split())
    assert {
        "/usr/bin/igvmfw",
        "/usr/share/man/man1/igvmfw.1.gz",
        "/usr/share/man/man1/igvmfw-refresh.1.gz",
        "/usr/share/bash-completion/completions/igvmfw",
        "/usr/share/zsh/site-functions/_igvmfw",
        "/usr/share/fish/vendor_completions.d/igvmfw.fish",
    } <= files
    for package in ("igvmfw", "python3-igvmfw", "igvmfw-rpm-macros", "igvmfw-libvirt-hook"):
        assert root.rpm("-qL", package).strip().endswith(f"/{package}-{__version__}/LICENSE")
    assert root.rpm("-qc", "igvmfw-libvirt-hook").split() == ["/etc/libvirt/hooks/qemu.d/igvmfw"]
    # the directory is libvirt's, and stays as it has it
    assert root.run("stat", "-c", "%a", "/etc/libvirt") == "700\n"
    assert dead_references(root, "/usr/share/doc/igvmfw") == ""
    assert "igvmfw refresh" in root.run("man", "igvmfw-refresh")


def test_the_hook_works_as_it_is_installed(root: RpmRoot) -> None:
    root.rpm("-i", *PROGRAM, *HOOK, *root.libvirt("10007.0"), root.vendor(1, NATIVE))
    domain = (
        "<domain type='qemu'><name>g</name><memory>65536</memory>"
        "<os firmware='igvm'><type arch='x86_64' machine='q35'>hvm</type></os></domain>"
    )
    rewritten = root.run("igvmfw", "rewrite", "-", stdin=domain)
    hook = ["/etc/libvirt/hooks/qemu.d/igvmfw", "g", "prepare", "begin", "-"]
    root.run("rm", "/usr/share/igvm/vendor.igvm")
    refused = root.try_run(*hook, stdin=rewritten)
    assert refused.returncode == 1
    assert "/usr/share/igvm/vendor.igvm" in refused.stderr
    # switched off, it stays so; and what rpm puts aside is no hook
    root.run("touch", "/etc/libvirt/hooks/igvmfw.off")
    root.rpm("-U", "--replacepkgs", *HOOK)
    assert root.run(*hook, stdin=rewritten) == ""
    root.run("rm", "/etc/libvirt/hooks/igvmfw.off")
    root.run("sed", "-i", "s/^python=.*/python=other/", hook[0])
    assert f"{hook[0]}.rpmsave" in root.rpm("-e", "igvmfw-libvirt-hook")
    assert root.run(f"{hook[0]}.rpmsave", *hook[1:], stdin=rewritten) == ""


@pytest.mark.parametrize(
    ("distribution", "exceptions"),
    [("Fedora", "igvmfw.rpmlintrc"), ("openSUSE", "igvmfw-rpmlintrc")],
)
def test_rpmlint_finds_nothing(root: RpmRoot, distribution: str, exceptions: str) -> None:
    """With the settings of the distribution, and exceptions of which each is explained."""
    settings = rpmlint_settings(root.run("rpmlint", "--version").strip())
    need(settings is not None, "rpmlint's source distribution")
    assert settings is not None
    shutil.copytree(settings / distribution, root.shared / "settings")
    shutil.copytree(SPEC.parent, root.shared / "rpm")
    words = ["-c", "/shared/settings", "-r", f"/shared/rpm/{exceptions}"]
    shown = root.try_run("rpmlint", *words, *PROGRAM, *MACROS, *HOOK, "/shared/rpm/igvmfw.spec")
    found = re.findall(r"^\S+: [EW]: .*", shown.stdout, re.MULTILINE)
    assert found == [], shown.stdout
    assert "4 packages and 1 specfiles checked; 0 errors, 0 warnings" in shown.stdout, shown


@pytest.mark.parametrize(
    ("definition", "has", "has_not"),
    [
        ("fedora 42", ["%pyproject_buildrequires", "python3-libvirt >="], ["python3-rich"]),
        (
            "suse_version 1600",
            [
                "BuildRequires:  python-rpm-macros",
                "python3-libvirt-python",
                "Requires: *python3-rich",
            ],
            ["%pyproject_buildrequires"],
        ),
        ("nothing 1", ["python3-libvirt >=", "-m pip wheel"], ["%pyproject", "python3-rich"]),
    ],
)
def test_the_spec_file_as_each_distribution_reads_it(
    tmp_path: Path, definition: str, has: Sequence[str], has_not: Sequence[str]
) -> None:
    root = RpmRoot(directory=tmp_path)
    shutil.copy(SPEC, root.shared)
    text = root.run("rpmspec", "-P", "--define", definition, "/shared/igvmfw.spec")
    assert "warning" not in text
    for pattern in has:
        assert re.search(pattern, text), pattern
    for pattern in has_not:
        assert not re.search(pattern, text), pattern
    watched = (*vendor_directories(), "/usr/share/igvmfw/firmware")
    directories = " ".join(f"{directory}/" for directory in watched)
    assert f"%transfiletriggerin -- {directories}\n" in text
    assert f"%transfiletriggerpostun -- {directories}\n" in text
    assert re.search(rf"^Version: +{re.escape(__version__)}$", text, re.MULTILINE)


def test_the_packages_for_opensuse_are_built(builder: RpmRoot) -> None:
    """Where their contents and dependencies are others; with pip, not the distribution's macros."""
    options = ["--nodeps", "--define", "suse_version 1600"]
    builder.run("/shared/igvmfw/packaging/build-rpm", "/shared/suse", *options)
    program, python = (
        f"/shared/suse/{name}-{__version__}-0.noarch.rpm" for name in ("igvmfw", "python3-igvmfw")
    )
    confinement = "/etc/apparmor.d/abstractions/libvirt-qemu.d/igvmfw"
    assert confinement in builder.rpm("-qpc", program).split()
    required = builder.rpm("-qp", "--requires", python)
    for needed in ("lxml >= 4.9", "jsonschema >= 4.17", "rich >= 13"):
        assert f"python3-{needed}\n" in required
    assert "python3-libvirt-python >= 9.0" in builder.rpm("-qp", "--recommends", program)
