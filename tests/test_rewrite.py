"""Rewriting a domain for unmodified libvirt, and back: only what must change changes."""

import re

import pytest
from lxml import etree

from igvmfw.commandline import object_argument
from igvmfw.errors import DomainError, RefusedError
from igvmfw.platforms import Platform
from igvmfw.rewrite import as_request, convert, request_of, restore, rewrite
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import Record
from tests.virt import domains
from tests.virt.choices import SHA256, chosen, domain, for_, same, without

FORMS = [domains.REQUEST, domains.BY_PATH, domains.SEV, domains.CROWDED]


@pytest.mark.parametrize("text", FORMS)
def test_restoring_gives_the_request_back_byte_for_byte(text: str) -> None:
    rewritten = rewrite(domain(text), for_(text)).domain
    assert rewritten.write() != text.encode()
    assert same(restore(rewritten), domain(text))
    reread = Domain.parse(rewritten.write())
    assert same(restore(reread), domain(text))
    if text is not domains.CROWDED:  # its comments after the end stand on lines of their own
        assert restore(reread).write() == text.encode()


@pytest.mark.parametrize("text", FORMS)
def test_rewriting_again_changes_nothing(text: str) -> None:
    once = rewrite(domain(text), for_(text)).domain
    assert rewrite(once, for_(text)).domain.write() == once.write()
    reread = Domain.parse(once.write())
    assert rewrite(reread, for_(text)).domain.write() == once.write()


def test_a_namespace_that_is_no_absolute_uri_is_the_users() -> None:
    """libvirt takes any, and so stays whatever reads the metadata."""
    own = "<metadata><my:app xmlns:my='mycompany'>x</my:app></metadata>"
    text = domains.SEV.replace("<os ", f"{own}<os ")
    once = rewrite(domain(text), for_(text)).domain
    assert "<my:app xmlns:my='mycompany'>x</my:app>" in once.write().decode()
    assert rewrite(once, for_(text)).domain is once
    assert restore(once).write() == text.encode()


def test_what_libvirt_gets() -> None:
    result = rewrite(domain(domains.REQUEST), chosen()).domain
    assert result.os.firmware is None
    assert result.os.loader is None
    assert result.os.element.find("firmware") is None
    assert result.arguments == (
        "-object",
        "igvm-cfg,id=igvm0,file=/usr/share/igvm/ovmf.igvm",
        "-machine",
        "igvm-cfg=igvm0",
    )
    record = Record.find(result)
    assert record is not None
    assert record.file is not None
    assert record.file.path == "/usr/share/igvm/ovmf.igvm"
    assert (record.file.sha256, record.file.platform) == (SHA256, Platform.NATIVE)
    assert (record.file.descriptor, record.file.measurement) == ("60-ovmf.json", "ab" * 32)


def test_everything_else_stays() -> None:
    before = domain(domains.CROWDED)
    after = rewrite(before, chosen(Platform.SEV)).domain
    ours = ("metadata/{urn:igvmfw:domain:1}domain", "launchSecurity/policy", "memoryBacking/locked")
    taken = ("os/firmware", "os/loader")
    left = before.copy()
    del left.os.element.attrib["firmware"]
    assert after.arguments[:2] == before.arguments
    assert after.root.find(".//{http://libvirt.org/schemas/domain/qemu/1.0}env") is not None
    for argument in list(after.argument_elements())[2:]:
        parent = argument.getparent()
        assert parent is not None
        parent.remove(argument)
    assert without(after, *ours) == without(left, *taken)
    text = after.write().decode()
    for kept in ("<!-- before -->", "<!-- after -->", "<![CDATA[a < b & c]]>", "<?keep this?>"):
        assert kept in text


