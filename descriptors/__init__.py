"""Descriptor templates, shipped as the package igvmfw.descriptors (see igvmfw.resources)."""
