"""A root to build and install packages in, with what was done to it."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.parts import need
from tests.testbed.cache import SCRIPTS, printed


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageRoot:
    """A root of package-roots.sh.

    Attributes:
        kind: Whose tools are in it.
        directory: What was changed in it is kept here.
    """

    kind: str
    directory: Path

    def __post_init__(self) -> None:
        need(os.geteuid() == 0, f"root, for a root with {self.kind}'s tools")
        need(printed("package-roots.sh", self.kind).is_dir(), f"a root with {self.kind}'s tools")
        self.shared.mkdir(parents=True, exist_ok=True)

    @property
    def shared(self) -> Path:
        """The directory that is /shared in the root."""
        return self.directory / "shared"

    def try_run(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in the root, as root and without network, whatever comes of it."""
        script = [str(SCRIPTS / "package-roots.sh"), self.kind, "--run", str(self.directory)]
        return subprocess.run(
            [*script, *command],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a command in the root that succeeds; what it writes to either stream."""
        done = self.try_run(*command, stdin=stdin)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def files(self) -> frozenset[str]:
        """Every path in the root, but the package manager's own data and the shared directory."""
        own = ["/proc", "/dev", "/shared", "/var/lib/rpm", "/var/lib/dpkg", "/var/cache", "/tmp"]
        pruned = " -o ".join(f"-path {path}" for path in own)
        return frozenset(self.run("sh", "-c", f"find / \\( {pruned} \\) -prune -o -print").split())
