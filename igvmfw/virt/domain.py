"""A libvirt domain: the XML as the truth, typed views on it.

Source: libvirt's docs/formatdomain.rst and src/conf/schemas/domaincommon.rng (9.0 and 11.3).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from lxml import etree

from igvmfw.errors import DomainError
from igvmfw.platforms import Platform
from igvmfw.virt.document import Document, indent, insert, remove

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
COMMANDLINE = f"{{{QEMU_NAMESPACE}}}commandline"
ARGUMENT = f"{{{QEMU_NAMESPACE}}}arg"
IGVM = "igvm"
SEV_ES_POLICY = 0x4  # policy bit 2; AMD's SEV API (publication 55766), "Guest Policy Structure"

VARIABLES = ("nvram", "varstore")  # of UEFI: in flash; or, since libvirt 12.1, kept by QEMU itself
_XML_SPACE = " \t\r\n"
_HEXADECIMAL = re.compile(r"(0[xX])?0*[0-9a-fA-F]{1,16}")  # as libvirt's schema has it
# what libvirt itself writes before an element that may have to be made (virDomainDefFormat)
_BEFORE = {
    "uuid": ("name",),
    "metadata": ("name", "uuid", "genid", "title", "description"),
    "memoryBacking": ("maxMemory", "memory", "currentMemory", "blkiotune", "memtune"),
    "policy": ("cbitpos", "reducedPhysBits"),
}
_UUID = re.compile("[0-9a-f]{32}")
_UNITS: Mapping[str, int] = {
    "b": 1,
    "bytes": 1,
    "": 1 << 10,
    **{unit: 1000**power for power, unit in enumerate(("kb", "mb", "gb", "tb"), 1)},
    **{unit: 1 << 10 * power for power, unit in enumerate(("k", "m", "g", "t"), 1)},
    **{unit: 1 << 10 * power for power, unit in enumerate(("kib", "mib", "gib", "tib"), 1)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a domain asks of its IGVM firmware.

    Attributes:
        architecture: Processor architecture, as libvirt names it.
        machine: QEMU machine type, an alias included; None for QEMU's default.
        platform: The isolation platform; for a SEV domain without a policy, whether it is SEV or
            SEV-ES is still open and `policy` is None.
        features: Feature names with True for wanted and False for unwanted.
        path: The file the domain names itself.
        policy: The SEV, SEV-ES or SEV-SNP guest policy that the domain states.
    """

    architecture: str
    machine: str | None
    platform: Platform
    features: Mapping[str, bool]
    path: str | None = None
    policy: int | None = None


@dataclass(frozen=True, slots=True)
class Loader:
    """A view of `<loader>`."""

    element: "etree._Element"

    @property
    def type(self) -> str | None:
        """How the guest gets the file: rom, pflash, or igvm in a request."""
        return self.element.get("type")

    @property
    def path(self) -> str | None:
        """The file, None when only attributes are given."""
        # as it stands: libvirt does not trim it either, and white space may be part of a name
        text = self.element.text
        return None if text is None or not text.strip() else text


