"""The benchmark's tables and verdicts, as Markdown."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.timing import Samples, quartiles, ratios


def duration(seconds: float) -> str:
    """A time with three digits, in the unit that suits."""
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"


def size(count: int) -> str:
    """Bytes, in MiB."""
    return f"{count / (1 << 20):.0f} MiB" if count else "–"


def spread(values: Sequence[float]) -> str:
    """A ratio's median, with the middle half of the rounds."""
    low, high = quartiles(values)
    return f"{statistics.median(values):.2f} ({low:.2f}–{high:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What was to be reached: a ratio or a figure, and the bound below which it should stay.

    `otherwise` says why it may not be reached, and what was tried.
    """

    text: str
    value: float
    bound: float
    shown: str
    otherwise: str = ""

    @property
    def met(self) -> bool:
        """Whether it was."""
        return self.value < self.bound

    def line(self) -> str:
        """Its row in the table of goals."""
        return f"| {self.text} | {self.shown} | {'met' if self.met else '**not met**'} |"


def goals(found: Sequence[Goal]) -> Iterator[str]:
    """The table of goals, and why some were not met."""
    yield from ("| goal | found | |", "|---|---|---|", *(goal.line() for goal in found))
    for goal in found:
        if goal.otherwise and not goal.met:
            yield from ("", f"Not met: {goal.text}: {goal.otherwise}.")


def table(samples: Mapping[str, Samples], base: str, *, of: str = "") -> Iterator[str]:
    """Medians with their spread, memory, and each one's ratio to one of them."""
    yield f"| {of or 'what'} | median | middle half | ratio to {base} | memory |"
    yield "|---|---:|---:|---:|---:|"
    for name, found in samples.items():
        low, high = found.quartiles
        ratio = "1" if name == base else spread(ratios(found, samples[base]))
        half = f"{duration(low)} – {duration(high)}"
        yield f"| {name} | {duration(found.median)} | {half} | {ratio} | {size(found.peak)} |"
