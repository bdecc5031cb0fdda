#!/bin/bash
# Installs, through apt, what the test bed needs and this Debian or Ubuntu machine lacks.
# Asks nothing, and calls apt only where something is missing.
# usage: packages.sh SET...    of: run    to run igvmfw, its tests and the demonstration
#                                  words  to test man pages and completion
#                                  rust   to build the Rust programs that tests compare with
#                                  build  to build QEMU (with rust)
#                                  roots  to make a root with a newer libvirt
set -euo pipefail

run="python3 python3-venv python3-dev gcc libc6-dev pkg-config libssl-dev libvirt-dev libvirt-clients
    libvirt-clients-qemu python3-cryptography python3-lxml libvirt-daemon libvirt-daemon-driver-qemu
    qemu-system-x86 ovmf seabios virtinst xz-utils librsvg2-bin fonts-dejavu-core tini"
words="zsh fish man-db groff mandoc"
build="build-essential ninja-build flex bison cbindgen ca-certificates xz-utils python3-venv
    libglib2.0-dev libslirp-dev libfdt-dev zlib1g-dev device-tree-compiler"
roots="debootstrap"
here=$(dirname "$(realpath "$0")")

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "packages.sh: needs root to run: $*" >&2
        echo "packages.sh: run it as root, or install sudo" >&2
        return 4
    fi
}

no_apt() {
    cat >&2 <<TEXT
packages.sh: there is no apt here. Install these packages' counterparts by hand, then go on:
  Debian's names:    $*
  Fedora's names:    python3-devel gcc pkgconf openssl-devel libvirt-devel libvirt-client
                     libvirt-daemon-driver-qemu qemu-system-x86 edk2-ovmf seabios-bin xz
                     virt-install librsvg2-tools dejavu-sans-fonts dejavu-sans-mono-fonts
  openSUSE's names:  python3-devel gcc pkg-config libopenssl-devel libvirt-devel libvirt-client
                     libvirt-daemon-driver-qemu qemu-x86 qemu-ovmf-x86_64 qemu-seabios xz
                     virt-install rsvg-convert dejavu-fonts
Their QEMU takes IGVM files, so that none has to be built.
TEXT
    exit 4
}

missing_of() { # PACKAGE...: those not installed
    local package
    for package in "$@"; do
        case $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true) in
            installed) ;;
            *) echo "$package" ;;
        esac
    done
}

# The package with a cargo that is new enough: Debian 12 has it beside its old one, for browsers;
# Ubuntu has one for each version.
rust_packages() {
    local name candidate
    for name in cargo cargo-web $(apt-cache pkgnames cargo-1. | sort -rV); do
        candidate=$(LC_ALL=C apt-cache policy "$name" | awk '/Candidate:/ { print $2 }')
        if dpkg --compare-versions "${candidate:-0}" ge "$("$here/rust.sh" --minimum)"; then
            echo "$name rustc${name#cargo}"
            return
        fi
    done
    echo "packages.sh: no package of cargo is new enough; install Rust with rustup" >&2
    return 4
}

apt_get() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@"
}

# libvirt's drivers look up the user that Debian runs guests as, whatever qemu.conf says; only the
# package libvirt-daemon-system makes it, and starts daemons that nothing here needs.
make_guest_user() {
    getent passwd libvirt-qemu >/dev/null && return
    echo "packages.sh: adding the system user libvirt-qemu" >&2
    getent group libvirt-qemu >/dev/null || as_root groupadd --system libvirt-qemu
    as_root useradd --system --gid libvirt-qemu --home-dir /var/lib/libvirt --no-create-home \
        --shell /usr/sbin/nologin libvirt-qemu
}

wanted=""
need_rust=""
need_user=""
for set in "$@"; do
    case $set in
        run) wanted+=" $run"; need_user=1 ;;
        words) wanted+=" $words" ;;
        rust) need_rust=1 ;;
        build) wanted+=" $build"; need_rust=1 ;;
        roots) wanted+=" $roots" ;;
        *) echo "packages.sh: no set named '$set'" >&2; exit 2 ;;
    esac
done
if [ -n "$need_rust" ] && "$here/rust.sh" >/dev/null 2>&1; then need_rust=""; fi
# shellcheck disable=SC2086  # the lists are words on purpose
command -v apt-get >/dev/null || no_apt $wanted
# shellcheck disable=SC2086
missing=$(missing_of $wanted)
if [ -n "$missing$need_rust" ]; then
    echo "packages.sh: installing" $missing ${need_rust:+and a Rust compiler} >&2
    apt_get update >&2
    if [ -n "$need_rust" ]; then missing+=" $(rust_packages)"; fi
    # shellcheck disable=SC2086
    apt_get install -y --no-install-recommends --no-remove $missing >&2
fi
if [ -n "$need_user" ]; then make_guest_user; fi
