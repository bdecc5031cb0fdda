"""Progress of long work, on stderr: a bar on a terminal, now and then a line in a log.

Work that is done in a moment shows nothing, and pays nothing: rich is loaded when a bar appears.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from igvmfw.cli import output

_Item = TypeVar("_Item")
_DELAY = 0.5  # seconds until a bar appears
_FIRST_LINE = 3.0  # seconds until a log gets a line
_NEXT_LINE = 10.0  # seconds between those
_NARROW = 50  # columns; below there is room for a count alone
_TERMINATED = 128 + signal.SIGTERM


class Progress:
    """How far some work is; commands tell, a thread shows."""

    def __init__(self, label: str, unit: str) -> None:
        self._label = label
        self._unit = unit
        self._done = 0
        self._total: int | None = None
        self._over = threading.Event()
        self._bar: Any = None  # rich's, while it is drawn

    def __call__(self, done: int, total: int) -> None:
        """Say how much is done, of how much."""
        self._done, self._total = done, total
        self._update()

    def over(self, items: Iterable[_Item], total: int) -> Iterator[_Item]:
        """The items, counted as they come."""
        self(0, total)
        for done, item in enumerate(items, 1):
            yield item
            self(done, total)

    def say(self, what: str) -> None:
        """Say what is being done, where it cannot be counted."""
        self._unit = what
        self._update()

    def _text(self) -> str:
        if self._total is None:
            text = f"{self._label} {self._unit}"
        else:
            text = f"{self._label}: {self._done} of {self._total} {self._unit}"
        return output.one_line(text)  # rich takes away some control characters, and not ESC

    def _update(self) -> None:
        bar = self._bar
        if bar is not None:
            bar.update(
                bar.tasks[0].id,
                description=self._text(),
                completed=self._done,
                total=self._total,
            )

    def show_lines(self) -> None:
        """Print how far it is, until it is over."""
        wait = _FIRST_LINE
        while not self._over.wait(wait):
            output.say(f"igvmfw: {self._text()}")
            wait = _NEXT_LINE

    def show_bar(self) -> None:
        """Draw a bar on the terminal's last line, until it is over."""
        if self._over.wait(_DELAY):
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(stderr=True)
        # an interrupt is echoed as ^C: it must not wrap, or what is erased is another line
        console.width = max(1, console.width - len("^C") - 1)
        printer = lambda text: console.print(Text(text), soft_wrap=True)  # noqa: E731
        with contextlib.suppress(OSError), self._drawn(console), output.messages_through(printer):
            self._update()
            self._over.wait()

    @contextlib.contextmanager
    def _drawn(self, console: Any) -> Iterator[None]:
        from rich import progress
        from rich.table import Column

        columns: list[progress.ProgressColumn] = [
            progress.TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            )
        ]
        if console.width >= _NARROW:
            columns += [progress.BarColumn(), progress.TimeRemainingColumn()]
        bar = progress.Progress(
            *columns,
            console=console,
            transient=True,  # nothing of it is left
            redirect_stdout=False,  # the result goes where it goes
            redirect_stderr=False,
        )
        bar.add_task(self._text(), total=self._total)
        with bar:
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def finish(self) -> None:
        """Have whoever shows it end."""
        self._over.set()


@contextlib.contextmanager
def progress(label: str, unit: str = "", *, prints: bool = False) -> Iterator[Progress]:
    """Show how far the work in the `with` block is, once it takes longer than a moment.

    Args:
        label: What is done, such as `reading`.
        unit: What is counted, such as `files`.
        prints: Whether results are printed meanwhile: on the terminal that shows them, they are
            progress enough.
    """
    shown = Progress(label, unit)
    on_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if output.is_quiet() or (prints and sys.stdout.isatty()):
        yield shown
        return
    show = shown.show_bar if on_terminal else shown.show_lines
    thread = threading.Thread(target=show, name="progress", daemon=True)
    with _termination():
        thread.start()
        try:
            yield shown
        finally:
            shown.finish()
            thread.join()


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Leave by the usual way when the process is asked to end: a bar hides the cursor."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
