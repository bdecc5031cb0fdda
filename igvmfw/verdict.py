"""Which descriptor a domain gets, and why it gets none of the others.

The choice itself is `igvmfw.select.candidates`'; this only explains it, entry by entry.
"""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from igvmfw import rooted
from igvmfw.errors import NoFirmwareError
from igvmfw.qemu.catalog import Entry, match
from igvmfw.select import Candidate, candidates, platforms, unfit_reason, wanted_of
from igvmfw.virt.domain import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a request makes of one descriptor file.

    Attributes:
        entry: The descriptor file.
        chosen: Whether the domain gets this one.
        reasons: Why not; for the chosen one empty.
    """

    entry: Entry
    chosen: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a request makes of a catalogue.

    Attributes:
        candidate: What is chosen by descriptor, or named by the domain itself; None: nothing is.
        verdicts: One for each descriptor file, in order of choice.
    """

    candidate: Candidate | None
    verdicts: tuple[Verdict, ...]


def judge(
    request: Request,
    entries: Sequence[Entry],
    *,
    unfit: Collection[str] = (),
    root: Path = rooted.HOST,
) -> Judgement:
    """Explain a choice.

    Args:
        request: What the domain asks for.
        entries: The catalogue, in order of choice.
        unfit: File names of descriptors whose file was read, and is not for the guest's platform.
        root: The root directory that the descriptors' files are in.
    Raises:
        RefusedError: The domain names a file, and each descriptor of it contradicts the domain.
    """
    candidate = None
    with contextlib.suppress(NoFirmwareError):
        found = candidates(request, entries, root=root)
        candidate = next(candidate for candidate in found if candidate.descriptor not in unfit)
    verdicts = []
    decided = False
    for entry in entries:
        reasons = _reasons(request, entry)
        if not reasons and entry.name in unfit:
            reasons = (unfit_reason(request),)
        chosen = not decided and not reasons and candidate is not None
        decided = decided or chosen
        if not reasons and not chosen:
            reasons = ("matches too, and comes later in the order of choice",)
        verdicts.append(Verdict(entry=entry, chosen=chosen, reasons=reasons))
    return Judgement(candidate=candidate, verdicts=tuple(verdicts))


def _reasons(request: Request, entry: Entry) -> tuple[str, ...]:
    if request.path is not None:
        return (f"the domain names {request.path} itself",)
    first: tuple[str, ...] | None = None
    for platform in platforms(request):
        reasons = match(entry, wanted_of(request, platform))
        if not reasons:
            return ()
        first = reasons if first is None else first
    return first or ()
