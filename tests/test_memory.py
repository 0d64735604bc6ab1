"""Out of memory, in any stage: it is done in smaller batches, or one line says what would fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from autoslim import cli, pipeline
from autoslim.data import load_data, reading
from autoslim.errors import DataError, TrainError
from autoslim.memory import in_smaller_batches, naming_memory
from test_pipeline import config, run

__all__ = ["config"]  # the fixture

SMALL = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from small_net import Net

class Limited(Net):
    def forward(self, x):
        judged = self.stem[1].training  # a search has the statistics of its batches
        most = {{False: "EVALUATED", True: "JUDGED"}}[judged]
        if not torch.is_grad_enabled() and len(x) > int(os.environ.get(most, "1000")):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().forward(x)

def net():
    return Limited(16, 4)
"""


@pytest.fixture
def limited(config: Path, in_tmp: Path) -> Path:
    """A run whose network needs more memory than there is for batches beyond what the environment says."""
    (in_tmp / "limited.py").write_text(SMALL.format(tests=str(Path(__file__).parent)))
    values = yaml.safe_load(config.read_text())
    values["model"] = "limited.py:net"
    values["slim"]["budgets"], values["train"]["epochs"], values["retrain"]["epochs"] = ["50%"], 1, 1
    config.write_text(yaml.safe_dump(values))
    return config


def test_what_does_not_depend_on_batches_is_evaluated_in_smaller_ones(
    limited: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("run", limited, "--run-dir", "whole") == 0
    monkeypatch.setenv("EVALUATED", "30")
    assert run("run", limited, "--run-dir", "parts") == 0
    whole, parts = (
        json.loads((in_tmp / name / "results.json").read_text())["subnets"][0]["accuracy"]
        for name in ("whole", "parts")
    )
    assert parts == pytest.approx(whole, abs=0.011)  # sums of statistics are rounded in another order


def test_the_search_says_which_batches_to_set_and_goes_on_with_them(
    limited: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGED", "100")
    assert run("run", limited) == 2
    said = capsys.readouterr().err
    assert "out of memory for the held-out accuracy" in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "out of memory" in line
    assert "batches of 150: set slim.batch_size=75 or slim.memory_gb" in line
    assert (in_tmp / "runs/small/supernet/model.safetensors").exists()
    assert run("run", limited, "--set", "slim.batch_size=75") == 0
    assert run("run", limited, "--set", "slim.batch_size=50") == 2  # scores are of those batches now
    assert "slim.batch_size is 75 there and 50 now" in capsys.readouterr().err


def test_one_sample_too_many_is_a_line() -> None:
    def never(size: int) -> None:
        raise MemoryError

    with pytest.raises(TrainError, match="out of memory, evaluating, even for a batch of 1"):
        in_smaller_batches(never, 8, "evaluating")
    assert in_smaller_batches(lambda size: size if size <= 3 else never(size), 12, "evaluating") == 3
    with pytest.raises(ValueError, match="as it is"), naming_memory("; less"):
        raise ValueError("as it is")


def test_images_that_do_not_fit_name_the_keys_that_help(
    shapes_npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)

    def full(*arguments: object, **options: object) -> torch.Tensor:
        return torch.empty(10**15)

    monkeypatch.setattr(reading.torch, "zeros", full)
    with pytest.raises(DataError, match=r"out of memory while .*data.image_size, or data.memory_gb below 4,"):
        load_data(tmp_path / "images", image_size=8)


def test_whatever_is_left_is_one_line_and_exit_code_2(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **options: object) -> None:
        torch.empty(10**15)

    monkeypatch.setattr(pipeline, "trace", full)
    assert cli.main(["train", str(config)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: out of memory (")
    assert "train.batch_size" in said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space")
def test_a_process_at_its_limit_says_so(in_tmp: Path, shapes_npz: Path) -> None:
    code = """
import resource, sys, torch
from autoslim.cli import main
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
import autoslim.pipeline
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 400_000_000, -1))
sys.exit(main(sys.argv[1:]))
"""
    values = {
        "model": f"{Path(__file__).parent / 'small_net.py'}:net",
        "model_args": {"channels": 256},
        "data": {"source": str(shapes_npz), "holdout": 150, "augment": "none"},
        "train": {"epochs": 1, "batch_size": 400},
        "threads": 1,
    }
    (in_tmp / "small.yaml").write_text(yaml.safe_dump(values))
    ended = subprocess.run(
        [sys.executable, "-c", code, "train", "small.yaml"], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "out of memory" in ended.stderr.splitlines()[-1]
