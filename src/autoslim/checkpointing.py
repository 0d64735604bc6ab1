"""Activation checkpointing: what is inside blocks of a net is computed again in the backward pass, and not kept.

Any module has blocks; a subnet of a supernet, which is the model with other tensors in its places while it runs, has
them as they were when it ran.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoslim.errors import TrainError

Forward = Callable[..., Any]


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Inside, the blocks of `model` keep only their inputs. Outputs and gradients are the same.

    Raises `TrainError` if there is nothing to divide.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise TrainError(f"checkpointing: {type(model).__name__} has no blocks of layers; set checkpointing=false")
    own = [(block, vars(block).get("forward")) for block, _ in blocks]  # that of wrappers and hooks of others
    try:
        for block, forward in blocks:
            block.forward = _recomputed(block, forward)
        yield
    finally:
        for block, before in own:
            if before is None:
                del block.forward  # the class's own again
            else:
                block.forward = before


def blocks_of(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """The largest modules of at most about sqrt(n) of the n layers, which is best for memory, with their `forward`.

    Long sequences of layers without a block in them (VGG) are run in pieces of that length.
    """
    limit = max(2, math.ceil(1.5 * math.sqrt(sum(1 for _ in _layers(model)))))
    found: list[tuple[nn.Module, Forward]] = []
    seen = set[int]()

    def visit(module: nn.Module, is_root: bool) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        count = sum(1 for _ in _layers(module))
        is_called = type(module).forward is not nn.Module.forward  # lists and dictionaries of modules are not
        if 2 <= count <= limit and is_called and not is_root:
            found.append((module, module.forward))
        elif (
            type(module) is nn.Sequential
            and "forward" not in vars(module)  # it does nothing but run its layers
            and len(module) > limit
            and all(not any(m.children()) for m in module)
        ):
            found.append((module, _in_pieces(module, limit)))
        else:
            for child in module.children():
                visit(child, False)

    visit(model, True)
    return [(block, forward) for block, forward in found if any(True for _ in block.parameters())]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    return (each for each in module.modules() if not any(True for _ in each.children()))


def _in_pieces(sequence: nn.Sequential, length: int) -> Forward:
    def forward(x: Any) -> Any:
        layers = list(sequence)
        for start in range(0, len(layers), length):
            x = _kept_little(sequence, lambda x, part=layers[start : start + length]: _through(part, x), (x,), {})
        return x

    forward.is_divided = True  # type: ignore[attr-defined]
    return forward


def _through(layers: list[nn.Module], x: Any) -> Any:
    for layer in layers:
        x = layer(x)
    return x


def _recomputed(block: nn.Module, forward: Forward) -> Forward:
    if hasattr(forward, "is_divided"):
        return forward
    return lambda *args, **kwargs: _kept_little(block, forward, args, kwargs)


def _kept_little(block: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    again = _as_it_is(block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)


class _as_it_is(AbstractContextManager[None]):  # noqa: N801  (used like a function)
    """A context in which a block has the tensors and attributes it has now.

    A subnet runs with cut tensors and other numbers of channels in place; when its backward pass computes a block
    again, they are no longer there. Running statistics were updated once and are not touched again.
    """

    def __init__(self, block: nn.Module) -> None:
        self._then = [_State.of(module) for module in block.modules()]
        self._now: list[_State] = []

    def __enter__(self) -> None:
        self._now = [_State.of(state.module) for state in self._then]
        for state in self._then:
            state.put(spare_buffers=True)

    def __exit__(self, *error: object) -> None:
        for state in self._now:
            state.put()


class _State:
    """What a module holds itself."""

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, Any],
        buffers: dict[str, Tensor | None],
        attributes: dict[str, Any],
    ) -> None:
        self.module, self.parameters, self.buffers, self.attributes = module, parameters, buffers, attributes

    @staticmethod
    def of(module: nn.Module) -> _State:
        plain = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and isinstance(value, (int, float, str, tuple, list))
        }
        return _State(module, dict(module._parameters), dict(module._buffers), plain)

    def put(self, *, spare_buffers: bool = False) -> None:
        self.module._parameters.update(self.parameters)
        for name, buffer in self.buffers.items():
            self.module._buffers[name] = buffer.clone() if spare_buffers and buffer is not None else buffer
        vars(self.module).update(self.attributes)
