"""What commands print: data on stdout, messages on stderr."""

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from igvmfw.cli import printable

if TYPE_CHECKING:
    from igvmfw.memorymap import MemoryMap

WIDTH_WITHOUT_TERMINAL = 100  # characters, in a pipe or a file


def emit(text: str) -> None:
    """One piece of the result, on stdout."""
    print(printable(text))


def emit_json(document: Any) -> None:
    """The one JSON document of a `--json` run, on stdout."""
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def emit_map(memory: "MemoryMap") -> None:
    """A memory map, on stdout: in colours on a terminal that takes them."""
    from rich.console import Console
    from rich.text import Text

    from igvmfw.textmap import map_lines

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    known = console.is_terminal or "COLUMNS" in os.environ
    width = console.width if known else WIDTH_WITHOUT_TERMINAL
    unicode = "utf" in (sys.stdout.encoding or "").lower()
    # captured: rich itself would end the program where the reader of a pipe goes away
    with console.capture() as captured:
        for line in map_lines(memory, width=width, ascii_only=not unicode):
            console.print(Text.assemble(*line))
    sys.stdout.write(captured.get())


def warn(message: str) -> None:
    """A warning, on stderr: it never mixes with the result."""
    print(f"igvmfw: warning: {printable(message)}", file=sys.stderr)


def note(message: str) -> None:
    """What was done, on stderr."""
    print(printable(message), file=sys.stderr)
