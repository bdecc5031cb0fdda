"""Ready descriptors of the IGVM files that distributions ship.

A preset is a template in descriptors/ whose file name begins with `@DATADIR@`.  What the file
itself tells always wins; a preset only adds what no file can tell: the machine types its makers
support, and how the build logs.

Sources: Fedora's edk2 package (OVMF.igvm, made of OVMF_CODE_4M.fd, whose own descriptor has
verbose-dynamic); COCONUT-SVSM's documentation (coconut-qemu.igvm, run on q35).  Whether a build of
that keeps its vTPM's state, its feature `cocoonfs`, is off by default and told by the file.
"""

import functools

from igvmfw.describe import SVSM, Stated
from igvmfw.errors import UsageError
from igvmfw.qemu.descriptor import PLATFORM_FEATURES, VTPM, Descriptor, IgvmMapping
from igvmfw.resources import load_template, template_names

DATADIR = "/usr/share"
_VARIABLE = "@DATADIR@"

# what `igvmfw.describe` finds out from the file
_TOLD_BY_FILE = {
    *PLATFORM_FEATURES.values(),
    VTPM,
    "enrolled-keys",
    "host-uefi-vars",
    "requires-smm",
    "secure-boot",
}


@functools.cache
def load(name: str, datadir: str = DATADIR) -> Descriptor:
    """A preset, with its path filled in.

    Args:
        name: One of `igvmfw.resources.template_names`.
        datadir: Where the files are, as guests' hosts see it.
    Raises:
        UsageError: There is no such preset.
    """
    if name not in template_names():
        known = ", ".join(template_names())
        raise UsageError(f"unknown preset {name!r}", hint=f"known: {known}")
    template = Descriptor.parse(load_template(name))
    mapping = template.mapping
    if not isinstance(mapping, IgvmMapping):
        raise UsageError(f"the preset {name!r} is of no IGVM file")
    filename = mapping.filename.replace(_VARIABLE, datadir.rstrip("/"))
    return template.replace(mapping=mapping.replace(filename=filename))


def find(filename: str, datadir: str = DATADIR) -> Descriptor | None:
    """The preset of a file that lies where distributions ship it."""
    presets = (load(name, datadir) for name in template_names())
    return next((preset for preset in presets if preset.mapping.filename == filename), None)


def stated(preset: Descriptor) -> Stated:
    """What a preset says that its file cannot; whether there is an SVSM, it can."""
    machines = (machine for target in preset.targets for machine in target.machines)
    return Stated(
        interface_types=tuple(i for i in preset.interface_types if i != SVSM),
        features=tuple(f for f in preset.features if f not in _TOLD_BY_FILE),
        machines=tuple(machines),
    )
