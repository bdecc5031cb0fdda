"""An IGVM file on disk → its descriptor, with the reasons: `describe`, with the file read."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from igvmfw import files, presets, rooted
from igvmfw.describe import Description, Stated, describe
from igvmfw.errors import IgvmfwError, InputError, RefusedError
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.payload import firmware_image, identify
from igvmfw.igvm.uefi import find_facts
from igvmfw.provenance import FileIdentity, shows_changes
from igvmfw.qemu.options import file_value
from igvmfw.qemu.schema import Profile


def describe_file(
    path: str,
    *,
    root: Path = rooted.HOST,
    profile: Profile = Profile.IGVMFW,
    stated: Stated | None = None,
    note_time: bool = False,
    tags: Sequence[str] = (),
) -> Description:
    """Read an IGVM file and describe it, with the preset of its place where there is one.

    Args:
        path: The file, as the host names it; below `root`.
        root: The root directory whose guests use it: the descriptor has the path seen in there.
        profile: What the descriptor may hold.
        stated: What the caller adds.
        note_time: Note the file's time too, so that a change is seen without reading the file;
            not of a file that changed just now, whose next change may not show in it.
        tags: Tags for the descriptor, before the one that says which file was described.
    Raises:
        InputError: The file is missing, unreadable, damaged, or not below `root`.
        RefusedError: No QEMU takes such a file, or it has a name that QEMU cannot be given.
        UsageError: Something has to be stated that the file cannot tell, or what is stated is not
            among what firmware.json knows.
    """
    inner = rooted.inner(root, path)
    try:
        inner.encode()
    except UnicodeEncodeError:
        raise InputError(
            "the file's name is not UTF-8", where=path, hint="a descriptor is: rename the file"
        ) from None
    try:
        file_value(inner)
    except RefusedError as error:
        raise error.within(path) from None
    real = rooted.resolve(root, inner)
    now = time.time_ns()
    try:
        info = os.stat(real)  # before reading: a change meanwhile shows in the time
    except OSError:
        info = None  # opening it gives the better error
    try:
        with files.content_of(real) as data:
            image = IgvmFile.parse(data)
            payloads = [identify(image, platform) for platform in image.supported]
            facts = [find_facts(firmware_image(image, platform)) for platform in image.supported]
            preset = presets.find(inner)
            noted = note_time and info is not None and shows_changes(info, now)
            identity = FileIdentity.of(data, info if noted else None)
            return describe(
                image,
                payloads,
                facts,
                filename=inner,
                profile=profile,
                stated=stated,
                preset=presets.stated(preset) if preset is not None else None,
                tags=(*tags, identity.tag()),
            )
    except IgvmfwError as error:
        if error.where == str(real):
            error.where = None  # it is named as the caller does
        raise error.within(path) from None
