#!/bin/bash
# Runs a program on what looks like a SEV host with an IGVM-capable QEMU, and changes nothing here:
# /etc, /usr and /var are as they are, and what is written there is gone afterwards, as are the
# processes that were started. Needs root.
# usage: sandbox.sh EMULATOR PROGRAM [ARGUMENT...]    EMULATOR becomes /usr/bin/qemu-system-x86_64
set -euo pipefail

if [ "${1-}" != --inside ]; then
    exec unshare --mount --pid --fork --kill-child "$0" --inside "$@"
fi
emulator=$2
shift 2
mount --make-rprivate /
mount -t proc proc /proc
top=/run
mount -t tmpfs tmpfs "$top"
for folder in etc usr var; do
    mkdir -p "$top/igvmfw-sandbox/$folder"/{new,work}
    mount -t overlay overlay -o \
        "lowerdir=/$folder,upperdir=$top/igvmfw-sandbox/$folder/new,workdir=$top/igvmfw-sandbox/$folder/work" \
        "/$folder"
done
mount --bind "$emulator" /usr/bin/qemu-system-x86_64
# not exec: the namespace's first process has to outlive what the program leaves running
"$@"
