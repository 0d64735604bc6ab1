"""Data sets: every source, the hold-out, batches, and every kind of bad input refused in one line."""

import gzip
import io
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoslim.data import Batches, ImageSet, load_data, memory, parse_augment
from autoslim.errors import ConfigError, DataError

PLAIN = {"mean": [0.0], "std": [1.0]}
RED, GREEN, BLUE = (230, 20, 20), (20, 200, 20), (20, 20, 220)


@pytest.fixture(scope="module")
def fashion():
    return load_data("fashion-mnist-mini")


def refusal(source, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_data(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert repr(str(source)) in text
    return text


def numbered(count: int, num_classes: int = 3, shape: tuple[int, ...] = (8, 8)) -> tuple[np.ndarray, np.ndarray]:
    """Images that are all different: the first pixels spell the number of the image."""
    x = np.zeros((count, *shape), np.uint8)
    x.reshape(count, -1)[:, :2] = np.stack([np.arange(count) // 256, np.arange(count) % 256], axis=1)
    return x, np.arange(count) % num_classes


def arrays(**changed) -> dict[str, np.ndarray]:
    x_train, y_train = numbered(60)
    x_test, y_test = numbered(12)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test, **changed}


@pytest.fixture
def npz(tmp_path):
    """Write an `.npz`; arrays given replace good ones, None leaves one out."""

    def write(**changed) -> str:
        np.savez(tmp_path / "set.npz", **{k: v for k, v in arrays(**changed).items() if v is not None})
        return str(tmp_path / "set.npz")

    return write


def identities(images: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.images}


# ---- the embedded set


def test_embedded_set_has_its_published_shape(fashion):
    assert [len(fashion.train), len(fashion.holdout), len(fashion.test)] == [4800, 1200, 1000]
    assert fashion.image_shape == (1, 28, 28)
    assert fashion.num_classes == 10
    assert fashion.class_names[9] == "Ankle boot"
    assert (fashion.mean, fashion.std) == ((0.2860,), (0.3530,))
    assert fashion.default_augment == "flip,crop"
    assert fashion.skipped == ()


def test_embedded_set_carries_its_licence():
    text = (files("autoslim") / "assets" / "fashion_mnist_6k_1k.LICENSE").read_text(encoding="utf-8")
    assert "2017 Zalando SE" in text
    assert "The MIT License" in text


def test_image_size_resizes_the_embedded_set(fashion):
    large = load_data("fashion-mnist-mini", image_size=56)
    assert large.image_shape == (1, 56, 56)
    by_pillow = Image.fromarray(fashion.test.images[7, 0].numpy()).resize((56, 56), Image.Resampling.BILINEAR)
    assert (large.test.images[7, 0].float() - torch.tensor(np.array(by_pillow))).abs().max() <= 1


# ---- the hold-out


def test_holdout_is_stratified_and_disjoint(fashion):
    assert fashion.holdout.labels.bincount().tolist() == [120] * 10
    assert fashion.train.labels.bincount().tolist() == [480] * 10
    train, held = identities(fashion.train), identities(fashion.holdout)
    assert not train & held
    whole = np.load(files("autoslim") / "assets" / "fashion_mnist_6k_1k.npz")
    assert train | held == {image.tobytes() for image in whole["x_train"]}
    assert np.array_equal(fashion.test.images[:, 0].numpy(), whole["x_test"])
    assert np.array_equal(fashion.test.labels.numpy(), whole["y_test"])


def test_holdout_labels_still_belong_to_their_images(npz):
    x, y = numbered(60)
    label_of = {image.tobytes(): label for image, label in zip(x, y, strict=True)}
    data = load_data(npz())
    for part in (data.train, data.holdout):
        for image, label in zip(part.images, part.labels, strict=True):
            assert label_of[image.numpy().tobytes()] == label


def test_holdout_is_fixed_by_the_seed(npz):
    source = npz()
    first, again, other = (identities(load_data(source, seed=seed).holdout) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("holdout", "count"), [(0.2, 12), (0.25, 15), (7, 7), (3, 3), (57, 57), (0.001, 3)])
def test_holdout_is_a_share_or_a_number(npz, holdout, count):
    data = load_data(npz(), holdout=holdout)
    assert [len(data.holdout), len(data.train)] == [count, 60 - count]
    assert set(data.holdout.labels.tolist()) == set(data.train.labels.tolist()) == {0, 1, 2}


def test_holdout_of_uneven_classes_follows_their_sizes(npz):
    labels = np.array([0] * 40 + [1] * 18 + [2] * 2)
    assert load_data(npz(y_train=labels)).holdout.labels.bincount().tolist() == [8, 3, 1]


@pytest.mark.parametrize("holdout", [0, -1, 2, 58, 60, 1000, 0.0, 1.0, -0.5, 1.5, 0.99, float("nan")])
def test_holdout_that_leaves_something_empty_is_refused(npz, holdout):
    text = refusal(npz(), holdout=holdout)
    assert "3 to 57" in text or "no share between 0 and 1" in text


def test_class_of_a_single_image_cannot_be_on_both_sides(npz):
    assert "class '2' has only 1 image" in refusal(npz(y_train=np.array([0] * 30 + [1] * 29 + [2])))


# ---- .npz


def test_npz_grey(npz):
    data = load_data(npz())
    assert data.image_shape == (1, 8, 8)
    assert data.class_names == ("0", "1", "2")
    assert data.default_augment == "crop"


def test_npz_colour_keeps_its_channels_and_measures_them_on_train(npz):
    x = np.random.default_rng(0).integers(0, 256, (60, 6, 10, 3), np.uint8)
    data = load_data(npz(x_train=x, y_train=numbered(60)[1][:, None], x_test=x[:12]))
    assert data.image_shape == (3, 6, 10)
    assert data.default_augment == "flip,crop"
    assert np.array_equal(data.test.images.numpy(), x[:12].transpose(0, 3, 1, 2))
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_npz_with_class_names(npz):
    assert load_data(npz(class_names=np.array(["cat", "dog", "cow"]))).class_names == ("cat", "dog", "cow")


def test_npz_by_path_object(npz):
    assert len(load_data(Path(npz())).test) == 12


def test_other_members_of_an_npz_are_not_touched(npz):
    assert len(load_data(npz(notes=np.array([{"any": "object"}], dtype=object))).test) == 12


def test_image_size_crops_the_centre(npz):
    x = np.zeros((60, 8, 16), np.uint8)
    x[:, :, 4:12] = 255
    data = load_data(npz(x_train=x, x_test=x[:12]), image_size=4)
    assert data.image_shape == (1, 4, 4)
    assert data.train.images.min() == 255


def test_image_size_makes_no_artefacts(npz):
    """A checkerboard finer than a pixel of the result must become grey."""
    board = np.broadcast_to((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8), (60, 64, 64))
    images = load_data(npz(x_train=board, x_test=board[:12]), image_size=7).train.images
    assert (images.float() - 127.5).abs().max() < 4


def test_constant_images_give_finite_batches(npz):
    data = load_data(npz(x_train=np.full((60, 8, 8), 9, np.uint8)))
    images, _ = next(iter(Batches(data.train, 8, mean=data.mean, std=data.std)))
    assert images.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"y_test": None, "x_test": None}, "lacks x_test, y_test (it has: x_train, y_train)"),
        ({"x_train": np.zeros((60, 8, 8), np.float32)}, "x_train is float32; images must be uint8"),
        ({"x_train": np.zeros((60, 64), np.uint8)}, "x_train has shape (60, 64)"),
        ({"x_train": np.zeros((60, 3, 8, 8), np.uint8)}, "x_train has shape (60, 3, 8, 8); needed is (N, H, W)"),
        ({"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, np.int64)}, "x_train is empty"),
        ({"y_train": np.zeros(60)}, "y_train is float64; labels must be whole numbers"),
        ({"y_train": np.eye(60, dtype=np.int64)}, "y_train has shape (60, 60); needed is (N,)"),
        ({"y_train": np.arange(59) % 3}, "x_train holds 60 images but y_train 59 labels"),
        ({"y_train": np.arange(60) % 3 - 1}, "label -1 is negative"),
        ({"y_test": np.arange(12) % 3 - 1}, "label -1 is negative"),
        ({"y_train": np.zeros(60, np.int64), "y_test": np.zeros(12, np.int64)}, "only one class, 0"),
        ({"y_test": np.arange(12) % 4}, "class 3 is in the test part but has no training image"),
        ({"y_train": np.arange(60) % 3 + 1, "y_test": np.arange(12) % 3 + 1}, "class 0 has no training image"),
        ({"y_train": np.arange(60) % 3 * 2, "y_test": np.arange(12) % 3 * 2}, "class 1 has no training image"),
        ({"class_names": np.array(["cat", "dog"])}, "label 2 is too high for 2 class names"),
        ({"class_names": np.array(["cat", "dog", "cow", "pig"])}, "class 'pig' has no training image"),
        ({"x_test": np.zeros((12, 9, 9), np.uint8)}, "9x9 with 1 channel; set an image size"),
        ({"x_test": np.zeros((12, 8, 8, 3), np.uint8)}, "test images 8x8 with 3 channels"),
    ],
)
def test_npz_that_cannot_be_used(npz, changed, reason):
    assert reason in refusal(npz(**changed))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_pickled_arrays_are_never_loaded(npz, tmp_path):
    source = npz(y_train=np.array([Bomb()] * 60, dtype=object))
    assert "y_train holds pickled Python objects, which are never loaded" in refusal(source)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    assert "not an .npz file" in refusal(tmp_path / "pickle.npz")


def test_damaged_npz(npz, tmp_path):
    whole = Path(npz()).read_bytes()
    path = tmp_path / "damaged.npz"
    for content in (b"", b"no archive at all", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert "not an .npz file, or a damaged one" in refusal(path)
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    assert "holds a single array" in refusal(tmp_path / "single.npz")
    flipped = bytearray(whole)
    flipped[300] ^= 255  # a pixel of x_train: the checksum of the archive tells
    path.write_bytes(flipped)
    assert "x_train is damaged" in refusal(path)


def test_npz_larger_than_the_memory(npz, monkeypatch):
    source = npz()
    assert "72 images of 1000000x1000000 need 72,000,000 MB, more than half" in refusal(source, image_size=10**6)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000)
    assert "its arrays need 0 MB, more than half of the 0 MB of free memory" in refusal(source)


def test_npz_whose_header_promises_too_much(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1000, 1000)})
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{key}.npy", header.getvalue())
    assert "x_train is damaged" in refusal(tmp_path / "large.npz")


