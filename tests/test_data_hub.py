"""Hugging Face data sets and WebDataset shards, built here: nothing is fetched from anywhere but this machine."""

from __future__ import annotations

import io
import json
import random
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from autoslim.data import Batches, ImageSet, StreamedSet, hub, load_data
from autoslim.data import shards as shards_module
from autoslim.errors import DataError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def refusal(source: str, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load_data(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def grey(level: int) -> Image.Image:
    return Image.new("L", (6, 5), level)


def identities(part: ImageSet) -> set[int]:
    return set(part.images[:, 0, 0, 0].tolist())


# ---- Hugging Face

hugging = pytest.importorskip("datasets")


def rows(count: int, **columns: object):
    given = {"image": [grey(i) for i in range(count)], "label": [i % 2 for i in range(count)], **columns}
    return hugging.Dataset.from_dict({k: v for k, v in given.items() if v is not None}).cast_column(
        "image", hugging.Image()
    )


def saved(path: Path, **splits: object) -> str:
    hugging.DatasetDict(splits).save_to_disk(str(path))
    return f"hf:{path}"


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
def test_hub_set_with_both_splits(tmp_path, memory_gb):
    named = hugging.ClassLabel(names=["cat", "dog"])
    splits = {"train": rows(40).cast_column("label", named), "test": rows(10).cast_column("label", named)}
    data = load_data(saved(tmp_path / "set", **splits), memory_gb=memory_gb)
    assert data.class_names == ("cat", "dog")
    assert data.image_shape == (1, 5, 6)
    assert [len(data.train), len(data.holdout), len(data.test)] == [32, 8, 10]
    assert isinstance(data.train, ImageSet if memory_gb else StreamedSet)
    found = Batches(data.holdout, 8, mean=[0.0], std=[1 / 255], workers=0 if memory_gb else 1)
    images, labels = next(iter(found))
    assert images[:, 0, 0, 0].tolist() == pytest.approx(list(data.holdout_names))  # pixel and number are the same here
    assert labels.tolist() == [number % 2 for number in data.holdout_names]


@pytest.mark.parametrize("split", ["validation", "val", None])
def test_hub_set_without_a_test_split(tmp_path, split):
    splits = {"train": rows(40), **({} if split is None else {split: rows(6)})}
    data = load_data(saved(tmp_path / "set", **splits))
    assert len(data.test) == (8 if split is None else 6)
    if split is None:
        parts = [identities(part) for part in (data.train, data.holdout, data.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 40


def test_hub_set_of_parquet_files_with_class_names_in_text(tmp_path):
    (tmp_path / "set").mkdir()
    for name, count in (("train", 20), ("test", 6)):
        table = rows(count, label=None, kind=["cow" if i % 2 else "ant" for i in range(count)])
        table.to_parquet(str(tmp_path / "set" / f"{name}.parquet"))
    data = load_data(f"hf:{tmp_path / 'set'}", label_column="kind")
    assert data.class_names == ("ant", "cow")
    assert data.test.labels.tolist() == [0, 1] * 3


def test_hub_columns_are_found_or_named(tmp_path):
    two = rows(20, other=[grey(9) for _ in range(20)], label=None, kind=[i % 2 for i in range(20)])
    source = saved(tmp_path / "two", train=two.cast_column("other", hugging.Image()))
    assert "several columns of images (image, other); its columns are" in refusal(source)
    assert "no column 'imge'; did you mean 'image'?" in refusal(source, image_column="imge")
    assert "no column of labels; its columns are image, " in refusal(source, image_column="image")
    assert "no column 'kin'; did you mean 'kind'?" in refusal(source, image_column="image", label_column="kin")
    assert "column 'kind' holds no images" in refusal(source, image_column="kind")
    assert len(load_data(source, image_column="image", label_column="kind").test) == 4


def test_hub_sets_that_cannot_be_used(tmp_path, monkeypatch):
    assert "row 3 of its train part has no label" in refusal(
        saved(tmp_path / "none", train=rows(10, label=[0, 1, 0, None, 1, 0, 1, 0, 1, 0]))
    )
    assert "holds float64; labels must be whole numbers" in refusal(
        saved(tmp_path / "float", train=rows(10, label=[0.5] * 10))
    )
    assert "has no split train; it has odd" in refusal(saved(tmp_path / "odd", odd=rows(10)))
    assert "there is no folder '/no/such/place'" in refusal("hf:/no/such/place")
    assert "names no data set; give hf:NAME" in refusal("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'autoslim[datasets]'" in refusal("hf:some/name")


@pytest.mark.parametrize("withheld", [-1, None])
def test_hub_test_split_without_labels_gives_way_to_validation_and_is_told(tmp_path, withheld):
    splits = {"train": rows(20), "test": rows(5, label=[withheld] * 5), "validation": rows(6)}
    for split in splits:
        splits[split] = splits[split].cast_column("label", hugging.ClassLabel(names=["cat", "dog"]))
    data = load_data(saved(tmp_path / "set", **splits))
    assert data.test.labels.tolist() == [0, 1] * 3
    assert len(data.remarks) == 1
    assert data.remarks[0].startswith("its split test has no labels (column 'label' is -1 or null in every row)")
    assert data.remarks[0].endswith("split validation is the test part")
    del splits["validation"]
    text = refusal(saved(tmp_path / "less", **splits))
    assert "its split test has no labels" in text
    assert "give a function of your own" in text
    splits["validation"] = rows(6).cast_column("label", hugging.ClassLabel(names=["cat", "dog"]))
    splits["test"] = rows(5, label=[-1, 0, 1, 0, 1]).cast_column("label", hugging.ClassLabel(names=["cat", "dog"]))
    assert "label -1 is negative" in refusal(saved(tmp_path / "some", **splits))  # a single one is a mistake


@pytest.mark.parametrize(
    ("labels", "kind"),
    [([[0], [1]] * 5, "List"), ([[0, 1], [1]] * 5, "List"), ([{"x": 0}, {"x": 1}] * 5, "struct")],
)
def test_hub_labels_that_are_no_single_values_are_refused(tmp_path, labels, kind):
    kind = (
        kind if kind == "struct" else type(hugging.Sequence(hugging.Value("int64"))).__name__
    )  # depends on its version
    source = saved(tmp_path / "set", train=rows(10, label=labels, other=[0, 1] * 5))
    for options in ({}, {"label_column": "label"}):
        text = refusal(source, **options)
        assert f"column 'label' is of type {kind}; a label must be one whole number from 0 or one name" in text
        assert text.endswith("set label_column, to one of other")
    assert load_data(source, label_column="other").num_classes == 2
    assert "column 'image' is of type Image" in refusal(source, label_column="image")
    assert "column 'label' is of type" in refusal(saved(tmp_path / "two", train=rows(10), test=rows(10, label=labels)))


def test_hub_name_that_cannot_be_had_is_one_line(monkeypatch):
    def load_dataset(name: str, config: str | None) -> None:
        assert (name, config) == ("someone/birds", "small")
        raise ConnectionError("the hub\ncannot be reached")

    monkeypatch.setattr(hugging, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "_answers", lambda url: True)
    assert refusal("hf:someone/birds:small").endswith("datasets cannot load it: the hub")


def test_a_hub_that_does_not_answer_is_asked_once_and_the_cache_is_looked_at(monkeypatch):
    import huggingface_hub.constants

    def load_dataset(name: str, config: str | None) -> None:
        assert huggingface_hub.constants.HF_HUB_OFFLINE  # its client does not try again and again
        assert hugging.config.HF_HUB_OFFLINE
        raise ConnectionError("not in the cache")

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hugging, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "_answers", lambda url: False)
    assert "does not answer, and it is not in the cache (not in the cache)" in refusal("hf:nope/x")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.undo()
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
def test_broken_images_of_a_hub_set(tmp_path, memory_gb):
    encoded = io.BytesIO()
    grey(7).save(encoded, "PNG")
    images = [{"bytes": b"no image" if i == 4 else encoded.getvalue(), "path": None} for i in range(20)]
    source = saved(tmp_path / "set", train=rows(20, image=images))
    assert "cannot decode train item 4: " in refusal(source, memory_gb=memory_gb)
    data = load_data(source, skip_broken=True, memory_gb=memory_gb)
    assert data.skipped == ("train item 4",)
    assert len(data.train) + len(data.holdout) + len(data.test) == 19


# ---- WebDataset

webdataset = pytest.importorskip("webdataset")
braceexpand = pytest.importorskip("braceexpand")


def write_shards(folder: Path, counts: list[int], name: str = "train", **members: object) -> str:
    """Shards by webdataset's own writer; pixel and number of an image are the same. The pattern of all."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        with webdataset.TarWriter(str(folder / f"{name}-{shard:04}.tar")) as writer:
            for _ in range(count):
                image = io.BytesIO()
                grey(number).save(image, "PNG")
                sample = {"__key__": f"{number:05}", "png": image.getvalue(), "cls": number % 2, **members}
                writer.write({key: value for key, value in sample.items() if value is not None})
                number += 1
    return f"wds:{folder}/{name}-{{0000..{len(counts) - 1:04}}}.tar"


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
def test_shards_of_any_length(tmp_path, memory_gb):
    source = write_shards(tmp_path / "set", [10, 1, 17, 12])
    data = load_data(source, memory_gb=memory_gb, image_size=5, channels=1)
    assert [len(data.train), len(data.holdout), len(data.test)] == [26, 6, 8]
    seen = []
    for part, names in (
        (data.train, data.train_names),
        (data.holdout, data.holdout_names),
        (data.test, data.test_names),
    ):
        images, labels = zip(*Batches(part, 5, mean=[0.0], std=[1 / 255]), strict=True)
        levels = torch.cat(images)[:, 0, 0, 0].round().int().tolist()
        assert torch.cat(labels).tolist() == [level % 2 for level in levels]
        assert [int(name.rsplit(":")[-1]) for name in names] == levels
        seen += levels
    assert sorted(seen) == list(range(40))
    assert data.train_names[0].startswith("train-0000.tar:0000")


def test_shards_of_a_test_set(tmp_path):
    source = write_shards(tmp_path / "set", [20, 20])
    tested = write_shards(tmp_path / "set", [6], "val")
    data = load_data(source, test_shards=tested, image_size=5)
    assert [len(data.train), len(data.holdout), len(data.test)] == [32, 8, 6]


def test_an_epoch_goes_through_few_shards_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_AT_A_TIME", 2)
    data = load_data(write_shards(tmp_path / "set", [8] * 10), memory_gb=0.0, image_size=5)
    pictures, indices = data.train.pictures, data.train.indices
    order = pictures.epoch_order(indices, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(len(indices)))
    shard = (indices[order] // 8).tolist()
    groups = [set(shard[i : i + 4]) for i in range(0, len(shard), 4)]
    assert max(map(len, groups)) <= 4
    first_half = [shard.index(number) for number in range(10)]
    assert sorted(first_half)[4] >= 10  # the fifth shard begins only when others are done
    other = pictures.epoch_order(indices, torch.Generator().manual_seed(1))
    assert not torch.equal(order, other)


def test_labels_in_json(tmp_path):
    source = write_shards(tmp_path / "set", [20], cls=None, json=json.dumps({"label": 1, "kind": 0}))
    assert "only one class, 1" in refusal(source)
    assert "only one class, 0" in refusal(source, label_column="kind")
    assert "its .json has no key 'knd'; set label_column" in refusal(source, label_column="knd")


def raw_shard(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return f"wds:{path}"


def test_shards_that_cannot_be_used(tmp_path, monkeypatch):
    path = tmp_path / "one.tar"
    assert "there is no shard" in refusal("wds:/no/shard-{00..03}.tar")
    assert "names no shards; give wds:" in refusal("wds:")
    assert "never from a command" in refusal("wds:pipe:touch /tmp/x")
    assert "stands for more than 1,000,000 shards" in refusal("wds:/no/{0..99999999}.tar")
    assert "stands for more than 1,000,000 shards" in refusal("wds:/no/" + "{a,b}" * 21)
    assert "stands for more than 1,000,000 shards" in refusal("wds:/no/{0..9" + "9" * 40 + "}.tar")
    assert "one of its braces has no partner" in refusal("wds:/no/{a,b")
    assert "one of its braces has no partner" in refusal("wds:/no/a}{b")
    assert "too many braces in each other" in refusal("wds:/no/" + "{a," * 900 + "}" * 900)
    path.write_bytes(b"no tar at all" * 100)
    assert "is no tar file, or a damaged one" in refusal(f"wds:{path}")
    path.write_bytes(b"")
    assert "is no tar file, or a damaged one" in refusal(f"wds:{path}")
    assert "holds no images" in refusal(raw_shard(path, [("a.txt", b"x")]))
    assert "sample 'a' of shard" in refusal(raw_shard(path, [("a.png", b"x")]))
    assert "has no label: none of .cls, .label, .json is among png" in refusal(raw_shard(path, [("a.png", b"x")]))
    assert "its label is no whole number" in refusal(raw_shard(path, [("a.png", b"x"), ("a.cls", b"cat")]))
    text = refusal(raw_shard(path, [("a.png", b"x"), ("a.json", b"[" * 100_000)]))
    assert "its label is no whole number" in text
    assert "several images: png, jpg" in refusal(raw_shard(path, [("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")]))
    assert "give wds:" in refusal(str(path))
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert "pip install 'autoslim[webdataset]'" in refusal(f"wds:{path}")


@pytest.mark.parametrize(
    "bomb",
    [
        "{a,{b,{c,d}}}" * 12,  # four names each, though no brace holds more than two
        "{{a,b}" * 25 + ",c" + "}" * 25,
        "{{1..1000},{a,b}}{1..1000}",
        "{a..z}" * 5,
        "{0..9..3}" * 7,
    ],
)
def test_braces_that_stand_for_too_many_shards_are_refused_at_once(bomb):
    assert "stands for more than 1,000,000 shards" in refusal(f"wds:/no/{bomb}.tar")


@pytest.mark.parametrize("seed", range(20))
def test_number_of_shards_is_no_less_than_are_written_out(seed):
    draws = random.Random(seed)

    def pattern(depth: int) -> str:
        kind = draws.randrange(6 if depth else 2)
        if kind < 2:
            return draws.choice(["a", "\\{", "\\,", "{2..5}", "{05..3}", "{a..d}", "{}", "{x}", ""])
        parts = [pattern(depth - 1) for _ in range(draws.randrange(2, 4))]
        return "".join(parts) if kind < 4 else f"{{{','.join(parts)}}}"

    for _ in range(50):
        given = pattern(3)
        assert len(list(braceexpand.braceexpand(given))) <= shards_module._num_expanded(given)
    assert shards_module._num_expanded("{a,{b,{c,d}}}x{1..3}") == 12


@pytest.mark.parametrize(
    "members", [{"cls": b"9" * 20}, {"cls": b"-" + b"9" * 20}, {"json": b'{"label": 1%s}' % (b"0" * 30)}]
)
def test_labels_of_more_than_64_bits_are_refused(tmp_path, members):
    named = [("a.png", b"x"), *((f"a.{kind}", content) for kind, content in members.items())]
    text = refusal(raw_shard(tmp_path / "one.tar", named))
    assert "sample 'a' of shard" in text
    assert "has a label of more than 64 bits; number the classes from 0" in text


def test_shards_named_by_a_file_url_are_the_files(tmp_path, home):
    write_shards(tmp_path / "set", [20])
    plain = f"wds:{tmp_path}/set/train-0000.tar"
    url = plain.replace("wds:", "wds:file://")
    assert load_data(url, image_size=5).record() == load_data(plain, image_size=5).record()
    write_shards(tmp_path / "set", [30])
    assert load_data(url, image_size=5).record() == load_data(plain, image_size=5).record()
    assert sum(load_data(url, image_size=5).record()["images"].values()) == 30
    assert not list(home.rglob("*.tar"))  # no copy either
    assert "there is no shard" in refusal("wds:file:///no/shard.tar")


def test_broken_images_and_a_cut_shard(tmp_path):
    whole = io.BytesIO()
    grey(3).save(whole, "PNG")
    members = [(f"{i}.{kind}", content) for i in range(20) for kind, content in (
        ("cls", str(i % 2).encode()), ("png", b"" if i == 4 else b"junk" if i == 5 else whole.getvalue()))]  # fmt: skip
    source = raw_shard(tmp_path / "set.tar", members)
    assert "cannot decode 'set.tar:4': the file is empty" in refusal(source, image_size=5)
    for memory_gb in (4.0, 0.0):
        data = load_data(source, image_size=5, skip_broken=True, memory_gb=memory_gb)
        assert data.skipped == ("set.tar:4", "set.tar:5")
    content = (tmp_path / "set.tar").read_bytes()
    (tmp_path / "set.tar").write_bytes(content[: len(content) * 2 // 3])
    assert "set.tar" in refusal(source, image_size=5)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The URL at which the folder `set` can be fetched, and what was."""
    fetched: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def do_GET(self) -> None:
            fetched.append(self.path)
            super().do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "set")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", fetched
    server.shutdown()
    server.server_close()


def test_shards_from_a_url_are_fetched_once_and_room_is_made(tmp_path, home, monkeypatch, served):
    write_shards(tmp_path / "set", [12, 12, 12])
    url, fetched = served
    source = f"wds:{url}/train-{{0000..0002}}.tar"
    data = load_data(source, memory_gb=0.0, image_size=5)
    found = Batches(data.train, 4, mean=data.mean, std=data.std, shuffle=True, workers=1)
    reference = [images for images, _ in found]
    assert sorted(set(fetched)) == [f"/train-000{i}.tar" for i in range(3)]
    assert len(fetched) == 3
    # with room for one only, shards are fetched again, and nothing else changes
    monkeypatch.setattr(shards_module, "_KEPT_BYTES", 1)
    folder = home / ".cache" / "autoslim-data" / "shards"
    for path in folder.glob("*.tar"):
        path.unlink()
    again = Batches(data.train, 4, mean=data.mean, std=data.std, shuffle=True, workers=1)
    for here, there in zip(again, reference, strict=True):
        assert torch.equal(here[0], there)
    assert len(list(folder.glob("*.tar"))) == 1
    found.close()
    again.close()


def test_shards_that_cannot_be_fetched_say_why(tmp_path, served):
    (tmp_path / "set").mkdir()
    assert "cannot be fetched: 404" in refusal(f"wds:{served[0]}/train.tar")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "Connect call failed" in refusal(f"wds:http://127.0.0.1:{port}/train.tar")
    assert "Protocol not known" in refusal("wds:nothing://train.tar")


@pytest.mark.parametrize("loses_its_note", [False, True])
def test_a_shard_that_is_fetched_again_and_changed_is_listed_anew(tmp_path, home, served, loses_its_note):
    write_shards(tmp_path / "set", [20])
    source = f"wds:{served[0]}/train-0000.tar"
    before = load_data(source, memory_gb=0.0, image_size=5)
    write_shards(tmp_path / "set", [30], txt="other offsets")
    for path in home.rglob("*.version" if loses_its_note else "*.tar"):
        path.write_text("damaged") if loses_its_note else path.unlink()
    if not loses_its_note:
        count = len(served[1])
        for _ in range(2):
            with pytest.raises(DataError, match="has changed since its images were listed; start again"):
                list(Batches(before.train, 4, mean=before.mean, std=before.std))
        assert len(served[1]) == count + 1  # it is not fetched again by each that reads
    data = load_data(source, image_size=5, channels=1)
    assert sum(data.record()["images"].values()) == 30
    assert [int(name.rsplit(":")[-1]) for name in data.train_names] == data.train.images[:, 0, 0, 0].tolist()


# ---- data sets of torch


TORCH_SETS = """
import numpy as np, torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset
torch.manual_seed(0)
class Pictures(Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return Image.fromarray(np.full((6, 7, 3), i, np.uint8)), i % 2
def pictures(): return Pictures(30), Pictures(8)
def tensors():
    level = lambda n: torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1)
    make = lambda n: TensorDataset(level(n).expand(n, 3, 6, 7), torch.arange(n) % 2)
    return make(30), make(8)
def subsets(): return Subset(Pictures(60), range(30)), Subset(Pictures(60), range(8))
class Random(Pictures):
    targets = [0, 1] * 15
    def __getitem__(self, i): return np.random.randint(0, 256, (6, 7), np.uint8), i % 2
def draws(): return Random(30), Pictures(8)
class Liar(Pictures):
    targets = torch.arange(30) // 15
def liar(): return Liar(30), Pictures(8)
"""


@pytest.mark.parametrize("memory_gb", [4.0, 0.0])
@pytest.mark.parametrize("name", ["pictures", "tensors", "subsets"])
def test_functions_that_return_data_sets_of_torch(tmp_path, name, memory_gb):
    (tmp_path / "mine.py").write_text(TORCH_SETS)
    data = load_data(f"{tmp_path}/mine.py:{name}", memory_gb=memory_gb, workers=1)
    assert data.image_shape == (3, 6, 7)
    images, labels = next(iter(Batches(data.test, 8, mean=[0.0] * 3, std=[1 / 255] * 3, workers=1)))
    assert images[:, 2, 5, 6].round().tolist() == list(range(8))
    assert labels.tolist() == [0, 1] * 4


def test_random_transforms_of_a_user_repeat_when_streamed(tmp_path):
    (tmp_path / "mine.py").write_text(TORCH_SETS.replace("Random(30), Pictures(8)", "Random(30), Random(30)"))
    data = load_data(f"{tmp_path}/mine.py:draws", memory_gb=0.0)
    epochs = []
    for workers, epoch in ((0, 0), (2, 0), (0, 1)):
        found = Batches(data.train, 5, mean=data.mean, std=data.std, shuffle=False, workers=workers)
        found.set_epoch(epoch)
        epochs.append(torch.cat([images for images, _ in found]))
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def test_labels_that_a_data_set_tells_wrongly_are_found_out(tmp_path):
    (tmp_path / "mine.py").write_text(TORCH_SETS.replace("return Liar(30), Pictures(8)", "return Liar(30), Liar(30)"))
    data = load_data(f"{tmp_path}/mine.py:liar", memory_gb=0.0)
    with pytest.raises(DataError, match=r"train item \d+ has the label \d now, and had \d before"):
        list(Batches(data.train, 5, mean=data.mean, std=data.std))
