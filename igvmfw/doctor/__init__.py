"""What a host has, lacks and has wrong for launching guests from IGVM files.

`gather` is the edge: it looks at files, processes, emulators and libvirt, and gives `Facts`.
`checks.examine` judges facts, and looks at nothing.
"""