# ---- which source is meant


def test_unknown_source_suggests_the_nearest(npz, tmp_path, monkeypatch):
    npz()
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'fashion-mnist-mini'?" in refusal("fashion-mnist")
    assert "did you mean 'set.npz'?" in refusal("sets.npz")
    assert f"did you mean '{tmp_path / 'set.npz'}'?" in refusal(tmp_path / "sett.npz")
    assert "give fashion-mnist-mini, an .npz file, an image folder" in refusal("/no/such/folder")
    assert "an image folder" in refusal("")
    assert "an image folder" in refusal("~no-such-user/images")


def test_other_files_are_no_data_sets(tmp_path):
    (tmp_path / "set.csv").write_text("0,1")
    (tmp_path / "set.py").write_text("")
    assert "a .csv file is no data set; give an .npz file" in refusal(tmp_path / "set.csv")
    assert "set.py:function" in refusal(tmp_path / "set.py")


@pytest.mark.parametrize("size", [0, -5])
def test_image_size_must_be_positive(size):
    assert f"at least 1, got {size}" in refusal("fashion-mnist-mini", image_size=size)


# ---- image folders


def picture(colour=RED, size=(40, 30), mode="RGB") -> Image.Image:
    return Image.new("RGB", size, colour).convert(mode)


def fill(folder: Path, count: int, colour=RED, suffix=".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(tuple(min(255, c + index) for c in colour)).save(folder / f"{index:03}{suffix}")


@pytest.fixture
def folder(tmp_path):
    """Two classes with ten images each, in one folder of class folders."""
    fill(tmp_path / "set" / "apple", 10, RED)
    fill(tmp_path / "set" / "pear", 10, GREEN)
    return tmp_path / "set"


@pytest.fixture
def split_folder(tmp_path):
    """train/ with two classes of ten images, val/ with two of three."""
    for part, count in (("train", 10), ("val", 3)):
        fill(tmp_path / "set" / part / "apple", count, RED)
        fill(tmp_path / "set" / part / "pear", count, GREEN)
    return tmp_path / "set"


def test_folder_of_class_folders(folder):
    calls = []
    data = load_data(str(folder), progress=lambda done, total: calls.append((done, total)))
    assert data.class_names == ("apple", "pear")
    assert data.image_shape == (3, 64, 64)
    assert data.default_augment == "resized-crop,flip"
    assert data.test.labels.bincount().tolist() == [2, 2]
    assert [len(data.train), len(data.holdout)] == [13, 3]
    parts = [identities(part) for part in (data.train, data.holdout, data.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 20
    assert calls == [(done, 20) for done in range(1, 21)]
    is_green = data.train.images[:, 1].float().mean((1, 2)) > 100
    assert torch.equal(is_green, data.train.labels == 1)


def test_test_part_of_one_folder_is_fixed_by_the_seed_not_by_the_holdout(folder):
    first = identities(load_data(str(folder), image_size=8).test)
    assert identities(load_data(str(folder), image_size=8, holdout=7).test) == first
    assert identities(load_data(str(folder), image_size=8, seed=3).test) != first


@pytest.mark.parametrize("name", ["val", "test", "valid", "validation"])
def test_folder_with_train_and_a_test_folder(split_folder, name):
    if name != "val":
        (split_folder / "val").rename(split_folder / name)
    data = load_data(str(split_folder), image_size=16)
    assert len(data.train) + len(data.holdout) == 20
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_test_folder_without_labels_gives_way_to_val(split_folder):
    (split_folder / "test").mkdir()
    picture().save(split_folder / "test" / "unknown.png")
    assert len(load_data(str(split_folder), image_size=16).test) == 6


def test_nested_images_are_found_and_other_files_ignored(folder):
    fill(folder / "apple" / "more" / "deep", 5, BLUE, ".JPG")
    (folder / "apple" / "notes.txt").write_text("not an image")
    (folder / "apple" / "._000.png").write_text("left by a Mac")
    (folder / ".hidden").mkdir()
    data = load_data(str(folder), image_size=8)
    assert sum(map(len, (data.train, data.holdout, data.test))) == 25


def decoded(folder: Path, image: Image.Image, name: str, size: int = 16, **options) -> torch.Tensor:
    """What the library makes of one image file, (3, H, W)."""
    for part in ("train", "test"):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True)
            for index in range(2):
                image.save(folder / part / label / name.replace(".", f"{index}."), **options)
    return load_data(str(folder), image_size=size).test.images[0]


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *(("RGB", name) for name in ("a.jpg", "a.png", "a.bmp", "a.webp", "a.tif", "a.ppm", "a.JPEG")),
        ("CMYK", "a.jpg"),
        ("CMYK", "a.tif"),
        ("P", "a.png"),
        ("P", "a.gif"),
        ("RGBA", "a.png"),
        ("RGBA", "a.webp"),
    ],
)
def test_every_format_and_mode_becomes_rgb(tmp_path, mode, name):
    image = decoded(tmp_path, picture((200, 100, 50), mode=mode), name)
    assert (image.float().mean((1, 2)) - torch.tensor([200.0, 100, 50])).abs().max() < 12


