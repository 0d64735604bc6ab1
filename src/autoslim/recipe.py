"""How a network is trained, as data: plain Python, so that the configuration can hold it without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator

from autoslim.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel

SCHEDULES = ("linear", "cosine", "step")


def _refuse_bool(value: Any) -> Any:
    """Python takes true for 1, and a run would train at that rate."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted here")
    return value


_NUMBER = BeforeValidator(_refuse_bool)
_FINITE = Lt(math.inf)


def problem_in(errors: Sequence[Mapping[str, Any]]) -> str:
    """The first problem of those that pydantic lists, in one line: the key, what it takes, what was given."""
    key, given = _key_of(errors[0]), " ".join(repr(errors[0]["input"]).split())
    of_key = [error for error in errors if _key_of(error) == key]  # one for each member of a union
    first, *others = dict.fromkeys(error["msg"].removeprefix("Value error, ") for error in of_key)
    message = ", or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    hint = ""
    for error in of_key:
        if error["type"] == "literal_error" and isinstance(error["input"], str):
            near = nearest(error["input"], re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", "")))
            hint = f"; {near}" if near.startswith("did you mean") else ""
    return f"{key}: {message}, got {given if len(given) < 80 else given[:77] + '...'}{hint}"


def _key_of(error: Mapping[str, Any]) -> str:
    """What the user wrote: a union reports its members as the last part of the path."""
    parts = (str(part) for part in error["loc"])
    return ".".join(part for part in parts if not part.startswith(("constrained", "function-", "literal[", "bool")))


@cache
def _fields_of(kind: type[Recipe]) -> type[BaseModel]:
    """The fields of a recipe for pydantic, which else would look at them in a configuration only."""
    from pydantic import ConfigDict, create_model  # here: half of what importing this module would take

    hints = get_type_hints(kind, include_extras=True)
    given: dict[str, Any] = {each.name: (hints[each.name], ...) for each in fields(kind)}
    return create_model(kind.__name__, __config__=ConfigDict(arbitrary_types_allowed=True), **given)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; by default SGD with momentum on a schedule per step, as in the papers.

    `epochs` counts passes over the training images. `optimizer`: one of torch.optim by its name in small letters (sgd,
    adamw, rmsprop ...), or "timm:lamb" and the like; `optimizer_args` are its other options, such as `{betas: [0.9,
    0.99]}`. `momentum` and `nesterov` are for those that have them. `schedule`: see `learning_rate`; or a scheduler of
    torch ("torch:OneCycleLR") or timm ("timm:poly") with its `schedule_args`; `warmup_epochs` come first in any case.
    `accumulate`: batches per optimizer step. Gradients are clipped value by value (`clip_value`), then by their norm
    (`clip_norm`). `ema`: decay per step of an average of the weights, which is what is evaluated and kept. `autocast`:
    the precision of what autocast lowers; fp16 scales the loss, so that small gradients survive. `checkpointing`:
    recompute what is inside blocks in the backward pass instead of keeping it. `compile`: torch.compile, for plain nets
    only. `checkpoint_minutes`: a checkpoint also within an epoch whenever so many have passed since the last one (null:
    none); a run that is killed goes on from it exactly. `on_nan`: a loss that is not a number stops the training, or
    its step is skipped and counted; where more than half of an epoch or the last steps were skipped, it stops too.

    `train_supernet` and `retrain` do all of it but `batch_size` (batches are as given) and `checkpoint_minutes`, which
    act in a run only. Raises `ConfigError` for a value that a key does not take.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    epochs: Annotated[int, Ge(1), _NUMBER] = 30
    batch_size: Annotated[int, Ge(1), _NUMBER] = 128
    accumulate: Annotated[int, Ge(1), _NUMBER] = 1
    optimizer: str = "sgd"
    optimizer_args: dict[str, Any] = field(default_factory=dict, hash=False)
    lr: Annotated[float, Gt(0), _FINITE, _NUMBER] = 0.1
    momentum: Annotated[float, Ge(0), Lt(1), _NUMBER] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Ge(0), _FINITE, _NUMBER] = 1e-4
    schedule: str = "linear"
    schedule_args: dict[str, Any] = field(default_factory=dict, hash=False)
    warmup_epochs: Annotated[float, Ge(0), _FINITE, _NUMBER] = 0.0
    label_smoothing: Annotated[float, Ge(0), Lt(1), _NUMBER] = 0.0
    clip_value: Annotated[float, Gt(0), _NUMBER] | None = None
    clip_norm: Annotated[float, Gt(0), _NUMBER] | None = None
    ema: Annotated[float, Gt(0), Lt(1)] | None = None
    autocast: Literal["none", "bf16", "fp16"] = "none"
    channels_last: bool = False
    checkpointing: bool = False
    compile: bool = False
    on_nan: Literal["stop", "skip"] = "stop"
    checkpoint_minutes: Annotated[float, Gt(0), _NUMBER] | None = 10.0

    def __post_init__(self) -> None:
        """From Python as from a file: what cannot be is refused, and "1e-3" is a number."""
        from pydantic import ValidationError

        try:
            checked = _fields_of(type(self)).model_validate(vars(self))  # type: ignore[arg-type]
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__}: {problem_in(error.errors())}") from None
        for each in fields(self):
            object.__setattr__(self, each.name, getattr(checked, each.name))

    def warmup_rate(self, step: int, steps_per_epoch: int) -> float | None:
        """The rate of a linear warm-up at a step counted from 0; None when that is over."""
        warmup = self.warmup_epochs * steps_per_epoch
        return self.lr * (step + 1) / (warmup + 1) if step < warmup else None

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The rate of "linear", "cosine" or "step" at a step counted from 0: a warm-up, then decay to 0.

        "step" is that of ResNets: a tenth, a hundredth and a thousandth of it from 30, 60 and 90 % of the epochs on.
        """
        assert self.schedule in SCHEDULES, "others are no function of the step: see optimizers.make_schedule"
        warming = self.warmup_rate(step, steps_per_epoch)
        if warming is not None:
            return warming
        warmup = self.warmup_epochs * steps_per_epoch
        progress = (step - warmup) / max(1.0, self.epochs * steps_per_epoch - warmup)
        if self.schedule == "step":
            tenths = sum(step >= share * self.epochs * steps_per_epoch for share in (0.3, 0.6, 0.9))
            return self.lr * 0.1**tenths
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * progress)) / 2
        return self.lr * (1 - progress)


@dataclass(frozen=True)
class SupernetRecipe(Recipe):
    """Training of nets that share their weights.

    Per step the widest, the narrowest and `num_random` others (n = num_random + 2). `distill`: do the narrower nets
    learn from the widest? By soft cross-entropy (true) or by adaptive alpha-divergence ("alpha", of AlphaNet, which
    wants `clip_value: 1`: the default of a run then); "auto" means true, and false for the switches of an S-Net, as in
    the papers. `sort`: by which importance a run sorts the channels before it trains, so that narrow nets keep the best
    of trained weights (l1 if the run is `pretrained`): see `sort_channels`; first-order looks at `calibration_images`.
    `plain_epochs`: of the `epochs`, so many come first in which the whole network is trained alone, as any other; then
    the channels are sorted (by first-order, if not given), and the other epochs are those of the supernet. Where all
    of them are plain the search looks at a network that was never trained to be cut: right for short fine-tuning of
    trained weights and budgets that are not small (benchmarks/LOG.md). `sort` and `plain_epochs` act in a run;
    `train_supernet` refuses them.
    """

    num_random: Annotated[int, Ge(0), _NUMBER] = 2
    distill: bool | Literal["auto", "alpha"] = "auto"
    sort: Literal["none", "l1", "gamma", "first-order"] = "none"
    plain_epochs: Annotated[int, Ge(0), _NUMBER] = 0


@dataclass(frozen=True)
class RetrainRecipe(Recipe):
    """Training of the nets found, and of the uniform nets beside them.

    `init`: "scratch" (the paper) or "supernet" (its weights; the default of a `pretrained` run). `distill`: weight of
    the soft cross-entropy against the supernet's widest net, 0 for none. `uniform`: train a uniform-width net of equal
    cost by the same recipe, from the same start. `jointly`: train the nets of all budgets as one S-Net, as the authors
    did, and the uniform nets as another one. `retrain` trains the net that it is given, from the weights that this
    has: `init` and `uniform` act in a run, and `jointly` is refused; `distill` wants a teacher.
    """

    init: Literal["scratch", "supernet"] = "scratch"
    distill: Annotated[float, Ge(0), Le(1), _NUMBER] = 0.0
    uniform: bool = True
    jointly: bool = False
