"""Losses of a student against a teacher."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autoslim import alpha_divergence, soft_cross_entropy


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 5), (2, 4, 3, 3)])
def test_soft_cross_entropy_is_what_the_paper_writes(shape: tuple[int, ...]) -> None:
    student, teacher = logits(*shape), logits(*shape, seed=1)
    expected = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    assert float(soft_cross_entropy(student, teacher)) == pytest.approx(float(expected))


def divergence(student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    q, p = student.softmax(1), teacher.softmax(1)
    if alpha == 1:
        return (p * (p / q).log()).sum(1)
    if alpha == 0:
        return (q * (q / p).log()).sum(1)
    return ((q * (p / q) ** alpha).sum(1) - 1) / (alpha * (alpha - 1))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_without_clipping_value_and_gradient_are_those_of_the_divergence(alpha: float) -> None:
    student, teacher = logits(7, 5).requires_grad_(), logits(7, 5, seed=1)
    value = alpha_divergence(student, teacher, alphas=(alpha, alpha), clip=math.inf)
    (gradient,) = torch.autograd.grad(value, student)
    expected = divergence(student, teacher, alpha).mean()
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert float(value.detach()) == pytest.approx(float(expected.detach()))
    assert torch.allclose(gradient, expected_gradient, atol=1e-10)


def test_the_larger_divergence_is_chosen_sample_by_sample() -> None:
    student, teacher = logits(40, 5), logits(40, 5, seed=1)
    both = torch.stack([divergence(student, teacher, -1.0), divergence(student, teacher, 1.0)])
    assert 0 < int((both[0] > both[1]).sum()) < 40
    chosen = alpha_divergence(student, teacher, clip=math.inf)
    assert float(chosen) == pytest.approx(float(both.max(0).values.mean()))


def authors(student: Tensor, teacher: Tensor, alpha: float, clip: float) -> tuple[Tensor, Tensor]:
    """Value and gradient per sample, written out class by class from the description of the authors' code."""
    q, p = student.detach().softmax(1), teacher.softmax(1)
    values, gradients = torch.zeros(len(q), dtype=q.dtype), torch.zeros_like(q)
    for row in range(len(q)):
        rho = []
        for c in range(q.shape[1]):
            r = float(p[row, c] / q[row, c])
            if alpha == 1.0:
                f, f0, weight = r * math.log(r), 0.0, r
            else:
                clipped = min(max(r**alpha, 0.0), clip)
                f0 = 1 / (alpha * (alpha - 1))
                f, weight = clipped * f0, clipped / alpha + f0
            values[row] += q[row, c] * (f - f0)
            rho.append(weight)
        for k in range(q.shape[1]):  # of -sum q rho log q, where q and rho in front are constants
            gradients[row, k] = -sum(q[row, c] * rho[c] * ((c == k) * 1.0 - q[row, k]) for c in range(q.shape[1]))
    return values, gradients


@pytest.mark.parametrize("clip", [5.0, 20.0])
def test_value_and_gradient_are_those_of_the_authors_where_weights_are_clipped(clip: float) -> None:
    student, teacher = (3 * logits(30, 5)).requires_grad_(), 3 * logits(30, 5, seed=1)
    negative, positive = (authors(student, teacher, alpha, clip) for alpha in (-1.0, 1.0))
    assert ((teacher.softmax(1) / student.softmax(1)) > clip).any()  # of which alpha = 1 clips none
    chosen = negative[0] > positive[0]
    assert 0 < int(chosen.sum()) < 30
    value = alpha_divergence(student, teacher, clip=clip)
    (gradient,) = torch.autograd.grad(value, student)
    assert float(value.detach()) == pytest.approx(float(torch.where(chosen, negative[0], positive[0]).mean()))
    torch.testing.assert_close(gradient, torch.where(chosen[:, None], negative[1], positive[1]) / 30)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    student = logits(6, 5).requires_grad_()
    value = alpha_divergence(student, student.detach())
    (gradient,) = torch.autograd.grad(value, student)
    assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12
