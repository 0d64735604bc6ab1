"""Slimmable networks (Yu et al. 2018): a fixed list of widths in one network, each with BatchNorm of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from autoslim.errors import SpaceError, nearest
from autoslim.lending import Lender
from autoslim.losses import Backward, Loss, plain_backward
from autoslim.slicing import alone, check_model, cut, extract, put_back, run_subnet
from autoslim.space import ChannelSpace, Widths, name_of_ratio
from autoslim.supernet import NO_REPLICAS, backward_in_turn, runs_of, unwrapped
from autoslim.tracing import split_input

Switches = Iterable[float] | Mapping[str, Widths]


class SwitchableNet(nn.Module):
    """An S-Net: all weights shared, a private copy of every BatchNorm layer for each switch (S-Net, section 3.3).

    `switches` are width ratios, or widths by name (to train the nets that a search found together). The first is used
    until `switch(name)` chooses another; `net(x, "0.5")` runs one without choosing it. A number finds the switch of
    that ratio: 0.5 is "0.5", or "width 0.5" as a run names it. A private layer holds the channels of its switch only:
    weight, bias and running statistics alike.

    With `private=False` the switches share the model's own BatchNorm layers, running statistics too: the ablation of
    the paper, whose nets train well and fail in evaluation. Layers that are no BatchNorm are always shared.

    Of several threads one waits for the other; the plain nets of `subnet` run side by side.

    The model is used as it is, not copied; its own BatchNorm layers are not, unless `private=False`, and are in neither
    `parameters()` nor `state_dict()`. Raises `SpaceError` for a ratio or widths that the space does not have.
    """

    def __init__(self, model: nn.Module, space: ChannelSpace, switches: Switches, *, private: bool = True) -> None:
        super().__init__()
        check_model(model, space)
        self.space = space
        self.lender = Lender()
        self.is_private = private
        self.switches = _named(space, switches)
        self.shared = model
        self._layers = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
        nets = [extract(model, space, widths) for widths in self.switches.values()] if private else []
        self.norms = nn.ModuleList(_nested({name: net.get_submodule(name) for name in self._layers}) for net in nets)
        self._current = next(iter(self.switches))
        self._unused = _tensors_of_batchnorm(model, "shared") if private else frozenset()
        self.register_state_dict_post_hook(_without_unused)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_unused)  # type: ignore[no-untyped-call]

    @property
    def unused(self) -> frozenset[str]:
        """Names of the model's own BatchNorm tensors, in whose place the private ones are used."""
        return self._unused

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Of all switches, and what they share; without `unused`."""
        start = f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if name.removeprefix(start) not in self._unused:
                yield name, parameter

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.shared

    @property
    def current(self) -> str:
        """Name of the switch that is used."""
        return self._current

    @property
    def widths(self) -> Widths:
        """Widths of the switch that is used."""
        return self.switches[self._current]

    def switch(self, which: float | str) -> SwitchableNet:
        """Use this switch from now on. Costs microseconds: nothing is copied."""
        self._current = self._name(which)
        return self

    def forward(self, inputs: Any, which: float | str | None = None) -> Any:
        """Run at a switch (default: the one chosen). `inputs`: a tensor, a tuple of arguments or a mapping."""
        name = self._current if which is None else self._name(which)
        widths, (args, kwargs) = self.switches[name], split_input(inputs)
        with alone:
            given = self.private_tensors(name) if self.is_private else self._shared_statistics(widths)
            output = run_subnet(self.shared, self.space, widths, args, kwargs, given)
            if not self.is_private and self.training:
                buffers = dict(self.shared.named_buffers())
                for key, tensor in given.items():
                    put_back(buffers[key], self.space.buffers[key], widths, tensor)
        return output

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise SpaceError(NO_REPLICAS)

    def _shared_statistics(self, widths: Widths) -> dict[str, Tensor]:
        """Slices of the model's own running statistics, to be written back after a forward pass in training mode."""
        return {
            name: cut(buffer.detach(), self.space.buffers[name], widths).clone()
            for layer in self._layers
            for name, buffer in self.shared.get_submodule(layer).named_buffers(layer, recurse=False)
        }

    def private_tensors(self, which: float | str) -> dict[str, Tensor]:
        """The tensors that belong to one switch alone, under their names in the model."""
        if not self.is_private:
            return {}
        norms = self.norms[list(self.switches).index(self._name(which))]
        return {**dict(norms.named_parameters()), **dict(norms.named_buffers())}

    def subnet(self, which: float | str) -> nn.Module:
        """A plain, independent module: what the network is at one switch."""
        name = self._name(which)
        net = extract(self.shared, self.space, self.switches[name])
        private = self.private_tensors(name)
        own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        with torch.no_grad():
            for key, tensor in private.items():
                own[key].copy_(tensor)
        return net

    def _name(self, which: float | str) -> str:
        """The switch of a name or of a ratio, which a run calls "width 0.5"."""
        if not isinstance(which, (str, Real)):
            raise SpaceError(f"a switch is a ratio or a name, got {which!r}; {nearest('', self.switches)}")
        name = which if isinstance(which, str) else f"{float(which):g}"
        for each in (name, name_of_ratio(name)):
            if each in self.switches:
                return each
        raise SpaceError(f"no switch {name!r}; {nearest(name, self.switches)}")


