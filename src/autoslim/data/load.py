"""`load_data`: any source, read into the same three parts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from autoslim.data.arrays import EMBEDDED, read_embedded, read_npz
from autoslim.data.datasets import read_function, read_torchvision
from autoslim.data.folders import read_folder
from autoslim.data.hub import read_hub
from autoslim.data.memory import check_memory
from autoslim.data.pixels import Frame, framed, shape_text
from autoslim.data.reading import Contents, check_all, decode_all, first_shape, image_text
from autoslim.data.sets import Found, ImageData, ImageSet, Pictures, StreamedSet
from autoslim.data.shards import read_shards
from autoslim.data.splits import checked_class_names, statistics, stratified
from autoslim.errors import DataError
from autoslim.memory import is_out_of_memory

MEMORY_GB = 4.0
_TEST_SHARE = 0.2  # of a source without a test part
_STATISTICS_IMAGES = 1000  # of a streamed set: the mean of each channel then is known to less than 0.01

_SMALLER = "take a smaller image size, or a lower memory_gb so that they are streamed"

_Part = ImageSet | StreamedSet


@dataclass(frozen=True)
class Options:
    """How a source is read; see `load_data`."""

    holdout: float | int = 0.2
    seed: int = 0
    image_size: int | None = None
    channels: int | None = None
    center_crop: float = 1.0
    skip_broken: bool = False
    memory_gb: float = MEMORY_GB
    workers: int = 0


def load_data(
    source: str | os.PathLike[str],
    *,
    holdout: float | int = 0.2,
    seed: int = 0,
    image_size: int | None = None,
    channels: int | None = None,
    center_crop: float = 1.0,
    skip_broken: bool = False,
    memory_gb: float = MEMORY_GB,
    workers: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    test_shards: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageData:
    """Read a data set; `DataError` in one line for anything that cannot be used.

    `source` is one of

    - `fashion-mnist-mini`, which comes with the library (6,000 + 1,000 images, 28x28 grey);
    - an `.npz` file with `x_train y_train x_test y_test`: uint8 (N, H, W) or (N, H, W, C) and whole-number labels;
    - a folder with `train/` and `test/` or `val/` (or what is usual for them: `Training/`, `dev/`) that hold a folder
      for each class, or one folder of class folders, of which a fifth becomes the test part. Images become RGB
      (transparent parts white);
    - `torchvision:CIFAR10` or another of its data sets, when it lies in `~/.cache/autoslim-data`;
    - `hf:NAME`, `hf:NAME:CONFIG` or `hf:path/to/folder`: a data set for Hugging Face `datasets`; `image_column` and
      `label_column` name its columns where their types do not tell;
    - `wds:path/to/train-{0000..0146}.tar`, shards in the WebDataset format, local or at a URL, and those of
      `test_shards`, without which a fifth becomes the test part; `label_column` names a key of a `.json` member;
    - `package.module:function` or `path/to/file.py:function`, which returns (train, test), two map-style data sets of
      (image, label), or a mapping with the keys of the `.npz`. An image is uint8, (H, W), (H, W, C) or (C, H, W), or
      a Pillow image.

    `holdout` is a share of the training images or a number of them. It and a test part are cut class by class, fixed
    by `seed`, and leave each class images on both sides. With `image_size` the shorter side of each image is resized
    to it and the longer one cropped around the centre (of held-out and test images a centre square of `center_crop` of
    the shorter side is taken); folders need a size and use 64 when none is given. `channels`, 1 or 3, makes all images
    grey or colour. `skip_broken` leaves out images that cannot be decoded.

    Sets of up to `memory_gb` (10^9 bytes of decoded pixels) are decoded once and held in memory; larger ones are
    checked once, by `workers` processes, and then read from their source again and again. `progress(done, total)` is
    called while images are decoded or checked.
    """
    source = os.fspath(source)
    options = Options(holdout, seed, image_size, channels, center_crop, skip_broken, memory_gb, workers)
    try:
        _check_options(options)
        found = _read(source, image_column, label_column, test_shards, seed)
        return _in_parts(found, options, progress or (lambda done, total: None))
    except (DataError, OSError) as error:
        raise DataError(f"data {source!r}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DataError(
            f"data {source!r}: out of memory while images were read; set a smaller data.image_size, or "
            f"data.memory_gb below {memory_gb:g}, so that they are streamed"
        ) from error


def _check_options(options: Options) -> None:
    if options.image_size is not None and options.image_size < 1:
        raise DataError(f"an image size must be at least 1, got {options.image_size}")
    if options.channels not in (None, 1, 3):
        raise DataError(f"channels must be 1 or 3, got {options.channels}")
    if not 0 < options.center_crop <= 1:
        raise DataError(f"center_crop must be above 0 and at most 1, got {options.center_crop}")


def _read(source: str, image_column: str | None, label_column: str | None, test_shards: str | None, seed: int) -> Found:
    if source == EMBEDDED:
        return read_embedded()
    path = Path(os.path.expanduser(source))  # unlike that of Path it leaves an unknown ~name alone
    if source and path.is_dir():
        return read_folder(path)
    if path.is_file() and path.suffix.lower() == ".npz":
        return read_npz(path)
    if path.is_file():
        wanted = f"{source}:function" if path.suffix == ".py" else "an .npz file or a folder of class folders"
        wanted = f"wds:{source}" if path.suffix == ".tar" else wanted
        raise DataError(f"a {path.suffix or 'plain'} file is no data set; give {wanted}")
    kind, colon, rest = source.partition(":")
    if colon and kind == "torchvision":
        return read_torchvision(rest)
    if colon and kind == "hf":
        return read_hub(rest, image_column, label_column)
    if colon and kind == "wds":
        return read_shards(rest, test_shards, label_column)
    if colon:
        return read_function(source)
    near = {entry.name: entry for entry in path.parent.iterdir()} if path.parent.is_dir() else {}
    close = difflib.get_close_matches(path.name, [EMBEDDED, *near], n=1)
    hint = f"did you mean {str(near.get(close[0], close[0]))!r}?" if close else ""
    raise DataError(
        "no such file, folder or data source; "
        + (
            hint
            or f"give {EMBEDDED}, an .npz file, an image folder, torchvision:NAME, hf:NAME, wds:SHARDS or "
            "path/to/file.py:function"
        )
    )


# ---- from what was found to three parts


@dataclass(frozen=True)
class _Side:
    """The training or the test images of a source: what is usable of them, and under which numbers."""

    source: ImageSet | Pictures
    contents: Contents
    numbers: torch.Tensor  # (N,) of the usable images

    @property
    def labels(self) -> torch.Tensor:
        return self.contents.labels[self.numbers]

    def chosen(self, mask: torch.Tensor) -> _Side:
        return replace(self, numbers=self.numbers[mask])

    def names(self) -> Sequence[str | int]:
        numbers: list[int] = self.numbers.tolist()
        return numbers if isinstance(self.source, ImageSet) else [self.source.name(number) for number in numbers]

    def broken_names(self) -> list[str]:
        if isinstance(self.source, ImageSet):
            return []
        names = {number: self.source.name(number) for number in self.contents.broken}
        return [n if isinstance(n, str) else image_text(self.source, number) for number, n in names.items()]


def _in_parts(found: Found, options: Options, progress: Callable[[int, int], None]) -> ImageData:
    size = options.image_size or found.default_size
    if options.center_crop < 1 and size is None:
        raise DataError("center_crop needs an image size; set image_size")
    frame = Frame(size, options.channels)
    shape, train, test = _contents(found, frame, options, progress)
    skipped = tuple(name for side in (train, test) if side is not None for name in side.broken_names())
    _check_not_all_broken(train, found.class_names)
    names = checked_class_names(train.labels, (test or train).labels, found.class_names)
    remarks = list(found.remarks)
    if test is None:
        to_test = stratified(train.labels, _TEST_SHARE, options.seed, names, "test part")
        train, test = train.chosen(~to_test), train.chosen(to_test)
    else:
        _check_not_all_broken(test, found.class_names)
        remarks += _untested(test.labels, names)
    held_out = stratified(train.labels, options.holdout, options.seed, names, "hold-out")
    kept, held = train.chosen(~held_out), train.chosen(held_out)
    central = replace(frame, share=options.center_crop)
    kept_part = _part(kept, frame, shape)
    mean, std = found.statistics or _statistics(kept_part)
    if len(mean) != shape[0]:  # of the colours the source has, not of those asked for
        mean, std = _statistics(kept_part)
    augment = found.default_augment or ("crop" if shape[0] == 1 else "flip,crop")
    return ImageData(
        kept_part,
        _part(held, central, shape),
        _part(test, central, shape),
        names,
        mean,
        std,
        augment,
        skipped,
        tuple(remarks),
        kept.names(),
        held.names(),
        test.names(),
    )


def _contents(
    found: Found, frame: Frame, options: Options, progress: Callable[[int, int], None]
) -> tuple[tuple[int, int, int], _Side, _Side | None]:
    """The shape of all images, and both sides of the source, decoded or checked."""
    sources = [found.train, *([] if found.test is None else [found.test])]
    total = sum(map(len, sources))
    shapes = [_shape(source, frame) for source in sources]
    if len(set(shapes)) > 1:
        hint = "" if shapes[0][0] != shapes[1][0] else "; set an image size"
        raise DataError(f"training images are {shape_text(shapes[0])}, test images {shape_text(shapes[1])}{hint}")
    shape = shapes[0]
    needed = total * shape[0] * shape[1] * shape[2]
    streams = needed > options.memory_gb * 1e9
    in_memory = any(isinstance(source, ImageSet) for source in sources)
    if in_memory or not streams:
        what = f"{total} images of {shape[1]}x{shape[2]}"
        check_memory(
            needed,
            what,
            None if in_memory else "take a smaller image size, or a lower memory_gb so that they are streamed",
        )
    sides, done = [], 0
    for source in sources:

        def report(here: int, before: int = done) -> None:
            progress(before + here, total)

        if isinstance(source, ImageSet):
            contents = Contents(source.labels, {}, framed(source.images, frame))
        elif streams:
            contents = check_all(source, frame, options.workers, skip_broken=options.skip_broken, report=report)
        else:
            every = range(len(source))
            contents = decode_all(source, every, frame, shape, skip_broken=options.skip_broken, report=report)
        sides.append(_Side(source, contents, contents.usable.nonzero().flatten()))
        done += len(source)
    return shape, sides[0], sides[1] if len(sides) > 1 else None


def _shape(source: ImageSet | Pictures, frame: Frame) -> tuple[int, int, int]:
    if isinstance(source, ImageSet):
        channels, height, width = source.image_shape
        return frame.channels or channels, frame.size or height, frame.size or width
    return first_shape(source, frame)


def _part(side: _Side, frame: Frame, shape: tuple[int, int, int]) -> _Part:
    """The images of a part: those in memory, read again where they have a frame of their own, or to be streamed."""
    images = side.contents.images
    if images is None:
        assert not isinstance(side.source, ImageSet)
        return StreamedSet(side.source, side.numbers, side.labels, shape, frame)
    if frame.share == 1:
        return ImageSet(images[side.numbers], side.labels)
    if isinstance(side.source, ImageSet):
        return ImageSet(framed(side.source.images[side.numbers], frame), side.labels)
    contents = decode_all(side.source, side.numbers.tolist(), frame, shape)
    assert contents.images is not None
    return ImageSet(contents.images, side.labels)


def _check_not_all_broken(side: _Side, class_names: tuple[str, ...] | None) -> None:
    if not side.contents.broken:
        return
    usable = set(side.labels.tolist())
    for label in sorted(set(side.contents.labels.tolist()) - usable):
        name = class_names[label] if class_names else label
        raise DataError(f"all images of class {name!r} are broken; mend them or remove its folder")


def _untested(labels: torch.Tensor, names: tuple[str, ...]) -> Iterable[str]:
    counts = torch.bincount(labels, minlength=len(names))
    missing = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        yield f"classes without a test image, which no accuracy tells of: {len(missing)} ({shown})"


def _statistics(part: _Part) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the training pixels; of a streamed set those of images spread evenly over it."""
    if isinstance(part, StreamedSet):
        count = min(len(part), _STATISTICS_IMAGES)
        chosen = part.indices[torch.arange(count) * len(part) // count]
        contents = decode_all(part.pictures, chosen.tolist(), part.frame, part.image_shape)
        assert contents.images is not None
        return statistics(contents.images)
    return statistics(part.images)
