"""The example of docs/api.md, run as it stands against real libvirt."""

import subprocess
import sys
from pathlib import Path

import pytest

from igvmfw.virt.domain import Domain
from tests.api_reference import DOCUMENT
from tests.system.guests import domain, igvmfw, wrap

EXAMPLE = DOCUMENT.parent / "examples" / "define.py"


def run(uri: str, xml: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(EXAMPLE), uri, str(xml)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_example_defines_a_domain_that_starts(
    uri: str, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    file = wrap(ovmf, tmp_path / "ovmf.igvm")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file, kind="qemu"))
    done = run(uri, xml)
    assert (done.returncode, done.stdout) == (0, f"guest: {file}\n"), done.stderr
    virsh = ["virsh", "-q", "-c", uri, "dumpxml", "guest"]
    defined = subprocess.run(virsh, capture_output=True, timeout=60, check=True).stdout
    assert f"igvm-cfg,id=igvm0,file={file}" in Domain.parse(defined).arguments
    started = igvmfw("start", "-c", uri, "--paused", "guest")
    assert started.code == 0, started.err


@pytest.mark.parametrize(
    ("text", "said"),
    [("<domain", "not well-formed"), ("<domain type='qemu'><os firmware='igvm'/></domain>", "")],
)
def test_the_example_says_what_is_wrong(uri: str, tmp_path: Path, text: str, said: str) -> None:
    xml = tmp_path / "guest.xml"
    xml.write_text(text)
    done = run(uri, xml)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_code_in_the_document_runs(
    uri: str, igvm_qemu: Path, ovmf: Path, tmp_path: Path
) -> None:
    """All of it, one piece after the other, with this machine's URI and files."""
    file = wrap(ovmf, tmp_path / "ovmf.igvm", "--platform", "native", "--platform", "sev-es")
    xml = tmp_path / "guest.xml"
    xml.write_text(domain(igvm_qemu, file, kind="qemu"))
    pieces = [part.split("```")[0] for part in DOCUMENT.read_text().split("```python\n")[1:]]
    assert len(pieces) == 3
    code = "".join(pieces) + "print(name, file.path, file.platform)\n"
    for there, here in (
        ("qemu:///system", uri), ("guest.xml", xml), ("/srv/igvm/OVMF.igvm", file),
    ):  # fmt: skip
        assert there in code
        code = code.replace(there, str(here))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"guest {file} native\n"), done.stderr
