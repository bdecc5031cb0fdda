"""Timing: whole processes and functions, in rounds, so that all see the same machine."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class Samples:
    """What was measured of one thing.

    Attributes:
        seconds: Of each round.
        peak: The most memory, in bytes; 0 where it was not measured.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        """Seconds, in the middle."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds, the middle half of the rounds."""
        return quartiles(self.seconds)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The borders of the middle half."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratios(above: Samples, below: Samples) -> list[float]:
    """One thing's time over another's, round by round."""
    return [a / b for a, b in zip(above.seconds, below.seconds, strict=True)]


_MEASURE = """
import os, resource, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ,
                     file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])
os.waitpid(pid, 0)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A command, or several one after the other, that is timed from its start to its end."""

    commands: Sequence[Sequence[str]]
    stdin: Path = Path(os.devnull)
    environment: Mapping[str, str] | None = None

    def run(self) -> float:
        """Seconds on the clock."""
        environment = os.environ if self.environment is None else self.environment
        files = [
            (os.POSIX_SPAWN_OPEN, 0, str(self.stdin), os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        begin = time.perf_counter()
        for command in self.commands:
            pid = os.posix_spawn(command[0], list(command), environment, file_actions=files)
            _, status = os.waitpid(pid, 0)
            if status:
                raise RuntimeError(f"{' '.join(command)[:200]} ended with {status >> 8}")
        return time.perf_counter() - begin

    def memory(self) -> int:
        """The most memory of the first command, in bytes, but at least what a bare Python takes.

        A process begins with the memory of the one that started it, so that a small one does.
        """
        command = [sys.executable, "-I", "-S", "-c", _MEASURE, *self.commands[0]]
        with self.stdin.open("rb") as stdin:
            shown = subprocess.run(
                command, stdin=stdin, capture_output=True, check=True, env=self.environment
            )
        return int(shown.stderr.split()[-1]) << 10


def time_processes(processes: Mapping[str, Process], rounds: int) -> dict[str, Samples]:
    """Run each process once a round; the first round, which fills the caches, does not count."""
    found = {name: Samples(peak=process.memory()) for name, process in processes.items()}
    for number in range(rounds + 1):
        for name, process in processes.items():
            seconds = process.run()
            if number:
                found[name].seconds.append(seconds)
    return found


def time_functions(
    functions: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, Samples]:
    """Call each function once a round; the first round does not count."""
    found = {name: Samples() for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if number:
                found[name].seconds.append(time.perf_counter() - begin)
    return found
