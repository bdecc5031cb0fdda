#!/bin/bash
# Installs the tools that igvmfw's reading and writing of IGVM files is compared with, into the
# cache: igvm-inspect and igvm-wrap of the crate virtfw-igvm-tools.
# usage: peers.sh [--print]     prints the directory with the programs; --print builds nothing
set -euo pipefail
version=0.2.6
prefix=${XDG_CACHE_HOME:-$HOME/.cache}/igvmfw/peers-virtfw-igvm-tools-$version
bin=$prefix/bin
if [ "${1-}" != --print ] && [ ! -x "$bin/igvm-wrap" ]; then
    command -v cargo >/dev/null || {
        echo "peers.sh: no cargo: install Rust 1.74 or newer (Debian: cargo-web rustc-web)" >&2
        exit 4
    }
    mkdir -p "$(dirname "$prefix")"
    work=$(mktemp -d "$prefix.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    echo "peers.sh: building igvm-inspect and igvm-wrap $version (about 1 minute)" >&2
    cargo install --quiet --locked --root "$work" --target-dir "$work/target" \
        "virtfw-igvm-tools@$version" >&2
    rm -rf "$work/target" "$prefix"
    mv "$work" "$prefix"
    trap - EXIT
fi
echo "$bin"
