"""What the tests of commands share."""

from pathlib import Path

import pytest

from igvmfw.cli import main
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from tests.cli.commands import Run, file_in
from tests.refreshing import settle


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; returns its exit status and what it printed."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def wrapped(ovmf: Path) -> bytes:
    """An IGVM file for plain, SEV and SEV-ES guests."""
    return wrap(ovmf.read_bytes(), [Platform.NATIVE, Platform.SEV, Platform.SEV_ES])


@pytest.fixture
def root(tmp_path: Path, wrapped: bytes) -> Path:
    """A root directory with that file where packages put them."""
    root = tmp_path / "root"
    file_in(root).parent.mkdir(parents=True)
    file_in(root).write_bytes(wrapped)
    settle()
    return root
