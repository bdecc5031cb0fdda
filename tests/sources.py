"""Texts of other projects that tests compare with: fetched once, kept in the cache, never shipped.

libvirt's source package comes from the Debian or Ubuntu archive this machine uses, through apt and
without touching its configuration.  QEMU's docs/interop/firmware.json and its own descriptors are
kept by the test bed beside the emulator it builds, in PREFIX/share/igvmfw.  rpmlint's source
distribution, of the release given, has the settings that Fedora and openSUSE use it with.
"""

import functools
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.testbed.cache import CACHE, SUITES, printed

_LIBVIRT_PARTS = (
    "*/tests/qemufirmwaredata",
    "*/tests/qemufirmwaretest.c",
    "*/tests/domaincapsdata",
    "*/tests/qemuxml*data",  # domains: qemuxml2argvdata up to 10.0, qemuxmlconfdata since
    "*/src/conf/schemas",
)
_VERSION = "igvmfw-version"  # put beside what came with the source

# what ships firmware with descriptors in Debian and Ubuntu
_FIRMWARE_PACKAGE = re.compile(r"(ovmf|qemu-efi)(-[a-z0-9-]+)?")


def qemu_interop(release: str) -> Path | None:
    """docs/interop/firmware.json of a QEMU that the test bed builds, where it is built."""
    path = printed("build-qemu.sh", release).parents[1] / "share/igvmfw/firmware.json"
    return path if path.is_file() else None


def qemu_descriptors(release: str) -> Path | None:
    """The directory of the descriptors that a QEMU which the test bed builds comes with."""
    path = printed("build-qemu.sh", release).parents[1] / "share/igvmfw/descriptors"
    return path if path.is_dir() else None


@functools.cache
def libvirt_source() -> Path | None:
    """The parts of libvirt's source tree that tests read, or None where it cannot be fetched."""
    return _kept(None) or _fetched(None)


@functools.cache
def newer_libvirt_source() -> Path | None:
    """The same of the newest release that can be fetched, as the roots' suites have them.

    An archive may list a new source before it has it.
    """
    newest_first = SUITES[::-1]
    for source in (_kept, _fetched):
        for suite in newest_first:
            found = source(suite)
            if found is not None:
                return found
    return None


def version_of(source: Path) -> str:
    """The release of libvirt that a source tree is of."""
    return (source / _VERSION).read_text()


def _place(suite: str | None) -> Path:
    parts = hashlib.sha256("\0".join(_LIBVIRT_PARTS).encode()).hexdigest()[:12]
    return CACHE / "sources" / f"libvirt-{suite + '-' if suite else ''}{parts}"


def _kept(suite: str | None) -> Path | None:
    place = _place(suite)
    return place if place.is_dir() else None


def _fetched(suite: str | None) -> Path | None:
    place = _place(suite)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as work:
        try:
            tree = _fetch(Path(work), suite)
            (tree / _VERSION).write_text(tree.name.removeprefix("libvirt-"))
            tree.rename(place)
        except (OSError, subprocess.SubprocessError, StopIteration):
            return _kept(suite)  # another run may have been faster
    return place


def _fetch(work: Path, suite: str | None) -> Path:
    for directory in ("lists/partial", "cache/archives/partial"):
        (work / directory).mkdir(parents=True)
    (work / "sources.list").write_text(_source_lines(suite))
    apt = [
        "apt-get",
        "-qq",
        f"-oDir::Etc::sourcelist={work}/sources.list",
        "-oDir::Etc::sourceparts=/dev/null",
        f"-oDir::State::lists={work}/lists",
        f"-oDir::Cache={work}/cache",
        "-oAPT::Sandbox::User=",
        "-oAcquire::Languages=none",
    ]
    subprocess.run([*apt, "update"], check=True, timeout=300, capture_output=True)
    fetch = [*apt, "source", "--download-only", "--only-source", "--tar-only", "libvirt"]
    subprocess.run(fetch, check=True, timeout=300, capture_output=True, cwd=work)
    tarball = next(work.glob("libvirt_*.orig.tar.*z"))
    unpack = ["tar", "-xf", str(tarball), "--wildcards", *_LIBVIRT_PARTS]
    subprocess.run(unpack, check=True, timeout=300, capture_output=True, cwd=work)
    return next(work.glob("libvirt-*/"))


@functools.cache
def distribution_descriptors() -> Path | None:
    """A directory for each of the distribution's firmware packages, with its descriptors, or None.

    Most of them are for other architectures than this host's.
    """
    kept = CACHE / "sources" / "descriptors"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as work:
            try:
                _fetch_descriptors(Path(work)).rename(kept)
            except (OSError, subprocess.SubprocessError):
                return kept if kept.is_dir() else None  # another run may have been faster
    return kept


def _fetch_descriptors(work: Path) -> Path:
    names = ["apt-cache", "pkgnames"]
    known = subprocess.run(names, check=True, timeout=60, capture_output=True, text=True).stdout
    packages = sorted(name for name in known.split() if _FIRMWARE_PACKAGE.fullmatch(name))
    fetch = ["apt-get", "-qq", "-oAPT::Sandbox::User=", "download", *packages]
    subprocess.run(fetch, check=True, timeout=300, capture_output=True, cwd=work)
    for package in work.glob("*.deb"):
        directory = work / "all" / package.name.split("_")[0]
        directory.mkdir(parents=True)
        unpack = (
            'dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --wildcards "*/qemu/firmware/*.json"'
        )
        # a package without any, such as a transitional one, is no failure
        subprocess.run(
            ["sh", "-c", unpack, "-", str(package), str(directory)],
            check=False,
            timeout=60,
            capture_output=True,
        )
    return work / "all"


@functools.cache
def rpmlint_settings(version: str) -> Path | None:
    """The directories Fedora and openSUSE of settings for rpmlint, or None where it has none."""
    kept = CACHE / "sources" / f"rpmlint-{version}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
            fetch = [*pip, "--no-deps", "--no-binary", ":all:", f"rpmlint=={version}"]
            try:
                subprocess.run(fetch, check=True, timeout=300, capture_output=True, cwd=directory)
                tarball = next(Path(directory).glob("rpmlint-*.tar.gz"))
                unpack = ["tar", "-xf", str(tarball), "--wildcards", "*/configs"]
                subprocess.run(unpack, check=True, timeout=60, capture_output=True, cwd=directory)
                next(Path(directory).glob("rpmlint-*/configs")).rename(kept)
            except (OSError, subprocess.SubprocessError, StopIteration):
                return kept if kept.is_dir() else None  # another run may have been faster
    return kept


def _source_lines(suite: str | None) -> str:
    """deb-src lines for the archives that this machine's apt takes packages from."""
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)\t$(RELEASE)\t$(ORIGIN)"],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    lines = set()
    for target in targets.stdout.splitlines():
        uri, release, origin = target.split("\t")
        if suite is not None:
            if "-" in release:
                continue  # updates, which a suite to come has not
            release = suite
        keyring = Path(f"/usr/share/keyrings/{origin.lower()}-archive-keyring.gpg")
        if keyring.is_file():
            lines.add(f"deb-src [signed-by={keyring}] {uri} {release} main\n")
    return "".join(sorted(lines))
