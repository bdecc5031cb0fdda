import json
import os
import re
import tempfile
from pathlib import Path

import pytest

from igvmfw.qemu.catalog import (
    Catalog,
    Entry,
    State,
    Wanted,
    glob_matches,
    load,
    match,
    match_descriptor,
    search_path,
)
from igvmfw.qemu.descriptor import Descriptor
from tests.parts import need
from tests.privilege import without_privilege
from tests.qemu.test_descriptor import igvm_document
from tests.sources import libvirt_source

VENDOR, SYSTEM = "usr/share/qemu/firmware", "etc/qemu/firmware"
USER = "home/user/.config/qemu/firmware"
FLASH = {
    "device": "flash",
    "executable": {"filename": "/usr/share/code.fd", "format": "raw"},
    "nvram-template": {"filename": "/usr/share/vars.fd", "format": "raw"},
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/user/.config")
    return tmp_path


def put(root: Path, directory: str, name: str, content: str | bytes | None = None) -> Path:
    """A descriptor file; without content, one whose description is its place."""
    path = root / directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        content = json.dumps({**igvm_document(), "description": f"{directory}/{name}"})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def catalog(root: Path, *, user: bool = True) -> Catalog:
    return load(search_path(root, user=user), root)


def states(found: Catalog, root: Path) -> list[tuple[str, str]]:
    return [(str(entry.path.relative_to(root)), entry.state.value) for entry in found.entries]


def test_the_search_path_is_firmware_jsons(monkeypatch: pytest.MonkeyPatch) -> None:
    def qemus(root: str = "/", *, user: bool) -> list[str]:
        path = search_path(Path(root), user=user)
        assert [p.parts[-2:] for p in path[1::2]] == [("igvmfw", "firmware")] * (len(path) // 2)
        assert [p.parents[1] for p in path[::2]] == [p.parents[1] for p in path[1::2]]
        return [str(directory) for directory in path[::2]]

    monkeypatch.setenv("XDG_CONFIG_HOME", "/x/config")
    monkeypatch.setenv("HOME", "/home/me")
    system = ["/etc/qemu/firmware", "/usr/share/qemu/firmware"]
    assert qemus(user=False) == system
    assert qemus(user=True) == ["/x/config/qemu/firmware", *system]
    for not_absolute in ("", "config"):
        monkeypatch.setenv("XDG_CONFIG_HOME", not_absolute)
        assert qemus(user=True)[0] == "/home/me/.config/qemu/firmware"
    assert qemus("/mnt", user=True)[0] == "/mnt/home/me/.config/qemu/firmware"
    assert qemus("/mnt", user=True)[2] == "/mnt/usr/share/qemu/firmware"


def test_igvmfws_own_directories_rank_below_qemus_of_the_same_level(root: Path) -> None:
    put(root, "etc/igvmfw/firmware", "50-x.json")
    put(root, VENDOR, "50-x.json")
    put(root, SYSTEM, "60-y.json")
    put(root, "etc/igvmfw/firmware", "60-y.json")
    assert states(catalog(root), root) == [
        ("etc/igvmfw/firmware/50-x.json", "available"),
        (f"{VENDOR}/50-x.json", "shadowed"),
        (f"{SYSTEM}/60-y.json", "available"),
        ("etc/igvmfw/firmware/60-y.json", "shadowed"),
    ]


def test_sorting_is_by_name_across_directories(root: Path) -> None:
    for directory, name in [
        (VENDOR, "50-b.json"),
        (VENDOR, "9-late.json"),
        (SYSTEM, "40-a.json"),
        (USER, "60-c.json"),
        (VENDOR, "50-B.json"),
    ]:
        put(root, directory, name)
    assert [entry.name for entry in catalog(root).available] == [
        "40-a.json",
        "50-B.json",
        "50-b.json",
        "60-c.json",
        "9-late.json",
    ]


def test_the_more_specific_file_takes_effect(root: Path) -> None:
    for directory in (VENDOR, SYSTEM, USER):
        put(root, directory, "50-x.json")
    found = catalog(root)
    assert states(found, root) == [
        (f"{USER}/50-x.json", "available"),
        (f"{SYSTEM}/50-x.json", "shadowed"),
        (f"{VENDOR}/50-x.json", "shadowed"),
    ]
    assert found.entries[2].overridden_by == root / USER / "50-x.json"
    chosen = found.find("50-x.json")
    assert chosen is not None
    assert chosen.descriptor is not None
    assert chosen.descriptor.description == f"{USER}/50-x.json"
    assert states(catalog(root, user=False), root)[0] == (f"{SYSTEM}/50-x.json", "available")


def test_an_empty_file_masks_the_less_specific_ones(root: Path) -> None:
    put(root, VENDOR, "50-x.json")
    put(root, SYSTEM, "50-x.json", "")
    put(root, USER, "51-y.json", "")
    found = catalog(root)
    assert states(found, root) == [
        (f"{SYSTEM}/50-x.json", "mask"),
        (f"{VENDOR}/50-x.json", "masked"),
        (f"{USER}/51-y.json", "mask"),
    ]
    assert found.available == ()
    assert found.find("50-x.json") is None


def test_a_more_specific_file_reaches_over_a_mask(root: Path) -> None:
    put(root, VENDOR, "50-x.json")
    put(root, SYSTEM, "50-x.json", "")
    put(root, USER, "50-x.json")
    assert [state for _, state in states(catalog(root), root)] == [
        "available",
        "shadowed",
        "shadowed",
    ]


def test_a_broken_descriptor_is_named_and_hides_no_other(root: Path) -> None:
    put(root, SYSTEM, "10-damaged.json", '{"description": "cut off')
    put(root, SYSTEM, "20-nested.json", "[" * 100_000)
    put(root, SYSTEM, "30-huge.json", b" " * (2 << 20))
    put(root, SYSTEM, "40-other.json", '{"targets": []}')
    put(root, VENDOR, "50-fine.json")
    found = catalog(root)
    assert [entry.name for entry in found.available] == ["50-fine.json"]
    broken = [entry for entry in found.entries if entry.state is State.BROKEN]
    assert len(broken) == 4
    for entry in broken:
        assert entry.error is not None
        assert entry.error.where is not None
        assert entry.error.where.startswith(str(entry.path))


def test_a_damaged_file_still_stands_for_its_name(root: Path) -> None:
    put(root, SYSTEM, "50-x.json", "{")
    put(root, VENDOR, "50-x.json")
    assert states(catalog(root), root) == [
        (f"{SYSTEM}/50-x.json", "broken"),
        (f"{VENDOR}/50-x.json", "shadowed"),
    ]


def test_what_is_no_file_takes_no_effect(root: Path) -> None:
    for name in ("10-dir.json", "20-link.json", "30-loop.json", "40-fifo.json", "50-null.json"):
        put(root, VENDOR, name)
    system = root / SYSTEM
    (system / "10-dir.json").mkdir(parents=True)
    (system / "20-link.json").symlink_to("/nowhere/at/all")
    (system / "30-loop.json").symlink_to("30-loop.json")
    os.mkfifo(system / "40-fifo.json")
    (system / "50-null.json").symlink_to("/dev/null")
    found = catalog(root)
    assert len(found.available) == 5
    assert all(entry.path.is_relative_to(root / VENDOR) for entry in found.available)
    errors = [str(entry.error) for entry in found.entries if entry.state is State.BROKEN]
    assert len(errors) == 5
    for expected in ("is a directory", "does not exist", "links form a loop", "not a regular"):
        assert any(expected in error for error in errors)


def test_links_are_followed_inside_the_root(root: Path) -> None:
    real = put(root, "opt/firmware", "real.json")
    (root / SYSTEM).mkdir(parents=True)
    (root / SYSTEM / "50-link.json").symlink_to("/opt/firmware/real.json")
    (root / "usr/share/qemu").mkdir(parents=True)
    (root / VENDOR).symlink_to("/opt/firmware")
    found = catalog(root)
    assert [entry.name for entry in found.available] == ["50-link.json", "real.json"]
    assert found.available[0].descriptor == Descriptor.parse(real.read_bytes())


def test_other_names_are_passed_over(root: Path) -> None:
    for name in (".50-x.json", "50-x.json~", "50-x.json.dpkg-new", "README"):
        put(root, SYSTEM, name)
    found = catalog(root)
    assert [(e.name, e.state) for e in found.entries] == [
        ("50-x.json.dpkg-new", State.IGNORED),
        ("50-x.json~", State.IGNORED),
        ("README", State.IGNORED),
    ]


def test_other_devices_are_told_apart(root: Path) -> None:
    put(root, VENDOR, "50-flash.json", json.dumps({**igvm_document(), "mapping": FLASH}))
    assert catalog(root).entries[0].state is State.OTHER_DEVICE


def test_missing_directories_are_no_problem_and_odd_ones_are_named(root: Path) -> None:
    assert catalog(root) == Catalog(entries=())
    put(root, "etc/qemu", "firmware", "a file where a directory belongs")
    put(root, VENDOR, "50-x.json")
    found = catalog(root)
    assert len(found.available) == 1
    assert [problem.where for problem in found.problems] == [str(root / SYSTEM)]


def test_unreadable_files_and_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/user/.config")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        put(root, SYSTEM, "10-secret.json").chmod(0)
        put(root, USER, "20-inside.json")
        put(root, VENDOR, "30-fine.json")
        (root / USER).chmod(0)
        with without_privilege():
            found = catalog(root)
        (root / USER).chmod(0o700)
        assert [(e.name, e.state.value) for e in found.entries] == [
            ("10-secret.json", "broken"),
            ("30-fine.json", "available"),
        ]
        assert "Permission denied" in str(found.entries[0].error)
        assert [str(p) for p in found.problems] == [
            f"{root}/{USER}: cannot read: Permission denied"
        ]


def test_order_is_what_libvirts_own_test_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    source = libvirt_source()
    need(source is not None, "libvirt's source package")
    assert source is not None
    text = (source / "tests/qemufirmwaretest.c").read_text()
    body = text[text.index("*expected[]", text.index("testFWPrecedence")) :].split("NULL")[0]
    expected = [
        {"SYSCONFDIR": "etc", "PREFIX": "usr"}.get(prefix, prefix) + path
        for prefix, path in re.findall(r'(SYSCONFDIR|PREFIX|)\s*"(/\S+\.json)"', body)
    ]
    assert len(expected) > 5
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/user/.config")
    tree = source / "tests/qemufirmwaredata"
    found = catalog(tree)
    # libvirt lists what takes effect before it parses
    effective = (State.AVAILABLE, State.OTHER_DEVICE, State.BROKEN)
    ours = [str(e.path.relative_to(tree)) for e in found.entries if e.state in effective]
    assert ours == expected


@pytest.mark.parametrize(
    ("glob", "text", "expected"),
    [
        ("pc-q35-*", "pc-q35-10.2", True),
        ("pc-q35-*", "pc-q35-", True),
        ("pc-q35-*", "pc-q35", False),
        ("pc-q35-1?.*", "pc-q35-10.2", True),
        ("pc-q35-1?.*", "pc-q35-9.2", False),
        ("*", "", True),
        ("", "", True),
        ("", "x", False),
        ("?", "", False),
        ("*a*b", "xaxbxb", True),
        ("*a*b", "xaxbxbx", False),
        ("pc-[iq]*", "pc-q35-2.4", False),
        ("pc-[iq]*", "pc-[iq]2", True),
    ],
)
def test_globs_are_glibs(glob: str, text: str, expected: bool) -> None:
    assert glob_matches(glob, text) is expected


def test_a_hostile_glob_takes_no_time() -> None:
    assert not glob_matches("*a" * 20_000, "a" * 200)


def wanted(machine: str | None = "pc-q35-10.2", **features: bool) -> Wanted:
    named = {name.replace("_", "-"): value for name, value in features.items()}
    return Wanted(architecture="x86_64", machine=machine, features=named)


def test_matching_keeps_every_reason() -> None:
    descriptor = Descriptor.from_dict(igvm_document())
    assert match_descriptor(descriptor, wanted(amd_sev_snp=True, secure_boot=False)) == ()
    assert match_descriptor(
        descriptor, wanted("pc-q35-10.2-virt", amd_sev=True, amd_sev_snp=False)
    ) == ("lacks the feature amd-sev", "has the feature amd-sev-snp, which the request excludes")
    assert match_descriptor(descriptor, wanted("microvm")) == (
        "takes the machine types pc-q35-*, pc-i440fx-*, not microvm",
    )
    other = Wanted(architecture="aarch64", machine="virt-9.0", features={})
    assert match_descriptor(descriptor, other) == ("is for x86_64, not aarch64",)
    flash = Descriptor.from_dict({**igvm_document(), "mapping": FLASH})
    assert match_descriptor(flash, wanted()) == (
        "describes firmware for device 'flash', not 'igvm'",
    )


@pytest.mark.parametrize(
    ("globs", "machine", "expected"),
    [
        (["pc-q35-*"], "q35", True),
        (["pc-*"], "q35", True),
        (["pc-i440fx-*"], "pc", True),
        (["pc-i440fx-*"], "q35", False),
        (["pc-q35-1?.*"], "q35", False),
        (["q35"], "q35", True),
        (["pc-i440fx-*"], None, True),
        ([], None, True),
        ([], "pc-q35-10.2", False),
    ],
)
def test_machine_aliases(globs: list[str], machine: str | None, expected: bool) -> None:
    targets = [{"architecture": "x86_64", "machines": globs}]
    descriptor = Descriptor.from_dict({**igvm_document(), "targets": targets})
    assert (match_descriptor(descriptor, wanted(machine)) == ()) is expected


def test_reasons_of_entries_that_take_no_effect(root: Path) -> None:
    put(root, SYSTEM, "10-broken.json", "{")
    put(root, SYSTEM, "20-mask.json", "")
    put(root, VENDOR, "20-mask.json")
    put(root, SYSTEM, "30-x.json.rpmnew")
    put(root, SYSTEM, "40-x.json")

    def reasons(entry: Entry) -> str:
        return "; ".join(match(entry, wanted()))

    found = [reasons(entry) for entry in catalog(root).entries]
    assert "not JSON" in found[0]
    assert "empty file" in found[1]
    assert f"masked by {root / SYSTEM}/20-mask.json" in found[2]
    assert "does not end in .json" in found[3]
    assert found[4] == ""
