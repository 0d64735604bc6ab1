"""What a user may tell tracing, and what tracing tells of models that are out of the ordinary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nets
import user_nets  # noqa: F401  # registers its nets
from autoslim import ChannelSpace, extract, trace
from autoslim.errors import TraceError


def running_maximum(axis: int) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.cummax(m.mixed(m.stem(x)), axis).values)

    return nets.Function(forward, stem=nets.conv(3, 8), mixed=nets.conv(8, 6), head=nn.Sequential(*nets.head(6)))


def test_tied_layers_share_a_group() -> None:
    net, inputs = nn.Sequential(nets.conv(3, 8), nets.conv(8, 8), *nets.head(8)), nets.image()
    assert len(trace(net, inputs).groups) == 2
    space = trace(net, inputs, tie=[["0.0", "1.0"]])
    assert {name: group.size for name, group in space.groups.items()} == {"0.0": 8}
    subnet = extract(net, space, space.smallest())
    assert subnet[0][0].out_channels == subnet[1][0].out_channels == 1


def test_what_is_tied_to_a_fixed_layer_is_fixed() -> None:
    net, inputs = nn.Sequential(nets.conv(3, 8), nets.conv(8, 8), nets.conv(8, 4), *nets.head(4)), nets.image()
    assert list(trace(net, inputs, tie=[("0.0", "1.0")], fixed=["0"]).groups) == ["2.0"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tie": [["0.0"]]}, "lists of at least two layers"),
        ({"tie": ["0.0"]}, "lists of at least two layers"),
        ({"tie": [["0.0", "1.9"]]}, "no module is named '1.9'; did you mean"),
        ({"tie": [["0.0", "1.1"]]}, "'1.1' is no conv or linear layer"),
        ({"tie": [["0.0", "1.0"]]}, "have 8 and 6 output channels"),
        ({"free": ["stem"]}, "free: no module is named 'stem'"),
        ({"fixed": "stem"}, "fixed: no module is named 'stem'"),
    ],
)
def test_wrong_names_and_sizes_are_one_clear_line(options: dict[str, Any], expected: str) -> None:
    net, inputs = nn.Sequential(nets.conv(3, 8), nets.conv(8, 6), *nets.head(6)), nets.image()
    with pytest.raises(TraceError, match=expected) as caught:
        trace(net, inputs, **options)
    assert "\n" not in str(caught.value)


def test_free_channels_pass_through_an_operator_without_a_rule() -> None:
    net, inputs = running_maximum(2).double().eval(), nets.image().double()
    assert list(trace(net, inputs).groups) == ["stem.0"]
    space = trace(net, inputs, free=["mixed"])
    assert list(space.groups) == ["stem.0", "mixed.0"]
    widths = space.uniform(0.5)
    subnet = extract(net, space, widths).eval()
    full = net.mixed(net.stem(inputs))
    assert subnet.mixed(subnet.stem(inputs)).shape[1] == 3
    assert full.shape[1] == 6
    assert subnet(inputs).shape == net(inputs).shape


def test_free_is_not_believed_where_the_operator_mixes_channels() -> None:
    space = trace(running_maximum(1), nets.image(), free=["mixed.0"])
    assert list(space.groups) == ["stem.0"]
    note = next(note for note in space.notes if note.name == "mixed.0")
    assert "does not treat channels one by one" in note.reason


def test_an_unknown_operator_is_named_with_its_line_and_a_remedy() -> None:
    note = next(note for note in trace(running_maximum(2), nets.image()).notes if note.name == "mixed.0")
    assert "cummax" in note.reason
    assert note.line.startswith("tests/test_overrides.py:")
    assert "`free`" in note.remedy
    assert "docs/tracing.md" in note.remedy


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("looks_at_values", "does not run on the meta device (RuntimeError: Tensor.item() cannot be called"),
        ("stays_on_the_cpu", "traced on fake tensors"),
        ("draws_its_path", "draws random numbers in its forward pass: traced along one path"),
    ],
)
def test_how_a_model_had_to_be_traced_is_said(name: str, expected: str) -> None:
    space = trace(*nets.build(name))
    assert expected in " ".join(space.remarks)
    assert ChannelSpace.from_json(space.to_json()) == space


def test_ordinary_models_need_no_remark() -> None:
    space = trace(*nets.build("residual"))
    assert space.remarks == space.mixing == ()


@pytest.mark.parametrize("name", ["layer_norm", "attention_along_channels", "shuffled_units"])
def test_operators_that_see_all_channels_are_listed(name: str) -> None:
    assert trace(*nets.build(name)).mixing


def test_a_module_under_two_names_is_put_back() -> None:
    """torch.func.functional_call leaves such a module with its replacement."""
    from autoslim import Supernet

    shared = nn.Conv2d(6, 6, 1)
    net = nn.Sequential(nets.conv(3, 6), shared, nn.Sequential(nn.ReLU(), shared), *nets.head(6))
    space = trace(net, nets.image())
    supernet = Supernet(net, space).eval()
    supernet(nets.image(), space.smallest())
    assert net[1].weight.shape == (6, 6, 1, 1)
    assert extract(net, space, space.smallest())[1].weight.shape == (1, 1, 1, 1)


def test_a_model_that_keeps_what_it_computed_for_its_last_input_can_be_cut_afterwards() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nets.conv(3, 6), nn.Sequential(*nets.head(6))
            self.register_buffer("grid", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            if self.grid.shape[-1] != x.shape[-1]:
                self.grid = torch.linspace(0, 1, x.shape[-1], device=x.device)
            return self.head(self.stem(x) * self.grid)

    net = Keeps().eval()
    space = trace(net, nets.image())
    expected = net(nets.image())
    assert extract(net, space, space.full()).eval()(nets.image()).equal(expected)
    assert extract(net, space, space.smallest()).stem[0].out_channels == 1


def test_a_lazy_layer_is_refused_with_the_way_out() -> None:
    net = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), *nets.head(8))
    with pytest.raises(TraceError) as caught:
        trace(net, nets.image())
    assert "\n" not in str(caught.value)
    assert "run Sequential once" in str(caught.value)
