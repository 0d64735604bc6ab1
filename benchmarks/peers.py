"""AutoSlim beside Torch-Pruning and NVIDIA ModelOpt: 54 public convnets, every channel number halved, the same grades.

    python3 -m venv peers && peers/bin/pip install -r benchmarks/requirements-peers.txt
    peers/bin/python benchmarks/peers.py            # benchmarks/results/peers.csv and peers.md; resumes

Each tool is asked for a net with every layer it can cut at half of its channels, the last layer aside. Measured on the net that
comes out, alike for all: does it run and give what the model gives in shape, does the gradient reach what it reached before, which
share of the model's conv and linear MACs lies in layers that lost output channels (those with 1000 outputs aside), and how many MACs
are left (torch's own counter). A: it works and (share >= 0.95 or left <= 0.30). B: share >= 0.60. C: it works. F: raised, hung or wrong.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "benchmarks" / "results" / "peers.csv"
PAGE = ROOT / "benchmarks" / "results" / "peers.md"
TOOLS = ("autoslim", "torch-pruning", "modelopt")
LIMIT = 180
FIELDS = ("model", "tool", "grade", "cut", "left", "seconds", "failure")

TORCHVISION = (
    *("alexnet", "vgg16_bn", "squeezenet1_1", "densenet121", "googlenet", "inception_v3", "resnet18", "resnet50"),
    *("resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_large", "mnasnet1_0", "shufflenet_v2_x1_0", "efficientnet_b0"),
    *("regnet_y_400mf", "convnext_tiny"),
)
TIMM = (
    *(
        "res2net50_26w_4s",
        "resnest14d",
        "dpn68",
        "ghostnet_100",
        "ghostnetv2_100",
        "mixnet_s",
        "tf_mixnet_s",
        "cspresnet50",
    ),
    *("cspdarknet53", "nf_resnet50", "eca_nfnet_l0", "inception_next_tiny", "rexnet_100", "skresnet18", "fasternet_t0"),
    *("densenetblur121d", "edgenext_small", "resnet50d", "legacy_seresnet50", "ecaresnet26t", "resnetv2_50"),
    *(
        "hrnet_w18_small",
        "dla34",
        "selecsls42",
        "xception41",
        "ese_vovnet19b_dw",
        "repvgg_a0",
        "lcnet_050",
        "hgnet_tiny",
    ),
    *("tf_efficientnetv2_b0", "convnextv2_atto", "convmixer_768_32", "repvit_m1_0", "starnet_s1", "mambaout_femto"),
    *("focalnet_tiny_srf", "fastvit_t8", "hardcorenas_a"),
)
MODELS = (*(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM))


# --- the tools ---------------------------------------------------------------------------------------------------


def by_autoslim(model: Any, inputs: Any) -> Any:
    import autoslim

    space = autoslim.trace(model, inputs)
    return autoslim.extract(model, space, space.uniform(0.5))


def by_torch_pruning(model: Any, inputs: Any) -> Any:
    import torch_pruning

    last = [module for module in model.modules() if outputs_of_layer(module) == 1000]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=last,
    )
    pruner.step()
    return model


def by_modelopt(model: Any, inputs: Any) -> Any:
    import modelopt.torch.nas as nas
    from modelopt.torch.prune.fastnas import FastNASConfig

    settings = FastNASConfig().model_dump()

    def halve(node: Any) -> None:
        for key, value in node.items():
            if key in ("channels_ratio", "features_ratio"):
                node[key] = [0.5, 1.0]
            elif key in ("channel_divisor", "feature_divisor"):
                node[key] = 1
            elif isinstance(value, dict):
                halve(value)

    halve(settings)
    space = nas.convert(model, mode=[("fastnas", settings)])
    nas.sample(space, min)
    return nas.export(space)


HALVED_BY: dict[str, Callable[[Any, Any], Any]] = {
    "autoslim": by_autoslim,
    "torch-pruning": by_torch_pruning,
    "modelopt": by_modelopt,
}


# --- one measurement, in a process of its own --------------------------------------------------------------------


def outputs_of_layer(module: Any) -> int:
    """Output channels of a convolution or linear layer, else 0."""
    return int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0) or 0)


def measure(name: str, tool: str) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    import grading

    torch.set_num_threads(1)
    model = grading.build(name)
    inputs, _, _ = grading.inputs_for(name, model)
    inputs = tuple(value.float() for value in inputs)
    grading.randomise(model).eval()
    macs: dict[str, int] = {}
    sizes: dict[str, int] = {}
    handles = []

    def counted(key: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            incoming = module.weight[0].numel()
            macs[key] = macs.get(key, 0) + out.numel() * incoming

        return hook

    for key, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            sizes[key] = outputs_of_layer(module)
            if sizes[key] != 1000:
                handles.append(module.register_forward_hook(counted(key)))
    with torch.no_grad():
        shapes = [out.shape for out in grading.outputs_of(model, inputs)]
    for handle in handles:
        handle.remove()
    full = flops(model, inputs, FlopCounterMode)
    unreached = len(grading.unreached(model, inputs))
    started = time.monotonic()
    halved = HALVED_BY[tool](model, inputs).eval()
    seconds = time.monotonic() - started
    with torch.no_grad():
        outputs = grading.outputs_of(halved, inputs)
    assert [out.shape for out in outputs] == shapes, f"gives {[tuple(out.shape) for out in outputs]}"
    assert all(out.isfinite().all() for out in outputs), "gives what is no number"
    assert len(grading.unreached(halved, inputs)) <= unreached, "the gradient does not reach every parameter"
    after = {key: outputs_of_layer(module) for key, module in halved.named_modules()}
    cut = sum(count for key, count in macs.items() if after.get(key, 0) < sizes[key]) / sum(macs.values())
    left = flops(halved, inputs, FlopCounterMode) / full
    grade = "A" if cut >= 0.95 or left <= 0.30 else "B" if cut >= 0.60 else "C"
    return {"grade": grade, "cut": round(cut, 3), "left": round(left, 3), "seconds": round(seconds, 1), "failure": ""}


def flops(model: Any, inputs: Any, counter_type: Any) -> int:
    import torch

    with torch.no_grad(), counter_type(display=False) as counter:
        model(*inputs)
    return int(counter.get_total_flops())


def measured(job: tuple[str, str]) -> dict[str, Any]:
    name, tool = job
    failed = {"grade": "F", "cut": "", "left": "", "seconds": ""}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name, tool], capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return {"model": name, "tool": tool, **failed, "failure": f"no result within {LIMIT} s"}
    line = done.stdout.strip().splitlines()[-1:] or [""]
    if done.returncode or not line[0].startswith("{"):
        text = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"model": name, "tool": tool, **failed, "failure": text[:160]}
    return {"model": name, "tool": tool, **json.loads(line[0])}


# --- files -------------------------------------------------------------------------------------------------------


def page(rows: list[dict[str, Any]]) -> str:
    """Counts per tool, then every model."""
    found = {(row["model"], row["tool"]): row for row in rows}
    lines = ["# Beside other tools", "", *(__doc__ or "").strip().splitlines(), ""]
    lines += ["| tool | A | B | C | F | median seconds |", "| --- | --- | --- | --- | --- | --- |"]
    for tool in TOOLS:
        mine = [row for row in rows if row["tool"] == tool]
        counts = Counter(row["grade"] for row in mine)
        times = sorted(float(row["seconds"]) for row in mine if row["seconds"] != "")
        median = times[len(times) // 2] if times else float("nan")
        lines.append(f"| {tool} | {' | '.join(str(counts[letter]) for letter in 'ABCF')} | {median:.1f} |")
    lines += ["", "Per model: grade, share cut, MACs left.", "", f"| model | {' | '.join(TOOLS)} |"]
    lines += [f"| --- |{' --- |' * len(TOOLS)}"]
    for name in MODELS:
        cells = []
        for tool in TOOLS:
            row = found.get((name, tool))
            if row is None:
                cells.append("")
            elif row["grade"] == "F":
                cells.append(f"F: {row['failure'][:60]}".replace("|", "/"))
            else:
                cells.append(f"{row['grade']} {float(row['cut']):.2f} {float(row['left']):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="measure what has a row already, too")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "TOOL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    rows: list[dict[str, Any]] = []
    if CSV.exists() and not options.again:
        with CSV.open(newline="") as file:
            rows = [dict(row) for row in csv.DictReader(file)]
    known = {(row["model"], row["tool"]) for row in rows}
    jobs = [(name, tool) for name in MODELS for tool in TOOLS if (name, tool) not in known]
    with ThreadPoolExecutor(options.workers) as pool:
        for done, row in enumerate(pool.map(measured, jobs), 1):
            rows.append(row)
            print(
                f"{done}/{len(jobs)} {row['grade']} {row['tool']:14s} {row['model']:36s} {row['failure'][:80]}",
                flush=True,
            )
            CSV.parent.mkdir(parents=True, exist_ok=True)
            with CSV.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            PAGE.write_text(page(rows))
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
