"""A domain that asks for IGVM firmware becomes one that unmodified libvirt takes, and back.

libvirt knows no IGVM: the file is named in `<qemu:commandline>`, the request moves into the
metadata.  Nothing else changes, rewriting again changes nothing, and `restore` is the inverse.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from igvmfw.commandline import (
    check_arguments,
    object_argument,
    remove_arguments,
    set_file,
    set_state,
)
from igvmfw.errors import DomainError, RefusedError
from igvmfw.platforms import Platform
from igvmfw.select import Choice
from igvmfw.virt.document import indent, insert, remove
from igvmfw.virt.domain import IGVM, VARIABLES, Domain, Os, Request, is_request, only, place
from igvmfw.virt.record import File, OnChange, Part, Record, State

# names and aliases of q35 and i440fx machines, Ubuntu's aliases included: the machine types that
# have the property igvm-cfg (hw/i386/pc.c of QEMU 10.2)
_MACHINES = ("q35", "pc", "ubuntu", "ubuntu-q35")
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

    Loader and UEFI variables are kept in the metadata for the way back; firmware features stay
    wanted, and so does secure='yes' of the loader where none of them says it.

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
    secure = _wants_secure(os)
    if current is None or not record.has(Part.BEFORE):
        _ = os.variables  # several of a kind are not worth keeping
        record.drop(Part.BEFORE)
        record.take(Part.BEFORE, "loader", *VARIABLES)
    else:
        _drop_request(result)
    os.element.set("firmware", IGVM)
    if path is not None or secure:
        _ask(os, path, secure=secure)
    return result


def _wants_secure(os: Os) -> bool:
    """Whether the loader alone says that the firmware must be safe for Secure Boot.

    libvirt itself puts secure='yes' beside features, for the firmware that it chose by them.
    """
    said = {"secure-boot", "requires-smm"} & set(os.features)
    return not said and os.loader is not None and os.loader.element.get("secure") == "yes"


def _ask(os: Os, path: str | None, *, secure: bool) -> None:
    """Put in the loader of a request."""
    loader = os.element.makeelement("loader", {"type": IGVM})
    if secure:
        loader.set("secure", "yes")
    loader.text = path
    kind = only(os.element, "type")
    insert(os.element, 0 if kind is None else os.element.index(kind) + 1, loader)


def rewrite(
    domain: Domain,
    choice: Choice,
    *,
    lock_memory: bool | None = None,
    may_lock_memory: bool = True,
    on_change: OnChange | None = None,
    state: State | None = None,
) -> Rewritten:
    """Give a domain the chosen file, in a form that unmodified libvirt takes.

    Args:
        domain: A domain that asks for IGVM firmware, or was rewritten before.
        choice: The file.
        lock_memory: Let a SEV or SEV-ES guest lock its memory, which it needs to start where QEMU
            runs unprivileged; None leaves it as recorded, which is to let it where nothing is.
        may_lock_memory: Whether libvirt can do so on the guest's host; what is recorded stays.
        on_change: What a start does when the file is another by then; None leaves it as recorded,
            which is to refuse where nothing is.
        state: Where the vTPM in the file keeps its state; None for a file that keeps none.
    Raises:
        RefusedError: The domain has something that QEMU does not take beside an IGVM file.
        DomainError: The domain asks for no IGVM firmware, or contradicts itself.
    """
    argument = object_argument(choice.path)
    result = domain.copy()
    record = Record.find(result)
    former = None if record is None else record.file
    ours = former is not None
    check_guest(result)
    _check_security(result)
    check_arguments(result, ours=ours)
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
    if lock_memory is None:
        lock_memory = former.lock_memory if former else True
    if lock_memory and may_lock_memory and choice.platform in _PINNED:
        changes += _lock_memory(result, record)
    set_file(result, record, argument)
    set_state(result, record, state)
    if state is not None and state.path is not None:
        changes.append(f"the firmware's vTPM keeps its state in {state.path}")
    record.set_file(
        File(
            path=choice.path,
            sha256=choice.sha256,
            platform=choice.platform,
            descriptor=choice.descriptor,
            measurement=choice.measurement,
            on_change=on_change or (former.on_change if former else OnChange.REFUSE),
            lock_memory=lock_memory,
        )
    )
    if result.document.text() == domain.document.text():
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
    chosen = record.chosen
    if record.file is not None:
        remove_arguments(result, record)
        _undo_needs(result, record)
    if is_request(result.os):  # a newer request than the recorded one
        record.drop(Part.REQUEST)
    record.give_back(Part.REQUEST)
    if chosen and not is_request(result.os):
        # what is recorded is never acted on by itself: it could have igvmfw read or make any file
        raise record.damaged()
    record.drop("file", "state")
    if not record.has(Part.BEFORE):
        record.remove()
    return result


def restore(domain: Domain) -> Domain:
    """The domain as it was before `prepare`, and before `convert`; any other domain as it is.

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


def check_guest(domain: Domain) -> None:
    """See that a domain is of a kind that can take an IGVM file.

    Args:
        domain: Any domain.
    Raises:
        RefusedError: Its hypervisor, architecture or machine type takes none.
        DomainError: It has no `<os>`.
    """
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
