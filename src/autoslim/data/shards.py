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
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock

from autoslim.data.pixels import IMAGE_SUFFIXES, BrokenImage, Frame, decoded, first_line, load_pillow
from autoslim.data.reading import CACHE
from autoslim.data.sets import Found, Pictures, checked_label
from autoslim.errors import DataError, RunError
from autoslim.files import write_whole

_MOST_SHARDS = 1_000_000
_AT_A_TIME = 8  # shards among whose images an epoch draws
_KEPT_BYTES = 50 * 10**9  # of shards from URLs
_LABELS = ("cls", "label", "json")  # members that may tell the class, the first that is there
_BRACES = re.compile(
    r"\\.|\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\n?\}|\{([A-Za-z]\.\.[A-Za-z])(?:\.\.-?\d+)?\n?\}|[{},]", re.S
)
_INDEX_FORMAT = 2  # those before were made of shards cut short too
_LONGEST_NUMBER = 30  # digits; no number of shards has more


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

    def __init__(self, shards: list[str], versions: list[str], index: _Index, cache_key: str) -> None:
        self._shards, self._versions, self._index, self._cache_key = shards, versions, index, cache_key
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
        shard = self._index.shard[index]
        with _opened(self._shards[shard], self._versions[shard]) as file:
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
        """Name, size and time of each shard, or what was fetched from its URL."""
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
    versions = [_version(shard) for shard in shards]
    index = _kept_index(_index_path(versions, label_column))
    if index is None:
        index, versions = _indexed(shards, label_column)
        content = io.BytesIO()
        np.savez_compressed(content, **vars(index))
        with suppress(RunError):  # a home directory that cannot be written costs time, no more
            write_whole(_index_path(versions, label_column), content.getvalue())
    return ShardPictures(shards, versions, index, _key(versions, label_column))


def _expanded(pattern: str) -> list[str]:
    """The shards a pattern with braces stands for."""
    from braceexpand import braceexpand

    if _num_expanded(pattern) > _MOST_SHARDS:
        raise DataError(f"{pattern!r} stands for more than {_MOST_SHARDS:,} shards")
    try:
        shards = [_plain(shard) for shard in braceexpand(pattern)]
    except RecursionError as error:
        raise DataError(
            f"a pattern of shards that begins with {pattern[:40]!r} has too many braces in each other"
        ) from error
    if not pattern:
        raise DataError("names no shards; give wds:path/to/train-{0000..0146}.tar")
    if any(shard.startswith("pipe:") for shard in shards):
        raise DataError("shards come from files or URLs (https://, s3://, gs://), never from a command")
    for shard in shards:
        if not _is_remote(shard) and not os.path.isfile(os.path.expanduser(shard)):
            count = f" of {len(shards)}" if len(shards) > 1 else ""
            raise DataError(f"there is no shard {shard!r}{count}; a pattern is path/to/train-{{0000..0146}}.tar")
    return shards


def _num_expanded(pattern: str) -> int:
    """How many names a pattern stands for, or more: found at once, where writing them out could take days.

    What follows each other multiplies, alternatives add up, and so on inwards.
    """
    unbalanced = DataError(f"{pattern!r} is no pattern of shards: one of its braces has no partner")
    most = _MOST_SHARDS + 1
    open_groups: list[tuple[int, int]] = []  # of each: the sum of the alternatives so far, the product before it
    total, count = 0, 1
    for token in _BRACES.finditer(pattern):
        if token[1]:
            if len(token[0]) > 2 * _LONGEST_NUMBER:
                return most
            count *= abs(int(token[1]) - int(token[2])) + 1
        elif token[3]:
            count *= 52
        elif token[0] == "{":
            open_groups.append((total, count))
            total, count = 0, 1
        elif token[0] == "," and open_groups:
            total, count = total + count, 1
        elif token[0] == "}":
            if not open_groups:
                raise unbalanced
            inner = total + count
            total, count = open_groups.pop()
            count *= inner
        total, count = min(total, most), min(count, most)
    if open_groups:
        raise unbalanced
    return count


def _indexed(shards: list[str], label_column: str | None) -> tuple[_Index, list[str]]:
    """Read all shards once, and note the version of each; `DataError` naming what cannot be used."""
    rows: list[tuple[int, int, int, int, bytes]] = []
    versions = []
    for number, shard in enumerate(shards):
        try:
            with _opened(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                versions.append(os.path.basename(file.name) if _is_remote(shard) else _version(shard))
                before = len(rows)
                try:
                    for sample in _samples(archive, shard, label_column):
                        rows.append((number, *sample))
                except DataError:
                    _check_end(archive, file, shard)  # it may be why a sample lacks something
                    raise
                _check_end(archive, file, shard)
        except tarfile.TarError as error:
            raise DataError(f"shard {shard!r} is no tar file, or a damaged one: {first_line(error)}") from error
        if len(rows) == before:
            raise DataError(f"shard {shard!r} holds no images (.jpg, .png, ...)")
    columns = list(zip(*rows, strict=True))
    index = _Index(
        np.array(columns[0], np.int32),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.int64),
        np.array(columns[3], np.int64),
        np.array(columns[4]),
    )
    return index, versions


