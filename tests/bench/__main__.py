"""The benchmark: igvmfw beside its peers and its limits, in the same run.  `make bench` runs it.

It writes docs/benchmarks.md, with the machine it ran on; --quick shows within half a minute that
it works, and writes figures that say nothing.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import lzma
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lxml import etree
from sevsnpmeasure import guest, vcpu_types
from sevsnpmeasure.vmm_types import VMMType

from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import GuestPolicy
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import Vmm, launch_digest, launch_updates
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from igvmfw.qemu.cpus import signature
from tests.bench.report import Goal, duration, goals, size, spread, table
from tests.bench.timing import Process, Samples, ratios, time_functions, time_processes
from tests.igvm import samples as small
from tests.sources import libvirt_source
from tests.testbed.cache import printed

CHECKOUT = Path(__file__).parents[2]
OVMF = Path("/usr/share/ovmf/OVMF.fd")
COCONUT = CHECKOUT / "tests/data/coconut/coconut-qemu-vtpm-snp-ovmf.igvm.xz"
HOOK = CHECKOUT / "packaging/libvirt-hook/igvmfw"
CPU = "EPYC-v4"
PARSE = """
import sys
from igvmfw.files import mapped
from igvmfw.igvm.image import IgvmFile
with mapped(sys.argv[1]) as data:
    IgvmFile.parse(data)
"""
CHAIN = "its hashes alone"
PAGE, PAGE_INFO = 4096, 112  # bytes
GROWN = 1.5  # times, at most, to count as constant
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


def inspect(bench: Bench, files: Mapping[str, Path]) -> None:
    """igvmfw inspect beside igvm-inspect, whole processes."""
    peer = str(printed("peers.sh") / "igvm-inspect")
    bench.section(
        "Inspect",
        "Whole processes; igvm-inspect prints the headers, igvmfw inspect also looks into the "
        "guest's memory for what the file carries.",
    )
    many = bench.work / "many"
    many.mkdir()
    count = 50 if bench.quick else 1000
    kinds = [files["ovmf"], files["coconut"]]
    names = [str(many / f"{number}.igvm") for number in range(count)]
    for number, name in enumerate(names):
        os.link(kinds[number % 2], name)
    for title, words in {
        f"one file of {files['ovmf'].stat().st_size >> 10} KiB": [str(files["ovmf"])],
        f"{count} files of {files['ovmf'].stat().st_size >> 10} and "
        f"{files['coconut'].stat().st_size >> 10} KiB": names,
    }.items():
        found = time_processes(
            {
                "igvmfw inspect": Process(commands=[[bench.igvmfw, "inspect", *words]]),
                "igvm-inspect": Process(commands=[[peer, *words]]),
                "igvm-inspect, a process a file": Process(commands=[[peer, w] for w in words]),
            },
            bench.rounds(15 if len(words) == 1 else 5),
        )
        bench.compare(found, "igvm-inspect", of=title)
        bench.lines.append("")
    found_ratios = ratios(found["igvmfw inspect"], found["igvm-inspect"])
    bench.goals.append(
        Goal(
            text=f"{count} files inspected in less time than igvm-inspect takes",
            value=statistics.median(found_ratios),
            bound=1,
            shown=f"{spread(found_ratios)} of its time",
        )
    )


def crate_times(option: str, file: Path, rounds: int) -> Samples:
    """What the program around the reference crate says of itself."""
    command = [str(printed("reference.sh")), option, str(file), str(rounds + 1)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    return Samples([int(line) / 1e9 for line in shown.split()][1:], peak=memory(*command[:-1], "1"))


def memory(*command: str) -> int:
    """The most memory of a process, in bytes."""
    return Process(commands=[command]).memory()


def parse(bench: Bench, files: Mapping[str, Path]) -> None:
    """Reading in process, beside the crate igvm."""
    bench.section(
        "Parse",
        "In process. The crate `igvm` copies the page data, igvmfw does not; both check "
        "the rules of the format. Memory: of a process that does this alone, Python's own in it.",
    )
    rounds = bench.rounds(30)
    for name in ("coconut", "large"):
        content = files[name].read_bytes()
        found = time_functions({"igvmfw": lambda c=content: IgvmFile.parse(c)}, rounds)  # type: ignore[misc]
        found["igvmfw"].peak = memory(bench.python, "-c", PARSE, str(files[name]))
        found["crate igvm"] = crate_times("--time", files[name], rounds)
        headers = len(IgvmFile.parse(content).headers)
        title = f"{len(content) / (1 << 20):.1f} MiB, {headers} headers"
        bench.compare(found, "crate igvm", of=title)
        bench.lines.append("")


def measure(bench: Bench, files: Mapping[str, Path]) -> None:
    """Launch digests beside the bare hash and others."""
    bench.section(
        "Measure",
        "In process, reading the file included. The limit is the hash of the same pages in one go, "
        "by hashlib; what SEV-SNP's chain needs at least is a hash of each page and one of each "
        "record (its hashes alone). igvmmeasure is COCONUT's tool, whose algorithm is written anew "
        "in Rust around the crate `igvm` (it computes in the file's order, and reads the file, "
        "too); sev-snp-measure computes from the raw OVMF, not from an IGVM file. Memory: of "
        "`igvmfw measure`, and of a process that does this alone.",
    )
    cpu = signature(CPU)
    rounds = bench.rounds(20)
    for name in ("ovmf", "coconut", "large"):
        content = files[name].read_bytes()
        for kind in IgvmFile.parse(content).supported:
            if kind is not Platform.NATIVE:
                _measure(bench, name, content, files[name], kind, cpu, rounds)


def chain(pages: bytes) -> bytes:
    """The hashes that SEV-SNP's chain is made of, two a page, and nothing else."""
    digest = bytes(48)
    rest = bytes(PAGE_INFO - 2 * len(digest))
    for start in range(0, len(pages), PAGE):
        contents = hashlib.sha384(pages[start : start + PAGE]).digest()
        digest = hashlib.sha384(digest + contents + rest).digest()
    return digest


