"""Commands that mend a host, by its distribution.

Package names: Debian 12 and 13, Ubuntu 24.04, Fedora 42, openSUSE Tumbleweed.
"""

import re
import shlex
from collections.abc import Sequence

from igvmfw.doctor.apparmor import reading_rule
from igvmfw.doctor.facts import HOOK, Manager

_INSTALL = {
    Manager.APT: "apt install",
    Manager.DNF: "dnf install",
    Manager.ZYPPER: "zypper install",
}
_PACKAGES = {
    "libvirt": {
        Manager.APT: "libvirt-daemon-system",
        Manager.DNF: "libvirt-daemon-kvm",
        Manager.ZYPPER: "libvirt-daemon-qemu",
    },
    "libvirt-python": {
        Manager.APT: "python3-libvirt",
        Manager.DNF: "python3-libvirt",
        Manager.ZYPPER: "python3-libvirt-python",
    },
    # what building the module takes
    "libvirt-headers": {
        Manager.APT: "libvirt-dev gcc pkg-config python3-dev",
        Manager.DNF: "libvirt-devel gcc pkgconf-pkg-config python3-devel",
        Manager.ZYPPER: "libvirt-devel gcc pkg-config python3-devel",
    },
    "qemu": {
        Manager.APT: "qemu-system-x86",
        Manager.DNF: "qemu-system-x86-core",
        Manager.ZYPPER: "qemu-x86",
    },
    "ovmf": {
        Manager.APT: "ovmf",
        Manager.DNF: "edk2-ovmf",
        Manager.ZYPPER: "qemu-ovmf-x86_64",
    },
}
# a raw image with code and variables in one, which SEV-SNP needs
_RAW_FIRMWARE = {
    Manager.APT: "/usr/share/ovmf/OVMF.fd",
    Manager.DNF: "/usr/share/edk2/ovmf/OVMF.amdsev.fd",
    Manager.ZYPPER: "/usr/share/qemu/ovmf-x86_64.bin",
}
RELOAD_KVM = "modprobe -r kvm_amd && modprobe kvm_amd"


def install(what: str, manager: Manager) -> str:
    """The command that installs something.

    Args:
        what: `libvirt`, `libvirt-headers`, `libvirt-python`, `qemu` or `ovmf`.
        manager: The distribution's package manager.
    """
    if manager is Manager.UNKNOWN:
        return f"install {what} with the distribution's package manager"
    return f"{_INSTALL[manager]} {_PACKAGES[what][manager]}"


def install_module(environment: str | None, manager: Manager) -> str:
    """The command that installs libvirt's Python module.

    Args:
        environment: The interpreter of a virtual environment; None for the distribution's.
        manager: The distribution's package manager.
    """
    if environment is None:
        return install("libvirt-python", manager)
    headers = install("libvirt-headers", manager)
    return f"{headers} && {shlex.quote(environment)} -m pip install libvirt-python"


def package_names(manager: Manager) -> tuple[str, ...]:
    """Every package that a remedy names."""
    return tuple(name for names in _PACKAGES.values() for name in names[manager].split())


def daemon(manager: Manager) -> str:
    """The systemd unit of the daemon that runs QEMU guests."""
    return "libvirtd" if manager is Manager.APT else "virtqemud"


def start_daemon(manager: Manager) -> str:
    """The command that starts libvirt, now and at every boot."""
    return f"systemctl enable --now {daemon(manager)}.socket"


def restart_daemon(names: Sequence[str], manager: Manager) -> str:
    """The command that restarts daemons; guests go on running meanwhile.

    Args:
        names: Of the daemons that run; the distribution's usual one where none does.
        manager: The distribution's package manager.
    """
    return f"systemctl restart {' '.join(dict.fromkeys(names)) or daemon(manager)}"


def reload_daemon(names: Sequence[str], manager: Manager) -> str:
    """The command that has daemons look for hooks; who is connected stays so.

    Args:
        names: As for `restart_daemon`.
        manager: The distribution's package manager.
    """
    return f"systemctl reload {' '.join(dict.fromkeys(names)) or daemon(manager)}"


def igvm_emulator(manager: Manager) -> str:
    """What brings an emulator that takes IGVM files."""
    if manager in (Manager.DNF, Manager.ZYPPER):
        return install("qemu", manager)
    return (
        "build QEMU 10.1 or newer with --enable-igvm (this distribution's has it not), and name it "
        "in IGVMFW_QEMU and in each domain's <emulator>"
    )


def firmware(platform: str, manager: Manager) -> str:
    """The commands that make an IGVM file for a platform and install its descriptor."""
    raw = _RAW_FIRMWARE.get(manager, "OVMF.fd")
    file = f"/usr/share/igvm/ovmf-{platform}.igvm"
    return (
        f"mkdir -p /usr/share/igvm && igvmfw wrap {raw} -o {file} --platform {platform} && "
        f"igvmfw install {file}"
    )


def switch_on(parameters: Sequence[str]) -> str:
    """The command that turns kvm_amd's switches on, now and at every boot."""
    options = " ".join(f"{name}=1" for name in parameters)
    return f"echo options kvm_amd {options} > /etc/modprobe.d/igvmfw.conf && {RELOAD_KVM}"


def install_hook(names: Sequence[str], environment: str | None, manager: Manager) -> str:
    """The command, in igvmfw's sources, that installs the hook and has libvirt take it up.

    Args:
        names: As for `restart_daemon`.
        environment: As for `install_module`.
        manager: The distribution's package manager.
    """
    install = f"install -D -m 755 packaging/libvirt-hook/igvmfw /{HOOK}"
    if environment is not None:  # which has igvmfw, as the distribution's Python has not
        install += f" && sed -i {shlex.quote(f's|^python=.*|python={environment}|')} /{HOOK}"
    return f"in igvmfw's sources: {install} && {reload_daemon(names, manager)}"


def relabel(file: str) -> str:
    """The command that gives a file a type that SELinux lets guests read."""
    restore = f"restorecon -v {shlex.quote(file)}"
    if file.startswith("/usr/"):
        return restore
    # fcontext takes a regular expression
    return f"semanage fcontext -a -t virt_content_t {shlex.quote(re.escape(file))} && {restore}"


def allow_reading(directories: Sequence[str]) -> str:
    """The command that lets AppArmor's guests read directories."""
    # of its own: the file igvmfw beside it is a package's
    path = "/etc/apparmor.d/abstractions/libvirt-qemu.d/igvmfw-local"
    rules = " ".join(shlex.quote(reading_rule(directory)) for directory in directories)
    return f"mkdir -p {path.rpartition('/')[0]} && printf '%s\\n' {rules} >> {path}"
