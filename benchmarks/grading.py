"""Grades of one public model: is it traced, are its subnets right, how deep can it be cut. Used by `zoo.py` and tests.

Everything is measured in double precision, with every weight drawn anew (BatchNorm statistics and affines too), so that
a wrong index cannot hide behind a zero or a one, and on an input as small as the model takes.

    1 capture    traced within ten seconds
    2 identity   the widest net computes exactly what the model does, under the same names
    3 run        a subnet run in place equals the subnet extracted: smallest and largest widths, and three others
    4 zeroed     ... and the model with the channels left out set to zero, unless an operator sees all channels at once
    5 backward   reaches every parameter of the extracted net that it reaches in the model
    6 depth      share of MACs whose output channels can be cut, and MACs left with every group at half
    7 round trip of a subnet of random widths in single precision: saved and loaded, torch.export, ONNX and onnxruntime.
                 Done if asked for; "as the model": what fails, fails with the whole model too

A: 1-5 hold and (cuttable >= 0.95 or left at half <= 0.30). B: 1-5 hold, cuttable >= 0.60. C: 1-5 hold. F: anything else.
"""

from __future__ import annotations

import functools
import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from autoslim import ChannelSpace, MacCost, Supernet, extract, trace
from autoslim.export import export_onnx, export_program, load_subnet, save_subnet, verify_onnx
from autoslim.slicing import copy_module
from autoslim.tracing import OUTPUT, tensors_in

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 299, 320, 331, 384, 448, 512)
LARGE = 300e6  # parameters beyond which a model is graded alone
TOO_LARGE = 420e6  # ... and beyond which its numbers do not fit into 20 GB in double precision
DETECTION_SIDE = 96

Inputs = tuple[Any, ...]


@dataclass
class Grade:
    """One row of `results/zoo.csv`."""

    model: str
    family: str = ""
    grade: str = "F"
    million_params: float = 0.0
    image: int = 0
    trace_s: float = 0.0
    groups: int = 0
    cuttable: float = 0.0
    at_half: float = 1.0
    identity: str = ""
    run: str = ""
    zeroed: str = ""
    tolerance: float = TOLERANCE[torch.float64]
    backward: str = ""
    round_trip: str = ""
    checked: str = "numbers"  # "shapes" for a model too large: capture, proof and depth on meta
    frozen: str = ""  # reasons, most frequent first
    failure: str = ""
    seconds: float = 0.0
    commit: str = ""

    def judge(self) -> Grade:
        """Set the grade from what was measured."""
        holds = not self.failure and self.trace_s < 10
        if self.checked == "numbers":
            holds = holds and all(
                check in ("yes", "n/a") for check in (self.identity, self.run, self.zeroed, self.backward)
            )
        deep = self.cuttable >= 0.95 or self.at_half <= 0.30
        self.grade = "F" if not holds else "A" if deep else "B" if self.cuttable >= 0.60 else "C"
        return self


# --- models ------------------------------------------------------------------------------------------------------


def build(name: str, *, device: str = "cpu") -> nn.Module:
    """`timm:NAME` or `torchvision:NAME`, with whatever was in memory as weights: `randomise` draws them.

    A model made for images of one size only is made for the smallest that it can be made for.
    """
    family, _, short = name.partition(":")
    with warnings.catch_warnings(), torch.device(device), _NoInitialisation():
        warnings.simplefilter("ignore")
        if family == "timm":
            import timm

            return timm.create_model(short, pretrained=False, **_made_for(short))
        from torchvision import models

        options: dict[str, Any] = {"init_weights": False} if short in ("googlenet", "inception_v3") else {}
        if short.startswith("vit_") and SIZES[0] % int(short.rpartition("_")[2]) == 0:
            options["image_size"] = SIZES[0]
        if is_detection(name):
            options["weights_backbone"] = None
            if "ssd" not in short:
                options |= {"min_size": DETECTION_SIDE, "max_size": DETECTION_SIDE}
        elif is_segmentation(name):
            options["weights_backbone"] = None
        return models.get_model(short, weights=None, **options)


