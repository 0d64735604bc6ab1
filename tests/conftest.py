"""Shared by all tests: threads that do not fight, devices, and small data and runs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

# two workers with two threads each would slow each other tenfold on two cores
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device this machine has."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def shapes_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that a small net learns in seconds: bright bars at four angles, 16x16 grey, with noise."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "shapes.npz"

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 4, count)
        rows, columns = np.mgrid[:16, :16] - 7.5
        angles = labels * np.pi / 4
        offset = rng.uniform(-4, 4, (count, 1, 1))
        distance = np.abs(rows * np.cos(angles)[:, None, None] + columns * np.sin(angles)[:, None, None] - offset)
        images = 200 * (distance < 1.5) + rng.normal(30, 25, (count, 16, 16))
        return images.clip(0, 255).astype(np.uint8), labels.astype(np.int64)

    x_train, y_train = part(600)
    x_test, y_test = part(200)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
