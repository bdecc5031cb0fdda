#!/bin/bash
# Provides a QEMU (x86-64 system emulator) that takes IGVM files.
#
# The one that IGVMFW_QEMU names, else the distribution's own where it has IGVM (Fedora, openSUSE),
# else one built from public packages into the cache: libigvm out of the crate igvm, QEMU out of the
# source package of Debian or Ubuntu. Building asks nothing and takes about 5 minutes on 2 cores.
#
# usage: build-qemu.sh [RELEASE] [--print]
#     makes sure that it is there, and prints its path; with --print only prints it, built or not.
#     RELEASE asks for one of the releases below and nothing else: it is built even where another
#     QEMU takes IGVM files. Without it: what IGVMFW_QEMU or the distribution has, else the first.
#        build-qemu.sh --releases    names them
# environment: IGVMFW_QEMU   an emulator to use; nothing is built
#              QEMU_SOURCE   URL or file with QEMU's source, where the archive has it no more
set -Eeuo pipefail

# Each with what igvmfw has to know of it: 10.2 without, 11.0 with MADT and reset from the file.
releases="10.2 11.0"
declare -A versions=([10.2]=10.2.2 [11.0]=11.0.1) checksums=(
    [10.2]=be05230fe47a6937cd29f28f562932c8125f9c93c2a82c625198f7a4aa601dfb
    [11.0]=75a0f910bc45ef532ab3c705a6995bb96d70bca1826c2f61da6e13a3719a089f
)
meson="meson==1.9.1 tomli==2.2.1 pycotap==1.3.1 setuptools==75.8.0 distlib==0.3.9"
# where to look for another version once the archives have no $tarball any more, as Ubuntu's
debian_suite=sid
ubuntu_suite=resolute

here=$(dirname "$(realpath "$0")")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/igvmfw

takes_igvm() { # EMULATOR
    "$1" -object igvm-cfg,help 2>/dev/null | grep -q '^ *file='
}

