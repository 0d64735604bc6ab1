"""Image folders as they are found in the wild: every oddity is a refusal in one line, or a counted skip."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from autoslim.data import ImageSet, load_data
from autoslim.data.folders import read_folder
from autoslim.errors import DataError

links = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


def fill(folder: Path, count: int, grey: int = 100) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("L", (4, 4), grey + index).save(folder / f"{index:03}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of six images, in one folder of class folders."""
    fill(tmp_path / "set" / "apple", 6)
    fill(tmp_path / "set" / "pear", 6, 200)
    return tmp_path / "set"


@pytest.fixture
def parted(tmp_path: Path) -> Path:
    """train/ with two classes of six images, val/ with two of two."""
    for part, count in (("train", 6), ("val", 2)):
        fill(tmp_path / "parted" / part / "apple", count)
        fill(tmp_path / "parted" / part / "pear", count, 200)
    return tmp_path / "parted"


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load_data(folder, image_size=4, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loaded(folder: Path, **options: object):
    return load_data(folder, image_size=4, **options)


def count(data) -> int:
    return len(data.train) + len(data.holdout) + len(data.test)


# ---- class folders


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("Apple", "differ only in upper and lower case"),
        ("APPLE", "differ only in upper and lower case"),
        ("apple ", "differ only in how they are written"),
    ],
)
def test_one_class_under_two_names_is_refused(folder, name, how):
    fill(folder / name, 2)
    if len(list(folder.iterdir())) == 2:
        pytest.skip("this file system takes both names for one")
    text = refusal(folder)
    assert how in text
    assert repr(name) in text
    assert "'apple'" in text
    assert "merge them or rename one" in text


def test_one_class_in_two_unicode_forms_is_refused(folder):
    for form in ("NFC", "NFD"):
        fill(folder / unicodedata.normalize(form, "pâté"), 2)
    if len(list(folder.iterdir())) == 3:
        pytest.skip("this file system takes both names for one")
    assert "differ only in how they are written" in refusal(folder)


@links
def test_one_class_under_two_names_by_a_link_is_refused(folder):
    (folder / "fruit").symlink_to(folder / "apple")
    assert "'fruit' is a folder of class folder 'apple' too; an image can have one class only" in refusal(folder)


@links
def test_folder_of_a_class_linked_into_another_is_refused(folder):
    (folder / "apple" / "more").symlink_to(folder / "pear")
    assert "is a folder of class folder 'apple' too" in refusal(folder)


@links
@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_class_folder_that_leads_up_is_refused(folder, target):
    (folder / "loop").symlink_to(target)
    assert "class folder 'loop' is a link to a folder that it lies in; remove it" in refusal(folder)


@links
def test_links_in_a_circle_are_not_followed_and_counted(folder):
    (folder / "apple" / "self").symlink_to(".")
    (folder / "apple" / "up").symlink_to("..")
    fill(folder / "pear" / "deep", 1)
    (folder / "pear" / "deep" / "back").symlink_to("..")
    (folder / "ring").symlink_to("ring")
    data = loaded(folder)
    assert count(data) == 13
    assert any("not followed: 3, the first: apple/" in remark for remark in data.remarks)


@links
def test_linked_images_and_folders_are_read(folder, tmp_path):
    fill(tmp_path / "elsewhere", 3)
    (folder / "apple" / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "pear" / "linked.png").symlink_to(tmp_path / "elsewhere" / "000.png")
    (folder / "plum").symlink_to(tmp_path / "plums")
    fill(tmp_path / "plums", 4)
    data = loaded(folder)
    assert count(data) == 6 + 3 + 6 + 1 + 4
    assert data.class_names == ("apple", "pear", "plum")


