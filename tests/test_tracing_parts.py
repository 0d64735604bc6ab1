"""Tensors taken apart and written together by hand: slices, padding, indices, orders; and why what stays does."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from autoslim import ChannelSpace, MacCost, Supernet, extract, sort_channels, trace
from autoslim.atoms import Mismatch
from autoslim.errors import TraceError
from autoslim.rules import _TABLE
from autoslim.tracing import _unlike
from grading import zeroed
from nets import Case, Function, conv, head, image, randomise
from test_laws import call, difference, some_widths

Middle = Callable[[Any, Tensor], Tensor]


def around(middle: Middle, channels: int = 8, **modules: Any) -> Case:
    """A net that does something between a convolution of 8 channels and one that reads `channels`."""
    net = Function(
        lambda m, x: m.head(middle(m, m.stem(x))),
        stem=conv(3, 8),
        head=nn.Sequential(conv(channels, 6), *head(6)),
        **modules,
    )
    return net, image()


def obeys_the_laws(net: nn.Module, x: Tensor, *, is_counted: bool = True) -> ChannelSpace:
    """The space of a net: subnets in place are those extracted, cost what is said, and what is cut is as good as 0.

    `is_counted`: does torch count all of its products?
    """
    randomise(net.double())
    net, x = net.eval(), x.double()
    space = trace(net, x)
    supernet, macs = Supernet(net, space), MacCost(space)
    torch.set_default_dtype(torch.float64)
    try:
        for widths in some_widths(space):
            subnet = extract(net, space, widths).eval()
            with FlopCounterMode(display=False) as counter:
                expected = call(subnet, x)
            assert difference(call(lambda *a, w=widths: supernet(*a, w), x), expected) < 1e-9
            assert macs(widths) == counter.get_total_flops() / 2 or not is_counted
            if not space.mixing:
                assert difference(call(zeroed(net, space, widths), x), expected) < 1e-9
    finally:
        torch.set_default_dtype(torch.float32)
    return space


def sizes(space: ChannelSpace) -> dict[str, int]:
    return {group.name: group.size for group in space.groups.values()}


def reasons(space: ChannelSpace) -> dict[str, str]:
    return {note.name: note.reason for note in space.notes if "output of the network" not in note.reason}


# --- slices, and what is written into them ------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_with_circular_padding_are_understood(dims: int) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    convs = [layer(a, b, 3, padding=1, padding_mode="circular") for a, b in ((3, 8), (8, 6))]
    net = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), layer(6, 5, 1))
    space = obeys_the_laws(net, torch.randn(2, 3, *[6] * dims))
    assert sizes(space) == {"0": 8, "2": 6}
    assert [note.name for note in space.notes] == ["4"]


def _pad_by_hand(m: Any, y: Tensor) -> Tensor:
    z = y.new_zeros(y.shape[0], y.shape[1], y.shape[2] + 2, y.shape[3] + 2)
    z[:, :, 1:-1, 1:-1] = y
    return z


def _pad_by_sums(m: Any, y: Tensor) -> Tensor:
    (h, w), p = y.shape[2:], 1
    z = y.new_zeros(*y.shape[:2], h + 2 * p, w + 2 * p)
    z[:, :, p : p + h, p : p + w] = y
    return z


def _pad_narrowed(m: Any, y: Tensor) -> Tensor:
    z = torch.zeros(*y.shape[:2], 10, 10, dtype=y.dtype, device=y.device)
    z.narrow(2, 1, 8).narrow(3, 1, 8).copy_(y)
    return z


def _pad_a_view(m: Any, y: Tensor) -> Tensor:
    z = y.new_zeros(y.shape[0], 10, 10, y.shape[1]).permute(0, 3, 1, 2)
    z[:, :, 1:-1, 1:-1] = y
    return z


def _part_taken_before(m: Any, y: Tensor) -> Tensor:
    rows = y.new_empty(*y.shape[:2], 10, 8)[:, :, 1:-1]
    rows[:, :, :, :4] = y[..., :4]
    rows[:, :, :, 4:] = y[..., 4:]
    return rows


def _every_other_place(m: Any, y: Tensor) -> Tensor:
    z = y.new_zeros(*y.shape[:2], 16, 16)
    z[:, :, ::2, ::2] = y
    z[:, :, 1::2, 1::2] = m.more(y)
    return z


def _sample_by_sample(m: Any, y: Tensor) -> Tensor:
    z = y.new_empty(y.shape)
    for i in range(len(y)):
        z[i] = m.more(y[i : i + 1])[0]
    return z


def _positions(m: Any, y: Tensor) -> Tensor:
    tokens = y.flatten(2).transpose(1, 2)
    offset, length = m.pad.padding[0], tokens.shape[1]
    tokens = tokens + m.embedding[:, offset : offset + length] + m.embedding.narrow(1, offset, length)
    return tokens.transpose(1, 2).reshape(y.shape)


@pytest.mark.parametrize(
    ("middle", "modules"),
    [
        (lambda m, y: F.pad(y, (1, 1, 2, 2), mode="circular"), {}),
        (lambda m, y: m.pad(y), {"pad": nn.CircularPad2d(1)}),
        (_pad_by_hand, {}),
        (_pad_by_sums, {}),
        (_pad_narrowed, {}),
        (_pad_a_view, {}),
        (_part_taken_before, {}),
        (_every_other_place, {"more": conv(8, 8)}),
        (_sample_by_sample, {"more": conv(8, 8)}),
        (_positions, {"embedding": nn.Parameter(torch.randn(1, 96, 8)), "pad": nn.ZeroPad2d(16)}),
    ],
)
def test_parts_of_maps_are_written_without_freezing_channels(middle: Middle, modules: dict[str, Any]) -> None:
    space = obeys_the_laws(*around(middle, **modules))
    assert sizes(space) == {"stem.0": 8, "head.0.0": 6}
    assert not reasons(space)


def test_a_net_padded_by_hand_is_slimmed_throughout() -> None:
    net = Function(
        lambda m, x: m.h(m.e(m.d(_pad_by_hand(m, m.c(x)))).mean((2, 3))),
        c=nn.Conv2d(3, 8, 3, padding=1),
        d=nn.Conv2d(8, 12, 3),
        e=nn.Conv2d(12, 10, 1),
        h=nn.Linear(10, 5),
    )
    assert sizes(obeys_the_laws(net, image())) == {"c": 8, "d": 12, "e": 10}


def _joined(m: Any, y: Tensor) -> Tensor:
    parts, at = [y, m.more(y), m.most(y)], 0
    z = y.new_zeros(y.shape[0], sum(part.shape[1] for part in parts), *y.shape[2:])
    for part in parts:
        z[:, at : at + part.shape[1]] = part
        at = at + part.shape[1]
    return z


def test_channels_written_beside_each_other_are_those_of_a_concatenation() -> None:
    net, x = around(_joined, 20, more=conv(8, 5), most=conv(8, 7))
    space = obeys_the_laws(net, x)
    assert sizes(space) == {"stem.0": 8, "more.0": 5, "most.0": 7, "head.0.0": 6}
    cat = Function(
        lambda m, x: m.head(torch.cat([y := m.stem(x), m.more(y), m.most(y)], 1)),
        **{name: getattr(net, name) for name in ("stem", "more", "most", "head")},
    )
    assert trace(cat, x.double()).parameters == space.parameters


def test_what_is_written_where_it_cannot_be_followed_is_frozen() -> None:
    def middle(m: Any, y: Tensor) -> Tensor:
        z = y.new_zeros(y.shape[0] * 8, *y.shape[2:])
        z.view(y.shape[0], 8, -1)[:, :, 1:] = y.flatten(2)[:, :, 1:]
        return z.view(-1, 8, *y.shape[2:])

    space = obeys_the_laws(*around(middle))
    assert sizes(space) == {"head.0.0": 6}
    assert "written in place into a part of another tensor by copy_" in reasons(space)["stem.0"]


@pytest.mark.parametrize(
    ("middle", "channels", "group", "choices"),
    [
        (lambda m, y: y[:, 1 : y.shape[1] - 1], 6, 6, 6),
        (lambda m, y: y[:, 2 : y.shape[1] - 2], 4, 4, 4),
        (lambda m, y: y[:, : y.shape[1] - 1], 7, 7, 7),
        (lambda m, y: y[:, y.shape[1] // 4 : y.shape[1] - y.shape[1] // 4], 4, 8, 2),
        (lambda m, y: y.narrow(1, y.shape[1] // 4, y.shape[1] // 2), 4, 8, 2),
        (lambda m, y: y.narrow(1, 2, 4), 4, 2, 2),
        (lambda m, y: torch.cat(y.tensor_split(4, 1)[::-1], 1), 8, 8, 2),
        (lambda m, y: y[:, 1 : y.shape[1] - 1].sum(1, keepdim=True).expand_as(y) + y, 8, 6, 6),
    ],
)
def test_slices_of_channels_with_two_bounds(middle: Middle, channels: int, group: int, choices: int) -> None:
    space = obeys_the_laws(*around(middle, channels))
    assert space.groups["stem.0"].size == group
    assert len(space.groups["stem.0"].choices) == choices


def test_unequal_parts_of_channels_are_frozen_with_the_reason() -> None:
    space = obeys_the_laws(*around(lambda m, y: torch.cat(y.tensor_split(5, 1)[::-1], 1)))
    assert sizes(space) == {"head.0.0": 6}
    assert reasons(space)["stem.0"].startswith("slice in the model's forward has a bound that is worked out")


@pytest.mark.parametrize("is_raised", [True, False])
def test_a_rule_whose_labels_do_not_line_up_freezes_what_meets_there(
    monkeypatch: pytest.MonkeyPatch, is_raised: bool
) -> None:
    def wrong(rec: Any, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if is_raised:
            raise Mismatch("silu: 8 channels meet 1")
        rec.set(out, [labels if labels is None else labels[:3] for labels in rec.labels(args[0])])

    monkeypatch.setitem(_TABLE, "silu", wrong)
    space = obeys_the_laws(*around(lambda m, y: F.silu(y)))
    assert sizes(space) == {"head.0.0": 6}
    assert reasons(space)["stem.0"].startswith("channels do not line up in the operator silu")


# --- orders of channels ---------------------------------------------------------------------------------------------


def _triangle(m: Any, y: Tensor) -> Tensor:
    ones = torch.ones(y.shape[1], y.shape[1], dtype=y.dtype, device=y.device)
    return torch.einsum("oc,bchw->bohw", ones.tril(), y)


ORDERED: dict[str, Middle] = {
    "arange": lambda m, y: y * torch.arange(y.shape[1], device=y.device).view(1, -1, 1, 1),
    "from one": lambda m, y: y * torch.arange(1, y.shape[1] + 1, device=y.device).view(1, -1, 1, 1),
    "linspace": lambda m, y: y * torch.linspace(0, 1, y.shape[1], device=y.device).view(1, -1, 1, 1),
    "more than there are": lambda m, y: y * torch.linspace(0, 1, y.shape[1] + 1, device=y.device)[1:].view(1, -1, 1, 1),
    "logspace": lambda m, y: y * torch.logspace(0, 1, y.shape[1], device=y.device).view(1, -1, 1, 1),
    "cumsum": lambda m, y: y * torch.ones(y.shape[1], device=y.device).cumsum(0).view(1, -1, 1, 1),
    "tril": _triangle,
    "triu of a weight": lambda m, y: torch.einsum("oc,bchw->bohw", m.weight.triu(), y),
}


@pytest.mark.parametrize("name", ORDERED)
def test_sorting_warns_where_channels_are_told_apart_by_their_numbers(name: str) -> None:
    net, x = around(ORDERED[name], weight=nn.Parameter(torch.randn(8, 8)))
    space = obeys_the_laws(net, x, is_counted="tri" not in name)  # `einsum` by one is no product to torch
    assert "stem.0" in space.groups
    assert space.mixing
    with pytest.warns(UserWarning, match="the order of channels may matter"):
        sort_channels(net, space)
    net, x = around(ORDERED[name], weight=nn.Parameter(torch.randn(8, 8)))
    randomise(net.double().eval())
    before = net(x.double())
    assert "stem.0" not in sort_channels(net, space, example_input=x.double())
    assert difference([net(x.double())], [before]) < 1e-9


def _causal(m: Any, y: Tensor) -> Tensor:
    tokens = y.flatten(2).transpose(1, 2)
    length = tokens.shape[1]
    later = torch.ones(length, length, device=y.device).triu(1).bool()
    weights = (tokens @ tokens.transpose(1, 2)).masked_fill(later, -1e9)
    return (weights.softmax(-1) @ tokens).transpose(1, 2).reshape(y.shape)


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, y: y * torch.arange(y.shape[2], device=y.device).view(1, 1, -1, 1),
        lambda m, y: y * torch.arange(m.rows, device=y.device).view(1, 1, -1, 1),
        lambda m, y: y.flip(1),
        lambda m, y: F.conv2d(y, m.weight + torch.eye(y.shape[1], dtype=y.dtype, device=y.device)[:, :, None, None]),
        _causal,
    ],
)
def test_positions_of_maps_and_the_identity_tell_no_channels_apart(middle: Middle) -> None:
    net, x = around(middle, weight=nn.Parameter(torch.randn(8, 8, 1, 1)))
    net.rows = 8
    space = obeys_the_laws(net, x)
    assert "stem.0" in space.groups
    assert not space.mixing
    before = net(x.double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "stem.0" in sort_channels(net, space)
    assert difference([net(x.double())], [before]) < 1e-9


# --- maxima and their indices ---------------------------------------------------------------------------------------


def _cbam(m: Any, y: Tensor) -> Tensor:
    seen = torch.cat([y.mean(1, keepdim=True), torch.max(y, 1, keepdim=True)[0]], 1)
    return y * m.where(seen).sigmoid()


@pytest.mark.parametrize(
    "middle",
    [
        _cbam,
        lambda m, y: y / y.abs().max(),
        lambda m, y: y * y.median(1, keepdim=True)[0] + y.min(1, keepdim=True).values,
        lambda m, y: (y.argmax(1), y)[1],
    ],
)
def test_the_largest_channel_is_taken_without_freezing(middle: Middle) -> None:
    space = obeys_the_laws(*around(middle, where=nn.Conv2d(2, 1, 3, padding=1)))
    assert sizes(space) == {"stem.0": 8, "head.0.0": 6}
    assert space.mixing
    assert reasons(space) in ({}, {"where": "it has a single output channel"}, {"where": UNUSED})


UNUSED = "it is not used in the forward pass"


class _Quantised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().max() / 127
        return F.conv2d(x, (self.weight / scale).round() * scale, self.bias, padding=1)


def test_weights_quantised_per_tensor_are_slimmed() -> None:
    net = nn.Sequential(_Quantised(3, 8, 3), nn.ReLU(), _Quantised(8, 12, 3), nn.ReLU(), *head(12))
    assert sizes(obeys_the_laws(net, image())) == {"0": 8, "2": 12}


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, y: y * torch.max(y, 1, keepdim=True)[1],
        lambda m, y: y * y.argmax(1, keepdim=True),
        lambda m, y: y * y.gather(1, y.max(1, keepdim=True)[1]),
        lambda m, y: y * y.median(1, keepdim=True).indices.detach().float(),
    ],
)
def test_an_index_into_channels_that_somebody_reads_freezes_them(middle: Middle) -> None:
    space = obeys_the_laws(*around(middle))
    assert sizes(space) == {"head.0.0": 6}
    assert reasons(space)["stem.0"] == "an index into channels is taken"


def test_an_index_into_channels_may_be_an_output() -> None:
    net = Function(
        lambda m, x: (m.head(y := m.body(m.stem(x))), y.max(1)[1]),
        stem=conv(3, 8),
        body=conv(8, 8),
        head=nn.Sequential(*head(8)),
    )
    space = trace(net, image())
    assert sizes(space) == {"stem.0": 8}
    assert reasons(space) == {"body.0": "an index into channels is taken"}


# --- indices, orders, spectra -------------------------------------------------------------------------------------


def _unpooled(m: Any, y: Tensor) -> Tensor:
    pooled, places = F.max_pool2d(y, 2, return_indices=True)
    return F.max_unpool2d(m.more(pooled), places, 2)


def _pooled_elsewhere(m: Any, y: Tensor) -> Tensor:
    pooled, places = F.max_pool2d(y, 2, return_indices=True)
    return m.more(y).flatten(2).gather(2, places.flatten(2)).reshape(pooled.shape)


def _tokens(y: Tensor) -> Tensor:
    return y.flatten(2)


def _best(y: Tensor) -> Tensor:
    return _tokens(y).max(2, keepdim=True).indices


def _spread(m: Any, y: Tensor) -> Tensor:
    places = m.places.expand(*y.shape[:2], -1)
    return torch.zeros_like(_tokens(y)).scatter_add(2, places, _tokens(m.more(y))).reshape(y.shape)


TIED: dict[str, Middle] = {
    "gather": lambda m, y: _tokens(m.more(y)).gather(2, _best(y)).unsqueeze(3),
    "take_along_dim": lambda m, y: torch.take_along_dim(_tokens(m.more(y)), _best(y), 2).unsqueeze(3),
    "argmax": lambda m, y: _tokens(m.more(y)).gather(2, _tokens(y).argmax(2, keepdim=True)).unsqueeze(3),
    "argsort": lambda m, y: y.gather(2, m.more(y).argsort(2)),
    "places of a pooling": _pooled_elsewhere,
    "unpooling": _unpooled,
    "scatter_add": _spread,
    "scatter": lambda m, y: _tokens(y).scatter(2, _best(m.more(y)), _tokens(y)).unsqueeze(3),
    "scatter_reduce": lambda m, y: _tokens(y).scatter_reduce(2, _best(y), _tokens(m.more(y)), "amax").unsqueeze(3),
    "index_add": lambda m, y: _tokens(y).index_add(2, m.places.flatten(), _tokens(m.more(y))).unsqueeze(3),
    "index_copy": lambda m, y: _tokens(y).index_copy(2, m.places.flatten(), _tokens(m.more(y))).unsqueeze(3),
    "complex": lambda m, y: torch.complex(y, m.more(y)).abs(),
}


@pytest.mark.parametrize("name", TIED)
def test_channels_of_an_index_are_those_of_what_it_takes(name: str) -> None:
    net, x = around(TIED[name], more=conv(8, 8))
    net.register_buffer("places", torch.arange(63, -1, -1).view(1, 1, 64))
    space = obeys_the_laws(net, x)
    assert not reasons(space)
    assert sizes(space) == {"stem.0": 8, "head.0.0": 6}
    before = net(x.double())
    sort_channels(net, space)
    assert difference([net(x.double())], [before]) < 1e-9


def test_an_index_of_fewer_channels_freezes_both_sides() -> None:
    space = obeys_the_laws(*around(lambda m, y: _tokens(y).gather(2, _best(m.more(y)))[..., None], 5, more=conv(8, 5)))
    assert sizes(space) == {"head.0.0": 6}
    assert (
        reasons(space)["stem.0"] == reasons(space)["more.0"] == "gather in the model's forward cannot follow the widths"
    )


def test_groups_of_one_size_are_proven_at_different_widths() -> None:
    layers = [module for _ in range(6) for module in (conv(8, 8), nn.ReLU())]
    space = trace(nn.Sequential(conv(3, 8), *layers, *head(8)), image())
    assert sizes(space) == {"0.0": 8, **{f"{2 * i + 1}.0": 8 for i in range(6)}}
    for seed in range(20):
        assert len(set(_unlike(space, random.Random(seed)).values())) == 7
    few = space.with_choices(2, 1, 0.5)
    assert set(_unlike(few, random.Random(0)).values()) == set(next(iter(few.groups.values())).choices)


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, y: y.sort(2)[0] * y.sort(-1).indices,
        lambda m, y: _tokens(y).topk(5)[0].unsqueeze(3),
        lambda m, y: (
            y - _tokens(y).kthvalue(3, keepdim=True)[0][..., None] + _tokens(y).kthvalue(5)[0][..., None, None]
        ),
        lambda m, y: y - _tokens(y).median(-1)[0][..., None, None] + _tokens(y).nanmedian(-1)[0][..., None, None],
        lambda m, y: F.fold(F.unfold(y, 3, padding=1), y.shape[2:], 3, padding=1),
        lambda m, y: torch.fft.irfft2(torch.fft.rfft2(y) * torch.view_as_complex(m.filter), s=y.shape[2:]),
        lambda m, y: torch.fft.fft2(y).real + torch.fft.ifft2(y, norm="ortho").imag,
        lambda m, y: torch.view_as_real(y * 1j).flatten(3),
        lambda m, y: torch.polar(y.abs(), y).real,
        lambda m, y: F.logsigmoid(y),
        lambda m, y: F.conv2d(y, torch.fft.irfft2(torch.fft.rfft2(m.weight), s=(3, 3)).sort(3)[0], padding=1),
    ],
)
def test_operators_along_the_map_leave_channels_free(middle: Middle) -> None:
    modules = {"filter": nn.Parameter(torch.randn(8, 8, 5, 2)), "weight": nn.Parameter(torch.randn(8, 8, 3, 3))}
    space = obeys_the_laws(*around(middle, **modules))
    assert {"stem.0", "head.0.0"} <= set(space.groups)
    assert set(reasons(space).values()) <= {UNUSED}
    assert not space.mixing


@pytest.mark.parametrize(
    ("middle", "operator"),
    [
        (lambda m, y: y.sort(1)[0], "sort"),
        (lambda m, y: y.topk(8, 1)[0], "topk"),
        (lambda m, y: torch.fft.fft(y, dim=1).real, "_fft_r2c"),
        (lambda m, y: y.roll(y.shape[1] // 2, 1), "roll"),  # half of what is kept: some widths would happen to line up
        (lambda m, y: F.conv2d(y, m.weight.sort(0)[0]), "sort"),
    ],
)
def test_operators_along_the_channels_freeze_them(middle: Middle, operator: str) -> None:
    space = obeys_the_laws(*around(middle, weight=nn.Parameter(torch.randn(8, 8, 1, 1))))
    assert len(space.groups) < 3
    assert f"{operator} in the model's forward cannot follow the widths" in reasons(space).values()


@pytest.mark.parametrize("is_masked", [False, True])
def test_deformable_convolutions_are_producers(is_masked: bool) -> None:
    ops = pytest.importorskip("torchvision").ops
    net, x = around(
        lambda m, y: m.body(y, m.offset(y), m.mask(y).sigmoid() if is_masked else None),
        10,
        body=ops.DeformConv2d(8, 10, 3, padding=1),
        offset=nn.Conv2d(8, 18, 3, padding=1),
        mask=nn.Conv2d(8, 9, 3, padding=1),
    )
    space = obeys_the_laws(net, x, is_counted=False)  # torch does not count it
    assert sizes(space) == {"stem.0": 8, "body": 10, "head.0.0": 6}
    widths = space.full().replaced("body", 5)
    saved = 64 * 2 * (9 * 8 * 5 + 9 * 5 * 6)
    assert MacCost(space)(space.full()) - MacCost(space)(widths) == saved
    assert extract(net, space, widths).body.out_channels == 5


@pytest.mark.parametrize(
    "ending",
    [lambda y: (y * (1 + 0j)).real, lambda y: torch.view_as_real(y * 1j), lambda y: y.clone(), lambda y: y.detach()],
)
def test_output_channels_stay_whatever_the_network_ends_in(ending: Callable[[Tensor], Tensor]) -> None:
    net = Function(lambda m, x: ending(m.last(m.stem(x).mean((2, 3)))), stem=conv(3, 8), last=nn.Linear(8, 5))
    space = obeys_the_laws(net, image())
    assert sizes(space) == {"stem.0": 8}
    assert [note.name for note in space.notes] == ["last"]


def test_an_operator_that_gives_another_shape_than_usual_freezes_what_enters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_TABLE, "median", _TABLE["clone"])
    space = obeys_the_laws(*around(lambda m, y: y - y.median()))
    assert sizes(space) == {"head.0.0": 6}
    assert reasons(space)["stem.0"].startswith("a result of another shape in the operator median is not understood")


# --- numbers that count channels ------------------------------------------------------------------------------------


def test_a_stored_number_that_counts_channels_and_pixels_freezes_the_channels() -> None:
    def middle(m: Any, y: Tensor) -> Tensor:
        y = _tokens(y).reshape(-1, m.size, 8, 8)
        return F.interpolate(y, size=(m.size, m.size))

    net, x = around(middle)
    net.size = 8
    space = obeys_the_laws(net, x)
    assert sizes(space) == {"head.0.0": 6}
    expected = "upsample_nearest2d in the model's forward gives 7 in place of 8 along an axis that has no channels"
    assert reasons(space)["stem.0"] == f"the network does not run when it is cut: {expected}"


@pytest.mark.parametrize(
    "cut", [lambda m, y: y.narrow(1, m.k, m.rest), lambda m, y: torch.narrow(y, 1, m.k, length=m.rest)]
)
def test_a_part_narrowed_up_to_the_end_is_that_of_a_split(cut: Middle) -> None:
    net, x = around(lambda m, y: torch.cat([m.more(y.narrow(1, 0, m.k)), cut(m, y)], 1), more=conv(3, 3))
    net.k, net.rest = 3, 5
    assert sizes(obeys_the_laws(net, x)) == {"stem.0": 3, "stem.0#2": 5, "more.0": 3, "head.0.0": 6}


def test_a_constant_length_up_to_the_end_is_named() -> None:
    net, x = around(lambda m, y: torch.cat([m.more(y.narrow(1, 0, m.k)), y.narrow(1, m.k, 5)], 1), more=conv(3, 3))
    net.k = 3
    space = obeys_the_laws(net, x)
    assert sizes(space) == {"stem.0": 3, "more.0": 3, "head.0.0": 6}


@pytest.mark.parametrize("half", [lambda c: c >> 1, lambda c: divmod(c, 2)[0]])
def test_halves_of_channels_however_they_are_computed(half: Callable[[int], int]) -> None:
    space = obeys_the_laws(*around(lambda m, y: y[:, : half(y.shape[1])] * y[:, half(y.shape[1]) :].sigmoid(), 4))
    assert len(space.groups["stem.0"].choices) == 4


SCALED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "power": lambda m, a: a * m.head_dim**-0.5,
    "root": lambda m, a: a / math.sqrt(m.head_dim),
    "quotient": lambda m, a: a / m.head_dim,
    "constant": lambda m, a: a * 0.5,
}


@pytest.mark.parametrize("name", SCALED)
def test_a_number_computed_from_an_attribute_that_follows_mixes(name: str) -> None:
    def attention(m: Any, y: Tensor) -> Tensor:
        b, n, _ = (tokens := _tokens(y).transpose(1, 2)).shape
        q, k, v = m.qkv(tokens).reshape(b, n, 3, m.heads, m.head_dim).permute(2, 0, 3, 1, 4)
        weights = SCALED[name](m, q @ k.transpose(-2, -1)).softmax(-1)
        return m.project((weights @ v).transpose(1, 2).reshape(b, n, m.heads * m.head_dim)).mean(1)[..., None, None]

    net, x = around(attention, qkv=nn.Linear(8, 24), project=nn.Linear(8, 8))
    net.heads, net.head_dim = 2, 4
    space = obeys_the_laws(net, x)
    assert "qkv" in space.groups
    assert bool(space.mixing) == (name != "constant")


class _Adapted(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(width, out), nn.Linear(width, 2), nn.Linear(2, out)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.up.weight @ self.down.weight, self.base.bias)


@pytest.mark.parametrize("layer", [_Adapted(8, 6), parametrizations.orthogonal(nn.Linear(8, 6))])
def test_numbers_in_a_layer_say_its_shape_whoever_uses_its_weight(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 3))
    space = trace(net, torch.randn(4, 5))
    subnet = extract(net, space, space.uniform(0.5))
    inner = getattr(subnet[2], "base", subnet[2])
    assert (inner.out_features, inner.in_features) == tuple(inner.weight.shape)
    assert inner.in_features == 4


# --- lone channels --------------------------------------------------------------------------------------------------


class _Mixer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, channels, 3, padding=1)
        self.tokens = nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 16))
        self.last = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).transpose(1, 2)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.last(x.mean(1))


def test_a_map_of_one_channel_may_be_transposed() -> None:
    x = torch.randn(2, 1, 16)
    assert sizes(obeys_the_laws(_Mixer(1), x)) == {"tokens.0": 10}
    space = trace(net := _Mixer(4), x)
    narrow = extract(net, space, space.full().replaced("stem", 1))
    assert sizes(obeys_the_laws(narrow, x)) == {"tokens.0": 10}


# --- true reasons ---------------------------------------------------------------------------------------------------


def test_parameters_of_one_element_are_used() -> None:
    one = {"scale": nn.Parameter(torch.ones(())), "heat": nn.Parameter(torch.ones(1))}
    net = Function(
        lambda m, x: m.head(m.stem(x)) * m.scale.exp() / m.heat,
        stem=parametrizations.weight_norm(nn.Conv2d(3, 8, 3), dim=None),
        head=nn.Sequential(*head(8)),
        **one,
    )
    assert not reasons(obeys_the_laws(net, image()))
    net.forgotten = nn.Parameter(torch.ones(1))
    assert reasons(trace(net, image().double())) == {"forgotten": UNUSED}


def test_of_a_layer_that_is_used_otherwise_the_parameter_is_named() -> None:
    net = Function(
        lambda m, x: m.head(F.conv2d(m.stem(x), m.body.weight)),
        stem=conv(3, 8),
        body=nn.Conv2d(8, 6, 3),
        head=nn.Sequential(*head(6)),
    )
    space = obeys_the_laws(net, image())
    assert sizes(space) == {"stem.0": 8, "body": 6}
    assert reasons(space) == {"body.bias": UNUSED}


@pytest.mark.parametrize(
    ("use", "operator"),
    [
        (lambda weight: weight.cummin(0)[0], "cummin"),
        (lambda weight: (weight * 2).cummax(0)[0] + 1, "cummax"),
    ],
)
def test_an_operator_that_a_weight_does_not_pass_is_named(use: Callable[[Tensor], Tensor], operator: str) -> None:
    net = Function(
        lambda m, x: m.head(F.conv2d(m.stem(x), use(m.body.weight))),
        stem=nn.Sequential(conv(3, 8), conv(8, 8)),
        body=nn.Conv2d(8, 6, 3, bias=False),
        head=nn.Sequential(*head(6)),
    )
    space = obeys_the_laws(net, image())
    assert sizes(space) == {"stem.0.0": 8}
    assert reasons(space)["body"].startswith(f"the operator {operator} is not understood")


def test_of_a_linear_layer_too() -> None:
    net = Function(
        lambda m, x: m.head(F.linear(m.stem(x).mean((2, 3)), m.body.weight.cummin(0)[0], m.body.bias)),
        stem=nn.Sequential(conv(3, 8), conv(8, 8)),
        body=nn.Linear(8, 6),
        head=nn.Linear(6, 5),
    )
    space = obeys_the_laws(net, image())
    assert sizes(space) == {"stem.0.0": 8}
    assert reasons(space)["body"].startswith("the operator cummin is not understood")


class _Closed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8), nn.Sequential(*head(8))
        self.run = lambda x: self.head(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def test_a_model_that_calls_itself_through_a_closure_is_told_so() -> None:
    with pytest.raises(
        TraceError, match=r"stem\.0: a function kept in the model .* runs this layer of the model itself"
    ):
        trace(_Closed(), image())


def test_what_torch_logs_of_a_failing_operator_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    net, x = around(lambda m, y: y + m.scale.expand(2, 8, 9, 9), scale=nn.Parameter(torch.ones(1, 8, 3, 3)))
    with pytest.raises(TraceError, match="does not run on the example input") as caught:
        trace(net, x)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