def test_a_changed_choice_updates_in_place() -> None:
    once = rewrite(domain(domains.CROWDED), chosen(Platform.SEV)).domain
    commandline = next(once.argument_elements()).getparent()
    assert commandline is not None
    once.add_arguments("-msg", "timestamp=on")
    again = rewrite(
        once, chosen(Platform.SEV, path="/other.igvm", sha256="f" * 64, policy=1)
    ).domain
    assert again.arguments == (
        "-L",
        "/usr/share/a,b",
        "-object",
        "igvm-cfg,id=igvm0,file=/other.igvm",
        "-machine",
        "igvm-cfg=igvm0",
        "-msg",
        "timestamp=on",
    )
    assert again.security is not None
    assert again.security.policy == 1
    record = Record.find(again)
    assert record is not None
    assert record.file is not None
    assert record.file.sha256 == "f" * 64
    back = restore(again)
    assert back.arguments == ("-L", "/usr/share/a,b", "-msg", "timestamp=on")


def test_the_request_is_read_from_a_rewritten_domain() -> None:
    for text in FORMS:
        rewritten = rewrite(domain(text), for_(text)).domain
        assert rewritten.request() is None
        assert request_of(rewritten) == domain(text).request()


def test_a_rewritten_domain_can_be_edited_before_it_is_restored() -> None:
    rewritten = rewrite(domain(domains.REQUEST), chosen()).domain
    rewritten.os.element.append(etree.Element("bootmenu", {"enable": "yes"}))
    back = restore(rewritten)
    assert back.os.element.find("bootmenu") is not None
    assert back.request() == domain(domains.REQUEST).request()


def test_a_newer_request_replaces_the_recorded_one() -> None:
    rewritten = rewrite(domain(domains.REQUEST), chosen()).domain
    rewritten.os.element.append(etree.fromstring("<loader type='igvm'>/new.igvm</loader>"))
    request = request_of(rewritten)
    assert request is not None
    assert (request.path, request.features) == ("/new.igvm", {})
    again = rewrite(rewritten, chosen(path="/new.igvm")).domain
    assert request_of(again) == request


def test_other_firmware_put_in_by_hand_is_not_overwritten() -> None:
    rewritten = rewrite(domain(domains.REQUEST), chosen()).domain
    rewritten.os.element.set("firmware", "efi")
    for function in (restore, as_request, request_of):
        with pytest.raises(DomainError, match="other firmware was put into"):
            function(rewritten)


@pytest.mark.parametrize("path", [None, "/usr/share/igvm/x.igvm"])
def test_an_efi_domain_turns_into_an_igvm_one_and_back(path: str | None) -> None:
    before = domain(domains.EFI)
    asking = convert(before, path)
    request = asking.request()
    assert request is not None
    assert (request.path, request.platform) == (path, Platform.SEV)
    assert request.features == {"secure-boot": False}
    assert convert(asking, path) is asking
    rewritten = rewrite(asking, chosen(Platform.SEV)).domain
    for gone in ("loader", "nvram", "firmware"):
        assert rewritten.os.element.find(gone) is None
    assert convert(rewritten, path) is rewritten
    assert same(as_request(rewritten), asking)
    assert restore(rewritten).write() == domains.EFI.encode()
    assert restore(asking).write() == domains.EFI.encode()


@pytest.mark.parametrize("path", [None, "/usr/share/igvm/x.igvm"])
def test_a_secure_loader_stays_wanted(path: str | None) -> None:
    text = re.sub("(?s)    <firmware>.*</firmware>\n", "", domains.EFI)
    text = text.replace("secure='no'", "secure='yes'")
    asking = convert(domain(text), path)
    request = asking.request()
    assert request is not None
    assert (request.path, request.features) == (path, {"requires-smm": True})
    assert convert(asking, path) is asking
    rewritten = rewrite(asking, chosen(Platform.SEV)).domain
    assert rewritten.os.loader is None
    assert same(as_request(rewritten), asking)
    assert restore(Domain.parse(rewritten.write())).write() == text.encode()
    other = convert(rewritten, "/other.igvm").request()
    assert other is not None
    assert other.features == {"requires-smm": True}


def test_what_libvirt_derived_from_features_is_not_wanted_beside_them() -> None:
    text = domains.EFI.replace("enabled='no'", "enabled='yes'").replace("='no'", "='yes'")
    request = convert(domain(text)).request()
    assert request is not None
    assert request.features == {"secure-boot": True}


