"""A forward pass as it is: the operators that run, and how long each tensor lives that they make."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoslim.rules import find_rule
from autoslim.shortcuts import shaped


@dataclass
class Life:
    """A tensor with memory of its own, result number `leaf` of operator `first`; `last`: the last that ran with it."""

    first: int
    leaf: int
    last: int


def is_silent(func: Any) -> bool:
    """Is it an operator without a result of its own, which other modes make torch call now and then?"""
    return bool(func.overloadpacket.__name__ == "detach")


class Lifetimes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own base
    """A forward pass in which is noted what lives how long. Views and results in place live as long as their memory.

    `trail` has the operators and the parameters given to them, to compare passes by. Numbers of operators are those of
    a pass on labels, which runs the same ones. Only weak references are kept, so tensors are let go of exactly when the
    user's code does.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        named = (*model.named_parameters(), *model.named_buffers())
        self._named = {id(tensor): (name, tensor) for name, tensor in named}  # held: an id may not come again
        self.trail: list[tuple[str, ...]] = []
        self.operators: list[str] = []
        self.lives: list[Life] = []
        self._live: dict[int, Life | None] = {}  # by storage; None for what was there before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim" or is_silent(func):
            return func(*args, **kwargs)
        if find_rule(func) is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._leave_trail(func, args)
        self.operators.append(func.overloadpacket.__name__)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._meet(leaf, None)
        result = shaped(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        now = len(self.operators) - 1
        for number, leaf in enumerate(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            self._meet(leaf, Life(now, number, now))
        return result

    def _leave_trail(self, func: Any, args: Sequence[Any]) -> None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if not tensors or tensors[0].ndim:  # counters of batches are no part of it
            name = "batch_norm" if "batch_norm" in func.overloadpacket.__name__ else func.overloadpacket.__name__
            self.trail.append((name, *(self._named[id(arg)][0] for arg in tensors if id(arg) in self._named)))

    def finish(self) -> None:
        """The pass is over: what is still alive lived through it."""
        for life in self._live.values():
            if life is not None:
                life.last = len(self.operators) - 1
        self._live.clear()

    def _meet(self, tensor: Tensor, life: Life | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = life
        if life is not None:
            self.lives.append(life)
        weakref.finalize(storage, self._let_go, key).atexit = False

    def _let_go(self, key: int) -> None:
        life = self._live.pop(key, None)
        if life is not None:
            life.last = len(self.operators) - 1
