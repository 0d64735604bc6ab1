"""What a narrow net learns from a wide one: losses of student and teacher logits, both of shape (N, C, ...)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autoslim.errors import TrainError

Loss = Callable[[Any, Any], Tensor]
Backward = Callable[[Tensor], object]


def plain_backward(loss: Tensor) -> None:
    """Send a loss back as it is. `accelerator.backward`, or one that scales the loss, can take its place.

    Raises `TrainError` if it is not one number.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TrainError(f"a loss must be one number, as a tensor; got {given}: take the mean over the samples")
    loss.backward()  # type: ignore[no-untyped-call]


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy against the softmax of the teacher (US-Net, section 3.3); mean over all but classes."""
    return torch.nn.functional.cross_entropy(student, teacher.softmax(dim=1))


def alpha_divergence(
    student: Tensor, teacher: Tensor, *, alphas: tuple[float, float] = (-1.0, 1.0), clip: float = 5.0
) -> Tensor:
    """Adaptive alpha-divergence (Wang et al. 2021, AlphaNet, section 3): the larger of two, sample by sample.

    A negative alpha punishes a student that is sure where its teacher is not, a positive one the opposite. Importance
    weights `(p / q) ** alpha` above `clip` are clipped, in the gradient too; those of alpha 0 and 1, the two
    Kullback-Leibler divergences, are not, as in the authors' code. They clip gradient values at 1.0 beside it, without
    which a step may be huge. The value is that of the divergence, the gradient the authors' estimate of its; mean over
    all but classes.
    """
    q_log = student.log_softmax(dim=1)
    q, p_log = q_log.detach().exp(), teacher.detach().log_softmax(dim=1)
    (value, gradient), (other_value, other_gradient) = (_divergence(q_log, q, p_log, alpha, clip) for alpha in alphas)
    surrogate = torch.where(value > other_value, gradient, other_gradient)
    return (torch.maximum(value, other_value) + surrogate - surrogate.detach()).mean()


def _divergence(q_log: Tensor, q: Tensor, p_log: Tensor, alpha: float, clip: float) -> tuple[Tensor, Tensor]:
    """The divergence of each sample, and a tensor whose gradient is its."""
    log_ratio = p_log - q_log.detach()
    if abs(alpha) < 1e-3:  # KL(q, p)
        f, rho, constant = -log_ratio, log_ratio - 1.0, 0.0
    elif abs(alpha - 1.0) < 1e-3:  # KL(p, q)
        ratio = log_ratio.exp()
        f, rho, constant = ratio * log_ratio, ratio, 0.0
    else:
        weight = (alpha * log_ratio).exp().clamp(0.0, clip)
        constant = 1.0 / (alpha * (alpha - 1.0))
        f, rho = weight * constant, weight / alpha + constant
    return (q * (f - constant)).sum(dim=1), -(q * rho * q_log).sum(dim=1)
