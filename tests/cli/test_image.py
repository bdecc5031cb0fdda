"""inspect, measure and wrap as they are typed: results, and what a tired person gets wrong."""

import gc
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from sevsnpmeasure.ovmf import OVMF

from igvmfw import files
from igvmfw.igvm.headers import PageData
from igvmfw.igvm.image import IgvmFile
from igvmfw.platforms import Platform
from tests.cli.commands import Run, one_line
from tests.igvm import samples


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "all.igvm"
    path.write_bytes(
        samples.small(Platform.NATIVE, Platform.SEV, Platform.SEV_ES, Platform.SEV_SNP)
    )
    return path


def test_inspect_tells_people_what_is_inside(run: Run, file: Path) -> None:
    code, out, err = run("inspect", file)
    assert (code, err) == (0, "")
    for text in (
        "revision 2",
        "sev-snp (mask 0x8, policy 0x30000)",
        "sev-es",
        "MEMORY_MAP",
        "real mode",
    ):
        assert text in out
    assert len(out.splitlines()) < 25


def test_inspect_pages_shows_runs(run: Run, ovmf: Path, tmp_path: Path) -> None:
    wrapped = tmp_path / "ovmf.igvm"
    assert run("wrap", ovmf, "-o", wrapped)[0] == 0
    _, out, _ = run("inspect", "--pages", wrapped)
    assert "0xffe00000-0xffffffff  512 pages" in out
    assert len(out.splitlines()) < 12


def test_inspect_tells_what_the_ovmf_was_built_for(run: Run, ovmf: Path, tmp_path: Path) -> None:
    wrapped = tmp_path / "ovmf.igvm"
    assert run("wrap", ovmf, "-o", wrapped)[0] == 0
    out = run("inspect", "--json", wrapped)[1]
    valid("inspect", out)
    facts = json.loads(out)["payload"]["ovmf"]
    assert facts["sev_snp"]
    assert facts["tdx"]
    assert not facts["igvm_parameters"]
    table = OVMF(str(ovmf))  # sev-snp-measure's reading of the same table
    assert facts["sev_es_reset_address"] == table.sev_es_reset_eip()


def test_inspect_json_is_one_document(run: Run, file: Path) -> None:
    code, out, _ = run("inspect", "--json", "--pages", file)
    assert code == 0
    document: dict[str, Any] = json.loads(out)
    assert document["size"] == file.stat().st_size
    assert [item["platform_type"] for item in document["platforms"]] == [
        "NATIVE", "SEV", "SEV_ES", "SEV_SNP",
    ]  # fmt: skip
    assert document["directives"]["PAGE_DATA"] == 2
    page = next(item for item in document["pages"] if item["type"] == "PAGE_DATA")
    assert (page["gpa"], page["data_size"], page["data_type"]) == (0x1000, 4096, "NORMAL")
    context = next(item for item in document["pages"] if item["type"] == "VP_CONTEXT")
    assert context["registers"]["cs"]["base"] == 0xFFFF0000
    assert [(r["gpa"], r["size"], r["kind"], r["name"])
            for r in document["summaries"][3]["regions"]] == [
        (0x1000, 4096, "measured", None),
        (0x2000, 4096, "zero", None),
        (0x10_0000, 4096, "parameters", "memory map, VP count"),
        (0xFFFF_FFFF_F000, 4096, "vmsa", "of vCPU 0"),
    ]  # fmt: skip
    assert isinstance(json.loads(run("inspect", "--json", file, file)[1]), list)


