"""The disk that an SVSM keeps its state on, as QEMU is told of it.

The SVSM reaches it through one of the virtio-mmio slots that COCONUT-SVSM's QEMU adds to the
machine q35 for it; the guest above the SVSM does not see it.

Source: COCONUT-SVSM, Documentation/docs/developer/PERSISTENCE.md ("Setup/Testing") and
scripts/launch_guest.sh; the machine properties are those of its QEMU branch, in no release of QEMU
up to 11.0.
"""

from collections.abc import Iterable

from igvmfw.errors import EmulatorError, RefusedError
from igvmfw.qemu.descriptor import StorageInterface
from igvmfw.qemu.options import file_value

STORAGE_ID = "svsm_storage"
SLOTS = "x-svsm-virtio-mmio"  # machine property: the slots for the SVSM's own devices
PLANE = "device-plane"  # machine property, where devices belong to a plane (VMPL) of the guest
# virtio-mmio speaks virtio 0.9 by default, which the SVSM's driver does not
TRANSPORT = "virtio-mmio.force-legacy=false"


def arguments(path: str, *, planes: bool = False) -> tuple[str, ...]:
    """What QEMU is told, option and value in turn.

    Args:
        path: The disk's file, raw.
        planes: Whether the guest's devices have to be told apart by plane: SEV-SNP guests, where
            the emulator has the machine property `device-plane`.
    Raises:
        RefusedError: The path is none that QEMU could get.
    """
    machine, device = f"{SLOTS}=on", f"virtio-blk-device,drive={STORAGE_ID}"
    if planes:
        machine += f",kernel-irqchip=split,{PLANE}=2"
        device += ",plane=0"
    drive = f"file={file_value(path)},format=raw,if=none,id={STORAGE_ID},cache=none"
    slots = ("-machine", machine, "-global", TRANSPORT)
    return (*slots, "-drive", drive, "-device", device)


def check_interface(interface: str) -> None:
    """Refuse an interface that no QEMU has beside an IGVM file.

    Source: QEMU 10.2.2, backends/igvm.c and hw/i386/pc_sysfw.c ("pflash devices cannot be
    configured when using IGVM").

    Raises:
        EmulatorError: It is pflash.
    """
    if interface == StorageInterface.PFLASH:
        raise EmulatorError(
            "the firmware keeps its vTPM's state in a pflash device, which QEMU (up to 11.0) "
            "refuses beside an IGVM file",
            hint="choose firmware that keeps it on a virtio-blk-mmio disk, or none",
        )


def check_machine(properties: Iterable[str], machine: str | None, emulator: str) -> None:
    """Refuse an emulator whose machine has no slots for the disk.

    Args:
        properties: The machine's properties.
        machine: The machine type, for the message.
        emulator: The emulator, for the message.
    Raises:
        EmulatorError: It has none.
    """
    if SLOTS not in properties:
        raise EmulatorError(
            f"the machine {machine or 'of its choice'} has no property {SLOTS}, by which the "
            "firmware reaches the state of its vTPM",
            where=emulator,
            hint="COCONUT-SVSM's QEMU has it (github.com/coconut-svsm/qemu), with machine='q35'; "
            "releases of QEMU up to 11.0 have not",
        )


def check_format(format_: str) -> None:
    """Refuse a disk format that the SVSM would not find its state in.

    Raises:
        RefusedError: It is not raw.
    """
    if format_ != "raw":
        raise RefusedError(
            f"the descriptor asks for vTPM state in the format {format_[:40]!r}",
            hint='igvmfw makes raw files: put "format": "raw" into x-vtpm-storage',
        )
