"""SEV and SEV-ES guests from an IGVM file: real libvirt, real QEMU, a stand-in for the host."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import launch_digest
from igvmfw.platforms import Platform
from igvmfw.rewrite import rewrite
from igvmfw.select import Choice
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import Record
from tests.system.guests import domain, igvmfw, wrap
from tests.testbed.standin import SevEmulator

INCOMPATIBLE = "IGVM file does not describe a compatible supported platform"


def security(policy: str | None) -> str:
    stated = "" if policy is None else f"<policy>{policy}</policy>"
    return f"<launchSecurity type='sev'>{stated}</launchSecurity>"


@pytest.mark.parametrize(
    ("platform", "policy", "vcpus", "expected"),
    [
        (Platform.SEV, "0x1", 1, 0x1),
        (Platform.SEV_ES, "0x5", 2, 0x5),
        # no policy: virt-install's default; libvirt reads the processor's own CPUID for SEV-ES,
        # where the stand-in cannot answer
        (Platform.SEV, None, 2, 0x3),
    ],
)
def test_a_guest_starts_and_is_measured_as_expected(
    uri: str,
    embed_root: Path,
    sev_emulator: SevEmulator,
    ovmf: Path,
    tmp_path: Path,
    platform: Platform,
    policy: str | None,
    vcpus: int,
    expected: int,
) -> None:
    words = ("--platform", "sev", "--platform", "sev-es", "--vcpus", "2")
    file = wrap(ovmf, tmp_path / "ovmf, sev.igvm", *words)
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(sev_emulator.path, file, vcpus=vcpus, security=security(policy)))
    defined = igvmfw("define", "-c", uri, "--validate", xml)
    assert defined.code == 0, defined.err
    started = igvmfw("start", "-c", uri, "--paused", "guest")
    assert started.code == 0, started.err

    record = sev_emulator.wait_for("measure")
    assert record.policy == expected
    kept = Record.find(Domain.parse((embed_root / "etc/qemu/guest.xml").read_bytes()))
    assert kept is not None
    assert kept.file is not None
    assert kept.file.platform is platform
    # what the metadata promises, what the file says, and what was launched are one
    assert record.digest is not None
    assert kept.file.measurement == record.digest.hex()
    image = IgvmFile.parse(file.read_bytes())
    assert launch_digest(image, platform, vcpus=vcpus) == record.digest
    assert len(record.vcpus) == (vcpus if platform is Platform.SEV_ES else 0)


def test_a_file_without_the_platform_is_refused_before_libvirt_and_by_qemu(
    uri: str, embed_root: Path, sev_emulator: SevEmulator, ovmf: Path, tmp_path: Path
) -> None:
    file = wrap(ovmf, tmp_path / "snp.igvm", "--platform", "sev-snp")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(sev_emulator.path, file, security=security("0x1")))
    for command in ("define", "create"):
        refused = igvmfw(command, "-c", uri, xml)
        assert (refused.code, refused.out) == (1, "")
        assert f"{file}: the guest needs sev, the file is for sev-snp" in refused.err
    assert not list((embed_root / "etc" / "qemu").glob("*.xml"))
    assert not (embed_root / "log" / "qemu" / "guest.log").exists()

    # had igvmfw let it pass, QEMU would not have
    choice = Choice(path=str(file), sha256="0" * 64, platform=Platform.SEV, policy=1)
    forced = rewrite(Domain.parse(xml.read_bytes()), choice, lock_memory=False).domain
    xml.write_bytes(forced.write())
    program = (
        "import sys\n"
        "from igvmfw.virt.host import connect, translated\n"
        "with connect(sys.argv[1]) as connection, translated():\n"
        "    connection.native.createXML(open(sys.argv[2]).read())\n"
    )
    words = [sys.executable, "-c", program, uri, str(xml)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode
    error = done.stderr[done.stderr.index("igvmfw.errors.LibvirtError") :]
    assert INCOMPATIBLE in error
    assert "choose another file" in error


def test_a_sev_es_policy_needs_a_sev_es_file(
    uri: str, sev_emulator: SevEmulator, ovmf: Path, tmp_path: Path
) -> None:
    file = wrap(ovmf, tmp_path / "sev.igvm", "--platform", "sev")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(sev_emulator.path, file, security=security("0x5")))
    refused = igvmfw("define", "-c", uri, xml)
    assert refused.code == 1
    assert "needs sev-es, the file is for sev" in refused.err
    # without a policy the guest gets what both host and file have
    xml.write_text(domain(sev_emulator.path, file, security=security(None)))
    printed = igvmfw("define", "-c", uri, "--print-xml", xml)
    assert "<policy>0x0003</policy>" in printed.out


def test_virsh_sees_an_ordinary_domain(
    uri: str, sev_emulator: SevEmulator, ovmf: Path, tmp_path: Path
) -> None:
    file = wrap(ovmf, tmp_path / "sev.igvm", "--platform", "sev")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(sev_emulator.path, file, security=security("0x1")))
    assert igvmfw("define", "-c", uri, xml).code == 0
    virsh = subprocess.run(
        ["virsh", "-q", "-c", uri, "start", "--paused", "guest"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert virsh.returncode == 0, virsh.stderr
    assert sev_emulator.wait_for("measure").policy == 1


def change(uri: str, directory: Path, old: str, new: str) -> None:
    """Change what libvirt has of the guest, as `virsh edit` would."""
    words = ["virsh", "-q", "-c", uri]
    shown = subprocess.run(
        [*words, "dumpxml", "--inactive", "guest"], capture_output=True, text=True, check=True
    ).stdout
    changed = re.sub(old, new, shown, flags=re.S)
    assert changed != shown
    (directory / "changed.xml").write_text(changed)
    subprocess.run([*words, "define", directory / "changed.xml"], check=True)


@pytest.fixture
def protected(uri: str, sev_emulator: SevEmulator, ovmf: Path, tmp_path: Path) -> Path:
    """The file of a SEV-ES guest that is defined as `guest`; plain guests could take it, too."""
    words = ("--platform", "native", "--platform", "sev-es", "--vcpus", "2")
    file = wrap(ovmf, tmp_path / "es.igvm", *words, "--policy", "sev-es=0x7")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(sev_emulator.path, file, vcpus=2, security=security("0x7")))
    defined = igvmfw("define", "-c", uri, xml)
    assert defined.code == 0, defined.err
    return file


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<launchSecurity.*</launchSecurity>", "", "chosen for sev-es, the guest is now native"),
        ("0x0007", "0x0003", "chosen for sev-es, the guest is now sev"),
        ("0x0007", "0x0004", "the domain's guest policy is 0x4, the file's is 0x7"),
    ],
)
def test_a_guest_with_less_protection_than_was_defined_does_not_start(
    uri: str, protected: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    change(uri, tmp_path, old, new)
    result = igvmfw("start", "-c", uri, "--paused", "guest")
    assert (result.code, result.out) == (1, "")
    assert said in result.err
    assert "define" in result.err or "<policy>" in result.err


@pytest.mark.parametrize("vcpus", [2, 3])
def test_the_digest_that_start_shows_is_of_the_vcpus_that_start(
    uri: str, sev_emulator: SevEmulator, protected: Path, tmp_path: Path, vcpus: int
) -> None:
    if vcpus == 3:
        change(uri, tmp_path, "(<vcpu[^>]*>)2<", r"\g<1>3<")
    result = igvmfw("start", "-c", uri, "--paused", "--json", "guest")
    assert result.code == 0, result.err
    shown = json.loads(result.out)["igvm"]["measurement"]
    launched = sev_emulator.wait_for("measure").digest
    assert launched is not None
    # the third's registers are not the file's, but follow from the processor
    assert shown == (launched.hex() if vcpus == 2 else None)
