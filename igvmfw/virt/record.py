"""What igvmfw keeps in a domain's metadata: the request, what was chosen, and the way back.

libvirt keeps one top element per namespace in `<metadata>` and does not look into it
(docs/formatdomain.rst, "General metadata").  Ours is `domain` in NAMESPACE:

    <igvmfw:domain xmlns:igvmfw='urn:igvmfw:domain:1' made='metadata commandline' policy='0x3'>
      <igvmfw:file path='…' sha256='…' platform='sev' descriptor='…' measurement='…'
                   on-change='warn' lock-memory='no'/>
      <igvmfw:state interface='virtio-blk-mmio' size='8388608' path='…' template='…'
                    planes='yes'/>
      <igvmfw:request firmware='igvm'>
        <igvmfw:taken index='1'><firmware>…</firmware></igvmfw:taken>
      </igvmfw:request>
      <igvmfw:before firmware='efi'> … </igvmfw:before>
    </igvmfw:domain>

`request` holds what was taken out of `<os>` so that libvirt accepts the domain, `before` what was
there when the domain still had bios or efi firmware; `made` names the elements that igvmfw added,
`policy` the guest policy that it filled in; `on-change` stands only where a changed file shall not
stop a start, `lock-memory` only where igvmfw shall not lock the guest's memory.  `state` is where
the vTPM in the file keeps its state; it has no path where its interface is one that QEMU does not
have.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from lxml import etree

from igvmfw.errors import DomainError
from igvmfw.platforms import Platform
from igvmfw.virt.document import indent, insert, put_back, remove
from igvmfw.virt.domain import Domain, only, place

NAMESPACE = "urn:igvmfw:domain:1"
_ATTRIBUTES = ("made", "policy")
_MAX_TAKEN = 4  # loader, nvram, varstore, firmware
_HEX = re.compile(r"[0-9a-f]+")
_SIZE = re.compile(r"[1-9][0-9]{0,15}")
_POLICY = re.compile(r"0x[0-9a-f]{1,16}")


def _tag(name: str) -> str:
    return f"{{{NAMESPACE}}}{name}"


class Part(StrEnum):
    """What `<os>` lost on the way to XML that libvirt takes."""

    REQUEST = "request"
    BEFORE = "before"


class OnChange(StrEnum):
    """What a start does when the file is no longer the one that was chosen."""

    REFUSE = "refuse"
    WARN = "warn"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """The IGVM file a domain was given.

    Attributes:
        path: Where it is.
        sha256: Of its content when it was chosen, hexadecimal.
        platform: What the guest takes from it.
        descriptor: File name of the firmware descriptor that it was chosen by.
        measurement: The launch digest to expect, hexadecimal.
        on_change: What a start does when the content is another.
        lock_memory: Whether igvmfw is to lock the guest's memory where that is needed.
    """

    path: str
    sha256: str
    platform: Platform
    descriptor: str | None = None
    measurement: str | None = None
    on_change: OnChange = OnChange.REFUSE
    lock_memory: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where the vTPM in a domain's firmware keeps its state.

    Attributes:
        interface: How the firmware reaches it, in the descriptor's word.
        size: Of the file, in bytes.
        path: The file; None where QEMU cannot give the firmware such an interface.
        template: The file that it starts as; None for one that the firmware formats by itself.
        planes: Whether QEMU is told which plane of the guest it belongs to.
    """

    interface: str
    size: int
    path: str | None = None
    template: str | None = None
    planes: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """A view of igvmfw's element in the metadata."""

    domain: Domain
    element: "etree._Element"

    @classmethod
    def find(cls, domain: Domain) -> Self | None:
        """The record of a domain that igvmfw has worked on."""
        metadata = only(domain.root, "metadata")
        element = None if metadata is None else only(metadata, _tag("domain"))
        return None if element is None else cls(domain, element)

    @classmethod
    def make(cls, domain: Domain) -> Self:
        """The record, made when there is none."""
        found = cls.find(domain)
        if found is not None:
            return found
        metadata, made = domain.section("metadata")
        element = etree.Element(_tag("domain"), nsmap={"igvmfw": NAMESPACE})
        insert(metadata, len(metadata), element)
        if made:
            indent(metadata)
        record = cls(domain, element)
        if made:
            record.made("metadata")
        return record

    def remove(self) -> None:
        """Take the record out, and the metadata with it where igvmfw made it."""
        metadata, made = self.element.getparent(), self.has_made("metadata")
        remove(self.element)
        if made and metadata is not None and not len(metadata):
            remove(metadata)

    @property
    def file(self) -> File | None:
        """What was chosen; None for a domain that was not rewritten yet.

        Raises:
            DomainError: Someone damaged the record.
        """
        element = only(self.element, _tag("file"))
        if element is None:
            return None
        path, sha256 = element.get("path"), element.get("sha256", "")
        measurement = element.get("measurement")
        platform = element.get("platform")
        on_change = element.get("on-change", OnChange.REFUSE)
        lock_memory = element.get("lock-memory", "yes")
        if (
            not path
            or len(sha256) != 64
            or not _HEX.fullmatch(sha256)
            or (measurement is not None and not _HEX.fullmatch(measurement))
            or platform not in tuple(Platform)
            or on_change not in tuple(OnChange)
            or lock_memory not in ("yes", "no")
        ):
            raise _damaged(element)
        return File(
            path=path,
            sha256=sha256,
            platform=Platform(platform),
            descriptor=element.get("descriptor"),
            measurement=measurement,
            on_change=OnChange(on_change),
            lock_memory=lock_memory == "yes",
        )

    def set_file(self, file: File) -> None:
        """Record what was chosen."""
        values = {
            "path": file.path,
            "sha256": file.sha256,
            "platform": file.platform.value,
            "descriptor": file.descriptor,
            "measurement": file.measurement,
            "on-change": file.on_change if file.on_change is not OnChange.REFUSE else None,
            "lock-memory": None if file.lock_memory else "no",
        }
        element = self._part("file", first=True)
        for name, value in values.items():
            _set(element, name, value)

    @property
    def state(self) -> State | None:
        """Where the vTPM keeps its state; None where there is none to keep.

        Raises:
            DomainError: Someone damaged the record.
        """
        element = only(self.element, _tag("state"))
        if element is None:
            return None
        interface, size = element.get("interface"), element.get("size", "")
        path, template = element.get("path"), element.get("template")
        absolute = all(name is None or name.startswith("/") for name in (path, template))
        if not interface or not _SIZE.fullmatch(size) or not absolute:
            raise _damaged(element)
        return State(
            interface=interface,
            size=int(size),
            path=path,
            template=template,
            planes=element.get("planes") == "yes",
        )

    def set_state(self, state: State | None) -> None:
        """Record where the vTPM keeps its state; None where there is none to keep."""
        if state is None:
            self.drop("state")
            return
        element = self._part("state")
        _set(element, "interface", state.interface)
        _set(element, "size", str(state.size))
        _set(element, "path", state.path)
        _set(element, "template", state.template)
        _set(element, "planes", "yes" if state.planes else None)

    @property
    def policy(self) -> int | None:
        """The guest policy that igvmfw filled in.

        Raises:
            DomainError: Someone damaged the record.
        """
        text = self.element.get("policy")
        if text is None:
            return None
        if not _POLICY.fullmatch(text):
            raise _damaged(self.element)
        return int(text, 16)

    def set_policy(self, policy: int | None) -> None:
        """Record the guest policy that igvmfw filled in; None when the domain has its own."""
        self._set_attribute("policy", None if policy is None else f"0x{policy:x}")

    @property
    def chosen(self) -> bool:
        """Whether a file, or a place for a vTPM's state, was recorded.

        Raises:
            DomainError: Someone damaged the record.
        """
        return self.file is not None or self.state is not None

    def damaged(self) -> DomainError:
        """The error of a record that igvmfw cannot have made."""
        return _damaged(self.element)

    def made(self, *names: str) -> None:
        """Record that igvmfw made these elements."""
        known = self.element.get("made", "").split()
        self._set_attribute("made", " ".join(sorted({*known, *names})))

    def has_made(self, name: str) -> bool:
        """Whether igvmfw made the element."""
        return name in self.element.get("made", "").split()

    def forget(self, name: str) -> None:
        """Record that the element is gone again."""
        known = [word for word in self.element.get("made", "").split() if word != name]
        self._set_attribute("made", " ".join(known) or None)

    def has(self, part: Part) -> bool:
        """Whether something was taken out of `<os>` under this name."""
        return only(self.element, _tag(part)) is not None

    def drop(self, *names: str) -> None:
        """Take parts out of the record."""
        for name in names:
            element = only(self.element, _tag(name))
            if element is not None:
                remove(element)

    def take(self, part: Part, *tags: str) -> None:
        """Move the `firmware` attribute and these children of `<os>` into the record."""
        os = self.domain.os.element
        holder = self._part(part)
        firmware = os.get("firmware")
        if firmware is not None:
            holder.set("firmware", firmware)
            del os.attrib["firmware"]
        for child in [child for child in os if child.tag in tags]:
            taken = etree.Element(_tag("taken"), {"index": str(os.index(child))})
            lead = remove(child)
            if lead is not None:
                taken.set("lead", lead)
            insert(holder, len(holder), taken)
            taken.append(child)
        indent(holder)

    def give_back(self, part: Part) -> None:
        """Put back into `<os>` what `take` moved.

        Raises:
            DomainError: `<os>` has got other firmware since, or the record is damaged.
        """
        os = self.domain.os
        holder = only(self.element, _tag(part))
        if holder is None:
            return
        if os.firmware is not None or os.loader is not None or os.variables is not None:
            raise DomainError(
                "other firmware was put into <os> after igvmfw rewrote the domain",
                where=place(os.element),
                hint="remove it there, with virsh edit where libvirt has the domain, or remove "
                "igvmfw's element from <metadata>",
            )
        elements = holder.findall(_tag("taken"))
        if len(elements) > _MAX_TAKEN:
            raise _damaged(holder)
        for taken in reversed(elements):
            index = taken.get("index", "")
            if len(taken) != 1 or not (index.isascii() and index.isdigit()):
                raise _damaged(taken)
            put_back(os.element, int(index[:9]), taken[0], taken.get("lead"))
        firmware = holder.get("firmware")
        if firmware is not None:
            os.element.set("firmware", firmware)
        self.drop(part)

    def _set_attribute(self, name: str, value: str | None) -> None:
        """Set an attribute, in one order: a record that says the same again reads the same."""
        values = {known: self.element.get(known) for known in _ATTRIBUTES} | {name: value}
        for known, text in values.items():
            _set(self.element, known, None)
            _set(self.element, known, text)

    def _part(self, name: str, *, first: bool = False) -> "etree._Element":
        element = only(self.element, _tag(name))
        if element is None:
            element = etree.Element(_tag(name), nsmap={"igvmfw": NAMESPACE})
            insert(self.element, 0 if first else len(self.element), element)
            if len(self.element) == 1:
                indent(self.element)
        return element


def _damaged(element: "etree._Element") -> DomainError:
    return DomainError(
        "igvmfw's record in <metadata> is damaged",
        where=place(element),
        hint="remove igvmfw's element from <metadata> and let igvmfw rewrite the domain anew",
    )


def _set(element: "etree._Element", name: str, value: str | None) -> None:
    if value is not None:
        element.set(name, value)
    elif name in element.attrib:
        del element.attrib[name]
