"""A domain that asks for IGVM firmware becomes one that unmodified libvirt takes, and back.

libvirt knows no IGVM: the file is named in `<qemu:commandline>`, the request moves into the
metadata.  Nothing else changes, rewriting again changes nothing, and `restore` is the inverse.
"""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from igvmfw.errors import DomainError, RefusedError
from igvmfw.platforms import Platform
from igvmfw.select import Choice
from igvmfw.virt.document import canonical, indent, insert, remove
from igvmfw.virt.domain import COMMANDLINE, IGVM, Domain, Request, is_request, only, place
from igvmfw.virt.record import File, OnChange, Part, Record

OBJECT_TYPE = "igvm-cfg"
OBJECT_ID = "igvm0"
_MACHINE_VALUE = f"{OBJECT_TYPE}={OBJECT_ID}"
# names and aliases of q35 and i440fx machines, Ubuntu's aliases included: the machine types that
# have the property igvm-cfg (hw/i386/pc.c of QEMU 10.2)
_MACHINES = ("q35", "pc", "ubuntu", "ubuntu-q35")
_PATH_MAX = 4096  # bytes with the final NUL (linux/limits.h)
_PINNED = (Platform.SEV, Platform.SEV_ES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """A rewritten domain.

    Attributes:
        domain: The domain that libvirt takes.
        changes: What was filled in beyond the firmware itself.
        warnings: What the user should know before starting it.
    """

    domain: Domain
    changes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Argument:
    """An option handed to QEMU, with its value; the elements are as in the domain."""

    option: str
    value: str
    position: int


def object_argument(path: str) -> str:
    """The value of `-object` that gives QEMU an IGVM file.

    Args:
        path: The file; QEMU gets exactly this path.
    Raises:
        RefusedError: The path is not absolute, too long, or has characters no path should have.
    """
    if not path.startswith("/"):
        raise RefusedError(f"the path {path!r} is not absolute", hint="name the file from /")
    if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in path):
        raise RefusedError(
            f"the path {path!r} has control characters, or is no text", hint="rename the file"
        )
    if len(path.encode()) >= _PATH_MAX:
        raise RefusedError("the path is longer than the system allows", where=path[:60] + "…")
    # a comma is the only character with a meaning in an option's value, and is doubled to mean
    # itself (docs/system/invocation.rst, "Device and object properties")
    return f"{OBJECT_TYPE},id={OBJECT_ID},file={path.replace(',', ',,')}"


def request_of(domain: Domain) -> Request | None:
    """What a domain asks of IGVM firmware, also when it was rewritten already.

    Args:
        domain: Any domain; None comes of one that asks for none.
    Raises:
        DomainError: It contradicts itself.
    """
    return as_request(domain).request()


def convert(domain: Domain, path: str | None = None) -> Domain:
    """A domain with bios or efi firmware, or with none, asks for IGVM firmware instead.

    Loader and nvram are kept in the metadata for the way back; firmware features stay wanted.

    Args:
        domain: The domain; one that asks for IGVM already keeps its request.
        path: The IGVM file to ask for; None leaves it to the catalogue.
    Raises:
        RefusedError: The path is not absolute, too long, or has characters no path should have.
        DomainError: The domain contradicts itself, or igvmfw's record in it is damaged.
    """
    if path is not None:
        object_argument(path)  # what QEMU could not get is not worth asking for
    current = request_of(domain)
    if current is not None and path in (None, current.path):
        return domain
    result = as_request(domain).copy()
    record = Record.make(result)
    os = result.os
    if current is None or not record.has(Part.BEFORE):
        only(os.element, "nvram")  # several are not worth keeping
        record.drop(Part.BEFORE)
        record.take(Part.BEFORE, "loader", "nvram")
    else:
        _drop_request(result)
    os.element.set("firmware", IGVM)
    if path is not None:
        loader = os.element.makeelement("loader", {"type": IGVM})
        loader.text = path
        kind = only(os.element, "type")
        insert(os.element, 0 if kind is None else os.element.index(kind) + 1, loader)
    return result


