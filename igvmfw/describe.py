"""From an IGVM file to its firmware descriptor.

Only what the file says goes in; what it cannot say is asked for.  Every item has a reason.

Source: docs/interop/firmware.json of QEMU (FirmwareFeature, FirmwareTarget, Firmware).  Machine
types: in QEMU 10.2.2 those of the pc family, q35 and i440fx, have the property igvm-cfg, and
microvm answers "Property 'microvm-machine.igvm-cfg' not found".
"""

from collections.abc import Sequence
from dataclasses import dataclass

from igvmfw.errors import RefusedError, UsageError
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.payload import Payload
from igvmfw.igvm.spec import Architecture
from igvmfw.igvm.uefi import UefiFacts
from igvmfw.platforms import Platform
from igvmfw.qemu.descriptor import (
    PLATFORM_FEATURES,
    VTPM,
    VTPM_STORAGE,
    Descriptor,
    IgvmMapping,
    StorageInterface,
    Target,
    VtpmStorage,
)
from igvmfw.qemu.schema import Profile, known_features, known_interfaces

ARCHITECTURE = "x86_64"
MACHINE_FAMILIES = ("pc-q35-", "pc-i440fx-")
UEFI = "uefi"
SVSM = "svsm"  # the protocol between an SVSM and its SEV-SNP guest
PRESET = "by the preset for the file that distributions ship at this place"
UNTAKEN = (Platform.TDX,)  # up to QEMU 11.0

# COCONUT-SVSM keeps its state on one raw virtio-mmio disk; its documentation makes 8 MiB
# (Documentation/docs/developer/PERSISTENCE.md, "Setup/Testing")
COCONUT_STORAGE = VtpmStorage(
    interface=StorageInterface.VIRTIO_BLK_MMIO, format="raw", size_bytes=8 << 20
)

_PLATFORM_NAMES = {
    Platform.NATIVE: "plain",
    Platform.SEV: "SEV",
    Platform.SEV_ES: "SEV-ES",
    Platform.SEV_SNP: "SEV-SNP",
    Platform.TDX: "TDX",
    Platform.VSM: "VSM",
    Platform.CCA: "CCA",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """What the caller says about the firmware, beyond what its file says.

    Attributes:
        interface_types: Its interfaces to the guest, most native first; empty: as the payload has.
        features: Further features.
        machines: Globs of machine types; empty: every one that takes IGVM.
        description: The text for people; None: made from the payload.
    """

    interface_types: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()
    description: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why something is in a descriptor, or is left out of it.

    Attributes:
        item: The member, or the feature.
        text: The reason, for people.
    """

    item: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A descriptor and the reasons for what it says.

    Attributes:
        descriptor: The descriptor.
        reasons: Why it is as it is.
    """

    descriptor: Descriptor
    reasons: tuple[Reason, ...]


def describe(
    image: IgvmFile,
    payloads: Sequence[Payload],
    facts: Sequence[UefiFacts | None] = (),
    *,
    filename: str,
    profile: Profile = Profile.IGVMFW,
    stated: Stated | None = None,
    preset: Stated | None = None,
    tags: tuple[str, ...] = (),
) -> Description:
    """Make the descriptor of an IGVM file.

    Args:
        image: The file.
        payloads: What it carries, for each of its platforms.
        facts: What the UEFI firmware in it says about itself, for each of its platforms.
        filename: The path that the descriptor names.
        profile: What the descriptor may hold.
        stated: What the caller adds.
        preset: What counts where neither the caller nor the file says anything.
        tags: Tags for the descriptor.
    Raises:
        RefusedError: No QEMU takes such a file.
        UsageError: Something has to be stated that the file cannot tell, or what is stated is not
            among what firmware.json knows.
    """
    stated, preset = stated or Stated(), preset or Stated()
    _check_usable(image)
    _check_words(stated)
    reasons: list[Reason] = []
    interfaces = _once(stated.interface_types)
    if interfaces:
        _check_interfaces(interfaces, reasons)
    else:
        interfaces = _interfaces(image, payloads, preset, profile, reasons)
    found = _platform_features(image)
    found |= _vtpm_feature(payloads, profile, reasons)
    found |= _uefi_features(payloads, facts, reasons)
    found = dict.fromkeys(preset.features, PRESET) | found
    features = _features(found, profile, stated, reasons)
    storage = _storage(payloads, profile, reasons)
    machines = _machines(stated, preset, reasons)
    descriptor = Descriptor(
        description=stated.description or describe_text(image, payloads),
        interface_types=interfaces,
        mapping=IgvmMapping(filename=filename, vtpm_storage=storage),
        targets=(Target(architecture=ARCHITECTURE, machines=machines),),
        features=features,
        tags=tags,
    )
    return Description(descriptor=descriptor, reasons=tuple(reasons))


def _check_usable(image: IgvmFile) -> None:
    if image.architecture is not Architecture.X64:
        raise RefusedError(
            f"the file is for {image.architecture.name}: no machine of QEMU takes it",
            hint="up to QEMU 11.0 only x86_64 machines take IGVM files",
        )
    usable = {Platform.NATIVE, *PLATFORM_FEATURES}
    if not usable.intersection(image.supported):
        have = ", ".join(image.supported) or "none"
        raise RefusedError(
            f"none of the file's platforms is one that QEMU has: {have}",
            hint="QEMU has native, sev, sev-es, sev-snp and tdx",
        )


def _check_words(stated: Stated) -> None:
    for word in (stated.description or "", *stated.machines):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{word!r} is not UTF-8 text", hint="a descriptor is: state it in characters"
            ) from None


