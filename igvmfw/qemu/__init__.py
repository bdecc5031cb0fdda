"""QEMU's side: firmware descriptors, their search path, the emulator.

Knows no IGVM internals, no libvirt.
"""
