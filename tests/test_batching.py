"""Batches of a search within a limit of memory: what is really allocated stays below it."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nets
from autoslim import ChannelSpace, PeakMemoryCost, RacingJudge, Supernet, fit_batches, trace, zoo
from autoslim.batching import Fit
from autoslim.errors import ConfigError
from autoslim.export import load_tensors
from test_pipeline import artefacts, config, fails, run  # noqa: F401  # a fixture among them


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors that operators made and that are still alive; the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is not None and storage._cdata not in self._seen | given:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes()).atexit = False
        return result

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def weights_of(net: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers()))


@pytest.mark.parametrize("name", ["resnet20", "plain"])
@pytest.mark.parametrize("images", [8, 700])
def test_a_step_allocates_no_more_than_it_may(name: str, images: int) -> None:
    torch.manual_seed(0)
    plain = [nets.conv(3, 12), nets.conv(12, 48), nets.conv(48, 48, groups=48), nets.conv(48, 8, 1), *nets.head(8)]
    net = zoo.resnet20(0.5) if name == "resnet20" else nn.Sequential(*plain)
    space = trace(net, torch.zeros(1, 3, 16, 16)).with_choices(3, 4, 0.25)
    weights = weights_of(net)
    limit = 4 * weights + images * (PeakMemoryCost(space)(space.full()) - weights)
    fit = fit_batches(space, limit, batch_size=64)
    assert fit.batch_size == 64 if images > 64 else 2 <= fit.batch_size < 64
    assert (fit.keep_bytes > 0) == (images > 64)
    batches = [(torch.randn(fit.batch_size, 3, 16, 16), torch.zeros(fit.batch_size, dtype=torch.long))]
    candidates = {g: c for g in space.groups if (c := space.narrowed(space.full(), g)) is not None}
    with Allocated() as allocated:
        judge = RacingJudge(Supernet(net, space), batches, keep_bytes=fit.keep_bytes)
        judge.compare(space.full(), candidates)
    assert allocated.peak + weights <= limit
    if images > 64:
        assert judge._reused(space.full(), candidates, batches[0][0])


def test_a_backward_pass_is_counted() -> None:
    torch.manual_seed(0)
    net = zoo.resnet20(0.5)
    space = trace(net, torch.zeros(1, 3, 16, 16)).with_choices(3, 4, 0.25)
    fit = fit_batches(space, 12e6, screened=True)
    assert 2 <= fit.batch_size < fit_batches(space, 12e6).batch_size
    batches = [(torch.randn(fit.batch_size, 3, 16, 16), torch.zeros(fit.batch_size, dtype=torch.long))]
    candidates = {g: c for g in space.groups if (c := space.narrowed(space.full(), g)) is not None}
    with Allocated() as allocated:
        RacingJudge(Supernet(net, space), batches, keep_bytes=fit.keep_bytes, screen=2).compare(
            space.full(), candidates
        )
    assert allocated.peak + weights_of(net) <= 12e6


def test_the_limit_decides_and_says_what_would_do() -> None:
    net = zoo.resnet20(0.5)
    space = trace(net, torch.zeros(1, 3, 16, 16)).with_choices(3, 4, 0.25)
    sizes = [fit_batches(space, memory).batch_size for memory in (2e6, 8e6, 64e6, 1e12)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2
    assert fit_batches(space, 1e12, batch_size=99, keep_bytes=77) == Fit(99, 77)
    assert fit_batches(space, 8e6, keep_bytes=0).keep_bytes == 0
    with pytest.raises(ConfigError, match=r"too little for a search: .* allow ") as error:
        fit_batches(space, 1e5)
    enough = float(str(error.value).rpartition("allow ")[2].split()[0].removesuffix("K")) * 1e3
    assert fit_batches(space, 1.01 * enough).batch_size >= 2
    with pytest.raises(ConfigError, match="is not known"):
        fit_batches(ChannelSpace(space.groups), 1e9)


@pytest.mark.parametrize(
    ("memory", "options", "expected"),
    [
        (float("nan"), {}, "memory_bytes=nan is no limit in bytes"),
        (float("inf"), {}, "memory_bytes=inf is no limit in bytes"),
        (-1.0, {}, "memory_bytes=-1.0 is no limit"),
        (1e9, {"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        (1e9, {"batch_size": 0}, "batch_size must be a whole number of at least 2, got 0"),
        (1e9, {"batch_size": -2}, "batch_size must be a whole number of at least 2, got -2"),
        (1e9, {"keep_bytes": -1}, "keep_bytes=-1 is no number of bytes"),
        (1e9, {"element_bytes": 0}, "element_bytes must be a whole number"),
    ],
)
def test_numbers_that_are_none_of_images_or_bytes_are_named(
    memory: float, options: dict[str, int], expected: str
) -> None:
    space = trace(nn.Sequential(nets.conv(3, 12), *nets.head(12)), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ConfigError, match=expected):
        fit_batches(space, memory, **options)  # type: ignore[arg-type]


def test_a_run_keeps_its_batches(
    config: Path,  # noqa: F811
    in_tmp: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "slim.memory_gb=1e-05: 10K bytes are too little" in fails(
        capsys, "run", config, "--set", "slim.memory_gb=1e-5"
    )
    screened = ("--set", "slim.screen=2", "--set", "slim.judge=exhaustive")
    assert "slim.screen needs slim.judge racing or reuse" in fails(capsys, "run", config, *screened)
    assert not (in_tmp / "runs" / "small" / "supernet").exists()
    assert run("run", config, "--set", "slim.memory_gb=0.003", "--set", "slim.screen=2") == 0
    root = in_tmp / "runs" / "small"
    kept = json.loads((root / "batches.json").read_text())
    assert 2 <= kept["batch_size"] < 150
    count = -(-150 // kept["batch_size"])
    assert f"batches of {-(-150 // count)} images" in capsys.readouterr().err
    path = (root / "slim.jsonl").read_bytes()
    whole = artefacts(root)
    learned = load_tensors(root / "race" / "0001.safetensors")[0]
    assert sum(name.startswith("gained.") for name in learned) == 2, "the first step looked at both in full"
    (root / "slim.jsonl").write_bytes(b"".join(path.splitlines(keepends=True)[:2]))
    for metrics in root.rglob("subnets/*/metrics.json"):
        metrics.unlink()
    with monkeypatch.context() as patched:  # as if another version counted otherwise
        patched.setattr("autoslim.config.fit_batches", lambda *arguments, **options: Fit(30, 0))
        assert run("slim", root) == 0
    assert (root / "slim.jsonl").read_bytes() == path
    assert run("run", root) == 0
    assert artefacts(root)["path"] == whole["path"]
