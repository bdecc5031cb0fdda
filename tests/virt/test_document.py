"""Lossless XML: what is not changed stays, what is inserted can be removed; attacks are refused."""

import contextlib
import time
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from igvmfw.errors import DomainError
from igvmfw.virt.document import (
    MAX_BYTES,
    MAX_DEPTH,
    Document,
    insert,
    put_back,
    remove,
)
from tests.virt import domains
from tests.virt.choices import canonical

BOMB = (
    "<!DOCTYPE domain [<!ENTITY a 'aaaaaaaaaaaaaaaa'>"
    + "".join(f"<!ENTITY {chr(98 + n)} '{f'&{chr(97 + n)};' * 16}'>" for n in range(12))
    + "]><domain><name x='&l;'>&l;</name></domain>"
)


@pytest.mark.parametrize(
    "text", [domains.REQUEST, domains.BY_PATH, domains.SEV, domains.EFI, domains.CROWDED]
)
def test_an_unchanged_document_is_written_byte_for_byte(text: str) -> None:
    assert Document.parse(text.encode()).write() == text.encode()


@pytest.mark.parametrize(
    "text",
    [
        '<domain type="kvm"><name>"a" it\'s</name></domain>',
        "\ufeff<domain/>",
        "<domain><a></a>\r\n<b />\r\n</domain>\n\n<!-- x -->\n",
        "<domain a='&#10;&#9;&quot;'>&#13;</domain>",
    ],
)
def test_odd_writing_survives_when_nothing_changes(text: str) -> None:
    document = Document.parse(text.encode())
    assert document.write() == text.encode()
    assert document.copy().write() == text.encode()


def test_only_the_changed_line_changes() -> None:
    document = Document.parse(domains.CROWDED.encode())
    document.root.set("id", "4")
    before, after = domains.CROWDED.splitlines(), document.write().decode().splitlines()
    changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
    assert [b for b, _ in changed] == [line for line in before if "id='3'" in line]


def test_the_sources_quotes_are_kept() -> None:
    for text in ("<a b='1'/>", '<a b="1"/>'):
        document = Document.parse(text.encode())
        document.root.append(document.root.makeelement("c", {"d": 'it\'s "e"'}))
        quote = text[5]
        written = document.write().decode()
        assert f"b={quote}1{quote}" in written
        again = etree.fromstring(written)
        assert again[0].get("d") == 'it\'s "e"'


def test_what_is_declared_as_ascii_stays_ascii() -> None:
    root = etree.fromstring(domains.BY_PATH)
    for data in (
        etree.tostring(root, xml_declaration=True),
        ElementTree.tostring(ElementTree.fromstring(domains.BY_PATH), xml_declaration=True),
    ):
        assert b"ASCII" in data.upper()
        document = Document.parse(data)
        assert document.write() == data
        name = document.root.find("name")
        assert name is not None
        name.text = "Ge\u00e4ndert \U0001f600"
        written = document.write()
        assert written.isascii()
        assert etree.fromstring(written).findtext("name") == name.text
    with pytest.raises(DomainError, match="line 1: encoding 'ascii' is not supported"):
        Document.parse("<?xml version='1.0' encoding='ascii'?><a>\u00e4</a>".encode())


def test_a_copy_is_independent() -> None:
    document = Document.parse(domains.REQUEST.encode())
    copy = document.copy()
    copy.root.set("id", "9")
    assert document.write() == domains.REQUEST.encode()
    assert copy.write() != document.write()


BLANK = st.sampled_from([None, "\n", "\n  ", "  ", "\n\n    ", "\t"])


@st.composite
def trees(draw: st.DrawFn) -> "etree._Element":
    root = etree.Element("root")
    root.text = draw(BLANK)
    for number in range(draw(st.integers(0, 4))):
        comment = draw(st.booleans())
        child = etree.Comment("c") if comment else etree.Element(f"e{number}")
        child.tail = draw(BLANK)
        root.append(child)
    return root


