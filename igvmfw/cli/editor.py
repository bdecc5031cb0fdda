"""A text in the user's editor, as virsh edit has it."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from igvmfw import files
from igvmfw.cli.output import report
from igvmfw.errors import HostError, IgvmfwError, InputError


class Editing:
    """A text that is being edited."""

    __slots__ = ("_path", "_what")

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._what = what

    def edited(self, *, limit: int) -> bytes:
        """Have the text edited, as it was left the last time; returns what it is then.

        Args:
            limit: Most bytes to accept.
        Raises:
            HostError: The editor cannot be run, or says that it failed.
            InputError: It left no file to read, or too large a one.
        """
        _run_editor(self._path)
        try:
            return files.read_text(self._path, limit=limit)
        except InputError as error:
            raise InputError(
                f"the editor left no text to take: {error.message}",
                where=self._what,
                hint="nothing was changed: edit it again",
            ) from None


@contextlib.contextmanager
def editing(text: bytes, what: str) -> Iterator[Editing]:
    """Put a text where an editor can have it, until the end of the block.

    It may hold passwords: nobody else can look at it, nor at the copies that editors leave beside
    it, and all go with it.

    Args:
        text: What is edited.
        what: Its name, for errors.
    """
    with tempfile.TemporaryDirectory(prefix="igvmfw-", ignore_cleanup_errors=True) as directory:
        path = Path(directory) / "domain.xml"
        files.write_atomic(path, text, mode=0o600)
        yield Editing(path, what)


def asks_again(error: IgvmfwError) -> bool:
    """Whether the user wants to go on editing what is wrong; nobody is asked in a script."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    report(error)
    sys.stderr.write("Edit again? [Y/n] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    # at the end of input there is no answer to come
    return answer != "" and answer.strip().lower() in ("", "y", "yes")


@contextlib.contextmanager
def _interrupts_for_the_editor() -> Iterator[None]:
    """Pass over interrupts, which the terminal sends to both.

    An editor may take one for a command, as emacs does; that must not cost the text.
    """
    # a function and not SIG_IGN, which the editor would inherit
    before = {
        number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGQUIT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_editor(path: Path) -> None:
    # virsh's order; a value may have options
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        with _interrupts_for_the_editor():
            done = subprocess.run([*shlex.split(editor), str(path)], check=False)
    except (OSError, ValueError) as error:
        raise HostError(
            f"cannot run the editor: {getattr(error, 'strerror', None) or error}",
            where=editor,
            hint="set VISUAL or EDITOR",
        ) from None
    if done.returncode:
        raise HostError(
            f"the editor failed with exit status {done.returncode}",
            where=editor,
            hint="nothing was changed",
        )
