"""Channels in the order of their importance, so that cutting the last ones of a trained net hurts least."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autoslim.calibrate import evaluating
from autoslim.errors import ConfigError, SpaceError, nearest
from autoslim.lending import cloned
from autoslim.slicing import check_model, copy_module
from autoslim.space import Axis, ChannelGroup, ChannelSpace, Operation, a_space
from autoslim.tracing import split_input, tensors_in

_SAME = 1e-9  # of the largest output, in double precision


def sort_channels(
    model: nn.Module,
    space: ChannelSpace,
    importance: str | Mapping[str, Tensor] = "l1",
    *,
    example_input: Any = None,
) -> tuple[str, ...]:
    """Put the most important channels of each group first, in place; what the model computes stays the same.

    `importance`: "l1", the sum of the absolute weights that produce a channel (in all layers that do; under a
    parametrization, of what it gives); "gamma", the absolute scales of BatchNorm behind them; or scores (size,) by
    group, such as `first_order` gives. Pass the space as it was traced: channels between two of its choices belong
    together and keep their order. Groups whose choices are not equally far apart stay as they are, like those with no
    score; the names of the groups sorted are returned.

    With an `example_input` each group is sorted on a copy in double precision first, and left alone if that changes the
    output (a model that does something else with each channel by its number). Without one that is not looked at, and
    there is a warning if the model has operators that see all channels at once. Raises `SpaceError` for a space of
    another model, or scores that do not fit.
    """
    check_model(model, a_space(space))
    if example_input is None and space.mixing:
        warnings.warn(
            f"sort_channels: the order of channels may matter to this model ({space.mixing[0]}); give example_input, "
            "and groups for which it does are left alone",
            stacklevel=2,
        )
    scores = _SCORES[_known(importance)](model, space) if isinstance(importance, str) else _given(importance, space)
    done = []
    for name, group in space.groups.items():
        score = scores.get(name)
        block = _block(group)
        if score is None or block is None:
            continue
        order = score.detach().cpu().double().reshape(-1, block).sum(1).argsort(descending=True, stable=True).tolist()
        ranks = [first * block + index for first in order for index in range(block)]
        orders = _orders(space, name, ranks)
        if orders is not None and (example_input is None or _is_harmless(model, orders, example_input)):
            _apply(model, orders)
            done.append(name)
    return tuple(done)


def first_order(model: nn.Module, space: ChannelSpace, backward: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """How much the loss would change without a channel, to first order: |sum of weight * gradient| of what produces it.

    `backward(model)` is to leave gradients in the parameters (a forward and backward over some batches). (Molchanov et
    al. 2019.) Raises `ConfigError` if there are none.
    """
    a_space(space)
    model.zero_grad()
    backward(model)
    products = {
        name: parameter.detach() * parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    if not products:
        raise ConfigError("first_order: backward(model) left no gradients; let it end with loss.backward()")
    return {group: score.abs() for group, score in _summed(model, space, products).items()}


def _known(importance: str) -> str:
    if importance not in _SCORES:
        raise SpaceError(f"no importance {importance!r}; {nearest(importance, _SCORES)}, or scores by group")
    return importance


def _given(importance: object, space: ChannelSpace) -> dict[str, Tensor]:
    """Scores of a user, as tensors; `SpaceError` if one does not fit, before anything is sorted."""
    if not isinstance(importance, Mapping):
        kind = type(importance).__name__
        raise SpaceError(f"importance is one of {', '.join(map(repr, _SCORES))}, or scores by group; got a {kind}")
    found = {}
    for name, given in importance.items():
        if name not in space.groups:
            raise SpaceError(f"importance of {name!r}: there is no such group; {nearest(str(name), space.groups)}")
        size = space.groups[name].size
        try:
            found[name] = torch.as_tensor(given, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise SpaceError(f"importance of {name!r}: expected {size} numbers, got a {type(given).__name__}") from None
        if found[name].shape != (size,):
            raise SpaceError(f"importance of {name!r}: expected shape ({size},), got {tuple(found[name].shape)}")
        if found[name].isnan().any():
            raise SpaceError(f"importance of {name!r}: there is a score that is not a number")
    return found


def _l1(model: nn.Module, space: ChannelSpace) -> dict[str, Tensor]:
    values: dict[tuple[str, str], tuple[str, Tensor]] = {}
    with evaluating(model), torch.no_grad():  # in training mode spectral_norm goes on with its iteration
        for name, parameter in model.named_parameters():
            module, attribute = owner = _owner(name)
            weight = getattr(model.get_submodule(module), attribute)
            if weight.shape == parameter.shape:  # the one of its originals that is laid out like it
                values[owner] = name, weight.abs()
    return _summed(model, space, dict(values.values()))


def _owner(parameter: str) -> tuple[str, str]:
    """Of which attribute of which module a parameter is, or is made up under a parametrization."""
    module, is_original, rest = f".{parameter}".rpartition(".parametrizations.")
    if is_original:
        return module.removeprefix("."), rest.partition(".")[0]
    module, _, attribute = parameter.rpartition(".")
    return module, attribute


def output_dims(model: nn.Module, space: ChannelSpace) -> dict[str, int]:
    """Along which dimension each weight has the channels that it produces; without those of which it cannot be told.

    A layer says it by its class, a parameter that the model's own code multiplies by the products of the space.
    """
    dims = {}
    for name, axes in space.parameters.items():
        owner, _ = _owner(name)
        module = model.get_submodule(owner)
        if isinstance(module, (_ConvNd, nn.Linear)) and len(axes) > 1:
            dims[name] = 1 if isinstance(module, _ConvTransposeNd) else 0
        elif len(axes) > 1:
            named = [op for op in space.operations if op.name in (owner, name.removesuffix(".weight"))]
            found = {_produced(axes, op) for op in named if op.kind != "matmul"} - {None}
            if len(found) == 1:
                dims.update((name, dim) for dim in found if dim is not None)
    return dims


def _produced(axes: Sequence[Axis], product: Operation) -> int | None:
    """Along which of the axes of a weight its outputs lie in a product; None if it has no part in it, or both may."""
    groups, factors, outputs = (
        frozenset[str]().union(*(axis.groups for axis in each)) for each in (axes, product.factors, product.outputs)
    )
    along = [dim for dim, axis in enumerate(axes) if axis.groups & outputs]
    fixed = [dim for dim, axis in enumerate(axes) if not axis.groups]  # as the outputs of a classifier
    if not groups <= factors or len(along) > 1:
        return None
    return next(iter((*along, *fixed)), None)


def _summed(model: nn.Module, space: ChannelSpace, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of weights, summed over everything but the channels that they produce, by group."""
    dims, scores = output_dims(model, space), dict[str, Tensor]()
    for name, value in values.items():
        if name in dims:
            others = [dim for dim in range(value.ndim) if dim != dims[name]]
            _add(scores, space, space.parameters[name][dims[name]], value.double().sum(others))
    return scores


