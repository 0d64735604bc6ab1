"""Data sets for Hugging Face `datasets`: from its hub, a folder it saved, or a folder of Parquet files."""

from __future__ import annotations

import importlib
import itertools
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoslim.data.pixels import BrokenImage, Frame, as_tensor, first_line, framed
from autoslim.data.sets import Found, Pictures
from autoslim.errors import DataError, nearest

_PATIENCE = 5  # seconds
_TRAIN_SPLITS = ("train", "training")
_TEST_SPLITS = ("test", "validation", "valid", "val")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")  # looked for where no type tells


class HubPictures(Pictures):
    """The rows of a `datasets.Dataset`, which lies memory-mapped on disk: images of a column, labels as given."""

    def __init__(self, dataset: Any, column: str, labels: torch.Tensor, part: str) -> None:
        self._dataset = dataset.with_format(None).select_columns([column])
        self._column, self._given = column, labels
        self.labels = labels
        self.part = part

    def __len__(self) -> int:
        return len(self._given)

    def name(self, index: int) -> int:
        """Its number."""
        return index

    def read(self, index: int, frame: Frame) -> tuple[torch.Tensor, int]:
        """The image of a row."""
        try:
            value = self._dataset[index][self._column]
            if value is None:
                raise BrokenImage("the row has no image")
            image = as_tensor(value)
        except BrokenImage:
            raise
        except Exception as error:  # whatever Pillow or Arrow raise for damaged bytes
            raise BrokenImage(first_line(error)) from error
        return framed(image[None], frame)[0], int(self._given[index])

    def check_key(self) -> str:
        """The fingerprint that `datasets` gives."""
        return f"{self._dataset._fingerprint}\t{self._column}\t{len(self)}"


def read_hub(given: str, image_column: str | None, label_column: str | None) -> Found:
    """`NAME`, `NAME:CONFIG` or a folder; `DataError` naming the extra where `datasets` is missing."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("needs Hugging Face datasets: pip install 'autoslim[datasets]'") from error
    if not given:
        raise DataError("names no data set; give hf:NAME or hf:path/to/folder")
    loaded = _load(datasets, given)
    splits = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    train = next((splits[name] for name in _TRAIN_SPLITS if name in splits), None)
    if train is None:
        raise DataError(f"has no split train; it has {', '.join(map(str, splits)) or 'none'}")
    images = _image_column(datasets, train.features, image_column)
    labels = _label_column(datasets, train.features, label_column)
    _check_label_type(datasets, train.features, labels)
    test, remarks = _test_split(splits, labels)
    for split in (train, *([] if test is None else [test])):
        if not len(split):
            raise DataError("its split train is empty")
        for column in (images, labels):
            if column not in split.features:
                raise DataError(f"its test split has no column {column!r}; it has {', '.join(split.features)}")
    if test is not None:
        _check_label_type(datasets, test.features, labels)
    names = getattr(train.features[labels], "names", None)
    if names is None and train.features[labels].dtype in ("string", "large_string"):
        names = sorted({str(value) for value in train.unique(labels)})
    class_names = None if names is None else tuple(map(str, names))
    parts = [
        None if split is None else HubPictures(split, images, _labels(split, labels, class_names, part), part)
        for split, part in ((train, "train"), (test, "test"))
    ]
    assert parts[0] is not None
    return Found(parts[0], parts[1], class_names, remarks=remarks)


def _test_split(splits: Mapping[str, Any], column: str) -> tuple[Any, tuple[str, ...]]:
    """The first test split that has labels, or None without any, and a remark for one whose labels are kept back."""
    present = [name for name in _TEST_SPLITS if name in splits and len(splits[name])]
    withheld = list(itertools.takewhile(lambda name: _is_withheld(splits[name], column), present))
    if not withheld:
        return (splits[present[0]] if present else None), ()
    told = f"its split {' and '.join(withheld)} has no labels (column {column!r} is -1 or null in every row)"
    if withheld == present:
        raise DataError(
            f"{told}, and there is no other to test on; give a function of your own that returns (train, test)"
        )
    used = present[len(withheld)]
    return splits[used], (f"{told}, left out; split {used} is the test part",)


def _is_withheld(split: Any, column: str) -> bool:
    """Does no row tell its label? Competitions keep those of their test images back, as ImageNet's did."""
    return column in split.features and all(value in (-1, None) for value in _values(split, column))


