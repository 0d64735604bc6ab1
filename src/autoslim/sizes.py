"""Sizes that remember where they come from: `self.num_heads`, `x.shape[1] // 2`.

While a model is captured, the whole numbers among its modules' attributes and in the shapes of its tensors are `Size`s,
a subclass of `int`. A rule that meets one in the arguments of its operator can tell a size that follows the widths by
itself (taken from another tensor), one that can be made to (kept in an attribute), and a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class AttributeSource:
    """A number kept in a module, alone or at `index` of a tuple or list."""

    path: str
    name: str
    index: int | None
    module: nn.Module


@dataclass(frozen=True, eq=False)
class AxisSource:
    """The length of an axis of a tensor."""

    tensor: Tensor
    axis: int


Source = AttributeSource | AxisSource


class Listener(Protocol):
    """Knows which axes matter, and is told what a model's code does with sizes apart from giving them to operators."""

    def is_labelled(self, tensor: Tensor, axis: int) -> bool:
        """May the length of this axis follow the widths?"""

    def found_equal(self, one: Size, other: Size) -> None:
        """Two sizes are compared, as in `assert x.shape[1] == self.channels`, and are equal."""

    def made_a_number(self, size: Size) -> None:
        """A size enters the arithmetic, as in `x / math.sqrt(x.shape[1])`."""


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


