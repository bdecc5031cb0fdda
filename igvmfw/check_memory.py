"""Where a file puts things, and whether QEMU has memory there: a part of check.py.

Source: QEMU, backends/igvm.c (qigvm_prepare_memory, qigvm_directive_required_memory), hw/i386 (the
memory of q35 and pc) and target/i386/sev.c (cgs_set_guest_state, CGS_PAGE_TYPE_REQUIRED_MEMORY);
Linux, arch/x86/kvm/svm/sev.c (sev_gmem_post_populate: a page is launched once).
"""

from collections.abc import Iterator

from igvmfw.findings import Guest, Result, error, warning
from igvmfw.igvm.headers import PageData, RequiredMemory
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.loading import LoadedRegion, prepared_regions
from igvmfw.igvm.spec import LARGE_PAGE_SIZE, PAGE_SIZE
from igvmfw.platforms import Platform

SEV_FAMILY = (Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)
_FOUR_GIB = 1 << 32
_MAX_ADDRESS = 1 << 52
# what stands below 4 GiB on q35 and pc and is no RAM when QEMU loads the file
_DEVICES = (
    (0xFEC0_0000, 0xFEC0_1000, "I/O APIC"),
    (0xFED0_0000, 0xFED0_1000, "HPET"),
    (0xFEE0_0000, 0xFEF0_0000, "local APIC"),
)
_VGA = (0xA_0000, 0xC_0000)  # the window of a VGA adapter's memory
_ROM_BORDERS = (0xC_0000, 0xE_0000)  # where pc's memory changes from RAM to ROM, and to another
# q35 has all RAM below 4 GiB where it is less than this, else as much as the other (pc_q35.c)
_SPLIT_FROM, _SPLIT_LOW = 0xB000_0000, 0x8000_0000
_PERHAPS_RAM = ((0, 0xE000_0000), (_FOUR_GIB, _MAX_ADDRESS))  # of any guest, on q35 or pc
_NAMES: dict[type, str] = {PageData: "a region of pages", RequiredMemory: "required memory"}


def find_crossing(image: IgvmFile, mask: int, memory: int | None) -> Iterator[tuple[int, Result]]:
    """What is partly in memory that QEMU made for something before it; the first, where it stops.

    Where the guest has no memory QEMU makes some, and what comes later must lie in it as a whole,
    or apart from it.

    Args:
        image: The file.
        mask: The compatibility mask of the platform that the guest takes.
        memory: The guest's, in bytes; None where it is not known.
    Yields:
        The index of the header, and what is the matter.
    """
    there = [*(device[:2] for device in _DEVICES), *(_ram(memory) or _PERHAPS_RAM)]
    regions = [
        region
        for region in prepared_regions(image, mask)
        if region.start < region.end
        and not any(region.start < end and start < region.end for start, end in there)
    ]
    borders = sorted({border for region in regions for border in (region.start, region.end)})
    places = {border: place for place, border in enumerate(borders)}
    # for each piece between two borders whose memory it is: a piece is made once, and what begins
    # in one that is made looks at no other, so that no file keeps this busy
    made: list[LoadedRegion | None] = [None] * len(borders)
    for region in regions:
        begin, end = places[region.start], places[region.end]
        before = made[begin] or next((made[n] for n in range(begin, end) if made[n]), None)
        if before is None:
            made[begin:end] = [region] * (end - begin)
        elif region.start < before.start or before.end < region.end:
            yield region.first, _crossing(image, region, before)
            return


def _crossing(image: IgvmFile, region: LoadedRegion, before: LoadedRegion) -> Result:
    what = _NAMES.get(type(image.headers[region.first]), "the parameter area")
    return error(
        "memory-border",
        f"{what} from 0x{region.start:x} to 0x{region.end:x} is partly in memory that QEMU made "
        f"for what comes before it (0x{before.start:x} to 0x{before.end:x}): 'region size "
        "exceeded'",
        "rebuild the image so that the larger comes first, or both lie in the guest's memory",
    )


def _ram(memory: int | None) -> tuple[tuple[int, int], ...]:
    """The guest's memory on q35, where it is known: begin and end of each range, in bytes."""
    if memory is None:
        return ()
    if memory < _SPLIT_FROM:
        return ((0, memory),)
    return (0, _SPLIT_LOW), (_FOUR_GIB, _FOUR_GIB + memory - _SPLIT_LOW)


