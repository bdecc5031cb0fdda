"""A running domain's measurement against an IGVM file: was launched what should have been?

For SEV and SEV-ES the processor signs the launch digest with the transport integrity key (TIK) of
the guest's owner, and libvirt hands the signature out; whoever has the key can check it.  A SEV-SNP
guest asks for an attestation report itself, and only the digest to expect in it can be computed
here.

Source: AMD SEV API (publication 55766), LAUNCH_MEASURE; libvirt's virDomainGetLaunchSecurityInfo
and docs/manpages/virt-qemu-sev-validate.rst.
"""

import base64
import binascii
import contextlib
import hashlib
import hmac
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igvmfw import files
from igvmfw.errors import DomainError, InputError, LibvirtError, RefusedError, UsageError
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import MEASURED, launch_digest
from igvmfw.launch import fetch, recorded
from igvmfw.platforms import Platform
from igvmfw.qemu import cpus
from igvmfw.select import file_policy
from igvmfw.virt.domain import Domain
from igvmfw.virt.host import Connection, translated

KEY_SIZE = 16  # bytes of a TIK, and of the nonce
_HMAC_SIZE = 32
_CONTEXT = b"\x04"  # what LAUNCH_MEASURE puts before what it signs
_NO_DEBUG = 1 << 0  # of a SEV or SEV-ES policy
_SNP_DEBUG = 1 << 19  # of a SEV-SNP policy
_DEFAULT_MODEL = "qemu64"  # what QEMU and libvirt give a guest without <cpu>


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What LAUNCH_MEASURE returned, and what went into it beside digest and key.

    Attributes:
        signature: The HMAC-SHA256, 32 bytes.
        nonce: 16 bytes.
        api: Major and minor version of the SEV firmware's API.
        build: Of the firmware.
        policy: The guest policy that the guest was launched with.
    """

    signature: bytes
    nonce: bytes
    api: tuple[int, int]
    build: int
    policy: int

    @classmethod
    def from_libvirt(cls, values: Mapping[str, Any]) -> "Measurement":
        """From what virDomainGetLaunchSecurityInfo returns.

        Raises:
            LibvirtError: Something is missing or is not what the SEV API says.
        """
        try:
            blob = base64.b64decode(values["sev-measurement"], validate=True)
            numbers = [int(values[f"sev-{name}"]) for name in ("api-major", "api-minor")]
            build, policy = int(values["sev-build-id"]), int(values["sev-policy"])
        except (KeyError, ValueError) as error:
            raise LibvirtError(f"libvirt does not tell the measurement: {error!r}") from None
        if (
            len(blob) != _HMAC_SIZE + KEY_SIZE
            or not all(0 <= number < 1 << 8 for number in (*numbers, build))
            or not 0 <= policy < 1 << 32
        ):
            raise LibvirtError("what libvirt tells is no measurement of the SEV API")
        return cls(
            signature=blob[:_HMAC_SIZE],
            nonce=blob[_HMAC_SIZE:],
            api=(numbers[0], numbers[1]),
            build=build,
            policy=policy,
        )

    def is_of(self, digest: bytes, tik: bytes) -> bool:
        """Whether the processor signed this launch digest with this key.

        Args:
            digest: SHA-256 of what was launched, 32 bytes.
            tik: 16 bytes.
        """
        signed = (
            _CONTEXT
            + bytes((*self.api, self.build))
            + self.policy.to_bytes(4, "little")
            + digest
            + self.nonce
        )
        return hmac.compare_digest(hmac.digest(tik, signed, "sha256"), self.signature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What libvirt knows of a running domain's launch.

    Attributes:
        domain: The domain as it runs.
        platform: SEV, SEV-ES or SEV-SNP.
        policy: The guest policy: on SEV and SEV-ES as launched, on SEV-SNP as the domain states it.
        measurement: On SEV and SEV-ES.
    """

    domain: Domain
    platform: Platform
    policy: int | None
    measurement: Measurement | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The answer.

    Attributes:
        verified: True and False are answers; None says that there was nothing to check with.
        reasons: Why it is not True.
        warnings: What an owner should know all the same.
        launch: What was asked about.
        path: The IGVM file.
        sha256: Of its content, hexadecimal.
        cpu_signature: CPUID leaf 1 EAX of the guest's CPU, where the digest depends on it.
        digest: The launch digest that follows from file, vCPUs and CPU.
    """

    verified: bool | None
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = field(default=())
    launch: Launch
    path: str
    sha256: str
    cpu_signature: int | None
    digest: bytes


def read_tik(path: Path | str) -> bytes:
    """Read a transport integrity key.

    Args:
        path: 16 bytes as `sevctl session` writes them, or these in base64; `-` is standard input.
    Raises:
        InputError: The file is unreadable, or holds no such key.
    """
    data = files.read_text(path, limit=4096)
    if len(data) == KEY_SIZE:
        return data
    with contextlib.suppress(binascii.Error, ValueError):
        decoded = base64.b64decode(b"".join(data.split()), validate=True)
        if len(decoded) == KEY_SIZE:
            return decoded
    raise InputError(
        f"no TIK: it has {KEY_SIZE} bytes, or these in base64; the file has {len(data)}",
        where="standard input" if str(path) == files.STDIN else str(path),
        hint="of sevtool's tmp_tk.bin, TEK and TIK in one, the TIK is the second half: tail -c 16"
        if len(data) == 2 * KEY_SIZE
        else "name the file that sevctl session wrote as …_tik.bin",
    )


def inquire(connection: Connection, name: str) -> Launch:
    """Ask libvirt for a running domain's launch.

    Args:
        connection: Where.
        name: The domain's ID, UUID or name.
    Raises:
        RefusedError: It does not run, or is not protected by SEV.
        LibvirtError: There is no such domain, or libvirt does not tell.
    """
    where = f"domain '{name}'"
    native = connection.find(name, by_id=True)
    with translated(where):
        if not native.isActive():
            raise RefusedError(
                "not running: there is no measurement", where=where, hint="start it first"
            )
    domain = fetch(connection, name)
    security = domain.security
    platform = Platform.NATIVE if security is None else security.platform
    if security is None or platform not in MEASURED:
        raise RefusedError(
            f"a {platform} guest is not measured by SEV",
            where=where,
            hint="only domains with <launchSecurity type='sev'> or 'sev-snp' can be verified",
        )
    if platform is Platform.SEV_SNP:
        # libvirt asks QEMU for a measurement here, too, and fails as there is none (11.3)
        return Launch(domain=domain, platform=platform, policy=security.policy, measurement=None)
    with translated(where):
        values = native.launchSecurityInfo()
    try:
        measurement = Measurement.from_libvirt(values)
    except LibvirtError as error:
        raise error.within(where) from None
    return Launch(
        domain=domain, platform=platform, policy=measurement.policy, measurement=measurement
    )


def verify(
    connection: Connection,
    name: str,
    *,
    path: str | None = None,
    tik: bytes | None = None,
    cpu: str | None = None,
) -> Verification:
    """Compare a running domain's measurement with an IGVM file.

    Args:
        connection: Where the domain runs.
        name: Its ID, UUID or name.
        path: The owner's copy of the file; None takes the one that the domain was given.
        tik: The owner's key, 16 bytes; without it nothing is verified.
        cpu: The guest's CPU model, as `cpu_signature` takes it; None takes the domain's.
    Raises:
        RefusedError: The domain has no measurement, or cannot have been launched from the file.
        InputError: The file cannot be read, or is damaged.
        UsageError: The file, or the CPU model, has to be named.
        LibvirtError: libvirt does not tell.
    """
    launch = inquire(connection, name)
    path = path or _given_file(connection, launch.domain)
    with files.content_of(path) as content:
        try:
            image = IgvmFile.parse(content)
            if image.find_platform(launch.platform) is None:
                raise RefusedError(
                    f"{name} runs on {launch.platform}, the file is only for "
                    f"{', '.join(image.supported) or 'no platform'}",
                    hint="the guest was not launched from this file",
                )
            digest, signature = _digest(image, launch, cpu, local=not connection.is_remote)
            stated = file_policy(image, launch.platform)
        except (InputError, RefusedError) as error:
            raise error.within(path) from None
        sha256 = hashlib.sha256(content).hexdigest()
    file = None
    with contextlib.suppress(DomainError):  # the metadata is the host's word, and decides nothing
        file = recorded(launch.domain)
    changed = file is not None and file.path == path and file.sha256 != sha256
    verified, reasons = _answer(launch, digest, stated, tik, changed=changed)
    return Verification(
        verified=verified,
        reasons=reasons,
        warnings=tuple(_warnings(launch, unmeasured=changed and verified is True)),
        launch=launch,
        path=path,
        sha256=sha256,
        cpu_signature=signature,
        digest=digest,
    )


def _given_file(connection: Connection, domain: Domain) -> str:
    file = recorded(domain)
    if file is None:
        raise UsageError(
            f"{domain.name} was given no IGVM file by igvmfw", hint="name the file with --file"
        )
    if connection.is_remote:
        raise UsageError(
            f"{file.path} is on the host of {domain.name}, not here",
            hint="name your own copy of the file with --file",
        )
    return file.path


def _digest(
    image: IgvmFile, launch: Launch, cpu: str | None, *, local: bool
) -> tuple[bytes, int | None]:
    """The digest, and the CPU signature where a vCPU without VP context makes it count."""
    vcpus = launch.domain.vcpus
    try:
        return launch_digest(image, launch.platform, vcpus=vcpus), None
    except UsageError:
        signature = _signature(launch.domain, local=local) if cpu is None else cpus.signature(cpu)
        digest = launch_digest(image, launch.platform, vcpus=vcpus, cpu_signature=signature)
        return digest, signature


def _signature(domain: Domain, *, local: bool) -> int:
    """CPUID leaf 1 EAX of a domain's CPU."""
    element = domain.root.find("cpu")
    mode = "" if element is None else element.get("mode", "custom")
    if mode in ("host-passthrough", "maximum"):
        model = _host_model() if local else None
        if model is None:
            raise UsageError(
                f"the digest depends on the host's CPU, which {domain.name} has (mode='{mode}')",
                hint="name it with --cpu FAMILY/MODEL/STEPPING, as the host's /proc/cpuinfo has it",
            )
        return cpus.signature(model)
    model = None if element is None else element.findtext("model")
    try:
        return cpus.signature((model or "").strip() or _DEFAULT_MODEL)
    except UsageError as error:
        error.hint = f"name it with --cpu; {error.hint}"
        raise


