"""Cutting tensors: how widths become shorter tensors is written here once; running and extracting both use it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.errors import SpaceError
from autoslim.space import Axis, ChannelSpace


def cut(tensor: Tensor, axes: tuple[Axis, ...], widths: Mapping[str, int]) -> Tensor:
    """`tensor` with only the positions kept by `widths`: a view where they are prefixes, else a differentiable copy."""
    for dim, axis in enumerate(axes):
        if not axis.groups:
            continue
        positions = axis.positions(widths)
        if len(positions) == axis.size:
            continue
        if isinstance(positions, range):
            tensor = tensor.narrow(dim, 0, len(positions))
        else:
            tensor = tensor.index_select(dim, torch.tensor(positions, device=tensor.device))
    return tensor


def put_back(tensor: Tensor, axes: tuple[Axis, ...], widths: Mapping[str, int], values: Tensor) -> None:
    """Write the values that `cut(tensor, axes, widths)` gave, changed since, to where they were taken from."""
    places = [torch.tensor(axis.positions(widths), device=tensor.device) for axis in axes]
    with torch.no_grad():
        tensor[torch.meshgrid(*places, indexing="ij") if places else ()] = values.to(tensor.dtype)


def active_tensors(
    model: nn.Module, space: ChannelSpace, widths: Mapping[str, int], given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors that make `model` the subnet of these widths, for `torch.func.functional_call`.

    Parameters that are cut are views of (or gathered from) the model's own, so gradients reach it. Buffers are copies:
    running statistics that a subnet updates in training mode never reach the model. Attributes such as `groups` must be
    set around the call as well: see `active_attributes`. Tensors that are `given` are taken instead.
    """
    given = given or {}
    parameters = dict(model.named_parameters())
    tensors = {
        name: cut(parameters[name], axes, widths)
        for name, axes in space.parameters.items()
        if name not in given and any(axis.groups for axis in axes)
    }
    for name, buffer in model.named_buffers():
        if name not in given:
            tensors[name] = cut(buffer.detach(), space.buffers[name], widths).clone()
    return {**tensors, **given}


@contextmanager
def active_attributes(model: nn.Module, space: ChannelSpace, widths: Mapping[str, int]) -> Iterator[None]:
    """Set `groups`, `normalized_shape` and the like for `widths`; they are restored whatever happens inside."""
    replaced = []
    try:
        for attribute in space.attributes:
            module = model.get_submodule(attribute.module)
            before = getattr(module, attribute.name)
            value = _like(before, attribute.value(widths))
            if before != value:
                replaced.append((module, attribute.name, before))
                setattr(module, attribute.name, value)
        yield
    finally:
        for module, name, before in replaced:
            setattr(module, name, before)


def run_subnet(
    model: nn.Module,
    space: ChannelSpace,
    widths: Mapping[str, int],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    given: Mapping[str, Tensor] | None = None,
    mode: AbstractContextManager[Any] | None = None,
) -> Any:
    """One forward pass of the subnet, under a `mode` of dispatch if there is one; the model's buffers stay as they are.

    Tensors that are `given`, under their names in the model, are used in place of its own; they may change.
    """
    tensors = active_tensors(model, space, widths, given)
    with active_attributes(model, space, widths), _in_place_of(model, tensors), mode or nullcontext():
        return model(*args, **(kwargs or {}))


