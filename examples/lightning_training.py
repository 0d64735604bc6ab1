"""The sandwich step inside Lightning (`pip install lightning`): a module of yours with manual optimization.

    python examples/lightning_training.py                    # half a minute on one core
    python examples/lightning_training.py --images 64 --epochs 1

Lightning keeps loop, device, precision, logging and checkpoints; the step is one call. `backward=self.manual_backward`
lets it scale losses and place gradients as its precision and strategy want it.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import lightning
import torch
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


class SlimmableTraining(lightning.LightningModule):
    """Trains all widths of a network at once."""

    def __init__(self, model: nn.Module, space: autoslim.ChannelSpace) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model  # what is saved and moved; the supernet is a second handle on it
        self._supernet = [autoslim.Supernet(model, space)]  # in a list: not a second copy in checkpoints
        self._rng = random.Random(0)

    def training_step(self, batch: Any, index: int) -> None:
        images, labels = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        losses = autoslim.sandwich_backward(
            self._supernet[0].train(),
            images,
            labels,
            loss=nn.functional.cross_entropy,
            rng=self._rng,
            backward=self.manual_backward,
        )
        optimizer.step()
        self.log_dict(losses, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), 3e-3)


def search(model: nn.Module, space: autoslim.ChannelSpace, held_out: TensorDataset, budget: str) -> dict[str, float]:
    """What comes after training, with what Lightning left in `model`."""
    batches = list(DataLoader(held_out, 250))
    cost = autoslim.MacCost(space)
    judge = autoslim.RacingJudge(autoslim.Supernet(model, space), batches)
    *_, last = autoslim.greedy_slim(space, judge, cost, [budget])
    found = autoslim.extract(model, space, last.widths)
    autoslim.recalibrate_batchnorm(found, batches)
    return {
        "share of MACs": cost(last.widths) / cost(space.full()),
        "full": autoslim.evaluate(model, batches),
        "found": autoslim.evaluate(found, batches),
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000, help="training images; a quarter of that is held out")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--accelerator", default="cpu", help="cpu, gpu, auto: Lightning's own word")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = network()
    space = autoslim.trace(model, torch.zeros(1, 1, 16, 16)).with_choices(bins=8, divisor=4, min_ratio=0.25)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(SlimmableTraining(model, space), DataLoader(bars(options.images, 1), 50, shuffle=True))
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})
    results = search(model.cpu(), space, bars(options.images // 4, 2), options.budget)
    print(", ".join(f"{name} {value:.3f}" for name, value in results.items()))
    return results


if __name__ == "__main__":
    main()
