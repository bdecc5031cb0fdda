"""The file that a vTPM's state is kept in: made, looked at, removed.

The directory is writable for igvmfw's user alone, and everything happens through its descriptor,
so that no guest, and no user that guests run as, can put a link in the way.  A file is made under
another name and linked to its own when it is whole and on disk: whatever interrupts that leaves no
state or a usable one, and a file that is there already is never replaced.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from igvmfw import files
from igvmfw.errors import IgvmfwError, InputError, OutputError, RefusedError

_MODE = 0o600
_DIRECTORY_MODE = 0o711  # QEMU's user opens what it was told of, and cannot list the others
_BLOCK = 1 << 16
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def make(
    path: Path,
    *,
    size: int,
    initial: bytes = b"",
    template: Path | None = None,
    owner: tuple[int, int] | None = None,
) -> bool:
    """Make the file of a vTPM's state, or keep the one that is there.

    Args:
        path: The file, in a directory that is for such files alone and made when missing.
        size: In bytes; what the file does not start with are holes.
        initial: What the file starts with.
        template: A file with what it starts with instead.
        owner: User and group of the file; None for one's own.  Only root can give files away.
    Returns:
        Whether it was made.
    Raises:
        InputError: The template cannot be read.
        RefusedError: What is there is no regular file, others may write to the directory, or the
            template is too large.
        OutputError: The file cannot be made.
    """
    if os.geteuid() != 0:
        owner = None
    with _reported(path), _directory(path.parent, make=True) as directory:
        temporary = _temporary(path)
        with contextlib.suppress(FileNotFoundError):  # left by one that was interrupted
            os.unlink(temporary, dir_fd=directory)
        if _find(directory, path) is not None:
            _put_right(directory, path, owner)
            return False
        fd = os.open(temporary, _NEW, _MODE, dir_fd=directory)
        try:
            _fill(fd, size, initial, template)
            _give(fd, owner)
            os.fsync(fd)
            # unlike a rename, a link replaces nothing
            os.link(
                temporary,
                path.name,
                src_dir_fd=directory,
                dst_dir_fd=directory,
                follow_symlinks=False,
            )
        finally:
            os.close(fd)
            os.unlink(temporary, dir_fd=directory)
        os.fsync(directory)
    return True


def look(path: Path) -> os.stat_result | None:
    """What is known of the file; None where there is none.

    Raises:
        RefusedError: It is no regular file.
        PermissionError: This user may not look.
    """
    try:
        info = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    _check_regular(info, path)
    return info


def remove(path: Path) -> bool:
    """Remove the file of a vTPM's state; returns whether there was one.

    Raises:
        RefusedError: It is no regular file, or others may write to the directory.
        OutputError: It cannot be removed.
    """
    with _reported(path, "remove"):
        try:
            with _directory(path.parent) as directory:
                for name in (_temporary(path), path.name):
                    with contextlib.suppress(FileNotFoundError):
                        found = _find(directory, path) is not None
                        os.unlink(name, dir_fd=directory)
                os.fsync(directory)
        except FileNotFoundError:
            return False
    return found


def _temporary(path: Path) -> str:
    return f".{path.name}.new"


@contextlib.contextmanager
def _reported(path: Path, verb: str = "make") -> Iterator[None]:
    try:
        yield
    except IgvmfwError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot {verb} the state of a vTPM: {error.strerror or error}",
            where=str(path),
            hint="run igvmfw as root for the system's guests"
            if isinstance(error, PermissionError)
            else "check that its file system is there, is writable and has room",
        ) from None


@contextlib.contextmanager
def _directory(path: Path, *, make: bool = False) -> Iterator[int]:
    """The directory, locked against other runs of igvmfw."""
    if make:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, _DIRECTORY_MODE)
            files.sync_directory(path.parent)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        raise RefusedError(
            "is a link or no directory, where states of vTPMs are kept",
            where=str(path),
            hint="take it away; igvmfw makes the directory",
        ) from None
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise RefusedError(
                f"others may change what is in the directory (owner {info.st_uid}, mode "
                f"{stat.S_IMODE(info.st_mode):04o})",
                where=str(path),
                hint=f"it must belong to user {os.geteuid()} and have mode 0711",
            )
        if make and info.st_mode & 0o111 != 0o111:  # an umask, or an interrupted run
            os.fchmod(fd, _DIRECTORY_MODE)
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def _find(directory: int, path: Path) -> os.stat_result | None:
    try:
        info = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    _check_regular(info, path)
    return info


def _check_regular(info: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise RefusedError(
            "is a link or no regular file, where the state of a vTPM is kept",
            where=str(path),
            hint="take it away, or put the state there as a file",
        )


def _put_right(directory: int, path: Path, owner: tuple[int, int] | None) -> None:
    """Owner and mode of a state that is there: a backup may have been put back by root."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path.name, flags, dir_fd=directory)
    try:
        info = os.fstat(fd)
        _check_regular(info, path)
        wanted = owner or (info.st_uid, info.st_gid)
        if (info.st_uid, info.st_gid) != wanted or stat.S_IMODE(info.st_mode) != _MODE:
            _give(fd, owner)
            os.fsync(fd)
    finally:
        os.close(fd)


def _give(fd: int, owner: tuple[int, int] | None) -> None:
    if owner is not None:
        os.fchown(fd, *owner)
    os.fchmod(fd, _MODE)  # last: a change of the owner may take bits away


def _fill(fd: int, size: int, initial: bytes, template: Path | None) -> None:
    os.ftruncate(fd, size)
    if template is None:
        _write(fd, memoryview(initial))
        return
    with files.content_of(template) as content:
        if len(content) > size:
            raise RefusedError(
                f"the template has {len(content)} bytes, the descriptor's size-bytes is {size}",
                where=str(template),
                hint="put the template's size into x-vtpm-storage",
            )
        if not content:
            raise InputError("the template is empty", where=str(template), hint="install it anew")
        _write(fd, content)


def _write(fd: int, content: memoryview) -> None:
    for start in range(0, len(content), _BLOCK):
        block = content[start : start + _BLOCK]
        if not any(block):
            continue  # stays a hole
        done = 0
        while done < len(block):
            done += os.pwrite(fd, block[done:], start + done)
