"""What AppArmor's rules let a confined program read.

Source: apparmor.d(5), and AppArmor's parser_lex.l and parser_regex.c (4.1).  Nothing is guessed: a
rule that depends on what is not known here, such as a variable, is told as such.
"""

import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from igvmfw.machine import Text

_MAX_TEXT = 1 << 19  # characters of all files; Debian's rules for guests have 40 000
_PER_FILE = 1 << 11  # that each counts for beside its own: there can be thousands of empty ones
_MAX_NAME = 4096  # PATH_MAX
_MAX_NESTING = 50  # of alternatives, as AppArmor's parser has it
_MAX_WORK = 1 << 20  # steps of all comparisons, about a second
_INCLUDE = r"\#?include(?:[ \t]+if[ \t]+exists)?[ \t]+(?:<(?P<name>[^>\n]*)>|(?P<other>[^ \t\n]+))"
_TOKEN = re.compile(
    rf"""(?P<include>{_INCLUDE})
    |(?P<comment>\#[^\n]*)
    |(?P<word>"(?:[^"\\]|\\.)*"|(?:\\[ \t"!,]|[^ \t\r\n"!,]|,(?=[^ \t\r\n"!,]))+)
    |(?P<end>,)""",
    re.VERBOSE | re.DOTALL,
)
_PERMISSIONS = re.compile(r"[rwalkmxuipc]*r[rwalkmxuipc]*", re.IGNORECASE)
_PREFIXES = {"audit", "allow", "deny", "owner", "file", "quiet"}
_ESCAPED = frozenset('*?[]{}^,\\"!@ \t')  # by a backslash; other such pairs stand for a character
_SPECIAL = re.compile(r'[*?\[\]{}\\"]')
# what an include of a directory passes over: libapparmor's src/private.c
_LEFTOVERS = (
    "~ .dpkg-new .dpkg-old .dpkg-dist .dpkg-bak .dpkg-remove .pacsave .pacnew .rpmnew .rpmsave "
    ".orig .rej"
).split()

Read = Callable[[str], Iterable[Text]]


class Access(StrEnum):
    """Whether a file can be read."""

    OPEN = "open"
    CLOSED = "closed"  # no rule allows it
    DENIED = "denied"  # a rule forbids it, which no other can change
    UNCLEAR = "unclear"  # a rule allows or forbids it in some cases, or could not be read


@dataclass(frozen=True, slots=True)
class _Any:
    """`*`, and `**`, which goes over slashes."""

    slashes: bool


@dataclass(frozen=True, slots=True)
class _OneOf:
    """`?` and `[…]`."""

    characters: frozenset[str]
    inverted: bool


@dataclass(frozen=True, slots=True)
class _Either:
    """`{…,…}`."""

    sequences: tuple["_Glob", ...]