def _tensors_of_batchnorm(model: nn.Module, prefix: str) -> frozenset[str]:
    """Names of the parameters and buffers of all BatchNorm layers, every one that a shared layer has."""
    layers = model.named_modules(prefix=prefix, remove_duplicate=False)
    return frozenset(
        f"{name}.{key}"
        for name, module in layers
        if isinstance(module, _BatchNorm)
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    )


def _without_unused(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(module, SwitchableNet)
    for name in module.unused:
        state.pop(prefix + name, None)


def _with_unused(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """What `state_dict` leaves out, and older versions did not, stays as it is."""
    assert isinstance(module, SwitchableNet)
    for name in module.unused:
        layer, _, key = name.rpartition(".")
        state[prefix + name] = getattr(module.get_submodule(layer), key)


def switch_backward(
    net: SwitchableNet | DistributedDataParallel,
    images: Any,
    targets: Any,
    *,
    loss: Loss,
    distill: bool | Loss = False,
    backward: Backward = plain_backward,
) -> dict[str, float]:
    """Forward and backward of every switch, in their order; gradients add up, no optimizer step (S-Net, algorithm 1).

    With `distill` all but the first learn from its detached output instead of from the targets; that and `backward` are
    as in `sandwich_backward`. Returns the losses by name of the switch.

    In several processes `net` may be `DistributedDataParallel(net, find_unused_parameters=True)` (no switch uses the
    private layers of another): its gradients are averaged once, during the last backward pass.
    """
    own = unwrapped(net, SwitchableNet)
    nets = runs_of(net, own, images, {name: ((name,), {}) for name in own.switches})
    return backward_in_turn(nets, targets, loss, distill, backward)


def _named(space: ChannelSpace, switches: Switches) -> dict[str, Widths]:
    if isinstance(switches, Mapping):
        named = {str(name): widths for name, widths in switches.items()}
    elif isinstance(switches, str) or not isinstance(switches, Iterable):
        raise SpaceError(f"switches are width ratios, such as [1.0, 0.5], or widths by name, got {switches!r}")
    else:
        named = named_ratios(space, list(switches))
    if not named:
        raise SpaceError("an S-Net needs at least one switch, such as 1.0")
    for name, widths in named.items():
        if not isinstance(widths, Mapping):
            raise SpaceError(f"switch {name!r} needs widths, such as space.uniform(0.5), got {widths!r}")
        space.check(widths)
    return named


def named_ratios(space: ChannelSpace, ratios: Sequence[float], name: str = "{:g}") -> dict[str, Widths]:
    """Uniform widths by name, the widest first; `SpaceError` where two would be the same net."""
    pairs = sorted(((ratio, space.uniform(ratio)) for ratio in ratios), key=lambda pair: -pair[0])
    for (wide, widths), (narrow, others) in pairwise(pairs):
        if widths == others:
            also = "given twice" if wide == narrow else f"the same widths as {wide:g} in this space, which rounds them"
            raise SpaceError(f"the ratio {narrow:g} is {also}; leave one out, or choose finer space.bins and divisor")
    return {name.format(ratio): widths for ratio, widths in pairs}


def _nested(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Modules under the same names as in the model they come from."""
    root = nn.Module()
    for name, layer in layers.items():
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(last, layer)
    return root
