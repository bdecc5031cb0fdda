"""The commands of the documentation, read out of its pages.

A page of Markdown says what its blocks are by the language of their fences, and by comments that
stand right above them and that a reader does not see:

    ```sh            commands, run by a shell in the page's order, all in one folder
    ```console       the same, `$ ` before each, with what they print; `…` is any text, alone in a
                     line any lines
    ```xml, …        anything else, not run
    <!-- file: NAME -->          the block is the content of a file of the page's folder
    <!-- not run: REASON -->     the block's commands cannot run in a test
    <!-- setup: COMMAND -->      run before the next block; $GIVEN has what a test has prepared
                                 (guest.xml, tik.bin), $CHECKOUT is the source

In a man page's source (docs/man) the blocks are those behind `::` in the section EXAMPLES, and the
comments are `.. not run: REASON` and `.. setup: COMMAND`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
SHELL = ("sh", "console")
_FENCE = re.compile(r"( *)```(\S*)\s*$")
_REMARK = re.compile(r"\s*(?:<!--|\.\.) (file|not run|setup): (.*?)(?: -->)?\s*$")
_INDENTED = re.compile(
    r" {4,}(\$ |sudo |(igvmfw|make|pip|apt|apt-get|dnf|virsh|systemctl|install|cp|cocoonfs|podman|"
    r"kubectl|restorecon|rpm\w*|dpkg\S*) )"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One run of the shell.

    `printed` is what it must print, None where a page does not show it.
    """

    commands: str
    printed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block of a page, with what the comments above it say."""

    page: str
    line: int
    language: str
    text: str
    file: str | None = None
    not_run: str | None = None
    setup: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """The commands; none of a block that is no shell's."""
        if self.language == "sh":
            return (Step(commands=self.text),)
        if self.language != "console":
            return ()
        steps = []
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            lines = part.splitlines(keepends=True)
            more = next(
                (i for i, line in enumerate(lines) if not line.rstrip().endswith("\\")), len(lines)
            )
            commands, printed = lines[: more + 1], lines[more + 1 :]
            steps.append(Step(commands="".join(commands), printed="".join(printed)))
        return tuple(steps)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(slots=True)
class _Remarks:
    """What stands above the next block."""

    values: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)

    def read(self, line: str) -> bool:
        found = _REMARK.match(line)
        if found is None:
            return False
        if found[1] == "setup":
            self.setup.append(found[2])
        else:
            self.values[found[1]] = found[2]
        return True

    def block(self, page: str, line: int, language: str, text: str) -> Block:
        made = Block(
            page=page,
            line=line,
            language=language,
            text=text,
            file=self.values.get("file"),
            not_run=self.values.get("not run"),
            setup=tuple(self.setup),
        )
        self.values, self.setup = {}, []
        return made


def pages() -> list[Path]:
    """Every page of the documentation."""
    texts = ("*.md", "docs/**/*.md", "packaging/*/README.md")
    return sorted(path for text in texts for path in CHECKOUT.glob(text)) + sorted(
        CHECKOUT.glob("docs/man/*.rst")
    )


def name_of(page: Path) -> str:
    """A page as a reader finds it."""
    return str(page.relative_to(CHECKOUT))


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in its order."""
    read = _markdown if page.suffix == ".md" else _manual
    return read(page.read_text(encoding="utf-8"), name_of(page))


def unseen_commands(page: Path) -> list[str]:
    """Lines of a page of Markdown that look like commands and are in no fence."""
    inside = False
    found = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if _FENCE.match(line):
            inside = not inside
        elif not inside and _INDENTED.match(line):
            found.append(f"{name_of(page)}:{number}: {line.strip()}")
    return found


def _markdown(text: str, page: str) -> list[Block]:
    found = []
    remarks = _Remarks()
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        fence = _FENCE.match(line)
        if fence is None:
            remarks.read(line)
            continue
        body = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            body.append(inner.removeprefix(fence[1]) + "\n")
        found.append(remarks.block(page, number, fence[2], "".join(body)))
    return found


def _manual(text: str, page: str) -> list[Block]:
    before, _, examples = text.partition("\nEXAMPLES\n")
    examples = re.split(r"^\S.*\n===", examples, flags=re.MULTILINE)[0]
    first = before.count("\n") + 2
    found = []
    remarks = _Remarks()
    body: list[str] = []
    begun = 0
    for number, line in enumerate([*examples.splitlines(), "end"], first):
        if begun and (line.startswith("   ") or not line):
            body.append(line.removeprefix("   ") + "\n")
            continue
        if begun and any(map(str.strip, body)):
            found.append(remarks.block(page, begun, "sh", "".join(body)))
        if not remarks.read(line):
            begun = number if line.endswith("::") else 0
        body = []
    return found
