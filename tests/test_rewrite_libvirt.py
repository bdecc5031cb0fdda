"""What is rewritten, judged by libvirt: its schemas, and the domains of its own tests."""

from pathlib import Path

import pytest
from lxml import etree

from igvmfw.errors import DomainError, IgvmfwError, RefusedError
from igvmfw.platforms import Platform
from igvmfw.rewrite import convert, request_of, restore, rewrite
from igvmfw.virt.domain import COMMANDLINE, Domain
from tests.parts import need
from tests.sources import libvirt_source, newer_libvirt_source, version_of
from tests.virt import domains
from tests.virt.choices import chosen, domain, for_, same, without

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")


@pytest.fixture(scope="module")
def schema() -> "etree.RelaxNG":
    need(SCHEMA.exists(), "libvirt's schemas (Debian: libvirt0)")
    return etree.RelaxNG(etree.parse(SCHEMA))


@pytest.mark.parametrize("text", [domains.REQUEST, domains.BY_PATH, domains.SEV])
def test_the_result_is_valid_for_libvirts_schema(schema: "etree.RelaxNG", text: str) -> None:
    before = domain(text)
    assert not schema.validate(before.document.tree)
    after = rewrite(before, for_(text)).domain
    assert schema.validate(after.document.tree), schema.error_log.last_error
    converted = rewrite(convert(domain(domains.EFI)), chosen(Platform.SEV)).domain
    assert schema.validate(converted.document.tree), schema.error_log.last_error


@pytest.mark.parametrize("newer", [False, True])
def test_libvirts_own_domains(newer: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Each becomes valid XML or one clear error, and comes back as it was."""
    source = newer_libvirt_source() if newer else libvirt_source()
    need(source is not None, "libvirt's source package (through apt)")
    assert source is not None
    schema = etree.RelaxNG(etree.parse(source / "src/conf/schemas/domain.rng"))
    files = corpus(source)
    rewritten = 0
    refused: list[IgvmfwError] = []
    for file in files:
        data = file.read_bytes()
        try:
            before = Domain.parse(data)
            assert before.write() == data, file
            valid = schema.validate(before.document.tree)
            asking = convert(before, "/usr/share/igvm/a, b.igvm")
            request = request_of(asking)
            assert request is not None
            policy = chosen(request.platform).policy if request.policy is None else request.policy
            choice = chosen(request.platform, path="/usr/share/igvm/a, b.igvm", policy=policy)
            after = rewrite(asking, choice).domain
        except (DomainError, RefusedError) as error:
            refused.append(error)
            continue
        rewritten += 1
        assert after.os.loader is None, file
        assert after.os.variables is None, file
        assert same(restore(after), before), file
        reread = Domain.parse(after.write())
        assert rewrite(reread, choice).domain is reread, file
        assert schema.validate(reread.document.tree) or not valid, schema.error_log.last_error
        assert unchanged_parts(reread) == unchanged_parts(before), file
    with capsys.disabled():
        print(
            f"\n{len(files)} domains of libvirt {version_of(source)}: {rewritten} rewritten, "
            f"{len(refused)} refused, of {len({error.message for error in refused})} kinds"
        )
    assert rewritten > 500
    assert all(error.hint for error in refused if "not well-formed" not in error.message)
    assert rewritten + len(refused) == len(files) > 1000


def corpus(source: Path) -> list[Path]:
    """libvirt's own domains for QEMU."""
    found = [*source.glob("tests/qemuxml2argvdata/*.xml")]
    return sorted([*found, *source.glob("tests/qemuxmlconfdata/*.xml")])


def unchanged_parts(source: Domain) -> bytes:
    """The canonical form without all that a rewriter may touch."""
    copy = source.copy()
    copy.os.element.attrib.pop("firmware", "")
    ours = "igvm-cfg"
    for commandline in copy.root.findall(COMMANDLINE):
        elements = list(commandline)
        for place, element in enumerate(elements):
            if ours in element.get("value", ""):
                commandline.remove(element)
                commandline.remove(elements[place - 1])
        if not len(commandline):
            copy.root.remove(commandline)
    for empty, child in (
        ("metadata", "{urn:igvmfw:domain:1}domain"),
        ("memoryBacking", "locked"),
        ("launchSecurity", "policy"),
        ("os", "firmware"),
        ("os", "loader"),
        ("os", "nvram"),
    ):
        for parent in copy.root.findall(empty):
            for element in parent.findall(child):
                parent.remove(element)
            if not len(parent) and empty in ("metadata", "memoryBacking"):
                copy.root.remove(parent)
    return without(copy)
