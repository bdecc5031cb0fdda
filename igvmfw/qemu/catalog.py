"""The firmware descriptors of a host: where they are, which take effect, and which match.

Source: docs/interop/firmware.json of QEMU 10.2.2, `Firmware`:
- three directories, from general to specific: /usr/share/qemu/firmware, /etc/qemu/firmware,
  $XDG_CONFIG_HOME/qemu/firmware;
- the files of all three are sorted by file name, and the first that matches is chosen;
- of files with the same name, the one in the more specific directory takes effect;
- a more specific file of zero length hides the less specific ones.
And `FirmwareTarget`: machine types are concrete ones, matched by globs.

Where it is silent, libvirt's ways hold (src/qemu/qemu_interop_config.c, qemu_firmware.c): names
that start with a dot are passed over, only regular files (or links to them) take effect, a
descriptor that cannot be read is passed over and still stands for its name, globs have `*` and `?`
only, and the system daemon does not look into a home.  Names that do not end in `.json` are passed
over too: they are what editors and package managers leave behind.

Beside each of the three directories igvmfw has one of its own, which counts as a little less
specific and which nothing else reads: libvirt before 10.7 refuses *all* descriptors as soon as one
names a device it does not know (`igvmfw.install` has the details), so there is no place for an
IGVM descriptor in QEMU's directories while such a libvirt is installed.
"""

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

from igvmfw import files, rooted
from igvmfw.errors import DescriptorError, InputError, RefusedError
from igvmfw.qemu import jsontext
from igvmfw.qemu.descriptor import Descriptor, Device
from igvmfw.qemu.options import file_value
from igvmfw.records import Record

VENDOR_BASE = "usr/share"
SYSTEM_BASE = "etc"
QEMU_DIRECTORY = "qemu/firmware"
OWN_DIRECTORY = "igvmfw/firmware"
SUFFIX = ".json"

# aliases of x86 machine types and what their concrete names start with (hw/i386/pc_q35.c,
# pc_piix.c): descriptors name concrete types, domain XML often an alias
MACHINE_ALIASES = {"q35": "pc-q35-", "pc": "pc-i440fx-"}


class State(StrEnum):
    """What becomes of a descriptor file."""

    AVAILABLE = "available"
    OTHER_DEVICE = "other-device"  # takes effect, but describes no IGVM firmware
    BROKEN = "broken"  # cannot be read, or is no descriptor
    SHADOWED = "shadowed"  # a more specific directory has a file of that name
    MASKED = "masked"  # a more specific directory has an empty file of that name
    MASK = "mask"  # the empty file
    IGNORED = "ignored"  # its name is not a descriptor's


class Entry(Record):
    """One file of a descriptor directory.

    Attributes:
        name: The file's name, which the order of choice is by.
        path: Where it is.
        state: What becomes of it.
        descriptor: What it holds, where that could be read.
        error: Why it could not be read.
        overridden_by: The file that shadows or masks it.
    """

    name: str
    path: Path
    state: State
    descriptor: Descriptor | None = None
    error: DescriptorError | None = None
    overridden_by: Path | None = None


class Catalog(Record):
    """All descriptor files of a search path, in order of choice.

    Attributes:
        entries: Sorted by name; of one name, the most specific first.
        problems: Directories that could not be read.
    """

    entries: tuple[Entry, ...]
    problems: tuple[DescriptorError, ...] = ()

    @property
    def available(self) -> tuple[Entry, ...]:
        """The IGVM descriptors that take effect, in order of choice."""
        return tuple(entry for entry in self.entries if entry.state is State.AVAILABLE)

    def find(self, name: str) -> Entry | None:
        """The descriptor that takes effect under a file name."""
        taking_effect = (State.AVAILABLE, State.OTHER_DEVICE, State.BROKEN)
        found = (e for e in self.entries if e.name == name and e.state in taking_effect)
        return next(found, None)


