"""Files at the edges: reading without copies, and writing that is atomic and durable.

Only the edges (cli/, the installer, the hook) call this; everything below works on bytes.
"""

import contextlib
import mmap
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from igvmfw.errors import InputError, OutputError

STDIN = "-"
MAX_STDIN = 1 << 30  # bytes of standard input, which has to be held; real IGVM files have some MiB
MAX_READ = 64 << 20  # bytes of a file that are read; a larger one is mapped
MAX_TEXT = 16 << 20  # bytes; no descriptor or domain XML comes near it


def _input_error(path: str, error: OSError) -> InputError:
    hints = {
        FileNotFoundError: "check the path",
        PermissionError: "check the file's permissions, or run as a user who may read it",
        IsADirectoryError: "name a file inside it",
    }
    hint = next((text for kind, text in hints.items() if isinstance(error, kind)), None)
    return InputError(f"cannot read: {error.strerror or error}", where=path, hint=hint)


@contextlib.contextmanager
def content_of(path: Path | str) -> Iterator[memoryview]:
    """The content of a file, read-only, for use inside the `with` block.

    It is read, as nothing that happens to the file later can harm the process then, and takes no
    longer than mapping.  What is larger than `MAX_READ` is mapped: if such a file is truncated
    meanwhile, the kernel ends the process (SIGBUS).

    Args:
        path: A regular file. `-` reads standard input to its end instead.
    Raises:
        InputError: The file is missing, unreadable or not a regular file, or becomes shorter while
            it is read; standard input has more than `MAX_STDIN` bytes.
    """
    if str(path) == STDIN:
        data = sys.stdin.buffer.read(MAX_STDIN + 1)
        if len(data) > MAX_STDIN:
            raise InputError(
                f"standard input goes on after {MAX_STDIN >> 20} MiB",
                hint="is it the right one? so large a file can be named instead",
            )
        yield memoryview(data)
        return
    with _regular(str(path)) as (fd, size):
        small = size <= MAX_READ
        view = memoryview(_read(fd, size, str(path))) if small else _mapping(fd, str(path))
    yield view


@contextlib.contextmanager
def _regular(path: str) -> Iterator[tuple[int, int]]:
    """A regular file's descriptor, and its size in bytes."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer; it is refused below
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _input_error(path, error) from None
    except ValueError as error:  # NUL, or a surrogate
        raise InputError(f"cannot read: no file has this name: {error}", where=path) from None
    try:
        info = os.fstat(fd)
        if stat.S_ISDIR(info.st_mode):
            raise _input_error(path, IsADirectoryError(None, "Is a directory"))
        if not stat.S_ISREG(info.st_mode):
            raise InputError(
                "cannot read: not a regular file", where=path, hint="- reads standard input"
            )
        yield fd, info.st_size
    finally:
        os.close(fd)


def _read(fd: int, size: int, path: str) -> bytes:
    try:
        data = os.read(fd, size)
        # some network file systems give less at a time
        while len(data) < size and (more := os.read(fd, size - len(data))):
            data += more
    except OSError as error:
        raise _input_error(path, error) from None
    if len(data) < size:
        raise InputError(
            f"changed while it was read: {len(data)} of {size} bytes are left",
            where=path,
            hint="try again; whoever writes it should rename a new file over it",
        )
    return data


def _mapping(fd: int, path: str) -> memoryview:
    try:
        # not closed explicitly: views of it may outlive the block, and the last one frees it
        return memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot map: {error}", where=path) from None


def read_text(path: Path | str, *, limit: int = MAX_TEXT) -> bytes:
    """Read a whole small file (a descriptor, a domain XML).

    Args:
        path: The file; `-` is standard input.
        limit: Most bytes to accept.
    Raises:
        InputError: Missing, unreadable, not a regular file, or larger than `limit`.
    """
    if str(path) == STDIN:
        data = sys.stdin.buffer.read(limit + 1)
    else:
        with _regular(str(path)) as (fd, size):
            data = _read(fd, min(size, limit + 1), str(path))
    if len(data) > limit:
        from igvmfw.kinds import kind_of  # only what goes wrong has to pay for it

        kind = kind_of(data)
        raise InputError(
            f"larger than {limit} bytes",
            where=str(path),
            hint=f"is it the right file? It is {kind.name}" if kind else "is it the right file?",
        )
    return data


def write_atomic(path: Path, data: bytes | memoryview, *, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Args:
        path: Where the file goes; its directory must exist.
        data: The whole content.
        mode: Permission bits of the new file.
    Raises:
        OutputError: The directory is missing or not writable, or the disk is full.
    """
    import tempfile  # loads much, which only writing has to pay for

    directory = path.parent
    temporary: str | None = None
    try:
        fd, temporary = tempfile.mkstemp(prefix=temporary_prefix(path), dir=directory)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        temporary = None
        sync_directory(directory)
    except OSError as error:
        raise OutputError(
            f"cannot write: {error.strerror or error}",
            where=str(path),
            hint="check that the directory exists and is writable, and that the disk has room",
        ) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def write_output(path: Path, data: bytes | memoryview) -> None:
    """Write the file that a command was told to, as `write_atomic`.

    What a link leads to is written, and not the link replaced; a device or a pipe, such as
    /dev/stdout, takes the data as it is and stays what it is.

    Args:
        path: Where the data goes.
        data: All of it.
    Raises:
        OutputError: As `write_atomic`.
    """
    try:
        special = not stat.S_ISREG(os.stat(path).st_mode) and not path.is_dir()
    except OSError:
        special = False  # nothing there; writing says what else is wrong
    if not special:
        write_atomic(Path(os.path.realpath(path)) if path.is_symlink() else path, data)
        return
    try:
        with path.open("wb", buffering=0) as stream:
            view = memoryview(data)
            while view:
                view = view[stream.write(view) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write: {error.strerror or error}",
            where=str(path),
            hint="check what it is, and that whatever reads it goes on",
        ) from None


TEMPORARY_SUFFIX = 8  # characters that follow the prefix, as tempfile.mkstemp makes them


def temporary_prefix(path: Path) -> str:
    """How the name begins that `write_atomic` gives a file first."""
    return f".{path.name[:100]}."


def sync_directory(directory: Path) -> None:
    """Make a rename or removal inside `directory` survive a crash."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
