"""IGVM files as a whole: read from a path, and summed up."""

from pathlib import Path

from igvmfw import files
from igvmfw.errors import IgvmError, IgvmfwError
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.payload import Payload, identify
from igvmfw.igvm.summary import Summary, summarize
from igvmfw.records import Record


class Inspection(Record):
    """What is inside an IGVM file.

    Attributes:
        image: The file itself, with every header.
        payload: The software that it carries on its first platform.
        summaries: What it does on each of its platforms, in file order.
    """

    image: IgvmFile
    payload: Payload
    summaries: tuple[Summary, ...]


def load_image(path: Path | str, *, lenient: bool = False) -> IgvmFile:
    """Read an IGVM file.

    The content is kept, once, for as long as the image is used.  A file of more than 64 MiB is not
    read but mapped.  Replace such files by renaming a new one over them: one that is truncated
    meanwhile would end the process.

    Args:
        path: A regular file; `-` reads standard input.
        lenient: Go on after a broken rule of the format as far as the file can be read; the
            image's `problems` say what is wrong.
    Raises:
        InputError: The file is missing, unreadable or not a regular file, or becomes shorter while
            it is read.
        IgvmError: It breaks a rule of the format (when lenient: it has no fixed header).
    """
    with files.content_of(path) as content:
        try:
            return IgvmFile.parse(content, lenient=lenient)
        except IgvmfwError as error:
            raise error.within(str(path)) from None


def inspect_image(image: IgvmFile) -> Inspection:
    """Say what is inside an IGVM file.

    Args:
        image: The file; one that was read leniently may lack its data, and then has no payload.
    Raises:
        IgvmError: A page or a VP context lies outside the file's data, or the file unfolds to more
            memory than igvmfw looks at.
    """
    return Inspection(
        image=image,
        payload=find_payload(image),
        summaries=summarize(image),
    )


def find_payload(image: IgvmFile) -> Payload:
    """The software that a file carries; nothing where a file read leniently misses its data.

    Raises:
        IgvmError: As `inspect_image`.
    """
    try:
        return identify(image)
    except IgvmError:
        if not image.problems:
            raise
        return Payload()
