"""Laws on networks nobody thought of: random chains of the ways in which channels are mixed, split and moved."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nets
from autoslim import MacCost, Supernet, extract, trace
from grading import zeroed
from test_laws import call, difference

Step = tuple[nn.Module, int]  # a module, and how many channels it gives


class Lambda(nn.Module):
    """A function of itself and its input, with layers and whole numbers as attributes."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def divisor(rng: random.Random, number: int) -> int:
    return rng.choice([n for n in range(1, number + 1) if number % n == 0])


def convolution(rng: random.Random, c: int) -> Step:
    out = rng.randint(3, 12)
    return nets.conv(c, out, rng.choice([1, 3])), out


def depthwise(rng: random.Random, c: int) -> Step:
    return nets.conv(c, c, groups=c), c


def grouped(rng: random.Random, c: int) -> Step:
    groups = divisor(rng, c)
    out = groups * rng.randint(1, 4)
    return nets.conv(c, out, 1, groups=groups), out


def residual(rng: random.Random, c: int) -> Step:
    return Lambda(lambda m, x: x + m.two(m.one(x)), one=nets.conv(c, 5), two=nets.conv(5, c)), c


def dense(rng: random.Random, c: int) -> Step:
    return Lambda(lambda m, x: torch.cat([x, m.one(x)], 1), one=nets.conv(c, 4)), c + 4


def partial(rng: random.Random, c: int) -> Step:
    kept = rng.randint(1, c - 1)
    step = Lambda(
        lambda m, x: torch.cat([m.one(x[:, : m.kept]), x[:, m.kept :]], 1), kept=kept, one=nets.conv(kept, kept)
    )
    return step, c


def parts(rng: random.Random, c: int) -> Step:
    first = rng.randint(1, c - 2)
    sizes = (first, rng.randint(1, c - first - 1))
    sizes = (*sizes, c - sum(sizes))

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b, rest = x.split(m.sizes, 1)
        return torch.cat([rest, m.one(a), b], 1)

    return Lambda(forward, sizes=sizes, one=nets.conv(first, first)), c


def halves(rng: random.Random, c: int) -> Step:
    if c % 2:
        return convolution(rng, c)
    return Lambda(
        lambda m, x: torch.cat([m.one(x.chunk(2, 1)[1]), x.chunk(2, 1)[0]], 1), one=nets.conv(c // 2, 5)
    ), 5 + c // 2


def gated(rng: random.Random, c: int) -> Step:
    if c % 2:
        return convolution(rng, c)
    return Lambda(lambda m, x: F.glu(x, 1)), c // 2


def shuffled(rng: random.Random, c: int) -> Step:
    groups = divisor(rng, c)

    def forward(m: Any, x: Tensor) -> Tensor:
        b, n, h, w = x.shape
        return x.view(b, m.groups, n // m.groups, h, w).transpose(1, 2).reshape(b, n, h, w)

    return Lambda(forward, groups=groups), c


def excited(rng: random.Random, c: int) -> Step:
    return Lambda(
        lambda m, x: x * m.two(m.one(x.mean((2, 3)))).sigmoid()[..., None, None],
        one=nn.Linear(c, 4),
        two=nn.Linear(4, c),
    ), c


def tokens(rng: random.Random, c: int) -> Step:
    def forward(m: Any, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        return m.one(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(b, -1, h, w)

    out = rng.randint(3, 9)
    return Lambda(forward, one=nn.Linear(c, out)), out


def backwards(rng: random.Random, c: int) -> Step:
    return Lambda(lambda m, x: x.flip(1)), c


def scaled(rng: random.Random, c: int) -> Step:
    return Lambda(
        lambda m, x: x * m.scale + m.shift,
        scale=nn.Parameter(torch.rand(c, 1, 1)),
        shift=nn.Parameter(torch.rand(1, c, 1, 1)),
    ), c


def activated(rng: random.Random, c: int) -> Step:
    return rng.choice([nn.PReLU(c), nn.GELU(), nn.InstanceNorm2d(c, affine=True)]), c


def padded(rng: random.Random, c: int) -> Step:
    return Lambda(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2))), c + 3


def doubled(rng: random.Random, c: int) -> Step:
    return Lambda(lambda m, x: x.repeat(1, 2, 1, 1)), 2 * c


def blurred(rng: random.Random, c: int) -> Step:
    return Lambda(
        lambda m, x: F.conv2d(x, m.kernel.expand(m.channels, 1, 3, 3), padding=1, groups=m.channels),
        channels=c,
        kernel=nn.Parameter(torch.rand(1, 1, 3, 3)),
    ), c


STEPS = (convolution, depthwise, grouped, residual, dense, partial, parts, halves, gated, shuffled, excited, tokens)
STEPS += (backwards, scaled, activated, padded, doubled, blurred)


def random_net(seed: int) -> nn.Module:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels = rng.randint(4, 12)
    layers: list[nn.Module] = [nets.conv(3, channels)]
    for _ in range(rng.randint(2, 6)):
        layer, channels = rng.choice(STEPS)(rng, channels)
        layers.append(layer)
        if channels < 4 or channels > 40:
            layers.append(nets.conv(channels, 8, 1))
            channels = 8
    net = nn.Sequential(*layers, *nets.head(channels))
    nets.randomise(net.double())
    return net


@pytest.mark.parametrize("seed", range(80))
def test_laws_hold_for_random_networks(seed: int) -> None:
    net, inputs = random_net(seed).eval(), nets.image(size=5, batch=1).double()
    space = trace(net, inputs)
    supernet = Supernet(net, space).eval()
    macs = MacCost(space)
    rng = random.Random(seed)
    assert torch.equal(supernet(inputs), net(inputs))
    for widths in (space.smallest(), space.sample(rng), space.sample(rng)):
        subnet = extract(net, space, widths).eval()
        expected = call(subnet, inputs)
        assert difference(call(lambda x, w=widths: supernet(x, w), inputs), expected) < 1e-9
        if not space.mixing:
            assert difference(call(zeroed(net, space, widths), inputs), expected) < 1e-9
        with FlopCounterMode(display=False) as counter:
            subnet(inputs)
        assert macs(widths) == counter.get_total_flops() / 2
    assert math.prod(len(group.choices) for group in space.groups.values()) > 1
