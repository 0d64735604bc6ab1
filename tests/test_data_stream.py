"""Images that are read when they are wanted: the same images as in memory, whoever reads them, and in whichever run."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from autoslim import Supernet, SupernetRecipe, trace
from autoslim.data import Batches, ImageSet, StreamedSet, load_data, usual_workers
from autoslim.errors import ConfigError, DataError
from autoslim.train import Training, sandwich_step

EVERY = "wide-resized-crop,crop,flip,jitter,lighting,rand-augment,trivial-augment,auto-augment,erase:0.9"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was checked before is kept below the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 photographs of noise in two classes, 24 to 40 pixels."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(40):
        path = root / ("cat" if index % 2 else "dog") / f"{index:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        small = rng.integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(small).resize((24 + index % 17, 24 + index % 13)).save(path)
    return root


def streamed(folder: Path, **options: object):
    data = load_data(folder, image_size=16, memory_gb=0.0, **options)
    assert all(isinstance(part, StreamedSet) for part in (data.train, data.holdout, data.test))
    return data


def batches(data, part: str = "train", **options: object) -> Batches:
    return Batches(getattr(data, part), 8, mean=data.mean, std=data.std, **options)


def collected(batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    batches.close()
    return torch.cat(images), torch.cat(labels)


# ---- as in memory


@pytest.mark.parametrize("part", ["train", "holdout", "test"])
def test_streamed_images_are_those_in_memory_to_the_bit(folder, part):
    options = {"image_size": 16, "center_crop": 0.875, "seed": 1}
    kept = load_data(folder, **options)
    lazily = load_data(folder, **options, memory_gb=0.0)
    assert isinstance(kept.train, ImageSet)
    assert isinstance(lazily.train, StreamedSet)
    assert (lazily.mean, lazily.std) == (kept.mean, kept.std)  # so few images are all looked at
    for here, there in zip(collected(batches(kept, part)), collected(batches(lazily, part)), strict=True):
        assert torch.equal(here, there)
    assert kept.record()["holdout"] == lazily.record()["holdout"]


def test_a_set_is_streamed_when_it_exceeds_the_memory_given(folder):
    size = 40 * 3 * 16 * 16 / 1e9
    assert isinstance(load_data(folder, image_size=16, memory_gb=1.01 * size).train, ImageSet)
    assert isinstance(load_data(folder, image_size=16, memory_gb=0.99 * size).train, StreamedSet)


def test_subset_reads_nothing_and_keeps_the_order(folder):
    train = streamed(folder).train
    part = train.subset([5, 3])
    assert part.labels.tolist() == train.labels[[5, 3]].tolist()
    assert train.subset(train.labels == 1).labels.unique().tolist() == [1]
    assert part.image_shape == (3, 16, 16)
    assert "2 images" in repr(part)


# ---- whoever reads


@pytest.mark.parametrize("augment", ["none", EVERY])
def test_the_number_of_workers_changes_nothing(folder, augment):
    data = streamed(folder)
    torch.manual_seed(0)
    random.seed(0)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    reference = None
    for workers, prefetch in ((0, 2), (1, 1), (3, 2)):
        found = batches(
            data, augment=augment, shuffle=True, workers=workers, prefetch=prefetch, mix="mixup", num_classes=2
        )
        epochs = []
        for epoch in (0, 4):
            found.set_epoch(epoch)
            epochs.append(tuple(torch.cat(each) for each in zip(*found, strict=True)))
        found.close()
        reference = reference or epochs
        for (images, labels), (other_images, other_labels) in zip(epochs, reference, strict=True):
            assert torch.equal(images, other_images)
            assert torch.equal(labels, other_labels)
    assert not torch.equal(reference[0][0], reference[1][0])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]


def test_an_epoch_that_was_left_early_leaves_no_trace(folder):
    found = batches(streamed(folder), augment="resized-crop,flip", shuffle=True, workers=2)
    first = torch.cat([images for images, _ in found])
    next(iter(found))
    found.set_epoch(1)
    next(iter(found))
    found.set_epoch(0)
    assert torch.equal(first, torch.cat([images for images, _ in found]))
    found.close()


@pytest.mark.parametrize("augment", ["flip", "crop", "resized-crop", "jitter", "lighting", "rand-augment", "erase:0.9"])
def test_seed_epoch_and_number_decide_an_image(folder, augment):
    data = streamed(folder)

    def epoch(seed: int, number: int, part: StreamedSet) -> torch.Tensor:
        found = Batches(part, 8, mean=data.mean, std=data.std, augment=augment, seed=seed)
        found.set_epoch(number)
        return collected(found)[0]

    reference = epoch(1, 5, data.train)
    assert torch.equal(reference, epoch(1, 5, data.train))
    assert not torch.equal(reference, epoch(1, 6, data.train))
    assert not torch.equal(reference, epoch(2, 5, data.train))
    assert torch.equal(reference[:9], epoch(1, 5, data.train.subset(range(9))))  # no neighbour matters


def test_shuffle_visits_each_image_once(folder):
    data = streamed(folder)
    images, labels = collected(batches(data, shuffle=True))
    plain, plain_labels = collected(batches(data))
    assert labels.tolist() != plain_labels.tolist()
    key = [(image.double().sum().item(), int(label)) for image, label in zip(images, labels, strict=True)]
    assert sorted(key) == sorted((i.double().sum().item(), int(n)) for i, n in zip(plain, plain_labels, strict=True))


def test_a_resumed_training_repeats_an_uninterrupted_one(folder):
    data = streamed(folder)

    def training() -> tuple[Training, Batches, object]:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        )
        recipe = SupernetRecipe(epochs=3, batch_size=8, num_random=1)
        found = batches(data, augment=EVERY, mix="mixup,cutmix", num_classes=2, shuffle=True, drop_last=True)
        supernet = Supernet(net, trace(net, torch.zeros(1, 3, 16, 16)))
        return Training(supernet, recipe, len(found)), found, sandwich_step(supernet, recipe)

    whole, found, step = training()
    for _ in range(3):
        whole.run_epoch(found, step)
    first, found, step = training()
    first.run_epoch(found, step)
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    second, found, step = training()
    second.load_state(saved, 1)
    for _ in range(2):
        second.run_epoch(found, step)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name


# ---- what is checked, and when


def test_the_check_of_all_images_is_kept_until_a_file_changes(folder, home, monkeypatch):
    from autoslim.data import reading

    calls = []
    load_data(folder, image_size=16, memory_gb=0.0, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (40, 40)
    kept = list((home / ".cache" / "autoslim-data" / "checked").glob("*.json"))
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr(reading, "make_loader", None)  # nothing is read again
        streamed(folder)
    kept[0].write_text("damaged")
    streamed(folder)
    path = folder / "cat" / "01.jpg"
    os.utime(path, (1, 1))
    streamed(folder)
    assert len(list((home / ".cache" / "autoslim-data" / "checked").glob("*.json"))) == 2


def test_a_home_that_cannot_be_written_costs_only_time(folder, home):
    home.parent.mkdir(exist_ok=True)
    home.write_text("no directory")
    assert len(streamed(folder).train) == 26


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanished_is_named_in_one_line(tmp_path, workers):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(9):
            Image.new("L", (20, 20), index).save(tmp_path / name / f"{index}.png")
    data = streamed(tmp_path)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        collected(batches(data, shuffle=True, workers=workers))
    assert "the file is empty; it could be read before: was it changed?" in str(caught.value)
    assert "\n" not in str(caught.value)


SUDDEN_END = """
import os
import numpy as np
main = os.getpid()
class Set:
    targets = [0, 1] * 10
    def __len__(self): return 20
    def __getitem__(self, index):
        if index == 13 and os.getpid() != main: os.kill(os.getpid(), 9)
        return np.full((8, 8), index, np.uint8), index % 2
