"""libvirt's side: domain XML, connections. Knows no IGVM internals, no descriptors."""
