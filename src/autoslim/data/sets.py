"""What a data set is: images decoded in memory, or read when they are wanted, and the three parts of a data set."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoslim.data.pixels import Frame
from autoslim.errors import DataError


class Pictures(ABC):
    """Labelled images that are decoded when asked for, in any process.

    `labels` (N,) int64 are None where only the items tell; `part` of the source. `in_threads`: may several threads
    read at once? `is_foreign`: may reading draw random numbers, being a user's own code?
    """

    labels: torch.Tensor | None
    part = "train"
    in_threads = False
    is_foreign = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str | int:
        """What the image is called in messages and records: a file, a key, or its number."""

    @abstractmethod
    def read(self, index: int, frame: Frame) -> tuple[torch.Tensor, int]:
        """An image (C, H, W) uint8 and its label; `BrokenImage` if it cannot be decoded, `DataError` if it is none."""

    def epoch_order(self, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A random order of these images, as numbers into `indices`, in which they can be read fast."""
        return torch.randperm(len(indices), generator=generator)

    def check_key(self) -> str | None:
        """Stands for the content of all images, so that they need to be checked only once; None if nothing does."""
        return None


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (N, C, H, W) uint8 and their labels (N,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"images must be uint8 of shape (N, C, H, W), got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be int64 of shape ({len(self.images)},), "
                f"got {self.labels.dtype} {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images of {self.image_shape})"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, indices: torch.Tensor | Iterable[int]) -> ImageSet:
        """A copy of the images at `indices`, in their order, or of those where a mask is true."""
        indices = _indices(indices)
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class StreamedSet:
    """Images that are read from their source whenever a batch wants them, and their labels (N,) int64.

    `indices` (N,) are their numbers in `pictures`, `image_shape` is (C, H, W) after `frame`.
    """

    pictures: Pictures
    indices: torch.Tensor
    labels: torch.Tensor
    image_shape: tuple[int, int, int]
    frame: Frame

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"StreamedSet({len(self)} images of {self.image_shape})"

    def subset(self, indices: torch.Tensor | Iterable[int]) -> StreamedSet:
        """The images at `indices`, in their order, or those where a mask is true; nothing is read."""
        indices = _indices(indices)
        return StreamedSet(self.pictures, self.indices[indices], self.labels[indices], self.image_shape, self.frame)


@dataclass(frozen=True)
class Found:
    """What a source holds before labels are checked and parts are cut; without `test` a part of train becomes it."""

    train: ImageSet | Pictures
    test: ImageSet | Pictures | None
    class_names: tuple[str, ...] | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    default_augment: str | None = None  # None: the usual one of its channels
    remarks: tuple[str, ...] = ()
    default_size: int | None = None


def checked_label(label: int, where: str) -> int:
    """`DataError` for a label that int64 cannot hold."""
    if -(2**63) <= label < 2**63:
        return label
    raise DataError(f"{where} has a label of more than 64 bits; number the classes from 0 without gaps")


def _indices(indices: torch.Tensor | Iterable[int]) -> torch.Tensor:
    return indices if isinstance(indices, torch.Tensor) else torch.tensor(list(indices), dtype=torch.int64)


@dataclass(frozen=True)
class ImageData:
    """A data set in its three parts; `holdout` was cut from the training images, `test` never was.

    `mean` and `std` are those of the training pixels in [0, 1], a number for each channel. `skipped` names the broken
    images that were left out, `remarks` say what else was. The names of the images of each part are files below the
    folder, keys of shards, or numbers of images in the training (or test) part of the source.
    """

    train: ImageSet | StreamedSet
    holdout: ImageSet | StreamedSet
    test: ImageSet | StreamedSet
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    default_augment: str = "none"
    skipped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    train_names: Sequence[str | int] = ()
    holdout_names: Sequence[str | int] = ()
    test_names: Sequence[str | int] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.train.image_shape

    def record(self) -> dict[str, Any]:
        """What a run keeps of its data, as plain JSON types: which images were held out, and a digest of the rest."""
        parts = {"train": self.train, "holdout": self.holdout, "test": self.test}
        names = {"train": self.train_names, "holdout": self.holdout_names, "test": self.test_names}
        return {
            "images": {part: len(images) for part, images in parts.items()},
            "streamed": isinstance(self.train, StreamedSet),
            "image_shape": list(self.image_shape),
            "mean": list(self.mean),
            "std": list(self.std),
            "classes": list(self.class_names),
            "skipped": list(self.skipped),
            "remarks": list(self.remarks),
            "digest": {part: _digest(names[part], images.labels) for part, images in parts.items()},
            "holdout": [
                [name, self.class_names[label]]
                for name, label in zip(self.holdout_names, self.holdout.labels.tolist(), strict=True)
            ],
        }


def _digest(names: Sequence[str | int], labels: torch.Tensor) -> str:
    """Stands for the images of a part by their names and labels, in their order."""
    digest = hashlib.sha256()
    for name, label in zip(names, labels.tolist(), strict=True):
        digest.update(f"{name}\t{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
