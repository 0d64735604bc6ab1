"""Laws of a search as it is run: killed anywhere it goes on alike, chance stops it as seldom as stated, on any net."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import autoslim
from autoslim import (
    Judge,
    LatencyCost,
    MacCost,
    PeakMemoryCost,
    RacingJudge,
    ReuseJudge,
    Supernet,
    greedy_slim,
    resolve_budget,
    trace,
)
from autoslim.calibrate import batch_statistics
from autoslim.models import build_model
from autoslim.scores import negative_loss
from test_latency import invented
from test_pipeline import NET, config, run  # noqa: F401  # a fixture among them
from test_reuse import _Drawn, _supernet

JUDGES: dict[str, Callable[..., Judge]] = {
    "exhaustive": Judge,
    "reuse": ReuseJudge,
    "racing": RacingJudge,
    "racing, screened": lambda *given: RacingJudge(*given, screen=3),
    "racing, little kept": lambda *given: RacingJudge(*given, keep_bytes=1_000_000),
}
BUDGETS = {
    "50%": "score",
    "latency_ms<=70%": "score",
    "macs<=60%, latency_ms<=80%": "score-per-cost",
    "peak_memory<=70%, params<=60%": "score-per-cost",
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", JUDGES)
def test_killed_at_any_step_the_path_is_the_same(kind: str, budget: str) -> None:
    """What follows a step depends on its widths and on what a race has learned; a new judge decides alike."""
    supernet, batches = _supernet()
    space, batches = supernet.space, batches[:5]
    costs = {"macs": MacCost(space), "params": autoslim.ParamCost(space), "peak_memory": PeakMemoryCost(space)}
    cost, limit = resolve_budget(budget, space, costs | {"latency_ms": LatencyCost(space, invented(space))})
    options = {"rule": BUDGETS[budget]}
    judge, steps, states = JUDGES[kind](supernet, batches), list[autoslim.SlimStep](), []
    for step in greedy_slim(space, judge, cost, [limit], **options):  # type: ignore[arg-type]
        steps.append(step)
        states.append(judge.learned() if isinstance(judge, RacingJudge) else {})
    assert len(steps) >= 3
    for at in range(1, len(steps)):
        fresh = JUDGES[kind](supernet, batches)
        if isinstance(fresh, RacingJudge):
            for state in states[:at]:
                fresh.learn(state)
        start = steps[at - 1].widths
        assert next(greedy_slim(space, fresh, cost, [limit], start=start, **options)) == steps[at]  # type: ignore[arg-type]


@pytest.mark.parametrize("judge", ["racing", "reuse"])
def test_a_run_killed_at_any_step_of_a_latency_budget_ends_in_the_same_bytes(
    config: Path,  # noqa: F811
    in_tmp: Path,
    judge: str,
) -> None:
    space = autoslim.trace(build_model(NET), torch.zeros(1, 1, 16, 16)).with_choices(4, 4, 0.25)
    invented(space, 30).save(in_tmp / "phone.csv")
    budgets = json.dumps(["macs<=75%, latency_ms<=75%", "latency_ms<=70%"])
    options = ["latency.table=phone.csv", f"slim.budgets={budgets}", f"slim.judge={judge}", "slim.batch_size=30"]
    options += ["train.epochs=1"]
    settings = [part for text in options for part in ("--set", text)]
    for stage in ("train", "slim"):
        assert run(stage, config, *settings) == 0
    root = in_tmp / "runs" / "small"
    log, found = root / "slim.jsonl", sorted((root / "subnets").rglob("*.json"))
    whole = {path: path.read_bytes() for path in (log, *found)}
    lines = whole[log].splitlines(keepends=True)
    assert len(lines) >= 3
    (in_tmp / "phone.csv").unlink()  # the run has its own
    # a race leaves what it has learned for the last two steps only: a kill cannot throw it back further
    for kept in range(len(lines) - 1 if judge == "racing" else 0, len(lines)):
        log.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])  # killed within a write
        for path in found:
            path.unlink()
        assert run("slim", root) == 0
        assert {path: path.read_bytes() for path in whole} == whole


def test_with_labels_shuffled_the_best_is_dropped_no_more_often_than_stated() -> None:
    """A real net, whose candidates differ by chance alone: labels are drawn anew in each simulation."""
    supernet, batches = _supernet()
    space = supernet.space
    first, *others = space.groups
    full = space.full()
    then = space.narrowed(full, first)
    assert then is not None
    # a step whose candidates were all looked at one step before
    before = {g: each for g in others if (each := space.narrowed(full, g)) is not None}
    candidates = {g: each for g in others if (each := space.narrowed(then, g)) is not None}
    images = torch.cat([inputs for inputs, _ in batches])
    labels = torch.cat([targets for _, targets in batches])
    with torch.no_grad(), batch_statistics(supernet.model):
        nets_ = [full, then, *before.values(), *candidates.values()]
        outputs = {widths: supernet(images, widths) for widths in nets_}
    generator = torch.Generator().manual_seed(0)
    wrong, early, runs, confidence = 0, 0, 300, 0.9
    for _ in range(runs):
        shuffled = labels[torch.randperm(len(labels), generator=generator)]
        scores = {widths: negative_loss(output, shuffled).double() for widths, output in outputs.items()}
        best = max(candidates, key=lambda group: float(scores[candidates[group]].mean()))
        judge = _Drawn(supernet, scores, 100, confidence)
        judge.learn({f"gained.{g}": (scores[each] - scores[full]).float() for g, each in before.items()})
        left = judge.compare(then, candidates)
        wrong += best not in left
        early += len(left) < len(candidates)
    assert wrong <= (1 - confidence) * runs
    assert early > 0  # it does drop some: those that are really worse whatever the labels


# in-place operators, shared layers, concatenation, shuffles, selective kernels, sizes in attributes, re-parameterised
SAMPLE = (
    *("dla46_c", "dpn48b", "ghostnet_050", "hrnet_w18_small", "inception_next_atto", "mixnet_s", "test_byobnet"),
    *("test_nfnet", "repghostnet_050", "res2net50_48w_2s", "rexnet_100", "skresnet18", "densenetblur121d", "lcnet_035"),
    *("test_mambaout", "focalnet_tiny_srf", "ese_vovnet19b_slim", "selecsls60", "fasternet_t0", "test_convnext3"),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*(f"timm:{name}" for name in SAMPLE), "torchvision:googlenet"])
def test_reuse_scores_public_nets_as_whole_passes_do(name: str) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    import grading

    model = grading.randomise(grading.build(name)).eval()
    torch.manual_seed(0)
    inputs = torch.randn(6, 3, 64, 64)
    space = trace(model, inputs[:1]).with_choices(bins=4, divisor=1)
    batches = [(inputs[:3], torch.arange(3)), (inputs[3:], torch.arange(3))]
    supernet = Supernet(model, space)

    def gentle(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return negative_loss(output / output.std().clamp_min(1e-6), targets)  # weights are drawn: logits may be huge

    exact, reuse = Judge(supernet, batches, gentle), ReuseJudge(supernet, batches, gentle)
    widths = space.uniform(0.5)
    groups = [*space.groups][:: max(1, len(space.groups) // 4)]
    candidates = {group: c for group in groups if (c := space.narrowed(widths, group)) is not None}
    scores = reuse.compare(widths, candidates)
    assert candidates
    assert {group: score for group, (score, _) in scores.items()} == pytest.approx(
        {group: exact(candidate) for group, candidate in candidates.items()}, abs=1e-5
    )
