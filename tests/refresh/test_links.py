"""`refresh` where links give a directory, or an IGVM file, more than one name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from igvmfw import rooted
from igvmfw.install import Into, Level, Place, choose_place
from igvmfw.platforms import Platform
from igvmfw.refresh import Refreshed, refresh
from tests.refreshing import Make, described


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


@pytest.fixture(params=["the host's root", "another root"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """The place below a root, which the host's own root may be as well."""
    place = choose_place(Level.VENDOR, root=tmp_path.resolve())
    return place if request.param == "another root" else place.replace(root=rooted.HOST)


def run(place: Place, *directories: str) -> Refreshed:
    vendor = place.directory.parents[1]
    return refresh(place, [vendor / name for name in directories or ("igvm",)])


def files(place: Place) -> list[str]:
    """The names of the IGVM files that have descriptors."""
    return sorted(Path(path).name for path in described(place).values())


def test_a_link_to_a_file_means_what_it_points_to(place: Place, make: Make) -> None:
    """As packages install a versioned file, with a link to the newest."""
    file = make("usr/share/igvm/OVMF-1.igvm")
    link = file.with_name("OVMF.igvm")
    link.symlink_to(file.name)
    run(place)
    assert files(place) == ["OVMF-1.igvm"]
    file.unlink()
    run(place)
    assert files(place) == []


def test_a_link_from_elsewhere_is_described_while_it_holds(place: Place, make: Make) -> None:
    file = make("opt/fw/OVMF.igvm")
    link = make("usr/share/igvm/link.igvm")
    link.unlink()
    link.symlink_to(os.path.relpath(file, link.parent))
    run(place)
    assert files(place) == ["link.igvm"]
    file.unlink()
    (action,) = run(place).actions
    assert action.reason.endswith("/link.igvm is gone")
    assert files(place) == []


def test_a_directory_that_links_to_another_has_no_files_of_its_own(
    place: Place, make: Make
) -> None:
    """As Fedora's /usr/share/OVMF."""
    make("usr/share/edk2/ovmf/a.igvm")
    (place.directory.parents[1] / "OVMF").symlink_to("edk2/ovmf")
    run(place, "edk2", "OVMF")
    assert [Path(path).parent.name for path in described(place).values()] == ["ovmf"]


def test_a_file_that_becomes_a_link_to_another(place: Place, make: Make) -> None:
    file = make("usr/share/igvm/x.igvm")
    run(place)
    assert files(place) == ["x.igvm"]
    file.unlink()
    make("usr/share/igvm/y.igvm", Platform.SEV)
    file.symlink_to("y.igvm")
    reasons = [action.reason for action in run(place).actions]
    assert files(place) == ["y.igvm"]
    assert reasons[-1].endswith("/x.igvm is a link to another file now")