def _gamma(model: nn.Module, space: ChannelSpace) -> dict[str, Tensor]:
    scores: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        weight = f"{name}.weight" if name else "weight"
        if isinstance(module, _BatchNorm) and weight in space.parameters:
            _add(scores, space, space.parameters[weight][0], module.weight.detach().abs().double())
    return scores


_SCORES: dict[str, Callable[[nn.Module, ChannelSpace], dict[str, Tensor]]] = {"l1": _l1, "gamma": _gamma}


def _add(scores: dict[str, Tensor], space: ChannelSpace, axis: Axis, values: Tensor) -> None:
    """Add what is said of the positions of an axis to their ranks."""
    for group in axis.groups:
        score = scores.setdefault(group, values.new_zeros(space.groups[group].size))
        for rank, positions in _positions(axis, group).items():
            score[rank] += values[positions].sum()


def _positions(axis: Axis, group: str) -> dict[int, list[int]]:
    """Where each rank of a group lies on an axis."""
    found: dict[int, list[int]] = {}
    offset = 0
    for span in axis.spans:
        if span.group == group:
            for index in range(span.size):
                found.setdefault(span.start + index // span.repeat * span.step, []).append(offset + index)
        offset += span.size
    return found


def _block(group: ChannelGroup) -> int | None:
    """How many channels belong together; None if that differs."""
    first, *others = group.choices
    steps = {high - low for low, high in zip(group.choices, others, strict=False)}
    step = min(steps, default=0)  # the first choice may be several steps: some layers need more than one channel
    return step if steps == {step} and first % step == 0 else None


def _orders(space: ChannelSpace, group: str, ranks: list[int]) -> dict[tuple[str, int], list[int]] | None:
    """The new order along each axis of each tensor that puts the channel of rank `ranks[i]` at rank i.

    None if the channels do not lie alike on some axis.
    """
    orders = {}
    for name, axes in (*space.parameters.items(), *space.buffers.items()):
        for dim, axis in enumerate(axes):
            if group in axis.groups:
                places, order = _positions(axis, group), list(range(axis.size))
                for rank, source in enumerate(ranks):
                    here, there = places.get(rank, []), places.get(source, [])
                    if len(here) != len(there):
                        return None
                    for place, taken in zip(here, there, strict=True):
                        order[place] = taken
                orders[name, dim] = order
    return orders


def _apply(model: nn.Module, orders: Mapping[tuple[str, int], list[int]]) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for (name, dim), order in orders.items():
            tensor = tensors[name]
            tensor.copy_(tensor.index_select(dim, torch.tensor(order, device=tensor.device)))


def _is_harmless(model: nn.Module, orders: Mapping[tuple[str, int], list[int]], example_input: Any) -> bool:
    twin = copy_module(model, lambda _, t: t.to(torch.float64 if t.is_floating_point() else t.dtype, copy=True))
    inputs = torch.utils._pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
        split_input(example_input),
    )

    def outputs() -> list[Tensor]:
        args, kwargs = cloned(inputs)  # the model may change them
        return [tensor.clone() for tensor in tensors_in(twin(*args, **kwargs))]

    twin.eval()
    with torch.no_grad():
        before = outputs()
        _apply(twin, orders)
        after = outputs()
    return all(
        (one - other).abs().max() <= _SAME * other.abs().max().clamp_min(1e-300)
        for one, other in zip(after, before, strict=True)
    )
