#!/bin/bash
# Finds a Rust that can build what the test bed builds.
# usage: rust.sh            prints a directory with `cargo` and `rustc`, to put first in PATH
#        rust.sh --minimum  prints the oldest version that will do
set -euo pipefail
minimum=1.83  # of the crates in libigvm/Cargo.lock

if [ "${1-}" = --minimum ]; then
    echo $minimum
    exit
fi

new_enough() { # CARGO
    local version
    version=$("$1" --version 2>/dev/null | cut -d ' ' -f 2) || return 1
    [ "$(printf '%s\n' "$minimum" "$version" | sort -V | head -n 1)" = "$minimum" ]
}

for cargo in $(type -aP cargo) "${CARGO_HOME:-$HOME/.cargo}/bin/cargo"; do
    if new_enough "$cargo"; then
        dirname "$cargo"
        exit
    fi
done
# Ubuntu's packages are named by version: give them their usual names
for cargo in $(compgen -G '/usr/bin/cargo-1.*' | sort -rV); do
    rustc=/usr/bin/rustc-${cargo##*/cargo-}
    if [ -x "$rustc" ] && new_enough "$cargo"; then
        bin=${XDG_CACHE_HOME:-$HOME/.cache}/igvmfw/rust-${cargo##*/cargo-}
        mkdir -p "$bin"
        ln -sf "$cargo" "$bin/cargo"
        ln -sf "$rustc" "$bin/rustc"
        echo "$bin"
        exit
    fi
done
echo "rust.sh: no cargo of version $minimum or newer: packages.sh rust installs one" >&2
exit 4
