from pathlib import Path

import pytest

from igvmfw.describe import COCONUT_STORAGE, Description, Stated, describe, describe_text
from igvmfw.errors import RefusedError, UsageError
from igvmfw.igvm.image import IgvmFile
from igvmfw.igvm.payload import Payload, identify
from igvmfw.igvm.uefi import UefiFacts
from igvmfw.platforms import Platform
from igvmfw.qemu.descriptor import Descriptor, IgvmMapping
from igvmfw.qemu.schema import Profile, check_schema
from tests.igvm import samples

OVMF = Payload(firmware="OVMF")
SVSM = Payload(firmware="OVMF", svsm="COCONUT-SVSM", svsm_version="2026.07-devel-1-gabcdef0")
VTPM = Payload(firmware="OVMF", svsm="COCONUT-SVSM", vtpm=True)
PERSISTENT = Payload(firmware="OVMF", svsm="COCONUT-SVSM", vtpm=True, persistence=True)


def made(
    *platforms: Platform,
    payloads: list[Payload] | None = None,
    profile: Profile = Profile.IGVMFW,
    stated: Stated | None = None,
) -> Description:
    image = IgvmFile.parse(samples.small(*platforms))
    payloads = [OVMF] * len(platforms) if payloads is None else payloads
    return describe(image, payloads, filename="/f.igvm", profile=profile, stated=stated)


def with_facts(
    *facts: UefiFacts | None, payload: Payload = OVMF, profile: Profile = Profile.IGVMFW
) -> Description:
    image = IgvmFile.parse(samples.small(Platform.NATIVE, Platform.SEV))
    return describe(image, [payload] * 2, facts, filename="/f.igvm", profile=profile)


def uefi(**true: bool) -> UefiFacts:
    names = ("secure_boot", "smm", "variable_service", "enrolled_keys")
    return UefiFacts(**{name: true.get(name, False) for name in names})


def reasons(description: Description) -> dict[str, str]:
    return {reason.item: reason.text for reason in description.reasons}


@pytest.mark.parametrize(
    ("platforms", "features"),
    [
        ([Platform.NATIVE], []),
        ([Platform.SEV], ["amd-sev"]),
        ([Platform.NATIVE, Platform.SEV, Platform.SEV_ES], ["amd-sev", "amd-sev-es"]),
        ([Platform.SEV_SNP, Platform.NATIVE], ["amd-sev-snp"]),
    ],
)
def test_features_are_the_platforms(platforms: list[Platform], features: list[str]) -> None:
    description = made(*platforms)
    descriptor = description.descriptor
    assert list(descriptor.features) == features
    assert descriptor.interface_types == ("uefi",)
    assert descriptor.mapping == IgvmMapping(filename="/f.igvm")
    assert [t.architecture for t in descriptor.targets] == ["x86_64"]
    assert descriptor.targets[0].machines == ("pc-q35-*", "pc-i440fx-*")
    for profile in Profile:
        assert check_schema(descriptor.to_dict(), profile) == ()
    assert all(reasons(description)[feature] for feature in (*features, "uefi", "pc-q35-*"))


def test_vtpm_and_its_storage() -> None:
    description = made(Platform.SEV_SNP, payloads=[PERSISTENT])
    assert description.descriptor.features == ("amd-sev-snp", "vtpm")
    mapping = description.descriptor.mapping
    assert isinstance(mapping, IgvmMapping)
    assert mapping.vtpm_storage == COCONUT_STORAGE
    assert check_schema(description.descriptor.to_dict()) == ()
    assert "COCONUT-SVSM" in reasons(description)["x-vtpm-storage"]


def test_without_persistence_there_is_no_storage() -> None:
    mapping = made(Platform.SEV_SNP, payloads=[VTPM]).descriptor.mapping
    assert isinstance(mapping, IgvmMapping)
    assert mapping.vtpm_storage is None


def test_the_profile_upstream_leaves_out_what_qemu_has_no_word_for() -> None:
    description = made(Platform.SEV_SNP, payloads=[PERSISTENT], profile=Profile.UPSTREAM)
    assert description.descriptor.features == ("amd-sev-snp",)
    for version in ("10.1", "10.2", "11.0"):
        assert check_schema(description.descriptor.to_dict(), Profile.UPSTREAM, version) == ()
    assert reasons(description)["vtpm"].startswith("left out")
    assert reasons(description)["x-vtpm-storage"].startswith("left out")


def test_a_vtpm_that_only_some_guests_get_is_not_promised() -> None:
    description = made(Platform.NATIVE, Platform.SEV_SNP, payloads=[OVMF, VTPM])
    assert "vtpm" not in description.descriptor.features


@pytest.mark.parametrize(
    ("facts", "features"),
    [
        (uefi(), []),
        (uefi(secure_boot=True), []),
        (uefi(secure_boot=True, smm=True), ["requires-smm", "secure-boot"]),
        (uefi(secure_boot=True, enrolled_keys=True), ["enrolled-keys", "secure-boot"]),
        (uefi(secure_boot=True, variable_service=True), ["secure-boot", "host-uefi-vars"]),
        (uefi(enrolled_keys=True, smm=True), ["enrolled-keys", "requires-smm"]),
    ],
)
def test_what_the_firmware_says_about_itself(facts: UefiFacts, features: list[str]) -> None:
    description = with_facts(facts, facts)
    assert list(description.descriptor.features) == ["amd-sev", *features]
    assert all(reasons(description)[feature] for feature in features)
    assert check_schema(description.descriptor.to_dict(), Profile.UPSTREAM) == ()
    # what one platform's firmware has not, the descriptor does not promise
    assert with_facts(facts, uefi()).descriptor.features == ("amd-sev",)
    assert with_facts(facts, None).descriptor.features == ("amd-sev",)