def _check_end(archive: tarfile.TarFile, file: BinaryIO, shard: str) -> None:
    """`DataError` for an archive without its end, a block of zeros; tarfile takes whatever is no member for it.

    Usual are two such blocks, and more as padding.
    """
    archive.getmembers()  # the rest of them
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(
            f"shard {shard!r} is cut short or damaged: its last whole member is not followed by the end of an archive; "
            "copy or download it again"
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
            return checked_label(int(text), where)
        value = json.loads(text)[label_column or "label"]
        if isinstance(value, int) and not isinstance(value, bool):
            return checked_label(value, where)
        raise ValueError(f"{label_column or 'label'} is {value!r}")
    except KeyError as error:
        raise DataError(f"{where}: its .json has no key {error}; set label_column") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: its label is no whole number ({first_line(error)[:80]})") from error


# ---- shards at a URL


def _plain(shard: str) -> str:
    """A path where a URL names one: such a file is read where it lies."""
    return re.sub(r"^(file|local)://", "", shard)


def _is_remote(shard: str) -> bool:
    return "://" in shard


@contextmanager
def _opened(shard: str, version: str = "") -> Iterator[Any]:
    """A shard to read from: of a URL the copy called `version`, by default any."""
    path = _fetched(shard, version) if _is_remote(shard) else Path(os.path.expanduser(shard))
    with open(path, "rb") as file:
        yield file


def _fetched(url: str, version: str) -> Path:
    """A copy of a shard on disk, fetched by whoever of several processes needs it first.

    Its name tells its content. So a shard that was fetched again and is another one now is never read by an old index.
    """
    path = _copy(version or _version(url))
    if path is None:
        try:
            _folder().mkdir(parents=True, exist_ok=True)
            with FileLock(_folder() / f"{_hashed(url)}.lock"):
                last = _version(url)
                path = _copy(version or last)
                if path is None and (not version or last in ("", version)):  # else it is known to have changed
                    path = _download(url)
                    _make_room(_folder(), path)
        except OSError as error:
            raise DataError(f"shard {url!r} cannot be fetched: {first_line(error)}") from error
    if path is None or (version and path.name != version):
        raise DataError(
            f"shard {url!r} has changed since its images were listed; start again, and they are listed anew"
        )
    with suppress(OSError):
        os.utime(path)  # used last: kept longest
    return path


def _folder() -> Path:
    return Path.home() / CACHE / "shards"


def _copy(version: str) -> Path | None:
    path = _folder() / version
    return path if version and path.exists() else None


def _download(url: str) -> Path:
    """Fetch a shard, and note beside it what it is called now."""
    import fsspec  # torch needs it too

    beside = _folder() / f"{_hashed(url)}.part"
    digest = hashlib.sha256()
    try:
        with fsspec.open(url, "rb") as source, open(beside, "wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
        path = _folder() / f"{_hashed(url)}-{digest.hexdigest()[:32]}.tar"
        os.replace(beside, path)
        write_whole(_note(url), path.name)
    except ImportError as error:  # of the protocol
        raise DataError(f"shard {url!r}: {first_line(error)}") from error
    except Exception as error:  # each protocol has its own
        raise DataError(f"shard {url!r} cannot be fetched: {_reason(error, url)}") from error
    finally:
        beside.unlink(missing_ok=True)
    return path


def _reason(error: BaseException, url: str) -> str:
    """What an exception says, or the one it came from where it says the URL only."""
    cause = error.__cause__ or error.__context__
    if cause is not None and str(error).strip() in ("", url):
        return _reason(cause, url)
    reason = first_line(error)
    return f"{type(error).__name__} without a reason" if reason == url else reason


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


def _version(shard: str) -> str:
    """Stands for the content of a shard: name, size and time, or what the copy is called that was fetched last.

    Empty for a URL from which nothing was fetched yet.
    """
    if _is_remote(shard):
        with suppress(OSError, ValueError):
            name = _note(shard).read_text(encoding="ascii")
            if re.fullmatch(rf"{_hashed(shard)}-[0-9a-f]{{32}}\.tar", name):
                return name
        return ""
    found = os.stat(os.path.expanduser(shard))
    return f"{os.path.abspath(os.path.expanduser(shard))}\t{found.st_size}\t{found.st_mtime_ns}"


def _note(url: str) -> Path:
    return _folder() / f"{_hashed(url)}.version"


def _key(versions: list[str], label_column: str | None) -> str:
    return "\n".join([label_column or "", *versions])


def _index_path(versions: list[str], label_column: str | None) -> Path:
    return _folder() / f"{_hashed(_key(versions, label_column))}-{_INDEX_FORMAT}.npz"


def _kept_index(path: Path) -> _Index | None:
    """An index written before, if it is still there and whole."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return _Index(*(kept[name] for name in ("shard", "offset", "size", "label", "key")))
    except Exception:  # zipfile, zlib, struct and numpy each have their own
        return None


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]
