"""What a check finds, and how it says so."""

from dataclasses import dataclass
from enum import StrEnum

from igvmfw.platforms import Platform


class Severity(StrEnum):
    """What a finding means for a launch."""

    ERROR = "error"  # refused by QEMU, or unsafe to give to it
    WARNING = "warning"  # launched, but not quite what the file says


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing about a file that matters for its launch.

    Attributes:
        rule: Its name in docs/check.md.
        severity: What it means for the launch.
        platform: The guest's.
        header_index: Counts all variable headers from 0; None where no header is at fault.
        file_offset: Of that header, in bytes.
        message: What is the matter, for people.
        remedy: What to do about it, for people.
    """

    rule: str
    severity: Severity
    platform: Platform
    header_index: int | None
    file_offset: int | None
    message: str
    remedy: str

    @property
    def where(self) -> str:
        """The place, for people."""
        if self.header_index is None:
            return "file"
        return f"header {self.header_index}, offset 0x{self.file_offset:x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """What is known of the guest; None where it is not.

    Attributes:
        vcpus: Its virtual processors.
        memory: In bytes.
    """

    vcpus: int | None = None
    memory: int | None = None


Result = tuple[str, Severity, str, str]  # rule, severity, message, remedy


def error(rule: str, message: str, remedy: str) -> Result:
    """A breach that stops the launch, or must."""
    return rule, Severity.ERROR, message, remedy


def warning(rule: str, message: str, remedy: str) -> Result:
    """A launch that is not quite what the file says."""
    return rule, Severity.WARNING, message, remedy


def plain(what: str) -> Result:
    """Memory that stays in plain text on SEV and SEV-ES."""
    return warning(
        "unmeasured-plain",
        f"{what} is not encrypted by QEMU: the guest reads noise there unless it maps it shared",
        "make sure that the firmware expects this, or use SEV-SNP",
    )


def unparsable(what: str) -> Result:
    """What libigvm, the parser within QEMU, does not read."""
    return error(
        "unparsable",
        f"QEMU's parser (libigvm) does not read a file with {what}: 'Unable to parse IGVM file'",
        "rebuild the image",
    )
