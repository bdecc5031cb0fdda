"""Options that several commands have."""

import argparse
import os
from pathlib import Path

from igvmfw import rooted
from igvmfw.errors import InputError


def root_option(parser: argparse.ArgumentParser) -> None:
    """Declare --root."""
    parser.add_argument(
        "--root",
        type=_root,
        default=rooted.HOST,
        metavar="DIR",
        help="for the guests of another root directory: files are below it, and descriptors name "
        "them as seen from in there",
    )


def _root(text: str) -> Path:
    if not os.path.isdir(text):
        raise InputError("is no directory", where=text, hint="--root needs one")
    return Path(os.path.abspath(text))
