"""What the runs of configs/imagenet would cost: an estimate from MACs, none of it was run.

    python benchmarks/paper/imagenet_cost.py     # writes its table into docs/paper.md and docs/scaling.md

Training takes three forward passes' worth of MACs per image, a step of the supernet those of its four nets, a candidate
of the search one forward pass over the images of the search. How many candidates there are depends on what is found; here the
steps of a search that knows nothing are counted. MACs per second are those of published trainings on one A100 80GB in mixed precision, as
NVIDIA's DeepLearningExamples list them (PyTorch 21.03): ResNet-50 v1.5 2470 images/s (938 in TF32), EfficientNet-B0, for the
mobile nets, of which that repository has none, 2489 images/s (1078 in TF32). That ours reach them is an assumption.
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import ROOT, publish, table

from autoslim import Config, MacCost, greedy_slim, load_config, trace
from autoslim.models import build_model

IMAGES = 1_281_167 - 50_000
# images/s in training, and MACs of that net: NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets, README of each
RESNET50 = 3 * 2470 * 4.09e9
EFFICIENTNET_B0 = 3 * 2489 * 0.386e9
THROUGHPUT = {  # MACs/s of one GPU
    "mobilenet_v1": EFFICIENTNET_B0,
    "mobilenet_v2": EFFICIENTNET_B0,
    "mnasnet": EFFICIENTNET_B0,
    "resnet50": RESNET50,
}
SIDE = 224


def hours(config: Config) -> dict[str, float]:
    """GPU-hours of the stages of a run."""
    model = build_model(config.model, config.model_args)
    with torch.device("meta"):
        example = torch.zeros(1, 3, SIDE, SIDE)
    space = trace(model, example, **config.space.wishes()).with_choices(
        config.space.bins, config.space.divisor, config.space.min_ratio
    )
    cost, rng = MacCost(space), random.Random(0)
    step = cost(space.full()) + cost(space.smallest()) + 2 * mean(cost(space.sample(rng)) for _ in range(500))
    tried: list[float] = []

    def judge(widths: Any) -> float:
        tried.append(cost(widths))
        return rng.random()

    found = list(greedy_slim(space, judge, cost, config.slim.budgets))
    limits = [next(step.cost for step in found if step.cost <= _limit(text)) for text in config.slim.budgets]
    macs = {
        "supernet": 3 * step * IMAGES * config.train.epochs,
        "search": sum(tried) * (config.slim.images or 50_000),
        "retraining": 3 * sum(limits) * IMAGES * config.retrain.epochs,
    }
    throughput = THROUGHPUT[config.model.partition(":")[2]]
    return {stage: amount / throughput / 3600 for stage, amount in macs.items()} | {"candidates": len(tried)}


def _limit(text: str) -> float:
    return float(text[:-1]) * {"M": 1e6, "G": 1e9}[text[-1]]


def rows(paths: list[Path]) -> list[list[str]]:
    lines = []
    for path in paths:
        config = load_config(path)
        spent = hours(config)
        stages = [f"{max(1, spent[stage]):,.0f} h" for stage in ("supernet", "search", "retraining")]
        total = sum(spent[stage] for stage in ("supernet", "search", "retraining"))
        throughput = f"{THROUGHPUT[path.stem] / 1e12:.1f} T MACs/s"
        lines.append(
            [
                path.stem,
                throughput,
                stages[0],
                f"{stages[1]} ({spent['candidates']:,.0f} candidates)",
                stages[2],
                f"{total:,.0f} h",
            ]
        )
    return lines


if __name__ == "__main__":
    head = ["configs/imagenet", "one A100, published", "supernet", "search", "retraining, all budgets", "GPU-hours"]
    shown = table(head, rows(sorted((ROOT / "configs" / "imagenet").glob("*.yaml"))))
    for page in ("paper.md", "scaling.md"):
        publish(ROOT / "docs" / page, "cost", shown)
    print(shown)
