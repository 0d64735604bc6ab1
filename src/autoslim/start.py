"""Where the training of a supernet starts: with trained weights, and their channels in the order of importance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.calibrate import evaluating
from autoslim.config import Config
from autoslim.data import Batches, ImageData
from autoslim.export import load_tensors, save_tensors
from autoslim.pretrained import load_pretrained
from autoslim.progress import Progress
from autoslim.records import naming
from autoslim.run import Run
from autoslim.sorting import first_order, sort_channels
from autoslim.space import ChannelSpace
from autoslim.train import load_unshared, unshared

_FIRST_ORDER_BATCH = 50  # a product of weight and gradient per batch: over all images at once gradients cancel


def starting_weights(
    run: Run, model: nn.Module, every: ChannelSpace, data: ImageData, progress: Progress
) -> Callable[[], None]:
    """Give `model`, in place, the weights its training starts from; a function that keeps them is returned.

    They are computed once: a run that goes on finds them in `supernet/start.safetensors`. Channels are sorted here
    unless `plain_epochs` come first.
    """
    config = run.config
    if run.start.exists():
        with naming(run.start):
            load_unshared(model, load_tensors(run.start)[0])
        return lambda: None
    sorts = config.train.sort != "none" and not config.train.plain_epochs
    record: dict[str, Any] = {"pretrained": config.pretrained, "sort": config.train.sort if sorts else "none"}
    if config.pretrained is not None:
        loaded = load_pretrained(
            model,
            config.pretrained,
            name=config.model,
            model_args=config.model_args,
            num_classes=data.num_classes,
        )
        for line in loaded.lines():
            progress.say(f"pretrained: {line}")
        record |= {"source": loaded.source, "reinitialised": loaded.reinitialised, "unused": loaded.unused}
    if sorts:
        record |= sort_weights(config, model, every, data, progress)
    if config.pretrained is None and not sorts:
        return lambda: None
    return lambda: save_tensors(run.start, unshared(model), record)


def sort_weights(
    config: Config, model: nn.Module, every: ChannelSpace, data: ImageData, progress: Progress
) -> dict[str, Any]:
    """Sort the channels of `model`, in place, by `train.sort`; returns what is to be known of it."""
    device = next(model.parameters()).device
    images = _images(config, data, 8, device)
    example = next(iter(images))[0][:2]
    before = _outputs(model, example)
    sort = config.train.sort
    importance: Any = _first_order(config, model, every, data, device) if sort == "first-order" else sort
    done = sort_channels(model, every, importance, example_input=example)
    after = _outputs(model, example)
    difference = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
    progress.say(
        f"sorted: {len(done)} of {len(every.groups)} groups by {sort}; outputs differ by {difference:.1g} of the "
        f"largest"
    )
    return {"sorted": done, "difference": difference}


def _first_order(
    config: Config, model: nn.Module, every: ChannelSpace, data: ImageData, device: torch.device
) -> dict[str, Tensor]:
    """Scores on training images: of each batch by itself, added up."""
    total: dict[str, Tensor] = {}
    model.eval()  # running statistics stay as they are
    for images, labels in _images(config, data, _FIRST_ORDER_BATCH, device):

        def backward(net: nn.Module, images: Tensor = images, labels: Tensor = labels) -> None:
            nn.functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]

        for group, scores in first_order(model, every, backward).items():
            total[group] = total[group] + scores if group in total else scores
    model.train()
    return total


def _images(config: Config, data: ImageData, batch_size: int, device: torch.device) -> Batches:
    """Training images, the first so many of a shuffle by the seed, without augmentation."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(config.seed))
    chosen = data.train.subset(order[: config.calibration_images])
    return Batches(chosen, batch_size, mean=data.mean, std=data.std, seed=config.seed, device=device)


def _outputs(model: nn.Module, example: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        output = model(example)
    assert isinstance(output, Tensor), "the run has seen its logits before"
    return output
