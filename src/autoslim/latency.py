"""Latency as it is measured: wall time of a forward pass, median over repeats."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from autoslim.tracing import split_input


def measure_latency(model: nn.Module, example_input: Any, *, repeats: int = 30, warmup: int = 5) -> float:
    """Median milliseconds of one forward pass in evaluation mode, on the device the model is on.

    The mode is restored.
    """
    args, kwargs = split_input(example_input)
    parameter = next(model.parameters(), None)
    on_cuda = parameter is not None and parameter.is_cuda
    training, times = model.training, []
    model.eval()
    try:
        with torch.inference_mode():
            for index in range(warmup + repeats):
                if on_cuda:
                    torch.cuda.synchronize()
                started = time.perf_counter()
                model(*args, **kwargs)
                if on_cuda:
                    torch.cuda.synchronize()
                if index >= warmup:
                    times.append((time.perf_counter() - started) * 1e3)
    finally:
        model.train(training)
    return statistics.median(times)