class Wanted(Record):
    """What a request asks of a descriptor.

    Attributes:
        architecture: The emulator, such as `x86_64`.
        machine: A machine type, concrete or an alias; None matches every one.
        features: Feature → must have it (True) or must not have it (False).
    """

    architecture: str
    machine: str | None
    features: Mapping[str, bool]


def user_base() -> str:
    """The directory of the configuration of the user who runs this, without the leading slash.

    Source: XDG Base Directory Specification 0.8: XDG_CONFIG_HOME counts when it is absolute, and
    is ~/.config otherwise.
    """
    config = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(config):
        config = os.path.join(os.path.expanduser("~"), ".config")
    return config.strip("/")


def search_path(root: Path = rooted.HOST, *, user: bool) -> tuple[Path, ...]:
    """The directories that hold descriptors, the most specific first.

    Args:
        root: Another root directory to look into.
        user: With the user's own directories, as libvirt's session daemon does.
    """
    bases = [user_base()] if user else []
    bases += [SYSTEM_BASE, VENDOR_BASE]
    return tuple(root / base / own for base in bases for own in (QEMU_DIRECTORY, OWN_DIRECTORY))


def load(directories: Sequence[Path], root: Path = rooted.HOST) -> Catalog:
    """Read every descriptor of a search path.

    No single file or directory makes this fail: each is kept with what is wrong with it.

    Args:
        directories: The most specific first, as `search_path` gives them.
        root: The root directory that links in them are relative to.
    """
    found: dict[bytes, list[Path]] = {}
    problems = []
    for directory in directories:
        try:
            for name in os.listdir(_real(directory, root)):
                if not name.startswith("."):
                    found.setdefault(os.fsencode(name), []).append(directory / name)
        except FileNotFoundError:
            continue
        except (OSError, InputError) as error:
            problems.append(_problem(directory, error))
    entries = (entry for name in sorted(found) for entry in _entries_of(found[name], root))
    return Catalog(entries=tuple(entries), problems=tuple(problems))


def _real(path: Path, root: Path) -> Path:
    return path if root == rooted.HOST else rooted.resolve(root, path.relative_to(root))


def _problem(path: Path, error: OSError | InputError) -> DescriptorError:
    if isinstance(error, InputError):
        return DescriptorError(error.message, where=str(path), hint=error.hint)
    return DescriptorError(f"cannot read: {error.strerror or error}", where=str(path))


def _entries_of(paths: Iterable[Path], root: Path) -> Iterable[Entry]:
    """The entries of one name, most specific first."""
    decisive: Entry | None = None
    for path in paths:
        entry, takes_effect = _read_entry(path, root)
        if decisive is not None and takes_effect:
            over = State.MASKED if decisive.state is State.MASK else State.SHADOWED
            entry = Entry(
                name=entry.name,
                path=path,
                state=over,
                descriptor=entry.descriptor,
                error=entry.error,
                overridden_by=decisive.path,
            )
        elif takes_effect:
            decisive = entry
        yield entry


def _read_entry(path: Path, root: Path) -> tuple[Entry, bool]:
    """Read one file; the flag says whether it stands for its name."""
    name = path.name

    def entry(state: State, error: DescriptorError | None = None) -> Entry:
        return Entry(name=name, path=path, state=state, error=error)

    if not name.endswith(SUFFIX):
        return entry(State.IGNORED), False
    try:
        real = _real(path, root)
        info = os.stat(real)
    except (OSError, InputError) as error:
        return entry(State.BROKEN, _lost(path, error)), False
    if not stat.S_ISREG(info.st_mode):
        what = "a directory" if stat.S_ISDIR(info.st_mode) else "not a regular file"
        hint = "an empty file would hide a less specific one"
        odd = DescriptorError(f"is {what}", where=str(path), hint=hint)
        return entry(State.BROKEN, odd), False
    if info.st_size == 0:
        return entry(State.MASK), True
    try:
        data = files.read_text(real, limit=jsontext.MAX_SIZE)
        descriptor = Descriptor.parse(data)
    except DescriptorError as error:
        return entry(State.BROKEN, error.within(str(path))), True
    except InputError as error:
        return entry(State.BROKEN, _problem(path, error)), True
    is_igvm = descriptor.mapping.device is Device.IGVM
    state = State.AVAILABLE if is_igvm else State.OTHER_DEVICE
    return Entry(name=name, path=path, state=state, descriptor=descriptor), True


