"""Installing and removing descriptors: where they go, what may be touched, and doing it.

A plan says what would happen to each file; carrying it out is atomic per file, durable, and
excludes other igvmfw processes.  Only a descriptor that igvmfw wrote and nobody edited is ever
replaced or removed (`igvmfw.provenance`).

Where they go: into QEMU's directories (firmware.json), unless the libvirt beside them is older than
10.7.  Such a libvirt gives up on all firmware when one descriptor has a device it does not know
(src/qemu/qemu_firmware.c, qemuFirmwareFetchParsedConfigs), so an IGVM descriptor there would take
`<os firmware='efi'>` away from every domain.  That is seen with 9.0.0; 11.3.0 goes on; by the
changelog of a distribution that went back, 9.10.0 is of the old kind and 10.7.0 of the new.  Beside
an old one the descriptors go into igvmfw's own directories, which only igvmfw reads.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path

from igvmfw import files, rooted
from igvmfw.errors import DescriptorError, InputError, OutputError, RefusedError, UsageError
from igvmfw.provenance import Writer, is_untouched, sealed
from igvmfw.qemu import catalog, jsontext
from igvmfw.qemu.descriptor import Descriptor
from igvmfw.records import Record

FIRST_TOLERANT_LIBVIRT = (10, 7, 0)
DEFAULT_PRIORITY = 65  # after the distributions' own (30 to 60), before what `refresh` writes
VENDOR_PRIORITY = 70
LOCK = ".igvmfw.lock"

# libvirt's library carries the release in its file name: 9.0.0 is libvirt.so.0.9000.0
_LIBRARY_PARENTS = ("usr", "usr/local", "")  # of lib, lib64, …
_LIBRARY_NAME = re.compile(r"libvirt\.so\.0\.(\d{1,3}?)(\d{3})\.(\d{1,3})")


class Level(StrEnum):
    """Whose descriptors (firmware.json, `Firmware`)."""

    USER = "user"
    SYSTEM = "system"
    VENDOR = "vendor"


class Into(StrEnum):
    """Which program's directory."""

    AUTO = "auto"
    QEMU = "qemu"
    IGVMFW = "igvmfw"


class Kind(StrEnum):
    """What happens to a file."""

    WRITE = "write"
    REMOVE = "remove"
    UNCHANGED = "unchanged"
    KEEP = "keep"  # it would be replaced or removed, were it igvmfw's


class Action(Record):
    """What happens to one file, and why.

    Attributes:
        kind: What happens.
        path: The descriptor file.
        reason: Why, for people.
        data: The new content, where it is written.
    """

    kind: Kind
    path: Path
    reason: str
    data: bytes | None = None


class Place(Record):
    """A directory for descriptors.

    Attributes:
        directory: The directory, as the host names it.
        root: The root directory that guests see it in.
        search_path: All directories of its catalogue, most specific first.
        note: What is unusual about the place, for people.
    """

    directory: Path
    root: Path
    search_path: tuple[Path, ...]
    note: str | None = None

    @property
    def less_specific(self) -> tuple[Path, ...]:
        """The directories whose files of the same name it would override."""
        return self.search_path[self.search_path.index(self.directory) + 1 :]

    @property
    def real_directory(self) -> Path:
        """The directory without links: one that several names mean has one of these."""
        return rooted.real(self.root, self.directory.relative_to(self.root))


def find_libvirt(root: Path) -> tuple[int, int, int] | None:
    """The newest libvirt installed in a root, by its library's name; None where there is none."""
    versions = []
    for name in _libraries(root):
        if found := _LIBRARY_NAME.fullmatch(name):
            major, minor, micro = (int(part) for part in found.groups())
            versions.append((major, minor, micro))
    return max(versions, default=None)


def _libraries(root: Path) -> Iterator[str]:
    """The names in the directories of a root that have libraries, Debian's among them."""
    for parent in _LIBRARY_PARENTS:
        for directory in _names(root, parent):
            if directory.startswith("lib"):
                for name in _names(root, f"{parent}/{directory}"):
                    if "-linux-gnu" in name:
                        yield from _names(root, f"{parent}/{directory}/{name}")
                    yield name


def _names(root: Path, directory: str) -> list[str]:
    """What is in a directory, by its path inside a root; nothing where there is none."""
    try:
        return os.listdir(rooted.resolve(root, directory))
    except (OSError, InputError):  # no directory, or links that form a loop
        return []


