"""Typed views on a domain, and what it asks of IGVM firmware."""

import pytest

from igvmfw.errors import DomainError
from igvmfw.platforms import Platform
from igvmfw.virt.domain import Domain, Request
from tests.virt import domains


def domain(text: str) -> Domain:
    return Domain.parse(text.encode())


def test_views_read_what_libvirt_reads() -> None:
    view = domain(domains.EFI)
    assert (view.type, view.name, view.emulator, view.vcpus) == ("kvm", "guest", None, 1)
    assert view.memory == 512 << 20
    assert (view.os.type, view.os.architecture, view.os.machine) == ("hvm", "x86_64", "q35")
    assert view.os.loader is not None
    assert view.os.loader.path == "/usr/share/OVMF/OVMF_CODE_4M.fd"
    assert view.security is not None
    assert (view.security.type, view.security.policy) == ("sev", 3)
    crowded = domain(domains.CROWDED)
    assert crowded.arguments == ("-L", "/usr/share/a,b")
    assert (crowded.vcpus, crowded.memory) == (1, 1 << 30)


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        ("<memory>1024</memory>", 1 << 20),
        ("<memory unit='bytes'>4096</memory>", 4096),
        ("<memory unit='KB'>4</memory>", 4000),
        ("<memory unit='GiB'> 2 </memory>", 2 << 30),
        ("<memory unit='T'>1</memory>", 1 << 40),
        ("", None),
    ],
)
def test_memory_in_libvirts_units(memory: str, size: int | None) -> None:
    assert domain(f"<domain>{memory}</domain>").memory == size


def test_vcpus_at_start() -> None:
    assert domain("<domain/>").vcpus == 1
    assert domain("<domain><vcpu current='2'>4</vcpu></domain>").vcpus == 2
    each = "<vcpu id='0' enabled='yes'/><vcpu id='1' enabled='no'/><vcpu id='2' enabled='yes'/>"
    assert domain(f"<domain><vcpu>3</vcpu><vcpus>{each}</vcpus></domain>").vcpus == 2


def test_an_empty_uuid_is_none_and_is_filled_in() -> None:
    text = domains.BY_PATH.replace("  <memory", "  <uuid/>\n  <memory")
    empty = domain(text)
    assert empty.uuid is None
    empty.add_uuid("c7a5fdbd-edaf-9455-926a-d65c16db1809")
    filled = "<uuid>c7a5fdbd-edaf-9455-926a-d65c16db1809</uuid>"
    assert empty.write().decode() == text.replace("<uuid/>", filled)


def test_both_request_forms() -> None:
    assert domain(domains.REQUEST).request() == Request(
        architecture="x86_64",
        machine="q35",
        platform=Platform.NATIVE,
        features={"vtpm": True, "secure-boot": False},
    )
    request = domain(domains.BY_PATH).request()
    assert request is not None
    assert (request.path, request.features) == ("/usr/share/igvm/ovmf.igvm", {})


def test_no_request() -> None:
    assert domain(domains.EFI).request() is None
    assert domain("<domain type='lxc'><os><type>exe</type></os></domain>").request() is None
    assert domain("<domain/>").request() is None


