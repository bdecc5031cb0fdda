"""Firmware that keeps the state of its vTPM, as far as no guest is needed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from igvmfw.cli import main
from igvmfw.platforms import Platform
from igvmfw.state import recorded
from igvmfw.virt.domain import Domain
from tests.igvm import samples

Rewrite = Callable[..., tuple[Domain, str]]
STORAGE = {"interface": "virtio-blk-mmio", "format": "raw", "size-bytes": 8 << 20}
XML = """<domain type='kvm'>
  <name>guest</name>
  <memory unit='MiB'>64</memory>
  {os}
  <devices>
    <emulator>{emulator}</emulator>
  </devices>
  {security}
</domain>
"""
CHOSEN = "<os firmware='igvm'><type arch='x86_64' machine='q35'>hvm</type></os>"
SNP = "<launchSecurity type='sev-snp'><policy>0x30000</policy></launchSecurity>"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one firmware file, whose descriptor asks for storage."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    root = tmp_path / "root"
    directory = root / "usr/share/qemu/firmware"
    directory.mkdir(parents=True)
    (root / "svsm.igvm").write_bytes(samples.small(Platform.NATIVE, Platform.SEV_SNP))
    write_descriptor(root, STORAGE)
    return root


def write_descriptor(root: Path, storage: dict[str, object], filename: str = "/svsm.igvm") -> None:
    descriptor = {
        "description": "with a vTPM",
        "interface-types": ["uefi"],
        "mapping": {"device": "igvm", "filename": filename, "x-vtpm-storage": storage},
        "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
        "features": ["amd-sev-snp", "vtpm"],
        "tags": [],
    }
    path = root / "usr/share/qemu/firmware/50-svsm.json"
    path.write_text(json.dumps(descriptor))


def emulator(directory: Path, *properties: str) -> Path:
    """An emulator as far as asking for its machine goes."""
    path = directory / "qemu"
    lines = "echo 'pc-q35-machine options:'\n" + "".join(
        f"echo '  {name}=<bool> - text'\n" for name in properties
    )
    path.write_text(f'#!/bin/sh\n[ "$*" = "-machine q35,help" ] || exit 1\n{lines}')
    path.chmod(0o755)
    return path


@pytest.fixture
def rewrite(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Rewrite:
    """Rewrites a text; what came out, and what was said."""

    def call(text: str) -> tuple[Domain, str]:
        xml = tmp_path / "guest.xml"
        xml.write_text(text)
        code = main(["rewrite", "--root", str(root), str(xml)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return Domain.parse(out.encode()), err

    return call


def test_a_domain_gets_a_uuid_once(
    rewrite: Rewrite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = XML.format(os=CHOSEN, emulator=tmp_path / "none", security="")
    made, said = rewrite(text)
    state = recorded(made)
    assert state is not None
    assert made.uuid is not None
    assert str(state.path).endswith(f"/libvirt/qemu/igvmfw/libvirt-{made.uuid}.raw")
    assert f"keeps its state in {state.path}" in said
    # after the name, where libvirt puts it
    assert [child.tag for child in made.root][:2] == ["name", "uuid"]
    assert rewrite(made.write().decode())[0].write() == made.write()
    assert rewrite(text)[0].uuid != made.uuid
    xml = tmp_path / "made.xml"
    xml.write_bytes(made.write())
    assert main(["restore", str(xml)]) == 0
    restored = capsys.readouterr().out
    assert restored == text.replace("</name>", f"</name>\n  <uuid>{made.uuid}</uuid>")


@pytest.mark.parametrize(
    ("properties", "security", "planes"),
    [
        (("x-svsm-virtio-mmio", "device-plane"), SNP, True),
        (("x-svsm-virtio-mmio", "device-plane"), "", False),
        (("x-svsm-virtio-mmio",), SNP, False),
    ],
)
def test_planes_where_the_emulator_has_them(
    rewrite: Rewrite, tmp_path: Path, properties: tuple[str, ...], security: str, planes: bool
) -> None:
    qemu = emulator(tmp_path, *properties)
    made, _ = rewrite(XML.format(os=CHOSEN, emulator=qemu, security=security))
    more = ",kernel-irqchip=split,device-plane=2" if planes else ""
    assert f"x-svsm-virtio-mmio=on{more}" in made.arguments
    device = "virtio-blk-device,drive=svsm_storage" + (",plane=0" if planes else "")
    assert device in made.arguments
    assert rewrite(made.write().decode())[0].write() == made.write()


def test_a_file_that_the_domain_names_has_its_descriptors_storage(
    rewrite: Rewrite, root: Path
) -> None:
    file = root / "svsm.igvm"
    (root / "link").symlink_to(".")
    named = CHOSEN.replace(" firmware='igvm'", "").replace(
        "</os>", f"<loader type='igvm'>{file}</loader></os>"
    )
    text = XML.format(os=named, emulator="/q", security="")
    for spelled in (root, root / "link", root / "usr/.."):
        other = text.replace(str(file), f"{spelled}/svsm.igvm")
        made, _ = rewrite(other)
        assert recorded(made) is not None
        assert f"igvm-cfg,id=igvm0,file={spelled}/svsm.igvm" in made.arguments
    write_descriptor(root, STORAGE, "/other.igvm")
    assert recorded(rewrite(text)[0]) is None
    write_descriptor(root, STORAGE, "/link/svsm.igvm")
    assert recorded(rewrite(text)[0]) is not None


def test_a_file_with_several_descriptors_has_the_storage_of_one(
    rewrite: Rewrite, root: Path
) -> None:
    """Neither the order of files nor one that contradicts the domain takes a state away."""
    feature = "<firmware><feature enabled='yes' name='vtpm'/></firmware>"
    named = CHOSEN.replace(" firmware='igvm'", "").replace(
        "</os>", f"{feature}<loader type='igvm'>{root}/svsm.igvm</loader></os>"
    )
    own = root / "usr/share/qemu/firmware/50-svsm.json"
    plain = json.loads(own.read_text())
    del plain["mapping"]["x-vtpm-storage"]
    for name, features in (("10-a", []), ("20-b", ["vtpm"])):
        own.with_name(f"{name}.json").write_text(json.dumps(plain | {"features": features}))
    made, said = rewrite(XML.format(os=named, emulator="/q", security=""))
    assert recorded(made) is not None
    assert "cannot be checked" not in said


def test_a_second_tpm_is_named(rewrite: Rewrite) -> None:
    text = XML.format(os=CHOSEN, emulator="/q", security="").replace(
        "</devices>", "<tpm model='tpm-crb'><backend type='emulator'/></tpm></devices>"
    )
    assert "<tpm> beside the firmware's own vTPM" in rewrite(text)[1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"format": "qcow2"}, "'qcow2'"), ({"size-bytes": 100}, "100 bytes")],
)
def test_storage_that_cannot_be_made(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, object],
    said: str,
) -> None:  # fmt: skip
    write_descriptor(root, STORAGE | changed)
    xml = tmp_path / "guest.xml"
    xml.write_text(XML.format(os=CHOSEN, emulator="/q", security=""))
    assert main(["rewrite", "--root", str(root), str(xml)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "x-vtpm-storage" in err


def test_list_shows_it(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xml = tmp_path / "guest.xml"
    xml.write_text(XML.format(os=CHOSEN, emulator="/q", security=""))
    assert main(["list", "--root", str(root), "--for", str(xml)]) == 0
    assert "/svsm.igvm, keeps its vTPM's state: virtio-blk-mmio, 8 MiB" in capsys.readouterr().out
    file = root / "svsm.igvm"
    named = CHOSEN.replace("</os>", f"<loader type='igvm'>{file}</loader></os>")
    xml.write_text(XML.format(os=named, emulator="/q", security=""))
    assert main(["list", "--root", str(root), "--for", str(xml)]) == 0
    assert (
        f"* {file}: named by the domain, keeps its vTPM's state: virtio-blk-mmio, 8 MiB"
        in capsys.readouterr().out
    )
    write_descriptor(root, STORAGE | {"format": "qcow2"})
    assert main(["list", "--root", str(root), "--for", str(xml)]) == 1
    assert "asks for vTPM state in the format 'qcow2'" in capsys.readouterr().err