@links
def test_train_and_val_that_are_one_folder_are_refused(parted):
    for path in sorted((parted / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (parted / "val").rmdir()
    (parted / "val").symlink_to("train")
    assert "train/ and val/ are the same folder" in refusal(parted)


def renamed(parted: Path, train: str, test: str) -> Path:
    for old, new in (("train", train), ("val", test)):
        (parted / old).rename(parted / f"{new}-")  # by way of a third name: some file systems know no letter case
        (parted / f"{new}-").rename(parted / new)
    return parted


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training", "Training"])
@pytest.mark.parametrize("test", ["Test", "testing", "val", "VAL", "Valid", "Validation", "validate", "dev", "Dev"])
def test_parts_by_their_usual_names_in_any_letter_case(parted, train, test):
    data = loaded(renamed(parted, train, test))
    assert data.class_names == ("apple", "pear")
    assert [len(data.train) + len(data.holdout), len(data.test)] == [12, 4]
    assert all(name.startswith(f"{test}/") for name in data.test_names)
    (parted / test / "pear").rename(parted / test / "plum")
    assert f"class 'plum' is in {test}/ but not in {train}/" in refusal(parted)


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (("train", "val", "test"), "test"),
        (("train", "val", "Test", "testing"), "val"),  # two that are named exactly so go before all others
        (("Train", "Val", "Testing", "Dev"), "Testing"),
        (("training", "dev", "validate", "extra"), "validate"),
    ],
)
def test_which_of_several_test_folders_is_used(tmp_path, names, used):
    for name in names:
        for label in ("a", "b"):
            fill(tmp_path / name / label, 4)
    assert {name.split("/")[0] for name in loaded(tmp_path).test_names} == {used}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ("train", "training", "Test"),
            "has train/ and training/, which mean the same images; merge them or rename one",
        ),
        (("Train", "Test", "TEST"), "has TEST/ and Test/, which mean the same images"),
        (("Train",), "has Train/ but no test/ or val/"),
        (("Testing", "dev"), "has Testing/ but no train/"),
        (("train", "eval"), "has train/ but no test/ or val/, and all its folders hold a and b; rename the one meant"),
        (("Val", "learn"), "has Val/ but no train/, and all its folders hold a and b; rename the one meant"),
    ],
)
def test_parts_that_would_be_a_guess_are_refused(tmp_path, names, reason):
    for name in names:
        for label in ("a", "b"):
            fill(tmp_path / name / label, 4)
    if len(list(tmp_path.iterdir())) < len(names):
        pytest.skip("this file system takes two names for one")
    assert reason in refusal(tmp_path)


def test_images_without_classes_in_parts_are_refused(tmp_path):
    for name in ("Train", "Dev", "Ship"):
        fill(tmp_path / name, 4)
    assert "Train/ and Dev/ are training and test images by their names, but Train/ has no class folders" in refusal(
        tmp_path
    )
    (tmp_path / "Dev").rename(tmp_path / "Plane")
    assert loaded(tmp_path).class_names == ("Plane", "Ship", "Train")


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_class_may_be_written_in_another_unicode_form_in_val(parted, forms):
    for part, form in zip(("train", "val"), forms, strict=True):
        (parted / part / "pear").rename(parted / part / unicodedata.normalize(form, "pâté"))
    data = loaded(parted)
    assert data.class_names[1] in (unicodedata.normalize(form, "pâté") for form in forms)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    fill(parted / "val" / "pa\u0302te\u0301", 1)
    fill(parted / "val" / "p\u00e2t\u00e9", 1)
    if len(list((parted / "val").iterdir())) == 3:
        assert "differ only in how they are written" in refusal(parted)


def test_class_only_in_val_suggests_the_one_meant(parted):
    (parted / "val" / "pear").rename(parted / "val" / "Pear")
    assert "class 'Pear' is in val/ but not in train/; did you mean 'pear'?" in refusal(parted)


@pytest.mark.parametrize("is_empty", [True, False])
def test_class_missing_in_val_is_told(parted, is_empty):
    for path in (parted / "val" / "pear").iterdir():
        path.unlink()
    if not is_empty:
        (parted / "val" / "pear").rmdir()
    data = loaded(parted)
    assert data.test.labels.tolist() == [0, 0]
    assert data.num_classes == 2
    assert data.remarks == ("classes without a test image, which no accuracy tells of: 1 (pear)",)


def test_val_without_any_image_is_refused(parted):
    for path in (parted / "val").rglob("*.png"):
        path.unlink()
    assert "val/ holds no images" in refusal(parted)


# ---- files


def test_files_that_are_no_images_are_counted(folder):
    for name in ("notes.txt", "Thumbs.db", "labels.json", "more.json", "README"):
        (folder / "apple" / name).write_text("x")
    (folder / "apple" / ".DS_Store").write_text("x")
    Image.new("L", (4, 4)).save(folder / "stray.png")
    data = loaded(folder)
    assert count(data) == 12
    assert data.remarks[0].startswith("files that are no images by their names, left out: 5 (.json 2, ")
    assert "no suffix 1" in data.remarks[0]
    assert data.remarks[1] == "images beside the class folders, left out: 1, the first: stray.png"


def test_clean_folder_has_no_remarks(folder, parted):
    assert loaded(folder).remarks == loaded(parted).remarks == ()


def broken_file(path: Path, how: str) -> str:
    """Put something that is no image there; the reason that is to be given."""
    if how == "empty":
        path.write_bytes(b"")
        return "the file is empty"
    if how == "dangling":
        path.symlink_to("nowhere.png")
        return "the link leads nowhere"
    if how == "ring":
        path.symlink_to(path.name)
        return "the link leads nowhere"
    if how == "pipe":
        os.mkfifo(path)
        return "not a regular file"
    Image.effect_noise((64, 64), 99).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    return "truncated"


