"""Reading and writing: nothing is lost, nothing is believed, nothing is copied needlessly."""

import random
import tracemalloc
from pathlib import Path

import pytest

from igvmfw.errors import IgvmError
from igvmfw.files import content_of
from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import (
    HEADERS,
    CcaPolicy,
    ErrorRange,
    Madt,
    PageData,
    Parameter,
    ParameterArea,
    ParameterInsert,
    RawHeader,
    RequiredMemory,
    SnpIdBlock,
    SupportedPlatform,
    VpContext,
)
from igvmfw.igvm.image import IgvmFile, assemble, serialize
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import OPTIONAL_BIT, HeaderType
from igvmfw.platforms import Platform
from tests.igvm import samples

FILES = {
    "native": samples.small(),
    "revision 1": samples.small(Platform.SEV_SNP, revision=1),
    "all platforms": samples.small(
        Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP
    ),
    "rich": samples.rich(),
    "cca": samples.cca(),
}


@pytest.mark.parametrize("name", FILES)
def test_writing_gives_back_what_was_read(name: str) -> None:
    assert IgvmFile.parse(FILES[name]).write() == FILES[name]


@pytest.mark.parametrize("kind", sorted(HEADERS))
def test_every_header_survives_its_bytes(kind: int) -> None:
    cls = HEADERS[kind]
    size = cls.LAYOUT.size if hasattr(cls, "LAYOUT") else 21
    body = bytes(random.Random(kind).randbytes(size))
    header = cls.parse(body)
    assert header.write() == body
    assert type(header) is cls
    assert header.type == kind == cls.TYPE


@pytest.mark.parametrize("name", ["native", "rich"])
def test_every_prefix_is_refused_with_a_place(name: str) -> None:
    data = FILES[name]
    for end in range(len(data)):
        with pytest.raises(IgvmError) as caught:
            IgvmFile.parse(data[:end])
        assert caught.value.where


@pytest.mark.parametrize("name", list(FILES))
def test_any_changed_byte_gives_a_model_or_an_igvm_error(name: str) -> None:
    data = bytearray(FILES[name])
    end = IgvmFile.parse(FILES[name]).fixed.file_data_offset
    for position in range(end):
        for bit in (0x01, 0x80, 0xFF):
            data[position] ^= bit
            lenient_read(bytes(data))  # gets past the checksum, to the rules behind it
            with pytest.raises(IgvmError):  # strictly, the checksum covers every header byte
                IgvmFile.parse(bytes(data))
            data[position] ^= bit


def lenient_read(data: bytes) -> None:
    try:
        image = IgvmFile.parse(data, lenient=True)
    except IgvmError:
        return
    assert image.problems
    for header in image.headers:
        try:
            image.data_of(header)
        except IgvmError:
            continue


def test_data_behind_the_headers_may_be_anything() -> None:
    data = bytearray(FILES["native"])
    data[-1] ^= 0xFF
    assert IgvmFile.parse(bytes(data)).write() == bytes(data)


def test_what_is_read_does_not_change(tmp_path: Path) -> None:
    path = tmp_path / "small.igvm"
    path.write_bytes(FILES["native"])
    with content_of(path) as view, path.open("r+b") as file:
        file.write(b"other")
        file.flush()
        assert view == FILES["native"]
        assert view.readonly


def test_a_large_file_costs_its_headers_only(tmp_path: Path) -> None:
    path = tmp_path / "large.igvm"
    head = IgvmFile.parse(FILES["native"])
    size = 100 << 20
    # the same headers over 100 MiB of (sparse) file data: what the header says grows along
    fixed = head.fixed.replace(total_file_size=size)
    body = serialize(head.headers)
    data = assemble(fixed, b"", body, bytes(size - 32 - len(body)))
    path.write_bytes(data)
    del data
    tracemalloc.start()
    with content_of(path) as view:
        image = IgvmFile.parse(view)
        assert len(image.content) == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def built(*headers: AnyHeader, words: tuple[Platform, ...] = (Platform.NATIVE,)) -> bytes:
    builder = ImageBuilder()
    for index, word in enumerate(words):
        builder.add(samples.platform(word, 1 << index))
    for header in headers:
        builder.add(header)
    return builder.build()


ID_BLOCK = SnpIdBlock.parse(bytes(SnpIdBlock.LAYOUT.size))


