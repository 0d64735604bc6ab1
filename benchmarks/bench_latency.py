"""Latency as tables predict it against real end-to-end measurements in the same session, over random subnets.

    python benchmarks/bench_latency.py             # MobileNetV2, ResNet-50; 1 and 2 threads; torch, onnxruntime
    python benchmarks/bench_latency.py --models mobilenet_v2 --threads 1 --runtimes torch --nets 10 --profiled 12

For each model, runtime and number of threads: a table is measured (a fresh one, on subnets of its own), then random
subnets are measured end to end, each twice at different times, and predicted. Two kinds: "around" draws a ratio between
0.25 and 1 for each net and its widths around it, "independent" draws every width by itself, which gives nets of
about equal latency. Resumes: a record is written after each net, to benchmarks/results/latency.json, and latency.md is
written from that. `again` compares the two measurements with each other, which no prediction can better.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from autoslim import ChannelSpace, LatencyCost, Widths, extract, measure_latency_table, trace
from autoslim.files import read_json, write_json, write_whole
from autoslim.latency import processor, sample_around, spread
from autoslim.runtimes import OnnxNets, Prepared
from paper.ranking import spearman

RESULTS = Path(__file__).parent / "results"
KINDS = ("around", "independent")


def drawn(space: ChannelSpace, kind: str, count: int) -> list[Widths]:
    rng = random.Random(f"bench {kind}")
    if kind == "independent":
        return [space.sample(rng) for _ in range(count)]
    return [sample_around(space, rng, rng.uniform(0.25, 1.0)) for _ in range(count)]


def built(name: str) -> torch.nn.Module:
    """The network with statistics as after training, so that exporting folds them as it would then."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
    return model


def measure(options: argparse.Namespace, name: str, runtime: str, threads: int, record: dict[str, Any]) -> None:
    """Fill one record: the table, then two rounds over the nets, written after each net."""
    model, image = built(name), torch.randn(1, 3, options.size, options.size)
    space = trace(model, image).with_choices()
    started = time.perf_counter()
    cache = options.out.parent / ".latency"
    table = measure_latency_table(
        model, space, image, runtime=runtime, threads=threads, nets=options.profiled, cache=cache
    )
    record.setdefault("about", dict(table.about))
    record.setdefault("table_seconds", round(time.perf_counter() - started, 1))
    record.setdefault("rows", len(table.rows))
    cost = LatencyCost(space, table)
    onnx: OnnxNets | None = None
    nets = {f"{kind} {i}": widths for kind in KINDS for i, widths in enumerate(drawn(space, kind, options.nets))}
    found = record.setdefault("nets", {})
    for round_ in ("ms", "again_ms"):
        for key, widths in nets.items():
            if round_ in found.get(key, {}):
                continue
            net = extract(model, space, widths).eval()
            if runtime == "onnxruntime" and onnx is None:
                onnx = OnnxNets(model, space, image)
            prepared = Prepared(runtime, net, image, threads, onnx.at(widths, net) if onnx else None)
            samples = prepared.passes(options.repeats, warmup=5, seconds=5.0)
            entry = found.setdefault(key, {"predicted_ms": cost(widths), "widths": list(widths.values())})
            entry |= {round_: statistics.median(samples), f"{round_.removesuffix('ms')}spread_ms": spread(samples)}
            write_json(options.out, options.records)


def summary(record: dict[str, Any], kind: str) -> dict[str, float]:
    nets = [net for key, net in record["nets"].items() if key.startswith(kind) and "ms" in net]
    real, predicted = [net["ms"] for net in nets], [net["predicted_ms"] for net in nets]
    again = [net.get("again_ms", net["ms"]) for net in nets]
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


def report(records: dict[str, Any], command: str) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    lines = [
        "# Predicted and real latency",
        "",
        f"`{command}`; {time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip()}, {processor()}, torch "
        f"{torch.__version__}. Error: |predicted - measured| / measured, median over the nets and worst. `again`: the same "
        "nets measured once more in the same session, against the first time. Raw records: latency.json.",
        "",
        "| model | runtime | threads | nets | ms | median error | worst | Spearman | again: error | again: Spearman | table |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, record in records.items():
        for kind in KINDS:
            if not any(name.startswith(kind) and "ms" in net for name, net in record.get("nets", {}).items()):
                continue
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
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path, default=RESULTS / "latency.json")
    options = parser.parse_args()
    options.records = read_json(options.out) if options.out.exists() else {}
    for name in options.models:
        for runtime in options.runtimes:
            for threads in options.threads:
                record = options.records.setdefault(f"{name} {runtime} {threads}", {})
                measure(options, name, runtime, threads, record)
                write_json(options.out, options.records)
                text = report(options.records, "python benchmarks/bench_latency.py")
                write_whole(options.out.with_suffix(".md"), text)
                print(text)
    worst = [summary(record, "around") for record in options.records.values()]
    print(json.dumps({"error": max(s["error"] for s in worst), "spearman": min(s["spearman"] for s in worst)}))


if __name__ == "__main__":
    main()