def _once(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))


def _check_interfaces(stated: Sequence[str], reasons: list[Reason]) -> None:
    known = known_interfaces()
    for interface in stated:
        if interface not in known:
            raise UsageError(
                f"unknown interface type {interface!r}", hint=f"known: {', '.join(known)}"
            )
    reasons += [Reason(item=item, text="stated") for item in stated]


def _interfaces(
    image: IgvmFile,
    payloads: Sequence[Payload],
    preset: Stated,
    profile: Profile,
    reasons: list[Reason],
) -> tuple[str, ...]:
    if payloads and all(payload.firmware is not None for payload in payloads):
        found = {UEFI: "the file carries OVMF, a UEFI firmware"}
    elif preset.interface_types:
        found = dict.fromkeys(preset.interface_types, PRESET)
    else:
        raise UsageError(
            "cannot tell which interface the firmware has for the guest: no OVMF in the file",
            hint="firmware.json requires it: state it with --interface uefi (or bios, …)",
        )
    carried = bool(payloads) and all(payload.svsm for payload in payloads)
    if carried and Platform.SEV_SNP in image.supported:
        found[SVSM] = f"{payloads[0].svsm} in the file speaks the SVSM protocol with SEV-SNP guests"
    if profile is Profile.UPSTREAM and (why := found.pop(SVSM, None)):
        why = f"left out: {why}, but firmware.json has a word for it since QEMU 11.0 only"
        reasons.append(Reason(item=SVSM, text=why))
    reasons += [Reason(item=item, text=text) for item, text in found.items()]
    return tuple(found)


def _platform_features(image: IgvmFile) -> dict[str, str]:
    found = {}
    for platform in image.supported:
        if platform in PLATFORM_FEATURES:
            untaken = " (which QEMU takes from no IGVM file yet)" if platform in UNTAKEN else ""
            found[PLATFORM_FEATURES[platform]] = f"the file has the platform {platform}{untaken}"
    return found


def _vtpm_feature(
    payloads: Sequence[Payload], profile: Profile, reasons: list[Reason]
) -> dict[str, str]:
    if not _all_have_vtpm(payloads):
        return {}
    why = f"{payloads[0].svsm} in the file was built with its vTPM"
    if profile is Profile.IGVMFW:
        return {VTPM: why}
    left_out = f"left out: {why}, but firmware.json has no word for it"
    reasons.append(Reason(item=VTPM, text=left_out))
    return {}


