"""`refresh` where links give a directory, or an IGVM file, more than one name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from igvmfw.install import Into, Level, choose_place
from tests.refreshing import Make, maker


@pytest.fixture
def make(tmp_path: Path, ovmf: Path) -> Make:
    return maker(tmp_path, ovmf)


def igvmfw(*words: str | Path) -> str:
    """What a command prints; it must not wait for itself."""
    command = [sys.executable, "-m", "igvmfw", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(
    ("link", "target", "into"),
    [
        ("igvmfw/firmware", "../qemu/firmware", "qemu"),
        ("igvmfw", "qemu", "igvmfw"),
        ("qemu/firmware", "{base}/igvmfw/firmware", "qemu"),
    ],
)
def test_qemus_directory_and_igvmfws_are_one(
    make: Make, tmp_path: Path, link: str, target: str, into: str
) -> None:
    file = make("usr/share/igvm/a.igvm")
    for base in ("usr/share", "etc"):
        path = tmp_path / base / link
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target.format(base=f"/{base}"))
    place = choose_place(Level.VENDOR, root=tmp_path, into=Into(into))
    where = ("--root", tmp_path, "--into", into)
    written = place.directory / "70-igvm-a.json"
    reason = "/usr/share/igvm/a.igvm"
    assert igvmfw("refresh", *where) == f"written    {written}  ({reason} is new)\n"
    assert igvmfw("refresh", *where) == f"unchanged  {written}  ({reason} looks unchanged)\n"
    assert igvmfw("refresh", "--remove", *where) == f"removed    {written}  (written by refresh)\n"
    assert os.listdir(place.real_directory) == []
    # uninstall looks into both, and takes either's name
    for other in Into.QEMU, Into.IGVMFW:
        igvmfw("install", file, *where)
        named = choose_place(Level.SYSTEM, root=tmp_path, into=other).directory / "65-a.json"
        words = ("uninstall", named, "--root", tmp_path)
        assert igvmfw(*words) == f"removed    {named}  (written by igvmfw)\n"
    igvmfw("install", file, *where)
    assert igvmfw("uninstall", "a", "--root", tmp_path).count("\n") == 1
