"""Parts that a test needs and not every machine has."""

import os

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
