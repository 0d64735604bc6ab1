"""What tests/test_distributed.py runs in each of its processes: `python ranks.py CASE`, started as torchrun would."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import autoslim
from autoslim.distributed import GradientAverage, agreed, gathered, joined, share_of, world
from autoslim.losses import plain_backward
from autoslim.recipe import Recipe, SupernetRecipe
from autoslim.train import Training, plain_step, sandwich_step

torch.set_num_threads(1)


def net(dtype: torch.dtype = torch.float64, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8, dtype=dtype)] if norm else []
    body = [nn.Conv2d(1, 8, 3, padding=1), *norms, nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)).to(dtype)


def batches(count: int, size: int = 9, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (size * count,), generator=generator)
    images = torch.randn(size * count, 1, 8, 8, generator=generator, dtype=dtype) + labels.view(-1, 1, 1, 1)
    return list(zip(images.split(size), labels.split(size), strict=True))


def supernet(dtype: torch.dtype = torch.float64, norm: bool = False) -> autoslim.Supernet:
    space = autoslim.trace(net(torch.float32, norm), torch.zeros(1, 1, 8, 8)).with_choices(4, 2, 0.25)
    return autoslim.Supernet(net(dtype, norm), space)


def searched() -> autoslim.Supernet:
    """A supernet with six groups, trained a little, so that candidates differ."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((1, 8), (8, 12), (12, 12), (12, 16), (16, 8), (8, 12)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))
    shared = autoslim.Supernet(model, autoslim.trace(model, torch.zeros(1, 1, 8, 8)).with_choices(4, 2, 0.25))
    list(autoslim.train_supernet(shared, batches(6, 30, torch.float32), SupernetRecipe(epochs=2, lr=0.05)))
    return shared


def gradients(here: object) -> dict[str, object]:
    """Sandwich gradients of unequal shares of a batch (5 and 4 images), and how often was reduced."""
    model = supernet()
    ((images, targets),) = batches(1)
    images, targets = share_of((images, targets), world())
    mean = GradientAverage(model.parameters())
    found: dict[str, object] = {"reduced": []}
    for _ in range(3):  # DistributedDataParallel arranges its buckets anew after the first
        model.zero_grad()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            losses = autoslim.sandwich_backward(
                model, images, targets, loss=nn.functional.cross_entropy, rng=random.Random(3)
            )
            means = mean.average(len(images), list(losses.values()))
        found["reduced"].append(sum(event.name == "gloo:all_reduce" for event in profile.events()))
    return found | {
        "gradients": {name: p.grad.tolist() for name, p in model.named_parameters()},
        "losses": dict(zip(losses, means, strict=True)),
    }


LOSS = {"loss": nn.functional.cross_entropy}
RATIOS = [1.0, 0.5, 0.25]


def switchable() -> autoslim.SwitchableNet:
    model = net(norm=True)
    space = autoslim.trace(net(torch.float32, norm=True), torch.zeros(1, 1, 8, 8))
    return autoslim.SwitchableNet(model, space, RATIOS).eval()  # no statistics of a share


def wrapped(here: object) -> dict[str, object]:
    """Gradients of two batches that add up, of nets that the user has put into DistributedDataParallel."""
    first, second = (share_of(batch, world()) for batch in batches(2, 8))
    found: dict[str, object] = {}
    for name, own, options in (
        ("supernet", supernet(), {}),
        ("switches", switchable(), {"find_unused_parameters": True}),
    ):
        model = nn.parallel.DistributedDataParallel(own, **options)

        def backward(images: Tensor, targets: Tensor, model: Any = model, own: nn.Module = own) -> None:
            if isinstance(own, autoslim.Supernet):
                autoslim.sandwich_backward(model, images, targets, rng=random.Random(3), **LOSS)
            else:
                autoslim.switch_backward(model, images, targets, distill=True, **LOSS)

        for _ in range(3):  # it arranges its buckets anew after the first
            model.zero_grad()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                with model.no_sync():
                    backward(*first)
                backward(*second)
        gradients = {name: p.grad.tolist() for name, p in own.named_parameters() if p.grad is not None}
        reduced = sum(event.name == "gloo:all_reduce" for event in profile.events())
        found[name] = {"gradients": gradients, "reduced": reduced}
    return found


