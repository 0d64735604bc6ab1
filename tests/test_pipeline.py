"""The main job from the command line: files, results, resuming after kill -9, and mistakes found before training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import autoslim
from autoslim import LatencyTable, inspection, pipeline, slim
from autoslim.cli import main
from autoslim.errors import SpaceError
from autoslim.export import load_tensors, save_tensors
from autoslim.files import append_record
from autoslim.models import build_model
from autoslim.space import ChannelSpace, Widths
from test_latency import invented

NET = f"{Path(__file__).parent / 'small_net.py'}:net"


@pytest.fixture
def config(in_tmp: Path, shapes_npz: Path) -> Path:
    """A configuration that runs in a few seconds."""
    values = {
        "model": NET,
        "data": {"source": str(shapes_npz), "holdout": 150, "augment": "none"},
        "space": {"bins": 4, "divisor": 4, "min_ratio": 0.25},
        "train": {"epochs": 3, "batch_size": 50, "lr": 0.05},
        "slim": {"budgets": ["50%", "params=30%"], "batch_size": 150},
        "retrain": {"epochs": 2, "batch_size": 50, "lr": 0.05},
        "export": {"onnx": False},
        "calibration_images": 200,
        "threads": 1,
    }
    path = in_tmp / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*arguments: str) -> int:
    return main([str(argument) for argument in arguments])


def artefacts(root: Path) -> dict[str, Any]:
    """What two runs must share: search path, widths byte for byte, figures and accuracies (not times)."""
    path = root / "slim.jsonl"
    found: dict[str, Any] = {"path": path.read_bytes() if path.exists() else None}
    for path in sorted(root.rglob("widths.json")):
        found[str(path.relative_to(root))] = path.read_bytes()
    for path in sorted(root.rglob("metrics.json")):
        found[str(path.relative_to(root))] = json.loads(path.read_text()) | {
            "latency_ms": None,
            "latency_spread_ms": None,
        }
    log = [json.loads(line) | {"seconds": None} for line in (root / "train.jsonl").read_text().splitlines()]
    found["train"] = log
    for path in sorted(root.rglob("model.safetensors")):
        found[str(path.relative_to(root))] = path.read_bytes()
    return found


def test_a_run_leaves_everything_the_design_promises(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run", config, "--json", "--set", "export.onnx=true") == 0
    root = in_tmp / "runs" / "small"
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((root / "results.json").read_text())
    assert printed["model"] == NET
    assert [subnet["budget"] for subnet in printed["subnets"]] == ["50%", "params=30%"]
    space = ChannelSpace.from_json((root / "space.json").read_text())
    macs, params = autoslim.MacCost(space), autoslim.ParamCost(space)
    assert printed["full"]["macs"] == macs(space.full())
    for subnet in printed["subnets"]:
        directory = root / "subnets" / {"50%": "50%", "params=30%": "params-30%"}[subnet["budget"]]
        widths = Widths.from_json((directory / "widths.json").read_text())
        space.check(widths)
        assert subnet["macs"] == macs(widths)
        assert subnet["params"] == params(widths)
        assert subnet["latency_ms"] > 0
        assert set(subnet["accuracy"]) == {"supernet", "found", "retrained", "uniform"}
        assert all(0.0 <= value <= 1.0 for value in subnet["accuracy"].values())
        assert subnet["uniform"]["macs"] == pytest.approx(subnet["macs"], rel=0.1)
        assert {"model.safetensors", "model.onnx", "metrics.json"} <= {path.name for path in directory.iterdir()}
        net = autoslim.load_subnet(directory)
        assert sum(p.numel() for p in net.parameters()) == subnet["params"]
        assert type(net).__name__ == "Net"
    first, second = printed["subnets"]
    assert first["macs"] <= 0.5 * printed["full"]["macs"]
    assert second["params"] <= 0.3 * printed["full"]["params"]
    assert yaml.safe_load((root / "config.yaml").read_text())["provenance"]["version"] == autoslim.__version__
    page = (root / "report.html").read_text()
    assert "params=30%" in page
    steps = [json.loads(line) for line in (root / "slim.jsonl").read_text().splitlines()]
    assert all(0 <= step["accuracy"] <= 1 for step in steps)
    assert "Search path (held-out images)" in page
    assert not list(root.rglob("*.part"))
    assert not list(root.rglob("checkpoint.safetensors"))


RATIOS = ["--set", "ratios=[0.5, 1.0, 0.25]"]


@pytest.mark.parametrize("system", ["i-net", "s-net", "shared-bn", "us-net", "nonuniform-us-net"])
def test_each_system_of_the_papers_runs_by_its_name(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], system: str
) -> None:
    assert run("run", config, "--system", system, *RATIOS, "--json", "--set", "retrain.jointly=true") == 0
    root = in_tmp / "runs" / "small"
    results = json.loads(capsys.readouterr().out)
    assert results["system"] == system
    space = ChannelSpace.from_json((root / "space.json").read_text())
    assert [net["budget"] for net in results["subnets"]] == ["width 1", "width 0.5", "width 0.25"]
    trained = "retrained" if system == "i-net" else "found"
    for net in results["subnets"]:
        assert net["macs"] == autoslim.MacCost(space)(space.uniform(net["ratio"]))
        assert [kind for kind, value in net["accuracy"].items() if value is not None and kind != "supernet"] == [
            trained
        ]
        plain = autoslim.load_subnet(root / "subnets" / net["budget"].replace(" ", "-"))
        assert sum(p.numel() for p in plain.parameters()) == net["params"]
    assert "width 0.25" in (root / "report.html").read_text()
    before = artefacts(root)
    assert run("run", root) == 0  # nothing is left to do
    assert artefacts(root) == before
    lines = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    if system in ("s-net", "shared-bn"):
        assert all(list(line["switches"]) == ["width 1", "width 0.5", "width 0.25"] for line in lines)
        net = autoslim.load_subnet(root / "supernet")
        assert isinstance(net, autoslim.SwitchableNet)
        assert net.is_private == (system == "s-net")
        images = torch.randn(3, 1, 12, 12)
        for ratio in (1.0, 0.5, 0.25):
            assert net.switch(ratio).current == f"width {ratio:g}"
            plain = autoslim.load_subnet(root / "subnets" / f"width-{ratio:g}")
            assert torch.allclose(net(images), plain(images), atol=1e-5)
        with pytest.raises(SpaceError, match=r"no switch '0\.75'"):
            net.switch(0.75)


@pytest.mark.parametrize(("system", "low"), [("us-net", "0.5"), ("nonuniform-us-net", "0.25")])
def test_a_us_net_gives_any_other_ratio_at_once(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], system: str, low: str
) -> None:
    options = ["--system", system, "--set", "ratios=[1.0, 0.5]"]
    assert run("slim", config, *options, "--ratio", "0.75") == 2
    assert "is not trained yet" in capsys.readouterr().err
    assert run("run", config, *options) == 0
    root = in_tmp / "runs" / "small"
    before, log = artefacts(root), (root / "train.jsonl").read_bytes()
    settings = (root / "config.yaml").read_bytes()
    capsys.readouterr()
    for ratio in ("0.2", "1.5", "0", "nan"):
        assert run("slim", root, "--ratio", ratio) == 2
        assert f"from {low} to 1" in capsys.readouterr().err
    assert run("slim", root, "--budget", "60%") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"autoslim slim {root} --ratio 0.5" in error
    assert (root / "config.yaml").read_bytes() == settings
    assert run("slim", root, "--ratio", "0.63", "--ratio", "0.75", "--json") == 0
    shown = capsys.readouterr()
    assert "width 0.63: the same net as width 0.75" in shown.err
    results = json.loads(shown.out)
    assert results == json.loads((root / "results.json").read_text())
    assert [net["budget"] for net in results["subnets"]] == ["width 1", "width 0.75", "width 0.63", "width 0.5"]
    space = ChannelSpace.from_json((root / "space.json").read_text())
    for net in results["subnets"]:
        assert net["macs"] == autoslim.MacCost(space)(space.uniform(net["ratio"]))
        assert 0 <= net["accuracy"]["found"] <= 1
        plain = autoslim.load_subnet(root / "subnets" / net["budget"].replace(" ", "-"))
        assert sum(p.numel() for p in plain.parameters()) == net["params"]
    assert "width 0.63" in (root / "report.html").read_text()
    assert (root / "train.jsonl").read_bytes() == log
    after = artefacts(root)
    assert {key: after[key] for key in before} == before  # nothing of the others was touched
    assert run("run", root) == 0  # it is one of the run's ratios from now on
    assert artefacts(root) == after
    assert run("run", root, "--set", "ratios=[1.0, 0.3]") == (
        2 if system == "us-net" else 0
    )  # another training, or not


def test_an_onnx_file_that_is_gone_is_made_again(config: Path, in_tmp: Path) -> None:
    pytest.importorskip("onnxruntime")
    few = ("--set", "slim.budgets=[80%]", "--set", "train.epochs=1", "--set", "retrain.epochs=1")
    few += ("--set", "retrain.uniform=false", "--set", "export.onnx=true", "--set", "export.report=false")
    assert run("run", config, *few) == 0
    file = in_tmp / "runs" / "small" / "subnets" / "80%" / "model.onnx"
    before = file.stat().st_mtime_ns
    assert run("export", "runs/small") == 0
    assert file.stat().st_mtime_ns == before
    file.unlink()
    assert run("export", "runs/small") == 0
    assert file.exists()


@pytest.mark.parametrize("system", ["autoslim", "us-net"])
def test_files_of_a_net_that_are_gone_are_made_again(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], system: str
) -> None:
    options = ["--system", system, "--set", "ratios=[1.0, 0.5]"]
    assert run("run", config, *options) == 0
    root = in_tmp / "runs" / "small"
    name = "50%" if system == "autoslim" else "width-0.5"
    before = artefacts(root)
    for file in ("widths.json", "model.safetensors"):
        path = root / "subnets" / name / file
        content = path.read_bytes()
        path.write_bytes(content[:20])
        if file == "widths.json" or system == "autoslim":
            assert run("run", root) == 2
            assert "delete it to compute it again" in capsys.readouterr().err
        path.unlink()
        assert run("run", root) == 0
        assert path.read_bytes() == content
    after = artefacts(root)
    assert {key: after[key] for key in before if key != "train"} == {k: v for k, v in before.items() if k != "train"}
    shutil.copy(root / "config.yaml", in_tmp / "again.yaml")  # a configuration like any other
    assert run("inspect", in_tmp / "again.yaml") == 0


def test_an_image_alone_in_a_batch_is_refused_where_batchnorm_cannot_do_with_it(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp / "pooled.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "    nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))\n"
    )
    pooled = ("--set", "model=pooled.py:net", "--set", "model_args={}", "--set", "slim.budgets=[60%]")
    for options, named in (
        (["train.batch_size=1"], "train.batch_size=1 leaves an image alone in a batch: "),
        (["retrain.batch_size=1"], "retrain.batch_size=1 leaves an image alone"),
        (["slim.images=3", "slim.batch_size=2"], "slim.batch_size=2 for 3 images leaves an image alone"),
    ):
        error = fails(capsys, "run", config, *pooled, *(part for each in options for part in ("--set", each)))
        assert named in error
        assert "Expected more than 1 value per channel" in error
        assert not (in_tmp / "runs" / "small" / "supernet").exists()


def test_a_path_that_the_terminal_cannot_show_is_no_failure(config: Path, in_tmp: Path) -> None:
    root = in_tmp / "naïve ü"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(autoslim.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "autoslim", "run", str(config), "--run-dir", str(root)],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"na\\xefve" in done.stdout


@pytest.mark.parametrize("system", ["i-net", "s-net", "shared-bn", "autoslim"])
def test_systems_of_fixed_widths_refuse_other_ratios_and_budgets(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], system: str
) -> None:
    assert run("slim", config, "--system", system, "--ratio", "0.5") == 2
    assert f"slim --ratio: system {system}" in capsys.readouterr().err
    if system != "autoslim":
        assert run("slim", config, "--system", system, "--budget", "60%") == 2
        assert f"slim --budget: system {system} searches nothing" in capsys.readouterr().err
    assert not (in_tmp / "runs").exists()


def test_each_switch_of_an_s_net_becomes_an_onnx_file(config: Path, in_tmp: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert run("run", config, "--system", "s-net", *RATIOS, "--set", "export.onnx=true", "--set", "train.epochs=1") == 0
    root = in_tmp / "runs" / "small"
    files = [root / "subnets" / f"width-{ratio}" / "model.onnx" for ratio in ("0.25", "0.5", "1")]
    sizes = [file.stat().st_size for file in files]
    assert sizes == sorted(set(sizes))


def test_a_net_at_a_ratio_is_what_the_system_makes_it(config: Path, in_tmp: Path) -> None:
    for system in ("s-net", "i-net"):
        assert run("run", config, "--system", system, "--set", "ratios=[1.0]", "--run-dir", system) == 0
    accuracies = [
        json.loads((in_tmp / s / "results.json").read_text())["subnets"][0]["accuracy"] for s in ("s-net", "i-net")
    ]
    assert accuracies[0]["found"] == accuracies[1]["retrained"]  # one switch, full width: an ordinary training


def test_the_nets_found_may_be_retrained_jointly(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("run", config, "--set", "retrain.jointly=true") == 0
    root = in_tmp / "runs" / "small"
    stages = {json.loads(line)["stage"] for line in (root / "train.jsonl").read_text().splitlines()}
    assert stages == {"supernet", "retrained jointly", "uniform jointly"}
    with_two = (root / "joint" / "retrained" / "model.safetensors").read_bytes()
    both = autoslim.load_subnet(root / "joint" / "retrained")
    assert isinstance(both, autoslim.SwitchableNet)
    images = torch.randn(3, 1, 12, 12)
    for budget, directory in (("50%", "50%"), ("params=30%", "params-30%")):
        plain = autoslim.load_subnet(root / "subnets" / directory)
        assert torch.allclose(plain(images), both(images, budget), atol=1e-5)
    assert all(
        0 <= net["accuracy"]["uniform"] <= 1 for net in json.loads((root / "results.json").read_text())["subnets"]
    )
    # one that comes later shares their weights: all are trained anew, also after a kill between two of them
    assert run("slim", root, "--budget", "70%") == 0
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_switch_of", None)
        with pytest.raises(TypeError):
            run("run", root)
    assert "retrained jointly: anew with all budgets, for what was trained lacks 70%" in capsys.readouterr().err
    assert run("run", root) == 0
    assert "jointly" not in capsys.readouterr().err
    assert (root / "joint" / "retrained" / "model.safetensors").read_bytes() != with_two
    three = autoslim.load_subnet(root / "joint" / "retrained")
    results = json.loads((root / "results.json").read_text())["subnets"]
    assert [net["budget"] for net in results] == list(three.switches) == ["70%", "50%", "params=30%"]
    for net in results:
        plain = autoslim.load_subnet(root / "subnets" / net["budget"].replace("=", "-"))
        assert torch.allclose(plain(images), three(images, net["budget"]), atol=1e-5)
        assert 0 <= net["accuracy"]["retrained"] <= 1
    # fewer ask for nothing; another one in the place of one does, and what a kill left of other switches is no use
    assert run("run", config, "--set", "retrain.jointly=true") == 0
    assert "jointly: anew" not in capsys.readouterr().err
    checkpoint = root / "joint" / "retrained" / "checkpoint.safetensors"
    tensors, _ = load_tensors(root / "joint" / "retrained" / "model.safetensors")
    save_tensors(checkpoint, tensors, {"epoch": 1, "switches": {"70%": {}}})
    assert run("run", config, "--set", "retrain.jointly=true", "--set", "slim.budgets=[50%, 60%]") == 0
    assert "lacks 60%" in capsys.readouterr().err
    assert not checkpoint.exists()


def test_exchanges_and_the_rule_of_the_search_are_options(config: Path, in_tmp: Path) -> None:
    assert run("run", config, "--set", "slim.rule=score-per-cost", "--set", "slim.exchange=true") == 0
    root = in_tmp / "runs" / "small"
    space = ChannelSpace.from_json((root / "space.json").read_text())
    for net in json.loads((root / "results.json").read_text())["subnets"]:
        scores = [exchange["score"] for exchange in net.get("exchanges", [])]
        assert scores == sorted(scores)
        widths = json.loads((root / "subnets" / net["budget"].replace("=", "-") / "widths.json").read_text())
        assert autoslim.MacCost(space)(widths) == net["macs"]
    assert net["params"] <= 0.3 * autoslim.ParamCost(space)(space.full())


def test_exchanges_made_before_a_kill_are_not_searched_again(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--set", "slim.exchange=true", "--set", "slim.budgets=[50%]", "--set", "slim.rule=score-per-cost"]

    class Killed(BaseException):
        pass

    def always(space: ChannelSpace, judge: Any, cost: Any, widths: Widths, limit: float) -> Any:
        """Three exchanges of any worth: what is tested is that they are kept."""
        for number in range(made[0], 3):
            moves = [
                slim.Exchange(wider, narrower, after, cost(after), float(number))
                for wider in space.groups
                for narrower in (None, *space.groups)
                if narrower != wider
                and (after := space.widened(widths, wider)) is not None
                and (narrower is None or (after := space.narrowed(after, narrower)) is not None)
                and cost(after) <= limit
            ]
            widths = moves[number % len(moves)].widths
            made[0] += 1
            yield moves[number % len(moves)]
            if made[0] == stop:
                raise Killed

    monkeypatch.setattr(pipeline, "exchange_bins", always)
    made, stop = [0], 0
    assert run("run", config, *options) == 0
    whole = artefacts(in_tmp / "runs" / "small")
    metrics = whole["subnets/50%/metrics.json"]
    assert len(metrics["exchanges"]) == 3

    made, stop = [0], 2
    with pytest.raises(Killed):
        run("run", config, *options, "--run-dir", in_tmp / "killed")
    log = in_tmp / "killed" / "subnets" / "50%" / "exchange.jsonl"
    assert _lines(log) == 2
    stop = 0
    assert run("run", in_tmp / "killed") == 0
    assert made == [3]  # the third alone was searched
    assert artefacts(in_tmp / "killed") == whole
    page = (in_tmp / "killed" / "report.html").read_text()
    assert "Exchanges" in page

    (log.parent / "metrics.json").unlink()
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[1], lines[1], lines[1]]) + "\n")
    assert run("run", in_tmp / "killed") == 2
    assert "exchange.jsonl, line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--system", "s-nets"], "no system 's-nets'; did you mean 's-net'?"),
        (["--system", "S-Net"], "no system 'S-Net'; did you mean 's-net'?"),
        (["--system", "US_Net"], "did you mean 'us-net'?"),
        (["--system", "ofa"], "known: autoslim, i-net"),
        (["--system", "us-net", "--set", "ratios=[1.0, 0.1]"], "space.min_ratio"),
        (["--system", "us-net", "--set", "ratios=[1.0, 1.5]"], "ratios"),
        (["--system", "us-net", "--set", "ratios=[1.0, 1.0]"], "twice"),
        (["--system", "s-net", "--set", "ratios=[0.51, 0.5]"], "ratio 0.5 is the same widths as 0.51"),
    ],
)
def test_systems_that_cannot_be_are_refused_before_anything_runs(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run("run", config, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error:")
    assert message in error
    assert not (in_tmp / "runs" / "small" / "supernet").exists()


IMAGENET = sorted((Path(__file__).parent.parent / "configs" / "imagenet").glob("*.yaml"))


@pytest.mark.parametrize("recipe", IMAGENET, ids=lambda path: path.stem)
def test_the_imagenet_recipes_run_on_a_small_folder_of_that_shape(
    recipe: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("val", 4)):
        for name in ("n01440764", "n02102040", "n03000684"):
            folder = in_tmp / "imagenet" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (72, 80, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{name}_{index}.JPEG")
    small = ["model_args.num_classes=3", "data.image_size=64", "data.holdout=12", "slim.budgets=[99%, 98%]"]
    small += ["train.epochs=1", "train.batch_size=8", "retrain.epochs=1", "retrain.batch_size=8"]
    small += ["slim.images=12", "calibration_images=12", "export.onnx=false", "threads=1"]
    assert run("run", recipe, "--json", *(part for text in small for part in ("--set", text))) == 0
    results = json.loads(capsys.readouterr().out)
    assert [net["budget"] for net in results["subnets"]] == ["99%", "98%"]
    for net in results["subnets"]:
        assert net["macs"] < 0.99 * results["full"]["macs"]
        assert all(0 <= net["accuracy"][kind] <= 1 for kind in ("supernet", "found", "retrained", "uniform"))
    assert (in_tmp / "runs" / recipe.stem / "report.html").exists()


@pytest.mark.parametrize("recipe", IMAGENET, ids=lambda path: path.stem)
def test_the_budgets_of_the_imagenet_recipes_are_within_reach(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = autoslim.load_config(recipe)
    width = config.model_args.get("width", 1.0)
    budgets = [part for budget in config.slim.budgets for part in ("--budget", budget)]
    assert run("inspect", config.model, "--set", f"model_args.width={width}", *budgets, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["budgets"]) == len(config.slim.budgets)


@pytest.mark.parametrize("before_the_record", [False, True])
def test_a_race_killed_after_any_step_takes_the_same_path(
    config: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, before_the_record: bool
) -> None:
    options = ["--set", "slim.batch_size=30", "--set", "space.bins=6", "--set", "train.epochs=4"]
    assert run("train", config, *options, "--run-dir", "whole") == 0
    shutil.copytree(in_tmp / "whole", in_tmp / "killed")
    assert run("slim", in_tmp / "whole") == 0
    whole = (in_tmp / "whole" / "slim.jsonl").read_text()
    assert min(json.loads(line)["images"] for line in whole.splitlines()) < 150  # there was a race

    def killed(path: Path, record: dict[str, Any]) -> None:
        if not before_the_record:
            append_record(path, record)
        raise RuntimeError("killed")

    def alternately(path: Path, record: dict[str, Any]) -> None:
        nonlocal turns
        turns += 1
        (killed if turns % 3 == 0 else append_record)(path, record)

    turns = 0
    monkeypatch.setattr(pipeline, "append_record", alternately)
    for _ in range(len(whole.splitlines())):
        with contextlib.suppress(RuntimeError):
            assert run("slim", in_tmp / "killed") == 0
            break
    assert (in_tmp / "killed" / "slim.jsonl").read_text() == whole


def test_it_learns_and_the_search_beats_the_supernets_chance(config: Path, in_tmp: Path) -> None:
    assert run("run", config, "--set", "train.epochs=8", "--set", "retrain.epochs=12") == 0
    results = json.loads((in_tmp / "runs/small/results.json").read_text())
    for subnet in results["subnets"]:
        assert subnet["accuracy"]["supernet"] > 0.6  # four classes: chance is 0.25
        assert subnet["accuracy"]["found"] > 0.5
        assert subnet["accuracy"]["retrained"] > 0.6


def test_stage_by_stage_equals_all_in_a_row_and_two_runs_are_equal(config: Path, in_tmp: Path) -> None:
    assert run("run", config, "--run-dir", "whole") == 0
    assert run("train", config, "--run-dir", "steps") == 0
    for stage in ("slim", "retrain", "export", "report"):
        assert run(stage, "steps") == 0
    assert artefacts(in_tmp / "whole") == artefacts(in_tmp / "steps")
    assert run("run", config, "--run-dir", "other", "--set", "seed=1") == 0
    assert artefacts(in_tmp / "whole") != artefacts(in_tmp / "other")


def _killed_when(config: Path, root: Path, moment: Callable[[], bool]) -> None:
    """Start the job in a process of its own and `kill -9` it at a moment."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "autoslim.cli", "run", str(config), "--run-dir", str(root)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    try:
        while not moment():
            assert time.monotonic() < deadline, "the moment to kill it never came"
            assert process.poll() is None, "the job ended before it could be killed"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_at_any_stage_it_ends_in_the_same_result(config: Path, in_tmp: Path) -> None:
    assert run("run", config, "--run-dir", "whole") == 0
    root = in_tmp / "killed"
    _killed_when(config, root, lambda: (root / "supernet" / "checkpoint.safetensors").exists())
    _killed_when(config, root, lambda: _lines(root / "train.jsonl") >= 3)
    _killed_when(config, root, lambda: _lines(root / "slim.jsonl") >= 2)
    with open(root / "slim.jsonl", "a") as file:
        file.write('{"group": "stem.0", "wid')  # what a kill within a write leaves
    _killed_when(config, root, lambda: (root / "subnets/50%/uniform/checkpoint.safetensors").exists())
    (root / "subnets" / ".model.safetensors.77.part").write_bytes(b"half")
    assert run("run", config, "--run-dir", str(root)) == 0
    assert artefacts(root) == artefacts(in_tmp / "whole")
    assert not list(root.rglob("*.part"))


