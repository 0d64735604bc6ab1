"""`trace`: run a model once on labels, read the channel groups off, and prove that they can be cut.

1. Capture: a copy of the model on the meta device runs under a dispatch mode; the rules tie atoms together.
2. Assemble: classes of tied atoms that some layer produces become groups and ranks; the rest stays fixed, and is noted.
3. Prove: cut every group, run again with the final labels; what fails, or does not line up, is frozen with its reason.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import logging
import math
import random
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from autoslim.atoms import FIXED, Atoms, CarriedAtoms, Labels, Mismatch, SettledAtoms
from autoslim.errors import TraceError, nearest
from autoslim.lifetimes import Lifetimes, is_silent
from autoslim.recorder import RawOperation, Recorder, Unsupported, line_of_the_user
from autoslim.rules import Rule, find_rule, pass_freely
from autoslim.shortcuts import NoDetours, NoUnrolling, shaped
from autoslim.sizes import SizeMode, mark_attributes
from autoslim.slicing import copy_module, extract
from autoslim.space import (
    Activation,
    Attribute,
    Axis,
    ChannelGroup,
    ChannelSpace,
    Note,
    Operation,
    Reason,
    Span,
    Widths,
)

ExampleInput = Tensor | tuple[Any, ...] | Mapping[str, Any]

_SINGLE = "it has a single output channel"
_TIED = "all of its channels are tied to each other"
OUTPUT = "its output is an output of the network"
_SHAPED = "keep the weight in the shape (out, in, ...)"
_UNKNOWN = (
    "name the layer in `free` if the operator treats channels one by one; else add a rule for it (docs/tracing.md)"
)


def trace(
    model: nn.Module,
    example_input: ExampleInput,
    *,
    fixed: Iterable[str] = (),
    tie: Iterable[Iterable[str]] = (),
    free: Iterable[str] = (),
) -> ChannelSpace:
    """The channel space of any model: which channels can be cut together, what stays fixed and why.

    `example_input` is a tensor, a tuple of positional arguments or a mapping of keyword arguments. Costs derived from
    the space are those of one forward pass on it, so a batch of one gives the usual figures. The model itself is not
    touched, and no arithmetic is done: everything runs on the meta device (if the model does not run there on fake
    tensors, or on real ones: `ChannelSpace.remarks` says so), in evaluation mode and, where that is possible, in
    training mode too (auxiliary heads). Every width >= 1 that the network allows is a choice; thin them out with
    `ChannelSpace.with_choices`.

    What tracing cannot know can be said; it is proven like everything else. `fixed` holds globs of module names to
    leave alone; a name also fixes everything below it. `tie` holds lists of layers whose output channels are to be cut
    together, one by one. `free` holds globs of layers whose output channels pass through operators without a rule one
    by one (a custom operator, say): this is tried out on numbers.

    Raises `TraceError` if the model is no `nn.Module`, does not run on the input, has nothing to slim, or if a name is
    unknown.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace needs a torch.nn.Module, got {type(model).__name__}")
    lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
    if lazy:
        raise TraceError(f"{lazy[0]!r} has no shape yet: run {type(model).__name__} once on an example, then trace it")
    wishes = _Wishes.checked(model, fixed, tie, free)
    with _quiet_torch():
        subject = _prepared(model, example_input)
        recorder = _capture_all(subject, wishes)
        try:
            space = _proven(subject, _assemble(recorder, model, wishes, subject), recorder)
        except _Unstable:  # ties met late in the pass may tie more before: once more with what is known
            _walk(subject, subject.passes[0], recorder)
            try:
                space = _proven(subject, _assemble(recorder, model, wishes, subject), recorder)
            except _Unstable as error:
                raise TraceError(f"{type(model).__name__} does something else at each forward pass: {error}") from None
    if not space.groups:
        told = [f"{note.name}: {note.reason}{f' at {note.line}' if note.line else ''}" for note in space.notes[:3]]
        reasons = "; ".join(told) or "it has no conv or linear layer"
        raise TraceError(f"nothing in {type(model).__name__} can be slimmed ({reasons})")
    return dataclasses.replace(space, remarks=subject.remarks)


@dataclass(frozen=True)
class _Wishes:
    """What the user said about layers, by name."""

    fixed: tuple[str, ...] = ()
    tie: tuple[tuple[str, ...], ...] = ()
    free: tuple[str, ...] = ()

    @classmethod
    def checked(
        cls, model: nn.Module, fixed: Iterable[str], tie: Iterable[Iterable[str]], free: Iterable[str]
    ) -> _Wishes:
        names = [name for name, _ in model.named_modules() if name]
        globs = {
            option: [given] if isinstance(given, str) else [*given]
            for option, given in (("fixed", fixed), ("free", free))
        }
        for option, listed in globs.items():
            for glob in listed:
                if not any(fnmatch.fnmatchcase(name, glob) for name in names):
                    raise TraceError(f"{option}: no module is named {glob!r}; {nearest(glob, names)}")
        ties = []
        for entry in tie:
            layers = () if isinstance(entry, str) else tuple(entry)
            if len(layers) < 2:
                raise TraceError(f"tie: expected lists of at least two layers, as [[a, b], ...], got {entry!r}")
            for layer in layers:
                if layer not in names:
                    raise TraceError(f"tie: no module is named {layer!r}; {nearest(layer, names)}")
            ties.append(layers)
        return cls(tuple(globs["fixed"]), tuple(ties), tuple(globs["free"]))

    def is_fixed(self, name: str) -> bool:
        return any(_covers(glob, name) for glob in self.fixed)

    def is_free(self, name: str) -> bool:
        return any(_covers(glob, name) for glob in self.free)

    def tie_layers(self, recorder: Recorder) -> None:
        """Merge the output channels of layers that are to be tied."""
        produced: dict[str, Labels] = {}
        for operation in recorder.operations:
            if operation.produced is not None:
                produced.setdefault(operation.name, operation.produced)
        for first, *others in self.tie:
            for layer in (first, *others):
                if layer not in produced:
                    raise TraceError(f"tie: {layer!r} is no conv or linear layer; {nearest(layer, produced)}")
                if len(produced[layer]) != len(produced[first]):
                    sizes = f"{len(produced[first])} and {len(produced[layer])}"
                    raise TraceError(f"tie: {first!r} and {layer!r} have {sizes} output channels")
                recorder.atoms.merge(
                    produced[first], produced[layer], lambda: Reason("it is tied to channels that stay by the user")
                )


