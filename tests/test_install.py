import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igvmfw import files
from igvmfw.errors import InputError, OutputError, RefusedError, UsageError
from igvmfw.install import (
    LOCK,
    Action,
    Into,
    Kind,
    Level,
    Place,
    carry_out,
    choose_place,
    file_name,
    find_installed,
    find_libvirt,
    locked,
    overriding,
    plan_install,
    plan_uninstall,
)
from igvmfw.provenance import (
    FileIdentity,
    Writer,
    described_file,
    find_writer,
    is_untouched,
    sealed,
)
from igvmfw.qemu.descriptor import Descriptor
from tests.killing import kills
from tests.parts import need_libvirt
from tests.privilege import without_privilege
from tests.qemu.test_descriptor import igvm_document


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return choose_place(Level.SYSTEM, root=tmp_path)


def descriptor(file: str = "/usr/share/igvm/a.igvm", **changes: object) -> Descriptor:
    document = igvm_document() | changes
    document["mapping"] = {"device": "igvm", "filename": file}
    return Descriptor.from_dict(document)


def install(place: Place, name: str, wanted: Descriptor) -> Action:
    with locked(place, create=True):
        action = plan_install(place, name, wanted)
        carry_out(place, [action])
    return action


def test_seals_hold_until_something_is_edited() -> None:
    plain = descriptor()
    assert not is_untouched(plain)
    assert find_writer(plain) is None
    ours = sealed(plain, Writer.REFRESH)
    assert is_untouched(ours)
    assert find_writer(ours) is Writer.REFRESH
    assert sealed(sealed(plain, Writer.INSTALL), Writer.REFRESH) == ours
    # a reader that formats it anew changes nothing
    assert is_untouched(Descriptor.parse(json.dumps(ours.to_dict(), indent=1).encode()))
    edits = [
        ours.replace(description="mine"),
        ours.replace(features=()),
        ours.replace(tags=(*ours.tags, "note")),
        ours.replace(extra={"x-note": 1}),
        ours.replace(tags=(*ours.tags, ours.tags[-1])),
    ]
    assert not any(is_untouched(edited) for edited in edits)


def test_the_identity_of_the_file_survives_in_a_tag(tmp_path: Path) -> None:
    path = tmp_path / "f.igvm"
    path.write_bytes(b"content")
    for info in (None, path.stat()):
        identity = FileIdentity.of(b"content", info)
        tagged = descriptor().replace(tags=("other", identity.tag()))
        assert described_file(tagged) == identity
        assert identity.looks_like(path.stat()) is (info is not None)
        if info is not None:
            assert f"ctime:{info.st_ctime_ns}" in identity.tag()
    assert described_file(descriptor()) is None
    assert described_file(descriptor().replace(tags=("igvmfw-file=sha256:xyz,size:1",))) is None


@pytest.mark.parametrize(
    ("stem", "priority", "name"),
    [
        ("ovmf-sev", 65, "65-ovmf-sev.json"),
        ("a b/c\nd", 5, "05-a-b-c-d.json"),
        ("ümlaut", 0, "00-mlaut.json"),
        ("../../etc/passwd", 99, "99-etc-passwd.json"),
        ("x" * 500, 50, f"50-{'x' * 120}.json"),
    ],
)
def test_file_names(stem: str, priority: int, name: str) -> None:
    assert file_name(stem, priority) == name


@pytest.mark.parametrize(("stem", "priority"), [("x", 100), ("x", -1), ("...", 50), ("é", 50)])
def test_names_that_cannot_be(stem: str, priority: int) -> None:
    with pytest.raises(UsageError):
        file_name(stem, priority)


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/me/.config")
    places = {level: choose_place(level, root=tmp_path).directory for level in Level}
    assert places == {
        Level.USER: tmp_path / "home/me/.config/qemu/firmware",
        Level.SYSTEM: tmp_path / "etc/qemu/firmware",
        Level.VENDOR: tmp_path / "usr/share/qemu/firmware",
    }


