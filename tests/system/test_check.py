"""What `check` says of a file is what QEMU does with it: each rule with a file that breaks it."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from igvmfw.check import check_image, refuses
from igvmfw.findings import Guest
from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import (
    DeviceTree,
    EnvironmentInfo,
    ErrorRange,
    GuestPolicy,
    Madt,
    MemoryMap,
    ParameterArea,
    ParameterInsert,
    RequiredMemory,
    SnpIdBlock,
    VersionString,
    VpCount,
)
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import SEV_VMSA_GPA, PageDataFlags, PageDataType
from igvmfw.igvm.vpcontext import Segment, build_native
from igvmfw.igvm.wrap import RESET_ADDRESS, reset_vmsa
from igvmfw.platforms import Platform
from igvmfw.qemu.acceptance import Acceptance, acceptance_of
from igvmfw.qemu.emulator import probe
from tests.igvm import samples
from tests.parts import need
from tests.testbed.cache import printed
from tests.testbed.standin import make_emulator

NATIVE, SEV, SEV_ES, SNP = (
    Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP,
)  # fmt: skip
GUEST = Guest(vcpus=2, memory=512 << 20)
SNP_POLICY = GuestPolicy(0x30000, 1)


@dataclass(frozen=True)
class Case:
    """A file and what becomes of it; `said` is QEMU's own error, None where it launches."""

    rule: str
    platform: Platform
    build: Callable[[ImageBuilder], None]
    said: str | None
    declared: Platform | None = None  # the file's platform, where it is not the guest's
    run: bool = True  # False for what must never be given to QEMU
    fine_since: tuple[int, int] = (99, 0)  # the first release that the rule is not for

    def rules(self, release: Acceptance) -> set[str]:
        """What `check` has to find for a release."""
        own = {self.rule} if self.rule and release.version < self.fine_since else set()
        sev = self.platform in (SEV, SEV_ES) and not release.sev_launch
        return own | ({"sev-launch"} if sev else set())


def adding(*headers: AnyHeader) -> Callable[[ImageBuilder], None]:
    def add(builder: ImageBuilder) -> None:
        for header in headers:
            builder.add(header)

    return add


def page(gpa: int = 0x1000, flags: int = 0, kind: int = 0, times: int = 1) -> Callable[..., None]:
    def add(builder: ImageBuilder) -> None:
        for _ in range(times):
            builder.add_page(gpa, 1, samples.PAGE, flags=flags, data_type=kind)

    return add


def context(
    *indices: int, gpa: int = SEV_VMSA_GPA, features: int = 0, **registers: int
) -> Callable[..., None]:
    def add(builder: ImageBuilder) -> None:
        for index in indices:
            vmsa = reset_vmsa(RESET_ADDRESS, sev_features=features)
            values: dict[str, int | Segment] = {**vmsa.registers(), **registers}
            builder.add_vp_context(1, index, type(vmsa).build(values).content, gpa=gpa)

    return add


def native_context(*indices: int) -> Callable[..., None]:
    def add(builder: ImageBuilder) -> None:
        for index in indices:
            builder.add_vp_context(1, index, build_native({"rip": 0xFFF0, "cr0": 0x60000010}))

    return add


def snp(add: Callable[..., None]) -> Callable[..., None]:
    def with_policy(builder: ImageBuilder) -> None:
        builder.add(SNP_POLICY)
        add(builder)

    return with_policy


def pages(*addresses: int) -> Callable[..., None]:
    def add(builder: ImageBuilder) -> None:
        for address in addresses:
            builder.add_page(address, 1, samples.PAGE)

    return add


def both(*adders: Callable[..., None]) -> Callable[..., None]:
    def add(builder: ImageBuilder) -> None:
        for each in adders:
            each(builder)

    return add


def with_tail(builder: ImageBuilder) -> None:
    vmsa = bytearray(reset_vmsa(RESET_ADDRESS, sev_features=1).content)
    vmsa[0x670] = 1  # behind what libigvm has in a VMSA
    builder.add_vp_context(1, 0, vmsa, gpa=SEV_VMSA_GPA)


