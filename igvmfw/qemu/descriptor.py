"""QEMU's firmware descriptors: what firmware.json describes, as types.

Source: docs/interop/firmware.json of QEMU 10.2.2 (`Firmware` and what it refers to), and of 11.0
for `uefi-vars` (QEMU commit e8dcd2a0c2d6).  What is read here is what can be understood without a
doubt; which words a release of QEMU allows is the schema's matter (`igvmfw.qemu.schema`), because
a descriptor for a newer QEMU must not stop anyone from choosing among the others.  libvirt reads
it the same way (src/qemu/qemu_firmware.c): it takes a descriptor without description and tags,
and passes over features it does not know.

Members that nobody knows are kept and written back.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeAlias

from igvmfw.errors import DescriptorError
from igvmfw.platforms import Platform
from igvmfw.qemu import jsontext
from igvmfw.qemu.jsontext import Members, array, file_name, text
from igvmfw.records import Record

MAX_STORAGE = 1 << 40  # bytes; far beyond any vTPM state, and still a disk QEMU can make

VTPM_STORAGE = "x-vtpm-storage"
VTPM = "vtpm"

# FirmwareFeature's word for each platform; firmware for the plain one needs none
PLATFORM_FEATURES: Mapping[Platform, str] = {
    Platform.SEV: "amd-sev",
    Platform.SEV_ES: "amd-sev-es",
    Platform.SEV_SNP: "amd-sev-snp",
    Platform.TDX: "intel-tdx",
}


class Device(StrEnum):
    """Where firmware is mapped (FirmwareDevice)."""

    FLASH = "flash"
    KERNEL = "kernel"
    MEMORY = "memory"
    IGVM = "igvm"


class FlashMode(StrEnum):
    """How a flash firmware keeps its variables (FirmwareFlashMode)."""

    SPLIT = "split"
    COMBINED = "combined"
    STATELESS = "stateless"


class StorageInterface(StrEnum):
    """How firmware reaches the storage of its vTPM (igvmfw's extension)."""

    VIRTIO_BLK_MMIO = "virtio-blk-mmio"
    PFLASH = "pflash"


_NO_EXTRA: Mapping[str, object] = MappingProxyType({})


def _word(words: type[StrEnum], value: object) -> str:
    found = text(value)
    if found not in tuple(words):
        raise DescriptorError(f"{found[:60]!r} is not one of {', '.join(words)}")
    return found


def _flash_mode(value: object) -> FlashMode:
    return FlashMode(_word(FlashMode, value))


def _storage_interface(value: object) -> StorageInterface:
    return StorageInterface(_word(StorageInterface, value))


def _storage_size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DescriptorError(f"expected a whole number of bytes, found {jsontext.kind(value)}")
    if not 0 < value <= MAX_STORAGE:
        raise DescriptorError(f"expected 1 to {MAX_STORAGE} bytes, found {value}")
    return value


class FlashFile(Record):
    """A file for a pflash chip (FirmwareFlashFile)."""

    filename: str
    format: str
    extra: Mapping[str, object] = _NO_EXTRA

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """From parsed JSON. Raises DescriptorError."""
        members = Members(value)
        return cls(
            filename=members.take("filename", file_name),
            format=members.take("format", text),
            extra=members.rest(),
        )

    def to_dict(self) -> dict[str, Any]:
        """To JSON."""
        return {"filename": self.filename, "format": self.format, **self.extra}


class FlashMapping(Record):
    """Firmware in pflash chips (FirmwareMappingFlash)."""

    device: ClassVar[Device] = Device.FLASH
    executable: FlashFile
    nvram_template: FlashFile | None = None
    stated_mode: FlashMode | None = None
    extra: Mapping[str, object] = _NO_EXTRA

    @property
    def mode(self) -> FlashMode:
        """The mode; `split` where none is stated (FirmwareMappingFlash, @mode)."""
        return self.stated_mode or FlashMode.SPLIT

    @property
    def filename(self) -> str:
        """The executable's file."""
        return self.executable.filename

    @classmethod
    def from_members(cls, members: Members) -> Self:
        """From the mapping's members. Raises DescriptorError."""
        mapping = cls(
            stated_mode=members.take_optional("mode", _flash_mode),
            executable=members.take("executable", FlashFile.from_dict),
            nvram_template=members.take_optional("nvram-template", FlashFile.from_dict),
            extra=members.rest(),
        )
        if mapping.mode is FlashMode.SPLIT and mapping.nvram_template is None:
            raise DescriptorError("mode 'split' needs the member 'nvram-template'")
        return mapping

    def to_dict(self) -> dict[str, Any]:
        """To JSON."""
        document: dict[str, Any] = {"device": self.device.value}
        if self.stated_mode is not None:
            document["mode"] = self.stated_mode.value
        document["executable"] = self.executable.to_dict()
        if self.nvram_template is not None:
            document["nvram-template"] = self.nvram_template.to_dict()
        return {**document, **self.extra}


class KernelMapping(Record):
    """Firmware loaded like a Linux kernel (FirmwareMappingKernel)."""

    device: ClassVar[Device] = Device.KERNEL
    filename: str
    extra: Mapping[str, object] = _NO_EXTRA

    @classmethod
    def from_members(cls, members: Members) -> Self:
        """From the mapping's members. Raises DescriptorError."""
        return cls(filename=members.take("filename", file_name), extra=members.rest())

    def to_dict(self) -> dict[str, Any]:
        """To JSON."""
        return {"device": self.device.value, "filename": self.filename, **self.extra}


class UefiVars(Record):
    """The variable store that QEMU's uefi-vars device starts from (FirmwareMemoryUefiVars)."""

    template: str
    extra: Mapping[str, object] = _NO_EXTRA

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """From parsed JSON. Raises DescriptorError."""
        members = Members(value)
        return cls(template=members.take("template", file_name), extra=members.rest())

    def to_dict(self) -> dict[str, Any]:
        """To JSON."""
        return {"template": self.template, **self.extra}


class MemoryMapping(Record):
    """Firmware in memory (FirmwareMappingMemory)."""

    device: ClassVar[Device] = Device.MEMORY
    filename: str
    uefi_vars: UefiVars | None = None
    extra: Mapping[str, object] = _NO_EXTRA

    @classmethod
    def from_members(cls, members: Members) -> Self:
        """From the mapping's members. Raises DescriptorError."""
        return cls(
            filename=members.take("filename", file_name),
            uefi_vars=members.take_optional("uefi-vars", UefiVars.from_dict),
            extra=members.rest(),
        )

    def to_dict(self) -> dict[str, Any]:
        """To JSON."""
        document: dict[str, Any] = {"device": self.device.value, "filename": self.filename}
        if self.uefi_vars is not None:
            document["uefi-vars"] = self.uefi_vars.to_dict()
        return {**document, **self.extra}


class VtpmStorage(Record):
    """The persistent storage that firmware expects for its vTPM (igvmfw's extension).

    An IGVM file cannot ask for it itself, so the descriptor does; software that does not know the
    member passes over it.
    """

    interface: StorageInterface
    format: str
    size_bytes: int
    template: str | None = None
    extra: Mapping[str, object] = _NO_EXTRA

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """From parsed JSON. Raises DescriptorError."""
        members = Members(value)
        return cls(
            interface=members.take("interface", _storage_interface),
            format=members.take("format", text),
            size_bytes=members.take("size-bytes", _storage_size),
            template=members.take_optional("template", file_name),
            extra=members.rest(),
        )

    def to_dict(self) -> dict[str, Any]:
        """To JSON."""
        document: dict[str, Any] = {
            "interface": self.interface.value,
            "format": self.format,
            "size-bytes": self.size_bytes,
        }
        if self.template is not None:
            document["template"] = self.template
        return {**document, **self.extra}


class IgvmMapping(Record):
    """Firmware in an IGVM file (FirmwareMappingIgvm, since QEMU 10.1)."""

    device: ClassVar[Device] = Device.IGVM
    filename: str
    vtpm_storage: VtpmStorage | None = None
    extra: Mapping[str, object] = _NO_EXTRA

    @classmethod
    def from_members(cls, members: Members) -> Self:
        """From the mapping's members. Raises DescriptorError."""
        return cls(
            filename=members.take("filename", file_name),
            vtpm_storage=members.take_optional(VTPM_STORAGE, VtpmStorage.from_dict),
            extra=members.rest(),
        )

    def to_dict(self) -> dict[str, Any]:
        """To JSON."""
        document: dict[str, Any] = {"device": self.device.value, "filename": self.filename}
        if self.vtpm_storage is not None:
            document[VTPM_STORAGE] = self.vtpm_storage.to_dict()
        return {**document, **self.extra}


FirmwareMapping: TypeAlias = FlashMapping | KernelMapping | MemoryMapping | IgvmMapping
"""The mapping of a descriptor, told apart by `device` (FirmwareMapping)."""

_MAPPINGS: dict[str, type[FirmwareMapping]] = {
    kind.device.value: kind for kind in (FlashMapping, KernelMapping, MemoryMapping, IgvmMapping)
}


def _read_mapping(value: object) -> FirmwareMapping:
    members = Members(value)
    device = members.take("device", text)
    if device not in _MAPPINGS:
        raise DescriptorError(
            f"{device[:60]!r} is not one of {', '.join(_MAPPINGS)}", where="device"
        )
    return _MAPPINGS[device].from_members(members)


class Target(Record):
    """An emulator and the machine types that take the firmware (FirmwareTarget).

    `machines` are globs over concrete machine types, `*` and `?` only.
    """

    architecture: str
    machines: tuple[str, ...]
    extra: Mapping[str, object] = _NO_EXTRA

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """From parsed JSON. Raises DescriptorError."""
        members = Members(value)
        return cls(
            architecture=members.take("architecture", text),
            machines=members.take("machines", array(text)),
            extra=members.rest(),
        )

    def to_dict(self) -> dict[str, Any]:
        """To JSON."""
        return {"architecture": self.architecture, "machines": list(self.machines), **self.extra}


class Descriptor(Record):
    """A firmware descriptor (Firmware).

    Attributes:
        description: The text for people.
        interface_types: The firmware's interfaces to the guest, most native first.
        mapping: The device it is for, and its files.
        targets: The architectures and machine types that can use it.
        features: What it can do.
        tags: For development and debugging.
        extra: Members that firmware.json does not have.
    """

    description: str
    interface_types: tuple[str, ...]
    mapping: FirmwareMapping
    targets: tuple[Target, ...]
    features: tuple[str, ...]
    tags: tuple[str, ...] = ()
    extra: Mapping[str, object] = _NO_EXTRA

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a descriptor file's content.

        Raises:
            DescriptorError: Not JSON, or not a descriptor; `where` is the JSON path.
        """
        return cls.from_dict(jsontext.parse(data))

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """From parsed JSON.

        Raises:
            DescriptorError: A member is missing or of the wrong kind; `where` is the JSON path.
        """
        members = Members(value)
        return cls(
            description=members.take_optional("description", text) or "",
            interface_types=members.take("interface-types", array(text)),
            mapping=members.take("mapping", _read_mapping),
            targets=members.take("targets", array(Target.from_dict)),
            features=members.take("features", array(text)),
            tags=members.take_optional("tags", array(text)) or (),
            extra=members.rest(),
        )

    def to_dict(self) -> dict[str, Any]:
        """To JSON, members in the order firmware.json lists them."""
        return {
            "description": self.description,
            "interface-types": list(self.interface_types),
            "mapping": self.mapping.to_dict(),
            "targets": [target.to_dict() for target in self.targets],
            "features": list(self.features),
            "tags": list(self.tags),
            **self.extra,
        }

    def write(self) -> bytes:
        """The descriptor file's content, in ASCII, so that no terminal or locale changes it."""
        return (json.dumps(self.to_dict(), indent=4) + "\n").encode()
