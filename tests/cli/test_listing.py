"""list as it is typed, also for one domain."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from igvmfw.platforms import Platform
from tests.cli.commands import Run, checked, file_in, one_line, put
from tests.igvm import samples


def state_of(out: str, name: str) -> str:
    return next(line.split()[-1] for line in out.splitlines() if line.startswith(name))


def test_list_shows_what_became_of_the_file(run: Run, root: Path, wrapped: bytes) -> None:
    run("install", "--root", root, file_in(root))
    file = file_in(root)
    name = "65-ovmf-sev.json"
    os.utime(file, ns=(3, 3))  # another time alone is no change
    assert state_of(run("list", "--root", root)[1], name) == "present"
    file.write_bytes(wrapped[:-1] + bytes([wrapped[-1] ^ 1]))
    _, out, err = run("list", "--root", root)
    assert state_of(out, name) == "changed"
    assert "is not the file that was described" in err
    file.write_bytes(wrapped[:5000])
    _, out, err = run("list", "--root", root)
    assert state_of(out, name) == "damaged"
    assert "sev,sev-es" in out  # by the descriptor
    file.unlink()
    code, out, err = run("list", "--root", root)
    assert (code, state_of(out, name)) == (0, "missing")
    assert "/usr/share/igvm/ovmf-sev.igvm does not exist" in err
    file.mkdir()
    assert state_of(run("list", "--root", root)[1], name) == "unreadable"


def test_list_all_and_its_json(run: Run, root: Path) -> None:
    run("install", "--root", root, file_in(root))
    run("install", "--root", root, "--vendor", "--priority", "65", file_in(root))
    system = root / "etc/qemu/firmware"
    (system / "10-broken.json").write_text("{")
    (system / "20-mask.json").touch()
    put(root / "usr/share/qemu/firmware/20-mask.json")
    flash = {
        "device": "flash",
        "executable": {"filename": "/c", "format": "raw"},
        "nvram-template": {"filename": "/v", "format": "raw"},
    }
    put(system / "30-flash.json", mapping=flash)
    put(system / "40-relative.json", mapping={"device": "igvm", "filename": "x.igvm"})
    code, out, err = run("list", "--all", "--root", root)
    assert code == 0
    assert [tuple(line.split()[:: len(line.split()) - 1]) for line in out.splitlines()[1:]] == [
        ("10-broken.json", "broken"),
        ("20-mask.json", "mask"),
        ("20-mask.json", "masked"),
        ("30-flash.json", "other-device"),
        ("40-relative.json", "missing"),
        ("65-ovmf-sev.json", "present"),
        ("65-ovmf-sev.json", "shadowed"),
    ]
    assert f"igvmfw: warning: {system}/10-broken.json: " in err
    assert "no absolute path" in err
    code, out, err = run("list", "--all", "--json", "--root", root)
    document = checked(out, "list")
    assert [row["state"] for row in document["firmware"]][:3] == ["broken", "mask", "masked"]
    assert document["firmware"][-1]["overridden_by"] == str(system / "65-ovmf-sev.json")
    assert document["firmware"][-1]["payload"]["firmware"] == "OVMF"
    _, out, _ = run("list", "--json", "--root", root)
    assert [row["name"] for row in checked(out, "list")["firmware"]] == [
        "40-relative.json",
        "65-ovmf-sev.json",
    ]


def test_list_filters(run: Run, root: Path) -> None:
    run("install", "--root", root, "--feature", "acpi-s3", file_in(root))
    for words, shown in [
        (("--platform", "sev-es"), True),
        (("--platform", "native"), True),
        (("--platform", "sev-snp"), False),
        (("--feature", "acpi-s3"), True),
        (("--feature", "acpi-s3", "--feature", "vtpm"), False),
        (("--platform", "sev", "--feature", "amd-sev"), True),
    ]:
        code, out, err = run("list", "--root", root, *words)
        assert code == (0 if shown else 1)
        assert ("65-ovmf-sev.json" in out) is shown
        assert ("no IGVM firmware has all that was asked for" in err) is not shown
    code, _, err = run("list", "--root", root / "usr")
    assert code == 1
    assert "no IGVM firmware found; 'igvmfw install FILE' adds some" in err
    code, _, err = run("list", "--platform", "s390")
    assert code == 2
    one_line(err, "not one of native, sev")


DOMAIN = """<domain type='kvm'><name>g</name><memory unit='GiB'>2</memory>
<os firmware='igvm'><type arch='x86_64' machine='{machine}'>hvm</type>{firmware}</os>
{security}</domain>"""
SEV = "<launchSecurity type='sev'><policy>0x{policy:x}</policy></launchSecurity>"


def domain(path: Path, machine: str = "q35", firmware: str = "", security: str = "") -> Path:
    path.write_text(DOMAIN.format(machine=machine, firmware=firmware, security=security))
    return path


def test_list_for_a_domain(run: Run, root: Path, tmp_path: Path) -> None:
    run("install", "--root", root, file_in(root))
    run("install", "--root", root, "--name", "later", "--priority", "90", file_in(root))
    system = root / "etc/qemu/firmware"
    put(system / "10-snp.json")
    (system / "20-broken.json").write_text("{")
    xml = domain(tmp_path / "sev.xml", security=SEV.format(policy=5))
    code, out, _ = run("list", "--root", root, "--for", xml)
    assert code == 0
    assert out.splitlines() == [
        "  10-snp.json: lacks the feature amd-sev-es",
        f"  20-broken.json: {system}/20-broken.json: line 1 column 2: not JSON: "
        "Expecting property name enclosed in double quotes",
        "* 65-ovmf-sev.json: chosen, /usr/share/igvm/ovmf-sev.igvm",
        "  90-later.json: matches too, and comes later in the order of choice",
    ]
    code, out, _ = run("list", "--root", root, "--json", "--all", "--for", xml)
    document = checked(out, "list")
    assert [row["chosen"] for row in document["firmware"]] == [False, False, True, False]
    assert document["file"] == "/usr/share/igvm/ovmf-sev.igvm"
    assert document["file_problem"] is None


def test_list_for_a_domain_that_gets_none(run: Run, root: Path, tmp_path: Path) -> None:
    run("install", "--root", root, file_in(root))
    snp = "<launchSecurity type='sev-snp'><policy>0x30000</policy></launchSecurity>"
    code, out, err = run("list", "--root", root, "--for", domain(tmp_path / "a", security=snp))
    assert (code, out) == (1, "  65-ovmf-sev.json: lacks the feature amd-sev-snp\n")
    assert "no descriptor matches the domain; 'igvmfw install FILE' adds one" in err
    code, out, _ = run("list", "--root", root, "--for", domain(tmp_path / "a", "microvm"))
    assert code == 1
    assert "takes the machine types pc-q35-*, pc-i440fx-*, not microvm" in out


def test_list_for_a_domain_judges_the_file_too(run: Run, root: Path, tmp_path: Path) -> None:
    run("install", "--root", root, file_in(root))
    file_in(root).unlink()
    code, out, err = run("list", "--root", root, "--for", domain(tmp_path / "a.xml"))
    assert code == 1
    assert "* 65-ovmf-sev.json: chosen" in out
    assert "cannot read: No such file" in err


def test_list_for_a_domain_that_names_its_file(run: Run, root: Path, tmp_path: Path) -> None:
    xml = tmp_path / "named.xml"
    named = domain(xml).read_text().replace("firmware='igvm'", "")
    xml.write_text(named.replace("</os>", f"<loader type='igvm'>{file_in(root)}</loader></os>"))
    code, out, _ = run("list", "--root", root, "--for", xml)
    assert (code, out) == (0, f"* {file_in(root)}: named by the domain\n")


def test_a_file_that_the_domain_names_is_the_hosts(run: Run, root: Path, tmp_path: Path) -> None:
    """Where QEMU will open it; `rewrite --root` takes it so, too."""
    named = domain(
        tmp_path / "x", firmware="<loader type='igvm'>/usr/share/igvm/ovmf-sev.igvm</loader>"
    )
    assert (root / "usr/share/igvm/ovmf-sev.igvm").exists()
    for words in (["list", "--for"], ["rewrite"]):
        code, _, err = run(*words, named, "--root", root)
        assert code != 0
        assert "/usr/share/igvm/ovmf-sev.igvm: cannot read: No such file" in err


KERNEL = "<kernel>/vmlinuz</kernel>"
HASHES = "<launchSecurity type='sev' kernelHashes='yes'><policy>0x1</policy></launchSecurity>"
BIOS = """<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<qemu:arg value='-bios'/><qemu:arg value='/x'/></qemu:commandline>"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("type='kvm'", "type='xen'", "a domain of type 'xen' cannot take an IGVM file"),
        (">hvm<", ">xen<", "a guest of type 'xen' and architecture x86_64 cannot take"),
        ("</os>", f"{KERNEL}</os>{HASHES}", "QEMU cannot add the hashes"),
        ("'kvm'>", f"'qemu'>{SEV.format(policy=1)}", "launchSecurity needs KVM"),
        ("</domain>", f"{BIOS}</domain>", "-bios /x in <qemu:commandline> beside IGVM firmware"),
    ],
)
def test_list_for_a_domain_that_rewrite_refuses(
    run: Run, root: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    run("install", "--root", root, file_in(root))
    xml = domain(tmp_path / "refused.xml")
    xml.write_text(xml.read_text().replace(old, new, 1))
    code, out, err = run("list", "--root", root, "--for", xml)
    refused, _, said = run("rewrite", "--root", root, xml)
    assert (code, refused) == (1, 1)
    assert "* 65-ovmf-sev.json: chosen" in out
    assert err.replace("warning", "error") == said
    assert err.startswith(f"igvmfw: warning: {xml}: ")
    assert message in err
    _, out, _ = run("list", "--json", "--root", root, "--for", xml)
    assert checked(out, "list")["file_problem"]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("<domain", 3, "domain.xml: "),
        ("", 3, "domain.xml: "),
        ("<domain type='kvm'><os><type>hvm</type></os></domain>", 1, "asks for no IGVM firmware"),
    ],
)
def test_list_for_what_is_no_request(
    run: Run, root: Path, tmp_path: Path, text: str, code: int, message: str
) -> None:
    path = tmp_path / "domain.xml"
    path.write_text(text)
    found, out, err = run("list", "--root", root, "--for", path)
    assert (found, out) == (code, "")
    one_line(err, message)


