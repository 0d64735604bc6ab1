"""Batches that are used more than once, lent to a model that may change them in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Lender:
    """Gives a model the inputs of a batch; copies of them, if it writes into what it is given.

    Whether it does is seen in the first pass, which gets copies too.
    """

    def __init__(self) -> None:
        self._writes: bool | None = None

    @contextmanager
    def lent(self, inputs: Any) -> Iterator[Any]:
        """Inputs for one pass."""
        if self._writes is False:
            yield inputs
            return
        own = cloned(inputs)
        before = _versions(own)
        yield own
        if self._writes is None:
            self._writes = _versions(own) != before


def cloned(value: Any) -> Any:
    """The same with a copy of each tensor in it."""
    return with_tensors(value, Tensor.clone)


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with `change` made of each tensor in it, in containers, dataclasses and plain objects.

    Nothing that is given is written to.
    """

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if next(_tensors_in(leaf, set()), None) is None:
            return leaf
        new = copy.copy(leaf)
        if isinstance(new, MutableMapping):  # of a kind of its own; pytree knows the others
            for key in list(new):
                new[key] = with_tensors(new[key], change)
        for name, entry in _attributes_of(new).items():
            object.__setattr__(new, name, with_tensors(entry, change))  # of a frozen one too
        return new

    return tree_map(changed, value)


def _versions(inputs: Any) -> list[int]:
    """How often each tensor was written to."""
    return [tensor._version for tensor in _tensors_in(inputs, set()) if not tensor.is_inference()]


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor, once each; objects may refer to one another."""
    for leaf in tree_leaves(value):
        if id(leaf) in seen:
            continue
        seen.add(id(leaf))
        if isinstance(leaf, Tensor):
            yield leaf
            continue
        entries = [*_attributes_of(leaf).values()] + ([*leaf.values()] if isinstance(leaf, MutableMapping) else [])
        for entry in entries:
            yield from _tensors_in(entry, seen)


def _attributes_of(value: Any) -> dict[str, Any]:
    """What an object holds; nothing for classes, functions and modules, which are no data."""
    is_data = hasattr(value, "__dict__") and not callable(value)
    return dict(vars(value)) if is_data else {}