def make(): return Set(), Set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked there only")
# torch's signal handler may raise while its loader opens files to see whether any are left: one stays open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_was_killed_ends_it_with_a_message(tmp_path):
    (tmp_path / "sudden.py").write_text(SUDDEN_END)
    data = load_data(f"{tmp_path}/sudden.py:make", memory_gb=0.0)
    found = Batches(data.test, 4, mean=data.mean, std=data.std, workers=1)
    with pytest.raises(DataError, match=r"ended from outside .*; memory may be short: set data.workers lower"):
        list(found)


def test_usual_workers_are_shared_among_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert usual_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert usual_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert usual_workers() == 0


def test_workers_that_cannot_be(folder):
    with pytest.raises(DataError, match="workers must be at least 0 and prefetch at least 1, got -1 and 2"):
        batches(streamed(folder), workers=-1)


# ---- crops of the original


def test_random_crops_are_taken_from_the_whole_image(tmp_path):
    """A wide picture: a crop shows parts that the centre square has lost."""
    wide = np.zeros((30, 46, 3), np.uint8)
    wide[:, :6, 0], wide[:, -6:, 1] = 255, 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(20):
            Image.fromarray(wide).save(tmp_path / name / f"{index}.png")
    data = load_data(tmp_path, image_size=16, memory_gb=0.0)
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3}
    assert collected(Batches(data.train, 8, **plain, augment="flip"))[0].max() == 0
    images = collected(Batches(data.train, 8, **plain, augment="resized-crop"))[0]
    assert images[:, 0].max() > 0.5
    assert images[:, 1].max() > 0.5


