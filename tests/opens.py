"""Which files of a directory any process opens, by the kernel's account (inotify(7))."""

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

_IN_OPEN = 0x20
_IN_Q_OVERFLOW = 0x4000
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows
_LIBC = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@contextlib.contextmanager
def watching_opens(directory: Path) -> Iterator[Callable[[], set[str]]]:
    """Watch a directory; what is given tells the names opened since it was asked last."""
    fd = _check(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        _check(_LIBC.inotify_add_watch(fd, os.fsencode(directory), _IN_OPEN))
        yield lambda: set(_names(fd))
    finally:
        os.close(fd)


def _names(fd: int) -> Iterator[str]:
    while True:
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return
        while data:
            _, mask, _, length = _EVENT.unpack_from(data)
            assert not mask & _IN_Q_OVERFLOW, "more files were opened than the kernel could tell"
            name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
            if name:  # the directory itself has none
                yield os.fsdecode(name)
            data = data[_EVENT.size + length :]
