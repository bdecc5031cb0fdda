"""Domain XML that means harm: refused, or harmless, in bounded time and memory.

Each runs in a process of its own, whose limits the kernel keeps.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from igvmfw.platforms import Platform
from igvmfw.virt.document import MAX_BYTES
from tests.cli.commands import one_line
from tests.igvm import samples
from tests.virt import domains

MEMORY = 512 << 20  # bytes of address space
SECONDS = 20  # of processor time

LAUGHS = "".join(f"<!ENTITY {chr(98 + n)} '{f'&{chr(97 + n)};' * 16}'>" for n in range(12))
OURS = (
    "<qemu:arg value='-object'/><qemu:arg value='igvm-cfg,id=igvm0,file=/x'/>"
    "<qemu:arg value='-machine'/><qemu:arg value='igvm-cfg=igvm0'/>"
)


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def attack(data: bytes | Path, *words: str | Path, command: str = "rewrite") -> tuple[int, str]:
    """Give a domain to a command on standard input; returns exit status and messages."""
    process = [sys.executable, "-m", "igvmfw", command, *map(str, words), "-"]
    stdin = None if isinstance(data, bytes) else data.open("rb")
    # the limits are the command's, not those of what measures the tests' coverage within it
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        process,
        input=data if isinstance(data, bytes) else None,
        stdin=stdin,
        capture_output=True,
        check=False,
        preexec_fn=limit,
        env=plain,
    )
    assert done.returncode >= 0, f"ended by signal {-done.returncode}"
    said = done.stderr.decode()
    assert "Traceback" not in said
    assert "internal error" not in said
    assert (done.stdout == b"") == (done.returncode != 0)
    return done.returncode, said


def filled(before: str, repeated: str | Callable[[int], str], after: str) -> bytes:
    """As much of something as a document may have."""
    text = repeated if isinstance(repeated, str) else repeated(10**6)
    times = (MAX_BYTES - len(before) - len(after)) // len(text.encode())
    parts = (repeated if isinstance(repeated, str) else repeated(n) for n in range(times))
    return f"{before}{''.join(parts)}{after}".encode()


def inside(tag: str, text: str) -> tuple[str, str]:
    """A domain, cut where an element ends."""
    before, end, after = text.partition(f"</{tag}>")
    return before, end + after


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("firmware") / "small.igvm"
    path.write_bytes(samples.small(*(Platform.NATIVE, Platform.SEV, Platform.SEV_ES)))
    return path


def asking(file: Path, text: str = domains.BY_PATH) -> str:
    return text.replace("/usr/share/igvm/ovmf.igvm", str(file))


@pytest.mark.parametrize(
    "doctype",
    [
        f"<!DOCTYPE domain [<!ENTITY a 'aaaaaaaaaaaaaaaa'>{LAUGHS}]>",
        f"<!DOCTYPE domain [<!ENTITY a '{'a' * 100_000}'>]>",
        "<!DOCTYPE domain [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>",
        "<!DOCTYPE domain [<!ENTITY a SYSTEM 'file:///dev/zero'>]>",
        "<!DOCTYPE domain [<!ENTITY % p SYSTEM 'http://127.0.0.1:9/x'> %p;]>",
        "<!DOCTYPE domain SYSTEM 'http://127.0.0.1:9/domain.dtd'>",
        "<!DOCTYPE domain PUBLIC '-//x' 'file:///dev/zero'>",
    ],
)
def test_entities_are_neither_expanded_nor_fetched(doctype: str) -> None:
    text = domains.BY_PATH.replace("guest", "&m;&a;" * 1000)
    code, said = attack((doctype + text).encode())
    assert code == 3
    one_line(said, "document type declaration")


def test_what_includes_or_transforms_is_text_like_any_other(file: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    include = (
        f"<xi:include xmlns:xi='http://www.w3.org/2001/XInclude' href='{secret}' parse='text'/>"
    )
    text = asking(file).replace("<os>", f"<metadata>{include}</metadata><os>")
    process = [sys.executable, "-m", "igvmfw", "rewrite", "-"]
    done = subprocess.run(process, input=text.encode(), capture_output=True, check=True)
    assert include.encode() in done.stdout


def test_a_hundred_megabytes_of_nesting(tmp_path: Path) -> None:
    huge = tmp_path / "huge.xml"
    with huge.open("wb") as stream:
        for _ in range(100):
            stream.write(b"<a>" * ((1 << 20) // 3))
    code, said = attack(huge)
    assert code == 3
    one_line(said, f"larger than {MAX_BYTES} bytes")
    process = [sys.executable, "-m", "igvmfw", "restore", str(huge)]
    done = subprocess.run(process, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert (done.returncode, done.stdout) == (3, "")
    one_line(done.stderr, huge, f"larger than {MAX_BYTES} bytes")


FULL = {
    "depth": filled("", "<a>", ""),
    "attributes": filled("<domain ", lambda n: f"a{n}='' ", "/>"),
    "namespaces": filled("<domain ", lambda n: f"xmlns:n{n}='u' ", "/>"),
    "nested-namespaces": filled("", lambda n: f"<a xmlns:n{n}='u'>", ""),
    "references": filled("<domain>", "&amp;", "</domain>"),
    "one-value": filled("<domain type='", "&#39;", "'/>"),
}


@pytest.mark.parametrize("kind", list(FULL))
def test_a_document_full_of_one_thing(kind: str) -> None:
    code, _ = attack(FULL[kind], "--igvm")
    assert code in (0, 1, 3)


PARTS = {
    "children": ("os", "<x/>"),
    "loaders": ("os", "<loader/>"),
    "stores": ("os", "<nvram/>"),
    "metadata": ("domain", "<metadata/>"),
    "security": ("domain", "<launchSecurity type='sev'/>"),
}


@pytest.mark.parametrize("kind", list(PARTS))
def test_a_domain_full_of_one_part(kind: str, file: Path) -> None:
    tag, part = PARTS[kind]
    text = asking(file).replace(f"<loader type='igvm'>{file}</loader>", "")
    before, after = inside(tag, text)
    code, said = attack(filled(before, part, after), f"--igvm={file}")
    if kind == "children":
        assert code == 0
    else:
        assert code == 3
        one_line(said, "more than one <")


BESIDE: dict[str, tuple[str, str | Callable[[int], str], str]] = {
    "comment": ("<!--", "-<", "-->"),
    "attributes": ("<x ", lambda n: f"a{n}='' ", "/>"),
    "namespaces": ("<x ", lambda n: f"xmlns:n{n}='urn:x' ", "/>"),
}


@pytest.mark.parametrize("kind", list(BESIDE))
def test_a_domain_with_much_that_is_no_concern(kind: str, file: Path) -> None:
    before, part, after = BESIDE[kind]
    if kind == "comment":
        after += asking(file)
    else:
        start, end = inside("domain", asking(file))
        before, after = f"{start}<metadata>{before}", f"{after}</metadata>{end}"
    code, said = attack(filled(before, part, after))
    assert code == 0, said


@pytest.mark.parametrize("command", ["rewrite", "restore"])
@pytest.mark.parametrize("kind", ["arguments", "ours", "taken", "made"])
def test_a_record_full_of_one_thing(command: str, kind: str, file: Path) -> None:
    first = subprocess.run(
        [sys.executable, "-m", "igvmfw", "rewrite", "-"],
        input=asking(file).encode(),
        capture_output=True,
        check=True,
    ).stdout.decode()
    cut, more = {
        "arguments": ("</qemu:commandline>", "<qemu:arg value='-x'/>"),
        "ours": ("</qemu:commandline>", OURS),
        "taken": ("</igvmfw:request>", "<igvmfw:taken index='9'><firmware/></igvmfw:taken>"),
        "made": ("commandline metadata'", "x "),
    }[kind]
    before, end, after = first.partition(cut)
    assert end, first
    code, _ = attack(filled(before, more, end + after), command=command)
    assert code == (3 if kind in ("ours", "taken") else 0)
