"""Killing a process at each step of what it does, one after the other."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import FrameType

import igvmfw.files
import igvmfw.install

# the modules whose every line is a step: those that change files
_WATCHED = frozenset(str(module.__file__) for module in (igvmfw.files, igvmfw.install, tempfile))


def kills(work: Callable[[], object], *, prepare: Callable[[], object]) -> Iterator[int]:
    """Kill `work` before its first line that may change a file, before its second, and so on.

    Args:
        work: What is done, in a process of its own.
        prepare: What is done before each time.
    Yields:
        After each kill, the number of the line; at last once more, after work that was not killed.
    """
    step = 0
    while True:
        step += 1
        prepare()
        killed = _killed(work, step)
        yield step
        if not killed:
            return


def _killed(work: Callable[[], object], step: int) -> bool:
    """Whether a process came as far as that step, and was killed there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.settrace(_Tracer(step))
            work()
            status = 0
        finally:
            os._exit(status)
    _, result = os.waitpid(child, 0)
    assert result in (0, signal.SIGKILL), result
    return result == signal.SIGKILL


class _Tracer:
    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self, frame: FrameType, event: str, _: object) -> "_Tracer | None":
        if frame.f_code.co_filename not in _WATCHED:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self