@pytest.mark.parametrize(
    "store", ["<varstore/>", "<varstore template='/usr/share/v.json' path='/var/lib/v.json'/>"]
)
def test_variables_that_qemu_itself_keeps_go_with_the_firmware(store: str) -> None:
    """What libvirt 12 has instead of <nvram> where the firmware is for QEMU's uefi-vars."""
    text = re.sub("(?s)    <loader.*</nvram>", f"    {store}", domains.EFI)
    rewritten = rewrite(convert(domain(text)), chosen(Platform.SEV)).domain
    assert rewritten.os.element.find("varstore") is None
    assert restore(rewritten).write() == text.encode()
    beside = domains.REQUEST.replace("    <boot ", f"    {store}\n    <boot ")
    with pytest.raises(DomainError, match="<varstore> beside IGVM firmware") as caught:
        rewrite(domain(beside), chosen())
    assert "--igvm" in str(caught.value)


def test_another_file_for_a_domain_that_asks_already() -> None:
    asking = convert(domain(domains.REQUEST), "/first.igvm")
    rewritten = rewrite(asking, chosen(path="/first.igvm")).domain
    second = convert(rewritten, "/second.igvm")
    request = second.request()
    assert request is not None
    assert request.path == "/second.igvm"
    assert restore(second).write() == domains.REQUEST.encode()


def test_a_bios_domain_without_any_loader() -> None:
    text = domains.BY_PATH.replace(
        "    <loader type='igvm'>/usr/share/igvm/ovmf.igvm</loader>\n", ""
    )
    rewritten = rewrite(convert(domain(text)), chosen()).domain
    assert restore(rewritten).write() == text.encode()


def test_sev_gets_what_it_cannot_start_without() -> None:
    result = rewrite(domain(domains.SEV), chosen(Platform.SEV_ES))
    assert result.domain.security is not None
    assert result.domain.security.policy == 7
    assert result.domain.root.find("memoryBacking/locked") is not None
    assert len(result.changes) == 2
    off = rewrite(domain(domains.SEV), chosen(Platform.SEV_ES), lock_memory=False)
    assert off.domain.root.find("memoryBacking") is None
    # switched off later: what igvmfw added goes again
    assert same(
        rewrite(result.domain, chosen(Platform.SEV_ES), lock_memory=False).domain, off.domain
    )


def test_that_memory_is_not_to_be_locked_is_remembered() -> None:
    off = rewrite(domain(domains.SEV), chosen(Platform.SEV), lock_memory=False).domain
    assert rewrite(off, chosen(Platform.SEV)).domain is off
    on = rewrite(off, chosen(Platform.SEV), lock_memory=True).domain
    assert same(on, rewrite(domain(domains.SEV), chosen(Platform.SEV)).domain)
    assert restore(off).write() == domains.SEV.encode()


def test_a_host_that_cannot_lock_memory_decides_for_itself_alone() -> None:
    here = rewrite(domain(domains.SEV), chosen(Platform.SEV), may_lock_memory=False).domain
    assert here.root.find("memoryBacking") is None
    elsewhere = rewrite(here, chosen(Platform.SEV)).domain
    assert same(elsewhere, rewrite(domain(domains.SEV), chosen(Platform.SEV)).domain)


@pytest.mark.parametrize(
    "own",
    [
        "<memoryBacking><locked/></memoryBacking>",
        "<memtune><hard_limit unit='GiB'>1</hard_limit></memtune>",
    ],
)
def test_the_users_own_memory_limit_is_kept(own: str) -> None:
    text = domains.SEV.replace("<launchSecurity", f"{own}<launchSecurity")
    result = rewrite(domain(text), chosen(Platform.SEV))
    assert len(result.changes) == 1
    assert restore(result.domain).write() == text.encode()


def test_only_sev_and_sev_es_lock_memory() -> None:
    text = domains.SEV.replace("type='sev'", "type='sev-snp'")
    result = rewrite(domain(text), chosen(Platform.SEV_SNP)).domain
    assert result.root.find("memoryBacking") is None
    assert result.security is not None
    assert result.security.policy == 0x30000


