import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from igvmfw.description import describe_file
from igvmfw.errors import IgvmfwError, InputError
from igvmfw.install import Into, Level, Place, choose_place, plan_install
from igvmfw.platforms import Platform
from igvmfw.provenance import Writer, find_writer, is_untouched
from igvmfw.qemu.descriptor import Descriptor
from igvmfw.refresh import Refreshed, refresh, remove_all
from tests.igvm import samples
from tests.privilege import without_privilege
from tests.refreshing import Make, contents, described, kinds, run


def test_new_changed_gone(place: Place, make: Make) -> None:
    assert run(place) == Refreshed(actions=(), problems=())
    assert not place.directory.exists()
    file = make("usr/share/edk2/ovmf/MINE.igvm")
    assert kinds(run(place)) == {"70-edk2-ovmf-MINE.json": "write"}
    path = place.directory / "70-edk2-ovmf-MINE.json"
    first = Descriptor.parse(path.read_bytes())
    assert first.mapping.filename == "/usr/share/edk2/ovmf/MINE.igvm"
    assert find_writer(first) is Writer.REFRESH
    assert is_untouched(first)
    make("usr/share/edk2/ovmf/MINE.igvm", Platform.SEV, Platform.SEV_ES)
    assert kinds(run(place)) == {"70-edk2-ovmf-MINE.json": "write"}
    assert Descriptor.parse(path.read_bytes()).features == ("amd-sev", "amd-sev-es")
    file.unlink()
    assert kinds(run(place, dry_run=True)) == {"70-edk2-ovmf-MINE.json": "remove"}
    assert path.exists()
    assert kinds(run(place)) == {"70-edk2-ovmf-MINE.json": "remove"}
    assert list(place.directory.iterdir()) == []


def test_edited_descriptors_are_kept(place: Place, make: Make) -> None:
    file = make("usr/share/igvm/a.igvm")
    run(place)
    path = place.directory / "70-igvm-a.json"
    edited = path.read_bytes().replace(b"OVMF for", b"My OVMF for")
    path.write_bytes(edited)
    make("usr/share/igvm/a.igvm", Platform.SEV)
    done = run(place)
    assert kinds(done) == {"70-igvm-a.json": "keep"}
    assert "was edited" in done.actions[0].reason
    file.unlink()
    done = run(place)
    assert kinds(done) == {"70-igvm-a.json": "keep"}
    assert "is gone, but" in done.actions[0].reason
    assert path.read_bytes() == edited


def test_a_package_that_brings_its_own_descriptor_needs_none(place: Place, make: Make) -> None:
    file = make("usr/share/igvm/a.igvm")
    own = describe_file(str(file), root=place.root).descriptor
    place.directory.mkdir(parents=True)
    path = place.directory / "50-package.json"
    path.write_bytes(own.write())
    assert kinds(run(place)) == {"50-package.json": "unchanged"}
    file.unlink()
    assert run(place).actions == ()
    assert path.exists()


def test_refreshs_descriptor_gives_way_to_a_packages_own(place: Place, make: Make) -> None:
    file = make("usr/share/igvm/a.igvm")
    run(place)
    own = describe_file(str(file), root=place.root).descriptor.write()
    for directory in (place.directory, place.root / "usr/share/igvmfw/firmware"):
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("50-package.json", "90-package.json"):  # whichever is read first
            (directory / name).write_bytes(own)
            assert kinds(run(place)) == {name: "unchanged", "70-igvm-a.json": "remove"}
            assert kinds(run(place)) == {name: "unchanged"}
            (directory / name).unlink()
            assert kinds(run(place)) == {"70-igvm-a.json": "write"}


def test_removing_all_removes_what_refresh_wrote(place: Place, make: Make) -> None:
    make("usr/share/igvm/a.igvm")
    make("usr/share/igvm/b.igvm")
    make("usr/share/igvm/edited.igvm")
    run(choose_place(Level.VENDOR, root=place.root, into=Into.IGVMFW))
    left = place.root / "usr/share/igvmfw/firmware/70-igvm-a.json"
    kept = left.read_bytes()
    run(place)
    left.write_bytes(kept)  # of the same name in both directories
    edited = place.directory / "70-igvm-edited.json"
    edited.write_bytes(edited.read_bytes().replace(b"OVMF for", b"My OVMF for"))
    package = place.directory / "50-package.json"
    package.write_bytes(describe_file(str(place.root / "usr/share/igvm/b.igvm")).descriptor.write())
    before = set(place.directory.iterdir())
    planned = remove_all(place, dry_run=True)
    assert set(place.directory.iterdir()) == before
    assert remove_all(place) == planned
    assert sorted((a.path.name, a.kind.value) for a in planned.actions) == [
        ("70-igvm-a.json", "remove"),
        ("70-igvm-a.json", "remove"),
        ("70-igvm-b.json", "remove"),
        ("70-igvm-edited.json", "keep"),
    ]
    assert set(place.directory.iterdir()) == {edited, package}
    assert list(left.parent.iterdir()) == []