def _measure(
    bench: Bench, name: str, content: bytes, file: Path, kind: Platform, cpu: int, rounds: int
) -> None:
    updates = launch_updates(IgvmFile.parse(content), kind, Vmm.QEMU)
    # as the chain of SEV-SNP has it: each place in the file once
    pages = b"".join(bytes(page) for update in updates for page in update.pages)
    algorithm = hashlib.sha384 if kind is Platform.SEV_SNP else hashlib.sha256
    limit = f"bare {algorithm().name}"

    def own() -> bytes:
        return launch_digest(IgvmFile.parse(content), kind, vcpus=2, cpu_signature=cpu)

    functions: dict[str, Callable[[], object]] = {
        "igvmfw": own,
        limit: lambda: algorithm(pages).digest(),
    }
    if kind is Platform.SEV_SNP:
        functions[CHAIN] = lambda: chain(pages)
    if name == "ovmf" and kind is Platform.SEV_SNP:
        functions["sev-snp-measure"] = lambda: guest.snp_calc_launch_digest(
            2,
            vcpu_types.CPU_SIGS["EPYC-v4"],
            str(OVMF),
            None,
            None,
            None,
            0x1,
            "",
            VMMType.QEMU,
            False,
        )
    found = time_functions(functions, rounds)
    words = [str(file), "--platform", kind, "--vcpus", "2", "--cpu", CPU]
    found["igvmfw"].peak = memory(bench.igvmfw, "measure", *words)
    if kind is Platform.SEV_SNP:
        found["igvmmeasure's algorithm"] = crate_times("--time-measure", file, rounds)
    title = f"{kind}, {len(pages) / (1 << 20):.1f} MiB of pages ({name})"
    bench.compare(found, limit, of=title)
    bench.lines.append("")
    if name == "large":
        values = ratios(found["igvmfw"], found[limit])
        bench.goals.append(
            Goal(
                text="SEV-SNP measurement within 1.3 times the bare SHA-384 of the same pages",
                value=statistics.median(values),
                bound=1.3,
                shown=f"{spread(values)} times ({len(pages) >> 20} MiB)",
                otherwise=f"the two calls of hashlib a page, which the chain is made of, take "
                f"{spread(ratios(found[CHAIN], found[limit]))} times by themselves. Tried: two "
                "threads (hashlib lets others run meanwhile, but for 4 KiB the change takes "
                "longer than it gains), Python's own SHA-384 (half as fast), the chain's records "
                "put together by other means (nothing to see)",
            )
        )
        values = ratios(found["igvmfw"], found["igvmmeasure's algorithm"])
        bench.goals.append(
            Goal(
                text="and faster than igvmmeasure on a file of over 32 MiB",
                value=statistics.median(values),
                bound=1,
                shown=f"{spread(values)} of its time",
            )
        )


