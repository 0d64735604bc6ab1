"""How good a subnet is: evaluation of plain modules, and the judge of the greedy search."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoslim.batching import KEPT_BYTES, check_kept
from autoslim.calibrate import batch_statistics, evaluating
from autoslim.distributed import World, gathered, samples_of, world
from autoslim.errors import ConfigError, DataError, RunError
from autoslim.lending import Lender
from autoslim.race import looks, outraced
from autoslim.reuse import Diverged, Reuse
from autoslim.scores import Score, accuracy, checked, count_of, find_score, is_correct, negative_loss, pairs_of
from autoslim.screening import promising
from autoslim.slicing import run_subnet
from autoslim.space import Widths, as_widths, check_whole
from autoslim.supernet import Supernet, unwrapped
from autoslim.tracing import split_input

T = TypeVar("T")


class Judge:
    """Scores widths on fixed held-out batches, with the BatchNorm statistics of each batch (AutoSlim, section 3.3).

    `batches`: (inputs, targets) pairs, kept in memory; large and shuffled, for their statistics stand for the whole
    data. `score(output, targets)`, higher is better, is a number per sample, or their mean; or a name: "accuracy",
    "loss". `also` is a second score that is computed from the same outputs: see `also_of`. The model's buffers and
    modes are left as they were. Use it as the `judge` of `greedy_slim`.

    With `world=distributed.world()` the processes of a group share the work: each is given all batches and asked the
    same questions, runs every so-many-th batch, and gets the answers, to the bit, that one process would get.
    """

    def __init__(
        self,
        supernet: Supernet,
        batches: Iterable[tuple[Any, Any]],
        score: str | Score = "loss",
        *,
        also: str | Score | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self.supernet = unwrapped(supernet, Supernet)
        self.score, self.also = find_score(score), None if also is None else find_score(also)
        self.batches: Sequence[tuple[Any, Any]] = list(pairs_of(batches))
        if not self.batches:
            raise DataError("the search needs held-out images, and there is none")
        self._also_of: dict[Widths, tuple[float, int]] = {}  # of the nets judged last: second score, and samples seen
        self._lender = Lender()

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Mean score of the net of these widths."""
        widths = as_widths(widths)
        found = _Sums()
        with self._modes():
            own = {
                number: self._measured(self._whole(widths, inputs), inputs, targets)
                for number, (inputs, targets) in enumerate(self.batches)
                if number % self.world.size == self.world.rank
            }
        for _, measured in self._of_all(own):
            found.add(measured)
        self._also_of[widths] = found.also, found.count
        return found.score

    def also_of(self, widths: Mapping[str, int]) -> tuple[float, int]:
        """The mean of the second score of one of the nets judged last, and over how many samples it is."""
        assert self.also is not None, "no second score was asked for"
        widths = as_widths(widths)
        if widths not in self._also_of:
            self(widths)
        found = self._also_of[widths]
        self._also_of.clear()
        return found

    def _measured(self, output: Any, inputs: Any, targets: Any) -> _Measured:
        count = count_of(inputs, targets)
        also = 0.0 if self.also is None else float(checked(self.also(output, targets), count).double().mean())
        return _Measured(checked(self.score(output, targets), count).detach().double().cpu(), also, count)

    def _of_all(self, own: Mapping[int, T]) -> list[tuple[int, T]]:
        """What all processes found, each for batches of its own by their number, in the order of the batches."""
        if self.world.size == 1:
            return sorted(own.items(), key=lambda item: item[0])
        return sorted((item for part in gathered(dict(own)) for item in part.items()), key=lambda item: item[0])

    def _whole(self, widths: Widths, inputs: Any) -> Any:
        with self._lender.lent(inputs) as own:
            args, kwargs = split_input(own)
            return run_subnet(self.supernet.model, self.supernet.space, widths, args, kwargs)

    @contextmanager
    def _modes(self) -> Iterator[None]:
        with torch.no_grad(), batch_statistics(self.supernet.model):
            yield


