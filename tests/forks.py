"""A process that has imported everything and forks a real one for each run: `import torch` takes longer than a kill.

It reads lines of JSON: `arguments` of the command line, and `output`, a file for what it says. With `signal` this is
killed after `delay` seconds, or `more` seconds after it was seen to get further in its directory `root`, whichever
comes first. `beside` is a second process, of the same two keys, that is started at the same time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def done(root: Path) -> int:
    """How far a run has come: epochs, greedy steps, exchanges, nets and figures."""
    logs = [root / "train.jsonl", root / "slim.jsonl", *root.glob("subnets/*/exchange.jsonl")]
    lines = sum(path.read_bytes().count(b"\n") for path in logs if path.exists())
    return lines + sum(1 for name in ("model.safetensors", "metrics.json") for _ in root.rglob(name))


class Forks:
    """Processes of the command line, one after the other."""

    def __init__(self, process: subprocess.Popen[str], output: Path) -> None:
        self.process, self.output = process, output

    def run(self, *arguments: object, **killed: Any) -> tuple[Any, ...]:
        """Exit status (negative: the signal that ended it) and seconds; the exit statuses of it and of `beside`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"arguments": [*map(str, arguments)], "output": str(self.output), "signal": None, **killed}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))


@contextmanager
def forks(output: Path) -> Iterator[Forks]:
    import autoslim

    environment = os.environ | {"PYTHONPATH": str(Path(autoslim.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        yield Forks(process, output)
        assert process.stdin is not None
        process.stdin.close()  # it ends


# --- in that process ----------------------------------------------------------------------------------------------


def forked(asked: dict[str, Any]) -> int:
    """The pid of a child that works on a command line. Nothing of torch ran before: there are no threads to lose."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        from autoslim.cli import main

        code = main(asked["arguments"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(pid: int, asked: dict[str, Any], started: float) -> int:
    """The exit status of a child, killed when it is time to."""
    if asked["signal"] is not None:
        root, end = Path(asked["root"]), started + asked["delay"]
        before = done(root)
        while time.monotonic() < end:
            time.sleep(0.005)
            if before >= 0 and done(root) > before:
                end, before = min(end, time.monotonic() + asked["more"]), -1
            over, status = os.waitpid(pid, os.WNOHANG)
            if over:
                return os.waitstatus_to_exitcode(status)
        os.kill(pid, asked["signal"])  # not waited for yet: it is no other process
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def serve() -> None:
    import autoslim.pipeline  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        started = time.monotonic()
        others = [forked(asked["beside"])] if "beside" in asked else []
        status = ended(forked(asked), asked, started)
        seconds = time.monotonic() - started
        beside = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in others]
        print(json.dumps([status, seconds, *([status, *beside] if others else [])]), flush=True)


if __name__ == "__main__":
    serve()
