"""Results on the meta device by shape alone, for the operators that torch itself works out in Python there.

Half the time of a trace would go into them. A case that is not plain is left to torch, errors above all. `NoUnrolling`
does the same for recurrent layers; on real tensors, `NoDetours` keeps torch from a way of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_UNARY = frozenset(
    (
        *("relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh", "mish", "elu"),
        *("leaky_relu", "softplus", "clamp", "clamp_min", "exp", "sqrt", "rsqrt", "abs", "neg", "erf", "celu"),
        *("_softmax", "_log_softmax"),
    )
)
_BINARY = frozenset(("add", "sub", "mul", "div"))


def shaped(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operator on meta tensors, or None where torch has to be asked."""
    source = args[0] if args else None
    if not isinstance(source, Tensor) or not source.is_meta or not source.is_floating_point() or kwargs.get("dtype"):
        return None
    name = func.overloadpacket.__name__
    if name == "native_batch_norm":
        saved = source.shape[1] if args[5] else 0  # no statistics are kept in evaluation
        return torch.empty_like(source), source.new_empty(saved), source.new_empty(saved)
    if name == "native_layer_norm":
        shape = tuple(args[1])
        if tuple(source.shape[-len(shape) :]) != shape or any(
            isinstance(vector, Tensor) and tuple(vector.shape) != shape for vector in args[2:4]
        ):
            return None
        statistics = source.new_empty((*source.shape[: -len(shape)], *[1] * len(shape)))
        plain = torch.empty_like(source, memory_format=torch.contiguous_format)
        return plain, statistics, torch.empty_like(statistics)
    in_place = name.endswith("_")
    plain = name.removesuffix("_")
    if plain in _UNARY and func._overloadname == "default":
        return source if in_place else torch.empty_like(source)
    if plain in _BINARY and len(args) == 2:
        return _broadcast(source, args[1], in_place)
    if name in ("mm", "addmm", "bmm") and not kwargs:
        return _product(*args)
    return None


def _product(*operands: Tensor) -> Tensor | None:
    left, right = operands[-2:]
    if any(not operand.is_meta or operand.dtype != left.dtype for operand in operands):
        return None
    (*batch, rows, inner), (*batch_right, inner_right, columns) = left.shape, right.shape
    if batch != batch_right or inner != inner_right or (len(operands) == 3 and operands[0].shape != (columns,)):
        return None
    return left.new_empty((*batch, rows, columns))


def _broadcast(source: Tensor, other: Any, in_place: bool) -> Tensor | None:
    if not isinstance(other, Tensor):
        return (source if in_place else torch.empty_like(source)) if isinstance(other, (int, float)) else None
    if other.dtype != source.dtype or not other.is_meta:
        return None
    if other.shape == source.shape or _fits(other, source):
        return source if in_place else torch.empty_like(source)
    return torch.empty_like(other) if not in_place and _fits(source, other) else None


def _fits(small: Tensor, large: Tensor) -> bool:
    """Does a tensor take the shape of another by broadcasting?"""
    pairs = zip(reversed(small.shape), reversed(large.shape), strict=False)
    return small.ndim <= large.ndim and all(a in (1, b) for a, b in pairs)


class NoDetours(TorchFunctionMode):
    """A forward pass in which tensors without elements (no region found, say) run the operators that others would.

    torch's BatchNorm of nothing scales by the first channel's weight: whose channels they are could not be seen.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (_batch_norm if func is F.batch_norm and args[0].numel() == 0 else func)(*args, **kwargs)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    result: Tensor = torch.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)[0]
    return result


class NoUnrolling(TorchFunctionMode):
    """A forward pass on meta in which a recurrent layer takes one product per weight, whatever the length.

    The products are as large as those of all steps together.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_plain = len(args) == 9 and isinstance(args[2], (list, tuple)) and args[0].ndim == 3 and not kwargs
        if getattr(func, "__name__", "") in ("lstm", "gru", "rnn_tanh", "rnn_relu") and is_plain:
            return _recurrent(*args)
        return func(*args, **kwargs)


def _recurrent(
    x: Tensor,
    state: Tensor | tuple[Tensor, ...],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    first, second, size = x.shape
    states = (state,) if isinstance(state, Tensor) else state
    directions = 2 if bidirectional else 1
    per_direction = len(weights) // (layers * directions)
    rows = x.reshape(-1, size)
    for at in range(0, len(weights), per_direction):
        into, within, *others = weights[at : at + per_direction]
        if at == directions * per_direction:  # the layers above see the outputs of both directions
            rows = rows.new_empty(len(rows), into.shape[1])
        torch.mm(rows, into.t())
        torch.mm(rows.new_empty(len(rows), within.shape[1]), within.t())
        for other in others:  # biases; the projection of an LSTM
            torch.mm(rows.new_empty(len(rows), other.shape[1]), other.t()) if other.ndim == 2 else other.sum()
    for each in states:
        each.sum()
    output = x.new_empty(first, second, directions * states[0].shape[2])
    return (output, *map(torch.empty_like, states))
