"""The mark by which an SVSM knows a new disk as its own, and formats it at its first start.

COCONUT-SVSM keeps its state in a CocoonFs, an encrypted and authenticated file system whose key it
gets by attestation.  Who has no key can still prepare a disk: the "filesystem creation info header"
at its beginning says how it is to be formatted.  Without it, or with zeros, the SVSM passes over
the disk.

Source: cocoonfs-format.md of the crate cocoon-tpm-storage 0.1.5 (format version 1), sections
"Filesystem creation info header", "Checksum scheme" and "Common extent integrity protection
scheme".  The parameters are those that COCONUT-SVSM's PERSISTENCE.md gives to its tool cocoonfs
(-H sha2 -C aes -t 128), with that tool's defaults for the rest.
"""

import struct
import zlib

from igvmfw.errors import RefusedError

MAGIC = b"CCFSMKFS"
SALT_SIZE = 16  # bytes; any up to 255, to tell images and their keys apart
_VERSION = 1
_UNIT = 128  # bytes of an allocation block
_IO_BLOCK = 512  # bytes
_TIER_0 = 128  # bytes that the mask is over
_CHECKPOINTS = (256, 512)  # every power of two up to the IO block: a possible end of a torn write
_LEAST = 16 * _IO_BLOCK  # bytes; "minimum storage volume size"
_RESERVE = 1024  # bytes for metadata that can be added without the key; the tool's default
# the image layout: seven sizes as powers of two, five hashes (TPM_ALG_SHA256), TPM_ALG_AES with its
# key's bits
_LAYOUT = bytes((0, 2, 1, 2, 2, 0, 0)) + struct.pack(">7H", *(0x0B,) * 5, 0x06, 128)
# a byte with its odd and even bits exchanged
_SWAPPED = bytes((byte & 0x55) << 1 | (byte & 0xAA) >> 1 for byte in range(256))


def check_size(size: int) -> None:
    """Refuse a size that the SVSM could not format.

    Raises:
        RefusedError: The disk is too small.
    """
    if size < _LEAST:
        raise RefusedError(
            f"a disk of {size} bytes for a vTPM's state cannot be formatted",
            hint=f"size-bytes of x-vtpm-storage must be {_LEAST} or more",
        )


def creation_header(size: int, salt: bytes) -> bytes:
    """What a new disk starts with.

    Args:
        size: Of the disk, in bytes.
        salt: SALT_SIZE random bytes.
    """
    # no entries, and the reserve, under a tag of zeros
    metadata = bytes(16) + struct.pack("<IQ", 8, _RESERVE)
    fields = struct.pack("<QQB", len(metadata), size // _UNIT, len(salt))
    head = MAGIC + bytes((_VERSION,)) + _LAYOUT + fields
    save_area = 8 * len(_CHECKPOINTS)
    plain = (head + bytes(8 + 1 + save_area) + salt).ljust(_IO_BLOCK, b"\0")
    return _protected(plain, len(head)) + _with_checksum(metadata)


def _with_checksum(metadata: bytes) -> bytes:
    padded = metadata.ljust(_IO_BLOCK - 8, b"\0")
    return _checksum(padded) + padded


def _protected(plain: bytes, section: int) -> bytes:
    """An extent with its integrity protection, by which a torn write is told from a whole one.

    Args:
        plain: The extent; what the checkpoints replace is zero, as is the section's room.
        section: Where the protection goes.
    """
    checksum = _checksum(plain)
    head = plain[len(MAGIC) : _TIER_0]
    # no byte may be zero afterwards, nor the mask itself
    mask = next(m for m in range(1, 256) if m not in head and m not in checksum)
    commit = bytes(byte ^ mask for byte in checksum)
    block = bytearray(plain)
    block[len(MAGIC) : _TIER_0] = bytes(byte ^ mask for byte in head)
    block[section : section + 9] = commit + bytes((mask,))
    for end in _CHECKPOINTS:
        block[end - 8 : end] = commit
    return bytes(block)


def _checksum(data: bytes) -> bytes:
    """Two CRC-32 in the bit order of zlib, as the crate has them whatever the text says."""
    both = (zlib.crc32(data), zlib.crc32(data.translate(_SWAPPED)))
    return struct.pack("<2I", *both)