@pytest.mark.parametrize(
    ("mode", "name"), [("L", "a.png"), ("L", "a.jpg"), ("LA", "a.png"), ("I;16", "a.png"), ("I;16", "a.tif")]
)
def test_grey_of_8_and_16_bits(tmp_path, mode, name):
    if mode == "I;16":
        grey = Image.fromarray(np.full((30, 40), 120 * 256 + 7, np.uint16))
        assert grey.mode == mode
    else:
        grey = picture((120, 120, 120), mode=mode)
    assert (decoded(tmp_path, grey, name).float() - 120).abs().max() < 2


def test_whole_numbers_beyond_16_bits_have_no_range(tmp_path):
    assert decoded(tmp_path / "16", Image.fromarray(np.full((30, 40), 120 * 256, np.int32)), "a.tif").max() == 120
    with pytest.raises(DataError, match="beyond 16 bits"):
        decoded(tmp_path / "32", Image.fromarray(np.full((30, 40), 70_000, np.int32)), "a.tif")


def test_black_and_white(tmp_path):
    assert decoded(tmp_path, Image.new("1", (20, 20), 1), "a.png").min() == 255


def test_transparent_parts_become_white(tmp_path):
    image = decoded(tmp_path, Image.new("RGBA", (20, 20), (255, 0, 0, 0)), "a.png")
    assert image.min() == 255


