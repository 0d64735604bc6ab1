"""Cutting tensors: how widths become shorter tensors is written here once; running and extracting both use it."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from autoslim.errors import SpaceError
from autoslim.space import Axis, ChannelSpace

Places = list[tuple[int, range | tuple[int, ...]]]

# A subnet runs with its tensors in the places of the model's own. Another thread that looked for those then would find
# the cut ones, and put them back for good; so one waits for the other. Plain modules, as `extract` gives, need none.
alone = threading.RLock()


def places_of(axes: tuple[Axis, ...], widths: Mapping[str, int]) -> Places:
    """The dimensions that `widths` make shorter, with the positions that are kept of each."""
    found = ((dim, axis, axis.positions(widths)) for dim, axis in enumerate(axes) if axis.groups)
    return [(dim, positions) for dim, axis, positions in found if len(positions) != axis.size]


def cut(tensor: Tensor, axes: tuple[Axis, ...], widths: Mapping[str, int]) -> Tensor:
    """`tensor` with only the positions kept by `widths`: a view where they are prefixes, else a differentiable copy."""
    return _taken(tensor, places_of(axes, widths))


def _taken(tensor: Tensor, places: Places) -> Tensor:
    for dim, positions in places:
        if isinstance(positions, range):
            tensor = tensor.narrow(dim, 0, len(positions))
        else:
            tensor = tensor.index_select(dim, torch.tensor(positions, device=tensor.device))
    return tensor


def _is_prefix(places: Places) -> bool:
    return all(isinstance(positions, range) for _, positions in places)


def _part(tensor: Tensor, places: Places) -> Tensor:
    """What `_taken` gives of a tensor without gradient, more quickly."""
    if not _is_prefix(places):
        return _taken(tensor, places)
    shape = list(tensor.shape)
    for dim, positions in places:
        shape[dim] = len(positions)
    return tensor.as_strided(shape, tensor.stride())


def put_back(tensor: Tensor, axes: tuple[Axis, ...], widths: Mapping[str, int], values: Tensor) -> None:
    """Write the values that `cut(tensor, axes, widths)` gave, changed since, to where they were taken from."""
    with torch.no_grad():
        _put(tensor, places_of(axes, widths), values.to(tensor.dtype))


def _put(tensor: Tensor, places: Places, values: Tensor) -> None:
    if not places:
        tensor.copy_(values)
        return
    grid = [torch.arange(size, device=tensor.device) for size in tensor.shape]
    for dim, positions in places:
        grid[dim] = torch.tensor(positions, device=tensor.device)
    tensor[torch.meshgrid(grid, indexing="ij")] = values


def active_tensors(
    model: nn.Module, space: ChannelSpace, widths: Mapping[str, int], given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors that make `model` the subnet of these widths, for `torch.func.functional_call`.

    Parameters that are cut are views of (or gathered from) the model's own, so gradients reach it. Buffers are copies:
    running statistics that a subnet updates in training mode never reach the model. Attributes such as `groups` must be
    set around the call as well: see `active_attributes`. Tensors that are `given` are taken instead.

    Raises `SpaceError` for widths that the space does not have.
    """
    space.check(widths)
    return _active(_owned(model), space, widths, given or {})


class _Owned(NamedTuple):
    """A place that a module has for a parameter or a buffer: `places[key]`, which holds `tensor`."""

    places: dict[str, Any]
    key: str
    name: str  # the first one of the tensor, as `named_parameters` has it
    tensor: Tensor
    is_parameter: bool


def _owned(model: nn.Module) -> list[_Owned]:
    """All places with a tensor in them; found once for a pass, for the walk takes longer than the cutting."""
    names: dict[int, str] = {}
    found = []
    for prefix, module in model.named_modules():
        for places in (module._parameters, module._buffers):
            for key, tensor in places.items():
                if tensor is not None:
                    name = names.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                    found.append(_Owned(places, key, name, tensor, places is module._parameters))
    return found


