"""From what a domain asks for to the file it gets: the catalogue's first match, then the file.

`choose` goes by the descriptors and opens no file; `confirm` judges the file itself, which the
caller has read.  Only a confirmed choice can be put into a domain.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from igvmfw import rooted
from igvmfw.errors import NoFirmwareError, PlatformError, RefusedError
from igvmfw.igvm.headers import GuestPolicy, RequiredMemory
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.spec import Architecture
from igvmfw.platforms import Platform
from igvmfw.qemu.catalog import Entry, State, Wanted, match
from igvmfw.qemu.descriptor import PLATFORM_FEATURES, Descriptor, IgvmMapping, VtpmStorage
from igvmfw.virt.domain import SEV_ES_POLICY, Request

# The policy of a domain that states none, when its file states none either.  SEV and SEV-ES:
# virt-install's (no debugging, no key sharing; virtinst/domain/launch_security.py).  SEV-SNP:
# QEMU's (SMT allowed; target/i386/sev.c, DEFAULT_SEV_SNP_POLICY).
DEFAULT_POLICY: Mapping[Platform, int] = {
    Platform.SEV: 0x03,
    Platform.SEV_ES: 0x07,
    Platform.SEV_SNP: 0x30000,
}
# a guest's memory goes on above 4 GiB when it is larger than this; q35's smallest split
_CONTIGUOUS = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A file that ought to do, going by its descriptor or by the domain's own word.

    Attributes:
        path: The IGVM file.
        platforms: What the guest can take from it, preferred first.
        descriptor: File name of its descriptor; None for a file named by path.
        features: The descriptor's features; None where there is no descriptor.
        storage: What the firmware's vTPM keeps its state on, going by the descriptor.
    """

    path: str
    platforms: tuple[Platform, ...]
    descriptor: str | None = None
    features: tuple[str, ...] | None = None
    storage: VtpmStorage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An IGVM file that was read and has what the guest needs.

    Attributes:
        path: The file.
        sha256: Of its content, hexadecimal.
        platform: What the guest takes from it.
        descriptor: File name of the descriptor that it was chosen by.
        features: The descriptor's features.
        policy: The guest policy, also where the domain states none; None without one.
        measurement: The launch digest to expect, hexadecimal, where it could be computed.
        warnings: What could not be checked.
    """

    path: str
    sha256: str
    platform: Platform
    descriptor: str | None = None
    features: tuple[str, ...] = ()
    policy: int | None = None
    measurement: str | None = None
    warnings: tuple[str, ...] = ()


def platforms(request: Request, *, sev_es: bool | None = None) -> tuple[Platform, ...]:
    """The platforms that satisfy a request, preferred first.

    Args:
        request: What the domain asks for.
        sev_es: Whether the host has SEV-ES; None when that is not known.
    """
    if request.platform is not Platform.SEV or request.policy is not None:
        return (request.platform,)
    match sev_es:
        case True:  # as virt-install does
            return (Platform.SEV_ES, Platform.SEV)
        case False:
            return (Platform.SEV,)
    return (Platform.SEV, Platform.SEV_ES)


def choose(
    request: Request,
    entries: Iterable[Entry],
    *,
    sev_es: bool | None = None,
    root: Path = rooted.HOST,
) -> Candidate:
    """The file that a domain names, or that of the first descriptor that matches.

    Args:
        request: What the domain asks for.
        entries: The catalogue, in order of choice.
        sev_es: Whether the host has SEV-ES; None when that is not known.
        root: The root directory that the descriptors' files are in; a file that the domain names
            is the host's.
    Raises:
        NoFirmwareError: No descriptor matches; each candidate is named with its reasons.
        RefusedError: The domain names a file, and each descriptor of it contradicts the domain's
            features.
    """
    return next(candidates(request, entries, sev_es=sev_es, root=root))


def candidates(
    request: Request,
    entries: Iterable[Entry],
    *,
    sev_es: bool | None = None,
    root: Path = rooted.HOST,
) -> Iterator[Candidate]:
    """What `choose` gives, and where that turns out not to be for the guest's platform, the next.

    A descriptor cannot say whether its file is for plain guests: firmware.json has no word for it.
    Only the file tells (`check_platform`).

    Args:
        request: What the domain asks for.
        entries: The catalogue, in order of choice.
        sev_es: Whether the host has SEV-ES; None when that is not known.
        root: The root directory that the descriptors' files are in; a file that the domain names
            is the host's.
    Raises:
        NoFirmwareError: No further descriptor matches; each is named with its reasons.
        RefusedError: As of `choose`.
    """
    acceptable = platforms(request, sev_es=sev_es)
    if request.path is not None:
        yield _named(request, request.path, entries, acceptable, root)
        return
    rejected: list[str] = []
    for entry in entries:
        if entry.state is State.BROKEN:
            rejected.append(str(entry.error))
        descriptor = entry.descriptor
        if entry.state is not State.AVAILABLE or descriptor is None:
            continue
        reasons = {platform: match(entry, wanted_of(request, platform)) for platform in acceptable}
        matching = tuple(platform for platform in acceptable if not reasons[platform])
        if not matching:
            rejected.append(f"{entry.path}: {', '.join(reasons[acceptable[0]])}")
            continue
        yield Candidate(
            path=descriptor.mapping.filename,
            platforms=matching,
            descriptor=entry.name,
            features=descriptor.features,
            storage=_storage(descriptor),
        )
        rejected.append(f"{entry.path}: {unfit_reason(request)}")
    raise NoFirmwareError(
        f"no IGVM firmware for {_describe(request)}: "
        + ("; ".join(rejected) or "no descriptor of an IGVM file is installed"),
        hint="see igvmfw list --all, or install a file with igvmfw install",
    )


def unfit_reason(request: Request) -> str:
    """Why a descriptor is passed over whose file is not for the guest's platform, for people."""
    return f"{' and '.join(platforms(request))} is none of its file's platforms"


