"""What tracing finds, freezes, refuses and leaves alone."""

from __future__ import annotations

import copy
import math
import random
import statistics
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nets
import user_nets  # noqa: F401  # registers its nets
from autoslim import ChannelSpace, Supernet, extract, trace
from autoslim.errors import TraceError
from autoslim.rules import _viewed_together


def reasons(space: ChannelSpace) -> dict[str, str]:
    return {note.name: note.reason for note in space.notes}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", {"0.0": 8, "2.0": 12}),
        ("residual", {"stem.0": 8, "one.0.0": 6}),
        ("depthwise", {"0.0": 8, "2.0": 10}),
        ("depth_multiplier", {"0.0": 6, "2.0": 8}),
        ("grouped", {"0.0": 12, "2.0": 8}),
        ("grouped_and_shuffled", {"stem.0": 12, "one.0": 27, "three.0": 12}),
        ("concatenated", {"stem.0": 6, "one.0": 4, "two.0": 8, "head.0.0": 8}),
        ("squeeze_excite", {"stem.0": 12, "down": 4}),
        ("flattened", {"0.0": 6, "3": 20}),
        ("shared_layer", {"stem.0": 8}),
        ("layer_norm", {"stem": 8, "one": 24}),
        ("rms_norm", {"embed": 8, "one": 12}),
        ("expanded_and_joined", {"stem.0": 8, "local.0": 6, "pooled": 10, "head.0.0": 8}),
        ("group_norm", {"0": 12, "3": 6}),
        ("control_flow", {"stem.0": 8, "layers.0.0": 8, "layers.1.0": 8}),
        ("several_inputs", {"left.0": 8, "right.0": 6, "head.0.0": 8}),
        ("embedding_shared_with_the_output", {"one": 12, "two": 8}),
        ("partial_sum", {"stem.0": 6, "main.0": 4}),  # with the shortcut, and beside it
    ],
)
def test_groups(name: str, expected: dict[str, int]) -> None:
    net, inputs = nets.build(name)
    found = {group.name: group.size for group in trace(net, inputs).groups.values()}
    assert found == expected


@pytest.mark.parametrize(("name", "groups"), [("mobilenet_v2", 25), ("resnet50", 37)])
def test_the_papers_group_counts(name: str, groups: int) -> None:
    models = pytest.importorskip("torchvision").models
    space = trace(models.get_model(name, weights=None), torch.zeros(1, 3, 224, 224))
    assert len(space.groups) == groups
    assert list(reasons(space).values()) == ["its output is an output of the network"]


@pytest.mark.parametrize(
    "name",
    ["resnet50", "mobilenet_v3_large", "shufflenet_v2_x1_0", "densenet121", "googlenet", "efficientnet_b0", "vgg11_bn"],
)
def test_tracing_takes_less_than_three_seconds(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        net = models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    times = []
    for _ in range(3):
        started = time.process_time()  # tracing uses one core; what else the machine does is not its time
        trace(net, torch.zeros(1, 3, 224, 224))
        times.append(time.process_time() - started)
    assert statistics.median(times) < 3


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("hard_coded_view", "mixed.0", "view in the model's forward has the constant size 4"),
        ("stored_split", "mixed.0", "split_with_sizes in the model's forward has a constant size"),
        ("unknown_operator", "mixed.0", "the operator cummax is not understood"),
        ("written_in_place", "main.0", "slice in the model's forward has the constant bound 6"),
        ("plain", "5", "output of the network"),
    ],
)
def test_what_cannot_be_cut_is_frozen_with_its_reason(name: str, layer: str, expected: str) -> None:
    net, inputs = nets.build(name)
    space = trace(net, inputs)
    assert expected in reasons(space)[layer]
    assert layer not in space.groups
    assert space.groups  # the rest of the net is still slimmed


def test_heads_of_training_mode_are_traced_even_from_a_single_example() -> None:
    net, inputs = nets.build("auxiliary_head_with_norm")
    space = trace(net, inputs[:1])
    assert list(space.groups) == ["stem.0", "aux.1.0"]
    subnet = extract(net, space, space.smallest()).train()
    assert [tuple(output.shape) for output in subnet(inputs)] == [(2, 5), (2, 5)]


def test_layers_never_reached_are_named() -> None:
    net, inputs = nets.build("residual")
    net.unused = nn.Conv2d(3, 3, 1)
    assert reasons(trace(net, inputs))["unused"] == "it is not used in the forward pass"


def test_fixed_layers_are_left_alone_with_all_that_is_tied_to_them() -> None:
    net, inputs = nets.build("residual")
    space = trace(net, inputs, fixed=["two"])
    assert list(space.groups) == ["one.0.0"]
    assert reasons(space)["stem.0"] == "fixed by the user"
    assert list(trace(net, inputs, fixed=["*.0.0"]).groups) == ["stem.0"]
    with pytest.raises(TraceError, match="did you mean 'stem'"):
        trace(net, inputs, fixed=["stm"])


