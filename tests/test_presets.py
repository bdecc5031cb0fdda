import json
from collections.abc import Callable
from pathlib import Path

import pytest

from igvmfw.cli import main
from igvmfw.description import describe_file
from igvmfw.errors import UsageError
from igvmfw.igvm.wrap import wrap
from igvmfw.platforms import Platform
from igvmfw.presets import find, load, stated
from igvmfw.qemu.schema import Profile, check_schema
from igvmfw.resources import load_template, template_names
from tests.igvm import samples

Put = Callable[..., Path]
DOMAIN = """<domain type='kvm'><name>g</name><memory unit='GiB'>2</memory>
<os firmware='igvm'><type arch='x86_64' machine='q35'>hvm</type></os>
<launchSecurity type='sev-snp'><policy>0x30000</policy></launchSecurity></domain>"""


@pytest.fixture
def put(tmp_path: Path, ovmf: Path) -> Put:
    """A file where a preset's distribution ships it."""

    def write(name: str, *platforms: Platform) -> Path:
        path = tmp_path / "root" / load(name).mapping.filename.lstrip("/")
        path.parent.mkdir(parents=True)
        path.write_bytes(wrap(ovmf.read_bytes(), platforms))
        return path

    return write


@pytest.mark.parametrize("name", template_names())
def test_every_preset_is_valid(name: str) -> None:
    template = load_template(name)
    assert b"@DATADIR@/" in template
    filled = load(name)
    assert filled.mapping.filename.startswith("/usr/share/")
    assert load(name, '/opt/a"b/').mapping.filename.startswith('/opt/a"b/')
    profile = Profile.IGVMFW if "vtpm" in filled.features else Profile.UPSTREAM
    for document in (filled.to_dict(), json.loads(template)):
        assert check_schema(document, profile) == ()
    assert find(filled.mapping.filename) == filled


def test_unknown_presets() -> None:
    assert find("/usr/share/other.igvm") is None
    with pytest.raises(UsageError, match="unknown preset 'x'"):
        load("x")


@pytest.mark.parametrize("name", template_names())
def test_list_and_rewrite_take_it(
    name: str, put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = put(name, Platform.SEV_SNP)
    root = tmp_path / "root"
    directory = root / "usr/share/qemu/firmware"
    directory.mkdir(parents=True)
    (directory / f"70-{name}.json").write_bytes(load(name).write())
    assert main(["list", "--root", str(root), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["firmware"]
    assert [(row["name"], row["file_state"]) for row in shown] == [(f"70-{name}.json", "present")]
    domain = tmp_path / "domain.xml"
    domain.write_text(DOMAIN)
    assert main(["rewrite", "--root", str(root), str(domain)]) == 0
    assert str(file) in capsys.readouterr().out


def test_a_preset_adds_what_the_file_cannot_tell(put: Put, tmp_path: Path) -> None:
    file = put("edk2-ovmf", Platform.NATIVE, Platform.SEV)
    description = describe_file(str(file), root=tmp_path / "root")
    # the platforms are the file's, not the preset's
    assert description.descriptor.features == ("amd-sev", "verbose-dynamic")
    reasons = {reason.item: reason.text for reason in description.reasons}
    assert "preset" in reasons["verbose-dynamic"]
    assert "OVMF" in reasons["uefi"]


def test_a_preset_gives_way_to_what_is_stated(put: Put, tmp_path: Path) -> None:
    file = put("coconut-svsm", Platform.SEV_SNP)
    root = tmp_path / "root"
    assert describe_file(str(file), root=root).descriptor.targets[0].machines == ("pc-q35-*",)
    mine = describe_file(str(file), root=root, stated=stated(load("edk2-ovmf")))
    assert mine.descriptor.targets[0].machines == ("pc-q35-*", "pc-i440fx-*")
    assert "vtpm" not in mine.descriptor.features


def test_a_preset_tells_the_interface_of_a_file_that_does_not(tmp_path: Path) -> None:
    path = tmp_path / "usr/share/coconut-svsm/coconut-qemu.igvm"
    path.parent.mkdir(parents=True)
    path.write_bytes(samples.small(Platform.SEV_SNP))
    descriptor = describe_file(str(path), root=tmp_path).descriptor
    assert descriptor.interface_types == ("uefi",)
