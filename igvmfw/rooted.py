"""Paths inside another root directory (`--root`), as a process that is chrooted there sees them.

A package build or an image has absolute links that mean its own files, not the host's; following
them with the host's root would read, or write, the wrong files.
"""

import contextlib
import os
from pathlib import Path

from igvmfw.errors import InputError

HOST = Path("/")
_MAX_LINKS = 40  # as path_resolution(7): the kernel gives up with ELOOP after 40
_PATH_MAX = 4096  # bytes with the final NUL (linux/limits.h)
_SHOWN = 200  # characters of a path, in messages


def resolve(root: Path, path: Path | str) -> Path:
    """The host's path of a file named inside `root`, links followed inside `root`.

    Args:
        root: The other root directory.
        path: The path as seen inside it; relative means relative to `root`.
    Returns:
        A path under `root`; nothing need exist there.  With the host's own root it is `path`.
    Raises:
        InputError: More links than the kernel would follow, or a longer path than it takes.
    """
    if root == HOST:
        return HOST / path
    _check_length(os.fspath(path), path)
    left = list(reversed(_steps(path)))
    base = str(root)
    done = base
    links = 0
    while left:
        step = left.pop()
        if step == "..":
            done = done[: max(len(base), done.rfind("/"))]  # '..' of the root is the root
            continue
        here = f"{done}/{step}"
        _check_length(here, path)  # links can make it longer than it was
        try:
            target = os.readlink(here)
        except OSError:  # no link, or nothing there
            done = here
            continue
        links += 1
        if links > _MAX_LINKS:
            raise InputError("too many links", where=str(path), hint="the links form a loop")
        if target.startswith("/"):
            done = base
        left += reversed(_steps(target))
    return Path(done)


def _check_length(text: str, path: Path | str) -> None:
    if len(os.fsencode(text)) >= _PATH_MAX:
        raise InputError(
            f"the path is longer than the {_PATH_MAX - 1} bytes that Linux takes",
            where=f"{str(path)[:_SHOWN]}…",
            hint="move the file to a shorter path",
        )


def real(root: Path, path: Path | str) -> Path:
    """As `resolve`, with the links followed in the host's own root, too.

    Args:
        root: The other root directory.
        path: The path as seen inside it.
    Raises:
        InputError: More links than the kernel would follow; never in the host's own root.
    """
    return Path(os.path.realpath(HOST / path)) if root == HOST else resolve(root, path)


def _steps(path: Path | str) -> list[str]:
    return [step for step in str(path).split("/") if step not in ("", ".")]


def is_same(root: Path, path: str, other: str) -> bool:
    """Whether a file named inside `root` is one of the host, however either is spelled.

    Args:
        root: The other root directory.
        path: The path as seen inside it.
        other: A path of the host.
    """
    if root == HOST and path == other:
        return True
    with contextlib.suppress(InputError):  # a loop of links leads to no file
        return os.path.realpath(resolve(root, path)) == os.path.realpath(other)
    return False


def inner(root: Path, path: Path | str) -> str:
    """The name inside `root` of a file that the host names `path`, links left as they are.

    Args:
        root: The other root directory.
        path: A path of the host, below `root`.
    Raises:
        InputError: The file is not below `root`.
    """
    absolute = _absolute(os.fspath(path))
    if root == HOST:
        return absolute
    for base in (os.path.abspath(root), os.path.realpath(root)):
        if absolute.startswith(base.rstrip("/") + "/"):
            return absolute[len(base.rstrip("/")) :]
    raise InputError(
        f"is not below the root {root}",
        where=str(path),
        hint="guests of that root could not see it: copy it there, and name it with that path",
    )


def _absolute(path: str) -> str:
    """An absolute path without `..`, of which only the kernel knows what it means behind a link."""
    if ".." not in path.split("/"):
        return os.path.abspath(path)
    head, name = os.path.split(path)
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(head), name)
