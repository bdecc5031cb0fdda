"""The SEV stand-in against sev-snp-measure: the digests of launches without any IGVM file."""

import hmac
import subprocess
from pathlib import Path

import pytest
from sevsnpmeasure import guest, vcpu_types
from sevsnpmeasure.sev_mode import SevMode
from sevsnpmeasure.vmm_types import VMMType

from tests.testbed.standin import API_VERSION, LaunchRecord, SevEmulator

CPU = "EPYC-v4"
VM_TYPE = "legacy-vm-type=off"  # as the tool assumes: the VMSA with the FPU's registers
GUESTS = {
    SevMode.SEV: f"sev-guest,id=sev0,policy=1,{VM_TYPE}",
    SevMode.SEV_ES: f"sev-guest,id=sev0,policy=5,{VM_TYPE}",
    SevMode.SEV_SNP: "sev-snp-guest,id=sev0,policy=0x30000",
}


def launch(emulator: SevEmulator, guest_object: str, vcpus: int, *words: str) -> LaunchRecord:
    """Launch a guest up to the end of its measuring."""
    command = [
        str(emulator.path), "-accel", "kvm", "-cpu", CPU, "-smp", str(vcpus), "-m", "256",
        "-machine", "q35,confidential-guest-support=sev0",
        "-object", f"{guest_object},cbitpos=0,reduced-phys-bits=1",
        "-nodefaults", "-display", "none", *words,
    ]  # fmt: skip
    end = "snp_finish" if "snp" in guest_object else "measure"
    emulator.forget()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        return emulator.wait_for(end)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize("mode", list(GUESTS))
def test_digest_of_a_plain_firmware_is_the_one_sev_snp_measure_computes(
    mode: SevMode, vcpus: int, sev_emulator: SevEmulator, ovmf: Path
) -> None:
    if mode is SevMode.SEV_SNP:
        words = ["-bios", str(ovmf)]
    else:
        words = ["-S", "-drive", f"if=pflash,format=raw,readonly=on,file={ovmf}"]
    record = launch(sev_emulator, GUESTS[mode], vcpus, *words)
    expected = guest.calc_launch_digest(
        mode, vcpus, vcpu_types.CPU_SIGS[CPU], str(ovmf), None, None, None, 1, "", VMMType.QEMU
    )
    assert record.digest == expected


def test_measurement_is_signed_with_the_key(sev_emulator: SevEmulator, ovmf: Path) -> None:
    pflash = f"if=pflash,format=raw,readonly=on,file={ovmf}"
    nonces = set()
    for _ in range(2):
        record = launch(sev_emulator, GUESTS[SevMode.SEV], 1, "-S", "-drive", pflash)
        assert record.digest is not None
        assert record.measurement is not None
        nonce = record.measurement[32:]
        policy = (1).to_bytes(4, "little")
        message = bytes([4, *API_VERSION]) + policy + record.digest + nonce
        assert record.measurement[:32] == hmac.digest(sev_emulator.tik, message, "sha256")
        nonces.add(nonce)
    assert len(nonces) == 2
