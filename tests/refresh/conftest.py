"""A root for the tests of `refresh`, with IGVM files in it."""

from pathlib import Path

import pytest

from igvmfw.install import Level, Place, choose_place
from tests.refreshing import Make, maker


@pytest.fixture
def make(tmp_path: Path, ovmf: Path) -> Make:
    """Puts an IGVM file with OVMF below the root."""
    return maker(tmp_path, ovmf)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The root's directory for vendor descriptors."""
    return choose_place(Level.VENDOR, root=tmp_path)