def split_input(example_input: ExampleInput) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example input as positional and keyword arguments."""
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    return (example_input,), {}


# --- capture -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pass:
    """A mode of the model, and arguments it runs with."""

    training: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fake: FakeTensorMode | None = None

    @property
    def has_numbers(self) -> bool:
        """Is it run on real tensors, so that shapes may depend on values?"""
        leaves = tree_leaves((self.args, self.kwargs))
        return self.fake is None and not any(leaf.is_meta for leaf in leaves if isinstance(leaf, Tensor))

    def _functions(self, model: nn.Module) -> AbstractContextManager[Any] | None:
        """What is run in place of some functions of torch: others where there are numbers than where only shapes."""
        if self.has_numbers:
            return NoDetours()
        has_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        return NoUnrolling() if has_recurrent else None

    def on(self, model: nn.Module, *modes: AbstractContextManager[Any] | None) -> Any:
        """The output of a model, under some modes. Random numbers are the same each time, so that its path is."""
        model.train(self.training)
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.eval()  # it treats channels one by one either way
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)  # that of the CPU alone
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for mode in (self.fake, self._functions(model), *modes):
                if mode is not None:
                    stack.enter_context(mode)
            return model(*self.args, **self.kwargs)


@dataclass(frozen=True)
class _Subject:
    """The model and its input where they are traced: on meta, or as they are if the model does not run there."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fake: FakeTensorMode | None = None
    remarks: tuple[str, ...] = ()
    originals: Mapping[int, str] = dataclasses.field(default_factory=dict)  # id -> name, for the user's own parameters
    trail: Sequence[tuple[str, ...]] = ()  # of operators, in evaluation mode
    lifetimes: Lifetimes | None = None  # of a pass in evaluation mode

    @cached_property
    def passes(self) -> list[_Pass]:
        """The forward passes to trace: in evaluation mode, and in training mode if other operators are run there.

        For that a single example may be too few (batch statistics of one value), so twice the batch is tried next.
        """
        found = [_Pass(False, self.args, self.kwargs, self.fake)]
        twice = tree_map(_doubled, (self.args, self.kwargs))
        for args, kwargs in ((self.args, self.kwargs), twice):
            run = _Pass(True, args, kwargs, self.fake)
            with suppress(Exception):
                model = self.fresh()
                lifetimes = Lifetimes(model)
                run.on(model, lifetimes)
                return found if lifetimes.trail == self.trail else [*found, run]
        return found

    def fresh(self) -> nn.Module:
        """A copy whose modules may be changed by a forward pass."""
        return copy_module(self.model, lambda name, tensor: tensor.clone())


class _OperatorError(Exception):
    """An operator refused its arguments; carries the labels that entered it."""

    def __init__(self, text: str, labels: Labels) -> None:
        super().__init__(text)
        self.labels = labels


# recurrent layers hold their weights in a second list, which does not follow; attention insists on its embed_dim
_KEEP_SIZES = (nn.RNNBase, nn.MultiheadAttention)