def start_up(bench: Bench, files: Mapping[str, Path]) -> None:
    """How long each command takes that has next to nothing to do."""
    bench.section(
        "Start-up",
        "Whole processes: `inspect` and `measure` of a file of 256 KiB, `list` of one descriptor, "
        "the others' `--help`.",
    )
    root = bench.work / "one"
    (root / "usr/share/igvm").mkdir(parents=True)
    os.link(files["small"], root / "usr/share/igvm/small.igvm")
    subprocess.run(
        [bench.igvmfw, "-q", "refresh", "--root", str(root)], check=True, stdout=subprocess.DEVNULL
    )
    listed = subprocess.run([bench.igvmfw, "--help"], check=True, capture_output=True, text=True)
    commands = re.findall(r"^    (\w+) ", listed.stdout, re.MULTILINE)
    words = {name: ["--help"] for name in commands}
    words["inspect"] = [str(files["small"])]
    words["list"] = ["--root", str(root)]
    processes = {"python3 -c pass": Process(commands=[[bench.python, "-c", "pass"]])}
    virsh = Path("/usr/bin/virsh")
    if virsh.exists():
        processes["virsh --version"] = Process(commands=[[str(virsh), "--version"]])
    for name, rest in words.items():
        processes[f"igvmfw {name}"] = Process(commands=[[bench.igvmfw, name, *rest]])
    found = time_processes(processes, bench.rounds(21))
    bench.compare(found, "python3 -c pass", of="command")
    for name in ("inspect", "list"):
        values = ratios(found[f"igvmfw {name}"], found["python3 -c pass"])
        bench.goals.append(
            Goal(
                text=f"start-up of `{name}` under 6 times that of `python3 -c pass`",
                value=statistics.median(values),
                bound=6,
                shown=f"{spread(values)} times",
            )
        )


def rewriting(bench: Bench, files: Mapping[str, Path]) -> None:
    """libvirt's own domains, each rewritten for an IGVM file."""
    from igvmfw.errors import IgvmfwError
    from igvmfw.launch import Options
    from igvmfw.launch import prepare as choose
    from igvmfw.rewrite import convert
    from igvmfw.virt.domain import Domain

    source = libvirt_source()
    if source is None:
        return
    texts = [path.read_bytes() for path in sorted(source.glob("tests/qemuxml*data/*.xml"))]
    texts = [text for text in texts if b"x86_64" in text][: 50 if bench.quick else None]
    bench.section(
        "Rewrite",
        f"In process: {len(texts)} domains of libvirt's own tests, read, turned to an IGVM file "
        "(which is read and hashed for each) and written, or refused. The limit: lxml alone reads "
        "and writes them.",
    )

    def own() -> None:
        for text in texts:
            try:
                domain = convert(Domain.parse(text), str(files["small"]))
                choose(domain, Options()).domain.write()
            except IgvmfwError:
                continue  # many of them cannot take an IGVM file

    def limit() -> None:
        for text in texts:
            etree.tostring(etree.fromstring(text))

    found = time_functions({"igvmfw rewrite": own, "lxml": limit}, bench.rounds(5))
    shared = {
        name: Samples([value / len(texts) for value in taken.seconds])
        for name, taken in found.items()
    }
    bench.compare(shared, "lxml", of="a document")


def hook(bench: Bench, files: Mapping[str, Path]) -> None:
    """What a start pays for the hook."""
    bench.section(
        "Hook",
        f"Whole processes, as libvirt runs it: a foreign domain of {len(FOREIGN) >> 10} KiB, and "
        "one with an IGVM file, which is read, hashed and judged.",
    )
    script = bench.work / "hook"
    text = HOOK.read_text().replace("python=/usr/bin/python3", f"python={bench.python}")
    script.write_text(text)
    script.chmod(0o755)
    foreign, own, request = (bench.work / f"{n}.xml" for n in ("foreign", "own", "request"))
    foreign.write_bytes(FOREIGN)
    emulator = printed("build-qemu.sh")
    request.write_text(
        "<domain type='kvm'><name>guest</name><memory>262144</memory><os>"
        "<type arch='x86_64' machine='q35'>hvm</type>"
        f"<loader type='igvm'>{files['ovmf']}</loader></os>"
        f"<devices><emulator>{emulator}</emulator></devices></domain>"
    )
    made = subprocess.run([bench.igvmfw, "rewrite", str(request)], check=True, capture_output=True)
    own.write_bytes(made.stdout)
    words = [str(script), "guest", "prepare", "begin", "-"]
    environment = {"XDG_RUNTIME_DIR": str(bench.work)}
    found = time_processes(
        {
            "sh -c :": Process(commands=[["/bin/sh", "-c", ":"]]),
            "a foreign domain": Process(commands=[words], stdin=foreign, environment=environment),
            "a domain with an IGVM file": Process(
                commands=[words], stdin=own, environment=environment
            ),
        },
        bench.rounds(31),
    )
    bench.compare(found, "sh -c :", of="start of")
    taken = found["a foreign domain"].median
    bench.goals.append(
        Goal(
            text="the hook takes less than 5 ms for a foreign domain",
            value=taken,
            bound=0.005,
            shown=duration(taken),
        )
    )


