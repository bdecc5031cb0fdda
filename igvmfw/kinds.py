"""What a file is instead of the kind that was asked for: the mistakes of a long day, by name."""

from igvmfw.records import Record

_VOLUME = 40  # bytes to the signature of a UEFI firmware volume: EFI_FIRMWARE_VOLUME_HEADER


class Kind(Record):
    """A kind of file.

    Attributes:
        name: In a sentence, with its article.
        remedy: How to get at what is in it; None where that is another program's business.
    """

    name: str
    remedy: str | None = None


EMPTY = Kind(name="empty", remedy="was it copied as a whole?")
IGVM = Kind(name="an IGVM file")
FIRMWARE = Kind(
    name="a raw UEFI firmware image", remedy="'igvmfw wrap' makes an IGVM file of such an image"
)
XML = Kind(name="XML")
JSON = Kind(name="JSON")
_MAGIC = {
    b"IGVM": IGVM,
    b"\x1f\x8b\x08": Kind(name="compressed with gzip", remedy="unpack it first: gzip -d"),
    b"\xfd7zXZ\0": Kind(name="compressed with xz", remedy="unpack it first: xz -d"),
    b"\x28\xb5\x2f\xfd": Kind(name="compressed with zstd", remedy="unpack it first: zstd -d"),
    b"BZh": Kind(name="compressed with bzip2", remedy="unpack it first: bzip2 -d"),
    b"QFI\xfb": Kind(
        name="a qcow2 image",
        remedy="firmware in qcow2 becomes a raw image with: qemu-img convert -O raw",
    ),
    b"\x7fELF": Kind(name="an ELF program"),
    b"<": XML,
    b"{": JSON,
}


def kind_of(data: bytes | bytearray | memoryview) -> Kind | None:
    """What a file looks like; None where nothing is recognised.

    Args:
        data: Its content, of which the first bytes count.
    """
    if not len(data):
        return EMPTY
    head = bytes(data[: _VOLUME + 4])
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    return FIRMWARE if head[_VOLUME:] == b"_FVH" else None