class _LabelMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own base
    """Runs the rule of each operator after it."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = find_rule(func)
        if func.namespace == "prim":  # a property of a fake tensor
            return func(*args, **kwargs)
        if rule is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        recorder = self.recorder
        recorder.reached(func)
        try:
            result = shaped(func, args, kwargs)
            if result is None:
                result = func(*args, **kwargs)
        except Exception as error:
            seen = [recorder.known(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            raise _OperatorError(_first_line(error), np.concatenate([*seen, np.array([], dtype=np.int64)])) from error
        recorder.leave_trail(args)
        with unset_fake_temporarily():  # labels are real
            self._labelled(rule, func, args, kwargs, result)
        recorder.results.append(result)
        if recorder.atoms.is_settled:
            self._compare(result)
        elif not is_silent(func):
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            recorder.outputs.append(
                (recorder.operator, [(tuple(leaf.shape), recorder.labels(leaf)) for leaf in leaves])
            )
        return result

    def _compare(self, result: Any) -> None:
        """Raise `Mismatch` if an axis without channels is not as long as in the capture.

        A number that follows the widths is used for something else as well.
        """
        recorder = self.recorder
        leaf = next((leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), None)
        if leaf is None or _is_moved(recorder.operator):
            return
        name, shape, labels = next(recorder.expected, ("", (), ()))
        if name != recorder.operator or leaf.ndim != len(shape):
            recorder.expected = iter(())  # another path: what follows cannot be compared
        elif leaf.shape != shape:
            for before, now, known, found in zip(shape, leaf.shape, labels, recorder.labels(leaf), strict=True):
                if now != before and known is None and found is None:
                    text = f"{recorder.where} gives {now} in place of {before} along an axis that has no channels"
                    raise Mismatch(text, recorder.known(leaf))

    def _labelled(self, rule: Rule | None, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        recorder = self.recorder
        unknown = f"the operator {recorder.operator} is not understood"
        inside = recorder.modules[-1][1] if recorder.modules else None
        keeps_sizes = f"nn.{type(inside).__name__} keeps its sizes" if isinstance(inside, _KEEP_SIZES) else ""
        if is_silent(func):
            recorder.indexes(result, recorder.indexed(args[0]))
        else:
            for arg in (*args, *kwargs.values()):
                if isinstance(arg, Tensor):
                    recorder.reads(arg)
                elif isinstance(arg, (list, tuple)):
                    for entry in arg:
                        if isinstance(entry, Tensor):
                            recorder.reads(entry)
        if keeps_sizes:
            self._pin((args, kwargs), keeps_sizes)
        try:
            if rule is not None:
                rule(recorder, func, args, kwargs, result)
                if keeps_sizes:
                    self._pin(result, keeps_sizes)
                return
        except Unsupported as error:
            unknown = f"{error} in the operator {recorder.operator} is not understood"
        except Mismatch as error:
            if recorder.atoms.is_settled and len(error.labels):  # without, nothing is cut: it was frozen for this
                raise
            unknown = f"channels do not line up in the operator {recorder.operator} ({error})"
        if recorder.passes_freely(args, kwargs):
            pass_freely(recorder, func, args, kwargs, result)
            return
        path = recorder.modules[-1][0] if recorder.modules else ""
        self._pin((args, kwargs), f"{unknown} (in {path or 'the forward of the model'})", _UNKNOWN)
        entering = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                recorder.obscure(entering, leaf)

    def _pin(self, tensors: Any, text: str, remedy: str = "") -> None:
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor):
                self.recorder.pin(leaf, text, remedy)


class _Run(Protocol):
    """One forward pass, under some modes."""

    def on(self, model: nn.Module, *modes: AbstractContextManager[Any] | None) -> Any:
        """The output of a model."""


def run_labelled(
    run: _Run, model: nn.Module, recorder: Recorder, within: AbstractContextManager[Any] | None = None
) -> None:
    """One forward pass under the label mode, and another one within it; outputs are pinned."""
    sizes: AbstractContextManager[Any] = nullcontext()
    if not recorder.atoms.is_settled:
        mark_attributes(model)
        sizes = SizeMode(recorder.call, recorder)
    names = {id(module): name for name, module in model.named_modules()}

    def push(module: nn.Module, args: Any) -> None:
        if id(module) in names:
            recorder.entered = names[id(module)]
            recorder.modules.append((recorder.entered, module))

    def pop(module: nn.Module, args: Any, result: Any) -> None:
        if id(module) in names:
            recorder.modules.pop()

    handles = [  # for all modules at once: thousands of hooks take their time
        register_module_forward_pre_hook(push),
        register_module_forward_hook(pop, always_call=True),
    ]
    recorder.modules.clear()
    recorder.begin(model)
    try:
        output = run.on(model, sizes, _LabelMode(recorder), within)
        for tensor in tensors_in(output):
            recorder.reads(tensor)
            recorder.pin(tensor, OUTPUT)
    finally:
        for handle in handles:
            handle.remove()


def _capture(subject: _Subject, wishes: _Wishes, keep_groups: Iterable[str], renumbers: bool) -> Recorder:
    """Labels after a pass in evaluation mode and, if other operators are run there, one in training mode."""
    recorder = Recorder(
        Atoms(),
        grouped=dict.fromkeys(keep_groups, True),
        renumbers=renumbers,
        is_free=wishes.is_free,
        originals=subject.originals,
    )
    evaluation, *training = subject.passes
    _walk(subject, evaluation, recorder)
    for run in training:
        evaluated = list(recorder.trail)
        recorder.trail.clear()
        _walk(subject, run, recorder)
        recorder.trains_alike = recorder.trail == evaluated
    if not training and (recorder.grouped or recorder.could_renumber):
        _walk(subject, evaluation, recorder)  # ties met late may tie more where channels were split before
    wishes.tie_layers(recorder)
    return recorder


def _walk(subject: _Subject, run: _Pass, recorder: Recorder) -> None:
    """One pass of a model on labels. Costs are those of the first."""
    counted, outputs = list(recorder.operations), recorder.outputs
    recorder.outputs = []
    try:
        run_labelled(run, subject.fresh(), recorder)
    except Mismatch as error:  # outside of a rule
        raise TraceError(f"{type(subject.model).__name__} cannot be traced: {error} ({recorder.where})") from error
    recorder.outputs = outputs or recorder.outputs
    if counted:
        recorder.operations, extra = counted, recorder.operations[len(counted) :]
        seen = {operation.weight for operation in counted}
        recorder.operations += [
            dataclasses.replace(operation, scale=0, output_scale=0)
            for operation in extra
            if operation.weight not in seen
        ]


def _capture_all(subject: _Subject, wishes: _Wishes) -> Recorder:
    """Capture, in the stricter sense of splitting first; parts are numbered anew where that makes more cuttable."""
    recorder = _capture_groups(subject, wishes, renumbers=False)
    if recorder.could_renumber and _cuttable_share(recorder) < _ENOUGH:
        other = _capture_groups(subject, wishes, renumbers=True)
        if _cuttable_share(other) > _cuttable_share(recorder):
            return other
    return recorder


def _capture_groups(subject: _Subject, wishes: _Wishes, *, renumbers: bool) -> Recorder:
    """Capture; grouped convolutions of which no whole group can be cut are tried again with equal ranks per group."""
    keep_groups: set[str] = set()
    while True:
        recorder = _capture(subject, wishes, keep_groups, renumbers)
        pinned = recorder.atoms.pinned()
        stuck = {
            operation.weight
            for operation in recorder.operations
            if operation.weight in recorder.grouped
            and operation.incoming > 1
            and operation.produced is not None
            and _free_classes(recorder, operation.produced, pinned) < 2
        }
        if stuck <= keep_groups:
            return recorder
        keep_groups |= stuck


_ENOUGH = 0.95  # share of the multiply-accumulates whose output channels can be cut


def _cuttable_share(recorder: Recorder) -> float:
    pinned = recorder.atoms.pinned()
    cuttable, total = 0, 0
    for operation in recorder.operations:
        if operation.produced is not None:
            macs = operation.scale * math.prod(len(factor) for factor in operation.factors)
            total += macs
            cuttable += macs if _free_classes(recorder, operation.produced, pinned) > 1 else 0
    return cuttable / max(total, 1)


def _free_classes(recorder: Recorder, labels: Labels, pinned: Mapping[int, Reason]) -> int:
    return len(set(recorder.atoms.find(labels).tolist()) - pinned.keys() - {FIXED})


def _prepared(model: nn.Module, example_input: ExampleInput) -> _Subject:
    """Model and input on the meta device, if the model runs there, else on fake tensors, else as real copies."""
    args, kwargs = split_input(example_input)
    shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    name = type(model).__name__
    failures: list[Exception] = []
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    ways: tuple[tuple[FakeTensorMode | None, Callable[[Tensor], Tensor], str], ...] = (
        (None, _to_meta, ""),
        (fake, lambda tensor: fake.from_tensor(tensor.detach()), "traced on fake tensors"),
        (None, _to_copy, "traced on real tensors, along the path that this input takes"),
    )
    for mode, convert, how in ways:
        try:
            subject = _converted(model, args, kwargs, convert, mode)
        except Exception as error:
            raise TraceError(f"{name} cannot be copied: {_first_line(error)}") from error
        trial = subject.fresh()
        lifetimes = Lifetimes(trial)
        try:
            _Pass(False, subject.args, subject.kwargs, mode).on(trial, lifetimes)
        except Exception as error:
            failures.append(error)
            continue
        remarks = [f"{name} does not run on the meta device ({_first_line(failures[0])}): {how}"] if failures else []
        if _has_drawn_random_numbers():
            remarks.append(f"{name} draws random numbers in its forward pass: traced along one path that it takes")
        lifetimes.finish()
        return dataclasses.replace(
            subject,
            remarks=tuple(remarks),
            originals={id(parameter): name for name, parameter in model.named_parameters()},
            trail=lifetimes.trail,
            lifetimes=lifetimes,
        )
    raise TraceError(
        f"{name} does not run on the example input of shape {shapes or 'none'}: {_first_line(failures[-1])}"
    ) from failures[-1]


def _has_drawn_random_numbers() -> bool:
    """Did the last pass draw numbers in Python or NumPy, so that the model's path may depend on them?"""
    after = random.getstate(), str(np.random.get_state())
    random.seed(0)
    np.random.seed(0)
    return after != (random.getstate(), str(np.random.get_state()))


