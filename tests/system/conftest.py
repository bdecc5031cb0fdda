"""libvirts for tests that start guests: the embedded driver, and daemons of the tests' own."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts import need
from tests.system.daemons import Daemon, install_hook, serving
from tests.testbed.cache import SUITES


@pytest.fixture(scope="session")
def known_emulators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What libvirt found out about emulators: asking one takes seconds, and every root anew."""
    return tmp_path_factory.mktemp("libvirt") / "cache"


@pytest.fixture
def uri(embed_root: Path, known_emulators: Path) -> Iterator[str]:
    """The URI of an embedded driver with a root of its own."""
    try:
        import libvirt  # noqa: F401
    except ImportError:
        need(False, "libvirt-python")
    if known_emulators.exists():
        shutil.copytree(known_emulators, embed_root / "cache")
    yield f"qemu:///embed?root={embed_root}"
    if (embed_root / "cache").exists():
        shutil.copytree(embed_root / "cache", known_emulators, dirs_exist_ok=True)


@pytest.fixture(scope="module", params=["host", "newest"])
def running(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A libvirtd with the hook: this host's, and the newest."""
    newest = request.param == "newest"
    need(bool(SUITES) or not newest, "a distribution with newer releases")
    with serving(SUITES[-1] if newest else None) as daemon:
        yield daemon


@pytest.fixture
def daemon(running: Daemon) -> Iterator[Daemon]:
    yield running
    running.remove_all()
    install_hook(running.hook, running.python)
    running.off.unlink(missing_ok=True)
    (running.root / "dev/sev").touch()
    shutil.rmtree(running.root / "module/kvm_amd", ignore_errors=True)
