"""Which file a domain gets: the catalogue's first match, then a look at the file itself."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from igvmfw.errors import NoFirmwareError, RefusedError
from igvmfw.igvm.builder import ImageBuilder
from igvmfw.igvm.headers import GuestPolicy, RequiredMemory
from igvmfw.igvm.image import IgvmFile
from igvmfw.platforms import Platform
from igvmfw.qemu import catalog
from igvmfw.qemu.catalog import Entry
from igvmfw.select import Candidate, choose, confirm
from igvmfw.virt.domain import Request
from tests.igvm import samples

MIB = 1 << 20


def request(
    platform: Platform = Platform.NATIVE,
    *,
    path: str | None = None,
    policy: int | None = None,
    machine: str | None = "q35",
    features: Mapping[str, bool] | None = None,
) -> Request:
    return Request(
        architecture="x86_64",
        machine=machine,
        platform=platform,
        features=features or {},
        path=path,
        policy=policy,
    )


def descriptor(name: str, *features: str, machines: str = "pc-q35-*", device: str = "igvm") -> str:
    words = ", ".join(f'"{feature}"' for feature in features)
    mapping = (
        f'{{"device": "igvm", "filename": "/usr/share/igvm/{name}.igvm"}}'
        if device == "igvm"
        else '{"device": "memory", "filename": "/usr/share/x.bin"}'
    )
    return f"""{{"description": "{name}", "interface-types": ["uefi"], "mapping": {mapping},
        "targets": [{{"architecture": "x86_64", "machines": ["{machines}"]}}],
        "features": [{words}], "tags": []}}"""


@pytest.fixture
def entries(tmp_path: Path) -> tuple[Entry, ...]:
    files = {
        "10-broken.json": "{",
        "20-flash.json": descriptor("flash", "amd-sev", device="memory"),
        "30-plain.json": descriptor("plain"),
        "40-sev.json": descriptor("sev", "amd-sev", "vtpm"),
        "50-es.json": descriptor("es", "amd-sev-es", "amd-sev"),
        "60-masked.json": descriptor("masked", "amd-sev-snp"),
        "70-old.json": descriptor("old", "amd-sev-snp", machines="pc-i440fx-*"),
    }
    vendor, system = tmp_path / "usr", tmp_path / "etc"
    vendor.mkdir()
    system.mkdir()
    for name, text in files.items():
        (vendor / name).write_text(text)
    (system / "60-masked.json").touch()
    return catalog.load([system, vendor]).entries


@pytest.mark.parametrize(
    ("wanted", "file"),
    [
        (request(), "plain"),
        (request(machine=None), "plain"),
        (request(Platform.SEV, policy=1), "sev"),
        (request(Platform.SEV_ES, policy=5), "es"),
        (request(Platform.SEV, policy=1, features={"vtpm": False}), "es"),
        (request(features={"vtpm": True}), "sev"),
        (request(Platform.SEV_SNP, machine="pc-i440fx-10.1"), "old"),
    ],
)
def test_the_first_matching_descriptor_wins(
    entries: tuple[Entry, ...], wanted: Request, file: str
) -> None:
    candidate = choose(wanted, entries)
    assert candidate.path == f"/usr/share/igvm/{file}.igvm"
    assert candidate.descriptor is not None
    assert candidate.descriptor.endswith(f"{file}.json")


def test_without_a_match_every_candidate_is_named_with_its_reason(
    entries: tuple[Entry, ...],
) -> None:
    with pytest.raises(NoFirmwareError) as caught:
        choose(request(Platform.SEV_SNP, features={"secure-boot": True}), entries)
    text = str(caught.value)
    assert "sev-snp, x86_64, q35, secure-boot" in text
    for name in ("30-plain", "40-sev", "50-es"):
        assert f"{name}.json: lacks the feature secure-boot, lacks the feature amd-sev-snp" in text
    assert "70-old.json: takes the machine types pc-i440fx-*, not q35" in text
    assert "10-broken.json" in text
    assert "20-flash" not in text
    assert "60-masked" not in text
    assert caught.value.hint


def test_an_empty_catalogue_says_so() -> None:
    with pytest.raises(NoFirmwareError, match="no descriptor of an IGVM file is installed"):
        choose(request(), ())


def test_sev_without_a_policy_goes_by_the_host_as_virt_install_does(
    entries: tuple[Entry, ...],
) -> None:
    bare = request(Platform.SEV)
    assert choose(bare, entries, sev_es=False).platforms == (Platform.SEV,)
    assert choose(bare, entries, sev_es=None).platforms[0] is Platform.SEV
    # catalogue order comes first: 40-sev.json has no SEV-ES
    assert choose(bare, entries, sev_es=True).platforms == (Platform.SEV,)
    assert choose(bare, entries[-4:], sev_es=True).platforms == (Platform.SEV_ES, Platform.SEV)
    assert choose(request(Platform.SEV, policy=1), entries, sev_es=True).platforms == (
        Platform.SEV,
    )


def test_a_file_named_by_path_needs_no_descriptor(entries: tuple[Entry, ...]) -> None:
    assert choose(request(path="/x.igvm"), ()).path == "/x.igvm"
    assert choose(request(path="/x.igvm"), entries).features is None


def test_a_file_named_by_path_is_held_to_its_descriptor(entries: tuple[Entry, ...]) -> None:
    path = "/usr/share/igvm/sev.igvm"
    fine = choose(request(path=path, features={"vtpm": True}), entries)
    assert fine.features == ("amd-sev", "vtpm")
    with pytest.raises(RefusedError, match="refuses the firmware feature vtpm"):
        choose(request(path=path, features={"vtpm": False}), entries)


def image(*platforms: Platform, policy: int | None = None, memory: int = 0) -> IgvmFile:
    builder = ImageBuilder()
    for index, word in enumerate(platforms):
        builder.add(samples.platform(word, 1 << index))
    if policy is not None:
        builder.add(GuestPolicy(policy, 1))
    if memory:
        builder.add(RequiredMemory(memory, 1, 16 * MIB))
    builder.add_page(0x1000, 1, samples.PAGE)
    return IgvmFile.parse(builder.build())


def candidate(*platforms: Platform) -> Candidate:
    return Candidate(path="/x.igvm", platforms=platforms)


@pytest.mark.parametrize("needed", list(Platform))
@pytest.mark.parametrize("there", [Platform.NATIVE, Platform.SEV, Platform.SEV_SNP])
def test_a_file_without_the_guests_platform_is_refused(needed: Platform, there: Platform) -> None:
    if needed is there:
        choice = confirm(candidate(needed), request(needed), image(there), sha256="0" * 64)
        assert choice.platform is needed
        return
    with pytest.raises(RefusedError) as caught:
        confirm(candidate(needed), request(needed), image(there), sha256="0" * 64)
    assert f"needs {needed}, the file is for {there}" in str(caught.value)
    assert caught.value.where == "/x.igvm"


@pytest.mark.parametrize(
    ("platform", "stated", "asked", "result"),
    [
        (Platform.NATIVE, None, None, None),
        (Platform.SEV, None, None, 0x03),
        (Platform.SEV_ES, None, None, 0x07),
        (Platform.SEV_SNP, None, None, 0x30000),
        (Platform.SEV, None, 0x01, 0x01),
        (Platform.SEV, 0x0B, None, 0x0B),
        (Platform.SEV_ES, 0x05, 0x05, 0x05),
        (Platform.SEV_SNP, 0xB0000, None, 0xB0000),
    ],
)
def test_the_policy_is_the_domains_then_the_files_then_the_default(
    platform: Platform, stated: int | None, asked: int | None, result: int | None
) -> None:
    file = image(platform, policy=stated)
    wanted = request(platform, policy=asked)
    assert confirm(candidate(platform), wanted, file, sha256="0" * 64).policy == result


def test_of_several_policies_the_last_counts_as_for_qemu() -> None:
    builder = ImageBuilder()
    builder.add(samples.platform(Platform.SEV_SNP, 1))
    builder.add(GuestPolicy(0x30000, 1))
    builder.add(GuestPolicy(0xB0000, 1))
    builder.add_page(0x1000, 1, samples.PAGE)
    file = IgvmFile.parse(builder.build())
    wanted = request(Platform.SEV_SNP)
    choice = confirm(candidate(Platform.SEV_SNP), wanted, file, sha256="0" * 64)
    assert choice.policy == 0xB0000


def test_contradicting_policies_are_named_both() -> None:
    with pytest.raises(RefusedError, match=r"0x1, the file's is 0x3"):
        confirm(
            candidate(Platform.SEV),
            request(Platform.SEV, policy=1),
            image(Platform.SEV, policy=3),
            sha256="0" * 64,
        )


@pytest.mark.parametrize(("platform", "policy"), [(Platform.SEV, 7), (Platform.SEV_ES, 3)])
def test_a_file_whose_policy_is_not_one_of_its_platform(platform: Platform, policy: int) -> None:
    with pytest.raises(RefusedError, match="bit 2"):
        confirm(
            candidate(platform), request(platform), image(platform, policy=policy), sha256="0" * 64
        )


def test_a_guest_too_small_for_the_file_is_refused() -> None:
    file = image(Platform.NATIVE, memory=128 * MIB)
    chosen = candidate(Platform.NATIVE)
    with pytest.raises(RefusedError, match=r"up to 144 MiB, the guest has 128 MiB"):
        confirm(chosen, request(), file, sha256="0" * 64, memory=128 * MIB)
    confirm(chosen, request(), file, sha256="0" * 64, memory=144 * MIB)


def test_features_that_nothing_vouches_for_are_said() -> None:
    chosen = candidate(Platform.NATIVE)
    wanted = request(features={"vtpm": True})
    choice = confirm(chosen, wanted, image(Platform.NATIVE), sha256="0" * 64)
    assert "vtpm" in choice.warnings[0]