def test_what_install_wrote_is_not_refreshs(place: Place, make: Make) -> None:
    file = make("usr/share/igvm/a.igvm")
    wanted = describe_file(str(file), root=place.root, note_time=True).descriptor
    place.directory.mkdir(parents=True)
    action = plan_install(place, "60-a.json", wanted)
    assert action.data is not None
    action.path.write_bytes(action.data)
    assert kinds(run(place)) == {"60-a.json": "unchanged"}
    file.unlink()
    assert run(place).actions == ()


def test_more_files_than_fit_into_memory(tmp_path: Path) -> None:
    """A file that cannot be described is let go, too."""
    vendor = tmp_path / "usr/share/igvm"
    vendor.mkdir(parents=True)
    source = vendor / "0.igvm"
    source.write_bytes(samples.small() + bytes(4 << 20))  # longer than its header says
    for number in range(1, 200):
        os.link(source, vendor / f"{number}.igvm")
    refresh = f"{sys.executable} -m igvmfw refresh --json --root {tmp_path}"
    command = f"ulimit -n 64; ulimit -v {400 << 10}; exec {refresh}"  # in KiB
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    problems = json.loads(done.stdout)["problems"]
    assert len(problems) == 200
    assert all("the file should have" in problem for problem in problems)


def test_damaged_files_hide_no_others(place: Place, make: Make) -> None:
    make("usr/share/igvm/good.igvm")
    bad = make("usr/share/igvm/bad.igvm")
    run(place)
    bad.write_bytes(bad.read_bytes()[:1000])
    make("usr/share/igvm/new.igvm")
    done = run(place)
    assert kinds(done) == {
        "70-igvm-bad.json": "remove",
        "70-igvm-good.json": "unchanged",
        "70-igvm-new.json": "write",
    }
    assert len(done.problems) == 1
    assert str(done.problems[0]).startswith(str(bad))


@pytest.fixture
def unprivileged(place: Place, tmp_path: Path) -> Iterator[Callable[[], Refreshed]]:
    """A refresh by a user who may do with the files what their modes say."""
    for directory in tmp_path, *tmp_path.parents[:2]:  # pytest's own
        directory.chmod(0o755)

    def refreshed() -> Refreshed:
        with without_privilege():
            return run(place)

    yield refreshed
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("igvm/sub/a.igvm", 0), ("igvm/sub", 0), ("igvm/sub", 0o111), ("igvm", 0)],
)
def test_what_cannot_be_read_keeps_its_descriptor(
    place: Place, make: Make, unprivileged: Callable[[], Refreshed], name: str, mode: int
) -> None:
    make("usr/share/igvm/sub/a.igvm")
    run(place)
    before = contents(place)
    place.directory.chmod(0o777)
    (place.root / "usr/share" / name).chmod(mode)
    done = unprivileged()
    assert contents(place) == before
    assert [str(problem).split(" (")[0] for problem in done.problems] == [
        f"{place.root}/usr/share/{name}: cannot read: Permission denied"
    ]
    kept = "keep" if name.endswith(".igvm") else None
    assert kinds(done).get("70-igvm-sub-a.json") == kept


def test_descriptors_that_cannot_be_listed_are_not_written_over(
    place: Place, make: Make, unprivileged: Callable[[], Refreshed]
) -> None:
    make("usr/share/igvm/a.igvm")
    run(place)
    path = place.directory / "70-igvm-a.json"
    path.write_bytes(path.read_bytes().replace(b"OVMF for", b"My OVMF for"))
    before = contents(place)
    place.directory.chmod(0o333)
    with pytest.raises(InputError, match="cannot read: Permission denied"):
        unprivileged()
    assert contents(place) == before


def test_what_cannot_be_described_is_said(place: Place, tmp_path: Path) -> None:
    (tmp_path / "usr/share/igvm").mkdir(parents=True)
    (tmp_path / "usr/share/igvm/bare.igvm").write_bytes(samples.small())
    done = run(place)
    assert done.actions == ()
    assert "--interface" in str(done.problems[0])


def test_links_hidden_and_other_files(place: Place, make: Make, tmp_path: Path) -> None:
    file = make("usr/share/igvm/a.igvm")
    make("opt/elsewhere/c.igvm")
    for name, target in [
        ("alias.igvm", "a.igvm"),
        ("absolute.igvm", "/opt/elsewhere/c.igvm"),
        ("dangling.igvm", "/nowhere"),
        ("loop.igvm", "loop.igvm"),
    ]:
        (file.parent / name).symlink_to(target)
    make("usr/share/igvm/.hidden.igvm")
    make("usr/share/igvm/a.igvm.dpkg-new")
    (file.parent / "directory.igvm").mkdir()
    os.mkfifo(file.parent / "fifo.igvm")
    (tmp_path / "usr/share/edk2").symlink_to("/usr/share/igvm")
    done = run(place)
    assert sorted(kinds(done)) == ["70-edk2-absolute.json", "70-igvm-a.json"]
    assert ["links form a loop" in str(p) for p in done.problems] == [True, True]


