"""JSON Schemas, shipped as the package igvmfw.schemas (see igvmfw.resources)."""
