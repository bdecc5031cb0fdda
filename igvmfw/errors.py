"""Every failure igvmfw reports, in one tree.

    IgvmfwError                    exit code
    ├── UsageError                 2   the command line or an API argument is wrong
    ├── InputError                 3   what was read is damaged, invalid, missing or unreadable
    │   ├── IgvmError                  an IGVM file
    │   ├── FirmwareError              a raw firmware image (OVMF)
    │   ├── DescriptorError            a QEMU firmware descriptor
    │   └── DomainError                a libvirt domain XML
    ├── NegativeError              1   the question was understood, the answer is no
    │   ├── NoFirmwareError            no descriptor satisfies the request
    │   └── RefusedError               going on would give a wrong or failing launch
    └── HostError                  4   the host lacks something
        ├── OutputError                a result cannot be written
        ├── EmulatorError              QEMU is missing, or cannot take IGVM
        └── LibvirtError               libvirt is missing, or reported an error

A message says what happened; `where` names the place (a path, with an offset, a JSON path or a
line where there is one); `hint` says what to do about it.  `str()` joins all three into the one
line that a person sees.
"""

from typing import ClassVar, Self


class IgvmfwError(Exception):
    """Root of all errors igvmfw raises on purpose.

    Args:
        message: What happened, with what was found and what was expected.
        where: The place: a path, or a position within what is being read.
        hint: What the reader can do about it.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def within(self, outer: str) -> Self:
        """Prefix the place with an outer one, such as the file's path; returns the same error.

        Parsers raise with the place they know; callers that know more add it while the error
        passes, so that no parser has to carry a path around.
        """
        self.where = outer if not self.where else f"{outer}: {self.where}"
        return self

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text


class UsageError(IgvmfwError):
    """The command line, or an argument of the API, is wrong."""

    exit_code = 2


class InputError(IgvmfwError):
    """What was read is damaged, invalid, missing or unreadable."""


class IgvmError(InputError):
    """An IGVM file breaks the format's rules, or a bound igvmfw sets."""


class FirmwareError(InputError):
    """A raw firmware image lacks what wrapping it needs."""


class DescriptorError(InputError):
    """A firmware descriptor is not what QEMU's firmware.json describes."""


class DomainError(InputError):
    """A domain XML is not well-formed, or asks for something contradictory."""


class NegativeError(IgvmfwError):
    """The question was understood, and the answer is no."""

    exit_code = 1


class NoFirmwareError(NegativeError):
    """No firmware descriptor satisfies the request."""


class RefusedError(NegativeError):
    """Going on would give a launch that fails, or is not the one asked for."""


class PlatformError(RefusedError):
    """The IGVM file does not have the guest's platform."""


class HostError(IgvmfwError):
    """The host lacks something that the command needs."""

    exit_code = 4


class OutputError(HostError):
    """A result cannot be written: no such directory, no permission, no room."""


class EmulatorError(HostError):
    """QEMU is missing, cannot be run, or cannot take IGVM files."""


class LibvirtError(HostError):
    """libvirt is missing or unreachable, or reported an error."""
