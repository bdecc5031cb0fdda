"""describe on files with an SVSM: the vTPM, and the storage that a persistent one expects."""

import json
import lzma
from pathlib import Path

import pytest

from igvmfw.cli import main
from igvmfw.igvm.builder import ImageBuilder
from igvmfw.platforms import Platform
from igvmfw.qemu.schema import QEMU_VERSIONS, Profile, check_schema
from tests.igvm import samples

REAL = Path(__file__).parents[1] / "data/coconut/coconut-qemu-vtpm-snp-ovmf.igvm.xz"
STORAGE = {"interface": "virtio-blk-mmio", "format": "raw", "size-bytes": 8 << 20}


def real(path: Path) -> Path:
    path.write_bytes(lzma.decompress(REAL.read_bytes()))
    return path


def persistent(path: Path) -> Path:
    """An SVSM as far as its text tells: built with its vTPM, and to keep its state."""
    marks = b"svsm::protocols::vtpm\0TPM_Manufacture\0CocoonFs\0CCFSMKFS\0kernel/src/persistence.rs"
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.SEV_SNP, 1))
    version = b"! COCONUT-SVSM Version: 2026.07-devel-113-gf4bc4bcd+\0"
    builder.add_page(0x800_0000, 1, version + marks)
    path.write_bytes(builder.build())
    return path


def described(
    capsys: pytest.CaptureFixture[str], *words: str | Path
) -> tuple[dict[str, object], list[str], str]:
    """The mapping, the features, and the explanation."""
    assert main(["describe", "--explain", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    return document["mapping"], document["features"], err


def test_a_vtpm_that_is_made_anew_needs_no_storage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping, features, explained = described(capsys, real(tmp_path / "f.igvm"))
    assert features == ["amd-sev-snp", "vtpm"]
    assert set(mapping) == {"device", "filename"}
    assert "COCONUT-SVSM in the file was built with its vTPM" in explained


def test_a_vtpm_that_keeps_its_state_names_its_storage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = persistent(tmp_path / "f.igvm")
    words = (file, "--interface", "uefi")
    mapping, features, explained = described(capsys, *words)
    assert features == ["amd-sev-snp", "vtpm"]
    assert mapping["x-vtpm-storage"] == STORAGE
    assert "keeps its state on a disk of its own" in explained
    descriptor = tmp_path / "descriptor.json"
    assert main(["describe", *map(str, words), "-o", str(descriptor)]) == 0
    assert main(["validate", str(descriptor)]) == 0
    # QEMU's own firmware.json has words for neither
    capsys.readouterr()
    mapping, features, explained = described(capsys, *words, "--profile", "upstream")
    assert (set(mapping), features) == ({"device", "filename"}, ["amd-sev-snp"])
    assert explained.count("left out") == 2


def test_the_protocol_of_an_svsm_is_an_interface(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(real(tmp_path / "f.igvm"))
    assert main(["describe", "--explain", file]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["interface-types"] == ["uefi", "svsm"]
    assert "COCONUT-SVSM in the file speaks the SVSM protocol with SEV-SNP guests" in err
    assert main(["describe", "--explain", "--profile", "upstream", file]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["interface-types"] == ["uefi"]
    assert "since QEMU 11.0 only" in err
    for version in QEMU_VERSIONS:
        assert check_schema(json.loads(out), Profile.UPSTREAM, version) == ()
