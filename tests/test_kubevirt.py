"""KubeVirt's sidecar, run as its shim runs it; the domains are as virt-launcher writes them.

Sources: kubevirt, cmd/sidecars/sidecar_shim.go (the arguments), pkg/virt-launcher/virtwrap/
converter/compute (os.go, launch_security.go: the domain), kubevirt.io/api core/v1 (the VMI).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lxml import etree

from igvmfw.platforms import Platform
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import Record
from tests.igvm import samples

FOLDER = Path(__file__).parents[1] / "packaging" / "kubevirt"
HOOK = FOLDER / "onDefineDomain"
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
SIDECARS = "hooks.kubevirt.io/hookSidecars"
LOADER = {
    "sev": '<loader readonly="yes" secure="no" type="pflash">/usr/share/OVMF/OVMF_CODE.cc.fd'
    "</loader>\n"
    '\t\t<nvram template="/usr/share/OVMF/OVMF_VARS.fd">'
    "/var/run/kubevirt-private/libvirt/qemu/nvram/guest_VARS.fd</nvram>",
    "sev-snp": '<loader readonly="yes" secure="no" type="rom">/usr/share/edk2/ovmf/OVMF.amdsev.fd'
    "</loader>",
}
SECURITY = {
    "native": ("", {}),
    "sev": (
        '<launchSecurity type="sev">\n\t\t<policy>0x1</policy>\n\t</launchSecurity>',
        {"sev": {}},
    ),
    "sev-es": (
        '<launchSecurity type="sev">\n\t\t<policy>0x5</policy>\n\t</launchSecurity>',
        {"sev": {"policy": {"encryptedState": True}}},
    ),
    "sev-snp": (
        '<launchSecurity type="sev-snp">\n\t\t<policy>0x30000</policy>\n\t</launchSecurity>',
        {"snp": {}},
    ),
    "tdx": ('<launchSecurity type="tdx"></launchSecurity>', {"tdx": {}}),
}


def domain(
    platform: str, *, emulator: Path | None = None, machine: str = "pc-q35-rhel9.6.0"
) -> str:
    """What virt-launcher hands to the hook: Go's encoding/xml, indented with tabs."""
    loader = LOADER["sev-snp" if platform in ("sev-snp", "tdx") else "sev"]
    named = f"<emulator>{emulator}</emulator>\n\t\t" if emulator else ""
    return f"""\
<domain type="kvm" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
	<name>default_igvm-guest</name>
	<memory unit="b">1073741824</memory>
	<os>
		<type arch="x86_64" machine="{machine}">hvm</type>
		<smbios mode="sysinfo"></smbios>
		{loader}
	</os>
	<sysinfo type="smbios">
		<system>
			<entry name="uuid">b0f7b1f5-2a6b-5c3c-8ad4-6e2f3b1f4d5e</entry>
			<entry name="manufacturer">KubeVirt</entry>
		</system>
		<bios></bios>
		<baseBoard></baseBoard>
		<chassis></chassis>
	</sysinfo>
	<devices>
		{named}<controller type="usb" index="0" model="none"></controller>
		<rng model="virtio-non-transitional">
			<backend model="random">/dev/urandom</backend>
		</rng>
		<memballoon model="none"></memballoon>
	</devices>
	{SECURITY[platform][0]}
	<metadata>
		<kubevirt xmlns="http://kubevirt.io">
			<uid>0b1c5b3e-41e7-44c0-9d1c-7cbb0ad4b8a5</uid>
			<graceperiod>
				<deletionGracePeriodSeconds>30</deletionGracePeriodSeconds>
			</graceperiod>
		</kubevirt>
	</metadata>
	<features>
		<acpi></acpi>
	</features>
	<vcpu placement="static">2</vcpu>
</domain>"""