def _load(datasets: Any, given: str) -> Any:
    path = Path(os.path.expanduser(given))
    try:
        if path.is_dir():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                return datasets.load_from_disk(str(path))
            return datasets.load_dataset(str(path))
        if path.is_absolute() or given.startswith(("./", "../", "~")):
            raise DataError(f"there is no folder {given!r}")
        name, _, config = given.partition(":")
        with _quick_without_network(datasets):
            return datasets.load_dataset(name, config or None)
    except DataError:
        raise
    except Exception as error:  # it has a dozen kinds, and those of the network besides
        raise DataError(f"datasets cannot load it: {first_line(error)}") from error


@contextmanager
def _quick_without_network(datasets: Any) -> Iterator[None]:
    """Where the hub does not answer, look at what is cached only: its client would try for a minute and say so."""
    hub: Any = importlib.import_module("huggingface_hub.constants")
    if hub.HF_HUB_OFFLINE or _answers(hub.ENDPOINT):
        yield
        return
    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        raise DataError(f"{hub.ENDPOINT} does not answer, and it is not in the cache ({first_line(error)})") from error
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PATIENCE).close()
    except urllib.error.HTTPError:  # an answer of any kind
        return True
    except (OSError, ValueError):
        return False
    return True


def _image_column(datasets: Any, features: Mapping[str, Any], given: str | None) -> str:
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if given is not None:
        if given not in features:
            raise DataError(f"has no column {given!r}; {nearest(given, features)}")
        if given not in columns:
            raise DataError(f"column {given!r} holds no images; columns of images: {', '.join(columns) or 'none'}")
        return given
    if len(columns) != 1:
        found = f"has several columns of images ({', '.join(columns)})" if columns else "has no column of images"
        raise DataError(f"{found}; its columns are {', '.join(features)}: set image_column")
    return columns[0]


def _label_column(datasets: Any, features: Mapping[str, Any], given: str | None) -> str:
    if given is not None:
        if given not in features:
            raise DataError(f"has no column {given!r}; {nearest(given, features)}")
        return given
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    columns = columns or [name for name in _LABEL_COLUMNS if name in features]
    if len(columns) != 1:
        found = f"has several columns of labels ({', '.join(columns)})" if columns else "has no column of labels"
        raise DataError(f"{found}; its columns are {', '.join(features)}: set label_column")
    return columns[0]


def _check_label_type(datasets: Any, features: Mapping[str, Any], column: str) -> None:
    """`DataError` for a column of lists, of structs or of images."""
    usable = [name for name, feature in features.items() if isinstance(feature, (datasets.ClassLabel, datasets.Value))]
    if column not in usable:
        kind = "struct" if isinstance(features[column], dict) else type(features[column]).__name__
        hint = f"set label_column, to one of {', '.join(usable)}" if usable else "no other column holds that"
        raise DataError(
            f"column {column!r} is of type {kind}; a label must be one whole number from 0 or one name: {hint}"
        )


def _values(split: Any, column: str) -> list[Any]:
    values: list[Any] = split.with_format(None).select_columns([column])[:][column]
    return values


def _labels(split: Any, column: str, class_names: tuple[str, ...] | None, part: str) -> torch.Tensor:
    """The labels (N,) of a split; class names become numbers."""
    values = _values(split, column)
    missing = next((row for row, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise DataError(f"row {missing} of its {part} part has no label in column {column!r}")
    if class_names is not None and values and isinstance(values[0], str):
        number = {name: index for index, name in enumerate(class_names)}
        unknown = next((value for value in values if value not in number), None)
        if unknown is not None:
            raise DataError(f"class {unknown!r} is in the {part} part but has no training image; remove it or add some")
        return torch.tensor([number[value] for value in values], dtype=torch.int64)
    labels = np.asarray(values)
    if labels.dtype.kind not in "iub" or labels.ndim != 1:
        raise DataError(f"column {column!r} holds {labels.dtype}; labels must be whole numbers from 0 or names")
    return torch.from_numpy(labels.astype(np.int64))
