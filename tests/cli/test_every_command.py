"""Every command that takes a file, with everything that can be wrong with it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from igvmfw.cli import COMMANDS, main

# how each command is given the file; the commands that take none stand below
TAKES: dict[str, Callable[[str, Path], list[str]]] = {
    "inspect": lambda file, tmp: [file],
    "check": lambda file, tmp: ["--qemu", "10.2", file],
    "measure": lambda file, tmp: [file],
    "wrap": lambda file, tmp: [file, "-o", str(tmp / "out")],
    "describe": lambda file, tmp: [file, "-o", str(tmp / "out")],
    "validate": lambda file, tmp: [file],
    "install": lambda file, tmp: ["--root", str(tmp / "root"), file],
    "rewrite": lambda file, tmp: [file, "-o", str(tmp / "out")],
    "restore": lambda file, tmp: [file, "-o", str(tmp / "out")],
    "define": lambda file, tmp: ["-c", f"qemu:///embed?root={tmp}/libvirt", file],
    "create": lambda file, tmp: ["-c", f"qemu:///embed?root={tmp}/libvirt", file],
}
TAKE_NONE = {
    "uninstall",
    "refresh",
    "list",
    "start",
    "edit",
    "dumpxml",
    "undefine",
    "verify",
    "doctor",
}

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "text": b"\x1b]0;title\x07 hello\n",
    "zeroes": bytes(100),
    "cut-igvm": b"IGVM\x02\0\0\0 \0\0\0",
    "cut-xml": b"<domain type='kvm'><name>x",
    "cut-json": b'{"description": "x", ',
    "utf-16": "<domain/>".encode("utf-16"),
    "deep": b"<a>" * 100_000,
}


def given(kind: str, tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir(exist_ok=True)
    path = folder / "input"
    if kind == "directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(folder / "nowhere")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes(CONTENTS[kind])
    return path


@pytest.mark.parametrize("kind", [*CONTENTS, "missing", "directory", "dangling", "loop", "fifo"])
@pytest.mark.parametrize("command", list(TAKES))
def test_bad_input_gets_a_clear_line_and_leaves_nothing(
    command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = given(kind, tmp_path)
    code = main([command, *TAKES[command](str(file), tmp_path)])
    out, err = capsys.readouterr()
    assert code == 3, err
    assert out == "" or command == "validate"
    last = (err or out).splitlines()[-1]
    assert "input" in last
    assert "Traceback" not in out + err
    assert "\x1b" not in out + err
    assert len(err.splitlines()) <= 1
    assert len(last) < 500
    left = {path.name for path in tmp_path.rglob("*")} - {"root", "input"}
    assert not left


def test_no_command_is_forgotten() -> None:
    assert {*TAKES} | TAKE_NONE >= {*COMMANDS}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_says_what_the_command_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert COMMANDS[command].help.split()[0] in capsys.readouterr().out.lower()
