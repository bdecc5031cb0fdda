"""Every command of the documentation: run where it can run, else read.

`tests.docpages` says how a page marks its blocks.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from igvmfw.cli import COMMANDS, build_parser
from igvmfw.errors import IgvmfwError, UsageError
from tests.conftest import QEMU_CONF
from tests.docpages import CHECKOUT, SHELL, Block, blocks_of, name_of, pages, unseen_commands
from tests.parts import measured, need
from tests.testbed.cache import SCRIPTS
from tests.testbed.standin import SevEmulator, make_emulator

PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS_IN = [block for block in BLOCKS if block.language in SHELL]
NOT_RUN = [block for block in COMMANDS_IN if block.not_run is not None]
RUN = [page for page in PAGES if any(b.not_run is None for b in blocks_of(page) if b.steps)]
# a domain that asks for IGVM firmware, for pages that speak of one and do not show it
GUEST = """\
<domain type='kvm'>
  <name>guest</name>
  <memory unit='MiB'>256</memory>
  <vcpu>2</vcpu>
  <os firmware='igvm'>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <features><acpi/></features>
  <launchSecurity type='sev'>
    <policy>0x7</policy>
  </launchSecurity>
  <devices>
    <memballoon model='none'/>
  </devices>
</domain>
"""
# runs the steps NN, until one fails; each leaves what it printed, and its exit status
RUN_STEPS = """\
cd "$HOME"
for step in "$STEPS"/??; do
    bash -euo pipefail "$step" >"$step.out" 2>&1 </dev/null
    echo $? >"$step.code"
    [ "$(cat "$step.code")" = 0 ] || break
