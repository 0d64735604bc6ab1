"""Pretrained weights: what fits is loaded, what does not is said; a run starts from them, sorted."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autoslim
import small_net
from autoslim import load_pretrained, pretrained
from autoslim.cli import main
from autoslim.config import Config
from autoslim.errors import ConfigError
from test_pipeline import NET, artefacts


def trained(classes: int = 7, channels: int = 16) -> nn.Module:
    """A net whose tensors all differ from fresh ones."""
    torch.manual_seed(1)
    net = small_net.net(channels, classes)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return net.eval()


def test_a_small_head_of_another_size_stays_as_it_was() -> None:
    source, net = trained(classes=7), small_net.net(classes=4)
    with torch.no_grad():
        net.head.weight.mul_(0.01 / net.head.weight.std())
    head = net.head.weight.clone()
    loaded = load_pretrained(net, source.state_dict())
    assert loaded.classes == (7, 4)
    assert loaded.reinitialised == ("head.weight", "head.bias")
    assert torch.equal(net.head.weight, head)
    assert all(
        torch.equal(tensor, net.state_dict()[name])
        for name, tensor in source.state_dict().items()
        if not name.startswith("head.")
    )
    assert "7 classes there, 4 here" in loaded.lines()[0]


def test_a_large_head_of_another_size_is_scaled_down() -> None:
    net = small_net.net(classes=4)
    torch.nn.init.uniform_(net.head.weight, -0.3, 0.3)  # as timm and torchvision draw those of some networks
    head, bias = net.head.weight.detach().clone(), net.head.bias.detach().clone()
    load_pretrained(net, trained(classes=7).state_dict())
    assert float(net.head.weight.detach().std(correction=0)) == pytest.approx(0.01)
    assert torch.allclose(net.head.weight / 0.01, head / head.std(correction=0), atol=1e-5)
    assert torch.equal(net.head.bias, bias)


def test_a_head_of_the_same_size_is_loaded() -> None:
    source, net = trained(), small_net.net(classes=7)
    loaded = load_pretrained(net, source.state_dict())
    assert loaded.reinitialised == ()
    x = torch.randn(3, 1, 16, 16)
    assert torch.equal(net.eval()(x), source(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "args": {"lr": 0.1}},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {key: value.half() for key, value in state.items()},
        lambda state: {"model": state, "epoch": 3, "rng_state": torch.get_rng_state()},
        lambda state: {"step": torch.tensor(3), "state_dict": {"model": state, "scale": torch.ones(1)}},
    ],
)
def test_state_dicts_as_training_scripts_save_them(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    source, net = trained(), small_net.net(classes=7)
    torch.save(wrap(source.state_dict()), tmp_path / "net.pth")
    loaded = load_pretrained(net, tmp_path / "net.pth")
    assert len(loaded.taken) == len(source.state_dict())
    torch.testing.assert_close(net.head.weight, source.head.weight, rtol=1e-3, atol=1e-3)
    assert net.head.weight.dtype == torch.float32


def test_shared_tensors_are_found_under_any_of_their_names() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    state = {"1.weight": torch.full((4, 4), 2.0), "0.bias": torch.ones(4), "1.bias": torch.ones(4)}
    load_pretrained(net, state)
    assert bool((net[0].weight == 2).all())


class Places(nn.Module):
    """A net with a table of positions, whose head is not its last layer by registration."""

    def __init__(self, positions: int, classes: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.table, self.places = nn.Parameter(torch.randn(positions, 1)), nn.Embedding(positions, 1)
        self.head, self.back = nn.Linear(16, classes), nn.Conv2d(16, 16, 1)
        nn.utils.parametrizations.weight_norm(self.head)


@pytest.mark.parametrize("num_classes", [None, 4])
def test_nothing_but_the_output_layer_may_have_another_size(num_classes: int | None) -> None:
    net = Places(64, 4)
    for name, size in (("table", (196, 1)), ("places.weight", (196, 1)), ("stem.weight", (32, 1, 3, 3))):
        state = {**Places(64, 4).state_dict(), name: torch.ones(size)}
        with pytest.raises(ConfigError, match=f"is of another network: a tensor has .* the first: '{name}' is"):
            load_pretrained(net, state, num_classes=num_classes)
    loaded = load_pretrained(net, Places(64, 7).state_dict(), num_classes=num_classes)
    assert (loaded.classes, len(loaded.reinitialised)) == ((7, 4), 3)  # its weight is two tensors
    with pytest.raises(ConfigError, match="is of another network"):  # a layer of so many outputs as there are classes
        load_pretrained(Places(64, 16), {**Places(64, 16).state_dict(), "stem.weight": torch.ones(32, 1, 3, 3)})
    with pytest.raises(ConfigError, match="is of another network"):
        load_pretrained(net, Places(64, 7).state_dict(), num_classes=5)


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in names}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: without(s, "stem.0.weight"), "lacks 1 tensors of the network: stem.0.weight"),
        (lambda s: {**without(s, "stem.0.weight"), "stem.weight": s["stem.0.weight"]}, "it has stem.weight instead"),
        (lambda s: {**s, "stem.0.weight": torch.ones(16, 3, 3, 3)}, r"'stem.0.weight' is \(16, 3, 3, 3\) there"),
        (lambda s: trained(channels=8).state_dict(), "is of another network: .* tensors have another shape there"),
        (
            lambda s: {**s, "stem.0.weight": s["stem.0.weight"] * float("nan")},
            "'stem.0.weight' holds what is no number",
        ),
        (lambda s: {**s, "stem.0.weight": s["stem.0.weight"].to_sparse()}, "'stem.0.weight' is sparse"),
        (lambda s: {**s, "stem.0.weight": s["stem.0.weight"].to("meta")}, "'stem.0.weight' is a meta tensor"),
        (lambda s: {**s, "stem.0.weight": s["stem.0.weight"] * 1j}, "'stem.0.weight' is complex"),
        (lambda s: {k: v.int() for k, v in s.items()}, r"'stem.0.weight' is of no floating-point type \(torch.int32\)"),
        (lambda s: {**s, "stem.0.weight": s["stem.0.weight"] > 0}, "'stem.0.weight' is of no floating-point type"),
        (lambda s: {}, "the tensors given holds no tensor at all"),
        (lambda s: {"a.weight": torch.ones(3)}, "has no tensor of the network: it has a.weight, the network stem.0"),
    ],
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(change: Callable[[Any], Any], text: str) -> None:
    net = small_net.net(classes=7)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ConfigError, match=text) as error:
        load_pretrained(net, change(trained().state_dict()))
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_tensors_left_over_and_a_head_that_is_absent_are_said() -> None:
    net = small_net.net(classes=4)
    state = {**without(trained().state_dict(), "head.weight", "head.bias"), "aux.weight": torch.ones(2)}
    with pytest.raises(ConfigError, match="lacks 2"):
        load_pretrained(net, state)
    loaded = load_pretrained(net, state, num_classes=4)
    assert loaded.reinitialised == ("head.weight", "head.bias")
    assert loaded.lines()[1].endswith("none of that name: aux.weight")
    old = {key: value for key, value in trained(4).state_dict().items() if "num_batches" not in key}
    assert load_pretrained(net, old).reinitialised == ()  # files older than that buffer


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def test_nothing_in_a_file_is_ever_run(in_tmp: Path) -> None:
    torch.save({"state_dict": trained().state_dict(), "args": Bomb()}, "bomb.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save(trained(), "whole.pth")
    for name in ("bomb.pth", "plain.pth", "whole.pth"):
        with pytest.raises(ConfigError, match=f"{name} cannot be read: ") as error:
            load_pretrained(small_net.net(classes=7), name)
        assert "\n" not in str(error.value)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth"])
def test_damaged_files_are_one_line_each(tmp_path: Path, name: str) -> None:
    whole = tmp_path / name
    if name.endswith("safetensors"):
        save_file(trained().state_dict(), whole)
    else:
        torch.save(trained().state_dict(), whole)
    content = whole.read_bytes()
    net = small_net.net(classes=7)
    for cut in (0, 1, 8, 100, len(content) // 2, len(content) - 1):
        whole.write_bytes(content[:cut])
        with pytest.raises(ConfigError, match=r"cannot be read|no state dict") as error:
            load_pretrained(net, whole)
        assert "\n" not in str(error.value)
    whole.write_bytes(b"")
    with pytest.raises(ConfigError, match="the file is empty"):
        load_pretrained(net, whole)
    torch.save({}, tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="no state dict, but an empty dictionary"):
        load_pretrained(net, tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="no state dict, but list"):
        load_pretrained(net, tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="are a directory"):
        load_pretrained(net, tmp_path)
    with pytest.raises(ConfigError, match=f"no file .*; did you mean '{name}'"):
        load_pretrained(net, tmp_path / name.replace("net", "nett"))


def test_which_format_a_file_has_is_seen_in_it(tmp_path: Path) -> None:
    source = trained()
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    for name in ("NET.SAFETENSORS", "net.pth", "net"):
        (tmp_path / name).write_bytes((tmp_path / "net.safetensors").read_bytes())
        net = small_net.net(classes=7)
        load_pretrained(net, tmp_path / name)
        assert torch.equal(net.head.weight, source.head.weight)
    torch.save(trained(channels=8).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(ConfigError, match="of another network"):
        load_pretrained(net, tmp_path / "net.safetensors")


def test_a_checkpoint_that_holds_itself_ends(tmp_path: Path) -> None:
    checkpoint: dict[str, Any] = {"epoch": 3}
    checkpoint |= dict.fromkeys(("model", "net", "state_dict"), checkpoint)
    torch.save(checkpoint, tmp_path / "circle.pth")
    with pytest.raises(ConfigError, match="no state dict, but a dictionary of epoch, model, net and 1 more"):
        load_pretrained(small_net.net(), tmp_path / "circle.pth")


@pytest.mark.filterwarnings("error")  # torch's own are several lines
def test_what_is_no_file_of_weights_is_said_to_be_what_it_is(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(trained(), torch.zeros(1, 1, 16, 16)), tmp_path / "script.pth")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>\n<html>")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (tmp_path / "image.pth").write_bytes(bytes(range(130, 255)))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": [1.0]}, protocol=4))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    torch.save(trained().state_dict(), tmp_path / "half.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "half.pth").read_bytes()[:-200])
    for name, text in (
        ("script.pth", r"a TorchScript archive.*torch.jit.load\(FILE\).state_dict\(\)"),
        ("page.pth", "no file of weights, but text that begins '<!DOCTYPE html>'"),
        ("pointer.safetensors", "no file of weights, but text that begins 'version https://git-lfs"),
        ("image.pth", "no file of weights; give"),
        ("plain.pth", "no plain state dict"),
        ("model.safetensors.index.json", "are an index: .* join those files to one"),
        ("arrays.npz", "a zip archive, but none that torch.save wrote"),
        ("half.pth", "damaged or cut short .* download it again"),
    ):
        with pytest.raises(ConfigError, match=text) as error:
            load_pretrained(small_net.net(), tmp_path / name)
        assert "\n" not in str(error.value)


def test_numbers_of_eight_bits_are_read() -> None:
    source, net = trained(), small_net.net(classes=7)
    small = {k: v.to(torch.float8_e4m3fn) if v.is_floating_point() else v for k, v in source.state_dict().items()}
    load_pretrained(net, small)
    torch.testing.assert_close(net.head.weight, source.head.weight, rtol=0.1, atol=0.01)


# --- by name -----------------------------------------------------------------------------------------------------


def test_torchvision_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision").models
    published = models.shufflenet_v2_x0_5(weights=None)
    asked: dict[str, Any] = {}

    def get(self: Any, **options: Any) -> dict[str, Tensor]:
        asked.update(options, member=self.name)
        return dict(published.state_dict())

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", get)
    for name in ("default", "IMAGENET1K_V1"):
        net = models.shufflenet_v2_x0_5(weights=None, num_classes=3)
        loaded = load_pretrained(net, name, name="torchvision:shufflenet_v2_x0_5")
        assert loaded.source == "torchvision's shufflenet_v2_x0_5 IMAGENET1K_V1"
        assert loaded.classes == (1000, 3)
        assert asked["weights_only"] is True
        assert asked["check_hash"] is True
    with pytest.raises(ConfigError, match="no weights 'IMAGENET1K_V7'; did you mean 'IMAGENET1K_V1'"):
        load_pretrained(net, "IMAGENET1K_V7", name="torchvision:shufflenet_v2_x0_5")


def test_timm_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    build, asked = timm.create_model, {}

    def create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.update(name=name, pretrained=pretrained, **options)
        return build(name.partition(".")[0], **options)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(pretrained, "_reach", lambda url: None)
    net = build("mobilenetv3_small_050", num_classes=5)
    loaded = load_pretrained(net, "lamb_in1k", name="timm:mobilenetv3_small_050", model_args={"num_classes": 5})
    assert loaded.classes == (1000, 5)
    assert asked == {"name": "mobilenetv3_small_050.lamb_in1k", "pretrained": True}
    with pytest.raises(ConfigError, match="no weights 'lamb_in2k'; did you mean 'lamb_in1k'"):
        load_pretrained(net, "lamb_in2k", name="timm:mobilenetv3_small_050")


@pytest.mark.parametrize("family", ["torchvision", "timm"])
def test_without_a_network_a_file_is_named_as_the_way_out(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    pytest.importorskip(family)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr(pretrained, "_is_cached", lambda repository: False)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    monkeypatch.setattr("os.makedirs", lambda *args, **options: None)
    name = {"torchvision": "resnet18", "timm": "tf_efficientnet_lite0"}[family]
    net = small_net.net()
    with pytest.raises(
        ConfigError, match=r"cannot be downloaded from https://.*give its path instead: --pretrained FILE"
    ):
        load_pretrained(net, "default", name=f"{family}:{name}")


def test_only_two_libraries_have_weights_by_name() -> None:
    with pytest.raises(ConfigError, match="are no file, and only models of torchvision and timm"):
        load_pretrained(small_net.net(), "default", name=NET)


# --- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(in_tmp: Path, shapes_npz: Path) -> Path:
    """A configuration that runs in seconds."""
    values = {
        "model": NET,
        "data": {"source": str(shapes_npz), "holdout": 150, "augment": "none"},
        "space": {"bins": 4, "divisor": 4, "min_ratio": 0.25},
        "train": {"epochs": 2, "batch_size": 50, "lr": 0.05},
        "slim": {"budgets": ["50%"], "batch_size": 150},
        "retrain": {"epochs": 1, "batch_size": 50, "lr": 0.05},
        "export": {"onnx": False, "report": False},
        "calibration_images": 100,
        "threads": 1,
    }
    path = in_tmp / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def weights(in_tmp: Path) -> Path:
    save_file(trained().state_dict(), in_tmp / "net.safetensors")
    return in_tmp / "net.safetensors"


@pytest.mark.parametrize(
    ("train", "retrain", "rates"),
    [
        ({}, {}, (0.03, 0.03)),
        ({"lr": 0.2}, {"init": "scratch"}, (0.2, 0.1)),
        ({"optimizer": "adamw"}, {"lr": 0.01}, (0.1, 0.01)),
    ],
)
def test_trained_weights_are_tuned_at_a_lower_rate_unless_one_is_given(
    train: dict[str, Any], retrain: dict[str, Any], rates: tuple[float, float]
) -> None:
    config = Config.model_validate({"model": "a:b", "pretrained": "w.pth", "train": train, "retrain": retrain})
    assert (config.train.lr, config.retrain.lr) == rates
    plain = Config.model_validate({"model": "a:b", "train": train, "retrain": retrain})
    assert plain.train.lr == train.get("lr", 0.1)


def test_a_run_starts_from_the_sorted_weights(
    small: Path,
    in_tmp: Path,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", str(small), "--pretrained", str(weights), "--json"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the class head is re-initialised (7 classes there, 4 here): head.weight, head.bias" in said
    assert "sorted: 3 of 3 groups by l1; outputs differ by" in said
    root = in_tmp / "runs" / "small"
    stated = yaml.safe_load((root / "config.yaml").read_text())
    assert stated["pretrained"] == str(weights)
    assert stated["train"]["sort"] == "l1"
    assert stated["retrain"]["init"] == "supernet"

    start, given = load_file(root / "supernet" / "start.safetensors"), load_file(weights)
    assert not torch.equal(start["stem.0.weight"], given["stem.0.weight"])  # in another order
    net, old = small_net.net(), trained()
    net.load_state_dict(start)
    net.head = old.head = nn.Identity()
    x = torch.randn(4, 1, 16, 16)
    sums = start["stem.0.weight"].abs().sum((1, 2, 3)) + sum(
        start[f"blocks.{i}.3.weight"].abs().sum((1, 2, 3)) for i in range(2)
    )
    assert bool((sums.diff() <= 1e-4).all()), "the largest first"
    sorted_features, features = (each.eval()(x).sort(dim=1).values for each in (net, old))
    torch.testing.assert_close(sorted_features, features, rtol=1e-4, atol=1e-4)

    before, start_bytes = artefacts(root), (root / "supernet" / "start.safetensors").read_bytes()
    weights.unlink()  # what was computed once is not asked for again
    assert main(["run", str(small), "--pretrained", str(weights)]) == 0
    assert artefacts(root) == before
    assert (root / "supernet" / "start.safetensors").read_bytes() == start_bytes


def test_a_run_killed_after_the_start_goes_on_from_it(
    small: Path,
    in_tmp: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["train", str(small), "--pretrained", str(weights)]) == 0
    whole = (in_tmp / "runs" / "small" / "supernet" / "model.safetensors").read_bytes()

    from autoslim import pipeline

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    again = ["train", str(small), "--pretrained", str(weights), "--run-dir", "again"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_train", killed)
        assert main(again) == 130
    weights.write_bytes(b"")  # not needed any more
    assert main(again) == 0
    assert (in_tmp / "again" / "supernet" / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("sort", ["none", "gamma", "first-order"])
def test_each_way_to_sort(small: Path, in_tmp: Path, weights: Path, sort: str) -> None:
    options = ["--pretrained", str(weights), "--set", f"train.sort={sort}", "--set", "train.epochs=1"]
    assert main(["train", str(small), *options]) == 0
    start, given = load_file(in_tmp / "runs" / "small" / "supernet" / "start.safetensors"), load_file(weights)
    moved = not torch.equal(start["blocks.0.0.weight"], given["blocks.0.0.weight"])
    assert moved == (sort != "none")
    one, other = (tensors["blocks.0.0.weight"].flatten().sort().values for tensors in (start, given))
    torch.testing.assert_close(one, other)


def test_uniform_nets_start_from_the_supernet_too(
    small: Path,
    in_tmp: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both are cut out of the supernet's weights: without a step of training they are its slices."""

    monkeypatch.setattr("autoslim.train.Training.run_epoch", _no_training)
    assert main(["run", str(small), "--pretrained", str(weights), "--set", "slim.budgets=[50%]"]) == 0
    root = in_tmp / "runs" / "small"
    supernet = load_file(root / "supernet" / "model.safetensors")["head.bias"]
    for directory in (root / "subnets" / "50%", root / "subnets" / "50%" / "uniform"):
        net = autoslim.load_subnet(directory)
        assert torch.equal(net.head.bias, supernet), directory
        assert net.head.weight.shape[1] < 16 or net.blocks[0][0].out_channels < 32


