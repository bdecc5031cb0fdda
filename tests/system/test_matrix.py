"""Every command on every libvirt and platform: what a person does with a domain, all its life.

The libvirts are this host's, embedded, and newer releases' daemons, which the Python module of this
host's libvirt talks to.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest

from igvmfw.platforms import Platform
from igvmfw.resources import load_schema
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import Record
from tests.parts import need
from tests.system.guests import Result, domain, igvmfw, wrap
from tests.testbed.standin import LaunchRecord, SevEmulator, make_emulator

VCPUS = 2
CPU = "EPYC-Milan"
MODEL = f"<cpu mode='custom' match='exact' check='none'><model>{CPU}</model></cpu>"
# bit 2 of a SEV policy is for SEV-ES
SECURITY = {
    Platform.NATIVE: "",
    Platform.SEV: "<launchSecurity type='sev'><policy>0x1</policy></launchSecurity>",
    Platform.SEV_ES: "<launchSecurity type='sev'><policy>0x5</policy></launchSecurity>",
    Platform.SEV_SNP: "<launchSecurity type='sev-snp'><policy>0x30000</policy></launchSecurity>",
}
FIRST_WITH_SNP = (10, 5)
ASK_VERSION = """
import sys
from igvmfw.virt.host import connect
with connect(sys.argv[1]) as connection:
    print(connection.native.getLibVersion())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A libvirt."""

    uri: str
    version: tuple[int, int]

    def run(self, command: str, *words: str | Path) -> Result:
        return igvmfw(command, "-c", self.uri, *words)

    def did(self, command: str, *words: str | Path) -> Result:
        """Run what has to succeed."""
        result = self.run(command, *words)
        assert result.code == 0, result.err
        return result

    def virsh(self, *words: str) -> str:
        command = ["virsh", "-q", "-c", self.uri, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout


@pytest.fixture(params=["host", "newer", "newest"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """Each libvirt in turn, left without the domain."""
    if request.param == "host":
        uri: str = request.getfixturevalue("uri")
    else:
        newer: Callable[[int], str] = request.getfixturevalue("newer_libvirts")
        uri = newer(("newer", "newest").index(request.param))
    # in a process of its own: this one could open no second embedded driver
    words = [sys.executable, "-c", ASK_VERSION, uri]
    asked = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    version = int(asked.stdout)
    host = Host(uri=uri, version=(version // 1_000_000, version // 1000 % 1000))
    yield host
    for word in ("destroy", "undefine"):
        with contextlib.suppress(subprocess.CalledProcessError):
            host.virsh(word, "guest")


@pytest.fixture(scope="module")
def protected(
    igvm_qemu: Path, dev_sev: None, tmp_path_factory: pytest.TempPathFactory
) -> SevEmulator:
    """One emulator for all: libvirt takes its time to get to know a new one."""
    tik = bytes(range(16))
    return make_emulator(tmp_path_factory.mktemp("sev"), igvm_qemu, tik=tik)


@pytest.fixture(scope="module")
def files(ovmf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Platform, Path]:
    """The file for each platform; that for SEV-SNP sets one of two vCPUs."""
    directory = tmp_path_factory.mktemp("firmware, of ours")
    three = [word for p in list(SECURITY)[:3] for word in ("--platform", p.value)]
    common = wrap(ovmf, directory / "common.igvm", *three, "--vcpus", str(VCPUS))
    snp = wrap(ovmf, directory / "snp.igvm", "--platform", "sev-snp")
    return {p: snp if p is Platform.SEV_SNP else common for p in SECURITY}


@pytest.fixture
def file(files: dict[Platform, Path], platform: Platform, tmp_path: Path) -> Path:
    copy = tmp_path / "guest, its own.igvm"
    copy.write_bytes(files[platform].read_bytes())
    return copy


@pytest.fixture
def xml(
    request: pytest.FixtureRequest, igvm_qemu: Path, platform: Platform, file: Path, tmp_path: Path
) -> Path:
    emulator = igvm_qemu
    if platform is not Platform.NATIVE:
        standin: SevEmulator = request.getfixturevalue("protected")
        standin.forget()
        emulator = standin.path
    text = domain(
        emulator,
        file,
        kind="qemu" if platform is Platform.NATIVE else "kvm",
        vcpus=VCPUS,
        security=SECURITY[platform],
    )
    if platform is Platform.SEV_SNP:
        text = text.replace("<features>", f"{MODEL}<features>")
    path = tmp_path / "guest.xml"
    path.write_text(text)
    return path


def asked_for(host: Host, *words: str) -> tuple[str | None, int | None]:
    """The file and memory that dumpxml shows the domain to ask for."""
    shown = Domain.parse(host.did("dumpxml", *words, "guest").out.encode())
    request = shown.request()
    assert request is not None
    assert shown.arguments == ()
    assert Record.find(shown) is None
    return request.path, shown.memory


def launched(host: Host, platform: Platform, standin: SevEmulator) -> LaunchRecord:
    # a SEV-SNP guest hands its memory over as it begins to run, and is not heard of again
    snp = platform is Platform.SEV_SNP
    host.did("start", *([] if snp else ["--paused"]), "guest")
    return standin.wait_for("snp_finish" if snp else "measure")


@pytest.mark.parametrize("platform", list(SECURITY))
def test_a_domain_from_its_definition_to_its_end(
    request: pytest.FixtureRequest,
    host: Host,
    platform: Platform,
    file: Path,
    xml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # libvirt of a container may not lift limits; the tests of rewriting have <locked/> itself
    words = ("--validate", "--no-lock-memory", xml)
    if platform is Platform.SEV_SNP and host.version < FIRST_WITH_SNP:
        refused = host.run("define", *words)
        assert (refused.code, refused.out) == (4, "")
        assert "SEV-SNP needs libvirt 10.5 or newer" in refused.err
        assert len(refused.err.splitlines()) == 1
        return
    defined = host.did("define", *words)
    assert defined.out == "Domain 'guest' defined\n"
    assert "warning" not in defined.err
    assert asked_for(host) == (str(file), 256 << 20)

    monkeypatch.setenv("VISUAL", "sed -i s/>262144</>327680</")
    assert host.did("edit", "--no-lock-memory", "guest").out == "Domain 'guest' edited\n"
    assert asked_for(host, "--inactive") == (str(file), 320 << 20)
    option = f"value='igvm-cfg,id=igvm0,file={str(file).replace(',', ',,')}'"
    assert option in host.virsh("dumpxml", "guest")

    if platform is Platform.NATIVE:
        host.did("start", "--paused", "guest")
        assert host.virsh("domstate", "guest").strip() == "paused"
        no = host.run("verify", "guest")
        assert (no.code, no.out) == (1, "")
        assert "a native guest is not measured by SEV" in no.err
    else:
        standin: SevEmulator = request.getfixturevalue("protected")
        record = launched(host, platform, standin)
        verify(host, platform, file, record, standin, tmp_path)
    assert asked_for(host) == (str(file), 320 << 20)

    # an embedded driver, opened anew, may find its guest gone before it is through with ending it
    with contextlib.suppress(subprocess.CalledProcessError):
        host.virsh("destroy", "guest")
    assert host.virsh("domstate", "guest").strip() == "shut off"
    assert host.did("undefine", "guest").out == "Domain 'guest' has been undefined\n"
    gone = host.run("dumpxml", "guest")
    assert (gone.code, gone.out) == (4, "")
    # the file was the guest's to read, and is nobody's to take away
    assert file.exists()


def verify(
    host: Host,
    platform: Platform,
    file: Path,
    record: LaunchRecord,
    standin: SevEmulator,
    directory: Path,
) -> None:
    """What was recorded of the launch, `measure` and `verify` are one, until a byte changes."""
    cpu = ("--cpu", CPU) if platform is Platform.SEV_SNP else ()
    words = ("--platform", platform.value, "--vcpus", str(VCPUS), *cpu, "--bare", str(file))
    measured = igvmfw("measure", *words)
    assert record.digest is not None
    assert measured.out == f"{record.digest.hex()}\n", measured.err
    tik = directory / "guest_tik.bin"
    tik.write_bytes(standin.tik)
    words = ("--tik", str(tik), "--json", "guest")
    snp = platform is Platform.SEV_SNP

    answer = host.run("verify", *words)
    document = json.loads(answer.out)
    jsonschema.validate(document, load_schema("verify"))
    assert (answer.code, document["verified"]) == ((1, None) if snp else (0, True))
    assert document["digest"] == record.digest.hex()
    assert document["algorithm"] == ("sha384" if snp else "sha256")
    if snp:
        assert "attestation report" in document["reasons"][0]

    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # file data: no checksum covers it
    file.write_bytes(data)
    no = host.run("verify", *words)
    document = json.loads(no.out)
    assert (no.code, document["verified"]) == (1, None if snp else False)
    assert document["digest"] != record.digest.hex()
    # and a guest that was not started yet will not be
    if not snp:
        assert "the file changed since guest was defined" in document["reasons"]


def test_the_libvirts_are_as_far_apart_as_they_should_be(
    newer_libvirts: Callable[[int], str],
) -> None:
    """Else the matrix has fewer rows than it seems to have."""
    versions = []
    for place in (0, 1):
        words = [sys.executable, "-c", ASK_VERSION, newer_libvirts(place)]
        asked = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        versions.append(int(asked.stdout))
    need(versions[0] < versions[1], "two releases with different libvirts")
    assert versions[0] >= 11_000_000
