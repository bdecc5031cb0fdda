"""One run of the benchmark: its files, its environment, and the page that it writes."""

import lzma
import random
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import GuestPolicy
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from tests.bench.report import Goal, table
from tests.bench.timing import Samples
from tests.igvm import samples as small

CHECKOUT = Path(__file__).parents[2]
OVMF = Path("/usr/share/ovmf/OVMF.fd")
COCONUT = CHECKOUT / "tests/data/coconut/coconut-qemu-vtpm-snp-ovmf.igvm.xz"
SMALL = 256 << 10  # bytes
PLATFORMS = (Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)
FOREIGN = (
    b"<domain type='kvm'><name>other</name>" + b"<description>x</description>" * 350 + b"</domain>"
)


@dataclass(slots=True, kw_only=True)
class Bench:
    """One run: where its files are, how often things are measured, and what it found."""

    work: Path
    quick: bool
    lines: list[str] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    @property
    def python(self) -> str:
        """The Python that igvmfw is installed for, as a distribution installs it."""
        return str(self.work / "installed/bin/python")

    @property
    def igvmfw(self) -> str:
        """The installed program."""
        return str(self.work / "installed/bin/igvmfw")

    def rounds(self, usual: int) -> int:
        """How often something is measured."""
        return 2 if self.quick else usual

    def section(self, title: str, text: str) -> None:
        """Begin a section."""
        print(f"bench: {title}", file=sys.stderr)
        self.lines += ["", f"## {title}", "", text, ""]

    def compare(self, found: Mapping[str, Samples], base: str, *, of: str = "") -> None:
        """Add a table."""
        self.lines += table(found, base, of=of)


def install(bench: Bench) -> None:
    """The wheel in an environment of its own: an editable install looks for files differently."""
    place = bench.work / "installed"
    venv.create(place, with_pip=True, symlinks=True)
    pip = [bench.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"{CHECKOUT}[libvirt]"], check=True)
    # a start must not pay for what only happens once
    subprocess.run([bench.python, "-m", "compileall", "-q", str(place / "lib")], check=False)


def prepare(bench: Bench) -> dict[str, Path]:
    """IGVM files of several sizes."""
    chance = random.Random(1)
    large = ImageBuilder()
    large.add(small.platform(Platform.SEV_SNP, 1))
    large.add(GuestPolicy(0x30000, 1))
    for number in range((2 if bench.quick else 33) << 8):
        large.add_page(0x10_0000 + number * 4096, 1, chance.randbytes(4096))
    contents = {
        # OVMF's last part alone: what it does at first, and the tables that tell that it is OVMF
        "small": wrap(OVMF.read_bytes()[-SMALL:], [Platform.NATIVE]),
        "ovmf": wrap(OVMF.read_bytes(), PLATFORMS, vcpus=2),
        "coconut": lzma.decompress(COCONUT.read_bytes()),
        "large": large.build(),
    }
    files = {}
    for name, content in contents.items():
        files[name] = bench.work / f"{name}.igvm"
        files[name].write_bytes(content)
    return files