def vmi(
    platform: str, file: Path | str | None, volume: Path | str | None = None, **annotations: Any
) -> dict[str, Any]:
    """A VMI as virt-launcher has it: a stored one, with what the cluster filled in."""
    pvc = {"name": "igvm-firmware", "volumePath": str(volume), "sharedComputePath": str(volume)}
    entry = {"image": "registry.example/sidecar", "args": ["--version", "v1alpha3"], "pvc": pvc}
    notes: dict[str, Any] = {SIDECARS: json.dumps([entry])}
    if file is not None:
        notes["igvmfw.io/file"] = str(file)
    notes |= {f"igvmfw.io/{name}": value for name, value in annotations.items()}
    security = SECURITY[platform][1]
    spec: dict[str, Any] = {
        "cpu": {"cores": 2, "sockets": 1, "threads": 1, "model": "host-model"},
        "machine": {"type": "pc-q35-rhel9.6.0"},
        "memory": {"guest": "1Gi"},
        "firmware": {
            "bootloader": {"efi": {"secureBoot": False}},
            "uuid": "b0f7b1f5-2a6b-5c3c-8ad4-6e2f3b1f4d5e",
        },
        "devices": {"disks": [{"name": "root", "disk": {"bus": "virtio"}}], "rng": {}},
        "resources": {"requests": {"memory": "1Gi"}},
    }
    if security:
        spec["launchSecurity"] = security
    return {
        "kind": "VirtualMachineInstance",
        "apiVersion": "kubevirt.io/v1",
        "metadata": {
            "name": "igvm-guest",
            "namespace": "default",
            "uid": "0b1c5b3e-41e7-44c0-9d1c-7cbb0ad4b8a5",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "annotations": notes,
            "finalizers": ["foregroundDeleteVirtualMachine"],
        },
        "spec": {
            "domain": spec,
            "volumes": [{"name": "root", "containerDisk": {"image": "registry.example/disk"}}],
            "architecture": "amd64",
        },
        "status": {"phase": "Scheduled", "nodeName": "node01"},
    }


def call(*words: str | bytes, code: int) -> "subprocess.CompletedProcess[bytes]":
    """Run the hook; a refusal prints nothing but one line on stderr."""
    command = [sys.executable, "-I", str(HOOK), *words]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stdout == b""
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("igvmfw: error: ")
        assert "Traceback" not in line
        assert "internal error" not in line
    else:
        assert done.stderr == b""
    return done


def hook(instance: object, xml: str, *, code: int = 0) -> bytes:
    """What the hook answers: the domain, or the line that it refuses with."""
    done = call("--vmi", json.dumps(instance), "--domain", xml, code=code)
    return done.stderr if code else done.stdout


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """What the PVC would be: a folder that both containers see under one path."""
    folder = tmp_path / "volume"
    folder.mkdir()
    return folder


@pytest.fixture
def file(volume: Path) -> Path:
    path = volume / "all.igvm"
    path.write_bytes(
        samples.small(Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)
    )
    return path


def assert_valid(xml: bytes) -> None:
    """See that libvirt's schema takes a domain, but for what KubeVirt always writes.

    Go writes lists without members as empty elements, which the schema has no room for; libvirt
    itself passes over them.
    """
    tree = etree.fromstring(xml)
    for name in ("bios", "baseBoard", "chassis"):
        for element in tree.iterfind(f"sysinfo/{name}"):
            element.getparent().remove(element)  # type: ignore[union-attr]
    etree.RelaxNG(etree.parse(SCHEMA)).assertValid(tree)


