"""Define a domain that asks for IGVM firmware: python3 define.py URI DOMAIN.xml."""

import sys
from pathlib import Path

import igvmfw

uri, xml = sys.argv[1:]
try:
    domain = igvmfw.Domain.parse(Path(xml).read_bytes())
    with igvmfw.connect(uri) as connection:
        prepared = igvmfw.prepare(domain, connection)
        name = igvmfw.define(connection, prepared.domain)
except igvmfw.IgvmfwError as error:
    sys.exit(str(error))
file = igvmfw.recorded(prepared.domain)
print(f"{name}: {file.path if file else 'asks for no IGVM firmware'}")
for warning in prepared.warnings:
    print(warning, file=sys.stderr)