def _no_training(training: Any, *args: Any, **options: Any) -> Any:
    training.epoch += 1
    return autoslim.train.EpochLog(training.epoch, {"loss": 0.0}, 0.0)


@pytest.mark.parametrize("system", ["s-net", "i-net"])
def test_other_systems_start_from_them_too(
    small: Path,
    in_tmp: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: str,
) -> None:
    monkeypatch.setattr("autoslim.train.Training.run_epoch", _no_training)
    ratios = ["--system", system, "--set", "ratios=[1.0, 0.5]"]
    assert main(["run", str(small), "--pretrained", str(weights), *ratios]) == 0
    root = in_tmp / "runs" / "small"
    start = load_file(root / "supernet" / "start.safetensors")
    net = autoslim.load_subnet(root / "subnets" / "width-0.5")
    assert torch.equal(net.stem[0].weight, start["stem.0.weight"][: net.stem[0].out_channels])


def test_the_defaults_that_depend_on_it_can_be_overridden() -> None:
    from autoslim.config import make_config

    plain = make_config({"model": NET})
    assert (plain.pretrained, plain.train.sort, plain.retrain.init) == (None, "none", "scratch")
    given = {"model": NET, "pretrained": True, "train": {"sort": "gamma"}, "retrain": {"init": "scratch"}}
    config = make_config(given)
    assert (config.pretrained, config.train.sort, config.retrain.init) == ("default", "gamma", "scratch")
    assert make_config({**given, "pretrained": False}).pretrained is None
    assert make_config(config.plain()) == config
    with pytest.raises(ConfigError, match=r"train\.sort"):
        make_config({"model": NET, "train": {"sort": "l2"}})