@pytest.mark.parametrize("platform", ["native", "sev", "sev-es", "sev-snp"])
def test_the_domain_is_launched_from_the_file(file: Path, volume: Path, platform: str) -> None:
    before = domain(platform)
    result = hook(vmi(platform, file, volume), before)
    after = Domain.parse(result)
    assert after.arguments == (
        "-object", f"igvm-cfg,id=igvm0,file={file}", "-machine", "igvm-cfg=igvm0",
    )  # fmt: skip
    assert after.os.loader is None
    assert after.os.variables is None
    record = Record.find(after)
    assert record is not None
    assert record.file is not None
    assert (record.file.path, record.file.platform) == (str(file), platform)
    # virt-launcher's own stays, its metadata included, and nothing of the memory is locked
    assert after.root.find("{*}metadata/{http://kubevirt.io}kubevirt") is not None
    assert after.root.find("memoryBacking") is None
    assert b"0b1c5b3e-41e7-44c0-9d1c-7cbb0ad4b8a5" in result
    # virt-launcher asks again when it syncs: the same answer
    assert hook(vmi(platform, file, volume), result.decode()) == result
    if platform != "sev-snp":  # which Debian 12's libvirt does not know yet
        assert_valid(before.encode())
        assert_valid(result)


@pytest.mark.parametrize("xml", [domain("sev"), "<domain>\n\té </domain>\n\n", "no XML at all"])
@pytest.mark.parametrize(
    "instance",
    [
        vmi("sev", None),
        {},
        {"metadata": None},
        {"metadata": {"annotations": None}},
        {"metadata": {"annotations": {"other": 1}}},
    ],
    ids=range(5),
)
def test_a_vmi_that_does_not_ask_stays_as_it_is_to_the_byte(xml: str, instance: object) -> None:
    assert hook(instance, xml) == xml.encode()


def test_bytes_that_are_no_text_stay_too() -> None:
    xml = b"<domain>\xff\xfe</domain>"
    assert call("--vmi", "{}", "--domain", xml, code=0).stdout == xml


def test_the_digest_pins_the_file(file: Path, volume: Path) -> None:
    import hashlib

    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    hook(vmi("sev", file, volume, sha256=digest), domain("sev"))
    hook(vmi("sev", file, volume, sha256=digest.upper()), domain("sev"))
    refused = hook(vmi("sev", file, volume, sha256="0" * 64), domain("sev"), code=1)
    assert digest.encode() in refused
    assert b"which file" in hook(vmi("sev", None, sha256=digest), domain("sev"), code=1)


@pytest.mark.parametrize(
    ("asked", "got"),
    [("sev-snp", "native"), ("sev", "native"), ("sev-es", "sev"), ("native", "sev")],
)
def test_a_guest_never_gets_another_protection_than_the_vmi_says(
    file: Path, volume: Path, asked: str, got: str
) -> None:
    refused = hook(vmi(asked, file, volume), domain(got), code=1)
    assert asked.encode() in refused


def test_tdx_is_refused(file: Path, volume: Path) -> None:
    hook(vmi("tdx", file, volume), domain("tdx"), code=1)


