"""The header of a new vTPM's disk against what COCONUT-SVSM's own tool writes.

The bytes are those of `cocoonfs -i FILE -f write-mkfs-info-header -H sha2 -C aes -t 128 -I SALT -s
SIZE` of the crate cocoonfs-cli 0.1.3 (cocoon-tpm-storage 0.1.5).  That tool also formatted disks
with the headers made here: `cocoonfs -i FILE -f list-files -K aabbcc` made the magic COCOONFS.
"""

import pytest

from igvmfw.cocoonfs import MAGIC, check_size, creation_header
from igvmfw.errors import RefusedError

CHECKSUM, MASK = slice(0x2F, 0x37), 0x37
TOOL = {
    ("ddeeff", 8 << 20): (
        "4343 4653 4d4b 4653 1110 1211 1212 1010 101b 101b 101b 101b 101b 1016 1090 0c10"
        "1010 1010 1010 1010 1110 1010 1010 1354 5aa9 4e5a dd41 0e10 1010 1010 1010 1010"
        "1010 1010 1010 1010 cdfe ef10 1010 1010"
    ),
    ("00112233445566778899aabbccddeeff", 8 << 20): (
        "4343 4653 4d4b 4653 1312 1013 1010 1212 1219 1219 1219 1219 1219 1214 1292 0e12"
        "1212 1212 1212 1212 1312 1212 1212 0279 cc6d 4e6f 4b23 5a12 1212 1212 1212 1212"
        "1212 1212 1212 1212 1203 3021 5647 7465 9a8b b8a9 decf fced 1212 1212 1212 1212"
    ),
    ("10", 1 << 20): (
        "4343 4653 4d4b 4653 1011 1310 1313 1111 111a 111a 111a 111a 111a 1117 1191 0d11"
        "1111 1111 1111 1131 1111 1111 1111 1079 4bb8 212d 888f 4011 1111 1111 1111 1111"
        "1111 1111 1111 1111 0111 1111 1111 1111"
    ),
}
METADATA = "7e1f9edd99a5049d 00000000000000000000000000000000 08000000 0004000000000000"


def unmasked(header: bytes) -> bytes:
    """The header without the mask, which whoever writes one chooses."""
    mask = header[MASK]
    plain = bytearray(header)
    plain[8:128] = bytes(byte ^ mask for byte in header[8:128])
    plain[MASK] = 0
    return bytes(plain)


@pytest.mark.parametrize(("salt", "size"), TOOL)
def test_the_header_is_the_tools(salt: str, size: int) -> None:
    mine = creation_header(size, bytes.fromhex(salt))
    tool = bytes.fromhex(TOOL[salt, size]).ljust(128, bytes.fromhex(TOOL[salt, size])[-1:])
    assert unmasked(mine)[:128] == unmasked(tool)
    assert len(mine) == 1024
    assert mine[512:].rstrip(b"\0") == bytes.fromhex(METADATA).rstrip(b"\0")


@pytest.mark.parametrize("salt", [bytes(16), bytes(range(16)), b"\xff" * 16])
def test_a_torn_write_shows(salt: bytes) -> None:
    """Format, "Common extent integrity protection scheme": what tells a part from the whole."""
    header = creation_header(8 << 20, salt)
    assert header[: len(MAGIC)] == MAGIC
    assert 0 not in header[:128]
    assert header[248:256] == header[504:512] == header[CHECKSUM]


def test_a_disk_too_small_to_format() -> None:
    check_size(8192)
    with pytest.raises(RefusedError, match="8191 bytes"):
        check_size(8191)
