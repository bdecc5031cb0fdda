"""What tests of `refresh` share: a root with IGVM files, and what was done to its descriptors."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from igvmfw.igvm.wrap import wrap
from igvmfw.install import Place
from igvmfw.platforms import Platform
from igvmfw.qemu.catalog import load
from igvmfw.refresh import Refreshed, refresh, vendor_directories

Make = Callable[..., Path]


def maker(root: Path, ovmf: Path) -> Make:
    """What puts an IGVM file with OVMF below a root."""
    firmware = ovmf.read_bytes()
    kept: dict[tuple[Platform, ...], bytes] = {}

    def put(name: str, *platforms: Platform) -> Path:
        platforms = platforms or (Platform.NATIVE,)
        if platforms not in kept:
            kept[platforms] = wrap(firmware, platforms)
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kept[platforms])
        settle()
        return path

    return put


def settle() -> None:
    """Let the clock go on: of a file that changed just now no time is noted."""
    time.sleep(0.03)


def run(place: Place, **how: Any) -> Refreshed:
    return refresh(place, vendor_directories(place.root), **how)


def kinds(done: Refreshed) -> dict[str, str]:
    return {action.path.name: action.kind.value for action in done.actions}


def described(place: Place) -> dict[str, str]:
    entries = load([place.directory], place.root).available
    return {entry.name: entry.descriptor.mapping.filename for entry in entries if entry.descriptor}


def contents(place: Place) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.directory.glob("[!.]*")}