def growth(bench: Bench, files: Mapping[str, Path]) -> None:
    """How refresh and list grow with the number of files."""
    bench.section(
        "Many descriptors",
        f"Whole processes: `refresh` of a root with so many IGVM files of {SMALL >> 10} KiB, where "
        "all are new, and again, where none changed; then `list`. Time a file, start-up included.",
    )
    bench.lines += [
        "| files | refresh, all new | refresh again | list | memory of refresh | of list |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    per_file: dict[str, list[float]] = {"refresh, all new": [], "refresh": [], "list": []}
    counts = (10, 100) if bench.quick else (10, 100, 1000, 10000)
    idle = time_processes({"start": Process(commands=[[bench.igvmfw, "--version"]])}, 5)["start"]
    for count in counts:
        root = bench.work / f"root-{count}"
        vendor = root / "usr/share/igvm"
        vendor.mkdir(parents=True)
        for number in range(count):
            os.link(files["small"], vendor / f"{number:05}.igvm")
        words = ["--root", str(root)]
        refresh = Process(commands=[[bench.igvmfw, "-q", "refresh", *words]])
        listing = Process(commands=[[bench.igvmfw, "list", *words]])
        first = refresh.run()
        rounds = bench.rounds(5 if count < 10000 else 3)
        found = time_processes({"refresh": refresh, "list": listing}, rounds)
        cells = [f"{count:,}", duration(first / count)]
        per_file["refresh, all new"].append((first - idle.median) / count)
        for name in ("refresh", "list"):
            cells.append(duration(found[name].median / count))
            per_file[name].append((found[name].median - idle.median) / count)
        cells += [size(refresh.memory()), size(listing.memory())]
        bench.lines.append(f"| {' | '.join(cells)} |")
    for name, costs in per_file.items():
        grown = costs[-1] / costs[1]
        bench.goals.append(
            Goal(
                text=f"`{name}`: cost a file constant, from {counts[1]} to {counts[-1]:,}",
                value=grown,
                bound=GROWN,
                shown=f"{grown:.2f} times (start-up deducted)",
            )
        )


def versions(bench: Bench) -> Iterator[str]:
    """The machine, and what was compared."""
    processor = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    virsh = subprocess.run(["virsh", "--version"], capture_output=True, text=True, check=False)
    yield f"* {processor[1] if processor else platform.processor()}, {os.cpu_count()} processors"
    yield f"* Linux {platform.release()}, Python {platform.python_version()}"
    yield (
        f"* igvmfw {importlib.metadata.version('igvmfw')}, lxml "
        f"{importlib.metadata.version('lxml')}, igvm-inspect (virtfw-igvm-tools) 0.2.6, crate igvm "
        f"0.5.0, sev-snp-measure {importlib.metadata.version('sev-snp-measure')}, virsh "
        f"{virsh.stdout.strip() or 'missing'}"
    )


def main() -> None:
    """Run it all, and write the page."""
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="see that it works; no figures")
    parser.add_argument("-o", "--output", type=Path, default=CHECKOUT / "docs/benchmarks.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="igvmfw-bench-") as directory:
        bench = Bench(work=Path(directory), quick=args.quick)
        install(bench)
        files = prepare(bench)
        inspect(bench, files)
        parse(bench, files)
        measure(bench, files)
        start_up(bench, files)
        rewriting(bench, files)
        hook(bench, files)
        growth(bench, files)
        head = [
            "# Benchmarks",
            "",
            f"Measured on {datetime.date.today()} by `make bench`, all in one run: in each round "
            "everything that a table compares runs once, so that all see the same machine. A ratio "
            "is the median of the rounds' ratios, with their middle half in brackets.",
            "",
            *versions(bench),
            "",
            *goals(bench.goals),
        ]
    args.output.write_text("\n".join([*head, *bench.lines]).rstrip("\n") + "\n")
    print(f"bench: wrote {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