def training(here: object) -> dict[str, object]:
    """Plain training on shares, with accumulation; then a step of a supernet, for the widths that ranks draw."""
    model, recipe = net(), Recipe(epochs=2, lr=0.05, accumulate=2, clip_norm=1.0)
    data = [share_of(batch, world()) for batch in batches(5)]
    run = Training(model, recipe, len(data), seed=3)
    logs = [run.run_epoch(data, plain_step(model, recipe)) for _ in range(2)]
    drawn: list[list[int]] = []
    shared, of_net = supernet(norm=True), SupernetRecipe(epochs=1, lr=0.01)
    real = shared.space.sample

    def step(inputs: Tensor, targets: Tensor, rng: random.Random, backward: object = plain_backward) -> dict:
        state = rng.getstate()
        drawn.append(list(real(rng).values()))
        rng.setstate(state)
        return sandwich_step(shared, of_net)(inputs, targets, rng, backward)

    Training(shared, of_net, len(data)).run_epoch(data, step)
    return {
        "weights": {name: p.tolist() for name, p in model.named_parameters()},
        "losses": [log.losses["loss"] for log in logs if log],
        "drawn": gathered(drawn),
        "statistics": gathered([b.tolist() for b in shared.buffers()]),
        "shared": gathered([p.tolist() for p in shared.parameters()]),
    }


def nan_on_one_rank(here: object) -> dict[str, object]:
    model, recipe = net(), Recipe(epochs=1, lr=0.05, on_nan="skip")
    data = [share_of(batch, world()) for batch in batches(4)]
    if world().rank == 1:
        data[2] = (data[2][0] * float("nan"), data[2][1])
    run = Training(model, recipe, len(data))
    asked = run.run_epoch(data, plain_step(model, recipe), stop=lambda: world().rank == 1 and run.steps == 2)
    assert asked is None  # on both
    log = run.run_epoch(data, plain_step(model, recipe))
    assert log is not None
    return {"skipped": gathered(log.skipped), "weights": gathered([p.tolist() for p in model.parameters()])}


def search(here: object) -> dict[str, object]:
    """Paths of all judges, over seven batches, which two ranks cannot share evenly."""
    found = {}
    shared = MADE
    assert shared is not None
    held_out = batches(7, 30, torch.float32)
    for name, kind in (
        ("exhaustive", autoslim.Judge),
        ("reuse", autoslim.ReuseJudge),
        ("racing", autoslim.RacingJudge),
    ):
        for rule in ("score", "score-per-cost"):
            judge = kind(shared, held_out, also="accuracy", world=world())
            cost = autoslim.MacCost(shared.space)
            path = []
            for step in autoslim.greedy_slim(shared.space, judge, cost, ["30%"], rule=rule):
                path.append([step.group, step.cost, step.score, *judge.also_of(step.widths)])
            found[f"{name} {rule}"] = path
    return {"paths": found, "all": gathered(found)}


def agreeing(here: object) -> dict[str, object]:
    """What rank 0 computes is what all get; a mistake that rank 0 meets ends every rank."""
    return {"got": gathered(agreed(lambda: os.environ["RANK"]))}


CASES = {f.__name__: f for f in (gradients, training, nan_on_one_rank, search, agreeing, wrapped)}

if __name__ == "__main__":
    MADE = searched() if sys.argv[1] == "search" else None  # by each alone: in the group they would train together
    with joined("cpu") as here:
        result = CASES[sys.argv[1]](here)
        if here.is_main:
            Path(sys.argv[2]).write_text(json.dumps(result))
