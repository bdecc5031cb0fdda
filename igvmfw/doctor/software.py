"""Judging libvirt, emulators, descriptors, hook and confinement."""

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from shlex import quote

from igvmfw.doctor import remedies
from igvmfw.doctor.apparmor import Access, judge
from igvmfw.doctor.facts import HOOK, HOOK_OFF, Facts, Found
from igvmfw.doctor.line import ALL, PROTECTED, Line, Status, Topic
from igvmfw.install import FIRST_TOLERANT_LIBVIRT
from igvmfw.inventory import FileState, Row
from igvmfw.platforms import Platform
from igvmfw.qemu.catalog import QEMU_DIRECTORY, State

_START_UP = 0.1  # seconds that a daemon takes at least until it looks for hooks
_NOT_HERE = "not asked, as it belongs to another root"
# what the policy lets svirt_t read: files_read_usr_files and virt_content_t (container-selinux'
# and selinux-policy's virt.te)
_READABLE_TYPES = {"usr_t", "virt_content_t", "svirt_image_t", "virt_image_t", "lib_t"}
_FIRST_SNP_LIBVIRT = (10, 5, 0)


def _text(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def libvirt_lines(facts: Facts) -> Iterator[Line]:
    """What is judged of libvirt."""
    yield _module(facts)
    yield _connection(facts)
    yield _tolerance(facts)
    for platform in PROTECTED:
        yield _offered(facts, platform)


def _module(facts: Facts) -> Line:
    name, topic = "python-module", Topic.LIBVIRT
    if facts.module is None:
        found = "libvirt-python can be loaded"
        return Line(topic=topic, name=name, status=Status.OK, found=found)
    remedy = remedies.install_module(facts.environment, facts.manager)
    found = f"libvirt-python: {facts.module}"
    return Line(topic=topic, name=name, status=Status.MISSING, found=found, remedy=remedy)


def _connection(facts: Facts) -> Line:
    libvirt = facts.libvirt

    def line(status: Status, found: str, remedy: str | None = None) -> Line:
        return Line(
            topic=Topic.LIBVIRT, name="connection", status=status, found=found, remedy=remedy
        )

    if libvirt.answered is not None:
        return line(Status.OK, f"libvirt {_text(libvirt.answered)} answers at {libvirt.uri}")
    if libvirt.version is None and not libvirt.denied:
        install = remedies.install("libvirt", facts.manager)
        return line(Status.MISSING, "no libvirt was found", install)
    if not libvirt.asked:
        return line(Status.UNKNOWN, _NOT_HERE)
    found = f"{libvirt.uri}: {libvirt.failure}"
    if libvirt.denied:
        return line(Status.UNKNOWN, found, "run it as root, or join the group libvirt")
    if facts.module is not None:
        return line(Status.UNKNOWN, found)
    if libvirt.remedy is not None and "connect" not in str(libvirt.failure):
        return line(Status.WRONG, found, libvirt.remedy)
    if facts.daemons:  # it runs, and does not answer
        names = [daemon.name for daemon in facts.daemons]
        return line(Status.WRONG, found, remedies.restart_daemon(names, facts.manager))
    return line(Status.WRONG, found, remedies.start_daemon(facts.manager))


def _tolerance(facts: Facts) -> Line:
    name, topic = "igvm-descriptors", Topic.LIBVIRT
    version = facts.libvirt.answered or facts.libvirt.version
    if version is None:
        found = "no release of libvirt is known"
        return Line(topic=topic, name=name, status=Status.UNKNOWN, found=found)
    if version >= FIRST_TOLERANT_LIBVIRT:
        found = f"libvirt {_text(version)} passes IGVM descriptors over"
        return Line(topic=topic, name=name, status=Status.OK, found=found)
    disturbing = [
        entry
        for entry in facts.catalog.available
        if str(entry.path.parent).endswith(QEMU_DIRECTORY)
    ]
    if not disturbing:
        found = (
            f"libvirt {_text(version)} would stumble over an IGVM descriptor in QEMU's "
            "directories, and none is there"
        )
        return Line(topic=topic, name=name, status=Status.OK, found=found)
    found = (
        f"libvirt {_text(version)} finds no firmware at all for its domains while these are "
        f"there: {', '.join(str(entry.path) for entry in disturbing)}"
    )
    first = disturbing[0]
    file = first.descriptor.mapping.filename if first.descriptor is not None else "FILE"
    remedy = f"igvmfw uninstall {quote(str(first.path))} && igvmfw install {quote(file)}"
    return Line(topic=topic, name=name, status=Status.WRONG, found=found, remedy=remedy)


def _offered(facts: Facts, platform: Platform) -> Line:
    def line(status: Status, found: str, remedy: str | None = None) -> Line:
        return Line(
            topic=Topic.LIBVIRT,
            name=f"offers-{platform}",
            status=status,
            found=found,
            remedy=remedy,
            platforms=(platform,),
        )

    libvirt = facts.libvirt
    if libvirt.capabilities is None:
        return line(Status.UNKNOWN, libvirt.failure or _NOT_HERE)
    offered = {
        Platform.SEV: libvirt.capabilities.sev,
        Platform.SEV_ES: libvirt.capabilities.sev_es,
        Platform.SEV_SNP: libvirt.capabilities.sev_snp,
    }[platform]
    if offered:
        return line(Status.OK, f"its domain capabilities have {platform}")
    version = libvirt.answered
    if platform is Platform.SEV_SNP and version is not None and version < _FIRST_SNP_LIBVIRT:
        remedy = f"install libvirt {_text(_FIRST_SNP_LIBVIRT)} or newer"
        return line(Status.MISSING, f"libvirt {_text(version)} is too old for SEV-SNP", remedy)
    # it keeps what it once found out about an emulator, also when the host has changed since
    cache = "rm -r /var/cache/libvirt/qemu/capabilities"
    restart = remedies.restart_daemon([d.name for d in facts.daemons], facts.manager)
    found = f"its domain capabilities lack {platform}"
    return line(Status.MISSING, found, f"mend the machine's lines first, then: {cache}; {restart}")


def emulator_lines(facts: Facts) -> Iterator[Line]:
    """What is judged of the emulators: each, and whether there is one to take."""
    able = [found for found in facts.emulators if found.emulator and found.emulator.igvm]
    other = f"name {able[0].path} in a domain's <emulator>" if able else None
    for found in facts.emulators:
        yield _emulator(found, other)

    def line(status: Status, found: str, remedy: str | None = None) -> Line:
        return Line(topic=Topic.EMULATOR, name="igvm", status=status, found=found, remedy=remedy)

    default = facts.libvirt.capabilities and facts.libvirt.capabilities.emulator
    if able:
        path = str(able[0].path)
        text = f"{path} takes IGVM files"
        if default is not None and default not in [str(found.path) for found in able]:
            text += f"; libvirt's default does not: <emulator>{path}</emulator> names it"
        yield line(Status.OK, text)
        yield _sev_launch(able)
        return
    remedy = remedies.igvm_emulator(facts.manager)
    if any(found.emulator is None for found in facts.emulators):
        yield line(Status.UNKNOWN, "none that could be asked takes IGVM files", remedy)
        return
    text = "no emulator takes IGVM files" if facts.emulators else "there is no emulator"
    yield line(Status.MISSING, text, remedy)


def _sev_launch(able: Sequence[Found]) -> Line:
    """Whether one of those that take IGVM files gets through a launch of SEV and SEV-ES guests."""

    def line(status: Status, text: str, remedy: str | None = None) -> Line:
        return Line(
            topic=Topic.EMULATOR,
            name="sev-launch",
            status=status,
            found=text,
            remedy=remedy,
            platforms=(Platform.SEV, Platform.SEV_ES),
        )

    releases = {found.path: found.emulator.acceptance for found in able if found.emulator}
    for path, release in releases.items():
        if release.sev_launch:
            return line(Status.OK, f"{path} launches SEV and SEV-ES guests from an IGVM file")
    names = ", ".join(sorted({release.name for release in releases.values()}))
    remedy = "use QEMU 10.1 or 10.2 for these guests, or SEV-SNP"
    if any(release.sev_launch is None for release in releases.values()):
        text = f"QEMU 11.0 cannot launch SEV and SEV-ES guests from an IGVM file; of {names} it is "
        return line(Status.UNKNOWN, f"{text}not known", remedy)
    text = f"{names} cannot launch SEV and SEV-ES guests from an IGVM file"
    return line(Status.MISSING, text, remedy)


def _emulator(found: Found, other: str | None) -> Line:
    def line(status: Status, text: str, remedy: str | None = None) -> Line:
        return Line(
            topic=Topic.EMULATOR,
            name=str(found.path),
            status=status,
            found=f"{text} ({found.origin})",
            remedy=remedy,
            needed=False,
        )

    if found.untried:
        return line(Status.UNKNOWN, str(found.problem))
    if found.emulator is None:
        remedy = "install QEMU again, or take the file away"
        return line(Status.WRONG, str(found.problem), remedy)
    text = f"QEMU {found.emulator.version_text}"
    if found.emulator.igvm:
        return line(Status.OK, f"{text} takes IGVM files")
    return line(Status.MISSING, f"{text} takes no IGVM files", other)


def firmware_lines(facts: Facts) -> Iterator[Line]:
    """What is judged of descriptors and their files."""
    for problem in facts.catalog.problems:
        denied = "Permission" in problem.message
        status = Status.UNKNOWN if denied else Status.WRONG
        yield _firmware(
            str(problem.where), status, problem.message, f"ls -l {quote(str(problem.where))}"
        )
    usable = []
    for row in facts.rows:
        line = _descriptor(row)
        if line is not None:
            yield line
        elif row.entry.state is State.AVAILABLE:
            usable.append(row)
    for platform in ALL:
        names = [row.entry.name for row in usable if platform in row.platforms]
        yield Line(
            topic=Topic.FIRMWARE,
            name=f"for-{platform}",
            status=Status.OK if names else Status.MISSING,
            found=", ".join(names) or f"no usable descriptor of IGVM firmware for {platform}",
            remedy=None if names else remedies.firmware(platform, facts.manager),
            platforms=(platform,),
            needed=False,  # a domain can name a file itself
        )


def _firmware(name: str, status: Status, found: str, remedy: str) -> Line:
    return Line(topic=Topic.FIRMWARE, name=name, status=status, found=found, remedy=remedy)


def _descriptor(row: Row) -> Line | None:
    """What is wrong with a descriptor or its file; None where nothing is."""
    entry = row.entry
    name = str(entry.path)
    if entry.state is State.BROKEN and entry.error is not None:
        denied = "Permission" in entry.error.message
        status = Status.UNKNOWN if denied else Status.WRONG
        return _firmware(name, status, entry.error.message, f"igvmfw validate {quote(name)}")
    if entry.state is not State.AVAILABLE or row.state in (None, FileState.PRESENT):
        return None
    file = entry.descriptor.mapping.filename if entry.descriptor is not None else "FILE"
    remedy = {
        FileState.MISSING: f"igvmfw uninstall {quote(name)}",
        FileState.CHANGED: f"if the change is meant: igvmfw install {quote(file)}",
        FileState.DAMAGED: f"install the package that {file} is from again",
    }.get(row.state or FileState.DAMAGED, f"chmod a+r {quote(file)}")
    unreadable = row.state is FileState.UNREADABLE and os.geteuid() != 0
    status = Status.UNKNOWN if unreadable else Status.WRONG
    return _firmware(name, status, str(row.problem), remedy)


def hook_lines(facts: Facts) -> Iterator[Line]:
    """What is judged of libvirt's hook."""

    def line(name: str, status: Status, found: str, remedy: str | None = None) -> Line:
        return Line(
            topic=Topic.HOOK,
            name=name,
            status=status,
            found=found,
            remedy=remedy,
            needed=False,
        )

    hook = facts.hook
    daemons = [daemon.name for daemon in facts.daemons]
    path = f"/{HOOK}"
    if hook is None:
        if facts.hook_problem is not None:
            yield line("installed", Status.UNKNOWN, f"{path}: {facts.hook_problem}")
            return
        remedy = remedies.install_hook(daemons, facts.environment, facts.manager)
        found = f"{path} is not there: libvirt checks no start by itself"
        yield line("installed", Status.MISSING, found, remedy)
        return
    if not hook.executable:
        found = f"{path} is switched off: it is not executable"
        yield line("installed", Status.WRONG, found, f"chmod 755 {path}")
    elif hook.off:
        found = f"{path} is switched off by /{HOOK_OFF}"
        yield line("installed", Status.WRONG, found, f"rm /{HOOK_OFF}")
    else:
        yield line("installed", Status.OK, path)
    if hook.unseen is not None:
        yield line("python", Status.UNKNOWN, hook.unseen)
    elif hook.failure is not None:
        found = f"{hook.python} cannot load igvmfw: {hook.failure}"
        remedy = f"correct the line python= in {path}, or install igvmfw for that interpreter"
        yield line("python", Status.WRONG, found, remedy)
    else:
        yield line("python", Status.OK, f"{hook.python} loads igvmfw")
    yield _active(facts)


def _active(facts: Facts) -> Line:
    """Whether the daemons were started when there was a hook for QEMU."""
    hook = facts.hook
    assert hook is not None
    since = min(hook.changed, hook.others or hook.changed)
    late = [daemon for daemon in facts.daemons if daemon.started + _START_UP < since]

    def line(status: Status, found: str, remedy: str | None = None) -> Line:
        return Line(
            topic=Topic.HOOK,
            name="active",
            status=status,
            found=found,
            remedy=remedy,
            needed=False,
        )

    if late:
        first = late[0]
        found = (
            f"{first.name} (process {first.pid}) runs since {_time(first.started)}, the hook is "
            f"there since {_time(since)}: it has taken the hook up only if it was reloaded since"
        )
        remedy = remedies.reload_daemon([daemon.name for daemon in late], facts.manager)
        return line(Status.UNKNOWN, found, remedy)
    if not facts.daemons:
        return line(Status.OK, "no daemon runs: the next that starts takes the hook up")
    names = ", ".join(f"{d.name} (process {d.pid})" for d in facts.daemons)
    return line(Status.OK, f"{names} started after the hook was there")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def confinement_lines(facts: Facts) -> Iterator[Line]:
    """What is judged of AppArmor and SELinux, which know nothing of a file named to QEMU alone."""

    def line(name: str, status: Status, found: str, remedy: str | None = None) -> Line:
        return Line(topic=Topic.CONFINEMENT, name=name, status=status, found=found, remedy=remedy)

    confinement = facts.confinement
    if set(facts.settings.get("security_driver", ())) == {"none"}:
        yield line("security-driver", Status.OK, "qemu.conf leaves guests unconfined")
        return
    if confinement.apparmor is None:
        yield line("apparmor", Status.UNKNOWN, "whether AppArmor is on cannot be read")
    files = [row.entry.descriptor.mapping.filename for row in _rows(facts) if row.entry.descriptor]
    if confinement.apparmor and confinement.abstraction:
        yield from _apparmor(facts, files)
    elif confinement.apparmor:
        yield line("apparmor", Status.OK, "AppArmor is on, without a profile for libvirt's guests")
    if confinement.selinux:
        yield from _selinux(facts, files)
    if confinement.apparmor is False and not confinement.selinux:
        yield line("security-driver", Status.OK, "neither AppArmor nor SELinux confines guests")


def _apparmor(facts: Facts, files: list[str]) -> Iterator[Line]:
    def line(status: Status, found: str, remedy: str | None = None) -> Line:
        return Line(
            topic=Topic.CONFINEMENT, name="apparmor", status=status, found=found, remedy=remedy
        )

    judged = judge(facts.confinement.rules, files)
    closed = [file for file, (access, _) in judged.items() if access is Access.CLOSED]
    if closed:
        folders = sorted({os.path.dirname(file) for file in closed})
        found = f"AppArmor keeps guests from reading {', '.join(closed)}"
        yield line(Status.WRONG, found, remedies.allow_reading(folders))
    for file, (access, why) in judged.items():
        if access is Access.DENIED:
            found = f"AppArmor keeps guests from reading {file}: its rules have '{why}'"
            remedy = "take that rule out of /etc/apparmor.d, or install the file elsewhere"
            yield line(Status.WRONG, found, remedy)
        elif access is Access.UNCLEAR:
            found = f"whether AppArmor lets guests read {file} cannot be told from its rules: {why}"
            yield line(Status.UNKNOWN, found)
    if all(access is Access.OPEN for access, _ in judged.values()):
        found = f"AppArmor lets guests read all {len(files)} files that descriptors name"
        yield line(Status.OK, found)


def _selinux(facts: Facts, files: list[str]) -> Iterator[Line]:
    closed = {
        file: kind for file, kind in facts.confinement.types.items() if kind not in _READABLE_TYPES
    }
    for file, kind in closed.items():
        yield Line(
            topic=Topic.CONFINEMENT,
            name="selinux",
            status=Status.WRONG,
            found=f"{file} has the type {kind}, which guests may not read",
            remedy=remedies.relabel(file),
        )
    if not closed:
        found = f"SELinux lets guests read the {len(files)} files that descriptors name"
        yield Line(topic=Topic.CONFINEMENT, name="selinux", status=Status.OK, found=found)


def _rows(facts: Facts) -> Iterator[Row]:
    return (row for row in facts.rows if row.entry.state is State.AVAILABLE)