def test_a_finished_run_returns_at_once_with_the_same_results(config: Path, in_tmp: Path) -> None:
    assert run("run", config) == 0
    root = in_tmp / "runs" / "small"
    before = artefacts(root)
    stamp = (root / "supernet/model.safetensors").stat().st_mtime_ns
    assert run("run", config) == 0
    assert artefacts(root) == before
    assert (root / "supernet/model.safetensors").stat().st_mtime_ns == stamp


def test_any_budget_on_the_path_is_taken_without_another_search(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("run", config) == 0
    root = in_tmp / "runs" / "small"
    before, path = artefacts(root), (root / "slim.jsonl").read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patched:  # nothing is loaded, traced or judged
        patched.setattr(pipeline, "prepare", None)
        assert run("slim", root, "--budget", "70%", "--budget", "macs<=60%, params<=80%", "--json") == 0
        taken = json.loads(capsys.readouterr().out)
        assert run("slim", root, "--budget", "70%") == 0  # once more
        assert "70%" in capsys.readouterr().out
        assert run("slim", root, "--budget", "0.7x", "--budget", "macs < 70%") == 0  # the same in other words
        assert capsys.readouterr().out.startswith("70%: ")
        assert not (root / "subnets" / "0.7x").exists()
        assert run("slim", root, "--budget", "memory<=70%, peak_memory<=90%") == 0
        shown = capsys.readouterr().out
        assert "elements of memory" in shown
        assert "bytes of peak memory" in shown
        shutil.rmtree(root / "subnets" / "memory-70%-peak_memory-90%")
        few = 'slim.budgets=["50%", "params=30%"]'
        again = ("--budget", "70%", "--budget", "macs<=60%, params<=80%")
        assert run("slim", root, "--set", few, *again) == 0
        assert "the smallest net of this space" in fails(capsys, "slim", root, "--budget", "1%")
        assert "no metric 'latency'" in fails(capsys, "slim", root, "--budget", "latency=3")
        assert "limits 'macs' twice" in fails(capsys, "slim", root, "--budget", "macs<=3M, macs<=50%")
    space = ChannelSpace.from_json((root / "space.json").read_text())
    macs, params = autoslim.MacCost(space), autoslim.ParamCost(space)
    steps = [json.loads(line) for line in path.splitlines()]
    for metrics, directory in zip(taken, ("70%", "macs-60%-params-80%"), strict=True):
        widths = Widths.from_json((root / "subnets" / directory / "widths.json").read_text())
        assert metrics == json.loads((root / "subnets" / directory / "metrics.json").read_text())
        assert (metrics["macs"], metrics["params"]) == (macs(widths), params(widths))
        assert metrics["accuracy"]["held_out"] == steps[metrics["steps"] - 1]["accuracy"]
    assert taken[0]["macs"] <= 0.7 * macs(space.full()) < steps[taken[0]["steps"] - 2]["cost"]
    assert taken[1]["params"] <= 0.8 * params(space.full())
    assert run("retrain", root, "--budget", "70%") == 0
    measured = json.loads((root / "subnets" / "70%" / "metrics.json").read_text())["accuracy"]
    assert {"supernet", "held_out", "found", "retrained"} <= measured.keys()
    # it is one of the run's budgets now: the stages go on with it, and change nothing of the others
    for stage in ("slim", "retrain", "report"):
        assert run(stage, root) == 0
    assert (root / "slim.jsonl").read_bytes() == path
    after = artefacts(root)
    assert {key: after[key] for key in before if key != "train"} == {k: v for k, v in before.items() if k != "train"}
    results = json.loads((root / "results.json").read_text())
    assert [net["budget"] for net in results["subnets"]] == ["70%", "macs<=60%, params<=80%", "50%", "params=30%"]
    assert all(0 <= net["accuracy"][kind] <= 1 for net in results["subnets"] for kind in ("found", "retrained"))
    capsys.readouterr()
    assert run("report", config) == 0  # the budgets of the file again
    assert "left out, for slim.budgets does not have it: 70%, macs<=60%, params<=80%;" in capsys.readouterr().err
    assert [net["budget"] for net in json.loads((root / "results.json").read_text())["subnets"]] == [
        "50%",
        "params=30%",
    ]


def test_budgets_that_are_added_do_not_change_the_rule_of_the_search(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A budget with several limits would make "auto" another rule; half a path would be by each."""
    first = ("--set", "slim.budgets=[80%]", "--set", "slim.judge=exhaustive")
    for name in ("one", "other"):
        assert run("train", config, "--run-dir", name, *first) == 0
        assert run("slim", name) == 0
    assert run("slim", "other", "--budget", "macs<=85%, params<=95%") == 0
    for name in ("one", "other"):
        capsys.readouterr()
        assert run("slim", name, "--budget", "30%") == 0
        assert ("by the rule it began with, score" in capsys.readouterr().err) == (name == "other")
    assert (in_tmp / "one/slim.jsonl").read_bytes() == (in_tmp / "other/slim.jsonl").read_bytes()


def test_more_held_out_images_than_there_are_is_said(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", config, "--set", "slim.images=100000", "--set", "train.epochs=1") == 0
    assert run("slim", "runs/small") == 0
    assert "on the 150 images held out, for there are no 100000" in " ".join(capsys.readouterr().err.split())


def test_a_budget_beyond_the_path_continues_the_search(config: Path, in_tmp: Path) -> None:
    budgets = ("--set", "slim.budgets=[80%, 40%]")
    assert run("run", config, "--run-dir", "whole", *budgets) == 0
    assert run("train", config, "--run-dir", "steps", "--set", "slim.budgets=[80%]") == 0
    assert run("slim", "steps") == 0
    shorter = _lines(in_tmp / "steps/slim.jsonl")
    assert run("slim", "steps", "--budget", "40%") == 0
    assert _lines(in_tmp / "steps/slim.jsonl") > shorter
    assert run("run", "steps") == 0
    assert artefacts(in_tmp / "steps") == artefacts(in_tmp / "whole")


def test_without_its_log_a_search_is_done_again(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("run", config, "--set", "retrain.uniform=false") == 0
    root = in_tmp / "runs" / "small"
    log, before = root / "slim.jsonl", artefacts(root)
    log.unlink()
    capsys.readouterr()
    with monkeypatch.context() as patched:  # killed before its first step
        patched.setattr(pipeline, "greedy_slim", None)
        with pytest.raises(TypeError):
            run("run", root)
    assert f"search: done again, for {Path('runs/small/slim.jsonl')} is gone" in capsys.readouterr().err.replace(
        str(in_tmp) + os.sep, ""
    )
    assert run("run", root) == 0
    assert artefacts(root) == before
    assert run("slim", root, "--budget", "70%") == 0
    # of another net than the one found then nothing is left
    directory = root / "subnets" / "50%"
    space = ChannelSpace.from_json((root / "space.json").read_text())
    (directory / "widths.json").write_text(space.smallest().to_json())
    log.unlink()
    assert run("slim", root) == 0
    assert "50% is another net than before; what was made of that is removed" in capsys.readouterr().err
    assert sorted(path.name for path in directory.iterdir()) == ["metrics.json", "widths.json"]
    assert log.read_bytes() == before["path"]
    assert run("run", config, "--set", "retrain.uniform=false") == 0
    after = artefacts(root)
    assert all(after[key] == before[key] for key in before if key != "train")


def test_every_stage_prints_json(config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str) -> Any:
        capsys.readouterr()
        assert run(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    root = in_tmp / "runs" / "small"
    one = ("--set", "slim.budgets=[80%]")
    trained = printed("train", config, *one)
    assert trained["full"] == json.loads((root / "supernet" / "metrics.json").read_text())
    assert (trained["directory"], trained["subnets"]) == ("runs/small", [])
    (found,) = printed("slim", root)["subnets"]
    assert (found["budget"], found["accuracy"]["retrained"]) == ("80%", None)
    (net,) = printed("retrain", root)["subnets"]
    assert net["accuracy"] == found["accuracy"] | {
        kind: net["accuracy"][kind] for kind in ("retrained", "uniform") if net["accuracy"][kind] >= 0
    }
    (seeded,) = printed("retrain", root, "--seed", "7")["subnets"]
    assert (seeded["seed"], set(seeded["accuracy"])) == (7, {"retrained", "uniform"})
    assert printed("export", root)["subnets"][0]["latency_ms"] > 0
    results = printed("report", root)
    assert results == json.loads((root / "results.json").read_text())
    # one on the path and one beyond, and the same line whether the search went on or not
    taken = printed("slim", root, "--budget", "90%", "--budget", "40%")
    assert [net["budget"] for net in taken] == ["90%", "40%"]
    assert taken[0].keys() == taken[1].keys()
    assert taken[1]["accuracy"].keys() - taken[0]["accuracy"].keys() == {"found"}
    assert run("slim", root, "--budget", "25%") == 0
    line = capsys.readouterr().out
    assert re.fullmatch(r"25%: \S+ MACs, \S+ params, \S+% on held-out images; \d+ steps along .*/25%\n", line)


def test_joint_budgets_run_and_hold(config: Path, in_tmp: Path) -> None:
    texts = ["macs<=80%, memory<=60%", "macs<=50%, params<=60%"]
    assert run("run", config, "--set", f"slim.budgets={json.dumps(texts)}", "--set", "retrain.uniform=false") == 0
    results = json.loads((in_tmp / "runs/small/results.json").read_text())
    assert [net["budget"] for net in results["subnets"]] == texts
    full = results["full"]
    for net, limits in zip(
        results["subnets"], ({"macs": 0.8, "memory": 0.6}, {"macs": 0.5, "params": 0.6}), strict=True
    ):
        assert all(net[metric] <= share * full[metric] for metric, share in limits.items())


def test_a_latency_budget_is_measured_before_training_and_beside_the_result(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOSLIM_CACHE", str(in_tmp / "cache"))
    few = ("--set", "latency.nets=4")
    with monkeypatch.context() as patched:
        patched.setattr(inspection, "measure_latency_table", None)  # calling it would be a TypeError
        text = "slim.budgets=['latency_ms<=50%, params<=1%']"
        assert "budget 'params<=1%'" in fails(capsys, "run", config, *few, "--set", text)
    assert "cannot be reached" in fails(capsys, "run", config, *few, "--set", "slim.budgets=[latency_ms<=0.0001]")
    assert not (in_tmp / "runs/small/supernet").exists()
    assert len(list((in_tmp / "cache").rglob("*.csv"))) == 1  # measured here; a table of other times from here on
    net = build_model(NET)
    space = autoslim.trace(net, torch.zeros(1, 1, 16, 16)).with_choices(4, 4, 0.25)
    invented(space, 30).save(in_tmp / "phone.csv")
    texts = json.dumps(["macs<=60%, latency_ms<=70%"])
    few = ("--set", "latency.table=phone.csv")
    assert run("run", config, *few, "--set", f"slim.budgets={texts}", "--json") == 0
    root = in_tmp / "runs" / "small"
    results = json.loads(capsys.readouterr().out)
    assert results["latency"] == {"runtime": "torch", "threads": 1}
    (net,) = results["subnets"]
    assert net["macs"] <= 0.6 * results["full"]["macs"]
    assert net["latency_predicted_ms"] <= 0.7 * results["full"]["latency_predicted_ms"] + 1e-4
    assert net["latency_ms"] > 0
    assert net["latency_spread_ms"] >= 0
    space = ChannelSpace.from_json((root / "space.json").read_text())
    cost = autoslim.LatencyCost(space, autoslim.LatencyTable.load(root / "latency.csv"))
    widths = Widths.from_json((root / "subnets" / "macs-60%-latency_ms-70%" / "widths.json").read_text())
    assert net["latency_predicted_ms"] == pytest.approx(cost(widths), abs=1e-4)
    assert "predicted" in (root / "report.html").read_text()
    # the table lies in the run: another budget needs no measurement, and none of torch
    monkeypatch.setattr(pipeline, "prepare", None)
    assert run("slim", root, "--budget", "latency_ms<=80%") == 0
    for text in ("macs<=60%, latency_ms<=70%", "latency_ms < 0.7x, 0.6x"):  # in any spelling
        assert run("latency", root, "--budget", text, "--json") == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["net"] == "found for macs<=60%, latency_ms<=70%"


def test_the_latency_of_a_run_is_by_the_table_that_is_asked_for(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOSLIM_CACHE", str(in_tmp / "cache"))
    space = autoslim.trace(build_model(NET), torch.zeros(1, 1, 16, 16)).with_choices(4, 4, 0.25)
    of_the_run = dataclasses.replace(invented(space, 30), about={"runtime": "torch", "threads": "1"})
    calls: list[tuple[str, int]] = []

    def measured(*_: object, runtime: str, threads: int, **__: object) -> LatencyTable:
        calls.append((runtime, threads))
        return of_the_run if not calls[1:] else dataclasses.replace(of_the_run, about={"runtime": runtime})

    monkeypatch.setattr(inspection, "measure_latency_table", measured)
    assert run("train", config, "--set", "slim.budgets=[latency_ms<=80%]") == 0
    root = in_tmp / "runs" / "small"
    assert calls == [("torch", 1)]

    def predicted(*options: str) -> float:
        capsys.readouterr()
        assert run("latency", root, "--json", *options) == 0
        return json.loads(capsys.readouterr().out)["predicted_ms"]

    own = predicted()
    LatencyTable(tuple(dataclasses.replace(row, ms=3 * row.ms) for row in of_the_run.rows)).save("phone.csv")
    assert predicted("--table", "phone.csv") == pytest.approx(3 * own, rel=1e-3)
    assert predicted("--set", "latency.table=phone.csv") == pytest.approx(3 * own, rel=1e-3)
    assert "leave one of the two out" in fails(capsys, "latency", root, "--table", "phone.csv", "--fresh")
    assert predicted("--threads", "1", "--runtime", "torch") == own
    assert len(calls) == 1  # until here everything was there
    predicted("--fresh")
    predicted("--threads", "2")
    assert calls[1:] == [("torch", 1), ("torch", 2)]
    assert run("latency", root, "--table", "phone.csv", "--top", "1") == 0
    assert capsys.readouterr().out.endswith("table: given; measured end to end: runtime torch, threads 1\n")
    assert run("latency", root, "--top", "1") == 0
    assert capsys.readouterr().out.endswith("table: runtime torch, threads 1\n")


def test_widths_may_be_those_at_which_latency_steps_down(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = autoslim.trace(build_model(NET), torch.zeros(1, 1, 16, 16)).with_choices("size:1", 2, 0.25)
    table = invented(space, 30)
    stepped = [dataclasses.replace(row, ms=0.1 * math.prod(-(-w // 8) for w in row.widths)) for row in table.rows]
    LatencyTable(tuple(stepped)).save(in_tmp / "steps.csv")
    options = ("--set", "space.bins=measured", "--set", "space.divisor=2", "--set", "latency.table=steps.csv")
    assert run("run", config, *options, "--set", "slim.budgets=[latency_ms<=80%]", "--json") == 0
    chosen = ChannelSpace.from_json((in_tmp / "runs/small/space.json").read_text())
    assert all(len(group.choices) < len(space.groups[name].choices) for name, group in chosen.groups.items())
    (net,) = json.loads(capsys.readouterr().out)["subnets"]
    full = autoslim.LatencyCost(chosen, LatencyTable.load(in_tmp / "runs/small/latency.csv"))(chosen.full())
    assert net["latency_predicted_ms"] <= 0.8 * full + 1e-4


def test_retraining_can_start_from_the_supernet_and_learn_from_it(config: Path, in_tmp: Path) -> None:
    options = ("--set", "retrain.init=supernet", "--set", "retrain.distill=0.5", "--set", "retrain.uniform=false")
    assert run("run", config, *options) == 0
    results = json.loads((in_tmp / "runs/small/results.json").read_text())
    for subnet in results["subnets"]:
        assert subnet["accuracy"]["uniform"] is None
        assert subnet["uniform"] is None
    lines = [json.loads(line) for line in (in_tmp / "runs/small/train.jsonl").read_text().splitlines()]
    losses = {line["stage"]: line["losses"] for line in lines if line["epoch"] == 1}
    assert set(losses) == {"supernet", "retrained 50%", "retrained params=30%"}


def test_bf16_and_channels_last_run(config: Path, in_tmp: Path) -> None:
    options = [
        f"--set={stage}.{key}" for stage in ("train", "retrain") for key in ("autocast=bf16", "channels_last=true")
    ]
    assert run("run", config, *options, "--set", "slim.score=accuracy") == 0
    results = json.loads((in_tmp / "runs/small/results.json").read_text())
    assert results["subnets"][0]["accuracy"]["retrained"] > 0.25


# --- mistakes: one line, exit code 2, nothing lost ---------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake gets."""
    capsys.readouterr()
    assert run(*arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model=torchvision:resnet51", "did you mean"),
        ("model=autoslim:mobilenet_v3", "did you mean"),
        ("model=resnet50", "torchvision:resnet50"),
        ("model=tests/nowhere.py:net", "no Python file"),
        ("model=NET_FILE:nett", "did you mean 'net'"),
        ("model=NET_FILE:NUMBER", "no function"),
        ("model=NET_FILE:not_a_module", "gives str"),
        ("model=NET_FILE:crashes", "the weights are on the other disk"),
        ("model=NET_FILE:only_linear", "nothing in Sequential can be slimmed"),
        ("model=NET_FILE:auxiliary", "gives tuple in training mode; a run needs logits of shape (images, classes)"),
        ("model=NET_FILE:broken", "does not run in training mode: ValueError: the second teacher is missing ("),
        ("model_args.chanels=8", "did you mean 'channels'"),
        ("model_args.classes=7", "7 outputs and the data has 4 classes"),
        ("space.fixed=[blocs.*]", "did you mean"),
        ("space.min_ratio=0", "greater than 0"),
        ("space.bins=0", "bins must be a number of at least 1, 'size:16'"),
        ("space.bins=paperr", "got 'paperr'"),
        ("slim.budgets=[50%, 3Q]", "no unit 'Q'"),
        ("slim.budgets=[latncy=3]", "no metric 'latncy'"),
        ("latency.runtime=onxruntime", "did you mean 'onnxruntime'"),
        ("latency.table=nowhere.csv", "nowhere.csv cannot be read"),
        ("space.bins=12.5", "got '12.5' (or 'measured')"),
        ("space.bins=[8]", "space.bins must be a number of at least 1, 'size:16'"),
        ("slim.budgets=[50%, 0.5x]", "'0.5x' and '50%' are the same; keep one"),
        ("latency.table=nowhere.csv --set slim.budgets=[latency_ms<=50%]", "nowhere.csv cannot be read"),
        ("slim.budgets=[latency=8]", "did you mean 'latency_ms'"),
        ("slim.budgets=[latency_ms<=8s]", "latency_ms is in milliseconds"),
        ("slim.budgets=['macs<=50%, params<=1%']", "the smallest net of this space has"),
        ("slim.budgets=['macs<=50%, macs<=30%']", "limits 'macs' twice"),
        ("slim.budgets=['macs<=50M, params<=90M']", "within all of its limits"),
        ("slim.budgets=[1%]", "the smallest net of this space has"),
        ("slim.budgets=[900M]", "above the full net"),
        ("train.epoch=3", "did you mean 'epochs'"),
        ("trian.epochs=3", "did you mean 'train'"),
        ("train.lr=fast", "train.lr"),
        ("data.source=fashion-mnist-minni", "did you mean"),
        ("data.augment=flipp", "did you mean 'flip'"),
        ("device=cuda:99", "cannot be used"),
        ("train.batch_size=5000", "smaller batch"),
    ],
)
def test_a_mistake_is_found_before_training(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], setting: str, expected: str
) -> None:
    setting = setting.replace("NET_FILE", str(Path(__file__).parent / "small_net.py"))
    settings = [part for text in setting.split(" --set ") for part in ("--set", text)]
    assert expected in fails(capsys, "run", str(config), *settings)
    assert not (in_tmp / "runs/small/supernet").exists()
    assert not (in_tmp / "runs/small/config.yaml").exists()  # nothing stands in the way of the mended one


