"""`refresh` beside other processes, and after ones that were killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from igvmfw.install import Into, Level, Place, choose_place
from igvmfw.platforms import Platform
from igvmfw.qemu.catalog import load
from igvmfw.refresh import remove_all
from tests.igvm import samples
from tests.killing import kills
from tests.refreshing import Make, contents, described, run


def test_killed_runs_are_made_good_by_the_next(place: Place, make: Make, tmp_path: Path) -> None:
    source = make("usr/share/igvm/file-0.igvm")
    for number in range(1, 60):
        os.link(source, source.with_name(f"file-{number}.igvm"))
    command = [sys.executable, "-m", "igvmfw", "refresh", "--root", str(tmp_path)]
    for delay in (0.15, 0.2, 0.25, 0.3, 0.4, 0.5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        found = load([place.directory], place.root)
        assert all(entry.error is None for entry in found.entries)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert len(described(place)) == 60
    assert len(list(place.directory.iterdir())) == 60


def test_a_kill_at_any_step_of_a_refresh(place: Place, tmp_path: Path) -> None:
    """One descriptor is replaced, one removed, one new: each is the old or the new one, whole."""
    first, changed = samples.small(Platform.SEV_SNP), samples.small(Platform.NATIVE)
    presets = ("coconut-svsm/coconut-qemu", "edk2/ovmf/OVMF")  # what small files are cannot be told
    kept, moved = (tmp_path / f"usr/share/{name}.igvm" for name in presets)
    for file in (kept, moved):
        file.parent.mkdir(parents=True)

    def before() -> None:
        kept.write_bytes(first)
        moved.write_bytes(first)
        run(place, note_time=False)

    def then() -> None:
        kept.write_bytes(changed)
        moved.unlink()

    before()
    old = contents(place)
    then()
    run(place, note_time=False)
    new = contents(place)
    assert [len(old), len(new)] == [2, 1]
    seen = []

    def prepare() -> None:
        before()
        then()

    for _ in kills(lambda: run(place, note_time=False), prepare=prepare):
        found = contents(place)
        for name in old:
            assert found.get(name) in (old.get(name), new.get(name))
        assert set(found) <= set(old)
        seen.append(found)
        run(place, note_time=False)
        assert contents(place) == new
        assert len(list(place.directory.iterdir())) == 1  # nothing of the killed run is left
    assert len(seen) > 50
    assert old in seen
    assert new in seen
    assert any(found not in (old, new) for found in seen)


def test_runs_that_want_the_same_directories_do_not_wait_for_each_other(place: Place) -> None:
    """A trigger's refresh, and the removal of igvmfw, both lock QEMU's directory and igvmfw's."""
    other = choose_place(Level.VENDOR, root=place.root, into=Into.IGVMFW)
    for each in (place, other):
        each.directory.mkdir(parents=True)
    (place.root / "usr/share/igvm").mkdir()
    (place.root / "usr/share/igvm/a.igvm").write_bytes(samples.small())
    calls = (lambda: run(place), lambda: run(other), lambda: remove_all(place))

    def often(call: Callable[[], object]) -> None:
        for _ in range(40):
            call()

    threads = [threading.Thread(target=often, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
