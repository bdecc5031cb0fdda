"""describe, validate, install, uninstall and refresh as they are typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from igvmfw.qemu.descriptor import Descriptor
from tests.cli.commands import Run, checked, file_in, one_line, put
from tests.igvm import samples


def files_below(path: Path) -> set[Path]:
    return {found for found in path.rglob("*") if found.is_file()}


# describe


def test_describe_prints_a_valid_descriptor(run: Run, root: Path) -> None:
    code, out, err = run("describe", file_in(root))
    assert (code, err) == (0, "")
    checked(out, "firmware-igvmfw")
    descriptor = Descriptor.parse(out.encode())
    assert descriptor.mapping.filename == str(file_in(root))
    assert descriptor.features == ("amd-sev", "amd-sev-es")
    assert descriptor.description == "OVMF for plain, SEV and SEV-ES guests"


def test_describe_is_reproducible(run: Run, root: Path) -> None:
    first = run("describe", "--root", root, file_in(root))
    os.utime(file_in(root), ns=(5, 5))
    assert run("describe", "--root", root, file_in(root)) == first


def test_describe_names_the_path_inside_the_root(run: Run, root: Path) -> None:
    _, out, _ = run("describe", "--root", root, file_in(root))
    assert json.loads(out)["mapping"]["filename"] == "/usr/share/igvm/ovmf-sev.igvm"


def test_describe_takes_what_is_stated_and_explains(run: Run, root: Path) -> None:
    code, out, err = run(
        "describe", "--explain", "--profile", "upstream", "--feature", "secure-boot",
        "--feature", "requires-smm", "--machine", "pc-q35-*", "--interface", "uefi",
        "--description", "mine", file_in(root),
    )  # fmt: skip
    assert code == 0
    document = checked(out, "firmware-10.1")
    assert document["description"] == "mine"
    assert document["features"] == ["amd-sev", "amd-sev-es", "requires-smm", "secure-boot"]
    assert document["targets"][0]["machines"] == ["pc-q35-*"]
    lines = dict(line.split("  ", 1) for line in err.splitlines())
    assert lines["secure-boot"].strip() == "stated"
    assert "platform sev" in lines["amd-sev".ljust(12)[:7]]


def test_describe_writes_files(run: Run, root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    assert run("describe", file_in(root), "-o", output)[:2] == (0, "")
    assert Descriptor.parse(output.read_bytes()).interface_types == ("uefi",)
    other = root / "usr/share/igvm/b.igvm"
    other.write_bytes(file_in(root).read_bytes())
    directory = tmp_path / "many"
    directory.mkdir()
    assert run("describe", file_in(root), other, "-o", directory, "--priority", "7")[0] == 0
    assert {p.name for p in files_below(directory)} == {"07-ovmf-sev.json", "07-b.json"}


def test_describe_refuses_before_it_writes_anything(run: Run, root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "many"
    (directory / "x").mkdir(parents=True)
    bad = root / "bad.igvm"
    bad.write_bytes(b"IGVM")
    code, out, err = run("describe", file_in(root), bad, "-o", directory)
    assert (code, out) == (3, "")
    one_line(err, bad)
    assert files_below(directory) == set()
    same = directory / "x/ovmf-sev.igvm"
    same.write_bytes(file_in(root).read_bytes())
    code, _, err = run("describe", file_in(root), same, "-o", directory)
    assert code == 2
    one_line(err, "both become")
    code, _, err = run("describe", file_in(root), same)
    assert code == 2
    one_line(err, "-o DIRECTORY")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--feature", "fast"), 2, "unknown feature 'fast'"),
        (("--feature", "vtpm", "--profile", "upstream"), 2, "unknown feature 'vtpm'"),
        (("--machine", "microvm"), 2, "takes no IGVM file"),
        (("--interface", "efi"), 2, "unknown interface type"),
        (("--profile", "mine"), 2, "--profile"),
        (("--priority", "100"), 2, "not a number within 0 to 99"),
        (("--root", "/nowhere"), 3, "/nowhere: is no directory"),
        (("--root", "/usr"), 3, "is not below the root /usr"),
    ],
)
def test_describe_with_wrong_words(
    run: Run, root: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    found, out, err = run("describe", *words, file_in(root))
    assert (found, out) == (code, "")
    one_line(err, message)


def test_describe_asks_for_the_interface(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bare.igvm"
    path.write_bytes(samples.small())
    code, _, err = run("describe", path)
    assert code == 2
    one_line(err, path, "--interface")
    assert run("describe", "--interface", "bios", path)[0] == 0
    path.write_bytes(samples.cca())
    code, _, err = run("describe", path)
    assert code == 1
    one_line(err, "AARCH64")


# validate


def test_validate_says_yes(run: Run, tmp_path: Path) -> None:
    path = put(tmp_path / "a.json")
    for words in ((), ("--profile", "upstream"), ("--qemu", "10.1")):
        assert run("validate", *words, path) == (0, f"{path}: valid\n", "")


def test_validate_says_no_with_every_reason(run: Run, tmp_path: Path) -> None:
    good, bad = put(tmp_path / "a.json"), put(tmp_path / "b.json", features=["a"], odd=1)
    code, out, err = run("validate", good, bad)
    assert (code, err) == (1, "")
    assert out.splitlines()[0] == f"{good}: valid"
    assert any(
        line.startswith(f"{bad}: features[0]: 'a' is not one of") for line in out.split("\n")
    )
    assert "'odd' was unexpected" in out
    code, out, _ = run("validate", "--json", good, bad)
    assert code == 1
    document = checked(out, "validate")
    assert [found["valid"] for found in document["descriptors"]] == [True, False]
    assert document["descriptors"][1]["violations"][1]["where"] == "features[0]"


def test_validate_goes_by_the_release(run: Run, tmp_path: Path) -> None:
    mapping = {"device": "memory", "filename": "/f", "uefi-vars": {"template": "/v"}}
    path = put(tmp_path / "a.json", mapping=mapping, features=["host-uefi-vars"])
    assert run("validate", "--qemu", "10.2", path)[0] == 1
    assert run("validate", "--qemu", "11.0", path)[0] == 0
    assert run("validate", "--qemu", "9.0", path)[0] == 2


def test_validate_reads_standard_input(root: Path) -> None:
    command = [sys.executable, "-m", "igvmfw"]
    described = subprocess.run(
        [*command, "describe", file_in(root)], check=True, capture_output=True
    )
    judged = subprocess.run(
        [*command, "validate", "--profile", "upstream", "-"],
        check=False,
        capture_output=True,
        input=described.stdout,
    )
    assert (judged.returncode, judged.stdout, judged.stderr) == (0, b"-: valid\n", b"")


# install and uninstall


def test_install_list_uninstall(run: Run, root: Path) -> None:
    code, out, err = run("install", "--root", root, file_in(root))
    path = root / "etc/qemu/firmware/65-ovmf-sev.json"
    assert (code, out, err) == (0, f"written    {path}  (new)\n", "")
    document = checked(path.read_text(), "firmware-igvmfw")
    assert document["mapping"] == {"device": "igvm", "filename": "/usr/share/igvm/ovmf-sev.igvm"}
    assert run("install", "--root", root, file_in(root))[1].startswith("unchanged")

    code, out, err = run("list", "--root", root)
    assert (code, err) == (0, "")
    heading, row = out.splitlines()
    assert heading.split() == ["NAME", "PLATFORMS", "FEATURES", "PAYLOAD", "FILE", "STATE"]
    assert row.split() == [
        "65-ovmf-sev.json", "native,sev,sev-es", "amd-sev,amd-sev-es", "OVMF", "(UEFI)",
        "/usr/share/igvm/ovmf-sev.igvm", "present",
    ]  # fmt: skip

    code, out, err = run("uninstall", "--root", root, "ovmf-sev")
    assert (code, out, err) == (0, f"removed    {path}  (written by igvmfw)\n", "")
    assert files_below(root) == {file_in(root)}


def test_install_levels_names_and_dry_run(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/me/.config")
    before = files_below(root)
    code, out, _ = run("install", "--root", root, "--dry-run", "--vendor", file_in(root))
    assert code == 0
    assert out.startswith("would be written  ")
    assert files_below(root) == before
    assert {path.name for path in root.iterdir()} == {"usr"}
    run("install", "--root", root, "--vendor", file_in(root))
    run("install", "--root", root, "--user", "--name", "mine", file_in(root))
    run("install", "--root", root, "--priority", "3", file_in(root))
    assert files_below(root) - before == {
        root / "usr/share/qemu/firmware/70-ovmf-sev.json",
        root / "home/me/.config/qemu/firmware/65-mine.json",
        root / "etc/qemu/firmware/03-ovmf-sev.json",
    }
    _, out, _ = run("list", "--root", root, "--user")
    order = [line.split()[0] for line in out.splitlines()[1:]]
    assert order == ["03-ovmf-sev.json", "65-mine.json", "70-ovmf-sev.json"]
    _, out, _ = run("list", "--root", root, "--system")
    assert "65-mine.json" not in out


def test_install_speaks_json(run: Run, root: Path) -> None:
    _, out, _ = run("install", "--json", "--root", root, file_in(root))
    document = checked(out, "install")
    assert document["actions"][0]["action"] == "write"
    _, out, _ = run("uninstall", "--json", "--dry-run", "--root", root, file_in(root))
    assert checked(out, "install")["dry_run"] is True
    _, out, _ = run("refresh", "--json", "--root", root)
    assert checked(out, "install")["actions"][0]["reason"].endswith("is new")


def test_install_all_or_nothing(run: Run, root: Path) -> None:
    other = root / "usr/share/igvm/b.igvm"
    other.write_bytes(file_in(root).read_bytes())
    taken = root / "etc/qemu/firmware/65-b.json"
    taken.parent.mkdir(parents=True)
    taken.write_text("mine")
    code, out, err = run("install", "--root", root, file_in(root), other)
    assert (code, out) == (1, "")
    one_line(err, taken, "is not a descriptor that igvmfw wrote", "--name")
    assert taken.read_text() == "mine"
    assert [path.name for path in taken.parent.iterdir()] == ["65-b.json"]
    code, _, err = run("install", "--root", root, "--name", "x", file_in(root), other)
    assert code == 2
    one_line(err, "--name is for one FILE")


def test_install_beside_an_old_libvirt(run: Run, root: Path) -> None:
    library = root / "usr/lib64/libvirt.so.0.9000.0"
    library.parent.mkdir()
    library.touch()
    code, _, err = run("install", "--root", root, file_in(root))
    assert code == 0
    assert "libvirt 9.0.0" in err
    assert (root / "etc/igvmfw/firmware/65-ovmf-sev.json").is_file()
    assert run("list", "--root", root)[::2] == (0, "")
    assert run("uninstall", "--root", root, "ovmf-sev")[0] == 0
    run("install", "--into", "qemu", "--root", root, file_in(root))
    code, out, err = run("list", "--root", root)
    assert (code, "65-ovmf-sev.json" in out) == (0, True)
    assert "libvirt 9.0.0 finds no firmware at all" in err


def test_install_warns_of_what_overrides_it(run: Run, root: Path) -> None:
    mask = root / "etc/qemu/firmware/70-ovmf-sev.json"
    mask.parent.mkdir(parents=True)
    mask.touch()
    code, _, err = run("install", "--vendor", "--root", root, file_in(root))
    assert code == 0
    assert f"{mask} is more specific" in err


def test_uninstall_keeps_what_is_not_igvmfws(run: Run, root: Path) -> None:
    run("install", "--root", root, file_in(root))
    path = root / "etc/qemu/firmware/65-ovmf-sev.json"
    edited = path.read_bytes().replace(b"OVMF for", b"Edited for")
    path.write_bytes(edited)
    code, out, err = run("uninstall", "--root", root, path)
    assert (code, err) == (1, "")
    assert out == f"kept       {path}  (was edited since igvmfw wrote it)\n"
    assert path.read_bytes() == edited
    code, _, err = run("uninstall", "--root", root, "nothing")
    assert code == 3
    one_line(err, "nothing", "no descriptor")


# refresh


def test_a_missing_file_is_named_once_and_as_it_was(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("describe", "install"):
        code, _, err = run(command, "absent.igvm")
        assert code == 3
        assert err.startswith("igvmfw: error: absent.igvm: cannot read: No such file")


def test_a_name_may_end_as_a_descriptors_does(run: Run, root: Path) -> None:
    code, out, _ = run("install", "--root", root, "--name", "ours.json", file_in(root))
    assert code == 0
    assert "/65-ours.json " in out


def test_refresh(run: Run, root: Path) -> None:
    code, out, err = run("refresh", "--root", root)
    path = root / "usr/share/qemu/firmware/70-igvm-ovmf-sev.json"
    reason = "/usr/share/igvm/ovmf-sev.igvm is new"
    assert (code, out, err) == (0, f"written    {path}  ({reason})\n", "")
    assert run("refresh", "--root", root)[1].startswith(f"unchanged  {path}  (")
    assert run("refresh", "--quiet", "--root", root) == (0, "", "")  # only what changed
    document = checked(run("refresh", "--quiet", "--json", "--root", root)[1], "install")
    assert [action["action"] for action in document["actions"]] == ["unchanged"]
    file_in(root).write_bytes(file_in(root).read_bytes()[:-4096])
    code, out, err = run("refresh", "--root", root)
    assert code == 3
    assert out.startswith("removed ")
    assert err.startswith(f"igvmfw: warning: {file_in(root)}: ")
    file_in(root).unlink()
    assert run("refresh", "--root", root) == (0, "", "")
    assert files_below(root) == set()


def test_refresh_takes_directories(run: Run, root: Path) -> None:
    assert run("refresh", "--root", root, root / "usr/share/igvm")[0] == 0
    code, _, err = run("refresh", "--root", root, root / "nowhere")
    assert code == 3
    one_line(err, "nowhere", "is no directory")


def test_refresh_removes_what_it_wrote(run: Run, root: Path) -> None:
    assert run("refresh", "--root", root)[0] == 0
    path = root / "usr/share/qemu/firmware/70-igvm-ovmf-sev.json"
    code, out, err = run("refresh", "--root", root, "--remove")
    assert (code, out, err) == (0, f"removed    {path}  (written by refresh)\n", "")
    assert files_below(root) == {file_in(root)}
    code, _, err = run("refresh", "--root", root, "--remove", root)
    assert code == 2
    one_line(err, "--remove goes with neither")


def test_refresh_goes_on_with_what_it_cannot_describe(run: Run, root: Path) -> None:
    (root / "usr/share/igvm/bare.igvm").write_bytes(samples.small())
    code, out, err = run("refresh", "--root", root)
    assert code == 0
    assert out.startswith("written ")
    assert "bare.igvm" in err
    assert "--interface" in err


def hostile(directory: Path, wrapped: bytes) -> dict[str, Path]:
    contents = {
        "empty": b"",
        "text": b"hello\n" * 100,
        "truncated": wrapped[:3000],
        "damaged": wrapped[:200] + bytes([wrapped[200] ^ 0xFF]) + wrapped[201:],
        "nested": b"[" * 300_000,
        "binary": bytes(range(256)) * 20,
        "escape": b'{"\x1b]0;evil\x07": \x1b[2J',
        "huge": b" " * (3 << 20),
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = directory / name
        paths[name].write_bytes(content)
    paths["missing"] = directory / "missing"
    paths["directory"] = directory / "directory"
    paths["directory"].mkdir()
    paths["fifo"] = directory / "fifo"
    os.mkfifo(paths["fifo"])
    paths["dangling"] = directory / "dangling"
    paths["dangling"].symlink_to("/nowhere")
    paths["null"] = Path("/dev/null")
    return paths


@pytest.mark.parametrize("command", ["describe", "install", "validate", "list --for"])
def test_hostile_input(run: Run, root: Path, wrapped: bytes, command: str) -> None:
    directory = root / "hostile"
    directory.mkdir()
    for name, path in hostile(directory, wrapped).items():
        before = files_below(root)
        words = [*command.split(), path]
        if command != "validate" and path.is_relative_to(root):
            words += ["--root", root]
        code, out, err = run(*words)
        assert code == 3, (name, out, err)
        assert out == ""
        one_line(err, path)
        assert "\x1b" not in err
        assert files_below(root) == before


@pytest.mark.parametrize("command", ["describe", "install", "validate", "list --for"])
def test_unreadable_input(run: Run, tmp_path: Path, command: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    for directory in tmp_path.parents:
        if directory.name.startswith("pytest"):
            directory.chmod(0o755)
    from tests.privilege import without_privilege

    tmp_path.chmod(0o755)
    with without_privilege():
        code, out, err = run(*command.split(), path)
    assert (code, out) == (3, "")
    one_line(err, path, "Permission denied")


def test_hostile_names_reach_no_terminal(run: Run, root: Path) -> None:
    system = root / "etc/qemu/firmware"
    system.mkdir(parents=True)
    put(
        system / "50-\x1b[31mred.json",
        features=["\x1b]0;title\x07"],
        mapping={"device": "igvm", "filename": "/\x1b[2J\n\u202e.igvm"},
    )
    (system / "60-\x1b.json").write_text("{")
    for words in (("list",), ("list", "--all"), ("list", "--json")):
        _, out, err = run(*words, "--root", root)
        assert "\x1b" not in out + err
        assert "\u202e" not in out + err


@pytest.mark.parametrize("where", ["missing/out.json", "full"])
def test_results_that_cannot_be_written(run: Run, root: Path, where: str) -> None:
    output = Path("/dev/full/out.json") if where == "full" else root / where
    code, out, err = run("describe", file_in(root), "-o", output)
    assert (code, out) == (4, "")
    one_line(err, output, "cannot write")
