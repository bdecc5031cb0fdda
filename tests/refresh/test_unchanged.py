"""Which files `refresh` reads: those that are not for certain what their descriptors say."""

import json
import lzma
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from igvmfw import files
from igvmfw.install import Kind, Place
from igvmfw.platforms import Platform
from igvmfw.provenance import Writer, sealed
from igvmfw.qemu.descriptor import Descriptor
from igvmfw.qemu.schema import Profile
from tests.opens import watching_opens
from tests.refreshing import Make, described, kinds, run, settle

SVSM = Path(__file__).parents[1] / "data/coconut/coconut-qemu-vtpm-snp-ovmf.igvm.xz"


def refresh_in_a_process(root: Path, **environment: str) -> Counter[str]:
    """How many files had what done to them, in a run after the clock went on."""
    settle()
    command = [sys.executable, "-m", "igvmfw", "-q", "refresh", "--json", "--root", str(root)]
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    return Counter(action["action"] for action in json.loads(done.stdout)["actions"])


def test_a_second_run_reads_no_files_contents(place: Place, make: Make, tmp_path: Path) -> None:
    """By the kernel's account of which files are opened."""
    source = make("usr/share/igvm/file-0.igvm")
    for number in range(1, 1000):
        os.link(source, source.with_name(f"file-{number}.igvm"))

    with watching_opens(source.parent) as opened:
        assert refresh_in_a_process(tmp_path) == {"write": 1000}
        assert len(opened()) == 1000
        assert len(described(place)) == 1000
        assert refresh_in_a_process(tmp_path) == {"unchanged": 1000}
        assert opened() == set()
        # one that is new is read, and alone
        make("usr/share/igvm/new.igvm", Platform.SEV)
        assert opened() == {"new.igvm"}  # written just now
        assert refresh_in_a_process(tmp_path) == {"write": 1, "unchanged": 1000}
        assert opened() == {"new.igvm"}


def test_an_upgrade_within_a_second_is_seen(place: Place, make: Make) -> None:
    """Packages set files' times of writing, in seconds; and two versions may be equally large."""
    file = make("usr/share/igvm/a.igvm")
    os.utime(file, (1, 1))
    run(place)
    before = file.stat()
    new = make("usr/share/igvm/.new", Platform.SEV)  # as dpkg and rpm do
    os.utime(new, (1, 1))
    new.rename(file)
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    done = run(place)
    assert [action.reason for action in done.actions] == ["/usr/share/igvm/a.igvm changed"]
    path = place.directory / "70-igvm-a.json"
    assert Descriptor.parse(path.read_bytes()).features == ("amd-sev",)


