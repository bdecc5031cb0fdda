"""Compare igvmfw's digests with those of others, and write the table of docs/measure.md.

Run by hand from the checkout, on a machine where `make testbed` was: it takes some minutes.
    .venv/bin/python -m tests.digest_table
"""

import contextlib
import importlib.metadata
import lzma
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vcpu_types import CPU_SIGS
from sevsnpmeasure.vmsa import VMSA

from igvmfw.errors import IgvmError
from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import MEASURED, Vmm, launch_digest, launch_vmsas
from igvmfw.igvm.vpcontext import Vmsa
from igvmfw.igvm.wrap import RESET_ADDRESS, wrap
from igvmfw.platforms import Platform
from igvmfw.qemu.cpus import signature
from tests.conftest import OVMF
from tests.igvm import digests, samples
from tests.igvm.generated import VCPUS, Generator
from tests.igvm.test_reference import files
from tests.system.test_measure import CPU, launch
from tests.testbed.cache import printed
from tests.testbed.standin import DEVICE, make_emulator

DOCUMENT = Path(__file__).parents[1] / "docs" / "measure.md"
BEGIN, END = "<!-- digest-table: begin -->", "<!-- digest-table: end -->"
COCONUT = Path(__file__).parent / "data" / "coconut"
LAUNCHES = 40  # generated files launched on each platform
HEAD = ("platform", "order", "source of truth", "compared", "equal", "known differences")


@dataclass
class Row:
    """One line of the table: what was compared, and how it came out."""

    platform: Platform
    order: str
    source: str
    compared: int = 0
    agreed: int = 0
    excepted: int = 0  # files with a difference that docs/measure.md describes

    def count(self, own: bytes | str, other: bytes | str) -> None:
        """Count one comparison."""
        self.compared += 1
        self.agreed += own == other

    def cells(self) -> tuple[str, ...]:
        """The line's texts."""
        numbers = (self.compared, self.agreed, self.excepted)
        return (self.platform, self.order, self.source, *map(str, numbers))


class Launched(NamedTuple):
    """A file and the guest it is launched for."""

    content: bytes
    vcpus: int


def main() -> int:
    """Compare, write the table, and say whether all digests agree."""
    rows = [*launched_by_qemu(), *computed_from_files(), *vmsas()]
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|---|---:|---:|---:|"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")
    print("\n".join(lines))
    return int(any(row.agreed != row.compared for row in rows))


def launched_by_qemu() -> Iterator[Row]:
    """QEMU's and KVM's order: launches recorded by the stand-in for a SEV host."""
    qemu = printed("build-qemu.sh")
    shown = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True)
    source = f"{' '.join(shown.stdout.split()[:1])} {shown.stdout.split()[3]}, launch recorded"
    with sev_device():
        for platform in MEASURED:
            row = Row(platform, "QEMU's", source)
            for content, vcpus in launchable(platform):
                image = IgvmFile.parse(content)
                own = launch_digest(image, platform, vcpus=vcpus, cpu_signature=signature(CPU))
                row.count(own, recorded(qemu, content, platform, vcpus))
            yield row


def recorded(qemu: Path, content: bytes, platform: Platform, vcpus: int) -> bytes:
    """The digest of one launch; the record is a new emulator's, so that it is nobody else's."""
    with tempfile.TemporaryDirectory(prefix="igvmfw-sev-") as directory:
        work = Path(directory)
        file = work / "guest.igvm"
        file.write_bytes(content)
        record = launch(make_emulator(work, qemu), file, platform, vcpus, work)
    assert record.digest is not None
    return record.digest


@contextlib.contextmanager
def sev_device() -> Iterator[None]:
    """/dev/sev, whose presence QEMU looks at."""
    made = not DEVICE.exists()
    if made:
        DEVICE.touch()
    try:
        yield
    finally:
        if made:
            DEVICE.unlink()


