"""libvirtds of the tests' own, with the hook: nothing of the host's own libvirt is touched."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import QEMU_CONF
from tests.parts import need
from tests.system.guests import Result
from tests.testbed.cache import CACHE, printed

HOOK = Path(__file__).parents[2] / "packaging" / "libvirt-hook" / "igvmfw"
DAEMON_CONF = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:file:/var/log/libvirtd.log"
"""
# libvirtd with /etc/libvirt, /run, /var, /dev and /sys/module of its own, so that nothing of the
# host is touched, and /dev/sev and KVM's switches can come and go
START = """\
set -e
root=$1
for device in null zero full random urandom kvm; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount --bind /dev/pts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
touch "$root/dev/sev"
mount --rbind "$root/dev" /dev
mount --bind "$root/module" /sys/module
mount --bind "$root/etc" /etc/libvirt
mount --bind "$root/run" /run
mount --bind "$root/var" /var
"""
# a newer release's, in its own root, where the host is to be found in /host
START_NEWER = """\
top=$root/top all=$root/top/all
mkdir "$top"
mount -t tmpfs tmpfs "$top"
mkdir "$top/new" "$top/work" "$all"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$top/new,workdir=$top/work" "$all"
mkdir -p "$all/host" "$all$3"
mount --rbind / "$all/host"
for directory in /dev /etc/libvirt /proc /run /sys /tmp /var "$3"; do
    mount --rbind "$directory" "$all$directory"
done
for directory in ${4:+/etc/qemu /usr/share/qemu/firmware}; do
    mkdir -p "$all$directory"
    mount --bind "$4$directory" "$all$directory"
done
exec chroot "$all" libvirtd
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """A libvirtd of the tests' own; what it takes for /etc/libvirt, /run, … is below `root`.

    `python` is the interpreter that igvmfw is installed for, as the hook has to name it.
    """

    root: Path
    python: Path

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.root}/run/libvirt/libvirt-sock"

    def virsh(self, *words: str | Path) -> Result:
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        return Result(code=done.returncode, out=done.stdout, err=done.stderr)

    @property
    def hook(self) -> Path:
        return self.root / "etc/hooks/qemu.d/igvmfw"

    @property
    def off(self) -> Path:
        """Where it is there, the hook is switched off."""
        return self.root / "etc/hooks/igvmfw.off"

    def reload(self) -> None:
        """As systemctl reload does."""
        os.kill(int((self.root / "run/libvirtd.pid").read_text()), signal.SIGHUP)

    def remove_all(self) -> None:
        for name in self.virsh("list", "--name").out.split():
            self.virsh("destroy", name)
        for name in self.virsh("list", "--all", "--name").out.split():
            self.virsh("undefine", name)


def install_hook(path: Path, python: str | Path) -> None:
    """As an administrator does where igvmfw is not the distribution's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = HOOK.read_text()
    assert "\npython=/usr/bin/python3\n" in text
    path.write_text(text.replace("\npython=/usr/bin/python3\n", f"\npython={python}\n"))
    path.chmod(0o755)


def _libvirt_user_exists() -> bool:
    return any(entry.pw_name in ("libvirt-qemu", "qemu") for entry in pwd.getpwall())


@contextlib.contextmanager
def serving(
    suite: str | None = None, *, firmware: Path | None = None, hook: bool = True
) -> Iterator[Daemon]:
    """A libvirtd until the end of the block.

    Args:
        suite: The newer release whose libvirtd it is; None for this host's.
        firmware: A tree whose firmware descriptors a newer release's sees instead of its own.
        hook: Whether it has igvmfw's hook.
    """
    need(os.geteuid() == 0, "root, for a libvirtd in a mount namespace")
    need(shutil.which("libvirtd", path="/usr/sbin:/usr/bin") is not None, "libvirtd")
    need(_libvirt_user_exists(), "the user that libvirt runs guests as (libvirt-qemu)")
    need(os.access("/dev/kvm", os.R_OK | os.W_OK), "KVM (read and write access to /dev/kvm)")
    root = Path(tempfile.mkdtemp(prefix="igvmfw-d-", dir="/tmp"))
    for name in ("dev", "etc", "module", "run", "var/lib", "var/log", "var/cache"):
        (root / name).mkdir(parents=True)
    (root / "etc/qemu.conf").write_text(QEMU_CONF)
    (root / "etc/libvirtd.conf").write_text(DAEMON_CONF)
    script, python, words = f"{START}exec libvirtd\n", Path(sys.executable), []
    if suite is not None:
        newer = printed("roots.sh", suite)
        need(newer.is_dir(), "a root with a newer libvirt")
        script, words = START + START_NEWER, [str(newer), str(CACHE), str(firmware or "")]
        python = root / "python"
        python.write_text(f'#!/bin/sh\nexec chroot /host {sys.executable} "$@"\n')
        python.chmod(0o755)
    daemon = Daemon(root=root, python=python)
    if hook:
        install_hook(daemon.hook, python)
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", root, *words],
        stdout=subprocess.DEVNULL,
        stderr=(root / "stderr").open("wb"),
    )
    try:
        deadline = time.monotonic() + 60
        while daemon.virsh("uri").code:
            said = (root / "stderr").read_text(errors="replace")[-500:]
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        yield daemon
        daemon.remove_all()
    finally:
        process.terminate()
        process.wait(timeout=30)
        shutil.rmtree(root, ignore_errors=True)