def test_before_anything_is_computed_the_configuration_may_change(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, "train", config, "--set", "train.batch_size=5000")
    fails(capsys, "train", config, "--set", "train.lr=1e30")  # within its first epoch
    assert run("train", config) == 0
    assert yaml.safe_load((in_tmp / "runs/small/config.yaml").read_text())["train"]["batch_size"] == 50


def test_nothing_of_a_failed_start_is_taken_for_the_run_that_follows(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = autoslim.trace(build_model(NET), torch.zeros(1, 1, 16, 16)).with_choices(4, 4, 0.25)
    table = invented(space, 30)
    table.save("a.csv")
    LatencyTable(tuple(dataclasses.replace(row, ms=2 * row.ms) for row in table.rows)).save("b.csv")
    few = ("--set", "slim.budgets=[latency_ms<=80%]", "--set", "train.epochs=1", "--set", "export.report=false")
    root = in_tmp / "runs" / "small"

    def failed() -> None:
        fails(capsys, "train", config, *few, "--set", "latency.table=a.csv", "--set", "train.lr=1e30")
        (root / "train.jsonl").write_text('{"stage": "plain", "epoch": 1, "losses": {}, "seconds": 1.0}\n')

    failed()
    stale = (root / "data.json").read_text()
    other = ("--set", "latency.table=b.csv", "--set", "data.holdout=100")
    assert run("train", config, *few, *other) == 0
    assert (root / "latency.csv").read_text() == Path("b.csv").read_text()
    assert '"plain"' not in (root / "train.jsonl").read_text()
    assert json.loads((root / "data.json").read_text())["images"]["holdout"] == 100
    assert run("slim", root) == 0  # the images are those of the run
    assert json.loads(stale)["images"]["holdout"] == 150
    shutil.rmtree(root)
    failed()
    assert run("train", config, "--set", "train.epochs=1", "--set", "data.image_size=12") == 0
    assert json.loads((root / "data.json").read_text())["image_shape"] == [1, 12, 12]
    assert not (root / "latency.csv").exists()  # another budget would be taken by it


@pytest.mark.parametrize("kept", ["slim.jsonl", "subnets"])
def test_without_its_supernet_a_run_is_still_that_of_its_configuration(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], kept: str
) -> None:
    few = ("--set", "slim.budgets=[80%]", "--set", "train.epochs=1")
    assert run("train", config, *few) == 0
    root = in_tmp / "runs" / "small"
    assert run("slim", root) == 0
    before = artefacts(root)
    shutil.rmtree(root / "supernet")
    if kept == "slim.jsonl":
        shutil.rmtree(root / "subnets")
    else:
        (root / "slim.jsonl").unlink()
    error = fails(capsys, "run", config, *few, "--set", "train.lr=0.3", "--set", "retrain.epochs=5")
    assert "train.lr is 0.05 there and 0.3 now, retrain.epochs is 2 there and 5 now" in error
    assert run("train", root) == 0
    assert run("slim", root) == 0
    assert artefacts(root) == before


