"""Optimizers and schedules by name: torch's own, and timm's."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from autoslim.errors import AutoSlimError, ConfigError, nearest
from autoslim.recipe import SCHEDULES, Recipe

Schedule = Callable[[int], Mapping[str, Any]]  # the step, counted from 0 -> options of every parameter group

_NO_OPTIMIZERS = {
    "lbfgs": "it wants to compute the loss several times a step",
    "sparseadam": "gradients are dense",
    "muon": "it takes matrices only, and networks have biases and kernels",
}
_NORMALISATION = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # _NormBase: of batches and of instances
_KEPT = (torch.Tensor, int, float, bool, str, type(None))  # what a checkpoint can hold of an optimizer's state
_PER_BATCH = ("OneCycleLR", "CyclicLR")  # the others of torch are stepped once per epoch, as in its documentation
_FILLED_IN = ("T_max", "total_steps")  # of CosineAnnealingLR and OneCycleLR: how long the training is
_NO_SCHEDULES = {
    "LRScheduler": "it is a base class",
    "ReduceLROnPlateau": "it waits for a figure to get worse, and a run that resumes has to repeat itself",
    "LambdaLR": "it needs a Python function",
    "MultiplicativeLR": "it needs a Python function",
    "SequentialLR": "it needs other schedulers",
    "ChainedScheduler": "it needs other schedulers",
}


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of a recipe; `ConfigError` for a name or an option that there is not.

    Weight decay on matrices and convolution kernels only: not on depthwise ones, normalisation or biases.
    """
    _try_out(recipe)
    return _build([group for group in _groups(model, recipe.weight_decay) if group["params"]], recipe)


def _try_out(recipe: Recipe) -> None:
    """One step of a small layer: some options are looked at only then, which would be after hours of a search."""
    parameters = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]
    optimizer = _build([{"params": parameters, "weight_decay": recipe.weight_decay}], recipe)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer.step()
    except Exception as error:  # whatever code of others meets in an option that it has not looked at
        raise _unfit(recipe, error) from error
    for slots in state_of(optimizer).values():
        for value in slots.values():
            if not isinstance(value, _KEPT):
                raise ConfigError(
                    f"optimizer {recipe.optimizer!r} keeps a {type(value).__name__}, which no checkpoint holds; choose "
                    "another one"
                )


def _unfit(recipe: Recipe, error: Exception) -> ConfigError:
    given = f" with optimizer_args {recipe.optimizer_args}" if recipe.optimizer_args else ""
    return ConfigError(f"optimizer {recipe.optimizer!r}{given} cannot be used: {_line(error)}")


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    spared = {  # by layer: under a parametrization what a weight is made of has other names and shapes
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORMALISATION) or _is_depthwise(module)
        for parameter in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 and id(parameter) not in spared else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _is_depthwise(module: nn.Module) -> bool:
    """Does each kernel see one channel, and are there several?"""
    if not isinstance(module, _ConvNd):
        return False
    return 1 < module.groups == (module.out_channels if module.transposed else module.in_channels)


def _build(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    source, _, name = recipe.optimizer.rpartition(":")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in recipe.optimizer_args.items()}
    for key in ("lr", "weight_decay", "momentum", "nesterov"):
        if key in options:
            raise ConfigError(f"optimizer_args.{key}: {key} is a key of the recipe itself, beside optimizer")
    try:
        if source == "timm":
            return _timm_optimizer(name, groups, recipe, options)
        if source in ("", "torch"):
            return _torch_optimizer(name, groups, recipe, options)
    except AutoSlimError:
        raise
    except Exception as error:  # whatever code of others meets in an option of the wrong kind
        raise _unfit(recipe, error) from error
    raise ConfigError(f"optimizer {recipe.optimizer!r}: write a name of torch.optim, or timm:NAME")


