"""Completion, as bash, zsh and fish themselves do it."""

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from igvmfw.cli import COMMANDS, main
from igvmfw.cli.completion import ANY, domains
from igvmfw.platforms import Platform
from tests.igvm import samples
from tests.parts import measured, need, need_libvirt

CHECKOUT = Path(__file__).parents[2]
SHELLS = ("bash", "zsh", "fish")
READY = "READY> "
EVERY = "\x14"  # Ctrl-T, bound to what inserts every candidate
BASH = f"""\
PS1='{READY}'; source $SCRIPTS/bash/igvmfw
bind '"\\C-t": insert-completions'; bind 'set bell-style none'
bind 'set enable-bracketed-paste off'
"""
ZSH = f"""\
PS1='{READY}'; unsetopt zle_bracketed_paste; unset zle_bracketed_paste; unsetopt beep
fpath=($SCRIPTS/zsh $fpath); autoload -Uz compinit; compinit -u -D
zle -C every complete-word _generic; bindkey '^T' every
zstyle ':completion:every:*' completer _all_matches _complete
zstyle ':completion:every:*' insert true
"""
DOMAINS = """\
<node xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>
  <domain type='test'><name>running</name><memory>1024</memory><os><type>hvm</type></os></domain>
  <domain type='test'><name>it's $off "1"</name><memory>1024</memory><os><type>hvm</type></os>
    <test:runstate>5</test:runstate></domain>
</node>
"""