@pytest.mark.parametrize("provenance", ["", "provenance:\n  version: 0.1.0\n", "provenance:\n"])
def test_a_run_is_summed_up_without_knowing_who_made_it(config: Path, in_tmp: Path, provenance: str) -> None:
    few = ("--set", "train.epochs=1", "--set", "slim.budgets=[80%]", "--set", "retrain.uniform=false")
    assert run("run", config, *few, "--set", "retrain.epochs=1", "--set", "export.report=false") == 0
    path = in_tmp / "runs" / "small" / "config.yaml"
    settings = path.read_text().replace("report: false", "report: true").partition("provenance:")[0]
    path.write_text(settings + provenance)
    assert run("report", path.parent) == 0
    page = (path.parent / "report.html").read_text()
    assert "<dt>Model</dt>" in page
    assert "<dt>Machine</dt>" not in page


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("double", "does not run: RuntimeError: "),
        ("double", "; its weights are torch.float64 and images float32: return model.float()"),
        ("half", "; its weights are torch.float16 and images float32: return model.float()"),
        ("meta", "has weights on the meta device, which are shapes without numbers"),
        ("leaves", "cannot be built: SystemExit: 0 ("),
        ("left", "sys.exit() was called by code that autoslim runs: SystemExit: 0 ("),
    ],
)
def test_models_that_cannot_be_run_are_one_line(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], name: str, expected: str
) -> None:
    (in_tmp / "odd.py").write_text(
        "import sys, torch\nfrom small_net import Net\n"
        "def double(): return Net(16, 4).double()\n"
        "def half(): return Net(16, 4).half()\n"
        "def meta():\n    with torch.device('meta'): return Net(16, 4)\n"
        "def leaves(): sys.exit(0)\n"
        "class Left(Net):\n    def forward(self, x): return super().forward(x) if x.is_meta else sys.exit(0)\n"
        "def left(): return Left(16, 4)\n"
        "class Casts(Net):\n    def forward(self, x): return super().forward(x.double()).float()\n"
        "def casts(): return Casts(16, 4).double()\n"
    )
    assert expected in fails(capsys, "train", config, "--set", f"model=odd.py:{name}")
    assert not (in_tmp / "runs/small/config.yaml").exists()
    assert run("inspect", f"odd.py:{name}", "--input", "1,1,16,16") == (2 if name == "leaves" else 0)
    if name == "double":  # one that casts its images may be of any type
        assert run("train", config, "--set", "model=odd.py:casts", "--set", "train.epochs=1") == 0


