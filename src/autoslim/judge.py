"""How good a subnet is: evaluation of plain modules, and the judge of the greedy search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.calibrate import batch_statistics
from autoslim.errors import ConfigError, DataError, nearest
from autoslim.slicing import run_subnet
from autoslim.space import Widths
from autoslim.supernet import Supernet
from autoslim.tracing import split_input

Score = Callable[[Any, Any], Tensor]


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose highest logit (N, C) is the target (N,)."""
    return (output.argmax(1) == targets).double().mean()


def negative_loss(output: Tensor, targets: Tensor) -> Tensor:
    """Minus the mean cross-entropy of logits (N, C): higher is better."""
    return -nn.functional.cross_entropy(output.float(), targets)


SCORES: dict[str, Score] = {"accuracy": accuracy, "loss": negative_loss}


class Judge:
    """Scores widths on fixed held-out batches, with the BatchNorm statistics of each batch (AutoSlim, section 3.3).

    `batches`: (inputs, targets) pairs, kept in memory; large and shuffled, for their statistics stand for the whole
    data. `score(output, targets)`, higher is better, is averaged over them by size; or a name: "accuracy", "loss". The
    model's buffers and modes are left as they were. Use it as the `judge` of `greedy_slim`.
    """

    def __init__(self, supernet: Supernet, batches: Iterable[tuple[Any, Any]], score: str | Score = "loss") -> None:
        if isinstance(score, str):
            if score not in SCORES:
                raise ConfigError(f"no score {score!r}; {nearest(score, SCORES)}")
            score = SCORES[score]
        self.supernet, self.score = supernet, score
        self.batches: Sequence[tuple[Any, Any]] = list(batches)
        if not self.batches:
            raise DataError("the search needs held-out images, and there is none")

    def __call__(self, widths: Widths) -> float:
        """Mean score of the net of these widths."""
        model, space = self.supernet.model, self.supernet.space
        total, count = 0.0, 0
        with torch.no_grad(), batch_statistics(model):
            for inputs, targets in self.batches:
                size = len(targets)
                args, kwargs = split_input(inputs)
                total += float(self.score(run_subnet(model, space, widths, args, kwargs), targets)) * size
                count += size
        return total / count


def evaluate(model: nn.Module, batches: Iterable[tuple[Any, Any]], score: Score = accuracy) -> float:
    """Mean of `score(output, targets)` over batches, by size, in evaluation mode; the mode is restored."""
    modes = {module: module.training for module in model.modules()}
    total, count = 0.0, 0
    try:
        model.eval()
        with torch.no_grad():
            for inputs, targets in batches:
                args, kwargs = split_input(inputs)
                total += float(score(model(*args, **kwargs), targets)) * len(targets)
                count += len(targets)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise DataError("there are no images to evaluate on")
    return total / count