AREA = ParameterArea(4096, 0)
REQUIRED = RequiredMemory(0x10_0000, 1, 4096)
HIGH = ParameterInsert(0x3F_F000, 1, 0)
LARGE = PageDataFlags.IS_2MB_PAGE
INSERT = ParameterInsert(0x10_0000, 1, 0)
ID_BLOCK = SnpIdBlock.parse(b"\1" + bytes(SnpIdBlock.LAYOUT.size - 1))

LATE = both(pages(0x10_0000, 0x5000), adding(REQUIRED))
EARLY = both(adding(REQUIRED), pages(0x10_0000, 0x5000))
PENDING = both(pages(0x5000, 0x10_0000), adding(REQUIRED))  # loaded when the next region begins

# where the guest has no memory, and QEMU makes some for what comes first
FAR = 0xF000_0000
CROSSING = [
    both(pages(FAR + 0x1000, 0x1000), adding(RequiredMemory(FAR, 1, 0x10_0000))),
    both(pages(FAR, 0x1000), adding(RequiredMemory(FAR, 1, 0x2000))),
    adding(RequiredMemory(FAR, 1, 4096), ParameterArea(8192, 1), ParameterInsert(FAR - 4096, 1, 1)),
    adding(RequiredMemory(FAR, 1, 0x2000), RequiredMemory(FAR + 0x1000, 1, 0x3000)),
    adding(RequiredMemory(FAR, 1, 4096), ParameterArea(8192, 1), ParameterInsert(FAR, 1, 1)),
    both(
        adding(RequiredMemory(FAR, 1, 4096), RequiredMemory(FAR + 4096, 1, 4096)),
        pages(FAR, FAR + 4096),
    ),
]
WITHIN = [
    both(adding(RequiredMemory(FAR, 1, 0x10_0000)), pages(FAR + 0x1000, 0x1000)),
    both(
        pages(FAR, 0x1000, FAR + 4096, 0x2000),
        adding(RequiredMemory(FAR, 1, 4096), RequiredMemory(FAR + 8192, 1, 4096)),
    ),
    # pages that are waiting for the next one are loaded last
    both(pages(FAR), adding(RequiredMemory(FAR, 1, 0x2000))),
]

