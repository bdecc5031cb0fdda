"""What is typed wrong: each mistake gets one line that says what was meant, or where to look."""

from pathlib import Path

import pytest

from igvmfw.cli import main


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("inspct x", ("no command 'inspct'", "did you mean 'inspect'?")),
        ("OVMF.igvm", ("no command 'OVMF.igvm'", "see 'igvmfw --help'")),
        ("inspect --jsn x", ("unrecognized arguments: --jsn", "see 'igvmfw inspect --help'")),
        ("define --igvm OVMF.igvm a.xml", ("one argument too many: a.xml", "--igvm=PATH")),
        ("rewrite --igvm= a.xml", ("--igvm: no path after '='", "see 'igvmfw rewrite --help'")),
        ("check --platform snp x", ("'snp' is not one of native, sev, sev-es, sev-snp",)),
        ("describe --profile a x", ("'a' is not one of upstream, igvmfw",)),
        ("install --into a x", ("'a' is not one of auto, qemu, igvmfw",)),
        ("wrap -o a --platform sev --policy snp=3 x", ("'snp' is no platform", "one of sev")),
        ("", ("COMMAND", "see 'igvmfw --help'")),
    ],
)
def test_a_typing_mistake(
    words: str, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize("command", ["rewrite", "list", "describe"])
def test_a_root_that_is_none(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for root in (tmp_path / "nowhere", file):
        words = [] if command == "list" else [str(file)]
        assert main([command, "--root", str(root), *words]) == 3
        assert f"{root}: is no directory (--root needs one)" in capsys.readouterr().err


def test_the_usage_shows_how_an_optional_value_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["rewrite", "--help"])
    assert "[--igvm [=PATH]]" in capsys.readouterr().out
