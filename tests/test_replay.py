"""What was written down of a pass gives on other inputs what the pass itself gives; what must not be is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoslim.replay import Program, Recording
from autoslim.reuse import _written_to


class _Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.recording.ran(func, args, kwargs or {}, list(_written_to(func, args, kwargs or {})), result)
        return result


def recorded(function: Callable[..., Any], x: Tensor) -> Program | None:
    recording = Recording(x)
    with torch.no_grad(), _Recorded(recording):
        output = function(x)
    written = recording.written(output)
    return None if written is None else written.bound()


def test_operators_in_place_views_lists_and_several_outputs() -> None:
    weight = torch.randn(4, 4)

    def function(x: Tensor) -> dict[str, Any]:
        unused = torch.exp(x) @ weight
        unused.add_(1)
        halves = (x @ weight).clamp_(min=-1).split(2, 1)
        both = torch.cat([halves[1].mul_(2), halves[0]], 1)
        both[:, 0] += 1  # through a view
        return {"both": both, "mean": both.mean(), "constant": weight, "number": 3}

    program = recorded(function, torch.randn(5, 4))
    assert program is not None
    names = [str(action.run) for action in program.actions]
    assert "aten.exp.default" not in names
    for _ in range(2):
        y = torch.randn(5, 4)
        expected, found = function(y), program.run(y, None)
        assert found["number"] == 3
        assert all(torch.equal(found[key], expected[key]) for key in ("both", "mean", "constant"))


def test_what_depends_on_values_is_refused() -> None:
    def branches(x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1

    assert recorded(branches, torch.ones(3)) is None
    assert recorded(lambda x: x[x > 0], torch.ones(3)) is None


def test_what_changes_a_tensor_that_outlives_the_pass_is_refused() -> None:
    count = torch.zeros(3)
    assert recorded(lambda x: count.add_(1) * x, torch.ones(3)) is None
    assert recorded(lambda x: x.mul_(2), torch.ones(3)) is None  # the caller's own batch

    def counted(x: Tensor) -> Tensor:
        count.add_(1)  # nothing reads it
        return x * 2

    program = recorded(counted, torch.ones(3))
    assert program is not None
    assert torch.equal(program.run(torch.full((3,), 2.0), None), torch.full((3,), 4.0))