@contextmanager
def _in_place_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors into the places that parameters and buffers of these names have, and back afterwards.

    `torch.func.functional_call` does the same, but leaves a module that is registered under two names with its
    replacement.
    """
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            for places in (module._parameters, module._buffers):
                for key, tensor in places.items():
                    name = names.get(id(tensor), "")
                    if name in tensors:
                        replaced.append((places, key, tensor))  # type: ignore[arg-type]  # not None: it has a name
                        places[key] = tensors[name]  # type: ignore[assignment]
        yield
    finally:
        for places, key, tensor in replaced:
            places[key] = tensor  # type: ignore[assignment]


def extract(model: nn.Module, space: ChannelSpace, widths: Mapping[str, int]) -> nn.Module:
    """A plain, independent module of the user's own class: the subnet of these widths.

    Parameters and buffers are cut copies, and `in_channels`, `groups`, `num_features`, `normalized_shape` and the like
    say what is true of it. Raises `SpaceError` if the widths or the model do not fit the space.
    """
    space.check(widths)
    check_model(model, space)

    def shorten(name: str, tensor: Tensor) -> Tensor:
        return cut(tensor, space.parameters.get(name) or space.buffers.get(name) or (), widths).clone()

    subnet = copy_module(model, shorten)
    for attribute in space.attributes:
        module = subnet.get_submodule(attribute.module)
        setattr(module, attribute.name, _like(getattr(module, attribute.name), attribute.value(widths)))
    return subnet


def _like(before: Any, value: Any) -> Any:
    """The value of an attribute as the list or tuple it was."""
    return list(value) if isinstance(before, list) else value


def copy_module(model: nn.Module, convert: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A deep copy whose parameters and buffers are `convert(name, tensor)`; shared tensors stay shared.

    Other tensors that modules hold as plain attributes, alone or in a list, have no name: it is empty. The originals
    are never copied, so a large model can be cut, or moved to the meta device, without a second one.
    """
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            memo[id(parameter)] = nn.Parameter(convert(name, parameter.detach()), parameter.requires_grad)
        for name, buffer in model.named_buffers():
            memo[id(buffer)] = convert(name, buffer.detach())
        for module in model.modules():
            for value in vars(module).values():
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, Tensor) and id(tensor) not in memo:
                        memo[id(tensor)] = convert("", tensor.detach())
        return _copied(model, memo)


_ATOMIC = frozenset((int, float, str, bool, type(None), torch.dtype, torch.device))


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy` gives, several times faster for the dozen empty dictionaries that each module has."""
    if id(module) in memo:
        found: nn.Module = memo[id(module)]
        return found
    kind = type(module)
    if (
        hasattr(kind, "__deepcopy__")
        or kind.__reduce_ex__ is not object.__reduce_ex__
        or kind.__getstate__ is not nn.Module.__getstate__
        or not kind.__setstate__.__module__.startswith("torch.nn.")  # those only know old checkpoints
    ):
        return copy.deepcopy(module, memo)
    new = kind.__new__(kind)
    memo[id(module)] = new
    for name, value in vars(module).items():
        if type(value) in _ATOMIC:  # most of them: spare the call
            new.__dict__[name] = value
        elif name != "_compiled_call_impl":
            new.__dict__[name] = _copied_value(value, memo)
    return new


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) in _ATOMIC:
        return value
    if isinstance(value, nn.Module):
        return _copied(value, memo)
    if type(value) in (dict, OrderedDict) and id(value) not in memo:
        memo[id(value)] = new = type(value)()
        if value:
            new.update((key, _copied_value(entry, memo)) for key, entry in value.items())
        return new
    return copy.deepcopy(value, memo)


def check_model(model: nn.Module, space: ChannelSpace) -> None:
    """Raise `SpaceError` unless `space` was traced from a model with these very tensors.

    A buffer of which nothing is cut may have any shape: some models keep there what they computed for their last input.
    """
    actual = {name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}
    tensors = {**space.parameters, **space.buffers}
    for name in {**tensors, **actual}:
        axes = tensors.get(name)
        expected = None if axes is None else tuple(axis.size for axis in axes)
        if actual.get(name) != expected:
            if name in space.buffers and name in actual and axes and not any(axis.groups for axis in axes):
                continue
            raise SpaceError(
                f"the space belongs to another model: {name!r} has shape {actual.get(name, 'none')} here and "
                f"{expected or 'none'} in the space; trace this model"
            )
    modules = dict(model.named_modules())
    for attribute in space.attributes:
        value = vars(modules[attribute.module]).get(attribute.name) if attribute.module in modules else None
        if not isinstance(value, (int, list, tuple)):
            raise SpaceError(
                f"the space belongs to another model: {attribute.module!r} has no number {attribute.name!r} here; "
                "trace this model"
            )
