"""Reading like the reference crate does, over thousands of made and mutated files.

`crate/` is a small program around the crate igvm 0.5.0; docs/format.md lists the differences that
are meant, which `STRICTER` and `LAXER` name here.
"""

import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from igvmfw.errors import IgvmError
from igvmfw.igvm.headers import (
    CorimDocument,
    CorimSignature,
    Header,
    PageData,
    ParameterArea,
    RawHeader,
    RelocatableRegion,
    RequiredMemory,
    SnpIdBlock,
    VbsMeasurement,
    VersionString,
    VpContext,
)
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import Vmm, launch_digest
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import OPTIONAL_BIT, PlatformType, type_name
from igvmfw.igvm.vpcontext import CCA, NATIVE, parse_vbs
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from tests.igvm import digests, samples
from tests.igvm.generated import Generator
from tests.igvm.mutations import mutated

COUNT = 3000
GENERATED = 300
SEED = 20260711

# igvmfw refuses, the crate accepts: rule → what igvm_defs says of it
STRICTER = {
    "padding": "the padding must be zero",
    "variable-header-offset": "behind the fixed header, and aligned to 8 bytes",
    "alignment": "2 MiB pages are aligned to 2 MiB; the size of an error range to pages",
    "vp-context": "the GPA of a context must be zero on native, SEV and VBS",
    "relocation": "a region that is empty or wraps (the crate panics on most)",
}


def crc(data: bytes | memoryview) -> str:
    return f"{len(data)}:{zlib.crc32(data):08x}"


def notation(image: IgvmFile) -> list[str]:
    """A file's content as the reference program writes it."""
    lines = [line(image, h) for h in (*image.platforms, *image.initializations, *image.directives)]
    # the crate drops what applies to no platform at all; igvmfw keeps it
    return [item for item in lines if item]


def line(image: IgvmFile, header: AnyHeader) -> str:
    if isinstance(header, RawHeader | VersionString):
        return ""  # only in files that the crate refuses
    if getattr(header, "compatibility_mask", 1) == 0:
        return ""
    return " ".join((type_name(header.type), *parts(image, header)))


def parts(image: IgvmFile, header: Header) -> Iterator[str]:
    match header:
        case VpContext():
            yield from context(image, header)
        case CorimDocument() | CorimSignature():
            yield from (str(header.compatibility_mask), crc(image.data_of(header)))
        case PageData():
            for number in (header.gpa, header.compatibility_mask, header.flags, header.data_type):
                yield str(number)
            yield crc(image.data_of(header))
        case ParameterArea():
            yield from (str(header.number_of_bytes), str(header.parameter_area_index))
            yield crc(image.data_of(header))
        case RequiredMemory():
            yield from map(str, (header.gpa, header.compatibility_mask, header.number_of_bytes))
            yield str(int(header.vtl2_protectable))
        case RelocatableRegion():
            values = list(header)
            values[3] = header.flags & 7  # the crate keeps the flags it knows
            yield from map(str, values)
        case SnpIdBlock():
            yield from (str(header.compatibility_mask), crc(header.ld), str(header.guest_svn))
        case VbsMeasurement():
            yield from (str(header.compatibility_mask), str(header.version))
            yield crc(header.boot_measurement_digest)
        case _:
            named = header.fields().items()
            yield from (str(value) for name, value in named if not name.startswith("reserved"))


def context(image: IgvmFile, header: VpContext) -> Iterator[str]:
    kinds = {item.compatibility_mask: item.platform_type for item in image.platforms}
    kind = kinds[header.compatibility_mask]
    mask, index = str(header.compatibility_mask), str(header.vp_index)
    if kind == PlatformType.VSM_ISOLATION:
        found = parse_vbs(image.content[header.file_offset :], image.architecture)
        numbers = [register.number for register in found.registers]
        yield from ("vbs", mask, str(found.vtl), str(numbers))
        return
    data = image.data_of(header)
    if kind in (PlatformType.NATIVE, PlatformType.SEV):
        yield from ("native", mask, index, crc(data[: NATIVE.size]))
    elif kind == PlatformType.CCA:
        yield from ("cca", mask, index, crc(data[: CCA.size]))
    else:
        yield from (str(header.gpa), mask, index, crc(data))


def bases(ovmf_bytes: bytes) -> list[bytes]:
    words = (Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)
    small = ovmf_bytes[-16384:]  # the end holds the tables; what they point to may be missing
    return [
        samples.small(),
        samples.small(Platform.SEV_SNP, revision=1),
        samples.small(*words),
        samples.rich(),
        samples.cca(),
        wrap(small, [Platform.NATIVE, Platform.SEV_ES]),
    ]