def test_a_policy_changed_afterwards_is_the_users() -> None:
    rewritten = rewrite(domain(domains.SEV), chosen(Platform.SEV)).domain
    policy = rewritten.root.find("launchSecurity/policy")
    assert policy is not None
    policy.text = "0x0001"
    request = request_of(rewritten)
    assert request is not None
    assert request.policy == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("/a b/ü.igvm", "/a b/ü.igvm"),
        ("/a,b.igvm", "/a,,b.igvm"),
        ("/a,id=x,file=/etc/passwd", "/a,,id=x,,file=/etc/passwd"),
        ("/,,", "/,,,,"),
        ('/it\'s "quoted"', '/it\'s "quoted"'),
    ],
)
def test_a_path_cannot_add_options(path: str, value: str) -> None:
    assert object_argument(path) == f"igvm-cfg,id=igvm0,file={value}"
    rewritten = rewrite(domain(domains.BY_PATH), chosen(path=path)).domain
    again = Domain.parse(rewritten.write())
    assert again.arguments[1] == f"igvm-cfg,id=igvm0,file={value}"
    assert same(restore(again), domain(domains.BY_PATH))


@pytest.mark.parametrize(
    "path",
    ["relative", "", "/a\nb", "/a\0b", "/a\x1b[2J", "/\udcff", "/" + "x" * 5000, "/a\u2028b"],
)
def test_paths_that_no_file_should_have_are_refused(path: str) -> None:
    with pytest.raises(RefusedError) as caught:
        object_argument(path)
    assert len(str(caught.value).splitlines()) == 1


def arguments(*values: str) -> str:
    return (
        "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"
        + "".join(f"<qemu:arg value='{value}'/>" for value in values)
        + "</qemu:commandline></domain>"
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("machine='q35'", "machine='microvm'", ("microvm", "machine='q35'")),
        ("machine='q35'", "machine='isapc'", ("isapc",)),
        ("arch='x86_64'", "arch='aarch64'", ("aarch64",)),
        (">hvm<", ">exe<", ("'exe'",)),
        ("type='kvm'", "type='xen'", ("'xen'", "type='kvm'")),
        ("</domain>", arguments("-bios", "/x"), ("-bios /x", "remove -bios")),
        ("</domain>", arguments("-pflash", "/x"), ("-pflash",)),
        ("</domain>", arguments("--drive", "file=/x,if=pflash"), ("-drive", "pflash")),
        ("</domain>", arguments("-machine", "smm=on,pflash0=f"), ("pflash0",)),
        ("</domain>", arguments("-M", "firmware=/x"), ("firmware",)),
        ("</domain>", arguments("-object", "igvm-cfg,id=mine,file=/x"), ("names an IGVM file",)),
        ("</domain>", arguments("--object", "id=i,qom-type=igvm-cfg"), ("names an IGVM file",)),
        (
            "</domain>",
            arguments("-object", '{"qom-type":"igvm-cfg","id":"igvm0"}'),
            ("names an IGVM file",),
        ),
        ("</domain>", arguments("-machine", "igvm-cfg=igvm0"), ("names an IGVM file",)),
        ("</domain>", arguments("-M", "q35,igvm_cfg=igvm0"), ("names an IGVM file",)),
        ("</domain>", arguments("-object", "secret,id=igvm0"), ("another id",)),
        ("</domain>", arguments("-object", "{&apos;id&apos;:&apos;x&apos;}"), ("JSON",)),
        ("</domain>", arguments("-object", "{&quot;a&quot;:" * 50_000), ("JSON",)),
        ("</domain>", arguments("--readconfig", "/x"), ("-readconfig /x", "remove")),
        ("</domain>", arguments("-set", "drive.a.if=pflash"), ("remove -set",)),
        (
            "</domain>",
            arguments("-machine", "hpet=off,confidential-guest-support=x"),
            ("remove confidential-guest-support", "<launchSecurity>"),
        ),
        ("</domain>", arguments("-M", "memory_encryption=x"), ("<launchSecurity>",)),
        ("</domain>", arguments("-machine", "pc"), ("remove pc", "<type machine='…'>")),
        ("</domain>", arguments("-machine", "hpet=off,type=pc"), ("<type machine='…'>",)),
        ("</domain>", arguments("-machine", "smp.cpus=3"), ("<vcpu>",)),
        ("</domain>", arguments("-smp", "3,sockets=3"), ("remove -smp", "<vcpu>")),
        ("</domain>", arguments("-m", "1G"), ("remove -m", "<memory>")),
        ("</domain>", arguments("-machine", "memory.size=1G"), ("<memory>",)),
    ],
)
def test_what_qemu_does_not_take_beside_igvm(old: str, new: str, words: tuple[str, ...]) -> None:
    source = domain(domains.BY_PATH.replace(old, new))
    with pytest.raises(RefusedError) as caught:
        rewrite(source, chosen())
    for word in words:
        assert word in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "values",
    [
        ("-object", "memory-backend-file,id=igvm-cfg,mem-path=/a,,igvm-cfg"),
        ("-machine", "smm=off"),
        ("-drive", "file=/pflash,if=none"),
        ("-object", "{&quot;qom-type&quot;:&quot;secret&quot;,&quot;id&quot;:&quot;s&quot;}"),
        ("-device", "{&quot;a&quot;:" * 50_000),
        ("-nodefaults",),
        ("-snapshot",),  # where no vTPM has a state
        ("-machine", "kernel_irqchip=split,hpet=off"),
        ("-machine", "q35,hpet=off"),
        ("-m", "slots=2,maxmem=8G"),
        ("-smp", "maxcpus=4"),
        ("-set", "device.net0.romfile="),
        ("-append", "console=ttyS0 igvm-cfg=1"),
    ],
)
def test_other_arguments_are_no_concern(values: tuple[str, ...]) -> None:
    source = domain(domains.BY_PATH.replace("</domain>", arguments(*values)))
    result = rewrite(source, chosen()).domain
    assert result.arguments[: len(values)] == source.arguments
    assert same(restore(result), source)