def test_transparent_palette_colour_becomes_white(tmp_path):
    image = Image.new("P", (20, 20), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert decoded(tmp_path, image, "a.gif", transparency=0).min() == 255


def test_orientation_of_a_photograph_is_honoured(tmp_path):
    image = Image.new("RGB", (32, 32), BLUE)
    image.paste(RED, (0, 0, 32, 16))  # red above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: red comes to the right
    upright = decoded(tmp_path, image, "a.jpg", exif=exif, quality=95).float()
    assert upright[0, :, 12:].mean() > 200
    assert upright[0, :, :4].mean() < 50


def test_shorter_side_is_resized_and_the_centre_kept(tmp_path):
    image = Image.new("RGB", (300, 100), BLUE)
    image.paste(RED, (100, 0, 200, 100))
    square = decoded(tmp_path, image, "a.png", size=32).float()
    assert square.shape == (3, 32, 32)
    assert square[0].min() > 200


def test_large_photograph_is_resized_without_artefacts(tmp_path):
    """A checkerboard finer than a pixel of the result must become grey."""
    board = np.indices((640, 640)).sum(0) % 2 * 255
    image = decoded(tmp_path, Image.fromarray(board.astype(np.uint8)), "a.png", size=32)
    assert (image.float() - 127.5).abs().max() < 4


def corrupt(path: Path, how: str) -> None:
    if how == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif how == "overwritten":
        path.write_bytes(path.read_bytes()[:60] + b"\0" * 200)
    elif how == "text":
        path.write_text("<html>404 Not Found</html>")
    elif how == "float":
        Image.new("F", (8, 8), 0.5).save(path, format="TIFF")
    else:
        path.write_bytes(b"")


BROKEN = {
    "truncated": "truncated",
    "overwritten": "",
    "text": "not an image that Pillow knows",
    "empty": "the file is empty",
    "float": "floating-point pixels",
}


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("how", BROKEN)
def test_broken_image_is_named_or_skipped(folder, how, suffix):
    name = f"pear/zz{suffix}"
    picture().save(folder / name)
    corrupt(folder / name, how)
    text = refusal(str(folder), image_size=16)
    assert f"cannot decode {name!r}: " in text
    assert BROKEN[how] in text
    assert "skip broken images" in text
    data = load_data(str(folder), image_size=16, skip_broken=True)
    assert data.skipped == (name,)
    assert sum(map(len, (data.train, data.holdout, data.test))) == 20


def test_class_of_which_nothing_remains_is_refused(folder):
    for path in (folder / "pear").iterdir():
        corrupt(path, "empty")
    assert "all images of class 'pear' are broken" in refusal(str(folder), skip_broken=True)


def test_folder_that_cannot_be_used(tmp_path, split_folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is empty; needed is a subfolder for each class" in refusal(empty)
    fill(tmp_path / "flat", 2)
    assert "the folder has no class folders" in refusal(tmp_path / "flat")
    fill(tmp_path / "one" / "apple", 4)
    assert "only one class, 'apple'" in refusal(tmp_path / "one")
    fill(tmp_path / "few" / "apple", 4)
    fill(tmp_path / "few" / "pear", 1)
    assert "class 'pear' has only 1 image to cut the test part from" in refusal(tmp_path / "few")
    (split_folder / "train" / "plum").mkdir()
    assert "class folder 'train/plum' holds no images" in refusal(split_folder)
    (split_folder / "train" / "plum").rmdir()
    fill(split_folder / "val" / "plum", 1)
    assert "class 'plum' is in val/ but not in train/" in refusal(split_folder)


def test_half_of_a_split_is_not_taken_for_classes(split_folder):
    (split_folder / "train").rename(split_folder / "test")
    assert "has test/ but no train/" in refusal(split_folder)
    (split_folder / "test").rename(split_folder / "train")
    (split_folder / "val").rename(split_folder.parent / "val")
    assert "has train/ but no test/ or val/" in refusal(split_folder)
    (split_folder.parent / "val").rename(split_folder / "ship")  # now train is a class, as are ships
    fill(split_folder / "train", 9)
    assert load_data(str(split_folder), image_size=8).class_names == ("ship", "train")


def test_folder_that_exceeds_the_memory(folder, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 2_000_000)
    load_data(str(folder), image_size=64)
    text = refusal(str(folder), image_size=512)
    assert "20 images of 512x512 need 16 MB, more than half of the 2 MB of free memory; take a smaller image" in text


def test_without_pillow_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'autoslim[vision]'" in refusal(str(folder))


# ---- torchvision


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_torchvision_set_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    raw = tmp_path / ".cache" / "autoslim-data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        x, y = numbered(count, 10)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(x))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(y.astype(np.uint8)))
        for path in raw.glob("*ubyte"):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    data = load_data("torchvision:FashionMNIST")
    assert [len(data.train), len(data.holdout), len(data.test)] == [30, 10, 20]
    assert data.image_shape == (1, 8, 8)
    assert data.class_names[9] == "Ankle boot"
    assert np.array_equal(data.test.images[:, 0].numpy(), numbered(20)[0])


def test_torchvision_set_that_is_absent_tells_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = refusal("torchvision:CIFAR10")
    root = tmp_path / ".cache" / "autoslim-data"
    assert f"torchvision.datasets.CIFAR10('{root}', train=True, download=True)\"" in text
    assert "split='train', download=True" in refusal("torchvision:SVHN")
    assert "split='trainval', download=True" in refusal("torchvision:OxfordIIITPet")


def test_torchvision_names_that_do_not_work(monkeypatch):
    assert "did you mean 'CIFAR10'?" in refusal("torchvision:CIFAR-10")
    assert "no data set 'xyz'" in refusal("torchvision:xyz")
    assert "EuroSAT has no train and test part" in refusal("torchvision:EuroSAT")
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "needs scipy: pip install scipy; or give the folder" in refusal("torchvision:ImageNet")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "pip install 'autoslim[vision]'" in refusal("torchvision:CIFAR10")


# ---- the user's function


@pytest.fixture
def function(tmp_path):
    """Write a module whose function `make` ends with the code given."""

    def write(code: str) -> str:
        path = tmp_path / "mine.py"
        lines = ["import numpy as np", "import torch", "from PIL import Image", "def make():"]
        path.write_text("\n".join(lines + [f"    {line}" for line in code.splitlines()]))
        return f"{path}:make"

    yield write
    for name in [name for name in sys.modules if name.startswith("mine_")]:
        del sys.modules[name]


def pairs(image: str, label: str = "i % 2") -> str:
    return f"return [({image}, {label}) for i in range(20)], [({image}, {label}) for i in range(6)]"


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        ("np.full((6, 8), i, np.uint8)", (1, 6, 8)),
        ("np.full((6, 8, 1), i, np.uint8)", (1, 6, 8)),
        ("np.full((6, 8, 3), i, np.uint8)", (3, 6, 8)),
        ("np.full((3, 6, 8), i, np.uint8)", (3, 6, 8)),
        ("torch.full((3, 6, 8), i, dtype=torch.uint8)", (3, 6, 8)),
        ("torch.full((3, 6, 3), i, dtype=torch.uint8)", (3, 6, 3)),
        ("torch.full((6, 8), i, dtype=torch.uint8)", (1, 6, 8)),
        ("Image.new('L', (8, 6), i)", (1, 6, 8)),
        ("Image.new('RGB', (8, 6), (i, i, i))", (3, 6, 8)),
        ("Image.new('RGBA', (8, 6), (i, i, i, 255))", (3, 6, 8)),
    ],
)
@pytest.mark.parametrize("label", ["i % 2", "np.int32(i % 2)", "torch.tensor(i % 2)"])
def test_function_that_returns_two_data_sets(function, image, shape, label):
    data = load_data(function(pairs(image, label)))
    assert data.image_shape == shape
    assert data.test.images[:, 0, 0, 0].tolist() == list(range(6))
    assert data.test.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_function_that_returns_a_mapping(function):
    code = "x, y = np.zeros((30, 8, 8, 3), np.uint8), np.arange(30) % 3\n"
    data = load_data(
        function(code + "return dict(x_train=x, y_train=y, x_test=torch.tensor(x), y_test=torch.tensor(y))")
    )
    assert [len(data.train), len(data.holdout), len(data.test)] == [24, 6, 30]


