"""Shards in the WebDataset format: tar files in which members of one name belong together (`0001.jpg`, `0001.cls`).

A shard is read once to learn where its images lie; then any image is one read at an offset. So parts can be cut class
by class, the order of an epoch depends on seed and epoch alone, and it does not matter how many processes read: a
stream of shards shared among workers has none of that. Shards at a URL are fetched whole, to a folder of bounded size,
and an epoch goes through few of them at a time.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from autoslim.data.pixels import IMAGE_SUFFIXES, BrokenImage, Frame, decoded, first_line, load_pillow
from autoslim.data.reading import CACHE
from autoslim.data.sets import Found, Pictures
from autoslim.errors import DataError, RunError
from autoslim.files import write_whole

_MOST_SHARDS = 1_000_000
_AT_A_TIME = 8  # shards among whose images an epoch draws
_KEPT_BYTES = 50 * 10**9  # of shards from URLs
_LABELS = ("cls", "label", "json")  # members that may tell the class, the first that is there


@dataclass(frozen=True, eq=False)
class _Index:
    """Where the images of a list of shards lie: shard, offset and size in bytes of each, its key and its label."""

    shard: np.ndarray[Any, np.dtype[np.int32]]
    offset: np.ndarray[Any, np.dtype[np.int64]]
    size: np.ndarray[Any, np.dtype[np.int64]]
    label: np.ndarray[Any, np.dtype[np.int64]]
    key: np.ndarray[Any, np.dtype[np.bytes_]]


class ShardPictures(Pictures):
    """The images of shards, in the order of the shards."""

    in_threads = True

    def __init__(self, shards: list[str], index: _Index, cache_key: str) -> None:
        self._shards, self._index, self._cache_key = shards, index, cache_key
        self.labels = torch.from_numpy(index.label)

    def __len__(self) -> int:
        return len(self._index.label)

    def name(self, index: int) -> str:
        """Shard and key."""
        shard = self._shards[self._index.shard[index]].rsplit("/", 1)[-1]
        return f"{shard}:{os.fsdecode(bytes(self._index.key[index]))}"

    def read(self, index: int, frame: Frame) -> tuple[torch.Tensor, int]:
        """An image, by one read at its offset."""
        size = int(self._index.size[index])
        if not size:
            raise BrokenImage("the file is empty")
        with _opened(self._shards[self._index.shard[index]]) as file:
            file.seek(int(self._index.offset[index]))
            content = file.read(size)
        if len(content) < size:
            raise BrokenImage("the shard ends in the middle of it")
        return decoded(io.BytesIO(content), frame), int(self._index.label[index])

    def epoch_order(self, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Shards in random order, and the images of a few of them at a time in random order."""
        shards = torch.from_numpy(self._index.shard[indices.numpy()].astype(np.int64))
        turn = torch.empty(len(self._shards), dtype=torch.int64)
        turn[torch.randperm(len(self._shards), generator=generator)] = torch.arange(len(self._shards))
        shuffled = torch.randperm(len(indices), generator=generator)
        return shuffled[torch.argsort(turn[shards[shuffled]] // _AT_A_TIME, stable=True)]

    def check_key(self) -> str:
        """Name, size and time of each shard, or its URL."""
        return self._cache_key


def read_shards(patterns: str, test_patterns: str | None, label_column: str | None) -> Found:
    """Shards by a pattern such as `path/train-{0000..0146}.tar`; `DataError` naming the extra if it is missing."""
    load_pillow()
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise DataError("needs webdataset: pip install 'autoslim[webdataset]'") from error
    train = _pictures(patterns, label_column)
    test = None if test_patterns is None else _pictures(test_patterns.removeprefix("wds:"), label_column)
    return Found(train, test, default_augment="resized-crop,flip", default_size=64)


def _pictures(pattern: str, label_column: str | None) -> ShardPictures:
    shards = _expanded(pattern)
    key = "\n".join([label_column or "", *map(_identity, shards)])
    kept = Path.home() / CACHE / "shards" / f"{_hashed(key)}.npz"
    index = _kept_index(kept)
    if index is None:
        index = _indexed(shards, label_column)
        content = io.BytesIO()
        np.savez_compressed(content, **vars(index))
        with suppress(RunError):  # a home directory that cannot be written costs time, no more
            write_whole(kept, content.getvalue())
    return ShardPictures(shards, index, key)


def _expanded(pattern: str) -> list[str]:
    """The shards a pattern with braces stands for."""
    from braceexpand import braceexpand

    if _most_expanded(pattern) > _MOST_SHARDS:
        raise DataError(f"{pattern!r} stands for more than {_MOST_SHARDS:,} shards")
    try:
        shards = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{pattern!r} is no pattern of shards: {first_line(error)}") from error
    if not pattern:
        raise DataError("names no shards; give wds:path/to/train-{0000..0146}.tar")
    if shards[0].startswith("pipe:"):
        raise DataError("shards come from files or URLs (https://, s3://, gs://), never from a command")
    for shard in shards:
        if not _is_remote(shard) and not os.path.isfile(os.path.expanduser(shard)):
            count = f" of {len(shards)}" if len(shards) > 1 else ""
            raise DataError(f"there is no shard {shard!r}{count}; a pattern is path/to/train-{{0000..0146}}.tar")
    return shards


def _most_expanded(pattern: str) -> int:
    """An upper bound of how many names a pattern stands for: found at once, where writing them out could take days."""
    count = 1
    for group in re.findall(r"\{([^{}]*)\}", pattern):
        ends = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(\.\.-?\d+)?", group)
        if len(group) > 60 and ends:  # no number of shards
            return _MOST_SHARDS + 1
        count *= abs(int(ends[1]) - int(ends[2])) + 1 if ends else group.count(",") + 1
    return count


def _indexed(shards: list[str], label_column: str | None) -> _Index:
    """Read all shards once; `DataError` naming shard and sample for what cannot be used."""
    rows: list[tuple[int, int, int, int, bytes]] = []
    for number, shard in enumerate(shards):
        try:
            with _opened(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                before = len(rows)
                for sample in _samples(archive, shard, label_column):
                    rows.append((number, *sample))
        except tarfile.TarError as error:
            raise DataError(f"shard {shard!r} is no tar file, or a damaged one: {first_line(error)}") from error
        if len(rows) == before:
            raise DataError(f"shard {shard!r} holds no images (.jpg, .png, ...)")
    columns = list(zip(*rows, strict=True))
    return _Index(
        np.array(columns[0], np.int32),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.int64),
        np.array(columns[3], np.int64),
        np.array(columns[4]),
    )


def _samples(archive: tarfile.TarFile, shard: str, label_column: str | None) -> Iterator[tuple[int, int, int, bytes]]:
    """Offset, size, label and key of each sample that has an image; members of one sample follow each other."""
    from webdataset.tariterators import base_plus_ext

    named = ((base_plus_ext(member.name), member) for member in archive if member.isreg())
    samples = itertools.groupby(((split, m) for split, m in named if split[0]), key=lambda each: each[0][0])
    for key, members in samples:
        by_suffix = {suffix.lower(): member for (_, suffix), member in members}
        images = [suffix for suffix in by_suffix if f".{suffix.rsplit('.', 1)[-1]}" in IMAGE_SUFFIXES]
        if not images:
            continue
        where = f"sample {key!r} of shard {shard!r}"
        if len(images) > 1:
            raise DataError(f"{where} has several images: {', '.join(images)}")
        label = _label(archive, by_suffix, label_column, where)
        member = by_suffix[images[0]]
        yield member.offset_data, member.size, label, os.fsencode(key)


def _label(
    archive: tarfile.TarFile, by_suffix: dict[str, tarfile.TarInfo], label_column: str | None, where: str
) -> int:
    suffix = next((name for name in _LABELS if name in by_suffix), None)
    if label_column is not None:
        suffix = "json" if "json" in by_suffix else None
    if suffix is None:
        wanted = ".json" if label_column is not None else ", ".join(f".{name}" for name in _LABELS)
        raise DataError(f"{where} has no label: none of {wanted} is among {', '.join(by_suffix)}")
    stream = archive.extractfile(by_suffix[suffix])
    assert stream is not None, "it is a regular file"
    text = stream.read(10**6).decode(errors="replace").strip()
    try:
        if suffix != "json":
            return int(text)
        value = json.loads(text)[label_column or "label"]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise ValueError(f"{label_column or 'label'} is {value!r}")
    except KeyError as error:
        raise DataError(f"{where}: its .json has no key {error}; set label_column") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: its label is no whole number ({first_line(error)[:80]})") from error


# ---- shards at a URL


def _is_remote(shard: str) -> bool:
    return "://" in shard


@contextmanager
def _opened(shard: str) -> Iterator[Any]:
    path = _fetched(shard) if _is_remote(shard) else Path(os.path.expanduser(shard))
    with open(path, "rb") as file:
        yield file


def _fetched(url: str) -> Path:
    """A copy of a shard on disk, fetched by whoever of several processes needs it first."""
    folder = Path.home() / CACHE / "shards"
    path = folder / f"{_hashed(url)}.tar"
    if path.exists():
        with suppress(OSError):
            os.utime(path)  # used last: kept longest
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{path.name}.lock"):
            if not path.exists():
                _download(url, path)
                _make_room(folder, path)
    except OSError as error:
        raise DataError(f"shard {url!r} cannot be fetched: {first_line(error)}") from error
    return path


def _download(url: str, path: Path) -> None:
    import fsspec  # torch needs it too

    beside = path.with_name(f"{path.name}.part")
    try:
        with fsspec.open(url, "rb") as source, open(beside, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        os.replace(beside, path)
    except ImportError as error:  # of the protocol
        raise DataError(f"shard {url!r}: {first_line(error)}") from error
    except Exception as error:  # each protocol has its own
        raise DataError(f"shard {url!r} cannot be fetched: {first_line(error)}") from error
    finally:
        beside.unlink(missing_ok=True)


def _make_room(folder: Path, fresh: Path) -> None:
    """Remove the shards unused for longest until the rest is small enough; whoever reads one now still can."""
    shards = []
    for path in folder.glob("*.tar"):
        with suppress(OSError):
            found = path.stat()
            shards.append((found.st_mtime, found.st_size, path))
    total = sum(size for _, size, _ in shards)
    for _, size, path in sorted(shards):
        if total <= _KEPT_BYTES:
            return
        if path != fresh:
            path.unlink(missing_ok=True)
            total -= size


# ---- what was learnt before


def _identity(shard: str) -> str:
    if _is_remote(shard):
        return shard
    found = os.stat(os.path.expanduser(shard))
    return f"{os.path.abspath(os.path.expanduser(shard))}\t{found.st_size}\t{found.st_mtime_ns}"


def _kept_index(path: Path) -> _Index | None:
    """An index written before, if it is still there and whole."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return _Index(*(kept[name] for name in ("shard", "offset", "size", "label", "key")))
    except Exception:  # zipfile, zlib, struct and numpy each have their own
        return None


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]
