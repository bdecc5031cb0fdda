"""Words in <qemu:commandline> that win over what a file was judged by: QEMU's own word."""

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest

from igvmfw.errors import RefusedError
from igvmfw.platforms import Platform
from igvmfw.preflight import check_domain
from igvmfw.rewrite import rewrite
from igvmfw.select import Choice
from igvmfw.state import check_domain as check_state
from igvmfw.virt.domain import Domain
from igvmfw.virt.record import File, Record, State
from tests.igvm import samples
from tests.system.guests import domain
from tests.virt.choices import canonical

ID = "6ecf0a42-5b5b-4c0b-9d5e-1f1f0a9e0001"
DISK = "svsm_storage"


def seen(qemu: Path, *words: str) -> dict[str, Any]:
    """What a QEMU makes of its arguments; empty where it takes them not."""
    asked = [
        {"execute": "qmp_capabilities"},
        {"execute": "qom-get", "arguments": {"path": "/machine", "property": "type"}},
        {"execute": "qom-get", "arguments": {"path": "/machine", "property": "smp"}},
        {"execute": "qom-get", "arguments": {"path": "/machine", "property": "memory"}},
        {"execute": "qom-get", "arguments": {"path": "/machine", "property": "igvm-cfg"}},
        {"execute": "query-block"},
        {"execute": "quit"},
    ]
    done = subprocess.run(
        [qemu, "-M", "q35", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio", *words],
        input="".join(map(json.dumps, asked)), capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    if done.returncode:
        return {}
    found = [document["return"] for document in map(json.loads, done.stdout.splitlines()[1:-1])
             if "return" in document]  # fmt: skip
    _, machine, smp, memory, igvm, blocks = found[:6]
    disks = {block["device"]: block["inserted"]["image"]["filename"] for block in blocks}
    return {"machine": machine, "cpus": smp["cpus"], "memory": memory["size"], "igvm": igvm,
            "disk": disks.get(DISK)}  # fmt: skip


def start(own: Domain, file: File, state: State) -> None:
    """What is looked at in a domain before it starts."""
    check_domain(own, file)
    check_state(own, state)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("-readconfig", "{work}/other.cfg"), "igvm"),
        (("-M", "igvm_cfg=other", "-object", "{{'qom-type':'igvm-cfg','id':'other'}}"), None),
        (("-object", "secret,id=igvm0,data=x"), None),
        (("-machine", "pc"), "machine"),
        (("-smp", "3"), "cpus"),
        (("-machine", "smp.cpus=3"), "cpus"),
        (("-m", "1G"), "memory"),
        (("-machine", "memory.size=1G"), "memory"),
        (("-set", "drive.svsm_storage.file={work}/other.raw"), "disk"),
        (("--snapshot",), "disk"),
    ],
)
def test_what_wins_over_what_was_checked_is_refused(
    igvm_qemu: Path, tmp_path: Path, words: tuple[str, ...], what: str | None
) -> None:
    file, state = tmp_path / "f.igvm", tmp_path / f"libvirt-{ID}.raw"
    file.write_bytes(samples.small())
    (tmp_path / "other.igvm").write_bytes(samples.small())
    for disk in (state, tmp_path / "other.raw"):
        disk.write_bytes(bytes(1 << 20))
    (tmp_path / "other.cfg").write_text(
        f'[object "other"]\n qom-type = "igvm-cfg"\n file = "{tmp_path}/other.igvm"\n'
        '[machine]\n igvm-cfg = "other"\n'
    )
    kept = State(interface="virtio-blk-mmio", size=1 << 20, path=str(state))
    choice = Choice(path=str(file), sha256="0" * 64, platform=Platform.NATIVE)
    asking = domain(igvm_qemu, file).replace("<memory", f"<uuid>{ID}</uuid><memory", 1)
    own = rewrite(Domain.parse(asking.encode()), choice, state=kept).domain
    record = Record.find(own)
    assert record is not None
    assert record.file is not None
    start(own, record.file, kept)

    added = [word.format(work=tmp_path) for word in words]
    # the machine property that brings the slots is in no release
    given = [*own.arguments[:4], *own.arguments[8:10], "-device", f"virtio-blk-pci,drive={DISK}"]
    before, after = seen(igvm_qemu, *given), seen(igvm_qemu, *given, *added)
    assert before
    assert not after if what is None else after[what] != before[what]

    text = canonical(own.document.tree).decode()
    more = "".join(f"<qemu:arg value={quoteattr(word)}/>" for word in added)
    edited = Domain.parse(text.replace("</qemu:c", f"{more}</qemu:c").encode())
    with pytest.raises(RefusedError, match="in <qemu:commandline>"):
        start(edited, record.file, kept)
    with pytest.raises(RefusedError, match="in <qemu:commandline>"):
        rewrite(edited, choice, state=kept)
