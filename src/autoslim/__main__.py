"""`python -m autoslim` is the command line."""

import sys

from autoslim.cli import main

if __name__ == "__main__":
    sys.exit(main())
