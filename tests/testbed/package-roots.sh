#!/bin/bash
# Makes, on top of a root of roots.sh, a layer with the tools to build and install packages, in the
# cache, and runs commands in both. Needs root; making one takes about a minute.
#
# usage: package-roots.sh --kinds               names the layers there are
#        package-roots.sh KIND                  prints a layer's path, made where it is missing
#        package-roots.sh KIND --print          prints it, and makes nothing
#        package-roots.sh KIND --run DIR COMMAND...
#                                               runs a command as root in the root, in namespaces of
#                                               its own and without network; what it changes is kept
#                                               in DIR, for the next command with the same DIR, and
#                                               DIR/shared is /shared in there
set -euo pipefail

here=$(dirname "$(realpath "$0")")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/igvmfw
read -ra suites <<<"$("$here/roots.sh" --suites)"
kinds="rpm ${suites[*]/#/deb-}"
if [ "${1-}" = --kinds ]; then
    echo "$kinds"
    exit
fi
kind=${1:?names no layer}
# of the first release with a libvirt that passes over IGVM descriptors, where the name has none
suite=${suites[0]}
case " $kinds " in
    *" $kind "*) ;;
    *) echo "package-roots.sh: no layer named $kind; there are: $kinds" >&2; exit 2 ;;
esac
case $kind in
    rpm) packages="rpm rpmlint file devscripts python3 python3-pip python3-setuptools python3-wheel
        python3-lxml python3-jsonschema python3-rich python3-docutils python3-argcomplete python3-packaging
        man-db" ;;
    deb-*)
        suite=${kind#deb-}
        # what builds and checks the packages, and all that they and their tests depend on: there
        # is no network later on (packaging/debian/control, packaging/debian/tests/control)
        packages="build-essential debhelper dh-python pybuild-plugin-pyproject python3-all
            python3-setuptools python3-pytest python3-hypothesis python3-docutils
            python3-argcomplete python3-lxml python3-jsonschema python3-rich python3-libvirt
            libvirt-clients ovmf qemu-system-x86 lintian autopkgtest apparmor"
        ;;
esac
base=$("$here/roots.sh" "$suite" --print)

mount_root() { # LOWER UPPER WORK ON
    mount --make-rprivate /
    mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" "$4"
    mount -t proc proc "$4/proc"
    mount --rbind /dev "$4/dev"
}

# shellcheck disable=SC2086  # the list is words on purpose
fill_layer() { # DIR
    mkdir "$1"/{new,work,all} &&
        mount_root "$base" "$1/new" "$1/work" "$1/all" &&
        cp /etc/resolv.conf "$1/all/etc/resolv.conf" &&
        chroot "$1/all" sh -ec "export DEBIAN_FRONTEND=noninteractive
            # a frozen mirror's lists may have expired
            apt='apt-get -q -o APT::Sandbox::User=root -o Acquire::Check-Valid-Until=false
                -o Dpkg::Options::=--force-unsafe-io'
            \$apt update
            \$apt install -y --no-install-recommends $(echo $packages)
            apt-get clean
            rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin"
}

# what is in the layer, and how it comes there
key=$({ basename "$base"; echo "$packages"; declare -f fill_layer; } | sha256sum | cut -c 1-16)
layer=$cache/layer-$kind-$key

make_layer() {
    if [ "$(id -u)" != 0 ]; then
        echo "package-roots.sh: left out: only root can make the $kind layer" >&2
        return
    fi
    "$here/roots.sh" "$suite" >/dev/null
    exec 9>"$layer.lock"
    flock 9
    [ ! -d "$layer" ] || return 0
    echo "package-roots.sh: adding $kind's tools to the root with $suite, about a minute" >&2
    rm -rf --one-file-system "$layer".??????  # what a killed run left
    work=$(mktemp -d "$layer.XXXXXX")
    # shellcheck disable=SC2064  # the directory of now
    trap "rm -rf --one-file-system '$work'" EXIT
    if ! unshare --mount --pid --fork --kill-child "$0" "$kind" --fill "$work" \
        >"$layer.log" 2>&1; then
        echo "package-roots.sh: failed; the end of $layer.log:" >&2
        tail -n 20 "$layer.log" >&2
        exit 4
    fi
    mv "$work/new" "$layer"
}

run() { # DIR COMMAND...
    local dir=$1
    shift
    mkdir -p "$dir"/{new,work,all,shared}
    exec unshare --mount --pid --net --ipc --uts --fork --kill-child \
        "$0" "$kind" --inside "$dir" "$@"
}

inside() { # DIR COMMAND...
    local all=$1/all
    mount_root "$layer:$base" "$1/new" "$1/work" "$all"
    mkdir -p "$all/shared"
    mount --bind "$1/shared" "$all/shared"
    shift
    # not exec: this shell is the namespace's first process and reaps what daemons leave behind.
    # libvirt waits for half a minute for each QEMU it asked that nobody reaps
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb \
        chroot "$all" "$@" <&0 &
    wait $!
}

case ${2-} in
    "") [ -d "$layer" ] || make_layer; echo "$layer" ;;
    --print) echo "$layer" ;;
    --fill) fill_layer "$3" ;;
    --run) run "${@:3}" ;;
    --inside) inside "${@:3}" ;;
    *) echo "package-roots.sh: unknown option $2" >&2; exit 2 ;;
esac
