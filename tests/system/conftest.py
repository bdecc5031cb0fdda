"""libvirt's embedded driver for tests that start guests."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts import need


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
