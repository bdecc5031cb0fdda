"""What stands in a domain's `<qemu:commandline>`: the IGVM file, and the disk of its vTPM.

QEMU merges several `-machine` options, so libvirt's own stays as it is.
"""

from collections.abc import Iterator
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
    """Refuse what QEMU does not take beside an IGVM file.

    Args:
        domain: The domain.
        ours: Whether igvmfw put an IGVM file there before.
    Raises:
        RefusedError: Firmware of another kind, or another IGVM file, is named there.
    """
    conflicts = {"-bios", "-pflash"}
    for argument in _arguments(domain):
        option, value = argument.option, argument.value
        if option in conflicts or (option == "-drive" and ("if", "pflash") in parse(value)):
            raise RefusedError(
                f"{option} {value} in <qemu:commandline> beside IGVM firmware",
                hint=f"remove {option}: the IGVM file brings the firmware",
            )
        if option == "-machine":
            keys = {key for key, _ in parse(value)} & {"pflash0", "pflash1", "firmware"}
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
            _check_no_disk(domain)
            domain.add_arguments(*wanted)
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
    """Whether QEMU is given exactly this state of a vTPM."""
    return all(_find(domain, *pair) is not None for pair in _pairs(state_arguments(state)))


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


def _check_no_disk(domain: Domain) -> None:
    for argument in _arguments(domain):
        options = parse(argument.value)
        names = {
            "-drive": ("id", svsmdisk.STORAGE_ID) in options,
            "-device": ("drive", svsmdisk.STORAGE_ID) in options,
            "-machine": any(key == svsmdisk.SLOTS for key, _ in options),
        }
        if names.get(argument.option):
            raise RefusedError(
                f"{argument.option} {argument.value} in <qemu:commandline> is for the state of a "
                "vTPM already",
                hint="remove it there: igvmfw puts in what the firmware's descriptor asks for",
            )


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
    return argument.option == "-machine" and any(key == OBJECT_TYPE for key, _ in options)


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