def test_data_set_of_the_user_brings_class_names_and_reports_progress(function):
    code = "class Set(list):\n    classes = ['cat', ('dog', 'hound')]\n"
    code += "make = lambda n: Set((np.zeros((4, 4), np.uint8), i % 2) for i in range(n))\nreturn make(8), make(4)"
    calls = []
    data = load_data(function(code), progress=lambda done, total: calls.append((done, total)))
    assert data.class_names == ("cat", "dog")
    assert calls == [(done, 12) for done in range(1, 13)]


def test_image_size_makes_different_sizes_equal(function):
    source = function(pairs("np.zeros((6 + i, 8), np.uint8)"))
    assert "train item 1 is 7x8 with 1 channel, the first 6x8 with 1 channel; set an image size" in refusal(source)
    assert load_data(source, image_size=5).image_shape == (1, 5, 5)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (pairs("np.zeros((8, 8))"), "train item 0: the image is float64; it must be uint8"),
        (pairs("torch.zeros(3, 8, 8)"), "(leave out ToTensor and Normalize)"),
        (pairs("np.zeros((8, 8, 5), np.uint8)"), "train item 0: the image has shape (8, 8, 5)"),
        (pairs("np.zeros((0, 8), np.uint8)"), "train item 0: the image has shape"),
        (pairs("None"), "train item 0: the image is object"),
        (pairs("np.zeros((8, 8) if i else (8, 8, 3), np.uint8)"), "give all the same channels"),
        (pairs("np.zeros((8, 8), np.uint8)", "i / 2"), "train item 0 has the label 0.0"),
        (pairs("np.zeros((8, 8), np.uint8)", "torch.zeros(9, 9)"), "train item 0 has the label tensor([["),
        (pairs("np.zeros((8, 8), np.uint8)", "-i"), "label -19 is negative"),
        (pairs("np.zeros((8, 8), np.uint8)", "0"), "only one class"),
        ("return [1, 2], [3]", "train item 0 is int; needed is a pair (image, label)"),
        ("return [], []", "its train part is empty"),
        ("return iter([]), []", "its train part is list_iterator, without index or length"),
        ("return {'x_train': 1}", "lacks y_train, x_test, y_test (it has: x_train)"),
        ("return 5", "gave int; needed is (train, test)"),
        ("return None", "gave NoneType"),
        ("return [], [], []", "gave tuple; needed is (train, test)"),
        (
            pairs("torch.zeros(3, 8, 8, dtype=torch.uint8, device='meta')"),
            "train item 0: the image, a tensor of torch.uint8",
        ),
        (
            pairs("torch.zeros(3, 8, 8, dtype=torch.bfloat16)"),
            "a tensor of torch.bfloat16 on cpu, cannot become an array",
        ),
        (pairs("np.zeros((8, 8), np.uint8)", "i * 10**20"), "train item 1 has a label of more than 64 bits; number"),
        (pairs("np.zeros((8, 8), np.uint8)", "torch.tensor(1, device='meta')"), "train item 0 has the label tensor("),
        (
            "class Set(list):\n    def __len__(self): raise TypeError('no length')\nreturn Set([1]), []",
            "the length of its train part cannot be had: TypeError: no length (",
        ),
        (
            "class Set(list):\n    def __len__(self): return -1\nreturn [1], Set()",
            "the length of its test part cannot be had: ValueError: __len__() should return >= 0",
        ),
        (
            "class Set(list): classes = ['cat', ()]\nreturn Set(), []",
            "classes[1] of its train part is empty; needed is the name of each class",
        ),
        (
            "return dict(x_train=[[1], [1, 2]], y_train=[0], x_test=[], y_test=[])",
            "x_train cannot become an array (setting an array element with a sequence.",
        ),
        (
            "return dict(x_train=torch.zeros(9, 8, 8, device='meta'), y_train=[0], x_test=[], y_test=[])",
            "x_train cannot become an array (Cannot copy out of meta tensor",
        ),
        (
            "x = torch.zeros(9, 8, 8, requires_grad=True)\nreturn dict(x_train=x, y_train=[0], x_test=x, y_test=[0])",
            "x_train is float32; images must be uint8",
        ),
        ("raise SystemExit('no images today')", "the function failed: SystemExit: no images today ("),
        ("1 / 0", "the function failed: ZeroDivisionError: division by zero ("),
        (
            "class Set(list):\n    def __getitem__(self, i): raise OSError('disk\\ngone')\nreturn Set([1]), []",
            "train item 0 failed: OSError: disk gone (",
        ),
    ],
)
def test_function_that_cannot_be_used(function, code, reason):
    text = refusal(function(code))
    assert reason in text
    if "failed" in reason:
        assert "mine.py, line " in text


