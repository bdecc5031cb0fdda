"""Judging a descriptor by the JSON Schema of its profile.

Profile `upstream` is docs/interop/firmware.json of one QEMU release; profile `igvmfw` is the newest
of them plus the feature `vtpm` and, in an igvm mapping, the member `x-vtpm-storage`.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from igvmfw.resources import load_schema

QEMU_VERSIONS = ("10.1", "10.2", "11.0")
MAX_VIOLATIONS = 100  # that are told; a file of 1 MiB can break rules a million times
_SHOWN = 200  # characters of a message: the value it quotes may be as long as the file


class Profile(StrEnum):
    """What a descriptor may hold."""

    UPSTREAM = "upstream"
    IGVMFW = "igvmfw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One rule of the schema that a descriptor breaks.

    Attributes:
        where: JSON path of the value, such as `targets[0].machines`; empty for the whole document.
        message: What is wrong with it.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


def schema_name(profile: Profile, qemu: str = QEMU_VERSIONS[-1]) -> str:
    """The shipped schema of a profile.

    Args:
        profile: The profile.
        qemu: For profile `upstream`, one of QEMU_VERSIONS.
    """
    return "firmware-igvmfw" if profile is Profile.IGVMFW else f"firmware-{qemu}"


@functools.cache
def known_features(profile: Profile, qemu: str = QEMU_VERSIONS[-1]) -> tuple[str, ...]:
    """The features that a profile has a word for (FirmwareFeature)."""
    definitions = load_schema(schema_name(profile, qemu))["$defs"]
    return tuple(definitions["FirmwareFeature"]["enum"])


@functools.cache
def known_interfaces() -> tuple[str, ...]:
    """The firmware-OS interfaces that firmware.json has a word for (FirmwareOSInterface)."""
    definitions = load_schema(schema_name(Profile.IGVMFW))["$defs"]
    return tuple(definitions["FirmwareOSInterface"]["enum"])


def check_schema(
    document: object, profile: Profile = Profile.IGVMFW, qemu: str = QEMU_VERSIONS[-1]
) -> tuple[Violation, ...]:
    """Compare parsed JSON with the schema of a profile.

    Args:
        document: What `igvmfw.qemu.jsontext.parse` gave.
        profile: Which schema.
        qemu: For profile `upstream`, one of QEMU_VERSIONS.
    Returns:
        What is wrong, by its place; empty when the document is valid.  After MAX_VIOLATIONS of
        them a last one says that there is more.
    """
    import jsonschema  # a tenth of a second that only this check pays

    validator = jsonschema.Draft202012Validator(load_schema(schema_name(profile, qemu)))
    errors = list(itertools.islice(validator.iter_errors(document), MAX_VIOLATIONS + 1))
    told = sorted(errors[:MAX_VIOLATIONS], key=lambda error: list(map(_sortable, error.path)))
    found = [Violation(where=_json_path(e.absolute_path), message=_message(e)) for e in told]
    if len(errors) > MAX_VIOLATIONS:
        found.append(Violation(where="", message="there is more wrong, which is not looked at"))
    return tuple(found)


def _sortable(step: str | int) -> tuple[bool, str, int]:
    return (False, "", step) if isinstance(step, int) else (True, step, 0)


def _message(error: object) -> str:
    schema = getattr(error, "schema", None)
    told = schema.get("$comment") if isinstance(schema, dict) else None
    validator = getattr(error, "validator", "")
    # a rule that only firmware.json's text states has its words in $comment
    message = told if told and validator in ("not", "const", "required", "contains") else None
    message = message or str(getattr(error, "message", error))
    return message if len(message) <= _SHOWN else message[: _SHOWN - 3] + "..."


def _json_path(steps: Iterable[str | int]) -> str:
    path = ""
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path
