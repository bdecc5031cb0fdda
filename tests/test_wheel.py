"""The wheel, installed into a clean virtual environment and used from another folder."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from igvmfw import __version__
from igvmfw.cli import COMMANDS

CHECKOUT = Path(__file__).parents[1]


def run(*command: str | Path, folder: Path) -> str:
    """Run a program where nothing of the checkout is in reach."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=clean,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: building writes into its source tree."""
    source = tmp_path_factory.mktemp("source") / "igvmfw"
    made = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "target", "*.egg-info")
    shutil.copytree(CHECKOUT, source, ignore=made)
    run(sys.executable, "-m", "build", "--wheel", folder=source)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a virtual environment with nothing but the wheel and what it depends on."""
    place = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", place, folder=place)
    words = ["install", "--quiet", "--disable-pip-version-check"]
    run(place / "bin" / "pip", *words, wheel, folder=place)
    return place / "bin"


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"igvmfw", f"igvmfw-{__version__}.dist-info"}
    for folder in ("schemas", "descriptors"):
        shipped = {path.name for path in (CHECKOUT / folder).glob("*.json")}
        assert shipped
        assert shipped <= {
            name.removeprefix(f"igvmfw/{folder}/")
            for name in names
            if name.startswith(f"igvmfw/{folder}/")
        }
    assert "igvmfw/py.typed" in names


def test_data_files_are_resources(environment: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.resources as r, json\n"
        "for package in ('igvmfw.schemas', 'igvmfw.descriptors'):\n"
        "    for entry in r.files(package).iterdir():\n"
        "        if entry.name.endswith('.json'):\n"
        "            json.loads(entry.read_text()); print(package, entry.name)\n"
        "import igvmfw; print(igvmfw.__file__)\n"
    )
    *files, place = run(environment / "python", "-c", code, folder=tmp_path).splitlines()
    assert {line.split()[0] for line in files} == {"igvmfw.schemas", "igvmfw.descriptors"}
    assert place.startswith(str(environment.parent))


def test_every_command_has_help(environment: Path, tmp_path: Path) -> None:
    program = environment / "igvmfw"
    assert run(program, "--version", folder=tmp_path).strip() == f"igvmfw {__version__}"
    listed = run(program, "--help", folder=tmp_path)
    for command in COMMANDS:
        assert command in listed
        assert run(program, command, "--help", folder=tmp_path).startswith("usage: igvmfw")


def test_a_program_that_uses_the_api_is_typed(environment: Path, tmp_path: Path) -> None:
    """As its author sees it: with the installed package, which brings its types."""
    program = tmp_path / "define.py"
    shutil.copy(CHECKOUT / "docs" / "examples" / "define.py", program)
    python = str(environment / "python")
    check = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python]
    assert "Success" in run(*check, program, folder=tmp_path)
    # and it is the package's types that were looked at, not Any
    program.write_text(program.read_text() + "reveal_type(prepared)\nname.no_such_thing()\n")
    done = subprocess.run(
        [*check, str(program)],
        capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False,
    )  # fmt: skip
    assert 'Revealed type is "igvmfw.rewrite.Rewritten"' in done.stdout
    assert '"str" has no attribute "no_such_thing"' in done.stdout


def test_the_way_from_firmware_to_a_domain_works(
    environment: Path, ovmf: Path, tmp_path: Path
) -> None:
    """Everything that needs no daemon, with the schemas and descriptors of the wheel."""
    program = environment / "igvmfw"
    root = tmp_path / "root"
    file = root / "usr/share/igvm/guest.igvm"
    file.parent.mkdir(parents=True)
    run(program, "wrap", ovmf, "-o", file, "--platform", "sev", folder=tmp_path)
    assert "sev" in run(program, "inspect", file, folder=tmp_path)
    digest = run(program, "measure", file, "--platform", "sev", "--bare", folder=tmp_path)
    assert len(bytes.fromhex(digest)) == 32
    run(program, "install", "--root", root, file, folder=tmp_path)
    assert "guest" in run(program, "list", "--root", root, folder=tmp_path)
    for descriptor in (root / "etc/qemu/firmware").glob("*.json"):
        run(program, "validate", descriptor, folder=tmp_path)
    domain = tmp_path / "domain.xml"
    domain.write_text(
        "<domain type='kvm'><name>d</name><memory>65536</memory>"
        "<os firmware='igvm'><type arch='x86_64' machine='q35'>hvm</type></os>"
        "<launchSecurity type='sev'><policy>1</policy></launchSecurity></domain>"
    )
    rewritten = run(program, "rewrite", "--root", root, domain, folder=tmp_path)
    assert "igvm-cfg" in rewritten
    assert "/usr/share/igvm/guest.igvm" in rewritten


def test_doctors_remedies_fit_a_virtual_environment(environment: Path, tmp_path: Path) -> None:
    """What apt installs is not seen in there, and its igvmfw not by the distribution's Python."""
    done = subprocess.run(
        [environment / "igvmfw", "doctor", "--json"],
        capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False,
    )  # fmt: skip
    lines = {line["name"]: line for line in json.loads(done.stdout)["lines"]}
    module = lines["python-module"]
    assert module["status"] == "missing"
    python, *words = shlex.split(module["remedy"].partition(" && ")[2])
    assert words == ["-m", "pip", "install", "libvirt-python"]
    assert os.path.samefile(environment, os.path.dirname(python))
    assert run(python, "-m", "igvmfw", "--version", folder=tmp_path)
    if (hook := lines["installed"])["status"] == "missing":
        assert f"s|^python=.*|python={python}|" in hook["remedy"]
