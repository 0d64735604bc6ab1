"""The estimate of all candidates by one backward pass: exact where the loss is linear, and of use where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autoslim import Judge, MacCost, RacingJudge, ReuseJudge, Supernet, greedy_slim, trace
from autoslim.errors import ConfigError
from autoslim.scores import find_score
from autoslim.screening import estimates, promising
from autoslim.space import ChannelSpace, Widths
from test_reuse import _supernet
from test_sorting import Products


def candidates_of(space: ChannelSpace, widths: Widths) -> dict[str, Widths]:
    return {group: c for group in space.groups if (c := space.narrowed(widths, group)) is not None}


def test_where_the_score_is_linear_in_a_group_the_estimate_is_exact() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 3))
    images = torch.randn(20, 3, 8, 8)
    space = trace(net, images[:1]).with_choices(4, 2, 0.25)
    supernet, batch = Supernet(net, space), (images, torch.zeros(20))

    def mean_of_the_output(output: Tensor, targets: Tensor) -> Tensor:
        return output.mean((1, 2, 3))

    judge = Judge(supernet, [batch], mean_of_the_output)
    for widths in (space.full(), space.uniform(0.5)):
        candidates = candidates_of(space, widths)
        found = estimates(supernet, widths, candidates, batch, mean_of_the_output)
        for group, candidate in candidates.items():
            assert found[group] == pytest.approx(judge(candidate) - judge(widths), abs=1e-6)


def test_the_true_best_is_among_the_promising_half() -> None:
    supernet, batches = _supernet()
    space, exact = supernet.space, ReuseJudge(supernet, batches)
    hits = steps = 0
    for step in greedy_slim(space, exact, MacCost(space), ["25%"]):
        widths = next(w for w in [space.widened(step.widths, step.group)] if w is not None)
        candidates = candidates_of(space, widths)
        half = promising(supernet, widths, candidates, batches[0], exact.score, -(-len(candidates) // 2))
        assert len(half) == -(-len(candidates) // 2)
        assert set(half.items()) <= set(candidates.items())
        hits += step.group in half
        steps += 1
    assert steps >= 8
    assert hits >= 0.75 * steps  # by chance half


@pytest.mark.parametrize("rule", ["score", "score-per-cost"])
def test_with_room_for_all_the_path_is_the_same_and_with_less_it_is_looked_at_less(rule: str) -> None:
    supernet, batches = _supernet()
    space, cost = supernet.space, MacCost(supernet.space)
    before = {name: tensor.clone() for name, tensor in supernet.model.state_dict().items()}
    supernet.model.requires_grad_(False)
    plain = list(greedy_slim(space, RacingJudge(supernet, batches), cost, ["40%"], rule=rule))
    wide = RacingJudge(supernet, batches, screen=len(space.groups))
    assert list(greedy_slim(space, wide, cost, ["40%"], rule=rule)) == plain
    looked: list[str] = []
    narrow = ReuseJudge(supernet, batches, "accuracy", screen=2)
    options = {"rule": rule, "on_candidate": lambda group, score: looked.append(group)}
    steps = list(greedy_slim(space, narrow, cost, ["40%"], **options))  # type: ignore[arg-type]
    assert len(looked) == 2 * len(steps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in supernet.parameters())


def test_what_cannot_be_screened_is_named() -> None:
    supernet, batches = _supernet()

    def hits(output: Tensor, targets: Tensor) -> Tensor:
        return (output.argmax(1) == targets).double()

    with pytest.raises(ConfigError, match="score with a gradient"):
        next(greedy_slim(supernet.space, ReuseJudge(supernet, batches, hits, screen=1), MacCost(supernet.space), "50%"))
    with pytest.raises(ConfigError, match="screen must be a whole number of at least 1"):
        RacingJudge(supernet, batches, screen=0)


def test_weights_that_the_models_own_code_multiplies_and_parametrized_ones_are_read_once() -> None:
    """Of each group that is read the estimate is the change of the readers; that of its writers is no part of it."""
    torch.manual_seed(0)
    net, images = Products(), torch.rand(8, 3, 8, 8)
    net.conv, targets = nn.utils.parametrizations.weight_norm(net.conv), torch.randint(0, 4, (8,))
    space = trace(net, images[:1]).with_choices(4, 2, 0.25)
    full, score = space.full(), find_score("loss")
    candidates = candidates_of(space, full)
    found = estimates(Supernet(net, space), full, candidates, (images, targets), score)
    score(net(images), targets).mean().backward()
    for group, weight, dim in (("conv", net.one, 0), ("one", net.two, 1)):
        assert weight.grad is not None
        kept = candidates[group][group]
        gone = (weight.detach() * weight.grad).movedim(dim, 0)[kept:].sum()
        assert found[group] == pytest.approx(-float(gone), rel=1e-4)