@given(trees(), st.integers(0, 5))
def test_removing_is_the_inverse_of_inserting(root: "etree._Element", index: int) -> None:
    before = canonical(root)
    element = etree.Element("new")
    insert(root, index, element)
    assert canonical(root) != before
    assert remove(element) is None
    assert canonical(root) == before


@given(trees(), st.data())
def test_putting_back_is_the_inverse_of_removing(
    root: "etree._Element", data: st.DataObject
) -> None:
    before = canonical(root)
    taken = []
    for child in data.draw(st.permutations(list(root))):
        index = root.index(child)
        taken.append((index, child, remove(child)))
    for index, child, lead in reversed(taken):
        put_back(root, index, child, lead)
    assert canonical(root) == before


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_give_a_document_or_one_error(data: bytes) -> None:
    with contextlib.suppress(DomainError):
        assert Document.parse(data).write() == data


@given(st.data())
@settings(max_examples=200)
def test_a_damaged_document_gives_a_document_or_one_error(data: st.DataObject) -> None:
    source = bytearray(domains.CROWDED.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        source[data.draw(st.integers(0, len(source) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DomainError):
        assert Document.parse(bytes(source)).write() == bytes(source)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (BOMB.encode(), ("document type", "line 1")),
        (
            b"<?xml version='1.0'?>\n<!-- x -->\n<!DOCTYPE a SYSTEM 'file:///etc/passwd'><a/>",
            ("line 3",),
        ),
        (b"<!DOCTYPE a [<!ENTITY % p SYSTEM 'http://127.0.0.1:1/x'> %p;]><a/>", ("document type",)),
        (b"<a>&unknown;</a>", ("not well-formed", "line 1")),
        (b"<a>\0</a>", ("not well-formed",)),
        (b"<a>\xff</a>", ("not UTF-8", "byte 3", "iconv")),
        ("<a/>".encode("utf-16"), ("not UTF-8",)),
        (b"<?xml version='1.0' encoding='ISO-8859-1'?><a/>", ("ISO-8859-1", "iconv")),
        (b"<?xml version='1.0' encoding='UTF-7'?><a/>", ("UTF-7",)),
        (b"", ("not well-formed",)),
        (b"<a><b></a>", ("not well-formed", "line 1")),
        (b"<a/><b/>", ("not well-formed", "one domain")),
        (b"x" * (MAX_BYTES + 1), ("larger than",)),
        (b"<a>" * (MAX_DEPTH + 1) + b"</a>" * (MAX_DEPTH + 1), ("",)),
        (b"<a>" * 1_000_000, ("",)),
        (b"<a b='" + b"x" * 3_000_000 + b"'", ("not well-formed",)),
        (b"<?a" * 500_000, ("not well-formed",)),
        (b"<!--" * 500_000, ("not well-formed",)),
        (b"<?a?>" * 500_000, ("not well-formed",)),
    ],
)
def test_attacks_and_accidents_get_one_error_in_bounded_time(
    data: bytes, words: tuple[str, ...]
) -> None:
    begin = time.process_time()
    with pytest.raises(DomainError) as caught:
        Document.parse(data)
    assert time.process_time() - begin < 5  # far from it, unless something explodes
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_greatest_depth_is_taken() -> None:
    Document.parse(b"<a>" * MAX_DEPTH + b"</a>" * MAX_DEPTH)


@pytest.mark.parametrize(
    ("before", "repeated", "after"), [("<a>", "<b/>", "</a>"), ("<!--", "-<x", "--><a/>")]
)
def test_the_cost_of_a_document_grows_with_it_and_no_faster(
    before: str, repeated: str, after: str
) -> None:
    def cost(times: int) -> float:
        data = f"{before}{repeated * times}{after}".encode()
        begin = time.process_time()
        assert Document.parse(data).write() == data
        return time.process_time() - begin

    # 8 times as much; what grew with the square would take 64 times as long
    assert cost(1_000_000) < 24 * cost(125_000)
