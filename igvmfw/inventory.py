"""The descriptors of a host together with the IGVM files they name, as those are now.

Files are opened and read here; a file that cannot be read becomes a state, never an exception.
"""

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from igvmfw import files, rooted
from igvmfw.errors import IgvmfwError, InputError
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.payload import Payload, identify
from igvmfw.platforms import Platform
from igvmfw.provenance import FileIdentity, described_file
from igvmfw.qemu.catalog import Catalog, Entry
from igvmfw.qemu.descriptor import PLATFORM_FEATURES, Descriptor, Device
from igvmfw.records import Record


class FileState(StrEnum):
    """What became of the file that a descriptor names."""

    PRESENT = "present"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    DAMAGED = "damaged"
    CHANGED = "changed"  # not the one that was described


class Row(Record):
    """A descriptor file and its IGVM file.

    Attributes:
        entry: The descriptor file.
        state: What became of the IGVM file; None where the descriptor names none.
        problem: What is wrong with it, for people.
        platforms: What a guest can take from it: by the file, or by the descriptor where the file
            cannot tell.
        payload: What it carries on its first platform.
    """

    entry: Entry
    state: FileState | None = None
    problem: str | None = None
    platforms: tuple[Platform, ...] = ()
    payload: Payload | None = None


def take(
    found: Catalog,
    root: Path = rooted.HOST,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Row, ...]:
    """Look at the file of every descriptor.

    Args:
        found: The catalogue, whose order is kept.
        root: The root directory that descriptors' paths are seen in.
        progress: Told how many are done, of how many.
    """
    rows = []
    for entry in found.entries:
        rows.append(_row(entry, root))
        progress(len(rows), len(found.entries))
    return tuple(rows)


def _row(entry: Entry, root: Path) -> Row:
    descriptor = entry.descriptor
    if descriptor is None or descriptor.mapping.device is not Device.IGVM:
        return Row(entry=entry)
    told = platforms_told(descriptor)
    name = descriptor.mapping.filename
    if not name.startswith("/"):
        problem = f"{name} is no absolute path: nobody can find the file"
        return Row(entry=entry, state=FileState.MISSING, problem=problem, platforms=told)
    try:
        path = rooted.resolve(root, name)
        info = os.stat(path)
        with files.content_of(path) as data:
            return _look(entry, descriptor, data, info)
    except FileNotFoundError:
        problem = f"{name} does not exist"
        return Row(entry=entry, state=FileState.MISSING, problem=problem, platforms=told)
    except OSError as error:
        problem = f"{name}: {error.strerror}"
    except InputError as error:
        problem = f"{name}: {error.message}"
    return Row(entry=entry, state=FileState.UNREADABLE, problem=problem, platforms=told)


def _look(entry: Entry, descriptor: Descriptor, data: memoryview, info: os.stat_result) -> Row:
    name = descriptor.mapping.filename
    try:
        image = IgvmFile.parse(data)
        payload = identify(image)
        platforms = image.supported
    except IgvmfwError as error:
        problem = f"{name}: {error}"
        told = platforms_told(descriptor)
        return Row(entry=entry, state=FileState.DAMAGED, problem=problem, platforms=told)
    changed = _is_changed(described_file(descriptor), data, info)
    return Row(
        entry=entry,
        state=FileState.CHANGED if changed else FileState.PRESENT,
        problem=f"{name} is not the file that was described" if changed else None,
        platforms=platforms,
        payload=payload,
    )


def _is_changed(described: FileIdentity | None, data: memoryview, info: os.stat_result) -> bool:
    if described is None or described.looks_like(info):
        return False
    # the digest last: it costs reading the whole file
    return described.size != data.nbytes or described.sha256 != FileIdentity.of(data).sha256


def platforms_told(descriptor: Descriptor) -> tuple[Platform, ...]:
    """The platforms that a descriptor's features name."""
    return tuple(
        platform
        for platform, feature in PLATFORM_FEATURES.items()
        if feature in descriptor.features
    )
