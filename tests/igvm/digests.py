"""Digests of other programs, and where they are known to differ (docs/measure.md)."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from igvmfw.igvm.headers import PageData, ParameterArea, ParameterInsert, VpContext
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.spec import PAGE_SIZE, PLATFORM_WORDS, PlatformType
from igvmfw.platforms import Platform


def verdicts(reference: Path, files: Sequence[Path]) -> list[str]:
    """What the reference program says of each file."""
    done = subprocess.run(
        [reference], input="\n".join(map(str, files)), capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(files)
    return lines


def crate(verdict: str) -> dict[Platform, str]:
    """The reference crate's digests, in hexadecimal."""
    return _digests(verdict, "crate")


def igvmmeasure(verdict: str) -> dict[Platform, str]:
    """The digests of igvmmeasure's algorithm, in hexadecimal."""
    return _digests(verdict, "igvmmeasure")


def _digests(verdict: str, source: str) -> dict[Platform, str]:
    found: dict[Platform, str] = {}
    for item in verdict.split("\t"):
        words = item.split()
        if words[:2] == ["digest", source]:
            found[PLATFORM_WORDS[PlatformType(int(words[2]))]] = words[3]
    return found


def has_large_page(image: IgvmFile, platform: Platform) -> bool:
    """Whether a platform has a page of 2 MiB."""
    return any(isinstance(h, PageData) and h.is_2mb_page for h in image.for_platform(platform))


def igvmmeasure_differs(image: IgvmFile, platform: Platform) -> bool:
    """Whether a file has what igvmmeasure is known to measure in another way."""
    own = [h for h in image.headers if isinstance(h, VpContext) and _has_vmsa(image, h)]
    mask = image.mask_of(platform)
    if any(not h.compatibility_mask & mask for h in own):
        return True  # it takes the VMSAs of every platform
    headers = list(image.for_platform(platform))
    pages = [h for h in headers if isinstance(h, PageData)]
    if platform is not Platform.SEV_SNP:
        # it hashes what data there is, measured or not: no zeroes, but unmeasured pages
        return any(h.data_type or (not h.file_offset) != (h.unmeasured or h.shared) for h in pages)
    sizes = {h.parameter_area_index: h.number_of_bytes for h in headers if type(h) is ParameterArea}
    inserted = [sizes[h.parameter_area_index] for h in headers if type(h) is ParameterInsert]
    # it takes a shared page for a private one, and one page of every parameter area
    return any(h.shared for h in pages) or any(size != PAGE_SIZE for size in inserted)


def _has_vmsa(image: IgvmFile, header: VpContext) -> bool:
    kinds = {h.compatibility_mask: h.platform_type for h in image.platforms}
    kind = kinds.get(header.compatibility_mask)
    return kind in (PlatformType.SEV_ES, PlatformType.SEV_SNP)
