"""Image folders: which files are images of which class, and everything that can be wrong with a tree of files."""

from __future__ import annotations

import itertools
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from autoslim.data.pixels import IMAGE_SUFFIXES, BrokenImage, Frame, decoded, load_pillow
from autoslim.data.sets import Found, Pictures
from autoslim.errors import DataError, nearest

_TEST_FOLDERS = ("test", "val", "valid", "validation")  # beside train; the first that has class folders is used
_TRAIN_NAMES = ("train", "training")  # these in any letter case, where there is no pair of the above
_TEST_NAMES = ("test", "testing", "val", "valid", "validation", "validate", "dev")
_SIZE = 64
_Id = tuple[int, int]  # device and inode


class FolderPictures(Pictures):
    """The image files of class folders below `root`.

    Names are kept as one array of bytes: a million strings would be copied into every worker.
    """

    in_threads = True

    def __init__(self, root: Path, names: Iterable[str], labels: Iterable[int]) -> None:
        self.root = root
        self._names = np.array([os.fsencode(name) for name in names])
        self.labels = self._given = torch.tensor(list(labels), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The file below the root."""
        return os.fsdecode(bytes(self._names[index])).replace(os.sep, "/")

    def read(self, index: int, frame: Frame) -> tuple[torch.Tensor, int]:
        """A file, decoded."""
        path = self._path(index)
        _check_file(path)
        return decoded(path, frame), int(self._given[index])

    def check_key(self) -> str:
        """Name, size and time of each file."""
        lines = [str(self.root.resolve())]
        for index in range(len(self)):
            try:
                found = os.stat(self._path(index))
                lines.append(f"{self.name(index)}\t{found.st_size}\t{found.st_mtime_ns}")
            except OSError as error:
                lines.append(f"{self.name(index)}\t{error.errno}")
        return "\n".join(lines)

    def _path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self._names[index])))


def _check_file(path: str) -> None:
    """`BrokenImage` for what cannot be a whole image; opening a named pipe would wait for ever."""
    try:
        found = os.stat(path)
    except OSError as error:
        if os.path.islink(path):
            raise BrokenImage(f"the link leads nowhere ({error.strerror})") from error
        raise BrokenImage(str(error.strerror)) from error
    if not stat.S_ISREG(found.st_mode):
        raise BrokenImage("not a regular file")
    if not found.st_size:
        raise BrokenImage("the file is empty")


def read_folder(root: Path) -> Found:
    """The images of a folder, by their names; none is opened. `DataError` for a tree that cannot be meant."""
    load_pillow()
    seen = _Seen(root)
    train_folder, test_folder = _layout(root)
    by_class = _class_files(train_folder, root, seen)
    class_names = tuple(by_class)
    if len(class_names) < 2:
        raise DataError(f"holds only one class, {class_names[0]!r}; there must be at least two class folders")
    test = None
    if test_folder is not None:
        if os.path.samefile(train_folder, test_folder):
            both = f"{train_folder.name}/ and {test_folder.name}/"
            raise DataError(f"{both} are the same folder; the test images must be others")
        tested = _class_files(test_folder, root, seen, may_be_empty=True)
        written = {unicodedata.normalize("NFC", name): name for name in class_names}  # macOS decomposes accents
        for name in tested:
            if unicodedata.normalize("NFC", name) not in written:
                hint = nearest(name, class_names)
                hint = hint if hint.startswith("did") else "remove it or add it there"
                raise DataError(f"class {name!r} is in {test_folder.name}/ but not in {train_folder.name}/; {hint}")
        if not any(tested.values()):
            raise DataError(f"{test_folder.name}/ holds no images (.jpg, .png, ...); add some or remove it")
        tested = {written[unicodedata.normalize("NFC", name)]: files for name, files in tested.items()}
        test = _pictures(root, tested, class_names)
    train = _pictures(root, by_class, class_names)
    return Found(
        train, test, class_names, default_augment="resized-crop,flip", remarks=seen.remarks(), default_size=_SIZE
    )


def _pictures(root: Path, by_class: dict[str, list[str]], class_names: tuple[str, ...]) -> FolderPictures:
    labels = [label for label, name in enumerate(class_names) for _ in by_class.get(name, ())]
    return FolderPictures(root, [file for name in class_names for file in by_class.get(name, ())], labels)


@dataclass
class _Seen:
    """What was met on the way through a tree: folders, by identity, and what was left out."""

    root: Path
    classes: dict[_Id, str] = field(default_factory=dict)  # by the folders that hold their images
    others: Counter[str] = field(default_factory=Counter)  # files that are no images, by suffix
    beside: list[str] = field(default_factory=list)
    circles: list[str] = field(default_factory=list)

    def remarks(self) -> tuple[str, ...]:
        """What was left out, in a line each."""
        found = []
        if self.others:
            kinds = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in self.others.most_common(4))
            more = ", ..." if len(self.others) > 4 else ""
            found.append(f"files that are no images by their names, left out: {self.others.total()} ({kinds}{more})")
        if self.beside:
            found.append(f"images beside the class folders, left out: {len(self.beside)}, the first: {self.beside[0]}")
        if self.circles:
            found.append(
                f"links to folders that were read already, not followed: {len(self.circles)}, "
                f"the first: {self.circles[0]}"
            )
        return tuple(found)


def _layout(root: Path) -> tuple[Path, Path | None]:
    """The train and the test folder, or the folder of class folders and None."""
    folders = sorted(_subfolders(root))
    names = {folder.name for folder in folders}
    exact = [root / name for name in _TEST_FOLDERS if name in names]
    if "train" in names and exact:
        return root / "train", _first_with_classes(exact)
    trains, tests = (
        [f for n in known for f in folders if f.name.lower() == n] for known in (_TRAIN_NAMES, _TEST_NAMES)
    )
    if trains and tests:
        return _checked_pair(trains, tests)
    if not trains and not tests:
        return root, None
    part, lacking = (trains + tests)[0].name, "train/" if tests else "test/ or val/"
    if len(folders) == len(trains + tests):
        raise DataError(f"has {part}/ but no {lacking}; add it, or give one folder of class folders")
    shared = set.intersection(*({below.name for below in _subfolders(folder)} for folder in folders))
    if len(shared) > 1 and not any(map(_stray_images, folders)):  # as in train/ and eval/: those are no classes
        raise DataError(
            f"has {part}/ but no {lacking}, and all its folders hold {' and '.join(sorted(shared)[:2])}; "
            f"rename the one meant to {lacking}, or {part}/ if it is a class"
        )
    return root, None


def _checked_pair(trains: list[Path], tests: list[Path]) -> tuple[Path, Path]:
    """The train and the test folder among those with such names; `DataError` where that would be a guess."""
    alike = [pair for pair in itertools.pairwise(tests) if pair[0].name.lower() == pair[1].name.lower()]
    for one, other in (*itertools.pairwise(trains), *alike):
        raise DataError(f"has {one.name}/ and {other.name}/, which mean the same images; merge them or rename one")
    train, test = trains[0], _first_with_classes(tests)
    if not _subfolders(train):
        raise DataError(
            f"{train.name}/ and {test.name}/ are training and test images by their names, but {train.name}/ has no "
            "class folders; add a subfolder for each class, or rename both if they are classes"
        )
    return train, test


def _first_with_classes(folders: list[Path]) -> Path:
    return next((folder for folder in folders if _subfolders(folder)), folders[0])


def _class_files(folder: Path, root: Path, seen: _Seen, *, may_be_empty: bool = False) -> dict[str, list[str]]:
    """The image files of each class folder of `folder`, at any depth, by their names below `root`."""
    shown = "the folder" if folder == root else f"{folder.name}/"
    classes = sorted(_subfolders(folder))
    if not classes:
        holds = "has no class folders" if any(folder.iterdir()) else "is empty"
        raise DataError(f"{shown} {holds}; needed is a subfolder for each class with its images in it")
    _check_names([path.name for path in classes], shown)
    seen.beside += [(folder / name).relative_to(root).as_posix() for name in _stray_images(folder)]
    above = {_identity(path) for path in (folder, *folder.parents)}
    found = {}
    for path in classes:
        where = path.relative_to(root).as_posix()
        if _identity(path) in above:
            raise DataError(f"class folder {where!r} is a link to a folder that it lies in; remove it")
        found[path.name] = _image_files(path, where, above, seen)
        if not found[path.name] and not may_be_empty:
            raise DataError(f"class folder {where!r} holds no images (.jpg, .png, ...); add some or remove it")
    return found


def _check_names(names: list[str], shown: str) -> None:
    """`DataError` for two class folders that are meant to be one."""
    by_meaning: dict[str, str] = {}
    for name in names:
        meaning = unicodedata.normalize("NFKC", name).casefold().strip()
        other = by_meaning.setdefault(meaning, name)
        if other != name:
            how = "upper and lower case" if other.casefold() == name.casefold() else "how they are written"
            raise DataError(
                f"class folders {other!r} and {name!r} of {shown} differ only in {how}; merge them or rename one"
            )


def _image_files(folder: Path, shown: str, above: set[_Id], seen: _Seen) -> list[str]:
    """Image files below a class folder, by their names below the root; links are followed, but never in a circle."""
    found: list[str] = []
    waiting = [(str(folder), shown)]
    name_of_class = shown  # with train/ or val/ before it: a class may have its folder in both
    while waiting:
        path, prefix = waiting.pop()
        identity = _identity(path)
        owner = seen.classes.setdefault(identity, name_of_class)
        if owner != name_of_class:
            raise DataError(f"{prefix!r} is a folder of class folder {owner!r} too; an image can have one class only")
        with os.scandir(path) as entries:
            for entry in entries:
                inner = f"{prefix}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    below = _identity(entry.path)
                    if below in above or seen.classes.get(below) == name_of_class:
                        seen.circles.append(inner)
                    else:
                        waiting.append((entry.path, inner))
                elif _is_image(entry.name):
                    found.append(inner)
                else:
                    seen.others[os.path.splitext(entry.name)[1].lower()] += 1
    return sorted(found)


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if _is_folder(entry) and not entry.name.startswith(".")]


def _stray_images(folder: Path) -> list[str]:
    """Images that lie in a folder itself."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_image(entry.name) and not _is_folder(entry))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def _identity(path: str | Path) -> _Id:
    found = os.stat(path)
    return found.st_dev, found.st_ino
