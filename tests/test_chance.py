"""Chance in a race: Student's distribution, and how often the best candidate is dropped, by simulation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autoslim.chance import chance_of_lead, student_tail
from autoslim.race import looks, outraced


@pytest.mark.parametrize(
    ("t", "freedom", "expected"),
    # tables of critical values (Abramowitz and Stegun, 26.10)
    [(63.657, 1, 0.005), (9.925, 2, 0.005), (4.0321, 5, 0.005), (4.587, 10, 0.0005), (3.3852, 30, 0.001), (0, 7, 0.5)],
)
def test_students_distribution_is_that_of_the_tables(t: float, freedom: float, expected: float) -> None:
    assert student_tail(t, freedom) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("t", [-2.0, 0.1, 1.0, 5.0, 40.0])
def test_students_distribution_in_closed_form(t: float) -> None:
    assert student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-9)
    assert student_tail(t, 2) == pytest.approx(0.5 - 0.5 * t / math.sqrt(2 + t * t), rel=1e-9)
    assert student_tail(t, 1e9) == pytest.approx(0.5 * math.erfc(t / math.sqrt(2)), rel=1e-4, abs=1e-300)


def test_few_samples_decide_nothing() -> None:
    before = torch.arange(100.0).double()
    for count in range(8):  # a line through two points leaves nothing over
        assert chance_of_lead(before[:count] + 1e6, before) == 1


def test_samples_that_agree_exactly_do_not_speak_for_those_not_seen() -> None:
    before = torch.zeros(400).double()
    before[::20] = 1.0  # a lead of 0.05: twenty hits that are misses now would undo it
    chance = [chance_of_lead(before[:count], before) for count in (8, 100, 200, 390)]
    assert chance == pytest.approx([(1 - count / 400) ** 20 for count in (8, 100, 200, 390)], rel=1e-3)
    assert chance[0] > 0.5
    assert chance_of_lead(before, before) == 0  # all seen
    assert chance_of_lead(-before[:200], -before) == 1  # no lead


def test_two_hundred_and_fifty_of_two_thousand_decide_as_before() -> None:
    """Student's distribution asks for hardly more than the normal one there."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2000, generator=generator).double()
    noise = torch.randn(250, generator=generator).double()
    noise = (noise - noise.mean()) / noise.std()
    error = (1 / 250 - 1 / 2000) ** 0.5
    lead = before[:250] - before.mean() + noise  # of none
    assert chance_of_lead(lead + 3.2 * error, before) > 0.5 * math.erfc(3.42 / 2**0.5)
    assert chance_of_lead(lead + 3.8 * error, before) < 0.5 * math.erfc(3.42 / 2**0.5)


def _flipped(hits: Tensor, share: float, generator: torch.Generator) -> Tensor:
    return torch.where(torch.rand(hits.shape, generator=generator) < share, 1 - hits, hits)


def _drawn(kind: str, candidates: int, population: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What candidates gain, and what they gained some steps before, (candidates, population); none is much better."""
    shape = candidates, population
    if kind == "loss":
        before = torch.randn(shape, generator=generator).double() * 0.05
        return before + torch.randn(shape, generator=generator).double() * 0.03, before
    if kind == "skewed":
        before = torch.randn(shape, generator=generator).double() * 0.05
        return before - (1.5 * torch.randn(shape, generator=generator).double()).exp() * 0.01, before
    then = (torch.rand(population, generator=generator) < 0.9).double()
    hits = _flipped(then.expand(shape), 0.02, generator)
    now = _flipped(then, 0.01, generator)
    moved = torch.where(torch.rand(shape, generator=generator) < 0.9, hits + now - then, hits).clamp(0, 1)
    return _flipped(moved, 0.005, generator) - now, hits - then


def _keeps_the_best(gained: Tensor, before: Tensor, batch: int, confidence: float) -> bool:
    """One race."""
    candidates, population = gained.shape
    decided = looks(-(-population // batch))
    known = {str(number): before[number] for number in range(candidates)}
    running = dict(known)
    for seen in sorted(decided):
        shown = {name: gained[int(name), : seen * batch] for name in running}
        for name in outraced(shown, {name: known[name] for name in running}, confidence, len(decided)):
            del running[name]
    means = gained.mean(1)
    return max(float(means[int(name)]) for name in running) >= float(means.max()) - 1e-12


@pytest.mark.parametrize(
    ("kind", "batch", "population", "runs"),
    [
        *[("loss", 2, 100, 40), ("loss", 4, 200, 40), ("loss", 16, 400, 60), ("loss", 50, 400, 100)],
        *[("loss", 250, 2000, 60), ("skewed", 8, 200, 40), ("skewed", 50, 400, 60)],
        *[("accuracy", 4, 200, 30), ("accuracy", 16, 400, 50), ("accuracy", 50, 400, 100), ("accuracy", 250, 2000, 40)],
    ],
)
def test_the_best_is_dropped_no_more_often_than_stated(kind: str, batch: int, population: int, runs: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    wrong = sum(
        not _keeps_the_best(*_drawn(kind, 6, population, generator), batch, confidence=0.95) for _ in range(runs)
    )
    assert wrong <= 0.05 * runs


def test_candidates_that_are_worse_are_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    for batch, population, count in ((16, 400, 48), (250, 2000, 250)):
        gained, before = _drawn("loss", 2, population, generator)
        lead = gained[0, :count] - gained[1, :count] + 0.05
        assert chance_of_lead(lead, before[0] - before[1] + 0.05) < 0.05 / (population / batch)