def test_a_loss_that_is_not_a_number_stops_with_the_step_and_keeps_the_checkpoint(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no epoch was finished" in fails(capsys, "train", config, "--run-dir", "bad", "--set", "train.lr=1e30")
    # an epoch that works, then one that does not
    real = pipeline.training_step

    def poisoned(*arguments: Any) -> Any:
        step, calls = real(*arguments), 0

        def wrapped(*inputs: Any) -> Any:
            nonlocal calls
            calls += 1
            return step(*inputs) if calls <= 12 else {"widest": float("nan")}

        return wrapped

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "training_step", poisoned)
        error = fails(capsys, "train", config)
    assert "step 4 of epoch 2" in error
    assert "the last good checkpoint is" in error
    assert (in_tmp / "runs/small/supernet/checkpoint.safetensors").exists()
    assert run("train", config) == 0


def test_a_directory_of_another_configuration_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], in_tmp: Path
) -> None:
    assert run("train", config) == 0
    error = fails(capsys, "run", config, "--set", "train.lr=0.3")
    assert "train.lr is 0.05 there and 0.3 now" in error
    (in_tmp / "full").mkdir()
    (in_tmp / "full" / "thesis.tex").write_text("do not touch")
    assert "is no run directory" in fails(capsys, "run", config, "--run-dir", "full")
    assert (in_tmp / "full" / "thesis.tex").read_text() == "do not touch"
    assert "is no run directory" in fails(capsys, "slim", "full")
    assert "first run `autoslim slim`" in fails(capsys, "retrain", "runs/small")


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_checkpoint_is_named(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], damage: bytes | None
) -> None:
    assert run("train", config) == 0
    path = in_tmp / "runs/small/supernet/model.safetensors"
    path.write_bytes(path.read_bytes()[:-50] if damage is None else damage)
    error = fails(capsys, "slim", "runs/small")
    assert str(path.relative_to(in_tmp)) in error
    assert "damaged" in error
    path.unlink()
    (path.parent / "metrics.json").unlink()
    assert run("train", "runs/small") == 0


