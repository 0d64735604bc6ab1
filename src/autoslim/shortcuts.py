"""Results on the meta device by shape alone, for the operators that torch itself works out in Python there.

Half the time of a trace would go into them. A case that is not plain is left to torch, errors above all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
        return torch.empty_like(source), source.new_empty(source.shape[1]), source.new_empty(source.shape[1])
    if name == "native_layer_norm":
        shape = tuple(args[1])
        if tuple(source.shape[-len(shape) :]) != shape or any(
            isinstance(vector, Tensor) and tuple(vector.shape) != shape for vector in args[2:4]
        ):
            return None
        statistics = source.new_empty((*source.shape[: -len(shape)], *[1] * len(shape)))
        return torch.empty_like(source), statistics, torch.empty_like(statistics)
    in_place = name.endswith("_")
    plain = name.removesuffix("_")
    if plain in _UNARY and func._overloadname == "default":
        return source if in_place else torch.empty_like(source)
    if plain in _BINARY and len(args) == 2:
        return _broadcast(source, args[1], in_place)
    return None


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


class Shortcuts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own base
    """A forward pass on meta, quicker."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = shaped(func, args, kwargs)
        return func(*args, **kwargs) if result is None else result
