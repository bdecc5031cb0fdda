"""rewrite, restore, define, create and start as they are typed, as far as no guest is needed."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from igvmfw.cli import main
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.measure import launch_digest
from igvmfw.platforms import Platform
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import Record
from tests.cli.commands import one_line
from tests.igvm import samples
from tests.parts import need_libvirt
from tests.virt import domains

Run = Callable[..., tuple[int, str, str]]
SCHEMA = Path(__file__).parents[2] / "schemas" / "domain.json"


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Runs a command; whatever anything prints, libvirt's C code included, is seen."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return call


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with two firmware files and their descriptors; no other is found."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    root = tmp_path / "root"
    catalogue = root / "usr/share/qemu/firmware"
    catalogue.mkdir(parents=True)
    files = {"plain": (Platform.NATIVE,), "sev": (Platform.SEV, Platform.SEV_ES)}
    for name, platforms in files.items():
        (root / f"usr/share/{name}.igvm").write_bytes(samples.small(*platforms))
        features = [f"amd-{word}" for word in platforms if word is not Platform.NATIVE]
        descriptor = {
            "description": name,
            "interface-types": ["uefi"],
            "mapping": {"device": "igvm", "filename": f"/usr/share/{name}.igvm"},
            "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
            "features": features,
            "tags": [],
        }
        (catalogue / f"50-{name}.json").write_text(json.dumps(descriptor))
    return root


@pytest.fixture
def xml(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "guest.xml"
        path.write_text(text)
        return path

    return write


PLAIN = domains.REQUEST.replace("      <feature enabled='yes' name='vtpm'/>\n", "")


def test_rewrite_and_restore_are_inverse(
    run: Run, root: Path, xml: Callable[[str], Path], tmp_path: Path
) -> None:
    source = xml(PLAIN)
    code, out, err = run("rewrite", source, "--root", root)
    assert (code, err) == (0, "")
    record = Record.find(Domain.parse(out.encode()))
    assert record is not None
    assert record.file is not None
    assert record.file.path == str(root / "usr/share/plain.igvm")
    assert record.file.descriptor == "50-plain.json"
    result = tmp_path / "out.xml"
    assert run("rewrite", source, "--root", root, "-o", result) == (0, "", "")
    assert result.read_text() == out
    code, again, _ = run("rewrite", result, "--root", root)
    assert (code, again) == (0, out)
    assert run("restore", result) == (0, PLAIN, "")


def test_rewrite_reads_standard_input(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in ([], ["-"], ["--igvm", "-"], ["--igvm"]):
        stdin = io.TextIOWrapper(io.BytesIO(PLAIN.encode()))
        monkeypatch.setattr("sys.stdin", stdin)
        code, out, err = run("rewrite", "--root", root, *words)
        assert (code, err) == (0, "")
        assert "igvm-cfg=igvm0" in out


def test_diff_shows_only_what_changes(run: Run, root: Path, xml: Callable[[str], Path]) -> None:
    code, out, err = run("rewrite", "--diff", xml(domains.SEV), "--root", root)
    assert code == 0
    removed = [line for line in out.splitlines() if line.startswith("-") and line[1] != "-"]
    assert removed == ["-  <os firmware='igvm'>", "-  <launchSecurity type='sev'/>"]
    assert "+    <locked/>" in out
    assert "policy 0x3" in err
    assert "<locked/>" in err
    code, out, err = run("rewrite", "--diff", xml(domains.SEV), "--root", root, "--no-lock-memory")
    assert "locked" not in out + err


def test_the_expected_measurement_is_recorded(
    run: Run, root: Path, xml: Callable[[str], Path]
) -> None:
    text = domains.SEV.replace("'sev'/>", "'sev'><policy>0x5</policy></launchSecurity>")
    _, out, _ = run("rewrite", xml(text), "--root", root)
    record = Record.find(Domain.parse(out.encode()))
    assert record is not None
    assert record.file is not None
    assert record.file.platform is Platform.SEV_ES
    image = IgvmFile.parse((root / "usr/share/sev.igvm").read_bytes())
    # 2 vCPUs, one without a VP context: its first registers depend on the host's CPU model
    assert record.file.measurement is None
    _, out, _ = run("rewrite", xml(text.replace(">2<", ">1<")), "--root", root)
    record = Record.find(Domain.parse(out.encode()))
    assert record is not None
    assert record.file is not None
    assert record.file.measurement == launch_digest(image, Platform.SEV_ES).hex()


def test_efi_becomes_igvm_and_back(
    run: Run, root: Path, xml: Callable[[str], Path], tmp_path: Path
) -> None:
    source = xml(domains.EFI)
    code, out, err = run("rewrite", "--igvm", source, "--root", root)
    assert code == 0
    assert "sev.igvm" in out
    result = tmp_path / "result.xml"
    result.write_text(out)
    assert run("restore", result) == (0, domains.EFI, "")
    code, out, err = run("rewrite", f"--igvm={root}/usr/share/sev.igvm", source)
    assert code == 0
    assert "secure-boot" in err  # asked for, and no descriptor to say so


def test_a_relative_root(
    run: Run, root: Path, xml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = xml(PLAIN)
    monkeypatch.chdir(root.parent)
    assert run("rewrite", "--root", root.name, file) == run("rewrite", "--root", root, file)
    code, out, err = run("rewrite", "--root", "nowhere", file)
    assert (code, out) == (3, "")
    one_line(err, "nowhere: is no directory")


def test_igvm_with_a_relative_path(
    run: Run, root: Path, xml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = xml(domains.EFI)
    monkeypatch.chdir(root / "usr")
    code, out, _ = run("rewrite", "--igvm=share/sev.igvm", source)
    assert code == 0
    assert f"file={root}/usr/share/sev.igvm'" in out


def test_a_domain_without_a_request_passes_unchanged(run: Run, xml: Callable[[str], Path]) -> None:
    code, out, err = run("rewrite", xml(domains.EFI))
    assert (code, out) == (0, domains.EFI)
    assert "unchanged" in err
    code, out, err = run("restore", xml(domains.EFI))
    assert (code, out) == (0, domains.EFI)
    assert "unchanged" in err


def test_no_firmware_is_an_answer(run: Run, root: Path, xml: Callable[[str], Path]) -> None:
    source = xml(domains.REQUEST)
    code, out, err = run("rewrite", source, "--root", root)
    assert (code, out) == (1, "")
    one_line(err, source, "50-plain.json: lacks the feature vtpm", "50-sev.json", "igvmfw list")


def test_a_file_without_the_platform_is_refused(
    run: Run, root: Path, xml: Callable[[str], Path]
) -> None:
    file = root / "usr/share/plain.igvm"
    text = domains.SEV.replace("</type>", f"</type><loader type='igvm'>{file}</loader>")
    code, out, err = run("rewrite", xml(text))
    assert (code, out) == (1, "")
    one_line(err, file, "needs sev or sev-es, the file is for native")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("", 3, ("guest.xml: line 1", "not well-formed")),
        ("<domain", 3, ("guest.xml: line 1",)),
        ("<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><a>&x;</a>", 3, ("document type",)),
        ("<network/>", 3, ("guest.xml", "not <domain>")),
        (domains.BY_PATH, 3, ("/usr/share/igvm/ovmf.igvm", "cannot read", "No such file")),
        (domains.REQUEST.replace("<boot", "<nvram/><boot"), 3, ("guest.xml: line 12", "<nvram>")),
        (domains.BY_PATH.replace("share", "\n"), 1, ("guest.xml", "control")),
    ],
)
def test_what_is_wrong_is_one_line(
    run: Run, xml: Callable[[str], Path], text: str, code: int, words: tuple[str, ...]
) -> None:
    found, out, err = run("rewrite", xml(text))
    assert (found, out) == (code, "")
    one_line(err, *words)


def test_a_damaged_file_is_named_with_its_place(
    run: Run, root: Path, xml: Callable[[str], Path]
) -> None:
    file = root / "usr/share/plain.igvm"
    file.write_bytes(file.read_bytes()[:100])
    code, out, err = run("rewrite", xml(PLAIN), "--root", root)
    assert (code, out) == (3, "")
    one_line(err, file)


def test_a_terminal_is_not_driven_by_a_path(run: Run, xml: Callable[[str], Path]) -> None:
    text = domains.BY_PATH.replace("/usr/share/igvm", "/\u202e\x9b2J")
    code, _, err = run("rewrite", xml(text))
    assert code in (1, 3)
    one_line(err)
    assert "\x9b" not in err
    assert "\u202e" not in err


def test_missing_and_unwritable_files(
    run: Run, root: Path, xml: Callable[[str], Path], tmp_path: Path
) -> None:
    code, _, err = run("rewrite", tmp_path / "missing.xml")
    assert code == 3
    one_line(err, "missing.xml", "cannot read")
    out = tmp_path / "no" / "out.xml"
    code, _, err = run("rewrite", xml(PLAIN), "--root", root, "-o", out)
    assert code == 4
    one_line(err, out)
    code, _, err = run("define", "-c", "qemu:///embed?root=relative", xml(PLAIN))
    assert code == 2
    one_line(err, "absolute directory")


def test_a_name_that_is_no_text_is_refused(run: Run, xml: Callable[[str], Path]) -> None:
    code, _, err = run("rewrite", "--igvm=/tmp/" + os.fsdecode(b"\xff"), xml(domains.EFI))
    assert code == 1
    one_line(err, "no text")


def test_without_libvirt_python_the_package_is_named(xml: Callable[[str], Path]) -> None:
    program = (
        "import sys; sys.modules['libvirt'] = None; import igvmfw.cli as c; sys.exit(c.main())"
    )
    words = [sys.executable, "-c", program, "define", str(xml(PLAIN))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (4, "")
    one_line(done.stderr, "python3-libvirt")


def test_rewrite_loads_neither_libvirt_nor_what_it_does_not_need(
    root: Path, xml: Callable[[str], Path]
) -> None:
    program = (
        "import sys, igvmfw.cli as c; c.main(); "
        "print([m for m in ('libvirt', 'rich', 'jsonschema') if m in sys.modules], file=sys.stderr)"
    )
    words = [sys.executable, "-c", program, "rewrite", str(xml(PLAIN)), "--root", str(root)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.strip() == "[]"


TEST_DRIVER = "test:///default"  # libvirt's own: no QEMU, nothing outlives the connection


@pytest.fixture
def libvirt() -> None:
    need_libvirt()


def test_libvirts_errors_are_one_line_with_a_remedy(
    run: Run, libvirt: None, xml: Callable[[str], Path]
) -> None:
    code, out, err = run("start", "-c", TEST_DRIVER, "nobody")
    assert (code, out) == (4, "")
    one_line(err, "domain 'nobody'", "not found")
    code, out, err = run("start", "-c", "nonsense:///", "nobody")
    assert (code, out) == (4, "")
    one_line(err)
    code, out, err = run("start", "-c", TEST_DRIVER, "test")
    assert code == 4
    one_line(err, "already running")
    code, out, err = run("define", "-c", TEST_DRIVER, xml(domains.BY_PATH))
    assert (code, out) == (4, "")
    one_line(err, "IGVM firmware is for guests of QEMU: give a qemu:// URI with -c")


def test_the_default_uri_is_virshs(
    run: Run, libvirt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", TEST_DRIVER)
    code, _, err = run("start", "test")
    assert code == 4
    one_line(err, "already running")
    monkeypatch.setenv("VIRSH_DEFAULT_CONNECT_URI", "nonsense:///")
    code, _, err = run("start", "test")
    one_line(err, "nonsense")


def test_words_stand_where_virsh_takes_them(
    run: Run, libvirt: None, xml: Callable[[str], Path]
) -> None:
    plain = ("dumpxml", "-c", TEST_DRIVER, "test")
    _, shown, _ = run(*plain)
    assert "<name>test</name>" in shown
    for words in (
        ("-c", TEST_DRIVER, "dumpxml", "test"),
        (f"--connect={TEST_DRIVER}", "dumpxml", "--domain", "test"),
        ("-c", "nonsense:///", "dumpxml", "--domain=test", "-c", TEST_DRIVER),
        ("dumpxml", "-c", TEST_DRIVER, "1"),
    ):
        assert run(*words) == (0, shown, ""), words
    file = xml(
        "<domain type='test'><name>a</name><memory>8192</memory><os><type>hvm</type></os></domain>"
    )
    for option in (["--file", str(file)], [f"--file={file}"]):
        code, out, _ = run("-c", TEST_DRIVER, "define", *option)
        assert (code, out) == (0, "Domain 'a' defined\n")
    for tpm in ("--tpm", "--keep-tpm"):
        code, out, err = run("-c", TEST_DRIVER, "undefine", tpm, "test")
        assert code == 4  # passed on: that driver knows no such flag
        one_line(err, "unsupported flags (0x")
    # what comes after -- is no option
    code, _, err = run("dumpxml", "-c", TEST_DRIVER, "--", "--domain")
    assert code == 4
    one_line(err, "domain '--domain'")
    code, out, err = run("-c", TEST_DRIVER, "inspect", file)
    assert (code, out) == (2, "")
    one_line(err, "inspect asks no libvirt (leave --connect out)")


def test_define_without_igvm_is_virshs_define(
    run: Run, libvirt: None, xml: Callable[[str], Path]
) -> None:
    text = (
        "<domain type='test'><name>a</name><memory>8192</memory><os><type>hvm</type></os></domain>"
    )
    code, out, err = run("define", "-c", TEST_DRIVER, xml(text))
    assert (code, out) == (0, "Domain 'a' defined\n")
    assert "no IGVM firmware asked for" in err
    code, out, err = run("create", "-c", TEST_DRIVER, "--json", xml(text))
    document = json.loads(out)
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    assert document == {"domain": "a", "igvm": None, "vtpm_state": None}
