"""The file of a vTPM's state: never replaced, never through a link, never half."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from igvmfw.errors import InputError, OutputError, RefusedError
from igvmfw.statefile import look, make, remove
from tests.parts import need
from tests.privilege import without_privilege

SIZE = 1 << 20
HEADER = b"header" * 100
OWNER = (12345, 23456)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lib" / "states" / "libvirt-x.raw"


def test_what_is_made(path: Path) -> None:
    old = os.umask(0o077)
    try:
        assert make(path, size=SIZE, initial=HEADER)
    finally:
        os.umask(old)
    info = path.stat()
    assert stat.filemode(info.st_mode) == "-rw-------"
    assert stat.filemode(path.parent.stat().st_mode) == "drwx--x--x"
    assert path.read_bytes() == HEADER.ljust(SIZE, b"\0")
    assert info.st_blocks * 512 <= 64 << 10
    assert names(path.parent) == [path.name]


def test_the_owner(path: Path) -> None:
    need(os.geteuid() == 0, "root, to give files away")
    make(path, size=SIZE, owner=OWNER)
    info = path.stat()
    assert (info.st_uid, info.st_gid, info.st_mode) == (*OWNER, stat.S_IFREG | 0o600)
    # as a backup is put back
    os.chown(path, 0, 0)
    path.chmod(0o644)
    assert not make(path, size=SIZE, owner=OWNER)
    info = path.stat()
    assert (info.st_uid, info.st_gid, info.st_mode) == (*OWNER, stat.S_IFREG | 0o600)


def test_one_that_is_there_is_kept(path: Path) -> None:
    make(path, size=SIZE, initial=HEADER)
    path.write_bytes(b"the guest's")
    inode = path.stat().st_ino
    assert not make(path, size=SIZE, initial=HEADER)
    assert (path.read_bytes(), path.stat().st_ino) == (b"the guest's", inode)


@pytest.mark.parametrize("kind", ["link", "dangling", "directory", "fifo"])
def test_what_is_no_file_is_neither_followed_nor_replaced(
    path: Path, tmp_path: Path, kind: str
) -> None:
    path.parent.mkdir(parents=True)
    target = tmp_path / "target"
    if kind == "link":
        target.write_bytes(b"precious")
    if kind in ("link", "dangling"):
        path.symlink_to(target)
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    for attempt in (lambda: make(path, size=SIZE), lambda: look(path), lambda: remove(path)):
        with pytest.raises(RefusedError, match="no regular file") as caught:
            attempt()
        assert caught.value.where == str(path)
    assert names(path.parent) == [path.name]
    if kind == "link":
        assert target.read_bytes() == b"precious"
    else:
        assert not target.exists()


def test_links_where_the_file_is_prepared(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir(parents=True)
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (path.parent / f".{path.name}.new").symlink_to(target)
    assert make(path, size=SIZE, initial=HEADER)
    assert target.read_bytes() == b"precious"
    assert names(path.parent) == [path.name]


def test_a_directory_that_is_a_link(path: Path, tmp_path: Path) -> None:
    path.parent.parent.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    path.parent.symlink_to(other)
    with pytest.raises(RefusedError, match="link or no directory"):
        make(path, size=SIZE)
    assert names(other) == []


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o772])
def test_a_directory_that_others_may_write_to(path: Path, mode: int) -> None:
    path.parent.mkdir(parents=True)
    path.parent.chmod(mode)
    with pytest.raises(RefusedError, match=f"mode {mode:04o}"):
        make(path, size=SIZE)
    assert names(path.parent) == []


def test_a_directory_of_another_user(path: Path) -> None:
    need(os.geteuid() == 0, "root, to give a directory away")
    path.parent.mkdir(parents=True)
    os.chown(path.parent, *OWNER)
    with pytest.raises(RefusedError, match="owner 12345"):
        make(path, size=SIZE)


def test_what_is_removed(path: Path) -> None:
    assert not remove(path)  # not even a directory
    make(path, size=SIZE)
    other = path.with_name("libvirt-y.raw")
    make(other, size=SIZE)
    assert remove(path)
    assert names(path.parent) == [other.name]
    assert not remove(path)
    assert look(path) is None


def test_templates(path: Path, tmp_path: Path) -> None:
    template = tmp_path / "template"
    with pytest.raises(InputError, match="cannot read"):
        make(path, size=SIZE, template=template)
    template.write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        make(path, size=SIZE, template=template)
    template.write_bytes(bytes(SIZE + 1))
    with pytest.raises(RefusedError, match="size-bytes"):
        make(path, size=SIZE, template=template)
    assert names(path.parent) == []
    content = b"a" + bytes(SIZE - 2) + b"z"
    template.write_bytes(content)
    assert make(path, size=SIZE, template=template)
    assert path.read_bytes() == content
    assert path.stat().st_blocks * 512 < SIZE // 2


def test_no_room_and_no_permission(path: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot make the state"):
        make(path, size=1 << 62)
    assert names(path.parent) == []
    need(os.geteuid() == 0, "root, to become another user")
    closed = tmp_path / "closed" / "states"
    closed.mkdir(parents=True, mode=0o711)
    with without_privilege(), pytest.raises(OutputError, match="as root"):
        make(closed / path.name, size=SIZE)


# kills the process at one of the places where something can happen to a file
KILLED = """\
import os, signal, sys
from pathlib import Path
from igvmfw import statefile

path, size, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
seen = 0

def step(*rest):
    global seen
    seen += 1
    if seen == limit:
        os.kill(os.getpid(), signal.SIGKILL)

def before_and_after(name):
    real = getattr(os, name)
    def wrapped(*args, **options):
        step()
        result = real(*args, **options)
        step()
        return result
    setattr(os, name, wrapped)

for name in "mkdir open ftruncate pwrite fchown fchmod fsync link unlink".split():
    before_and_after(name)
statefile.make(path, size=size, initial=b"header" * 100)
print(seen)
"""


def test_whatever_interrupts_it_leaves_none_or_a_whole_one(path: Path) -> None:
    limit, outcomes = 0, set()
    while True:
        limit += 1
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(SIZE), str(limit)],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        outcome = path.exists()
        if outcome:
            assert path.read_bytes() == HEADER.ljust(SIZE, b"\0")
            assert stat.filemode(path.stat().st_mode) == "-rw-------"
        outcomes.add(outcome)
        # and the next run goes on from there
        assert make(path, size=SIZE, initial=HEADER) is not outcome
        assert path.read_bytes() == HEADER.ljust(SIZE, b"\0")
        assert names(path.parent) == [path.name]
        assert path.stat().st_nlink == 1
        remove(path)
        path.parent.rmdir()
    assert limit == int(done.stdout) + 1
    assert limit > 20
    assert outcomes == {False, True}
