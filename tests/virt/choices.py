"""What tests of the rewriter share: choices without a file, and how domains compare."""

import dataclasses

from lxml import etree

from igvmfw.platforms import Platform
from igvmfw.select import Choice
from igvmfw.virt.domain import Domain

SHA256 = "0123456789abcdef" * 4


def domain(text: str) -> Domain:
    return Domain.parse(text.encode())


def chosen(platform: Platform = Platform.NATIVE, **values: object) -> Choice:
    policy = {Platform.SEV: 0x03, Platform.SEV_ES: 0x07, Platform.SEV_SNP: 0x30000}.get(platform)
    choice = Choice(
        path="/usr/share/igvm/ovmf.igvm",
        sha256=SHA256,
        platform=platform,
        descriptor="60-ovmf.json",
        policy=policy,
        measurement="ab" * 32,
    )
    return dataclasses.replace(choice, **values)  # type: ignore[arg-type]


def for_(text: str) -> Choice:
    return chosen(Platform.SEV if "launchSecurity" in text else Platform.NATIVE)


def canonical(element: "etree._Element | etree._ElementTree") -> bytes:
    """Canonical XML with comments: equal for documents that say the same.

    Source: Canonical XML 1.0 (https://www.w3.org/TR/2001/REC-xml-c14n-20010315).
    """
    tree = element if isinstance(element, etree._ElementTree) else element.getroottree()
    return etree.tostring(tree, method="c14n", with_comments=True)


def same(one: Domain, other: Domain) -> bool:
    return canonical(one.document.tree) == canonical(other.document.tree)


def without(source: Domain, *paths: str) -> bytes:
    """The canonical form without elements and without the white space between elements."""
    copy = source.copy()
    names = {"q": "http://libvirt.org/schemas/domain/qemu/1.0"}
    for path in paths:
        for element in copy.root.findall(path, names):
            parent = element.getparent()
            assert parent is not None
            parent.remove(element)
    text = etree.tostring(copy.root)
    parser = etree.XMLParser(remove_blank_text=True)
    return canonical(etree.fromstring(text, parser))
