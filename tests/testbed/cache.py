"""Where the test bed keeps what it builds, and the scripts that build it."""

import os
import subprocess
from pathlib import Path

SCRIPTS = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "igvmfw"


def printed(script: str, *arguments: str) -> Path:
    """The path that a script of the test bed prints with `--print`, built or not."""
    command = [str(SCRIPTS / script), *arguments, "--print"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return Path(shown.stdout.strip())


def _suites() -> tuple[str, ...]:
    shown = subprocess.run(
        [str(SCRIPTS / "roots.sh"), "--suites"],
        capture_output=True,
        text=True,
        check=False,  # it knows no distribution but Debian and Ubuntu
        timeout=60,
    )
    return tuple(shown.stdout.split())


SUITES = _suites()  # the releases that roots.sh makes roots of, newest last