@functools.cache
def _made_for(short: str) -> dict[str, int]:
    """`img_size=` of the smallest images that the timm model can be made for; nothing if it takes any or has no choice."""
    import timm

    config = timm.get_pretrained_cfg(short)
    if config is None or not config.fixed_input_size:
        return {}
    for side in SIZES:
        if side < max(config.input_size[1:]):
            try:
                with torch.device("meta"), torch.no_grad():
                    timm.create_model(short, img_size=side).eval()(torch.empty(1, config.input_size[0], side, side))
            except Exception:  # whatever it does not like about the size, a larger one may do
                continue
            return {"img_size": side}
    return {}


def is_detection(name: str) -> bool:
    """Does it want a list of images?"""
    return any(part in name for part in ("rcnn", "retinanet", "fcos", "ssd")) and name.startswith("torchvision:")


def is_segmentation(name: str) -> bool:
    return any(part in name for part in ("deeplab", "fcn_", "lraspp"))


class _NoInitialisation(TorchDispatchMode):  # type: ignore[no-untyped-call,misc]
    """Zeros instead of drawn weights, which take longer than anything else for large models."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("normal_", "uniform_", "erfinv_", "bernoulli_") and args[0].numel() > 4096:
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight, statistic and affine: nothing is zero, one, or equal to its neighbour."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "gamma" in name or "layer_scale" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
                if name.endswith("bias"):
                    parameter.sub_(1.0).mul_(0.2)
            else:
                parameter.normal_(0, math.sqrt(1.5 / max(parameter[0].numel(), 1)), generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model


def inputs_for(name: str, model: nn.Module) -> tuple[Inputs, int, torch.dtype]:
    """The smallest input that the model takes, its side, and the precision: double, unless the model insists.

    Found on meta, where trying costs little.
    """
    if is_detection(name):
        generator = torch.Generator().manual_seed(0)
        images = [torch.rand(3, DETECTION_SIDE, DETECTION_SIDE, generator=generator, dtype=torch.float64)]
        return (images,), DETECTION_SIDE, torch.float64
    config = getattr(model, "default_cfg", {})
    channels, usual, _ = config.get("input_size", (3, 224, 224))
    sizes = [*_made_for(name.removeprefix("timm:")).values()] if config.get("fixed_input_size") else [*SIZES]
    sizes.append(usual)
    for dtype in (torch.float64, torch.float32):
        probe = copy_module(model, lambda _, tensor: torch.empty_like(tensor, device="meta")).to(dtype).eval()
        for side in sizes:
            for inputs in _shapes(name, channels, side):
                try:
                    with torch.no_grad():
                        probe(*(value.to("meta", dtype) for value in inputs))
                except Exception as error:
                    failure = error
                else:
                    return tuple(value.to(dtype) for value in inputs), side, dtype
    raise RuntimeError(f"no input found: {failure}")


def _shapes(name: str, channels: int, side: int) -> Iterator[Inputs]:
    generator = torch.Generator().manual_seed(0)

    def image(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    family, _, short = name.partition(":")
    if "raft" in short:
        yield image(1, 3, 128, 128), image(1, 3, 128, 128)
    elif family == "torchvision" and short.startswith(("r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")):
        yield (image(1, 3, 16, side, side),)
    else:
        yield (image(1, channels, side, side),)


# --- grading -----------------------------------------------------------------------------------------------------


def grade(name: str, family: str = "", *, shapes_only: bool = False, round_trip: bool = False) -> Grade:
    """Everything about one model; what goes wrong is part of the grade, never raised."""
    row = Grade(name, family)
    started = time.monotonic()
    try:
        model = build(name, device="meta" if shapes_only and not is_detection(name) else "cpu")
        row.million_params = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
        inputs, row.image, dtype = inputs_for(name, model)
        row.tolerance = TOLERANCE[dtype]
        model = model.to(dtype)
        if not shapes_only:
            randomise(model)
        row.checked = "shapes" if shapes_only else "numbers"
        space = _measure(row, model.eval(), inputs)
        if round_trip and not shapes_only:
            row.round_trip = check_round_trip(name, model.float(), space, inputs)
    except Exception as error:
        row.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    row.seconds = round(time.monotonic() - started, 1)
    return row.judge()


def _measure(row: Grade, model: nn.Module, inputs: Inputs) -> ChannelSpace:
    started = time.process_time()  # of one core: what else the machine does is not its time
    space = trace(model, inputs)
    row.trace_s = round(time.process_time() - started, 2)
    row.groups = len(space.groups)
    macs = MacCost(space)
    row.cuttable = round(cuttable_share(space), 4)
    row.at_half = round(macs(space.uniform(0.5)) / macs(space.full()), 4)
    row.frozen = summary_of_notes(space)
    if row.checked == "numbers":
        check_numbers(row, model, space, inputs)
    return space


def check_round_trip(name: str, model: nn.Module, space: ChannelSpace, inputs: Inputs) -> str:
    """ "yes", or what of a subnet cannot be written and read back, with the reason."""
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return "n/a"
    image, widths = inputs[0].float(), space.sample(random.Random(7))
    subnet = extract(model, space, widths).eval()
    with torch.no_grad():
        expected = list(tensors_in(subnet(image)))
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)

        def saved() -> None:
            save_subnet(place, subnet, space, widths)
            with torch.no_grad():
                again = list(tensors_in(load_subnet(place, lambda: build(name).float()).eval()(image)))
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True)), "differs"

        def exported(net: nn.Module, outputs: list[Tensor] | None) -> None:
            export_program(net, image, place / "model.pt2")
            given = list(tensors_in(torch.export.load(place / "model.pt2").module()(image)))
            for one, other in zip(given, outputs or given, strict=True):
                assert (one - other).abs().max() <= 1e-4 * other.abs().max(), "differs"

        def as_onnx(net: nn.Module) -> None:
            export_onnx(net, image, place / "model.onnx")
            verify_onnx(place / "model.onnx", net, torch.cat([image, image]))

        ways: dict[str, tuple[Callable[[], None], Callable[[], None] | None]] = {
            "save and load": (saved, None),
            "torch.export": (lambda: exported(subnet, expected), lambda: exported(model, None)),
            "ONNX": (lambda: as_onnx(subnet), lambda: as_onnx(model)),
        }
        for way, (attempt, with_the_model) in ways.items():
            reason = _what_fails(attempt)
            if reason:
                whole = with_the_model is not None and _what_fails(with_the_model)
                problems.append(f"{way}: {'as the model: ' if whole else ''}{reason}")
    return "; ".join(problems) or "yes"


def _what_fails(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
    return ""


def cuttable_share(space: ChannelSpace) -> float:
    """Share of conv and linear MACs whose output channels can be cut, the network's own outputs aside."""
    outputs = {note.name for note in space.notes if note.reason == OUTPUT}
    cuttable, total = 0, 0
    for operation in space.operations:
        if operation.kind != "matmul" and operation.name not in outputs:
            macs = operation.scale * math.prod(axis.size for axis in operation.factors)
            total += macs
            cuttable += macs if operation.is_cuttable else 0
    return cuttable / max(total, 1)