done
"""


def is_as_shown(shown: str, printed: str) -> bool:
    """Whether a program printed what a page shows, `…` being any text."""
    pattern = ""
    for line in shown.splitlines(keepends=True):
        pattern += "(?:.*\n)*" if line.strip() == "…" else re.escape(line).replace("…", ".*")
    return re.fullmatch(pattern, printed) is not None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_marks_its_blocks(page: Path) -> None:
    assert not unseen_commands(page), "commands belong into a fence: ```sh"
    for block in blocks_of(page):
        assert block.language, f"{block}: a fence says its language, such as ```sh or ```text"
        assert block.language not in ("bash", "shell", "zsh", "shell-session"), f"{block}: use sh"
        assert block.not_run is None or len(block.not_run) > 10, f"{block}: why is it not run?"
        assert block.language in SHELL or block.not_run is None, f"{block}: nothing would run here"


@pytest.mark.parametrize("block", COMMANDS_IN, ids=str)
def test_commands_are_what_a_shell_takes(block: Block) -> None:
    for step in block.steps:
        checked = subprocess.run(
            ["bash", "-n"], input=step.commands, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, ""), step.commands


def calls(commands: str) -> Iterator[list[str]]:
    """The words that igvmfw is called with."""
    lexer = shlex.shlex(commands.replace("\\\n", " "), posix=True, punctuation_chars=";|&<>()\n")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    words: list[str] | None = None
    begins = True
    for token in [*lexer, ";"]:
        ends = set(token) <= set(";|&<>()\n")
        if ends:
            if words is not None:
                yield words
            words = None
        elif words is not None:
            words.append(token)
        elif begins and token == "igvmfw":
            words = []
        begins = ends or token in ("sudo", "do", "then", "if", "!")


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: f"{block}: {block.not_run}")
def test_what_is_not_run_has_options_that_exist(block: Block) -> None:
    """Its syntax was looked at above; this is what else can be known of it."""
    for step in block.steps:
        for words in calls(step.commands):
            try:
                build_parser([*COMMANDS]).parse_args(words)
            except UsageError as error:
                pytest.fail(f"{block}: igvmfw {shlex.join(words)}: {error}")
            except (IgvmfwError, SystemExit):
                continue  # a file that is not here; --help


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=name_of)
def test_commands_within_the_text_exist(page: Path) -> None:
    for words in re.findall(r"`igvmfw ([^`]+)`", page.read_text(encoding="utf-8")):
        command, *rest = words.split()
        if command.isupper():
            continue  # igvmfw COMMAND
        assert command in (*COMMANDS, "--version", "--help"), words
        known = {option for action in arguments(command) for option in action.option_strings}
        named = {word.partition("=")[0] for word in rest if word.startswith("-") and word != "-"}
        assert named <= known, words


def arguments(command: str) -> list[argparse.Action]:
    """A command's arguments and options."""
    (commands,) = (
        action
        for action in build_parser([command])._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    actions: list[argparse.Action] = commands.choices[command]._actions
    return actions


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def anchors(page: Path) -> set[str]:
    """The headings of a page, as forges make anchors of them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_index_has_every_page() -> None:
    index = (CHECKOUT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (CHECKOUT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


@pytest.fixture(scope="module")
def emulator(
    igvm_qemu: Path, dev_sev: None, tmp_path_factory: pytest.TempPathFactory
) -> SevEmulator:
    """One for all pages, as libvirt asks each emulator that is new to it for some seconds."""
    need(shutil.which("gcc") is not None, "gcc, for the SEV stand-in")
    return make_emulator(tmp_path_factory.mktemp("sev"), igvm_qemu, tik=bytes(range(16)))


@pytest.fixture
def given(tmp_path: Path, emulator: SevEmulator) -> Path:
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "guest.xml").write_text(GUEST)
    (folder / "tik.bin").write_bytes(emulator.tik)
    return folder


@pytest.fixture(scope="module")
def known_emulators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libvirt") / "cache"


@pytest.fixture
def libvirt_root(known_emulators: Path) -> Iterator[Path]:
    """Short, as sockets lie below it; its guests end with the sandbox."""
    with tempfile.TemporaryDirectory(prefix="igvmfw-") as name:
        root = Path(name)
        (root / "etc").mkdir()
        (root / "etc" / "qemu.conf").write_text(QEMU_CONF)
        if known_emulators.exists():
            shutil.copytree(known_emulators, root / "cache")
        yield root
        if (root / "cache").exists():
            shutil.copytree(root / "cache", known_emulators, dirs_exist_ok=True)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_commands_do_what_the_page_says(
    page: Path, tmp_path: Path, given: Path, libvirt_root: Path, emulator: SevEmulator
) -> None:
    need(os.geteuid() == 0, "root, for a sandbox")
    need(shutil.which("unshare") is not None, "unshare (util-linux)")
    folder = tmp_path / "page"
    steps = tmp_path / "steps"
    folder.mkdir()
    steps.mkdir()
    expected: list[tuple[Block, str, str | None]] = []
    for block in blocks_of(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text)
        setup = [] if not block.setup else [("\n".join(block.setup), None)]
        shown = [] if block.not_run else [(step.commands, step.printed) for step in block.steps]
        for commands, printed in [*setup, *shown]:
            (steps / f"{len(expected):02}").write_text(commands)
            expected.append((block, commands, printed))
    environment = measured() | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "GIVEN": str(given),
        "CHECKOUT": str(CHECKOUT),
        "STEPS": str(steps),
        "LIBVIRT_DEFAULT_URI": f"qemu:///embed?root={libvirt_root}",
        "LIBVIRT_LOG_OUTPUTS": f"3:file:{libvirt_root}/virsh.log",
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "100",
    }
    command: list[str | Path] = [SCRIPTS / "sandbox.sh", emulator.path, "bash", "-c", RUN_STEPS]
    subprocess.run(command, env=environment, timeout=300, check=True)
    for number, (block, commands, printed) in enumerate(expected):
        out = (steps / f"{number:02}.out").read_text()
        code = (steps / f"{number:02}.code").read_text().strip()
        assert code == "0", f"{block}: exit status {code} from\n{commands}\n{out}"
        assert printed is None or is_as_shown(printed, out), f"{block}: {commands}\nprinted\n{out}"