def _active(
    owned: Sequence[_Owned], space: ChannelSpace, widths: Mapping[str, int], given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    tensors = dict(given)
    direct: dict[str, tuple[Tensor, Places]] = {}
    for _, _, name, tensor, is_parameter in owned:
        if name in tensors or name in direct:
            continue
        if not is_parameter:
            tensors[name] = cut(tensor.detach(), space.buffers[name], widths).clone()
        elif places := places_of(space.parameters[name], widths):
            if _is_direct.get() and tensor.requires_grad and not _has_hooks(tensor):
                direct[name] = tensor, places
            else:
                tensors[name] = _taken(tensor, places)
    for names in _bundles({name: tensor.numel() for name, (tensor, _) in direct.items()}):
        parts = _Parts.apply([direct[name][1] for name in names], *(direct[name][0] for name in names))
        tensors |= zip(names, parts, strict=True)
    return tensors


def _has_hooks(parameter: Tensor) -> bool:
    """Somebody looks at its gradient, who would see nothing of what is added in place."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _bundles(elements: Mapping[str, int]) -> Iterator[list[str]]:
    """Names of neighbours, small ones together: no more than a hundredth of all elements, unless it is one."""
    limit, size, names = sum(elements.values()) // 100, 0, list[str]()
    for name, count in elements.items():
        if names and size + count > limit:
            yield names
            size, names = 0, []
        size += count
        names.append(name)
    if names:
        yield names


_is_direct: ContextVar[bool] = ContextVar("_is_direct", default=False)


@contextmanager
def gradients_in_place() -> Iterator[None]:
    """Nets that run inside add their gradients to those parts of the model's own that they are of, when they go back.

    That is the same as ever, but for a tensor of the size of the whole parameter for each, most of it zeros. But
    `torch.autograd.grad` sees nothing of it: it is for steps that end in `backward()`. Parameters with hooks get their
    gradients the usual way.
    """
    token = _is_direct.set(True)
    try:
        yield
    finally:
        _is_direct.reset(token)


class _Parts(torch.autograd.Function):
    """Parts of parameters, whose gradients go to where those of the parameters lie.

    Of several at once, for most parameters are small and each such call takes as long as adding their gradients does;
    but the first gradient of a bundle is held until the last one is there.
    """

    @staticmethod
    def forward(ctx: Any, places: Sequence[Places], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.places = [None if _is_prefix(each) else each for each in places]
        ctx.parameters = parameters
        ctx.set_materialize_grads(False)
        # dense copies would save kernels theirs, and hold them for a pass
        return tuple(_part(parameter.detach(), each) for parameter, each in zip(parameters, places, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        for parameter, places, gradient in zip(ctx.parameters, ctx.places, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            whole = parameter.grad
            if places is None:  # as nearly always, and this is done for each parameter of each net
                whole.as_strided(gradient.shape, whole.stride()).add_(gradient)
            else:
                _put(whole, places, _taken(whole, places) + gradient)
        return (None, *(None for _ in ctx.parameters))


@contextmanager
def active_attributes(model: nn.Module, space: ChannelSpace, widths: Mapping[str, int]) -> Iterator[None]:
    """Set `groups`, `normalized_shape` and the like for `widths`; they are restored whatever happens inside."""
    replaced = []
    try:
        modules = dict(model.named_modules(remove_duplicate=False))
        for attribute in space.attributes:
            own = modules[attribute.module].__dict__  # a module takes its time over setting an attribute
            before = own[attribute.name]
            value = _like(before, attribute.value(widths))
            if before != value:
                replaced.append((own, attribute.name, before))
                own[attribute.name] = value
        yield
    finally:
        for own, name, before in replaced:
            own[name] = before


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

    Tensors that are `given`, under their names in the model, are used in place of its own; they may change. Of several
    threads one waits for the other.

    Raises `SpaceError` for widths that the space does not have.
    """
    space.check(widths)
    with alone:
        owned = _owned(model)
        tensors = _active(owned, space, widths, given or {})

        @contextmanager
        def again() -> Iterator[None]:
            """As it was, but for statistics, which were updated once."""
            spare = {name: each if each.requires_grad else each.clone() for name, each in tensors.items()}
            with alone, active_attributes(model, space, widths), _in_place_of(owned, spare):
                yield

        active = active_attributes(model, space, widths), _in_place_of(owned, tensors)
        with active[0], active[1], _computed_again(again), mode or nullcontext():
            return model(*args, **(kwargs or {}))


_RECOMPUTING = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


@contextmanager
def _computed_again(within: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """What the model's own code gives to `torch.utils.checkpoint` inside is computed again `within` that.

    By then the tensors of the subnet are no longer in their places. torch has no hook for it: the names that its
    function looks up are replaced, those that there are in this version.
    """
    if not torch.is_grad_enabled():
        yield
        return

    def later(function: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
        """The function, but `within` that from its second call on, or from the `first`."""
        is_again = first

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_again
            with within() if is_again else nullcontext():
                is_again = True
                return function(*args, **kwargs)

        return call

    before = {name: getattr(checkpoint, name) for name in _RECOMPUTING if hasattr(checkpoint, name)}
    reentrant = checkpoint.CheckpointFunction

    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], *rest: Any) -> Any:
            return reentrant.apply(later(function, first=False), *rest)

    try:
        for name, recomputing in before.items():
            setattr(checkpoint, name, lambda f, *a, _real=recomputing, **k: _real(later(f, first=True), *a, **k))
        checkpoint.CheckpointFunction = Reentrant  # type: ignore[assignment,misc]
        yield
    finally:
        for name, recomputing in before.items():
            setattr(checkpoint, name, recomputing)
        checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


@contextmanager
def _in_place_of(owned: Sequence[_Owned], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors into the places that parameters and buffers of these names have, and back afterwards.

    `torch.func.functional_call` does the same, but leaves a module that is registered under two names with its
    replacement.
    """
    replaced = [each for each in owned if each.name in tensors]
    try:
        for places, key, name, *_ in replaced:
            places[key] = tensors[name]
        yield
    finally:
        for places, key, _, tensor, _ in replaced:
            places[key] = tensor


def extract(model: nn.Module, space: ChannelSpace, widths: Mapping[str, int]) -> nn.Module:
    """A plain, independent module of the user's own class: the subnet of these widths.

    Parameters and buffers are cut copies, and `in_channels`, `groups`, `num_features`, `normalized_shape` and the like
    say what is true of it. Raises `SpaceError` if the widths or the model do not fit the space.
    """
    space.check(widths)

    def shorten(name: str, tensor: Tensor) -> Tensor:
        return cut(tensor, space.parameters.get(name) or space.buffers.get(name) or (), widths).clone()

    with alone:
        check_model(model, space)
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

    Other tensors that modules hold as plain attributes, or in lists and dictionaries, have no name: it is empty. The
    originals are never copied, so a large model can be cut, or moved to the meta device, without a second one. Raises
    `SpaceError`, naming the attribute, for what cannot be copied.
    """
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            memo[id(parameter)] = nn.Parameter(convert(name, parameter.detach()), parameter.requires_grad)
        for name, buffer in model.named_buffers():
            memo[id(buffer)] = convert(name, buffer.detach())
        for module in model.modules():
            for name, value in vars(module).items():
                for tensor in () if name in _OWN else _leaves(value):
                    if isinstance(tensor, Tensor) and id(tensor) not in memo:
                        memo[id(tensor)] = convert("", tensor.detach())
        return _copied(model, memo)


def _leaves(value: Any) -> Iterable[Any]:
    """What an attribute holds, unless it can be seen at once that it holds no tensor, as nearly always."""
    if isinstance(value, Tensor):
        return (value,)
    if not isinstance(value, (list, tuple, dict)) or not value:
        return ()
    if isinstance(value, (list, tuple)) and all(type(each) in _ATOMIC for each in value):
        return ()
    return tree_leaves(value)


_OWN = frozenset(("_parameters", "_buffers", "_modules"))
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
        try:
            return copy.deepcopy(module, memo)
        except (RuntimeError, TypeError) as error:
            raise _uncopied(kind.__name__, error) from error
    new = kind.__new__(kind)
    memo[id(module)] = new
    for name, value in vars(module).items():
        if type(value) in _ATOMIC:  # most of them: spare the call
            new.__dict__[name] = value
        elif name != "_compiled_call_impl":
            try:
                new.__dict__[name] = _copied_value(value, memo)
            except (RuntimeError, TypeError) as error:
                raise _uncopied(f"the attribute {name!r} of {kind.__name__}", error) from error
    return new


def _uncopied(what: str, error: Exception) -> SpaceError:
    """For tensors of a graph inside an object, locks, open files."""
    why = str(error).splitlines()[0]
    return SpaceError(f"{what} cannot be copied ({why}); set what it keeps of a pass to None, and back afterwards")


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
