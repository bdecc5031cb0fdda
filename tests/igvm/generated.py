"""Valid IGVM files made at random: pages of every kind, parameters and VP contexts in any order."""

import random
from collections.abc import Callable

from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import (
    ErrorRange,
    GuestPolicy,
    MemoryMap,
    ParameterInsert,
    RequiredMemory,
    SnpIdBlock,
    VpCount,
)
from igvmfw.igvm.reader import U32
from igvmfw.igvm.spec import SEV_VMSA_GPA, PageDataFlags, PageDataType
from igvmfw.igvm.vpcontext import VBS_REGISTER, VBS_X64_REGISTERS, build_native
from igvmfw.igvm.wrap import reset_vmsa
from igvmfw.platforms import Platform
from tests.igvm import samples

EVERY = (
    Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP, Platform.TDX, Platform.VSM,
)  # fmt: skip
LAUNCHED = (Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)
FLAGS = (0, 0, 0, 0, PageDataFlags.UNMEASURED, PageDataFlags.SHARED, 6)
VCPUS = 2  # of the guest that a launchable file is for


class Generator:
    """Makes files out of one source of chance.

    Args:
        chance: Where every decision comes from: the same seed gives the same files.
        launchable: Only what QEMU takes: for a guest of `VCPUS`, every page once, VP contexts that
            KVM can set.
        plain: Only what every tool measures alike, for native and one platform of SEV.
    """

    def __init__(
        self, chance: random.Random, *, launchable: bool = False, plain: bool = False
    ) -> None:
        self.chance = chance
        self.launchable = launchable
        self.plain = plain
        self.data = [chance.randbytes(4096) for _ in range(4)]

    def file(self) -> bytes:
        """One file."""
        chance = self.chance
        known = LAUNCHED if self.launchable else EVERY
        words = chance.sample(known, chance.randint(1, len(known)))
        if self.plain:
            words = [Platform.NATIVE, chance.choice(LAUNCHED[1:])]
        self.masks = dict(zip(words, chance.sample([1 << n for n in range(8)], 8), strict=False))
        self.builder = ImageBuilder()
        for word, mask in self.masks.items():
            vtl = 2 if word is Platform.VSM else 0
            self.builder.add(samples.platform(word, mask, highest_vtl=vtl))
        if Platform.SEV_SNP in self.masks:
            self.builder.add(GuestPolicy(0x30000, self.masks[Platform.SEV_SNP]))
        steps: list[Callable[[], None]] = [self.pages] * chance.randint(1, 4)
        steps += [lambda index=index: self.area(index) for index in range(chance.randint(0, 3))]  # type: ignore[misc]
        steps += [lambda word=word: self.contexts(word) for word in words]  # type: ignore[misc]
        if not self.launchable:
            steps.append(self.others)
        chance.shuffle(steps)
        self.gpa = 0x10_0000
        for step in steps:
            step()
        return self.builder.build()

    def mask(self) -> int:
        """Some of the platforms."""
        masks = list(self.masks.values())
        return sum(self.chance.sample(masks, self.chance.randint(1, len(masks))))

    def pages(self) -> None:
        """Some pages, often next to each other and alike, so that QEMU joins them."""
        chance = self.chance
        mask, flags = self.mask(), self.flags()
        data_type = PageDataType.NORMAL
        special = self.masks.get(Platform.SEV_SNP, 0) | self.masks.get(Platform.TDX, 0)
        if mask & ~special == 0 and chance.random() < 0.5:
            data_type = chance.choice(list(PageDataType))
            if self.launchable and data_type in (PageDataType.CPUID_DATA, PageDataType.CPUID_XF):
                data_type = PageDataType.SECRETS  # QEMU fills a CPUID page for its own host
        for _ in range(chance.randint(1, 6)):
            zero = not self.plain and chance.random() < 0.3
            data = b"" if zero else chance.choice(self.data)
            self.builder.add_page(self.gpa, mask, data, flags=flags, data_type=data_type)
            self.gpa += 4096 * chance.choice((1, 1, 1, 2))
            if chance.random() < 0.2:
                flags = self.flags()

    def flags(self) -> int:
        """The flags of a page."""
        return 0 if self.plain else int(self.chance.choice(FLAGS))

    def area(self, index: int) -> None:
        """A parameter area, with pages before its insertion or not."""
        chance = self.chance
        least = int(self.launchable)
        pages = 1 if self.plain else chance.randint(least, 3)
        self.builder.add_parameter_area(index, 4096 * pages)
        if pages:
            self.builder.add(VpCount(index, 4080))
            if self.launchable or chance.random() < 0.5:
                self.builder.add(MemoryMap(index, 0))
        if chance.random() < 0.5:
            self.pages()
        self.builder.add(ParameterInsert(self.gpa, self.mask(), index))
        self.gpa += 4096 * pages
        if chance.random() < 0.5:
            self.pages()

    def contexts(self, word: Platform) -> None:
        """The VP contexts of a platform."""
        chance = self.chance
        mask = self.masks[word]
        if word in (Platform.SEV_ES, Platform.SEV_SNP):
            features = int(word is Platform.SEV_SNP)
            indices = range(VCPUS if self.launchable else 5)
            for index in sorted(chance.sample(indices, chance.randint(0, len(indices)))):
                vmsa = reset_vmsa(chance.randrange(1 << 32), sev_features=features)
                content = vmsa.content if self.launchable else chance.randbytes(4096)
                gpa = SEV_VMSA_GPA if self.launchable else chance.choice((SEV_VMSA_GPA, 0x7000))
                self.builder.add_vp_context(mask, index, content, gpa=gpa)
        elif word is Platform.VSM:
            for vtl in chance.sample((0, 1, 2), chance.randint(0, 3)):
                self.builder.add_vp_context(mask, 0, self.registers(vtl))
        elif word in (Platform.NATIVE, Platform.SEV) and not self.launchable:
            self.builder.add_vp_context(mask, 0, build_native({"rip": chance.randrange(1 << 64)}))

    def registers(self, vtl: int) -> bytes:
        """A VSM context whose values use all 16 bytes."""
        numbers = self.chance.sample(sorted(VBS_X64_REGISTERS), self.chance.randint(1, 20))
        return U32.write(len(numbers)) + b"".join(
            VBS_REGISTER.write(vtl, number, bytes(11), self.chance.randbytes(16))
            for number in numbers
        )

    def others(self) -> None:
        """What has a part in no digest, and error ranges, which have one on VSM."""
        chance = self.chance
        self.builder.add(RequiredMemory(0x4000_0000, self.mask(), 0x2000))
        if chance.random() < 0.5:
            self.builder.add(ErrorRange(0x5000_0000, self.mask(), 4096 * chance.randint(0, 3)))
        if Platform.SEV_SNP in self.masks and chance.random() < 0.3:
            block = SnpIdBlock.LAYOUT.write(
                self.masks[Platform.SEV_SNP], 0, bytes(3), chance.randbytes(48), bytes(16),
                bytes(16), 1, 0, 1, 0, bytes(144), bytes(152), bytes(144), bytes(152),
            )  # fmt: skip
            self.builder.add(SnpIdBlock.parse(block))