def _host_model() -> str | None:
    """The processor of this host as FAMILY/MODEL/STEPPING."""
    values: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                values.setdefault(name.strip(), value.strip())
    except OSError:
        return None
    parts = [values.get(name, "") for name in ("cpu family", "model", "stepping")]
    return "/".join(parts) if all(part.isdecimal() for part in parts) else None


def _answer(
    launch: Launch, digest: bytes, stated: int | None, tik: bytes | None, *, changed: bool
) -> tuple[bool | None, tuple[str, ...]]:
    reasons = list(_contradictions(launch, stated))
    if reasons:
        return False, tuple(reasons)
    if launch.measurement is None:
        return None, (
            "a SEV-SNP guest is verified by the attestation report that it asks for itself: "
            "compare the report's measurement with the digest",
        )
    if tik is None:
        return None, ("no TIK is given: only the guest's owner has it (--tik)",)
    if launch.measurement.is_of(digest, tik):
        return True, ()
    if changed:
        reasons.append(f"the file changed since {launch.domain.name} was defined")
    reasons.append(
        f"the guest was not launched from this file with {launch.domain.vcpus} vCPUs, or the TIK "
        "is not the one of its session"
    )
    if launch.domain.root.find("launchSecurity/session") is None:
        reasons.append(
            "the domain has no <session>: without one the processor makes a TIK that nobody knows"
        )
    return False, tuple(reasons)


def _contradictions(launch: Launch, stated: int | None) -> Iterator[str]:
    """Policies that should be one: the launched, the domain's and the file's."""
    security = launch.domain.security
    asked = None if security is None else security.policy
    for other, whose in ((asked, "the domain"), (stated, "the file")):
        if other is not None and launch.policy is not None and other != launch.policy:
            yield f"launched with policy 0x{launch.policy:x}, {whose} states 0x{other:x}"


def _warnings(launch: Launch, *, unmeasured: bool) -> Iterator[str]:
    if unmeasured:
        yield (
            f"the file changed since {launch.domain.name} was defined, in a part that is not "
            "measured"
        )
    policy = launch.policy
    if policy is None:
        return
    snp = launch.platform is Platform.SEV_SNP
    if bool(policy & _SNP_DEBUG) if snp else not policy & _NO_DEBUG:
        yield f"the policy 0x{policy:x} allows debugging: the host can read the guest's memory"
