"""Parts that a test needs and not every machine has."""

import importlib
import importlib.util
import os
from types import ModuleType

import pytest

SKIPPED = "needs "  # how the reasons of such skips begin: conftest counts them by it


def need(condition: bool, what: str) -> None:
    """Go on only where a part is there.

    A missing part skips the test and says how to get it; in CI, where every part has to be there,
    it fails the test.

    Args:
        condition: Whether the part is there.
        what: The part, as the reason names it.
    """
    if condition:
        return
    reason = f"{SKIPPED}{what}; `make testbed` brings what can be installed or built"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def measured() -> dict[str, str]:
    """What a process needs in its environment so that its coverage counts."""
    return {name: value for name, value in os.environ.items() if name.startswith("COV")}


def need_libvirt() -> ModuleType:
    """libvirt's Python module, which the extra `libvirt` or python3-libvirt brings."""
    need(importlib.util.find_spec("libvirt") is not None, "libvirt's Python module")
    return importlib.import_module("libvirt")
