"""Commands on a real terminal (a pty), and what a person sees there (by pyte, an emulator)."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyte

SECONDS = 120  # until a test gives up


class Terminal:
    """A terminal with one command on it."""

    def __init__(self, columns: int, lines: int) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process: subprocess.Popen[bytes]

    def start(
        self,
        *words: str | Path,
        stdin: int | None = None,
        stdout: IO[bytes] | int | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "igvmfw", *map(str, words)],
            stdin=self.slave if stdin is None else stdin,
            stdout=self.slave if stdout is None else stdout,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(2, termios.TIOCSCTTY, 0),
            env={**clean, "TERM": "xterm-256color", **(environment or {})},
        )
        os.close(self.slave)

    def read(self, seconds: float) -> bool:
        """Take what comes; False at the end."""
        if not select.select([self.master], [], [], seconds)[0]:
            return True
        try:
            part = os.read(self.master, 1 << 16)
        except OSError:  # Linux' way to say that nobody has the other side open
            return False
        self.raw += part
        self._stream.feed(part)
        return bool(part)

    @property
    def text(self) -> str:
        """What stands on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def wait_for(self, seen: Callable[[str], bool]) -> str:
        """The screen as soon as something can be seen on it."""
        deadline = time.monotonic() + SECONDS
        while not seen(self.text):
            assert self.read(1), f"it ended with:\n{self.text}"
            assert time.monotonic() < deadline, self.text
        return self.text

    def wait(self) -> int:
        """The exit status, with all that was printed seen."""
        deadline = time.monotonic() + SECONDS
        while self.read(1):
            assert time.monotonic() < deadline, self.text
        return self.process.wait(timeout=SECONDS)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)


@contextmanager
def terminal(columns: int = 80, lines: int = 60) -> Iterator[Terminal]:
    """A terminal; its command ends with it."""
    opened = Terminal(columns, lines)
    try:
        yield opened
    finally:
        if opened.process.poll() is None:
            opened.process.kill()
        opened.process.wait()
        os.close(opened.master)
