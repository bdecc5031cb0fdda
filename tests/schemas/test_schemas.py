import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from igvmfw.qemu import jsontext
from igvmfw.qemu.descriptor import Descriptor, StorageInterface
from igvmfw.qemu.schema import (
    MAX_VIOLATIONS,
    QEMU_VERSIONS,
    Profile,
    check_schema,
    known_features,
    known_interfaces,
    schema_name,
)
from igvmfw.resources import load_schema, schema_names
from tests.parts import need
from tests.qemu.test_descriptor import igvm_document
from tests.schemas import derive_firmware
from tests.sources import (
    distribution_descriptors,
    libvirt_source,
    qemu_descriptors,
    qemu_interop,
)
from tests.testbed.cache import CACHE

HOST = Path("/usr/share/qemu/firmware")


def qapi_text(release: str) -> str:
    path = qemu_interop(release)
    need(path is not None, f"firmware.json of the QEMU {release} that the test bed builds")
    assert path is not None
    return path.read_text()


@pytest.mark.parametrize("name", schema_names())
def test_every_schema_is_one(name: str) -> None:
    schema = load_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"].removesuffix(":1") == f"urn:igvmfw:schema:{name}"


def test_the_firmware_schemas_are_what_qemu_says() -> None:
    derived = derive_firmware.derive_all(qapi_text("10.2"), qapi_text("11.0"))
    assert {name for name in schema_names() if name.startswith("firmware-")} == set(derived)
    for name, schema in derived.items():
        shipped = (derive_firmware.SCHEMAS / f"{name}.json").read_text()
        assert shipped == derive_firmware.dump(schema), f"derive {name} anew"


def test_nothing_in_the_text_is_newer_than_10_1() -> None:
    """So the text of 10.2 describes 10.1 as well."""
    assert derive_firmware.newest_since(qapi_text("10.2")) == (10, 1)


def test_versions() -> None:
    assert [f"firmware-{v}" for v in QEMU_VERSIONS] == [
        schema_name(Profile.UPSTREAM, v) for v in QEMU_VERSIONS
    ]
    document = igvm_document()
    document["mapping"] = {"device": "memory", "filename": "/f", "uefi-vars": {"template": "/v"}}
    assert check_schema(document, Profile.UPSTREAM, "10.2")
    needed = check_schema(document, Profile.UPSTREAM, "11.0")
    assert [str(v) for v in needed] == ["features: 'uefi-vars' needs 'host-uefi-vars' in features"]
    document["features"].append("host-uefi-vars")
    assert not check_schema(document, Profile.UPSTREAM, "11.0")
    document = igvm_document()
    document["interface-types"] = ["svsm", "uefi"]
    assert check_schema(document, Profile.UPSTREAM, "10.2")
    assert not check_schema(document, Profile.UPSTREAM, "11.0")


def test_the_profile_igvmfw_adds_vtpm_alone() -> None:
    assert set(known_features(Profile.IGVMFW)) - set(known_features(Profile.UPSTREAM)) == {"vtpm"}
    assert known_interfaces() == ("bios", "openfirmware", "svsm", "uboot", "uefi")
    document = igvm_document()
    document["features"].append("vtpm")
    document["mapping"]["x-vtpm-storage"] = {
        "interface": "virtio-blk-mmio",
        "format": "raw",
        "size-bytes": 8 << 20,
    }
    assert not check_schema(document, Profile.IGVMFW)
    wrong = check_schema(document, Profile.UPSTREAM)
    assert [violation.where for violation in wrong] == ["features[1]", "mapping"]
    assert "x-vtpm-storage" in wrong[1].message


