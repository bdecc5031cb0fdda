"""The public API: one table, loaded lazily, documented, and the same for type checkers."""

import ast
import enum
import importlib
import inspect
import keyword
import re
import subprocess
import sys
from pathlib import Path

import pytest

import igvmfw
from igvmfw.errors import EmulatorError, IgvmError, IgvmfwError, InputError
from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import PageData
from igvmfw.igvm.image import IgvmFile, assemble, serialize
from igvmfw.platforms import Platform
from igvmfw.qemu.acceptance import RELEASES
from igvmfw.records import Record
from tests import api_reference
from tests.igvm import samples
from tests.test_imports import HEAVY, NAMES

SOURCE = Path(igvmfw.__file__)
# what cannot fail: no "Raises:" is asked of them
SAFE = {"refuses", "search_path", "load_catalog", "take_inventory"}
FUNCTIONS = [name for name in igvmfw.__all__ if inspect.isfunction(getattr(igvmfw, name))]
CLASSES = [name for name in igvmfw.__all__ if inspect.isclass(getattr(igvmfw, name))]


def declared() -> dict[str, tuple[str, str]]:
    """What a type checker sees: each name with its module, and its name there."""
    tree = ast.parse(SOURCE.read_bytes())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    found = {
        str(alias.asname): (str(node.module), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in block.body:
        if isinstance(node, ast.Assign):
            assert isinstance(node.targets[0], ast.Name)
            assert isinstance(node.value, ast.Name)
            found[node.targets[0].id] = found.pop(node.value.id)
    return found


def test_what_runs_is_what_a_type_checker_sees() -> None:
    assert declared() == igvmfw._HOME
    assert sorted(igvmfw.__all__) == sorted(igvmfw._HOME)
    for name, (module, attribute) in igvmfw._HOME.items():
        assert getattr(igvmfw, name) is getattr(importlib.import_module(module), attribute)


def test_no_name_is_hidden_by_a_module() -> None:
    """Importing igvmfw.check makes `igvmfw.check` that module, whatever it was before."""
    assert not {f"igvmfw.{name}" for name in igvmfw.__all__} & NAMES


def test_all_names_are_shown_and_others_are_missing() -> None:
    assert set(igvmfw.__all__) <= set(dir(igvmfw))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        igvmfw.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import igvmfw", set()),
        ("import igvmfw; dir(igvmfw); igvmfw.__version__", set()),
        ("from igvmfw import IgvmfwError, Platform, load_image, launch_digest, wrap", set()),
        ("from igvmfw import inspect_image, check_image, host_acceptance", set()),
        ("from igvmfw import Domain, prepare, convert, connect, define", {"lxml"}),
        ("from igvmfw import *", {"lxml"}),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_used(code: str, loaded: set[str]) -> None:
    code += "; import sys; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    modules = run.stdout.split()
    assert {name.split(".")[0] for name in modules} & HEAVY == loaded
    if code.startswith("import igvmfw;"):
        assert [name for name in modules if name.startswith("igvmfw")] == ["igvmfw"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_and_raises(name: str) -> None:
    function = getattr(igvmfw, name)
    parts = api_reference.sections(function.__doc__ or "")
    assert parts[""][0].strip()
    described = {
        word for item in api_reference.items(parts.get("Args", [])) for word in item.split(", ")
    }
    assert described == set(inspect.signature(function).parameters)
    raised = {
        word for item in api_reference.items(parts.get("Raises", [])) for word in item.split(", ")
    }
    assert raised or name in SAFE
    for word in raised:
        assert issubclass(getattr(igvmfw, word), IgvmfwError)


def fields_of(cls: type) -> tuple[str, ...]:
    if issubclass(cls, Record):
        return cls._names
    return tuple(getattr(cls, "__dataclass_fields__", ()))


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_it_is_and_holds(name: str) -> None:
    cls = getattr(igvmfw, name)
    doc = cls.__doc__ or ""
    assert doc.strip()
    assert not doc.startswith(f"{cls.__name__}("), "made by dataclass, not written"
    if issubclass(cls, enum.Enum):
        return
    fields = {field for field in fields_of(cls) if field[0] != "_"}
    described = api_reference.sections(doc).get("Attributes", [])
    named = {word for item in api_reference.items(described) for word in item.split(", ")}
    assert fields <= named | set(api_reference.MEMBERS.get(name, "").split())


def test_a_file_read_leniently_is_not_checked() -> None:
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.NATIVE, 1))
    builder.add_page(0x1000, 1)
    image = IgvmFile.parse(builder.build())
    platform, page = image.headers
    assert isinstance(page, PageData)
    headers = serialize((platform, page.replace(data_type=9)))
    damaged = IgvmFile.parse(assemble(image.fixed, b"", headers, b""), lenient=True)
    with pytest.raises(IgvmError, match="data type 9"):
        igvmfw.check_image(damaged, Platform.NATIVE, RELEASES[-1])


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises(InputError, match="no file has this name"):
        igvmfw.load_image(name)
    with pytest.raises(EmulatorError, match="no program has this name"):
        igvmfw.host_acceptance(Path(name))


def test_members_that_are_promised_exist() -> None:
    for name, members in api_reference.MEMBERS.items():
        cls = getattr(igvmfw, name)
        known = {*dir(cls), *fields_of(cls)}
        known |= {"message", "where", "hint"} if cls is IgvmfwError else set()
        assert set(members.split()) <= known


def test_the_reference_names_nothing_that_is_not_public() -> None:
    """A name in backticks is public, or stands in the reference as a parameter or a member."""
    text = api_reference.DOCUMENT.read_text().partition("<!-- reference: begin -->")[2]
    told = {*igvmfw.__all__, *keyword.kwlist}
    for line in text.splitlines():
        heading, item = re.match(r"#### `(.*)`", line), re.match(r"- `([\w., ]+)`(:|$)", line)
        for part in (heading, item):
            told |= {*re.findall(r"\w+", part[1])} if part is not None else set()
    for quoted in re.findall(r"`([^`\n]+)`", text):
        word = re.match(r"[a-z_]\w*(?=[.(]|$)", quoted)
        assert word is None or word[0] in told, quoted


def test_every_name_has_its_place_in_the_reference() -> None:
    grouped = {
        name
        for modules in api_reference.GROUPS.values()
        for module in modules.split()
        for name in api_reference.names_of(module)
    }
    assert grouped == set(igvmfw.__all__)
    if api_reference.DOCUMENT.read_text() != api_reference.written():
        pytest.fail("docs/api.md is not what the docstrings say: python -m tests.api_reference")
