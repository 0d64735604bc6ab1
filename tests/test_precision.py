"""A search in bf16: what rounding does is measured, and bf16 is taken only where it is harmless."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoslim import Judge, Supernet, trace
from autoslim.precision import lowered, lowered_inputs, rounding_of
from autoslim.scores import negative_loss
from test_pipeline import config, fails, run  # noqa: F401  # a fixture among them
from test_reuse import _supernet


def test_the_copy_computes_in_bf16_and_the_original_is_left_alone() -> None:
    supernet, batches = _supernet()
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    low = lowered(supernet)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    widths = supernet.space.smallest()
    rounded = Judge(low, [(lowered_inputs(images), targets) for images, targets in batches])(widths)
    assert rounded == pytest.approx(Judge(supernet, batches)(widths), abs=0.05)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())
    assert supernet.model.training == low.model.training


def test_rounding_is_compared_with_the_chance_of_the_images() -> None:
    """Chance falls with the root of the number of images; what rounding does is the same."""
    supernet, batches = _supernet()
    few, many = (rounding_of(supernet, lowered(supernet), batches[:n], negative_loss) for n in (1, 4))
    assert few.rounding == many.rounding > 0
    assert few.chance == pytest.approx(2 * many.chance)
    none = rounding_of(supernet, lowered(supernet, torch.float32), batches, negative_loss)
    assert none.rounding == 0
    assert none.is_harmless


def test_a_net_that_bf16_spoils_is_found_out() -> None:
    """A large common offset before the classes are told apart: bf16 keeps eight bits of it."""
    supernet, batches = _supernet()

    class Offset(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + 1000.0 - 1000.0

    net = Offset(supernet.model)
    spoiled = Supernet(net, trace(net, batches[0][0][:1]).with_choices(bins=4, divisor=2))
    assert not rounding_of(spoiled, lowered(spoiled), batches, negative_loss).is_harmless


def test_a_run_searches_in_bf16_or_says_why_not(config: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert "slim.precision" in fails(capsys, "run", config, "--set", "slim.precision=fp8")
    assert run("run", config, "--set", "slim.precision=bf16") == 0
    said = capsys.readouterr().err
    assert "search: in bf16 rounding moves" in said or "search: in fp32, for in bf16 rounding moves" in said
    root = in_tmp / "runs" / "small"
    path = (root / "slim.jsonl").read_bytes()
    (root / "slim.jsonl").write_bytes(b"".join(path.splitlines(keepends=True)[:-1]))
    for metrics in root.rglob("subnets/*/metrics.json"):
        metrics.unlink()
    assert run("slim", root) == 0
    assert (root / "slim.jsonl").read_bytes() == path