# hostile input, for every command


@pytest.mark.parametrize(
    "mapping",
    [
        {"filename": ""},
        {"filename": "/a\0b"},
        {
            "filename": "/a",
            "x-vtpm-storage": {"interface": "pflash", "format": "raw", "size-bytes": 4096.0},
        },
    ],
)
def test_what_list_calls_broken_is_not_valid(
    mapping: dict[str, object], run: Run, root: Path
) -> None:
    (root / "etc/qemu/firmware").mkdir(parents=True)
    path = put(root / "etc/qemu/firmware/10-odd.json", mapping={"device": "igvm", **mapping})
    _, _, warned = run("list", "--root", root)
    code, out, _ = run("validate", path)
    assert code == 1
    assert out == warned.splitlines()[0].removeprefix("igvmfw: warning: ") + "\n"


FORGED = "x\nigvmfw: error: not true\x1b[31m.igvm"


def test_a_files_name_forges_no_line(run: Run, root: Path) -> None:
    forged = root / "usr/share/igvm" / FORGED
    forged.write_bytes(file_in(root).read_bytes())
    for words in (["refresh", "--root", root], ["inspect", forged], ["describe", forged]):
        _, out, err = run(*words)
        assert "not true\\x1b" in out + err
        assert "\nigvmfw: error: not true" not in out + err
    written = [path.name for path in (root / "usr/share/qemu/firmware").iterdir()]
    assert written == ["70-igvm-ovmf-sev.json"]  # QEMU cannot be given the other one