@pytest.mark.parametrize("step", [4_000_000, 1_000_000_000, 2_000_000_000])
def test_a_change_within_a_step_of_the_clock_is_seen(
    place: Place, make: Make, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Linux's clock for files, ext4 with small inodes, and FAT, as if the clock stood meanwhile."""
    file = make("usr/share/igvm/a.igvm")
    stood = 1_700_000_000_000_000_000 + step % 1_000_000_000
    real = os.stat

    def coarse(path: Path | str, **how: Any) -> os.stat_result:
        info = real(path, **how)
        return os.stat_result(tuple(info), {"st_ctime_ns": stood}) if path == file else info

    monkeypatch.setattr(os, "stat", coarse)
    monkeypatch.setattr(time, "time_ns", lambda: stood + step - 1)
    assert run(place).actions[0].reason == "/usr/share/igvm/a.igvm is new"
    make("usr/share/igvm/a.igvm", Platform.SEV)
    assert run(place).actions[0].reason == "/usr/share/igvm/a.igvm changed"
    # once the clock has gone on, it is read a last time
    monkeypatch.setattr(time, "time_ns", lambda: stood + 10 * step)
    assert run(place).actions[0].reason == "/usr/share/igvm/a.igvm has its time noted now"
    with watching_opens(file.parent) as opened:
        assert run(place).actions[0].reason == "/usr/share/igvm/a.igvm looks unchanged"
        assert opened() == set()


def test_descriptors_of_an_image_that_can_be_reproduced(place: Place, make: Make) -> None:
    file = make("usr/share/igvm/a.igvm")
    path = place.directory / "70-igvm-a.json"
    texts = []
    for seconds in (1, 2):
        os.utime(file, (seconds, seconds))
        refresh_in_a_process(place.root, SOURCE_DATE_EPOCH="1")
        texts.append(path.read_bytes())
        path.unlink()
    assert texts[0] == texts[1]
    path.write_bytes(texts[0])
    # what has no time is read; then it has one
    assert refresh_in_a_process(place.root, SOURCE_DATE_EPOCH="1") == {"unchanged": 1}
    assert refresh_in_a_process(place.root) == {"write": 1}
    with watching_opens(file.parent) as opened:
        assert refresh_in_a_process(place.root) == {"unchanged": 1}
        assert opened() == set()
    # what has one loses it
    assert path.read_bytes() != texts[0]
    (action,) = run(place, note_time=False).actions
    assert action.reason.endswith("/a.igvm is described without its time now")
    assert path.read_bytes() == texts[0]
    (action,) = run(place).actions
    assert action.reason.endswith("/a.igvm has its time noted now")


def test_what_looks_unchanged_can_be_read_all_the_same(place: Place, make: Make) -> None:
    make("usr/share/igvm/a.igvm")
    run(place)
    path = place.directory / "70-igvm-a.json"
    wrong = Descriptor.parse(path.read_bytes()).replace(description="wrong")
    path.write_bytes(sealed(wrong, Writer.REFRESH).write())
    assert kinds(run(place)) == {"70-igvm-a.json": "unchanged"}
    assert kinds(run(place, everything=True)) == {"70-igvm-a.json": "write"}
    assert kinds(run(place, everything=True)) == {"70-igvm-a.json": "unchanged"}


def test_another_profile_is_not_what_looks_unchanged(place: Place) -> None:
    """The one has words that the other lacks, so what is missing shows in the file alone."""
    file = place.root / "usr/share/igvm/a.igvm"
    file.parent.mkdir(parents=True)
    file.write_bytes(lzma.decompress(SVSM.read_bytes()))
    settle()
    path = place.directory / "70-igvm-a.json"
    for profile in (Profile.IGVMFW, Profile.UPSTREAM, Profile.IGVMFW):
        assert kinds(run(place, profile=profile)) == {"70-igvm-a.json": "write"}
        features = Descriptor.parse(path.read_bytes()).features
        assert ("vtpm" in features) is (profile is Profile.IGVMFW)
        with watching_opens(file.parent) as opened:
            assert kinds(run(place, profile=profile)) == {"70-igvm-a.json": "unchanged"}
            assert opened() == set()


def test_touching_a_file_updates_what_is_noted(place: Place, make: Make) -> None:
    file = make("usr/share/igvm/a.igvm")
    run(place)
    os.utime(file, ns=(1, 1))
    settle()
    done = run(place)
    assert kinds(done) == {"70-igvm-a.json": "write"}
    assert "another time, and the same content" in done.actions[0].reason
    assert kinds(run(place)) == {"70-igvm-a.json": "unchanged"}


def test_a_change_while_it_is_read_shows_next_time(
    place: Place, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make("usr/share/igvm/a.igvm")
    real = files.content_of

    # written between the look at its time and its being read
    def meanwhile(path: Path | str) -> AbstractContextManager[memoryview]:
        os.utime(file, ns=(7, 7))
        return real(path)

    monkeypatch.setattr(files, "content_of", meanwhile)
    run(place)
    monkeypatch.undo()
    assert kinds(run(place)) == {"70-igvm-a.json": Kind.WRITE}
