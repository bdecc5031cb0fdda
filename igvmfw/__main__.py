"""`python3 -m igvmfw`: the same as the `igvmfw` command."""

import sys

from igvmfw.cli import main

if __name__ == "__main__":
    sys.exit(main())
