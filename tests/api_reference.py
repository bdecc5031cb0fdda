"""The reference in docs/api.md, made of the docstrings.

`python -m tests.api_reference` writes it anew; tests/test_api.py sees that it is what it would be.
"""

import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import igvmfw

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"
BEGIN, END = "<!-- reference: begin -->\n", "<!-- reference: end -->\n"
GROUPS = {
    "Errors": "igvmfw.errors",
    "IGVM files": "igvmfw.platforms igvmfw.images igvmfw.igvm.image igvmfw.igvm.payload "
    "igvmfw.igvm.summary",
    "Check": "igvmfw.check igvmfw.findings igvmfw.qemu.emulator igvmfw.qemu.acceptance",
    "Measure and wrap": "igvmfw.igvm.measure igvmfw.qemu.cpus igvmfw.igvm.wrap",
    "Descriptors and the catalogue": "igvmfw.description igvmfw.inventory igvmfw.describe "
    "igvmfw.qemu.descriptor "
    "igvmfw.qemu.schema igvmfw.qemu.catalog",
    "Choice": "igvmfw.virt.domain igvmfw.select igvmfw.verdict",
    "Domains": "igvmfw.manager igvmfw.rewrite igvmfw.virt.record igvmfw.virt.host igvmfw.launch",
    "Verify": "igvmfw.verify",
}
MEMBERS = {  # public of classes whose instances are more than their attributes
    "IgvmfwError": "message where hint exit_code",
    "IgvmFile": "parse write supported architecture revision page_size",
    "Acceptance": "name",
    "Finding": "where",
    "Descriptor": "parse from_dict to_dict write",
    "Catalog": "available find",
    "Domain": "parse write copy name type vcpus memory emulator",
    "Connection": "native uri is_remote is_system",
    "Measurement": "is_of",
}
_SECTION = re.compile(r"(Attributes|Args|Returns|Raises):$")
_ITEM = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def names_of(module: str) -> list[str]:
    """The public names of a module, in the order of the table."""
    return [name for name, (home, _) in igvmfw._HOME.items() if home == module]


def sections(doc: str) -> dict[str, list[str]]:
    """The parts of a docstring: what stands before any heading is under ''."""
    parts: dict[str, list[str]] = {"": []}
    current = parts[""]
    for line in inspect.cleandoc(doc).splitlines():
        if heading := _SECTION.fullmatch(line):
            current = parts.setdefault(heading[1], [])
        else:
            current.append(line)
    return parts


def items(lines: list[str]) -> dict[str, str]:
    """The entries of a section, each with its text in one line."""
    found: dict[str, str] = {}
    last = ""
    for line in lines:
        if entry := _ITEM.fullmatch(line):
            last = entry[1]
            found[last] = entry[2]
        elif last and line.strip():
            found[last] += f" {line.strip()}"
    return found


def render() -> str:
    """The whole reference."""
    lines: list[str] = []
    for title, modules in GROUPS.items():
        lines += [f"### {title}", ""]
        for module in modules.split():
            for name in names_of(module):
                lines += _entry(name, getattr(igvmfw, name))
    return "\n".join(lines)


def _entry(name: str, thing: object) -> Iterator[str]:
    yield f"#### `{name}{_signature(thing)}`"
    yield ""
    parts = sections(thing.__doc__ or "")
    text = "\n".join(parts.pop("")).strip()
    yield from (text, "")
    if isinstance(thing, type) and issubclass(thing, enum.Enum):
        yield from (f"`{member.name}`" + f" = `{member.value!r}`  " for member in thing)
        yield ""
    for member in MEMBERS.get(name, "").split():
        yield f"- `{name}.{member}`{_member_text(thing, member)}"
    if name in MEMBERS:
        yield ""
    for heading, lines in parts.items():
        listed = items(lines)
        if heading == "Returns" or not listed:
            yield from (f"{heading}: {' '.join(line.strip() for line in lines).strip()}", "")
            continue
        yield f"{heading}:"
        yield ""
        yield from (f"- `{item}`: {text}" for item, text in listed.items())
        yield ""


def _member_text(owner: object, member: str) -> str:
    doc = getattr(inspect.getattr_static(owner, member, None), "__doc__", None)
    is_own = isinstance(
        inspect.getattr_static(owner, member, None), property | classmethod
    ) or inspect.isfunction(inspect.getattr_static(owner, member, None))
    return f": {doc.splitlines()[0]}" if doc and is_own else ""


def _signature(thing: object) -> str:
    if not inspect.isfunction(thing):
        return ""
    signature = inspect.signature(thing)
    parameters = [
        p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()
    ]
    bare = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return re.sub(r"PosixPath\('(.*?)'\)", r"Path('\1')", _without_addresses(str(bare)))


def _without_addresses(text: str) -> str:
    return re.sub(r"<function <lambda> at 0x[0-9a-f]+>", "…", text)


def written() -> str:
    """The document as it should be."""
    text = DOCUMENT.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{render()}{END}{tail}"


if __name__ == "__main__":
    DOCUMENT.write_text(written())
