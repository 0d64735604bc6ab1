"""Labelled images, decoded once and held in memory as uint8, and batches of them, augmented and normalised.

`load_data` reads every source into the same three parts: train, a hold-out cut from it that judges subnets during the
search, and test, which is for the last figure only. Everything random depends on a seed and never on torch's global
generator.
"""

from __future__ import annotations

import difflib
import inspect
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from autoslim.errors import ConfigError, DataError, nearest
from autoslim.importing import describe, load_object

if TYPE_CHECKING:
    from PIL import Image

EMBEDDED = "fashion-mnist-mini"
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm", ".pbm", ".pnm")
)

_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # what the suffixes above may hold
_TEST_FOLDERS = ("test", "val", "valid", "validation")  # the first that has class folders is used
_TEST_SHARE = 0.2  # of one folder of class folders
_FOLDER_SIZE = 64
_KEYS = ("x_train", "y_train", "x_test", "y_test")
_CHANNELS = (1, 3, 4)
_CACHE = Path(".cache") / "autoslim-data"  # below the home directory
_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_FASHION_STATISTICS = (0.2860,), (0.3530,)  # as published for the whole of Fashion-MNIST


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
        return f"ImageSet({len(self)} images of {tuple(self.images.shape[1:])})"

    def subset(self, indices: torch.Tensor | Iterable[int]) -> ImageSet:
        """A copy of the images at `indices`, in their order, or of those where a mask is true."""
        if not isinstance(indices, torch.Tensor):
            indices = torch.tensor(list(indices), dtype=torch.int64)
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class ImageData:
    """A data set in its three parts; `holdout` was cut from the training images, `test` never was.

    `mean` and `std` are those of the training pixels in [0, 1], a number for each channel. `skipped` names the broken
    images that were left out.
    """

    train: ImageSet
    holdout: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    default_augment: str = "none"
    skipped: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load_data(
    source: str | os.PathLike[str],
    *,
    holdout: float | int = 0.2,
    seed: int = 0,
    image_size: int | None = None,
    skip_broken: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImageData:
    """Read a data set; `DataError` in one line for anything that cannot be used.

    `source` is one of

    - `fashion-mnist-mini`, which comes with the library (6,000 + 1,000 images, 28x28 grey);
    - an `.npz` file with `x_train y_train x_test y_test`: uint8 (N, H, W) or (N, H, W, C) and whole-number labels;
    - a folder with `train/` and `test/` or `val/` that hold a folder for each class, or one folder of class folders,
      of which a fifth becomes the test part. Images become RGB (transparent parts white);
    - `torchvision:CIFAR10` or another of its data sets, when it lies in `~/.cache/autoslim-data`;
    - `package.module:function` or `path/to/file.py:function`, which returns (train, test), two map-style data sets of
      (image, label), or a mapping with the keys of the `.npz`. An image is uint8, (H, W), (H, W, C) or (C, H, W), or
      a Pillow image.

    `holdout` is a share of the training images or a number of them. It and a test part are cut class by class, fixed
    by `seed`, and leave each class images on both sides. With `image_size` the shorter side of each image is resized
    to it and the longer one cropped around the centre; folders need a size and use 64 when none is given.
    `skip_broken` leaves out images of a folder that cannot be decoded. `progress(done, total)` is called while
    images are decoded.
    """
    source = os.fspath(source)
    report = progress or (lambda done, total: None)
    try:
        if image_size is not None and image_size < 1:
            raise DataError(f"an image size must be at least 1, got {image_size}")
        parts = _read(source, image_size, seed, skip_broken, report)
        train, test = _sized(parts.train, parts.test, image_size)
        class_names = _class_names(train.labels, test.labels, parts.class_names)
        held_out = _stratified(train.labels, holdout, seed, class_names, "hold-out")
    except (DataError, OSError) as error:
        raise DataError(f"data {source!r}: {error}") from error
    kept, held = train.subset(~held_out), train.subset(held_out)
    mean, std = parts.statistics or _statistics(kept.images)
    return ImageData(kept, held, test, class_names, mean, std, parts.augment, parts.skipped)


class Batches:
    """An iterable over (images (B, C, H, W) float32, normalised; labels (B,)) on `device`, again and again.

    Order and augmentation depend on `seed` and the epoch alone, so that a resumed run repeats them; call `set_epoch`
    before each epoch. `augment` is as in `parse_augment`; with `drop_last` every batch is full. `share=(rank, size)`
    gives every `size`-th image of each batch, for one of several processes that work on it together.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        mean: Iterable[float],
        std: Iterable[float],
        augment: str = "none",
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        share: tuple[int, int] = (0, 1),
    ):
        if 0 < batch_size < share[1]:
            raise DataError(f"a batch of {batch_size} cannot be shared by {share[1]} processes; raise batch_size")
        if batch_size < 1:
            raise DataError(f"a batch must hold at least 1 image, got {batch_size}")
        if drop_last and len(data) < batch_size:
            raise DataError(f"{len(data)} images do not fill one batch of {batch_size}; take a smaller batch size")
        # (C, 1, 1), in units of a uint8 pixel
        self._mean, self._std = (torch.tensor([*v], device=device).view(-1, 1, 1) * 255 for v in (mean, std))
        channels = data.images.shape[1]
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
        self._augments = [_AUGMENTS[name] for name in parse_augment(augment)]
        self._num_images = len(data) // batch_size * batch_size if drop_last else len(data)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __len__(self) -> int:
        return -(-self._num_images // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation that belong to `epoch`."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = _generator(self.seed, self.epoch)
        order = torch.randperm(len(self.data), generator=generator) if self.shuffle else None
        rank, size = self.share
        if rank:  # other images, augmented by other draws
            generator = _generator(self.seed, self.epoch, rank)
        for start in range(0, self._num_images, self.batch_size):
            span = slice(start + rank, min(start + self.batch_size, self._num_images), size)
            chosen = span if order is None else order[span]
            images = self.data.images[chosen].to(self.device)
            for augment in self._augments:
                images = augment(images, generator)
            images = images.to(torch.float32, memory_format=self._memory_format)
            yield images.sub_(self._mean).div_(self._std), self.data.labels[chosen].to(self.device)


def parse_augment(text: str) -> tuple[str, ...]:
    """The augmentations named in `text`, comma separated; `ConfigError` with the nearest name for an unknown one.

    `flip` mirrors half of the images, `crop` shifts each by up to an eighth of its size over black, `resized-crop`
    enlarges a random part of at least a quarter, `jitter` varies brightness, contrast and saturation by up to 0.4;
    `none` stands alone. They are applied in the order given.
    """
    names = tuple(name.strip() for name in text.split(","))
    if names == ("none",):
        return ()
    for name in names:
        if name == "none":
            raise ConfigError(f"augmentation {text!r}: 'none' does not go with others")
        if name not in _AUGMENTS:
            raise ConfigError(f"no augmentation {name!r} in {text!r}; {nearest(name, [*_AUGMENTS, 'none'])}")
    return names


# ---- augmentation: (B, C, H, W) uint8, or float32 of the same range -> the same; draws come from a CPU generator so
# ---- that they are equal on every device


def _flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored.to(images.device), images.flip(-1), images)


def _crop(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    height, width = images.shape[-2:]
    top, left = height // 8, width // 8
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


def _jitter(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    factors = 0.6 + 0.8 * torch.rand(3, len(images), 1, 1, 1, generator=generator)
    brightness, contrast, saturation = factors.to(images.device)
    images = (images * brightness).clamp_(0, 255)
    images = torch.lerp(_grey(images).mean((2, 3), keepdim=True), images, contrast).clamp_(0, 255)
    if images.shape[1] == 3:
        images = torch.lerp(_grey(images), images, saturation).clamp_(0, 255)
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


def _grey(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * torch.tensor([0.299, 0.587, 0.114], device=images.device).view(3, 1, 1)).sum(1, keepdim=True)


_AUGMENTS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "flip": _flip,
    "crop": _crop,
    "resized-crop": _resized_crop,
    "wide-resized-crop": partial(_resized_crop, least=0.08),
    "jitter": _jitter,
    "lighting": _lighting,
}


# ---- sources


@dataclass(frozen=True)
class _Parts:
    """What a source gives before sizes and labels are checked and the hold-out is cut."""

    train: ImageSet
    test: ImageSet
    augment: str
    class_names: tuple[str, ...] | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    skipped: tuple[str, ...] = ()


def _read(
    source: str, image_size: int | None, seed: int, skip_broken: bool, progress: Callable[[int, int], None]
) -> _Parts:
    if source == EMBEDDED:
        with as_file(files("autoslim") / "assets" / "fashion_mnist_6k_1k.npz") as path:
            parts = _read_npz(path)
        return _Parts(parts.train, parts.test, "flip,crop", _FASHION_CLASSES, _FASHION_STATISTICS)
    path = Path(os.path.expanduser(source))  # unlike that of Path it leaves an unknown ~name alone
    if source and path.is_dir():
        return _read_folder(path, image_size or _FOLDER_SIZE, seed, skip_broken, progress)
    if path.is_file() and path.suffix.lower() == ".npz":
        return _read_npz(path)
    if path.is_file():
        wanted = f"{source}:function" if path.suffix == ".py" else "an .npz file or a folder of class folders"
        raise DataError(f"a {path.suffix or 'plain'} file is no data set; give {wanted}")
    if source.startswith("torchvision:"):
        train, test = _torchvision(source.removeprefix("torchvision:"))
        return _from_datasets(train, test, image_size, progress)
    if ":" in source:
        return _from_function(source, image_size, progress)
    near = {entry.name: entry for entry in path.parent.iterdir()} if path.parent.is_dir() else {}
    close = difflib.get_close_matches(path.name, [EMBEDDED, *near], n=1)
    hint = f"did you mean {str(near.get(close[0], close[0]))!r}?" if close else ""
    raise DataError(
        "no such file, folder or data source; "
        + (hint or f"give {EMBEDDED}, an .npz file, an image folder, torchvision:NAME or path/to/file.py:function")
    )


def _read_npz(path: Path) -> _Parts:
    with path.open("rb") as stream:
        try:
            archive = np.load(stream, allow_pickle=False)
        except Exception as error:  # zipfile, zlib, struct and numpy each have their own, and so has an empty file
            raise DataError("not an .npz file, or a damaged one; write it with numpy.savez") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"holds a single array; save {', '.join(_KEYS)} together with numpy.savez")
        _check_keys(archive.files)
        _check_memory(sum(member.file_size for member in archive.zip.infolist()) if archive.zip else 0, "its arrays")
        wanted = [*_KEYS, "class_names"] if "class_names" in archive.files else _KEYS
        return _from_arrays({key: _member(archive, key) for key in wanted})


def _member(archive: Mapping[str, Any], key: str) -> Any:
    try:
        return archive[key]
    except Exception as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{key} holds pickled Python objects, which are never loaded; save a plain array"
            ) from error
        raise DataError(f"{key} is damaged ({_first_line(error)}); copy or write the file again") from error


def _from_arrays(arrays: Mapping[str, Any]) -> _Parts:
    _check_keys(arrays)
    train, test = (_checked_set(arrays, f"x_{part}", f"y_{part}") for part in ("train", "test"))
    names = arrays.get("class_names")
    class_names = None if names is None else tuple(map(str, np.asarray(names).ravel().tolist()))
    return _Parts(train, test, _default_augment(train), class_names)


def _check_keys(given: Iterable[str]) -> None:
    given = list(given)
    missing = [key for key in _KEYS if key not in given]
    if missing:
        found = ", ".join(map(str, given[:8])) + (", ..." if len(given) > 8 else "")
        raise DataError(f"lacks {', '.join(missing)} (it has: {found or 'nothing'}); needed are {', '.join(_KEYS)}")


def _checked_set(arrays: Mapping[str, Any], x_key: str, y_key: str) -> ImageSet:
    x, y = np.asarray(arrays[x_key]), np.asarray(arrays[y_key])
    if x.dtype != np.uint8:
        raise DataError(f"{x_key} is {x.dtype}; images must be uint8, 0 to 255")
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in _CHANNELS):
        raise DataError(f"{x_key} has shape {x.shape}; needed is (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels")
    if 0 in x.shape:
        raise DataError(f"{x_key} is empty, its shape is {x.shape}")
    if y.dtype.kind not in "iu":
        raise DataError(f"{y_key} is {y.dtype}; labels must be whole numbers from 0")
    if y.ndim == 2 and y.shape[1] == 1:  # as Keras gives them for CIFAR-10
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(f"{y_key} has shape {y.shape}; needed is (N,), one class number for each image")
    if len(x) != len(y):
        raise DataError(f"{x_key} holds {len(x)} images but {y_key} {len(y)} labels")
    images = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    images = images[:, None] if x.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.from_numpy(y.astype(np.int64)))


def _torchvision(name: str) -> tuple[Any, Any]:
    """The train and test part of a torchvision data set that is already there; nothing is downloaded."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError("needs torchvision: pip install 'autoslim[vision]'") from error
    if name not in datasets.__all__:
        raise DataError(f"torchvision has no data set {name!r}; {_near(name, datasets.__all__)}")
    kind = getattr(datasets, name)
    parameters = inspect.signature(kind).parameters
    root = Path.home() / _CACHE
    if "train" in parameters:
        choices: list[list[dict[str, Any]]] = [[{"train": True}], [{"train": False}]]
    elif "split" in parameters:
        choices = [[{"split": split} for split in splits] for splits in (("train", "trainval"), ("test", "val"))]
    else:
        choices = [[], []]

    def construct(options: list[dict[str, Any]]) -> Any:
        for option in options:
            try:
                return kind(root=str(root), **option)
            except ValueError:  # its splits have other names
                continue
            except Exception as error:
                arguments = ", ".join(f"{key}={value!r}" for key, value in {**option, "download": True}.items())
                code = f"import torchvision; torchvision.datasets.{name}({str(root)!r}, {arguments})"
                how = f'python -c "{code}"' if "download" in parameters else "see the documentation of torchvision"
                raise DataError(f"cannot be read from {root} ({_first_line(error)}); to get it: {how}") from error
        raise DataError(
            f"torchvision's {name} has no train and test part to choose; write a function that returns both"
        )

    return construct(choices[0]), construct(choices[1])


def _from_function(source: str, image_size: int | None, progress: Callable[[int, int], None]) -> _Parts:
    loaded = load_object(source)
    if callable(loaded):
        try:
            loaded = loaded()
        except Exception as error:
            raise DataError(f"the function failed: {describe(error)}") from error
    if isinstance(loaded, Mapping):
        return _from_arrays(loaded)
    if not isinstance(loaded, (tuple, list)) or len(loaded) != 2:
        raise DataError(
            f"gave {type(loaded).__name__}; needed is (train, test), two data sets, "
            f"or a mapping with {', '.join(_KEYS)}"
        )
    train, test = loaded
    return _from_datasets(train, test, image_size, progress)


def _from_datasets(train: Any, test: Any, image_size: int | None, progress: Callable[[int, int], None]) -> _Parts:
    counts = []
    for name, dataset in (("train", train), ("test", test)):
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            kind = type(dataset).__name__
            raise DataError(f"its {name} part is {kind}, without index or length; needed is a map-style data set")
        counts.append(len(dataset))
    total = sum(counts)
    train_set = _collect(train, "train", image_size, lambda done: progress(done, total))
    test_set = _collect(test, "test", image_size, lambda done: progress(counts[0] + done, total))
    classes = getattr(train, "classes", None)  # as torchvision's data sets have it
    names = None
    if isinstance(classes, (list, tuple)):
        names = tuple(str(name[0] if isinstance(name, (list, tuple)) else name) for name in classes)
    return _Parts(train_set, test_set, _default_augment(train_set), names)


def _collect(dataset: Any, part: str, image_size: int | None, progress: Callable[[int], None]) -> ImageSet:
    """All items of a map-style data set."""
    count = len(dataset)
    if not count:
        raise DataError(f"its {part} part is empty")
    images = torch.empty(0)
    labels = torch.empty(count, dtype=torch.int64)
    for index in range(count):
        where = f"{part} item {index}"
        try:
            item = dataset[index]
        except Exception as error:
            raise DataError(f"{where} failed: {describe(error)}") from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"{where} is {type(item).__name__}; needed is a pair (image, label)")
        try:
            image = _as_tensor(item[0])
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        try:
            labels[index] = operator.index(item[1])
        except TypeError as error:
            label = " ".join(repr(item[1]).split())[:60]
            raise DataError(f"{where} has the label {label}; labels must be whole numbers from 0") from error
        if image_size is not None:
            image = _fitted(image[None], image_size)[0]
        if not index:
            _check_memory(count * image.numel(), f"{count} images")
            images = torch.empty((count, *image.shape), dtype=torch.uint8)
        if image.shape != images.shape[1:]:
            raise DataError(
                f"{where} is {_shape_text(image.shape)}, the first {_shape_text(images.shape[1:])}; "
                + ("give all the same channels" if len(image) != images.shape[1] else "set an image size")
            )
        images[index] = image
        progress(index + 1)
    return ImageSet(images, labels)


