import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igvmfw.errors import DescriptorError
from igvmfw.qemu import jsontext
from igvmfw.qemu.descriptor import (
    Descriptor,
    Device,
    FlashMapping,
    FlashMode,
    IgvmMapping,
    MemoryMapping,
    StorageInterface,
)
from tests.parts import need

HOST = Path("/usr/share/qemu/firmware")


def igvm_document() -> dict[str, Any]:
    return {
        "description": "OVMF for SEV-SNP",
        "interface-types": ["uefi"],
        "mapping": {"device": "igvm", "filename": "/usr/share/igvm/ovmf.igvm"},
        "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*", "pc-i440fx-*"]}],
        "features": ["amd-sev-snp"],
        "tags": ["a tag"],
    }


def written(document: Any) -> bytes:
    return json.dumps(document).encode()


def test_every_descriptor_of_the_host_is_kept_whole() -> None:
    paths = sorted(HOST.glob("*.json"))
    need(bool(paths), "descriptors of the distribution's OVMF")
    for path in paths:
        data = path.read_bytes()
        descriptor = Descriptor.parse(data)
        assert descriptor.to_dict() == json.loads(data)
        assert Descriptor.parse(descriptor.write()) == descriptor


def test_igvm_mapping() -> None:
    descriptor = Descriptor.parse(written(igvm_document()))
    assert descriptor.mapping == IgvmMapping(filename="/usr/share/igvm/ovmf.igvm")
    assert descriptor.mapping.device is Device.IGVM
    assert descriptor.targets[0].machines == ("pc-q35-*", "pc-i440fx-*")
    assert descriptor.features == ("amd-sev-snp",)


def test_vtpm_storage() -> None:
    document = igvm_document()
    document["mapping"]["x-vtpm-storage"] = {
        "interface": "virtio-blk-mmio",
        "format": "raw",
        "size-bytes": 8 << 20,
        "template": "/usr/share/igvm/vtpm.img",
    }
    descriptor = Descriptor.from_dict(document)
    assert isinstance(descriptor.mapping, IgvmMapping)
    storage = descriptor.mapping.vtpm_storage
    assert storage is not None
    assert storage.interface is StorageInterface.VIRTIO_BLK_MMIO
    assert storage.size_bytes == 8 << 20
    assert descriptor.to_dict() == document


@pytest.mark.parametrize(
    ("mapping", "mode"),
    [
        ({"nvram-template": {"filename": "/v", "format": "qcow2"}}, FlashMode.SPLIT),
        ({"mode": "split", "nvram-template": {"filename": "/v", "format": "raw"}}, FlashMode.SPLIT),
        ({"mode": "combined"}, FlashMode.COMBINED),
        ({"mode": "stateless"}, FlashMode.STATELESS),
    ],
)
def test_flash_modes(mapping: dict[str, Any], mode: FlashMode) -> None:
    document = igvm_document()
    document["mapping"] = {
        "device": "flash",
        "executable": {"filename": "/code", "format": "raw"},
        **mapping,
    }
    descriptor = Descriptor.from_dict(document)
    assert isinstance(descriptor.mapping, FlashMapping)
    assert descriptor.mapping.mode is mode
    assert descriptor.mapping.filename == "/code"
    assert descriptor.to_dict() == document


def test_memory_with_uefi_variables_of_qemu_11() -> None:
    document = igvm_document()
    document["mapping"] = {"device": "memory", "filename": "/f", "uefi-vars": {"template": "/v"}}
    descriptor = Descriptor.from_dict(document)
    assert isinstance(descriptor.mapping, MemoryMapping)
    assert descriptor.to_dict() == document


def test_unknown_members_survive_at_every_level() -> None:
    document = igvm_document()
    document["x-top"] = {"deep": [1, 2.5, None, True]}
    document["mapping"]["x-map"] = "kept"
    document["targets"][0]["x-target"] = []
    assert Descriptor.from_dict(document).to_dict() == document
    assert json.loads(Descriptor.from_dict(document).write()) == document


def test_description_and_tags_may_be_missing_as_for_libvirt() -> None:
    document = igvm_document()
    del document["description"], document["tags"]
    descriptor = Descriptor.from_dict(document)
    assert descriptor.description == ""
    assert descriptor.tags == ()


