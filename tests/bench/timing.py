"""Timing: whole processes and functions, in rounds, so that all see the same machine."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Samples:
    """What was measured of one thing: seconds a round, and the most memory, in bytes."""

    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds, in the middle."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds, the middle half of the rounds."""
        return quartiles(self.seconds)

    @property
    def peak(self) -> int:
        """The most memory, in bytes; 0 where it was not measured."""
        return max(self.memory, default=0)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The borders of the middle half."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratios(above: Samples, below: Samples) -> list[float]:
    """One thing's time over another's, round by round."""
    return [a / b for a, b in zip(above.seconds, below.seconds, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A command, or several one after the other, that is timed from its start to its end."""

    commands: Sequence[Sequence[str]]
    stdin: Path = Path(os.devnull)
    environment: Mapping[str, str] | None = None

    def run(self) -> tuple[float, int]:
        """Seconds on the clock, and the most memory of a process, in bytes."""
        environment = os.environ if self.environment is None else self.environment
        files = [
            (os.POSIX_SPAWN_OPEN, 0, str(self.stdin), os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        peak = 0
        begin = time.perf_counter()
        for command in self.commands:
            pid = os.posix_spawn(command[0], list(command), environment, file_actions=files)
            _, status, usage = os.wait4(pid, 0)
            peak = max(peak, usage.ru_maxrss << 10)
            if status:
                raise RuntimeError(f"{' '.join(command)[:200]} ended with {status >> 8}")
        return time.perf_counter() - begin, peak


def time_processes(processes: Mapping[str, Process], rounds: int) -> dict[str, Samples]:
    """Run each process once a round; the first round, which fills the caches, does not count."""
    found = {name: Samples() for name in processes}
    for number in range(rounds + 1):
        for name, process in processes.items():
            seconds, memory = process.run()
            if number:
                found[name].seconds.append(seconds)
                found[name].memory.append(memory)
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
