"""The benchmark: igvmfw beside its peers and its limits, in the same run.  `make bench` runs it.

It writes docs/benchmarks.md, with the machine it ran on; --quick shows within half a minute that
it works, and writes figures that say nothing.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench.hosts import growth, hook, rewriting, start_up
from tests.bench.images import inspect, measure, parse
from tests.bench.report import goals
from tests.bench.run import CHECKOUT, Bench, install, prepare


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
