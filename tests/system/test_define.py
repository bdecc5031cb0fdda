"""define, dumpxml, edit and undefine with real libvirt: the request is what a person sees."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from igvmfw.launch import recorded
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import OnChange, Record
from tests.cli.terminal import terminal
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


def test_edit_with_an_option_and_no_other_change(
    defined: str, monkeypatch: pytest.MonkeyPatch, embed_root: Path
) -> None:
    monkeypatch.setenv("EDITOR", "touch")
    for option in ("--on-change=warn", "--no-lock-memory"):
        result = igvmfw("edit", "-c", defined, option, "guest")
        assert (result.code, result.out) == (0, "Domain 'guest' edited\n"), result.err
    file = recorded(Domain.parse(kept(embed_root)))
    assert file is not None
    assert (file.on_change, file.lock_memory) == (OnChange.WARN, False)


@pytest.mark.parametrize(
    ("editor", "code", "words"),
    [
        ("sed -i 's,</domain>,,'", 3, ("not well-formed",)),
        ("sed -i s,/ovmf.igvm,/missing.igvm,", 3, ("missing.igvm", "cannot read")),
        ("sed -i s,pc-q35-[0-9.]*,microvm,", 1, ("microvm",)),
        ("sed -i s,<acpi/>,<acppi/>,", 4, ("domain 'guest'", "schema", "features")),
        ("false", 4, ("exit status 1",)),
        ("rm", 3, ("domain 'guest': the editor left no text", "No such file")),
        ("truncate -s 0", 3, ("domain 'guest': line 1", "empty")),
        ("truncate -s 5M", 3, ("domain 'guest': the editor left no text", "larger than")),
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
    # some leave a copy
    editor.write_text(
        f'#!/bin/sh\ncp "$1" "$1~"; stat -c "%a %n" "$1" "$(dirname "$1")" > {seen}\n'
    )
    editor.chmod(0o755)
    edit(defined, str(editor), monkeypatch)
    mode, name, mode_around, around = seen.read_text().split()
    assert stat.filemode(int(mode, 8)) == "?rw-------"  # passwords may stand in it
    assert stat.filemode(int(mode_around, 8)) == "?rwx------"
    assert os.path.dirname(name) == around
    assert not os.path.exists(around)


def test_what_is_wrong_can_be_edited_again(
    defined: str, file: Path, embed_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "root/etc/qemu").mkdir(parents=True)
    (tmp_path / "root/etc/qemu/firmware").write_text("no directory")
    editor = tmp_path / "editor"
    editor.write_text(
        f"#!/bin/sh\nif grep -q missing.igvm $1; then sed -i s,/missing.igvm,/{file.name}, $1\n"
        f"else sed -i -e s,/{file.name},/missing.igvm, -e s,262144,524288, $1; fi\n"
    )
    editor.chmod(0o755)
    words: list[str | Path] = ["edit", "-c", defined, "--root", tmp_path / "root", "guest"]
    before = kept(embed_root)
    for answer, code in ((b"n\n", 3), (b"\x04", 3), (b"\n", 0)):
        with terminal(columns=300) as shown:
            shown.start(*words, environment={"VISUAL": str(editor)})
            seen = shown.wait_for(lambda text: "Edit again?" in text)
            # with what was said of the host before it failed
            assert "warning: " in seen
            assert "etc/qemu/firmware" in seen
            assert "missing.igvm: cannot read" in seen
            shown.type(answer)
            assert shown.wait() == code, shown.text
        if code:
            assert kept(embed_root) == before
    assert Domain.parse(kept(embed_root)).memory == 512 << 20


def test_an_interrupt_is_the_editors(defined: str, embed_root: Path, tmp_path: Path) -> None:
    """As emacs has it, where ^G is one: the terminal sends it to igvmfw as well."""
    editor = tmp_path / "editor"
    editor.write_text(
        "#!/bin/sh\ntrap 'sed -i s,262144,524288, $1' INT\nkill -INT 0\nkill -QUIT $PPID\n"
    )
    editor.chmod(0o755)
    with terminal(columns=300) as shown:
        shown.start("edit", "-c", defined, "guest", environment={"VISUAL": str(editor)})
        assert shown.wait() == 0, shown.text
    assert Domain.parse(kept(embed_root)).memory == 512 << 20


def test_what_was_chosen_by_an_option_outlives_a_new_definition(
    defined: str, monkeypatch: pytest.MonkeyPatch, embed_root: Path, tmp_path: Path
) -> None:
    """The request does not show it."""
    xml = tmp_path / "shown.xml"
    xml.write_text(igvmfw("dumpxml", "-c", defined, "guest").out)
    for words, expected in (
        (("--on-change", "warn"), (OnChange.WARN, True)),
        ((), (OnChange.WARN, True)),
        (("--on-change", "refuse", "--no-lock-memory"), (OnChange.REFUSE, False)),
        ((), (OnChange.REFUSE, False)),
        (("--lock-memory",), (OnChange.REFUSE, True)),
    ):
        assert igvmfw("define", "-c", defined, *words, xml).code == 0
        file = recorded(Domain.parse(kept(embed_root)))
        assert file is not None
        assert (file.on_change, file.lock_memory) == expected


def test_undefine(defined: str, embed_root: Path) -> None:
    result = igvmfw("undefine", "-c", defined, "guest")
    assert (result.code, result.out) == (0, "Domain 'guest' has been undefined\n")
    assert not (embed_root / "etc" / "qemu" / "guest.xml").exists()
    result = igvmfw("undefine", "-c", defined, "guest")
    assert (result.code, result.out) == (4, "")
    assert "domain 'guest'" in result.err


def test_undefine_says_what_libvirt_wants_to_hear(
    defined: str, igvm_qemu: Path, tmp_path: Path
) -> None:
    (tmp_path / "vars.fd").touch()
    xml = tmp_path / "efi.xml"
    xml.write_text(
        "<domain type='qemu'><name>efi</name><memory>65536</memory>"
        "<os><type arch='x86_64' machine='q35'>hvm</type>"
        "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
        f"<nvram>{tmp_path}/vars.fd</nvram></os><features><acpi/></features>"
        f"<devices><emulator>{igvm_qemu}</emulator></devices></domain>"
    )
    assert igvmfw("define", "-c", defined, xml).code == 0
    refused = igvmfw("undefine", "-c", defined, "efi")
    assert refused.code == 4
    assert "--nvram removes the file of UEFI variables, --keep-nvram keeps it" in refused.err
    assert igvmfw("undefine", "-c", defined, "--keep-nvram", "efi").code == 0
    assert igvmfw("start", "-c", defined, "--paused", "guest").code == 0
    save = ["virsh", "-q", "-c", defined, "managedsave", "guest"]
    subprocess.run(save, check=True, capture_output=True, timeout=60)
    refused = igvmfw("undefine", "-c", defined, "guest")
    assert refused.code == 4
    assert "--managed-save removes the saved state" in refused.err
    assert igvmfw("undefine", "-c", defined, "--managed-save", "guest").code == 0


def test_dumpxml_of_a_running_guest(defined: str) -> None:
    assert igvmfw("start", "-c", defined, "--paused", "guest").code == 0
    for words in ((), ("--inactive",), ("--security-info",), ("--migratable",)):
        assert dumped(defined, *words).request() is not None


def test_a_domain_by_its_uuid_or_id(defined: str, embed_root: Path, tmp_path: Path) -> None:
    uuid = Domain.parse(kept(embed_root)).root.findtext("uuid")
    assert uuid is not None
    assert igvmfw("dumpxml", "-c", defined, uuid).code == 0
    assert igvmfw("dumpxml", "-c", defined, "1").code == 4
    assert igvmfw("start", "-c", defined, "--paused", uuid).code == 0
    by_id = igvmfw("dumpxml", "-c", defined, "1")
    assert (by_id.code, by_id.out) == (0, igvmfw("dumpxml", "-c", defined, "guest").out)
    # what is to be started has none, so that this is a name
    xml = tmp_path / "guest.xml"
    xml.write_text(xml.read_text().replace(">guest<", ">1<"))
    assert igvmfw("define", "-c", defined, xml).code == 0
    assert igvmfw("start", "-c", defined, "--paused", "1").out == "Domain '1' started\n"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("machine='q35'", "machine='microvm'", "line 5: the machine type 'microvm'"),
        ("arch='x86_64' machine='q35'", "arch='aarch64' machine='virt'", "architecture aarch64"),
        ("type='qemu'", "type='xen'", "a domain of type 'xen' cannot take an IGVM file"),
    ],
)
def test_what_libvirt_cannot_run_either_is_said_in_our_words(
    uri: str, igvm_qemu: Path, file: Path, tmp_path: Path, old: str, new: str, words: str
) -> None:
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file, kind="qemu").replace(old, new))
    refused = igvmfw("define", "-c", uri, xml)
    assert (refused.code, refused.out) == (1, "")
    assert f"{xml}: " in refused.err
    assert words in refused.err


@pytest.mark.parametrize("command", ["define", "create"])
def test_a_file_that_sets_more_vcpus_than_the_guest_has(
    uri: str, igvm_qemu: Path, ovmf: Path, tmp_path: Path, embed_root: Path, command: str
) -> None:
    file = wrap(ovmf, tmp_path / "es.igvm", "--platform", "sev-es", "--vcpus", "4")
    xml = tmp_path / "guest.xml"
    security = "<launchSecurity type='sev'><policy>0x7</policy></launchSecurity>"
    xml.write_text(domain(igvm_qemu, file, vcpus=2, security=security))
    refused = igvmfw(command, "-c", uri, xml)
    assert (refused.code, refused.out) == (1, "")
    said = refused.err.splitlines()[-1]
    assert f"{file}: the file sets vCPU 3, the guest has only 2 (give the guest at least 4" in said
    assert not list((embed_root / "etc/qemu").glob("*.xml"))


@pytest.mark.parametrize(
    ("name", "spelled"), [("a b", "a%20b"), ("a+b", "a+b"), ("a;b&c", "a%3Bb%26c")]
)
def test_an_embedded_driver_in_a_directory_of_any_name(
    embed_root: Path, igvm_qemu: Path, file: Path, tmp_path: Path, name: str, spelled: str
) -> None:
    root, uri = embed_root / name, f"qemu:///embed?root={embed_root}/{spelled}"
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file, kind="qemu"))
    result = igvmfw("define", "-c", uri, xml)
    assert result.code == 0, result.err
    assert "libvirt" not in result.err
    assert kept(root)
    assert "libvirt version" in (root / "log/libvirt.log").read_text()
    assert sorted(path.name for path in embed_root.iterdir()) == sorted(["etc", name])


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
