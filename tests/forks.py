"""A process that has imported everything and forks a real one for each run: `import torch` takes longer than a kill.

Reads lines of JSON: `arguments` of the command line, and `output`, a file for what it says. With `signal` it is killed
after `delay` seconds, or `more` seconds after it was seen to get further with the run in `root`, whichever comes first.
Answers each with the exit status (negative: the signal that ended it) and the seconds it took.
"""

import json
import os
import sys
import time
from pathlib import Path

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


def done(root: Path) -> int:
    """How far a run has come: epochs, greedy steps, exchanges, nets and figures."""
    logs = [root / "train.jsonl", root / "slim.jsonl", *root.glob("subnets/*/exchange.jsonl")]
    lines = sum(path.read_bytes().count(b"\n") for path in logs if path.exists())
    return lines + sum(1 for name in ("model.safetensors", "metrics.json") for _ in root.rglob(name))


def serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.monotonic()
        pid = os.fork()
        if not pid:
            child(asked["arguments"], asked["output"])
        ended = 0
        if asked["signal"] is not None:
            root, end = Path(asked["root"]), started + asked["delay"]
            before = done(root)
            while not ended and time.monotonic() < end:
                time.sleep(0.005)
                if before >= 0 and done(root) > before:
                    end, before = min(end, time.monotonic() + asked["more"]), -1
                ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                os.kill(pid, asked["signal"])  # not waited for yet: it is no other process
        if not ended:
            _, status = os.waitpid(pid, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - started]), flush=True)


if __name__ == "__main__":
    serve()
