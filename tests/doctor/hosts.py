"""Trees of files that stand for hosts this machine is not.

The figures are those of public reports of an EPYC 7003: CPUID Fn8000_001F with 509 ASIDs, of which
the BIOS gives those below 100 to SEV-ES; cgroups' misc.capacity follows from it.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from tests.parts import need

SNP_FLAGS = "svm sme sev sev_es sev_snp".split()
# EAX: SME, SEV, page flush, SEV-ES, SEV-SNP, VMPL …; EBX: C-bit 51; ECX: 509; EDX: 100
MILAN = (0x0101FD3F, 0x00004173, 509, 100)
ROME = (0x0001000F, 0x0000016F, 509, 100)
PROCESSOR = """\
processor\t: 0
vendor_id\t: {vendor}
model name\t: {model}
flags\t\t: fpu vme de {flags}

processor\t: 1
vendor_id\t: {vendor}
flags\t\t: other
"""


def host(
    root: Path,
    *,
    vendor: str = "AuthenticAMD",
    model: str = "AMD EPYC 7763 64-Core Processor",
    kernel: str = "6.12.43+deb13-amd64",
    flags: Sequence[str] = SNP_FLAGS,
    cpuid: Sequence[int] | None = MILAN,
    parameters: dict[str, str] | None = None,
    capacity: str | None = "sev 410\nsev_es 99\n",
    modules: Sequence[str] = ("kvm", "kvm_amd", "ccp"),
    devices: Sequence[str] = ("kvm", "sev"),
    distribution: str = "debian",
) -> Path:
    """A host that can launch everything, unless something else is said."""
    if parameters is None:
        parameters = {"sev": "Y", "sev_es": "Y", "sev_snp": "Y"}
    text = PROCESSOR.format(vendor=vendor, model=model, flags=" ".join(flags))
    write(root / "proc/cpuinfo", text)
    write(root / "proc/sys/kernel/osrelease", f"{kernel}\n")
    write(root / "etc/os-release", f'ID={distribution}\nPRETTY_NAME="Some {distribution}"\n')
    for module in modules:
        (root / "sys/module" / module).mkdir(parents=True)
    for name, value in parameters.items():
        write(root / "sys/module/kvm_amd/parameters" / name, f"{value}\n")
    if capacity is not None:
        write(root / "sys/fs/cgroup/misc.capacity", capacity)
    if cpuid is not None:
        path = root / "dev/cpu/0/cpuid"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"".join(word.to_bytes(4, "little") for word in cpuid))
    for name in devices:
        device(root / "dev" / name)
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def device(path: Path) -> None:
    need(os.geteuid() == 0, "root, to make device files")
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR | 0o660, os.makedev(1, 3))  # what it would do plays no part