def summary_of_notes(space: ChannelSpace, limit: int = 3) -> str:
    """The reasons for frozen layers, without the names of modules, most frequent first."""
    counts: dict[str, list[str]] = {}
    for note in space.notes:
        if note.reason != OUTPUT:
            place = f"{note.operator.split(' in ')[0]} at {note.line}" if note.line else note.operator.split(" in ")[0]
            text = note.reason.split(" in '")[0].split(" by ")[0].split(": ")[0]
            counts.setdefault(f"{text} ({place})" if place else text, []).append(note.name)
    ordered = sorted(counts.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{len(names)}x {reason}" for reason, names in ordered[:limit])


def check_numbers(row: Grade, model: nn.Module, space: ChannelSpace, inputs: Inputs) -> None:
    """Checks 2 to 5."""
    with torch.no_grad():
        plain = outputs_of(model, inputs)
        supernet = Supernet(model, space).eval()
        widest = outputs_of(lambda *args: supernet(args), inputs)
        same = len(plain) == len(widest) and all(torch.equal(a, b) for a, b in zip(plain, widest, strict=True))
        row.identity = "yes" if same and supernet.state_dict().keys() == model.state_dict().keys() else "no"
        rng = random.Random(0)
        some = [space.smallest(), space.full(), *(space.sample(rng) for _ in range(3))]
        worst = 0.0
        for widths in dict.fromkeys(some):
            subnet = extract(model, space, widths).eval()
            expected = outputs_of(subnet, inputs)
            actual = outputs_of(lambda *args, chosen=widths: supernet(args, chosen), inputs)
            worst = max(worst, difference(actual, expected))
        row.run = "yes" if worst < row.tolerance else "no"
        if worst >= row.tolerance:
            row.failure = f"run and extracted net differ by {worst:.1e}"
        error = difference(outputs_of(zeroed(model, space, widths), inputs), expected)
        row.zeroed = "yes" if error < row.tolerance else "n/a" if space.mixing else "no"
    row.backward = "yes" if unreached(subnet, inputs) <= _unreached_on_meta(model, inputs) else "no"


def outputs_of(net: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """Every tensor that the net gives."""
    torch.manual_seed(0)
    return [leaf.to(torch.float64) for leaf in tensors_in(net(*inputs))]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, relative to the largest value; infinite for other shapes or what is no number."""
    if [a.shape for a in one] != [b.shape for b in other]:
        return math.inf
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if b.numel():
            scale = float(b.abs().max())
            error = float((a - b).abs().max()) / max(scale, 1e-30)
            worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst


def zeroed(model: nn.Module, space: ChannelSpace, widths: Mapping[str, int]) -> nn.Module:
    """The model with every weight that the subnet leaves out set to zero."""

    def convert(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        for dim, axis in enumerate(space.parameters.get(name, ())):
            if axis.groups:
                dropped = torch.ones(axis.size, dtype=torch.bool)
                dropped[list(axis.positions(widths))] = False
                tensor.movedim(dim, 0)[dropped] = 0
        return tensor

    return copy_module(model, convert).eval()


def unreached(model: nn.Module, inputs: Inputs) -> set[str]:
    """Names of the parameters that get no gradient from the outputs."""
    model.train().eval()  # lets go of what a model keeps from a forward pass without gradients
    model.requires_grad_(True).zero_grad(set_to_none=True)
    torch.manual_seed(0)
    outputs = [out for out in tensors_in(model(*inputs)) if out.requires_grad]
    if outputs:
        torch.stack([out.double().sum() for out in outputs]).sum().backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    model.zero_grad(set_to_none=True)
    return found


def _unreached_on_meta(model: nn.Module, inputs: Inputs) -> set[str]:
    """The same without arithmetic, where the model runs there: what reaches a parameter is no question of numbers."""
    probe = copy_module(model, lambda _, tensor: torch.empty_like(tensor, device="meta"))
    try:
        return unreached(probe, tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, inputs))
    except Exception:  # it does not run on meta: with numbers, which takes longer
        return unreached(model, inputs)


# --- the lists ---------------------------------------------------------------------------------------------------


def torchvision_models() -> dict[str, str]:
    """Name -> family of every torchvision model; quantised ones are float models with stubs."""
    from torchvision import models

    found = {}
    for name in models.list_models():
        builder = models.get_model_builder(name)
        module = builder.__module__.removeprefix("torchvision.models.")
        found[f"torchvision:{name}"] = f"torchvision {module}"
    return found


def timm_models() -> dict[str, str]:
    """Name -> family (the file it is defined in) of every timm model."""
    import timm

    return {
        f"timm:{name}": f"timm {timm.model_entrypoint(name).__module__.removeprefix('timm.models.')}"
        for name in timm.list_models()
    }