CASES = [
    Case("", NATIVE, adding(AREA, MemoryMap(0, 0), VpCount(0, 4092), INSERT), None),
    Case("", NATIVE, native_context(0), None),
    Case("", SEV, page(0x5000), None),
    Case("", SEV_ES, context(0, 1), None),
    Case("", SNP, snp(context(0, features=1)), None),
    Case("platform-missing", NATIVE, page(), "compatible supported platform", SEV),
    Case("platform-missing", SEV, page(), "compatible supported platform", SNP),
    Case("platform-fallback", SEV, page(), None, NATIVE),
    Case("header-unknown", NATIVE, adding(AREA, Madt(0, 0)), "type 0x309", fine_since=(11, 0)),
    Case("header-unknown", NATIVE, adding(AREA, DeviceTree(0, 0)), "Unknown header type"),
    Case("header-unknown", NATIVE, adding(ErrorRange(0x1000, 1, 4096)), "type 0x30D"),
    Case("unparsable", NATIVE, adding(VersionString(b"1")), "Unable to parse IGVM file"),
    Case("unparsable", SNP, snp(with_tail), "Unable to parse IGVM file"),
    Case("", NATIVE, adding(ErrorRange(0x1000, 0, 4096)), None),
    Case("parameter-outside", NATIVE, adding(AREA, VpCount(0, 4093)), None, run=False),
    Case("parameter-outside", NATIVE, adding(AREA, EnvironmentInfo(0, 1 << 31)), None, run=False),
    Case("parameter-offset", NATIVE, adding(AREA, MemoryMap(0, 64), INSERT), None),
    Case("area-size", NATIVE, adding(ParameterArea(1 << 40, 0)), None, run=False),
    Case("area-size", NATIVE, adding(ParameterArea(0, 0)), None, run=False),
    Case("area-contents", NATIVE, lambda b: b.add_parameter_area(0, 4096, b"x"), None),
    Case("memory-range", NATIVE, page(1 << 62), None, run=False),
    Case("memory-device", NATIVE, page(0xFEC0_0000), "existing non-RAM region"),
    Case("memory-device", NATIVE, page(0xFED0_0000), "existing non-RAM region"),
    Case("memory-device", NATIVE, page(0xFEE0_0000), "existing non-RAM region"),
    Case("memory-device", NATIVE, page(0xFEEF_F000), "existing non-RAM region"),
    Case("", NATIVE, page(0xFEF0_0000), None),
    Case(
        "memory-border", NATIVE, adding(ParameterArea(8192, 1), ParameterInsert(0x1FFF_F000, 1, 1)),
        "region size exceeded",
    ),
    Case("memory-border", NATIVE, pages(0x1FFF_F000, 0x2000_0000), "region size exceeded"),
    *(Case("memory-border", NATIVE, add, "region size exceeded") for add in CROSSING),
    *(Case("", NATIVE, add, None) for add in WITHIN),
    Case("memory-low", NATIVE, page(0xA_0000), None),
    Case("memory-low", NATIVE, pages(0xB_F000, 0xC_0000), None),
    Case("required-sev", SEV, adding(REQUIRED), "failed to configure required memory"),
    Case("required-sev", SEV_ES, adding(REQUIRED), "failed to configure required memory"),
    Case("required-empty", SNP, snp(adding(RequiredMemory(0x10_0000, 1, 0))), "required memory"),
    Case("required-empty", NATIVE, adding(RequiredMemory(0x4000_0000, 1, 0)), "Assertion"),
    Case("required-late", SNP, snp(LATE), None, run=False),
    Case("required-late", SNP, snp(adding(AREA, INSERT, REQUIRED)), None, run=False),
    Case("required-vtl", NATIVE, adding(RequiredMemory(0x10_0000, 1, 4096, 1)), None),
    Case("", SNP, snp(EARLY), None),
    Case("", SNP, snp(PENDING), None),
    Case("memory-required", NATIVE, adding(RequiredMemory(0x2000_0000, 1, 0x10_0000)), None),
    Case("page-type-native", NATIVE, page(kind=PageDataType.SECRETS), None),
    Case("page-twice", NATIVE, page(0x5000, times=2), None),
    Case("page-twice", SEV, page(0x5000, times=2), None, run=False),
    Case("page-twice", NATIVE, both(page(0x10_0000), adding(AREA, INSERT)), None),
    Case("page-twice", NATIVE, both(adding(AREA, HIGH), page(0x20_0000, LARGE)), None),
    Case("page-twice", SNP, snp(both(adding(AREA, INSERT), page(0x10_0000))), None, run=False),
    Case(
        "page-twice", NATIVE,
        adding(AREA, ParameterArea(8192, 1), INSERT, ParameterInsert(0xF_F000, 1, 1)), None,
    ),
    Case("page-shared", SEV, page(0x5000, flags=PageDataFlags.SHARED), None),
    Case("page-type", SEV, page(0x5000, kind=PageDataType.SECRETS), "SEV-SNP is not supported"),
    Case("page-type", SEV_ES, page(kind=PageDataType.CPUID_DATA), "SEV-SNP is not supported"),
    Case("unmeasured-plain", SEV, page(0x5000, flags=PageDataFlags.UNMEASURED), None),
    Case("unmeasured-plain", SEV_ES, adding(AREA, INSERT), None),
    Case("context-index", NATIVE, native_context(0, 1), "BSP only"),
    Case("context-index", SEV_ES, context(0, 1, 2), "out of bounds CPU index 2"),
    Case("context-twice", SEV_ES, context(0, 1, 1), None),
    Case("context-missing", SEV_ES, context(0), None),
    Case("vmsa-gpa", SEV_ES, context(0, 1, gpa=0x1000), "VMSA GPA must be FFFFFFFFF000"),
    Case("vmsa-gpa", SNP, snp(context(0, gpa=0, features=1)), "VMSA GPA must be FFFFFFFFF000"),
    Case("vmsa-features", SEV_ES, context(0, 1, features=1), "SEV_SNP is not enabled but is"),
    Case("vmsa-features", SEV_ES, context(0, 1, features=0x20), "unsupported sev_features"),
    Case("vmsa-features", SNP, snp(context(0)), "SEV_SNP is enabled but is not enabled in VMSA"),
    Case("vmsa-registers", SEV_ES, context(0, 1, star=1), "not synchronized with KVM"),
    Case("vmsa-registers", SNP, snp(context(0, features=1, cpl=3)), "not synchronized with KVM"),
    Case("vmsa-measured", SEV_ES, context(0, 1, cr4=0), None),
    Case("id-block-twice", SNP, snp(adding(ID_BLOCK, ID_BLOCK)), "Multiple ID blocks"),
    Case("policy-ignored", SEV, adding(GuestPolicy(3, 1)), None),
    Case("policy-missing", SNP, page(0x5000), None, run=False, fine_since=(11, 0)),
    Case("policy-missing", SNP, adding(ID_BLOCK), None, run=False),
    Case("policy-invalid", SNP, adding(GuestPolicy(0, 1)), None, run=False, fine_since=(11, 0)),
    Case("policy-invalid", SNP, adding(GuestPolicy(1, 1)), None, run=False),
]  # fmt: skip
CONTEXT_SEV = Case("context-sev", SEV, native_context(0), "SEV-ES is not supported")