def _torch_optimizer(
    name: str, groups: list[dict[str, Any]], recipe: Recipe, options: dict[str, Any]
) -> torch.optim.Optimizer:
    known = {
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    name = name.lower()
    if name in _NO_OPTIMIZERS:
        raise ConfigError(f"optimizer {name!r} cannot be used: {_NO_OPTIMIZERS[name]}; adamw would work")
    if name not in known:
        usable = [each for each in known if each not in _NO_OPTIMIZERS]
        raise ConfigError(f"no optimizer {recipe.optimizer!r}; {nearest(name, usable)}")
    taken = inspect.signature(known[name]).parameters
    for key in options:
        if key not in taken:
            raise ConfigError(f"optimizer_args: {name} has no option {key!r}; {nearest(key, set(taken) - {'params'})}")
    if "weight_decay" not in taken and recipe.weight_decay:
        raise ConfigError(f"optimizer {name!r} has no weight decay; set weight_decay=0")
    own = {"momentum": recipe.momentum, "nesterov": recipe.nesterov and recipe.momentum > 0}
    options |= {key: value for key, value in own.items() if key in taken}
    make: Callable[..., torch.optim.Optimizer] = known[name]
    return make(groups, lr=recipe.lr, **options)


def _timm_optimizer(
    name: str, groups: list[dict[str, Any]], recipe: Recipe, options: dict[str, Any]
) -> torch.optim.Optimizer:
    try:
        timm = importlib.import_module("timm.optim")
    except ImportError:
        raise ConfigError(f"optimizer {recipe.optimizer!r} needs timm: pip install 'autoslim[timm]'") from None
    known = [str(each) for each in timm.list_optimizers()]
    reasons = {each: _unusable(timm.get_optimizer_info(each)) for each in known}
    base = name.lower().removeprefix("lookahead_")
    if base not in reasons:
        usable = [each for each, reason in reasons.items() if reason is None]
        raise ConfigError(f"no optimizer {recipe.optimizer!r}; {nearest(name, usable)}")
    if reasons[base] is not None:
        raise ConfigError(f"optimizer {recipe.optimizer!r} cannot be used: {reasons[base]}; timm:lamb would work")
    made: torch.optim.Optimizer = timm.create_optimizer_v2(
        groups, opt=name.lower(), lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum, **options
    )
    return made


def state_of(optimizer: torch.optim.Optimizer) -> Mapping[torch.Tensor, Mapping[str, Any]]:
    """What an optimizer remembers of each parameter. timm's Lookahead leaves all of it, its own too, to another one."""
    keeper: torch.optim.Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    return keeper.state


def _unusable(info: Any) -> str | None:
    """Why an optimizer that timm lists cannot train here; None if it can."""
    if info.second_order:
        return "it needs second-order gradients, and a step has first-order ones"
    if isinstance(info.opt_class, str):  # of another package, imported when it is made
        package = info.opt_class.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            return f"it needs {package}, which is not installed"
        if not torch.cuda.is_available():
            return f"it needs {package} on CUDA, and there is none here"
    return None


def make_schedule(recipe: Recipe, steps_per_epoch: int) -> Schedule:
    """The schedule of a recipe as a function of the step; `ConfigError` for a name or an option that there is not.

    Our own and timm's go step by step. Those of torch are stepped after each epoch, with arguments in epochs, as its
    documentation does; OneCycleLR and CyclicLR after each step. Where they need to know how long the training is
    (`T_max`, `total_steps`), they are told. They are asked for the rate of every epoch at once, for some mistakes in
    `schedule_args` show only there.
    """
    if recipe.schedule in SCHEDULES:
        if recipe.schedule_args:
            raise ConfigError(f"schedule_args: the schedule {recipe.schedule!r} has no options")
        return lambda step: {"lr": recipe.learning_rate(step, steps_per_epoch)}
    schedule = _NamedSchedule(recipe, steps_per_epoch)
    schedule.check()
    return schedule


class _NamedSchedule:
    """A scheduler of torch or timm, on an optimizer of its own; asked for a step it walks there."""

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self._recipe, self._steps_per_epoch = recipe, steps_per_epoch
        self._warmup = math.ceil(recipe.warmup_epochs * steps_per_epoch)
        self._position, self._every, self._jumps = 0, 1, False
        self._walk: Callable[[int], object]
        self._begin()

    def __call__(self, step: int) -> Mapping[str, Any]:
        warming = self._recipe.warmup_rate(step, self._steps_per_epoch)
        if warming is not None:
            return {"lr": warming}
        target = (step - self._warmup) // self._every
        if target < self._position:
            self._begin()
        with self._named_errors(), warnings.catch_warnings():
            # torch warns of schedules stepped without their optimizer; ours has nothing to do
            warnings.filterwarnings("ignore", ".*lr_scheduler.step.*", UserWarning)
            while self._position < target:
                self._position = target if self._jumps else self._position + 1
                self._walk(self._position)
        group = self._optimizer.param_groups[0]
        return {key: group[key] for key in ("lr", "momentum", "betas") if key in group}

    def check(self) -> None:
        """`ConfigError` if the arguments give no rate at some epoch or at the last step; rates only, and so quick."""
        last = self._recipe.epochs * self._steps_per_epoch - 1
        for step in (*range(self._warmup, last, self._steps_per_epoch), last):
            rate = self(step)["lr"]
            with self._named_errors():
                if not -1e-6 * self._recipe.lr <= rate < math.inf:  # rounding may end just below 0
                    raise ValueError(f"its learning rate is {rate:g} at step {step + 1}")

    def _begin(self) -> None:
        self._optimizer = _build([{"params": [nn.Parameter(torch.zeros(1, 1))]}], self._recipe)
        source, _, name = self._recipe.schedule.rpartition(":")
        options, self._position = dict(self._recipe.schedule_args), 0
        with self._named_errors():
            if source == "timm":
                self._every, self._jumps, self._walk = 1, True, self._timm(name, options)
            elif source in ("", "torch"):
                self._every, self._jumps, self._walk = self._torch(name, options)
            else:
                raise ConfigError(
                    f"schedule {self._recipe.schedule!r}: write {', '.join(SCHEDULES)}, torch:NAME or timm:NAME"
                )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """What libraries say of wrong arguments, when they begin or at a later step."""
        try:
            yield
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError) as error:
            options = self._recipe.schedule_args
            given = ", ".join(f"{key}={value!r}" for key, value in options.items())
            arguments = f" with schedule_args {given}" if given else ""
            filled = next((f"; leave {key} out, and it is filled in" for key in _FILLED_IN if key in options), "")
            raise ConfigError(
                f"schedule {self._recipe.schedule!r}{arguments} cannot be used: {_line(error)}{filled}"
            ) from error

    def _torch(self, name: str, options: dict[str, Any]) -> tuple[int, bool, Callable[[int], object]]:
        module = torch.optim.lr_scheduler
        known = {
            key: kind
            for key, kind in vars(module).items()
            if inspect.isclass(kind) and issubclass(kind, module.LRScheduler) and not key.startswith("_")
        }
        name = {key.lower(): key for key in known}.get(name.lower(), name)
        if name not in known:
            usable = {*SCHEDULES, *(f"torch:{key}" for key in known if key not in _NO_SCHEDULES)}
            raise ConfigError(f"no schedule {self._recipe.schedule!r}; {nearest(self._recipe.schedule, usable)}")
        if name in _NO_SCHEDULES:
            raise ConfigError(f"schedule {name!r} cannot be used: {_NO_SCHEDULES[name]}")
        taken = inspect.signature(known[name]).parameters
        for key in options:
            if key not in taken:
                names = set(taken) - {"optimizer", "last_epoch"}
                raise ConfigError(f"schedule_args: {name} has no option {key!r}; {nearest(key, names)}")
        milestones = options.get("milestones", [])
        if not isinstance(milestones, (list, tuple)) or not all(type(each) is int for each in milestones):
            raise ConfigError(
                f"schedule_args.milestones: {milestones!r} are no whole epochs; write them as in [30, 60]"
            )
        known_to_us = ("optimizer", *_FILLED_IN, "max_lr")
        needed = [k for k, p in taken.items() if p.default is p.empty and k not in (*known_to_us, *options)]
        if needed:
            raise ConfigError(
                f"schedule {self._recipe.schedule!r} needs {', '.join(needed)}: give them in schedule_args, as "
                f"schedule_args.{needed[0]}=..."
            )
        is_per_batch = name in _PER_BATCH
        every = 1 if is_per_batch else self._steps_per_epoch
        left = max(1, self._recipe.epochs * self._steps_per_epoch - self._warmup)
        known_length = {"T_max": max(1, round(left / every)), "total_steps": left, "max_lr": self._recipe.lr}
        if name in ("OneCycleLR", "CosineAnnealingLR", "CyclicLR"):
            options = {key: value for key, value in known_length.items() if key in taken} | options
        scheduler = known[name](self._optimizer, **options)

        def walk(position: int) -> None:
            scheduler.last_epoch = position - 1  # the rates of the per-batch ones follow from it alone
            scheduler.step()

        return every, is_per_batch, walk

    def _timm(self, name: str, options: dict[str, Any]) -> Callable[[int], object]:
        try:
            timm = importlib.import_module("timm.scheduler")
        except ImportError:
            raise ConfigError(f"schedule {self._recipe.schedule!r} needs timm: pip install 'autoslim[timm]'") from None
        known = ("cosine", "tanh", "step", "multistep", "poly")
        if name not in known:
            raise ConfigError(f"no schedule {self._recipe.schedule!r}; {nearest(name, known)}")
        options = {
            "num_epochs": max(1, round(self._recipe.epochs - self._recipe.warmup_epochs)),
            "warmup_lr": 0.0,
            "step_on_epochs": False,
            "updates_per_epoch": self._steps_per_epoch,
            **options,
        }
        scheduler, _ = timm.create_scheduler_v2(self._optimizer, sched=name, **options)
        return lambda position: scheduler.step_update(position)


def _line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    if not said and isinstance(error, AssertionError):  # "assert t_initial > 0" says more than its name
        said = [traceback.extract_tb(error.__traceback__)[-1].line or ""]
    return said[0] if said and said[0] else type(error).__name__