def test_json_output_is_what_its_schema_says(run: Run, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "rich.igvm"
    other.write_bytes(samples.rich())
    damaged = tmp_path / "damaged.igvm"
    damaged.write_bytes(file.read_bytes()[:600])
    valid("inspect", run("inspect", "--json", "--pages", file)[1])
    valid("inspect", run("inspect", "--json", "--pages", file, other)[1])
    valid("inspect", run("inspect", "--json", "--pages", "--lenient", damaged)[1])
    valid("measure", run("measure", "--json", file, "--platform", "sev-snp")[1])


def valid(name: str, out: str) -> None:
    schema = json.loads((Path(__file__).parents[2] / "schemas" / f"{name}.json").read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(out), schema)


def test_lenient_shows_a_file_whose_pages_are_not_there(
    run: Run, ovmf: Path, tmp_path: Path
) -> None:
    wrapped = tmp_path / "ovmf.igvm"
    assert run("wrap", ovmf, "-o", wrapped)[0] == 0
    cut = tmp_path / "cut.igvm"
    cut.write_bytes(wrapped.read_bytes()[:-100_000])  # its headers are whole, its data is not
    code, out, err = run("inspect", "--lenient", cut)
    assert (code, err) == (3, "")
    assert "file-size" in out
    assert "PAGE_DATA" in out


def test_one_bad_file_hides_no_other(run: Run, file: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.igvm"
    code, out, err = run("inspect", missing, file)
    assert code == 3
    assert "sev-snp" in out
    assert str(missing) in err


@pytest.mark.parametrize(
    "words", [["inspect"], ["inspect", "--json"], ["measure"], ["check"], ["describe"]]
)
def test_a_file_is_let_go_when_it_was_read(
    run: Run, words: list[str], file: Path, ovmf: Path, tmp_path: Path
) -> None:
    """At once, and not when the collector comes: of a thousand files one is in memory."""
    path = tmp_path / "own.igvm"
    assert run("wrap", ovmf, "-o", path, "--platform", "sev")[0] == 0
    gc.collect()
    gc.disable()
    try:
        for each in (path, file):
            run(*words, each, *(["--platform", "sev"] if words == ["measure"] else []))
            assert each.name not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


@pytest.mark.parametrize("platform", ["sev", "sev-es", "sev-snp"])
def test_measure_prints_the_digest_alone_with_bare(run: Run, file: Path, platform: str) -> None:
    code, out, err = run("measure", file, "--platform", platform, "--bare")
    assert (code, err) == (0, "")
    document = json.loads(run("measure", file, "--platform", platform, "--json")[1])
    assert document["digest"] == out.strip()
    assert len(out.strip()) == (96 if platform == "sev-snp" else 64)


def test_measure_of_sev_is_the_hash_of_its_measured_pages(run: Run, file: Path) -> None:
    image = IgvmFile.parse(file.read_bytes())
    data = b"".join(
        bytes(image.data_of(h)).ljust(4096, b"\0") for h in image.headers if type(h) is PageData
    )
    out = run("measure", file, "--platform", "sev", "--bare")[1]
    assert out.strip() == hashlib.sha256(data).hexdigest()


def test_measure_asks_for_what_it_needs(run: Run, file: Path) -> None:
    code, _, err = run("measure", file)
    assert code == 2
    one_line(err, "--platform", "sev-es")
    code, _, err = run("measure", file, "--platform", "sev-es", "--vcpus", "2")
    assert code == 2
    one_line(err, "--cpu")
    assert run("measure", file, "--platform", "sev-es", "--vcpus", "2", "--cpu", "EPYC")[0] == 0
    code, _, err = run("measure", file, "--platform", "native")
    assert code == 2
    one_line(err, "native")


def damage(kind: str, file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "damaged"
    data = file.read_bytes()
    if kind == "missing":
        return path
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "truncated":
        path.write_bytes(data[:100])
    elif kind == "flipped":
        path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_bytes(b"\x1b[31mnot firmware\n")
    return path


@pytest.mark.parametrize(
    "kind", ["missing", "directory", "fifo", "truncated", "flipped", "empty", "text"]
)
@pytest.mark.parametrize("command", ["inspect", "measure", "wrap"])
def test_bad_input_gets_one_line_and_exit_code_3(
    run: Run, file: Path, tmp_path: Path, kind: str, command: str
) -> None:
    path = damage(kind, file, tmp_path)
    output = tmp_path / "out.igvm"
    more = ["-o", output] if command == "wrap" else []
    if command == "wrap" and kind == "flipped":
        more += ["--platform", "sev-snp"]  # any whole pages are a firmware for native
    code, out, err = run(command, path, *more)
    assert (code, out) == (3, "")
    one_line(err, path)
    assert "\x1b" not in err
    assert not output.exists()


@pytest.mark.parametrize("command", ["inspect", "measure"])
def test_no_permission_is_named(file: Path, command: str) -> None:
    file.chmod(0)
    # root reads everything, unless it gives up its capabilities
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, sys.executable, "-m", "igvmfw", command, file], capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    one_line(done.stderr, file, "permissions")


def test_wrap_writes_the_whole_file_or_nothing(run: Run, ovmf: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.igvm"
    output.write_bytes(b"old")
    words = ("wrap", ovmf, "-o", output, "--platform", "sev-es", "--platform", "native")
    assert run(*words, "--policy", "sev-snp=3")[0] == 2
    assert output.read_bytes() == b"old"
    code, out, err = run(*words, "--vcpus", "2", "--policy", "sev-es=0x7")
    assert (code, out) == (0, "")
    assert "sev-es, native" in err
    assert IgvmFile.parse(output.read_bytes()).supported == (Platform.SEV_ES, Platform.NATIVE)
    assert stat.S_IMODE(output.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["out.igvm"]


def test_wrap_into_nowhere(run: Run, ovmf: Path, tmp_path: Path) -> None:
    code, _, err = run("wrap", ovmf, "-o", tmp_path / "none" / "out.igvm")
    assert code == 4
    one_line(err, "none/out.igvm", "directory exists")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["inspekt"],
        ["inspect"],
        ["inspect", "--pagez", "x"],
        ["wrap", "x"],
        ["wrap", "x", "-o", "y", "--platform", "sev-xp"],
        ["wrap", "x", "-o", "y", "--vcpus", "0"],
        ["wrap", "x", "-o", "y", "--platform", "sev", "--policy", "three"],
        ["measure", "x", "--cpu", "Pentium"],
        ["measure", "x", "--bare", "--json"],
    ],
)
def test_usage_errors_exit_with_2_and_name_the_help(run: Run, words: list[str]) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    one_line(err)


def test_a_reader_that_goes_away_is_no_error(file: Path) -> None:
    command = f"'{sys.executable}' -m igvmfw inspect --json --pages '{file}' | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == 0


def test_standard_input_is_a_file_too(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "igvmfw", "inspect", "-"], input=file.read_bytes(),
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert b"sev-snp" in done.stdout


@pytest.mark.parametrize("words", [["inspect", "-"], ["measure", "--platform", "sev", "-"]])
def test_standard_input_without_an_end_is_refused(
    run: Run, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_STDIN", 1 << 20)
    with open("/dev/zero", encoding="latin-1") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        code, out, err = run(*words)
    assert (code, out) == (3, "")
    one_line(err, "standard input", "goes on after 1 MiB")


def test_a_picture_never_replaces_an_igvm_file(run: Run, file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    named = tmp_path / "named.svg"
    named.write_bytes(content)
    link, other = tmp_path / "link.svg", tmp_path / "other.svg"
    link.symlink_to(file)
    other.symlink_to(tmp_path / "other.igvm")
    (tmp_path / "other.igvm").write_bytes(content)
    for target, source, said in (
        (named, named, "which it is made of"),
        (link, file, "which it is made of"),
        (other, file, "would replace an IGVM file"),
    ):
        code, out, err = run("inspect", "--map", target, source)
        assert (code, out) == (2, "")
        one_line(err, target, said, "another name")
        assert target.read_bytes() == content
    picture = tmp_path / "picture.svg"
    for _ in range(2):  # the second replaces the first
        assert run("inspect", "--map", picture, file)[0] == 0
    assert b"<svg" in picture.read_bytes()[:200]


@pytest.mark.parametrize("which", ["firmware", "variables"])
def test_wrap_never_replaces_what_it_is_made_of(
    run: Run, ovmf: Path, which: str, tmp_path: Path
) -> None:
    content = ovmf.read_bytes()
    files = {name: tmp_path / name for name in ("firmware", "variables")}
    for path in files.values():
        path.write_bytes(content)
    link = tmp_path / "link.igvm"
    link.symlink_to(files[which])
    for out in (files[which], link):
        words = ("--vars", files["variables"], "-o", out)
        code, shown, err = run("wrap", files["firmware"], *words)
        assert (code, shown) == (2, "")
        one_line(err, files[which], "another name")
        assert files[which].read_bytes() == content


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (["gzip", "-c"], ("compressed with gzip", "gzip -d")),
        (["xz", "-c"], ("compressed with xz", "xz -d")),
        (["bzip2", "-c"], ("compressed with bzip2", "bzip2 -d")),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "check", "measure", "describe"])
def test_a_compressed_file_is_named_with_what_unpacks_it(
    command: str, program: list[str], words: tuple[str, ...], run: Run, file: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed.igvm"
    with file.open("rb") as source, packed.open("wb") as sink:
        subprocess.run(program, stdin=source, stdout=sink, check=True, timeout=60)
    code, out, err = run(command, packed)
    assert (code, out) == (3, "")
    one_line(err, packed, "not an IGVM file", *words)


def test_processors_that_start_alike_share_a_line(run: Run, ovmf: Path, tmp_path: Path) -> None:
    file = tmp_path / "many.igvm"
    assert run("wrap", ovmf, "-o", file, "--platform", "sev-es", "--vcpus", "64")[0] == 0
    code, out, _ = run("inspect", "--map", "-", file)
    assert code == 0
    starts = [line.split(maxsplit=1)[1] for line in out.splitlines() if "    entry " in line]
    assert [start.split(":")[0] for start in starts] == ["vCPU 0", "vCPUs 1 to 63"]
    assert "VMSA of vCPUs 0 to 63" in out


def test_other_kinds_of_file_are_named(run: Run, ovmf: Path, tmp_path: Path) -> None:
    disk, empty, xml = (tmp_path / name for name in ("disk.qcow2", "empty", "guest.xml"))
    empty.touch()
    xml.write_text("<domain type='kvm'/>")
    disk.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(65536))
    for path, words in (
        (ovmf, ("a raw UEFI firmware image", "igvmfw wrap")),
        (disk, ("a qcow2 image", "qemu-img convert")),
        (empty, ("it is empty",)),
        (xml, ("it is XML",)),
        (Path("/bin/sh"), ("an ELF program",)),
    ):
        code, out, err = run("inspect", path)
        assert (code, out) == (3, "")
        one_line(err, path, "not an IGVM file", *words)


def test_an_igvm_file_is_no_domain_and_no_descriptor(
    run: Run, ovmf: Path, file: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large.igvm"
    assert run("wrap", ovmf, "-o", large)[0] == 0
    for words, remedy in (
        (("rewrite", file), "--igvm=FILE"),
        (("list", "--for", file), "--igvm=FILE"),
        (("validate", file), "igvmfw describe"),
        (("validate", large), "is it the right file?"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (3, "")
        one_line(err, words[-1], "an IGVM file", remedy)
