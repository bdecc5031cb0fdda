"""doctor as it is typed, on this machine and on trees."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from igvmfw.cli import main
from igvmfw.doctor import gather
from igvmfw.resources import load_schema
from tests.doctor import hosts
from tests.parts import need, need_libvirt

CHECKOUT = Path(__file__).parents[2]


def checked(out: str) -> Any:
    document = json.loads(out)
    jsonschema.validate(document, load_schema("doctor"))
    return document


def lines_of(document: Any) -> dict[str, Any]:
    return {line["name"]: line for line in document["lines"]}


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    document = checked(capsys.readouterr().out)
    assert document["fit"] is (code == 0)
    assert document["fit"] is not any(line["fails"] for line in document["lines"])
    lines = lines_of(document)
    assert os.uname().release in lines["kernel"]["found"]
    flags = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].split()
    parameter = Path("/sys/module/kvm_amd/parameters/sev")
    has = "sev" in flags or (parameter.exists() and parameter.read_text().strip() in ("Y", "1"))
    assert (lines["processor-sev"]["status"] == "ok") is has
    assert (lines["dev-sev"]["status"] == "missing") is not Path("/dev/sev").exists()
    for line in document["lines"]:
        if line["status"] in ("missing", "wrong") and line["topic"] != "emulator":
            assert line["remedy"], line


def test_what_decides_is_what_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A host without SEV is no worse for plain guests; only what they need counts."""
    root = hosts.host(tmp_path, flags=[], cpuid=(0, 0, 0, 0), parameters={}, devices=["kvm"])
    main(["doctor", "--json", "--root", str(root)])
    document = checked(capsys.readouterr().out)
    assert document["platforms"] == ["native"]
    failing = {line["name"] for line in document["lines"] if line["fails"]}
    assert failing == {"connection", "igvm"}  # the tree has neither libvirt nor QEMU
    assert main(["doctor", "--json", "--root", str(root), "--platform", "sev-es"]) == 1
    document = checked(capsys.readouterr().out)
    failing = {line["name"] for line in document["lines"] if line["fails"]}
    assert failing >= {"processor-sev-es", "kvm-sev-es", "dev-sev"}
    assert "processor-sev" not in lines_of(document)
    assert all("sev-es" in line["platforms"] for line in document["lines"])


def test_text_is_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = hosts.host(tmp_path, model="\x1b]0;title\x07", kernel="6.1\x1b[2J")
    hosts.write(root / "etc/qemu/firmware/51-a\nok       firmware forged.json", "{")
    main(["doctor", "--root", str(root)])
    *lines, last = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("ok       firmware forged")]
    assert r"51-a\nok       firmware forged.json" in "".join(lines)
    assert "\x1b" not in "".join(lines)
    assert all(line.split()[0] in ("ok", "missing", "wrong", "unknown") for line in lines)
    assert last.startswith("native guests cannot be launched from IGVM files here (")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-c", "qemu+ssh://host.example/system"], "run 'igvmfw doctor' there"),
        (["--platform", "tdx"], "'tdx' is not one of native, sev, sev-es, sev-snp"),
        (["-c", "qemu:///embed"], None),
        (["-c", "nonsense://["], None),
    ],
)
def test_uris_that_do_not_do(
    words: list[str], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["doctor", "--json", *words])
    out, err = capsys.readouterr()
    if said is not None:
        assert (code, out) == (2, "")
        assert said in err
        return
    need_libvirt()
    assert lines_of(checked(out))["connection"]["status"] in ("missing", "wrong")


def test_a_libvirt_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need_libvirt()
    monkeypatch.setattr(gather, "_PATIENCE", 1.0)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
        dead.listen()
        uri = f"qemu+unix:///system?socket={tmp_path}/s"
        assert main(["doctor", "--json", "-c", uri]) == 1
    line = lines_of(checked(capsys.readouterr().out))["connection"]
    assert line["found"] == f"{uri}: no answer within 1 seconds"
    assert line["fails"]


def test_emulators(
    tmp_path: Path,
    igvm_qemu: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One with IGVM, one that is no QEMU, one that never ends, one that anybody can write to."""
    bad = {"a": "echo hello", "b": "exec sleep 60", "c": "exec yes"}
    for name, text in bad.items():
        path = tmp_path / name / "qemu-system-x86_64"
        hosts.write(path, f"#!/bin/sh\n{text}\n")
        path.chmod(0o757 if name == "c" else 0o755)
    monkeypatch.setattr(gather, "_ANSWER", 1.0)
    monkeypatch.setenv("IGVMFW_QEMU", str(igvm_qemu))
    monkeypatch.setenv("PATH", ":".join([*(str(tmp_path / name) for name in bad), os.defpath]))
    main(["doctor", "--json"])
    lines = lines_of(checked(capsys.readouterr().out))
    assert lines["igvm"]["found"].startswith(f"{igvm_qemu} takes IGVM files")
    own = lines[str(igvm_qemu)]
    assert own["status"] == "ok"
    assert own["found"].endswith("(IGVMFW_QEMU)")
    found = [lines[str(tmp_path / name / "qemu-system-x86_64")] for name in bad]
    assert [line["status"] for line in found] == ["wrong", "wrong", "unknown"]
    assert "does not answer as QEMU does" in found[0]["found"]
    assert "did not answer within 1 seconds" in found[1]["found"]
    assert "others than its owner can write to it" in found[2]["found"]


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and what doctor loads, where everybody can read it."""
    need(os.geteuid() == 0, "root, to be somebody else")
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(CHECKOUT / "igvmfw", site / "igvmfw")
    import lxml

    shutil.copytree(Path(str(lxml.__file__)).parent, site / "lxml")
    libvirt = Path(str(need_libvirt().__file__))
    for path in (*libvirt.parent.glob("libvirtmod*.so"), libvirt):
        shutil.copy(path, site)
    for path in (site, *site.parents[:2]):
        path.chmod(path.stat().st_mode | 0o055)
    return site


def test_somebody_who_is_not_root(site: Path, tmp_path: Path) -> None:
    """It works, and says what only root can see."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = subprocess.run(
        [*nobody, os.path.realpath(sys.executable), "-m", "igvmfw", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={"PYTHONPATH": str(site), "PATH": os.defpath, "HOME": "/nonexistent"},
        timeout=120,
    )
    assert done.stderr == ""
    document = json.loads(done.stdout)
    jsonschema.validate(document, load_schema("doctor"))
    assert done.returncode == int(not document["fit"])
    assert document["privileged"] is False
    if Path("/dev/cpu/0/cpuid").exists() and "guests-sev" in lines_of(document):
        told = " ".join(line["found"] for line in document["lines"])
        assert "/dev/cpu/0/cpuid: Permission denied" in told
