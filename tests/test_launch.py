"""From a request to a domain that libvirt takes, as far as no libvirt is needed."""

import dataclasses
from pathlib import Path

import pytest

from igvmfw.launch import Options, prepare, recorded
from igvmfw.platforms import Platform
from igvmfw.virt.domain import Domain
from igvmfw.virt.host import Capabilities
from tests.igvm import samples
from tests.virt import domains
from tests.virt.choices import canonical

HOST = Capabilities(emulator="/usr/bin/qemu-system-x86_64", igvm=False, sev=True, sev_es=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sev.igvm"
    path.write_bytes(samples.small(Platform.SEV, Platform.SEV_ES))
    return path


def asking(file: Path, text: str = domains.SEV) -> Domain:
    loader = f"<loader type='igvm'>{file}</loader>"
    return Domain.parse(text.replace("</type>", f"</type>\n    {loader}").encode())


def test_a_libvirt_that_knows_igvm_gets_the_request_as_it_stands(file: Path) -> None:
    request = asking(file)
    before = prepare(request, Options(), capabilities=HOST)
    assert recorded(before.domain) is not None
    knowing = dataclasses.replace(HOST, igvm=True)
    for domain in (request, before.domain):  # also one that was rewritten for an older release
        passed = prepare(domain, Options(), capabilities=knowing)
        assert canonical(passed.domain.document.tree) == canonical(request.document.tree)
        assert "passed on" in passed.changes[0]


@pytest.mark.parametrize(
    ("sev_es", "platforms", "policy"),
    [
        (True, (Platform.SEV, Platform.SEV_ES), 0x07),
        (False, (Platform.SEV, Platform.SEV_ES), 0x03),
        (True, (Platform.SEV,), 0x03),
    ],
)
def test_a_bare_launch_security_gets_virt_installs_policy(
    file: Path, sev_es: bool, platforms: tuple[Platform, ...], policy: int
) -> None:
    file.write_bytes(samples.small(*platforms))
    host = dataclasses.replace(HOST, sev_es=sev_es)
    prepared = prepare(asking(file), Options(), capabilities=host)
    assert prepared.domain.security is not None
    assert prepared.domain.security.policy == policy
    assert f"guest policy 0x{policy:x} filled in" in prepared.changes[0]


@pytest.mark.parametrize("vcpus", ["9" * 19, "4294967296"])
def test_absurd_counts_of_vcpus_cost_nothing(file: Path, vcpus: str) -> None:
    for policy in ("0x1", "0x5"):
        text = domains.SEV.replace("<vcpu>2<", f"<vcpu>{vcpus}<").replace(
            "type='sev'/>", f"type='sev'><policy>{policy}</policy></launchSecurity>"
        )
        assert recorded(prepare(asking(file, text), Options(), capabilities=HOST).domain)


def test_an_absurd_size_of_memory_is_for_libvirt_to_refuse(file: Path) -> None:
    text = domains.SEV.replace("'MiB'>512<", f"'TiB'>{'9' * 19}<")
    assert recorded(prepare(asking(file, text), Options()).domain)
