"""How a network is trained, as data: plain Python, so that the configuration can hold it without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum on a schedule per step, as in the papers. `epochs` counts passes over the training images."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    epochs: Annotated[int, Ge(1)] = 30
    batch_size: Annotated[int, Ge(1)] = 128
    lr: Annotated[float, Gt(0)] = 0.1
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    schedule: Literal["linear", "cosine", "step"] = "linear"
    warmup_epochs: Annotated[float, Ge(0)] = 0.0
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    clip_value: Annotated[float, Gt(0)] | None = None  # gradients beyond it are clipped, value by value
    autocast: Literal["none", "bf16"] = "none"
    channels_last: bool = False

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The rate at a step counted from 0: a linear warm-up, then linear or cosine decay to 0.

        "step" is that of ResNets: a tenth, a hundredth and a thousandth of it from 30, 60 and 90 % of the epochs on.
        """
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
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
    wants `clip_value: 1`); "auto" means true, and false for the switches of an S-Net, as in the papers. `sort`: by
    which importance a run sorts the channels before it trains, so that narrow nets keep the best of trained weights
    (l1 if the run is `pretrained`): see `sort_channels`; first-order looks at `calibration_images`.
    """

    num_random: Annotated[int, Ge(0)] = 2
    distill: bool | Literal["auto", "alpha"] = "auto"
    sort: Literal["none", "l1", "gamma", "first-order"] = "none"


@dataclass(frozen=True)
class RetrainRecipe(Recipe):
    """Training of the nets found, and of the uniform nets beside them.

    `init`: "scratch" (the paper) or "supernet" (its weights; the default of a `pretrained` run). `distill`: weight of
    the soft cross-entropy against the supernet's widest net, 0 for none. `uniform`: train a uniform-width net of equal
    cost by the same recipe, from the same start. `jointly`: train the nets of all budgets as one S-Net, as the authors
    did, and the uniform nets as another one.
    """

    init: Literal["scratch", "supernet"] = "scratch"
    distill: Annotated[float, Ge(0), Le(1)] = 0.0
    uniform: bool = True
    jointly: bool = False
