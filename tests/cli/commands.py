"""Commands as they are typed, and what is asked of their answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema

from igvmfw.resources import load_schema
from tests.qemu.test_descriptor import igvm_document

Run = Callable[..., tuple[int, str, str]]


def one_line(err: str, *words: str | Path) -> None:
    """A failure is one line for people, which has these words."""
    assert err.startswith("igvmfw: error: "), err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert str(word) in err


def checked(out: str, schema: str) -> Any:
    """The document of a `--json` run, which its schema allows."""
    document = json.loads(out)
    jsonschema.Draft202012Validator(load_schema(schema)).validate(document)
    return document


def file_in(root: Path) -> Path:
    """The IGVM file of the fixture `root`."""
    return root / "usr/share/igvm/ovmf-sev.igvm"


def put(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps({**igvm_document(), **changes}))
    return path
