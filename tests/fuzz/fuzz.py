"""Look for files that igvmfw does not cope with, for FUZZ_SECONDS (default 600): `make fuzz`.

With atheris, coverage leads the way; what it found interesting is kept in the cache for the next
run.  Without, hypothesis draws files at random.  Either ends with the input that failed: a path to
it, or the bytes.
"""

import importlib
import importlib.util
import itertools
import os
import random
import struct
import sys
import time
from pathlib import Path
from typing import Any

from tests.igvm.mutations import sealed
from tests.testbed.cache import CACHE

CORPUS = CACHE / "fuzz"
MAX_FILE = 64 << 10  # bytes: small files run fast, and what can go wrong shows in them
MAX_INPUT_SECONDS = 120  # more for one file counts as a failure; instrumented, they take 20 times
MAX_MEMORY = 2048  # MiB


def main() -> None:
    """Run one fuzzer until the time is up."""
    seconds = int(os.environ.get("FUZZ_SECONDS", "600"))
    if importlib.util.find_spec("atheris") is not None:
        with_atheris(seconds)
    else:
        with_hypothesis(seconds)


def with_atheris(seconds: int) -> None:
    """libFuzzer over the instrumented modules; does not return."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["igvmfw"]):
        module = importlib.import_module("tests.fuzz.exercise")

    def one(data: bytes) -> None:
        module.exercise(whole(data))

    CORPUS.mkdir(parents=True, exist_ok=True)
    write_seeds(CORPUS)
    options = [
        f"-max_total_time={seconds}", f"-max_len={MAX_FILE}", f"-timeout={MAX_INPUT_SECONDS}",
        f"-report_slow_units={MAX_INPUT_SECONDS}",
        f"-rss_limit_mb={MAX_MEMORY}", f"-artifact_prefix={CORPUS}/failed-", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(CORPUS)], one)
    atheris.Fuzz()


def whole(data: bytes) -> bytes:
    """The file with its size and checksum made right: chance would never meet them."""
    if len(data) < 32:
        return data
    content = bytearray(data)
    struct.pack_into("<I", content, 16, len(content))
    return sealed(content)


def write_seeds(directory: Path) -> None:
    """Files of every kind to start from."""
    from tests.fuzz.shapes import SHAPES
    from tests.igvm import samples
    from tests.igvm.generated import Generator

    generator = Generator(random.Random(1))
    seeds = [samples.small(), samples.rich(), samples.cca()]
    seeds += [shape(256) for shape in SHAPES] + [generator.file() for _ in range(30)]
    for index, seed in enumerate(seeds):
        (directory / f"seed-{index}").write_bytes(seed)


def with_hypothesis(seconds: int) -> None:
    """Batches of drawn files, each with another seed."""
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st

    from tests.fuzz.exercise import exercise
    from tests.fuzz.strategies import files, mutations

    limits = settings(
        max_examples=500, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    ending = time.monotonic() + seconds
    for batch in itertools.count(random.randrange(1 << 32)):

        @seed(batch)
        @limits
        @given(files() | st.binary(max_size=4096), mutations())
        def run(data: bytes, mutate: Any) -> None:
            exercise(data)
            exercise(mutate(data))

        run()
        if time.monotonic() > ending:
            print(f"nothing found in {seconds} s")
            return


if __name__ == "__main__":
    main()
