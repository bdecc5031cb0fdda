"""define, dumpxml, edit and undefine with real libvirt: the request is what a person sees."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from igvmfw.virt.domain import Domain
from igvmfw.virt.record import Record
from tests.system.guests import Result, domain, igvmfw, wrap


@pytest.fixture
def file(ovmf: Path, tmp_path: Path) -> Path:
    return wrap(ovmf, tmp_path / "ovmf.igvm")


@pytest.fixture
def defined(uri: str, igvm_qemu: Path, file: Path, tmp_path: Path) -> str:
    """The URI, with a domain `guest` defined there."""
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file, kind="qemu"))
    result = igvmfw("define", "-c", uri, "--validate", xml)
    assert result.code == 0, result.err
    return uri


@pytest.mark.parametrize("command", ["start", "dumpxml", "edit", "undefine", "verify"])
def test_a_domain_that_is_not_there(uri: str, command: str) -> None:
    result = igvmfw(command, "-c", uri, "nobody")
    assert (result.code, result.out) == (4, "")
    assert "domain 'nobody': Domain not found" in result.err
    assert "virsh list --all" in result.err


def test_an_emulator_that_is_not_there(uri: str, file: Path, tmp_path: Path) -> None:
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(tmp_path / "nowhere", file, kind="qemu"))
    result = igvmfw("define", "-c", uri, xml)
    assert (result.code, result.out) == (4, "")
    assert f"{tmp_path}/nowhere: No such file" in result.err
    assert "<emulator>" in result.err


def dumped(uri: str, *words: str) -> Domain:
    result = igvmfw("dumpxml", "-c", uri, *words, "guest")
    assert result.code == 0, result.err
    return Domain.parse(result.out.encode())


def edit(uri: str, editor: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setenv("VISUAL", editor)
    return igvmfw("edit", "-c", uri, "guest")


def kept(root: Path) -> bytes:
    return (root / "etc" / "qemu" / "guest.xml").read_bytes()


def test_dumpxml_shows_the_request(defined: str, file: Path, embed_root: Path) -> None:
    shown = dumped(defined)
    request = shown.request()
    assert request is not None
    assert request.path == str(file)
    assert shown.arguments == ()
    assert Record.find(shown) is None
    # what virsh shows is what libvirt was given
    virsh = subprocess.run(
        ["virsh", "-q", "-c", defined, "dumpxml", "guest"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert len(Domain.parse(virsh.stdout).arguments) == 4
    # and defining what was shown leaves the definition as it is
    before = kept(embed_root)
    xml = embed_root / "again.xml"
    xml.write_bytes(shown.write())
    assert igvmfw("define", "-c", defined, xml).code == 0
    assert kept(embed_root) == before


def test_print_xml_defines_nothing(
    uri: str, igvm_qemu: Path, file: Path, tmp_path: Path, embed_root: Path
) -> None:
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file, kind="qemu"))
    for command in ("define", "create"):
        printed = igvmfw(command, "-c", uri, "--print-xml", xml)
        assert printed.code == 0, printed.err
        assert printed.out == igvmfw("rewrite", xml).out
    assert not list((embed_root / "etc" / "qemu").glob("*.xml"))


def test_edit_shows_the_request_and_stores_what_libvirt_takes(
    defined: str, monkeypatch: pytest.MonkeyPatch, embed_root: Path, ovmf: Path, tmp_path: Path
) -> None:
    second = wrap(ovmf, tmp_path / "second.igvm")
    script = f"sed -i -e s,/ovmf.igvm,/{second.name}, -e s,262144,524288,"
    result = edit(defined, script, monkeypatch)
    assert (result.code, result.out) == (0, "Domain 'guest' edited\n"), result.err
    stored = Domain.parse(kept(embed_root))
    assert stored.memory == 512 << 20
    record = Record.find(stored)
    assert record is not None
    assert record.file is not None
    assert record.file.path == str(second)
    assert f"igvm-cfg,id=igvm0,file={second}" in stored.arguments


def test_edit_without_a_change_stores_nothing(
    defined: str, monkeypatch: pytest.MonkeyPatch, embed_root: Path
) -> None:
    before = kept(embed_root)
    result = edit(defined, "touch", monkeypatch)
    assert (result.code, result.out) == (0, "")
    assert "not changed" in result.err
    assert kept(embed_root) == before


@pytest.mark.parametrize(
    ("editor", "code", "words"),
    [
        ("sed -i 's,</domain>,,'", 3, ("not well-formed",)),
        ("sed -i s,/ovmf.igvm,/missing.igvm,", 3, ("missing.igvm", "cannot read")),
        ("sed -i s,pc-q35-[0-9.]*,microvm,", 1, ("microvm",)),
        ("sed -i s,<acpi/>,<acppi/>,", 4, ("domain 'guest'", "schema", "features")),
        ("false", 4, ("exit status 1",)),
        ("/no/such/editor", 4, ("/no/such/editor", "VISUAL")),
        ("sed 'unclosed", 4, ("VISUAL",)),
    ],
)
def test_a_bad_edit_changes_nothing(
    defined: str,
    monkeypatch: pytest.MonkeyPatch,
    embed_root: Path,
    editor: str,
    code: int,
    words: tuple[str, ...],
) -> None:
    before = kept(embed_root)
    result = edit(defined, editor, monkeypatch)
    assert (result.code, result.out) == (code, "")
    assert result.err.splitlines()[-1].startswith("igvmfw: error: ")
    for word in words:
        assert word in result.err
    assert "Traceback" not in result.err
    assert kept(embed_root) == before


def test_the_edited_text_is_private(
    defined: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    editor = tmp_path / "editor"
    editor.write_text(f'#!/bin/sh\nstat -c "%a %n" "$1" > {seen}\n')
    editor.chmod(0o755)
    edit(defined, str(editor), monkeypatch)
    mode, name = seen.read_text().split()
    assert stat.filemode(int(mode, 8)) == "?rw-------"  # passwords may stand in it
    assert not os.path.exists(name)


def test_undefine(defined: str, embed_root: Path) -> None:
    result = igvmfw("undefine", "-c", defined, "guest")
    assert (result.code, result.out) == (0, "Domain 'guest' has been undefined\n")
    assert not (embed_root / "etc" / "qemu" / "guest.xml").exists()
    result = igvmfw("undefine", "-c", defined, "guest")
    assert (result.code, result.out) == (4, "")
    assert "domain 'guest'" in result.err


def test_dumpxml_of_a_running_guest(defined: str) -> None:
    assert igvmfw("start", "-c", defined, "--paused", "guest").code == 0
    for words in ((), ("--inactive",), ("--security-info",), ("--migratable",)):
        assert dumped(defined, *words).request() is not None


def test_a_domain_by_its_uuid(defined: str, embed_root: Path) -> None:
    uuid = Domain.parse(kept(embed_root)).root.findtext("uuid")
    assert uuid is not None
    assert igvmfw("dumpxml", "-c", defined, uuid).code == 0


def test_other_domains_pass_as_they_are(uri: str, igvm_qemu: Path, tmp_path: Path) -> None:
    xml = tmp_path / "guest.xml"
    xml.write_text(
        "<domain type='qemu'><name>guest</name><memory>65536</memory>"
        "<os><type arch='x86_64'>hvm</type></os>"
        f"<devices><emulator>{igvm_qemu}</emulator></devices></domain>"
    )
    assert igvmfw("define", "-c", uri, xml).code == 0
    virsh = subprocess.run(
        ["virsh", "-q", "-c", uri, "dumpxml", "guest"], capture_output=True, check=True, timeout=60
    )
    shown = igvmfw("dumpxml", "-c", uri, "guest")
    assert shown.out.strip() == virsh.stdout.decode().strip()