def test_mistakes_on_the_command_line(small: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.ones(2)}, "other.pth")
    for given, text in (("missing.pth", "no file 'missing.pth'"), ("other.pth", "has no tensor of the network")):
        assert main(["run", str(small), "--pretrained", given]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert text in error
    assert not (in_tmp / "runs" / "small" / "supernet").exists()


# --- epochs of the whole network alone, before widths share it -------------------------------------------------------


def stages(root: Path) -> list[tuple[str, int]]:
    lines = (json.loads(line) for line in (root / "train.jsonl").read_text().splitlines())
    return [(line["stage"], line["epoch"]) for line in lines if line["stage"] in ("plain", "supernet")]


def test_plain_epochs_come_first_and_channels_are_sorted_after_them(
    small: Path, in_tmp: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--pretrained", str(weights), "--set", "train.epochs=3", "--set", "train.plain_epochs=1"]
    assert main(["train", str(small), *options]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("sorted: 3 of 3 groups by first-order") == 1
    root = in_tmp / "runs" / "small"
    assert stages(root) == [("plain", 1), ("supernet", 1), ("supernet", 2)]
    start, given = (load_file(path) for path in (root / "supernet" / "start.safetensors", weights))
    assert torch.equal(start["stem.0.weight"], given["stem.0.weight"]), "not sorted before"
    assert not (root / "supernet" / "plain" / "checkpoint.safetensors").exists()


def test_the_plain_network_is_that_of_an_ordinary_training_but_for_the_order_of_its_channels(
    small: Path, in_tmp: Path, weights: Path
) -> None:
    options = ["--pretrained", str(weights), "--set", "train.plain_epochs=2"]
    assert main(["run", str(small), *options]) == 0
    root = in_tmp / "runs" / "small"
    assert stages(root) == [("plain", 1), ("plain", 2)], "no sandwich at all"
    found, saved = (load_file(root / "supernet" / each) for each in ("model.safetensors", "plain/model.safetensors"))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.items())

    ordinary = ["--pretrained", str(weights), "--system", "i-net", "--set", "ratios=[1.0]", "--run-dir", "ordinary"]
    assert main(["run", str(small), *ordinary, "--set", "train.sort=none"]) == 0
    alone, sorted_net = autoslim.load_subnet("ordinary/subnets/width-1").train(), small_net.net().train()
    sorted_net.load_state_dict(found)
    images = torch.randn(8, 1, 16, 16)
    torch.testing.assert_close(sorted_net(images), alone(images), rtol=1e-4, atol=1e-4)
    assert not torch.equal(sorted_net.stem[0].weight, alone.stem[0].weight)

    whole = json.loads((root / "supernet" / "metrics.json").read_text())
    cut = json.loads((root / "subnets" / "50%" / "metrics.json").read_text())
    assert cut["macs"] <= whole["macs"] / 2
    assert cut["accuracy"]["supernet"] == whole["accuracy"]


@pytest.mark.parametrize("call", [1, 2])
def test_killed_between_plain_epochs_and_the_others_it_ends_in_the_same(
    small: Path, in_tmp: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    from autoslim import pipeline

    command = ["train", str(small), "--pretrained", str(weights), "--set", "train.plain_epochs=1"]
    assert main(command) == 0
    whole = (in_tmp / "runs" / "small" / "supernet" / "model.safetensors").read_bytes()

    train, calls = pipeline._train, iter(range(1, 9))

    def killed(*args: Any, **options: Any) -> None:
        number = next(calls)
        if number == 2:  # after the plain epochs, before the first sandwich
            raise KeyboardInterrupt
        train(*args, **options)
        if number == call:  # after the plain epochs, before they are kept
            raise KeyboardInterrupt

    again = [*command, "--run-dir", "again"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_train", killed)
        assert main(again) == 130
    assert main(again) == 0
    assert (in_tmp / "again" / "supernet" / "model.safetensors").read_bytes() == whole


def test_without_trained_weights_too(small: Path, in_tmp: Path) -> None:
    assert main(["train", str(small), "--set", "train.plain_epochs=1", "--set", "train.sort=none"]) == 0
    root = in_tmp / "runs" / "small"
    assert stages(root) == [("plain", 1), ("supernet", 1)]
    stated = yaml.safe_load((root / "config.yaml").read_text())
    assert stated["train"]["sort"] == "none", "as it was given"
    assert stated["retrain"]["init"] == "scratch"
    assert not (root / "supernet" / "start.safetensors").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"epochs": 2, "plain_epochs": 3}}, "plain_epochs=3 is more than train.epochs=2"),
        ({"train": {"plain_epochs": 1}, "system": "s-net"}, "system s-net has no network that could be trained alone"),
        ({"train": {"plain_epochs": -1}}, "train.plain_epochs: Input should be greater than or equal to 0"),
    ],
)
def test_plain_epochs_that_cannot_be(values: dict[str, Any], message: str) -> None:
    from autoslim.config import make_config

    with pytest.raises(ConfigError, match=message):
        make_config({"model": "a:b", **values})


def test_after_plain_epochs_sorting_looks_at_gradients_unless_it_is_told_otherwise() -> None:
    def sort(**train: Any) -> str:
        return Config.model_validate({"model": "a:b", "pretrained": "w.pth", "train": train}).train.sort

    assert sort(plain_epochs=1) == "first-order"
    assert sort(plain_epochs=0) == "l1"
    assert sort(plain_epochs=1, sort="gamma") == "gamma"
