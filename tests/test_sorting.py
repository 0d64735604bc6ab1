"""Sorting channels changes no output, and puts those that matter first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nets
from autoslim import ChannelSpace, extract, first_order, sort_channels, trace
from autoslim.errors import SpaceError
from test_laws import EVERY, call, difference, make

# the rest of torchvision has no operator that these have not
SLOW = {f"torchvision:{name}" for name in ("vgg11_bn", "resnext50_32x4d", "efficientnet_b0", "mnasnet1_0")}
NETS = [name for name in EVERY if name not in SLOW | {"draws_its_path"}]


@pytest.mark.parametrize("name", NETS)
def test_the_function_stays_the_same(name: str) -> None:
    net, inputs = make(name)
    net.eval()
    space = trace(net, inputs)
    before = call(net, inputs)
    sort_channels(net, space, example_input=inputs)
    assert difference(call(net, inputs), before) < 1e-6  # of several groups that each change nothing to 1e-9


@pytest.mark.parametrize("name", ["residual", "concatenated", "depthwise", "flattened", "squeeze_excite", "transposed"])
@pytest.mark.parametrize("importance", ["l1", "gamma"])
def test_the_most_important_channels_come_first(name: str, importance: str) -> None:
    net, inputs = nets.build(name)
    nets.randomise(net.double())
    net.eval()
    inputs = inputs.double()
    space = trace(net, inputs)
    before = call(net, inputs)
    done = sort_channels(net, space, importance)  # without a proof: labels alone are right here
    assert difference(call(net, inputs), before) < 1e-9
    if importance == "l1":
        assert set(done) == set(space.groups)
    again = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    sort_channels(net, space, importance)
    assert all(torch.equal(tensor, again[key]) for key, tensor in net.state_dict().items()), "sorted already"


def test_dead_channels_are_cut_without_loss() -> None:
    """Half of the channels produce nothing: once sorted, the net of half the width computes the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), *nets.head(12)).double().eval()
    with torch.no_grad():
        for layer, size in ((net[0], 16), (net[2], 12)):
            dead = torch.randperm(size)[: size // 2]
            layer.weight[dead] = 0
            layer.bias[dead] = 0
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    space = trace(net, x)
    expected = net(x)
    unsorted = extract(net, space, space.uniform(0.5))(x)
    assert (unsorted - expected).abs().max() > 1e-3
    assert set(sort_channels(net, space, example_input=x)) == set(space.groups)
    torch.testing.assert_close(extract(net, space, space.uniform(0.5))(x), expected, rtol=1e-12, atol=1e-12)


def test_first_order_scores_say_what_a_channel_is_worth() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *nets.head(8)).double()
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        net[4].weight[:, 5] = 0  # nobody reads channel 5, however large it is
        net[0].weight[5] = 10
    space = trace(net, x[:1])
    targets = torch.randint(0, 5, (16,))
    scores = first_order(net, space, lambda m: nn.functional.cross_entropy(m(x), targets).backward())
    assert int(scores["0"].argmin()) == 5
    assert all(parameter.grad is None for parameter in net.parameters())
    sort_channels(net, space, scores, example_input=x)
    assert bool((net[0].weight[7] == 10).all()), "it is the last now"
    sort_channels(net, space, "l1")
    assert bool((net[0].weight[0] == 10).all())


def test_mistakes_are_named_and_change_nothing() -> None:
    net, x = nets.build("plain")
    space: ChannelSpace = trace(net, x)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(SpaceError, match="known: gamma, l1"):
        sort_channels(net, space, "l2")
    group = next(iter(space.groups))
    with pytest.raises(SpaceError, match="expected shape"):
        sort_channels(net, space, {group: torch.ones(3)})
    assert sort_channels(net, space, {}) == ()
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
