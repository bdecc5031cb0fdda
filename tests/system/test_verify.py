"""verify: was a running guest launched from its file?  Real libvirt and QEMU, a stand-in host."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import launch_digest
from igvmfw.platforms import Platform
from igvmfw.resources import load_schema
from igvmfw.virt.record import NAMESPACE
from tests.parts import need
from tests.system.guests import Result, domain, igvmfw, wrap
from tests.testbed.standin import API_VERSION, SevEmulator

SESSION = "has no <session>: without one the processor makes a TIK that nobody knows"


def launched(
    uri: str,
    emulator: SevEmulator,
    ovmf: Path,
    directory: Path,
    *,
    policy: str = "0x5",
    vcpus: int = 2,
    contexts: int = 2,
    cpu: str = "",
) -> Path:
    """Start a guest of a new file; returns the file."""
    words = ("--platform", "sev", "--platform", "sev-es", "--vcpus", str(contexts))
    file = wrap(ovmf, directory / "firmware.igvm", *words)
    xml = directory / "guest.xml"
    security = f"<launchSecurity type='sev'><policy>{policy}</policy></launchSecurity>{cpu}"
    xml.write_text(domain(emulator.path, file, vcpus=vcpus, security=security))
    for command, word in (("define", xml), ("start", "guest")):
        result = igvmfw(command, "-c", uri, *(["--paused"] if command == "start" else []), word)
        assert result.code == 0, result.err
    emulator.wait_for("measure")
    return file


@pytest.fixture
def tik(sev_emulator: SevEmulator, tmp_path: Path) -> Path:
    path = tmp_path / "guest_tik.bin"
    path.write_bytes(sev_emulator.tik)
    return path


def verify(uri: str, *words: str | Path) -> Result:
    return igvmfw("verify", "-c", uri, *words, "guest")


def facts(result: Result) -> dict[str, str]:
    lines = (line.strip().partition("  ") for line in result.out.splitlines()[1:])
    return {name: value.strip() for name, _, value in lines if value}


def read(result: Result) -> dict[str, object]:
    document: dict[str, object] = json.loads(result.out)
    jsonschema.validate(document, load_schema("verify"))
    return document


@pytest.mark.parametrize(("policy", "platform"), [("0x1", "sev"), ("0x5", "sev-es")])
def test_yes_and_the_ways_to_no(
    uri: str,
    sev_emulator: SevEmulator,
    ovmf: Path,
    tmp_path: Path,
    tik: Path,
    policy: str,
    platform: str,
) -> None:
    file = launched(uri, sev_emulator, ovmf, tmp_path, policy=policy)
    record = sev_emulator.record()
    assert record.digest is not None
    yes = verify(uri, "--tik", tik)
    assert (yes.code, yes.err) == (0, "")
    assert yes.out.startswith("guest: verified\n")
    major, minor, build = API_VERSION
    assert facts(yes) == {
        "file": str(file),
        "platform": platform,
        "vCPUs": "2",
        "policy": policy,
        "launch digest": record.digest.hex(),
        "measurement": base64.b64encode(record.measurement or b"").decode(),
        "SEV API, build": f"{major}.{minor}, {build}",
    }
    # the key as text, and the owner's own copy of the file
    copy = tmp_path / "copy.igvm"
    shutil.copy(file, copy)
    text = tmp_path / "tik.b64"
    text.write_text(base64.b64encode(sev_emulator.tik).decode() + "\n")
    document = read(verify(uri, "--tik", text, "--file", copy, "--json"))
    assert document["verified"] is True
    assert document["reasons"] == []
    assert (document["file"], document["digest"]) == (str(copy), record.digest.hex())

    # each from standard input, and both
    for word, given in (("--tik", sev_emulator.tik), ("--file", file.read_bytes())):
        others = {"--tik": tik, "--file": file, word: "-"}
        words = [str(part) for pair in others.items() for part in pair]
        command = [sys.executable, "-m", "igvmfw", "verify", "-c", uri, *words, "guest"]
        piped = subprocess.run(command, input=given, capture_output=True, check=False, timeout=60)
        assert (piped.returncode, piped.stderr) == (0, b""), word
    both = verify(uri, "--tik", "-", "--file", "-")
    assert both.code == 2
    assert "--tik and --file cannot both be standard input" in both.err

    # another key
    wrong = tmp_path / "wrong.bin"
    wrong.write_bytes(bytes(16))
    no = verify(uri, "--tik", wrong)
    assert no.code == 1
    assert no.out.startswith("guest: not verified\n")
    assert "not launched from this file with 2 vCPUs, or the TIK is not the one of its" in no.out
    assert SESSION in no.out
    assert read(verify(uri, "--tik", wrong, "--json"))["verified"] is False
    # one byte of the file
    original = file.read_bytes()
    data = bytearray(original)
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    no = verify(uri, "--tik", tik)
    assert no.code == 1
    assert no.out.startswith("guest: not verified\n  the file changed since guest was defined\n")
    # which is not the owner's, whose copy is as it was
    assert verify(uri, "--tik", tik, "--file", copy).code == 0
    # a byte that no launch takes: the end of a VMSA
    data = bytearray(original)
    data[-1] ^= 1
    file.write_bytes(data)
    yes = verify(uri, "--tik", tik)
    assert yes.code == 0
    assert "the file changed since guest was defined, in a part that is not measured" in yes.err
    # the owner does not depend on what the host has put into the metadata
    forged = ["--uri", NAMESPACE, "--key", "x", "--set", "<domain><file sha256='x'/></domain>"]
    put = ["virsh", "-q", "-c", uri, "metadata", "guest", *forged, "--live"]
    subprocess.run(put, check=True, capture_output=True, timeout=60)
    damaged = verify(uri, "--tik", tik)
    assert damaged.code == 3
    assert "igvmfw's record in <metadata> is damaged" in damaged.err
    assert verify(uri, "--tik", tik, "--file", copy).code == 0


def test_another_count_of_vcpus_is_another_launch(
    uri: str, sev_emulator: SevEmulator, ovmf: Path, tmp_path: Path, tik: Path
) -> None:
    file = launched(uri, sev_emulator, ovmf, tmp_path, vcpus=2, contexts=2)
    one = wrap(ovmf, tmp_path / "one.igvm", "--platform", "sev-es", "--vcpus", "1")
    no = verify(uri, "--tik", tik, "--file", one)
    assert no.code == 1
    assert "not launched from this file with 2 vCPUs" in no.out
    three = wrap(ovmf, tmp_path / "three.igvm", "--platform", "sev-es", "--vcpus", "3")
    no = verify(uri, "--tik", tik, "--file", three)
    assert (no.code, no.out) == (1, "")
    assert f"{three}: the file sets vCPU 2, the guest has only 2" in no.err
    # nor is a file for another platform, or one that states another policy
    other = wrap(ovmf, tmp_path / "native.igvm")
    no = verify(uri, "--tik", tik, "--file", other)
    assert (no.code, no.out) == (1, "")
    assert f"{other}: guest runs on sev-es, the file is only for native" in no.err
    words = ("--platform", "sev-es", "--vcpus", "2", "--policy", "0x7")
    strict = wrap(ovmf, tmp_path / "strict.igvm", *words)
    no = verify(uri, "--tik", tik, "--file", strict)
    assert no.code == 1
    assert "launched with policy 0x5, the file states 0x7" in no.out
    assert verify(uri, "--tik", tik, "--file", file).code == 0


def named(model: str) -> str:
    text = f"<model fallback='forbid'>{model}</model>"
    return f"<cpu mode='custom' match='exact' check='none'>{text}</cpu>"


@pytest.mark.parametrize(
    ("cpu", "signature", "words"),
    [
        ("", 0x60FB1, ()),
        (named("EPYC"), 0x800F12, ()),
        ("<cpu mode='host-passthrough'/>", None, ()),
        (named("Opteron_G1"), 0xF61, ("15/6/1",)),
    ],
)
def test_a_vcpu_that_the_file_does_not_set_starts_with_its_signature(
    uri: str,
    sev_emulator: SevEmulator,
    ovmf: Path,
    tmp_path: Path,
    tik: Path,
    cpu: str,
    signature: int | None,
    words: tuple[str, ...],
) -> None:
    launched(uri, sev_emulator, ovmf, tmp_path, vcpus=2, contexts=1, cpu=cpu)
    started_with = sev_emulator.record().vcpus[1].registers["rdx"]
    if words:
        unknown = verify(uri, "--tik", tik)
        assert unknown.code == 2
        assert "unknown CPU model 'Opteron_G1'" in unknown.err
        assert "name it with --cpu" in unknown.err
        words = ("--cpu", *words)
    yes = verify(uri, "--tik", tik, *words)
    assert yes.code == 0, yes.out + yes.err
    assert facts(yes)["CPU signature"] == f"0x{started_with:x}"
    assert signature in (None, started_with)
    no = verify(uri, "--tik", tik, "--cpu", "EPYC-Genoa")
    assert no.code == 1


def test_without_the_key_nothing_is_verified(
    uri: str, sev_emulator: SevEmulator, ovmf: Path, tmp_path: Path
) -> None:
    file = launched(uri, sev_emulator, ovmf, tmp_path, policy="0x4")
    unknown = verify(uri)
    assert unknown.code == 1
    assert unknown.out.startswith(
        "guest: not verified\n  no TIK is given: only the guest's owner has it (--tik)\n"
    )
    assert "the policy 0x4 allows debugging: the host can read the guest's memory" in unknown.err
    digest = launch_digest(IgvmFile.parse(file.read_bytes()), Platform.SEV_ES, vcpus=2).hex()
    assert facts(unknown)["launch digest"] == digest
    document = read(verify(uri, "--json"))
    assert (document["verified"], document["digest"]) == (None, digest)


def test_what_is_no_measurement_is_said(
    uri: str, sev_emulator: SevEmulator, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    for size, hint in ((0, "sevctl session"), (15, "the file has 15"), (32, "tail -c 16")):
        key = tmp_path / "key"
        key.write_bytes(bytes(size))
        bad = verify(uri, "--tik", key)
        assert (bad.code, bad.out) == (3, "")
        assert f"{key}: no TIK: it has 16 bytes, or these in base64" in bad.err
        assert hint in bad.err
    nobody = verify(uri)
    assert nobody.code == 4
    assert "guest" in nobody.err
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, wrap(ovmf, tmp_path / "native.igvm")))
    assert igvmfw("define", "-c", uri, xml).code == 0
    off = verify(uri)
    assert (off.code, off.out) == (1, "")
    assert "domain 'guest': not running: there is no measurement (start it first)" in off.err
    assert igvmfw("start", "-c", uri, "--paused", "guest").code == 0
    native = verify(uri)
    assert (native.code, native.out) == (1, "")
    assert "domain 'guest': a native guest is not measured by SEV" in native.err


@pytest.mark.parametrize("policy", ["0x1", "0x5"])
def test_libvirts_own_validator_agrees(
    uri: str, sev_emulator: SevEmulator, ovmf: Path, tmp_path: Path, tik: Path, policy: str
) -> None:
    """It knows raw firmware and VMSAs, so it gets what was handed over as such."""
    validator = shutil.which("virt-qemu-sev-validate")
    need(validator is not None, "virt-qemu-sev-validate (libvirt-clients-qemu)")
    assert validator is not None
    launched(uri, sev_emulator, ovmf, tmp_path, policy=policy)
    record = sev_emulator.record()
    raw, wrong = tmp_path / "raw.fd", tmp_path / "wrong.bin"
    raw.write_bytes(record.data)
    wrong.write_bytes(bytes(16))
    major, minor, build = API_VERSION
    # by the distribution's Python, which has what it needs
    words: list[str | Path] = ["/usr/bin/python3", validator, "--firmware", raw, "--tek", wrong]
    words += ["--measurement", facts(verify(uri))["measurement"], "--policy", str(int(policy, 16))]
    words += ["--api-major", str(major), "--api-minor", str(minor), "--build-id", str(build)]
    for vcpu in record.vcpus:
        page = tmp_path / f"vmsa{vcpu.index}"
        page.write_bytes(vcpu.page)
        words += [f"--vmsa-cpu{vcpu.index}", page, "--num-cpus", "2"]
    assert len(record.vcpus) == (2 if policy == "0x5" else 0)
    for key, code in ((tik, 0), (wrong, 1)):
        theirs = subprocess.run(
            [*words, "--tik", key], capture_output=True, text=True, check=False, timeout=60
        )
        assert theirs.returncode == code, theirs.stderr
        assert ("OK: Looks good to me" in theirs.stdout) == (code == 0)
        assert verify(uri, "--tik", key).code == code


def test_for_sev_snp_the_digest_of_the_attestation_report_is_said(
    newer_libvirt: str, sev_emulator: SevEmulator, ovmf: Path, tmp_path: Path
) -> None:
    file = wrap(ovmf, tmp_path / "snp.igvm", "--platform", "sev-snp")
    security = "<launchSecurity type='sev-snp'><policy>0x30000</policy></launchSecurity>"
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(sev_emulator.path, file, name="verified-snp", vcpus=2, security=security))
    created = igvmfw("create", "-c", newer_libvirt, xml)
    assert created.code == 0, created.err
    record = sev_emulator.wait_for("snp_finish")
    assert record.digest is not None
    unknown = igvmfw("verify", "-c", newer_libvirt, "verified-snp")
    assert unknown.code == 1, unknown.err
    assert unknown.out.startswith("verified-snp: not verified\n  a SEV-SNP guest is verified by ")
    assert facts(unknown)["launch digest"] == record.digest.hex()
    assert facts(unknown)["policy"] == "0x30000"
    document = read(igvmfw("verify", "-c", newer_libvirt, "--json", "verified-snp"))
    assert (document["verified"], document["launch"]) == (None, None)
    assert (document["algorithm"], document["digest"]) == ("sha384", record.digest.hex())