def _converted(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    convert: Callable[[Tensor], Tensor],
    fake: FakeTensorMode | None,
) -> _Subject:
    inputs = tree_map(lambda leaf: convert(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    args, kwargs = inputs
    return _Subject(copy_module(model, lambda name, tensor: convert(tensor)), args, kwargs, fake)


def _doubled(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim > 0 else leaf


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _to_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor in a result, whatever it is wrapped in."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple, set)):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output):
        for entry in dataclasses.fields(output):
            yield from tensors_in(getattr(output, entry.name, None))
    elif hasattr(output, "__dict__"):
        yield from tensors_in(vars(output))


# --- assemble ----------------------------------------------------------------------------------------------------


class _Classes:
    """Classes of tied atoms as (group, rank)."""

    def __init__(self, recorder: Recorder, fixed_layers: Callable[[str], bool]) -> None:
        self._find = recorder.atoms.find
        self.reasons = recorder.atoms.pinned()
        producers = [op for op in recorder.operations if op.produced is not None]
        for operation in producers:
            if fixed_layers(operation.name):
                for root in self.roots(operation.produced):
                    self.reasons.setdefault(root, Reason("fixed by the user", remedy="take it out of `fixed`"))
        self._counted = recorder.counted
        self.groups: dict[str, ChannelGroup] = {}
        self._places: dict[int, tuple[str, int]] = {}
        self._axes: dict[bytes, Axis] = {}
        self._is_pinned = np.zeros(len(recorder.atoms), dtype=bool)
        self._is_pinned[list(self.reasons)] = True
        self._number(producers)

    def roots(self, labels: Labels | None) -> list[int]:
        """The class of each position."""
        return [] if labels is None else self._find(labels).tolist()

    def axis(self, labels: Labels | None, size: int) -> Axis:
        """Labels as an axis of (group, rank)."""
        if labels is None:
            return Axis.fixed(size)
        key = self._find(labels).tobytes()  # the same channels are met again and again
        if key not in self._axes:
            roots = self.roots(labels)
            first = self._places.get(roots[0]) if roots else None
            if first is not None and all(
                self._places.get(root) == (first[0], rank) for rank, root in enumerate(roots, start=first[1])
            ):
                self._axes[key] = Axis((Span(first[0], len(roots), first[1]),))  # nearly all are like that
            else:
                self._axes[key] = Axis.from_ranks(map(self._places.get, roots))
        return self._axes[key]

    def _free(self, labels: Labels | None) -> Labels:
        """The classes of those positions that can be cut."""
        roots = self._find(np.array([], dtype=np.int64) if labels is None else labels)
        roots = roots[roots >= 0]
        return roots[~self._is_pinned[roots]]

    def _number(self, producers: Sequence[RawOperation]) -> None:
        """A group: the classes that the same layers produce and the same numbers count, so that none hinders another.

        Ranks follow the first producer's channels; a class of several channels spans several ranks.
        """
        kinds = np.zeros(len(self._is_pinned), dtype=np.int64)  # classes of one kind have the same makers and counters
        sizes, makers = np.zeros_like(kinds), np.full_like(kinds, -1)  # as the first of their makers has them
        serial = itertools.count(1)
        met: list[Labels] = []  # classes in the order of their makers
        for index, operation in enumerate(producers):
            roots, counts = _distinct(self._free(operation.produced))
            new = makers[roots] < 0
            sizes[roots[new]], makers[roots[new]] = counts[new], index
            met.append(roots[new])
            _split_kinds(kinds, roots, serial)
        for labels in self._counted:
            _split_kinds(kinds, _distinct(self._free(labels))[0], serial)
        found = np.concatenate([*met, np.array([], dtype=np.int64)])
        by_kind = found[np.argsort(kinds[found], kind="stable")]
        members = np.split(by_kind, np.flatnonzero(np.diff(kinds[by_kind])) + 1) if len(found) else []
        place = np.zeros_like(kinds)
        place[found] = np.arange(len(found))
        for roots in sorted(members, key=lambda roots: int(place[roots[0]])):
            if len(roots) == 1:
                produced = producers[makers[roots[0]]].produced
                is_lone = produced is not None and len(produced) == 1
                self.reasons.setdefault(int(roots[0]), Reason(_SINGLE if is_lone else _TIED))
                continue
            first = name = producers[makers[roots[0]]].name
            copies = 2
            while name in self.groups:
                name, copies = f"{first}#{copies}", copies + 1
            choices = np.cumsum(sizes[roots]).tolist()
            ranks = [0, *choices[:-1]]
            self._places.update((root, (name, rank)) for root, rank in zip(roots.tolist(), ranks, strict=True))
            self.groups[name] = ChannelGroup(name, choices[-1], tuple(choices))


def _distinct(roots: Labels) -> tuple[Labels, Labels]:
    """Distinct classes in the order met, and how often each is."""
    found, first, counts = np.unique(roots, return_index=True, return_counts=True)
    order = np.argsort(first)
    return found[order], counts[order]


def _split_kinds(kinds: Labels, roots: Labels, serial: Iterator[int]) -> None:
    """Tell those classes of each kind that are among `roots` from those that are not."""
    found, inverse = np.unique(kinds[roots], return_inverse=True)
    kinds[roots] = np.array([next(serial) for _ in found], dtype=np.int64)[inverse] if len(found) else 0


def _assemble(recorder: Recorder, model: nn.Module, wishes: _Wishes, subject: _Subject) -> ChannelSpace:
    classes = _Classes(recorder, wishes.is_fixed)
    tensors = {
        kind: {
            name: tuple(
                classes.axis(labels, size)
                for labels, size in zip(recorder.axes.get(name) or [None] * tensor.ndim, tensor.shape, strict=True)
            )
            for name, tensor in named
        }
        for kind, named in (("parameters", model.named_parameters()), ("buffers", model.named_buffers()))
    }
    operations: list[Operation] = []
    notes: dict[str, Reason] = {}
    following = _following(recorder)
    for op in recorder.operations:
        axes = {id(labels): classes.axis(labels, len(labels)) for labels in (*op.factors, *op.outputs)}
        produced = None if op.produced is None else classes.axis(op.produced, len(op.produced))
        operations.append(
            Operation(
                name=op.name,
                kind=op.kind,
                scale=op.scale,
                factors=tuple(axes[id(labels)] for labels in op.factors),
                output_scale=op.output_scale,
                outputs=tuple(axes[id(labels)] for labels in op.outputs),
                is_cuttable=bool(produced and produced.groups),
                signature=f"{op.signature} {following.get(id(op), '')}".rstrip(),
                starts=op.starts,
            )
        )
        if produced is not None and not produced.groups:
            reasons = [classes.reasons[root] for root in classes.roots(op.produced) if root in classes.reasons]
            alone = _SINGLE if produced.size == 1 else "its input channels stay as they are"
            if op.weight in recorder.flat:
                reasons = [
                    Reason(f"{op.weight} is one long row, in which channels cannot be told apart", remedy=_SHAPED)
                ]
            kept = recorder.stays.get(op.weight, Reason(alone))
            notes.setdefault(op.name, reasons[0] if reasons else kept)
    unused = _unused(recorder, model)
    strange = {name: reason for name, reason in unused.items() if reason is _STRANGE}
    notes = {**strange, **notes, **{name: reason for name, reason in unused.items() if name not in notes}}
    arithmetic = dict.fromkeys(
        text
        for text, source in recorder.arithmetic
        if (counted := recorder.counted_by(source)) is not None and classes.axis(counted, len(counted)).groups
    )
    ordered = dict.fromkeys(text for text, labels in recorder.ordered if classes.axis(labels, len(labels)).groups)
    attributes = []
    for (path, attribute), (labels, is_tuple) in (*recorder.attributes.items(), *_of_weights(recorder, model)):
        axes_of = tuple(classes.axis(entry, len(entry)) for entry in labels)
        if any(axis.groups for axis in axes_of):
            attributes.append(Attribute(path, attribute, axes_of, is_tuple))
    space = ChannelSpace(
        groups=classes.groups,
        parameters=tensors["parameters"],
        buffers=tensors["buffers"],
        operations=tuple(op for op in operations if op.scale),
        attributes=tuple(attributes),
        activations=_activations(recorder, classes, subject),
        notes=tuple(Note.of(name, reason) for name, reason in notes.items()),
        mixing=tuple(dict.fromkeys((*recorder.mixing, *arithmetic, *ordered))),
    )
    return _never_empty(space, [(classes.axis(labels, len(labels)), least) for labels, least in recorder.needs])


_SIZES_OF_WEIGHTS = (("out_features", 0), ("in_features", 1), ("out_channels", 0), ("in_channels", 1))


def _of_weights(
    recorder: Recorder, model: nn.Module
) -> Iterator[tuple[tuple[str, str], tuple[tuple[Labels, ...], bool]]]:
    """Further numbers that say the shape of a weight, whoever used it: LoRA does not call the layer that it adapts."""
    for name, axes in recorder.axes.items():
        path = name.removesuffix(".weight").removesuffix(".parametrizations.weight.original")
        layer = model.get_submodule(path) if path != name and len(axes) > 1 else None
        if layer is None or isinstance(layer, torch.jit.ScriptModule):
            continue
        for attribute, axis in _SIZES_OF_WEIGHTS:
            counted = axes[1 - axis if getattr(layer, "transposed", False) else axis]
            is_new = (path, attribute) not in recorder.attributes
            if is_new and counted is not None and vars(layer).get(attribute) == len(counted):
                yield (path, attribute), ((counted,), False)


def _unused(recorder: Recorder, model: nn.Module) -> dict[str, Reason]:
    """Layers that no pass reads, and parameters of layers that are read otherwise."""
    read: dict[str, bool] = {}
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        layer = name.rpartition(".")[0]
        read[layer] = read.get(layer, False) or name in recorder.used
    notes = {}
    for name in names:
        if name not in recorder.used:
            layer = name.rpartition(".")[0]
            is_strange = name in recorder.strange
            notes[layer if layer and not read[layer] else name] = _STRANGE if is_strange else _UNUSED
    return notes


_UNUSED = Reason("it is not used in the forward pass")
_STRANGE = Reason(
    "a function kept in the model (a lambda, say) runs this layer of the model itself, not of the copy that is traced",
    remedy="make it a method, which finds the layers by `self`",
)


# views and the like: they take no time to speak of
_FREE = re.compile("empty|view|reshape|t|transpose|permute|slice|select|expand|detach|alias|(un)?squeeze|split.*|chunk")


def _following(recorder: Recorder) -> dict[int, str]:
    """For each operation of evaluation, by id, the operators that run after it, until the next one."""
    counted = [op for op in recorder.operations if op.scale]
    ends = [*(op.number for op in counted[1:]), len(recorder.outputs)]
    runs = {id(op): recorder.outputs[op.number + 1 : end] for op, end in zip(counted, ends, strict=False)}
    return {key: " ".join(name for name, _ in run if not _FREE.fullmatch(name)) for key, run in runs.items()}


def _activations(recorder: Recorder, classes: _Classes, subject: _Subject) -> tuple[Activation, ...]:
    """What lives how long in a forward pass; nothing if the passes with and without labels did not run the same."""
    found = subject.lifetimes
    if found is None or found.operators != [operator for operator, _ in recorder.outputs]:
        return ()
    last = len(found.operators) - 1
    inputs = [leaf for leaf in tree_leaves((subject.args, subject.kwargs)) if isinstance(leaf, Tensor)]
    activations = [Activation(leaf.numel(), (), 0, last) for leaf in inputs]
    for life in found.lives:
        shape, labels = recorder.outputs[life.first][1][life.leaf]
        axes = [classes.axis(entry, size) for entry, size in zip(labels, shape, strict=True)]
        scale = math.prod(axis.size for axis in axes if not axis.groups)
        activations.append(Activation(scale, tuple(axis for axis in axes if axis.groups), life.first, life.last))
    return tuple(activations)


def _never_empty(space: ChannelSpace, needs: Iterable[tuple[Axis, int]]) -> ChannelSpace:
    """Without the choices that would leave too few channels along an axis: none at all, or less than an operator
    needs."""
    lowest = {name: group.choices[0] for name, group in space.groups.items()}
    tensors = (*space.parameters.values(), *space.buffers.values())
    axes = dict.fromkeys(axis for axes in tensors for axis in axes if axis.groups)
    for axis, least in (*((axis, 1) for axis in axes), *needs):
        while axis.kept(lowest) < least:
            wider = [
                (axis.kept({**lowest, name: choice}), name, choice)
                for name in sorted(axis.groups)
                for choice in space.groups[name].choices
                if choice > lowest[name]
            ]
            enough = [entry for entry in wider if entry[0] >= least] or wider[-1:]
            _, name, lowest[name] = min(enough, key=lambda entry: entry[2] / space.groups[entry[1]].size)
    groups = {
        name: dataclasses.replace(group, choices=tuple(c for c in group.choices if c >= lowest[name]))
        for name, group in space.groups.items()
    }
    needed = Reason("all of its channels are needed")
    single = {name: needed for name, group in groups.items() if not group.is_slimmable}
    return dataclasses.replace(space, groups=groups).frozen(single)


def _covers(glob: str, name: str) -> bool:
    """Does a glob match a module's name, or the name of a module it lies in?"""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), glob) for n in range(1, len(parts) + 1))


