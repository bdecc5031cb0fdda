"""The syntax of QEMU's options: `key=value,key=value`, or JSON.

Source: docs/system/invocation.rst of QEMU ("Device and object properties", "Block device options").
"""

import json
import unicodedata

from igvmfw.errors import RefusedError

_SHOWN = 200  # characters of a path, in messages
_PATH_MAX = 4096  # bytes with the final NUL (linux/limits.h)


def file_value(path: str) -> str:
    """A path as the value of a key; QEMU gets exactly this path.

    Args:
        path: An absolute path.
    Raises:
        RefusedError: The path is not absolute, too long, or has characters no path should have.
    """
    shown = path[:_SHOWN]
    if not path.startswith("/"):
        raise RefusedError(f"the path {shown!r} is not absolute", hint="name the file from /")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in path):
        raise RefusedError(
            f"the path {shown!r} has control characters, or is no text",
            hint="rename the file",
        )
    if len(path.encode()) >= _PATH_MAX:
        raise RefusedError("the path is longer than the system allows", where=f"{shown}…")
    # a comma is the only character with a meaning in a value, and is doubled to mean itself
    return path.replace(",", ",,")


def parse(text: str) -> list[tuple[str, str]]:
    """The keys and values of an option's value; the first may come without a key."""
    if text.startswith("{"):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            return []
        members = parsed.items() if isinstance(parsed, dict) else ()
        return [(str(key), str(value)) for key, value in members]
    # a doubled comma is put aside while the single ones separate; NUL occurs in no XML
    parts = text.replace(",,", "\0").split(",")
    pairs = (part.replace("\0", ",").partition("=") for part in parts)
    return [(key, value) if equals else ("", key) for key, equals, value in pairs]
