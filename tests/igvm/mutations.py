"""Damage to IGVM files that gets past the checksum."""

import random
import struct
import zlib

from igvmfw.igvm.spec import OPTIONAL_BIT, HeaderType


def sealed(data: bytearray) -> bytes:
    """The file with a right checksum, where its fixed header can be read at all."""
    if len(data) >= 32:
        revision, offset, size = struct.unpack_from("<III", data, 4)
        head = bytearray(data[: 32 if revision == 2 else 24])
        head[20:24] = bytes(4)
        data[20:24] = struct.pack(
            "<I", zlib.crc32(data[offset : offset + size], zlib.crc32(bytes(head)))
        )
    return bytes(data)


INTERESTING = (0, 1, 2, 3, 8, 0xFFF, 0x1000, 0x1001, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)


def mutated(base: bytes, chance: random.Random) -> bytes:
    """One to three changes anywhere in the headers, the checksum made right again."""
    data = bytearray(base)
    offset, size = struct.unpack_from("<II", data, 8)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        kind = chance.randrange(7)
        place = chance.randrange(offset, offset + size)
        if kind == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            struct.pack_into("<I", data, place & ~3, chance.choice(INTERESTING))
        elif kind == 2:
            data[place] = chance.randrange(256)
        elif kind == 3:  # a field of the fixed header
            struct.pack_into(
                "<I",
                data,
                chance.choice((4, 8, 12, 16, 24, 28)),
                chance.choice(
                    (*INTERESTING, 24, 32, 40, size, size - 8, size + 8, len(data), len(data) - 1)
                ),
            )
        elif kind == 4:  # two neighbouring words change places
            at = offset + (place - offset) // 8 * 8
            data[at : at + 16] = data[at + 8 : at + 16] + data[at : at + 8]
        elif kind == 5:
            del data[chance.randrange(len(data)) :]
            struct.pack_into("<I", data, 16, len(data)) if len(data) >= 20 else None
        else:  # another header type in a header's place
            struct.pack_into(
                "<I",
                data,
                offset + (place - offset) // 8 * 8,
                chance.choice((*HeaderType, OPTIONAL_BIT | 0x302, 0x3FF, 0x200)),
            )
        if len(data) < offset + size:
            break
    return sealed(data)
