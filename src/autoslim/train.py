"""Training: the loop shared by supernets and plain nets, in steps that resume exactly."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from autoslim.calibrate import evaluating
from autoslim.checkpointing import checkpointed
from autoslim.distributed import GradientAverage, samples_of, take_from_main, world
from autoslim.ema import WeightAverage
from autoslim.errors import RunError, TrainError
from autoslim.lending import Lender
from autoslim.losses import Backward, Loss, alpha_divergence, plain_backward, soft_cross_entropy
from autoslim.memory import fitting_batch, is_out_of_memory
from autoslim.optimizers import make_optimizer, make_schedule, state_of
from autoslim.recipe import Recipe, RetrainRecipe, SupernetRecipe
from autoslim.scores import pair_of
from autoslim.supernet import Supernet, sandwich_backward
from autoslim.switchable import SwitchableNet, switch_backward
from autoslim.tracing import split_input

MOST_SKIPPED = 10  # steps in a row whose loss is no number: more of them is no bad luck
Distill = bool | Literal["auto", "alpha"] | Loss  # of whom narrow nets learn, and how: see `SupernetRecipe`
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Step(Protocol):
    """Forward and backward of one batch: sends every loss through `backward`, and returns the losses by name."""

    def __call__(
        self, inputs: Any, targets: Any, rng: random.Random, backward: Backward = plain_backward, /
    ) -> Mapping[str, float]:
        """`rng` draws what is random."""


@dataclass(frozen=True)
class EpochLog:
    """What an epoch came to: mean losses by name, its wall time, and how many steps were skipped (`on_nan`)."""

    epoch: int  # from 1
    losses: dict[str, float]
    seconds: float
    skipped: int = 0


@dataclass
class _Epoch:
    """What there is of the epoch that is being run."""

    steps: int = 0  # optimizer steps, with those skipped
    sums: dict[str, float] | None = None
    skipped: int = 0
    seconds: float = 0.0


class Training:
    """The optimizer and the progress of one network; `run_epoch` trains it.

    `step` does forward and backward of a batch; there is one optimizer step after it, or after `recipe.accumulate` of
    them. All randomness of a step derives from (`seed`, epoch, step), and that of the data from (`seed`, epoch), so a
    run resumed by `state`, `record` and `load_state` repeats an uninterrupted one exactly. For that a `generator` of
    a `DataLoader` or its sampler is seeded anew for each epoch. In a process group, each rank is given its own share
    of every batch, and all make the same step.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, batches_per_epoch: int, *, seed: int = 0) -> None:
        if batches_per_epoch < 1:
            raise TrainError(f"no full batch of {recipe.batch_size} images to train on; lower batch_size")
        self.model, self.recipe, self.seed = model, recipe, seed
        self.steps_per_epoch = math.ceil(batches_per_epoch / recipe.accumulate)
        self.epoch = 0
        self.device = next(model.parameters()).device
        if recipe.channels_last:
            for parameter in model.parameters():
                parameter.data = _channels_last(parameter.data)
        self.optimizer = make_optimizer(model, recipe)
        self.schedule = make_schedule(recipe, self.steps_per_epoch)
        self.average = None if recipe.ema is None else WeightAverage(lambda: unshared(model), recipe.ema)
        self.scaler = torch.amp.GradScaler(self.device.type) if recipe.autocast == "fp16" else None
        self._gradients = GradientAverage(model.parameters())
        self._current = _Epoch()
        self._skipped_in_a_row = 0
        take_from_main(unshared(model))

    @property
    def is_done(self) -> bool:
        """Have all epochs of the recipe been run?"""
        return self.epoch >= self.recipe.epochs

    @property
    def steps(self) -> int:
        """Optimizer steps made so far."""
        return self.epoch * self.steps_per_epoch + self._current.steps

    def run_epoch(
        self,
        batches: Iterable[tuple[Any, Any]],
        step: Step,
        on_step: Callable[[float], None] | None = None,
        *,
        stop: Callable[[], bool] = lambda: False,
        on_skip: Callable[[str], None] = lambda text: None,
    ) -> EpochLog | None:
        """Train for one pass over `batches`, or for what is left of it.

        When `stop()` turns true on any rank, the step is finished, and the answer is None: the same call goes on with
        the rest of the epoch, here or after `load_state`. Raises `TrainError`, naming the batch, at a loss that is not
        a number, unless such steps are skipped: `on_skip` is told. When memory does not suffice, the `TrainError` names
        a batch size for which it does. An average that is shown is put aside.
        """
        self.show_average(False)
        current, accumulate = self._current, self.recipe.accumulate
        started = time.perf_counter() - current.seconds
        set_epoch = getattr(batches, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        self.model.train()
        own = self.model.model if isinstance(self.model, (Supernet, SwitchableNet)) else self.model
        blocks = checkpointed(own) if self.recipe.checkpointing else nullcontext()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), blocks:
            seed = random.Random(f"{self.seed}/{self.epoch}").getrandbits(63)
            torch.manual_seed(seed)
            for generator in _generators(batches):
                generator.manual_seed(seed)
            waiting = iter(batches)
            number = 0
            while True:
                rng = self._random(number)
                torch.manual_seed(rng.getrandbits(63))
                first = number * accumulate
                group = [pair_of(batch, first + i) for i, batch in enumerate(islice(waiting, accumulate))]
                if not group:
                    break
                number += 1
                if number <= current.steps:  # made before a stop; what a loader draws is drawn again
                    continue
                losses, asked = self._step(group, step, rng, stop, on_skip)
                current.steps += 1
                current.seconds = time.perf_counter() - started
                if losses is not None:
                    current.sums = {n: (current.sums or {}).get(n, 0.0) + loss for n, loss in losses.items()}
                    if on_step is not None:
                        on_step(sum(losses.values()))
                if asked:
                    return None
        counted = current.steps - current.skipped
        if not current.steps:
            raise TrainError("there was no batch to train on")
        if not counted:
            raise TrainError(f"every step of epoch {self.epoch + 1} was skipped for a loss that is not a number")
        self._refuse_too_many_skipped()
        take_from_main(dict(self.model.named_buffers()))  # running statistics: of rank 0's shares
        self.epoch += 1
        self._current = _Epoch()
        means = {name: total / counted for name, total in (current.sums or {}).items()}
        return EpochLog(self.epoch, means, time.perf_counter() - started, current.skipped)

    def _refuse_too_many_skipped(self) -> None:
        """Weights that a step destroyed give no number at any later step: then the net is no result."""
        steps, skipped, last = self._current.steps, self._current.skipped, self._skipped_in_a_row
        remedy = "the weights are likely destroyed: lower lr or add warmup_epochs"
        if 2 * skipped > steps:
            raise TrainError(f"{skipped} of the {steps} steps of epoch {self.epoch + 1} were skipped; {remedy}")
        if self.epoch + 1 == self.recipe.epochs and last > 1:  # one may have been a bad batch
            raise TrainError(f"the last {last} steps of the training were skipped; {remedy}")

    def _random(self, step: int) -> random.Random:
        """What a step of this epoch draws from; other ranks draw other widths."""
        rank = world().rank
        return random.Random(f"{self.seed}/{self.epoch}/{step}" + (f"/{rank}" if rank else ""))

    def _step(
        self,
        group: list[tuple[Any, Any]],
        step: Step,
        rng: random.Random,
        stop: Callable[[], bool],
        on_skip: Callable[[str], None],
    ) -> tuple[Mapping[str, float] | None, bool]:
        """One optimizer step. Mean losses, or None if it was skipped; and whether any rank was asked to stop."""
        options = self.schedule(self.steps)
        for parameters in self.optimizer.param_groups:
            parameters.update(options)
        self.optimizer.zero_grad(set_to_none=True)
        skipping = self.recipe.on_nan == "skip"
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()] if skipping else []
        losses: dict[str, float] = {}
        sizes = [samples_of(inputs) for inputs, _ in group]
        if not sum(sizes):
            raise TrainError(
                f"step {self._current.steps + 1} of epoch {self.epoch + 1} got no samples: its batch is empty"
            )
        state = rng.getstate()  # the batches of a step are one large batch: they run the same random nets
        is_too_large = False
        try:
            for (inputs, targets), size in zip(group, sizes, strict=True):
                rng.setstate(state)
                share = size / sum(sizes)
                for name, loss in self._forward_backward(step, inputs, targets, rng, share).items():
                    losses[name] = losses.get(name, 0.0) + share * loss
            names = list(losses)
            numbers = [*losses.values(), float(stop())]
            *means, asked = self._gradients.average(sum(sizes), numbers)
            losses = dict(zip(names, means, strict=True))
            problem = self._problem(losses, options["lr"])
            if problem is None:
                self._update()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            is_too_large = True
        if is_too_large:  # here, where nothing of the failed step is held by the error any more
            raise self._too_large(group[0], step, rng, max(sizes))
        if problem is None:
            self._skipped_in_a_row = 0
            return losses, asked > 0
        self._skip(problem, buffers, on_skip)
        return None, asked > 0

    def _forward_backward(
        self, step: Step, inputs: Any, targets: Any, rng: random.Random, share: float
    ) -> Mapping[str, float]:
        scaler = self.scaler

        def backward(loss: Tensor) -> None:
            part = loss * share
            plain_backward(part if scaler is None else scaler.scale(part))

        if self.recipe.channels_last:
            inputs = torch.utils._pytree.tree_map(_channels_last, inputs)
        precision = _PRECISIONS.get(self.recipe.autocast)
        with torch.autocast(self.device.type, precision, enabled=precision is not None):
            if share == 1 and scaler is None:
                return step(inputs, targets, rng)
            return step(inputs, targets, rng, backward)

    def _problem(self, losses: Mapping[str, float], rate: float) -> str | None:
        """Why the step cannot be made; None if it can."""
        step = self._current.steps + 1
        accumulate = self.recipe.accumulate
        batch = f"batch {step}" if accumulate == 1 else f"batches {(step - 1) * accumulate + 1} to {step * accumulate}"
        where = f"at step {step} of epoch {self.epoch + 1} ({batch}, learning rate {rate:.3g})"
        for name, loss in losses.items():
            if not math.isfinite(loss):
                return f"the {name} loss became {loss} {where}"
        if self.recipe.on_nan == "skip" and self.scaler is None:  # a scaler looks at that itself
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            if gradients and not math.isfinite(float(nn.utils.get_total_norm(gradients))):
                return f"a gradient was no number {where}"
        return None

    def _update(self) -> None:
        """The step of the optimizer, with gradients as they came from the backward pass."""
        parameters = list(self.model.parameters())
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.recipe.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.recipe.clip_value)
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)  # leaves a step out whose gradients exceed fp16, and scales less then
            self.scaler.update()
        if self.average is not None:
            self.average.update()

    def _skip(self, problem: str, buffers: list[tuple[Tensor, Tensor]], on_skip: Callable[[str], None]) -> None:
        if self.recipe.on_nan == "stop":
            raise TrainError(f"{problem}; lower lr, add warmup_epochs, or leave such steps out with on_nan=skip")
        with torch.no_grad():
            for buffer, before in buffers:  # running statistics may have taken it in
                buffer.copy_(before)
        self.optimizer.zero_grad(set_to_none=True)
        self._current.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > MOST_SKIPPED:
            raise TrainError(f"{problem}, and so did {MOST_SKIPPED} steps in a row before it; lower lr")
        on_skip(f"{problem}: step left out, {self._current.skipped} in this epoch")

    def _too_large(self, batch: tuple[Any, Any], step: Step, rng: random.Random, size: int) -> TrainError:
        """The error for a batch that does not fit, with the half, quarter ... of it that was tried and does."""
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

        def run(smaller: int) -> None:
            try:
                inputs, targets = torch.utils._pytree.tree_map(
                    lambda leaf: leaf[:smaller] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch
                )
                self._forward_backward(step, inputs, targets, rng, 1.0)
            finally:
                self.optimizer.zero_grad(set_to_none=True)

        fits = fitting_batch(run, size)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        ranks = world().size
        if fits is None:
            return TrainError(f"out of memory, even for a batch of {ranks}; take smaller images or a smaller network")
        accumulate = self.recipe.accumulate * math.ceil(size / fits)
        return TrainError(
            f"out of memory at a batch of {size * ranks}; a forward and backward pass of {fits * ranks} was tried and "
            f"fits: set batch_size={fits * ranks}, with accumulate={accumulate} for the same steps"
            + ("" if self.recipe.checkpointing else ", or checkpointing=true")
        )

    def finish(self) -> None:
        """Leave the model with what is kept of it: the average of its weights, if the recipe asks for one."""
        self.show_average(True)

    def show_average(self, is_shown: bool) -> None:
        """Put the average of the weights into the model, for an evaluation; or the weights that are trained back."""
        if self.average is not None:
            self.average.show(is_shown)

    def state(self) -> dict[str, Tensor]:
        """Model, optimizer and average as plain tensors by name, the same whether the average is shown or not."""
        weights, average = (unshared(self.model), {}) if self.average is None else self.average.both()
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        for name, key, value in self._slots():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
        for number, group in enumerate(self.optimizer.param_groups):  # timm counts its steps there
            tensors |= {f"group.{number}.{key}": value for key, value in group.items() if isinstance(value, Tensor)}
        tensors |= {f"ema.{name}": tensor for name, tensor in average.items()}
        return tensors

    def record(self) -> dict[str, Any]:
        """The rest of the state, as plain JSON types."""
        slots: dict[str, dict[str, Any]] = {}
        for name, key, value in self._slots():
            if not isinstance(value, Tensor):
                slots.setdefault(name, {})[key] = value
        plain = [
            {key: value for key, value in group.items() if isinstance(value, (int, float, bool)) and key != "params"}
            for group in self.optimizer.param_groups
        ]
        current = self._current
        return {
            "epoch": self.epoch,
            "steps": current.steps,  # of the epoch that is being run
            "steps_per_epoch": self.steps_per_epoch,
            "sums": current.sums,
            "skipped": current.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "seconds": current.seconds,
            "slots": slots,
            "groups": plain,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def _slots(self) -> Iterator[tuple[str, str, Any]]:
        for name, parameter in self.model.named_parameters():
            for key, value in state_of(self.optimizer).get(parameter, {}).items():
                yield name, key, value

    def load_state(self, tensors: Mapping[str, Tensor], epoch: int, record: Mapping[str, Any] | None = None) -> None:
        """Go on after `epoch` finished epochs and what `record` says; `RunError` if the tensors are another net's."""
        record = record or {}
        self._check_record(epoch, record)
        if record.get("steps") and record.get("steps_per_epoch") != self.steps_per_epoch:
            raise RunError(
                f"the checkpoint was made in the middle of an epoch of {record.get('steps_per_epoch')} steps, and now "
                f"an epoch has {self.steps_per_epoch}; go on with the same data and batch_size"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "group": {}, "ema": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = tensor
        self.show_average(False)
        load_unshared(self.model, parts["model"])
        self._load_optimizer(parts["optimizer"], parts["group"], record)
        if self.average is not None:
            own = unshared(self.model)
            for name, tensor in _used(self.model, parts["ema"]).items():
                if name not in own or own[name].shape != tensor.shape:
                    raise RunError(f"the checkpoint belongs to another network: {name!r} does not fit")
                self.average.tensors[name] = tensor.to(own[name].device).clone()
        if self.scaler is not None and record.get("scaler"):
            self.scaler.load_state_dict(dict(record["scaler"]))
        self.epoch = epoch
        self._current = _Epoch(
            record.get("steps", 0), record.get("sums"), record.get("skipped", 0), record.get("seconds", 0.0)
        )
        self._skipped_in_a_row = record.get("skipped_in_a_row", 0)

    def _check_record(self, epoch: int, record: Mapping[str, Any]) -> None:
        """`RunError` for what no `record` of a training like this one says."""
        is_count = {name: type(record.get(name, 0)) is int for name in ("steps", "skipped", "skipped_in_a_row")}
        steps = record.get("steps", 0)
        sums, seconds = record.get("sums") or {}, record.get("seconds", 0.0)
        slots, groups = record.get("slots", {}), record.get("groups") or []
        if type(epoch) is not int or not 0 <= epoch <= self.recipe.epochs:
            raise RunError(f"the checkpoint says that {epoch!r} of {self.recipe.epochs} epochs were finished")
        if not all(is_count.values()) or min(steps, record.get("skipped", 0)) < 0:
            raise RunError("the checkpoint is damaged: it does not count its steps")
        if not isinstance(sums, dict) or not all(type(value) in (int, float) for value in (seconds, *sums.values())):
            raise RunError("the checkpoint is damaged: its losses are no numbers")
        if not isinstance(slots, dict) or not isinstance(groups, list):
            raise RunError("the checkpoint is damaged: it does not say what the optimizer was")
        if not all(isinstance(each, dict) for each in (*slots.values(), *groups)):
            raise RunError("the checkpoint is damaged: it does not say what the optimizer was")

    def _load_optimizer(
        self, tensors: Mapping[str, Tensor], of_groups: Mapping[str, Tensor], record: Mapping[str, Any]
    ) -> None:
        """By way of torch's own `load_state_dict`, which knows what belongs on which device."""
        places: dict[int, int] = {}  # its numbers: the groups in a row
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                places[id(parameter)] = len(places)
        numbers = {name: places[id(p)] for name, p in self.model.named_parameters() if id(p) in places}
        slots: dict[int, dict[str, Any]] = {}
        for key, tensor in tensors.items():
            slot, _, name = key.partition(".")
            if name not in numbers:
                raise RunError(f"the checkpoint belongs to another network: {name!r} does not fit")
            slots.setdefault(numbers[name], {})[slot] = tensor
        for name, values in record.get("slots", {}).items():
            if name not in numbers:
                raise RunError(f"the checkpoint belongs to another network: {name!r} does not fit")
            slots.setdefault(numbers[name], {}).update(values)
        whole = self.optimizer.state_dict()
        groups = record.get("groups") or [{} for _ in whole["param_groups"]]
        if len(groups) != len(whole["param_groups"]):
            raise RunError("the checkpoint belongs to another network: its parameters are in other groups")
        whole["state"] = slots
        for key, tensor in of_groups.items():
            number, _, option = key.partition(".")
            whole["param_groups"][int(number)][option] = tensor.to(self.device)
        whole["param_groups"] = [own | dict(kept) for own, kept in zip(whole["param_groups"], groups, strict=True)]
        self.optimizer.load_state_dict(whole)


def _generators(batches: Iterable[Any]) -> list[torch.Generator]:
    """Those that a `DataLoader` or one of its samplers draws the order from, instead of torch's global one."""
    samplers = (getattr(batches, name, None) for name in ("sampler", "batch_sampler"))
    owners = [batches, *samplers, getattr(getattr(batches, "batch_sampler", None), "sampler", None)]
    found = (getattr(owner, "generator", None) for owner in owners)
    return [each for each in found if isinstance(each, torch.Generator)]


def _channels_last(leaf: Any) -> Any:
    has_layout = isinstance(leaf, Tensor) and leaf.ndim == 4  # (N, C, H, W), or a kernel
    return leaf.contiguous(memory_format=torch.channels_last) if has_layout else leaf


def hard_loss(recipe: Recipe) -> Loss:
    """Cross-entropy; smoothing gives `1 - e` to the true class and `e / (K - 1)` to each other, as the papers' code.

    Targets are classes (N,), or shares of classes (N, K) as MixUp gives them: the loss then is linear in the shares.
    """

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        classes = output.shape[1]
        if targets.is_floating_point():
            targets = targets.to(output.dtype)
        smoothing = recipe.label_smoothing * classes / max(1, classes - 1)  # torch spreads it over all K classes
        return nn.functional.cross_entropy(output, targets, label_smoothing=min(smoothing, 1.0))

    return loss


def sandwich_step(
    supernet: Supernet,
    recipe: SupernetRecipe,
    loss: Loss | None = None,
    ratios: tuple[float, float] | None = None,
    distill: Distill | None = None,
) -> Step:
    """The step that trains a supernet at independent widths, or, within `ratios`, at one ratio for the whole net.

    `distill` takes the place of the recipe's.
    """
    _refuse_compile(recipe)
    loss = loss or hard_loss(recipe)
    distilled = _distillation(recipe.distill if distill is None else distill, auto=True)

    def step(inputs: Any, targets: Any, rng: random.Random, backward: Backward = plain_backward) -> Mapping[str, float]:
        return sandwich_backward(
            supernet,
            inputs,
            targets,
            loss=loss,
            rng=rng,
            num_random=recipe.num_random,
            distill=distilled,
            ratios=ratios,
            backward=backward,
        )

    return step


def switch_step(net: SwitchableNet, recipe: Recipe, loss: Loss | None = None) -> Step:
    """The step that trains an S-Net."""
    _refuse_compile(recipe)
    loss = loss or hard_loss(recipe)
    distill = _distillation(recipe.distill, auto=False) if isinstance(recipe, SupernetRecipe) else False

    def step(inputs: Any, targets: Any, rng: random.Random, backward: Backward = plain_backward) -> Mapping[str, float]:
        return switch_backward(net, inputs, targets, loss=loss, distill=distill, backward=backward)

    return step


def _refuse_compile(recipe: Recipe) -> None:
    """Nets of ever new widths are ever new shapes: torch.compile would translate each, and give up after eight."""
    if recipe.compile:
        raise TrainError(
            "compile=true: each step of shared weights runs nets of other shapes, and torch.compile would translate "
            "every one anew; it is for plain nets (retrain.compile=true)"
        )


def _distillation(wanted: Distill, *, auto: bool) -> bool | Loss:
    """What backward passes take; "auto" is `auto` to this kind of net."""
    if isinstance(wanted, bool) or callable(wanted):
        return wanted
    if wanted not in ("auto", "alpha"):
        raise TrainError(
            f'distill is True, False, "auto", "alpha" or a function of (output, teacher_output), got {wanted!r}'
        )
    return auto if wanted == "auto" else alpha_divergence


def plain_step(
    model: nn.Module,
    recipe: Recipe,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    weight: float = 0.0,
    imitate: Loss = soft_cross_entropy,
) -> Step:
    """The step that trains a plain net, with `weight` of its loss from what a teacher gives in evaluation mode.

    With `recipe.compile` it runs through torch.compile, one translation for its one shape.
    """
    loss = loss or hard_loss(recipe)
    if recipe.compile and recipe.checkpointing:
        raise TrainError("compile=true and checkpointing=true: torch.compile decides itself what to keep; choose one")
    run, lender = torch.compile(model) if recipe.compile else model, Lender()

    def step(inputs: Any, targets: Any, rng: random.Random, backward: Backward = plain_backward) -> Mapping[str, float]:
        is_taught = teacher is not None and weight > 0
        with lender.lent(inputs) if is_taught else nullcontext(inputs) as own:
            args, kwargs = split_input(own)
            output = run(*args, **kwargs)
        total = loss(output, targets)
        if teacher is not None and is_taught:
            with torch.no_grad(), evaluating(teacher), lender.lent(inputs) as own:
                args, kwargs = split_input(own)
                lesson = teacher(*args, **kwargs)
            total = (1 - weight) * total + weight * imitate(output, lesson)
        backward(total)
        return {"loss": float(total.detach())}

    return step


def train_supernet(
    supernet: Supernet,
    batches: Iterable[tuple[Any, Any]],
    recipe: SupernetRecipe,
    *,
    loss: Loss | None = None,
    distill: Distill | None = None,
    seed: int = 0,
) -> Iterator[EpochLog]:
    """Train a supernet in place by the sandwich rule; yields after each epoch.

    `batches` is any iterable of (inputs, targets) that has a length, such as a `DataLoader`; in a process group, each
    rank gives its own share of every batch. With `recipe.ema` the net holds the averaged weights whenever this yields.
    `loss(output, targets)` is cross-entropy, if not given (`label_smoothing` is of that one); by
    `distill(output, teacher_output)` narrow nets learn from the widest, if not as the recipe says, and what `distill`
    of a recipe may be is taken too. Raises `TrainError` for keys of the recipe that act in a run only.
    """
    if not isinstance(recipe, SupernetRecipe):
        raise TrainError(f"a supernet is trained by a SupernetRecipe, got {type(recipe).__name__}")
    if recipe.plain_epochs:
        raise TrainError(
            f"plain_epochs={recipe.plain_epochs} acts in a run only: leave it out, and here first go through "
            "retrain(supernet.model, ...) and call sort_channels"
        )
    if recipe.sort != "none":
        raise TrainError(f"sort={recipe.sort!r} acts in a run only: leave it out, and call sort_channels before")
    yield from _epochs(supernet, batches, recipe, sandwich_step(supernet, recipe, loss, distill=distill), seed)


def retrain(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    recipe: Recipe,
    *,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    distill: float | None = None,
    imitate: Loss = soft_cross_entropy,
    seed: int = 0,
) -> Iterator[EpochLog]:
    """Train a plain net (an extracted subnet) in place; yields after each epoch.

    With a `teacher`, which runs in evaluation mode and stays as it was, `distill` of the loss (if not given, that of a
    `RetrainRecipe`) is `imitate(output, teacher_output)`. `batches` and `loss` are as in `train_supernet`.
    """
    if isinstance(recipe, RetrainRecipe) and recipe.jointly:
        raise TrainError("jointly=true acts in a run only: leave it out, and train a SwitchableNet by switch_backward")
    weight = _share_of_teacher(recipe, teacher, distill)
    yield from _epochs(model, batches, recipe, plain_step(model, recipe, loss, teacher, weight, imitate), seed)


def _share_of_teacher(recipe: Recipe, teacher: nn.Module | None, distill: float | None) -> float:
    of_recipe = recipe.distill if isinstance(recipe, RetrainRecipe) else 0.0
    share = of_recipe if distill is None else distill
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1:
        raise TrainError(f"distill must be a number from 0 to 1, the teacher's share of the loss; got {share!r}")
    if share > 0 and teacher is None:
        raise TrainError(f"distill={share:g} needs a teacher: give one, such as teacher=supernet.model")
    if share == 0 and distill is None and teacher is not None:
        raise TrainError("a teacher needs its share of the loss: give distill, such as distill=0.5")
    return float(share)


def _epochs(
    model: nn.Module, batches: Iterable[tuple[Any, Any]], recipe: Recipe, step: Step, seed: int
) -> Iterator[EpochLog]:
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError as error:
        raise TrainError(
            f"batches are gone through once each epoch, and counted before: {error}; give a list of batches, or a "
            "DataLoader of a data set that has a length"
        ) from None
    training = Training(model, recipe, count, seed=seed)
    while not training.is_done:
        log = training.run_epoch(batches, step)
        assert log is not None, "nobody asks it to stop"
        training.show_average(True)
        yield log


def unshared(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `state_dict`, each shared one once, under its first name."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def _used(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Files of older versions have the BatchNorm tensors of S-Nets too that no switch uses."""
    if not isinstance(model, SwitchableNet):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name not in model.unused}


def load_unshared(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `unshared` gave into a model of the same shape; `RunError` if it does not fit."""
    own, tensors = unshared(model), _used(model, tensors)
    for name in {**own, **tensors}:
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise RunError(f"the saved tensors belong to another network: {name!r} does not fit")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