@links
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("how", ["empty", "dangling", "ring", "pipe", "truncated"])
def test_files_that_cannot_be_decoded(folder, how, streams, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    reason = broken_file(folder / "pear" / "zz.png", how)
    options = {"memory_gb": 0.0} if streams else {}
    text = refusal(folder, **options)
    assert "cannot decode 'pear/zz.png': " in text
    assert reason in text
    assert "skip broken images: --skip-broken" in text
    for _ in range(2):  # the second time from what was found the first time
        data = loaded(folder, skip_broken=True, **options)
        assert data.skipped == ("pear/zz.png",)
        assert count(data) == 12
    assert reason in refusal(folder, **options)


@pytest.mark.parametrize("streams", [False, True])
def test_all_images_of_a_class_broken(folder, streams, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (folder / "pear").iterdir():
        path.write_bytes(b"no image")
    options = {"memory_gb": 0.0} if streams else {}
    assert "all images of class 'pear' are broken" in refusal(folder, skip_broken=True, **options)
    for path in (folder / "apple").iterdir():
        path.write_bytes(b"no image")
    assert "all of its 12 images are broken; the first, 'apple/000.png': not an image" in refusal(
        folder, skip_broken=True, **options
    )


@pytest.mark.skipif(sys.platform != "linux", reason="others insist on Unicode")
def test_file_names_in_any_bytes(folder):
    Image.new("L", (4, 4)).save(os.fsdecode(os.fsencode(folder / "apple") + b"/\xff\xfe.png"))
    data = loaded(folder)
    assert count(data) == 13
    assert data.record()["images"]["test"] == len(data.test)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_asked_for(folder, channels):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(folder / "apple" / "red.png")
    data = load_data(folder, image_size=4, channels=channels, holdout=2)
    assert data.image_shape == (channels, 4, 4)
    every = torch.cat([part.images for part in (data.train, data.holdout, data.test)])
    red = next(image for image in every if image.float().std() > 50 or image[0, 0, 0] == 76)
    assert red[:, 0, 0].tolist() == ([255, 0, 0] if channels == 3 else [76])  # its luminance


def test_held_out_and_test_images_are_cropped_around_the_centre(tmp_path):
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            image = Image.new("L", (32, 32), 255)
            image.paste(0, (4, 4, 28, 28))  # black inside a white border of an eighth
            for index in range(4):
                image.save(tmp_path / part / name / f"{index}.png")
    data = load_data(tmp_path, image_size=24, center_crop=0.75)
    assert data.train.images.max() == 255
    assert data.holdout.images.max() == data.test.images.max() == 0
    whole = load_data(tmp_path, image_size=24)
    assert whole.test.images.max() == 255
    with pytest.raises(DataError, match="center_crop must be above 0 and at most 1, got 0"):
        load_data(tmp_path, center_crop=0)


# ---- many files


@links
def test_many_files_are_found_in_seconds(tmp_path):
    for name in ("a", "b", "c", "d"):
        fill(tmp_path / "set" / name, 1)
        for index in range(4_999):  # hard links cost no space
            os.link(tmp_path / "set" / name / "000.png", tmp_path / "set" / name / f"l{index}.png")
    start = time.process_time()
    found = read_folder(tmp_path / "set")
    seconds = time.process_time() - start
    assert len(found.train) == 20_000
    assert found.train.labels.bincount().tolist() == [5_000] * 4
    assert seconds < 5  # 0.1 s (100,000: see docs/data.md); the bound is wide for a busy machine


def test_which_images_were_held_out_is_recorded(folder, parted):
    data = loaded(folder, holdout=4, seed=3)
    record = data.record()
    assert record["images"] == {"train": 6, "holdout": 4, "test": 2}
    names = [name for name, _ in record["holdout"]]
    assert len(set(names)) == 4
    for (name, label), image in zip(record["holdout"], data.holdout.images, strict=True):
        assert name.split("/")[0] == label
        with Image.open(folder / name) as original:
            assert original.getpixel((0, 0)) == image[0, 0, 0]
    assert set(names) | set(data.train_names) | set(data.test_names) == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*.png")
    }
    assert loaded(folder, holdout=4, seed=3).record() == record
    assert loaded(folder, holdout=4, seed=4).record()["holdout"] != record["holdout"]
    assert all(name.startswith("train/") for name in loaded(parted).holdout_names)
    (folder / "pear" / "005.png").unlink()
    assert loaded(folder, holdout=4, seed=3).record()["digest"] != record["digest"]


def test_folder_is_decoded_once_into_memory(folder):
    assert isinstance(loaded(folder).train, ImageSet)
