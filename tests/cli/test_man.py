"""The man pages: what real formatters make of them, and whether they say what --help says."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from igvmfw.cli import COMMANDS
from tests.parts import need

CHECKOUT = Path(__file__).parents[2]
MAKE = CHECKOUT / "packaging" / "make-man"
SOURCES = sorted((CHECKOUT / "docs" / "man").glob("*.rst"))
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")
EPOCH = "1700000000"


def made(folder: Path, epoch: str = EPOCH) -> Path:
    """The pages, where man looks for them."""
    flat = folder / "flat"
    environment = os.environ | {"SOURCE_DATE_EPOCH": epoch}
    subprocess.run([sys.executable, MAKE, flat], check=True, env=environment, timeout=60)
    for page in flat.iterdir():
        place = folder / "man" / f"man{page.suffix[1:]}" / page.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, place)
    return folder / "man"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("pages"))


def run(*command: str | Path, **environment: str) -> str:
    """What a program prints that must not complain."""
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"LC_ALL": "C.UTF-8"} | environment,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


@functools.cache
def shown(pages: Path, name: str) -> str:
    """A page as man shows it, in lines so wide that nothing is broken."""
    need(shutil.which("man") is not None, "man (man-db)")
    text = run("man", "--warnings", "-M", pages, name, MANWIDTH="1000", MAN_KEEP_FORMATTING="")
    assert not re.search("\x1b|.\b", text)
    return text


@functools.cache
def helped(command: str) -> str:
    return run(sys.executable, "-m", "igvmfw", command, "--help", COLUMNS="1000", NO_COLOR="1")


def options_of(command: str) -> set[str]:
    """The options that --help lists, in all their spellings."""
    lines = helped(command).partition("\noptions:\n")[2].splitlines()
    heads = [line[2:].partition("  ")[0] for line in lines if line.startswith("  -")]
    return {found for head in heads for found in OPTION.findall(head)}


def section(page: str, command: str) -> str:
    """A command's own section of its group's page."""
    found = re.search(
        rf"^   igvmfw {command}\n(.*?)(?=^   igvmfw |^\S)", page, re.MULTILINE | re.DOTALL
    )
    assert found, f"no section for {command}"
    return found[1]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_page_has_what_help_has_and_nothing_else(pages: Path, command: str) -> None:
    text = section(shown(pages, f"igvmfw-{command}"), command)
    heads = [line for line in text.splitlines() if re.match(r" {7}-", line)]
    listed = {found for head in heads for found in OPTION.findall(head[7:].partition("  ")[0])}
    assert listed == options_of(command)
    words = " ".join(text.split())
    for line in helped(command).splitlines():  # what is said of each argument, too
        if found := re.match(r"  \S.*?  +(\S.*)", line):
            assert " ".join(found[1].split()) in words


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_page_speaks_of_no_option_that_is_none(pages: Path, source: Path) -> None:
    text = shown(pages, source.stem.rsplit(".", 1)[0])
    known = {"--version"}.union(*map(options_of, COMMANDS))
    ours = [line for line in text.splitlines() if "igvmfw" in line]
    assert {found for line in ours for found in re.findall(r"(?<!\S)--[\w-]+", line)} <= known


def test_every_command_is_in_one_group() -> None:
    grouped = [
        name
        for path in SOURCES
        for name in re.findall(r"^\.\. command:: (\S+)$", path.read_text(), re.MULTILINE)
    ]
    assert sorted(grouped) == sorted(COMMANDS), "each belongs on one page of docs/man"


def test_main_page_has_every_command_and_page(pages: Path) -> None:
    text = shown(pages, "igvmfw")
    for command, listed in COMMANDS.items():
        assert re.search(rf"^ +{command}\s+{re.escape(listed.help)}$", text, re.MULTILINE)
    others = {path.stem for path in SOURCES} - {"igvmfw.1"}
    assert others <= {f"{name}.{number}" for name, number in re.findall(r"([\w-]+)\((\d)\)", text)}


def test_references_lead_somewhere(pages: Path) -> None:
    there = {path.name for path in pages.rglob("*.?")}
    for path in SOURCES:
        text = shown(pages, path.stem.rsplit(".", 1)[0])
        named = {f"{n}.{s}" for n, s in re.findall(r"\b(igvmfw[\w-]*)\((\d)\)", text)}
        assert named <= there


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_formatters_have_nothing_to_complain(pages: Path, source: Path) -> None:
    page = next(pages.rglob(source.stem))
    need(shutil.which("groff") is not None, "groff")
    run("groff", "-ww", "-man", "-z", page)
    need(shutil.which("mandoc") is not None, "mandoc")
    run("mandoc", "-T", "lint", "-W", "warning", page)
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "SEE ALSO"):
        assert f"\n.SH {heading}\n" in page.read_text()


def test_pages_are_found_by_their_subject(pages: Path) -> None:
    need(shutil.which("lexgrog") is not None, "man-db")
    for path in SOURCES:
        name, _, _ = path.stem.rpartition(".")
        subject = path.read_text().partition("\n")[0]
        assert f'"{name} - {subject}"' in run("lexgrog", next(pages.rglob(path.stem)))


def test_pages_are_the_same_each_time(pages: Path, tmp_path: Path) -> None:
    again = made(tmp_path)
    for path in pages.rglob("*.?"):
        assert (again / path.relative_to(pages)).read_bytes() == path.read_bytes()
    assert '"2023-11-14"' in (pages / "man1" / "igvmfw.1").read_text()


def test_command_without_a_page_gets_a_bare_one(tmp_path: Path) -> None:
    """A command that is new must not stop a package from being built."""
    source = tmp_path / "source"
    for name in ("igvmfw", "packaging", "docs", "schemas", "descriptors"):
        shutil.copytree(CHECKOUT / name, source / name)
    next((source / "docs/man").glob("*verify.1.rst")).unlink()
    subprocess.run(
        [sys.executable, source / "packaging/make-man", tmp_path / "out"], check=True, timeout=60
    )
    assert "\\-\\-tik" in (tmp_path / "out" / "igvmfw-verify.1").read_text()