class Size(int):
    """A whole number that is `factor` times each of its sources, given the others; without any, it was computed.

    `whole` is what it was subtracted from, if it is a difference.
    """

    sources: tuple[tuple[Source, Fraction], ...]
    whole: Size | None = None

    def __new__(cls, value: int, sources: Iterable[tuple[Source, Fraction]] = ()) -> Size:
        """A size of this value with its sources, if any."""
        size = super().__new__(cls, value)
        size.sources = tuple(sources)
        return size

    def _scaled(self, factor: Fraction) -> Iterator[tuple[Source, Fraction]]:
        return ((source, known * factor) for source, known in self.sources)

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return int(self) * other
        sources = [*self._scaled(Fraction(int(other)))]
        if isinstance(other, Size):
            sources += other._scaled(Fraction(int(self)))
        return Size(int(self) * int(other), sources)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return int(self) // other
        value = int(self) // int(other)
        return Size(value, self._scaled(Fraction(1, int(other))) if value * int(other) == int(self) else ())

    def __lshift__(self, other: int) -> Any:
        return self * (1 << other)

    def __rshift__(self, other: int) -> Any:
        return self // (1 << other)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __sub__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return int(self) - other
        rest = Size(int(self) - int(other))
        rest.whole = self
        return rest

    def __neg__(self) -> Size:
        return Size(-int(self), self._scaled(Fraction(-1)))

    def __eq__(self, other: object) -> bool:
        equal = int(self) == other
        listener = _listener.get()
        if equal and isinstance(other, Size) and listener is not None:
            listener.found_equal(self, other)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __float__(self) -> float:
        listener = _listener.get()
        if listener is not None:
            listener.made_a_number(self)
        return float(int(self))

    def __truediv__(self, other: Any) -> Any:
        return float(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / float(self)

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        return pow(int(self), other, modulo) if isinstance(other, int) and other >= 0 else float(self) ** other


def _computed(name: str) -> Callable[[Size, Any], Any]:
    """Arithmetic that keeps no source: a size that may well follow the widths, which the proof will see."""
    plain = getattr(int, name)

    def method(self: Size, other: Any) -> Any:
        value = plain(self, other)
        return Size(value) if isinstance(value, int) else value

    return method


for _name in ("__add__", "__radd__", "__rsub__", "__rfloordiv__", "__mod__", "__rmod__"):
    setattr(Size, _name, _computed(_name))


def mark_attributes(model: nn.Module) -> None:
    """Turn the whole numbers kept in the modules of `model`, a copy that is run once, into `Size`s."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in list(vars(module).items()):
            if name.startswith("_"):
                continue
            if type(value) is int and value > 1:
                module.__dict__[name] = Size(value, [(AttributeSource(path, name, None, module), Fraction(1))])
            elif type(value) in (tuple, list) and any(type(entry) is int and entry > 1 for entry in value):
                module.__dict__[name] = type(value)(
                    Size(entry, [(AttributeSource(path, name, index, module), Fraction(1))])
                    if type(entry) is int and entry > 1
                    else entry
                    for index, entry in enumerate(value)
                )


@dataclass
class Call:
    """The call of torch that is under way, as the model's code wrote it."""

    name: str = ""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def argument(self, position: int, name: str) -> int | None:
        """An argument that is a whole number; None if it was not given."""
        found = self.args[position] if len(self.args) > position else self.kwargs.get(name)
        return found if isinstance(found, int) else None

    @property
    def numbers(self) -> list[int | None]:
        """The whole numbers among the arguments, in order; None stands for -1."""
        return list(_numbers((*self.args, *self.kwargs.values())))

    def given(self, shape: Sequence[int]) -> list[int | None] | None:
        """The numbers that ask for a result of this shape (None: to be worked out), if they can be told."""
        numbers = self.numbers
        if self.name == "unflatten" and numbers:
            dim, *parts = numbers
            at = -1 if dim is None else int(dim)
            at = at if at >= 0 else len(shape) + 1 - len(parts) + at
            numbers = [None] * at + parts + [None] * (len(shape) - at - len(parts))
        for start in range(len(numbers) - len(shape) + 1):
            window = numbers[start : start + len(shape)]
            if all(number is None or number == size for number, size in zip(window, shape, strict=True)):
                return window
        return None

    def number(self, value: int) -> int | None:
        """The argument of this value, one with a source first; None if there is none."""
        found = [number for number in self.numbers if number is not None and number == value]
        return max(found, key=_knowledge, default=None)


def _knowledge(number: int) -> int:
    return (2 if number.sources else 1) if isinstance(number, Size) else 0


class SizeMode(TorchFunctionMode):
    """Keeps `call` up to date, gives the shapes of tensors as `Size`s, and lets `listener` hear of them."""

    def __init__(self, call: Call, listener: Listener) -> None:
        super().__init__()
        self._call = call
        self._listener = listener

    def __enter__(self) -> Any:
        _listener.set(self._listener)
        return super().__enter__()  # type: ignore[no-untyped-call]  # torch's own base

    def __exit__(self, *details: Any) -> Any:
        _listener.set(None)
        return super().__exit__(*details)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is _SHAPE or func is torch.Tensor.size:
            return self._shape(args[0], func(*args, **kwargs), *args[1:], *kwargs.values())
        call = self._call
        before = call.name, call.args, call.kwargs
        call.name, call.args, call.kwargs = getattr(func, "__name__", ""), args, kwargs
        if call.name.strip("_") in _ARITHMETIC:
            for operand in args:
                if isinstance(operand, Size):
                    self._listener.made_a_number(operand)
        _listener.set(None)  # what the rules compare is nobody's business
        try:
            return func(*args, **kwargs)
        finally:
            _listener.set(self._listener)
            call.name, call.args, call.kwargs = before

    def _shape(self, tensor: Tensor, shape: Any, *dim: int) -> Any:
        if isinstance(shape, int):
            return self._size(tensor, dim[0] % tensor.ndim, shape)
        return torch.Size([self._size(tensor, axis, size) for axis, size in enumerate(shape)])

    def _size(self, tensor: Tensor, axis: int, size: int) -> int:
        if size > 1 and self._listener.is_labelled(tensor, axis):
            return Size(size, [(AxisSource(tensor, axis), Fraction(1))])
        return size


_SHAPE: Any = torch.Tensor.shape
_ARITHMETIC = frozenset(
    (
        *("tensor", "scalar_tensor", "as_tensor", "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul"),
        *("div", "true_divide", "truediv", "rtruediv", "itruediv", "pow", "rpow"),
    )
)


def _numbers(arguments: Iterable[Any]) -> Iterator[int | None]:
    for argument in arguments:
        if isinstance(argument, int):
            if not isinstance(argument, bool):
                yield None if argument == -1 else argument
        elif isinstance(argument, Tensor):
            continue
        elif isinstance(argument, (tuple, list)):
            yield from _numbers(argument)
        elif isinstance(argument, slice):
            yield from _numbers((argument.start, argument.stop))