def test_schema_and_model_know_the_same_storage() -> None:
    definitions = load_schema("firmware-igvmfw")["$defs"]
    assert definitions["VtpmStorageInterface"]["enum"] == list(StorageInterface)


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({"interface-types": []}, "interface-types", "non-empty"),
        ({"features": ["verbose-static", "verbose-dynamic"]}, "features", "exclude each other"),
        ({"features": ["amd-sev-xx"]}, "features[0]", "'amd-sev-xx' is not one of"),
        ({"targets": [{"architecture": "mips", "machines": []}]}, "targets[0].architecture", "mip"),
        ({"unknown": 1}, "", "'unknown' was unexpected"),
        ({"mapping": {"device": "igvm"}}, "mapping", "'filename' is a required property"),
        ({"mapping": {"device": "igvm", "filename": "/f", "mode": 1}}, "mapping", "'mode' was une"),
        (
            {"mapping": {"device": "flash", "executable": {"filename": "/f", "format": "raw"}}},
            "mapping",
            "mode 'split', the default, needs 'nvram-template'",
        ),
        (
            {
                "mapping": {
                    "device": "flash",
                    "mode": "stateless",
                    "executable": {"filename": "/f", "format": "raw"},
                    "nvram-template": {"filename": "/f", "format": "raw"},
                }
            },
            "mapping",
            "'nvram-template' is for mode 'split' only",
        ),
    ],
)
def test_violations_name_place_and_rule(change: dict[str, Any], where: str, message: str) -> None:
    violations = check_schema({**igvm_document(), **change})
    assert [violation.where for violation in violations] == [where]
    assert message in violations[0].message
    assert len(str(violations[0])) < 300


def test_a_huge_value_is_not_quoted_whole() -> None:
    violations = check_schema({**igvm_document(), "features": ["x" * 500_000]})
    assert len(str(violations[0])) < 300


def descriptors_of_the_field() -> list[Path]:
    source = libvirt_source()
    need(source is not None, "libvirt's source package")
    assert source is not None
    packages = distribution_descriptors()
    need(packages is not None, "the distribution's firmware packages")
    assert packages is not None
    # with those of newer releases, where the test bed has roots with firmware
    newer = CACHE.glob("*/usr/share/qemu/firmware/*.json")
    qemus = []
    for release in ("10.2", "11.0"):
        own = qemu_descriptors(release)
        need(own is not None, f"the descriptors of QEMU {release}")
        assert own is not None
        qemus += sorted(own.glob("*.json"))
    assert len(qemus) == 2 * 8
    ours = sorted([*HOST.glob("*.json"), *packages.rglob("*.json"), *newer])
    theirs = (source / "tests/qemufirmwaredata").glob("[ehu]*/**/*.json")
    return [*ours, *qemus, *sorted(path for path in theirs if path.stat().st_size)]


def test_every_descriptor_of_the_field_validates() -> None:
    judged = 0
    architectures: set[str] = set()
    for path in descriptors_of_the_field():
        text = path.read_bytes().replace(b"@DATADIR@", b"/usr/share/qemu")  # as its build does
        document = jsontext.parse(text)
        violations = check_schema(document, Profile.UPSTREAM)
        if "invalid" in path.name:
            assert violations
            continue
        expected: dict[str, Any] = json.loads(text)
        # one of libvirt's test files leaves out what libvirt does not read; QEMU requires it
        missing = [name for name in ("description", "tags") if name not in expected]
        assert [v.message for v in violations] == [f"'{m}' is a required property" for m in missing]
        descriptor = Descriptor.from_dict(document)
        assert {**descriptor.to_dict(), **expected} == descriptor.to_dict()
        judged += 1
        architectures |= {target.architecture for target in descriptor.targets}
    assert judged >= 31
    assert architectures >= {"x86_64", "i386", "aarch64", "arm", "riscv64", "loongarch64"}


def test_a_file_full_of_mistakes_is_told_of_some() -> None:
    """A file of 1 MiB can break rules a million times: each would be searched, kept and told."""
    wrong = {**igvm_document(), "features": [1] * 100_000}
    violations = check_schema(wrong)
    assert len(violations) == MAX_VIOLATIONS + 1
    numbers = [int(v.where.removeprefix("features[").rstrip("]")) for v in violations[:-1]]
    assert numbers == sorted(numbers)
    assert "more wrong" in str(violations[-1])
