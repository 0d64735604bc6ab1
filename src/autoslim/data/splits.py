"""Class names checked against labels, stratified parts fixed by a seed, and statistics of pixels."""

from __future__ import annotations

import numpy as np
import torch

from autoslim.data.randomness import generator
from autoslim.errors import DataError


def checked_class_names(train: torch.Tensor, test: torch.Tensor, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The class names, `names` or the numbers; `DataError` unless the labels of both parts fit them."""
    present, tested = np.unique(train.numpy()).tolist(), np.unique(test.numpy()).tolist()
    lowest, highest = min(present[0], tested[0]), max(present[-1], tested[-1])
    if lowest < 0:
        raise DataError(f"label {lowest} is negative; labels must be whole numbers from 0")
    if names is not None and highest >= len(names):
        raise DataError(f"label {highest} is too high for {len(names)} class names; the highest is {len(names) - 1}")
    if len(present) < 2:
        raise DataError(
            f"holds only one class, {names[present[0]] if names else present[0]!r}; at least two are needed"
        )
    for label in tested:
        if label not in present:
            name = names[label] if names else label
            raise DataError(f"class {name!r} is in the test part but has no training image; add some or remove it")
    num_classes = len(names) if names else highest + 1
    if len(present) < num_classes:
        label = next(i for i in range(num_classes) if i >= len(present) or present[i] != i)
        name = names[label] if names else label
        raise DataError(f"class {name!r} has no training image; number the classes from 0 without gaps")
    return names or tuple(map(str, range(num_classes)))


def stratified(
    labels: torch.Tensor, part: float | int, seed: int, class_names: tuple[str, ...], what: str
) -> torch.Tensor:
    """True for the images to cut off: `part` of them (a share or a number), of each class its share, at least one."""
    counts = torch.bincount(labels, minlength=len(class_names)).numpy()
    fewest, most = len(counts), len(labels) - len(counts)
    if counts.min() < 2:
        name = class_names[int(counts.argmin())]
        raise DataError(
            f"class {name!r} has only {counts.min()} image to cut the {what} from; each class needs two or more"
        )
    if isinstance(part, float) and not 0 < part < 1:
        raise DataError(f"a {what} of {part} is no share between 0 and 1; for a number of images write a whole number")
    wanted = max(fewest, round(part * len(labels))) if isinstance(part, float) else part
    if not fewest <= wanted <= most:
        raise DataError(
            f"a {what} of {part} would take {wanted} of {len(labels)} images and leave a class empty; "
            f"with {len(counts)} classes it can take {fewest} to {most}"
        )
    quota = counts * (wanted / len(labels))
    cut = np.floor(quota).astype(np.int64).clip(1, counts - 1)
    while short := wanted - int(cut.sum()):
        step = 1 if short > 0 else -1
        has_room = cut < counts - 1 if step > 0 else cut > 1
        cut[np.where(has_room, (quota - cut) * step, -np.inf).argmax()] += step
    draws = generator(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, number in enumerate(cut):
        members = (labels == label).nonzero().flatten()
        chosen[members[torch.randperm(len(members), generator=draws)[: int(number)]]] = True
    return chosen


def statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]; exact, from histograms."""
    means, stds = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double() / images[:, channel].numel()
        mean = float(share @ values)
        means.append(mean)
        stds.append(max(float(share @ (values - mean) ** 2) ** 0.5, 1 / 255))  # a constant channel: no division by 0
    return tuple(means), tuple(stds)