@pytest.mark.parametrize(
    ("path", "value", "where", "message"),
    [
        (["targets", 0, "machines"], "pc-q35-*", "targets[0].machines", "expected an array"),
        (["targets", 0, "machines", 1], 7, "targets[0].machines[1]", "expected a string, found a"),
        (["targets", 0], [], "targets[0]", "expected an object, found an array"),
        (["targets", 0, "architecture"], None, "targets[0].architecture", "found null"),
        (["mapping", "device"], "rom", "mapping.device", "not one of flash, kernel, memory, igvm"),
        (["mapping", "filename"], "", "mapping.filename", "file name is empty"),
        (["mapping", "filename"], "/a\0b", "mapping.filename", "NUL"),
        (["mapping"], True, "mapping", "expected an object, found true"),
        (["features"], {}, "features", "expected an array, found an object"),
        (["interface-types", 0], 1.5, "interface-types[0]", "expected a string, found a number"),
        (["mapping", "x-vtpm-storage"], {}, "mapping.x-vtpm-storage", "'interface' is missing"),
    ],
)
def test_errors_name_the_json_path(
    path: list[str | int], value: object, where: str, message: str
) -> None:
    document = igvm_document()
    inner: Any = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(DescriptorError) as caught:
        Descriptor.from_dict(document)
    assert caught.value.where == where
    assert message in caught.value.message


@pytest.mark.parametrize("size", [0, -1, (1 << 40) + 1, 1.5, "8M", True, None])
def test_absurd_storage_sizes_are_refused(size: object) -> None:
    document = igvm_document()
    document["mapping"]["x-vtpm-storage"] = {
        "interface": "pflash",
        "format": "raw",
        "size-bytes": size,
    }
    with pytest.raises(DescriptorError) as caught:
        Descriptor.from_dict(document)
    assert caught.value.where == "mapping.x-vtpm-storage.size-bytes"


def test_split_flash_needs_a_template_as_for_libvirt() -> None:
    document = igvm_document()
    document["mapping"] = {"device": "flash", "executable": {"filename": "/c", "format": "raw"}}
    with pytest.raises(DescriptorError, match="nvram-template") as caught:
        Descriptor.from_dict(document)
    assert caught.value.where == "mapping"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"{", "line 1 column 2: not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b"\xff\xfe{}", "byte 0: not UTF-8"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "more digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "member 'a' occurs twice"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"\\udfff": 1}', "half a surrogate pair"),
        (b"[" * 33 + b"]" * 33, "nested deeper than 32"),
        (b"[" * 500_000, "nested deeper than 32"),
        (b'{"a":' * 150_000, "nested deeper than 32"),
        (b" " * (1 << 20) + b"{}", "larger than 1048576 bytes"),
        (b"[]", "expected an object, found an array"),
        (b"null", "expected an object, found null"),
    ],
)
def test_hostile_text(data: bytes, message: str) -> None:
    with pytest.raises(DescriptorError) as caught:
        Descriptor.parse(data)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_many_duplicate_members_are_refused_at_once() -> None:
    names = ",".join(f'"{n}":0' for n in range(80_000))
    with pytest.raises(DescriptorError, match="member '5' occurs twice"):
        jsontext.parse(f'{{{names},"5":1}}'.encode())


def test_nesting_up_to_the_bound_is_read() -> None:
    document: Any = []
    for _ in range(31):
        document = [document]
    assert jsontext.parse(written(document)) == document


@given(st.binary(max_size=400))
def test_any_bytes_give_a_descriptor_or_an_error(data: bytes) -> None:
    with contextlib.suppress(DescriptorError):
        Descriptor.parse(data)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["device", "filename", "machines", "architecture", "mode", "format"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from(sorted(igvm_document())), _json)
def test_any_member_value_gives_a_descriptor_or_an_error(member: str, value: object) -> None:
    document = {**igvm_document(), member: value}
    try:
        descriptor = Descriptor.from_dict(document)
    except DescriptorError:
        return
    assert Descriptor.parse(descriptor.write()) == descriptor