class ReuseJudge(Judge):
    """Gives the scores of `Judge`, to rounding; the nets of a greedy step share what they have in common (see `reuse`).

    `keep_bytes`: memory for what is kept of the current net while its candidates run; those for which it does not
    suffice run as a whole. `reuse` says which groups can be reused. `screen`: look only at so many candidates of a
    step, those that one backward pass on the first batch finds most promising (see `promising`).
    """

    def __init__(
        self,
        supernet: Supernet,
        batches: Iterable[tuple[Any, Any]],
        score: str | Score = "loss",
        *,
        also: str | Score | None = None,
        keep_bytes: int = KEPT_BYTES,
        screen: int | None = None,
        world: World | None = None,
    ) -> None:
        super().__init__(supernet, batches, score, also=also, world=world)
        if screen is not None:
            check_whole(ConfigError, screen=screen)
        check_kept(keep_bytes)
        self.keep_bytes, self.screen = keep_bytes, screen

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
        if self.screen is not None:
            score = negative_loss if self.score is is_correct else self.score  # a count of hits has no gradient
            candidates = promising(self.supernet, widths, candidates, self.batches[0], score, self.screen, savings)
        found = {group: _Sums() for group in candidates}
        now, known = _Sums(), self._scores_of(widths)
        if self.keep_bytes:  # else nothing is reused, nor looked for
            self.reuse.forget()
        with self._modes():
            for start in range(0, len(self.batches), self.world.size):  # a batch for each process
                left = {group: candidates[group] for group in found if found[group].is_running}
                number = start + self.world.rank
                own = (
                    {number: self._measure(widths, left, number, savings, known)} if number < len(self.batches) else {}
                )
                for number, measured in self._of_all(own):  # and decisions batch by batch, as one process makes them
                    self._take(measured, found, now)
                    if number + 1 < len(self.batches):
                        running = {group: sums for group, sums in found.items() if sums.is_running}
                        for group in list(self._hopeless(running, now, savings)):
                            found[group].is_running = False
                            on_candidate(group, found[group].score)
                        if 1 == sum(sums.is_running for sums in found.values()) < len(found):
                            break
                else:
                    continue
                break
        running = {group: sums for group, sums in found.items() if sums.is_running}
        self._also_of = {candidates[group]: (sums.also, sums.count) for group, sums in running.items()}
        for group, sums in running.items():
            on_candidate(group, sums.score)
        self._remember({candidates[group]: sums for group, sums in running.items()}, running, now)
        return {
            group: (sums.score, sums.score if savings is None else (sums.score - now.score) / savings[group])
            for group, sums in running.items()
        }

    compares_with_now = False  # is the net of a step itself judged too, where its candidates do not need that?

    def _scores_of(self, widths: Widths) -> Sequence[Tensor]:
        """What is known of the net of a step: its scores by batch, of the first batches."""
        return ()

    def _measure(
        self,
        widths: Widths,
        candidates: Mapping[str, Widths],
        number: int,
        savings: Mapping[str, float] | None,
        known: Sequence[Tensor],
    ) -> dict[str | None, _Measured]:
        """The candidates on a batch; under None the current net, where it is wanted."""
        inputs, targets = self.batches[number]
        now, outputs = self._outputs(widths, candidates, inputs)
        measured: dict[str | None, _Measured] = {}
        if number < len(known):
            measured[None] = _Measured(known[number], 0.0, len(known[number]))
        elif savings is not None or self.compares_with_now:
            measured[None] = self._measured(now(), inputs, targets)
        return measured | {group: self._measured(output, inputs, targets) for group, output in outputs}

    @staticmethod
    def _take(measured: Mapping[str | None, _Measured], found: Mapping[str, _Sums], now: _Sums) -> None:
        for group, of_batch in measured.items():
            sums = now if group is None else found[group]
            if sums.is_running:  # another process may have run one that drops out at a batch before
                sums.add(of_batch)

    def _hopeless(self, running: Mapping[str, _Sums], now: _Sums, savings: Mapping[str, float] | None) -> Iterable[str]:
        """Candidates that need not be looked at any further."""
        return ()

    def _remember(self, nets: Mapping[Widths, _Sums], running: Mapping[str, _Sums], now: _Sums) -> None:
        """Called at the end of a step with those that did not drop out."""

    def _outputs(
        self, widths: Widths, candidates: Mapping[str, Widths], inputs: Any
    ) -> tuple[Callable[[], Any], Iterator[tuple[str, Any]]]:
        """The output of the current net, and those of its candidates one after the other."""
        reused = self._reused(widths, candidates, inputs)
        now = kept = None
        record = bool(reused) and len(self.batches) > 1 and self._may_record(reused, widths, inputs)
        if reused:
            with suppress(Diverged), self._lender.lent(inputs) as own:
                now, kept = self.reuse.keep(widths, own, reused, record=record)

        def outputs() -> Iterator[tuple[str, Any]]:
            for group, candidate in candidates.items():
                output = None
                if kept is not None and group in reused:
                    # its path depends on the widths: as a whole, then
                    with suppress(Diverged), self._lender.lent(inputs) as own:
                        output = self.reuse.run(kept, group, candidate, own, record=record)
                yield group, self._whole(candidate, inputs) if output is None else output

        return lambda: self._whole(widths, inputs) if now is None else now, outputs()

    def _may_record(self, groups: Iterable[str], widths: Widths, inputs: Any) -> bool:
        """Is there memory for all results of a pass beside those kept? In large passes Python takes little."""
        samples = samples_of(inputs)
        results = (*range(len(self.reuse.results)), *self.reuse.needed(groups))
        return self.reuse.bytes_needed(results, widths, samples) <= self.keep_bytes

    def _reused(self, widths: Widths, candidates: Iterable[str], inputs: Any) -> set[str]:
        """The groups worth keeping something for: first those that save most, as far as memory goes."""
        if not self.keep_bytes:
            return set()
        plans = {group: plan for group in candidates if (plan := self.reuse.plan(group)) is not None}
        samples = samples_of(inputs)
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

    After some of the batches (see `looks`), the three candidates that look best so far are compared with each other one
    on the same samples. That one drops out if the difference would be so large by chance, though it is the better one
    on all samples, with a probability below `1 - confidence` for the whole step (see `outraced`; corrected for
    the number of looks, of candidates that still run, and of samples that are left), so with small batches or few hits
    and misses that differ it takes longer. The
    step ends when one is left: its score is that of the samples seen. With `confidence=1` nobody drops out, with
    `keep_bytes=0` all nets run as a whole.

    What a candidate loses on each sample has hardly changed since it was last looked at on all of them, some steps ago.
    Comparisons are made by regression on that (a control variate), so far fewer samples tell candidates apart; the
    first step, and groups that were never seen in full, are judged on all samples. A search that is to go on exactly
    where another one stopped needs what each step of that one had `learned`: `learn`.
    """

    compares_with_now = True

    def __init__(
        self,
        supernet: Supernet,
        batches: Iterable[tuple[Any, Any]],
        score: str | Score = "loss",
        *,
        also: str | Score | None = None,
        keep_bytes: int = KEPT_BYTES,
        screen: int | None = None,
        confidence: float = 0.95,
        world: World | None = None,
    ) -> None:
        super().__init__(supernet, batches, score, also=also, keep_bytes=keep_bytes, screen=screen, world=world)
        if not (isinstance(confidence, (int, float)) and 0 < confidence <= 1):
            raise ConfigError(f"confidence must be a number above 0 and at most 1, got {confidence!r}")
        self.confidence = confidence
        self._sizes = [count_of(inputs, targets) for inputs, targets in self.batches]
        self._looks = looks(len(self.batches))
        self._gained: dict[str, Tensor] = {}  # by group: (N,), score less that of the net it was a candidate of
        self._seen: list[str] = []  # the groups looked at on all samples in the last step
        self._scores: dict[Widths, Tensor] = {}  # of the candidates of the last step: those samples that were seen
        self._state: list[Any] | None = None  # of the model that all of this was learned from

    def learned(self) -> dict[str, Tensor]:
        """What the last step added to what is known, as plain tensors."""
        names = [*self.supernet.space.groups]
        gained = {f"gained.{group}": self._gained[group] for group in self._seen}
        nets = {f"widths.{number}": torch.tensor([w[g] for g in names]) for number, w in enumerate(self._scores)}
        return gained | nets | {f"scores.{number}": scores for number, scores in enumerate(self._scores.values())}

    def learn(self, tensors: Mapping[str, Tensor]) -> None:
        """Know what another judge of the same batches learned in a step; step after step, in their order.

        Raises `RunError` for tensors that no such judge has learned.
        """
        names = [*self.supernet.space.groups]
        self._check_learned(tensors)
        self._forget_another()
        self._gained |= {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("gained.")}
        self._scores = {
            Widths(zip(names, tensor.tolist(), strict=True)): tensors[f"scores.{name[7:]}"]
            for name, tensor in tensors.items()
            if name.startswith("widths.")
        }

    def _forget_another(self) -> None:
        """What was learned from other weights, before the supernet was trained on, is worth nothing now."""
        state = state_of(self.supernet.model)
        if self._state is not None and self._state != state:
            self._gained, self._seen, self._scores = {}, [], {}
        self._state = state

    def _scores_of(self, widths: Widths) -> Sequence[Tensor]:
        self._forget_another()
        scores = self._scores.get(widths)
        if scores is None:
            return ()
        ends = [*itertools.takewhile(lambda end: end <= len(scores), itertools.accumulate(self._sizes))]
        return [scores[start:end] for start, end in itertools.pairwise([0, *ends])]

    def _check_learned(self, tensors: Mapping[str, Tensor]) -> None:
        space, count = self.supernet.space, sum(self._sizes)
        for name, tensor in tensors.items():
            kind, _, which = name.partition(".")
            samples = tensor.ndim == 1 and tensor.dtype == torch.float32 and len(tensor) <= count
            if kind == "gained":
                fits = samples and which in space.groups and len(tensor) == count
            elif kind == "widths":
                whole = tensor.shape == (len(space.groups),) and not tensor.is_floating_point()
                fits = whole and f"scores.{which}" in tensors
            else:
                fits = kind == "scores" and samples
            if not fits:
                raise RunError(f"it was learned in another search: {name!r} does not fit")

    def _remember(self, nets: Mapping[Widths, _Sums], running: Mapping[str, _Sums], now: _Sums) -> None:
        if self.confidence == 1 or any(sums.samples.ndim != 1 for sums in running.values()):
            return
        # single precision, as it is saved: a search that goes on computes with the same numbers
        self._scores = {widths: sums.samples.float() for widths, sums in nets.items()}
        self._seen = [group for group, sums in running.items() if sums.batches == len(self.batches)]
        self._gained |= {group: (running[group].samples - now.samples).float() for group in self._seen}

    def _hopeless(self, running: Mapping[str, _Sums], now: _Sums, savings: Mapping[str, float] | None) -> Iterable[str]:
        if self.confidence == 1 or len(running) < 2 or next(iter(running.values())).batches not in self._looks:
            return ()
        gained, before = dict[str, Tensor](), dict[str, Tensor]()
        for group, sums in running.items():
            if sums.samples.ndim != 1:
                raise ConfigError("racing needs a score per sample; the score given is a mean: judge with ReuseJudge")
            gained[group] = sums.samples - now.samples
            if group in self._gained:
                before[group] = self._gained[group].double()
        return outraced(gained, before, self.confidence, len(self._looks), savings)


@dataclass(frozen=True)
class _Measured:
    """A net on a batch: scores of its samples (or their mean), mean of the second score, number of samples."""

    scores: Tensor
    also: float
    size: int


class _Sums:
    """What is known of a net so far."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, int]] = []
        self._also = 0.0
        self.is_running = True

    def add(self, measured: _Measured) -> None:
        """One more batch."""
        self._parts.append((measured.scores, measured.size))
        self._also += measured.also * measured.size

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

    @property
    def batches(self) -> int:
        """Batches seen."""
        return len(self._parts)