def test_nothing_about_the_model_or_the_process_changes() -> None:
    net, inputs = nets.build("control_flow")
    net.train()
    net.layers[1].eval()
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    trace(net, inputs)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


def test_meta_half_and_any_batch_give_the_same_space() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nets.MENAGERIE["residual"]()[0]

    expected = trace(net(), torch.zeros(1, 3, 8, 8))
    assert trace(net().to("meta"), torch.zeros(1, 3, 8, 8)) == expected
    assert trace(net().half(), torch.zeros(1, 3, 8, 8).half()) == expected
    assert trace(net(), (torch.zeros(1, 3, 8, 8),)) == expected
    assert trace(net(), torch.zeros(2, 3, 8, 8)).parameters == expected.parameters


def test_a_forward_that_looks_at_values_is_traced_on_real_tensors() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.head(x.relu() if float(x.detach().abs().sum()) > 0 else x)

    assert list(trace(Looks(), torch.ones(1, 4)).groups) == ["stem"]


class _Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such feature\nsecond line")


@pytest.mark.parametrize(
    ("net", "inputs", "expected"),
    [
        (object(), torch.zeros(1), "needs a torch.nn.Module, got object"),
        (lambda x: x, torch.zeros(1), "needs a torch.nn.Module, got function"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3)),
            torch.zeros(1, 1, 8, 8),
            r"does not run on the example input of shape \(1, 1",
        ),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), {"y": torch.zeros(1)}, "does not run on the example input"),
        (_Raises(), torch.zeros(1, 4), "KeyError"),
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 4), "nothing in Sequential can be slimmed"),
        (nn.ReLU(), torch.zeros(1, 4), "it has no conv or linear layer"),
    ],
)
def test_what_cannot_be_traced_is_one_clear_line(net: object, inputs: object, expected: str) -> None:
    with pytest.raises(TraceError, match=expected) as caught:
        trace(net, inputs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_two_weights_of_one_module_have_names_of_their_own() -> None:
    def forward(m: nets.Function, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.conv2d(x, m.one)
        return torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, m.two), m.three).mean((2, 3))

    net = nets.Function(
        forward,
        one=nn.Parameter(torch.randn(6, 3, 1, 1)),
        two=nn.Parameter(torch.randn(4, 6, 1, 1)),
        three=nn.Parameter(torch.randn(2, 4, 1, 1)),
    )
    assert list(trace(net, nets.image()).groups) == ["one", "two"]


def test_a_group_of_a_grouped_convolution_is_cut_whole() -> None:
    net, inputs = nets.build("grouped")
    space = trace(net, inputs)
    assert space.groups["0.0"].choices == (3, 6, 9, 12)
    assert trace(*nets.build("grouped_and_shuffled")).groups["one.0"].choices == (9, 18, 27)


def test_a_batch_of_nothing_is_traced_like_a_batch_of_one() -> None:
    net, _ = nets.build("flattened")
    assert trace(net, torch.zeros(0, 3, 8, 8).double()).groups == trace(net, torch.zeros(1, 3, 8, 8).double()).groups


def test_views_hold_the_same_elements() -> None:
    rng = random.Random(0)

    def shape(elements: int) -> list[int]:
        found = []
        while elements > 1:
            size = rng.choice([n for n in range(2, elements + 1) if elements % n == 0])
            found.append(size)
            elements //= size
        for _ in range(rng.randint(0, 2)):
            found.insert(rng.randint(0, len(found)), 1)
        return found or [1]

    for _ in range(2000):
        elements = rng.choice([1, 2, 6, 12, 24, 36, 64])
        old, new = shape(elements), shape(elements)
        for dim in range(len(old)):
            left, right = _viewed_together(old, new, dim)
            assert dim in left
            assert math.prod(old[axis] for axis in left) == math.prod(new[axis] for axis in right)
            assert math.prod(old[: left.start]) == math.prod(new[: right.start])


def test_windows_of_attention_with_a_bias_per_head_are_slimmed_throughout() -> None:
    transformers = pytest.importorskip("torchvision").models.swin_transformer
    net = transformers.SwinTransformer([4, 4], 24, [2, 2, 2], [2, 4, 8], [7, 7], num_classes=5)
    space = trace(net, torch.randn(1, 3, 64, 64))
    assert [note.name for note in space.notes] == ["head"], "the number of heads stays, each has fewer channels"
    x = torch.randn(2, 3, 64, 64)
    widths = space.sample(random.Random(0))
    subnet = extract(net.eval(), space, widths)
    with torch.no_grad():
        torch.testing.assert_close(Supernet(net, space)(x, widths), subnet(x))


@pytest.mark.parametrize("size", [8, 16, 32])
def test_a_group_that_runs_at_every_other_width_only_is_frozen(size: int) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(3, size, 3), nn.Conv2d(size // 2, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            half = x.shape[1] // 4 * 2
            return self.last(self.b(x[:, :half] * x[:, half:].sigmoid()).relu())

    space = trace(Halves(), torch.zeros(1, 3, 8, 8))
    assert list(space.groups) == ["b"]
    assert "does not run when it is cut" in reasons(space)["a"]