class Desk:
    """A folder, and shells in it that complete igvmfw's command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "here"
        self.folder.mkdir()
        self.record = folder / "record"
        self.shells: dict[str, pexpect.spawn[str]] = {}
        scripts = folder / "scripts"
        subprocess.run(
            [sys.executable, CHECKOUT / "packaging/make-completion", scripts], check=True
        )
        # a program that completes as igvmfw does, and otherwise tells what it was called with
        program = folder / "bin" / "igvmfw"
        program.parent.mkdir()
        igvmfw = shlex.join([sys.executable, "-m", "igvmfw"])
        record = shlex.quote(str(self.record))
        program.write_text(
            f'#!/bin/sh\n[ -z "$_ARGCOMPLETE" ] || exec {igvmfw}\n'
            f"printf '%s\\0' \"$@\" >{record}.new && mv {record}.new {record}\n"
        )
        program.chmod(0o755)
        self.environment = measured() | {
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(CHECKOUT),
            "HOME": str(folder),
            "TERM": "dumb",
            "LC_ALL": "C.UTF-8",
            "SCRIPTS": str(scripts),
        }

    def typed(self, shell: str, keys: str) -> list[str]:
        """What igvmfw gets after somebody has pressed these keys, and Enter."""
        if shell not in self.shells:
            self.shells[shell] = self._start(shell)
        child = self.shells[shell]
        self.record.unlink(missing_ok=True)
        child.send(keys + "\r")
        child.expect_exact(READY)
        assert self.record.exists(), child.before
        return self.record.read_bytes().decode().split("\0")[:-1]

    def _start(self, shell: str) -> "pexpect.spawn[str]":
        need(shutil.which(shell) is not None, f"the shell {shell}")
        words, setup = {"bash": (["--norc", "--noprofile"], BASH), "zsh": (["-f"], ZSH)}[shell]
        file = Path(self.environment["SCRIPTS"]) / f"setup.{shell}"
        file.write_text(setup)
        child = pexpect.spawn(
            shell,
            [*words, "-i"],
            cwd=str(self.folder),
            env=self.environment | {"PS1": "FIRST> "},
            dimensions=(100, 4000),
            timeout=60,
            encoding="utf-8",
        )
        child.expect_exact("FIRST> ")
        child.sendline(f". {file}")
        child.expect_exact(READY)
        return child

    def close(self) -> None:
        for child in self.shells.values():
            child.close(force=True)

    def candidates(self, shell: str, line: str) -> set[str]:
        """What a shell offers for the last word of a line."""
        if shell != "fish":
            before = len(shlex.split(line)) - (1 if line.endswith(" ") else 2)
            return set(self.typed(shell, line + EVERY)[before:])
        need(shutil.which(shell) is not None, f"the shell {shell}")
        script = 'source $SCRIPTS/fish/igvmfw.fish; complete --do-complete "$LINE"'
        done = subprocess.run(
            [shell, "--no-config", "-c", script],
            cwd=self.folder,
            env=self.environment | {"LINE": line},
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=True,
        )
        return {offer.split("\t")[0] for offer in done.stdout.splitlines()}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_commands_and_options(desk: Desk, shell: str) -> None:
    assert desk.candidates(shell, "igvmfw ") == set(COMMANDS)
    assert desk.candidates(shell, "igvmfw un") == {"uninstall", "undefine"}
    assert desk.candidates(shell, "igvmfw start --p") == {"--paused"}
    assert desk.candidates(shell, "igvmfw wrap --v") == {"--vars", "--vcpus"}
    assert desk.candidates(shell, "igvmfw validate --profile ") == {"upstream", "igvmfw"}


@pytest.mark.parametrize("shell", SHELLS)
def test_files_of_the_kind_that_is_meant(desk: Desk, shell: str) -> None:
    for name in ("a.igvm", "b c.igvm", "a.xml", "a.json", "a.fd", "a.txt"):
        (desk.folder / name).touch()
    (desk.folder / "folder").mkdir()
    (desk.folder / "folder" / "d.igvm").touch()
    assert desk.candidates(shell, "igvmfw inspect ") == {"a.igvm", "b c.igvm", "folder/"}
    assert desk.candidates(shell, "igvmfw inspect folder/") == {"folder/d.igvm"}
    assert desk.candidates(shell, "igvmfw inspect a.t") == {"a.txt"}
    assert desk.candidates(shell, "igvmfw define ") == {"a.xml", "folder/"}
    assert desk.candidates(shell, "igvmfw rewrite --diff ") == {"a.xml", "folder/"}
    assert desk.candidates(shell, "igvmfw validate ") == {"a.json", "folder/"}
    assert desk.candidates(shell, "igvmfw wrap ") == {"a.fd", "folder/"}
    assert desk.candidates(shell, "igvmfw list --root ") == {"folder/"}


@pytest.mark.parametrize("shell", SHELLS)
def test_words_of_the_firmware_world(desk: Desk, shell: str) -> None:
    assert desk.candidates(shell, "igvmfw check x --platform ") == set(Platform)
    snp = desk.candidates(shell, "igvmfw wrap --platform sev-")
    assert snp == {"sev-es", "sev-snp"}
    assert desk.candidates(shell, "igvmfw list --feature amd-") == {
        "amd-sev",
        "amd-sev-es",
        "amd-sev-snp",
    }
    assert "pc-q35-*" in desk.candidates(shell, "igvmfw install --machine pc-q35")
    assert "uefi" in desk.candidates(shell, "igvmfw describe --interface u")
    assert "10.2" in desk.candidates(shell, "igvmfw check --qemu 10")
    assert desk.candidates(shell, "igvmfw inspect nowhere/") <= {"nowhere/"}
    assert "EPYC-Milan" in desk.candidates(shell, "igvmfw measure --cpu EPYC")
    assert "qemu:///system" in desk.candidates(shell, "igvmfw start -c q")


@pytest.mark.parametrize("shell", SHELLS)
def test_descriptors_that_are_installed(desk: Desk, shell: str) -> None:
    image = desk.folder / "ovmf.igvm"
    image.write_bytes(samples.small(Platform.SEV))
    root = desk.folder / "root"
    root.mkdir()
    (root / "fw.igvm").write_bytes(image.read_bytes())
    install: list[str | Path] = [sys.executable, "-m", "igvmfw", "install", "--interface", "uefi"]
    install += ["--root", root, root / "fw.igvm"]
    subprocess.run(install, check=True, env=desk.environment)
    foreign = root / "etc/qemu/firmware/60-edk2.json"
    installed = next(root.glob("etc/*/firmware/65-fw.json"))
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text(installed.read_text().replace("igvmfw-seal", "other"))
    line = "igvmfw uninstall --root root "
    assert desk.candidates(shell, line) == {"65-fw.json"}
    assert desk.candidates(shell, f"{line}f") == {"fw"}
    assert desk.candidates(shell, f"{line}root/f") == {"root/fw.igvm"}


@pytest.mark.parametrize("shell", SHELLS)
def test_domains_of_this_host(desk: Desk, shell: str) -> None:
    need_libvirt()
    (desk.folder / "node.xml").write_text(DOMAINS)
    uri = f"test://{desk.folder}/node.xml"
    off = 'it\'s $off "1"'
    assert desk.candidates(shell, f"igvmfw dumpxml -c {uri} ") == {"running", off}
    assert desk.candidates(shell, f"igvmfw start --connect {uri} ") == {off}
    assert desk.candidates(shell, f"igvmfw start --connect={uri} ") == {off}
    assert desk.candidates(shell, f"igvmfw verify -c {uri} ") == {"running"}


def test_domains_of_the_default_libvirt(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_libvirt()
    desk.environment["LIBVIRT_DEFAULT_URI"] = "test:///default"
    assert desk.candidates("fish", "igvmfw undefine ") == {"test"}
    # as libvirt.conf has it for a user who is not root
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    monkeypatch.delenv("VIRSH_DEFAULT_CONNECT_URI", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "libvirt").mkdir()
    written = '#uri_default = "qemu+ssh://host/system"\nuri_default = "test:///default"\n'
    (tmp_path / "libvirt" / "libvirt.conf").write_text(written)
    assert [*domains(ANY)("", argparse.Namespace())] == ["test"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_what_is_typed_arrives(desk: Desk, shell: str) -> None:
    """Tab completes, and the shell reads back what it completed as one word."""
    (desk.folder / "b c.igvm").touch()
    (desk.folder / "folder").mkdir()
    assert desk.typed(shell, "igvmfw insp\t b\t --j\t") == ["inspect", "b c.igvm", "--json"]
    assert desk.typed(shell, 'igvmfw inspect "b\t') == ["inspect", "b c.igvm"]
    assert desk.typed(shell, "igvmfw inst\t --machine pc-q35-\\*\t f\t") == [
        "install",
        "--machine",
        "pc-q35-*",
        "folder/",
    ]
    assert desk.typed(shell, "igvmfw rewrite --igvm=b\t") == ["rewrite", "--igvm=b c.igvm"]
    if shell == "bash":
        assert desk.typed(shell, "igvmfw start -c qemu:///sy\t") == [
            "start",
            "-c",
            "qemu:///system",
        ]


@pytest.mark.parametrize(
    "server",
    ["silent", "nobody"],
)
def test_a_daemon_that_does_not_answer_is_given_up(desk: Desk, server: str, tmp_path: Path) -> None:
    need_libvirt()
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        if server == "silent":
            listener.listen()
        uri = f"qemu+unix:///system?socket={path}"
        assert desk.candidates("fish", f"igvmfw start -c {uri} ") == set()


@pytest.mark.parametrize("uri", ["qemu+ssh://host/system", "qemu+tcp://[::1]/system", "an-alias"])
def test_no_other_host_is_asked(desk: Desk, uri: str) -> None:
    ssh = Path(desk.environment["PATH"].split(":")[0]) / "ssh"
    called = desk.folder / "called"
    ssh.write_text(f"#!/bin/sh\ntouch {called}\n")
    ssh.chmod(0o755)
    config = Path(desk.environment["HOME"]) / ".config/libvirt/libvirt.conf"
    config.parent.mkdir(parents=True)
    config.write_text('uri_aliases = ["an-alias=qemu+ssh://host/system"]\n')
    assert desk.candidates("fish", f"igvmfw start -c {uri} ") == set()
    desk.environment["LIBVIRT_DEFAULT_URI"] = uri
    assert desk.candidates("fish", "igvmfw start ") == set()
    assert not called.exists()


def test_the_embedded_driver_is_not_started(desk: Desk, tmp_path: Path) -> None:
    root = tmp_path / "v"
    assert desk.candidates("fish", f"igvmfw start -c qemu:///embed?root={root} ") == set()
    assert not root.exists()


def test_without_argcomplete_nothing_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert main(["list"]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "python3-argcomplete" in captured.err