def choose_place(level: Level, *, root: Path = rooted.HOST, into: Into = Into.AUTO) -> Place:
    """Where descriptors go.

    Args:
        level: Whose they are.
        root: The root directory whose guests use them.
        into: Which program's directory; AUTO keeps the libvirt of that root working.
    """
    base = {
        Level.USER: catalog.user_base(),
        Level.SYSTEM: catalog.SYSTEM_BASE,
        Level.VENDOR: catalog.VENDOR_BASE,
    }[level]
    note = None
    if into is Into.AUTO:
        into = Into.QEMU
        libvirt = find_libvirt(root)
        if libvirt is not None and libvirt < FIRST_TOLERANT_LIBVIRT:
            into = Into.IGVMFW
            note = (
                f"libvirt {'.'.join(map(str, libvirt))} would give up on all firmware if it found "
                "an IGVM descriptor in QEMU's directory, so it goes where only igvmfw looks"
            )
    subdirectory = catalog.OWN_DIRECTORY if into is Into.IGVMFW else catalog.QEMU_DIRECTORY
    return Place(
        directory=root / base / subdirectory,
        root=root,
        search_path=catalog.search_path(root, user=True),
        note=note,
    )


def distinct(places: Iterable[Place]) -> tuple[Place, ...]:
    """The places whose directory is none of those before, by a link or by name."""
    found: dict[Path, Place] = {}
    for place in places:
        found.setdefault(place.real_directory, place)
    return tuple(found.values())


def file_name(stem: str, priority: int) -> str:
    """The name of a descriptor file, such as `65-ovmf-sev.json`.

    Args:
        stem: What it is about; characters that a file name should not have are replaced.
        priority: 0 to 99; the lower one is chosen first.
    Raises:
        UsageError: The priority has more than two digits, or nothing is left of the stem.
    """
    if not 0 <= priority <= 99:
        raise UsageError(f"priority {priority} is not within 0 to 99")
    clean = re.sub(r"[^A-Za-z0-9._+-]+", "-", stem)[:120].strip("-.")
    if not clean:
        raise UsageError(f"no file name can be made from {stem!r}", hint="give one with --name")
    return f"{priority:02}-{clean}{catalog.SUFFIX}"


def plan_install(
    place: Place, name: str, descriptor: Descriptor, writer: Writer = Writer.INSTALL
) -> Action:
    """What installing a descriptor would do.

    Args:
        place: Where it goes.
        name: Its file name.
        descriptor: The descriptor, unsealed.
        writer: Which command writes it.
    Raises:
        RefusedError: It would replace, or override, a file that is not igvmfw's to replace.
    """
    path = place.directory / name
    new = sealed(descriptor, writer)
    old = _existing(path, place.root)
    if old is not None:
        data, theirs = old
        if data == new.write():
            return Action(kind=Kind.UNCHANGED, path=path, reason="is already as it should be")
        if reason := _not_ours(theirs):
            raise RefusedError(
                reason, where=str(path), hint="choose another --name, or remove the file first"
            )
        assert theirs is not None
        if theirs.mapping.filename != descriptor.mapping.filename:
            raise RefusedError(
                f"describes another file, {theirs.mapping.filename}",
                where=str(path),
                hint="choose another --name, or uninstall that one first",
            )
    for directory in place.less_specific:
        if _is_of_another(directory / name, place.root, descriptor):
            raise RefusedError(
                f"{path} would override this descriptor of other firmware",
                where=str(directory / name),
                hint="choose another --name or --priority",
            )
    reason = "replaces what igvmfw wrote before" if old else "new"
    return Action(kind=Kind.WRITE, path=path, reason=reason, data=new.write())


def overriding(place: Place, name: str) -> tuple[Path, ...]:
    """The files of more specific directories that would override a descriptor of that name."""
    more_specific = place.search_path[: place.search_path.index(place.directory)]
    paths = (directory / name for directory in more_specific)
    return tuple(
        path
        for path in paths
        if _exists(path, place.root) and _real_directory(path, place.root) != place.real_directory
    )


def plan_uninstall(place: Place, path: Path) -> Action:
    """What removing a descriptor file would do.

    Raises:
        InputError: There is no such file.
    """
    old = _existing(path, place.root)
    if old is None:
        raise InputError(
            "no such descriptor", where=str(path), hint="'igvmfw list --all' shows all there are"
        )
    if reason := _not_ours(old[1]):
        return Action(kind=Kind.KEEP, path=path, reason=reason)
    return Action(kind=Kind.REMOVE, path=path, reason="written by igvmfw")


def _is_of_another(path: Path, root: Path, descriptor: Descriptor) -> bool:
    """Whether a file describes other firmware, or nobody can tell."""
    old = _existing(path, root)
    if old is None or not old[0]:  # an empty file is nothing that could be overridden
        return False
    theirs = old[1]
    return theirs is None or theirs.mapping.filename != descriptor.mapping.filename


def _exists(path: Path, root: Path) -> bool:
    return rooted.resolve(root, path.relative_to(root)).exists()


def _existing(path: Path, root: Path) -> tuple[bytes, Descriptor | None] | None:
    """A descriptor file's content, and the descriptor where it is one; None without a file."""
    if not os.path.lexists(_real_directory(path, root) / path.name):
        return None
    try:
        data = files.read_text(
            rooted.resolve(root, path.relative_to(root)), limit=jsontext.MAX_SIZE
        )
    except InputError as error:
        raise RefusedError(
            f"exists and cannot be read ({error.message}), so it is not touched", where=str(path)
        ) from None
    try:
        return data, Descriptor.parse(data)
    except DescriptorError:
        return data, None


