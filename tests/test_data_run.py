"""Data in a whole run: what is recorded, what may change while it goes on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from autoslim.cli import main
from autoslim.config import DataConfig, make_config
from autoslim.errors import ConfigError

NET = f"{Path(__file__).parent / 'small_net.py'}:net"


@pytest.fixture
def photos(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four classes of ten grey images, and a file that is broken."""
    monkeypatch.setenv("HOME", str(in_tmp / "home"))
    rng = np.random.default_rng(0)
    for label in range(4):
        folder = in_tmp / "photos" / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(10):
            noise = rng.integers(0, 60, (20, 20)) + 50 * label
            Image.fromarray(noise.astype(np.uint8)).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"")
    (folder / "notes.txt").write_text("x")
    return in_tmp / "photos"


def configured(in_tmp: Path, **data: object) -> Path:
    values = {
        "model": NET,
        "data": {"source": "photos", "image_size": 16, "channels": 1, "holdout": 8, "skip_broken": True, **data},
        "space": {"bins": 2, "divisor": 4, "min_ratio": 0.5},
        "train": {"epochs": 1, "batch_size": 8, "lr": 0.05, "label_smoothing": 0.1},
        "slim": {"budgets": ["60%"], "batch_size": 8},
        "retrain": {"epochs": 1, "batch_size": 8, "lr": 0.05, "uniform": False},
        "export": {"onnx": False, "report": False},
        "calibration_images": 16,
        "threads": 1,
    }
    (in_tmp / "small.yaml").write_text(yaml.safe_dump(values))
    return in_tmp / "small.yaml"


def test_a_streamed_run_is_that_in_memory_with_any_workers(photos: Path, in_tmp: Path) -> None:
    results = {}
    for name, options in {
        "alone": ["data.workers=0", "data.memory_gb=0"],
        "together": ["data.workers=2", "data.memory_gb=0"],
    }.items():
        augment = {"augment": "resized-crop,trivial-augment,erase", "mix": "mixup,cutmix"}
        arguments = [str(configured(in_tmp, **augment)), "--run-dir", name, *(f"--set={o}" for o in options)]
        assert main(["train", *arguments]) == 0
        root = in_tmp / name
        results[name] = (root / "supernet" / "model.safetensors").read_bytes()
        log = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
        assert all(0 <= line["accuracy"] <= 1 for line in log)
    assert results["alone"] == results["together"]


def test_what_was_held_out_is_on_record_and_must_stay_so(
    photos: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(in_tmp)
    assert main(["train", str(config), "--run-dir", "run"]) == 0
    said = capsys.readouterr()
    assert "files that are no images by their names, left out: 1 (.txt 1)" in said.out + said.err
    record = json.loads((in_tmp / "run" / "data.json").read_text())
    assert record["images"] == {"train": 24, "holdout": 8, "test": 8}
    assert record["skipped"] == ["class3/broken.png"]
    assert len(record["holdout"]) == 8
    for name, label in record["holdout"]:
        assert (photos / name).is_file()
        assert name.startswith(label)
    # the number of workers may change, the images may not
    assert main(["slim", str(config), "--run-dir", "run", "--set", "data.workers=1", "--set", "data.prefetch=1"]) == 0
    shutil.copy(photos / "class0" / "1.png", photos / "class0" / "10.png")
    assert main(["slim", str(config), "--run-dir", "run"]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "the images are not those that run was begun with (" in text
    assert "restore them or choose another" in text


def test_an_npz_is_recorded_by_numbers(shapes_npz: Path, in_tmp: Path) -> None:
    config = configured(in_tmp, source=str(shapes_npz), holdout=100)
    assert main(["train", str(config), "--run-dir", "run"]) == 0
    record = json.loads((in_tmp / "run" / "data.json").read_text())
    labels = np.load(shapes_npz)["y_train"]
    assert len({number for number, _ in record["holdout"]}) == 100
    assert all(str(labels[number]) == name for number, name in record["holdout"])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"worker": 2}, "no key 'data.worker'; did you mean 'workers'?"),
        ({"workers": -1}, "data.workers: Input should be greater than or equal to 0"),
        ({"channels": 2}, "data.channels: Input should be 1 or 3"),
        ({"center_crop": 0}, "data.center_crop: Input should be greater than 0"),
        ({"center_crop": 1.5}, "data.center_crop: Input should be less than or equal to 1"),
        ({"memory_gb": -1}, "data.memory_gb: Input should be greater than or equal to 0"),
        ({"prefetch": 0}, "data.prefetch: Input should be greater than or equal to 1"),
    ],
)
def test_keys_have_bounds(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"model": NET, "data": values})
    assert reason in str(caught.value)


def test_all_that_reads_is_told_to_the_reader() -> None:
    others = {"source", "holdout", "augment", "mix", "workers", "prefetch"}
    assert set(DataConfig().reading()) | others == set(DataConfig.model_fields)
