"""The order of the layers: who may import whom, who prints, and what a start of igvmfw loads."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from igvmfw.cli import main
from igvmfw.platforms import Platform
from tests.igvm import samples

PACKAGE = Path(__file__).parents[1] / "igvmfw"
# Each module imports from those before it alone. A new module gets its place here.
GROUND = "errors records platforms kinds files resources rooted machine".split()
SIDES = "igvm qemu virt".split()  # know nothing of each other
JOINS = (
    "images findings describe presets provenance description check_context check_memory check "
    "inventory install refresh select verdict commandline cocoonfs state statefile rewrite upkeep "
    "preflight launch manager hook verify report memorymap drawing textmap doctor"
).split()
ORDER = [*GROUND, *SIDES, *JOINS, "cli", "__main__"]
PROGRAMS = ("cli", "__main__", "hook")  # libvirt starts the hook as a program of its own
HEAVY = {"libvirt", "lxml", "jsonschema", "rich", "argcomplete"}
MOST_LINES = 500
SLOW = {"dataclasses", "inspect", "uuid", "multiprocessing"}  # each a tenth of a start, or more
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {name_of(path) for path in MODULES}


def imported(tree: ast.AST) -> Iterator[str]:
    """What a module imports, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in NAMES else str(node.module)


def part_of(name: str) -> str | None:
    """The layer's part that a module of igvmfw belongs to; None for the package itself."""
    return name.split(".")[1] if "." in name else None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_from_above_alone(path: Path) -> None:
    own = part_of(name_of(path))
    theirs = {
        part_of(name)
        for name in imported(ast.parse(path.read_bytes()))
        if name.split(".")[0] == "igvmfw"
    }
    theirs -= {own, None}
    if own is None:  # the package itself names the public API, for type checkers alone
        block = next(n for n in ast.parse(path.read_bytes()).body if isinstance(n, ast.If))
        assert ast.unparse(block.test) == "TYPE_CHECKING"
        assert set(imported(ast.parse(path.read_bytes()))) - set(imported(block)) <= {
            "typing",
            "importlib",
        }
        return
    assert own in ORDER, "a module without a place: put it into the order above"
    for part in theirs:
        assert ORDER.index(str(part)) < ORDER.index(own), f"{own} must not import {part}"
    if own in SIDES:
        assert not theirs.intersection(SIDES), "igvm, qemu and virt know nothing of each other"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name_of(path): set(imported(ast.parse(path.read_bytes()))) & NAMES for path in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path, name])
        if name not in done:
            for other in graph[name] - {"igvmfw"}:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_modules_are_of_a_size_that_can_be_read() -> None:
    lines = {name_of(path): path.read_text().count("\n") for path in MODULES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_programs_print_and_exit(path: Path) -> None:
    if part_of(name_of(path)) in PROGRAMS:
        return
    for node in ast.walk(ast.parse(path.read_bytes())):
        match node:
            case ast.Call(func=ast.Name(id="print" | "exit" | "quit" | "breakpoint")):
                pytest.fail(f"{path}:{node.lineno} prints or exits")
            case ast.Attribute(value=ast.Name(id="sys"), attr="exit" | "stdout" | "stderr"):
                pytest.fail(f"{path}:{node.lineno} prints or exits")
            case ast.Attribute(value=ast.Name(id="os"), attr="_exit" | "abort"):
                pytest.fail(f"{path}:{node.lineno} exits")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_heavy_modules_are_imported_where_they_are_used(path: Path) -> None:
    """In a function; lxml at the top too, in virt/, where nothing goes without it."""
    tree = ast.parse(path.read_bytes())
    top = {
        name.split(".")[0]
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        for name in imported(node)
    }
    allowed = {"lxml"} if part_of(name_of(path)) == "virt" else set()
    assert not (top & HEAVY) - allowed


@pytest.mark.parametrize(
    "words",
    [
        ["--version"],
        ["--help"],
        ["inspect", "FILE"],
        ["list", "--root", "ROOT"],
        ["measure", "FILE", "--platform", "sev"],
    ],
    ids=lambda words: words[0],
)
def test_a_light_command_loads_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "usr/share/igvm/small.igvm"
    file.parent.mkdir(parents=True)
    file.write_bytes(samples.small(Platform.NATIVE, Platform.SEV))
    install = ["-q", "install", "--root", str(tmp_path), "--interface", "uefi", str(file)]
    assert main(install) == 0
    words = [{"FILE": str(file), "ROOT": str(tmp_path)}.get(word, word) for word in words]
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "igvmfw", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        # coverage, where it runs, loads much of its own
        env={name: value for name, value in os.environ.items() if not name.startswith("COV")},
    )
    loaded = {line.rsplit("|", 1)[1].strip() for line in run.stderr.splitlines() if "|" in line}
    assert "igvmfw.cli" in loaded
    assert not {name.split(".")[0] for name in loaded} & HEAVY
    if words[0] != "measure":
        assert not loaded & SLOW