# --- proof -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    """Why a cut net does not run, or does not line up with its labels; the groups met there, and others not far."""

    text: str
    groups: tuple[str, ...]
    suspects: tuple[str, ...]
    is_mismatch: bool
    operator: str = ""
    line: str = ""


class _Unstable(Exception):
    """Even with nothing cut a pass does not line up with the labels."""


def _proven(subject: _Subject, space: ChannelSpace, found: Recorder) -> ChannelSpace:
    """Freeze, with the reason, each group whose cut does not run or does not line up."""

    def failure(widths: Widths) -> _Failure | None:
        return _failure(subject, space, widths, found)

    rng = random.Random(0)
    draws: list[Callable[[ChannelSpace], Widths]] = [
        lambda s: _unlike(s, rng),
        lambda s: s.smallest(),  # last: a lone channel meets everything, and hides who is guilty
    ]
    is_stable = False
    kinds = set[tuple[str, str]]()  # of the groups frozen so far, and the lines where they failed
    for draw in draws:
        while space.groups:
            widths = draw(space)
            failed = failure(widths)
            if failed is None:
                break
            unstable = None if is_stable else failure(space.full())
            is_stable = not unstable
            if unstable and not (found.passed and unstable.groups):
                raise _Unstable(unstable.text)
            if unstable:  # what the user said of an operator is not so
                space = space.frozen(dict.fromkeys(unstable.groups, Reason(unstable.text)))
                continue
            guilty = _guilty(space, widths, failed, failure)
            for name, reason in guilty.items():
                if name not in space.groups:  # frozen with one like it
                    continue
                least = _least(space, name, widths[name], reason, failure)
                if least is None:
                    text = f"the network does not run when it is cut: {reason.text}"
                    alike = _alike(space, name)
                    space = space.frozen({name: Reason(text, reason.operator, reason.line)})
                    kind = _kind(name), reason.line
                    if kind in kinds:  # block after block: a proof for each would take minutes in a deep net
                        text = f"{text}; so does {name!r}, which is like it"
                        space = space.frozen(dict.fromkeys(alike, Reason(text, reason.operator, reason.line)))
                    kinds.add(kind)
                else:
                    space = space.restricted({name: least})
    return space


