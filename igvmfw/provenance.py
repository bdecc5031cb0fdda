"""What igvmfw notes in the tags of a descriptor: the file described, and who wrote the descriptor.

firmware.json keeps `tags` for development and debugging and has management software pass over
them, so nobody chooses firmware by these.  Three are igvmfw's:

    igvmfw-file=sha256:HEX,size:BYTES[,ctime:NANOSECONDS]   the IGVM file as it was
    igvmfw-profile=upstream                                 of refresh's, where it is not igvmfw
    igvmfw-seal=WRITER,sha256:HEX                           over all of the descriptor but this tag

A descriptor whose seal holds was written by igvmfw and not edited since.  Only such a one is
replaced or removed.  The seal is no signature: whoever may write the directory can also seal.
"""

import hashlib
import json
import os
import re
from enum import StrEnum
from typing import Self

from igvmfw.qemu.descriptor import Descriptor
from igvmfw.records import Record

_FILE = re.compile(r"igvmfw-file=sha256:([0-9a-f]{64}),size:(\d{1,20})(?:,ctime:(-?\d{1,20}))?")
_SEAL = re.compile(r"igvmfw-seal=(install|refresh),sha256:([0-9a-f]{64})")

_TICK_NS = 20_000_000  # the kernel's clock for files goes on every 10 ms or more often
_COARSEST_NS = 2_000_000_000  # of file systems that keep whole seconds, FAT only every other one
UPSTREAM_TAG = "igvmfw-profile=upstream"


class Writer(StrEnum):
    """Which command wrote a descriptor, and so which one keeps it."""

    INSTALL = "install"
    REFRESH = "refresh"


class FileIdentity(Record):
    """An IGVM file as it was when it was described.

    Attributes:
        sha256: Of its content, hexadecimal.
        size: In bytes.
        ctime_ns: When its content or status last changed, in nanoseconds since 1970; None where it
            had just changed, or the descriptor's text shall depend on the content alone, as in
            packages.  Not the time of writing: packages and images set that, and two versions of a
            file may share it.
    """

    sha256: str
    size: int
    ctime_ns: int | None = None

    @classmethod
    def of(cls, data: bytes | memoryview, info: os.stat_result | None = None) -> Self:
        """The identity of a file's content.

        Args:
            data: The whole content.
            info: Its status, where the time shall be noted.
        """
        return cls(
            sha256=hashlib.sha256(data).hexdigest(),
            size=memoryview(data).nbytes,
            ctime_ns=None if info is None else info.st_ctime_ns,
        )

    def tag(self) -> str:
        """The tag that says so."""
        time = "" if self.ctime_ns is None else f",ctime:{self.ctime_ns}"
        return f"igvmfw-file=sha256:{self.sha256},size:{self.size}{time}"

    def looks_like(self, info: os.stat_result) -> bool:
        """Whether size and time say that a file is still this one; its content is not read."""
        return info.st_size == self.size and info.st_ctime_ns == self.ctime_ns


def shows_changes(info: os.stat_result, now_ns: int) -> bool:
    """Whether any change of a file from now on gives it another time than it has.

    One that comes as soon after the last as the file system's clock cannot tell leaves the time as
    it is, and would never be seen.  So git does not trust the time of what changed just now either.

    Args:
        info: The file's status.
        now_ns: What the clock said before that was taken, in nanoseconds since 1970.
    """
    whole = info.st_ctime_ns % 1_000_000_000 == 0  # a finer clock has such times once in a while
    return info.st_ctime_ns + _TICK_NS + (_COARSEST_NS if whole else 0) < now_ns


def described_file(descriptor: Descriptor) -> FileIdentity | None:
    """The file that a descriptor was made for, where igvmfw noted it."""
    for tag in descriptor.tags:
        if found := _FILE.fullmatch(tag):
            sha256, size, ctime = found.groups()
            return FileIdentity(
                sha256=sha256, size=int(size), ctime_ns=None if ctime is None else int(ctime)
            )
    return None


def sealed(descriptor: Descriptor, writer: Writer) -> Descriptor:
    """The descriptor with its seal as the last tag."""
    plain = _without_seal(descriptor)
    return plain.replace(tags=(*plain.tags, f"igvmfw-seal={writer},sha256:{_digest(plain)}"))


def find_writer(descriptor: Descriptor) -> Writer | None:
    """Who wrote a descriptor and left a seal, whether it holds or not."""
    seals = [found for tag in descriptor.tags if (found := _SEAL.fullmatch(tag))]
    return Writer(seals[0].group(1)) if len(seals) == 1 else None


def is_untouched(descriptor: Descriptor) -> bool:
    """Whether igvmfw wrote the descriptor and nobody edited it since."""
    seals = [found for tag in descriptor.tags if (found := _SEAL.fullmatch(tag))]
    return len(seals) == 1 and seals[0].group(2) == _digest(_without_seal(descriptor))


def _without_seal(descriptor: Descriptor) -> Descriptor:
    tags = tuple(tag for tag in descriptor.tags if not _SEAL.fullmatch(tag))
    return descriptor.replace(tags=tags)


def _digest(descriptor: Descriptor) -> str:
    canonical = json.dumps(descriptor.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