def rewrite(
    domain: Domain,
    choice: Choice,
    *,
    lock_memory: bool = True,
    on_change: OnChange | None = None,
) -> Rewritten:
    """Give a domain the chosen file, in a form that unmodified libvirt takes.

    Args:
        domain: A domain that asks for IGVM firmware, or was rewritten before.
        choice: The file.
        lock_memory: Let a SEV or SEV-ES guest lock its memory, which it needs to start where QEMU
            runs unprivileged.
        on_change: What a start does when the file is another by then; None leaves it as recorded,
            which is to refuse where nothing is.
    Raises:
        RefusedError: The domain has something that QEMU does not take beside an IGVM file.
        DomainError: The domain asks for no IGVM firmware, or contradicts itself.
    """
    argument = object_argument(choice.path)
    result = domain.copy()
    record = Record.find(result)
    former = None if record is None else record.file
    ours = former is not None
    _check_machine(result)
    _check_security(result)
    _check_arguments(result, ours=ours)
    asks = is_request(result.os)
    if not asks and not ours:
        raise DomainError("the domain asks for no IGVM firmware", hint="use --igvm to make it ask")
    record = Record.make(result)
    if asks:
        result.request()  # what contradicts itself is not worth moving
        record.drop(Part.REQUEST)
        record.take(Part.REQUEST, "firmware", "loader")
    _undo_needs(result, record)
    changes = [*_state_policy(result, record, choice)]
    if lock_memory and choice.platform in _PINNED:
        changes += _lock_memory(result, record)
    _set_arguments(result, record, argument)
    record.set_file(
        File(
            path=choice.path,
            sha256=choice.sha256,
            platform=choice.platform,
            descriptor=choice.descriptor,
            measurement=choice.measurement,
            on_change=on_change or (former.on_change if former else OnChange.REFUSE),
        )
    )
    if canonical(result.document.tree) == canonical(domain.document.tree):
        result = domain
    return Rewritten(
        domain=result,
        changes=tuple(changes),
        warnings=(*choice.warnings, *_warnings(result, choice)),
    )


def as_request(domain: Domain) -> Domain:
    """A rewritten domain in its request form; any other domain as it is.

    What the domain was before `convert` stays in the metadata.

    Args:
        domain: Such as libvirt has it.
    Raises:
        DomainError: It got other firmware since, or igvmfw's record is damaged.
    """
    if Record.find(domain) is None:
        return domain
    result = domain.copy()
    record = Record.make(result)
    if record.file is not None:
        _remove_arguments(result, record)
        _undo_needs(result, record)
    if is_request(result.os):  # a newer request than the recorded one
        record.drop(Part.REQUEST)
    record.give_back(Part.REQUEST)
    record.drop("file")
    if not record.has(Part.BEFORE):
        record.remove()
    return result


def restore(domain: Domain) -> Domain:
    """The domain as it was before `rewrite`, and before `convert`; any other domain as it is.

    Args:
        domain: Such as libvirt has it.
    Raises:
        DomainError: It got other firmware since, or igvmfw's record is damaged.
    """
    result = as_request(domain)
    if Record.find(result) is None:
        return result
    result = result.copy()
    record = Record.make(result)
    _drop_request(result)
    record.give_back(Part.BEFORE)
    record.remove()
    return result


def _drop_request(domain: Domain) -> None:
    os = domain.os
    if os.firmware is not None:
        del os.element.attrib["firmware"]
    if os.loader is not None:
        remove(os.loader.element)


def _check_machine(domain: Domain) -> None:
    os = domain.os
    if domain.type not in ("kvm", "qemu"):
        raise RefusedError(
            f"a domain of type {domain.type!r} cannot take an IGVM file",
            hint="IGVM firmware is for QEMU: type='kvm' or type='qemu'",
        )
    if os.type != "hvm" or os.architecture not in (None, "x86_64"):
        raise RefusedError(
            f"a guest of type {os.type!r} and architecture {os.architecture or 'x86_64'} cannot "
            "take an IGVM file",
            where=place(os.element),
            hint="QEMU loads IGVM files for <type arch='x86_64'>hvm</type> only",
        )
    machine = os.machine
    if machine is not None and machine not in _MACHINES and not machine.startswith("pc-"):
        raise RefusedError(
            f"the machine type {machine!r} cannot take an IGVM file",
            where=place(os.element),
            hint="use machine='q35'",
        )


def _check_security(domain: Domain) -> None:
    security = domain.security
    if security is None:
        return
    where = place(security.element)
    if domain.type != "kvm":
        raise RefusedError(
            f"launchSecurity needs KVM, the domain is of type {domain.type!r}",
            where=where,
            hint="write <domain type='kvm'>",
        )
    if security.kernel_hashes and domain.os.direct_kernel:
        # sev_add_kernel_loader_hashes looks for the table in a flash image, which there is not
        raise RefusedError(
            "QEMU cannot add the hashes of a directly booted kernel to IGVM firmware",
            where=where,
            hint="remove kernelHashes, or let the firmware boot the kernel from a disk",
        )


def _check_arguments(domain: Domain, *, ours: bool) -> None:
    conflicts = {"-bios", "-pflash"}
    for argument in _arguments(domain):
        option, value = argument.option, argument.value
        if option in conflicts or (option == "-drive" and ("if", "pflash") in _options(value)):
            raise RefusedError(
                f"{option} {value} in <qemu:commandline> beside IGVM firmware",
                hint=f"remove {option}: the IGVM file brings the firmware",
            )
        if option == "-machine":
            keys = {key for key, _ in _options(value)} & {"pflash0", "pflash1", "firmware"}
            if keys:
                raise RefusedError(
                    f"{option} {value} in <qemu:commandline> beside IGVM firmware",
                    hint=f"remove {', '.join(sorted(keys))}: the IGVM file brings the firmware",
                )
        if _names_igvm(argument) and not (ours and _is_ours(argument)):
            raise RefusedError(
                f"{option} {value} in <qemu:commandline> names an IGVM file already",
                hint="remove it there: igvmfw puts it in",
            )