def test_a_file_that_qemu_would_not_find_is_refused(
    file: Path, volume: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.igvm"
    outside.write_bytes(file.read_bytes())
    link = volume / "link.igvm"
    link.symlink_to(outside)
    differs = vmi("sev", file, volume)
    entries = json.loads(differs["metadata"]["annotations"][SIDECARS])
    entries[0]["pvc"]["sharedComputePath"] = "/elsewhere"
    differs["metadata"]["annotations"][SIDECARS] = json.dumps(entries)
    bare = vmi("sev", file, volume)
    del bare["metadata"]["annotations"][SIDECARS]
    for instance in (
        vmi("sev", outside, volume),
        vmi("sev", link, volume),
        vmi("sev", f"{volume}/../outside.igvm", volume),
        vmi("sev", f"{volume}", volume),
        vmi("sev", f"{volume}x/a.igvm", volume),
        differs,
        bare,
    ):
        refused = hook(instance, domain("sev"), code=1)
        assert b"sharedComputePath" in refused


def test_the_container_s_log_says_why(file: Path, volume: Path, tmp_path: Path) -> None:
    """sidecar-shim drops the hook's standard error; its own is the log."""
    shim = tmp_path / "sidecar-shim"
    shim.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        "sys.exit(subprocess.run(sys.argv[1:], stderr=subprocess.PIPE).returncode)\n"
    )
    shim.chmod(0o755)
    instance = json.dumps(vmi("sev", volume / "missing.igvm", volume))
    command = [sys.executable, str(HOOK), "--vmi", instance, "--domain", domain("sev")]
    done = subprocess.run([str(shim), *command], capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr.startswith(b"igvmfw: error: ")
    assert b"missing.igvm" in done.stderr


def test_what_cannot_be_checked_is_said_and_the_guest_starts(file: Path, volume: Path) -> None:
    """As with KubeVirt's firmware autoselection, whose features a file by path cannot show."""
    asks = domain("sev").replace("<os>", '<os firmware="efi">')
    begin, end = asks.index("<loader"), asks.index("</loader>") + len("</loader>")
    wants = '<firmware><feature enabled="yes" name="secure-boot"></feature></firmware>'
    asks = asks[:begin] + wants + asks[end:]
    words = ["--vmi", json.dumps(vmi("sev", file, volume)), "--domain", asks]
    command = [sys.executable, "-I", str(HOOK), *words]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0
    assert done.stderr.startswith(b"igvmfw: warning: ")
    assert b"secure-boot" in done.stderr
    assert len(Domain.parse(done.stdout).arguments) == 4


def test_a_bad_file_is_refused_with_its_name(file: Path, volume: Path) -> None:
    (volume / "damaged.igvm").write_bytes(file.read_bytes()[:-1] + b"\xff" * 9)
    (volume / "native.igvm").write_bytes(samples.small(Platform.NATIVE))
    assert b"damaged.igvm" in hook(
        vmi("sev", volume / "damaged.igvm", volume), domain("sev"), code=3
    )
    assert b"missing.igvm" in hook(
        vmi("sev", volume / "missing.igvm", volume), domain("sev"), code=3
    )
    assert b"native.igvm" in hook(vmi("sev", volume / "native.igvm", volume), domain("sev"), code=1)


def test_a_path_cannot_bring_options_along(file: Path, volume: Path) -> None:
    odd = volume / "a,id=x,file=b'\"<&>.igvm"
    odd.write_bytes(file.read_bytes())
    after = Domain.parse(hook(vmi("sev", odd, volume), domain("sev")))
    assert after.arguments[1] == f"igvm-cfg,id=igvm0,file={str(odd).replace(',', ',,')}"
    for name in ("a\nb", "a\x1b[31mb", "a\x00b", "x" * 5000):
        refused = hook(vmi("sev", f"{volume}/{name}", volume), domain("sev"), code=1)
        assert b"\x1b" not in refused


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "1", '"x"', "[" * 60000, '{"a":' * 20000, "1" * 120000,
        '{"metadata": []}', '{"metadata": {"annotations": []}}',
        '{"metadata": {"annotations": {"igvmfw.io/file": 1}}}',
        '{"metadata": {"annotations": {"igvmfw.io/file": ["/a"]}}}',
        json.dumps({"metadata": {"annotations": {"igvmfw.io/file": "/a", SIDECARS: "{"}}}),
        json.dumps({"metadata": {"annotations": {"igvmfw.io/file": "/a", SIDECARS: 7}}}),
        json.dumps({"metadata": {"annotations": {"igvmfw.io/file": "/a\ud800"}}}),
    ],
    ids=range(16),
)  # fmt: skip
def test_a_vmi_that_is_none_is_refused(text: str) -> None:
    call("--vmi", text, "--domain", domain("native"), code=3)


@pytest.mark.parametrize(
    "entries",
    [[1], [None], [{"pvc": 1}], [{"pvc": {}}], [{"pvc": {"volumePath": None}}],
     [{"pvc": {"volumePath": ["/"], "sharedComputePath": ["/"]}}],
     [{"pvc": {"volumePath": "\0", "sharedComputePath": "\0"}}]],
    ids=range(7),
)  # fmt: skip
def test_odd_sidecars_share_nothing(file: Path, volume: Path, entries: object) -> None:
    instance = vmi("sev", file, volume)
    instance["metadata"]["annotations"][SIDECARS] = json.dumps(entries)
    hook(instance, domain("sev"), code=1)