@pytest.mark.parametrize(
    ("security", "platform", "policy"),
    [
        ("", Platform.NATIVE, None),
        ("<launchSecurity type='sev'/>", Platform.SEV, None),
        ("<launchSecurity type='sev'><policy>0x0001</policy></launchSecurity>", Platform.SEV, 1),
        ("<launchSecurity type='sev'><policy>7</policy></launchSecurity>", Platform.SEV_ES, 7),
        ("<launchSecurity type='sev'><policy>10</policy></launchSecurity>", Platform.SEV, 16),
        (
            "<launchSecurity type='sev-snp'><policy>0x30000</policy></launchSecurity>",
            Platform.SEV_SNP,
            0x30000,
        ),
        ("<launchSecurity type='tdx'/>", Platform.TDX, None),
    ],
)
def test_platform_follows_from_launch_security(
    security: str, platform: Platform, policy: int | None
) -> None:
    request = domain(domains.SEV.replace("<launchSecurity type='sev'/>", security)).request()
    assert request is not None
    assert (request.platform, request.policy) == (platform, policy)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<boot dev='hd'/>", "<nvram>/x</nvram>", ("<nvram>", "line", "--igvm")),
        ("<boot dev='hd'/>", "<loader type='pflash'>/x</loader>", ("'pflash'", "line")),
        ("<boot dev='hd'/>", "<loader>/x</loader>", ("'rom'",)),
        ("<boot dev='hd'/>", "<loader stateless='no'/>", ("stateless",)),
        (
            "<boot dev='hd'/>",
            "<loader type='igvm'>a</loader><loader/>",
            ("more than one <loader>",),
        ),
        ("<boot dev='hd'/>", "</os><os>", ("more than one <os>",)),
        ("enabled='no'", "enabled='maybe'", ("enabled",)),
        ("name='secure-boot'", "name='vtpm'", ("both wanted and unwanted",)),
        ("name='vtpm'", "", ("a name",)),
        ("</os>", "</os><launchSecurity type='s390-pv'/>", ("s390-pv",)),
        (
            "</os>",
            "</os><launchSecurity type='sev'><policy>0xzz</policy></launchSecurity>",
            ("'0xzz'", "hexadecimal"),
        ),
        (
            "</os>",
            f"</os><launchSecurity type='sev'><policy>{'f' * 100_000}</policy></launchSecurity>",
            ("hexadecimal",),
        ),
    ],
)
def test_contradictions_name_the_line_and_the_remedy(
    old: str, new: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(DomainError) as caught:
        domain(domains.REQUEST.replace(old, new, 1)).request()
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_loader_of_type_igvm_needs_a_file_and_no_other_firmware() -> None:
    empty = domains.BY_PATH.replace("/usr/share/igvm/ovmf.igvm", " \n ")
    with pytest.raises(DomainError, match="names no file"):
        domain(empty).request()
    efi = domains.BY_PATH.replace("<os>", "<os firmware='efi'>")
    with pytest.raises(DomainError, match="firmware='efi' beside"):
        domain(efi).request()


def test_attributes_of_the_loader_narrow_the_choice_as_in_libvirt() -> None:
    text = domains.REQUEST.replace("<boot dev='hd'/>", "<loader secure='yes'/>")
    request = domain(text).request()
    assert request is not None
    assert request.features["requires-smm"] is True


@pytest.mark.parametrize("text", ["<network/>", "<domainsnapshot/>", "<x:domain xmlns:x='y'/>"])
def test_only_a_domain_is_a_domain(text: str) -> None:
    with pytest.raises(DomainError, match="not <domain>"):
        domain(text)


ABSURD = [
    "-1",
    "-0",
    "+1",
    "1e9",
    "1.5",
    "NaN",
    "inf",
    "9" * 50,
    "٣",
    "１",
    "1_0",
    "two",
    "\u00a03",
]


@pytest.mark.parametrize("number", ["", "0", *ABSURD])
def test_absurd_numbers(number: str) -> None:
    for text in (f"<vcpu>{number}</vcpu>", f"<vcpu current='{number or 0}'>9</vcpu>"):
        with pytest.raises(DomainError, match="positive number"):
            _ = domain(f"<domain>{text}</domain>").vcpus
    with pytest.raises(DomainError, match="positive number"):
        _ = domain(f"<domain><memory unit='GiB'>{number}</memory></domain>").memory


@pytest.mark.parametrize("unit", ["", "parsec", "Kİ", "-", "GiB "])
def test_absurd_units(unit: str) -> None:
    text = f"<domain><memory unit='{unit}x'>1</memory></domain>"
    with pytest.raises(DomainError, match="unknown unit"):
        _ = domain(text).memory


@pytest.mark.parametrize(
    "policy", [*(n for n in ABSURD if n != "1e9"), "0x", "0x1_0", "f" * 9, "", " "]
)
def test_absurd_policies(policy: str) -> None:
    text = f"<launchSecurity type='sev'><policy>{policy}</policy></launchSecurity>"
    with pytest.raises(DomainError, match="not a hexadecimal number of 32 bits"):
        domain(domains.SEV.replace("<launchSecurity type='sev'/>", text)).request()
