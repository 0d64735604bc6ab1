"""A process that has imported everything and forks a real one for each run: `import torch` takes longer than a kill.

Reads lines of JSON: `arguments` of the command line, `output` (a file for what it says), and `delay` with `signal`, or
null. Answers each with the exit status (negative: the signal that ended it) and the seconds it took.
"""

import json
import os
import sys
import time

from autoslim import cli, pipeline  # noqa: F401  (nothing of torch runs before a fork: there are no threads to lose)


def child(arguments: list[str], output: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        code = cli.main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.monotonic()
        pid = os.fork()
        if not pid:
            child(asked["arguments"], asked["output"])
        ended = 0
        if asked["delay"] is not None:
            while not ended and time.monotonic() < started + asked["delay"]:
                time.sleep(0.001)
                ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                os.kill(pid, asked["signal"])  # not waited for yet: it is no other process
        if not ended:
            _, status = os.waitpid(pid, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - started]), flush=True)


if __name__ == "__main__":
    serve()