def test_secure_boot_that_nothing_protects_is_explained() -> None:
    description = with_facts(uefi(secure_boot=True), uefi(secure_boot=True))
    assert reasons(description)["secure-boot"].startswith("left out")


def test_variables_that_the_file_itself_serves_are_not_the_hosts() -> None:
    facts = uefi(secure_boot=True, variable_service=True)
    payload = Payload(firmware="OVMF", svsm="COCONUT-SVSM", uefi_variables=True)
    description = with_facts(facts, facts, payload=payload)
    assert description.descriptor.features == ("amd-sev", "secure-boot")


def test_what_is_stated_is_taken() -> None:
    stated = Stated(
        interface_types=("bios", "uefi"),
        features=("secure-boot", "amd-sev", "acpi-s3"),
        machines=("pc-q35-10.*",),
        description="mine",
    )
    description = made(Platform.SEV, stated=stated)
    descriptor = description.descriptor
    assert descriptor.interface_types == ("bios", "uefi")
    assert descriptor.features == ("acpi-s3", "amd-sev", "secure-boot")
    assert descriptor.targets[0].machines == ("pc-q35-10.*",)
    assert descriptor.description == "mine"
    assert reasons(description)["secure-boot"] == "stated"
    assert "platform sev" in reasons(description)["amd-sev"]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (Stated(features=("secureboot",)), "unknown feature 'secureboot'"),
        (Stated(interface_types=("efi",)), "unknown interface type 'efi'"),
        (Stated(machines=("microvm",)), "'microvm' takes no IGVM file"),
        (Stated(machines=("q35",)), "'q35' takes no IGVM file"),
        (Stated(machines=("virt-*",)), "'virt-*' takes no IGVM file"),
        (Stated(machines=("",)), "'' takes no IGVM file"),
    ],
)
def test_what_cannot_be_stated(stated: Stated, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(Platform.SEV, stated=stated)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("glob", ["pc-*", "*", "pc-q35-10.2", "pc-i440fx-?.*", "pc-q3?-*"])
def test_machine_globs_of_the_pc_family(glob: str) -> None:
    assert made(Platform.SEV, stated=Stated(machines=(glob,))).descriptor.targets[0].machines == (
        glob,
    )


def test_an_interface_is_asked_for_where_nothing_tells() -> None:
    with pytest.raises(UsageError, match="no OVMF in the file") as caught:
        made(Platform.NATIVE, payloads=[Payload(svsm="COCONUT-SVSM")])
    assert "--interface" in str(caught.value)
    stated = Stated(interface_types=("uefi",))
    assert made(Platform.NATIVE, payloads=[Payload()], stated=stated)


def test_files_that_no_qemu_takes() -> None:
    with pytest.raises(RefusedError, match="none of the file's platforms"):
        made(Platform.VSM)
    with pytest.raises(RefusedError, match="AARCH64"):
        describe(IgvmFile.parse(samples.cca()), [], filename="/f.igvm")


@pytest.mark.parametrize(
    ("platforms", "payloads", "text"),
    [
        ([Platform.NATIVE], [OVMF], "OVMF for plain guests"),
        ([Platform.SEV, Platform.SEV_ES], [OVMF, OVMF], "OVMF for SEV and SEV-ES guests"),
        (
            [Platform.NATIVE, Platform.SEV, Platform.SEV_SNP],
            [OVMF, OVMF, OVMF],
            "OVMF for plain, SEV and SEV-SNP guests",
        ),
        (
            [Platform.SEV_SNP],
            [SVSM],
            "COCONUT-SVSM 2026.07-devel-1-gabcdef0 with OVMF for SEV-SNP guests",
        ),
        ([Platform.SEV_SNP], [VTPM], "COCONUT-SVSM with OVMF and vTPM for SEV-SNP guests"),
        ([Platform.NATIVE], [Payload(svsm="COCONUT-SVSM")], "COCONUT-SVSM for plain guests"),
        ([Platform.NATIVE], [Payload()], "IGVM firmware for plain guests"),
        ([Platform.NATIVE, Platform.SEV], [OVMF, SVSM], "IGVM firmware for plain and SEV guests"),
    ],
)
def test_the_text_for_people(platforms: list[Platform], payloads: list[Payload], text: str) -> None:
    assert describe_text(IgvmFile.parse(samples.small(*platforms)), payloads) == text


def test_the_distributions_ovmf(ovmf: Path) -> None:
    from igvmfw.igvm.wrap import wrap

    image = IgvmFile.parse(wrap(ovmf.read_bytes(), [Platform.NATIVE, Platform.SEV_SNP]))
    payloads = [identify(image, platform) for platform in image.supported]
    descriptor = describe(image, payloads, filename="/f.igvm").descriptor
    assert descriptor.features == ("amd-sev-snp",)
    assert descriptor.description == "OVMF for plain and SEV-SNP guests"
    assert Descriptor.parse(descriptor.write()) == descriptor


@pytest.mark.parametrize(
    "stated", [Stated(description="x\udcff"), Stated(machines=("pc-q35-*\udcff",))]
)
def test_what_is_stated_is_text_that_a_descriptor_can_hold(stated: Stated) -> None:
    with pytest.raises(UsageError, match="not UTF-8 text"):
        made(Platform.NATIVE, stated=stated)


def test_what_is_stated_twice_is_said_once() -> None:
    stated = Stated(
        interface_types=("uefi", "uefi"), machines=("pc-q35-*",) * 2, features=("vtpm", "vtpm")
    )
    description = made(Platform.NATIVE, stated=stated)
    assert description.descriptor.interface_types == ("uefi",)
    assert description.descriptor.targets[0].machines == ("pc-q35-*",)
    assert description.descriptor.features == ("vtpm",)
    assert len(description.reasons) == 3
