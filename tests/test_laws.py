"""Laws of every subnet, over random widths: the menagerie, our networks, and torchvision's."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import nets
import user_nets  # noqa: F401  # registers its nets
from autoslim import (
    ChannelSpace,
    MacCost,
    MemoryCost,
    ParamCost,
    Supernet,
    Widths,
    active_attributes,
    active_tensors,
    extract,
    trace,
    zoo,
)
from autoslim.slicing import cut
from autoslim.space import Axis
from autoslim.tracing import split_input, tensors_in
from grading import zeroed

TORCHVISION = (
    *("resnet50", "mobilenet_v2", "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0", "densenet121", "vgg11_bn"),
    *("squeezenet1_1", "googlenet", "resnext50_32x4d", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny"),
)
OURS = ("mobilenet_v1", "mobilenet_v2", "mnasnet", "shufflenet_v1", "shufflenet_v2", "resnet50", "resnet20")
EVERY = [*nets.MENAGERIE, *(f"autoslim:{name}" for name in OURS), *(f"torchvision:{name}" for name in TORCHVISION)]
NOT_ZEROABLE = {*nets.MENAGERIE} - nets.ZEROABLE | {"torchvision:convnext_tiny"}
NOT_ZEROABLE |= {"torchvision:shufflenet_v2_x1_0", "autoslim:shufflenet_v1", "autoslim:shufflenet_v2"}


def make(name: str) -> nets.Case:
    """A network of any family, in double precision with random statistics, and a small input."""
    family, _, short = name.partition(":")
    if not short:
        return nets.build(name)
    torch.manual_seed(0)
    if family == "autoslim":
        options = {"num_classes": 10} if short == "resnet20" else {"num_classes": 10, "stem_stride": 1}
        width = 1.0 if short in ("shufflenet_v1", "shufflenet_v2", "resnet20") else 0.25
        net, x = getattr(zoo, short)(width, **options), torch.randn(2, 3, 32, 32)
    else:
        models = pytest.importorskip("torchvision").models
        options = {"init_weights": False} if short == "googlenet" else {}
        net, x = models.get_model(short, weights=None, **options), torch.randn(2, 3, 64, 64)
    nets.randomise(net.double())
    return net, x.double()


def some_widths(space: ChannelSpace, count: int = 2) -> Iterator[Widths]:
    rng = random.Random(1)
    yield space.smallest()
    for _ in range(count):
        yield space.sample(rng)
    yield space.with_choices(4, 2, 0.3).sample(rng)


def call(net: Any, inputs: Any) -> list[Tensor]:
    args, kwargs = split_input(inputs)
    torch.manual_seed(11)  # for dropout in training mode
    return list(tensors_in(net(*args, **kwargs)))


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    assert [a.shape for a in one] == [b.shape for b in other]
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1.0))
        for a, b in zip(one, other, strict=True)
    )


# nets that compute with functions, where no hook sees what comes out, and one in which torch counts no product by one
NO_MODULES = {"functional", "embedding_shared_with_the_output", "multihead_attention", "blur_from_a_buffer"}
NO_MODULES |= {
    "parameters_in_a_list",
    "einsum_of_axes",
    "weight_standardised",
    "recurrent",
    "recurrent_in_both_directions",
}
NOT_COUNTED = {"einsum_of_axes"}


@pytest.mark.parametrize("name", EVERY)
def test_a_subnet_is_the_extracted_net_and_costs_what_is_said(name: str) -> None:
    net, inputs = make(name)
    space = trace(net, inputs)
    net.eval()
    supernet = Supernet(net, space)
    plain = call(net, inputs)
    widest = call(lambda *a, **k: supernet(a if a else k), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, widest, strict=True))
    assert supernet.state_dict().keys() == net.state_dict().keys()
    assert ChannelSpace.from_json(space.to_json()) == space
    macs, params, memory = MacCost(space), ParamCost(space), MemoryCost(space)
    for widths in some_widths(space):
        subnet = extract(net, space, widths).eval()
        assert type(subnet) is type(net)
        expected = call(subnet, inputs)
        with active_attributes(net, space, widths):
            tensors = active_tensors(net, space, widths)
            actual = call(lambda *a, t=tensors, **k: functional_call(net, t, a, k), inputs)
        assert difference(actual, expected) < 1e-9
        assert difference(call(lambda *a, w=widths, **k: supernet(a if a else k, w), inputs), expected) < 1e-9
        if name not in NOT_ZEROABLE:
            assert not space.mixing
            assert difference(call(zeroed(net, space, widths), inputs), expected) < 1e-9
        outputs: list[int] = []
        # torch's counter does not know the fused attention of the CPU
        with FlopCounterMode(display=False) as counter, _Counting(subnet, outputs), sdpa_kernel(SDPBackend.MATH):
            call(subnet, inputs)
        assert macs(widths) == counter.get_total_flops() / 2 or name in NOT_COUNTED
        assert params(widths) == sum(p.numel() for p in subnet.parameters())
        if name not in NO_MODULES:
            assert memory(widths) == params(widths) + sum(outputs)
    assert all(torch.equal(a, b) for a, b in zip(call(net, inputs), plain, strict=True))


class _Counting:
    """Elements that convolutions and linear layers give, by hooks."""

    def __init__(self, net: nn.Module, found: list[int]) -> None:
        kinds = (nn.modules.conv._ConvNd, nn.Linear)
        self.handles = [
            module.register_forward_hook(lambda m, a, out: found.append(out.numel()))
            for module in net.modules()
            if isinstance(module, kinds)
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_the_extracted_net_and_stay_in_the_active_slice(name: str) -> None:
    net, inputs = make(name)
    space = trace(net, inputs)
    widths = space.sample(random.Random(2))
    widths = space.smallest() if widths == space.full() else widths  # the widest net updates statistics, as it should
    subnet = extract(net, space, widths)
    buffers = {key: tensor.clone() for key, tensor in net.named_buffers()}
    supernet = Supernet(net, space)
    for module in (supernet, subnet):
        module.train()
    mine = call(lambda *a, **k: supernet(a if a else k, widths), inputs)
    theirs = call(subnet, inputs)
    assert difference(mine, theirs) < 1e-9
    for outputs in (mine, theirs):
        sum((out**2).sum() for out in outputs if out.is_floating_point()).backward()
    cut_gradients = {key: parameter.grad for key, parameter in subnet.named_parameters()}
    for key, parameter in net.named_parameters():
        expected = cut_gradients[key]
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any()
            continue
        active = cut(parameter.grad, space.parameters[key], widths)
        assert float((active - expected).abs().max()) <= 1e-9 * float(expected.abs().max().clamp_min(1.0))
        assert int((parameter.grad != 0).sum()) == int((active != 0).sum())
    for key, tensor in net.named_buffers():
        assert torch.equal(tensor, buffers[key]), f"a narrow net changed the user's buffer {key}"


@pytest.mark.parametrize("name", ["concatenated", "flattened", "grouped", "split_and_shuffled"])
def test_the_zeroing_law_catches_a_wrong_index_map(name: str) -> None:
    """A space in which the positions of one consumer are reversed must break it: the law can fail."""
    net, inputs = make(name)
    space = trace(net, inputs)
    widths = Widths((key, group.choices[len(group.choices) // 2 - 1]) for key, group in space.groups.items())
    key = next(k for k, axes in space.parameters.items() if len(axes) > 1 and axes[1].groups)
    if name == "grouped":
        key = "1.1.weight"
    axes = space.parameters[key]
    at = 0 if name == "grouped" else 1
    ranks = [
        (span.group, span.start + (i // span.repeat) * span.step) for span in axes[at].spans for i in range(span.size)
    ]
    wrong = Axis.from_ranks(reversed(ranks))
    changed = {**space.parameters, key: (*axes[:at], wrong, *axes[at + 1 :])}
    broken = dataclasses.replace(space, parameters=changed)
    expected = call(zeroed(net.eval(), space, widths), inputs)
    assert difference(call(extract(net, space, widths).eval(), inputs), expected) < 1e-9
    assert difference(call(extract(net, broken, widths).eval(), inputs), expected) > 1e-6
