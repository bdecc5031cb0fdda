"""All that igvmfw does with an IGVM file it knows nothing of: what fuzzing runs."""

import contextlib
from collections.abc import Sequence

from igvmfw.check import check_image
from igvmfw.errors import IgvmError, RefusedError, UsageError
from igvmfw.findings import Guest
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import Vmm, launch_digest, stated_digest
from igvmfw.igvm.payload import Payload, firmware_image, identify
from igvmfw.igvm.summary import summarize
from igvmfw.igvm.uefi import find_facts
from igvmfw.platforms import Platform
from igvmfw.qemu.acceptance import RELEASES, Acceptance
from igvmfw.report import inspection, inspection_text, page_runs

DIGESTS = tuple((platform, vmm) for platform in Platform for vmm in Vmm)


def exercise(data: bytes) -> bool:
    """Read, inspect, measure and check a file in every way.

    Returns:
        Whether it breaks no rule.
    Raises:
        AssertionError: A promise is broken: reading twice gives two verdicts, or writing gives back
            other bytes than were read.
        Exception: Any other that is not IgvmError for damaged input, or RefusedError and
            UsageError from measuring.
    """
    strict = read(data, lenient=False)
    lenient = read(data, lenient=True)
    if strict is not None:
        assert lenient is not None
        assert not lenient.problems
        assert strict.write() == data
    elif lenient is not None:
        assert lenient.problems
    if lenient is not None:
        inspect(lenient)
        measure(lenient)
    if strict is not None:
        check(strict)
    return strict is not None


def read(data: bytes, *, lenient: bool) -> IgvmFile | None:
    """The image, or None where the file cannot be read."""
    try:
        return IgvmFile.parse(data, lenient=lenient)
    except IgvmError:
        return None


def inspect(image: IgvmFile) -> None:
    """All that `inspect` and `describe` look at."""
    payload = Payload()
    for platform in Platform:
        try:
            payload = identify(image, platform)
            find_facts(firmware_image(image, platform))
        except IgvmError:
            continue  # it does not have the platform, or is damaged
    summarize(image)
    try:
        inspection(image, "file", payload, pages=True)
        inspection_text(image, "file", payload)
    except IgvmError as error:
        if "unfolds to more memory" not in error.message:  # all else can be shown
            raise
    for _ in page_runs(image):
        pass


def measure(image: IgvmFile) -> None:
    """Every digest there is, and the stated one."""
    for platform, vmm in DIGESTS:
        digest(image, platform, vmm)
    with contextlib.suppress(IgvmError, RefusedError):
        stated_digest(image)


def check(image: IgvmFile, releases: Sequence[Acceptance] = RELEASES) -> None:
    """The verdict on every platform."""
    for platform in image.supported:
        for release in releases:
            for guest in (None, Guest(vcpus=2)):
                for finding in check_image(image, platform, release, guest):
                    assert finding.remedy


def digest(image: IgvmFile, platform: Platform, vmm: Vmm) -> None:
    """The digest of one platform, where it has one: also for more vCPUs than the file sets."""
    for vcpus, signature in ((1, None), (3, 0x00A0_0F11)):
        with contextlib.suppress(IgvmError, RefusedError, UsageError):
            launch_digest(image, platform, vcpus=vcpus, cpu_signature=signature, vmm=vmm)