@pytest.mark.parametrize("told", ["pass", "targets = [i * 10**20 for i in range(9)]"])
def test_labels_of_more_than_64_bits_are_refused_when_streamed(function, told):
    code = f"class Set(list):\n    {told}\n"
    code += "found = Set((np.zeros((8, 8), np.uint8), i * 10**20) for i in range(9))\nreturn found, found"
    text = refusal(function(code), memory_gb=0.0)
    assert "train item 1 has a label of more than 64 bits" in text


@pytest.mark.parametrize(
    "code", ["def make(root, size=3): return 1", "class make:\n    def __init__(self, root): pass"]
)
def test_function_that_needs_arguments_is_named_with_its_file(tmp_path, code):
    (tmp_path / "needy.py").write_text(code)
    text = refusal(f"{tmp_path}/needy.py:make")
    assert "called without arguments, but it needs some: missing a required argument: 'root'" in text
    assert f"needy.py, line {1 + code.startswith('class')}); give them defaults" in text


DECORATED = """
import functools
import numpy as np
def given(function):
    return functools.wraps(function)(lambda: function(9))
@given
def make(count):
    return [[(np.zeros((8, 8), np.uint8), i % 2) for i in range(count)]] * 2
"""


def test_function_whose_decorator_gives_the_arguments(tmp_path):
    (tmp_path / "decorated.py").write_text(DECORATED)
    assert len(load_data(f"{tmp_path}/decorated.py:make").test) == 9


def test_a_function_of_a_package_that_needs_arguments_names_no_file_of_ours():
    for source in ("torch:ones", "numpy:zeros"):
        assert "datasets.py" not in refusal(source)


def test_unknown_function_is_a_mistake_of_the_configuration(function):
    with pytest.raises(ConfigError, match="did you mean 'make'"):
        load_data(function("return 1") + "r")


# ---- batches


def square_set(count: int = 64, shape: tuple[int, int, int] = (1, 16, 16)) -> ImageSet:
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(count))


def collected(batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def pixels(data: ImageSet, augment: str, **options) -> torch.Tensor:
    """Augmented images in the range of a uint8 again."""
    channels = data.images.shape[1]
    batches = Batches(data, 16, mean=[0.0] * channels, std=[1.0] * channels, augment=augment, **options)
    return collected(batches)[0] * 255


def test_batches_are_normalised(fashion):
    images, _ = collected(Batches(fashion.train, 256, mean=fashion.mean, std=fashion.std))
    assert images.dtype == torch.float32
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02


def test_each_channel_has_its_own_statistics():
    data = square_set(shape=(3, 8, 8))
    batch, _ = next(iter(Batches(data, 64, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])))
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    torch.testing.assert_close(batch, (data.images / 255 - mean) / std)


