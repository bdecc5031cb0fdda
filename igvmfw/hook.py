"""libvirt's hook: looks at a domain's IGVM firmware before QEMU is started, and refuses if need be.

libvirt calls /etc/libvirt/hooks/qemu.d/igvmfw, a shell script, which runs this module for domains
that carry igvmfw's record: `python3 -I -m igvmfw.hook NAME prepare begin -`, with the domain's XML
on standard input.  A non-zero exit stops the start, and what stands on standard error reaches
virsh's user (docs/hooks.rst of libvirt).  A hook must not call libvirt, which waits for it.

A domain that igvmfw has chosen a file for relies on this check: where the check itself fails, the
start is refused.  No other domain is ever stopped.
"""

import sys
import syslog

from igvmfw.errors import IgvmfwError

EXIT_INTERNAL = 70  # EX_SOFTWARE of sysexits.h
_MAX_XML = 16 << 20  # bytes; what libvirt itself takes is smaller


def main(arguments: list[str]) -> int:
    """Run the hook as libvirt calls it; returns the exit status.

    Args:
        arguments: The domain's name, the operation, its stage, and one more.
    """
    if arguments[1:2] != ["prepare"]:
        return 0  # `reconnect` above all: to fail there would end a running guest
    try:
        # here, where it is said what is missing: the hook starts without them
        from igvmfw.preflight import Cache, check_start
        from igvmfw.virt.domain import Domain

        domain = Domain.parse(sys.stdin.buffer.read(_MAX_XML))
        check_start(domain, warn=_warn, cache=Cache.of_user())
    except IgvmfwError as error:
        _say("error", str(error))
        return error.exit_code
    except Exception as error:
        _say(
            "error",
            f"cannot check the IGVM firmware of {arguments[0]}: {type(error).__name__}: {error} "
            "(a bug, or igvmfw is not installed completely; touch /etc/libvirt/hooks/igvmfw.off "
            "has domains started unchecked)",
        )
        return EXIT_INTERNAL
    return 0


def _warn(message: str) -> None:
    _say("warning", message)
    # libvirt drops what a hook says that lets a domain pass
    syslog.openlog("igvmfw")
    syslog.syslog(syslog.LOG_WARNING, message)


def _say(kind: str, message: str) -> None:
    """One line, with everything escaped that could drive a terminal."""
    line = " ".join(message.split())
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
    sys.stderr.write(f"igvmfw: {kind}: {shown}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