def _unlike(space: ChannelSpace, rng: random.Random) -> Widths:
    """Random widths that differ for groups of one size, where they can: if equal, a missing tie could go unnoticed."""
    taken: dict[int, set[int]] = {}
    drawn = dict[str, int]()
    for group in space.groups.values():
        others = taken.setdefault(group.size, set())
        width = rng.choice(group.choices[:-1])
        if width in others:
            free = [choice for choice in group.choices if choice not in others]
            width = rng.choice(free[:-1] or free or [width])  # whole only if nothing else is left
        others.add(width)
        drawn[group.name] = width
    return Widths(drawn)


def _kind(name: str) -> str:
    """What the name of a layer has in common with those of other blocks."""
    return re.sub(r"\d+", "*", name)


def _alike(space: ChannelSpace, name: str) -> list[str]:
    """The groups of other blocks that have the place and the size of this one."""
    kind, size = _kind(name), space.groups[name].size
    return [g.name for g in space.groups.values() if g.name != name and g.size == size and _kind(g.name) == kind]


def _least(
    space: ChannelSpace, name: str, failed: int, reason: _Failure, failure: Callable[[Widths], _Failure | None]
) -> int | None:
    """The smallest width from which a group can be cut after all; None if the one in the middle does not work either.

    A width that `failed` says as much of all below it.
    """
    choices = space.groups[name].choices
    full = space.full()
    low, high = 0, (len(choices) - 1) // 2
    if reason.is_mismatch or high == 0 or failed >= choices[high] or failure(full.replaced(name, choices[high])):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if failure(full.replaced(name, choices[middle])) else (low, middle)
    # `c // 4 * 2` is half of every other width only
    has_gaps = high + 1 < len(choices) - 1 and failure(full.replaced(name, choices[high + 1]))
    return None if has_gaps else choices[high]


