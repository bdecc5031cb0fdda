"""What OVMF images say about themselves, against what their distribution says about them."""

import json
import lzma
import struct
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.payload import firmware_image
from igvmfw.igvm.uefi import (
    MAX_UNPACKED,
    MM_COMMUNICATION,
    SECURE_BOOT_CONFIG,
    UefiFacts,
    find_facts,
)
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from tests.parts import need

DESCRIPTORS = Path("/usr/share/qemu/firmware")
GLOBAL = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")  # EFI_GLOBAL_VARIABLE
STORE = uuid.UUID("aaf32c78-947b-439a-a180-2e144ec37792")  # gEfiAuthenticatedVariableGuid
NVDATA = uuid.UUID("fff12b8d-7696-4c8b-a985-2747075b4f50")  # gEfiSystemNvDataFvGuid
LZMA_GUID = uuid.UUID("ee4e5898-3914-4259-9d6e-dc7bd79403cf").bytes_le
FFS2 = uuid.UUID("8c8ce578-8a3d-4f1c-9935-896185c32dd3").bytes_le


def test_the_facts_are_what_the_distributions_descriptors_say() -> None:
    judged = 0
    for path in sorted(DESCRIPTORS.glob("*x86_64*.json")):
        document = json.loads(path.read_bytes())
        mapping = document["mapping"]
        if mapping["device"] == "flash":
            files = [mapping["nvram-template"]["filename"], mapping["executable"]["filename"]]
        else:
            files = [mapping["filename"]]
        facts = find_facts(b"".join(Path(file).read_bytes() for file in files))
        assert facts is not None
        features = document["features"]
        assert facts.enrolled_keys is ("enrolled-keys" in features)
        assert facts.smm is ("requires-smm" in features)
        assert facts.variable_service is ("host-uefi-vars" in features)
        if "secure-boot" in features:
            assert facts.secure_boot
        judged += 1
    need(judged > 0, "descriptors of the distribution's OVMF")


def test_the_image_comes_back_from_an_igvm_file(ovmf: Path) -> None:
    firmware = ovmf.read_bytes()
    image = IgvmFile.parse(wrap(firmware, [Platform.NATIVE, Platform.SEV]))
    for platform in image.supported:
        assert firmware_image(image, platform) == firmware
    assert find_facts(firmware) is find_facts(bytes(firmware))  # unpacked once


def section(kind: int, body: bytes) -> bytes:
    data = (len(body) + 4).to_bytes(3, "little") + bytes([kind]) + body
    return data + bytes(-len(data) % 4)


def file(name: bytes, kind: int, body: bytes) -> bytes:
    header = name + bytes(2) + bytes([kind, 0]) + (len(body) + 24).to_bytes(3, "little") + b"\xf8"
    return header + body + bytes(-len(body) % 8)


def volume(*files: bytes) -> bytes:
    body = b"".join(files)
    length = 72 + len(body)
    header = bytes(16) + FFS2 + length.to_bytes(8, "little") + b"_FVH" + bytes(4)
    header += (72).to_bytes(2, "little") + bytes(5) + b"\x02"
    return header.ljust(72, b"\0") + body


def packed(data: bytes) -> bytes:
    body = lzma.compress(data, lzma.FORMAT_ALONE)
    return section(0x02, LZMA_GUID + (24).to_bytes(2, "little") + bytes(2) + body)


def image(*drivers: bytes) -> bytes:
    inner = volume(*(file(driver, 0x07, b"code" * 9) for driver in drivers))
    return volume(file(bytes(16), 0x0B, packed(section(0x17, inner))))


def test_a_driver_that_no_distribution_builds_yet() -> None:
    other = bytes(range(16))
    assert find_facts(image(other, MM_COMMUNICATION)) == UefiFacts(
        secure_boot=False, smm=False, variable_service=True, enrolled_keys=False
    )
    assert find_facts(image(SECURE_BOOT_CONFIG, other)) == UefiFacts(
        secure_boot=True, smm=False, variable_service=False, enrolled_keys=False
    )


