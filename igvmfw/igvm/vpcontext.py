"""VP contexts: bytes ↔ registers, for each kind of context a file can hold.

Sources: the VMSA is "VMSA Layout, State Save Area for SEV-ES" (AMD64 APM volume 2, table B-4);
the others are IgvmNativeVpContextX64, VbsVpContextHeader/-Register and IgvmVpContextAArch64Cca in
igvm_defs 0.5.0; the register numbers are Hyper-V's (TLFS, "Virtual Processor Registers"), those
that the crate igvm 0.5.0 accepts (src/registers.rs).
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

from igvmfw.errors import IgvmError
from igvmfw.igvm.reader import U32, Buffer, Layout
from igvmfw.igvm.spec import PAGE_SIZE, Architecture
from igvmfw.records import Record

SEGMENT = Layout("HHIQ")


class Segment(NamedTuple):
    """A segment or table register as the VMSA holds it; `attrib` is the VMCB's 12-bit form."""

    selector: int = 0
    attrib: int = 0
    limit: int = 0
    base: int = 0


class _Field(NamedTuple):
    offset: int
    layout: Layout


def _fields(start: int, layout: Layout, names: str) -> dict[str, _Field]:
    return {
        name: _Field(start + index * layout.size, layout)
        for index, name in enumerate(names.split())
    }


_U8, _U16, _U64 = Layout("B"), Layout("H"), Layout("Q")

VMSA_FIELDS: Mapping[str, _Field] = {
    **_fields(0x000, SEGMENT, "es cs ss ds fs gs gdtr ldtr idtr tr"),
    **_fields(0x0A0, _U64, "pl0_ssp pl1_ssp pl2_ssp pl3_ssp u_cet"),
    **_fields(0x0CA, _U8, "vmpl cpl"),
    **_fields(0x0D0, _U64, "efer"),
    **_fields(0x140, _U64, "xss cr4 cr3 cr0 dr7 dr6 rflags rip dr0 dr1 dr2 dr3"),
    **_fields(0x1A0, _U64, "dr0_addr_mask dr1_addr_mask dr2_addr_mask dr3_addr_mask"),
    **_fields(0x1D8, _U64, "rsp s_cet ssp isst_addr rax star lstar cstar sfmask kernel_gs_base"),
    **_fields(0x228, _U64, "sysenter_cs sysenter_esp sysenter_eip cr2"),
    **_fields(0x268, _U64, "g_pat dbgctl br_from br_to last_excp_from last_excp_to"),
    **_fields(0x2E0, _U64, "spec_ctrl"),
    **_fields(0x2E8, U32, "pkru tsc_aux"),
    **_fields(0x2F0, _U64, "tsc_scale tsc_offset"),
    **_fields(0x308, _U64, "rcx rdx rbx"),
    **_fields(0x328, _U64, "rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15"),
    **_fields(0x390, _U64, "guest_exit_info_1 guest_exit_info_2 guest_exit_int_info guest_nrip"),
    **_fields(0x3B0, _U64, "sev_features vintr_ctrl guest_exit_code virtual_tom tlb_id pcpu_id"),
    **_fields(0x3E0, _U64, "event_inj xcr0"),
    **_fields(0x400, _U64, "x87_dp"),
    **_fields(0x408, U32, "mxcsr"),
    **_fields(0x40C, _U16, "x87_ftw x87_fsw x87_fcw x87_fop x87_ds x87_cs"),
    **_fields(0x418, _U64, "x87_rip"),
}
VMSA_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")
SEV_FEATURE_SNP_ACTIVE = 1 << 0