@pytest.mark.parametrize("security", [[], 1, "snp", {"sev": 1}, {"sev": {"policy": []}}])
def test_odd_launch_security_is_refused(file: Path, volume: Path, security: object) -> None:
    instance = vmi("native", file, volume)
    instance["spec"]["domain"]["launchSecurity"] = security
    hook(instance, domain("native"), code=3)


def test_two_kinds_of_launch_security_are_refused(file: Path, volume: Path) -> None:
    instance = vmi("native", file, volume)
    instance["spec"]["domain"]["launchSecurity"] = {"sev": {}, "snp": {}}
    hook(instance, domain("sev"), code=1)


@pytest.mark.parametrize(
    "xml", ["", "<domain", "<a/>", "<domain>" * 5000, "<!DOCTYPE d [<!ENTITY a 'b'>]>"]
)
def test_a_damaged_domain_is_refused(file: Path, volume: Path, xml: str) -> None:
    hook(vmi("native", file, volume), xml, code=3)


@pytest.mark.parametrize(
    "words", [[], ["--vmi", "{}"], ["--domain", "x"], ["--vmi", "{}", "--dom", "x"]]
)
def test_wrong_usage(words: list[str]) -> None:
    assert b"usage: " in call(*words, code=2).stderr


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


@pytest.mark.parametrize("name", ["vmi.yaml", "vmi-configmap.yaml"])
def test_the_manifests_name_what_there_is(name: str) -> None:
    (instance,) = documents(name)
    claim, job = documents("firmware.yaml")
    annotations = instance["metadata"]["annotations"]
    (sidecar,) = json.loads(annotations[SIDECARS])
    assert set(sidecar) <= {"image", "imagePullPolicy", "command", "args", "configMap", "pvc"}
    assert sidecar["pvc"]["name"] == claim["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == sidecar["image"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert f"--output={annotations['igvmfw.io/file']}" in container["command"]
    assert container["volumeMounts"][0]["mountPath"] == sidecar["pvc"]["volumePath"]
    if "configMap" in sidecar:
        (made,) = documents("kustomization.yaml")
        (generated,) = made["configMapGenerator"]
        assert sidecar["configMap"]["name"] == generated["name"]
        assert sidecar["configMap"]["key"] in generated["files"]
        assert sidecar["configMap"]["hookPath"] == "/usr/bin/onDefineDomain"


def test_the_manifest_becomes_a_guest(volume: Path, ovmf: Path) -> None:
    """The Job's own command makes the file, and the hook takes the manifest."""
    _, job = documents("firmware.yaml")
    (instance,) = documents("vmi.yaml")
    text = json.dumps(instance).replace("/var/run/igvmfw", str(volume))
    program, *words = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert program == "igvmfw"
    words = [word.replace("/var/run/igvmfw", str(volume)) for word in words]
    words = [word.replace("/usr/share/ovmf/OVMF.fd", str(ovmf)) for word in words]
    subprocess.run(
        [sys.executable, "-m", "igvmfw", *words], check=True, timeout=120, capture_output=True
    )
    after = Domain.parse(call("--vmi", text, "--domain", domain("sev-snp"), code=0).stdout)
    record = Record.find(after)
    assert record is not None
    assert record.file is not None
    assert record.file.platform is Platform.SEV_SNP


def test_the_image_copies_what_there_is() -> None:
    lines = (FOLDER / "Containerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    copied = {name for names in copies for name in names if "--from=shim" not in names}
    for name in copied:
        assert (FOLDER.parents[1] / name).exists()
    assert {"igvmfw", "schemas", "descriptors", "packaging/kubevirt/onDefineDomain"} <= copied
    assert HOOK.stat().st_mode & 0o111 == 0o111