def _as_tensor(image: Any) -> torch.Tensor:
    """An image a user's data set gave, as (C, H, W) uint8; `ValueError` if that is not possible."""
    is_tensor = isinstance(image, torch.Tensor)
    if hasattr(image, "getbands"):  # a Pillow image, without importing Pillow
        image = image.convert("L") if image.mode in ("1", "L") else _rgb(image)
    array = image.detach().cpu().numpy() if is_tensor else np.asarray(image)
    if array.dtype != np.uint8:
        hint = " (leave out ToTensor and Normalize)" if array.dtype.kind == "f" else ""
        raise ValueError(f"the image is {array.dtype}; it must be uint8, 0 to 255{hint}")
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[2] in _CHANNELS and not (is_tensor and array.shape[0] in _CHANNELS):
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in _CHANNELS or not array.size:
        raise ValueError(
            f"the image has shape {array.shape}; it must be (H, W), (H, W, C) or (C, H, W) with C 1, 3 or 4"
        )
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


# ---- image folders


def _read_folder(root: Path, size: int, seed: int, skip_broken: bool, progress: Callable[[int, int], None]) -> _Parts:
    train_folder, test_folder = _layout(root)
    by_class = _class_files(train_folder, root)
    class_names = tuple(by_class)
    if len(class_names) < 2:
        raise DataError(f"holds only one class, {class_names[0]!r}; there must be at least two class folders")
    entries = [(path, label, False) for label, name in enumerate(class_names) for path in by_class[name]]
    if test_folder is not None:
        for name, paths in _class_files(test_folder, root).items():
            if name not in by_class:
                raise DataError(
                    f"class {name!r} is in {test_folder.name}/ but not in train/; remove it or add it there"
                )
            entries += [(path, class_names.index(name), True) for path in paths]
    labels = torch.tensor([label for _, label, _ in entries])
    in_test = torch.tensor([is_test for _, _, is_test in entries])

    images, broken = _decode_files([path for path, _, _ in entries], root, size, skip_broken, progress)
    usable = torch.ones(len(entries), dtype=torch.bool)
    usable[list(broken)] = False
    for label, is_test in {entry[1:] for entry in entries}:
        if not usable[(labels == label) & (in_test == is_test)].any():
            raise DataError(f"all images of class {class_names[label]!r} are broken; mend them or remove its folder")
    everything = ImageSet(images, labels)
    if test_folder is None:
        in_test[usable] = _stratified(labels[usable], _TEST_SHARE, seed, class_names, "test part")
    return _Parts(
        everything.subset(usable & ~in_test),
        everything.subset(usable & in_test),
        "resized-crop,flip",
        class_names,
        skipped=tuple(broken.values()),
    )


