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