def test_a_damaged_search_log_is_named(config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", config) == 0
    assert run("slim", "runs/small") == 0
    log = in_tmp / "runs/small/slim.jsonl"
    for path in (in_tmp / "runs/small/subnets").rglob("metrics.json"):
        path.unlink()
    good = log.read_text()
    log.write_text(good.replace('{"group": "', '{"group": "x', 1))
    assert "line 1 does not follow" in fails(capsys, "slim", "runs/small")
    log.write_text(good.replace('{"group"', '{"grup"', 1))
    assert "line 1 is damaged: 'group'" in fails(capsys, "slim", "runs/small")
    log.write_text("not json\n" + good)
    assert "line 1 is damaged" in fails(capsys, "slim", "runs/small")
    log.write_text(good)
    assert run("slim", "runs/small") == 0


def test_a_full_disk_loses_nothing(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("run", config, "--run-dir", "whole") == 0
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 14:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        error = fails(capsys, "run", config, "--run-dir", "again")
    assert "No space left on device" in error
    assert "free some space" in error
    assert run("run", config, "--run-dir", "again") == 0
    assert artefacts(in_tmp / "again") == artefacts(in_tmp / "whole")


def test_two_processes_do_not_share_a_run_directory(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from autoslim.run import exclusive

    with exclusive(in_tmp / "runs" / "small"):
        assert "in use by another autoslim process" in fails(capsys, "run", config)
    assert run("train", config) == 0


def test_a_missing_extra_is_named_before_training(
    config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "has_onnx", lambda: False)
    assert "autoslim[onnx]" in fails(capsys, "run", config, "--set", "export.onnx=true")
    monkeypatch.setattr(pipeline, "has_plotly", lambda: False)
    assert "autoslim[report]" in fails(capsys, "run", config, "--run-dir", "b", "--set", "export.report=true")
    assert not (in_tmp / "runs/small/supernet").exists()


def test_the_test_images_are_never_seen_before_the_figures(
    config: Path, in_tmp: Path, shapes_npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search and training give the same nets when the test images are noise."""
    import numpy as np

    assert run("run", config) == 0
    arrays = dict(np.load(shapes_npz))
    arrays["x_test"] = np.random.default_rng(1).integers(0, 255, arrays["x_test"].shape).astype(np.uint8)
    other = in_tmp / "noise.npz"
    np.savez(other, **arrays)
    assert run("run", config, "--run-dir", "noise", "--set", f"data.source={other}") == 0
    before, after = artefacts(in_tmp / "runs/small"), artefacts(in_tmp / "noise")
    same = [key for key in before if not key.endswith("metrics.json")]
    assert all(before[key] == after[key] for key in same)
    assert before["supernet/metrics.json"] != after["supernet/metrics.json"]


def test_a_cut_net_gives_the_accuracy_that_was_reported(config: Path, in_tmp: Path) -> None:
    assert run("run", config) == 0
    root = in_tmp / "runs/small"
    from autoslim.data import Batches, load_data

    source = yaml.safe_load(config.read_text())["data"]["source"]
    data = load_data(source, holdout=150, seed=0)
    batches = Batches(data.test, 64, mean=data.mean, std=data.std)
    for subnet in json.loads((root / "results.json").read_text())["subnets"]:
        net = autoslim.load_subnet(root / "subnets" / subnet["budget"].replace("=", "-"))
        assert autoslim.evaluate(net, batches) == pytest.approx(subnet["accuracy"]["retrained"], abs=1e-9)
        assert not any(parameter.is_meta for parameter in net.parameters())
        assert torch.get_num_threads() == 1
