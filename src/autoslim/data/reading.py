"""All images of a source: decoded into memory, or checked once where they will be streamed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from autoslim.data.loading import Failure, items_of, make_loader
from autoslim.data.pixels import BrokenImage, Frame, shape_text
from autoslim.data.sets import Pictures
from autoslim.errors import DataError, RunError
from autoslim.files import write_whole

CACHE = Path(".cache") / "autoslim-data"  # below the home directory

_BLOCK = 256
Report = Callable[[int], None]


@dataclass(frozen=True)
class Contents:
    """The labels (N,) of all images and why some are broken; the images (N, C, H, W) too if they were decoded."""

    labels: torch.Tensor
    broken: dict[int, str]
    images: torch.Tensor | None = None

    @property
    def usable(self) -> torch.Tensor:
        """True for the images that are not broken."""
        usable = torch.ones(len(self.labels), dtype=torch.bool)
        usable[list(self.broken)] = False
        return usable


def first_shape(pictures: Pictures, frame: Frame) -> tuple[int, int, int]:
    """(C, H, W) of the first image that is not broken."""
    if not len(pictures):
        raise DataError(f"its {pictures.part} part is empty")
    reason = ""
    for index in range(len(pictures)):
        try:
            image, _ = pictures.read(index, frame)
        except BrokenImage as error:
            reason = reason or str(error)
            continue
        channels, height, width = image.shape
        return channels, height, width
    raise DataError(f"all of its {len(pictures)} images are broken; the first, {image_text(pictures, 0)}: {reason}")


def decode_all(
    pictures: Pictures,
    indices: Sequence[int],
    frame: Frame,
    shape: tuple[int, int, int],
    *,
    skip_broken: bool = False,
    report: Report = lambda done: None,
) -> Contents:
    """Read these images into memory; `DataError` naming the first that is broken or of another shape."""
    images = torch.zeros((len(indices), *shape), dtype=torch.uint8)
    labels = torch.zeros(len(indices), dtype=torch.int64)
    broken: dict[int, str] = {}

    def read(row: int) -> str | None:
        index = indices[row]
        try:
            image, labels[row] = pictures.read(index, frame)
        except BrokenImage as error:
            if pictures.labels is not None:
                labels[row] = pictures.labels[index]
            return str(error)
        if image.shape != images.shape[1:]:
            hint = "give all the same channels" if len(image) != shape[0] else "set an image size"
            raise DataError(
                f"{image_text(pictures, index)} is {shape_text(image.shape)}, the first {shape_text(shape)}; {hint}"
            )
        images[row] = image
        return None

    for row, reason in enumerate(_mapped(read, len(indices), pictures.in_threads)):
        if reason:
            _note_broken(pictures, indices[row], reason, skip_broken, broken, row)
        report(row + 1)
    return Contents(labels, broken, images)


def _mapped(read: Callable[[int], str | None], count: int, in_threads: bool) -> Iterator[str | None]:
    if not in_threads:
        yield from map(read, range(count))
        return
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        for start in range(0, count, _BLOCK):  # in blocks, so that an error ends it soon
            yield from pool.map(read, range(start, min(start + _BLOCK, count)))


def check_all(
    pictures: Pictures, frame: Frame, workers: int, *, skip_broken: bool = False, report: Report = lambda done: None
) -> Contents:
    """Labels and broken images of a source that will be streamed, found by reading all of it once.

    What was found is kept in `~/.cache/autoslim-data/checked` while the files stay as they are. A user's data set that
    tells its labels is believed, and its items are checked when they are read.
    """
    key = pictures.check_key()
    if key is None and pictures.labels is not None:
        return Contents(pictures.labels, {})
    kept = None if key is None else Path.home() / CACHE / "checked" / f"{_hashed(key)}.json"
    reasons = _kept_reasons(kept)
    labels = torch.zeros(len(pictures), dtype=torch.int64) if pictures.labels is None else pictures.labels.clone()
    broken: dict[int, str] = {}
    if reasons is None:
        reasons = {}
        small = frame if frame.size is None else replace(frame, size=1)  # a JPEG is read whole, but decoded coarsely
        blocks = [list(range(s, min(s + _BLOCK, len(pictures)))) for s in range(0, len(pictures), _BLOCK)]
        loader = make_loader(_Check(pictures, small), blocks, workers)
        for block, found in zip(blocks, items_of(loader), strict=True):
            for index, (label, reason) in zip(block, found, strict=True):
                labels[index] = label
                if reason:
                    _note_broken(pictures, index, reason, skip_broken, reasons, index)
            report(block[-1] + 1)
        if kept is not None:
            with suppress(RunError):  # a home directory that cannot be written costs time, no more
                write_whole(kept, json.dumps({str(index): reason for index, reason in reasons.items()}))
    for index, reason in reasons.items():
        _note_broken(pictures, index, reason, skip_broken, broken, index)
    return Contents(labels, broken)


@dataclass(eq=False)
class _Check(Dataset[Any]):
    """Reads blocks of images and gives, for each, its label and why it is broken, if it is."""

    pictures: Pictures
    frame: Frame

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, str]] | Failure:
        found: list[tuple[int, str]] = []
        known = self.pictures.labels
        for index in indices:
            try:
                found.append((self.pictures.read(index, self.frame)[1], ""))
            except BrokenImage as error:
                found.append((0 if known is None else int(known[index]), str(error)))
            except DataError as error:
                return Failure(str(error))
        return found


def _kept_reasons(kept: Path | None) -> dict[int, str] | None:
    """What an earlier check found, if it is still there and whole."""
    if kept is None:
        return None
    try:
        return {int(index): str(reason) for index, reason in json.loads(kept.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return None


def _note_broken(
    pictures: Pictures, index: int, reason: str, skip_broken: bool, broken: dict[int, str], row: int
) -> None:
    if not skip_broken:
        what = image_text(pictures, index)
        raise DataError(f"cannot decode {what}: {reason}; mend or remove it, or skip broken images: --skip-broken")
    broken[row] = reason


def image_text(pictures: Pictures, index: int) -> str:
    """An image in messages: its file or key in quotes, or its number."""
    name = pictures.name(index)
    return f"{pictures.part} item {name}" if isinstance(name, int) else repr(name)


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
