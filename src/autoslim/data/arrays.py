"""Images in arrays: `.npz` files, mappings of arrays, and the embedded set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoslim.data.memory import check_memory
from autoslim.data.pixels import CHANNELS, first_line
from autoslim.data.sets import Found, ImageSet
from autoslim.errors import DataError

EMBEDDED = "fashion-mnist-mini"

KEYS = ("x_train", "y_train", "x_test", "y_test")
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


def read_embedded() -> Found:
    """The cut of Fashion-MNIST that comes with the library."""
    with as_file(files("autoslim") / "assets" / "fashion_mnist_6k_1k.npz") as path:
        found = read_npz(path)
    return Found(found.train, found.test, _FASHION_CLASSES, _FASHION_STATISTICS, "flip,crop")


def read_npz(path: Path) -> Found:
    """An `.npz` file; nothing in it is unpickled."""
    with path.open("rb") as stream:
        try:
            archive = np.load(stream, allow_pickle=False)
        except Exception as error:  # zipfile, zlib, struct and numpy each have their own, and so has an empty file
            raise DataError("not an .npz file, or a damaged one; write it with numpy.savez") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"holds a single array; save {', '.join(KEYS)} together with numpy.savez")
        _check_keys(archive.files)
        check_memory(sum(member.file_size for member in archive.zip.infolist()) if archive.zip else 0, "its arrays")
        wanted = [*KEYS, "class_names"] if "class_names" in archive.files else KEYS
        return from_arrays({key: _member(archive, key) for key in wanted})


def _member(archive: Mapping[str, Any], key: str) -> Any:
    try:
        return archive[key]
    except Exception as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{key} holds pickled Python objects, which are never loaded; save a plain array"
            ) from error
        raise DataError(f"{key} is damaged ({first_line(error)}); copy or write the file again") from error


def from_arrays(arrays: Mapping[str, Any]) -> Found:
    """A mapping with the keys of an `.npz`."""
    _check_keys(arrays)
    train, test = (_checked_set(arrays, f"x_{part}", f"y_{part}") for part in ("train", "test"))
    names = arrays.get("class_names")
    class_names = None if names is None else tuple(map(str, _array(names, "class_names").ravel().tolist()))
    return Found(train, test, class_names=class_names)


def _check_keys(given: Iterable[str]) -> None:
    given = list(given)
    missing = [key for key in KEYS if key not in given]
    if missing:
        found = ", ".join(map(str, given[:8])) + (", ..." if len(given) > 8 else "")
        raise DataError(f"lacks {', '.join(missing)} (it has: {found or 'nothing'}); needed are {', '.join(KEYS)}")


def _array(given: Any, key: str) -> np.ndarray[Any, Any]:
    """An array, a tensor or lists as an array."""
    try:
        return np.asarray(given.detach().cpu() if isinstance(given, torch.Tensor) else given)
    except Exception as error:  # lists of several lengths; tensors that numpy has no type for, or without values
        raise DataError(f"{key} cannot become an array ({first_line(error)}); give a numpy array") from error


def _checked_set(arrays: Mapping[str, Any], x_key: str, y_key: str) -> ImageSet:
    x, y = (_array(arrays[key], key) for key in (x_key, y_key))
    if x.dtype != np.uint8:
        raise DataError(f"{x_key} is {x.dtype}; images must be uint8, 0 to 255")
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in CHANNELS):
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
