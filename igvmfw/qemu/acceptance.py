"""What each QEMU release takes of an IGVM file.

Source: QEMU, backends/igvm.c (the table `handlers`, qigvm_directive_vp_context) and
target/i386/igvm.c of the releases named: 10.1.0, 10.2.2 and 11.0.1.
"""

from dataclasses import dataclass, replace

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
        sev_launch: Whether it launches SEV and SEV-ES guests; None where that is not known.  11.0
            loads the file as the machine is reset, and has the launch measured before that
            (hw/core/machine.c, qdev_machine_creation_done), so that the processor refuses the file.
        keeps_policy: Whether a SEV-SNP guest has the domain's policy where the file has none, and
            not policy 0 (target/i386/sev.c, cgs_set_guest_policy).
    """

    version: tuple[int, int]
    headers: frozenset[str]
    native_context: bool
    sev_launch: bool | None = True
    keeps_policy: bool = False

    @property
    def name(self) -> str:
        """The release as QEMU writes it."""
        return f"QEMU {self.version[0]}.{self.version[1]}"


RELEASES = (
    Acceptance(version=(10, 1), headers=_COMMON, native_context=False),
    Acceptance(version=(10, 2), headers=_COMMON, native_context=True),
    Acceptance(
        version=(11, 0),
        headers=_COMMON | {"MADT"},
        native_context=True,
        sev_launch=False,
        keeps_policy=True,
    ),
)
# for an emulator that cannot be asked: nothing is refused that some release takes
ANY_RELEASE = replace(RELEASES[-1], sev_launch=None)


def acceptance_of(version: tuple[int, ...]) -> Acceptance:
    """What a release takes; a newer one than known takes at least what the newest known does.

    Args:
        version: Major, minor, and whatever follows.
    Raises:
        UsageError: The release is too old to take IGVM at all.
    """
    newest = RELEASES[-1]
    if version[:2] > newest.version:
        return replace(newest, version=(version[0], version[1]), sev_launch=None)
    fitting = [release for release in RELEASES if release.version <= version[:2]]
    if not fitting:
        shown = ".".join(map(str, version))
        raise UsageError(
            f"QEMU {shown} takes no IGVM files", hint="QEMU does since 10.1; name a newer one"
        )
    return fitting[-1]