def _guilty(
    space: ChannelSpace, widths: Widths, failed: _Failure, failure: Callable[[Widths], _Failure | None]
) -> dict[str, _Failure]:
    """Groups whose cut makes the net fail, with the failure.

    First those met where it failed, each cut alone, then the suspects; if it is none of them, bisect for the first
    group whose cut makes the net fail when those before it are cut as well.
    """
    full = space.full()
    for tried in (failed.groups, [name for name in dict.fromkeys(failed.suspects) if name not in failed.groups]):
        alone = {name: failure(full.replaced(name, widths[name])) for name in tried}
        found = {name: reason for name, reason in alone.items() if reason}
        if found:
            return found
    names = list(space.groups)

    def first_cut(count: int) -> Widths:
        return Widths((name, widths[name] if index < count else full[name]) for index, name in enumerate(names))

    low, high = 0, len(names)  # the first `low` groups cut together still work, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if failure(first_cut(middle)) is None else (low, middle)
    return {names[high - 1]: failure(first_cut(high)) or failed}


def _failure(subject: _Subject, space: ChannelSpace, widths: Widths, found: Recorder) -> _Failure | None:
    """Why the cut net does not run, or does not line up with its labels; None if all is well."""
    numbering = _Numbering(space)

    def suspects(recorder: Recorder) -> tuple[str, ...]:
        """Groups that numbers kept in and around the module where it failed follow; then those met last."""
        path, found = recorder.path, dict[str, None]()
        while path:
            for attribute in space.attributes:
                if attribute.module == path:
                    found |= dict.fromkeys(sorted({group for axis in attribute.axes for group in axis.groups}))
            path = path.rpartition(".")[0]
        return (*found, *numbering.groups_of(recorder.seen_last()))

    presets = numbering.presets(widths)
    for run in subject.passes:
        if run.training and found.trains_alike:
            continue
        net = extract(subject.model, space, widths)
        recorder = Recorder(
            SettledAtoms(numbering.describe),
            grouped=dict(found.grouped),
            renumbers=found.renumbers,
            passed=found.passed,
            axes=presets,
            expected=iter(()) if run.training or run.has_numbers else _expected(found),
        )
        try:
            run_labelled(run, net, recorder)
        except (Mismatch, _OperatorError) as error:
            groups = tuple(numbering.groups_of(error.labels))
            text = str(error) if isinstance(error, Mismatch) else f"{error} ({recorder.where})"
            is_mismatch = isinstance(error, Mismatch)
            return _Failure(text, groups, suspects(recorder), is_mismatch, recorder.where, line_of_the_user(error))
        except Exception as error:
            mode = ", in training mode" if run.training else ""
            text = f"{_first_line(error)} (after {recorder.where}{mode})"
            return _Failure(text, (), suspects(recorder), False, recorder.where, line_of_the_user(error))
    return None