def _real_directory(path: Path, root: Path) -> Path:
    return rooted.real(root, path.parent.relative_to(root))


def _not_ours(descriptor: Descriptor | None) -> str | None:
    if descriptor is None:
        return "is not a descriptor that igvmfw wrote"
    if is_untouched(descriptor):
        return None
    edited = any(tag.startswith("igvmfw-seal=") for tag in descriptor.tags)
    return "was edited since igvmfw wrote it" if edited else "was not written by igvmfw"


@contextlib.contextmanager
def locked(place: Place, *, create: bool) -> Iterator[None]:
    """Keep other igvmfw processes from changing the same directory meanwhile.

    The lock is a file that only who may write there can open, so nobody else can hold it; it is
    gone afterwards.

    Args:
        place: The directory.
        create: Make the directory where it is missing; otherwise there is nothing to lock.
    Raises:
        OutputError: The directory cannot be made or written.
    """
    directory = rooted.resolve(place.root, place.directory.relative_to(place.root))
    if not create and not os.path.isdir(directory):
        yield
        return
    try:
        _make_directories(directory)
        lock = directory / LOCK
        fd = _acquire(lock)
    except OSError as error:
        raise OutputError(
            f"cannot write: {error.strerror or error}",
            where=str(place.directory),
            hint="run it as root; 'igvmfw install --user' needs none",
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock)
        os.close(fd)


@contextlib.contextmanager
def all_locked(places: Iterable[Place], *, made: Place | None = None) -> Iterator[None]:
    """As `locked`, for several directories.

    They are locked in one order, whoever asks: so two processes never wait for each other.  And
    each once, by whatever names it is given: so a process never waits for itself.

    Args:
        places: The directories.
        made: The one that is made where it is missing.
    Raises:
        OutputError: As `locked`.
    """
    with contextlib.ExitStack() as stack:
        for place in sorted(distinct(places), key=lambda place: str(place.real_directory)):
            create = made is not None and place.real_directory == made.real_directory
            stack.enter_context(locked(place, create=create))
        yield


def _acquire(lock: Path) -> int:
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # who held it before has unlinked it: this one locks nothing then
            if os.path.samestat(os.fstat(fd), os.stat(lock)):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _make_directories(directory: Path) -> None:
    missing = [path for path in (directory, *directory.parents) if not os.path.isdir(path)]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            path.chmod(0o755)  # readable by libvirt, whatever the umask


def carry_out(place: Place, actions: Iterable[Action]) -> None:
    """Do what a plan says; the lock of the place must be held.

    Raises:
        OutputError: A file cannot be written or removed; what was done before stays done.
    """
    left: dict[Path, dict[str, list[str]]] = {}  # of each directory
    for action in actions:
        if action.kind not in (Kind.WRITE, Kind.REMOVE):
            continue
        directory = _real_directory(action.path, place.root)
        real = directory / action.path.name
        if directory not in left:
            left[directory] = _left_behind(directory)
        for name in left[directory].get(files.temporary_prefix(real), ()):
            with contextlib.suppress(OSError):
                os.unlink(directory / name)
        if action.data is not None:
            files.write_atomic(real, action.data)
        else:
            _remove(real, action.path)


def _left_behind(directory: Path) -> dict[str, list[str]]:
    """What killed processes left of writing files, by the prefix of each: nobody writes it now."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):  # writing says what is wrong with it
        for name in os.listdir(directory):
            if name.startswith("."):
                found.setdefault(name[: -files.TEMPORARY_SUFFIX], []).append(name)
    return found


def _remove(real: Path, shown: Path) -> None:
    try:
        os.unlink(real)
        files.sync_directory(real.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(
            f"cannot remove: {error.strerror or error}", where=str(shown), hint="run it as root"
        ) from None


def find_installed(place: Place, word: str) -> tuple[Path, ...]:
    """The descriptor files that a word means, in one directory.

    Args:
        place: The directory.
        word: A descriptor's file name, with or without priority and `.json`, its path, or the
            path of the IGVM file that it describes.
    Raises:
        InputError: Nothing is meant by it.
    """
    found = catalog.load([place.directory], place.root)
    inner = None
    with contextlib.suppress(InputError):
        inner = rooted.inner(place.root, word)
    paths = tuple(
        entry.path
        for entry in found.entries
        if _is_named(entry.name, word)
        or inner == rooted.inner(place.root, entry.path)
        or (entry.descriptor is not None and entry.descriptor.mapping.filename == inner)
    )
    if not paths:
        raise InputError(
            f"no descriptor in {place.directory} is named so, or describes such a file",
            where=word,
            hint="'igvmfw list --all' shows all there are",
        )
    return paths


def _is_named(name: str, word: str) -> bool:
    stem = name.removesuffix(catalog.SUFFIX)
    return word in (name, stem, re.sub(r"^\d\d-", "", stem))