def test_batches_without_shuffle_keep_the_order_and_the_data():
    data = square_set(50)
    before = data.images.clone()
    batches = Batches(data, 16, **PLAIN)
    sizes = [len(images) for images, _ in batches]
    assert sizes == [16, 16, 16, 2]
    assert len(batches) == 4
    assert collected(batches)[1].tolist() == list(range(50))
    collected(Batches(data, 16, **PLAIN, augment="flip,crop,resized-crop,jitter"))
    assert torch.equal(data.images, before)


def test_on_a_gpu_a_batch_is_taken_before_the_one_in_front_of_it_is_used(monkeypatch):
    data = ImageSet(torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8), torch.arange(30) % 3)
    options = {"mean": [0.5], "std": [0.2], "augment": "flip,crop", "shuffle": True}
    plain, ahead = Batches(data, 8, **options), Batches(data, 8, **options)
    taken, send = [], ahead._sent
    monkeypatch.setattr(ahead, "_is_ahead", True)  # as where the device is one
    monkeypatch.setattr(ahead, "_sent", lambda *batch: (taken.append(1), send(*batch))[1])
    used = 0
    for (images, labels), (expected, numbers) in zip(ahead, plain, strict=True):
        used += 1
        assert len(taken) == min(4, used + 1)
        assert torch.equal(images, expected)
        assert torch.equal(labels, numbers)
    assert used == 4


def test_drop_last_leaves_only_full_batches():
    batches = Batches(square_set(50), 16, **PLAIN, drop_last=True)
    assert [len(images) for images, _ in batches] == [16, 16, 16]
    assert len(batches) == 3
    assert len(Batches(square_set(48), 16, **PLAIN, drop_last=True)) == 3


def test_shuffle_visits_each_image_once_with_its_label():
    data = square_set()
    images, labels = collected(Batches(data, 10, **PLAIN, shuffle=True))
    assert labels.tolist() != list(range(64))
    assert sorted(labels.tolist()) == list(range(64))
    assert torch.equal((images * 255).round().to(torch.uint8), data.images[labels])


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "resized-crop", "jitter", "lighting", "crop,flip,jitter"])
def test_seed_and_epoch_decide_everything(augment):
    data = square_set(shape=(3, 16, 16))

    def epoch(seed: int, number: int) -> torch.Tensor:
        batches = Batches(data, 16, mean=[0.0] * 3, std=[1.0] * 3, augment=augment, shuffle=True, seed=seed)
        batches.set_epoch(number)
        next(iter(batches))  # an interrupted epoch leaves no trace
        return collected(batches)[0]

    reference = epoch(1, 5)
    assert torch.equal(reference, epoch(1, 5))
    for seed, number in ((1, 6), (2, 5), (5, 1), (2, 4)):
        assert not torch.equal(reference, epoch(seed, number))


def test_augmentation_changes_from_epoch_to_epoch_without_shuffle():
    batches = Batches(square_set(), 16, **PLAIN, augment="crop")
    first = collected(batches)[0]
    assert torch.equal(first, collected(batches)[0])
    batches.set_epoch(1)
    assert not torch.equal(first, collected(batches)[0])


def test_global_generators_are_neither_used_nor_moved(npz):
    def everything() -> torch.Tensor:
        data = load_data(source, seed=4)
        augment = "flip,crop,resized-crop,jitter"
        return collected(Batches(data.train, 7, mean=data.mean, std=data.std, augment=augment, shuffle=True))[0]

    source = npz()
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = everything()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    torch.manual_seed(99)
    assert torch.equal(first, everything())


def test_flip_mirrors_about_half_of_the_images():
    data = square_set(1000)
    flipped = pixels(data, "flip").round()
    is_mirrored = (flipped == data.images.flip(-1)).all((1, 2, 3))
    is_same = (flipped == data.images).all((1, 2, 3))
    assert (is_mirrored ^ is_same).all()
    assert 400 < is_mirrored.sum() < 600


def test_crop_shifts_by_up_to_an_eighth():
    images = torch.zeros(500, 1, 16, 24, dtype=torch.uint8)
    images[:, :, 8, 12] = 200
    cropped = pixels(ImageSet(images, torch.zeros(500, dtype=torch.int64)), "crop").round()
    assert (cropped.amax((1, 2, 3)) == 200).all()
    assert (cropped.sum((1, 2, 3)) == 200).all()
    _, _, y, x = cropped.nonzero().T
    assert set(y.tolist()) == set(range(6, 11))
    assert set(x.tolist()) == set(range(9, 16))


def test_resized_crop_enlarges_a_part():
    """On a picture whose pixels tell their place, the spread of a crop tells its size."""
    size = 32
    ramp = torch.arange(size, dtype=torch.uint8) * 4
    images = torch.stack([ramp.expand(size, size), ramp.expand(size, size).T])[None].repeat(400, 1, 1, 1)
    images = torch.cat([images, images[:, :1]], 1)
    cropped = pixels(ImageSet(images, torch.zeros(400, dtype=torch.int64)), "resized-crop") / 4
    width = (cropped[:, 0, :, -2] - cropped[:, 0, :, 1]).mean(1) * size / (size - 3) / size
    height = (cropped[:, 1, -2, :] - cropped[:, 1, 1, :]).mean(1) * size / (size - 3) / size
    assert 0.23 < (width * height).min() < 0.35
    assert 0.85 < (width * height).max() < 1.02
    assert (width / height).min() > 0.74
    assert (width / height).max() < 1.35
    assert cropped.min() >= 0
    assert cropped.max() <= size - 1 + 1e-3
    assert cropped[:, 0].mean((1, 2)).std() > 1  # not always the centre