def make_judge(
    kind: str,
    supernet: Supernet,
    batches: Iterable[tuple[Any, Any]],
    score: str,
    confidence: float,
    keep_bytes: int,
    screen: int | None = None,
) -> Judge:
    """The judge of a run, by name; its second score is the accuracy, and the processes of a group share its work."""
    here = world()
    if kind == "exhaustive":
        return Judge(supernet, batches, score, also="accuracy", world=here)
    if kind == "reuse":
        return ReuseJudge(supernet, batches, score, also="accuracy", keep_bytes=keep_bytes, screen=screen, world=here)
    options: dict[str, Any] = {"keep_bytes": keep_bytes, "screen": screen, "confidence": confidence}
    return RacingJudge(supernet, batches, score, also="accuracy", world=here, **options)


def state_of(model: nn.Module) -> list[Any]:
    """What differs when values of the model have: where each tensor lies, how often torch wrote to it, and its sum.

    The sum is for those who write to `.data`, of which torch keeps no count.
    """
    found: list[Any] = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        total = tensor.detach().sum(dtype=torch.float64).item() if tensor.dtype in _SUMMED else 0.0
        version = 0 if tensor.is_inference() else tensor._version
        found.append((name, tensor.data_ptr(), version, repr(total)))  # text: not a number is equal to itself
    return found


_SUMMED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def evaluate(model: nn.Module, batches: Iterable[tuple[Any, Any]], score: str | Score = accuracy) -> float:
    """Mean of `score(output, targets)` over batches, by size, in evaluation mode; the mode is restored.

    A score is a number per sample, or their mean, or a name: "accuracy", "loss".
    """
    score = find_score(score)
    total, count, lender = 0.0, 0, Lender()
    with evaluating(model), torch.no_grad():
        for inputs, targets in pairs_of(batches):
            size = count_of(inputs, targets)
            with lender.lent(inputs) as own:
                args, kwargs = split_input(own)
                found = checked(score(model(*args, **kwargs), targets), size)
            total += float(found.double().mean()) * size
            count += size
    if not count:
        raise DataError("there are no images to evaluate on")
    return total / count