def build(case: Case) -> bytes:
    builder = ImageBuilder()
    builder.add(samples.platform(case.declared or case.platform, 1))
    builder.add_page(0x9000, 1, samples.PAGE)
    case.build(builder)
    return builder.build()


def name_of(case: Case) -> str:
    return f"{case.rule or 'fine'}-{case.platform}"


def launch(
    qemu: Path, file: Path, platform: Platform, native: Sequence[str] = ("-accel", "tcg")
) -> tuple[bool, str]:
    """Whether QEMU gets through its launch, and what it said; `native`: options of such a guest."""
    objects = {
        NATIVE: "",
        SEV: "sev-guest,id=sev0,policy=1",
        SEV_ES: "sev-guest,id=sev0,policy=5",
        SNP: "sev-snp-guest,id=sev0,policy=0x30000",
    }
    machine = "q35,igvm-cfg=igvm0"
    command = [str(qemu), "-object", f"igvm-cfg,id=igvm0,file={file}", "-smp", "2"]
    if platform is NATIVE:
        command += native
    else:
        machine += ",confidential-guest-support=sev0"
        command += ["-accel", "kvm", "-cpu", "EPYC-v4", "-object"]
        command += [f"{objects[platform]},cbitpos=0,reduced-phys-bits=1"]
    command += [
        "-machine", machine, "-m", "512", "-nodefaults", "-display", "none", "-vga", "none",
        "-L", "/usr/share/seabios", "-S", "-qmp", "stdio",
    ]  # fmt: skip
    words = ["qmp_capabilities", *(["cont"] if platform is SNP else []), "quit"]
    typed = "".join(json.dumps({"execute": word}) + "\n" for word in words)
    done = subprocess.run(
        command, input=typed, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode == 0, done.stderr


@pytest.fixture(params=["10.2", "11.0"])
def qemu(request: pytest.FixtureRequest) -> Path:
    """A release of QEMU with IGVM."""
    path = printed("build-qemu.sh", request.param)
    need(path.exists(), f"QEMU {request.param} with IGVM support")
    return path


@pytest.fixture
def emulators(
    request: pytest.FixtureRequest, qemu: Path, tmp_path: Path
) -> Callable[[Platform], Path]:
    """The release for a platform: for those of SEV, on the stand-in host."""

    def emulator(platform: Platform) -> Path:
        if platform is NATIVE:
            return qemu
        request.getfixturevalue("dev_sev")
        return make_emulator(tmp_path, qemu).path

    return emulator


@pytest.mark.parametrize("case", [*CASES, CONTEXT_SEV], ids=name_of)
def test_the_verdict_is_qemus(
    case: Case, emulators: Callable[[Platform], Path], qemu: Path, tmp_path: Path
) -> None:
    file = tmp_path / "case.igvm"
    data = build(case)
    file.write_bytes(data)
    release = acceptance_of(probe(qemu).version)
    findings = check_image(IgvmFile.parse(data), case.platform, release, GUEST)
    rules = case.rules(release)
    assert {finding.rule for finding in findings} == rules, findings
    if case.rule in rules and not case.run:
        assert refuses(findings)
        return
    launched, said = launch(emulators(case.platform), file, case.platform)
    if "sev-launch" in rules:
        assert not launched
        assert refuses(findings)
        assert "Guest state is invalid" in said or (case.said and case.said in said)
    elif case.said is None or case.rule not in rules:
        assert launched, said
        # a fallback is QEMU's choice, and never what was asked for
        assert not refuses(findings) or case.rule == "platform-fallback"
    else:
        assert not launched
        assert case.said in said
        assert refuses(findings)


def test_what_qemu_does_with_a_hole_is_the_reason_for_its_rule(
    igvm_qemu: Path, tmp_path: Path
) -> None:
    """A parameter outside its area: QEMU writes there, into whatever it meets."""
    case = next(case for case in CASES if case.rule == "parameter-outside")
    far = ImageBuilder()
    far.add(samples.platform(NATIVE, 1))
    far.add_page(0x9000, 1, samples.PAGE)
    far.add(AREA)
    far.add(VpCount(0, 0x7FFF_F000))  # 2 GiB behind an area of 4 KiB
    file = tmp_path / "far.igvm"
    file.write_bytes(far.build())
    findings = check_image(IgvmFile.parse(file.read_bytes()), NATIVE, acceptance_of((10, 2)), GUEST)
    assert [finding.rule for finding in findings] == [case.rule]
    launched, _ = launch(igvm_qemu, file, NATIVE)
    assert not launched  # it crashes: nothing is mapped there


def test_the_madt_of_many_processors_needs_its_area(tmp_path: Path) -> None:
    """Also with QEMU: 376 are the most whose MADT is no larger than a page."""
    emulator = printed("build-qemu.sh", "11.0")
    need(emulator.exists(), "QEMU 11.0 with IGVM support")
    need(os.access("/dev/kvm", os.R_OK | os.W_OK), "KVM (read and write access to /dev/kvm)")
    builder = ImageBuilder()
    builder.add(samples.platform(NATIVE, 1))
    builder.add_page(0x9000, 1, samples.PAGE)
    adding(AREA, Madt(0, 0), INSERT)(builder)
    file = tmp_path / "madt.igvm"
    file.write_bytes(builder.build())
    image = IgvmFile.parse(file.read_bytes())
    for vcpus, rules in ((376, []), (377, ["madt-size"])):
        findings = check_image(image, NATIVE, acceptance_of((11, 0)), Guest(vcpus=vcpus))
        assert [finding.rule for finding in findings] == rules
        # more than 255 need an interrupt controller that QEMU has a part of, and x2APIC
        options = ["-accel", "kvm", "-machine", "kernel-irqchip=split", "-cpu", "EPYC-v4,x2apic=on"]
        launched, said = launch(emulator, file, NATIVE, [*options, "-smp", str(vcpus)])
        assert launched != refuses(findings), said
        assert launched or "MADT size exceeds" in said


# rules whose breach QEMU 10.2 cannot show here
UNTRIED = {
    "platform-unsupported",  # no TDX guest without TDX
    "context-native",  # QEMU 10.1 alone
    "context-form",  # only behind a fallback to another platform
    "empty",
}


def test_every_rule_is_documented_and_tried() -> None:
    root = Path(__file__).parents[2]
    documented = set(re.findall(r"^\| `([a-z-]+)`", (root / "docs/check.md").read_text(), re.M))
    sources = [*(root / "igvmfw").glob("check*.py"), root / "igvmfw/findings.py"]
    code = "".join(path.read_text() for path in sources)
    rules = set(re.findall(r'\b(?:error|warning)\(\s*"([a-z-]+)"', code))
    assert documented == rules
    tried = {case.rule for case in (*CASES, CONTEXT_SEV) if case.rule}
    tried |= {"sev-launch", "madt-size"}
    assert tried == rules - UNTRIED
