"""Keeping vendor descriptors in line with the IGVM files that packages install.

What packaging triggers call: a new file gets a descriptor, a changed one a new one, and when a file
is gone its descriptor goes; where one merely cannot be read, it stays.  A file whose size and time
are those of its descriptor is not opened.  A file that another descriptor of the same level
describes, as its package brought it, gets none.
"""

import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from igvmfw import rooted
from igvmfw.description import describe_file
from igvmfw.errors import IgvmfwError, InputError
from igvmfw.install import (
    VENDOR_PRIORITY,
    Action,
    Kind,
    Place,
    all_locked,
    carry_out,
    distinct,
    file_name,
)
from igvmfw.provenance import (
    UPSTREAM_TAG,
    Writer,
    described_file,
    find_writer,
    is_untouched,
    sealed,
)
from igvmfw.qemu import catalog
from igvmfw.qemu.catalog import Entry
from igvmfw.qemu.descriptor import Descriptor
from igvmfw.qemu.schema import Profile

# where distributions put IGVM files
VENDOR_DATA = ("coconut-svsm", "edk2", "OVMF", "ovmf", "qemu", "igvm")
SUFFIX = ".igvm"
_MAX_DEPTH = 4  # directories below a vendor directory
_GONE = (FileNotFoundError, NotADirectoryError)  # any other error says nothing about a file


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshed:
    """What a refresh did.

    Attributes:
        actions: One for each descriptor file concerned.
        problems: Files that could not be described; the others were.
    """

    actions: tuple[Action, ...]
    problems: tuple[IgvmfwError, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """A descriptor that there is."""

    path: Path
    descriptor: Descriptor

    @property
    def file(self) -> str:
        """The file that it describes."""
        return self.descriptor.mapping.filename

    @property
    def is_ours(self) -> bool:
        """Whether a refresh wrote it, and nobody edited it."""
        return find_writer(self.descriptor) is Writer.REFRESH and is_untouched(self.descriptor)


@dataclass(slots=True, kw_only=True)
class _Plan:
    place: Place
    profile: Profile
    everything: bool
    note_time: bool
    progress: Callable[[int, int], None]
    ours: dict[str, list[_Known]] = field(default_factory=dict)  # by IGVM file
    names: set[str] = field(default_factory=set)  # file names in use in the place
    actions: list[Action] = field(default_factory=list)
    problems: list[IgvmfwError] = field(default_factory=list)

    def add(self, kind: Kind, path: Path, reason: str, data: bytes | None = None) -> None:
        self.actions.append(Action(kind=kind, path=path, reason=reason, data=data))

    def is_here(self, known: _Known) -> bool:
        return known.path.parent == self.place.directory


def vendor_directories(root: Path = rooted.HOST) -> tuple[Path, ...]:
    """The directories that packages install IGVM files into."""
    return tuple(root / catalog.VENDOR_BASE / name for name in VENDOR_DATA)


def refresh(
    place: Place,
    directories: Sequence[Path],
    *,
    profile: Profile = Profile.IGVMFW,
    everything: bool = False,
    note_time: bool = True,
    dry_run: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Refreshed:
    """Bring the descriptors of a directory in line with the IGVM files of others.

    Args:
        place: Where the descriptors go; those in the level's other directory move there.
        directories: Where to look for files named *.igvm, as the host names them.
        profile: What the descriptors may hold.
        everything: Read every file, also one that looks unchanged.
        note_time: Note each file's time, which the next refresh knows it by, as `describe_file`
            does; without, the descriptors depend on the files' contents alone.
        dry_run: Only say what would be done.
        progress: Told how many files have been looked at, of how many.
    Raises:
        OutputError: The place cannot be written.
        InputError: A directory is not below the root, or one of descriptors cannot be read.
    """
    found, problems = _find_files(place.root, directories)
    plan = _Plan(
        place=place,
        profile=profile,
        everything=everything,
        note_time=note_time,
        progress=progress,
    )
    if dry_run:
        _plan(plan, found, directories)
    else:
        others = _same_level(place)
        needed = found or any(known.is_ours for known in _known(_load(*others)))
        with all_locked((place, *others), made=place if needed else None):
            _plan(plan, found, directories)
            carry_out(place, plan.actions)
    return Refreshed(actions=tuple(plan.actions), problems=(*problems, *plan.problems))


def remove_all(place: Place, *, dry_run: bool = False) -> Refreshed:
    """Remove what refreshes wrote, as before igvmfw itself is removed; edited descriptors are kept.

    Args:
        place: A directory; the other ones of its level are emptied, too.
        dry_run: Only say what would be done.
    Raises:
        OutputError: A directory cannot be written.
    """
    places = (place, *_same_level(place))
    with all_locked(() if dry_run else places):
        entries = catalog.load([each.directory for each in places], place.root).entries
        actions = tuple(
            _removal(entry.path, entry.descriptor, "written by refresh")
            for entry in entries
            if entry.descriptor is not None and find_writer(entry.descriptor) is Writer.REFRESH
        )
        if not dry_run:
            carry_out(place, actions)
    return Refreshed(actions=actions, problems=())


def _same_level(place: Place) -> tuple[Place, ...]:
    """The same level's directory of the other program, where it is not one with the place's."""
    base = place.directory.parents[1]
    both = (base / catalog.QEMU_DIRECTORY, base / catalog.OWN_DIRECTORY)
    return distinct((place, *(place.replace(directory=d) for d in both)))[1:]


def _find_files(
    root: Path, directories: Sequence[Path]
) -> tuple[dict[str, os.stat_result], list[IgvmfwError]]:
    """The IGVM files below directories, by the path seen inside the root."""
    found: dict[str, os.stat_result] = {}
    problems: list[IgvmfwError] = []
    for directory in directories:
        inner = rooted.inner(root, directory)
        for path in sorted(_walk(root, rooted.resolve(root, inner), inner, problems)):
            try:
                info = os.stat(rooted.resolve(root, path))
            except _GONE:
                continue  # a link to nothing; the file it meant is gone
            except OSError as error:
                problems.append(_unreadable(root, path, f"cannot read: {error.strerror}"))
                continue
            except InputError as error:
                problems.append(_unreadable(root, path, error.message, error.hint))
                continue
            if stat.S_ISREG(info.st_mode):
                found[path] = info
    return _without_aliases(root, found), problems


def _unreadable(root: Path, path: str, what: str, hint: str | None = None) -> InputError:
    """The problem with a file or directory, which is named as the host does."""
    return InputError(what, where=str(root / path.lstrip("/")), hint=hint)


def _walk(
    root: Path, real: Path, inner: str, problems: list[IgvmfwError], depth: int = 0
) -> Iterator[str]:
    try:
        with os.scandir(real) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                below = f"{inner.rstrip('/')}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    if depth < _MAX_DEPTH:
                        yield from _walk(root, real / entry.name, below, problems, depth + 1)
                elif entry.name.endswith(SUFFIX):
                    yield below
    except _GONE:
        return
    except OSError as error:
        problems.append(_unreadable(root, inner, f"cannot read: {error.strerror}"))


def _without_aliases(root: Path, found: dict[str, os.stat_result]) -> dict[str, os.stat_result]:
    """The files without the links that mean another one of them."""
    plain = {path: info for path, info in found.items() if not _is_link(root, path)}
    known = {(info.st_dev, info.st_ino) for info in plain.values()}
    for path, info in found.items():
        if path not in plain and (info.st_dev, info.st_ino) not in known:
            known.add((info.st_dev, info.st_ino))
            plain[path] = info
    return dict(sorted(plain.items()))


def _is_link(root: Path, path: str) -> bool:
    return rooted.real(root, path) != root / path.lstrip("/")


def _plan(plan: _Plan, found: dict[str, os.stat_result], directories: Sequence[Path]) -> None:
    place = plan.place
    here, elsewhere = _load(place), _load(*_same_level(place))
    plan.names = {entry.name for entry in here}
    others: dict[str, _Known] = {}
    for known in _known((*here, *elsewhere)):
        if known.is_ours:
            _take(plan, known)
        else:
            others.setdefault(known.file, known)
    for done, (path, info) in enumerate(found.items()):
        plan.progress(done, len(found))
        if path in others:
            _plan_others(plan, path, others[path])
        else:
            _plan_file(plan, path, info)
    below = tuple(f"{rooted.inner(place.root, each).rstrip('/')}/" for each in directories)
    files = {(info.st_dev, info.st_ino) for info in found.values()}
    for known in (*itertools.chain(*plan.ours.values()), *others.values()):
        if known.file not in found and find_writer(known.descriptor) is Writer.REFRESH:
            looked = known.file.startswith(below)
            gone = _why_gone(place.root, known.file, files) if looked else None
            _plan_unfound(plan, known, gone)


def _known(entries: Sequence[Entry]) -> Iterator[_Known]:
    """The descriptors of those files that are some."""
    return (_Known(e.path, e.descriptor) for e in entries if e.descriptor is not None)


def _take(plan: _Plan, known: _Known) -> None:
    """Know a descriptor as refresh's; one of the other directory goes where the right has one."""
    ours = plan.ours.setdefault(known.file, [])
    if not plan.is_here(known) and any(plan.is_here(own) for own in ours):
        plan.add(Kind.REMOVE, known.path, f"belongs into {plan.place.directory}")
    else:
        ours.append(known)


def _load(*places: Place) -> tuple[Entry, ...]:
    """The descriptors of directories; one that cannot be read is no empty one."""
    found = catalog.load([p.directory for p in places], places[0].root if places else rooted.HOST)
    if found.problems:
        raise found.problems[0]
    return found.entries


def _plan_others(plan: _Plan, path: str, theirs: _Known) -> None:
    """Leave a file to the descriptor that somebody else wrote for it."""
    edited = find_writer(theirs.descriptor) is Writer.REFRESH
    reason = "was edited since igvmfw wrote it" if edited else "is not refresh's"
    kind = Kind.KEEP if edited else Kind.UNCHANGED
    plan.add(kind, theirs.path, f"describes {path}, and {reason}")
    for own in plan.ours.get(path, ()):
        plan.add(Kind.REMOVE, own.path, f"{path} has another descriptor, {theirs.path}")


def _plan_file(plan: _Plan, path: str, info: os.stat_result) -> None:
    ours = plan.ours.get(path, [])
    if ours and all(_looks_unchanged(plan, own, info) for own in ours):
        for own in ours:
            _leave(plan, own, Kind.UNCHANGED, f"{path} looks unchanged")
        return
    try:
        host = str(plan.place.root / path.lstrip("/"))
        described = describe_file(
            host,
            root=plan.place.root,
            profile=plan.profile,
            note_time=plan.note_time,
            tags=(UPSTREAM_TAG,) if plan.profile is Profile.UPSTREAM else (),
        )
    except IgvmfwError as error:
        # its frames would keep the file's content as long as the error
        error.__context__ = None
        plan.problems.append(error.with_traceback(None))
        # of the class itself is what `files` says of reading; what was read has one below it
        unread = type(error) is InputError
        for own in ours:
            if unread:
                _leave(plan, own, Kind.KEEP, f"{path} cannot be read")
            else:
                plan.add(Kind.REMOVE, own.path, f"{path} is no longer what it describes")
        return
    now = sealed(described.descriptor, Writer.REFRESH)
    if not ours:
        target = plan.place.directory / _free_name(plan, path)
        plan.add(Kind.WRITE, target, f"{path} is new", now.write())
    for own in ours:
        if own.descriptor == now:
            _leave(plan, own, Kind.UNCHANGED, f"{path} is unchanged")
        else:
            reason = f"{path} {_what_changed(own.descriptor, now)}"
            _write(plan, own, now, reason)


def _leave(plan: _Plan, own: _Known, kind: Kind, reason: str) -> None:
    """Let a descriptor say what it says; from the other directory it moves into the right one."""
    if plan.is_here(own):
        plan.add(kind, own.path, reason)
    else:
        _move(plan, own)


def _move(plan: _Plan, own: _Known) -> None:
    _write(plan, own, own.descriptor, f"moved from {own.path.parent}")


def _write(plan: _Plan, own: _Known, now: Descriptor, reason: str) -> None:
    target = own.path
    if not plan.is_here(own):
        target = plan.place.directory / _free_name(plan, own.file, own.path.name)
    plan.add(Kind.WRITE, target, reason, now.write())
    if target != own.path:
        plan.add(Kind.REMOVE, own.path, f"belongs into {plan.place.directory}")


def _what_changed(descriptor: Descriptor, now: Descriptor) -> str:
    before, after = described_file(descriptor), described_file(now)
    if before is None or after is None or before.sha256 != after.sha256:
        return "changed"
    if after.ctime_ns is None and before.ctime_ns is not None:
        return "is described without its time now"
    if before.ctime_ns is None and after.ctime_ns is not None:
        return "has its time noted now"
    if before.ctime_ns != after.ctime_ns:
        return "has another time, and the same content"
    return "is the same, and described anew"


def _looks_unchanged(plan: _Plan, own: _Known, info: os.stat_result) -> bool:
    """Whether a descriptor is what this run would write, as far as that shows without reading."""
    if plan.everything or not plan.note_time:
        return False
    if (UPSTREAM_TAG in own.descriptor.tags) != (plan.profile is Profile.UPSTREAM):
        return False
    identity = described_file(own.descriptor)
    return identity is not None and identity.looks_like(info)


def _free_name(plan: _Plan, path: str, *wanted: str) -> str:
    """A file name that nobody has; it is taken from then on."""
    names = itertools.chain(wanted, _names(path))
    name = next(name for name in names if name not in plan.names)
    plan.names.add(name)
    return name


def _names(path: str) -> Iterator[str]:
    """File names for a descriptor: from the path, then with its digest, then numbered."""
    stem = path.removeprefix(f"/{catalog.VENDOR_BASE}").strip("/").removesuffix(SUFFIX)
    stem = stem.replace("/", "-")
    yield file_name(stem, VENDOR_PRIORITY)
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
    stem = f"{stem[-80:]}-{digest[:12]}"
    yield file_name(stem, VENDOR_PRIORITY)
    for number in itertools.count(2):
        yield file_name(f"{stem}-{number}", VENDOR_PRIORITY)


def _plan_unfound(plan: _Plan, known: _Known, gone: str | None) -> None:
    """What becomes of refresh's descriptor of a file that is gone, or was not looked at."""
    if gone:
        plan.actions.append(_removal(known.path, known.descriptor, f"{known.file} {gone}"))
    elif known.is_ours and not plan.is_here(known):
        _move(plan, known)


def _why_gone(root: Path, path: str, known: set[tuple[int, int]]) -> str | None:
    """Why there is no such file to describe; None where there is one, or nobody can tell.

    Args:
        root: The root that the path is seen in.
        path: The file, which was not found.
        known: The files that were.
    """
    try:
        info = os.stat(rooted.resolve(root, path))
    except _GONE:
        return "is gone"
    except (OSError, InputError):
        return None
    if (info.st_dev, info.st_ino) in known and _is_link(root, path):
        return "is a link to another file now"
    return None


def _removal(path: Path, descriptor: Descriptor, reason: str) -> Action:
    """Remove a descriptor of refresh's, unless somebody edited it."""
    if is_untouched(descriptor):
        return Action(kind=Kind.REMOVE, path=path, reason=reason)
    reason += ", but the descriptor was edited since igvmfw wrote it"
    return Action(kind=Kind.KEEP, path=path, reason=reason)
