"""Every script in examples/ runs with its smallest setting, and says what it can do."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import autoslim

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other packages, while they are imported
        spec.loader.exec_module(module)
    return module


def needs(*packages: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in packages:
            pytest.importorskip(package)


def test_regression(in_tmp: Path) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    regression = load("regression")
    results = regression.main(["--images", "64", "--epochs", "1", "--out", "net"])
    assert results["share of MACs"] <= 0.25
    assert 0 < results["retrained"] < 1
    net = autoslim.load_subnet("net", regression.Locator)
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    assert Path("net/model.onnx").stat().st_size > 1000


def test_segmentation(in_tmp: Path) -> None:
    needs("torchvision")
    small = ["--images", "8", "--size", "32", "--epochs", "1", "--batch-size", "4", "--budget", "95%", "--bins", "2"]
    results = load("segmentation").main([*small, "--out", "net"])
    assert results["share of MACs"] <= 0.95
    assert 0 <= results["retrained"] <= 1
    assert Path("net/model.safetensors").exists()


def test_detection(in_tmp: Path) -> None:
    needs("torchvision")
    small = ["--images", "4", "--size", "64", "--epochs", "1", "--batch-size", "4", "--budget", "98%", "--bins", "2"]
    results = load("detection").main([*small, "--out", "net"])
    assert results["share of MACs"] <= 0.98
    assert 0 < results["found"] < 100
    assert Path("net/model.safetensors").exists()


def test_average_precision_of_the_detection_example() -> None:
    needs("torchvision")
    average_precision = load("detection").average_precision
    boxes, labels = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.tensor([1, 2])
    target = {"boxes": boxes, "labels": labels}
    perfect = {"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9, 0.8])}
    assert average_precision([perfect], [target]) == 1.0
    assert average_precision([{**perfect, "labels": labels.flip(0)}], [target]) == 0.0
    doubled = {
        "boxes": torch.cat([boxes[:1] + 50, boxes]),
        "labels": torch.tensor([1, 1, 2]),
        "scores": torch.tensor([0.95, 0.9, 0.8]),
    }
    assert average_precision([doubled], [target]) == 0.75  # of one class: one wrong box before the right one


def test_lightning() -> None:
    needs("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and devices
        results = load("lightning_training").main(["--images", "100", "--epochs", "1", "--budget", "75%"])
    assert results["share of MACs"] <= 0.75
    assert 0 <= results["found"] <= 1


def test_accelerate() -> None:
    needs("accelerate")
    results = load("accelerate_training").main(["--cpu", "--images", "100", "--epochs", "1", "--budget", "75%"])
    assert results["share of MACs"] <= 0.75
    assert 0 <= results["found"] <= 1


def test_conversion_of_efficientnet_lite0(in_tmp: Path) -> None:
    """The names of the original, written down from its code, become timm's; the order of the file does not matter."""
    needs("timm")
    import timm

    convert = load("convert_efficientnet_lite0")
    model = timm.create_model("tf_efficientnet_lite0")
    tensors = {
        "_conv_stem.weight": model.conv_stem.weight,
        "_blocks.0._depthwise_conv.weight": model.blocks[0][0].conv_dw.weight,
        "_blocks.0._project_conv.weight": model.blocks[0][0].conv_pw.weight,
        "_blocks.0._bn2.bias": model.blocks[0][0].bn2.bias,
        "_blocks.2._expand_conv.weight": model.blocks[1][1].conv_pw.weight,
        "_blocks.2._bn0.running_var": model.blocks[1][1].bn1.running_var,
        "_blocks.15._project_conv.weight": model.blocks[6][0].conv_pwl.weight,
        "_bn1.running_mean": model.bn2.running_mean,
        "_fc.bias": model.classifier.bias,
    }
    own = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in convert.timm_names(tensors, model).items():
        assert own[id(tensor)] == name
    with pytest.raises(KeyError):
        convert.timm_names({"_conv_tail.weight": torch.ones(1)}, model)


@pytest.mark.parametrize("script", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_help(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    needs(*{"lightning_training": ["lightning"], "accelerate_training": ["accelerate"]}.get(script, ["timm"]))
    with pytest.raises(SystemExit) as end:
        load(script).main(["--help"])
    assert end.value.code == 0
    assert f"python examples/{script}.py" in capsys.readouterr().out


def test_losses_of_the_user_reach_the_loops() -> None:
    """Distillation and imitation losses given to `train_supernet` and `retrain` are those that are called."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    space = autoslim.trace(net, torch.zeros(1, 4))
    batches = [(torch.randn(6, 4), torch.randn(6, 2))]
    called: list[str] = []

    def named(name: str):  # type: ignore[no-untyped-def]
        def loss(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            called.append(name)
            return nn.functional.mse_loss(output, wanted)

        return loss

    recipe = autoslim.SupernetRecipe(epochs=1, batch_size=6, lr=0.01)
    list(autoslim.train_supernet(autoslim.Supernet(net, space), batches, recipe, loss=named("a"), distill=named("b")))
    assert called == ["a", "b", "b", "b"]
    called.clear()
    plain = autoslim.Recipe(epochs=1, batch_size=6, lr=0.01)
    teacher = nn.Linear(4, 2)
    list(autoslim.retrain(net, batches, plain, loss=named("a"), teacher=teacher, distill=0.5, imitate=named("b")))
    assert called == ["a", "b"]
    per_sample = autoslim.evaluate(net, batches, lambda output, wanted: (output - wanted).square().mean(1))
    mean = autoslim.evaluate(net, batches, nn.functional.mse_loss)
    assert per_sample == pytest.approx(mean, rel=1e-5)
