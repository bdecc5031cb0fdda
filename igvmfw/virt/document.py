"""Lossless XML: what is not changed is written as it was read.

The tree is the truth: comments, order, whitespace, unknown elements and foreign namespaces stay
in it.  Inserting keeps the indentation of the neighbours, and removing is its exact inverse.
Input is not trusted: no DTD, no entities, no network, bounded size and depth.
"""

import copy
import re
from dataclasses import dataclass

from lxml import etree

from igvmfw.errors import DomainError
from igvmfw.kinds import IGVM, XML, kind_of

# libvirt's protocol carries no longer string (VIR_NET_MESSAGE_STRING_MAX, virnetprotocol.x), so
# no daemon would take a longer document
MAX_BYTES = 4 << 20
MAX_DEPTH = 256  # elements; libxml2's own bound in the versions libvirt was long built with

_PROLOG = re.compile(r"(?>\s+|<\?(?>.*?\?>)|<!--(?>.*?-->))*", re.DOTALL)
_DECLARATION = re.compile(r"<\?xml\s[^>]*\?>")
_ENCODING = re.compile(r"""\sencoding\s*=\s*["']([^"']*)["']""")
_UTF8 = ("utf-8", "utf8")
_ASCII = ("us-ascii", "ascii")  # what Python's XML libraries declare unless they are told otherwise
_TOKEN = re.compile(r"<!--.*?-->|<!\[CDATA\[.*?\]\]>|<\?.*?\?>|<[^>]*>", re.DOTALL)
_DOUBLE_QUOTED = re.compile(r'="([^"]*)"')
_FIRST_QUOTE = re.compile(r"""<[^<!?>"']*=\s*(["'])""")


@dataclass(frozen=True, slots=True)
class _Style:
    """How the source was written, as far as the tree does not hold it."""

    prolog: str = ""
    single_quotes: bool = True
    final_newline: bool = True
    ascii: bool = False


class Document:
    """An XML document that is written back as it was read, except for what was changed."""

    __slots__ = ("_pristine", "_source", "_style", "tree")

    def __init__(
        self,
        tree: "etree._ElementTree",
        style: _Style,
        source: bytes,
        pristine: str | None = None,
    ) -> None:
        self.tree = tree
        self._style = style
        self._source = source
        self._pristine = self.text() if pristine is None else pristine

    @classmethod
    def parse(cls, data: bytes) -> "Document":
        """Read a document.

        Args:
            data: The text, UTF-8 or declared as ASCII; a byte order mark is taken.
        Raises:
            DomainError: It has another encoding, is not well-formed, has a DOCTYPE, or exceeds a
                bound.
        """
        text = _decode(data)
        parser = etree.XMLParser(
            encoding="utf-8",
            resolve_entities=False,
            load_dtd=False,
            no_network=True,
            huge_tree=False,
            strip_cdata=False,
        )
        try:
            root = etree.fromstring(text.encode(), parser)
        except etree.XMLSyntaxError as error:
            line, column = error.position
            # libxml2 says the place as well
            message = (error.msg or "no content").removesuffix(f", line {line}, column {column}")
            several = "Extra content" in message
            raise DomainError(
                f"not well-formed XML: {message}",
                where=f"line {line}, column {column}",
                hint="give one domain; virt-install prints one with --print-xml 2"
                if several
                else None,
            ) from None
        _check_depth(root)
        prolog = _PROLOG.match(text)
        quote = _FIRST_QUOTE.search(text)
        style = _Style(
            prolog=prolog.group() if prolog else "",
            single_quotes=quote is None or quote.group(1) == "'",
            final_newline=text.endswith("\n"),
            ascii=_encoding(text).lower() in _ASCII,
        )
        return cls(root.getroottree(), style, data)

    @property
    def root(self) -> "etree._Element":
        """The document's only top element."""
        return self.tree.getroot()

    def write(self) -> bytes:
        """The document's bytes, encoded as declared: the source's own where nothing was changed."""
        text = self.text()
        return self._source if text == self._pristine else text.encode()

    def copy(self) -> "Document":
        """An independent document with the same content and the same way of writing it."""
        return Document(copy.deepcopy(self.tree), self._style, self._source, self._pristine)

    def text(self) -> str:
        """The document written anew, in the source's style: what a comparison goes by."""
        nodes = [self.root, *self.root.itersiblings()]  # comments may follow the top element
        text = "\n".join(
            etree.tostring(node, encoding="unicode", with_tail=False) for node in nodes
        )
        if self._style.single_quotes:
            text = _TOKEN.sub(_requote, text)
        text = f"{self._style.prolog}{text}{chr(10) if self._style.final_newline else ''}"
        return text.encode("ascii", "xmlcharrefreplace").decode() if self._style.ascii else text


