"""What commands print: data on stdout, messages on stderr."""

import json
import sys
from typing import Any

from igvmfw.cli import printable


def emit(text: str) -> None:
    """One piece of the result, on stdout."""
    print(printable(text))


def emit_json(document: Any) -> None:
    """The one JSON document of a `--json` run, on stdout."""
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def warn(message: str) -> None:
    """A warning, on stderr: it never mixes with the result."""
    print(f"igvmfw: warning: {printable(message)}", file=sys.stderr)


def note(message: str) -> None:
    """What was done, on stderr."""
    print(printable(message), file=sys.stderr)
