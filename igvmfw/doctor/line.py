"""One line of the examination."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from igvmfw.platforms import Platform

PROTECTED = (Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)
ALL = (Platform.NATIVE, *PROTECTED)  # what QEMU launches from an IGVM file


class Status(StrEnum):
    """How something is."""

    OK = "ok"
    MISSING = "missing"  # it is not there
    WRONG = "wrong"  # it is there, and will not work
    UNKNOWN = "unknown"  # it cannot be seen


class Topic(StrEnum):
    """What a line is about."""

    MACHINE = "machine"
    LIBVIRT = "libvirt"
    EMULATOR = "emulator"
    FIRMWARE = "firmware"
    HOOK = "hook"
    CONFINEMENT = "confinement"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What was found of one thing.

    Attributes:
        topic: What it is about.
        name: What is looked at; unique, save for things that there are several of.
        status: How it is.
        found: What was found, for people; where nothing can be seen, why.
        remedy: The command that mends it, or what to do where no command does.
        platforms: The guests that it is about.
        needed: Whether they cannot be launched without it.
    """

    topic: Topic
    name: str
    status: Status
    found: str
    remedy: str | None = None
    platforms: tuple[Platform, ...] = ALL
    needed: bool = True

    def fails(self, asked: Collection[Platform]) -> bool:
        """Whether this keeps guests of these platforms from being launched as they should.

        Args:
            asked: The platforms that count.
        """
        if not set(self.platforms).intersection(asked):
            return False
        return self.status is Status.WRONG or (self.status is Status.MISSING and self.needed)


def is_fit(lines: Sequence[Line], asked: Collection[Platform]) -> bool:
    """Whether nothing stands in the way of guests of these platforms."""
    return not any(line.fails(asked) for line in lines)
