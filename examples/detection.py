"""Detection: torchvision's SSDlite on small made-up images; the losses come out of the model's own dictionary.

    python examples/detection.py                             # a few minutes on one core
    python examples/detection.py --images 8 --size 96 --epochs 1 --budget 95% --bins 2

A detector of torchvision is called with its targets and gives a dictionary of losses while it trains, and boxes
afterwards. `Detector` gives the losses whenever there are targets, so that the search can judge nets by them.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.ops import box_iou

import autoslim

CLASSES = 3  # background, square, disc
Target = dict[str, Tensor]
Batch = tuple[tuple[list[Tensor], list[Target]], list[Target]]  # (what the model is called with), targets


class Detector(nn.Module):
    """SSDlite for `size` pixels; with targets it gives losses by name, without them boxes, labels and scores."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.ssd = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
        self.ssd.transform.min_size, self.ssd.transform.max_size = (size,), size
        self.ssd.transform.fixed_size = (size, size)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        training = self.ssd.training
        self.ssd.training = targets is not None  # of this module alone: layers below keep their mode
        try:
            return self.ssd(images, targets)
        finally:
            self.ssd.training = training


def picture(size: int, generator: torch.Generator) -> tuple[Tensor, Target]:
    """An image (3, size, size) in [0, 1] with one or two shapes, and their boxes (n, 4) and labels (n,)."""
    image = 0.3 + 0.1 * torch.randn(3, size, size, generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    boxes, labels = [], []
    for _ in range(int(torch.randint(1, 3, (), generator=generator))):
        kind = int(torch.randint(1, CLASSES, (), generator=generator))
        radius = float(size * (0.1 + 0.1 * torch.rand((), generator=generator)))
        cy, cx = (radius + (size - 2 * radius) * torch.rand(2, generator=generator)).tolist()
        dy, dx = (y - cy).abs(), (x - cx).abs()
        inside = torch.maximum(dy, dx) < radius if kind == 1 else dy**2 + dx**2 < radius**2
        colour = 0.5 + 0.5 * torch.rand(3, generator=generator)
        image = torch.where(inside, colour.view(3, 1, 1), image)
        boxes.append([cx - radius, cy - radius, cx + radius, cy + radius])
        labels.append(kind)
    return image.clamp(0, 1), {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}


def batches(count: int, size: int, batch_size: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    pairs = [picture(size, generator) for _ in range(count)]
    parts = [pairs[start : start + batch_size] for start in range(0, count, batch_size)]
    return [(([image for image, _ in part], [t for _, t in part]), [t for _, t in part]) for part in parts]


# --- the functions that make it detection --------------------------------------------------------------------------


def loss(output: dict[str, Tensor], targets: list[Target]) -> Tensor:
    """The model's own losses: the targets were among its inputs."""
    return torch.stack([*output.values()]).sum()


def score(output: dict[str, Tensor], targets: list[Target]) -> Tensor:
    return -loss(output, targets)


def average_precision(detections: list[dict[str, Tensor]], targets: list[Target], overlap: float = 0.5) -> float:
    """A simple mean average precision: boxes in the order of their scores, each true box found once at `overlap`."""
    found = []
    for label in range(1, CLASSES):
        hits: list[tuple[float, bool]] = []
        count = 0
        for detected, target in zip(detections, targets, strict=True):
            mine, true = detected["labels"] == label, target["boxes"][target["labels"] == label]
            count += len(true)
            taken: set[int] = set()
            for box, certainty in zip(detected["boxes"][mine], detected["scores"][mine], strict=True):
                overlaps = box_iou(box[None], true)[0] if len(true) else torch.zeros(1)
                best = int(overlaps.argmax())
                is_hit = float(overlaps[best]) >= overlap and best not in taken
                taken |= {best} if is_hit else set()
                hits.append((float(certainty), is_hit))
        right, area = 0, 0.0
        for seen, (_, is_hit) in enumerate(sorted(hits, reverse=True), start=1):
            right += is_hit
            area += is_hit * right / seen
        found.append(area / max(1, count))
    return sum(found) / len(found)


@torch.no_grad()
def precision_of(model: nn.Module, data: list[Batch]) -> float:
    model.eval()
    detections = [boxes for (images, _), _ in data for boxes in model(images)]
    return average_precision(detections, [target for _, targets in data for target in targets])


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="training images; a quarter of that is held out")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--epochs", type=int, default=10, help="of the supernet, and of the net found")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--bins", type=int, default=4, help="widths of a layer that are looked at")
    parser.add_argument("--budget", default="60%")
    parser.add_argument("--out", type=Path, default=Path("runs/detection"))
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    train = batches(options.images, options.size, options.batch_size, seed=1)
    held_out = batches(max(4, options.images // 4), options.size, options.batch_size, seed=2)
    test = batches(max(4, options.images // 4), options.size, options.batch_size, seed=3)

    model = Detector(options.size)
    space = autoslim.trace(model, ([torch.zeros(3, options.size, options.size)],))  # positional arguments: the images
    space = space.with_choices(bins=options.bins, divisor=8, min_ratio=0.5)
    supernet = autoslim.Supernet(model, space).train()

    optimizer = torch.optim.AdamW(supernet.parameters(), 1e-3)
    rng = random.Random(0)
    for epoch in range(options.epochs):
        for inputs, targets in random.Random(epoch).sample(train, len(train)):
            optimizer.zero_grad()
            # distill=False: the narrow nets learn from the boxes too (a loss between two dictionaries would do as well)
            losses = autoslim.sandwich_backward(supernet, inputs, targets, loss=loss, distill=False, rng=rng)
            optimizer.step()
        print(f"epoch {epoch + 1}: {', '.join(f'{name} {value:.3f}' for name, value in losses.items())}")

    cost = autoslim.MacCost(space)
    judge = autoslim.Judge(supernet, held_out, score)
    *_, last = autoslim.greedy_slim(space, judge, cost, [options.budget])
    found = autoslim.extract(model, space, last.widths)
    autoslim.recalibrate_batchnorm(found, [inputs for inputs, _ in train[:4]])
    results = {
        "share of MACs": cost(last.widths) / cost(space.full()),
        "loss of the full net": -autoslim.evaluate(model, test, score),
        "found": -autoslim.evaluate(found, test, score),
    }
    found.train()
    optimizer = torch.optim.AdamW(found.parameters(), 1e-3)
    for epoch in range(options.epochs):
        for (images, targets), _ in random.Random(epoch).sample(train, len(train)):
            optimizer.zero_grad()
            loss(found(images, targets), targets).backward()
            optimizer.step()
    results["retrained"] = -autoslim.evaluate(found, test, score)
    results["average precision"] = precision_of(found, test)
    autoslim.save_subnet(options.out, found, space, last.widths)
    print(", ".join(f"{name} {value:.3f}" for name, value in results.items()), f"; saved in {options.out}")
    return results


if __name__ == "__main__":
    main()
