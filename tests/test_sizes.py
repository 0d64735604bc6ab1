"""Sizes that remember where they come from, and what tracing makes of them."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nets
import user_nets
from autoslim import extract, trace
from autoslim.sizes import AttributeSource, Call, Size, mark_attributes

SOURCE = AttributeSource("block", "heads", None, nn.Identity())


def size(value: int) -> Size:
    return Size(value, [(SOURCE, Fraction(1))])


def factors(number: Any) -> list[Fraction]:
    return [factor for _, factor in number.sources]


def test_a_size_is_the_number_it_stands_for() -> None:
    number = size(12)
    assert number == 12
    assert isinstance(number, int)
    assert torch.zeros(number, 2).shape == (12, 2)
    assert [0] * number == [0] * 12
    assert copy.deepcopy(number) == 12


@pytest.mark.parametrize(
    ("computed", "value", "expected"),
    [
        (lambda n: n * 3, 36, [Fraction(3)]),
        (lambda n: 3 * n, 36, [Fraction(3)]),
        (lambda n: n // 4, 3, [Fraction(1, 4)]),
        (lambda n: n >> 2, 3, [Fraction(1, 4)]),
        (lambda n: n << 1, 24, [Fraction(2)]),
        (lambda n: divmod(n, 4)[0], 3, [Fraction(1, 4)]),
        (lambda n: n * n, 144, [Fraction(12), Fraction(12)]),
        (lambda n: -n, -12, [Fraction(-1)]),
        (lambda n: n // 5, 2, []),  # does not divide: known only to be computed
        (lambda n: n + 1, 13, []),
        (lambda n: 20 - n, 8, []),
        (lambda n: 24 // n, 2, []),
        (lambda n: n % 5, 2, []),
    ],
)
def test_products_and_quotients_keep_their_source(computed: Any, value: int, expected: list[Fraction]) -> None:
    number = computed(size(12))
    assert number == value
    assert isinstance(number, Size)
    assert factors(number) == expected


def test_floats_are_plain() -> None:
    assert size(12) / 5 == 2.4
    assert size(12) * 0.5 == 6.0
    assert not isinstance(size(12) * 0.5, Size)


def test_attributes_are_marked_alone_and_in_lists() -> None:
    module = nn.Module()
    module.heads, module.sizes, module.training_flag, module.name, module.one = 4, [2, 6], True, "x", 1
    mark_attributes(module)
    assert isinstance(module.heads, Size)
    assert [entry.sources[0][0].index for entry in module.sizes] == [0, 1]
    assert type(module.sizes) is list
    assert type(module.training_flag) is bool
    assert type(module.one) is int  # nothing can be cut below one


def test_the_arguments_of_a_view_are_told_apart() -> None:
    call = Call("view", (torch.zeros(2, 24), 2, size(4), -1), {})
    assert call.given((2, 4, 6)) == [2, 4, None]
    assert isinstance(call.given((2, 4, 6))[1], Size)
    assert call.given((2, 8, 3)) is None
    assert Call("unflatten", (torch.zeros(2, 24), 1, (size(4), 6)), {}).given((2, 4, 6)) == [None, 4, 6]


@pytest.mark.parametrize(
    ("name", "attribute", "expected"),
    [
        ("split_by_stored_sizes", "sizes", (1, 1, 1)),
        ("split_by_one_width", "width", 1),
        ("heads_in_attributes", "head_dim", 1),
        ("flattened_by_a_stored_size", "channels", 1),
        ("hidden_state_made_in_forward", "hidden", 1),
        ("insists_on_its_channels", "embed_dim", 1),
    ],
)
def test_attributes_follow_in_the_extracted_net_and_come_back_in_place(
    name: str, attribute: str, expected: Any
) -> None:
    net, inputs = nets.build(name)
    before = getattr(net, attribute)
    space = trace(net, inputs)
    subnet = extract(net, space, space.smallest())
    assert getattr(net, attribute) == before
    after = getattr(subnet, attribute)
    assert after == expected
    assert type(after) is type(before)
    assert all(type(entry) is int for entry in (after if isinstance(after, tuple) else [after]))  # no `Size` is left


def test_a_constant_freezes_and_says_where_and_what_would_help() -> None:
    net, inputs = nets.build("hard_coded_view")
    note = next(note for note in trace(net, inputs).notes if note.name == "mixed.0")
    assert note.line.startswith("tests/nets.py:")
    assert "view" in note.operator
    assert "attribute of the module" in note.remedy


def test_arithmetic_with_a_number_of_channels_is_reported() -> None:
    (remark,) = {text.split(" at ")[0] for text in trace(*nets.build("insists_on_its_channels")).mixing}
    assert remark == "the number of channels enters the arithmetic"


def test_a_recurrent_layer_costs_no_more_to_trace_for_a_long_sequence() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(m.lstm(m.mixed(m.stem(x)).flatten(2).transpose(1, 2))[0].mean(1))

    def operations(size: int) -> int:
        net = user_nets.Sized(
            forward,
            {},
            stem=nn.Conv2d(3, 4, 1),
            mixed=nn.Conv2d(4, 4, 1),
            lstm=nn.LSTM(4, 5, batch_first=True),
            last=nn.Linear(5, 2),
        )
        return len(trace(net, torch.zeros(1, 3, size, size)).operations)

    assert operations(40) == operations(2)


def test_one_attribute_that_two_layers_rely_on_ties_them() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.one(x).view(x.shape[0], m.channels, -1)
        b = m.two(x).view(x.shape[0], m.channels, -1)
        return m.last(torch.cat([a.mean(2), b.mean(2)], 1))

    net = user_nets.Sized(
        forward, {"channels": 8}, one=nn.Conv2d(3, 8, 1), two=nn.Conv2d(3, 8, 1), last=nn.Linear(16, 4)
    )
    space = trace(net, nets.image())
    assert {name: group.size for name, group in space.groups.items()} == {"one": 8}
    assert extract(net, space, space.uniform(0.5)).channels == 4