_Glob = tuple[str | _Any | _OneOf | _Either, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule about reading files.

    Attributes:
        text: As it is written.
        glob: The files that it is about.
        denies: Whether it forbids.
        sure: Whether it applies to all these files, always.
    """

    text: str
    glob: _Glob
    denies: bool = False
    sure: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The rules of a profile.

    Attributes:
        rules: In their order.
        problem: Why these are not all, as a clause about them; None where they are.
    """

    rules: tuple[Rule, ...] = ()
    problem: str | None = None


def is_leftover(name: str) -> bool:
    """Whether an include of a directory passes over a file."""
    return name.startswith(".") or name.endswith(tuple(_LEFTOVERS))


def load(name: str, read: Read) -> Rules:
    """The rules of a file and of those that it includes.

    Args:
        name: Of the file, below /etc/apparmor.d.
        read: Gives a file's text, or those of a directory's files.
    """
    return _Loader(read).load(name)


class _Loader:
    def __init__(self, read: Read) -> None:
        self._read = read
        self._seen: set[tuple[str, bool]] = set()
        self._left = _MAX_TEXT
        self._problem: str | None = None

    def load(self, name: str) -> Rules:
        rules = tuple(self._of_file(name, sure=True))
        return Rules(rules=rules, problem=self._problem)

    def _of_file(self, name: str, *, sure: bool) -> Iterator[Rule]:
        if (name, sure) in self._seen:
            return
        self._seen.add((name, sure))
        for text in self._read(name):
            content = text.text or ""
            self._left -= len(content) + _PER_FILE
            if self._left < 0:
                self._problem = f"they have more than {_MAX_TEXT} characters"
                return
            if text.problem is not None:
                self._problem = f"/etc/apparmor.d/{name}: {text.problem}"
            yield from self._of_text(content, sure=sure)

    def _of_text(self, text: str, *, sure: bool) -> Iterator[Rule]:
        words: list[str] = []
        # of the blocks around: whether its rules are sure; None for another profile's
        blocks: list[bool | None] = []
        for token in _TOKEN.finditer(text):
            inside = None if None in blocks else sure and all(blocks)
            word = token["word"]
            if token["include"] is not None:
                if token["name"] is not None and inside is not None:
                    yield from self._of_file(token["name"], sure=inside)
                elif inside is not None:
                    self._problem = f"'{token['include']}' is not followed"
            elif word == "{":
                blocks.append(None if _is_profile(words) else False)
                words = []
            elif word == "}":
                del blocks[-1:]
                words = []
            elif word is not None:
                words.append(word)
            elif token["end"] is not None:
                rule = _rule(words) if inside is not None else None
                if rule is not None:
                    yield rule if inside else replace(rule, sure=False)
                words = []


def _is_profile(words: Sequence[str]) -> bool:
    return bool(words) and (words[0] in ("profile", "hat") or words[0][0] in "^/")


def _rule(words: Sequence[str]) -> Rule | None:
    """A rule about reading files; None where it is about something else."""
    text = " ".join(words)
    left = list(words)
    sure = True
    prefixes = set()
    while left and (left[0] in _PREFIXES or left[0].startswith("priority=")):
        sure = sure and not left[0].startswith("priority=")
        prefixes.add(left.pop(0))
    denies = "deny" in prefixes
    if "owner" in prefixes:  # it depends on whose the file is
        sure = False
    if (not left and "file" in prefixes) or left == ["all"]:
        return Rule(text=text, glob=(_Any(slashes=True),), denies=denies, sure=sure)
    if len(left) < 2:
        return None
    name, permissions = left[:2] if _is_name(left[0]) else left[1::-1]
    if not _is_name(name) or _PERMISSIONS.fullmatch(permissions) is None:
        return None
    glob, known = _read_glob(name)
    return Rule(text=text, glob=glob, denies=denies, sure=sure and known)


def _is_name(word: str) -> bool:
    return word.startswith(("/", '"/', "@{", '"@{'))


def _read_glob(word: str) -> tuple[_Glob, bool]:
    """A pattern, and whether it is all known; what is not may stand for anything."""
    text = word[1:-1] if word.startswith('"') else word
    if len(text) <= _MAX_NAME:
        try:
            return _GlobReader(_octets(text)).read()
        except ValueError:
            pass
    fixed = re.match(r"[^*?\[\]{}^\\@]*", _octets(text[:_MAX_NAME]))
    assert fixed is not None
    return (*fixed.group(), _Any(slashes=True)), False


class _GlobReader:
    """Raises `ValueError` for what AppArmor itself refuses, or what is not read here."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._known = True

    def read(self) -> tuple[_Glob, bool]:
        glob = self._sequence(0)
        if self._at < len(self._text):
            raise ValueError
        return glob, self._known

    def _take(self) -> str:
        if self._at == len(self._text):
            raise ValueError
        self._at += 1
        return self._text[self._at - 1]

    def _sequence(self, depth: int) -> _Glob:
        found: list[str | _Any | _OneOf | _Either] = []
        while self._at < len(self._text):
            character = self._text[self._at]
            if depth and character in ",}":
                break
            self._at += 1
            if character == "*":
                slashes = self._text.startswith("*", self._at)
                while self._text.startswith("*", self._at):
                    self._at += 1
                found.append(_Any(slashes=slashes))
            elif character == "?":
                found.append(_OneOf(characters=frozenset("/"), inverted=True))
            elif character == "[":
                found.append(self._one_of())
            elif character == "{":
                found.append(self._either(depth + 1))
            elif character == "@" and self._text.startswith("{", self._at):
                self._at = self._text.index("}", self._at) + 1
                self._known = False
                found.append(_Any(slashes=True))
            elif character in "]}":
                raise ValueError
            else:
                found.append(self._escaped() if character == "\\" else character)
        return tuple(found)

    def _escaped(self) -> str:
        character = self._take()
        if character not in _ESCAPED:
            raise ValueError
        return character

    def _one_of(self) -> _OneOf:
        inverted = self._text.startswith("^", self._at)
        self._at += inverted
        found = ""
        while (character := self._take()) != "]":
            if character == "\\":
                character = self._escaped()
            elif character == "-" and found and not self._text.startswith("]", self._at):
                first, last = ord(found[-1]), ord(self._take())
                found += "".join(map(chr, range(first, last + 1)))
                continue
            found += character
        return _OneOf(characters=frozenset(found), inverted=inverted)

    def _either(self, depth: int) -> _Either:
        if depth > _MAX_NESTING:
            raise ValueError
        sequences = [self._sequence(depth)]
        while (character := self._take()) == ",":
            sequences.append(self._sequence(depth))
        if character != "}" or len(sequences) == 1:
            raise ValueError
        return _Either(sequences=tuple(sequences))


def _octets(text: str) -> str:
    """AppArmor compares bytes: a character for each."""
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


class _Name:
    """A file's name, matched in a time that grows with name and pattern, whatever they are.

    A set of places in the name, 0 to its length, is a number with a bit for each.
    """

    def __init__(self, text: str) -> None:
        self.work = 0
        self._end = 1 << len(text)
        self._places: dict[str, int] = {}
        for index, character in enumerate(text):
            self._places[character] = self._places.get(character, 0) | 1 << index

    def matches(self, glob: _Glob) -> bool:
        return bool(self._ends(glob, 1) & self._end)

    def _ends(self, glob: _Glob, starts: int) -> int:
        """Where parts of the name end that match, each from one of the starts."""
        self.work += 1
        for piece in glob:
            if not starts:
                break
            self.work += 1
            if isinstance(piece, str):
                starts = (starts & self._places.get(piece, 0)) << 1
            elif isinstance(piece, _OneOf):
                starts = (starts & self._one_of(piece)) << 1
            elif isinstance(piece, _Any):
                starts = self._onward(starts, slashes=piece.slashes)
            else:
                ends = 0
                for sequence in piece.sequences:
                    ends |= self._ends(sequence, starts)
                starts = ends
        return starts

    def _one_of(self, piece: _OneOf) -> int:
        self.work += len(self._places)
        found = 0
        for character, places in self._places.items():
            if (character in piece.characters) is not piece.inverted:
                found |= places
        return found

    def _onward(self, starts: int, *, slashes: bool) -> int:
        """The starts and all places after them, up to the next slash unless it goes over those."""
        everything = 2 * self._end - 1
        if slashes:
            return everything & -(starts & -starts)
        # adding a start to a run of ones carries through to the zero behind the run
        runs = (self._end - 1) & ~self._places.get("/", 0)
        begun = starts & runs
        return starts | begun | ((begun + runs) ^ runs) & everything


def judge(rules: Rules, files: Sequence[str]) -> dict[str, tuple[Access, str | None]]:
    """Whether files can be read, each with the rule or the problem that decided.

    Args:
        rules: What `load` gave.
        files: Absolute names, without links.
    """
    found: dict[str, tuple[Access, str | None]] = {}
    work = 0
    for file in files:
        name = _Name(_octets(posixpath.normpath("/" + file.lstrip("/"))[:_MAX_NAME]))
        matching = [] if work > _MAX_WORK else [r for r in rules.rules if name.matches(r.glob)]
        work += name.work
        problem = "they take too long to compare" if work > _MAX_WORK else rules.problem
        found[file] = _judged(matching, problem)
    return found


def _judged(matching: Sequence[Rule], problem: str | None) -> tuple[Access, str | None]:
    denying = sorted((rule for rule in matching if rule.denies), key=lambda rule: not rule.sure)
    if denying:
        return Access.DENIED if denying[0].sure else Access.UNCLEAR, denying[0].text
    if problem is None and any(rule.sure for rule in matching):
        return Access.OPEN, None
    if matching and not any(rule.sure for rule in matching):
        return Access.UNCLEAR, matching[0].text
    return (Access.UNCLEAR, problem) if problem is not None else (Access.CLOSED, None)


def reading_rule(directory: str) -> str:
    """The rule that lets all files below a directory be read."""
    escaped = _SPECIAL.sub(r"\\\g<0>", directory.rstrip("/"))
    name = f"{escaped}/**"
    return f'"{name}" r,' if re.search(r"[\s,!#=()+&]", name) else f"{name} r,"
