"""What `inspect` says of a platform in figures: starts of processors, parameters."""

import time
from collections.abc import Callable

import pytest

from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import MemoryMap, ParameterInsert, VpContext, VpCount
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.reader import U32, Layout
from igvmfw.igvm.spec import SEV_VMSA_GPA
from igvmfw.igvm.summary import find_entry_address, summarize
from igvmfw.igvm.vpcontext import VBS_REGISTER, Segment, Vmsa, build_native
from igvmfw.platforms import Platform
from tests.fuzz.shapes import vmsas
from tests.igvm import samples

HV_SEGMENT = Layout("QIHH")  # base, limit, selector, attributes (TLFS, HV_X64_SEGMENT_REGISTER)
HV_RIP, HV_CS = 0x20010, 0x60001


def native(**registers: int) -> tuple[Platform, bytes]:
    return Platform.NATIVE, build_native(registers)


def vsm(rip: int, cs_base: int) -> tuple[Platform, bytes]:
    registers = (
        VBS_REGISTER.write(0, HV_RIP, bytes(11), rip.to_bytes(16, "little")),
        VBS_REGISTER.write(0, HV_CS, bytes(11), HV_SEGMENT.write(cs_base, 0xFFFF, 0xF000, 0x9B)),
    )
    return Platform.VSM, U32.write(len(registers)) + b"".join(registers)


def vmsa(cs_base: int, **registers: int) -> tuple[Platform, bytes]:
    return Platform.SEV_ES, Vmsa.build({"cs": Segment(base=cs_base), **registers}).content


@pytest.mark.parametrize(
    ("context", "text", "address"),
    [
        (native(), "architectural reset", None),
        (native(rip=0x10_0000, efer=0x500, cr0=1, code_base=0x1000), "64-bit mode, RIP 0x100000",
         0x10_0000),
        (native(rip=0x1000, cr0=1), "32-bit protected mode, EIP 0x1000", 0x1000),
        (native(rip=0x1000, cr0=1, code_base=0x20_0000),
         "32-bit protected mode, CS base 0x200000, EIP 0x1000", 0x20_1000),
        (vmsa(0xFFFF_0000, rip=0xFFF0), "real mode, CS base 0xffff0000, IP 0xfff0", 0xFFFF_FFF0),
        (vmsa(0, rip=0x1000, cr0=1), "32-bit protected mode, EIP 0x1000", 0x1000),
        (vsm(0xFFF0, 0xFFFF_0000), "real mode, CS base 0xffff0000, IP 0xfff0", 0xFFFF_FFF0),
    ],
)  # fmt: skip
def test_a_processor_starts_behind_its_code_segments_base(
    context: tuple[Platform, bytes], text: str, address: int | None
) -> None:
    platform, data = context
    builder = ImageBuilder()
    builder.add(samples.platform(platform, 1))
    builder.add_vp_context(1, 0, data, gpa=SEV_VMSA_GPA if platform is Platform.SEV_ES else 0)
    image = IgvmFile.parse(builder.build())
    assert [start.entry for start in summarize(image)[0].contexts] == [text]
    (header,) = (header for header in image.headers if isinstance(header, VpContext))
    assert find_entry_address(image, header) == address


def test_parameters_are_those_that_a_platform_gets() -> None:
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.NATIVE, 1))
    builder.add(samples.platform(Platform.VSM, 2))
    builder.add_page(0x1000, 3, samples.PAGE)
    for area, mask, parameter in ((0, 1, MemoryMap(0, 0)), (1, 2, VpCount(1, 0))):
        builder.add_parameter_area(area, 4096)
        builder.add(parameter)
        builder.add(ParameterInsert(0x10_0000 + area * 4096, mask, area))
    of_native, of_vsm = summarize(IgvmFile.parse(builder.build()))
    assert (of_native.parameters, of_native.unmeasured) == (("MEMORY_MAP",), 4096)
    assert (of_vsm.parameters, of_vsm.unmeasured) == (("VP_COUNT_PARAMETER",), 4096)


def test_many_vmsas_cost_little_more_than_reading_the_file() -> None:
    """Of which there may be 65536: whatever a VMSA holds, only its start is told."""
    data = vmsas(256 << 10)
    image = IgvmFile.parse(data)
    reading = min(seconds(lambda: IgvmFile.parse(data)) for _ in range(3))
    assert min(seconds(lambda: summarize(image)) for _ in range(3)) < 3 * reading


def seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started
