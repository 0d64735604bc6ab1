"""Augmentations by name: of whole batches in memory, or of one image at a time by torchvision's v2 transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from autoslim.data.pixels import luminance
from autoslim.errors import ConfigError, DataError, nearest

BatchAugment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
ImageAugment = Callable[[torch.Tensor], torch.Tensor]
_Size = tuple[int, int]  # (H, W)


@dataclass(frozen=True)
class Augmentation:
    """An augmentation and its number, such as 0.25 of `erase:0.25`; None is the usual one."""

    name: str
    value: float | None = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}:{self.value:g}"


@dataclass(frozen=True)
class _Kind:
    """How one augmentation is done: `batch` on (B, C, H, W) in memory, where it can be, `image` on (C, H, W).

    Both make the function from the number, and the first from the size of the result and the mean colour.
    """

    image: Callable[[float, _Size, Sequence[float]], ImageAugment]
    batch: Callable[[float, Sequence[float]], BatchAugment] | None = None
    usual: float | None = None  # None: it takes no number
    bounds: tuple[float, float] = (0.0, 1.0)
    meaning: str = ""
    whole: bool = False  # takes its crop from the whole image
    channels: tuple[int, ...] = (1, 3, 4)


def parse_augment(text: str) -> tuple[Augmentation, ...]:
    """The augmentations named in `text`, comma separated; `ConfigError` with the nearest name for an unknown one.

    `none` stands alone. They are applied in the order given; some take a number after a colon:

    - `flip` mirrors half of the images;
    - `crop` shifts each by up to an eighth of its size, or by `crop:SHARE` of it, over black;
    - `resized-crop` enlarges a random part of at least a quarter of the area, `wide-resized-crop` one of at least 8 %,
      `resized-crop:SHARE` one of at least SHARE;
    - `jitter` varies brightness, contrast and saturation by up to 0.4, or by `jitter:STRENGTH`;
    - `lighting` shifts colours along the principal axes of ImageNet;
    - `rand-augment` (two operations of magnitude 9 of 30, or of `rand-augment:MAGNITUDE`), `trivial-augment` and
      `auto-augment` are those of torchvision;
    - `erase` fills, in a quarter of the images or in `erase:SHARE` of them, a rectangle with the mean colour.
    """
    names = tuple(name.strip() for name in text.split(","))
    if names == ("none",):
        return ()
    return tuple(_parse_one(name, text) for name in names)


def _parse_one(given: str, text: str) -> Augmentation:
    name, colon, number = given.partition(":")
    if name == "none":
        raise ConfigError(f"augmentation {text!r}: 'none' does not go with others")
    if name not in _KINDS:
        raise ConfigError(f"no augmentation {name!r} in {text!r}; {nearest(name, [*_KINDS, 'none'])}")
    if not colon:
        return Augmentation(name)
    kind = _KINDS[name]
    if kind.usual is None:
        raise ConfigError(f"augmentation {given!r}: {name} takes no number")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    low, high = kind.bounds
    if not low <= value <= high:
        raise ConfigError(f"augmentation {given!r}: write {name}:NUMBER, {kind.meaning}, from {low:g} to {high:g}")
    return Augmentation(name, value)


def runs_in_batches(augmentations: Sequence[Augmentation]) -> bool:
    """Can all of them be done on a whole batch?"""
    return all(_KINDS[each.name].batch is not None for each in augmentations)


def wants_whole(augmentations: Sequence[Augmentation]) -> bool:
    """Does one of them cut its part out of the whole image, and not out of the centre square?"""
    return any(_KINDS[each.name].whole for each in augmentations)


def check_channels(augmentations: Sequence[Augmentation], channels: int) -> None:
    """`ConfigError` for an augmentation that images of so many channels cannot have."""
    for each in augmentations:
        if channels not in _KINDS[each.name].channels:
            raise ConfigError(
                f"augmentation {str(each)!r} needs images of 1 or 3 channels, these have {channels}; set data.channels"
            )


def batch_augments(augmentations: Sequence[Augmentation], mean: Sequence[float]) -> list[BatchAugment]:
    """Functions of (B, C, H, W) uint8, or float32 of the same range, and a generator, which give the same."""
    found = []
    for each in augmentations:
        kind = _KINDS[each.name]
        assert kind.batch is not None, f"{each} is done image by image"
        found.append(kind.batch(_value(each), mean))
    return found


def image_augments(augmentations: Sequence[Augmentation], size: _Size, mean: Sequence[float]) -> list[ImageAugment]:
    """Functions of (C, H, W) uint8, which give the same and draw from torch's global generator.

    `size` (H, W) is that of the result, `mean` the colour of what is erased.
    """
    if augmentations:
        try:
            import torchvision.transforms.v2  # noqa: F401
        except ImportError as error:
            raise DataError("augmenting image by image needs torchvision: pip install 'autoslim[vision]'") from error
    return [_KINDS[each.name].image(_value(each), size, mean) for each in augmentations]


def _value(each: Augmentation) -> float:
    usual = _KINDS[each.name].usual
    return each.value if each.value is not None else usual if usual is not None else 0.0


# ---- of whole batches; draws come from a CPU generator so that they are equal on every device


def _flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored.to(images.device), images.flip(-1), images)


def _crop(images: torch.Tensor, generator: torch.Generator, share: float = 0.125) -> torch.Tensor:
    height, width = images.shape[-2:]
    top, left = int(height * share), int(width * share)
    windows = F.pad(images, (left, left, top, top)).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, dy, dx, H, W)
    y = torch.randint(2 * top + 1, (len(images),), generator=generator)
    x = torch.randint(2 * left + 1, (len(images),), generator=generator)
    return windows[torch.arange(len(images)), :, y, x]


def _resized_crop(images: torch.Tensor, generator: torch.Generator, least: float = 0.25) -> torch.Tensor:
    area, ratio, x, y = torch.rand(4, len(images), generator=generator)
    area = least + (1 - least) * area
    ratio = (4 / 3) ** (2 * ratio - 1)
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    transform = torch.zeros(len(images), 2, 3)
    transform[:, 0, 0], transform[:, 0, 2] = width, (2 * x - 1) * (1 - width)
    transform[:, 1, 1], transform[:, 1, 2] = height, (2 * y - 1) * (1 - height)
    grid = F.affine_grid(transform.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


def _jitter(images: torch.Tensor, generator: torch.Generator, strength: float = 0.4) -> torch.Tensor:
    factors = (1 - strength) + 2 * strength * torch.rand(3, len(images), 1, 1, 1, generator=generator)
    brightness, contrast, saturation = factors.to(images.device)
    images = (images * brightness).clamp_(0, 255)
    images = torch.lerp(luminance(images).mean((2, 3), keepdim=True), images, contrast).clamp_(0, 255)
    if images.shape[1] == 3:
        images = torch.lerp(luminance(images), images, saturation).clamp_(0, 255)
    return images


# principal axes of the colours of ImageNet and deviations along them, for values from 0 to 1 (Krizhevsky et al. 2012)
_COLOUR_AXES = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
_COLOUR_DEVIATIONS = (0.2175, 0.0188, 0.0045)


def _lighting(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if images.shape[1] != 3:
        return images
    alphas = 0.1 * torch.randn(len(images), 3, generator=generator)
    shift = 255 * (alphas * torch.tensor(_COLOUR_DEVIATIONS)) @ torch.tensor(_COLOUR_AXES).T
    return (images + shift.view(-1, 3, 1, 1).to(images.device)).clamp_(0, 255)


def _erase(images: torch.Tensor, generator: torch.Generator, probability: float, mean: Sequence[float]) -> torch.Tensor:
    count, _, height, width = images.shape
    chosen, area, ratio, y, x = torch.rand(5, count, generator=generator)
    area, ratio = (0.02 + 0.31 * area) * height * width, (10 / 3) ** (2 * ratio - 1)
    high = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    top, left = (y * (height - high + 1)).floor(), (x * (width - wide + 1)).floor()
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < (top + high)[:, None])  # (B, H)
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])  # (B, W)
    erased = in_rows[:, None, :, None] & in_columns[:, None, None, :] & (chosen < probability).view(-1, 1, 1, 1)
    colour = (torch.tensor([*mean]) * 255).round().view(1, -1, 1, 1).to(images.device, images.dtype)
    return torch.where(erased.to(images.device), colour, images)


# ---- the same on one image, by torchvision


def _v2() -> Any:
    from torchvision.transforms import v2

    return v2


def _image_crop(share: float, size: _Size, mean: Sequence[float]) -> ImageAugment:
    def crop(image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]  # not yet `size`, where a crop from the whole image follows
        padding = [int(width * share), int(height * share)]
        shifted: torch.Tensor = _v2().RandomCrop((height, width), padding=padding)(image)
        return shifted

    return crop


def _image_resized_crop(least: float, size: _Size, mean: Sequence[float]) -> ImageAugment:
    crop: ImageAugment = _v2().RandomResizedCrop(size, scale=(least, 1.0), antialias=True)
    return crop


def _image_jitter(strength: float, size: _Size, mean: Sequence[float]) -> ImageAugment:
    return _one_by_one(partial(_jitter, strength=strength))  # torchvision's takes no images of 4 channels


def _image_lighting(value: float, size: _Size, mean: Sequence[float]) -> ImageAugment:
    return _one_by_one(_lighting)


def _one_by_one(augment: BatchAugment) -> ImageAugment:
    def one(image: torch.Tensor) -> torch.Tensor:
        return augment(image[None], torch.default_generator)[0].round().to(torch.uint8)

    return one


def _image_erase(probability: float, size: _Size, mean: Sequence[float]) -> ImageAugment:
    erase: ImageAugment = _v2().RandomErasing(p=probability, value=[round(255 * each) for each in mean])
    return erase


_KINDS: dict[str, _Kind] = {
    "flip": _Kind(lambda *_: _v2().RandomHorizontalFlip(), lambda *_: _flip),
    "crop": _Kind(
        _image_crop,
        lambda share, _: partial(_crop, share=share),
        0.125,
        (0.0, 0.5),
        "the largest shift as a share of the size",
    ),
    "resized-crop": _Kind(
        _image_resized_crop,
        lambda least, _: partial(_resized_crop, least=least),
        0.25,
        (0.01, 1.0),
        "the least share of the area",
        whole=True,
    ),
    "wide-resized-crop": _Kind(
        lambda _, size, mean: _image_resized_crop(0.08, size, mean),
        lambda *_: partial(_resized_crop, least=0.08),
        whole=True,
    ),
    "jitter": _Kind(
        _image_jitter, lambda strength, _: partial(_jitter, strength=strength), 0.4, meaning="the strength"
    ),
    "lighting": _Kind(_image_lighting, lambda *_: _lighting),
    "rand-augment": _Kind(
        lambda magnitude, *_: _v2().RandAugment(magnitude=round(magnitude)),
        usual=9.0,
        bounds=(0.0, 30.0),
        meaning="the magnitude",
        channels=(1, 3),
    ),
    "trivial-augment": _Kind(lambda *_: _v2().TrivialAugmentWide(), channels=(1, 3)),
    "auto-augment": _Kind(lambda *_: _v2().AutoAugment(), channels=(1, 3)),
    "erase": _Kind(
        _image_erase,
        lambda probability, mean: partial(_erase, probability=probability, mean=mean),
        0.25,
        meaning="the share of images",
    ),
}
