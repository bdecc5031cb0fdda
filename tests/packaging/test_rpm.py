"""The RPM packages: built, installed and removed by rpm, whose file triggers really run.

The root is Debian's with Debian's rpm and an rpm database of its own.  What Debian's packages bring
to it, a package without content provides, with the versions that are there: so rpm judges what ours
require.  Debian's Python learns where rpm distributions put Python packages.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from igvmfw import __version__
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from igvmfw.refresh import vendor_directories
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
    print(f"Provides: python3dist({found.name.lower().replace('_', '-')}) = {found.version}")
shown = subprocess.run(["dpkg-query", "-W", "-f", "${Package} ${Version}\\n", "python3*"],
                       capture_output=True, text=True, check=True).stdout
for line in shown.splitlines():
    name, *version = line.split()
    if version:
        print(f"Provides: {name} = {version[0].rpartition(':')[2].rpartition('-')[0] or version[0]}")
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
mkdir -p %{{buildroot}}/usr/lib/python3/dist-packages
echo {site_packages} >%{{buildroot}}/usr/lib/python3/dist-packages/site-packages.pth
%files
/usr/lib/python3/dist-packages/site-packages.pth
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
{descriptor}
%files
{path}
{files}
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
        words = ["--define", "_rpmdir /shared/made", "--define", "_binary_payload w1.gzdio"]
        return self.try_run("rpmbuild", "-bb", *words, *definitions, "/shared/test.spec")

    def vendor(
        self, version: int, *platforms: Platform, name: str = "vendor", descriptor: str = ""
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
                descriptor=descriptor,
                files=f"{FIRMWARE}/*.json" if descriptor else "",
            )
        )
        assert done.returncode == 0, done.stderr
        return f"/shared/made/noarch/{name}-{version}-1.noarch.rpm"

    def listed(self) -> dict[str, list[str]]:
        """The descriptors that igvmfw lists in the root, with their platforms."""
        rows = json.loads(self.run("igvmfw", "list", "--json"))["firmware"]
        assert all(row["file_state"] == "present" for row in rows)
        return {row["path"]: row["platforms"] for row in rows}


def image(*platforms: Platform) -> bytes:
    return wrap(Path("/usr/share/ovmf/OVMF.fd").read_bytes(), platforms)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages, built from a copy of the checkout; beside them the one that stands for Debian."""
    root = RpmRoot(directory=tmp_path_factory.mktemp("build"))
    made = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "target", "*.egg-info")
    shutil.copytree(CHECKOUT, root.shared / "igvmfw", ignore=made)
    provides = root.run("python3", "-c", PROVIDED)
    site_packages = root.run("python3", "-c", SITE_PACKAGES).strip()
    debian = root.build(DEBIAN.format(provides=provides, site_packages=site_packages))
    assert debian.returncode == 0, debian.stderr
    root.rpm("-i", "/shared/made/noarch/debian-1-1.noarch.rpm")
    root.run("/shared/igvmfw/packaging/build-rpm", "/shared/made/noarch")
    return root.shared / "made/noarch"


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


def test_try(root: RpmRoot) -> None:
    print(root.run("ls", "-l", "/shared/packages"))
    for p in ours("igvmfw", "python3-igvmfw", "igvmfw-rpm-macros"):
        print(root.run("rpm", "-qpl", p))
        print(root.run("rpm", "-qp", "--requires", p))
        print(root.run("rpm", "-qp", "--provides", p))
    print(root.run("rpmlint", "/shared/packages", ))
