"""igvmfw: IGVM firmware for libvirt guests.

Data flows one way: file → image → descriptor → choice → domain → launch.

What is named in `__all__` is the public API, described in docs/api.md.  Importing the package loads
none of it: each name brings its module when it is first used.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The public API: every module with the names it gives, `attribute:name` where the two differ.  A
# name of a module within the package would be hidden by that module, so that none is in here.  The
# same once more for type checkers and editors, which do not run code; a test compares the two.
_PUBLIC = {
    "igvmfw.errors": (
        "IgvmfwError UsageError InputError IgvmError FirmwareError DescriptorError DomainError "
        "NegativeError NoFirmwareError RefusedError HostError OutputError EmulatorError "
        "LibvirtError"
    ),
    "igvmfw.platforms": "Platform",
    "igvmfw.igvm.image": "IgvmFile",
    "igvmfw.igvm.payload": "Payload",
    "igvmfw.igvm.summary": "Summary VpEntry",
    "igvmfw.images": "Inspection inspect_image load_image",
    "igvmfw.findings": "Finding Guest Severity",
    "igvmfw.qemu.acceptance": "Acceptance acceptance_of",
    "igvmfw.qemu.emulator": "host_acceptance",
    "igvmfw.check": "check_image refuses",
    "igvmfw.qemu.cpus": "signature:cpu_signature",
    "igvmfw.igvm.measure": "Vmm launch_digest",
    "igvmfw.igvm.wrap": "wrap",
    "igvmfw.qemu.descriptor": "Descriptor",
    "igvmfw.qemu.schema": "Profile",
    "igvmfw.describe": "Description Reason Stated",
    "igvmfw.description": "describe_file",
    "igvmfw.inventory": "FileState Row take:take_inventory",
    "igvmfw.qemu.catalog": "Catalog Entry State:EntryState load:load_catalog search_path",
    "igvmfw.virt.domain": "Domain Request",
    "igvmfw.select": "Candidate choose",
    "igvmfw.verdict": "Judgement Verdict judge",
    "igvmfw.virt.record": "File:RecordedFile OnChange",
    "igvmfw.rewrite": "Rewritten as_request convert request_of restore",
    "igvmfw.manager": "prepare",
    "igvmfw.virt.host": "Connection connect",
    "igvmfw.launch": "create define fetch recorded start undefine",
    "igvmfw.verify": "Launch Measurement Verification read_tik verify:verify_domain",
}
_HOME = {
    name or attribute: (module, attribute)
    for module, words in _PUBLIC.items()
    for attribute, _, name in (word.partition(":") for word in words.split())
}
__all__ = [*_HOME]

if TYPE_CHECKING:
    from igvmfw.check import check_image as check_image
    from igvmfw.check import refuses as refuses
    from igvmfw.describe import Description as Description
    from igvmfw.describe import Reason as Reason
    from igvmfw.describe import Stated as Stated
    from igvmfw.description import describe_file as describe_file
    from igvmfw.errors import DescriptorError as DescriptorError
    from igvmfw.errors import DomainError as DomainError
    from igvmfw.errors import EmulatorError as EmulatorError
    from igvmfw.errors import FirmwareError as FirmwareError
    from igvmfw.errors import HostError as HostError
    from igvmfw.errors import IgvmError as IgvmError
    from igvmfw.errors import IgvmfwError as IgvmfwError
    from igvmfw.errors import InputError as InputError
    from igvmfw.errors import LibvirtError as LibvirtError
    from igvmfw.errors import NegativeError as NegativeError
    from igvmfw.errors import NoFirmwareError as NoFirmwareError
    from igvmfw.errors import OutputError as OutputError
    from igvmfw.errors import RefusedError as RefusedError
    from igvmfw.errors import UsageError as UsageError
    from igvmfw.findings import Finding as Finding
    from igvmfw.findings import Guest as Guest
    from igvmfw.findings import Severity as Severity
    from igvmfw.igvm.image import IgvmFile as IgvmFile
    from igvmfw.igvm.measure import Vmm as Vmm
    from igvmfw.igvm.measure import launch_digest as launch_digest
    from igvmfw.igvm.payload import Payload as Payload
    from igvmfw.igvm.summary import Summary as Summary
    from igvmfw.igvm.summary import VpEntry as VpEntry
    from igvmfw.igvm.wrap import wrap as wrap
    from igvmfw.images import Inspection as Inspection
    from igvmfw.images import inspect_image as inspect_image
    from igvmfw.images import load_image as load_image
    from igvmfw.inventory import FileState as FileState
    from igvmfw.inventory import Row as Row
    from igvmfw.inventory import take as _take_inventory
    from igvmfw.launch import create as create
    from igvmfw.launch import define as define
    from igvmfw.launch import fetch as fetch
    from igvmfw.launch import recorded as recorded
    from igvmfw.launch import start as start
    from igvmfw.launch import undefine as undefine
    from igvmfw.manager import prepare as prepare
    from igvmfw.platforms import Platform as Platform
    from igvmfw.qemu.acceptance import Acceptance as Acceptance
    from igvmfw.qemu.acceptance import acceptance_of as acceptance_of
    from igvmfw.qemu.catalog import Catalog as Catalog
    from igvmfw.qemu.catalog import Entry as Entry
    from igvmfw.qemu.catalog import State as _EntryState
    from igvmfw.qemu.catalog import load as _load_catalog
    from igvmfw.qemu.catalog import search_path as search_path
    from igvmfw.qemu.cpus import signature as _cpu_signature
    from igvmfw.qemu.descriptor import Descriptor as Descriptor
    from igvmfw.qemu.emulator import host_acceptance as host_acceptance
    from igvmfw.qemu.schema import Profile as Profile
    from igvmfw.rewrite import Rewritten as Rewritten
    from igvmfw.rewrite import as_request as as_request
    from igvmfw.rewrite import convert as convert
    from igvmfw.rewrite import request_of as request_of
    from igvmfw.rewrite import restore as restore
    from igvmfw.select import Candidate as Candidate
    from igvmfw.select import choose as choose
    from igvmfw.verdict import Judgement as Judgement
    from igvmfw.verdict import Verdict as Verdict
    from igvmfw.verdict import judge as judge
    from igvmfw.verify import Launch as Launch
    from igvmfw.verify import Measurement as Measurement
    from igvmfw.verify import Verification as Verification
    from igvmfw.verify import read_tik as read_tik
    from igvmfw.verify import verify as _verify_domain
    from igvmfw.virt.domain import Domain as Domain
    from igvmfw.virt.domain import Request as Request
    from igvmfw.virt.host import Connection as Connection
    from igvmfw.virt.host import connect as connect
    from igvmfw.virt.record import File as _RecordedFile
    from igvmfw.virt.record import OnChange as OnChange

    EntryState = _EntryState
    RecordedFile = _RecordedFile
    cpu_signature = _cpu_signature
    load_catalog = _load_catalog
    take_inventory = _take_inventory
    verify_domain = _verify_domain

else:  # a type checker would take any name at all for one that exists

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        module, attribute = _HOME[name]
        value = getattr(importlib.import_module(module), attribute)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOME})
