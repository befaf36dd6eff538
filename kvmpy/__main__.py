"""``python -m kvmpy``: the command line."""

import sys

from kvmpy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
