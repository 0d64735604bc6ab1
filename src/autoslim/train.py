"""Training: the loop shared by supernets and plain nets, in epochs that resume exactly."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.errors import RunError, TrainError
from autoslim.losses import Loss, alpha_divergence, soft_cross_entropy
from autoslim.recipe import Recipe, SupernetRecipe
from autoslim.supernet import Supernet, sandwich_backward
from autoslim.switchable import SwitchableNet, switch_backward
from autoslim.tracing import split_input

Step = Callable[[Any, Any, random.Random], Mapping[str, float]]


@dataclass(frozen=True)
class EpochLog:
    """What an epoch came to: mean losses by name, and its wall time."""

    epoch: int  # from 1
    losses: dict[str, float]
    seconds: float


class Training:
    """The optimizer and the progress of one network; `run_epoch` trains it, `state` and `load_state` resume it.

    `step(inputs, targets, rng)` does forward and backward and returns the losses; there is one optimizer step after it.
    All randomness of an epoch derives from (`seed`, epoch), so a resumed run repeats an uninterrupted one exactly.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, steps_per_epoch: int, *, seed: int = 0) -> None:
        if steps_per_epoch < 1:
            raise TrainError(f"no full batch of {recipe.batch_size} images to train on; lower batch_size")
        self.model, self.recipe, self.steps_per_epoch, self.seed = model, recipe, steps_per_epoch, seed
        self.epoch = 0
        self.optimizer = make_optimizer(model, recipe)

    @property
    def is_done(self) -> bool:
        """Have all epochs of the recipe been run?"""
        return self.epoch >= self.recipe.epochs

    def run_epoch(
        self, batches: Iterable[tuple[Any, Any]], step: Step, on_step: Callable[[float], None] | None = None
    ) -> EpochLog:
        """Train for one pass over `batches`. Raises `TrainError`, naming the step, at a loss that is not a number."""
        started, sums, count = time.perf_counter(), dict[str, float](), 0
        set_epoch = getattr(batches, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        rng = random.Random(f"{self.seed}/{self.epoch}")
        device = next(self.model.parameters()).device
        self.model.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(rng.getrandbits(63))
            for inputs, targets in batches:
                rate = self.recipe.learning_rate(self.epoch * self.steps_per_epoch + count, self.steps_per_epoch)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                self.optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.autocast == "bf16"):
                    losses = step(inputs, targets, rng)
                bad = {name: loss for name, loss in losses.items() if not math.isfinite(loss)}
                if bad:
                    name, loss = next(iter(bad.items()))
                    raise TrainError(
                        f"the {name} loss became {loss} at step {count + 1} of epoch {self.epoch + 1} (learning rate "
                        f"{rate:.3g}); lower lr or add warmup_epochs"
                    )
                if self.recipe.clip_value is not None:
                    nn.utils.clip_grad_value_(self.model.parameters(), self.recipe.clip_value)
                self.optimizer.step()
                count += 1
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0.0) + loss
                if on_step is not None:
                    on_step(sum(losses.values()))
        if not count:
            raise TrainError("there was no batch to train on")
        self.epoch += 1
        means = {name: total / count for name, total in sums.items()}
        return EpochLog(self.epoch, means, time.perf_counter() - started)

    def state(self) -> dict[str, Tensor]:
        """Model and optimizer as plain tensors by name."""
        tensors = {f"model.{name}": tensor for name, tensor in unshared(self.model).items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], epoch: int) -> None:
        """Go on after `epoch` finished epochs; `RunError` if the tensors are another net's."""
        load_unshared(self.model, {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        parameters = dict(self.model.named_parameters())
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, slot, name = key.split(".", 2)
                if name not in parameters or parameters[name].shape != tensor.shape:
                    raise RunError(f"the checkpoint belongs to another network: {name!r} does not fit")
                self.optimizer.state[parameters[name]][slot] = tensor.to(parameters[name].device).clone()
        self.epoch = epoch


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD; weight decay on matrices and convolution kernels only: not on depthwise ones, normalisation or biases."""
    depthwise = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and module.weight.shape[1] == 1
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 and id(parameter) not in depthwise else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov and recipe.momentum > 0,
    )


def hard_loss(recipe: Recipe) -> Loss:
    """Cross-entropy; smoothing gives `1 - e` to the true class and `e / (K - 1)` to each other, as the papers' code."""

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        classes = output.shape[1]
        smoothing = recipe.label_smoothing * classes / max(1, classes - 1)  # torch spreads it over all K classes
        return nn.functional.cross_entropy(output, targets, label_smoothing=min(smoothing, 1.0))

    return loss


def sandwich_step(
    supernet: Supernet,
    recipe: SupernetRecipe,
    loss: Loss | None = None,
    ratios: tuple[float, float] | None = None,
    imitate: Loss | None = None,
) -> Step:
    """The step that trains a supernet at independent widths, or, within `ratios`, at one ratio for the whole net."""
    loss = loss or hard_loss(recipe)
    distill = imitate or _distillation(recipe, auto=True)

    def step(inputs: Any, targets: Any, rng: random.Random) -> Mapping[str, float]:
        return sandwich_backward(
            supernet, inputs, targets, loss=loss, rng=rng, num_random=recipe.num_random, distill=distill, ratios=ratios
        )

    return step


def switch_step(net: SwitchableNet, recipe: Recipe, loss: Loss | None = None) -> Step:
    """The step that trains an S-Net."""
    loss = loss or hard_loss(recipe)
    distill = _distillation(recipe, auto=False) if isinstance(recipe, SupernetRecipe) else False

    def step(inputs: Any, targets: Any, rng: random.Random) -> Mapping[str, float]:
        return switch_backward(net, inputs, targets, loss=loss, distill=distill)

    return step


def _distillation(recipe: SupernetRecipe, *, auto: bool) -> bool | Loss:
    return auto if recipe.distill == "auto" else alpha_divergence if recipe.distill == "alpha" else recipe.distill


def plain_step(
    model: nn.Module,
    recipe: Recipe,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    weight: float = 0.0,
    imitate: Loss = soft_cross_entropy,
) -> Step:
    """The step that trains a plain net, with `weight` of its loss from what a teacher gives."""
    loss = loss or hard_loss(recipe)

    def step(inputs: Any, targets: Any, rng: random.Random) -> Mapping[str, float]:
        args, kwargs = split_input(inputs)
        output = model(*args, **kwargs)
        total = loss(output, targets)
        if teacher is not None and weight > 0:
            with torch.no_grad():
                lesson = teacher(*args, **kwargs)
            total = (1 - weight) * total + weight * imitate(output, lesson)
        total.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(total.detach())}

    return step


def train_supernet(
    supernet: Supernet,
    batches: Iterable[tuple[Any, Any]],
    recipe: SupernetRecipe,
    *,
    loss: Loss | None = None,
    distill: Loss | None = None,
    seed: int = 0,
) -> Iterator[EpochLog]:
    """Train a supernet in place by the sandwich rule; yields after each epoch.

    `batches` is any iterable of (inputs, targets) that has a length, such as a `DataLoader`. `loss(output, targets)` is
    cross-entropy, if not given; by `distill(output, teacher_output)` narrow nets learn from the widest, if not as the
    recipe says.
    """
    yield from _epochs(supernet, batches, recipe, sandwich_step(supernet, recipe, loss, imitate=distill), seed)


def retrain(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    recipe: Recipe,
    *,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    distill: float = 0.0,
    imitate: Loss = soft_cross_entropy,
    seed: int = 0,
) -> Iterator[EpochLog]:
    """Train a plain net (an extracted subnet) in place; yields after each epoch.

    With a `teacher` in evaluation mode, `distill` of the loss is `imitate(output, teacher_output)`.
    """
    yield from _epochs(model, batches, recipe, plain_step(model, recipe, loss, teacher, distill, imitate), seed)


def _epochs(
    model: nn.Module, batches: Iterable[tuple[Any, Any]], recipe: Recipe, step: Step, seed: int
) -> Iterator[EpochLog]:
    training = Training(model, recipe, len(batches), seed=seed)  # type: ignore[arg-type]  # a loader has a length
    while not training.is_done:
        yield training.run_epoch(batches, step)


def unshared(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `state_dict`, each shared one once, under its first name."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def load_unshared(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `unshared` gave into a model of the same shape; `RunError` if it does not fit."""
    own = unshared(model)
    for name in {**own, **tensors}:
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise RunError(f"the saved tensors belong to another network: {name!r} does not fit")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
