"""Regression in a plain PyTorch loop: where is the disc, and how large? A small net of one's own, up to an ONNX file.

    python examples/regression.py                            # one or two minutes of CPU time
    python examples/regression.py --images 64 --epochs 1

Three numbers come out of the network instead of logits, so loss, distillation loss and score are squared errors.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor, nn

import autoslim


class Locator(nn.Module):
    """Three numbers (N, 3) for an image (N, 1, 32, 32): x, y and radius of its disc, as shares of the side."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, 1, 1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, 1, 1),
                nn.BatchNorm2d(channels),
            )
            for _ in range(2)
        )
        self.down = nn.Conv2d(channels, channels, 4, 4)
        self.head = nn.Linear(channels * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(self.down(x).relu().flatten(1))


def batches(count: int, batch_size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    radius = 0.1 + 0.15 * torch.rand(count, generator=generator)
    x, y = 0.25 + 0.5 * torch.rand(2, count, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(32) / 32, torch.arange(32) / 32, indexing="ij")
    inside = (rows - y.view(-1, 1, 1)) ** 2 + (columns - x.view(-1, 1, 1)) ** 2 < radius.view(-1, 1, 1) ** 2
    images = inside[:, None] + 0.3 * torch.randn(count, 1, 32, 32, generator=generator)
    targets = torch.stack([x, y, radius], 1)
    return list(zip(images.split(batch_size), targets.split(batch_size), strict=True))


# --- the functions that make it regression -------------------------------------------------------------------------

loss = nn.functional.mse_loss  # of outputs and targets, and of outputs and those of the teacher


def score(output: Tensor, targets: Tensor) -> Tensor:
    """Minus the squared error of each image (N,)."""
    return -((output - targets) ** 2).mean(1)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1500, help="training images; a quarter of that is held out")
    parser.add_argument("--epochs", type=int, default=6, help="of the supernet, and of the net found")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--out", type=Path, default=Path("runs/regression"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    train = batches(options.images, options.batch_size, seed=1)
    held_out = batches(options.images // 4, options.batch_size, seed=2)
    test = batches(options.images // 4, options.batch_size, seed=3)

    model = Locator()
    example = torch.zeros(1, 1, 32, 32)
    space = autoslim.trace(model, example).with_choices(bins=8, divisor=4, min_ratio=0.25)
    supernet = autoslim.Supernet(model, space).train()
    optimizer = torch.optim.AdamW(supernet.parameters(), 2e-3)
    rng = random.Random(0)
    for epoch in range(options.epochs):
        for images, targets in random.Random(epoch).sample(train, len(train)):
            optimizer.zero_grad()
            losses = autoslim.sandwich_backward(supernet, images, targets, loss=loss, distill=loss, rng=rng)
            optimizer.step()
        print(f"epoch {epoch + 1}: {', '.join(f'{name} {value:.4f}' for name, value in losses.items())}")

    cost = autoslim.MacCost(space)
    judge = autoslim.RacingJudge(supernet, held_out, score)
    *_, last = autoslim.greedy_slim(space, judge, cost, [options.budget])
    found = autoslim.extract(model, space, last.widths)
    autoslim.recalibrate_batchnorm(found, [images for images, _ in train])  # images alone: targets are floats here
    results = {
        "share of MACs": cost(last.widths) / cost(space.full()),
        "full": -autoslim.evaluate(model, test, score),
        "found": -autoslim.evaluate(found, test, score),
    }
    recipe = autoslim.Recipe(epochs=options.epochs, batch_size=options.batch_size, lr=0.02)
    for _ in autoslim.retrain(found, train, recipe, loss=loss, teacher=model.eval(), distill=0.5, imitate=loss):
        pass
    results["retrained"] = -autoslim.evaluate(found, test, score)
    autoslim.save_subnet(options.out, found, space, last.widths)
    autoslim.export_onnx(found, example, options.out / "model.onnx")
    print(", ".join(f"{name} {value:.4f}" for name, value in results.items()), f"(squared error), {options.out}")
    return results


if __name__ == "__main__":
    main()