@pytest.mark.parametrize(
    ("library", "version", "own"),
    [
        ("usr/lib/x86_64-linux-gnu/libvirt.so.0.9000.0", (9, 0, 0), True),
        ("usr/lib64/libvirt.so.0.10006.1", (10, 6, 1), True),
        ("usr/lib64/libvirt.so.0.10007.0", (10, 7, 0), False),
        ("lib/x86_64-linux-gnu/libvirt.so.0.12008.0", (12, 8, 0), False),
        ("usr/lib64/libvirt.so.0", None, False),
        ("usr/lib64/libvirt.so.0.nonsense", None, False),
    ],
)
def test_beside_an_old_libvirt_descriptors_go_where_only_igvmfw_looks(
    tmp_path: Path, library: str, version: tuple[int, int, int] | None, own: bool
) -> None:
    (tmp_path / library).parent.mkdir(parents=True)
    (tmp_path / library).touch()
    assert find_libvirt(tmp_path) == version
    place = choose_place(Level.SYSTEM, root=tmp_path)
    assert place.directory == tmp_path / ("etc/igvmfw/firmware" if own else "etc/qemu/firmware")
    assert (place.note is not None) is own
    for into, directory in ((Into.QEMU, "qemu"), (Into.IGVMFW, "igvmfw")):
        stated = choose_place(Level.SYSTEM, root=tmp_path, into=into)
        assert stated.directory == tmp_path / "etc" / directory / "firmware"
        assert stated.note is None


