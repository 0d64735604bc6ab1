"""How good a subnet is: evaluation of plain modules, and the judge of the greedy search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoslim.calibrate import batch_statistics
from autoslim.errors import ConfigError, DataError, nearest
from autoslim.reuse import Diverged, Reuse
from autoslim.slicing import run_subnet
from autoslim.space import Widths
from autoslim.supernet import Supernet
from autoslim.tracing import split_input

Score = Callable[[Any, Any], Tensor]


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose highest logit (N, C) is the target (N,)."""
    return is_correct(output, targets).mean()


def is_correct(output: Tensor, targets: Tensor) -> Tensor:
    """For each sample: 1 if its highest logit (N, C) is the target (N,), else 0."""
    return (output.argmax(1) == targets).double()


def negative_loss(output: Tensor, targets: Tensor) -> Tensor:
    """For each sample: minus the cross-entropy of its logits (N, C). Higher is better."""
    return -nn.functional.cross_entropy(output.float(), targets, reduction="none")


SCORES: dict[str, Score] = {"accuracy": is_correct, "loss": negative_loss}
KEPT_BYTES = 2 * 1024**3


class Judge:
    """Scores widths on fixed held-out batches, with the BatchNorm statistics of each batch (AutoSlim, section 3.3).

    `batches`: (inputs, targets) pairs, kept in memory; large and shuffled, for their statistics stand for the whole
    data. `score(output, targets)`, higher is better, is a number per sample, or their mean; or a name: "accuracy",
    "loss". `also` is a second score that is computed from the same outputs: see `also_of`. The model's buffers and
    modes are left as they were. Use it as the `judge` of `greedy_slim`.
    """

    def __init__(
        self,
        supernet: Supernet,
        batches: Iterable[tuple[Any, Any]],
        score: str | Score = "loss",
        *,
        also: str | Score | None = None,
    ) -> None:
        self.supernet, self.score, self.also = supernet, _score(score), None if also is None else _score(also)
        self.batches: Sequence[tuple[Any, Any]] = list(batches)
        if not self.batches:
            raise DataError("the search needs held-out images, and there is none")
        self._also_of: dict[Widths, tuple[float, int]] = {}  # of the nets judged last: second score, and samples seen

    def __call__(self, widths: Widths) -> float:
        """Mean score of the net of these widths."""
        found = _Sums(self)
        with self._modes():
            for inputs, targets in self.batches:
                found.add(self._whole(widths, inputs), targets)
        self._also_of[widths] = found.also, found.count
        return found.score

    def also_of(self, widths: Widths) -> tuple[float, int]:
        """The mean of the second score of one of the nets judged last, and over how many samples it is."""
        assert self.also is not None, "no second score was asked for"
        if widths not in self._also_of:
            self(widths)
        found = self._also_of[widths]
        self._also_of.clear()
        return found

    def _whole(self, widths: Widths, inputs: Any) -> Any:
        args, kwargs = split_input(inputs)
        return run_subnet(self.supernet.model, self.supernet.space, widths, args, kwargs)

    @contextmanager
    def _modes(self) -> Iterator[None]:
        with torch.no_grad(), batch_statistics(self.supernet.model):
            yield


