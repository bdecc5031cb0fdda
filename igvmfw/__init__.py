"""igvmfw: IGVM firmware for libvirt guests.

Data flows one way: file → image → descriptor → choice → domain → launch.
"""

__version__ = "0.1.0"
