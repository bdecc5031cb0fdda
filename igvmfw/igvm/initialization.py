"""The headers that stand before the directives: a file's platforms, and its initialization.

Fields stand in the order of the layout and are named as in igvm_defs 0.5.0 (src/lib.rs,
IGVM_VHS_*).
"""

from collections.abc import Iterator
from typing import Self

from igvmfw.igvm.header import Breach, Extent, Header, aligned, zero
from igvmfw.igvm.reader import Buffer, Layout
from igvmfw.igvm.spec import (
    PLATFORM_VERSION,
    U64_SPACE,
    HeaderType,
    PlatformType,
    RelocatableRegionFlags,
)


class SupportedPlatform(Header):
    """IGVM_VHS_SUPPORTED_PLATFORM: a platform, and the mask other headers name it by."""

    TYPE = HeaderType.SUPPORTED_PLATFORM
    LAYOUT = Layout("IBBHQ")
    compatibility_mask: int
    highest_vtl: int
    platform_type: int
    platform_version: int
    shared_gpa_boundary: int

    def breaches(self) -> Iterator[Breach]:  # noqa: D102 - inherited
        if self.compatibility_mask.bit_count() != 1:
            yield Breach(
                "platform-mask", f"compatibility mask 0x{self.compatibility_mask:x} is not one bit"
            )
        if self.highest_vtl not in (0, 2):
            yield Breach("vtl", f"highest VTL is {self.highest_vtl}, must be 0 or 2")
        if self.platform_type not in PlatformType._value2member_map_:
            yield Breach("platform-type", f"unknown platform type {self.platform_type}")
        elif self.platform_version != PLATFORM_VERSION:
            yield Breach(
                "platform-version", f"platform version is {self.platform_version}, must be 1"
            )
        if self.platform_type in (PlatformType.NATIVE, PlatformType.VSM_ISOLATION):
            yield from zero("shared GPA boundary", self.shared_gpa_boundary)


class GuestPolicy(Header):
    """IGVM_VHS_GUEST_POLICY: the isolation policy, in the platform's own encoding."""

    TYPE = HeaderType.GUEST_POLICY
    LAYOUT = Layout("QII")
    policy: int
    compatibility_mask: int
    reserved: int = 0

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from zero("reserved", self.reserved)


class RelocatableRegion(Header):
    """IGVM_VHS_RELOCATABLE_REGION: memory that a loader may move as a whole."""

    TYPE = HeaderType.RELOCATABLE_REGION
    LAYOUT = Layout("IHBBQQQQQ")
    compatibility_mask: int
    vp_index: int
    vtl: int
    flags: int
    relocation_alignment: int
    relocation_region_gpa: int
    relocation_region_size: int
    minimum_relocation_gpa: int
    maximum_relocation_gpa: int

    @property
    def is_vtl2(self) -> bool:
        """The region describes VTL 2."""
        return bool(self.flags & RelocatableRegionFlags.IS_VTL2)

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        if self.vtl > 2:
            yield Breach("vtl", f"VTL is {self.vtl}, must be 0, 1 or 2")
        yield from aligned("region size", self.relocation_region_size)
        yield from aligned("relocation alignment", self.relocation_alignment)
        if self.relocation_alignment == 0:
            yield Breach("relocation", "relocation alignment is zero")
        else:
            for name, value in (
                ("region GPA", self.relocation_region_gpa),
                ("minimum GPA", self.minimum_relocation_gpa),
                ("maximum GPA", self.maximum_relocation_gpa),
            ):
                yield from aligned(name, value, self.relocation_alignment)
        yield from _region("region", self.relocation_region_gpa, self.relocation_region_size)


def _region(name: str, gpa: int, size: int) -> Iterator[Breach]:
    if size == 0:
        yield Breach("relocation", f"{name} is empty")
    elif gpa + size > U64_SPACE:
        yield Breach("relocation", f"{name} 0x{gpa:x} + 0x{size:x} ends outside the address space")


class PageTableRelocation(Header):
    """IGVM_VHS_PAGE_TABLE_RELOCATION: the page tables to fix up when regions move."""

    TYPE = HeaderType.PAGE_TABLE_RELOCATION_REGION
    LAYOUT = Layout("IHBBQQQ")
    compatibility_mask: int
    vp_index: int
    vtl: int
    reserved: int
    gpa: int
    size: int
    used_size: int

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from zero("reserved", self.reserved)
        if self.vtl > 2:
            yield Breach("vtl", f"VTL is {self.vtl}, must be 0, 1 or 2")
        yield from aligned("GPA", self.gpa)
        yield from aligned("size", self.size)
        yield from aligned("used size", self.used_size)
        if self.used_size > self.size:
            yield Breach(
                "relocation", f"used size 0x{self.used_size:x} exceeds size 0x{self.size:x}"
            )
        yield from _region("page table region", self.gpa, self.size)


class _CorimData(Header):
    LAYOUT = Layout("IIII")
    compatibility_mask: int
    file_offset: int
    size_bytes: int
    reserved: int

    def breaches(self) -> Iterator[Breach]:
        yield from zero("reserved", self.reserved)

    def extent(self) -> Extent | None:
        return Extent(self.file_offset, self.size_bytes) if self.file_offset else None


class CorimDocument(_CorimData):
    """IGVM_VHS_CORIM_DATA of a CORIM_DOCUMENT: reference values, as CBOR in the file data."""

    TYPE = HeaderType.CORIM_DOCUMENT
    compatibility_mask: int
    file_offset: int
    size_bytes: int
    reserved: int = 0


class CorimSignature(_CorimData):
    """IGVM_VHS_CORIM_DATA of a CORIM_SIGNATURE: a COSE_Sign1 over the document."""

    TYPE = HeaderType.CORIM_SIGNATURE
    compatibility_mask: int
    file_offset: int
    size_bytes: int
    reserved: int = 0


class CcaPolicy(Header):
    """IGVM_VHS_CCA_POLICY: the policy of an Arm CCA realm."""

    TYPE = HeaderType.CCA_POLICY
    LAYOUT = Layout("IIQQBB6s")
    compatibility_mask: int
    reserved: int
    attributes_required_zeroes: int
    attributes_required_ones: int
    hash_algorithm: int
    lfa_policy: int
    reserved2: bytes = bytes(6)

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        yield from zero("reserved", self.reserved)
        yield from zero("reserved2", int.from_bytes(self.reserved2, "little"))
        both = self.attributes_required_zeroes & self.attributes_required_ones
        if both:
            yield Breach("policy", f"attribute bits 0x{both:x} are required both zero and one")


class VersionString(Header):
    """VERSION_STRING: the owner's label of the file; the content is the UTF-8 text itself."""

    TYPE = HeaderType.VERSION_STRING
    text: bytes

    @classmethod
    def parse(cls, body: Buffer) -> Self:  # noqa: D102
        return cls(bytes(body))

    def write(self) -> bytes:  # noqa: D102
        return self.text

    def breaches(self) -> Iterator[Breach]:  # noqa: D102
        try:
            self.text.decode()
        except UnicodeDecodeError as error:
            yield Breach("version-string", f"not UTF-8: {error.reason} at byte {error.start}")
