"""How right the outputs of a net are: a number for each sample, higher is better. And batches, as users give them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoslim.distributed import samples_of
from autoslim.errors import ConfigError, DataError, nearest

Score = Callable[[Any, Any], Tensor]


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose highest logit (N, C) is the target (N,), or the largest of the shares (N, C) targeted."""
    return is_correct(output, targets).mean()


def is_correct(output: Tensor, targets: Tensor) -> Tensor:
    """For each sample: 1 if its highest logit (N, C) is the target, else 0; targets are as in `accuracy`."""
    targets = _fitting(output, targets)
    if targets.is_floating_point():
        targets = targets.argmax(1)
    return (output.argmax(1) == targets).double()


def negative_loss(output: Tensor, targets: Tensor) -> Tensor:
    """For each sample: minus the cross-entropy of its logits (N, C). Higher is better."""
    return -nn.functional.cross_entropy(output.float(), _fitting(output, targets), reduction="none")


SCORES: dict[str, Score] = {"accuracy": is_correct, "loss": negative_loss}


def find_score(score: str | Score) -> Score:
    """A score by its name, or as it is given; `ConfigError` for anything else."""
    if isinstance(score, str):
        if score not in SCORES:
            raise ConfigError(f"no score {score!r}; {nearest(score, SCORES)}")
        return SCORES[score]
    if not callable(score):
        raise ConfigError(f"score {score!r} cannot be asked; give {' or '.join(map(repr, SCORES))}, or a callable")
    return score


def checked(score: Any, count: int) -> Tensor:
    """A score as it may be; `ConfigError` for anything else."""
    if not isinstance(score, Tensor):
        raise ConfigError(f"a score must be a tensor, a number per sample or their mean; got a {type(score).__name__}")
    if score.ndim and score.shape != (count,):
        raise ConfigError(
            f"a score must be a number per sample, of shape ({count},), or their mean; got shape {tuple(score.shape)}"
            + ("; take the mean over its other dimensions: .flatten(1).mean(1)" if len(score) == count else "")
        )
    return score


def _fitting(output: Any, targets: Any) -> Tensor:
    """Targets of logits (N, C, ...), labels (N, ...) of any integer type as int64; `DataError` if they do not fit.

    Compared as they are, labels (N, 1) would broadcast, and a label beyond the classes would just never be right.
    """
    if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[1] < 2:
        given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise DataError(
            f"'loss' and 'accuracy' need logits (N, C) of at least 2 classes, and the model gives {given}; give a "
            "score of your own: score(output, targets)"
        )
    labels = (output.shape[0], *output.shape[2:])
    wanted = f"labels of shape {labels}, whole numbers, or shares of shape {tuple(output.shape)}"
    if not isinstance(targets, Tensor):
        raise DataError(f"targets must be a tensor, {wanted}; got a {type(targets).__name__}")
    whole = not targets.is_floating_point()
    found: Tensor = targets.long() if whole else targets
    if found.shape == (labels if whole else output.shape):
        wrong = found[((found < 0) | (found >= output.shape[1])) & (found != _IGNORED)] if whole else found[:0]
        if not len(wrong):
            return found
        raise DataError(
            f"there is a label {int(wrong[0])}, and the model tells {output.shape[1]} classes apart, from 0"
        )
    kind = str(targets.dtype).removeprefix("torch.")
    raise DataError(f"targets must be {wanted}; got {kind} of shape {tuple(targets.shape)}")


_IGNORED = -100  # as cross_entropy has it


def count_of(inputs: Any, targets: Any) -> int:
    """How many samples a batch has; its targets may be those of several heads, and its inputs a list of images."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    if isinstance(targets, Tensor) or (isinstance(inputs, list) and len(inputs) == len(targets)):
        return len(targets)
    is_told = any(isinstance(leaf, Tensor) and leaf.ndim for leaf in tree_leaves(inputs))
    return samples_of(inputs) if is_told else len(targets)


def pairs_of(batches: Any) -> Iterator[tuple[Any, Any]]:
    """(inputs, targets) one after the other, but for those of no samples; `DataError` for what is no such batch."""
    if not hasattr(batches, "__iter__"):
        raise DataError(f"batches are a list or loader of pairs (inputs, targets), got a {type(batches).__name__}")
    for number, batch in enumerate(batches):
        inputs, targets = pair_of(batch, number)
        if count_of(inputs, targets):
            yield inputs, targets


def pair_of(batch: Any, number: int) -> tuple[Any, Any]:
    """A batch as (inputs, targets); `DataError` if it is none."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        count = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise DataError(
            f"batches are pairs (inputs, targets), as [(images, labels), ...]; number {number} is a "
            f"{type(batch).__name__}{count}"
        )
    inputs, targets = batch
    if isinstance(inputs, np.ndarray):
        raise DataError(f"the inputs of batch {number} are a NumPy array; give torch.from_numpy of it")
    return inputs, targets
