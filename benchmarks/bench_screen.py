"""How often the best candidate of a greedy step is among the K most promising by one backward pass (`slim.screen`).

    python benchmarks/bench_screen.py --supernet runs/bench_search/mobilenet_v2.safetensors    # of bench_search.py

At random widths of the supernet every candidate of the step is judged on all images and estimated on the first batch:
the rank that the estimate gives the best one, and by how much loss the step is worse that takes the best of the K. Both
rules: the score alone, and the score per MACs saved. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from autoslim import Judge, MacCost, Supernet, trace, zoo
from autoslim.data import Batches, load_data
from autoslim.export import load_tensors
from autoslim.screening import estimates
from autoslim.train import load_unshared

DATA = Path("~/.cache/autoslim-data/fashion-mnist.npz").expanduser()
NETS: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v2": lambda **options: zoo.mobilenet_v2(0.5, num_classes=10, **options),
    "resnet50": lambda **options: zoo.resnet50(0.25, num_classes=10, **options),
}
COUNTS = (1, 3, 6, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--supernet", type=Path, required=True)
    parser.add_argument("--bins", type=int, default=4, help="of the supernet")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_data(str(options.data), image_size=32, holdout=10_000)
    model = NETS[options.supernet.stem](in_channels=data.image_shape[0])
    example = torch.zeros(1, *data.image_shape)
    space = trace(model, example).with_choices(bins=options.bins, divisor=4, min_ratio=1 / 4)
    load_unshared(model, load_tensors(options.supernet)[0])
    images = list(Batches(data.holdout.subset(range(options.images)), options.batch_size, mean=data.mean, std=data.std))
    judge, cost, rng = Judge(Supernet(model, space), images), MacCost(space), random.Random(0)
    ranks: dict[str, list[int]] = {"score": [], "score-per-cost": []}
    lost: dict[str, dict[int, list[float]]] = {rule: {count: [] for count in COUNTS} for rule in ranks}
    for number in range(options.steps):
        widths = space.full() if number == 0 else space.sample(rng)
        candidates = {g: c for g in space.groups if (c := space.narrowed(widths, g)) is not None}
        started = time.process_time()
        guessed = estimates(judge.supernet, widths, candidates, images[0], judge.score)
        estimated = time.process_time() - started
        now = judge(widths)
        real = {group: judge(candidate) - now for group, candidate in candidates.items()}
        judged = time.process_time() - started - estimated
        for rule in ranks:
            saved = {g: cost(widths) - cost(c) if rule != "score" else 1.0 for g, c in candidates.items()}
            order = sorted(candidates, key=lambda group: -guessed[group] / saved[group])
            best = max(real, key=lambda group: real[group] / saved[group])
            ranks[rule].append(order.index(best) + 1)
            for count in COUNTS:
                taken = max(order[:count], key=lambda group: real[group] / saved[group])
                lost[rule][count].append(real[best] - real[taken])
        print(
            number, len(candidates), {r: v[-1] for r, v in ranks.items()}, f"{estimated:.1f} {judged:.1f} s", flush=True
        )
    found = {
        rule: {f"best among {count}": sum(rank <= count for rank in ranks[rule]) / options.steps for count in COUNTS}
        | {f"loss given away, {count}": round(sum(lost[rule][count]) / options.steps, 5) for count in COUNTS}
        for rule in ranks
    }
    print(json.dumps({"steps": options.steps, "groups": len(space.groups), **found}))


if __name__ == "__main__":
    main()
