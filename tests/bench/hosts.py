"""What people and libvirt wait for: starts, domains, the hook, many descriptors."""

import os
import re
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path

from lxml import etree

from tests.bench.report import Goal, duration, size, spread
from tests.bench.run import CHECKOUT, SMALL, Bench
from tests.bench.timing import Process, Samples, ratios, time_functions, time_processes
from tests.sources import libvirt_source
from tests.testbed.cache import printed

HOOK = CHECKOUT / "packaging/libvirt-hook/igvmfw"
GROWN = 1.5  # times, at most, to count as constant
FOREIGN = (
    b"<domain type='kvm'><name>other</name>" + b"<description>x</description>" * 350 + b"</domain>"
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
