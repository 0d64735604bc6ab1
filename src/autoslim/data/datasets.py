"""Map-style data sets of (image, label): torchvision's, and those a user's function returns."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoslim.data.arrays import KEYS, from_arrays
from autoslim.data.pixels import BrokenImage, Frame, as_tensor, first_line, framed
from autoslim.data.reading import CACHE
from autoslim.data.sets import Found, Pictures, checked_label
from autoslim.errors import DataError
from autoslim.importing import describe, load_object


class DatasetPictures(Pictures):
    """The items of a map-style data set of (image, label).

    They may be the user's own code, so only one thread in each process reads.
    """

    is_foreign = True

    def __init__(self, dataset: Any, part: str) -> None:
        self.dataset, self.part = dataset, part
        self.labels = _told_labels(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> int:
        """Its number."""
        return index

    def read(self, index: int, frame: Frame) -> tuple[torch.Tensor, int]:
        """An item; errors name its part and number."""
        where = f"{self.part} item {index}"
        try:
            item = self.dataset[index]
        except (Exception, SystemExit) as error:
            raise DataError(f"{where} failed: {describe(error)}") from error
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"{where} is {type(item).__name__}; needed is a pair (image, label)")
        try:
            image = as_tensor(item[0])
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        except (OSError, SyntaxError) as error:  # a Pillow image is decoded only now
            raise BrokenImage(first_line(error)) from error
        try:
            label = operator.index(item[1])
        except Exception as error:  # TypeError, and what torch raises for a tensor without a value
            shown = " ".join(repr(item[1]).split())[:60]
            raise DataError(f"{where} has the label {shown}; labels must be whole numbers from 0") from error
        return framed(image[None], frame)[0], checked_label(label, where)


def _told_labels(dataset: Any) -> torch.Tensor | None:
    """The labels that a data set tells as torchvision's do, in `targets`; None if it does not."""
    if getattr(dataset, "target_transform", None) is not None:
        return None
    targets = getattr(dataset, "targets", None)
    try:
        labels = np.asarray(targets.detach().cpu() if isinstance(targets, torch.Tensor) else targets)
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.dtype.kind not in "iu" or labels.shape != (len(dataset),):
        return None
    return torch.from_numpy(labels.astype(np.int64))


def read_torchvision(name: str) -> Found:
    """The train and test part of a torchvision data set that is already there; nothing is downloaded."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError("needs torchvision: pip install 'autoslim[vision]'") from error
    if name not in datasets.__all__:
        raise DataError(f"torchvision has no data set {name!r}; {_near(name, datasets.__all__)}")
    kind = getattr(datasets, name)
    parameters = inspect.signature(kind).parameters
    root = Path.home() / CACHE
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
            except ImportError as error:
                package = (error.name or "").partition(".")[0] or first_line(error)
                also = "; or give the folder that holds its train/ and val/" if name == "ImageNet" else ""
                raise DataError(f"torchvision's {name} needs {package}: pip install {package}{also}") from error
            except Exception as error:
                arguments = ", ".join(f"{key}={value!r}" for key, value in {**option, "download": True}.items())
                code = f"import torchvision; torchvision.datasets.{name}({str(root)!r}, {arguments})"
                how = f'python -c "{code}"' if "download" in parameters else "see the documentation of torchvision"
                raise DataError(f"cannot be read from {root} ({first_line(error)}); to get it: {how}") from error
        raise DataError(
            f"torchvision's {name} has no train and test part to choose; write a function that returns both"
        )

    return from_datasets(construct(choices[0]), construct(choices[1]))


def read_function(source: str) -> Found:
    """What a user's function gives, or an object with a name."""
    loaded = load_object(source)
    if callable(loaded):
        _check_takes_nothing(loaded)
        try:
            loaded = loaded()
        except (Exception, SystemExit) as error:
            raise DataError(f"the function failed: {_described(error)}") from error
    if isinstance(loaded, Mapping):
        return from_arrays(loaded)
    if not isinstance(loaded, (tuple, list)) or len(loaded) != 2:
        raise DataError(
            f"gave {type(loaded).__name__}; needed is (train, test), two data sets, or a mapping with {', '.join(KEYS)}"
        )
    train, test = loaded
    return from_datasets(train, test)


def _check_takes_nothing(function: Callable[..., Any]) -> None:
    """`DataError` for a function that needs arguments, naming where it is written."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # a decorator may give the arguments
    except (TypeError, ValueError):  # of C code
        return
    try:
        signature.bind()
    except TypeError as error:
        written = vars(function).get("__init__", function) if inspect.isclass(function) else function
        code = getattr(written, "__code__", None)
        place = f" ({code.co_filename}, line {code.co_firstlineno})" if code else ""
        raise DataError(
            f"the function is called without arguments, but it needs some: {error}{place}; give them defaults"
        ) from error


def _described(error: BaseException) -> str:
    """An exception in one line; its place too, unless that is only where we called something written in C."""
    inner = error.__traceback__ and error.__traceback__.tb_next
    return describe(error if inner else error.with_traceback(None))


def from_datasets(train: Any, test: Any) -> Found:
    """Two map-style data sets; `DataError` if they have no index or length, or nothing in them."""
    for name, dataset in (("train", train), ("test", test)):
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            kind = type(dataset).__name__
            raise DataError(f"its {name} part is {kind}, without index or length; needed is a map-style data set")
        try:
            len(dataset)
        except (Exception, SystemExit) as error:
            raise DataError(f"the length of its {name} part cannot be had: {_described(error)}") from error
    return Found(DatasetPictures(train, "train"), DatasetPictures(test, "test"), class_names=_told_classes(train))


def _told_classes(dataset: Any) -> tuple[str, ...] | None:
    """The names in `classes`, as torchvision's data sets have it: strings, or tuples whose first is the name."""
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, (list, tuple)):
        return None
    for label, name in enumerate(classes):
        if isinstance(name, (list, tuple)) and not name:
            raise DataError(f"classes[{label}] of its train part is empty; needed is the name of each class")
    return tuple(str(name[0] if isinstance(name, (list, tuple)) else name) for name in classes)


def _near(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "its documentation lists them"
