"""IGVM files: inspected, parsed and measured, beside those who do so."""

import hashlib
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from sevsnpmeasure import guest, vcpu_types
from sevsnpmeasure.vmm_types import VMMType

from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import Vmm, launch_digest, launch_updates
from igvmfw.platforms import Platform
from igvmfw.qemu.cpus import signature
from tests.bench.report import Goal, spread
from tests.bench.run import OVMF, Bench
from tests.bench.timing import Process, Samples, ratios, time_functions, time_processes
from tests.testbed.cache import printed

CPU = "EPYC-v4"
PARSE = """
import sys
from igvmfw.files import content_of
from igvmfw.igvm.image import IgvmFile
with content_of(sys.argv[1]) as data:
    IgvmFile.parse(data)
"""
CHAIN = "its hashes alone"
PAGE, PAGE_INFO = 4096, 112  # bytes


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
