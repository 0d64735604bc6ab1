"""What a sandwich step costs beyond the convolutions: time, memory, and whether data would wait.

    python benchmarks/bench_train.py            # MobileNetV2 and ResNet-50 at 64, 128, 224 px, float32 and bf16: hours on two cores
    python benchmarks/bench_train.py --quick    # MobileNetV2 at 64 px, few rounds: a few minutes
    python benchmarks/bench_train.py --precisions fp32 --draws 2 --rounds 3    # where the CPU has no bf16

Time: one process, one batch. A sandwich step (four nets, one optimizer step) against its four nets extracted, each trained
as a plain module (forward, backward, its own optimizer step), in turn, in an order that alternates; the ratio of a round is
taken within it, and medians over rounds. Nets of several draws of widths; each draw warms up first, as compiled kernels are
cached by shape. Memory: the peak of a sandwich step against a plain step of the full net, each in a process of its own
(bench_memory.py), float32. Loader: images per second of `Batches` with flips and resized crops against those of the step.
Writes benchmarks/results/train.json; the last line is one JSON object with the worst ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")  # as the command line does

import torch
import torchvision
from torch import nn

from autoslim import Recipe, Supernet, extract, sandwich_backward, trace
from autoslim.data import Batches, ImageSet
from autoslim.files import write_json
from autoslim.losses import soft_cross_entropy
from autoslim.run import provenance
from autoslim.train import make_optimizer

RESULTS = Path(__file__).parent / "results" / "train.json"
BATCHES = {64: 64, 128: 32, 224: 16}  # images per batch by size: what two cores and 24 GB bear


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def steps(
    supernet: Supernet, images: torch.Tensor, targets: torch.Tensor, draw: int, precision: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A sandwich step, and the training of its four nets as plain modules, at the same widths."""
    space, loss = supernet.space, nn.CrossEntropyLoss()
    rng = random.Random(draw)
    widths = [space.full(), space.smallest(), space.sample(rng), space.sample(rng)]
    optimizer = make_optimizer(supernet, Recipe())
    nets = [extract(supernet.model, space, each).train() for each in widths]
    optimizers = [make_optimizer(net, Recipe()) for net in nets]
    autocast = {"device_type": "cpu", "dtype": torch.bfloat16, "enabled": precision == "bf16"}

    def sandwich() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(**autocast):
            sandwich_backward(supernet, images, targets, loss=loss, rng=random.Random(draw))
        optimizer.step()

    def plain() -> None:
        lesson = None
        for net, own in zip(nets, optimizers, strict=True):
            own.zero_grad(set_to_none=True)
            with torch.autocast(**autocast):
                output = net(images)
                value = loss(output, targets) if lesson is None else soft_cross_entropy(output, lesson)
                value.backward()
            lesson = output.detach() if lesson is None else lesson
            own.step()

    return sandwich, plain


def compare(name: str, size: int, precision: str, batch: int, draws: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    supernet = Supernet(model, trace(model, torch.zeros(1, 3, size, size)).with_choices()).train()
    images, targets = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    taken: dict[str, list[float]] = {"sandwich": [], "plain": []}
    for draw in range(draws):
        pair = dict(zip(taken, steps(supernet, images, targets, draw, precision), strict=True))
        for run in pair.values():
            run()
        for number in range(rounds):
            for kind in sorted(pair, reverse=bool(number % 2)):
                taken[kind].append(seconds(pair[kind]))
    ratios = [one / other for one, other in zip(taken["sandwich"], taken["plain"], strict=True)]
    found = {"net": name, "size": size, "precision": precision, "batch": batch, "ratio": statistics.median(ratios)}
    medians = {kind: statistics.median(times) for kind, times in taken.items()}
    print(
        f"{name} {size} px {precision}: sandwich {medians['sandwich']:.3f} s, four plain nets {medians['plain']:.3f} s, "
        f"ratio {found['ratio']:.3f}",
        flush=True,
    )
    return found | {"seconds": taken, "loader": loader(size, batch, medians["sandwich"])}


def loader(size: int, batch: int, step_seconds: float) -> dict[str, float]:
    """Images per second that are loaded and augmented, and that a step takes."""
    data = ImageSet(torch.randint(0, 256, (8 * batch, 3, size, size), dtype=torch.uint8), torch.zeros(8 * batch).long())
    batches = Batches(data, batch, mean=[0.5] * 3, std=[0.2] * 3, augment="resized-crop,flip", shuffle=True)
    list(batches)
    loaded = len(data) / statistics.median(seconds(lambda: list(batches)) for _ in range(3))
    stepped = batch / step_seconds
    print(f"  loader {loaded:.0f} images/s, step {stepped:.0f}: {stepped / loaded:.1%} of a step", flush=True)
    return {"images_per_second": loaded, "step_images_per_second": stepped, "share_of_step": stepped / loaded}


def memory(name: str, size: int, batch: int) -> dict[str, Any]:
    peaks = {}
    for kind in ("plain", "sandwich"):
        command = [sys.executable, str(Path(__file__).with_name("bench_memory.py")), "--measure", name, kind]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        peaks[kind] = float(subprocess.check_output([*command, str(batch), str(size)], text=True, env=environment))
    ratio = peaks["sandwich"] / peaks["plain"]
    print(f"{name} {size} px, batch {batch}: memory ratio {ratio:.3f}", flush=True)
    return {"net": name, "size": size, "batch": batch, "mib": peaks, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--draws", type=int, help="of widths")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        cases, draws, rounds = [("mobilenet_v2", 64, p, 32) for p in options.precisions], 1, 4
        memories = [("mobilenet_v2", 64, 64)]
    else:
        nets = ("mobilenet_v2", "resnet50")
        cases = [(net, size, p, BATCHES[size]) for net in nets for size in BATCHES for p in options.precisions]
        draws, rounds = 3, 5
        memories = [(net, size, batch) for net in nets for size, batch in BATCHES.items()]
    record: dict[str, Any] = {
        **provenance(),
        "quick": options.quick,
        "threads": options.threads,
        "time": [],
        "memory": [],
    }
    for case in cases:
        record["time"].append(compare(*case, options.draws or draws, options.rounds or rounds))
        record["load"] = os.getloadavg()
        write_json(RESULTS, record)
    for each in memories:
        record["memory"].append(memory(*each))
        write_json(RESULTS, record)
    worst = {
        "time_ratio": max(case["ratio"] for case in record["time"]),
        "memory_ratio": max(case["ratio"] for case in record["memory"]),
        "loader_share": max(case["loader"]["share_of_step"] for case in record["time"]),
    }
    print(json.dumps({key: round(value, 4) for key, value in worst.items()} | {"quick": options.quick}))


if __name__ == "__main__":
    main()
