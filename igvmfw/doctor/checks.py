"""Facts → lines.  Nothing here looks at the host."""

from collections.abc import Collection

from igvmfw.doctor import hardware, software
from igvmfw.doctor.facts import Facts
from igvmfw.doctor.line import Line
from igvmfw.platforms import Platform

_EXAMINERS = (
    hardware.machine_lines,
    software.libvirt_lines,
    software.emulator_lines,
    software.firmware_lines,
    software.hook_lines,
    software.confinement_lines,
)


def examine(facts: Facts, platforms: Collection[Platform]) -> tuple[Line, ...]:
    """Judge a host.

    Args:
        facts: What `gather` gave.
        platforms: Only what is about guests of these.
    Returns:
        By topic, in the order of a launch: processor to guest.
    """
    lines = (line for examiner in _EXAMINERS for line in examiner(facts))
    return tuple(line for line in lines if set(line.platforms).intersection(platforms))