def launchable(platform: Platform) -> Iterator[Launched]:
    """Files that QEMU takes for a platform: OVMF in several ways, small ones, generated ones."""
    firmware = OVMF.read_bytes()
    for vcpus in (1, 2, 5):
        yield Launched(wrap(firmware, [Platform.NATIVE, platform], vcpus=vcpus), vcpus)
        yield Launched(samples.small(Platform.NATIVE, platform), vcpus)
    generator = Generator(random.Random(f"launched {platform}"), launchable=True)
    found = 0
    while found < LAUNCHES:
        content = generator.file()
        if platform in IgvmFile.parse(content).supported:
            found += 1
            yield Launched(content, VCPUS)


def computed_from_files() -> Iterator[Row]:
    """The file's own order: the crate's digests, and igvmmeasure's."""
    reference = printed("reference.sh")
    crate = [Platform.SEV_SNP, Platform.TDX, Platform.VSM]
    rows = {("crate", p): Row(p, "file's", "crate igvm 0.5.0") for p in crate}
    rows |= {("igvmmeasure", p): Row(p, "file's", "igvmmeasure's algorithm") for p in MEASURED}
    with tempfile.TemporaryDirectory() as directory:
        paths = write_files(Path(directory))
        for path, verdict in zip(paths, digests.verdicts(reference, paths), strict=True):
            try:
                image = IgvmFile.parse(path.read_bytes())
            except IgvmError:
                continue
            for platform, digest in digests.crate(verdict).items():
                excepted = digests.has_large_page(image, platform)
                compare(rows["crate", platform], image, digest, excepted)
            for platform, digest in digests.igvmmeasure(verdict).items():
                excepted = digests.igvmmeasure_differs(image, platform)
                compare(rows["igvmmeasure", platform], image, digest, excepted)
    yield from rows.values()


def compare(row: Row, image: IgvmFile, digest: str, excepted: bool) -> None:
    """Count one file in a row, unless it is one for which both are known to differ."""
    if excepted:
        row.excepted += 1
        return
    row.count(launch_digest(image, row.platform, vmm=Vmm.SPEC).hex(), digest)


def write_files(directory: Path) -> Sequence[Path]:
    """The files of the reference test, wrapped OVMFs, and COCONUT-SVSM's own images."""
    firmware = OVMF.read_bytes()
    contents = list(files(firmware))
    contents += [lzma.decompress(path.read_bytes()) for path in sorted(COCONUT.glob("*.xz"))]
    contents += [wrap(firmware, [Platform.NATIVE, platform]) for platform in MEASURED]
    paths = [directory / str(index) for index in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def vmsas() -> Iterator[Row]:
    """VMSAs of processors that start from reset: sev-snp-measure's, of every CPU type it knows."""
    version = importlib.metadata.version("sev-snp-measure")
    modes = {Platform.SEV_ES: SevMode.SEV_ES, Platform.SEV_SNP: SevMode.SEV_SNP}
    for platform, mode in modes.items():
        # KVM_SEV_ES_INIT leaves the FPU's registers out, which sev-snp-measure does not know
        es = platform is Platform.SEV_ES
        part = "VMSAs but for the FPU's registers" if es else "VMSAs"
        row = Row(platform, "QEMU's", f"sev-snp-measure {version}, {part}")
        builder = ImageBuilder()
        builder.add(samples.platform(platform, 1))
        image = IgvmFile.parse(builder.build())
        for model, number in CPU_SIGS.items():
            own = launch_vmsas(image, platform, 2, signature(model))
            theirs = VMSA(mode, RESET_ADDRESS, number, int(not es)).pages(2)
            for mine, other in zip(own, theirs, strict=True):
                row.count(mine.content, without_fpu(other) if es else bytes(other))
        yield row


def without_fpu(page: bytes) -> bytes:
    """A VMSA page whose FPU state is zero."""
    registers = Vmsa.parse(page).registers()
    kept = {name: value for name, value in registers.items() if name not in ("mxcsr", "x87_fcw")}
    return Vmsa.build(kept).content


if __name__ == "__main__":
    sys.exit(main())