def check_platform(candidate: Candidate, image: IgvmFile) -> Platform:
    """What the guest takes from a file.

    Raises:
        PlatformError: The file lacks the guest's platform.
    """
    platform = next((p for p in candidate.platforms if p in image.supported), None)
    if platform is None:
        raise PlatformError(
            f"the guest needs {' or '.join(candidate.platforms)}, the file is for "
            f"{', '.join(image.supported) or 'no platform'}",
            where=candidate.path,
            hint="choose a file for this platform, or change <launchSecurity>",
        )
    return platform


def confirm(
    candidate: Candidate,
    request: Request,
    image: IgvmFile,
    *,
    sha256: str,
    memory: int | None = None,
) -> Choice:
    """Judge the file itself.

    Args:
        candidate: What `choose` gave.
        request: What the domain asks for.
        image: The candidate's file.
        sha256: Of the file's content, hexadecimal.
        memory: The guest's memory in bytes, where known.
    Raises:
        RefusedError: The file lacks the guest's platform, needs memory that the guest has not, or
            states another guest policy than the domain.
    """
    if image.architecture is not Architecture.X64:
        raise RefusedError("the file is not for x86_64", where=candidate.path)
    platform = check_platform(candidate, image)
    _check_memory(image, platform, memory, candidate.path)
    return Choice(
        path=candidate.path,
        sha256=sha256,
        platform=platform,
        descriptor=candidate.descriptor,
        features=candidate.features or (),
        policy=_policy(request, image, platform, candidate.path),
        warnings=tuple(_unchecked(request, candidate)),
    )


def file_policy(image: IgvmFile, platform: Platform) -> int | None:
    """The guest policy that a file states for a platform; of several the last, as QEMU takes it."""
    stated = None
    for header in image.for_platform(platform):
        if isinstance(header, GuestPolicy):
            stated = header.policy
    return stated