@pytest.mark.parametrize("data", [b"", b"_FVH" * 1000, bytes(1 << 20), volume()])
def test_what_has_no_drivers(data: bytes) -> None:
    assert find_facts(data) is None


def test_bombs_are_cut_off() -> None:
    bomb = packed(bytes(256 << 20))
    found = find_facts(volume(file(bytes(16), 0x0B, bomb * 3)))
    assert found is not None
    assert MAX_UNPACKED <= 64 << 20
    nested = image(MM_COMMUNICATION)
    for _ in range(6):
        nested = volume(file(bytes(16), 0x0B, packed(section(0x17, nested))))
    found = find_facts(nested)
    assert found is not None
    assert not found.variable_service


def overlapping(count: int, size: int) -> bytes:
    """Damaged volumes that begin one behind the other, and all hold the same file to the end."""
    data = bytearray(size)
    shared, last = count * 128, size - 24
    for start in range(0, shared, 128):
        data[start + 16 : start + 56] = struct.pack(
            "<16sQ4sIHHHBB", bytes(16), size - start, b"_FVH", 0, 56, 0, 0, 0, 2
        )
        length = (shared - start - 56).to_bytes(3, "little")
        data[start + 56 : start + 80] = struct.pack("<16sHBB3sB", bytes(16), 0, 1, 0, length, 0)
    length = (last - shared).to_bytes(3, "little")
    data[shared : shared + 24] = struct.pack("<16sHBB3sB", bytes(16), 0, 0x0B, 0, length, 0)
    data[shared + 24 : shared + 28] = (last - shared - 24).to_bytes(3, "little") + b"\x17"
    data[last + 19] = 1  # a large file, whose size would lie behind the end
    return bytes(data)


def test_what_lies_within_many_volumes_is_not_searched_once_for_each(tmp_path: Path) -> None:
    """The kernel ends a search that takes long: 8,000 times 15 MiB."""
    path = tmp_path / "overlapping"
    path.write_bytes(overlapping(8000, 15 << 20))
    program = (
        "import resource, sys; from igvmfw.igvm.uefi import find_facts\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "assert find_facts(open(sys.argv[1], 'rb').read()) is None"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)


def variables(deleted: int, key: bytes = b"key.") -> bytes:
    """A variable store whose platform key comes after so many variables that are deleted."""
    name = "PK\0".encode("utf-16-le")
    gone = struct.pack("<HB57x", 0x55AA, 0x3C)
    kept = struct.pack("<HB33xII16s", 0x55AA, 0x3F, len(name), len(key), GLOBAL.bytes_le)
    content = gone * deleted + kept + name + key
    store = struct.pack("<16sIBB6x", STORE.bytes_le, 28 + len(content), 0x5A, 0xFE) + content
    volume = struct.pack("<16x16sQ4s4xH22x", NVDATA.bytes_le, 72 + len(store), b"_FVH", 72)
    return volume + store


@pytest.mark.parametrize(
    ("stores", "enrolled"),
    [
        ([variables(60_000)], True),
        ([variables(70_000)], False),
        ([variables(40_000, key=b""), variables(20_000)], True),
        ([variables(40_000, key=b""), variables(40_000)], False),
    ],
)
def test_the_variables_of_all_stores_are_counted(stores: list[bytes], enrolled: bool) -> None:
    """No firmware has a thousand; a file of 600 kB can hold 64 MiB of them for each platform."""
    facts = find_facts(image(SECURE_BOOT_CONFIG) + b"".join(stores))
    assert facts is not None
    assert facts.enrolled_keys is enrolled


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_images_do_no_harm(data: st.DataObject) -> None:
    damaged = bytearray(image(SECURE_BOOT_CONFIG, MM_COMMUNICATION))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    find_facts(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
