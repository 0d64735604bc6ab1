"""Semantic segmentation: torchvision's LRASPP on small made-up images, from training to a net of half the MACs.

    python examples/segmentation.py                          # a few minutes on one core
    python examples/segmentation.py --images 16 --size 32 --epochs 1 --budget 90%

The network gives a dictionary, {"out": logits (N, classes, H, W)}: loss, distillation loss and score are four lines.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import autoslim

CLASSES = 4  # background, square, disc, cross


def picture(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An image (3, size, size) with one to three shapes in colours of their own, and its mask (size, size)."""

    def draw(low: float, high: float, count: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = draw(-1, 1, 3).view(3, 1, 1) + 0.2 * torch.randn(3, size, size, generator=generator)
    mask = torch.zeros(size, size, dtype=torch.int64)
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        kind = int(torch.randint(1, CLASSES, (), generator=generator))
        radius, (cy, cx) = draw(size / 8, size / 4), draw(size / 4, 3 * size / 4, 2)
        dy, dx = (y - cy).abs(), (x - cx).abs()
        inside = {
            1: torch.maximum(dy, dx) < radius,
            2: dy**2 + dx**2 < radius**2,
            3: (torch.minimum(dy, dx) < radius / 3) & (torch.maximum(dy, dx) < radius),
        }[kind]
        image = torch.where(inside, draw(-2, 2, 3).view(3, 1, 1), image)
        mask[inside] = kind
    return image, mask


def batches(count: int, size: int, batch_size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images, masks = (torch.stack(part) for part in zip(*(picture(size, generator) for _ in range(count)), strict=True))
    return list(zip(images.split(batch_size), masks.split(batch_size), strict=True))


# --- the three functions that make it segmentation -----------------------------------------------------------------


def loss(output: dict[str, Tensor], masks: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output["out"], masks)


def distill(output: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    return autoslim.soft_cross_entropy(output["out"], teacher["out"])  # pixel by pixel, over the classes


def score(output: dict[str, Tensor], masks: Tensor) -> Tensor:
    """Minus the loss of each image (N,): a score per sample, as racing wants it."""
    return -nn.functional.cross_entropy(output["out"], masks, reduction="none").mean((1, 2))


def mean_iou(output: dict[str, Tensor], masks: Tensor) -> Tensor:
    """Intersection over union of each class, averaged over those that are there."""
    found = output["out"].argmax(1)
    shares = [
        ((found == c) & (masks == c)).sum() / ((found == c) | (masks == c)).sum()
        for c in range(CLASSES)
        if bool(((found == c) | (masks == c)).any())
    ]
    return torch.stack(shares).mean()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="training images; a quarter of that is held out")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--epochs", type=int, default=8, help="of the supernet, and of the net found")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bins", type=int, default=4, help="widths of a layer that are looked at")
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--out", type=Path, default=Path("runs/segmentation"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    train = batches(options.images, options.size, options.batch_size, seed=1)
    held_out = batches(max(4, options.images // 4), options.size, options.batch_size, seed=2)
    test = batches(max(4, options.images // 4), options.size, options.batch_size, seed=3)

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    space = autoslim.trace(model, torch.zeros(1, 3, options.size, options.size))
    space = space.with_choices(bins=options.bins, divisor=8, min_ratio=0.25)
    supernet = autoslim.Supernet(model, space).train()

    optimizer = torch.optim.AdamW(supernet.parameters(), 1e-3)
    rng = random.Random(0)
    for epoch in range(options.epochs):
        for images, masks in random.Random(epoch).sample(train, len(train)):
            optimizer.zero_grad()
            losses = autoslim.sandwich_backward(supernet, images, masks, loss=loss, distill=distill, rng=rng)
            optimizer.step()
        print(f"epoch {epoch + 1}: {', '.join(f'{name} {value:.3f}' for name, value in losses.items())}")

    cost = autoslim.MacCost(space)
    judge = autoslim.RacingJudge(supernet, held_out, score, keep_bytes=0)  # small images: keeping results would not pay
    *_, last = autoslim.greedy_slim(space, judge, cost, [options.budget])
    found = autoslim.extract(model, space, last.widths)
    autoslim.recalibrate_batchnorm(found, [images for images, _ in train])
    results = {
        "share of MACs": cost(last.widths) / cost(space.full()),
        "full": autoslim.evaluate(model, test, mean_iou),
        "found": autoslim.evaluate(found, test, mean_iou),
    }
    recipe = autoslim.Recipe(epochs=options.epochs, batch_size=options.batch_size, lr=0.02)
    for _ in autoslim.retrain(found, train, recipe, loss=loss):
        pass
    results["retrained"] = autoslim.evaluate(found, test, mean_iou)
    autoslim.save_subnet(options.out, found, space, last.widths)
    print(", ".join(f"{name} {value:.3f}" for name, value in results.items()), f"(mean IoU); saved in {options.out}")
    return results


if __name__ == "__main__":
    main()