def _layout(root: Path) -> tuple[Path, Path | None]:
    """The train and the test folder, or the folder of class folders and None."""
    names = {folder.name for folder in _subfolders(root)}
    tests = [name for name in _TEST_FOLDERS if name in names]
    if "train" in names and tests:
        with_classes = [name for name in tests if _subfolders(root / name)]
        return root / "train", root / (with_classes or tests)[0]
    if names and names <= {"train", *_TEST_FOLDERS}:
        lacking = "train/" if tests else "test/ or val/"
        raise DataError(f"has {sorted(names)[0]}/ but no {lacking}; add it, or give one folder of class folders")
    return root, None


def _class_files(folder: Path, root: Path) -> dict[str, list[Path]]:
    """The image files of each class folder of `folder`, at any depth."""
    shown = "the folder" if folder == root else f"{folder.name}/"
    classes = sorted(_subfolders(folder))
    if not classes:
        holds = "has no class folders" if any(folder.iterdir()) else "is empty"
        raise DataError(f"{shown} {holds}; needed is a subfolder for each class with its images in it")
    found = {}
    for path in classes:
        found[path.name] = sorted(
            Path(parent, name)
            for parent, _, names in os.walk(path)
            for name in names
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        )
        if not found[path.name]:
            where = path.relative_to(root).as_posix()
            raise DataError(f"class folder {where!r} holds no images (.jpg, .png, ...); add some or remove it")
    return found


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _decode_files(
    paths: list[Path], root: Path, size: int, skip_broken: bool, progress: Callable[[int, int], None]
) -> tuple[torch.Tensor, dict[int, str]]:
    """All images (N, 3, size, size), and the names of the broken ones by index."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("image folders need Pillow: pip install 'autoslim[vision]'") from error
    Image.init()  # here, since several threads must not do it at once
    formats = [name for name in _FORMATS if name in Image.OPEN]
    _check_memory(len(paths) * 3 * size * size, f"{len(paths)} images of {size}x{size}")
    images = torch.zeros(len(paths), 3, size, size, dtype=torch.uint8)
    broken: dict[int, str] = {}

    def decode(index: int) -> str | None:
        try:
            with Image.open(paths[index], formats=formats) as image:
                images[index] = _square(image, size)
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error ...
            return _why_broken(paths[index], error)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), 256):  # in blocks, so that an error ends it soon
            block = range(start, min(start + 256, len(paths)))
            for index, reason in zip(block, pool.map(decode, block), strict=True):
                if reason:
                    name = paths[index].relative_to(root).as_posix()
                    if not skip_broken:
                        raise DataError(
                            f"cannot decode {name!r}: {reason}; mend or remove it, or skip broken images: --skip-broken"
                        )
                    broken[index] = name
                progress(index + 1, len(paths))
    return images, broken


def _square(image: Image.Image, size: int) -> torch.Tensor:
    """A Pillow image upright, in RGB, its centre square resized to (3, size, size)."""
    from PIL import Image, ImageOps

    image.draft(None, (2 * size, 2 * size))  # JPEG: decode no more than the resize can use
    image = _rgb(ImageOps.exif_transpose(image))
    image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)  # antialiased
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, under the names I, I;16, I;16B ...
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def _why_broken(path: Path, error: Exception) -> str:
    if path.is_file() and not path.stat().st_size:
        return "the file is empty"
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image that Pillow knows"
    return _first_line(error)


# ---- checks, splits and sizes


def _sized(train: ImageSet, test: ImageSet, image_size: int | None) -> tuple[ImageSet, ImageSet]:
    """Both parts at `image_size`, or as they are; `DataError` unless all images have one shape."""
    if image_size is not None:
        count, channels = len(train) + len(test), train.images.shape[1]
        _check_memory(count * channels * image_size**2, f"{count} images of {image_size}x{image_size}")
        train, test = (ImageSet(_fitted(part.images, image_size), part.labels) for part in (train, test))
    if train.images.shape[1:] != test.images.shape[1:]:
        hint = "" if train.images.shape[1] != test.images.shape[1] else "; set an image size"
        raise DataError(
            f"training images are {_shape_text(train.images.shape[1:])}, "
            f"test images {_shape_text(test.images.shape[1:])}{hint}"
        )
    return train, test


def _fitted(images: torch.Tensor, size: int) -> torch.Tensor:
    """The centre squares of images (N, C, H, W), resized to (N, C, size, size)."""
    count, channels, height, width = images.shape
    if (height, width) == (size, size):
        return images
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    fitted = torch.empty(count, channels, size, size, dtype=torch.uint8)
    for start in range(0, count, 256):  # a whole set in float32 could exceed the memory
        block = images[start : start + 256].float()
        resized = F.interpolate(block, (size, size), mode="bilinear", antialias=True, align_corners=False)
        fitted[start : start + 256] = resized.round_().clamp_(0, 255)
    return fitted


def _class_names(train: torch.Tensor, test: torch.Tensor, names: tuple[str, ...] | None) -> tuple[str, ...]:
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


def _stratified(
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
    generator = _generator(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, number in enumerate(cut):
        members = (labels == label).nonzero().flatten()
        chosen[members[torch.randperm(len(members), generator=generator)[: int(number)]]] = True
    return chosen


def _statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]; exact, from histograms."""
    means, stds = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double() / images[:, channel].numel()
        mean = float(share @ values)
        means.append(mean)
        stds.append(max(float(share @ (values - mean) ** 2) ** 0.5, 1 / 255))  # a constant channel: no division by 0
    return tuple(means), tuple(stds)


def _default_augment(train: ImageSet) -> str:
    return "crop" if train.images.shape[1] == 1 else "flip,crop"


def _generator(*seeds: int) -> torch.Generator:
    """A generator of its own for each tuple of seeds."""
    state = np.random.SeedSequence([seed % 2**64 for seed in seeds]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def _check_memory(needed: int, what: str) -> None:
    available = _available_bytes()
    if available is not None and needed > available / 2:  # half: cutting the parts copies them once
        raise DataError(
            f"{what} need {needed / 1e6:,.0f} MB, more than half of the {available / 1e6:,.0f} MB of free memory; "
            "take a smaller image size or fewer images"
        )


def _available_bytes() -> int | None:
    """Free memory of the machine; None where it cannot be told."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # macOS tells only what there is in all
    except (AttributeError, ValueError, OSError):
        return None


def _near(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "its documentation lists them"


def _shape_text(shape: Iterable[int]) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
