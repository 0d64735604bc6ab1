"""Sorting channels changes no output, and puts those that matter first."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import nets
from autoslim import ChannelSpace, extract, first_order, sort_channels, trace
from autoslim.errors import SpaceError
from autoslim.sorting import output_dims
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


def test_the_example_stays_as_it_is_where_the_model_writes_into_it() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *nets.head(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.body(x.mul_(2))
            return y

    x = torch.rand(2, 3, 8, 8)
    net = Writes()
    space = trace(net, x[:1].clone())
    for example in (x.clone(), x.double()):
        assert sort_channels(net, space, example_input=example) == tuple(space.groups)
        assert torch.equal(example.float(), x)


class Products(nn.Module):
    """Weights that its own code multiplies, from the left and from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.one, self.two = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(12, 16))
        self.square, self.last = nn.Parameter(torch.randn(12, 12)), nn.Parameter(torch.randn(12, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (self.conv(x).relu().mean((2, 3)) @ self.one).relu()
        x = nn.functional.linear(x, self.two)
        return (x + (x @ self.square).relu()) @ self.last


def test_of_a_product_the_weights_that_produce_a_channel_count_whichever_axis_they_lie_along() -> None:
    torch.manual_seed(0)
    net, x = Products(), torch.rand(4, 3, 8, 8)
    space = trace(net, x[:1])
    # both axes of `square` are the same channels: which of them it makes is not known
    assert output_dims(net, space) == {"conv.weight": 0, "one": 1, "two": 0, "last": 1}
    assert set(sort_channels(net, space, example_input=x)) == {"conv", "one", "two"}
    for sums in (net.conv.weight.abs().sum((1, 2, 3)), net.one.abs().sum(0), net.two.abs().sum(1)):
        assert torch.equal(sums, sums.sort(descending=True).values)


@pytest.mark.parametrize(
    "parametrized", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_under_a_parametrization_the_weight_that_the_layer_has_counts(
    parametrized: Callable[[nn.Module], nn.Module], kind: type[nn.Conv2d]
) -> None:
    torch.manual_seed(0)
    layer, x = parametrized(kind(3, 8, 3)), torch.rand(2, 3, 8, 8)
    net = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():  # weight_norm has no use for the scale of these
        original = list(layer.parametrizations["weight"].parameters())[-1]
        original.mul_(torch.arange(1.0, len(original) + 1).view(-1, 1, 1, 1))
    space = trace(net, x[:1])
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    sums = net.eval()[0].weight.abs().sum((1 if kind is nn.Conv2d else 0, 2, 3)).detach()
    assert sort_channels(net.train(), space, example_input=x) == ("0",)
    assert all(module.training for module in net.modules())
    torch.testing.assert_close(
        net.eval()[0].weight.abs().sum((1 if kind is nn.Conv2d else 0, 2, 3)).detach(), sums.sort(descending=True)[0]
    )
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer.sort()[0], before[name].sort()[0]), "another order at most"


def test_another_default_device_is_of_no_matter() -> None:
    net, x = nets.build("plain")
    space = trace(net, x)
    twin = copy.deepcopy(net)
    order = {name: list(range(group.size)) for name, group in space.groups.items()}
    with torch.device("meta"):
        done = sort_channels(net, space)
        assert sort_channels(net, space, order) == done  # type: ignore[arg-type]
    assert sort_channels(twin, space) == done == tuple(space.groups)
    sort_channels(twin, space, order)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in net.state_dict().items())
