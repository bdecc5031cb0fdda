"""Parts that tests of several folders share, and a last word on what was not tested."""

import contextlib
import functools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.parts import SKIPPED, need
from tests.testbed.cache import SCRIPTS, SUITES, printed
from tests.testbed.standin import DEVICE, SevEmulator, make_emulator

OVMF = Path("/usr/share/ovmf/OVMF.fd")  # code and variables in one image, with SEV-SNP's metadata
QEMU_CONF = """\
stdio_handler = "file"
namespaces = []
security_driver = "none"
user = "root"
group = "root"
remember_owner = 0
cgroup_controllers = []
"""


@pytest.fixture(scope="session")
def igvm_qemu() -> Path:
    """A QEMU that takes IGVM files."""
    qemu = printed("build-qemu.sh")
    need(qemu.exists(), "a QEMU with IGVM support")
    return qemu


@pytest.fixture(scope="session")
def ovmf() -> Path:
    """The distribution's OVMF, a combined image."""
    need(OVMF.exists(), f"OVMF ({OVMF})")
    return OVMF


@pytest.fixture(scope="session")
def kvm() -> None:
    """KVM, usable by this user."""
    need(os.access("/dev/kvm", os.R_OK | os.W_OK), "KVM (read and write access to /dev/kvm)")


@pytest.fixture(scope="session")
def dev_sev(kvm: None) -> Iterator[None]:
    """/dev/sev, whose presence libvirt looks at; the stand-in answers for it."""
    made = not DEVICE.exists()
    if made:
        need(os.access(DEVICE.parent, os.W_OK), f"{DEVICE}, or root to make a stand-in for it")
        DEVICE.touch()
    yield
    if made:
        DEVICE.unlink(missing_ok=True)


@pytest.fixture
def sev_emulator(igvm_qemu: Path, dev_sev: None) -> Iterator[SevEmulator]:
    """An IGVM-capable QEMU that finds itself on a SEV host, with the record of its launch."""
    need(shutil.which("gcc") is not None, "gcc, for the SEV stand-in")
    with tempfile.TemporaryDirectory(prefix="igvmfw-sev-") as directory:
        tik = bytes(range(16))  # not zeros: a tool that ignores the key must be noticed
        yield make_emulator(Path(directory), igvm_qemu, tik=tik)


@pytest.fixture
def embed_root() -> Iterator[Path]:
    """A root for libvirt's embedded driver: qemu:///embed?root=DIR.  Its guests end with it."""
    need(_libvirt_user_exists(), "the user that libvirt runs guests as (libvirt-qemu)")
    # short: the monitor's socket goes below it, and a socket's path has at most 107 bytes
    directory = Path(tempfile.mkdtemp(prefix="igvmfw-"))
    (directory / "etc").mkdir()
    (directory / "etc" / "qemu.conf").write_text(QEMU_CONF)
    yield directory
    _end_guests(directory)
    shutil.rmtree(directory, ignore_errors=True)


def _libvirt_user_exists() -> bool:
    """Whether there is a user that libvirt looks up before it reads what qemu.conf says."""
    if os.geteuid() != 0:
        return True
    for name in ("libvirt-qemu", "qemu"):  # Debian and Ubuntu; Fedora and openSUSE
        with contextlib.suppress(KeyError):
            return bool(pwd.getpwnam(name))
    return False


def _end_guests(root: Path) -> None:
    guests = set(root.glob("run/qemu/*.pid")) - {root / "run/qemu/driver.pid"}  # ours: this process
    for file in guests:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture(scope="session")
def newer_libvirts() -> Iterator[Callable[[int], str]]:
    """URIs of libvirts of newer releases, by their place: 0 is the oldest of them.

    Each runs from its first use on, out of a root that roots.sh made.  They see /tmp and the test
    bed's cache where they are; their guests end with them.
    """
    with contextlib.ExitStack() as stack:

        @functools.cache
        def uri_of(suite: str) -> str:
            return stack.enter_context(_served(suite))

        def uri_at(place: int) -> str:
            need(os.geteuid() == 0, "root, for a newer libvirt")
            need(place < len(SUITES), "a distribution with one more release and its libvirt")
            return uri_of(SUITES[place])

        yield uri_at


@contextlib.contextmanager
def _served(suite: str) -> Iterator[str]:
    """The libvirtd of a root, until the end of the block."""
    need(printed("roots.sh", suite).is_dir(), "a root with a newer libvirt")
    with tempfile.TemporaryDirectory(prefix="igvmfw-libvirtd-", dir="/tmp") as directory:
        socket = Path(directory) / "libvirt-sock"
        with (Path(directory) / "log").open("wb") as log:
            command = [str(SCRIPTS / "roots.sh"), suite, "--serve", directory]
            daemon = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for _ in range(300):
                if socket.exists() or daemon.poll() is not None:
                    break
                time.sleep(0.1)
            assert socket.exists(), (Path(directory) / "log").read_text()
            yield f"qemu+unix:///system?socket={socket}"
        finally:
            daemon.kill()  # and with it every process in its namespace
            daemon.wait()


@pytest.fixture
def newer_libvirt(newer_libvirts: Callable[[int], str]) -> str:
    """The URI of the newest libvirt."""
    return newer_libvirts(max(len(SUITES) - 1, 0))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say in the very last lines which parts were missing, and how many tests with them."""
    # its class is public in newer releases of pytest only
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    missing: dict[str, int] = {}
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason.startswith(SKIPPED):
            missing[reason] = missing.get(reason, 0) + 1
    if missing:
        reporter.section("NOT TESTED ON THIS MACHINE", red=True, bold=True)
        for reason, count in sorted(missing.items()):
            reporter.write_line(f"{count:4} tests skipped: {reason}", red=True)
