#!/bin/bash
# Builds the program around the reference crate `igvm` (tests/igvm/crate) into the cache.
# usage: reference.sh [--print]     prints the program's path; --print builds nothing
set -euo pipefail
source=$(realpath "$(dirname "$0")/../igvm/crate")
key=$(cat "$source/Cargo.toml" "$source/Cargo.lock" "$source"/src/*.rs | sha256sum | cut -c1-16)
program=${XDG_CACHE_HOME:-$HOME/.cache}/igvmfw/reference-$key/igvm-peer
if [ "${1-}" != --print ] && [ ! -x "$program" ]; then
    command -v cargo >/dev/null || {
        echo "reference.sh: no cargo: install Rust 1.81 or newer (Debian: cargo-web rustc-web)" >&2
        exit 4
    }
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    echo "reference.sh: building the reference crate's program (about 1 minute)" >&2
    cargo build --quiet --release --locked --manifest-path "$source/Cargo.toml" \
        --target-dir "$work" >&2
    mkdir -p "$(dirname "$program")"
    install "$work/release/igvm-peer" "$program.new"
    mv "$program.new" "$program"
fi
echo "$program"
