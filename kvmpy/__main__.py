"""``python -m kvmpy``: the command line."""

import os

from kvmpy.cli.main import main

if __name__ == "__main__":
    # All is closed and written then: the interpreter's own clean-up would be 5 ms for nothing.
    os._exit(main())
