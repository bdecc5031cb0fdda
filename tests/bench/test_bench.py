"""The benchmark works; what it finds is no test's business."""

import subprocess
import sys
from pathlib import Path

from tests.bench.run import OVMF
from tests.parts import need
from tests.testbed.cache import printed


def test_the_benchmark_writes_its_page(tmp_path: Path) -> None:
    need(OVMF.exists(), f"OVMF ({OVMF})")
    need((printed("peers.sh") / "igvm-inspect").exists(), "igvm-inspect")
    need(printed("reference.sh").exists(), "the program around the reference crate")
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "tests.bench", "--quick", "-o", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    for section in ("Inspect", "Parse", "Measure", "Start-up", "Rewrite", "Hook", "Many desc"):
        assert f"\n## {section}" in text
    goals = text.partition("| goal |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(goals) == 9