class ReuseJudge(Judge):
    """Gives the scores of `Judge`, to rounding; the nets of a greedy step share what they have in common (see `reuse`).

    `keep_bytes`: memory for what is kept of the current net while its candidates run; those for which it does not
    suffice run as a whole. `reuse` says which groups can be reused.
    """

    def __init__(
        self,
        supernet: Supernet,
        batches: Iterable[tuple[Any, Any]],
        score: str | Score = "loss",
        *,
        also: str | Score | None = None,
        keep_bytes: int = KEPT_BYTES,
    ) -> None:
        super().__init__(supernet, batches, score, also=also)
        self.keep_bytes = keep_bytes

    @cached_property
    def reuse(self) -> Reuse:
        """What nets of the supernet have in common."""
        with self._modes():
            return Reuse(self.supernet.model, self.supernet.space, self.batches[0][0])

    def compare(
        self,
        widths: Widths,
        candidates: Mapping[str, Widths],
        savings: Mapping[str, float] | None = None,
        on_candidate: Callable[[str, float], None] = lambda group, score: None,
    ) -> dict[str, tuple[float, float]]:
        """Score and worth of the candidates of a greedy step from `widths`, by group.

        The worth is the score or, with `savings`, the score lost per cost saved. Candidates that cannot be the best
        may be missing.
        """
        found = {group: _Sums(self) for group in candidates}
        now = _Sums(self)
        with self._modes():
            for number, (inputs, targets) in enumerate(self.batches, start=1):
                left = [group for group in found if found[group].is_running]
                now_output, outputs = self._outputs(widths, {g: candidates[g] for g in left}, inputs)
                if savings is not None:
                    now.add(now_output(), targets)
                for group, output in outputs:
                    found[group].add(output, targets)
                if number < len(self.batches):
                    for group in self._hopeless({g: found[g] for g in left}, now, savings):
                        found[group].is_running = False
                        on_candidate(group, found[group].score)
                    if 1 == sum(sums.is_running for sums in found.values()) < len(found):
                        break
        running = {group: sums for group, sums in found.items() if sums.is_running}
        self._also_of = {candidates[group]: (sums.also, sums.count) for group, sums in running.items()}
        for group, sums in running.items():
            on_candidate(group, sums.score)
        return {
            group: (sums.score, sums.score if savings is None else (sums.score - now.score) / savings[group])
            for group, sums in running.items()
        }

    def _hopeless(self, running: Mapping[str, _Sums], now: _Sums, savings: Mapping[str, float] | None) -> Iterable[str]:
        """Candidates that need not be looked at any further."""
        return ()

    def _outputs(
        self, widths: Widths, candidates: Mapping[str, Widths], inputs: Any
    ) -> tuple[Callable[[], Any], Iterator[tuple[str, Any]]]:
        """The output of the current net, and those of its candidates one after the other."""
        reused = self._reused(widths, candidates, inputs)
        now = kept = None
        with suppress(Diverged):
            now, kept = self.reuse.keep(widths, inputs, reused) if reused else (None, None)

        def outputs() -> Iterator[tuple[str, Any]]:
            for group, candidate in candidates.items():
                output = None
                if kept is not None and group in reused:
                    with suppress(Diverged):  # its path depends on the widths: as a whole, then
                        output = self.reuse.run(kept, group, candidate, inputs)
                yield group, self._whole(candidate, inputs) if output is None else output

        return lambda: self._whole(widths, inputs) if now is None else now, outputs()

    def _reused(self, widths: Widths, candidates: Iterable[str], inputs: Any) -> set[str]:
        """The groups worth keeping something for: first those that save most, as far as memory goes."""
        if not self.keep_bytes:
            return set()
        plans = {group: plan for group in candidates if (plan := self.reuse.plan(group)) is not None}
        samples = next(leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim)
        reused, needed = set[str](), frozenset[int]()
        for group in sorted(plans, key=lambda group: plans[group].share):
            together = needed | plans[group].needed
            if self.reuse.bytes_needed(together, widths, samples) <= self.keep_bytes:
                reused.add(group)
                needed = together
        saved = sum(1 - plans[group].share for group in reused)
        return reused if saved > 1 else set()  # keeping costs a pass