class Vmsa(Record):
    """The save area of a SEV-ES or SEV-SNP virtual processor, a page of 4 KiB.

    `content` is the page; registers are read by the names of `VMSA_FIELDS`.
    """

    content: bytes

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Take a page as a VMSA.

        Raises:
            IgvmError: It is not 4096 bytes long.
        """
        if len(data) != PAGE_SIZE:
            raise IgvmError(f"a VMSA has {PAGE_SIZE} bytes, not {len(data)}")
        return cls(content=bytes(data))

    @classmethod
    def build(cls, registers: Mapping[str, int | Segment]) -> Self:
        """A VMSA of the given registers, all others zero.

        Raises:
            IgvmError: A value does not fit its register.
        """
        page = bytearray(PAGE_SIZE)
        for name, value in registers.items():
            offset, layout = VMSA_FIELDS[name]
            packed = layout.write(*value) if isinstance(value, tuple) else layout.write(value)
            page[offset : offset + layout.size] = packed
        return cls(content=bytes(page))

    def register(self, name: str) -> int:
        """A register that is not a segment."""
        offset, layout = VMSA_FIELDS[name]
        value: int = layout.read(self.content, offset)[0]
        return value

    def segment(self, name: str) -> Segment:
        """A segment or table register."""
        return Segment(*SEGMENT.read(self.content, VMSA_FIELDS[name].offset))

    def registers(self) -> dict[str, int | Segment]:
        """All registers that are not zero, in the order of the layout."""
        found: dict[str, int | Segment] = {}
        for name in VMSA_FIELDS:
            value = self.segment(name) if name in VMSA_SEGMENTS else self.register(name)
            if any(value) if isinstance(value, tuple) else value:
                found[name] = value
        return found


NATIVE_NAMES = (
    "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15 rip rflags "
    "idtr_base idtr_limit reserved0 reserved1 gdtr_limit gdtr_base "
    "code_selector code_attributes code_base code_limit "
    "data_selector data_attributes data_base data_limit gs_base cr0 cr3 cr4 efer"
).split()
NATIVE = Layout("18Q Q HHHH Q HHII HHII Q QQQQ".replace(" ", ""))


def parse_native(data: Buffer) -> dict[str, int]:
    """The registers of a native or SEV context (IgvmNativeVpContextX64), by name.

    Raises:
        IgvmError: Too short, or bytes behind the structure are not zero.
    """
    values = NATIVE.read(data, 0, "native VP context")
    _zero_from(data, NATIVE.size)
    return dict(zip(NATIVE_NAMES, values, strict=True))


def build_native(registers: Mapping[str, int]) -> bytes:
    """The structure of a native context, registers not given being zero.

    Raises:
        IgvmError: A value does not fit its register.
    """
    return NATIVE.write(*(registers.get(name, 0) for name in NATIVE_NAMES))


CCA_NAMES = (*(f"x{index}" for index in range(8)), "pc", "flags")
CCA = Layout("10Q")


def parse_cca(data: Buffer) -> dict[str, int]:
    """The registers of an Arm CCA context (IgvmVpContextAArch64Cca), by name.

    Raises:
        IgvmError: Too short, or bytes behind the structure are not zero.
    """
    values = CCA.read(data, 0, "CCA VP context")
    _zero_from(data, CCA.size)
    return dict(zip(CCA_NAMES, values, strict=True))


def _zero_from(data: Buffer, start: int) -> None:
    if bytes(data[start:]).strip(b"\0"):
        raise IgvmError("bytes behind the VP context's structure are not zero")


VBS_REGISTER = Layout("BI11s16s")
VBS_X64_REGISTERS = {
    0x20004: "Rsp", 0x20005: "Rbp", 0x20006: "Rsi", 0x20008: "R8", 0x20009: "R9", 0x2000A: "R10",
    0x2000B: "R11", 0x2000C: "R12", 0x20010: "Rip", 0x20011: "Rflags", 0x40000: "Cr0",
    0x40002: "Cr3", 0x40003: "Cr4", 0x60000: "Es", 0x60001: "Cs", 0x60002: "Ss", 0x60003: "Ds",
    0x60004: "Fs", 0x60005: "Gs", 0x60007: "Tr", 0x70000: "Idtr", 0x70001: "Gdtr",
    0x80001: "Efer", 0x80004: "Pat", 0x8000E: "MtrrDefType",
    **{0x80010 + index: f"MtrrPhysBase{index}" for index in range(5)},
    **{0x80040 + index: f"MtrrPhysMask{index}" for index in range(5)},
    0x80070: "MtrrFix64k00000", 0x80071: "MtrrFix16k80000", 0x80077: "MtrrFix4kE0000",
    0x80078: "MtrrFix4kE8000", 0x80079: "MtrrFix4kF0000", 0x8007A: "MtrrFix4kF8000",
}  # fmt: skip
VBS_AARCH64_REGISTERS = {
    **{0x20000 + index: f"X{index}" for index in range(8)},
    0x20022: "Pc", 0x20023: "Cpsr", 0x40002: "SctlrEl1", 0x40005: "Ttbr0El1",
    0x40006: "Ttbr1El1", 0x40007: "TcrEl1", 0x4000B: "MairEl1", 0x4000C: "VbarEl1",
}  # fmt: skip


class VbsRegister(NamedTuple):
    """A register of a VSM context; the value is its 16 bytes as a number."""

    name: str
    number: int
    value: int


class VbsContext(NamedTuple):
    """The registers of a VSM context, all of one VTL; `size` is what it takes of the file."""

    vtl: int
    registers: tuple[VbsRegister, ...]
    size: int


def parse_vbs(data: Buffer, architecture: Architecture) -> VbsContext:
    """The register list of a VSM context.

    Args:
        data: The file data from the context's offset on.
        architecture: Of the file; it gives the register numbers their meaning.
    Raises:
        IgvmError: The list is empty, longer than the data, or than the registers there are; its
            VTLs differ or do not exist, or a register is not one that an initial context may set.
    """
    (count,) = U32.read(data, 0, "VBS VP context")
    if count == 0:
        raise IgvmError("the VP context has no registers")
    size = 4 + count * VBS_REGISTER.size
    if size > len(data):
        raise IgvmError(f"{count} registers need {size} bytes, {len(data)} are left")
    x64 = architecture is Architecture.X64
    names = VBS_X64_REGISTERS if x64 else VBS_AARCH64_REGISTERS
    if count > len(names):  # each header may name the same list: it must not be long
        raise IgvmError(f"the VP context sets {count} registers, there are {len(names)}")
    registers: list[VbsRegister] = []
    vtl: int | None = None
    for index in range(count):
        own_vtl, number, _, value = VBS_REGISTER.read(data, 4 + index * VBS_REGISTER.size)
        if number not in names:
            raise IgvmError(f"register {index} has number 0x{number:x}, which is not supported")
        if vtl is None:
            vtl = own_vtl
        if own_vtl != vtl or vtl > 2:
            raise IgvmError(f"register {index} is for VTL {own_vtl}: all need one VTL of 0, 1, 2")
        registers.append(VbsRegister(names[number], number, int.from_bytes(value, "little")))
    assert vtl is not None
    return VbsContext(vtl, tuple(registers), size)
