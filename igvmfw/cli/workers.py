"""Many items, shared among the processors."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from igvmfw.errors import HostError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
MANY = 200  # items; fewer are done before the processes have started
_PATIENCE = 1.0  # seconds for the last items of a process that nobody listens to any more
_CHUNK = 16  # items a process takes at a time


def each(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """What `work` makes of every item, in their order.

    Args:
        work: It must neither print nor depend on what was done before: many items are given to
            processes of their own.
        items: What it is called with.
    Raises:
        HostError: A process was ended from outside.
        Exception: What `work` raises.
    """
    processors = len(os.sched_getaffinity(0))
    if len(items) < MANY or processors < 2:
        yield from map(work, items)
        return
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(_worker(work)) for _ in range(processors)]
        try:
            for line, chunk in zip(lines, chunks, strict=False):
                line.send(chunk)
            for index in range(len(chunks)):
                line = lines[index % processors]
                results = line.recv()
                if isinstance(results, Exception):
                    raise results
                if index + processors < len(chunks):
                    line.send(chunks[index + processors])
                yield from results
        except (EOFError, ConnectionError):
            raise HostError(
                "a process that shares the work was ended from outside",
                hint=f"is the memory used up? fewer than {MANY} at a time need no such processes",
            ) from None


@contextlib.contextmanager
def _worker(work: Callable[[Any], Any]) -> Iterator["Connection[Any, Any]"]:
    """A process that does the work, and what it is told and tells through.

    Each has a connection of its own, which ends with the process that shares out the work, however
    that one ends: none is left behind.
    """
    import multiprocessing
    from multiprocessing import resource_tracker

    # not by a fork, which would copy locks that the thread that shows progress may hold
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    # an interrupt is for the process that shares out the work: it ends the others.  The tracker,
    # which multiprocessing would start on its own, lets interrupts through as it starts.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        yield ours
    finally:
        ours.close()
        if process.pid is not None:
            process.join(_PATIENCE)
            process.kill()  # it has nothing to tidy up, and no handler may hold it
            process.join()


def _serve(line: "Connection[Any, Any]", work: Callable[[Any], Any]) -> None:
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            chunk = line.recv()
            try:
                results: object = [work(item) for item in chunk]
            except Exception as error:
                results = error
            line.send(results)