def _expected(found: Recorder) -> Iterator[tuple[str, tuple[int, ...], Sequence[Labels | None]]]:
    """Operators of the capture in order, with shape and labels of what they gave first."""
    return ((name, *made[0]) for name, made in found.outputs if made and not _is_moved(name))


@cache
def _is_moved(operator: str) -> bool:
    """Does the operator give what it was given, in another place or order? Whether one is run may depend on sizes."""
    return _FREE.fullmatch(operator) is not None or operator in ("_unsafe_view", "clone", "_to_copy", "copy_", "detach")


class _Numbering:
    """Final labels: the channels of all groups are numbered through."""

    def __init__(self, space: ChannelSpace) -> None:
        self._space = space
        self._names = list(space.groups)
        self._firsts = np.cumsum([0, *(group.size for group in space.groups.values())])
        self._first_of = dict(zip(self._names, self._firsts.tolist(), strict=False))

    def describe(self, number: int) -> str:
        """A channel, for people."""
        place = self.place(number)
        return "a channel that stays" if place is None else f"channel {place[1]} of {place[0]!r}"

    def place(self, number: int) -> tuple[str, int] | None:
        """Group and rank of a channel; None if it stays."""
        if number < 0:
            return None
        name = self._names[int(np.searchsorted(self._firsts, number, "right")) - 1]
        return name, number - self._first_of[name]

    def groups_of(self, labels: Labels) -> list[str]:
        """Groups in the order met."""
        found, met = np.unique(np.searchsorted(self._firsts, labels[labels >= 0], "right") - 1, return_index=True)
        return [self._names[index] for index in found[np.argsort(met)]]

    def presets(self, widths: Mapping[str, int]) -> dict[str, list[Labels | None]]:
        """The labels of what is kept of each parameter and buffer."""
        tensors = {**self._space.parameters, **self._space.buffers}
        distinct = {id(axis): axis for axes in tensors.values() for axis in axes}  # many tensors have the same
        settled = {key: self._settled(axis, widths) for key, axis in distinct.items()}
        return {name: [settled[id(axis)] for axis in axes] for name, axes in tensors.items()}

    def _settled(self, axis: Axis, widths: Mapping[str, int]) -> Labels:
        labels = [np.array([], dtype=np.int64)]
        for span in axis.spans:
            if span.group is None:
                labels.append(np.full(span.size, FIXED))
            else:
                ranks = span.start + np.arange(span.kept(widths)) // span.repeat * span.step
                labels.append(self._first_of[span.group] + ranks)
        return np.concatenate(labels)


# --- activations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What an operator of a forward pass returns: the axes of each tensor; and how much it does, at full width."""

    operator: Any
    axes: list[tuple[Axis, ...]]
    macs: float
    written: int  # elements


def results_of(model: nn.Module, space: ChannelSpace, run: _Run) -> list[Result]:
    """The operators of a forward pass in order.

    `run.on(model, *modes)` does the pass, at full width. What is not known of an axis is taken to stay as it is.
    """
    numbering = _Numbering(space)
    recorder = Recorder(CarriedAtoms(), axes=numbering.presets(space.full()), renumbers=True)
    known: dict[bytes, Axis] = {}

    def axis(labels: Labels | None, size: int) -> Axis:
        if labels is None or not (labels >= 0).any():
            return Axis.fixed(size)
        key = labels.tobytes()
        if key not in known:
            known[key] = Axis.from_ranks(map(numbering.place, labels.tolist()))
        return known[key]

    def axes(tensor: Tensor) -> tuple[Axis, ...]:
        return tuple(axis(labels, size) for labels, size in zip(recorder.labels(tensor), tensor.shape, strict=True))

    results = _Results(axes)
    with torch.random.fork_rng(devices=[]):
        run_labelled(run, model, recorder, results)
    return results.found


class _Results(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own base
    """Notes what operators return, before they are broken down into others."""

    def __init__(self, axes: Callable[[Tensor], tuple[Axis, ...]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes = axes
        self.found: list[Result] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if is_silent(func):
            return result
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        formula = flop_registry.get(func.overloadpacket)
        macs = formula(*args, **kwargs, out_val=result) / 2 if formula else 0
        written = 0 if func.is_view else sum(tensor.numel() for tensor in tensors)
        self.found.append(Result(func, [self._axes(tensor) for tensor in tensors], macs, written))
        return result


# --- odds and ends -----------------------------------------------------------------------------------------------


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Generators of random numbers are put back, and attention is computed from plain products."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    state, array_state = random.getstate(), np.random.get_state()
    log = logging.getLogger(torch._subclasses.fake_tensor.__name__)
    was_disabled, log.disabled = log.disabled, True  # a traceback for each operator that refuses its arguments
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        log.disabled = was_disabled
        torch.backends.mha.set_fastpath_enabled(fastpath)
        random.setstate(state)
        np.random.set_state(array_state)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {textwrap.shorten(text[0], 160, placeholder=' ...')}"
        if text
        else type(error).__name__
    )
