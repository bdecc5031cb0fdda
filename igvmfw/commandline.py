"""What stands in a domain's `<qemu:commandline>`: the IGVM file, and the disk of its vTPM.

QEMU merges several `-machine` options, so libvirt's own stays as it is.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from igvmfw.errors import DomainError, RefusedError
from igvmfw.qemu import svsmdisk
from igvmfw.qemu.options import file_value, parse
from igvmfw.virt.document import remove
from igvmfw.virt.domain import COMMANDLINE, Domain, only
from igvmfw.virt.record import Record, State

OBJECT_TYPE = "igvm-cfg"
OBJECT_ID = "igvm0"
_MACHINE_VALUE = f"{OBJECT_TYPE}={OBJECT_ID}"
_FIRMWARE = "the IGVM file brings the firmware"
_PROTECTION = "<launchSecurity> says how the guest is protected"
# properties of a machine that its guest's IGVM file leaves no place for, or is judged by
_MACHINE_KEYS = {
    "pflash0": _FIRMWARE,
    "pflash1": _FIRMWARE,
    "firmware": _FIRMWARE,
    "confidential-guest-support": _PROTECTION,
    "memory-encryption": _PROTECTION,
    "smp.cpus": "<vcpu> says for how many the file is judged and measured",
    "memory": "<memory> says for how much the file is judged",
    "memory.size": "<memory> says for how much the file is judged",
}


@dataclass(frozen=True, slots=True)
class _Argument:
    """An option handed to QEMU, with its value; the elements are as in the domain."""

    option: str
    value: str
    position: int

    def __str__(self) -> str:
        return f"{self.option} {self.value}"


def object_argument(path: str) -> str:
    """The value of `-object` that gives QEMU an IGVM file.

    Args:
        path: The file; QEMU gets exactly this path.
    Raises:
        RefusedError: The path is not absolute, too long, or has characters no path should have.
    """
    return f"{OBJECT_TYPE},id={OBJECT_ID},file={file_value(path)}"


def state_arguments(state: State | None) -> tuple[str, ...]:
    """The options, each with its value, that give QEMU the state of a vTPM.

    Raises:
        RefusedError: Its path is none that QEMU could get.
    """
    if state is None or state.path is None:
        return ()
    return svsmdisk.arguments(state.path, planes=state.planes)


def check_arguments(domain: Domain, *, ours: bool) -> None:
    """Refuse what QEMU does not take beside an IGVM file, or by which it gets another guest.

    QEMU takes the later word: what stands here wins over libvirt's own, by which a file is judged.

    Args:
        domain: The domain.
        ours: Whether igvmfw put an IGVM file there before.
    Raises:
        RefusedError: Firmware of another kind, another IGVM file, or what the domain's own
            elements say in another way, is named there.
    """
    for argument in _arguments(domain):
        if _names_igvm(argument):
            if ours and _is_ours(argument):
                continue
            raise RefusedError(
                f"{argument} in <qemu:commandline> names an IGVM file already",
                hint="remove it there: igvmfw puts it in",
            )
        remedy = _remedy(argument, domain.os.machine)
        if remedy is not None:
            raise RefusedError(
                f"{argument} in <qemu:commandline> beside IGVM firmware", hint=remedy
            )


def _remedy(argument: _Argument, machine: str | None) -> str | None:
    """What to do about a word that cannot stay; None for one that can."""
    option, value = argument.option, argument.value
    options = parse(value)
    if option == "-readconfig":
        return f"remove {option}: QEMU would take any option from there, another IGVM file too"
    if option == "-machine":
        return _machine_remedy(options, machine)
    if option == "-object":
        if ("id", OBJECT_ID) in options:
            return f"give it another id: {OBJECT_ID} is the IGVM file's"
        if value.startswith("{") and not options:
            # QEMU's JSON has strings in single quotes, too
            return "write it in JSON that others than QEMU read: it could name another IGVM file"
    if option == "-smp" and _sets(options, "cpus"):
        return f"remove {option}: <vcpu> says for how many the file is judged and measured"
    if option == "-m" and _sets(options, "size"):
        return f"remove {option}: <memory> says for how much the file is judged"
    flash = option == "-drive" and ("if", "pflash") in options
    flash = flash or (option == "-set" and value.startswith("drive.") and ".if=pflash" in value)
    if flash or option in ("-bios", "-pflash"):
        return f"remove {option}: the IGVM file brings the firmware"
    return None


def _sets(options: list[tuple[str, str]], key: str) -> bool:
    """Whether a key has a value, which may come without it where it is the first."""
    return any(name == key for name, _ in options) or any(
        not name and value for name, value in options[:1]
    )


def _machine_remedy(options: list[tuple[str, str]], machine: str | None) -> str | None:
    for name, value in options:
        key = _machine_key(name)
        if key in _MACHINE_KEYS:
            return f"remove {name}: {_MACHINE_KEYS[key]}"
        if key == "type" and value != machine:
            return f"remove {value}: <type machine='…'> says which machine the guest has"
    if options and not options[0][0] and options[0][1] not in ("", machine):
        return f"remove {options[0][1]}: <type machine='…'> says which machine the guest has"
    return None


def _machine_key(name: str) -> str:
    """A machine's property as it is called; QEMU takes underscores for hyphens."""
    return name.replace("_", "-")


def set_file(domain: Domain, record: Record, value: str) -> None:
    """Name the file: in place where it is named already, at the end otherwise.

    Args:
        domain: The domain.
        record: Learns what had to be made.
        value: What `object_argument` gave.
    """
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


