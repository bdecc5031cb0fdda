"""The IGVM file format. Knows no QEMU and no libvirt."""