class RacingJudge(ReuseJudge):
    """Compares the nets of a greedy step batch by batch; those that cannot win any more drop out.

    After each batch, the scores of the best candidate so far are compared with those of each other on the same samples.
    The other drops out if the difference would be so large by chance, though it is the better one on all samples, with
    a probability below `1 - confidence` for the whole step (normal approximation, one-sided, corrected for the number
    of comparisons and for how many samples are left). The step ends when one is left: its score is that of the samples
    seen. With `confidence=1` nobody drops out, with `keep_bytes=0` all nets run as a whole.
    """

    def __init__(
        self,
        supernet: Supernet,
        batches: Iterable[tuple[Any, Any]],
        score: str | Score = "loss",
        *,
        also: str | Score | None = None,
        keep_bytes: int = KEPT_BYTES,
        confidence: float = 0.95,
    ) -> None:
        super().__init__(supernet, batches, score, also=also, keep_bytes=keep_bytes)
        if not 0 < confidence <= 1:
            raise ConfigError(f"confidence must lie above 0 and at most at 1, got {confidence}")
        self.confidence = confidence
        self._samples = sum(len(targets) for _, targets in self.batches)

    def _hopeless(self, running: Mapping[str, _Sums], now: _Sums, savings: Mapping[str, float] | None) -> Iterable[str]:
        if self.confidence == 1 or len(running) < 2:
            return
        worth = {}
        for group, sums in running.items():
            if sums.samples.ndim != 1:
                raise ConfigError("racing needs a score per sample; the score given is a mean: judge with ReuseJudge")
            worth[group] = sums.samples if savings is None else (sums.samples - now.samples) / savings[group]
        best = max(worth, key=lambda group: float(worth[group].mean()))
        comparisons = (len(self.supernet.space.groups) - 1) * (len(self.batches) - 1)
        bound = NormalDist().inv_cdf(1 - (1 - self.confidence) / max(1, comparisons))
        for group in worth:
            if group != best and _lead(worth[best] - worth[group], self._samples) > bound:
                yield group


def _lead(differences: Tensor, population: int) -> float:
    """A mean in standard errors, as that of some samples of a finite population."""
    count = len(differences)
    error = float(differences.std()) / count**0.5 * (1 - count / population) ** 0.5
    mean = float(differences.mean())
    return mean / error if error > 0 else (float("inf") if mean > 0 else 0.0)


class _Sums:
    """What is known of a net so far."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._parts: list[tuple[Tensor, int]] = []
        self._also = 0.0
        self.is_running = True

    def add(self, output: Any, targets: Any) -> None:
        """One more batch."""
        judge, size = self._judge, len(targets)
        self._parts.append((judge.score(output, targets).detach().double().cpu(), size))
        if judge.also is not None:
            self._also += float(judge.also(output, targets).double().mean()) * size

    @property
    def samples(self) -> Tensor:
        """The score of each sample; without dimensions if the score is a mean."""
        scores = [scores for scores, _ in self._parts]
        return torch.cat(scores) if scores[0].ndim else scores[0]

    @property
    def score(self) -> float:
        """The mean score."""
        return sum(float(scores.mean()) * size for scores, size in self._parts) / self.count

    @property
    def also(self) -> float:
        """The mean of the second score."""
        return self._also / self.count

    @property
    def count(self) -> int:
        """Samples seen."""
        return sum(size for _, size in self._parts)


def make_judge(
    kind: str, supernet: Supernet, batches: Iterable[tuple[Any, Any]], score: str, confidence: float, keep_bytes: int
) -> Judge:
    """The judge of a run, by name; its second score is the accuracy."""
    if kind == "exhaustive":
        return Judge(supernet, batches, score, also="accuracy")
    if kind == "reuse":
        return ReuseJudge(supernet, batches, score, also="accuracy", keep_bytes=keep_bytes)
    return RacingJudge(supernet, batches, score, also="accuracy", keep_bytes=keep_bytes, confidence=confidence)


def _score(score: str | Score) -> Score:
    if not isinstance(score, str):
        return score
    if score not in SCORES:
        raise ConfigError(f"no score {score!r}; {nearest(score, SCORES)}")
    return SCORES[score]


def evaluate(model: nn.Module, batches: Iterable[tuple[Any, Any]], score: Score = accuracy) -> float:
    """Mean of `score(output, targets)` over batches, by size, in evaluation mode; the mode is restored.

    A score is a number per sample, or their mean.
    """
    modes = {module: module.training for module in model.modules()}
    total, count = 0.0, 0
    try:
        model.eval()
        with torch.no_grad():
            for inputs, targets in batches:
                args, kwargs = split_input(inputs)
                total += float(score(model(*args, **kwargs), targets).double().mean()) * len(targets)
                count += len(targets)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise DataError("there are no images to evaluate on")
    return total / count
