"""What an OVMF image says about itself: the drivers in it, and the keys in its variable store.

Source: UEFI Platform Initialization 1.8, volume 3 (firmware volumes 3.2.1, files 3.2.3, sections
3.2.5); edk2, MdeModulePkg/Include/Guid/VariableFormat.h (the variable store) and the drivers' .inf
files (FILE_GUID).  The drivers lie in volumes within an LZMA section of the main volume.

Nothing here proves anything about a hostile image; it reads what an honest build has, in time and
memory that a hostile one cannot raise beyond a bound.
"""

import functools
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from igvmfw.errors import IgvmError
from igvmfw.igvm.reader import U32, U64, Layout, guid

FOUR_GIB = 1 << 32
MAX_FIRMWARE = 64 << 20  # bytes below 4 GiB that are looked at; real images have 2 to 16 MiB
MAX_UNPACKED = 64 << 20  # bytes that all compressed sections may unpack to; OVMF has 14 MiB
MAX_DEPTH = 4  # volumes within volumes; OVMF has 2
MAX_VOLUMES = 64  # that are named; OVMF has 3
MAX_SEARCHED = 256 << 20  # bytes, what lies within something else once more; OVMF has 16 MiB
MAX_PARTS = 1 << 16  # volumes, files, sections, variables that are looked at; OVMF has below 300

# EFI_FIRMWARE_VOLUME_HEADER from the file system GUID on, EFI_FFS_FILE_HEADER, EFI_GUID_DEFINED_…
_VOLUME = Layout("16sQ4sIHHHBB")
_FILE = Layout("16sHBB3sB")
_GUIDED = Layout("16sHH")
_STORE = Layout("16sIBBHI")
_VARIABLE = Layout("HBBIQ16sIII16s")
_VOLUME_GUID = 16  # bytes before the file system GUID
_SIGNATURE = 40  # bytes before "_FVH"
_LARGE_FILE = 0x01
_VOLUME_IMAGE_FILE = 0x0B
_GUIDED_SECTION = 0x02
_VOLUME_SECTION = 0x17

_LZMA = guid("ee4e5898-3914-4259-9d6e-dc7bd79403cf")
_VARIABLE_VOLUME = guid("fff12b8d-7696-4c8b-a985-2747075b4f50")
_AUTHENTICATED_STORE = guid("aaf32c78-947b-439a-a180-2e144ec37792")
_GLOBAL_VARIABLE = guid("8be4df61-93ca-11d2-aa0d-00e098032b8c")
_SECURE_BOOT_ENABLE = guid("f0a30bc7-af08-4556-99c4-001009c93a44")
_STORE_FORMATTED, _STORE_HEALTHY = 0x5A, 0xFE
_VARIABLE_START, _VARIABLE_ADDED = 0x55AA, 0x3F

SECURE_BOOT_CONFIG = guid("f0e6a44f-7195-41c3-ac64-54f202cd0a21")
SMM_CORE = guid("e94f54cd-81eb-47ed-aec3-856f5dc157a9")
MM_COMMUNICATION = guid("0b807404-2d1c-4066-95f4-f28a58800185")


@dataclass(frozen=True, slots=True, kw_only=True)
class UefiFacts:
    """What is in a UEFI firmware image.

    Attributes:
        secure_boot: It has the interfaces of Secure Boot (SecureBootConfigDxe).
        smm: It needs System Management Mode (PiSmmCore).
        variable_service: It takes its variables from a service outside of it, the host's or an
            SVSM's (VirtMmCommunication).
        enrolled_keys: Its own variable store has a platform key, and Secure Boot is not off.
    """

    secure_boot: bool
    smm: bool
    variable_service: bool
    enrolled_keys: bool


class Volume(NamedTuple):
    """A firmware volume: its place in the image and its size, in bytes."""

    offset: int
    size: int
    variables: bool  # it holds the variable store


def find_volumes(firmware: bytes) -> tuple[Volume, ...]:
    """The volumes of a firmware image, one after the other; those within them are not looked at."""
    data = memoryview(firmware)
    found: list[Volume] = []
    at = firmware.find(b"_FVH")
    while at >= 0 and len(found) < MAX_VOLUMES:
        start, end = at - _SIGNATURE, at + 4
        if start >= 0 and len(data) - start >= _VOLUME_GUID + _VOLUME.size:
            system, length, _, _, header, *_ = _VOLUME.read(data, start + _VOLUME_GUID)
            if _SIGNATURE < header <= length <= len(data) - start:
                found.append(Volume(start, length, system == _VARIABLE_VOLUME))
                end = start + length
        at = firmware.find(b"_FVH", end)
    return tuple(found)


@functools.lru_cache(maxsize=4)  # platforms, and files, often share one image; unpacking is slow
def find_facts(firmware: bytes) -> UefiFacts | None:
    """Look into a firmware image.

    Args:
        firmware: The image, or the memory that holds it.
    Returns:
        What it says, or None where no firmware volume with drivers can be read.
    """
    scan = _Scan()
    scan.volumes(memoryview(firmware), 0)
    if not scan.unpacked:
        return None
    return UefiFacts(
        secure_boot=SECURE_BOOT_CONFIG in scan.files,
        smm=SMM_CORE in scan.files,
        variable_service=MM_COMMUNICATION in scan.files,
        enrolled_keys=scan.enrolled_keys,
    )