@pytest.mark.parametrize(
    ("rule", "headers"),
    [
        ("platform-twice", [samples.platform(Platform.NATIVE, 2)]),
        ("platform-mask", [samples.platform(Platform.SEV, 6)]),
        ("platform-type", [SupportedPlatform(2, 0, 9, 1, 0)]),
        ("platform-version", [SupportedPlatform(2, 0, 2, 2, 0)]),
        ("vtl", [SupportedPlatform(2, 1, 2, 1, 0)]),
        ("alignment", [PageData(0x1001, 1, 0)]),
        ("alignment", [PageData(0x1000, 1, 0, 1)]),
        ("page-type", [PageData(0x1000, 1, 0, 0, 4)]),
        ("reserved", [PageData(0x1000, 1, 0, 0, 0, 1)]),
        ("file-data", [PageData(0x1000, 1, 8)]),
        ("file-data", [PageData(0x1000, 1, 0xFFFF_F000)]),
        ("alignment", [ParameterArea(4095, 0)]),
        ("parameter-area", [ParameterArea(4096, 0), ParameterArea(4096, 0)]),
        ("parameter-area", [ParameterInsert(0x1000, 1, 3)]),
        (
            "parameter-area",
            [ParameterArea(0, 0), ParameterInsert(0, 1, 0), Madt(0, 0)],
        ),
        ("alignment", [RequiredMemory(0x1000, 1, 1)]),
        ("alignment", [ErrorRange(0x1000, 1, 1)]),
        ("vp-context", [VpContext(0, 3, 0x1000, 0)]),
        ("header-type", [RawHeader(0x3FF, b"12345678")]),
        ("header-type", [RawHeader(0x250, b"")]),
        ("header-size", [RawHeader(HeaderType.PAGE_DATA, b"1234")]),
        ("policy", [CcaPolicy(1, 0, 0, 0, 0, 0)]),
    ],
)
def test_a_broken_rule_is_named_with_its_place(rule: str, headers: list[AnyHeader]) -> None:
    with pytest.raises(IgvmError, match=rf"\[{rule}\]") as caught:
        built(*headers)
    assert "offset 0x" in str(caught.value)


def test_a_file_needs_a_platform() -> None:
    builder = ImageBuilder()
    builder.add_page(0x1000, 1)
    with pytest.raises(IgvmError, match="no-platform"):
        builder.build()


def test_sections_must_stand_in_order() -> None:
    image = IgvmFile.parse(FILES["rich"])
    turned = assemble(image.fixed, b"", serialize(image.headers[::-1]), image.file_data)
    with pytest.raises(IgvmError):
        IgvmFile.parse(turned)
    lenient = IgvmFile.parse(turned, lenient=True)
    assert "section-order" in {problem.rule for problem in lenient.problems}


def test_an_optional_header_is_kept_and_a_mandatory_unknown_one_only_leniently() -> None:
    optional = built(RawHeader(OPTIONAL_BIT | 0x3FF, b"anything"))
    assert IgvmFile.parse(optional).write() == optional

    image = IgvmFile.parse(built())
    headers = (*image.headers, RawHeader(0x3FF, b"x" * 11))
    unknown = assemble(image.fixed, b"", serialize(headers), b"")
    with pytest.raises(IgvmError, match="header-type"):
        IgvmFile.parse(unknown)
    lenient = IgvmFile.parse(unknown, lenient=True)
    assert lenient.headers[-1] == RawHeader(0x3FF, b"x" * 11)
    assert lenient.write() == unknown


def test_equal_data_is_stored_once_and_zeroes_not_at_all() -> None:
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.NATIVE, 1))
    for gpa in range(0, 0x100000, 0x2000):
        builder.add_page(gpa, 1, samples.PAGE)
        builder.add_page(gpa + 0x1000, 1, bytes(4096))
    data = builder.build()
    image = IgvmFile.parse(data)
    assert len(image.file_data) == 4096
    assert {page.file_offset == 0 for page in image.directives if isinstance(page, PageData)} == {
        True,
        False,
    }


def test_masks_belong_to_the_file() -> None:
    image = IgvmFile.parse(FILES["all platforms"])
    assert image.supported == (
        Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP,
    )  # fmt: skip
    assert image.mask_of(Platform.SEV_SNP) == 8
    assert image.find_platform(Platform.TDX) is None
    own = [h for h in image.for_platform(Platform.SEV_ES) if isinstance(h, VpContext)]
    assert len(own) == 1
    with pytest.raises(IgvmError, match="no platform tdx"):
        image.mask_of(Platform.TDX)


def test_every_parameter_kind_is_typed() -> None:
    kinds: list[type[Parameter]] = [cls for cls in HEADERS.values() if issubclass(cls, Parameter)]
    image = IgvmFile.parse(built(ParameterArea(4096, 7), *(cls(7, 64) for cls in kinds)))
    assert [type(header) for header in image.directives[1:]] == kinds
