"""Peak memory of a sandwich step against a plain training step of the full net, same batch, CPU.

    python benchmarks/bench_memory.py            # MobileNetV2 and ResNet-50 (torchvision), 64 px
    python benchmarks/bench_memory.py --quick    # MobileNetV2 only

Each measurement is a process of its own, and there are two. Tensors: what torch allocates in a step at most, more than at
its least (torch.profiler; the second step). Process: the high-water mark of resident memory over three steps, less what
the process held before its first step (code and libraries). That has the kernels in it which oneDNN compiles for each
shape and keeps (up to ONEDNN_PRIMITIVE_CACHE_CAPACITY, whatever the batch): a sandwich step meets new shapes each time.
MALLOC_MMAP_THRESHOLD_ makes glibc give freed tensors back at once, so that the mark shows what is held and not how the
heap fragments. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_ENVIRONMENT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}


def resident(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) / 1024


def measure(name: str, kind: str, batch: int, size: int, precision: str = "fp32", of: str = "process") -> float:
    """MiB that steps need: of tensors, or of the process beyond its bare self."""
    import random

    import torch
    import torchvision
    from torch import nn

    from autoslim import Recipe, Supernet, sandwich_backward, trace
    from autoslim.train import make_optimizer

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model = torchvision.models.get_model(name, weights=None)
    supernet = Supernet(model, trace(model, torch.zeros(1, 3, size, size)).with_choices())
    optimizer = make_optimizer(model, Recipe())
    loss = nn.CrossEntropyLoss()
    images, targets = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    rng = random.Random(0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if kind == "sandwich":
                sandwich_backward(supernet, images, targets, loss=loss, rng=rng)
            else:
                loss(model(images), targets).backward()
        optimizer.step()

    if of == "tensors":
        step()  # the optimizer takes its memory in the first
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
        return allocated(profiled)
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def allocated(profiled: Any) -> float:
    """MiB of tensors at the highest moment that was profiled, above the lowest."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    levels = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    return (max(levels) - min(levels)) / 2**20


def peak(name: str, kind: str, batch: int, size: int, precision: str, of: str) -> float:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, kind, str(batch), str(size)]
    command += ["--precision", precision, "--of", of]
    return float(subprocess.check_output(command, text=True, env=_ENVIRONMENT).splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", nargs=4, metavar=("NET", "KIND", "BATCH", "SIZE"))
    parser.add_argument("--of", choices=("tensors", "process"), default="process", help="for --measure")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    if options.measure:
        name, kind, batch, size = options.measure
        print(measure(name, kind, int(batch), int(size), options.precision, options.of))
        return
    cases = [("mobilenet_v2", 128, 64)] if options.quick else [("mobilenet_v2", 128, 64), ("resnet50", 64, 64)]
    for name, batch, size in cases:
        for of in ("tensors", "process"):
            peaks = {}
            for kind in ("plain", "sandwich"):
                repeats = 1 if options.quick or of == "tensors" else 3
                runs = [peak(name, kind, batch, size, options.precision, of) for _ in range(repeats)]
                peaks[kind] = sorted(runs)[len(runs) // 2]
                print(f"{name} {size} px, batch {batch}, {kind}, {of}: {peaks[kind]:.0f} MiB")
            print(f"ratio {name}, {of}: {peaks['sandwich'] / peaks['plain']:.3f}")


if __name__ == "__main__":
    main()
