"""Rewriting libvirt's own domains after damage: lossless, the same when repeated, or one error."""

import contextlib
import functools
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lxml import etree

from igvmfw.errors import IgvmfwError
from igvmfw.platforms import Platform
from igvmfw.rewrite import convert, request_of, restore, rewrite
from igvmfw.select import Choice
from igvmfw.virt.domain import Domain
from tests.sources import libvirt_source, newer_libvirt_source
from tests.test_rewrite_libvirt import corpus
from tests.virt import domains
from tests.virt.choices import canonical, chosen

# reproducible in CI
BOUNDED = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
VALUES = st.sampled_from(
    (
        "",
        "igvm",
        "efi",
        "sev",
        "sev-snp",
        "kvm",
        "q35",
        "yes",
        "no",
        "-1",
        "9" * 30,
        "0x",
        "٣",
        "\t",
    )
) | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8).filter(
    lambda text: "\ufffe" not in text and "\uffff" not in text
)
PATHS = st.sampled_from(("/a.igvm", "/a, b=c,,id=x", '/it\'s "ü" <&>;$(x)'))
ODD = (
    "<loader type='igvm'>/mine.igvm</loader>",
    "<loader>/rom</loader>",
    "<nvram/>",
    "<firmware><feature enabled='no' name='secure-boot'/></firmware>",
    "<memoryBacking> <locked/></memoryBacking>",
    "<launchSecurity type='sev'/>",
    "<metadata/>",
    "<!-- a comment -->",
    "<?an instruction?>",
    "<os/>",
    "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'/>",
    "<q:arg xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0' value='-object'/>",
)


@functools.cache
def sources() -> tuple[bytes, ...]:
    """libvirt's domains, where they can be had, and ours."""
    own = [domains.REQUEST, domains.BY_PATH, domains.SEV, domains.EFI, domains.CROWDED]
    files: list[Path] = []
    for source in (libvirt_source(), newer_libvirt_source()):
        files += corpus(source) if source is not None else []
    theirs = [data for data in (f.read_bytes() for f in files) if b"x86_64" in data]
    return (*(text.encode() for text in own), *theirs)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A domain with elements moved, doubled, dropped and put in, and values made odd."""
    places = st.integers(0, len(sources()) - 1)
    data = sources()[draw(places)]
    try:
        root = etree.fromstring(data)
    except etree.XMLSyntaxError:
        return data
    for _ in range(draw(st.integers(0, 5))):
        elements = [element for element in root.iter() if isinstance(element.tag, str)]
        element = elements[draw(st.integers(0, len(elements) - 1))]
        match draw(st.sampled_from(("value", "text", "tail", "put", "drop", "double", "move"))):
            case "value" if element.attrib:
                name = draw(st.sampled_from(sorted(map(str, element.attrib))))
                element.set(name, draw(VALUES))
            case "text":
                element.text = draw(VALUES)
            case "tail" if element is not root:
                element.tail = draw(st.sampled_from((None, "", "\n", "    ", "text")))
            case "put":
                odd = etree.fromstring(f"<x>{draw(st.sampled_from(ODD))}</x>")[0]
                element.insert(draw(st.integers(0, 3)), odd)
            case "drop" if element is not root:
                element.getparent().remove(element)  # type: ignore[union-attr]
            case "double" if element is not root:
                element.addnext(etree.fromstring(etree.tostring(element, with_tail=False)))
            case "move" if element is not root:
                root.insert(draw(st.integers(0, 5)), element)
    return etree.tostring(root, encoding="utf-8")


def choice_for(domain: Domain, path: str) -> Choice:
    request = request_of(domain)
    platform = Platform.NATIVE if request is None else request.platform
    policy = None if request is None else request.policy
    known = chosen(platform)
    return chosen(platform, path=path, policy=known.policy if policy is None else policy)


@given(damaged(), PATHS)
@BOUNDED
def test_any_domain_is_rewritten_without_loss_or_refused(data: bytes, path: str) -> None:
    try:
        before = Domain.parse(data)
        asking = convert(before, path)
        choice = choice_for(asking, path)
        after = rewrite(asking, choice).domain
    except IgvmfwError:
        return
    reread = Domain.parse(after.write())
    for result in (after, reread):
        assert rewrite(result, choice).domain is result
        assert canonical(restore(result).document.tree) == canonical(before.document.tree)


@given(damaged(), PATHS, st.data())
@BOUNDED
def test_a_rewritten_domain_that_was_damaged_is_read_or_refused(
    data: bytes, path: str, more: st.DataObject
) -> None:
    with contextlib.suppress(IgvmfwError):
        asking = convert(Domain.parse(data), path)
        after = bytearray(rewrite(asking, choice_for(asking, path)).domain.write())
        for _ in range(more.draw(st.integers(1, 4))):
            place = more.draw(st.integers(0, len(after) - 1))
            after[place : place + 1] = more.draw(st.binary(max_size=3))
        again = Domain.parse(bytes(after))
        restore(again)
        rewrite(again, choice_for(again, path))