@dataclass(frozen=True, slots=True)
class Os:
    """A view of `<os>`."""

    element: "etree._Element"

    @property
    def firmware(self) -> str | None:
        """The firmware asked for: bios, efi, or igvm in a request."""
        return self.element.get("firmware")

    @property
    def type(self) -> str | None:
        """The guest's kind: hvm, exe, linux, xen…"""
        element = only(self.element, "type")
        return None if element is None else (element.text or "").strip()

    @property
    def architecture(self) -> str | None:
        """The processor architecture."""
        element = only(self.element, "type")
        return None if element is None else element.get("arch")

    @property
    def machine(self) -> str | None:
        """The machine type or its alias."""
        element = only(self.element, "type")
        return None if element is None else element.get("machine")

    @property
    def loader(self) -> Loader | None:
        """The firmware file, or attributes it must have."""
        element = only(self.element, "loader")
        return None if element is None else Loader(element)

    @property
    def variables(self) -> "etree._Element | None":
        """Where UEFI variables are kept; libvirt takes one such element alone."""
        found = (only(self.element, tag) for tag in VARIABLES)
        return next((element for element in found if element is not None), None)

    @property
    def direct_kernel(self) -> bool:
        """Whether a kernel is given to QEMU instead of booting from a disk."""
        return only(self.element, "kernel") is not None

    @property
    def features(self) -> Mapping[str, bool]:
        """The firmware features asked for (True) and refused (False).

        Raises:
            DomainError: A feature has no name, is neither on nor off, or is both.
        """
        features: dict[str, bool] = {}
        firmware = only(self.element, "firmware")
        for element in () if firmware is None else firmware.findall("feature"):
            name, enabled = element.get("name"), element.get("enabled")
            if not name or enabled not in ("yes", "no"):
                raise DomainError(
                    "a firmware feature needs a name and enabled='yes' or 'no'",
                    where=place(element),
                )
            if features.setdefault(name, enabled == "yes") != (enabled == "yes"):
                raise DomainError(
                    f"firmware feature {name!r} is both wanted and unwanted",
                    where=place(element),
                    hint="keep one of the two",
                )
        return features


@dataclass(frozen=True, slots=True)
class LaunchSecurity:
    """A view of `<launchSecurity>`."""

    element: "etree._Element"

    @property
    def type(self) -> str | None:
        """The kind of protection: sev, sev-snp, tdx, s390-pv."""
        return self.element.get("type")

    @property
    def kernel_hashes(self) -> bool:
        """Whether hashes of a directly booted kernel shall be part of the measurement."""
        return self.element.get("kernelHashes") == "yes"

    @property
    def policy(self) -> int | None:
        """The guest policy.

        Raises:
            DomainError: It is no hexadecimal number, or has more bits than such a policy.
        """
        element = only(self.element, "policy")
        if element is None:
            return None
        text = (element.text or "").strip(_XML_SPACE)
        bits = 32 if self.type == "sev" else 64
        # libvirt reads it so with and without 0x
        if not _HEXADECIMAL.fullmatch(text) or int(text, 16) >= 1 << bits:
            raise DomainError(
                f"policy {text[:40]!r} is not a hexadecimal number of {bits} bits",
                where=place(element),
                hint="write it as 0x03",
            )
        return int(text, 16)

    def add_policy(self, policy: int) -> None:
        """State the guest policy, where libvirt itself puts it, written as libvirt writes it."""
        element = etree.Element("policy")
        element.text = f"0x{policy:0{8 if self.type == 'sev-snp' else 4}x}"
        insert(self.element, _after(self.element, _BEFORE["policy"]), element)

    def remove_policy(self) -> None:
        """Take the policy away."""
        element = only(self.element, "policy")
        if element is not None:
            remove(element)

    @property
    def platform(self) -> Platform:
        """The platform that type and policy name.

        Raises:
            DomainError: The type is none that an IGVM file can be for.
        """
        match self.type:
            case "sev":
                es = (self.policy or 0) & SEV_ES_POLICY
                return Platform.SEV_ES if es else Platform.SEV
            case "sev-snp":
                return Platform.SEV_SNP
            case "tdx":
                return Platform.TDX
        raise DomainError(
            f"launch security {self.type!r} has no IGVM firmware",
            where=place(self.element),
            hint="IGVM firmware is for type='sev', 'sev-snp' or 'tdx', or no launchSecurity",
        )


