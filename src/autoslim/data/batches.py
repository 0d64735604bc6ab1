"""Batches of a data set for training and evaluation: from memory, or streamed by worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, Dataset

from autoslim.data.augment import (
    Augmentation,
    ImageAugment,
    batch_augments,
    check_channels,
    image_augments,
    parse_augment,
    runs_in_batches,
    wants_whole,
)
from autoslim.data.loading import Failure, close_loader, items_of, make_loader
from autoslim.data.mixing import Mixer, parse_mix
from autoslim.data.pixels import BrokenImage, Frame, shape_text
from autoslim.data.randomness import generator, preserved, reseed
from autoslim.data.reading import image_text
from autoslim.data.sets import ImageSet, StreamedSet
from autoslim.errors import DataError

_MIXING = 1  # apart from the seeds of images


class Batches:
    """An iterable over (images (B, C, H, W) float32, normalised; labels (B,)) on `device`, again and again.

    Order and augmentation depend on `seed` and the epoch alone, so that a resumed run repeats them; call `set_epoch`
    before each epoch. `augment` is as in `parse_augment`; with `drop_last` every batch is full. With `mix`, as in
    `parse_mix`, labels are shares (B, `num_classes`) float32. `share=(rank, size)` gives every `size`-th image of each
    batch, for one of several processes that work on it together; in memory each augments by draws of its own.

    A set in memory is augmented batch by batch. A streamed one is read and augmented image by image in `workers`
    processes (0: in this one), each of which has up to `prefetch` batches ready; so is a set in memory if something
    in `augment` cannot be done on batches. How many workers there are changes no pixel.
    """

    def __init__(
        self,
        data: ImageSet | StreamedSet,
        batch_size: int,
        *,
        mean: Iterable[float],
        std: Iterable[float],
        augment: str = "none",
        mix: str = "none",
        num_classes: int | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        workers: int = 0,
        prefetch: int = 2,
        share: tuple[int, int] = (0, 1),
    ):
        if 0 < batch_size < share[1]:
            raise DataError(f"a batch of {batch_size} cannot be shared by {share[1]} processes; raise batch_size")
        if batch_size < 1:
            raise DataError(f"a batch must hold at least 1 image, got {batch_size}")
        if drop_last and len(data) < batch_size:
            raise DataError(f"{len(data)} images do not fill one batch of {batch_size}; take a smaller batch size")
        if workers < 0 or prefetch < 1:
            raise DataError(f"workers must be at least 0 and prefetch at least 1, got {workers} and {prefetch}")
        mean, std = [*mean], [*std]
        # (C, 1, 1), in units of a uint8 pixel
        self._mean, self._std = (torch.tensor(v, device=device).view(-1, 1, 1) * 255 for v in (mean, std))
        channels = data.image_shape[0]
        if not len(self._mean) == len(self._std) == channels:
            raise DataError(
                f"images of {channels} channels need as many means and stds, got {len(self._mean)} and {len(self._std)}"
            )
        self.data = data
        self.batch_size = batch_size
        self.share = share
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.device = torch.device(device)
        self._is_ahead = self.device.type == "cuda"
        self._num_images = len(data) // batch_size * batch_size if drop_last else len(data)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        augmentations = parse_augment(augment)
        check_channels(augmentations, channels)
        self._mixer = _mixer(mix, num_classes, data)
        self._loader: DataLoader[_Batch | Failure] | None = None
        if isinstance(data, ImageSet) and runs_in_batches(augmentations):
            self._augments = batch_augments(augmentations, mean)
        else:
            reader = _Reader(data, augmentations, mean, seed)
            self._loader = make_loader(
                reader,
                _Plan(self),
                workers,
                prefetch=prefetch,
                pin=self.device.type == "cuda",
                persistent=shuffle,  # one pool for all epochs; evaluation is too seldom to keep one
            )

    def __len__(self) -> int:
        return -(-self._num_images // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation that belong to `epoch`."""
        self.epoch = epoch

    def close(self) -> None:
        """End the worker processes, if there are any; the next epoch starts new ones."""
        if self._loader is not None:
            close_loader(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch = self.epoch
        for number, (images, labels) in enumerate(self._from_memory() if self._loader is None else self._streamed()):
            images = images.to(torch.float32, memory_format=self._memory_format).sub_(self._mean).div_(self._std)
            if self._mixer is not None:
                images, labels = self._mixer(images, labels, self.seed, epoch, number, _MIXING, *self.share[:1])
                images = images.contiguous(memory_format=self._memory_format)
            yield images, labels

    def _from_memory(self) -> Iterator[_Batch]:
        assert isinstance(self.data, ImageSet)
        draws = generator(self.seed, self.epoch)
        order = torch.randperm(len(self.data), generator=draws) if self.shuffle else None
        rank, size = self.share
        if rank:  # other images, augmented by other draws
            draws = generator(self.seed, self.epoch, rank)
        starts = range(0, self._num_images, self.batch_size)
        spans = (slice(start + rank, min(start + self.batch_size, self._num_images), size) for start in starts)
        chosen = (span if order is None else order[span] for span in spans)
        sent = (self._sent(self.data.images[each], self.data.labels[each]) for each in chosen)
        for images, labels in _one_ahead(sent) if self._is_ahead else sent:
            for augment in self._augments:
                images = augment(images, draws)
            yield images, labels

    def _sent(self, images: torch.Tensor, labels: torch.Tensor) -> _Batch:
        """On the device; a GPU copies pinned memory by itself while this process goes on."""
        if self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _streamed(self) -> Iterator[_Batch]:
        assert self._loader is not None
        for images, labels in items_of(self._loader):
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def _one_ahead(batches: Iterable[_Batch]) -> Iterator[_Batch]:
    """The same batches, each taken before the one in front of it is handed out, so that it is there in time."""
    waiting: _Batch | None = None
    for batch in batches:
        if waiting is not None:
            yield waiting
        waiting = batch
    if waiting is not None:
        yield waiting


def _mixer(mix: str, num_classes: int | None, data: ImageSet | StreamedSet) -> Mixer | None:
    mixings = parse_mix(mix)
    if not mixings:
        return None
    if num_classes is None or num_classes <= int(data.labels.max()):
        raise DataError(f"mixing needs the number of classes, got {num_classes}; pass num_classes")
    return Mixer(mixings, num_classes)


_Batch = tuple[torch.Tensor, torch.Tensor]
_Key = tuple[int, int]  # epoch and number of an image in the set


class _Plan:
    """Which images make up the batches of the current epoch; the epoch goes to the workers with every image."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[_Key]]:
        batches = self._batches
        epoch, data, count = batches.epoch, batches.data, batches._num_images
        rank, size = batches.share
        order = torch.arange(len(data))
        if batches.shuffle:
            draws = generator(batches.seed, epoch)
            if isinstance(data, StreamedSet):
                order = data.pictures.epoch_order(data.indices, draws)
            else:
                order = torch.randperm(len(data), generator=draws)
        for start in range(0, count, batches.batch_size):
            chosen = order[start + rank : min(start + batches.batch_size, count) : size]
            yield [(epoch, index) for index in chosen.tolist()]


@dataclass(eq=False)
class _Reader(Dataset[_Batch]):
    """Reads whole batches of images, augmented; whatever is random in an image depends on seed, epoch and its number.

    A `Failure` takes the place of a batch that cannot be read: an exception would come out of a worker as a traceback.
    """

    data: ImageSet | StreamedSet
    augmentations: tuple[Augmentation, ...]
    mean: Sequence[float]
    seed: int

    def __post_init__(self) -> None:
        self._transforms: list[ImageAugment] = image_augments(self.augmentations, self.data.image_shape[1:], self.mean)

    def __getitems__(self, keys: Sequence[_Key]) -> _Batch | Failure:
        images = torch.empty((len(keys), *self.data.image_shape), dtype=torch.uint8)
        labels = torch.empty(len(keys), dtype=torch.int64)
        is_foreign = isinstance(self.data, StreamedSet) and self.data.pictures.is_foreign
        with preserved():
            for row, (epoch, number) in enumerate(keys):
                if is_foreign or self._transforms:
                    reseed(self.seed, epoch, number, all_generators=is_foreign)
                try:
                    image, labels[row] = self._read(number)
                except DataError as error:
                    return Failure(str(error))
                for transform in self._transforms:
                    image = transform(image)
                images[row] = image
        return images, labels

    def _read(self, number: int) -> tuple[torch.Tensor, int]:
        data = self.data
        if isinstance(data, ImageSet):
            return data.images[number], int(data.labels[number])
        index = int(data.indices[number])
        is_whole = wants_whole(self.augmentations)
        frame: Frame = replace(data.frame, whole=is_whole)
        name = image_text(data.pictures, index)
        try:
            image, label = data.pictures.read(index, frame)
        except BrokenImage as error:
            raise DataError(f"cannot decode {name}: {error}; it could be read before: was it changed?") from error
        if label != data.labels[number]:
            raise DataError(f"{name} has the label {label} now, and had {int(data.labels[number])} before")
        if not is_whole and image.shape != data.image_shape:
            raise DataError(
                f"{name} is {shape_text(image.shape)}, others {shape_text(data.image_shape)}; set an image size"
            )
        if len(image) != data.image_shape[0]:
            raise DataError(f"{name} has {len(image)} channels, others {data.image_shape[0]}; set data.channels")
        return image, label
