"""A run killed a hundred times ends in the same bytes. Takes minutes: `make soak` runs it, `make test` does not.

Real processes are killed at random moments, most by SIGKILL. Where a run is ahead of the kills that are to come, the
next process is killed before it gets further, or just then; where it is behind, some time after it got further. So the
kills are spread over all stages, however fast the machine is.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from forks import done, forks
from test_pipeline import artefacts, config

__all__ = ["config"]  # the fixture
KILLS = int(os.environ.get("AUTOSLIM_KILLS", "100"))
SEED = int(os.environ.get("AUTOSLIM_SEED", "0"))
OPTIONS = [
    *("train.epochs=6", "train.ema=0.9", "retrain.epochs=6", "retrain.optimizer=adamw", "retrain.lr=0.01"),
    *("space.bins=6", "slim.batch_size=30", "slim.exchange=true", "data.augment=crop"),
]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stage(root: Path) -> str:
    """What a process that is started now works on."""
    nets = [*root.glob("subnets/*/metrics.json")]
    if not (root / "supernet/metrics.json").exists():
        return "training"
    if len(nets) < 2:
        return "search"
    known = [json.loads(path.read_text()).get("accuracy", {}) for path in nets]
    return "retraining" if not all("uniform" in each for each in known) else "export"


def everything(root: Path) -> dict[str, Any]:
    """What must be the same to the byte, but for times."""
    found = artefacts(root)
    for pattern in ("race/*", "subnets/*/exchange.jsonl", "space.json", "data.json"):
        found |= {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob(pattern))}
    results = json.loads((root / "results.json").read_text())
    for net in (results["full"], *results["subnets"]):
        net["latency_ms"] = net["latency_spread_ms"] = None
    return found | {"results": results, "files": sorted(str(path.relative_to(root)) for path in root.rglob("*"))}


@pytest.mark.soak
def test_a_hundred_kills_end_in_the_same_result(config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [part for text in OPTIONS for part in ("--set", text)]
    rng, root, output = random.Random(SEED), in_tmp / "killed", in_tmp / "output.txt"

    def tell(text: str) -> None:
        with capsys.disabled():
            print(f"soak: {text}", file=sys.stderr, flush=True)

    with forks(output) as processes:
        status, whole_seconds, *_ = processes.run("run", config, *options, "--run-dir", "whole")
        assert status == 0, output.read_text()
        whole, total = everything(in_tmp / "whole"), done(in_tmp / "whole")
        assert whole["path"].count(b"\n") > 8
        assert len({json.loads(line)["images"] for line in whole["path"].splitlines()}) > 1  # there was a race
        status, start, *_ = processes.run("run", config, *options, "--run-dir", "whole")  # to come to where it was
        assert status == 0, output.read_text()
        unit = (whole_seconds - start) / total
        moves = sum(map(lines, (in_tmp / "whole").glob("subnets/*/exchange.jsonl")))
        tell(f"undisturbed {whole_seconds:.1f} s for {total} steps, {moves} of them exchanges; seed {SEED}")

        hit, ends, signals, began = Counter[str](), Counter[int](), Counter[str](), time.monotonic()
        while (kills := hit.total()) < KILLS:
            where = stage(root)
            if done(root) / total > 0.97 * kills / KILLS:
                delay, more = rng.uniform(0.1 * start, start + 2 * unit), rng.uniform(0, 0.2 * unit)
            else:
                delay, more = 600.0, rng.uniform(0, unit)
            number = signal.SIGTERM if rng.random() < 0.15 else signal.SIGKILL
            status, *_ = processes.run(
                "run", config, *options, "--run-dir", root, root=str(root), delay=delay, more=more, signal=number
            )
            assert status in (0, -number, 128 + number), f"{status} at kill {kills}: {output.read_text()}"
            if status == 0:
                continue
            hit[where] += 1
            ends[status] += 1
            signals[signal.Signals(number).name] += 1
            if hit.total() % 10 == 0:
                tell(f"{hit.total()} kills, {done(root)} of {total} steps, in {stage(root)}; {dict(hit)}")
        status, *_ = processes.run("run", config, *options, "--run-dir", root)
        assert status == 0, output.read_text()
    tell(f"{dict(signals)}, ends {dict(ends)}, in {time.monotonic() - began:.0f} s; while at {dict(hit)}")
    assert all(hit[name] >= KILLS // 20 for name in ("training", "search", "retraining")), hit
    after = everything(root)
    assert after["files"] == whole["files"]
    assert [key for key in whole if after[key] != whole[key]] == []