def test_the_libvirt_of_a_root_is_not_looked_for_outside(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    for debians in (outside / "lib/x86_64-linux-gnu", root / "usr/lib/x86_64-linux-gnu"):
        debians.mkdir(parents=True)
    (outside / "lib/libvirt.so.0.9000.0").touch()
    (outside / "lib/x86_64-linux-gnu/libvirt.so.0.9001.0").touch()
    (root / "lib").symlink_to(outside / "lib")
    (root / "usr/lib/i386-linux-gnu").symlink_to(outside / "lib/x86_64-linux-gnu")
    (root / "usr/lib64").symlink_to("lib64")  # a loop
    assert find_libvirt(root) is None
    # the root's own is found behind the same links
    own = Path(f"{root}{outside}/lib/x86_64-linux-gnu/libvirt.so.0.9002.0")
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_libvirt(root) == (9, 2, 0)


def test_find_libvirt_agrees_with_libvirt() -> None:
    libvirt = need_libvirt()
    number = libvirt.getVersion()
    version = (number // 1_000_000, number // 1000 % 1000, number % 1000)
    assert find_libvirt(Path("/")) == version


def test_install_update_uninstall(place: Place) -> None:
    path = place.directory / "65-a.json"
    assert install(place, "65-a.json", descriptor()).kind is Kind.WRITE
    installed = Descriptor.parse(path.read_bytes())
    assert installed.replace(tags=installed.tags[:-1]) == descriptor()
    assert path.stat().st_mode & 0o777 == 0o644
    before = path.stat()
    assert install(place, "65-a.json", descriptor()).kind is Kind.UNCHANGED
    assert path.stat() == before
    assert install(place, "65-a.json", descriptor(description="new")).kind is Kind.WRITE
    with locked(place, create=False):
        action = plan_uninstall(place, path)
        assert action.kind is Kind.REMOVE
        carry_out(place, [action])
    assert list(place.directory.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a descriptor that igvmfw wrote"),
        (b"{", "not a descriptor that igvmfw wrote"),
        (b"x" * (2 << 20), "cannot be read"),
        (descriptor().write(), "was not written by igvmfw"),
        (
            sealed(descriptor(), Writer.INSTALL).replace(description="mine").write(),
            "was edited since",
        ),
    ],
)
def test_what_is_not_igvmfws_is_never_touched(place: Place, content: bytes, why: str) -> None:
    place.directory.mkdir(parents=True)
    path = place.directory / "65-a.json"
    path.write_bytes(content)
    with pytest.raises(RefusedError, match=why):
        install(place, "65-a.json", descriptor())
    if "cannot be read" in why:
        with pytest.raises(RefusedError, match=why):
            plan_uninstall(place, path)
    else:
        action = plan_uninstall(place, path)
        assert action.kind is Kind.KEEP
        assert why in action.reason
        carry_out(place, [action])
    assert path.read_bytes() == content


@pytest.mark.parametrize("target", ["/nowhere", "directory"])
def test_links_and_directories_are_never_touched(place: Place, target: str) -> None:
    place.directory.mkdir(parents=True)
    path = place.directory / "65-a.json"
    if target == "directory":
        path.mkdir()
    else:
        path.symlink_to(target)
    with pytest.raises(RefusedError, match="so it is not touched"):
        install(place, "65-a.json", descriptor())
    assert path.is_symlink() or path.is_dir()


def test_a_name_that_describes_another_file_is_taken(place: Place) -> None:
    install(place, "65-a.json", descriptor("/one/a.igvm"))
    with pytest.raises(RefusedError, match="describes another file, /one/a"):
        install(place, "65-a.json", descriptor("/two/a.igvm"))


def test_other_firmware_is_not_overridden_by_accident(place: Place, tmp_path: Path) -> None:
    vendor = tmp_path / "usr/share/qemu/firmware/65-a.json"
    vendor.parent.mkdir(parents=True)
    vendor.write_bytes(descriptor("/other.igvm").write())
    with pytest.raises(RefusedError, match="would override"):
        install(place, "65-a.json", descriptor())
    vendor.write_bytes(descriptor().write())  # of the same file: this is what overriding is for
    assert install(place, "65-a.json", descriptor()).kind is Kind.WRITE


def test_what_overrides_a_new_descriptor_is_found(tmp_path: Path) -> None:
    vendor = choose_place(Level.VENDOR, root=tmp_path)
    assert overriding(vendor, "65-a.json") == ()
    mask = tmp_path / "etc/qemu/firmware/65-a.json"
    mask.parent.mkdir(parents=True)
    mask.touch()
    assert overriding(vendor, "65-a.json") == (mask,)


def test_finding_by_name_path_and_file(place: Place, tmp_path: Path) -> None:
    file = str(tmp_path / "usr/share/igvm/a.igvm")
    install(place, "65-a.json", descriptor())
    install(place, "66-b.json", descriptor())
    install(place, "67-c.json", descriptor("/else.igvm"))
    a, b = place.directory / "65-a.json", place.directory / "66-b.json"
    for word in ("65-a.json", "65-a", "a", str(a)):
        assert find_installed(place, word) == (a,)
    assert find_installed(place, file) == (a, b)
    for word in ("65", "a.json", "/usr/share/igvm/a.igvm", "nothing", ""):
        with pytest.raises(InputError, match="no descriptor in"):
            find_installed(place, word)
    with pytest.raises(InputError, match="no such descriptor"):
        plan_uninstall(place, place.directory / "65-gone.json")


def test_links_out_of_the_root_are_not_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    (root / "etc").mkdir(parents=True)
    (root / "etc/qemu").symlink_to(f"{outside}")
    place = choose_place(Level.SYSTEM, root=root)
    install(place, "65-a.json", descriptor())
    assert list(outside.iterdir()) == []
    assert (root / str(outside).lstrip("/") / "firmware/65-a.json").is_file()


def test_no_rights(tmp_path: Path) -> None:
    with without_privilege(), pytest.raises(OutputError, match="Permission denied") as caught:
        install(choose_place(Level.SYSTEM, root=tmp_path), "65-a.json", descriptor())
    assert "--user" in str(caught.value)


def test_the_directory_is_readable_by_libvirt_whatever_the_umask(place: Place) -> None:
    before = os.umask(0o077)
    try:
        install(place, "65-a.json", descriptor())
    finally:
        os.umask(before)
    for path in (place.directory, place.directory.parent):
        assert path.stat().st_mode & 0o777 == 0o755
    assert (place.directory / "65-a.json").stat().st_mode & 0o777 == 0o644


def test_locks_exclude_each_other_and_leave_nothing(place: Place) -> None:
    with locked(place, create=True):
        lock = place.directory / LOCK
        assert lock.stat().st_mode & 0o777 == 0o600
        with lock.open("w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert list(place.directory.iterdir()) == []
    with locked(place, create=True):  # a lock file that a killed process left does not matter
        pass


@pytest.mark.parametrize("stem", ["a", "n" * 120, "[a]"])
def test_what_a_killed_process_left_of_a_file_is_swept(place: Place, stem: str) -> None:
    name = f"65-{stem}.json"
    place.directory.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: 1 / 0)  # the last step before it would be whole
        patch.setattr(os, "unlink", lambda *_: None)  # as if killed: nothing is cleaned up
        with pytest.raises(ZeroDivisionError):
            files.write_atomic(place.directory / name, b"half")
    (left,) = place.directory.iterdir()
    assert left.name.startswith(".")
    kept = place.directory / f".65-a.json.{'x' * 9}"
    kept.write_text("somebody else's")
    install(place, name, descriptor())
    assert sorted(place.directory.iterdir()) == sorted([kept, place.directory / name])


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Each adds its line under the lock; none is lost."""
    program = (
        "import sys; from pathlib import Path; from igvmfw.install import *;"
        "place = choose_place(Level.SYSTEM, root=Path(sys.argv[1]));\n"
        "for turn in range(25):\n"
        "    with locked(place, create=True):\n"
        "        path = place.directory / 'count'\n"
        "        path.write_text(str(int(path.read_text() if path.exists() else 0) + 1))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    directory = tmp_path / "etc/qemu/firmware"
    assert (directory / "count").read_text() == "100"
    assert [path.name for path in directory.iterdir()] == ["count"]


KILLED = """
import sys
from pathlib import Path
from igvmfw.install import *
from igvmfw.qemu.descriptor import Descriptor
place = choose_place(Level.SYSTEM, root=Path(sys.argv[1]))
both = [Descriptor.parse(Path(path).read_bytes()) for path in sys.argv[2:]]
print("ready", flush=True)
while True:
    for wanted in both:
        with locked(place, create=True):
            carry_out(place, [plan_install(place, "65-a.json", wanted)])
"""


def test_a_kill_at_any_moment_leaves_one_of_both_descriptors(place: Place, tmp_path: Path) -> None:
    old, new = descriptor(description="old" * 5000), descriptor(description="new" * 5000)
    paths = [tmp_path / "old", tmp_path / "new"]
    for path, wanted in zip(paths, (old, new), strict=True):
        path.write_bytes(wanted.write())
    install(place, "65-a.json", old)
    allowed = {sealed(wanted, Writer.INSTALL).write() for wanted in (old, new)}
    command = [sys.executable, "-c", KILLED, str(tmp_path), *map(str, paths)]
    seen: set[bytes] = set()
    turn = 0
    while turn < 25 or (seen != allowed and turn < 500):  # a busy machine may need more turns
        turn += 1
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.0007 * (turn % 50))
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        process.stdout.close()
        content = (place.directory / "65-a.json").read_bytes()
        assert content in allowed
        seen.add(content)
    assert seen == allowed
    install(place, "65-a.json", old)
    install(place, "65-a.json", new)
    assert [path.name for path in place.directory.iterdir()] == ["65-a.json"]


def test_a_kill_at_any_step_of_an_installation(place: Place) -> None:
    old, new = descriptor(description="old"), descriptor(description="new")
    allowed = [sealed(wanted, Writer.INSTALL).write() for wanted in (old, new)]
    path = place.directory / "65-a.json"
    seen = []
    for _ in kills(
        lambda: install(place, "65-a.json", new), prepare=lambda: install(place, "65-a.json", old)
    ):
        seen.append(path.read_bytes())
        assert seen[-1] in allowed
    assert len(seen) > 50
    assert seen[0] == allowed[0]
    assert seen[-1] == allowed[1]
    assert seen == sorted(seen, key=allowed.index)  # the old one up to some step, then the new one
    assert [path.name for path in place.directory.iterdir()] == ["65-a.json"]


def test_a_kill_at_any_step_of_a_removal(place: Place) -> None:
    path = place.directory / "65-a.json"
    wanted = descriptor()

    def remove() -> None:
        with locked(place, create=False):
            carry_out(place, [plan_uninstall(place, path)])

    seen = []
    for _ in kills(remove, prepare=lambda: install(place, "65-a.json", wanted)):
        assert not path.exists() or path.read_bytes() == sealed(wanted, Writer.INSTALL).write()
        seen.append(path.exists())
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {True, False}
