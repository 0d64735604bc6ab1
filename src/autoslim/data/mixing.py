"""MixUp and CutMix: each image of a batch blended with another, and labels as shares of classes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autoslim.data.randomness import derived_seed, preserved, reseed
from autoslim.errors import ConfigError, DataError, nearest

_USUAL = {"mixup": 0.2, "cutmix": 1.0}  # alpha of the Beta distribution, as published for ImageNet


@dataclass(frozen=True)
class Mixing:
    """One way to mix, and the alpha of its Beta distribution."""

    name: str
    alpha: float


def parse_mix(text: str) -> tuple[Mixing, ...]:
    """What `text` asks for: `none`, `mixup`, `cutmix`, either with `:ALPHA`, or both, of which each batch takes one.

    `ConfigError` with the nearest name for an unknown one. Without a number alpha is 0.2 and 1, as in the papers
    (Zhang et al. 2018, Yun et al. 2019).
    """
    names = [name.strip() for name in text.split(",")]
    if names == ["none"]:
        return ()
    found = []
    for given in names:
        name, colon, number = given.partition(":")
        if name not in _USUAL:
            raise ConfigError(f"no mixing {name!r} in {text!r}; {nearest(name, [*_USUAL, 'none'])}")
        try:
            alpha = float(number) if colon else _USUAL[name]
        except ValueError:
            alpha = math.nan
        if not 0 < alpha < math.inf:
            raise ConfigError(f"mixing {given!r}: write {name}:ALPHA with a number above 0, such as {_USUAL[name]:g}")
        found.append(Mixing(name, alpha))
    if len({each.name for each in found}) < len(found):
        raise ConfigError(f"mixing {text!r} names one twice")
    return tuple(found)


class Mixer:
    """Mixes batches by torchvision's MixUp and CutMix; which, and how much, depends on the seeds given with a batch."""

    def __init__(self, mixings: tuple[Mixing, ...], num_classes: int) -> None:
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise DataError("mixing images needs torchvision: pip install 'autoslim[vision]'") from error
        kinds: dict[str, Callable[..., Any]] = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
        self._transforms = [kinds[each.name](alpha=each.alpha, num_classes=num_classes) for each in mixings]

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, *seeds: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) float and labels (B,) to mixed images and labels (B, K) float32 that sum to 1."""
        chosen = random.Random(derived_seed(*seeds)).choice(self._transforms)
        with preserved():
            reseed(*seeds)
            mixed, shares = chosen(images, labels)
        return mixed, shares
