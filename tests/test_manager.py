"""Preparing a domain in one call: what was not so good comes along as data, never in print."""

from pathlib import Path

import pytest

import igvmfw
from igvmfw.cli import main
from tests.igvm import samples
from tests.virt import domains

PLAIN = domains.REQUEST.replace("      <feature enabled='yes' name='vtpm'/>\n", "")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with a directory of descriptors that cannot be read."""
    odd = tmp_path / "root/etc/qemu/firmware"
    odd.parent.mkdir(parents=True)
    odd.write_text("not a directory")
    return tmp_path / "root"


def test_warnings_are_data(root: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plain.igvm"
    file.write_bytes(samples.small(igvmfw.Platform.NATIVE))
    asks = igvmfw.convert(igvmfw.Domain.parse(PLAIN.encode()), str(file))
    prepared = igvmfw.prepare(asks, root=root, user=False)
    assert any("etc/qemu/firmware" in warning for warning in prepared.warnings)
    kept = igvmfw.recorded(prepared.domain)
    assert kept is not None
    assert kept.path == str(file)
    assert capfd.readouterr() == ("", "")


def test_warnings_of_a_failure_are_its_notes(root: Path) -> None:
    domain = igvmfw.Domain.parse(PLAIN.encode())
    with pytest.raises(igvmfw.NoFirmwareError) as raised:
        igvmfw.prepare(domain, root=root, user=False)
    (note,) = raised.value.__notes__
    assert "etc/qemu/firmware" in note


def test_a_command_prints_them_before_the_error(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    xml = tmp_path / "guest.xml"
    xml.write_text(PLAIN)
    assert main(["rewrite", "--root", str(root), str(xml)]) == 1
    out, err = capfd.readouterr()
    warning, error = err.splitlines()
    assert out == ""
    assert warning.startswith("igvmfw: warning: ")
    assert "etc/qemu/firmware" in warning
    assert error.startswith("igvmfw: error: ")


def test_a_domain_that_asks_for_nothing_stays_and_nothing_is_looked_at(root: Path) -> None:
    domain = igvmfw.Domain.parse(b"<domain type='kvm'><os><type>hvm</type></os></domain>")
    prepared = igvmfw.prepare(domain, root=root)
    assert prepared.domain is domain
    assert prepared.warnings == ()
