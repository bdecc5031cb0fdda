"""Derives the JSON Schemas of firmware descriptors from QEMU's QAPI text.

QAPI's grammar: docs/devel/qapi-code-gen.rst in QEMU's source.  Enums and members come from the
text; three rules that only its prose states are added in `add_prose_rules`, each with its place.
The text of 10.2 describes 10.1 as well: it has nothing that is newer.

Run as a script it rewrites schemas/, from docs/interop/firmware.json of these two releases:
    python -m tests.schemas.derive_firmware FIRMWARE_JSON_10_2 FIRMWARE_JSON_11_0
"""

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).parents[2] / "schemas"
Definitions = dict[str, dict[str, Any]]

# the extension igvmfw makes, in the same grammar
IGVMFW: Definitions = {
    "VtpmStorageInterface": {"enum": "VtpmStorageInterface", "data": ["virtio-blk-mmio", "pflash"]},
    "VtpmStorageFormat": {"enum": "VtpmStorageFormat", "data": ["raw"]},
    "VtpmStorage": {
        "struct": "VtpmStorage",
        "data": {
            "interface": "VtpmStorageInterface",
            "format": "VtpmStorageFormat",
            "size-bytes": "size",
            "*template": "str",
        },
    },
    "FirmwareMappingIgvm": {
        "struct": "FirmwareMappingIgvm",
        "data": {"filename": "str", "*x-vtpm-storage": "VtpmStorage"},
    },
}

BUILT_IN: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "size": {"type": "integer", "minimum": 1, "maximum": 1 << 40},
}


def read_qapi(text: str) -> Definitions:
    """The enums, structs and unions of a QAPI text, by name."""
    code = "\n".join(re.sub(r"#.*", "", line) for line in text.splitlines())
    definitions: Definitions = {}
    depth = start = 0
    for position, character in enumerate(code):
        if character == "{":
            start = position if depth == 0 else start
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                expression = ast.literal_eval(code[start : position + 1])
                kind = next(iter(expression))
                if kind in ("enum", "struct", "union"):
                    definitions[expression[kind]] = expression
    return definitions


def newest_since(text: str) -> tuple[int, ...]:
    """The newest release that a QAPI text names in its `Since:` marks."""
    marks = re.findall(r"[Ss]ince:? (\d+)\.(\d+)", text)
    return max(tuple(int(part) for part in mark) for mark in marks)


def _reference(name: str | list[str]) -> dict[str, Any]:
    if isinstance(name, list):
        return {"type": "array", "items": _reference(name[0])}
    return BUILT_IN.get(name) or {"$ref": f"#/$defs/{name}"}


def _object(data: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name.lstrip("*"): _reference(kind) for name, kind in data.items()},
        "required": [name for name in data if not name.startswith("*")],
        "additionalProperties": False,
    }


def _union(definition: dict[str, Any], schemas: Definitions) -> dict[str, Any]:
    tag = definition["discriminator"]
    for value, branch in definition["data"].items():
        members = schemas[branch]["properties"]
        schemas[branch]["properties"] = {tag: {"const": value}, **members}
    return {
        "type": "object",
        "properties": {name: _reference(kind) for name, kind in definition["base"].items()},
        "required": list(definition["base"]),
        "allOf": [
            {
                "if": {"properties": {tag: {"const": value}}, "required": [tag]},
                "then": _reference(branch),
            }
            for value, branch in definition["data"].items()
        ],
    }


def add_prose_rules(schemas: Definitions) -> None:
    """What firmware.json says in words."""
    firmware = schemas["Firmware"]["properties"]
    # Firmware, @interface-types
    firmware["interface-types"]["minItems"] = 1
    # FirmwareFeature, @verbose-dynamic and @verbose-static
    firmware["features"]["not"] = {
        "allOf": [
            {"contains": {"const": "verbose-dynamic"}},
            {"contains": {"const": "verbose-static"}},
        ]
    }
    firmware["features"]["$comment"] = (
        "the features verbose-dynamic and verbose-static exclude each other"
    )
    # FirmwareMappingMemory, @uefi-vars (since 11.0)
    if "FirmwareMemoryUefiVars" in schemas:
        needed = {"features": "host-uefi-vars", "interface-types": "uefi"}
        schemas["Firmware"].update(
            {
                "if": {"properties": {"mapping": {"required": ["uefi-vars"]}}},
                "then": {
                    "properties": {
                        name: {
                            "contains": {"const": word},
                            "$comment": f"'uefi-vars' needs {word!r} in {name}",
                        }
                        for name, word in needed.items()
                    }
                },
            }
        )
    # FirmwareMappingFlash, @mode and @nvram-template
    schemas["FirmwareMappingFlash"].update(
        {
            "if": {
                "properties": {"mode": {"enum": ["combined", "stateless"]}},
                "required": ["mode"],
            },
            "then": {
                "not": {"required": ["nvram-template"]},
                "$comment": "'nvram-template' is for mode 'split' only",
            },
            "else": {
                "required": ["nvram-template"],
                "$comment": "mode 'split', the default, needs 'nvram-template'",
            },
        }
    )


def derive(definitions: Definitions, name: str, title: str) -> dict[str, Any]:
    """The JSON Schema of `Firmware`."""
    schemas: Definitions = {}
    for key, definition in definitions.items():
        if "enum" in definition:
            schemas[key] = {"type": "string", "enum": definition["data"]}
        elif "struct" in definition:
            schemas[key] = _object(definition["data"])
    for key, definition in definitions.items():
        if "union" in definition:
            schemas[key] = _union(definition, schemas)
    add_prose_rules(schemas)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:igvmfw:schema:{name}",
        "title": title,
        "$ref": "#/$defs/Firmware",
        "$defs": schemas,
    }


def derive_all(text_10_2: str, text_11_0: str) -> dict[str, dict[str, Any]]:
    """Every firmware schema igvmfw ships, by name, from the QAPI texts of two releases."""
    base, newer = read_qapi(text_10_2), read_qapi(text_11_0)
    feature = newer["FirmwareFeature"]
    own = {**newer, **IGVMFW, "FirmwareFeature": {**feature, "data": [*feature["data"], "vtpm"]}}
    return {
        name: derive(definitions, name, title)
        for name, definitions, title in (
            ("firmware-10.1", base, "Firmware descriptor, QEMU 10.1"),
            ("firmware-10.2", base, "Firmware descriptor, QEMU 10.2"),
            ("firmware-11.0", newer, "Firmware descriptor, QEMU 11.0"),
            ("firmware-igvmfw", own, "Firmware descriptor, QEMU 11.0 with igvmfw's extension"),
        )
    }


def dump(schema: dict[str, Any]) -> str:
    """The text of a schema file."""
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    texts = [Path(name).read_text() for name in sys.argv[1:]]
    for schema_name, derived in derive_all(*texts).items():
        (SCHEMAS / f"{schema_name}.json").write_text(dump(derived))
