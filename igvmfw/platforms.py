"""The words for isolation platforms, shared by all sides."""

from enum import StrEnum


class Platform(StrEnum):
    """An isolation platform, as named on the command line, in JSON and in domain metadata.

    Source: IgvmPlatformType in igvm_defs 0.5.0 (src/lib.rs); the words follow QEMU's feature
    names where it has one (amd-sev-snp → sev-snp).
    """

    NATIVE = "native"
    SEV = "sev"
    SEV_ES = "sev-es"
    SEV_SNP = "sev-snp"
    TDX = "tdx"
    VSM = "vsm"
    CCA = "cca"