@pytest.mark.parametrize("name", ["usr/share/igvm/ovmf-sev.igvm", f"/usr/share/igvm/{FORGED}"])
def test_a_descriptor_whose_file_qemu_cannot_get_hides_no_other(
    name: str, run: Run, root: Path, tmp_path: Path
) -> None:
    run("install", "--root", root, file_in(root))
    (root / "usr/share/igvm" / FORGED).write_bytes(file_in(root).read_bytes())
    put(root / "etc/qemu/firmware/10-odd.json", mapping={"device": "igvm", "filename": name})
    xml = domain(tmp_path / "plain.xml")
    code, out, err = run("list", "--root", root, "--for", xml)
    assert code == 0, err
    first, second = out.splitlines()
    assert first.startswith("  10-odd.json: the path ")
    assert second.startswith("* 65-ovmf-sev.json: chosen")
    code, out, _ = run("list", "--root", root)
    assert len(out.splitlines()) == 3
    code, out, _ = run("rewrite", "--root", root, xml)
    assert code == 0
    assert "/usr/share/igvm/ovmf-sev.igvm" in out


TRUNCATING = """
import os, sys
from igvmfw import inventory
from igvmfw.cli import main
looks = inventory.identify
def truncated_first(image):
    os.truncate(sys.argv[1], 0)
    return looks(image)
inventory.identify = truncated_first
sys.exit(main(sys.argv[2:]))
"""