# ---- augmentation image by image


def squares(count: int = 64, channels: int = 3) -> ImageSet:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, 16, 20), dtype=torch.uint8, generator=draws)
    return ImageSet(images, torch.arange(count) % 2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", ["rand-augment", "rand-augment:15", "trivial-augment", "auto-augment", EVERY])
def test_policies_work_on_sets_in_memory_of_any_shape(augment, channels):
    data = squares(channels=channels)
    plain = {"mean": [0.0] * channels, "std": [1 / 255] * channels, "augment": augment}
    results = [collected(Batches(data, 16, **plain, workers=workers)) for workers in (0, 2)]
    images, labels = results[0]
    assert images.shape == (64, channels, 16, 20)
    assert labels.tolist() == data.labels.tolist()
    assert images.min() >= 0
    assert images.max() <= 255
    assert not torch.equal(images, data.images.float())
    assert torch.equal(images, results[1][0])


@pytest.mark.parametrize("streams", [False, True])
def test_erased_rectangles_have_the_mean_colour(folder, streams):
    if streams:
        data = load_data(folder, image_size=16, memory_gb=0.0)
        part, mean, std = data.train, data.mean, data.std
    else:
        part, mean, std = squares(400), (0.2, 0.4, 0.6), (0.3, 0.3, 0.3)
    plain, _ = collected(Batches(part, 8, mean=mean, std=std))
    erased, _ = collected(Batches(part, 8, mean=mean, std=std, augment="erase:0.5"))
    changed = (plain != erased).any(1)
    assert erased.abs().amax(1)[changed].max() < 0.01 / min(std)  # zero but for rounding to a uint8
    is_changed = changed.any(2).any(1)
    assert 0.2 < is_changed.double().mean() < 0.8
    area = changed[is_changed].double().mean((1, 2))
    assert area.min() > 0
    assert 0.05 < area.mean() < 0.35
    for mask in changed[is_changed]:  # whole rectangles, but for pixels that were of that colour before
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert mask.sum() > 0.9 * height * width


@pytest.mark.parametrize(
    ("augment", "reason"),
    [
        ("flip:0.5", "augmentation 'flip:0.5': flip takes no number"),
        ("erase:2", "write erase:NUMBER, the share of images, from 0 to 1"),
        ("erase:", "write erase:NUMBER"),
        ("jitter:nan", "write jitter:NUMBER, the strength, from 0 to 1"),
        ("rand-augment:31", "write rand-augment:NUMBER, the magnitude, from 0 to 30"),
        ("resized-crop:0", "write resized-crop:NUMBER, the least share of the area, from 0.01 to 1"),
        ("randaugment", "did you mean 'rand-augment'?"),
    ],
)
def test_numbers_of_augmentations(augment, reason):
    with pytest.raises(ConfigError) as caught:
        Batches(squares(), 8, mean=[0.0] * 3, std=[1.0] * 3, augment=augment)
    assert reason in str(caught.value)


def test_policies_of_four_channels_are_refused():
    with pytest.raises(ConfigError, match="'trivial-augment' needs images of 1 or 3 channels, these have 4"):
        Batches(squares(channels=4), 8, mean=[0.0] * 4, std=[1.0] * 4, augment="trivial-augment")


def test_without_torchvision_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(DataError, match="pip install 'autoslim\\[vision\\]'"):
        Batches(squares(), 8, mean=[0.0] * 3, std=[1.0] * 3, augment="trivial-augment")
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(DataError, match="pip install 'autoslim\\[vision\\]'"):
        Batches(squares(), 8, mean=[0.0] * 3, std=[1.0] * 3, mix="mixup", num_classes=2)
    Batches(squares(), 8, mean=[0.0] * 3, std=[1.0] * 3, augment="resized-crop,flip")  # our own, in batches


# ---- shards


@pytest.mark.parametrize("written_by", ["tarfile", "tar"])
def test_a_shard_that_is_cut_anywhere_is_named(tmp_path, written_by):
    pytest.importorskip("webdataset")
    for index in range(20):
        Image.fromarray(np.full((8, 8), 10 * index, np.uint8)).save(tmp_path / f"{index:02}.png")
        (tmp_path / f"{index:02}.cls").write_text(str(index % 2))
    names = [f"{index:02}.{suffix}" for index in range(20) for suffix in ("png", "cls")]
    whole = tmp_path / "whole.tar"
    if written_by == "tar":
        if shutil.which("tar") is None:
            pytest.skip("there is no tar here")
        subprocess.run(["tar", "--create", "--file", whole, *names], check=True, cwd=tmp_path)
    else:
        with tarfile.open(whole, "w") as archive:
            for name in names:
                archive.add(tmp_path / name, name)
    with tarfile.open(whole) as archive:
        members = archive.getmembers()
        end = archive.offset
    content = whole.read_bytes()
    last_image, last_label = members[-2:]
    between = last_label.offset  # the last sample has no label then
    for size in (end, between, last_image.offset, end - 100, between + 10, last_image.offset_data + 5):
        cut = tmp_path / f"cut-{size}.tar"
        cut.write_bytes(content[:size])
        with pytest.raises(DataError, match=rf"shard '.*cut-{size}.tar' is (cut short or|no tar file, or a) damaged"):
            load_data(f"wds:{cut}", image_size=8)
    garbled = tmp_path / "garbled.tar"  # tarfile takes what is no header for the end
    garbled.write_bytes(content[: members[20].offset] + b"x" * 512 + content[members[20].offset + 512 :])
    with pytest.raises(DataError, match="cut short or damaged"):
        load_data(f"wds:{garbled}", image_size=8)
    streamed = tmp_path / "streamed.tar"  # without padding
    streamed.write_bytes(content[:end] + bytes(512))
    for source in (whole, streamed):
        data = load_data(f"wds:{source}", image_size=8)
        assert len(data.train) + len(data.holdout) + len(data.test) == 20


# ---- augmentations of whole images and of any number of channels


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 200x150 that tell where each pixel is: red is its column, green its row."""
    root = tmp_path_factory.mktemp("ramps")
    red, green = np.meshgrid(np.linspace(0, 255, 200), np.linspace(0, 255, 150))
    ramp = np.stack([red, green, np.zeros_like(red)], -1).astype(np.uint8)
    for index in range(48):
        path = root / ("cat" if index % 2 else "dog") / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(ramp).save(path)
    return root


@pytest.mark.parametrize("shift", ["crop:0.1", "crop:0.5"])
def test_a_crop_before_a_resized_crop_leaves_as_much_of_the_image(ramps, shift):
    data = load_data(ramps, image_size=32, memory_gb=0.0)

    def seen(augment: str) -> torch.Tensor:
        """The ranges of columns and rows in what is not black, as shares."""
        images, _ = collected(Batches(data.train, 8, mean=[0.0] * 3, std=[1.0] * 3, augment=augment))
        return torch.stack([images[:, c].amax((1, 2)) - images[:, c].amin((1, 2)) for c in (0, 1)], 1).mean(0)

    alone, after = seen("resized-crop:0.5"), seen(f"{shift},resized-crop:0.5")
    assert alone.min() > 0.6
    assert (after > 0.8 * alone).all()  # shifted by shares of a whole image, not cut to 32 of its pixels


def test_a_crop_before_a_resized_crop_takes_images_smaller_than_the_result(folder):
    data = load_data(folder, image_size=64, memory_gb=0.0)  # of 24 to 40 pixels
    images, _ = collected(batches(data, augment="crop,resized-crop"))
    assert images.shape[1:] == (3, 64, 64)
    assert images.isfinite().all()


@pytest.mark.parametrize("augment", ["jitter", "flip,crop,jitter:1,lighting,erase"])
def test_streamed_images_of_four_channels_are_augmented_as_in_memory(tmp_path, augment):
    code = "import numpy as np\ndef make():\n    draws = np.random.default_rng(0)\n"
    code += "    one = lambda n: [(draws.integers(0, 256, (16, 16, 4), np.uint8), i % 2) for i in range(n)]\n"
    (tmp_path / "given.py").write_text(code + "    return one(24), one(8)\n")
    for memory_gb in (0.0, 4.0):
        data = load_data(f"{tmp_path}/given.py:make", image_size=16, memory_gb=memory_gb)
        assert isinstance(data.train, ImageSet if memory_gb else StreamedSet)
        plain = Batches(data.train, 8, mean=[0.0] * 4, std=[1 / 255] * 4)
        images, _ = collected(Batches(data.train, 8, mean=[0.0] * 4, std=[1 / 255] * 4, augment=augment))
        assert images.shape[1:] == (4, 16, 16)
        assert 0 <= images.min() < images.max() <= 255
        assert not torch.equal(images, collected(plain)[0])


@pytest.mark.parametrize(("augment", "streams"), [("crop,jitter,erase", True), ("rand-augment", False)])
def test_images_augmented_one_by_one_are_the_same_for_any_number_of_ranks(folder, augment, streams):
    data = load_data(folder, image_size=16, memory_gb=0.0 if streams else 4.0)
    options = {"augment": augment, "shuffle": True, "seed": 3}
    shares = [batches(data, share=(rank, 2), **options) for rank in range(2)]
    for (whole, _), *parts in zip(batches(data, **options), *shares, strict=True):
        assert torch.equal(whole[0::2], parts[0][0])
        assert torch.equal(whole[1::2], parts[1][0])