class _Scan:
    """One walk through an image; damaged parts are passed over."""

    def __init__(self) -> None:
        self.files: set[bytes] = set()
        self.enrolled_keys = False
        self.unpacked = 0
        self._parts = 0
        self._searched = 0

    def _may_search(self, size: int) -> bool:
        # damaged volumes may overlap: each could hold the same megabytes
        self._searched += size
        return self._searched <= MAX_SEARCHED

    def _go_on(self) -> bool:
        self._parts += 1
        return self._parts <= MAX_PARTS

    def volumes(self, data: memoryview, depth: int) -> None:
        """Every firmware volume in some data, one after the other."""
        if depth > MAX_DEPTH or not self._may_search(len(data)):
            return
        content = bytes(data)
        at = content.find(b"_FVH")
        while at >= 0 and self._go_on():
            start = at - _SIGNATURE
            end = self._volume(data, start, depth) if start >= 0 else None
            at = content.find(b"_FVH", at + 4 if end is None else end)

    def _volume(self, data: memoryview, start: int, depth: int) -> int | None:
        """One volume; returns its end, or None where there is none."""
        try:
            system, length, _, _, header, _, extended, _, _ = _VOLUME.read(
                data, start + _VOLUME_GUID
            )
            if not header <= length <= len(data) - start:
                return None
            volume = data[start : start + length]
            if system == _VARIABLE_VOLUME:
                self.enrolled_keys |= self._has_keys(volume, header)
            else:
                first = header
                if extended:
                    first = extended + U32.read(volume, extended + 16)[0]
                self._volume_files(volume, first, depth)
        except IgvmError:
            return None
        return start + max(int(length), _SIGNATURE + 4)

    def _volume_files(self, volume: memoryview, at: int, depth: int) -> None:
        at = _align(at, 8)
        while at + _FILE.size <= len(volume) and self._go_on():
            name, _, kind, attributes, size, _ = _FILE.read(volume, at)
            length, header = int.from_bytes(size, "little"), _FILE.size
            if attributes & _LARGE_FILE:
                length, header = U64.read(volume, at + header)[0], header + 8
            if not header <= length <= len(volume) - at:
                return  # free space, or damage
            self.files.add(bytes(name))
            if kind == _VOLUME_IMAGE_FILE:
                self._sections(volume[at + header : at + length], depth)
            at = _align(at + length, 8)

    def _sections(self, data: memoryview, depth: int) -> None:
        for kind, body in _sections(data):
            if not self._go_on():
                return
            if kind == _VOLUME_SECTION:
                self.volumes(body, depth + 1)
            elif kind == _GUIDED_SECTION and depth < MAX_DEPTH:
                name, offset, _ = _GUIDED.read(body)
                # the offset counts from the section's start, its header of 4 bytes included
                if name == _LZMA and 4 <= offset <= len(body) + 4:
                    self._sections(memoryview(self._unpack(body[offset - 4 :])), depth + 1)

    def _unpack(self, data: memoryview) -> bytes:
        left = MAX_UNPACKED - self.unpacked
        if left <= 0 or not self._may_search(len(data)):
            return b""
        try:
            decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=MAX_UNPACKED * 2)
            unpacked = decoder.decompress(bytes(data), max_length=left)
        except lzma.LZMAError:
            return b""
        self.unpacked += len(unpacked)
        return unpacked

    def _has_keys(self, volume: memoryview, header: int) -> bool:
        """Whether a variable store has a platform key, and Secure Boot is not switched off."""
        store, size, formatted, health, _, _ = _STORE.read(volume, header)
        if (store, formatted, health) != (_AUTHENTICATED_STORE, _STORE_FORMATTED, _STORE_HEALTHY):
            return False
        end = min(header + size, len(volume))
        key, enabled = False, True
        for owner, name, value in self._variables(volume[header + _STORE.size : end]):
            if (owner, name) == (_GLOBAL_VARIABLE, "PK"):
                key = len(value) > 0
            elif (owner, name) == (_SECURE_BOOT_ENABLE, "SecureBootEnable"):
                enabled = value != b"\0"
        return key and enabled

    def _variables(self, data: memoryview) -> Iterator[tuple[bytes, str, bytes]]:
        """The variables in force: owner, name, value."""
        at = 0
        while at + _VARIABLE.size <= len(data) and self._go_on():
            start, state, _, _, _, _, _, name_size, data_size, owner = _VARIABLE.read(data, at)
            body = at + _VARIABLE.size
            if start != _VARIABLE_START or body + name_size + data_size > len(data):
                return
            if state == _VARIABLE_ADDED:
                name = bytes(data[body : body + name_size]).decode("utf-16-le", "replace")
                value = bytes(data[body + name_size : body + name_size + data_size])
                yield bytes(owner), name.rstrip("\0"), value
            at = _align(body + name_size + data_size, 4)


def _align(offset: int, to: int) -> int:
    return (offset + to - 1) // to * to


def _sections(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The sections of a file: their types, and what follows their headers."""
    at = 0
    while at + 4 <= len(data):
        length, header = int.from_bytes(data[at : at + 3], "little"), 4
        kind = data[at + 3]
        if length == 0xFFFFFF:
            length, header = U32.read(data, at + 4)[0], 8
        if not header <= length <= len(data) - at:
            return
        yield kind, data[at + header : at + length]
        at = _align(at + length, 4)
