#!/bin/bash
# Makes root directories with newer releases of this distribution and their libvirt (10.5 or newer,
# which knows SEV-SNP) in the cache, through debootstrap. Needs root; each takes about a minute.
#
# usage: roots.sh --suites              names the releases there are roots of, newest last
#        roots.sh SUITE                 prints a root's path, made where it is missing
#        roots.sh SUITE --print         prints it, and makes nothing
#        roots.sh SUITE --serve DIR     runs the root's libvirtd until it is killed, and its guests
#                                       with it; its socket is DIR/libvirt-sock. The root itself
#                                       stays as it is, and /tmp and the cache are in it where they
#                                       are outside
set -euo pipefail

here=$(dirname "$(realpath "$0")")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/igvmfw
# libvirt, and what the emulator that build-qemu.sh builds and the SEV stand-in load
packages="libvirt-daemon libvirt-daemon-driver-qemu libglib2.0-0t64 libslirp0 libfdt1 zlib1g
    libssl3t64 seabios ipxe-qemu qemu-system-data"
# shellcheck disable=SC1091
distribution=$(. /etc/os-release && echo "${ID-}")
case $distribution in
    debian) suites="trixie sid" script=sid components=main ;;
    ubuntu) suites=resolute script=gutsy components=main,universe ;;
    *)
        echo "roots.sh: knows how to make a root on Debian and Ubuntu only" >&2
        exit 4
        ;;
esac
if [ "${1-}" = --suites ]; then
    echo "$suites"
    exit
fi
case " $suites " in
    *" ${1:?names no suite} "*) suite=$1 ;;
    *) echo "roots.sh: no suite named $1; there are: $suites" >&2; exit 2 ;;
esac
root=$cache/root-$suite-$(sha256sum "$here/roots.sh" | cut -c 1-16)

fill_root() { # DIR MIRROR
    debootstrap --variant=minbase --components=$components \
        --keyring="/usr/share/keyrings/$distribution-archive-keyring.gpg" \
        "$suite" "$1" "$2" "/usr/share/debootstrap/scripts/$script" &&
        # nothing that packages would start may start
        printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d" &&
        chmod 755 "$1/usr/sbin/policy-rc.d" &&
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive chroot "$1" \
            apt-get -q -o APT::Sandbox::User=root install -y --no-install-recommends $packages &&
        { chroot "$1" getent passwd libvirt-qemu >/dev/null ||
            chroot "$1" useradd --system --user-group --no-create-home libvirt-qemu; } &&
        chroot "$1" apt-get clean && rm -rf "$1"/var/lib/apt/lists/*
}

make_root() {
    local mirror work
    if [ "$(id -u)" != 0 ]; then
        echo "roots.sh: left out: only root can make the root with a newer libvirt" >&2
        return
    fi
    mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -v security | head -n 1)
    mkdir -p "$cache"
    exec 9>"$root.lock"
    flock 9
    [ ! -d "$root" ] || return 0
    echo "roots.sh: making a root with $distribution $suite and its libvirt, about a minute" >&2
    rm -rf --one-file-system "$root".??????  # what a killed run left
    work=$(mktemp -d "$root.XXXXXX")
    # shellcheck disable=SC2064  # the directory of now
    trap "rm -rf --one-file-system '$work'" EXIT
    if ! fill_root "$work" "$mirror" >"$root.log" 2>&1; then
        echo "roots.sh: failed; the end of $root.log:" >&2
        tail -n 20 "$root.log" >&2
        exit 4
    fi
    chmod 755 "$work"
    mv "$work" "$root"
}

# In namespaces of its own, so that nothing stays mounted and no guest stays behind.
serve() { # DIR
    mkdir -p "$1"
    cat >"$1/libvirtd.conf" <<CONF
unix_sock_dir = "$1"
auth_unix_rw = "none"
auth_unix_ro = "none"
CONF
    cat >"$1/qemu.conf" <<'CONF'
stdio_handler = "file"
namespaces = []
security_driver = "none"
user = "root"
group = "root"
remember_owner = 0
cgroup_controllers = []
CONF
    exec unshare --mount --pid --fork --kill-child "$0" "$suite" --inside "$1"
}

inside() { # DIR
    local top=$1/root
    mount --make-rprivate /
    mkdir -p "$top"
    mount -t tmpfs tmpfs "$top"
    mkdir "$top"/{new,work,all}
    mount -t overlay overlay \
        -o "lowerdir=$root,upperdir=$top/new,workdir=$top/work" "$top/all"
    mount -t proc proc "$top/all/proc"
    mount --rbind /dev "$top/all/dev"
    mount --rbind /sys "$top/all/sys"
    mkdir -p "$top/all$cache"
    mount --bind "$cache" "$top/all$cache"
    mount --bind /tmp "$top/all/tmp"
    cp "$1/qemu.conf" "$top/all/etc/libvirt/qemu.conf"
    # not exec: guests become children of this process, which is the namespace's first
    chroot "$top/all" libvirtd --config "$1/libvirtd.conf" &
    wait
}

case ${2-} in
    "") [ -d "$root" ] || make_root; echo "$root" ;;
    --print) echo "$root" ;;
    --serve) serve "$3" ;;
    --inside) inside "$3" ;;
    *) echo "roots.sh: unknown option $2" >&2; exit 2 ;;
esac