def test_a_file_truncated_meanwhile_ends_no_list(run: Run, root: Path) -> None:
    run("install", "--root", root, file_in(root))
    command = [sys.executable, "-c", TRUNCATING, str(file_in(root)), "list", "--root", str(root)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert file_in(root).stat().st_size == 0
    assert state_of(done.stdout, "65-ovmf-sev.json") == "present"  # as it was when it was read


def test_a_file_truncated_before_it_is_read_is_a_state(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("install", "--root", root, file_in(root))
    file = file_in(root)
    reads = os.read

    def truncated_first(fd: int, size: int) -> bytes:
        if os.path.samestat(os.fstat(fd), file.stat()):
            os.truncate(file, 5000)
        return reads(fd, size)

    monkeypatch.setattr(os, "read", truncated_first)
    code, out, err = run("list", "--root", root)
    assert (code, state_of(out, "65-ovmf-sev.json")) == (0, "unreadable")
    assert "changed while it was read: 5000 of " in err


def test_a_path_of_a_megabyte_costs_nobody_a_minute(run: Run, root: Path) -> None:
    """The kernel ends a command that follows it step by step, each from the root on."""
    run("install", "--root", root, file_in(root))
    put(
        root / "etc/qemu/firmware/10-long.json",
        mapping={"device": "igvm", "filename": "/" + "a/" * 500_000},
    )
    command = [sys.executable, "-m", "igvmfw", "list", "--root", str(root)]
    done = subprocess.run(
        command,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (20, 20)),
        capture_output=True,
        check=True,
        text=True,
    )
    assert state_of(done.stdout, "10-long.json") == "unreadable"
    assert state_of(done.stdout, "65-ovmf-sev.json") == "present"
    assert "longer than the 4095 bytes that Linux takes" in done.stderr


def test_a_plain_domain_gets_the_first_file_that_is_for_it(
    run: Run, root: Path, tmp_path: Path
) -> None:
    """A descriptor cannot say that its file is not for plain guests; the file can."""
    snp = file_in(root).with_name("snp.igvm")
    snp.write_bytes(samples.small(Platform.SEV_SNP))
    run("install", "--root", root, "--interface", "uefi", snp)
    xml = domain(tmp_path / "plain.xml")
    code, out, err = run("rewrite", "--root", root, xml)
    assert (code, out) == (1, "")
    assert "65-snp.json: native is none of its file's platforms" in err
    code, out, _ = run("list", "--root", root, "--for", xml)
    assert (code, out) == (1, "  65-snp.json: native is none of its file's platforms\n")
    run("install", "--root", root, "--name", "zz", file_in(root))
    code, out, err = run("rewrite", "--root", root, xml)
    assert code == 0, err
    assert "/usr/share/igvm/ovmf-sev.igvm" in out
    code, out, _ = run("list", "--root", root, "--for", xml)
    assert code == 0
    assert out.splitlines() == [
        "  65-snp.json: native is none of its file's platforms",
        "* 65-zz.json: chosen, /usr/share/igvm/ovmf-sev.igvm",
    ]
