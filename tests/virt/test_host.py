"""What a host offers, and libvirt's errors with remedies."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from igvmfw.errors import LibvirtError, OutputError, UsageError
from igvmfw.virt import embedded
from igvmfw.virt.host import Capabilities, Connection, connect
from tests.parts import need, need_libvirt
from tests.sources import libvirt_source


def test_libvirts_own_capabilities() -> None:
    source = libvirt_source()
    need(source is not None, "libvirt's source package (through apt)")
    assert source is not None
    read = {
        file.name: (file.read_text(), Capabilities.parse(file.read_text()))
        for file in source.glob("tests/domaincapsdata/*.xml")
    }
    assert len(read) > 50
    for name, (text, capabilities) in read.items():
        assert capabilities.sev is ("<sev supported='yes'>" in text), name
        guests = re.search(r"<maxESGuests>(\d+)<", text)
        assert capabilities.sev_es is (guests is not None and guests.group(1) != "0"), name
        assert not capabilities.igvm, name  # none of them knows IGVM
        assert capabilities.emulator is None or capabilities.emulator.startswith("/")
    assert any(capabilities.sev_es for _, capabilities in read.values())


@pytest.mark.parametrize(
    "os",
    [
        "<os><enum name='firmware'><value>efi</value><value>igvm</value></enum></os>",
        "<os><loader><enum name='type'><value>igvm</value></enum></loader></os>",
    ],
)
def test_a_libvirt_that_knows_igvm_itself(os: str) -> None:
    assert Capabilities.parse(f"<domainCapabilities>{os}</domainCapabilities>").igvm


class _Native:
    """Stands for libvirt-python's connection where only its URI counts."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def getURI(self) -> str:  # noqa: N802 - libvirt's name
        return self._uri


@pytest.mark.parametrize(
    ("uri", "remote", "system"),
    [
        ("qemu:///system", False, True),
        ("qemu:///session", False, False),
        ("qemu:///embed?root=/x", False, False),
        ("qemu+ssh://user@host/system", True, True),
        ("qemu+tcp://[::1]/session", True, False),
        ("qemu+unix:///system?socket=/x", False, True),
    ],
)
def test_where_guests_run(uri: str, remote: bool, system: bool) -> None:
    need_libvirt()
    connection = Connection(_Native(uri))
    assert (connection.is_remote, connection.is_system) == (remote, system)
    if remote or system:
        assert connection.may_lock_memory


def test_a_limit_that_is_none_can_be_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    need_libvirt()
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: unlimited)
    assert Connection(_Native("qemu:///session")).may_lock_memory


@pytest.mark.parametrize(
    ("uri", "root"),
    [
        ("qemu:///embed?root=/a/b", Path("/a/b")),
        ("qemu:///embed?root=/a%20b", Path("/a b")),
        ("qemu:///embed?x=y;root=/a+b%3bc%26", Path("/a+b;c&")),
        ("qemu:///system", None),
        ("qemu+ssh://host/embed?root=/x", None),
        ("test:///default", None),
        ("http://[broken", None),
    ],
)
def test_the_embedded_drivers_root(uri: str, root: Path | None) -> None:
    assert embedded.root_of(uri) == root


@pytest.mark.parametrize("uri", ["qemu:///embed", "qemu:///embed?root=", "qemu:///embed?root=a"])
def test_a_root_must_be_absolute(uri: str) -> None:
    with pytest.raises(UsageError, match="absolute"), connect(uri):
        pass


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), connect(f"qemu:///embed?root={tmp_path}/file/below"):
        pass


def test_preparing_a_root_twice_keeps_what_is_there(tmp_path: Path) -> None:
    embedded.prepare(tmp_path / "root")
    configuration = tmp_path / "root/etc/qemu.conf"
    assert 'stdio_handler = "file"' in configuration.read_text()
    configuration.write_text("# mine\n")
    embedded.prepare(tmp_path / "root")
    assert configuration.read_text() == "# mine\n"
    assert [entry.name for entry in configuration.parent.iterdir()] == ["qemu.conf"]


def test_one_process_at_a_time_has_a_root_open(uri_of_root: str) -> None:
    # in processes of their own: this one could not open another directory afterwards
    within = f"from igvmfw.virt.host import connect\nwith connect({uri_of_root!r}):\n    "
    words = (sys.executable, "-c")
    holder = subprocess.Popen(
        [*words, f"{within}print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline()
    other = subprocess.run(
        [*words, f"{within}pass"], capture_output=True, text=True, check=False, timeout=60
    )
    assert "another process has" in other.stderr
    holder.communicate(b"\n", timeout=60)
    assert holder.returncode == 0
    # and again after it was closed, twice in one process
    subprocess.run([*words, f"{within}pass\n" * 2], check=True, timeout=60)


@pytest.fixture
def uri_of_root(embed_root: Path) -> str:
    need_libvirt()
    return f"qemu:///embed?root={embed_root}"


def test_no_daemon_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    need_libvirt()
    uri = f"qemu+unix:///system?socket={tmp_path}/none"
    with pytest.raises(LibvirtError) as caught, connect(uri):
        pass
    assert caught.value.where == uri
    assert "-c" in str(caught.value)