key() {
    # shellcheck disable=SC1091
    { cat "$0" "$here"/libigvm/* /etc/os-release; uname -m; } | sha256sum | cut -c 1-16
}

say() { echo "build-qemu.sh: $*" >&2; }

phase() {
    say "$*"
    echo "==== $*" >>"$log"
}

# ---- QEMU's source ----

# An archive of this machine's apt that has the file. apt's own downloader knows about proxies.
from_mirrors() {
    local mirror
    for mirror in $(apt-get indextargets --format '$(REPO_URI)' | sort -u); do
        /usr/lib/apt/apt-helper -o APT::Sandbox::User=root download-file \
            "${mirror%/}/pool/main/q/qemu/$tarball" "$work/$tarball" "SHA256:$sha256" && return
    done
    return 1
}

# The current source of a suite, with lists of its own: the machine's configuration stays as it is.
from_suite() {
    local id uri suite keyring apt
    # shellcheck disable=SC1091
    id=$(. /etc/os-release && echo "$ID")
    case $id in
        debian) suite=$debian_suite ;;
        ubuntu) suite=$ubuntu_suite ;;
        *) return 1 ;;
    esac
    keyring=/usr/share/keyrings/$id-archive-keyring.gpg
    uri=$(apt-get indextargets --format '$(REPO_URI)' | grep -v security | head -n 1)
    mkdir -p "$work"/apt/{lists,cache/archives}/partial
    echo "deb-src [signed-by=$keyring] $uri $suite main" >"$work/apt/sources.list"
    apt=(apt-get -q -o "Dir::Etc::sourcelist=$work/apt/sources.list" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$work/apt/lists" -o "Dir::Cache=$work/apt/cache"
        -o APT::Sandbox::User= -o Acquire::Languages=none)
    "${apt[@]}" update || return 1
    (cd "$work" && "${apt[@]}" source --download-only --only-source qemu)
}

no_source() {
    cat >&2 <<TEXT
build-qemu.sh: cannot fetch QEMU's source ($tarball): the archives of this machine's apt have it
no more, or are out of reach. Set QEMU_SOURCE to the URL or the file of QEMU $version's release
tarball, or IGVMFW_QEMU to an emulator with IGVM support. Details: $log
TEXT
    exit 4
}

fetch_source() {
    case ${QEMU_SOURCE-} in
        "") from_mirrors || from_suite || return 1 ;;
        *://*)
            /usr/lib/apt/apt-helper -o APT::Sandbox::User=root download-file "$QEMU_SOURCE" \
                "$work/qemu.orig.tar.${QEMU_SOURCE##*.}" ;;
        *) cp "$QEMU_SOURCE" "$work/qemu.orig.tar.${QEMU_SOURCE##*.}" ;;
    esac
    mkdir "$work/qemu"
    tar -C "$work/qemu" --strip-components 1 -xf "$(compgen -G "$work/qemu*.orig.tar.*" | head -n 1)"
}

# ---- building ----

# A static library, two headers that cbindgen writes, and a pkg-config file.
build_libigvm() {
    local crate source
    PATH=$("$here/rust.sh"):$PATH
    cp -r "$here/libigvm" "$work/libigvm"
    mkdir -p "$work/lib" "$work/include/igvm"
    (cd "$work/libigvm" && cargo build --release --locked --target-dir "$work/target")
    for crate in igvm igvm_defs; do
        source=$(cd "$work/libigvm" && cargo metadata --format-version 1 --locked |
            python3 -c 'import json, os, sys
print(*(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"]
        if p["name"] == sys.argv[1]))' "$crate")
        cbindgen -q -c "$work/libigvm/$crate.toml" -o "$work/include/igvm/$crate.h" "$source"
    done
    # prefixes that cbindgen cannot give to the members of these enums
    sed -i -e 's/INVALID = 0/IGVM_INVALID = 0/' -e 's/RESERVED_DO_NOT_USE = /IGVM_&/' \
        -e 's/\b\(RequiredMemoryFlags\|MemoryMapEntryFlags\)\b/Igvm\1/g' \
        "$work/include/igvm/igvm_defs.h"
    sed -i 's/  HEADER_SECTION_/  IGVM_HEADER_SECTION_/' "$work/include/igvm/igvm.h"
    cp "$work/target/release/libigvm_c.a" "$work/lib/"
    cat >"$work/lib/igvm.pc" <<PC
Name: igvm
Description: IGVM file parser, C API
Version: 0.4.0
Cflags: -I$work/include
Libs: -L$work/lib -ligvm_c -lpthread -ldl -lm
PC
}

# ROMs come from the distribution's packages. What only costs time to build is left out: trace
# points, debug information, other programs; -O1 boots a guest as fast as -O2.
configure_qemu() {
    python3 -m venv "$work/venv"
    # shellcheck disable=SC2086
    "$work/venv/bin/pip" -q install $meson
    # the archive's tarball has no firmware images to unpack
    sed -i 's/unpack_edk2_blobs = bzip2.found()/unpack_edk2_blobs = false/' "$work/qemu/meson.build"
    mkdir "$work/build"
    cd "$work/build"
    PKG_CONFIG_PATH=$work/lib PATH=$work/venv/bin:$PATH ../qemu/configure \
        --python="$work/venv/bin/python" --prefix="$prefix" --target-list=x86_64-softmmu \
        --without-default-features --enable-system --enable-tcg --enable-kvm --enable-igvm \
        --enable-slirp --enable-tpm --enable-fdt=system --enable-download \
        --disable-install-blobs --disable-docs --disable-tools --disable-guest-agent \
        --disable-werror --disable-debug-info --enable-trace-backends=nop -Doptimization=1 \
        --firmwarepath=/usr/share/qemu:/usr/share/seabios:/usr/lib/ipxe/qemu
}

# Shows ninja's [n/m]: in place on a terminal, elsewhere every 400th.
show_progress() {
    local line count
    while IFS= read -r line; do
        case $line in \[*/*\]*) ;; *) continue ;; esac
        count=${line#[}
        count=${count%%/*}
        if [ -t 2 ]; then
            printf '\rbuild-qemu.sh: %s\033[K' "${line%%]*}]" >&2
        elif [ $((count % 400)) = 0 ]; then
            say "${line%%]*}]"
        fi
    done
    if [ -t 2 ]; then echo >&2; fi
}

compile_qemu() {
    PATH=$work/venv/bin:$PATH ninja -C "$work/build" qemu-system-x86_64 2>&1 | tee -a "$log" |
        show_progress
}

install_qemu() {
    install -D -s "$work/build/qemu-system-x86_64" "$work/installed/bin/qemu-system-x86_64"
    install -D -m 644 "$work/qemu/docs/interop/firmware.json" \
        "$work/installed/share/igvmfw/firmware.json"
    install -D -m 644 -t "$work/installed/share/igvmfw/descriptors" \
        "$work"/qemu/pc-bios/descriptors/*.json
    takes_igvm "$work/installed/bin/qemu-system-x86_64"
    mv "$work/installed" "$prefix"
}

failed() {
    local status=$?
    if [ "$BASH_SUBSHELL" = 0 ]; then
        say "failed; the end of $log:" 2>&3
        tail -n 25 "$log" >&3
    fi
    exit $status
}

build() {
    mkdir -p "$cache"
    exec 9>"$prefix.lock"
    if ! flock -n 9; then
        say "another run is building it: waiting"
        flock 9
    fi
    [ ! -x "$emulator" ] || return 0
    "$here/packages.sh" build
    log=$prefix.log
    : >"$log"
    rm -rf "$prefix".??????  # what a killed run left
    work=$(mktemp -d "$prefix.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    exec 3>&2 # the steps' own output goes to the log
    trap 'failed' ERR
    say "no QEMU with IGVM support here: building QEMU $version into $prefix, about 5 minutes"
    phase "1/5 fetching QEMU's source"
    fetch_source >>"$log" 2>&1 || no_source
    phase "2/5 building libigvm"
    build_libigvm >>"$log" 2>&1
    phase "3/5 configuring QEMU $(cat "$work/qemu/VERSION")"
    (configure_qemu) >>"$log" 2>&1
    phase "4/5 compiling QEMU"
    compile_qemu
    phase "5/5 installing"
    install_qemu >>"$log" 2>&1
}

release="" print=""
for word in "$@"; do
    case $word in
        --print) print=1 ;;
        --releases) echo "$releases"; exit ;;
        *) release=$word ;;
    esac
done
emulator=""
if [ -z "$release" ]; then
    emulator=${IGVMFW_QEMU-}
    for own in qemu-system-x86_64 /usr/libexec/qemu-kvm; do
        own=$(command -v "$own" || true)
        if [ -z "$emulator" ] && [ -n "$own" ] && takes_igvm "$own"; then emulator=$own; fi
    done
    release=${releases%% *}
fi
version=${versions[$release]-}
if [ -z "$version" ]; then
    say "no release $release; there are: $releases"
    exit 2
fi
sha256=${checksums[$release]}
tarball=qemu_$version+ds.orig.tar.xz
if [ -z "$emulator" ]; then
    prefix=$cache/qemu-$release-$(key)
    emulator=$prefix/bin/qemu-system-x86_64
    if [ -z "$print" ] && [ ! -x "$emulator" ]; then build; fi
elif [ -z "$print" ] && ! takes_igvm "$emulator"; then
    say "$emulator (IGVMFW_QEMU) does not run, or has no IGVM support"
    exit 4
fi
echo "$emulator"