class MemoryCheck:
    """What was put where so far, on one platform.

    Args:
        platform: The guest's.
        guest: What is known of it.
    """

    def __init__(self, platform: Platform, guest: Guest) -> None:
        self._platform = platform
        self._memory = guest.memory
        self._pages: set[int] = set()  # addresses of pages of 4 KiB
        self._frames: set[int] = set()  # of 2 MiB, with any page
        self._large: set[int] = set()  # of 2 MiB, as one page

    def page(self, page: PageData) -> Iterator[Result]:
        """One page: whether its memory is loaded already."""
        if self._take(page.gpa, large=page.is_2mb_page):
            yield self._twice(page.gpa)

    def area(self, gpa: int, size: int) -> Iterator[Result]:
        """A parameter area at its insertion; addresses and sizes in bytes.

        The caller keeps the size of all areas within bounds.
        """
        yield from self.placed(gpa, size, "the parameter area")
        twice = [a for a in range(gpa, gpa + size, PAGE_SIZE) if self._take(a, large=False)]
        if twice:
            yield self._twice(twice[0])

    def required(self, required: RequiredMemory) -> Iterator[Result]:
        """Memory that the file requires."""
        if self._platform in (Platform.SEV, Platform.SEV_ES):
            yield error(
                "required-sev",
                f"QEMU refuses required memory on {self._platform}: 'failed to configure required "
                "memory'",
                "rebuild the image without it: only SEV-SNP guests have private memory",
            )
            return
        size = required.number_of_bytes
        if size == 0:
            yield error(
                "required-empty",
                f"required memory of no size at 0x{required.gpa:x}: QEMU refuses it on SEV-SNP, "
                "and ends where the guest has no memory",
                "rebuild the image",
            )
            return
        yield from self.placed(required.gpa, size, "required memory")
        needed = self._needed(required.gpa, required.gpa + size)
        if needed is not None:
            yield warning(
                "memory-required",
                f"the file needs memory up to 0x{required.gpa + size:x}, which the guest does not "
                "have there",
                f"give the guest at least {-(-needed >> 20)} MiB",
            )

    def _needed(self, start: int, end: int) -> int | None:
        """How much memory a guest needs that has a range in it; None: it has, or no other would.

        Between q35's two parts no guest has memory: QEMU makes what the file requires there.
        """
        if self._memory is None:
            return None
        if start >= _FOUR_GIB:
            needed = max(_SPLIT_FROM, end - _FOUR_GIB + _SPLIT_LOW)
        elif end < _SPLIT_FROM and self._memory < _SPLIT_FROM:
            needed = end
        else:
            return None
        return needed if self._memory < needed else None

    def placed(self, gpa: int, size: int, what: str) -> Iterator[Result]:
        """Whether memory can be prepared: all of it within one range of RAM, or where nothing is.

        Args:
            gpa: Where, in bytes.
            size: In bytes.
            what: Its name, for the message.
        """
        end = gpa + size
        for start, behind, device in _DEVICES:
            if gpa < behind and start < end:
                yield error(
                    "memory-device",
                    f"{what} at 0x{gpa:x} lies on the {device} (0x{start:x}): 'Could not prepare "
                    "memory … due to existing non-RAM region'",
                    "rebuild the image for QEMU's memory layout",
                )
        if end > _MAX_ADDRESS:
            yield error(
                "memory-range",
                f"{what} at 0x{gpa:x} is beyond any guest's address space",
                "rebuild the image",
            )
        for start, behind in _ram(self._memory):
            if gpa < behind and start < end and not (start <= gpa and end <= behind):
                yield error(
                    "memory-border",
                    f"{what} from 0x{gpa:x} to 0x{end:x} crosses an end of the guest's memory "
                    f"(0x{start:x} to 0x{behind:x}): 'region size exceeded'",
                    "give the guest another amount of memory, or rebuild the image",
                )
        yield from self._low(gpa, end, what)

    @staticmethod
    def _low(gpa: int, end: int, what: str) -> Iterator[Result]:
        start, behind = _VGA
        if gpa < behind and start < end:
            yield warning(
                "memory-low",
                f"{what} at 0x{gpa:x} lies where a VGA adapter has its memory (0x{start:x}): "
                "where the guest has one, QEMU 11.0 refuses that, and with older releases it is "
                "hidden",
                "give the guest no VGA adapter, or rebuild the image",
            )
        elif any(gpa < border < end for border in _ROM_BORDERS):
            yield warning(
                "memory-low",
                f"{what} from 0x{gpa:x} to 0x{end:x} is RAM and ROM at once on the machine pc, "
                "which QEMU refuses: 'region size exceeded'",
                "use the machine q35, or rebuild the image",
            )

    def _take(self, gpa: int, *, large: bool) -> bool:
        """Note a page; whether there is one already."""
        frame = gpa // LARGE_PAGE_SIZE
        twice = frame in (self._frames if large else self._large) or gpa in self._pages
        self._frames.add(frame)
        if large:
            self._large.add(frame)
        else:
            self._pages.add(gpa)
        return twice

    def _twice(self, gpa: int) -> Result:
        message = f"guest memory at 0x{gpa:x} is loaded twice"
        if self._platform in SEV_FAMILY:
            return error(
                "page-twice",
                f"{message}: memory that is encrypted cannot be loaded again",
                "rebuild the image without overlapping pages and parameter areas",
            )
        return warning("page-twice", f"{message}: the later one wins", "rebuild the image")
