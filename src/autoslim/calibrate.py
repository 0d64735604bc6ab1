"""BatchNorm statistics: exact ones for a net that is done, those of the batch while searching."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoslim.errors import DataError, SpaceError
from autoslim.lending import Lender
from autoslim.supernet import Supernet
from autoslim.switchable import SwitchableNet
from autoslim.tracing import split_input


class _Reached(Exception):
    """Stops a forward pass at the layer being measured."""


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set running mean and variance to those of `batches` (about 1,000 training images), in place.

    Layer after layer, each under the final statistics of the layers before it: the result is what the whole population
    has (variance with divisor n), in evaluation mode, however the images are split into batches. A batch is a tensor, a
    tuple of arguments or a mapping of keyword arguments. Of a pair whose second part is a tensor of whole numbers the
    first is taken, as of (images, labels) from a loader, unless the model cannot run without a second argument: one
    that it may be given goes in a mapping. Momentum, affine parameters, modes and everything else stay as they are.
    Layers that are not reached, or keep no statistics, are left alone. A layer that is called several times is measured
    over all its calls, while it, and what lies between them and is not measured yet, normalises by the batch: nothing
    depends on the statistics that were there before. Costs about half a forward pass per BatchNorm layer. Raises
    `DataError` if statistics would not be finite. (US-Net, section 3.4, where the average over batches is cumulative.)

    Of a `SwitchableNet` the private layers of its current switch are measured, and nothing else; `SpaceError` if its
    switches share their layers. A `Supernet` is measured at full width: statistics of another one are those of the net
    that `extract` gives.
    """
    if isinstance(model, SwitchableNet):
        _recalibrate_switch(model, batches)
        return
    if isinstance(model, Supernet):
        model = model.model
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise DataError(f"recalibrate_batchnorm needs a list or loader of batches, got a {type(batches).__name__}")
    takes_one = _required(model) < 2
    batches = [batch[0] if takes_one and _is_labelled(batch) else batch for batch in batches]
    if not batches:
        raise DataError("recalibrate_batchnorm needs at least one batch of images")
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    tracked = {layer: layer.track_running_stats for layer in layers}
    lender = Lender()
    names = {module: name for name, module in model.named_modules()}
    try:
        with evaluating(model), _named_lone_samples(), torch.no_grad():
            order = _execution_order(model, layers, batches[0], lender)
            for layer, _ in order:  # has no statistics yet, and so normalises by the batch; its buffers are left alone
                layer.training, layer.track_running_stats = True, False
            for layer, calls in order:
                _measure(model, layer, names[layer], calls, batches, lender)
                layer.training = False
    finally:
        for layer in layers:
            layer.track_running_stats = tracked[layer]


def _recalibrate_switch(net: SwitchableNet, batches: Iterable[Any]) -> None:
    """By way of the plain net of the current switch, whose statistics are the private ones."""
    if not net.is_private:
        raise SpaceError(
            f"recalibrate_batchnorm: the switches share their BatchNorm layers, so statistics of {net.current!r} would "
            f"be those of all; measure a net of its own: recalibrate_batchnorm(net.subnet({net.current!r}), batches)"
        )
    plain = net.subnet(net.current)
    recalibrate_batchnorm(plain, batches)
    measured = dict(plain.named_buffers())
    with torch.no_grad():
        for name, tensor in net.private_tensors(net.current).items():
            if name in measured:
                tensor.copy_(measured[name])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; modes are restored, each module's own."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        model.train(modes[model])  # by its own method, which may do more than that
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but BatchNorm normalises with the statistics of the batch; modes are restored.

    Nothing is done about running statistics: run subnets through `Supernet` or `run_subnet`, which work on copies.
    """
    with _named_lone_samples(), evaluating(model):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.training = True
        yield


@contextmanager
def _named_lone_samples() -> Iterator[None]:
    """`DataError` where a batch has no statistics."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            "a batch of one sample has no statistics at a BatchNorm layer that sees a single value for each channel; "
            "leave such a batch out (drop_last of a loader), or make batches larger"
        ) from error


def _is_labelled(batch: Any) -> bool:
    """(images, labels) as a loader gives them: the labels are integers."""
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
    return is_pair and not batch[1].is_floating_point()


def _required(model: nn.Module) -> int:
    """Without how many positional arguments a model cannot run; 0 if it does not say."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a compiled one
        return 0
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is each.empty for each in parameters)


def _execution_order(
    model: nn.Module, layers: list[_BatchNorm], batch: Any, lender: Lender
) -> list[tuple[_BatchNorm, int]]:
    """The layers as they are reached, with how often a forward pass calls each."""
    calls: dict[_BatchNorm, int] = {}

    def count(layer: nn.Module, args: Any) -> None:
        assert isinstance(layer, _BatchNorm)
        calls[layer] = calls.get(layer, 0) + 1

    handles = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        _forward(model, batch, lender)
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.items())


def _measure(model: nn.Module, layer: _BatchNorm, name: str, calls: int, batches: list[Any], lender: Lender) -> None:
    """Pool mean and variance of what reaches `layer` over all batches (Chan et al. 1979), and store them."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean = square = torch.zeros((), dtype=torch.float64, device=layer.running_mean.device)
    count, seen = 0, 0

    def pool(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        nonlocal mean, square, count, seen
        given = (*args, *kwargs.values())[0]
        channels = given.detach().transpose(0, 1).flatten(1).double()  # (C, N * positions)
        size = channels.shape[1]
        shift = channels.mean(1) - mean
        total = count + size
        square = square + channels.var(1, correction=0) * size + shift**2 * (count * size / total)
        mean, count = mean + shift * (size / total), total
        seen += 1
        if seen == calls:
            raise _Reached

    handle = layer.register_forward_pre_hook(pool, with_kwargs=True)
    try:
        for batch in batches:
            seen = 0
            try:
                _forward(model, batch, lender)
            except _Reached:
                continue
    finally:
        handle.remove()
    if not (count and mean.isfinite().all() and square.isfinite().all()):
        raise DataError(
            f"recalibrate_batchnorm: what reaches BatchNorm layer {name!r} has no finite mean and variance; look for "
            "infinite values and such that are not numbers in the images, and in the weights before that layer"
        )
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(square / count)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(len(batches))


def _forward(model: nn.Module, batch: Any, lender: Lender) -> None:
    with lender.lent(batch) as own:
        args, kwargs = split_input(own)
        model(*args, **kwargs)