def files(ovmf_bytes: bytes) -> Iterator[bytes]:
    chance = random.Random(SEED)
    start = bases(ovmf_bytes)
    yield from start
    for _ in range(COUNT):
        yield mutated(chance.choice(start), chance)
    generators = [Generator(chance), Generator(chance), Generator(chance, plain=True)]
    for _ in range(GENERATED):
        whole = chance.choice(generators).file()
        yield whole
        yield mutated(whole, chance)


def lax(image: IgvmFile) -> bool:
    """Whether the file has what igvm_defs allows and the crate does not read."""
    return len(image.file_data) == 0 or any(
        isinstance(header, VersionString) or header.type & OPTIONAL_BIT for header in image.headers
    )


def read(data: bytes) -> tuple[IgvmFile | None, str]:
    """What igvmfw makes of a file: the image, or the rule it breaks."""
    try:
        return IgvmFile.parse(data), ""
    except IgvmError as error:
        return None, error.message.rsplit("[", 1)[-1].rstrip("]")


@pytest.fixture(scope="module")
def verdicts(
    ovmf_bytes: bytes, reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[bytes, str]]:
    """Every file with what the reference program says of it."""
    folder = tmp_path_factory.mktemp("reference")
    contents = list(files(ovmf_bytes))
    paths = []
    for index, data in enumerate(contents):
        paths.append(folder / str(index))
        paths[-1].write_bytes(data)
    return list(zip(contents, digests.verdicts(reference, paths), strict=True))


def test_verdict_and_content_are_the_reference_crates(
    verdicts: list[tuple[bytes, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    counts: Counter[str] = Counter(files=len(verdicts))
    for index, (data, verdict) in enumerate(verdicts):
        kind, *content = verdict.split("\t")
        expected = [item for item in content if not item.startswith("digest ")]
        image, rule = read(data)
        if image is None:
            if kind == "ok":
                assert rule in STRICTER, f"file {index}: only igvmfw refuses: {rule}"
                counts[f"stricter: {rule}"] += 1
            else:
                counts["both refuse" if kind == "error" else "crate panics, igvmfw refuses"] += 1
        elif kind != "ok":
            assert kind == "error", f"file {index}: the crate panics, igvmfw accepts"
            assert lax(image), f"file {index}: only the crate refuses: {content}"
            counts["laxer"] += 1
        else:
            assert notation(image) == expected, f"file {index}"
            counts["both accept, content equal"] += 1
    with capsys.disabled():
        print("\nreference crate:", ", ".join(f"{n} {what}" for what, n in counts.items()))
    assert counts["both refuse"] > COUNT / 4
    assert counts["both accept, content equal"] > COUNT / 20


def compared(
    verdicts: list[tuple[bytes, str]],
    stated: Callable[[str], Mapping[Platform, str]],
    differs: Callable[[IgvmFile, Platform], bool],
    known: str,
) -> Counter[str]:
    """Every digest that a source states against ours; `differs` says which are meant to, `known`
    why."""
    counts: Counter[str] = Counter()
    for index, (data, verdict) in enumerate(verdicts):
        image, _ = read(data)
        if image is None:
            continue
        for platform, digest in stated(verdict).items():
            if differs(image, platform):
                counts[known] += 1
                continue
            own = launch_digest(image, platform, vmm=Vmm.SPEC).hex()
            assert own == digest, f"file {index}, {platform}"
            counts[f"{platform} equal"] += 1
    return counts


def test_digests_in_file_order_are_the_crates(
    verdicts: list[tuple[bytes, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    known = "files with 2 MiB pages, of which the crate measures 4 KiB"
    counts = compared(verdicts, digests.crate, digests.has_large_page, known)
    with capsys.disabled():
        print("\nthe crate's digests:", ", ".join(f"{n} {what}" for what, n in counts.items()))
    for platform in (Platform.SEV_SNP, Platform.TDX, Platform.VSM):
        assert counts[f"{platform} equal"] > GENERATED / 3


def test_digests_are_igvmmeasures_where_nothing_is_known_to_differ(
    verdicts: list[tuple[bytes, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    known = "with a known difference"
    counts = compared(verdicts, digests.igvmmeasure, digests.igvmmeasure_differs, known)
    with capsys.disabled():
        print("\nigvmmeasure's digests:", ", ".join(f"{n} {what}" for what, n in counts.items()))
    for platform in (Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP):
        assert counts[f"{platform} equal"] > GENERATED / 15


@pytest.mark.parametrize("platform", [Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP])
def test_a_wrapped_ovmf_has_the_digest_that_igvmmeasure_computes(
    platform: Platform, ovmf_bytes: bytes, reference: Path, tmp_path: Path
) -> None:
    file = tmp_path / "wrapped.igvm"
    file.write_bytes(wrap(ovmf_bytes, [Platform.NATIVE, platform], vcpus=2))
    (verdict,) = digests.verdicts(reference, [file])
    own = launch_digest(IgvmFile.parse(file.read_bytes()), platform, vmm=Vmm.SPEC).hex()
    assert digests.igvmmeasure(verdict) == {platform: own}
