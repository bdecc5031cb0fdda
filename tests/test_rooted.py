import os
from pathlib import Path

import pytest

from igvmfw.errors import InputError
from igvmfw.rooted import HOST, inner, is_same, resolve


def test_links_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    for name, target in [
        ("absolute", "/usr/lib"),
        ("relative", "usr/lib"),
        ("up", "../../../../usr/./lib"),
        ("chain", "absolute"),
    ]:
        (tmp_path / name).symlink_to(target)
        assert resolve(tmp_path, f"/{name}/file") == tmp_path / "usr/lib/file"
    assert resolve(tmp_path, "../../etc/passwd") == tmp_path / "etc/passwd"
    assert resolve(tmp_path, "/usr/lib/../share//./x") == tmp_path / "usr/share/x"
    assert resolve(tmp_path, "/") == tmp_path
    assert resolve(HOST, "/usr/lib/../x") == Path("/usr/lib/../x")


def test_it_agrees_with_the_kernel(tmp_path: Path) -> None:
    """Where nothing leaves the root, following inside and outside is the same."""
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/link").symlink_to("b/../b/c")
    (tmp_path / "a/b/c/back").symlink_to("../../link/..")
    for path in ("a/link", "a/link/back", "a/link/back/c", "a/b/c/back/../link/back/new"):
        assert resolve(tmp_path, path) == Path(os.path.realpath(tmp_path / path))


def test_loops_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("/a")
    with pytest.raises(InputError, match="too many links"):
        resolve(tmp_path, "/a/x")


def test_a_path_may_be_as_long_as_for_the_kernel(tmp_path: Path) -> None:
    room = 4095 - len(f"{tmp_path}/")
    longest = "a/" * (room // 2 - 1) + "b" * (2 + room % 2)
    assert len(str(resolve(tmp_path, longest))) == 4095
    assert not os.path.exists(tmp_path / longest)  # the kernel looks: no ENAMETOOLONG
    (tmp_path / "x").symlink_to("long")
    for path in (f"{longest}b", f"x/{longest[4:]}", "é/" * 1400, "./" * 2048):
        with pytest.raises(InputError, match="longer than the 4095 bytes") as caught:
            resolve(tmp_path, path)
        assert len(str(caught.value)) < 400


def test_the_name_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inner(tmp_path, tmp_path / "usr/x") == "/usr/x"
    assert inner(tmp_path, f"{tmp_path}//usr/../y") == "/y"
    monkeypatch.chdir(tmp_path)
    assert inner(tmp_path, "usr/x") == "/usr/x"
    assert inner(HOST, "usr/x") == f"{tmp_path}/usr/x"
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    assert inner(link, tmp_path / "usr/x") == "/usr/x"
    for outside in (tmp_path, tmp_path.parent / "x", f"{tmp_path}x/y"):
        with pytest.raises(InputError, match="is not below the root"):
            inner(tmp_path, outside)


def test_what_lies_above_a_link_is_what_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "there/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("there/deep")
    for name in ("there/file", "file"):
        (tmp_path / name).write_text(name)
    named = f"{tmp_path}/link/../file"
    assert Path(inner(HOST, named)).read_text() == Path(named).read_text() == "there/file"
    assert inner(tmp_path, named) == "/there/file"
    assert inner(HOST, f"{tmp_path}/link/..") == f"{tmp_path}/there"
    assert inner(HOST, f"{tmp_path}/link/./x") == f"{tmp_path}/link/x"


def test_one_file_in_several_spellings(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/file").touch()
    (tmp_path / "link").symlink_to("/dir")
    (tmp_path / "loop").symlink_to("loop")
    for path in ("/dir/file", "/link/file", "/dir/../link/./file"):
        assert is_same(tmp_path, path, f"{tmp_path}/dir/file")
        assert is_same(tmp_path, path, f"{tmp_path}/dir/../dir/file")
    assert not is_same(tmp_path, "/dir/file", "/dir/file")  # of the host
    assert not is_same(tmp_path, "/loop/file", f"{tmp_path}/dir/file")
    assert is_same(HOST, "/nowhere/file", "/nowhere/../nowhere/file")
    assert not is_same(HOST, "/nowhere/file", "/nowhere/other")
