"""The hook without libvirt: what it looks at, what it trusts, and what it never stops."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from igvmfw import preflight
from igvmfw.errors import DomainError, IgvmfwError, InputError, RefusedError
from igvmfw.launch import Options, prepare
from igvmfw.machine import check_host
from igvmfw.platforms import Platform
from igvmfw.preflight import Cache, check_start
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import NAMESPACE, OnChange
from tests.igvm import samples
from tests.parts import need
from tests.virt import domains

FRONT = Path(__file__).parents[1] / "packaging" / "libvirt-hook" / "igvmfw"
KEY = {"sha256": "ab", "vcpus": 1}


def emulator(path: Path, version: str = "10.2.2") -> Path:
    """An emulator as far as asking it goes, which notes that it was asked."""
    path.write_text(
        f"#!/bin/sh\necho asked >> {path}.log\n"
        f"echo 'QEMU emulator version {version}'; echo '  file=<string>'\n"
    )
    path.chmod(0o755)
    return path


def rewritten(directory: Path, file: bytes, *, on_change: OnChange | None = None) -> Domain:
    """A native domain with this file, as libvirt hands it to the hook."""
    path = directory / "firmware.igvm"
    path.write_bytes(file)
    text = domains.BY_PATH.replace("/usr/share/igvm/ovmf.igvm", str(path)).replace(
        "</domain>",
        f"<devices><emulator>{emulator(directory / 'qemu')}</emulator></devices></domain>",
    )
    domain = prepare(Domain.parse(text.encode()), Options(on_change=on_change)).domain
    return Domain.parse(domain.write())


def warnings_of(domain: Domain, cache: Cache | None = None) -> list[str]:
    said: list[str] = []
    check_start(domain, warn=said.append, cache=cache)
    return said


def test_a_domain_passes_with_the_file_that_was_chosen(tmp_path: Path) -> None:
    assert warnings_of(rewritten(tmp_path, samples.small())) == []
    assert (tmp_path / "qemu.log").read_text().count("asked") == 2


def test_domains_without_a_file_are_none_of_its_business() -> None:
    for text in (domains.EFI, domains.REQUEST):
        assert warnings_of(Domain.parse(text.encode())) == []


def test_a_change_is_refused_or_only_said(tmp_path: Path) -> None:
    for choice in (None, OnChange.WARN):
        domain = rewritten(tmp_path, samples.small(), on_change=choice)
        file = tmp_path / "firmware.igvm"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        found = hashlib.sha256(data).hexdigest()
        if choice is None:
            with pytest.raises(RefusedError, match=f"its SHA-256 is {found}, recorded is "):
                check_start(domain, warn=print)
        else:
            [said] = warnings_of(domain)
            assert f"{file}: the file changed since guest was defined" in said


def test_a_damaged_file_is_refused_whatever_is_recorded(tmp_path: Path) -> None:
    domain = rewritten(tmp_path, samples.small(), on_change=OnChange.WARN)
    file = tmp_path / "firmware.igvm"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=re.escape(f"{file}: offset 0x10: the file should have ")):
        check_start(domain, warn=print)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    text = rewritten(tmp_path, samples.small()).write().replace(b"sha256='", b"sha256='?")
    with pytest.raises(DomainError, match="igvmfw's record in <metadata> is damaged"):
        check_start(Domain.parse(text), warn=print)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # QEMU would take the later one
        (
            "</qemu:c",
            "<qemu:arg value='-object'/><qemu:arg value='igvm-cfg,id=x,file=/x'/></qemu:c",
            ("names an IGVM file already",),
        ),
        (
            "</qemu:c",
            "<qemu:arg value='-machine'/><qemu:arg value='igvm-cfg=x'/></qemu:c",
            ("names an IGVM file already",),
        ),
        (
            "</qemu:c",
            "<qemu:arg value='-object'/><qemu:arg value='igvm-cfg,id=igvm0,file=/x'/></qemu:c",
            ("more than once",),
        ),
        # or would start without any
        ("igvm-cfg=igvm0'", "usb=off'", ("which QEMU is not given",)),
        ("value='-object'", "value='-name'", ("which QEMU is not given",)),
        (",file=", ",file=/other", ("which QEMU is not given",)),
        # or refuse it
        ("</qemu:c", "<qemu:arg value='-bios'/><qemu:arg value='/x'/></qemu:c", ("remove -bios",)),
        ("<os>", "<os firmware='efi'>", ("guest has firmware='efi' beside", "virsh edit")),
        (
            "</os>",
            "<loader type='pflash'>/x</loader></os>",
            ("guest has <loader> beside", "virsh edit"),
        ),
        ("</os>", "<nvram>/x</nvram></os>", ("guest has <nvram> beside",)),
        ("</os>", "<varstore/></os>", ("guest has <varstore> beside",)),
    ],
)
def test_what_was_changed_since_is_not_what_was_checked(
    tmp_path: Path, old: str, new: str, words: tuple[str, ...]
) -> None:
    text = rewritten(tmp_path, samples.small()).write().decode()
    assert text.count(old) == 1
    with pytest.raises(IgvmfwError) as caught:
        check_start(Domain.parse(text.replace(old, new).encode()), warn=print)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.hint


def test_an_emulator_that_others_can_write_to_is_not_run(tmp_path: Path) -> None:
    domain = rewritten(tmp_path, samples.small())
    (tmp_path / "qemu").chmod(0o777)
    assert warnings_of(domain) == []  # judged by the newest rules known
    assert not (tmp_path / "qemu.log").exists()


def binary(path: Path) -> Path:
    """An emulator that is no script."""
    need(shutil.which("gcc") is not None, "gcc")
    source = path.with_suffix(".c")
    source.write_text(
        "#include <stdio.h>\n"
        f'int main(void) {{ FILE *log = fopen("{path}.log", "a"); fputs("asked\\n", log);\n'
        'puts("QEMU emulator version 10.2.2\\n file=<string>"); }\n'
    )
    path.unlink(missing_ok=True)
    subprocess.run(["gcc", "-o", path, source], check=True)
    return path


def test_what_passed_is_not_looked_at_again(tmp_path: Path) -> None:
    domain = rewritten(tmp_path, samples.small())
    qemu, log = tmp_path / "qemu", tmp_path / "qemu.log"
    cache = Cache(tmp_path / "cache")
    # a script may run another QEMU each time
    for times in (1, 2):
        assert warnings_of(domain, cache) == []
        assert log.read_text().count("asked") == 2 * times
    log.unlink()
    binary(qemu)
    for _ in range(3):
        assert warnings_of(domain, cache) == []
        assert log.read_text().count("asked") == 2
    binary(qemu)  # replaced, with the same content
    assert warnings_of(domain, cache) == []
    assert log.read_text().count("asked") == 4
    # so is igvmfw itself, whose rules may have been mended
    module = Path(preflight.__file__)
    module.chmod(module.stat().st_mode)  # which changes its ctime alone
    for _ in range(2):
        assert warnings_of(domain, cache) == []
        assert log.read_text().count("asked") == 6
    # another file is another matter
    (tmp_path / "firmware.igvm").write_bytes(samples.small(Platform.NATIVE, Platform.SEV))
    with pytest.raises(RefusedError, match="the file changed"):
        check_start(domain, warn=print, cache=cache)


def test_only_what_nobody_else_could_write_is_trusted(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert not cache.has(KEY)
    cache.add(KEY)
    assert cache.has(KEY)
    assert not cache.has({**KEY, "vcpus": 2})
    [entry] = cache.directory.iterdir()
    for place, right, wrong in ((entry, 0o600, 0o644), (cache.directory, 0o700, 0o755)):
        place.chmod(wrong)
        assert not cache.has(KEY)
        place.chmod(right)
        assert cache.has(KEY)
    entry.write_text("something else")
    assert not cache.has(KEY)
    cache.add(KEY)
    assert cache.has(KEY)
    moved = entry.rename(tmp_path / "moved")
    entry.symlink_to(moved)
    assert not cache.has(KEY)
    entry.unlink()
    moved.rename(entry)
    (tmp_path / "link").symlink_to(cache.directory)
    assert not Cache(tmp_path / "link").has(KEY)
    if os.geteuid() == 0:
        for place in (entry, cache.directory):
            os.chown(place, 65534, -1)
            assert not cache.has(KEY)
            os.chown(place, 0, -1)


@pytest.mark.parametrize(
    ("user", "runtime", "expected"),
    [
        (0, "/elsewhere", "/run/igvmfw"),
        (1000, "/run/user/1000", "/run/user/1000/igvmfw"),
        (1000, None, "/run/user/1000/igvmfw"),  # as libvirt of a session runs a hook
        (1000, "relative", None),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, user: int, runtime: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if runtime is not None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    assert Cache.of_user() == (None if expected is None else Cache(Path(expected)))


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file")
    cache.add(KEY)
    assert not cache.has(KEY)


def test_the_cache_does_not_grow_for_ever(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    for number in range(600):
        cache.add({"vcpus": number})
    assert len(list(cache.directory.iterdir())) <= 512
    assert cache.has({"vcpus": 599})


@pytest.mark.parametrize("platform", [Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP])
def test_a_host_is_asked_for_its_platforms(tmp_path: Path, platform: Platform) -> None:
    word = platform.value.replace("-", "_")
    check_host(Platform.NATIVE, tmp_path)
    with pytest.raises(RefusedError, match=f"cannot launch {platform} guests: the device is miss"):
        check_host(platform, tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/sev").touch()
    check_host(platform, tmp_path)  # no kvm_amd: another KVM may do it
    parameters = tmp_path / "sys/module/kvm_amd/parameters"
    parameters.mkdir(parents=True)
    for value in ("Y\n", "1\n"):
        (parameters / word).write_text(value)
        check_host(platform, tmp_path)
    for value in ("N\n", "0\n"):
        (parameters / word).write_text(value)
        with pytest.raises(RefusedError, match=f"KVM has {word}={value[0]}"):
            check_host(platform, tmp_path)


def front(directory: Path, python: str, shell: str = "sh") -> Path:
    path = directory / "igvmfw"
    text = FRONT.read_text().replace("python=/usr/bin/python3", f"python={python}")
    path.write_text(text.replace("#!/bin/sh", f"#!/usr/bin/env {shell}"))
    path.chmod(0o755)
    return path


def call(hook: Path, xml: bytes, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [hook, *words], input=xml, capture_output=True, check=False, env={}, timeout=60, cwd="/"
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


OWN = f"<domain><metadata><i:domain xmlns:i='{NAMESPACE}'/></metadata></domain>".encode()


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    (tmp_path / "hooks/qemu.d").mkdir(parents=True)
    broken = front(tmp_path / "hooks/qemu.d", "/nowhere/python3")
    words = ("guest", "prepare", "begin", "-")
    code, _, err = call(broken, OWN, *words)
    off = tmp_path / "hooks/igvmfw.off"
    assert code == 1
    assert f"touch {off} has domains started unchecked" in err
    off.touch()
    assert call(broken, OWN, *words) == (0, "", "")


@pytest.mark.parametrize("suffix", [".rpmsave", ".rpmnew", ".dpkg-old", ".dpkg-dist", "~"])
def test_what_is_put_aside_of_it_stops_nothing(tmp_path: Path, suffix: str) -> None:
    """libvirt runs whatever is executable in the directory."""
    broken = front(tmp_path, "/nowhere/python3")
    aside = broken.rename(f"{broken}{suffix}")
    assert call(aside, OWN, "guest", "prepare", "begin", "-") == (0, "", "")


@pytest.mark.parametrize(
    "operation",
    ["start", "started", "stopped", "release", "migrate", "restore", "reconnect", "attach"],
)
def test_only_a_start_is_ever_stopped(tmp_path: Path, operation: str) -> None:
    broken = front(tmp_path, "/nowhere/python3")
    assert call(broken, OWN, "guest", operation, "begin", "-") == (0, "", "")
    code, out, err = call(broken, OWN, "guest", "prepare", "begin", "-")
    assert (code, out) == (1, "")
    assert err.startswith("igvmfw: error: cannot check the IGVM firmware of guest: ")
    assert "/nowhere/python3: " in err
    assert err.count("\n") == 1
    # nor by the module itself
    words = [sys.executable, "-I", "-m", "igvmfw.hook", "guest", operation, "begin", "-"]
    done = subprocess.run(words, input=b"<", capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
@pytest.mark.parametrize("quote", ["'", '"'])
def test_the_shell_knows_igvmfws_domains(tmp_path: Path, quote: str, shell: str) -> None:
    need(shutil.which(shell) is not None, shell)
    broken = front(tmp_path, "/bin/false", shell)
    own = OWN.replace(b"'", quote.encode())
    assert call(broken, own, "guest", "prepare", "begin", "-")[0] == 1
    others = [
        f"<domain><title>{NAMESPACE}, xmlns=&apos;{NAMESPACE}&apos;</title></domain>",
        f"<domain><metadata><i:domain xmlns:i='{NAMESPACE}0'/></metadata></domain>",
        domains.EFI,
        "",
    ]
    for other in others:
        assert call(broken, other.encode(), "guest", "prepare", "begin", "-") == (0, "", "")


def test_the_whole_way_to_a_verdict(tmp_path: Path) -> None:
    hook = front(tmp_path, sys.executable)
    xml = rewritten(tmp_path, samples.small()).write()
    assert call(hook, xml, "guest", "prepare", "begin", "-") == (0, "", "")
    file = tmp_path / "firmware.igvm"
    file.unlink()
    code, out, err = call(hook, xml, "guest", "prepare", "begin", "-")
    assert (code, out) == (1, "")
    assert (
        err == f"igvmfw: error: {file}: cannot read: No such file or directory (check the path)\n"
    )


def test_a_failure_of_its_own_is_said_in_one_line(tmp_path: Path) -> None:
    site = tmp_path / "site"
    program = (
        "import sys\n"
        "from igvmfw import hook, preflight\n"
        "def fail(*arguments, **options): raise KeyError('one\\ntwo')\n"
        "preflight.check_start = fail\n"
        "sys.exit(hook.main(['guest', 'prepare', 'begin', '-']))\n"
    )
    site.write_text(program)
    done = subprocess.run(
        [sys.executable, site], input=OWN, capture_output=True, check=False, timeout=60
    )
    said = done.stderr.decode()
    assert done.returncode == 70
    assert said.startswith("igvmfw: error: cannot check the IGVM firmware of guest: KeyError: ")
    assert said.count("\n") == 1
    assert "touch /etc/libvirt/hooks/igvmfw.off has domains started unchecked" in said


def test_the_hook_never_loads_libvirt(tmp_path: Path) -> None:
    xml = rewritten(tmp_path, samples.small()).write()
    program = (
        "import sys, igvmfw.hook\n"
        "code = igvmfw.hook.main(['guest', 'prepare', 'begin', '-'])\n"
        "print(code, sorted({'libvirt', 'jsonschema', 'rich'} & set(sys.modules)))\n"
    )
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, input=xml, capture_output=True, check=True, timeout=60)
    assert done.stdout == b"0 []\n", done.stderr