def insert(parent: "etree._Element", index: int, element: "etree._Element") -> None:
    """Insert so that the indentation of the neighbours goes on.

    Args:
        parent: Gets the element.
        index: Position among the children, comments included; the end when beyond it.
        element: What to insert; its own tail is replaced.
    """
    index = min(index, len(parent))
    before = _text_before(parent, index)
    if not _is_blank(before):
        element.tail = None
    else:
        if 0 < index == len(parent) and _is_blank(parent.text):
            _set_text_before(parent, index, parent.text)
        element.tail = before
    parent.insert(index, element)  # lxml moves the tail along


def remove(element: "etree._Element") -> str | None:
    """Remove an element with the whitespace that led to it: the inverse of `insert`.

    Returns:
        That whitespace, when it is not the one `insert` would put there again.
    """
    parent = element.getparent()
    if parent is None:
        raise ValueError("the top element cannot be removed")
    index = parent.index(element)
    lead, tail = _text_before(parent, index), element.tail
    parent.remove(element)  # lxml takes the tail away with the element
    element.tail = None
    if not _is_blank(lead):
        _set_text_before(parent, index, f"{lead}{tail or ''}")
        return None
    _set_text_before(parent, index, tail)
    last = 0 < index == len(parent) and _is_blank(parent.text)
    usual = parent.text if last else tail
    return None if lead == usual else lead or ""


def put_back(
    parent: "etree._Element", index: int, element: "etree._Element", lead: str | None
) -> None:
    """Insert what `remove` took away, with the whitespace that it returned."""
    insert(parent, index, element)
    if lead is not None:
        _set_text_before(parent, min(index, len(parent) - 1), lead or None)


def indent(element: "etree._Element") -> None:
    """Put each child of a newly inserted element on its own line, as its surroundings have it."""
    parent = element.getparent()
    if parent is None or not len(element):
        return
    lead = _text_before(parent, parent.index(element))
    if lead is None or "\n" not in lead or not lead.isspace():
        return
    grand = parent.getparent()
    outer = "\n" if grand is None else _text_before(grand, grand.index(parent)) or ""
    inner = lead + ((lead.removeprefix(outer) if lead.startswith(outer) else "") or "  ")
    element.text = inner
    for child in element:
        child.tail = inner
    element[-1].tail = lead


def _encoding(text: str) -> str:
    """What an XML declaration says, without one what it is then."""
    declaration = _DECLARATION.match(text)
    stated = _ENCODING.search(declaration.group()) if declaration else None
    return stated.group(1) if stated else "UTF-8"


def _decode(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise DomainError(f"larger than {MAX_BYTES} bytes, more than libvirt itself takes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = kind_of(data)
        if kind is None or kind is XML:
            raise DomainError(
                "not UTF-8 text",
                where=f"byte {error.start}",
                hint="libvirt's XML is UTF-8: convert it with iconv -t UTF-8",
            ) from None
        raise DomainError(
            f"not a domain XML: it is {kind.name}",
            where="byte 0",
            hint="a domain names its IGVM file in <loader type='igvm'>, or gets it by --igvm=FILE"
            if kind is IGVM
            else kind.remedy,
        ) from None
    name = _encoding(text)
    if name.lower() not in _UTF8 and not (name.lower() in _ASCII and text.isascii()):
        raise DomainError(
            f"encoding {name[:40]!r} is not supported",
            where="line 1",
            hint="libvirt's XML is UTF-8: convert it with iconv -t UTF-8, and correct line 1",
        )
    prolog = _PROLOG.match(text)
    if prolog and text.startswith("<!DOCTYPE", prolog.end()):
        raise DomainError(
            "a document type declaration is not accepted",
            where=f"line {text.count(chr(10), 0, prolog.end()) + 1}",
            hint="a domain XML needs none; remove it",
        )
    return text


def _check_depth(root: "etree._Element") -> None:
    depth = 0
    for event, element in etree.iterwalk(root, events=("start", "end")):
        depth += 1 if event == "start" else -1
        if depth > MAX_DEPTH:
            raise DomainError(
                f"elements nested deeper than {MAX_DEPTH}", where=f"line {element.sourceline}"
            )


def _requote(match: re.Match[str]) -> str:
    token = match.group()
    if token.startswith(("<!", "<?")):
        return token
    # libvirt writes &apos; in its single-quoted values (virBufferEscapeString)
    return _DOUBLE_QUOTED.sub(
        lambda value: "='" + value.group(1).replace("'", "&apos;") + "'", token
    )


def _is_blank(text: str | None) -> bool:
    return not text or text.isspace()


def _text_before(parent: "etree._Element", index: int) -> str | None:
    return parent.text if index == 0 else parent[index - 1].tail


def _set_text_before(parent: "etree._Element", index: int, text: str | None) -> None:
    if index == 0:
        parent.text = text
    else:
        parent[index - 1].tail = text