def test_names_that_collide(place: Place, make: Make) -> None:
    make("usr/share/igvm/a/b.igvm")
    make("usr/share/igvm/a-b.igvm")
    make("usr/share/igvm/a b.igvm")
    assert len(set(kinds(run(place)))) == 3
    before = described(place)
    assert set(kinds(run(place)).values()) == {"unchanged"}
    assert described(place) == before


def test_a_name_is_never_one_that_is_taken(place: Place, make: Make) -> None:
    """As when somebody has what refresh wrote describe another file, again and again."""
    make("usr/share/igvm/a.igvm")
    edited: dict[str, bytes] = {}
    for _ in range(4):
        (name,) = [name for name, kind in kinds(run(place)).items() if kind == "write"]
        path = place.directory / name
        edited[name] = path.read_bytes().replace(b"/usr/share/igvm/a", b"/srv/mine")
        path.write_bytes(edited[name])
        assert contents(place) == edited
    assert len(edited) == 4


def test_copies_of_what_refresh_wrote_are_its_own(place: Place, make: Make) -> None:
    """As to give a file a higher priority."""
    file = make("usr/share/igvm/a.igvm")
    run(place)
    path = place.directory / "70-igvm-a.json"
    for name in ("20-first.json", "80-last.json"):
        path.with_name(name).write_bytes(path.read_bytes())
    assert set(kinds(run(place)).values()) == {"unchanged"}
    make("usr/share/igvm/a.igvm", Platform.SEV)
    run(place)
    texts = contents(place)
    assert sorted(texts) == ["20-first.json", "70-igvm-a.json", "80-last.json"]
    assert all(Descriptor.parse(text).features == ("amd-sev",) for text in texts.values())
    file.unlink()
    run(place)
    assert contents(place) == {}


def test_files_outside_the_directories_are_left_alone(place: Place, make: Make) -> None:
    make("usr/share/igvm/a.igvm")
    other = make("usr/share/edk2/b.igvm")
    run(place)
    other.unlink()
    done = refresh(place, [place.root / "usr/share/igvm"])
    assert kinds(done) == {"70-igvm-a.json": "unchanged"}


def test_descriptors_move_when_the_right_place_changes(make: Make, tmp_path: Path) -> None:
    make("usr/share/igvm/a.igvm")
    own = choose_place(Level.VENDOR, root=tmp_path, into=Into.IGVMFW)
    qemu = choose_place(Level.VENDOR, root=tmp_path, into=Into.QEMU)
    run(own)
    before = contents(own)
    before["20-first.json"] = before["70-igvm-a.json"]
    (own.directory / "20-first.json").write_bytes(before["20-first.json"])
    for place, other in ((qemu, own), (own, qemu)):
        done = run(place)
        assert {action.reason for action in done.actions} == {
            f"moved from {other.directory}",
            f"belongs into {place.directory}",
        }
        assert contents(place) == before
        assert contents(other) == {}
    # as a run leaves it that was killed half-way
    qemu.directory.joinpath("70-igvm-a.json").write_bytes(before["70-igvm-a.json"])
    run(own)
    assert [contents(own), contents(qemu)] == [before, {}]


def test_descriptors_of_files_elsewhere_move_too(make: Make, tmp_path: Path) -> None:
    """As when libvirt is upgraded across 10.7, and the trigger looks where packages put files."""
    make("opt/fw/a.igvm")
    make("opt/fw/b.igvm")
    gone = make("usr/share/igvm/gone.igvm")
    own = choose_place(Level.VENDOR, root=tmp_path, into=Into.IGVMFW)
    qemu = choose_place(Level.VENDOR, root=tmp_path, into=Into.QEMU)
    run(own)
    refresh(own, [tmp_path / "opt/fw"])
    gone.unlink()
    before = contents(own)
    del before["70-igvm-gone.json"]
    run(qemu)
    assert contents(own) == {}
    assert contents(qemu) == before
    # none is written over where its name is taken
    own.directory.joinpath("70-opt-fw-a.json").write_bytes(b"mine")
    run(own)
    assert contents(qemu) == {}
    found = contents(own)
    assert found.pop("70-opt-fw-a.json") == b"mine"
    assert sorted(found.values()) == sorted(before.values())


def test_a_name_that_is_no_utf8_is_a_problem(place: Place, make: Make) -> None:
    file = make("usr/share/igvm/a.igvm")
    os.rename(os.fsencode(file), os.fsencode(file.parent) + b"/\xff.igvm")
    done = run(place)
    assert done.actions == ()
    assert "not UTF-8" in str(done.problems[0])


def test_a_directory_outside_the_root_is_refused(place: Place) -> None:
    with pytest.raises(IgvmfwError, match="not below the root"):
        refresh(place, [Path("/usr/share/igvm")])
