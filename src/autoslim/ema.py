"""An average of the weights on their way: what is evaluated and kept, while training goes on with the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The exponential moving average of a model's tensors, with statistics of BatchNorm, as `swa_utils` computes it.

    `tensors` gives the model's own by name. The average begins with the weights after the first step; whole numbers are
    copied.
    """

    def __init__(self, tensors: Callable[[], Mapping[str, Tensor]], decay: float) -> None:
        self._own, self.decay = tensors, decay
        self.tensors: dict[str, Tensor] = {}  # empty before the first step
        self._is_shown = False
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """One more step was made."""
        own = self._own()
        if not self.tensors:
            self.tensors = {name: tensor.clone() for name, tensor in own.items()}
            return
        floats = [name for name, tensor in own.items() if tensor.is_floating_point()]
        with torch.no_grad():
            self._average([self.tensors[name] for name in floats], [own[name] for name in floats], 1)
            for name in own.keys() - set(floats):
                self.tensors[name].copy_(own[name])

    def both(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The weights that are trained, and their average: whichever of them is in the model."""
        return (self.tensors, self._own()) if self._is_shown else (self._own(), self.tensors)

    def show(self, is_shown: bool) -> None:
        """Put the average into the model, and its weights aside; or the other way round."""
        if is_shown == self._is_shown or not self.tensors:
            return
        with torch.no_grad():
            for name, tensor in self._own().items():
                other = tensor.clone()
                tensor.copy_(self.tensors[name])
                self.tensors[name] = other
        self._is_shown = is_shown
