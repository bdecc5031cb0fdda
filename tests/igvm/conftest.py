"""Peers and firmware for the format's tests."""

import struct
import uuid
from pathlib import Path

import pytest

from tests.parts import need
from tests.testbed.cache import printed


@pytest.fixture(scope="session")
def peers() -> Path:
    """The directory with igvm-inspect and igvm-wrap."""
    found = printed("peers.sh")
    need((found / "igvm-wrap").exists(), "igvm-inspect and igvm-wrap (tests/testbed/peers.sh)")
    return found


@pytest.fixture(scope="session")
def ovmf_bytes(ovmf: Path) -> bytes:
    return ovmf.read_bytes()


@pytest.fixture(scope="session")
def ovmf_with_parameters(ovmf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian's OVMF with the IGVM parameter lists that newer builds of edk2 have.

    The table's TDX entry becomes the IGVM one, which points into the unused end of a volume.
    """
    image = bytearray(ovmf.read_bytes())
    entry = image.rindex(uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le) - 6
    sections = [
        (0x81_2000, 0x1000, 0x100),  # parameter area
        (0, 192, 0x101),  # memory map
        (192, 16, 0x102),  # VP count
        (0x81_3000, 0x1000, 0x200),  # HOB area
    ]
    body = struct.pack("<4sIII", b"IGVM", 16 + 12 * len(sections), 1, len(sections))
    body += b"".join(struct.pack("<III", *section) for section in sections)
    place = image.index(b"\xff" * 4096)
    image[place : place + len(body)] = body
    guid = uuid.UUID("784fa70e-3176-4677-8a20-04b68699e374").bytes_le
    image[entry : entry + 22] = struct.pack("<IH", len(image) - place, 22) + guid
    path = tmp_path_factory.mktemp("ovmf") / "OVMF-parameters.fd"
    path.write_bytes(image)
    return path


@pytest.fixture(scope="session")
def reference() -> Path:
    """The program around the reference crate (tests/igvm/crate)."""
    found = printed("reference.sh")
    need(found.exists(), "the reference crate's program (tests/testbed/reference.sh)")
    return found