def _uefi_features(
    payloads: Sequence[Payload], facts: Sequence[UefiFacts | None], reasons: list[Reason]
) -> dict[str, str]:
    """What the UEFI firmware itself tells; only what holds on every platform."""
    told = [fact for fact in facts if fact is not None]
    if not told or len(told) < len(facts):
        return {}
    found = {}
    if all(fact.smm for fact in told):
        found["requires-smm"] = "the firmware has the drivers for SMM (PiSmmCore)"
    keys = all(fact.enrolled_keys for fact in told)
    if keys:
        found["enrolled-keys"] = "the variable store in the file has a platform key"
    service = all(fact.variable_service for fact in told)
    if service and not any(payload.uefi_variables for payload in payloads):
        found["host-uefi-vars"] = (
            "the firmware takes its variables from a service outside of it "
            "(VirtMmCommunication), and the file brings none"
        )
    if all(fact.secure_boot for fact in told):
        # firmware.json warns of Secure Boot whose variables the guest's kernel can change;
        # distributions do not state the feature for such builds either
        if keys or service or "requires-smm" in found:
            found["secure-boot"] = "the firmware has the interfaces of UEFI Secure Boot"
        else:
            why = "left out: it is built in, but no keys are enrolled and nothing protects any"
            reasons.append(Reason(item="secure-boot", text=why))
    return found


def _features(
    found: dict[str, str], profile: Profile, stated: Stated, reasons: list[Reason]
) -> tuple[str, ...]:
    known = known_features(profile)
    for feature in stated.features:
        if feature not in known:
            raise UsageError(
                f"unknown feature {feature!r}",
                hint=f"profile {profile} knows: {', '.join(known)}",
            )
        found.setdefault(feature, "stated")
    reasons += [Reason(item=feature, text=why) for feature, why in found.items()]
    return tuple(feature for feature in known if feature in found)


def _all_have_vtpm(payloads: Sequence[Payload]) -> bool:
    """A descriptor speaks of every guest that starts from the file, on whatever platform."""
    return bool(payloads) and all(payload.vtpm for payload in payloads)


def _storage(
    payloads: Sequence[Payload], profile: Profile, reasons: list[Reason]
) -> VtpmStorage | None:
    if not _all_have_vtpm(payloads) or not all(payload.persistence for payload in payloads):
        return None
    why = f"{payloads[0].svsm} in the file keeps its state on a disk of its own"
    if profile is not Profile.IGVMFW:
        reasons.append(Reason(item=VTPM_STORAGE, text=f"left out: {why}"))
        return None
    reasons.append(Reason(item=VTPM_STORAGE, text=why))
    return COCONUT_STORAGE


def _machines(stated: Stated, preset: Stated, reasons: list[Reason]) -> tuple[str, ...]:
    machines, why = _once(stated.machines), "stated"
    if not machines:
        machines, why = preset.machines, PRESET
    if not machines:
        machines = tuple(f"{family}*" for family in MACHINE_FAMILIES)
        why = "the machine types of QEMU that take IGVM files"
    _check_machines(machines)
    reasons += [Reason(item=machine, text=why) for machine in machines]
    return machines


def _check_machines(globs: Sequence[str]) -> None:
    for glob in globs:
        literal = glob.split("*")[0].split("?")[0]
        wild = len(literal) < len(glob)
        fits = (
            literal.startswith(family) or (wild and family.startswith(literal))
            for family in MACHINE_FAMILIES
        )
        if not any(fits):
            families = " and ".join(f"{family}*" for family in MACHINE_FAMILIES)
            raise UsageError(
                f"the machine type {glob!r} takes no IGVM file",
                hint=f"QEMU has {families}; aliases such as q35 do not go into descriptors",
            )


def describe_text(image: IgvmFile, payloads: Sequence[Payload]) -> str:
    """A line for people: what the file carries, and for which guests."""
    first = payloads[0] if payloads else Payload()
    same = [p for p in payloads if (p.firmware, p.svsm) == (first.firmware, first.svsm)]
    if len(same) < len(payloads):
        first = Payload()
    parts = [first.firmware] if first.firmware else []
    parts += ["vTPM"] if _all_have_vtpm(payloads) else []
    if first.svsm:
        version = f" {first.svsm_version}" if first.svsm_version else ""
        carried = f"{first.svsm}{version}" + (f" with {' and '.join(parts)}" if parts else "")
    else:
        carried = parts[0] if parts else "IGVM firmware"
    names = [_PLATFORM_NAMES[platform] for platform in dict.fromkeys(image.supported)]
    guests = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    return f"{carried} for {guests} guests"
