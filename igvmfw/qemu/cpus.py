"""CPU models of QEMU → the signature a vCPU of that model starts with.

Source: QEMU 10.2, target/i386/cpu.c (builtin_x86_defs: family, model, stepping).
"""

from igvmfw.errors import UsageError

# family, model, stepping; the versions of a model (-v1 …) share them
MODELS = {
    "EPYC": (23, 1, 2),
    "EPYC-IBPB": (23, 1, 2),
    "EPYC-Rome": (23, 49, 0),
    "EPYC-Milan": (25, 1, 1),
    "EPYC-Genoa": (25, 17, 0),
    "EPYC-Turin": (26, 0, 0),
    "qemu64": (15, 107, 1),  # what a guest gets that names none
    "kvm64": (15, 6, 1),
}


def signature(model: str) -> int:
    """CPUID leaf 1 EAX of a CPU model: what a vCPU has in RDX after reset.

    Args:
        model: QEMU's name (EPYC-Milan, EPYC-Milan-v2), or FAMILY/MODEL/STEPPING in decimal.
    Raises:
        UsageError: The model is not known, or its numbers do not fit.
    """
    base, _, version = model.rpartition("-v")
    numbers = MODELS.get(base if version.isdecimal() else model)
    if numbers is None:
        parts = model.split("/")
        if len(parts) != 3 or not all(part.isdecimal() and len(part) < 4 for part in parts):
            raise UsageError(
                f"unknown CPU model {model!r}",
                hint=f"known: {', '.join(MODELS)}; others as FAMILY/MODEL/STEPPING (25/1/1)",
            )
        family, number, stepping = (int(part) for part in parts)
        numbers = family, number, stepping
    family, number, stepping = numbers
    if family > 15 + 255 or number > 255 or stepping > 15:
        raise UsageError(f"CPU model {model!r}: family, model or stepping is too large")
    extended = max(0, family - 15)
    return (
        extended << 20
        | (number >> 4) << 16
        | min(family, 15) << 8
        | (number & 15) << 4
        | stepping
    )  # fmt: skip