def test_launch_security_needs_kvm() -> None:
    with pytest.raises(RefusedError, match="needs KVM"):
        rewrite(domain(domains.SEV.replace("type='kvm'", "type='qemu'")), chosen(Platform.SEV))


def test_kernel_hashes_of_a_direct_boot_are_refused() -> None:
    text = domains.SEV.replace("type='sev'", "type='sev' kernelHashes='yes'")
    rewrite(domain(text), chosen(Platform.SEV))
    text = text.replace("</type>", "</type><kernel>/vmlinuz</kernel>")
    with pytest.raises(RefusedError, match="hashes"):
        rewrite(domain(text), chosen(Platform.SEV))


def test_two_tpms_are_pointed_out() -> None:
    text = domains.REQUEST.replace("</devices>", "<tpm model='tpm-crb'/></devices>")
    result = rewrite(domain(text), chosen(features=("vtpm",)))
    assert "two" in result.warnings[0]
    assert rewrite(domain(text), chosen()).warnings == ()


def test_a_domain_that_asks_for_nothing() -> None:
    with pytest.raises(DomainError, match="--igvm"):
        rewrite(domain(domains.EFI), chosen(Platform.SEV))
    plain = domain(domains.EFI)
    assert restore(plain) is plain
    assert request_of(plain) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (SHA256, "zz"),
        ("platform='native'", "platform='x'"),
        ("index='1'", "index='-1'"),
        ("index='1'", "index='²'"),
        ("measurement='ab", "measurement='xx"),
        (":request", ":requests"),
    ],
)
def test_a_damaged_record_is_one_clear_error(old: str, new: str) -> None:
    text = rewrite(domain(domains.REQUEST), chosen()).domain.write().decode()
    assert old in text
    with pytest.raises(DomainError, match="damaged"):
        restore(domain(text.replace(old, new)))


def test_an_absurd_position_in_the_record_is_harmless() -> None:
    text = rewrite(domain(domains.REQUEST), chosen()).domain.write().decode()
    back = restore(domain(text.replace("index='1'", f"index='{'9' * 5000}'")))
    assert back.request() == domain(domains.REQUEST).request()
