"""Rules of AppArmor, read as AppArmor's own parser reads them, and in bounded time."""

import re
import time
from itertools import product
from pathlib import Path

import pytest

from igvmfw.doctor.apparmor import Access, judge, load, reading_rule
from igvmfw.machine import Text
from tests.testbed.package_root import PackageRoot

OPEN, CLOSED, DENIED, UNCLEAR = Access.OPEN, Access.CLOSED, Access.DENIED, Access.UNCLEAR
DIRECTORIES = ("/srv/a b", '/srv/a,b{c,d}[e]*"\\', "/srv/a\nb", "/srv/@{HOME}^", "/ä", "/srv/#")
RULES = (
    "/a/[^bc]x r", "/c/{a,{b,c*}}x r", '"/d/a b\\*c" r', "/e/{,**/}*.igvm rk", "/f/a\\,b r",
    "/g/** r", "/h/a#b r", "/i/a,b r", "/l/a\\ b r", "r /m/x", "file /n/x rk", "audit /o/? r",
    '"/q/a\\{b\\}\\[c\\]" mr', "/s/a@b r", "/t/a^b r", "/u/[a-c/]x R", "/v/**/y r", "/w/*/y r",
    "/x/[a-c]y r", "/y/a.b+(c)|$ r", "/z/ä? r", "allow /A/***.igvm r", "/B/{*.igvm,*/} r",
    *(reading_rule(directory).removesuffix(",") for directory in DIRECTORIES),
)  # fmt: skip
NAMES = (
    "a", "b", "ax", "dx", "bx", "/x", "cx", "cyx", "a b*c", "a bxc", "x.igvm", "x/y.igvm", "xigvm",
    "a,b", "a#b", "a b", "x", "xx", "a{b}[c]", "a@b", "a^b", "y", "x/y", "x/z/y", "ay", "-y", "e\n",
    "a.b+(c)|$", "äx", "äö", "ä", "ccx", "a/b", ".igvm",
)  # fmt: skip


def access(text: str, *files: str, **included: str) -> list[Access]:
    texts = {"main": text, **included}
    rules = load("main", lambda name: [Text(text=texts[name])] if name in texts else [])
    return [found for found, _ in judge(rules, files).values()]


def test_patterns_mean_what_apparmors_parser_says(tmp_path: Path) -> None:
    root = PackageRoot(kind="deb-sid", directory=tmp_path)
    rules = ",\n  ".join(RULES)
    (root.shared / "profile").write_text(f"profile x {{\n  {rules},\n}}\n")
    parse = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--dump", "rule-exprs"]
    said = root.run(*parse, "/shared/profile")
    theirs = re.findall(r"^aare: (.*?)   ->   (.*?)\nrule:", said, re.MULTILINE | re.DOTALL)
    assert len(theirs) == len(RULES)
    folders = {re.sub(r"(?<=.)/.*", "/", rule.strip('"'), flags=re.DOTALL) for rule, _ in theirs}
    files = [f"{folder}{name}" for folder, name in product(sorted(folders), NAMES)]
    files += [f"{directory}/{name}" for directory, name in product(DIRECTORIES, NAMES)]
    files = [file for file in dict.fromkeys(files) if "//" not in file]
    patterns = [re.compile(theirs.encode(), re.DOTALL) for _, theirs in theirs]
    expected = [any(p.fullmatch(file.encode()) for p in patterns) for file in files]
    assert expected.count(True) > len(DIRECTORIES) * len(NAMES)
    for file, found, opens in zip(files, access(f"{rules},", *files), expected, strict=True):
        assert found is (OPEN if opens else CLOSED), file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/* r, # all\n", OPEN),
        ("# /srv/* r,\n", CLOSED),
        ("/srv/* w,", CLOSED),
        ("/srv/* rw, deny /srv/a* r,", DENIED),
        ("/srv/* rw, deny /srv/a* w,", OPEN),
        ("owner /srv/* r,", UNCLEAR),
        ("/srv/* r, deny owner /srv/* r,", UNCLEAR),
        ("file,", OPEN),
        ("capability, network inet stream, /srv/** r,", OPEN),
        ("link /srv/a.igvm -> /srv/b,", CLOSED),
        ("profile other {\n  /srv/* r,\n  include <more>\n}\n", CLOSED),
        ("if $wanted {\n  /srv/* r,\n}\n", UNCLEAR),
        ("profile other {\n}\n/srv/* r,", OPEN),
        ("include <more>\n", OPEN),
        ("  #include if exists <more>\n", OPEN),
        ("include <main>\ninclude <none>\n", CLOSED),
        ("include /else/where\n", UNCLEAR),
        ("@{folder}/*.igvm r,", UNCLEAR),
        ("@{folder}/*.fd r,", CLOSED),
        ("/srv/{a.igvm} r,", UNCLEAR),  # which AppArmor refuses
        ("/srv/[a r,", UNCLEAR),
        ("/srv/\\x61* r,", UNCLEAR),
        ("/home/{a r,", CLOSED),
        (f"/srv/{'{,' * 60}a{'}' * 60} r,", UNCLEAR),
    ],
)
def test_rules(text: str, expected: Access) -> None:
    assert access(text, "/srv/a.igvm", more="/srv/* r,\n") == [expected]


@pytest.mark.parametrize(
    "text",
    [
        f"/{'**a' * 1000}b r,\n" * 100,
        f"/{'{,a,' * 49}{'}' * 49} r,\n" * 2000,
        f"/{'[!-ÿ]*' * 600} r,\n" * 100,
        '"\\' * 200_000,
        "{" * 500_000,
        "/a r,\n" * 80_000,
        ",".join(["include <main>\n"] * 30_000),
    ],
    ids=lambda text: text[:8],
)
def test_rules_that_take_long(text: str) -> None:
    begin = time.process_time()
    access(text, *(f"/{'a' * 200}{number}" for number in range(200)))
    assert time.process_time() - begin < 30


def test_what_cannot_be_seen_makes_nothing_sure() -> None:
    denied = Text(problem="Permission denied")
    rules = load("main", lambda name: [Text(text="/srv/* r,"), denied])
    found = judge(rules, ["/srv/a", "/a"])
    assert found == dict.fromkeys(found, (UNCLEAR, "/etc/apparmor.d/main: Permission denied"))
    huge = load("main", lambda name: iter([Text(text="/srv/* r,\n")] * 100_000))
    assert "characters" in str(huge.problem)
