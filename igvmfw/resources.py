"""The data files igvmfw ships: JSON Schemas and descriptor templates.

They are read through importlib.resources, so that an installed wheel, a zip and a checkout all
serve them the same way.
"""

import functools
import importlib.resources
import json
from typing import Any

from igvmfw.errors import HostError


def _read(package: str, name: str) -> bytes:
    try:
        return importlib.resources.files(package).joinpath(name).read_bytes()
    except (ModuleNotFoundError, OSError):
        raise HostError(
            "a file of igvmfw's own is missing",
            where=f"{package}/{name}",
            hint="the installation is incomplete: install igvmfw again",
        ) from None


def schema_names() -> tuple[str, ...]:
    """The names of the shipped JSON Schemas, without `.json`."""
    return _names("igvmfw.schemas")


def load_schema(name: str) -> dict[str, Any]:
    """A shipped JSON Schema (draft 2020-12).

    Args:
        name: Such as `firmware-10.2` or `list`.
    Raises:
        HostError: The file is not there: the installation is incomplete.
    """
    schema: dict[str, Any] = json.loads(_read("igvmfw.schemas", f"{name}.json"))
    return schema


def template_names() -> tuple[str, ...]:
    """The names of the shipped descriptor templates, without `.json`."""
    return _names("igvmfw.descriptors")


def load_template(name: str) -> bytes:
    """A shipped descriptor template; `@DATADIR@` in it stands for the data directory.

    Raises:
        HostError: The file is not there: the installation is incomplete.
    """
    return _read("igvmfw.descriptors", f"{name}.json")


@functools.cache
def _names(package: str) -> tuple[str, ...]:
    entries = importlib.resources.files(package).iterdir()
    names = (entry.name for entry in entries)
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))