def test_resized_crop_brings_in_no_dark_border():
    white = ImageSet(torch.full((100, 3, 16, 16), 255, dtype=torch.uint8), torch.arange(100))
    assert pixels(white, "resized-crop").min() > 254.9


def test_jitter_varies_images_within_the_range_of_pixels():
    data = square_set(200, (3, 8, 8))
    jittered = pixels(data, "jitter")
    assert jittered.min() >= 0
    assert jittered.max() <= 255.01
    ratio = jittered.mean((1, 2, 3)) / data.images.float().mean((1, 2, 3))
    assert 0.55 < ratio.min() < 0.75
    assert 1.1 < ratio.max() < 1.45
    grey = pixels(square_set(20), "jitter")
    assert grey.shape == (20, 1, 16, 16)


def test_jitter_keeps_grey_pictures_grey():
    images = square_set(20).images.expand(20, 3, 16, 16)
    jittered = pixels(ImageSet(images, torch.arange(20)), "jitter")
    torch.testing.assert_close(jittered[:, 0], jittered[:, 2], atol=1e-2, rtol=0)


def test_channels_last():
    data = square_set(shape=(3, 16, 16))
    for augment in ("none", "flip,crop", "resized-crop,jitter"):
        options = {"mean": [0.0] * 3, "std": [1.0] * 3, "augment": augment}
        plain, _ = next(iter(Batches(data, 16, **options)))
        last, _ = next(iter(Batches(data, 16, **options, channels_last=True)))
        assert plain.is_contiguous()
        assert last.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(plain, last, rtol=0, atol=0)


def test_batches_go_to_the_device():
    images, labels = next(iter(Batches(square_set(), 16, **PLAIN, augment="flip,crop", device="cpu")))
    assert images.device == labels.device == torch.device("cpu")


def test_augmentation_is_fast(fashion):
    batches = Batches(fashion.train, 128, mean=fashion.mean, std=fashion.std, augment="flip,crop", shuffle=True)
    next(iter(batches))
    start = time.process_time()  # what else the machine does is not its time
    for _ in batches:
        pass
    assert time.process_time() - start < 1  # about 0.02 s


@pytest.mark.parametrize("augment", ["none", "flip", "flip,crop", "crop, flip", "resized-crop,flip,jitter"])
def test_augmentations_that_exist(augment):
    assert ",".join(map(str, parse_augment(augment))) == augment.replace(" ", "").replace("none", "")


@pytest.mark.parametrize(
    ("augment", "hint"),
    [
        ("flp", "did you mean 'flip'?"),
        ("flip,crp", "did you mean 'crop'?"),
        ("flip,resized_crop", "did you mean 'resized-crop'?"),
        ("auto", "known: auto-augment, crop, erase, flip, jitter, lighting, none, rand-augment, resized-crop, "),
        ("", "known: auto-augment, crop"),
        ("none,flip", "'none' does not go with others"),
    ],
)
def test_unknown_augmentation(augment, hint):
    with pytest.raises(ConfigError) as caught:
        Batches(square_set(), 16, **PLAIN, augment=augment)
    assert hint in str(caught.value)


def test_batches_that_cannot_be_made():
    with pytest.raises(DataError, match="at least 1 image, got 0"):
        Batches(square_set(), 0, **PLAIN)
    with pytest.raises(DataError, match="64 images do not fill one batch of 128; take a smaller batch size"):
        Batches(square_set(), 128, **PLAIN, drop_last=True)
    with pytest.raises(DataError, match="images of 1 channels need as many means and stds, got 3 and 3"):
        Batches(square_set(), 16, mean=[0.0] * 3, std=[1.0] * 3)


def test_image_set_refuses_other_tensors():
    with pytest.raises(DataError, match=r"images must be uint8 of shape \(N, C, H, W\)"):
        ImageSet(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match=r"labels must be int64 of shape \(4,\)"):
        ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


def test_subset_takes_the_images_asked_for():
    data = square_set()
    for indices in ([5, 3], (5, 3), torch.tensor([5, 3]), range(5, 2, -2)):
        part = data.subset(indices)
        assert part.labels.tolist() == [5, 3]
        assert torch.equal(part.images, data.images[[5, 3]])
    assert len(data.subset([])) == 0


def test_embedded_set_needs_neither_pillow_nor_torchvision():
    code = (
        "import sys; sys.modules['PIL'] = sys.modules['torchvision'] = None\n"
        "from autoslim.data import load_data; print(len(load_data('fashion-mnist-mini').test))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1000\n"


def test_lighting_shifts_the_colours_of_a_whole_image_by_little():
    images = torch.full((200, 3, 4, 4), 128, dtype=torch.uint8)
    shifted = pixels(ImageSet(images, torch.zeros(200, dtype=torch.long)), "lighting") * 1.0
    assert torch.allclose(shifted.amax((2, 3)), shifted.amin((2, 3)))  # the same for every pixel
    shift = shifted[:, :, 0, 0] - 128
    assert shift.abs().mean() < 10
    # the first axis is nearly grey: the three colours mostly go together
    assert torch.corrcoef(shift.T).min() > 0.8


def test_the_wide_crop_sees_smaller_parts():
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(100, 1, 32, 32).contiguous()
    data = ImageSet(ramp, torch.zeros(100, dtype=torch.long))
    usual, wide = (pixels(data, name) for name in ("resized-crop", "wide-resized-crop"))
    usual, wide = (part.amax((1, 2, 3)) - part.amin((1, 2, 3)) for part in (usual, wide))
    assert wide.mean() < 0.95 * usual.mean()
