"""`python -m autoslim`, and the command `autoslim`, are the command line."""

import gc
import sys


def entry() -> int:
    """`main`, for a process that ends afterwards; returns its exit code.

    At its end Python collects garbage once more, which with torch and a traced network loaded takes seconds of CPU.
    The memory goes back to the system anyway: everything is declared permanent, and there is nothing to look at.
    """
    try:
        from autoslim.cli import main  # takes a moment, in which somebody may press Ctrl-C

        return main()
    except KeyboardInterrupt:
        print("error: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    finally:
        gc.freeze()


if __name__ == "__main__":
    sys.exit(entry())
