"""A plain guest from an IGVM file, through real libvirt and real QEMU, without any daemon."""

import json
import subprocess
from pathlib import Path

import pytest

from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import Madt, ParameterArea
from igvmfw.platforms import Platform
from igvmfw.virt.domain import Domain
from tests.igvm import samples
from tests.parts import need
from tests.system.guests import domain, igvmfw, wait_for, wrap

DISTRIBUTION_QEMU = Path("/usr/bin/qemu-system-x86_64")
BOOT = 180  # seconds; with TCG it takes some twenty


def processes(file: Path) -> list[list[bytes]]:
    """The command lines of all processes that name a file."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(str(file).replace(",", ",,").encode() in word for word in words):
            found.append(words)
    return found


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_a_guest_boots_to_its_boot_manager(
    uri: str, igvm_qemu: Path, ovmf: Path, tmp_path: Path, machine: str
) -> None:
    # every character that could mean something to XML, QEMU or a shell
    folder = tmp_path / "a, b=c,,id=x"
    folder.mkdir()
    file = wrap(ovmf, folder / 'it\'s "ü" <&>;$(x).igvm')
    serial = tmp_path / "serial"
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file, kind="qemu", machine=machine, serial=serial))

    defined = igvmfw("define", "-c", uri, "--validate", xml)
    assert (defined.code, defined.out) == (0, "Domain 'guest' defined\n"), defined.err
    assert str(file) in defined.err
    started = igvmfw("start", "-c", uri, "--json", "guest")
    assert started.code == 0, started.err
    assert json.loads(started.out)["igvm"]["path"] == str(file)

    (words,) = processes(file)
    option = words[words.index(b"igvm-cfg=igvm0") - 2]
    assert option.decode() == "igvm-cfg,id=igvm0,file=" + str(file).replace(",", ",,")
    wait_for(serial, b"BdsDxe: ", seconds=BOOT)

    # the guest outlived the command that started it, and the next one finds it
    again = igvmfw("start", "-c", uri, "guest")
    assert again.code == 4
    assert "already running" in again.err


def test_what_libvirt_keeps_comes_back_as_the_request(
    uri: str, embed_root: Path, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    file = wrap(ovmf, tmp_path / "ovmf.igvm")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file, kind="qemu"))
    assert igvmfw("define", "-c", uri, xml).code == 0
    kept = embed_root / "etc" / "qemu" / "guest.xml"
    rewritten = igvmfw("rewrite", kept)
    assert (rewritten.code, rewritten.out) == (0, kept.read_text())  # nothing left to do
    restored = Domain.parse(igvmfw("restore", kept).out.encode())
    request = restored.request()
    assert request is not None
    assert request.path == str(file)
    assert restored.arguments == ()
    # and once more, as an edited domain would be
    xml.write_bytes(restored.write())
    assert igvmfw("define", "-c", uri, xml).code == 0
    assert igvmfw("rewrite", kept).out == kept.read_text()


def test_a_file_that_changed_since_is_not_started(
    uri: str, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    file = wrap(ovmf, tmp_path / "ovmf.igvm")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file, kind="qemu"))
    assert igvmfw("define", "-c", uri, xml).code == 0
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    started = igvmfw("start", "-c", uri, "guest")
    assert started.code == 1
    assert f"{file}: the file changed since guest was defined" in started.err
    file.unlink()
    started = igvmfw("start", "-c", uri, "guest")
    assert started.code == 3
    assert "cannot read" in started.err
    assert processes(file) == []


def test_an_emulator_without_igvm_is_named_before_the_start(
    uri: str, ovmf: Path, tmp_path: Path
) -> None:
    need(DISTRIBUTION_QEMU.exists(), f"the distribution's QEMU ({DISTRIBUTION_QEMU})")
    helped = subprocess.run(
        [DISTRIBUTION_QEMU, "-object", "igvm-cfg,help"],
        capture_output=True,
        check=False,
        timeout=60,
    )
    if helped.returncode == 0:
        pytest.skip("the distribution's QEMU has IGVM")
    file = wrap(ovmf, tmp_path / "ovmf.igvm")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(DISTRIBUTION_QEMU, file, kind="qemu"))
    created = igvmfw("create", "-c", uri, xml)
    assert (created.code, created.out) == (4, "")
    for word in (str(DISTRIBUTION_QEMU), "10.1", "<emulator>"):
        assert word in created.err
    defined = igvmfw("define", "-c", uri, xml)
    assert defined.code == 0
    assert "warning: the domain will not start" in defined.err


def test_a_failing_launch_gives_qemus_words_in_one_line(
    uri: str, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    file = wrap(ovmf, tmp_path / "ovmf.igvm")
    xml = tmp_path / "guest.xml"
    text = domain(igvm_qemu, file, kind="qemu")
    clash = (
        "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
        "<qemu:arg value='-no-such-option'/></qemu:commandline></domain>"
    )
    xml.write_text(text.replace("</domain>", clash))
    created = igvmfw("create", "-c", uri, xml)
    assert created.code == 4
    assert "no-such-option" in created.err
    assert created.err.splitlines()[-1].startswith("igvmfw: error: ")


def test_a_configuration_of_the_users_is_left_alone(embed_root: Path, tmp_path: Path) -> None:
    configuration = embed_root / "etc" / "qemu.conf"
    before = configuration.read_text()
    xml = tmp_path / "guest.xml"
    xml.write_text("<domain/>")
    igvmfw("define", "-c", f"qemu:///embed?root={embed_root}", xml)
    assert configuration.read_text() == before
    assert (embed_root / "log" / "libvirt.log").exists()


def test_a_new_root_gets_what_it_needs(
    embed_root: Path, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    new = embed_root / "n"  # below the fixture's root, which is removed
    file = wrap(ovmf, tmp_path / "ovmf.igvm")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file, kind="qemu"))
    defined = igvmfw("define", "-c", f"qemu:///embed?root={new}", xml)
    assert defined.code == 0, defined.err
    assert 'stdio_handler = "file"' in (new / "etc" / "qemu.conf").read_text()
    assert (new / "etc" / "qemu" / "guest.xml").exists()


def test_a_file_that_this_qemu_refuses_is_named_before_the_start(
    uri: str, embed_root: Path, igvm_qemu: Path, tmp_path: Path
) -> None:
    """By the rules of the release that the domain names, which `check` goes by, and the hook."""
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.NATIVE, 1))
    builder.add_page(0x1000, 1, samples.PAGE)
    builder.add(ParameterArea(4096, 0))
    builder.add(Madt(0, 0))  # since QEMU 11.0
    file = tmp_path / "madt.igvm"
    file.write_bytes(builder.build())
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file, kind="qemu"))
    checked = igvmfw("check", "--platform", "native", "--emulator", igvm_qemu, file)
    if checked.code == 0:
        pytest.skip("this QEMU takes the header")
    reason = f"{file}: header 3, offset 0x"
    defined = igvmfw("define", "-c", uri, xml)
    assert defined.code == 0, defined.err
    assert f"igvmfw: warning: the domain will not start: {reason}" in defined.err
    for command, word in (("start", "guest"), ("create", xml)):
        refused = igvmfw(command, "-c", uri, word)
        assert (refused.code, refused.out) == (1, "")
        assert f"igvmfw: error: {reason}" in refused.err
        assert "QEMU 10.2 would not launch this native guest: " in refused.err
    assert not (embed_root / "log/qemu/guest.log").exists()  # QEMU was never begun