def _lost(path: Path, error: OSError | InputError) -> DescriptorError:
    problem = _problem(path, error)
    if isinstance(error, FileNotFoundError):
        problem = DescriptorError(
            "is a link to a file that does not exist", where=str(path), hint="remove the link"
        )
    return problem


def match(entry: Entry, wanted: Wanted) -> tuple[str, ...]:
    """Why a descriptor file is not one to choose; empty when it is."""
    if entry.state is State.BROKEN:
        return (str(entry.error),)
    if entry.state in (State.SHADOWED, State.MASKED):
        return (f"{entry.state} by {entry.overridden_by}",)
    if entry.state is State.IGNORED:
        return (f"the file name does not end in {SUFFIX}",)
    if entry.descriptor is None:
        return ("an empty file, which hides less specific ones",)
    return match_descriptor(entry.descriptor, wanted)


def match_descriptor(descriptor: Descriptor, wanted: Wanted) -> tuple[str, ...]:
    """Why a descriptor does not satisfy a request; empty when it does."""
    if descriptor.mapping.device is not Device.IGVM:
        return (f"describes firmware for device '{descriptor.mapping.device}', not 'igvm'",)
    reasons = []
    try:
        file_value(descriptor.mapping.filename)
    except RefusedError as error:  # nobody could use it
        reasons.append(error.message)
    if reason := _match_target(descriptor, wanted):
        reasons.append(reason)
    for feature, must_have in wanted.features.items():
        if must_have and feature not in descriptor.features:
            reasons.append(f"lacks the feature {feature}")
        elif not must_have and feature in descriptor.features:
            reasons.append(f"has the feature {feature}, which the request excludes")
    return tuple(reasons)


def _match_target(descriptor: Descriptor, wanted: Wanted) -> str | None:
    targets = [t for t in descriptor.targets if t.architecture == wanted.architecture]
    if not targets:
        others = ", ".join(dict.fromkeys(t.architecture for t in descriptor.targets)) or "nothing"
        return f"is for {others}, not {wanted.architecture}"
    globs = [glob for target in targets for glob in target.machines]
    machine = wanted.machine
    if machine is None or any(glob_matches(glob, machine) for glob in globs):
        return None
    # an alias stands for some version of its family: the glob must take them all, so it is held
    # against the family's own glob as if that were a name
    family = MACHINE_ALIASES.get(machine)
    if family is not None and any(glob_matches(glob, f"{family}*") for glob in globs):
        return None
    return f"takes the machine types {', '.join(globs) or '(none)'}, not {machine}"


def glob_matches(glob: str, text: str) -> bool:
    """Whether a glob of `*` and `?` matches a whole text.

    Not fnmatch: brackets mean themselves, as in GLib's g_pattern_match, which libvirt uses.  Time
    is bounded by the product of both lengths, whatever the glob.
    """
    at_glob = at_text = 0
    star: int | None = None
    resume = 0
    while at_text < len(text):
        if at_glob < len(glob) and glob[at_glob] == "*":
            star, resume = at_glob, at_text
            at_glob += 1
        elif at_glob < len(glob) and glob[at_glob] in ("?", text[at_text]):
            at_glob += 1
            at_text += 1
        elif star is not None:  # let the last star take one more character
            resume += 1
            at_glob, at_text = star + 1, resume
        else:
            return False
    return not glob[at_glob:].strip("*")
