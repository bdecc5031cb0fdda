"""check as it is typed."""

import json
from pathlib import Path

import jsonschema
import pytest

from igvmfw.check import MAX_CONTEXTS, check_image, refuses
from igvmfw.cli import main
from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import Madt, ParameterArea
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.spec import SEV_VMSA_GPA
from igvmfw.platforms import Platform
from igvmfw.qemu.acceptance import RELEASES
from tests.igvm import samples

SCHEMA = Path(__file__).parents[2] / "schemas" / "check.json"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.NATIVE, 1))
    builder.add_page(0x1000, 1, samples.PAGE)
    builder.add(ParameterArea(4096, 0))
    builder.add(Madt(0, 0))
    path = tmp_path / "madt.igvm"
    path.write_bytes(builder.build())
    return path


@pytest.mark.parametrize(("qemu", "code"), [("10.1", 1), ("10.2.2", 1), ("11.0", 0), ("12.1", 0)])
def test_the_release_decides(
    file: Path, qemu: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--qemu", qemu, str(file)]) == code
    out = capsys.readouterr().out
    assert ("header-unknown" in out) == bool(code)
    assert ("offset 0x" in out) == bool(code)


def test_without_an_emulator_the_newest_release_judges_and_it_is_said(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("IGVMFW_QEMU", raising=False)
    monkeypatch.setattr("igvmfw.qemu.emulator.find", lambda: (Path("/bin/true"),))
    assert main(["check", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("native: would be launched as it is by some release of QEMU\n")
    assert "no QEMU of this host takes IGVM files" in err
    assert "igvmfw doctor" in err


def test_the_environment_names_an_emulator(
    file: Path, igvm_qemu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As doctor has it, which says so where none is installed."""
    monkeypatch.setenv("IGVMFW_QEMU", str(igvm_qemu))
    code = main(["check", str(file)])
    out, err = capsys.readouterr()
    assert "by QEMU 1" in out
    assert (code, err) == (int("10.2" in out), "")
    monkeypatch.setenv("IGVMFW_QEMU", "/does/not/exist")
    assert main(["check", str(file)]) == 4
    assert "/does/not/exist: cannot run" in capsys.readouterr().err


def test_what_is_alike_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.SEV, 1))
    for number in range(100):
        builder.add_page(0x1000 * (1 + number), 1, samples.PAGE, flags=2)  # unmeasured
    path = tmp_path / "many.igvm"
    path.write_bytes(builder.build())
    words = ["check", "--qemu", "10.2", str(path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("warning [unmeasured-plain]") == 5
    assert "and 95 more [unmeasured-plain], the last at header 100, offset 0x" in out
    assert main([*words, "--json"]) == 0
    (platform,) = json.loads(capsys.readouterr().out)["platforms"]
    assert len(platform["findings"]) == 100


def test_json_is_what_the_schema_says(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--json", "--qemu", "10.2", "--platform", "native", "--platform", "tdx"]
    assert main([*words, str(file)]) == 1
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, json.loads(SCHEMA.read_bytes()))
    assert [item["platform"] for item in document["platforms"]] == ["native", "tdx"]
    assert document["platforms"][0]["findings"][0]["remedy"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--qemu", "9.2"], 2),
        (["--qemu", "new"], 2),
        (["--qemu", "10.2", "--emulator", "/bin/true"], 2),
        (["--emulator", "/bin/true"], 4),
        (["--emulator", "/does/not/exist"], 4),
        (["--vcpus", "none"], 2),
    ],
)
def test_what_a_tired_person_gets_wrong(
    file: Path, words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *words, str(file)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("igvmfw: error: ")
    assert err.count("\n") == 1


def test_a_damaged_file_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "damaged.igvm"
    path.write_bytes(samples.small()[:200])
    assert main(["check", "--qemu", "10.2", str(path)]) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_an_emulator_is_asked(
    file: Path, igvm_qemu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["check", "--emulator", str(igvm_qemu), str(file)])
    out = capsys.readouterr().out
    assert "QEMU 1" in out
    assert code == int("10.2" in out)


def test_more_contexts_than_any_guest_has_vcpus_are_not_all_judged() -> None:
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.SEV_ES, 1))
    for _ in range(MAX_CONTEXTS + 1000):
        builder.add_vp_context(1, 0, bytes(4096), gpa=SEV_VMSA_GPA)
    findings = check_image(IgvmFile.parse(builder.build()), Platform.SEV_ES, RELEASES[1])
    judged = [finding for finding in findings if finding.rule == "vmsa-measured"]
    assert len(judged) == MAX_CONTEXTS
    assert [finding.header_index for finding in findings if finding.rule == "context-index"] == [
        MAX_CONTEXTS + 1
    ]
    assert refuses(findings)
