"""Peak memory of a sandwich step against a plain training step of the full net, same batch, CPU.

    python benchmarks/bench_memory.py            # MobileNetV2 and ResNet-50 (torchvision), 64 px
    python benchmarks/bench_memory.py --quick    # MobileNetV2 only

Each measurement is a process of its own; the peak is the high-water mark of resident memory over three steps, less what
the process held before its first step (code and libraries). MALLOC_MMAP_THRESHOLD_ makes glibc give freed tensors back
at once, so that the mark shows what is held and not how the heap fragments. Needs Linux.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

_ENVIRONMENT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}


def resident(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) / 1024


def measure(name: str, kind: str, batch: int, size: int, precision: str = "fp32") -> float:
    """MiB that two steps need beyond the bare process."""
    import random

    import torch
    import torchvision
    from torch import nn

    from autoslim import Recipe, Supernet, sandwich_backward, trace
    from autoslim.train import make_optimizer

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    model = torchvision.models.get_model(name, weights=None)
    supernet = Supernet(model, trace(model, torch.zeros(1, 3, size, size)).with_choices())
    optimizer = make_optimizer(model, Recipe())
    loss = nn.CrossEntropyLoss()
    images, targets = torch.randn(batch, 3, size, size), torch.randint(0, 1000, (batch,))
    rng = random.Random(0)
    before = resident("VmRSS")
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            if kind == "sandwich":
                sandwich_backward(supernet, images, targets, loss=loss, rng=rng)
            else:
                loss(model(images), targets).backward()
        optimizer.step()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", nargs=4, metavar=("NET", "KIND", "BATCH", "SIZE"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    if options.measure:
        name, kind, batch, size = options.measure
        print(measure(name, kind, int(batch), int(size), options.precision))
        return
    cases = [("mobilenet_v2", 128, 64)] if options.quick else [("mobilenet_v2", 128, 64), ("resnet50", 64, 64)]
    for name, batch, size in cases:
        peaks = {}
        for kind in ("plain", "sandwich"):
            command = [sys.executable, __file__, "--measure", name, kind, str(batch), str(size)]
            runs = [
                float(subprocess.check_output(command, text=True, env=_ENVIRONMENT))
                for _ in range(1 if options.quick else 3)
            ]
            peaks[kind] = sorted(runs)[len(runs) // 2]
            print(f"{name} {size} px, batch {batch}, {kind}: {peaks[kind]:.0f} MiB")
        print(f"ratio {name} {peaks['sandwich'] / peaks['plain']:.3f}")


if __name__ == "__main__":
    main()
