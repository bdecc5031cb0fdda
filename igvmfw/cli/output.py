"""What commands print: data on stdout, messages on stderr."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from igvmfw.errors import OutputError

_LABEL = re.compile(r"\s*(?:\S+(?: \S+)*\s{2,}|[-*•] )?")
_MIN_TEXT = 12  # columns that folded text keeps beside its indentation
_STYLES = {"good": "32", "bad": "31", "doubtful": "33", "strong": "1"}  # ECMA-48, SGR

Printer = Callable[[str], None]


class _Messages:
    """How messages are shown now: `--quiet` drops notes, a progress bar has them above itself."""

    quiet = False
    above: Printer | None = None


def set_quiet(quiet: bool) -> None:
    """Drop notes and progress from now on; warnings and errors stay."""
    _Messages.quiet = quiet


def is_quiet() -> bool:
    """Whether only warnings and errors are wanted."""
    return _Messages.quiet


@contextlib.contextmanager
def messages_through(printer: Printer) -> Iterator[None]:
    """Let messages be printed by what occupies the terminal's last line."""
    _Messages.above = printer
    try:
        yield
    finally:
        _Messages.above = None


def prepare_streams() -> None:
    """Make the standard streams usable, whatever they were given as.

    A stream that was closed must not become the next file that is opened; writing to it fails.
    Characters that the locale's encoding lacks are escaped.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest number that is free: this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - for the process' lifetime
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Report a standard output that takes no more; one whose reader went away stays as it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write: {error.strerror or error}",
            where="standard output",
            hint="check where it goes, and that the disk has room",
        ) from None


if TYPE_CHECKING:
    from igvmfw.memorymap import MemoryMap

WIDTH_WITHOUT_TERMINAL = 100  # characters, in a pipe or a file


def emit(text: str) -> None:
    """One piece of the result, on stdout."""
    with _writing():
        print(printable(text))


def emit_folded(text: str) -> None:
    """Lines for people: a terminal gets them folded at words, everything else as they are."""
    columns = width()
    if columns is None:
        emit(text)
        return
    for line in printable(text).split("\n"):
        emit(fold(line, columns))


def emit_json(document: Any) -> None:
    """The one JSON document of a `--json` run, on stdout."""
    import json

    with _writing():
        json.dump(document, sys.stdout, indent=2)
        sys.stdout.write("\n")


def emit_bytes(data: bytes) -> None:
    """A result that is a file or a program's input, on stdout as it is."""
    with _writing():
        sys.stdout.flush()
        sys.stdout.buffer.write(data)


def flush() -> None:
    """Get the result out.

    Raises:
        OutputError: Standard output does not take it.
    """
    with _writing():
        sys.stdout.flush()


def abandon() -> None:
    """Give up what standard output does not take, so that the end of the process says no more."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _silence(sys.stdout)


def _silence(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)


def emit_map(memory: "MemoryMap") -> None:
    """A memory map, on stdout: in colours on a terminal that takes them."""
    from rich.console import Console
    from rich.text import Text

    from igvmfw.textmap import map_lines

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    known = console.is_terminal or "COLUMNS" in os.environ
    columns = console.width if known else WIDTH_WITHOUT_TERMINAL
    unicode = "utf" in (sys.stdout.encoding or "").lower()
    # captured: rich itself would end the program where the reader of a pipe goes away
    with console.capture() as captured:
        for line in map_lines(memory, width=columns, ascii_only=not unicode):
            console.print(Text.assemble(*line))
    with _writing():
        sys.stdout.write(captured.get())


def warn(message: str) -> None:
    """A warning, on stderr: it never mixes with the result."""
    say(f"igvmfw: warning: {one_line(message)}")


def note(message: str) -> None:
    """What was done, on stderr; nothing with --quiet."""
    if not _Messages.quiet:
        say(one_line(message))


def say(message: str) -> None:
    """A message, on stderr; where nobody reads that, the command goes on."""
    text = printable(message)
    try:
        if _Messages.above is not None:
            _Messages.above(text)
        else:
            print(text, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def width() -> int | None:
    """The columns of the terminal that stdout is; None where it is none."""
    if not sys.stdout.isatty():
        return None
    import shutil

    return max(1, shutil.get_terminal_size().columns)


def styled(text: str, style: str) -> str:
    """Text in a colour, where stdout is a terminal that wants it (no-color.org).

    Not for `emit`, which escapes what drives a terminal: for `emit_styled`.
    """
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def emit_styled(text: str) -> None:
    """One line that was made with `styled` of text that was made `printable`."""
    with _writing():
        print(text)


def fold(line: str, columns: int, *, indent: int | None = None) -> str:
    """A line in as many as it needs, the later ones below the text after its label.

    Words that are longer than a line, such as paths, stay whole: a terminal wraps them itself, and
    they can be copied.

    Args:
        line: One line.
        columns: The width.
        indent: Of the later lines; None for what the line's own beginning says.
    """
    if len(line) <= columns:
        return line
    if indent is None:
        label = _LABEL.match(line)
        indent = label.end() if label is not None else 0
    if columns - indent < _MIN_TEXT:
        indent = 2 if columns > _MIN_TEXT else 0
    import textwrap

    lines = textwrap.wrap(
        line,
        columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )
    return "\n".join(lines)


def printable(text: str) -> str:
    """Text from a file with everything escaped that could drive a terminal.

    An IGVM file, a descriptor or a domain XML may carry control characters on purpose.
    """
    if all(map(str.isprintable, text.split("\n"))):
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Text of which a part came from elsewhere, such as a file's name, kept from forging a line."""
    return printable(text).replace("\n", "\\n")