def _named(
    request: Request,
    path: str,
    entries: Iterable[Entry],
    acceptable: tuple[Platform, ...],
    root: Path,
) -> Candidate:
    """The file that the domain names, with what a descriptor of it says; one with storage first."""
    found: list[Descriptor] = []
    refusal: RefusedError | None = None
    for entry in entries:
        descriptor = entry.descriptor
        if entry.state is not State.AVAILABLE or descriptor is None:
            continue
        if not rooted.is_same(root, descriptor.mapping.filename, path):
            continue
        contradicted = _contradicted(request, descriptor)
        if contradicted is None:
            found.append(descriptor)
            continue
        wanted = request.features[contradicted]
        refusal = refusal or RefusedError(
            f"the domain {'wants' if wanted else 'refuses'} the firmware feature {contradicted}, "
            f"which {path} {'lacks' if wanted else 'has'}",
            where=str(entry.path),
            hint="change <feature>, or name another file",
        )
    if found:
        # firmware that keeps a state loses it where it is given no storage
        best = next((one for one in found if _storage(one) is not None), found[0])
        return Candidate(
            path=path, platforms=acceptable, features=best.features, storage=_storage(best)
        )
    if refusal is not None:
        raise refusal
    return Candidate(path=path, platforms=acceptable)


def _contradicted(request: Request, descriptor: Descriptor) -> str | None:
    """The first feature that a domain asks for otherwise than a descriptor has it."""
    asked = request.features.items()
    return next((name for name, wanted in asked if wanted != (name in descriptor.features)), None)


def _storage(descriptor: Descriptor) -> VtpmStorage | None:
    mapping = descriptor.mapping
    return mapping.vtpm_storage if isinstance(mapping, IgvmMapping) else None


def wanted_of(request: Request, platform: Platform) -> Wanted:
    """What a request asks of a descriptor for one of its platforms."""
    features = dict(request.features)
    if platform in PLATFORM_FEATURES:
        features[PLATFORM_FEATURES[platform]] = True
    return Wanted(architecture=request.architecture, machine=request.machine, features=features)


def _describe(request: Request) -> str:
    words = [request.platform.value, request.architecture]
    if request.machine:
        words.append(request.machine)
    words += [name if wanted else f"no {name}" for name, wanted in request.features.items()]
    return ", ".join(words)


def check_policy(policy: int | None, image: IgvmFile, platform: Platform, path: str) -> int | None:
    """The guest policy that a file states, which has to be the domain's, where both state one.

    Args:
        policy: The domain's; None where it states none.
        image: The file.
        platform: What the guest takes from it.
        path: The file's path, for the message.
    Raises:
        RefusedError: They differ, or the file's is none of the platform.
    """
    stated = file_policy(image, platform)
    if stated is None:
        return None
    if policy is not None and policy != stated:
        raise RefusedError(
            f"the domain's guest policy is 0x{policy:x}, the file's is 0x{stated:x}",
            where=path,
            hint="remove <policy> to take the file's, or choose another file",
        )
    if platform is not Platform.SEV_SNP and bool(stated & SEV_ES_POLICY) != (
        platform is Platform.SEV_ES
    ):
        raise RefusedError(
            f"the file's guest policy for {platform} is 0x{stated:x}, which is not one of "
            f"{platform} (bit 2 is for SEV-ES)",
            where=path,
            hint="make the file anew with a fitting policy",
        )
    return stated


def _policy(request: Request, image: IgvmFile, platform: Platform, path: str) -> int | None:
    if platform not in DEFAULT_POLICY:
        return None
    stated = check_policy(request.policy, image, platform, path)
    if stated is not None:
        return stated
    return request.policy if request.policy is not None else DEFAULT_POLICY[platform]


def _check_memory(image: IgvmFile, platform: Platform, memory: int | None, path: str) -> None:
    needed = max(
        (
            header.gpa + header.number_of_bytes
            for header in image.for_platform(platform)
            if isinstance(header, RequiredMemory)
        ),
        default=0,
    )
    if memory is not None and memory < needed <= _CONTIGUOUS:
        raise RefusedError(
            f"the file needs memory up to {needed >> 20} MiB, the guest has {memory >> 20} MiB",
            where=path,
            hint="raise <memory>",
        )


def _unchecked(request: Request, candidate: Candidate) -> Iterator[str]:
    if candidate.features is None and request.features:
        yield (
            f"{candidate.path} has no descriptor: whether it has the firmware features "
            f"asked for ({', '.join(request.features)}) cannot be checked"
        )