def _arguments(domain: Domain) -> Iterator[_Argument]:
    """QEMU's options with their values; an option without one has the next option as value."""
    values = domain.arguments
    for position, word in enumerate(values):
        option = "-" + word.lstrip("-") if word.startswith("-") else ""
        following = values[position + 1] if position + 1 < len(values) else ""
        yield _Argument("-machine" if option == "-M" else option, following, position)


def _options(text: str) -> list[tuple[str, str]]:
    """The keys and values of an option's value; the first may come without a key."""
    if text.startswith("{"):
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            return []
        members = parsed.items() if isinstance(parsed, dict) else ()
        return [(str(key), str(value)) for key, value in members]
    # a doubled comma is put aside while the single ones separate; NUL occurs in no XML
    parts = text.replace(",,", "\0").split(",")
    pairs = (part.replace("\0", ",").partition("=") for part in parts)
    return [(key, value) if equals else ("", key) for key, equals, value in pairs]


def _names_igvm(argument: _Argument) -> bool:
    options = _options(argument.value)
    if argument.option == "-object":
        return ("", OBJECT_TYPE) in options[:1] or ("qom-type", OBJECT_TYPE) in options
    return argument.option == "-machine" and any(key == OBJECT_TYPE for key, _ in options)


def _is_ours(argument: _Argument) -> bool:
    if argument.option == "-machine":
        return argument.value == _MACHINE_VALUE
    return ("id", OBJECT_ID) in _options(argument.value)


def _named(domain: Domain) -> list[_Argument]:
    """The arguments that name an IGVM file."""
    named = [argument for argument in _arguments(domain) if _names_igvm(argument)]
    options = [argument.option for argument in named]
    if len(options) != len(set(options)):
        raise DomainError(
            "<qemu:commandline> names an IGVM file more than once",
            hint="keep one -object igvm-cfg and one -machine igvm-cfg",
        )
    return named


def _set_arguments(domain: Domain, record: Record, value: str) -> None:
    """Name the file: in place where it is named already, at the end otherwise."""
    named = _named(domain)
    elements = list(domain.argument_elements())
    objects = [a for a in named if a.option == "-object"]
    for argument in objects:
        elements[argument.position + 1].set("value", value)
    missing = [] if objects else ["-object", value]
    if not any(a.option == "-machine" for a in named):
        missing += ["-machine", _MACHINE_VALUE]
    if missing and domain.add_arguments(*missing):
        record.made("commandline")


def _remove_arguments(domain: Domain, record: Record) -> None:
    elements = list(domain.argument_elements())
    for argument in reversed(_named(domain)):
        if _is_ours(argument):
            remove(elements[argument.position + 1])
            remove(elements[argument.position])
    commandline = only(domain.root, COMMANDLINE)
    if commandline is not None and record.has_made("commandline") and not len(commandline):
        remove(commandline)
    record.forget("commandline")


def _state_policy(domain: Domain, record: Record, choice: Choice) -> Iterator[str]:
    security = domain.security
    if security is None or choice.policy is None or security.policy is not None:
        return
    security.add_policy(choice.policy)
    record.set_policy(choice.policy)
    yield f"guest policy 0x{choice.policy:x} filled in, for {choice.platform}"


def _lock_memory(domain: Domain, record: Record) -> Iterator[str]:
    """Let libvirt lift the limit on locked memory.

    KVM pins all memory of a SEV or SEV-ES guest and counts it against that limit (QEMU
    sev_ram_block_added, Linux sev_pin_memory); libvirt lifts it only for `<locked/>` or a
    `<hard_limit>` (qemuDomainGetMemLockLimitBytes; docs/kbase/launch_security_sev.rst, "Memory").
    SEV-SNP guests have their memory in a guest_memfd, which is not counted.
    """
    if domain.root.find("memoryBacking/locked") is not None:
        return
    if domain.root.find("memtune/hard_limit") is not None:
        return
    backing, made = domain.section("memoryBacking")
    insert(backing, len(backing), backing.makeelement("locked"))
    if made:
        indent(backing)
        record.made("memoryBacking")
    record.made("locked")
    yield "<locked/> added: the memory of a SEV guest is pinned"


def _undo_needs(domain: Domain, record: Record) -> None:
    """Take out what `_state_policy` and `_lock_memory` put in, unless it was changed since."""
    security = domain.security
    if record.policy is not None:
        if security is not None and security.policy == record.policy:
            security.remove_policy()
        record.set_policy(None)
    backing = only(domain.root, "memoryBacking")
    locked = None if backing is None else only(backing, "locked")
    if record.has_made("locked") and backing is not None and locked is not None:
        remove(locked)
        if record.has_made("memoryBacking") and not len(backing):
            remove(backing)
    record.forget("locked")
    record.forget("memoryBacking")


def _warnings(domain: Domain, choice: Choice) -> Iterator[str]:
    if domain.has_tpm and "vtpm" in choice.features:
        yield (
            "the guest has a <tpm> beside the firmware's own vTPM: it will see two; remove <tpm> "
            "unless both are meant"
        )
