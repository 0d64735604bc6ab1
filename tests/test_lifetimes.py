"""Peak memory in closed form, against tensors counted while the extracted net runs."""

from __future__ import annotations

import random
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nets
import user_nets
from autoslim import ChannelSpace, PeakMemoryCost, extract, trace
from autoslim.errors import SpaceError
from autoslim.tracing import split_input
from test_laws import EVERY, make, some_widths


class Alive(TorchDispatchMode):
    """The elements of all tensors that exist after each operator, tensors that share memory counted once."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.known, self.peak = [weakref.ref(tensor) for tensor in before], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.known += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.known = [reference for reference in self.known if reference() is not None]
        alive = [tensor for tensor in (reference() for reference in self.known) if tensor is not None]
        memory = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() // t.element_size() for t in alive}
        self.peak = max(self.peak, sum(memory.values()))
        return result


def elements_alive(net: nn.Module, inputs: Any) -> int:
    args, kwargs = split_input(inputs)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with torch.no_grad(), Alive([*net.parameters(), *net.buffers(), *given]) as alive:
        net.eval()(*args, **kwargs)
    return alive.peak


# torch's CPU computes attention in one operator; a copy of a single channel or head may be a view instead
OTHERWISE = {"multihead_attention"}
UPPER_BOUND = {
    "split_and_shuffled",
    "attention",
    "attention_of_a_transformer",
    "einsum_of_axes",
    "deviations_of_groups",
}
UNROLLED = {"recurrent", "recurrent_in_both_directions"}  # traced as one product per weight


@pytest.mark.parametrize("name", [name for name in EVERY if name not in UNROLLED])
def test_peak_memory_is_what_an_eager_run_holds(name: str) -> None:
    net, inputs = make(name)
    space = trace(net, inputs)
    peak = PeakMemoryCost(space, element_bytes=1)
    four = PeakMemoryCost(ChannelSpace.from_json(space.to_json()))
    for widths in (space.full(), *some_widths(space, 1)):
        assert four(widths) == 4 * peak(widths)
        held = elements_alive(extract(net, space, widths), inputs)
        if name in OTHERWISE or (name in UPPER_BOUND and widths != space.full()):
            assert held <= peak(widths)
        else:
            assert held == peak(widths)


@pytest.mark.parametrize("name", ["residual", "concatenated", "squeeze_excite", "autoslim:mobilenet_v2"])
def test_narrower_never_holds_more(name: str) -> None:
    net, inputs = make(name)
    space = trace(net, inputs)
    peak, rng = PeakMemoryCost(space), random.Random(3)
    for _ in range(20):
        widths = space.sample(rng)
        for group in space.groups:
            narrower = space.narrowed(widths, group)
            assert narrower is None or peak(narrower) <= peak(widths)
    assert peak(space.smallest()) < peak(space.full())


def test_what_is_held_longer_counts_longer() -> None:
    """The same layers, once with every result kept until the end."""

    def forward(m: Any, x: Tensor) -> Tensor:
        kept = [m.one(x)]
        for layer in (m.two, m.three):
            kept.append(layer(kept[-1]))
            if not m.keeps:
                kept = kept[-1:]
        return m.last(kept[-1].mean((2, 3)))

    def peak(keeps: bool) -> float:
        layers = {"one": nn.Conv2d(3, 8, 1), "two": nn.Conv2d(8, 8, 1), "three": nn.Conv2d(8, 8, 1)}
        net = user_nets.Sized(forward, {"keeps": keeps}, **layers, last=nn.Linear(8, 4))
        space = trace(net, torch.zeros(1, 3, 16, 16))
        return PeakMemoryCost(space, 1)(space.full())

    one, ends = (
        8 * 16 * 16,
        8 + 4,
    )  # with all kept, the worst moment is the last: the means and the output are there too
    assert peak(True) == peak(False) + one + ends


def test_a_space_without_lifetimes_says_so() -> None:
    space = trace(*nets.build("residual"))
    old = space.to_json().replace('"activations"', '"of another time"')
    with pytest.raises(SpaceError, match="trace the model again"):
        PeakMemoryCost(ChannelSpace.from_json(old))


def test_it_takes_well_under_a_millisecond_per_net() -> None:
    space = trace(*make("autoslim:mobilenet_v2"))
    peak, widths = PeakMemoryCost(space), space.uniform(0.5)
    started = time.process_time()
    for _ in range(20):
        peak(widths)
    assert (time.process_time() - started) / 20 < 5e-3  # 0.6 ms when nothing else runs
