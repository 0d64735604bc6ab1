"""Latency as tables predict it against real end-to-end measurements in the same session, over random subnets.

    python benchmarks/bench_latency.py             # MobileNetV2, ResNet-50; 1 and 2 threads; torch, onnxruntime
    python benchmarks/bench_latency.py --quick     # MobileNetV2 at 96 px, 1 thread, torch, a few nets: a minute or two
    python benchmarks/bench_latency.py --models resnet50 --runtimes onnxruntime --threads 2     # one session

For each model, runtime and number of threads, a session: a table is measured (a fresh one, on subnets of its own), then
random subnets are measured end to end and predicted. They are measured in rounds over all of them, minutes apart, as a
shared machine is slower in one minute than in another; a round gives the median of its passes, the least of every other
round is the measurement, that of the remaining ones `again`. Two kinds: "around" draws a ratio between 0.25 and 1 for
each net and its widths around it, "independent" draws every width by itself, which gives nets of about equal latency.
Resumes session by session: a session that is complete in benchmarks/results/latency.json stays as it is (unless
`--again`), one that was killed is begun anew, for a prediction is compared with measurements of the same session.
latency.md is written from the complete ones. `again` compares the two measurements with each other, which no prediction
can better. The last line is one JSON object with the worst of all sessions and both kinds.

Eager torch takes memory from malloc anew for every tensor. glibc gives large pieces back to the system and takes them
again, by thresholds that it moves: a net whose tensors lie beyond them takes up to 40 % longer, in one process and not
in the next. So the script starts itself again with thresholds that keep memory; `--plain-malloc` leaves them alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoslim import ChannelSpace, LatencyCost, Widths, extract, measure_latency_table, trace
from autoslim.files import read_json, write_json, write_whole
from autoslim.latency import processor, sample_around, spread
from autoslim.run import provenance
from autoslim.runtimes import ON_CPU, OnnxNets, Prepared
from paper.ranking import spearman

RESULTS = Path(__file__).parent / "results"
KINDS = ("around", "independent")
KEPT = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}  # bytes


def drawn(space: ChannelSpace, kind: str, count: int) -> list[Widths]:
    rng = random.Random(f"bench {kind}")
    if kind == "independent":
        return [space.sample(rng) for _ in range(count)]
    return [sample_around(space, rng, rng.uniform(0.25, 1.0)) for _ in range(count)]


def built(name: str) -> nn.Module:
    """The network with statistics as after training, so that exporting folds them as it would then."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
    return model


def measure(options: argparse.Namespace, name: str, runtime: str, threads: int) -> dict[str, Any]:
    """One session: the table, then two rounds over the nets."""
    model, image = built(name), torch.randn(1, 3, options.size, options.size)
    space = trace(model, image).with_choices()
    nets = {f"{kind} {i}": widths for kind in KINDS for i, widths in enumerate(drawn(space, kind, options.nets))}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:  # never a table of another session
        table = measure_latency_table(
            model, space, image, runtime=runtime, threads=threads, nets=options.profiled, cache=Path(scratch)
        )
    table_seconds = time.perf_counter() - started
    cost = LatencyCost(space, table)
    onnx = OnnxNets(model, space, image) if runtime in ON_CPU else None
    found: dict[str, dict[str, Any]] = {
        key: {"predicted_ms": cost(widths), "widths": list(widths.values())} for key, widths in nets.items()
    }
    rounds: dict[str, list[float]] = {key: [] for key in nets}
    for number in range(options.rounds):
        for key, widths in nets.items():
            net = extract(model, space, widths).eval()
            prepared = Prepared(runtime, net, image, threads, onnx.at(widths, net) if onnx else None)
            samples = prepared.passes(options.repeats, warmup=3, seconds=5.0)
            rounds[key].append(statistics.median(samples))
            found[key] |= {"spread_ms": spread(samples)}
            say(
                f"{name} {runtime} {threads}, round {number + 1}, {key}: {rounds[key][-1]:.2f} ms, "
                f"{found[key]['predicted_ms']:.2f} predicted"
            )
    for key, medians in rounds.items():  # as a table does: of several rounds, the least disturbed
        found[key] |= {"ms": min(medians[::2]), "again_ms": min(medians[1::2]), "rounds_ms": medians}
    return {
        "settings": settings(options),
        "about": dict(table.about),
        "table_seconds": round(table_seconds, 1),
        "session_seconds": round(time.perf_counter() - started, 1),
        "rows": len(table.rows),
        "nets": found,
        "provenance": provenance(),
    }