class Domain:
    """A domain XML, changed only where it is asked to be."""

    __slots__ = ("document",)

    def __init__(self, document: Document) -> None:
        if document.root.tag != "domain":
            raise DomainError(
                f"the top element is <{etree.QName(document.root).localname[:60]}>, not <domain>",
                hint="give the XML of a domain, as virsh dumpxml prints it",
            )
        self.document = document

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a domain.

        Args:
            data: The XML text, UTF-8.
        Raises:
            DomainError: It is not well-formed, not a domain, or exceeds a bound.
        """
        return cls(Document.parse(data))

    def write(self) -> bytes:
        """The XML text; of an unchanged domain, the bytes it was read from."""
        return self.document.write()

    def copy(self) -> Self:
        """An independent domain with the same content."""
        return type(self)(self.document.copy())

    @property
    def root(self) -> "etree._Element":
        """The `<domain>` element."""
        return self.document.root

    @property
    def type(self) -> str | None:
        """The hypervisor: kvm, qemu…"""
        return self.root.get("type")

    @property
    def name(self) -> str | None:
        """The domain's name."""
        return self.root.findtext("name")

    @property
    def uuid(self) -> str | None:
        """The domain's UUID as libvirt spells it: lower case, with hyphens.

        Raises:
            DomainError: It is none that libvirt takes.
        """
        element = only(self.root, "uuid")
        if element is None or not element.text:  # libvirt makes one in place of an empty one too
            return None
        text = element.text.strip()
        digits = text.replace("-", "").lower()
        if not _UUID.fullmatch(digits):
            raise DomainError(
                f"{text[:60]!r} is no UUID", where=place(element), hint="write one as uuidgen does"
            )
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))

    def add_uuid(self, uuid: str) -> None:
        """Give a domain without UUID one, where libvirt itself puts it."""
        element = only(self.root, "uuid")
        if element is None:
            element = etree.Element("uuid")
            insert(self.root, _after(self.root, _BEFORE["uuid"]), element)
        element.text = uuid

    @property
    def os(self) -> Os:
        """The `<os>` element.

        Raises:
            DomainError: There is none.
        """
        element = only(self.root, "os")
        if element is None:
            raise DomainError("no <os> element", hint="a domain needs <os><type>hvm</type></os>")
        return Os(element)

    @property
    def security(self) -> LaunchSecurity | None:
        """The `<launchSecurity>` element."""
        element = only(self.root, "launchSecurity")
        return None if element is None else LaunchSecurity(element)

    @property
    def emulator(self) -> str | None:
        """The QEMU binary the domain names."""
        text = self.root.findtext("devices/emulator")
        return (text or "").strip() or None

    @property
    def has_tpm(self) -> bool:
        """Whether libvirt gives the guest a TPM."""
        return self.root.find("devices/tpm") is not None

    @property
    def vcpus(self) -> int:
        """The number of virtual processors at start.

        Raises:
            DomainError: It is no positive number.
        """
        each = self.root.findall("vcpus/vcpu")
        if each:
            return sum(vcpu.get("enabled") == "yes" for vcpu in each)
        element = only(self.root, "vcpu")
        if element is None:
            return 1
        return _number(element, element.get("current") or element.text)

    @property
    def memory(self) -> int | None:
        """The memory at start, in bytes.

        Raises:
            DomainError: It is no number, or its unit is none that libvirt knows.
        """
        element = only(self.root, "memory")
        if element is None:
            return None
        unit = element.get("unit", "")
        if unit.lower() not in _UNITS:
            raise DomainError(f"unknown unit {unit[:40]!r} of memory", where=place(element))
        return _number(element, element.text) * _UNITS[unit.lower()]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments that are handed to QEMU as they stand."""
        return tuple(element.get("value", "") for element in self.argument_elements())

    def argument_elements(self) -> Iterator["etree._Element"]:
        """The elements behind `arguments`."""
        commandline = only(self.root, COMMANDLINE)
        if commandline is not None:
            yield from commandline.findall(ARGUMENT)

    def section(self, tag: str) -> "tuple[etree._Element, bool]":
        """A child of `<domain>` that is made when missing, and whether it was made.

        Args:
            tag: `metadata`, `memoryBacking`, or COMMANDLINE.
        """
        element = only(self.root, tag)
        if element is not None:
            return element, False
        namespaces = {"qemu": QEMU_NAMESPACE} if tag == COMMANDLINE else None
        element = etree.Element(tag, nsmap=namespaces)
        before = _BEFORE.get(tag)
        insert(self.root, _after(self.root, before) if before else len(self.root), element)
        return element, True

    def add_arguments(self, *values: str) -> bool:
        """Hand QEMU further arguments; returns whether `<qemu:commandline>` had to be made."""
        commandline, made = self.section(COMMANDLINE)
        for value in values:
            argument = etree.Element(ARGUMENT, {"value": value}, nsmap={"qemu": QEMU_NAMESPACE})
            insert(commandline, len(commandline), argument)
        if made:
            indent(commandline)
        return made

    def request(self) -> Request | None:
        """What the domain asks of IGVM firmware; None when it asks for none.

        Raises:
            DomainError: What it asks for is contradictory.
        """
        os = only(self.root, "os")
        if os is None or not is_request(Os(os)):
            return None
        view = Os(os)
        _check_request(view)
        security = self.security
        loader = view.loader
        features = dict(view.features)
        if loader is not None and loader.element.get("secure") in ("yes", "no"):
            # libvirt's own reading of the attribute (qemuFirmwareMatchDomain)
            features.setdefault("requires-smm", loader.element.get("secure") == "yes")
        return Request(
            # the only architecture for which a QEMU loads IGVM files
            architecture=view.architecture or "x86_64",
            machine=view.machine,
            platform=Platform.NATIVE if security is None else security.platform,
            features=features,
            path=None if loader is None else loader.path,
            policy=None if security is None else security.policy,
        )


def is_request(os: Os) -> bool:
    """Whether an `<os>` asks for IGVM firmware, in either form."""
    loader = os.loader
    return os.firmware == IGVM or (loader is not None and loader.type == IGVM)


def only(parent: "etree._Element", tag: str) -> "etree._Element | None":
    """The child with this tag.

    Raises:
        DomainError: There are several: which one libvirt takes is nothing to rely on.
    """
    found = parent.findall(tag)
    if len(found) > 1:
        name = etree.QName(tag).localname
        raise DomainError(f"more than one <{name}>", where=place(found[1]), hint="keep one")
    return found[0] if found else None


def place(element: "etree._Element") -> str:
    """Where an element stands, for an error."""
    return f"line {element.sourceline}" if element.sourceline else f"<{element.tag}>"


def _check_request(os: Os) -> None:
    loader = os.loader
    if os.firmware not in (None, IGVM):
        raise DomainError(
            f"firmware='{os.firmware}' beside <loader type='igvm'>",
            where=place(os.element),
            hint="remove the firmware attribute, or make it 'igvm'",
        )
    variables = os.variables
    if variables is not None:
        raise DomainError(
            f"<{variables.tag}> beside IGVM firmware, which has no such store of UEFI variables",
            where=place(variables),
            hint=f"remove <{variables.tag}>, or let --igvm turn the domain into an IGVM one",
        )
    if loader is None:
        return
    where = place(loader.element)
    if loader.type not in (None, IGVM) or (loader.path and loader.type is None):
        raise DomainError(
            f"<loader type='{loader.type or 'rom'}'> beside firmware='igvm'",
            where=where,
            hint="remove <loader>, or name an IGVM file in <loader type='igvm'>",
        )
    if loader.element.get("stateless") == "no":
        raise DomainError(
            "stateless='no' asks for a variable store, which IGVM firmware has not",
            where=where,
            hint="remove the attribute",
        )
    if os.firmware is None and loader.path is None:
        raise DomainError(
            "<loader type='igvm'> names no file",
            where=where,
            hint="put the path of an IGVM file into it, or write <os firmware='igvm'> to have "
            "one chosen",
        )


def _after(parent: "etree._Element", tags: tuple[str, ...]) -> int:
    positions = [index for index, child in enumerate(parent) if child.tag in tags]
    return positions[-1] + 1 if positions else 0


def _number(element: "etree._Element", text: str | None) -> int:
    digits = (text or "").strip(_XML_SPACE)
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20 and int(digits)):
        raise DomainError(
            f"{digits[:40]!r} in <{element.tag}> is not a positive number", where=place(element)
        )
    return int(digits)
