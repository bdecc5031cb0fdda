"""What each QEMU release takes of an IGVM file.

Source: QEMU, backends/igvm.c (the table `handlers`, qigvm_directive_vp_context) and
target/i386/igvm.c of the releases named; 11.0 from the development tree that became it.
"""

from dataclasses import dataclass

from igvmfw.errors import UsageError

_COMMON = frozenset(
    {
        "GUEST_POLICY",
        "PARAMETER_AREA",
        "PAGE_DATA",
        "PARAMETER_INSERT",
        "VP_CONTEXT",
        "REQUIRED_MEMORY",
        "VP_COUNT_PARAMETER",
        "SNP_ID_BLOCK",
        "MEMORY_MAP",
        "ENVIRONMENT_INFO_PARAMETER",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """What one release takes.

    Attributes:
        version: Major and minor.
        headers: The header types it handles, by IGVM_VHT name; any other stops the launch.
        native_context: Whether a native guest may have a VP context (for its first processor).
    """

    version: tuple[int, int]
    headers: frozenset[str]
    native_context: bool

    @property
    def name(self) -> str:
        """The release as QEMU writes it."""
        return f"QEMU {self.version[0]}.{self.version[1]}"


RELEASES = (
    Acceptance(version=(10, 1), headers=_COMMON, native_context=False),
    Acceptance(version=(10, 2), headers=_COMMON, native_context=True),
    Acceptance(version=(11, 0), headers=_COMMON | {"MADT"}, native_context=True),
)


def acceptance_of(version: tuple[int, ...]) -> Acceptance:
    """What a release takes; a newer one than known is judged as the newest known.

    Args:
        version: Major, minor, and whatever follows.
    Raises:
        UsageError: The release is too old to take IGVM at all.
    """
    fitting = [release for release in RELEASES if release.version <= version[:2]]
    if not fitting:
        shown = ".".join(map(str, version))
        raise UsageError(
            f"QEMU {shown} takes no IGVM files", hint="QEMU does since 10.1; name a newer one"
        )
    return fitting[-1]