def settings(options: argparse.Namespace) -> dict[str, int]:
    """What makes sessions comparable."""
    return {key: getattr(options, key) for key in ("nets", "profiled", "repeats", "rounds", "size", "plain_malloc")}


def say(text: str) -> None:
    """Progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def summary(record: dict[str, Any], kind: str) -> dict[str, float]:
    nets = [net for key, net in record["nets"].items() if key.startswith(kind)]
    real, predicted = [net["ms"] for net in nets], [net["predicted_ms"] for net in nets]
    again = [net["again_ms"] for net in nets]
    errors = [abs(p - r) / r for p, r in zip(predicted, real, strict=True)]
    return {
        "nets": len(nets),
        "least": min(real),
        "most": max(real),
        "error": statistics.median(errors),
        "worst": max(errors),
        "spearman": spearman(predicted, real) if len(nets) > 2 else float("nan"),
        "again_error": statistics.median(abs(a - r) / r for a, r in zip(again, real, strict=True)),
        "again_spearman": spearman(again, real) if len(nets) > 2 else float("nan"),
    }


def report(records: dict[str, Any]) -> str:
    about = max((record["provenance"] for record in records.values()), key=lambda each: each["date"])
    lines = [
        "# Predicted and real latency",
        "",
        f"`python benchmarks/bench_latency.py`; {about['date'][:10]}, commit {about['commit']}, {processor()}, "
        f"{about['machine']}. Error: |predicted - measured| / measured, median over the nets and worst. `again`: the same "
        "nets measured once more in the same session, against the first time. Raw records: latency.json.",
        "",
        "| model | runtime | threads | nets | ms | median error | worst | Spearman | again: error | again: Spearman | table |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, record in records.items():
        for kind in KINDS:
            s = summary(record, kind)
            lines.append(
                f"| {' | '.join(key.split())} | {s['nets']:.0f} {kind} | {s['least']:.1f}-{s['most']:.1f} | "
                f"{s['error']:.1%} | {s['worst']:.1%} | {s['spearman']:.3f} | {s['again_error']:.1%} | "
                f"{s['again_spearman']:.3f} | {record['rows']} rows, {record['table_seconds']:.0f} s |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "resnet50"])
    parser.add_argument("--runtimes", nargs="+", default=["torch", "onnxruntime"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--nets", type=int, default=30, help="of each kind")
    parser.add_argument("--profiled", type=int, default=60, help="subnets that a table is measured on")
    parser.add_argument("--repeats", type=int, default=15, help="passes in a round")
    parser.add_argument(
        "--rounds", type=int, default=4, help="over all nets; every other one is the measurement `again`"
    )
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--plain-malloc", action="store_true", help="thresholds of malloc as they are")
    parser.add_argument("--again", action="store_true", help="measure complete sessions again")
    parser.add_argument("--quick", action="store_true", help="one small session, written beside the results")
    parser.add_argument("--out", type=Path, default=RESULTS / "latency.json")
    options = parser.parse_args()
    if not options.plain_malloc and not os.environ.keys() >= KEPT.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT)  # malloc reads them when it starts
    if options.quick:
        options.models, options.runtimes, options.threads = (
            options.models[:1],
            options.runtimes[:1],
            options.threads[:1],
        )
        options.nets, options.profiled, options.repeats, options.rounds, options.size = 6, 12, 10, 2, 96
        options.out = options.out.with_name("latency_quick.json")
    records: dict[str, Any] = read_json(options.out) if options.out.exists() else {}
    for name in options.models:
        for runtime in options.runtimes:
            for threads in options.threads:
                key = f"{name} {runtime} {threads}"
                if not options.again and records.get(key, {}).get("settings") == settings(options):
                    say(f"{key}: measured before")
                    continue
                records[key] = measure(options, name, runtime, threads)
                write_json(options.out, records)
                write_whole(options.out.with_suffix(".md"), report(records))
    print(report(records))
    worst = {kind: [summary(record, kind) for record in records.values()] for kind in KINDS}
    found = {
        kind: {"error": max(s["error"] for s in each), "spearman": min(s["spearman"] for s in each)}
        for kind, each in worst.items()
    }
    # widths drawn independently give nets of about equal latency, whose order is mostly noise: see `again`
    print(json.dumps(found["around"] | {"sessions": len(records), "independent": found["independent"]}))


if __name__ == "__main__":
    main()
