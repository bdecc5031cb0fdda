"""Files for hypothesis: headers of every kind with any values, and damage to whole files."""

import struct
from collections.abc import Callable

from hypothesis import strategies as st

from igvmfw.igvm.headers import HEADERS, Header, RawHeader, SupportedPlatform
from igvmfw.igvm.image import FixedHeader, assemble, serialize
from igvmfw.igvm.rules import AnyHeader
from igvmfw.igvm.spec import Architecture
from tests.igvm.mutations import sealed

EDGES = (0, 1, 2, 3, 7, 0x1000, 0x2000, 0x20_0000, 0x8000_0000, 0xFFFF_F000, 0xFFFF_FFFF)
FIELDS = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


@st.composite
def header(draw: st.DrawFn, offset: int) -> AnyHeader:
    """One header of a kind that exists, of its right size, or of any kind and size."""
    if draw(st.integers(0, 15)) == 0:
        return RawHeader(draw(st.integers(0, 0xFFFF_FFFF)), draw(st.binary(max_size=40)))
    kind = draw(st.sampled_from(sorted(HEADERS)))
    cls: type[Header] = HEADERS[kind]
    layout = getattr(cls, "LAYOUT", None)
    if layout is None:
        return RawHeader(kind, draw(st.binary(max_size=40)))
    body = bytearray(layout.size)
    word = st.sampled_from((*EDGES, offset, offset + 4096)) | st.integers(0, 0xFFFF_FFFF)
    for place in range(0, layout.size - 3, 4):
        if draw(st.booleans()):
            struct.pack_into("<I", body, place, draw(word) & 0xFFFF_FFFF)
    return cls.parse(bytes(body))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file with a right checksum: a few platforms, any headers, some data."""
    types = draw(st.lists(st.integers(0, 7), max_size=4, unique=True))
    headers: list[AnyHeader] = [SupportedPlatform(1 << n, 0, t, 1, 0) for n, t in enumerate(types)]
    headers += draw(st.lists(header(draw(st.sampled_from((0x200, 0x1000, 0x1004)))), max_size=12))
    if draw(st.booleans()):
        headers.sort(key=lambda item: item.type & 0x7FFF_FFFF)
    data = draw(st.sampled_from((b"", bytes(4096), b"\x01\0\0\0" * 1024, b"_FVH" * 3000)))
    fixed = FixedHeader(
        revision=draw(st.sampled_from((1, 2, 2))),
        architecture=draw(st.sampled_from(Architecture)),
        page_size=4096, variable_header_offset=0, variable_header_size=0, total_file_size=0,
        checksum=0,
    )  # fmt: skip
    return assemble(fixed, b"", serialize(tuple(headers)), data)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Damage: bytes overwritten, cut out, put in or repeated; mostly with a right checksum."""
    place = st.integers(0, 1 << 14)
    kind = st.sampled_from(("set", "cut", "put", "repeat"))
    step = st.tuples(kind, place, st.binary(max_size=32))
    steps = draw(st.lists(step, min_size=1, max_size=6))
    seal = draw(st.integers(0, 7)) > 0

    def mutate(base: bytes) -> bytes:
        data = bytearray(base)
        for kind, anywhere, new in steps:
            at = anywhere % (len(data) + 1)
            if kind == "set":
                data[at : at + len(new)] = new
            elif kind == "cut":
                del data[at : at + len(new)]
            elif kind == "put":
                data[at:at] = new
            else:
                data[at:at] = data[at : at + 8 * len(new)]
        if len(data) >= 20 and seal:
            struct.pack_into("<I", data, 16, len(data))
        return sealed(data) if seal else bytes(data)

    return mutate
