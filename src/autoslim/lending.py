"""Batches that are used more than once, lent to a model that may change them in place."""

from __future__ import annotations

from collections.abc import Iterator
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
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def _versions(inputs: Any) -> list[int]:
    """How often each tensor was written to."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
