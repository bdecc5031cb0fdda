"""Texts of other projects that tests compare with: fetched once, kept in the cache, never shipped.

libvirt's source package comes from the Debian or Ubuntu archive this machine uses, through apt and
without touching its configuration.  QEMU's docs/interop/firmware.json is kept by the test bed
beside the emulator it builds, as PREFIX/share/igvmfw/firmware.json.
"""

import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

from tests.testbed.cache import CACHE, printed

_LIBVIRT_PARTS = (
    "*/tests/qemufirmwaredata",
    "*/tests/qemufirmwaretest.c",
    "*/tests/domaincapsdata",
    "*/tests/qemuxml*data",  # domains: qemuxml2argvdata up to 10.0, qemuxmlconfdata since
)


def qemu_interop(release: str) -> Path | None:
    """docs/interop/firmware.json of a QEMU that the test bed builds, where it is built."""
    path = printed("build-qemu.sh", release).parents[1] / "share/igvmfw/firmware.json"
    return path if path.is_file() else None


@functools.cache
def libvirt_source() -> Path | None:
    """The parts of libvirt's source tree that tests read, or None where it cannot be fetched."""
    parts = hashlib.sha256("\0".join(_LIBVIRT_PARTS).encode()).hexdigest()[:12]
    kept = CACHE / "sources" / f"libvirt-{parts}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as work:
            try:
                tree = _fetch(Path(work))
                tree.rename(kept)
            except (OSError, subprocess.SubprocessError, StopIteration):
                return kept if kept.is_dir() else None  # another run may have been faster
    return kept


def _fetch(work: Path) -> Path:
    for directory in ("lists/partial", "cache/archives/partial"):
        (work / directory).mkdir(parents=True)
    (work / "sources.list").write_text(_source_lines())
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
    fetch = [*apt, "source", "--download-only", "--only-source", "libvirt"]
    subprocess.run(fetch, check=True, timeout=300, capture_output=True, cwd=work)
    tarball = next(work.glob("libvirt_*.orig.tar.*z"))
    unpack = ["tar", "-xf", str(tarball), "--wildcards", *_LIBVIRT_PARTS]
    subprocess.run(unpack, check=True, timeout=300, capture_output=True, cwd=work)
    return next(work.glob("libvirt-*/"))


def _source_lines() -> str:
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
        keyring = Path(f"/usr/share/keyrings/{origin.lower()}-archive-keyring.gpg")
        if keyring.is_file():
            lines.add(f"deb-src [signed-by={keyring}] {uri} {release} main\n")
    return "".join(sorted(lines))