def set_state(domain: Domain, record: Record, state: State | None) -> None:
    """Name the disk of a vTPM, in place of the one that the record has.

    Args:
        domain: The domain.
        record: What igvmfw put there before; learns of the new one.
        state: The new one; None for firmware that keeps nothing.
    Raises:
        RefusedError: Someone else named such a disk, or the path is none that QEMU could get.
    """
    wanted, former = state_arguments(state), state_arguments(record.state)
    places = [_find(domain, *pair) for pair in _pairs(former)]
    if wanted != former or None in places:
        _remove_pairs(domain, former)
        if wanted:
            domain.add_arguments(*wanted)
    check_disk(domain, state)
    record.set_state(state)


def remove_arguments(domain: Domain, record: Record) -> None:
    """Take out what `set_file` and `set_state` put in."""
    _remove_pairs(domain, state_arguments(record.state))
    elements = list(domain.argument_elements())
    for argument in reversed(_named(domain)):
        if _is_ours(argument):
            remove(elements[argument.position + 1])
            remove(elements[argument.position])
    commandline = only(domain.root, COMMANDLINE)
    if commandline is not None and record.has_made("commandline") and not len(commandline):
        remove(commandline)
    record.forget("commandline")


def gives_file(domain: Domain, path: str) -> bool:
    """Whether QEMU is given exactly this IGVM file, in igvmfw's words.

    Raises:
        DomainError: Several are named: which one QEMU takes is nothing to rely on.
    """
    given = {argument.option: argument.value for argument in _named(domain)}
    return given == {"-object": object_argument(path), "-machine": _MACHINE_VALUE}


def has_state(domain: Domain, state: State) -> bool:
    """Whether QEMU is given exactly this state of a vTPM, as far as igvmfw's words go."""
    return all(_find(domain, *pair) is not None for pair in _pairs(state_arguments(state)))


def check_disk(domain: Domain, state: State | None) -> None:
    """Refuse words of others that concern the disk of a vTPM: QEMU takes the later ones.

    Args:
        domain: The domain.
        state: What igvmfw's own words there are for; None for a domain without such a disk.
    Raises:
        RefusedError: There are such words.
    """
    left = list(_pairs(state_arguments(state)))
    machine = {svsmdisk.SLOTS, svsmdisk.PLANE}
    machine |= {key for option, value in left if option == "-machine" for key, _ in parse(value)}
    if not left:
        return
    for argument in _arguments(domain):
        pair = (argument.option, argument.value)
        if pair in left:
            left.remove(pair)
        elif _concerns_disk(argument, machine):
            raise RefusedError(
                f"{argument} in <qemu:commandline> is for the state of a vTPM already",
                hint="remove it there: igvmfw puts in what the firmware's descriptor asks for",
            )
        elif argument.option == "-snapshot":
            raise RefusedError(
                "-snapshot in <qemu:commandline> has QEMU forget what a vTPM writes to its state",
                hint="remove it; <transient/> does so for a single disk",
            )


def _pairs(arguments: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    return zip(arguments[::2], arguments[1::2], strict=True)


def _find(domain: Domain, option: str, value: str) -> int | None:
    """Where an option stands last with exactly this value: the user's own come before igvmfw's."""
    arguments = reversed(list(_arguments(domain)))
    found = (a.position for a in arguments if (a.option, a.value) == (option, value))
    return next(found, None)


def _remove_pairs(domain: Domain, arguments: tuple[str, ...]) -> None:
    for option, value in _pairs(arguments):
        position = _find(domain, option, value)
        if position is not None:
            elements = list(domain.argument_elements())
            remove(elements[position + 1])
            remove(elements[position])


def _concerns_disk(argument: _Argument, machine: Collection[str]) -> bool:
    """Whether a word is about the disk, or about these properties of the machine."""
    option, value = argument.option, argument.value
    options = parse(value)
    match option:
        case "-drive":
            return ("id", svsmdisk.STORAGE_ID) in options
        case "-blockdev":
            return ("node-name", svsmdisk.STORAGE_ID) in options
        case "-device":
            return ("drive", svsmdisk.STORAGE_ID) in options
        case "-machine":
            return any(_machine_key(key) in machine for key, _ in options)
        case "-set":
            return value.startswith(f"drive.{svsmdisk.STORAGE_ID}.")
        case "-global":
            name = svsmdisk.TRANSPORT.partition("=")[0]
            driver, _, key = name.partition(".")
            named = {("driver", driver), ("property", key)} <= set(options)
            return value != svsmdisk.TRANSPORT and (named or value.startswith(f"{name}="))
    return False


def _arguments(domain: Domain) -> Iterator[_Argument]:
    """QEMU's options with their values; an option without one has the next option as value."""
    values = domain.arguments
    for position, word in enumerate(values):
        option = "-" + word.lstrip("-") if word.startswith("-") else ""
        following = values[position + 1] if position + 1 < len(values) else ""
        yield _Argument("-machine" if option == "-M" else option, following, position)


def _names_igvm(argument: _Argument) -> bool:
    options = parse(argument.value)
    if argument.option == "-object":
        return ("", OBJECT_TYPE) in options[:1] or ("qom-type", OBJECT_TYPE) in options
    return argument.option == "-machine" and any(
        _machine_key(key) == OBJECT_TYPE for key, _ in options
    )


def _is_ours(argument: _Argument) -> bool:
    if argument.option == "-machine":
        return argument.value == _MACHINE_VALUE
    return ("id", OBJECT_ID) in parse(argument.value)


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
