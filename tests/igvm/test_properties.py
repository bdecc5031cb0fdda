"""Whatever a file holds: a model or an IgvmError, in time and memory that grow with the file alone.

`make fuzz` runs the same for as long as one likes (tests/fuzz).
"""

import random
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igvmfw.igvm.image import IgvmFile
from igvmfw.platforms import Platform
from igvmfw.qemu.acceptance import RELEASES
from tests.fuzz import exercise as run
from tests.fuzz.exercise import exercise
from tests.fuzz.shapes import SHAPES
from tests.fuzz.strategies import files, mutations
from tests.igvm import samples
from tests.igvm.generated import Generator
from tests.igvm.mutations import mutated

# reproducible in CI; the long run by hand is the one that looks for something new
BOUNDED = settings(
    max_examples=300, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
MIB = 1 << 20
BASES = (
    samples.small(), samples.small(Platform.SEV_SNP, revision=1), samples.rich(), samples.cca(),
    samples.small(Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP),
    *(Generator(random.Random(seed)).file() for seed in range(10)),
)  # fmt: skip

Shape = Callable[[int], bytes]


def check_if_whole(image: IgvmFile) -> None:
    if not image.problems:
        run.check(image, RELEASES[-1:])


FUNCTIONS = (run.inspect, check_if_whole)


@BOUNDED
@given(st.binary(max_size=2048))
def test_any_bytes(data: bytes) -> None:
    exercise(data)
    exercise(b"IGVM" + data)


@BOUNDED
@given(files())
def test_any_headers(data: bytes) -> None:
    exercise(data)


@BOUNDED
@given(st.sampled_from(BASES), mutations())
def test_any_mutated_file(base: bytes, mutate: Callable[[bytes], bytes]) -> None:
    exercise(mutate(base))


def test_mutated_files_of_every_kind() -> None:
    chance = random.Random(20261124)
    accepted = sum(exercise(mutated(chance.choice(BASES), chance)) for _ in range(600))
    assert 60 < accepted < 540  # both sides of the rules are reached


def cost(data: bytes, function: Callable[[IgvmFile], object]) -> tuple[float, int]:
    """Seconds of CPU time, and bytes allocated at once, for reading a file and one function."""
    started = time.process_time()
    function(IgvmFile.parse(data, lenient=True))
    seconds = time.process_time() - started
    tracemalloc.start()
    function(IgvmFile.parse(data, lenient=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_1_kib_of_headers_costs_little(shape: Shape) -> None:
    data = shape(1024)
    assert len(data) < 12 << 10
    for function in FUNCTIONS:
        seconds, peak = cost(data, function)
        assert seconds < 2, function
        assert peak < 4 * MIB, function
    for platform, vmm in run.DIGESTS:
        seconds, peak = cost(data, lambda image, p=platform, v=vmm: run.digest(image, p, v))  # type: ignore[misc]
        assert seconds < 5, (platform, vmm)  # well below 1 s, on a machine with nothing else to do
        assert peak < 4 * MIB, (platform, vmm)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_cost_grows_with_the_file_and_no_faster(shape: Shape) -> None:
    for function in FUNCTIONS:
        small, large = (cost(shape(kib << 10), function) for kib in (4, 32))
        # 8 times the file; what grew with its square would take 64 times as long
        assert large[0] < 24 * max(small[0], 0.01), f"{small[0]:.3f} s, {large[0]:.3f} s"
        assert large[1] < 24 * small[1]
