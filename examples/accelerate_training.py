"""The sandwich step inside Hugging Face Accelerate (`pip install accelerate`).

    python examples/accelerate_training.py                   # half a minute on one core
    accelerate launch examples/accelerate_training.py        # on what `accelerate config` has set up

Accelerate keeps device, precision and the loader; the step is one call with `backward=accelerator.backward`. With
several processes `prepare` gives DistributedDataParallel, and gradients are averaged once per step, in the last of the
four backward passes of the sandwich.
"""

from __future__ import annotations

import argparse
import random

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autoslim


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for incoming, outgoing in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(incoming, outgoing, 3, 2, 1, bias=False), nn.BatchNorm2d(outgoing), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))


def bars(count: int, seed: int) -> TensorDataset:
    """Images (N, 1, 16, 16) with a bar at one of four angles."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(16) - 7.5, torch.arange(16) - 7.5, indexing="ij")
    angle, shift = (labels * torch.pi / 4).view(-1, 1, 1), 8 * torch.rand(count, 1, 1, generator=generator) - 4
    bar = ((rows * angle.cos() + columns * angle.sin() - shift).abs() < 1.5).float()
    return TensorDataset(bar[:, None] + 0.5 * torch.randn(count, 1, 16, 16, generator=generator), labels)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000, help="training images; a quarter of that is held out")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    options = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=options.cpu)
    set_seed(0)  # the same weights on every process
    model = network()
    space = autoslim.trace(model, torch.zeros(1, 1, 16, 16)).with_choices(bins=8, divisor=4, min_ratio=0.25)
    supernet = autoslim.Supernet(model, space).train()
    optimizer = torch.optim.AdamW(supernet.parameters(), 3e-3)
    prepared, optimizer, loader = accelerator.prepare(
        supernet, optimizer, DataLoader(bars(options.images, 1), 50, shuffle=True)
    )

    rng = random.Random(accelerator.process_index)  # each process its own random widths
    for epoch in range(options.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            with accelerator.autocast():
                losses = autoslim.sandwich_backward(
                    prepared,
                    images,
                    labels,
                    loss=nn.functional.cross_entropy,
                    rng=rng,
                    backward=accelerator.backward,
                )
            optimizer.step()
        accelerator.print(f"epoch {epoch + 1}: {', '.join(f'{key} {value:.3f}' for key, value in losses.items())}")

    cost = autoslim.MacCost(space)
    held_out = [tuple(part.to(accelerator.device) for part in b) for b in DataLoader(bars(options.images // 4, 2), 250)]
    *_, last = autoslim.greedy_slim(space, autoslim.RacingJudge(supernet, held_out), cost, [options.budget])
    found = autoslim.extract(model, space, last.widths)
    autoslim.recalibrate_batchnorm(found, held_out)
    results = {
        "share of MACs": cost(last.widths) / cost(space.full()),
        "full": autoslim.evaluate(model, held_out),
        "found": autoslim.evaluate(found, held_out),
    }
    accelerator.print(", ".join(f"{name} {value:.3f}" for name, value in results.items()))
    return results


if __name__ == "__main__":
    main()
