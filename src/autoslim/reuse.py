"""What two nets that differ in one group have in common: a forward pass that computes only the rest.

A candidate of a greedy step has one group narrower than the current net. Up to the first layer that reads the channels
taken away, what its operators give is a slice of what the current net's gave: that is kept, and the candidate's pass
starts there. Which operators those are is not read off a model but found out by trying, on random numbers in double
precision, so that it holds for any operator; what does not come out equal is computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from math import nan, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from autoslim.distributed import samples_of
from autoslim.lending import cloned
from autoslim.lifetimes import is_silent
from autoslim.replay import Make, Program, Recording, Written, flat, plain_of, shapes_of
from autoslim.slicing import active_tensors, copy_module, cut, run_subnet
from autoslim.space import Axis, ChannelSpace, Widths
from autoslim.tracing import Result, results_of, split_input, tensors_in

_SAMPLES = 3  # so few that it is quick, and enough for statistics of a batch to be of use
_OTHER_SAMPLES = 4  # what was found out on so many is proven on others: samples may be folded into an axis
_EQUAL = 1e-9
_SMALL = 1e-2  # far above what counts as equal, and no number that anything is computed from becomes another
_WRITTEN = 10  # memory is slow: to write an element takes as long as about so many products


class Diverged(Exception):
    """A pass runs other operators than the one it is compared with."""


@dataclass(frozen=True)
class Plan:
    """How nets narrower in one group are run: which results are computed, and which are needed of the net kept."""

    computed: frozenset[int]  # operators, by their place in the pass
    needed: frozenset[int]
    share: float  # of the work of a whole pass that is left
    # by operator: which of its arguments that are no tensors, as the sizes of a view, are others in the narrower net
    follows: Mapping[int, frozenset[int]] = field(default_factory=dict, hash=False)


@dataclass
class Kept:
    """Results of a net that were kept, and what all others looked like."""

    widths: Widths
    needed: frozenset[int]
    results: dict[int, list[Any]] = field(default_factory=dict)  # leaves of what an operator returned
    looks: dict[int, Any] = field(default_factory=dict)  # the same with a `_Look` for each tensor
    plain: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # arguments of operators that are no tensors


@dataclass(frozen=True)
class _Look:
    """Shape, type and layout of a tensor."""

    shape: tuple[int, ...]
    order: tuple[int, ...]  # dimensions, that with the largest stride first
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Look:
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim)))
        return cls(tuple(tensor.shape), order, tensor.dtype, tensor.device)

    def blank(self, shape: Sequence[int]) -> Tensor:
        """A tensor of this look and another shape, whose values do not matter."""
        strides, step = [0] * len(shape), 1
        for dim in reversed(self.order):
            strides[dim], step = step, step * max(1, shape[dim])
        return torch.empty_strided(tuple(shape), strides, dtype=self.dtype, device=self.device)


@contextmanager
def _diverging() -> Iterator[None]:
    """An operator that fails on what a plan gives it says that the plan does not hold."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # what fails as a whole too will say so there
        raise Diverged(str(error)) from error


class Reuse:
    """Runs nets of a model that differ from another in one group, computing only what differs.

    `example`: some inputs of the model (a batch of the images of a search). Operators are told apart by their place in
    the pass, so the model must run the same ones at all widths; groups for which that, or anything else, does not hold
    have no plan. Modes of modules are to be those of the passes to come.
    """

    def __init__(self, model: nn.Module, space: ChannelSpace, example: Any) -> None:
        self.model, self.space = model, space
        self._plans: dict[str, Plan | None] = {}
        self._written: dict[str, list[Written]] = {}  # by group, for inputs of several shapes
        self._unwritable = set[str]()
        self._is_keeping_writable = True
        self._bound: dict[tuple[str, int], list[Program]] = {}  # by group and width, for the widths of `_bound_at`
        self._bound_at: Widths | None = None
        self._kept: list[tuple[frozenset[int], Program, Kept]] = []  # whole passes at these widths
        self._cut: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.results: list[Result] = []
        self.samples = _SAMPLES  # that the axes of `results` were found with
        self.overwritten = set[int]()  # results that a later operator of the pass writes into
        try:
            self._finding = _Finding(self, example)
            self._reads_sizes = self._finding.reads_sizes()
        except Exception:  # its path depends on the widths; or it does not run on a few samples in double precision
            self._plans = dict.fromkeys(space.groups)
            self._reads_sizes = True

    def plan(self, group: str) -> Plan | None:
        """How nets narrower in a group are run; None if that must be done as a whole. Found when first asked for."""
        if group not in self._plans:
            self._plans[group] = None
            self._plans[group] = self._finding.plan(group)
        return self._plans[group]

    def whole(self) -> list[str]:
        """Groups without a plan."""
        return [group for group in self.space.groups if self.plan(group) is None]

    def _known(self, group: str) -> Plan:
        plan = self._plans[group]
        assert plan is not None, f"{group!r} has no plan"
        return plan

    def needed(self, groups: Iterable[str]) -> frozenset[int]:
        """The operators whose results the candidates of `groups` need."""
        return frozenset(index for group in groups for index in self._known(group).needed)

    @_diverging()
    def keep(self, widths: Widths, inputs: Any, groups: Iterable[str], *, record: bool = True) -> tuple[Any, Kept]:
        """The output at `widths`, and what the candidates of `groups` need of the pass.

        With `record`, the pass is written down the first time, for which all its results are kept until it ends, and
        from then on run without the code of the model. Raises `Diverged` where that cannot be done.
        """
        self._bind(widths)
        needed, shapes = self.needed(groups), shapes_of(inputs)
        for given, known, first in self._kept:
            if needed <= given and known.shapes == shapes:
                output, results = known.run(inputs, None)
                return output, Kept(widths, needed, results, first.looks, first.plain)
        record = record and self._is_keeping_writable
        tensors = self._tensors(widths)
        recording = Recording(inputs, self._names(tensors)) if record else None
        mode = _Keeping(self, widths, needed, recording)
        output = self.pass_of(self.model, widths, inputs, mode, tensors)
        if recording is not None:
            written = recording.written((output, mode.kept.results))
            program = None if written is None else written.bound(lambda name: self._named(name, widths))
            if isinstance(program, Program):
                self._kept.append((needed, program, Kept(widths, needed, {}, mode.kept.looks, mode.kept.plain)))
            self._is_keeping_writable = isinstance(program, Program)
        return output, mode.kept

    @_diverging()
    def run(self, kept: Kept, group: str, widths: Widths, inputs: Any, *, record: bool = True) -> Any:
        """The output at `widths`, which differ from those of the pass kept in one group.

        The first time, with `record`, the operators that are computed are written down, for which all results of this
        one pass are kept until it ends; from then on they are run without the code of the model. At other widths of
        the other groups too, unless that code looks at sizes of tensors, by which its path may depend on widths. Raises
        `Diverged` where the plan does not hold for these inputs and widths: run it as a whole.
        """
        self._bind(kept.widths)
        shapes = shapes_of(inputs)
        bound = self._bound.setdefault((group, widths[group]), [])
        for program in bound:
            if program.shapes == shapes:
                return program.run(inputs, (kept, widths))
        for written in [each for each in self._written.get(group, []) if each.shapes == shapes]:
            found = written.bound(lambda name: self._named(name, widths), kept.plain)
            with suppress(RuntimeError):  # torch itself may take another way at these widths: a view that is none here
                if found is not None:
                    output = found.run(inputs, (kept, widths))
                    bound.append(found)
                    return output
            self._written[group].remove(written)
        record = record and group not in self._unwritable
        tensors = self._tensors(widths)
        recording = Recording(inputs, self._names(tensors)) if record else None
        mode = _Reusing(self, kept, group, widths, recording)
        if recording is None:
            return self.pass_of(self.model, widths, inputs, mode, tensors)
        output = self.pass_of(self.model, widths, inputs, mode, tensors)
        new = recording.written(output)
        first = None if new is None else new.bound(lambda name: self._named(name, widths))
        if new is None or first is None:
            self._unwritable.add(group)
            return output
        bound.append(first)
        if new.is_general and not self._reads_sizes:
            self._written.setdefault(group, []).append(new)
        return output

    def forget(self) -> None:
        """Look at the tensors of the model anew: they have changed, or may have."""
        self._bind(None)

    def _bind(self, widths: Widths | None) -> None:
        """What is bound is bound to the widths of the net kept; at others it is no longer wanted."""
        if widths is None or widths != self._bound_at:
            self._bound_at = widths
            self._bound.clear()
            self._kept.clear()
            self._cut.clear()

    def _tensors(self, widths: Widths) -> dict[str, Tensor]:
        with torch.no_grad():
            return active_tensors(self.model, self.space, widths)

    def _names(self, tensors: Mapping[str, Tensor]) -> dict[int, str]:
        """Names of the tensors that a pass meets, by id: those that are cut, and the model's own."""
        own = {id(tensor): name for name, tensor in self.model.named_parameters()}
        return own | {id(tensor): name for name, tensor in tensors.items()}

    def _named(self, name: str, widths: Widths) -> Tensor:
        """A tensor of the model, cut; those that two candidates have in common once for both."""
        is_parameter = name in self.space.parameters
        axes = self.space.parameters[name] if is_parameter else self.space.buffers[name]
        key = (name, tuple(widths[group] for axis in axes for group in axis.groups))
        if key not in self._cut:
            owner, _, last = name.rpartition(".")
            tensor = getattr(self.model.get_submodule(owner), last).detach()
            part = cut(tensor, axes, widths)
            self._cut[key] = part if is_parameter else part.clone()  # the model's own statistics stay as they are
        return self._cut[key]

    def bytes_needed(self, needed: Iterable[int], widths: Mapping[str, int], samples: int, itemsize: int = 4) -> int:
        """Memory that results of operators take at `widths`, for so many samples."""
        results = (axes for index in needed for axes in self.results[index].axes)
        elements = sum(prod(axis.kept(widths) for axis in axes) for axes in results)
        return elements * itemsize * samples // self.samples

    def pass_of(
        self,
        model: nn.Module,
        widths: Widths,
        inputs: Any,
        mode: AbstractContextManager[Any] | None,
        given: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The output of a model with the tensors of this one, cut or as `given`, under a mode."""
        args, kwargs = split_input(inputs)
        with torch.no_grad():
            return run_subnet(model, self.space, widths, args, kwargs, given, mode)


# --- finding out -------------------------------------------------------------------------------------------------


class _Finding:
    """Finds the plans of a `Reuse` by comparing passes of a random model in double precision."""

    def __init__(self, reuse: Reuse, example: Any) -> None:
        self.reuse, self.space = reuse, reuse.space
        self.model = _random_copy(reuse.model)
        self.inputs, self.other_inputs = (
            tree_map(partial(_few_random, count=count), example) for count in (_SAMPLES, _OTHER_SAMPLES)
        )
        reuse.samples = samples_of(self.inputs)
        reuse.results = results_of(self.model, self.space, self)
        self._low, self._higher = (  # narrow nets are quick; at these widths each group can go one choice down
            Widths((g.name, g.choices[min(place, len(g.choices) - 1)]) for g in self.space.groups.values())
            for place in (1, 2)
        )
        self._passes = [self._first(self._low)]

    def reads_sizes(self) -> bool:
        """Does the model's code look at sizes that may depend on widths, and so, perhaps, do other things then?

        Sizes of tensors, or `out_channels` and the like of layers.
        """
        with _SizesRead() as sizes:
            self._run(self._low, _watched_attributes(self.model, self.space, sizes))
        return bool(sizes.are_read)

    def plan(self, group: str) -> Plan | None:
        """The plan of a group, tried out at other widths than it was found at."""
        plan = self._found(group)
        if plan is not None and not self._holds(group, plan):
            if len(self._passes) == 1:
                try:
                    self._passes.append(self._first(self._higher))
                except (RuntimeError, Diverged):  # other operators there, where a result was kept from another pass
                    return None
            plan = self._found(group)  # what differs at either width
            plan = plan if plan is not None and self._holds(group, plan) else None
        return plan

    def _first(self, widths: Widths) -> _Comparing:
        mode = _Comparing(self.reuse, widths)
        self._run(widths, mode)
        self.reuse.overwritten |= mode.overwritten
        return mode

    def on(self, model: nn.Module, *modes: Any) -> Any:
        """A pass under modes."""
        args, kwargs = split_input(cloned(self.inputs))  # the model may change them
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for mode in filter(None, modes):
                stack.enter_context(mode)
            return model(*args, **kwargs)

    def _run(self, widths: Widths, mode: AbstractContextManager[Any] | None, inputs: Any = None) -> Any:
        inputs = cloned(self.inputs if inputs is None else inputs)
        return self.reuse.pass_of(self.model, widths, inputs, mode)

    def _found(self, group: str) -> Plan | None:
        computed, needed = set[int](), set[int]()
        follows: dict[int, frozenset[int]] = {}
        for first in self._passes:
            widths = self.space.narrowed(first.widths, group)
            if widths is None:
                return None
            mode = _Comparing(self.reuse, widths, first)
            try:
                mode.gave(self._run(widths, mode))
            except (RuntimeError, Diverged):
                return None
            if mode.is_entangled:
                return None
            computed |= mode.computed
            follows |= {index: places | follows.get(index, frozenset()) for index, places in mode.follows.items()}
            needed |= mode.needed
        if not needed - computed:
            return None
        work = [result.macs + _WRITTEN * result.written for result in self.reuse.results]
        share = sum(work[i] for i in computed) / sum(work)
        return Plan(frozenset(computed), frozenset(needed - computed), share, follows)

    def _holds(self, group: str, plan: Plan) -> bool:
        """Proof, not hope: does a pass by the plan give what a whole pass gives?"""
        widths = self.space.narrowed(self._higher, group)
        if widths is None:
            return False
        self.reuse._plans[group] = plan
        try:
            keeping = _Keeping(self.reuse, self._higher, plan.needed)
            self._run(self._higher, keeping, self.other_inputs)
            reusing = _Reusing(self.reuse, keeping.kept, group, widths, in_doubt=True)
            given = self._run(widths, reusing, self.other_inputs)
        except (RuntimeError, Diverged, AssertionError):
            return False
        finally:
            self.reuse._plans[group] = None
        pairs = zip(tensors_in(given), tensors_in(self._run(widths, None, self.other_inputs)), strict=True)
        return all(_same(one, other) for one, other in pairs)


def _random_copy(model: nn.Module) -> nn.Module:
    """The model in double precision with random numbers, in the same modes: no value is like another by chance."""
    generator = torch.Generator().manual_seed(0)

    def convert(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        draw = torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
        fan = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
        values = (2 * draw - 1) * (3 / fan) ** 0.5 if tensor.ndim > 1 else draw + 0.5  # scales and variances: positive
        return values.to(tensor.device)

    return copy_module(model, convert)


def _few_random(leaf: Any, count: int) -> Any:
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return leaf
    few = leaf[:count]
    if not leaf.is_floating_point():
        return few
    draw = torch.randn(few.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")
    return draw.to(leaf.device)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return bool((one == other).all())
    scale = float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=_EQUAL, atol=_EQUAL * scale, equal_nan=True)


class _InOrder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own base
    """Calls `ran` for each operator with its place in the pass."""

    def __init__(self, reuse: Reuse) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reuse = reuse
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_silent(func):
            return self.passed(args[0], func(*args, **(kwargs or {})))
        index, self.count = self.count, self.count + 1
        results = self.reuse.results
        if index >= len(results) or results[index].operator is not func:
            raise Diverged(f"{func} as operator {index}")
        return self.ran(index, func, args, kwargs or {})

    def ran(self, index: int, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator is to be run; gives its result."""
        raise NotImplementedError

    def passed(self, source: Tensor, result: Tensor) -> Tensor:
        """A tensor was given another handle."""
        return result


class _Comparing(_InOrder):  # type: ignore[no-untyped-call]
    """Records all results, and compares them with those of a first pass in which one group was wider."""

    def __init__(self, reuse: Reuse, widths: Widths, first: _Comparing | None = None) -> None:
        super().__init__(reuse)
        self.widths, self.first = widths, first
        self.results: list[Any] = []
        self.reads: list[list[Any]] = []  # by each operator: shapes of tensors, and plain arguments
        self.plain: list[tuple[Any, ...]] = []
        self.follows: dict[int, frozenset[int]] = {}
        self.overwritten = set[int]()  # results that a later operator writes into
        self.computed = set[int]()
        self.needed = set[int]()
        self.is_entangled = False  # something needed was written to under another name
        self._alive: list[Any] = []  # so that nothing takes the place of another in memory
        self._made: dict[int, int] = {}  # id of a tensor -> the operator that returned it
        self._made_at: dict[int, set[int]] = {}  # where numbers lie -> operators that returned them
        self._written: dict[int, int] = {}  # where its numbers lie -> the operator that wrote there last
        self._differs = set[int]()  # where numbers lie that differ from the first pass

    def ran(self, index: int, func: Any, args: Any, kwargs: Any) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = [_place(leaf) for leaf in inputs]
        writes = [*_written_to(func, args, kwargs)]
        reads = [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves((args, kwargs))]
        differs = not self._differs.isdisjoint(places)
        if not differs and self.first is not None and self.first.reads[index] == reads and not writes:
            result = self._as_before(index, func, args, kwargs)  # all it reads is as it was
        else:
            result = func(*args, **kwargs)
            self._enliven(index, func, result)
            differs = differs or not self._is_slice(index, tree_leaves(result))
            differs = differs or (not func.is_view and self._sums_up(index, reads, tree_leaves(result)))
        leaves = tree_leaves(result)
        if self.first is not None:
            if differs:
                self.computed.add(index)
                self._need(inputs)
            elif changed := _changed(self.first.plain[index], _plain(func, args, kwargs)):
                self.follows[index] = changed
        else:
            self.reads.append(reads)
            self.plain.append(_plain(func, args, kwargs))
            self.results.append(cloned(result))
        for leaf in writes:
            self.overwritten |= self._made_at.get(_place(leaf), set())
        for leaf in (*writes, *leaves):
            if isinstance(leaf, Tensor):
                place = _place(leaf)
                if differs:
                    self._differs.add(place)
                if not func.is_view:
                    self._written[place] = index
                self._written.setdefault(place, index)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._made[id(leaf)] = index
                self._made_at.setdefault(_place(leaf), set()).add(index)
        self._alive += [*inputs, *leaves]
        return result

    def gave(self, output: Any) -> None:
        """The pass is over: its output is read, whatever of it differs."""
        self._need(tensors_in(output))

    def _need(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            made, place = self._made.get(id(tensor)), _place(tensor)
            if made is not None and place not in self._differs:
                self.needed.add(made)
                self.is_entangled |= self._written[place] > made

    def passed(self, source: Tensor, result: Tensor) -> Tensor:
        if id(source) in self._made:
            self._made[id(result)] = self._made[id(source)]
        self._alive += [source, result]
        return result

    def _as_before(self, index: int, func: Any, args: Any, kwargs: Any) -> Any:
        assert self.first is not None
        if func.is_view:
            return func(*args, **kwargs)
        return cloned(self.first.results[index])

    def _enliven(self, index: int, func: Any, result: Any) -> None:
        """Small numbers in place of zeros, the same for a channel at all widths.

        A unit that is off for these few samples, as behind ReLU after pooling, would not be missed if it was cut.
        """
        if func.is_view:
            return
        leaves = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        for leaf, axes in zip(leaves, self.reuse.results[index].axes, strict=True):
            if not leaf.is_floating_point() or not any(axis.groups for axis in axes):
                continue
            if leaf.shape != tuple(axis.kept(self.widths) for axis in axes):
                continue
            is_off = leaf == 0
            if is_off.any():
                generator = torch.Generator().manual_seed(index)
                numbers = torch.zeros((), dtype=leaf.dtype, device=leaf.device)
                for axis in axes:
                    draw = torch.rand(axis.size, generator=generator, dtype=leaf.dtype, device="cpu").to(leaf.device)
                    numbers = numbers.unsqueeze(-1) + cut(draw, (axis,), self.widths)
                leaf.copy_(torch.where(is_off, _SMALL * (1 + numbers), leaf))

    def _sums_up(self, index: int, reads: Sequence[Any], leaves: Sequence[Any]) -> bool:
        """Does it read something that was cut, and give nothing that was? It may depend on all of what it reads.

        The largest of all channels is hardly ever one that was taken away.
        """
        if self.first is None:
            return False
        was, now = (
            [each for each in some if isinstance(each, torch.Size)] for some in (self.first.reads[index], reads)
        )
        gave, gives = (
            [leaf.shape for leaf in some if isinstance(leaf, Tensor)]
            for some in (tree_leaves(self.first.results[index]), leaves)
        )
        return was != now and gave == gives

    def _is_slice(self, index: int, leaves: Sequence[Any]) -> bool:
        """Are the results those of the first pass without the channels taken away?"""
        if self.first is None:
            return True
        axes = iter(self.reuse.results[index].axes)
        for leaf, whole in zip(leaves, tree_leaves(self.first.results[index]), strict=True):
            if isinstance(leaf, Tensor):
                expected = _cut_further(whole, next(axes), self.first.widths, self.widths, self.reuse.samples)
                if expected is None or not _same(leaf, expected):
                    return False
            elif leaf != whole:
                return False
        return True


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written_to(func: Any, args: Any, kwargs: Any) -> Iterable[Tensor]:
    """The tensors that an operator changes in place."""
    for number, name in _arguments_written(func):
        given = args[number] if number < len(args) else kwargs.get(name)
        yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))


@cache
def _arguments_written(func: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an operator changes in place."""
    return [
        (number, argument.name)
        for number, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _plain(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The arguments of an operator that are no tensors; and the numbers of a tensor that code has just made of some."""
    if func.overloadpacket.__name__.startswith("lift_fresh") and args[0].numel() <= _FEW:
        return (str(args[0].tolist()),)
    return plain_of(args, kwargs)


_FEW = 64


def _changed(one: tuple[Any, ...], other: tuple[Any, ...]) -> frozenset[int]:
    """The places at which arguments differ; -1 among them if there are more of one."""
    differing = {place for place, pair in enumerate(zip(one, other, strict=False)) if not _same(*pair)}
    return frozenset(differing if len(one) == len(other) else {*differing, -1})


def _cut_further(
    tensor: Tensor, axes: tuple[Axis, ...], before: Mapping[str, int], after: Mapping[str, int], samples: int
) -> Tensor | None:
    """What is left at `after` of a result at `before`; None if it is not as long as its axes say.

    The axes are those of so many `samples`; they may be folded into one that channels lie along.
    """
    for dim, axis in enumerate(axes):
        if all(before[group] == after[group] for group in axis.groups):
            continue
        old = axis.positions(before)
        if len(old) == tensor.shape[dim]:
            tensor = _shortened(tensor, dim, old, axis.positions(after))
            continue
        folded = _folded(axis, samples)
        if folded is None:
            return None
        of_one, place = folded
        count = of_one.kept(before)
        if not count or tensor.shape[dim] % count:
            return None
        sizes = (-1, count) if place else (count, -1)
        apart = tensor.reshape(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])
        tensor = _shortened(apart, dim + place, of_one.positions(before), of_one.positions(after)).flatten(dim, dim + 1)
    return tensor


def _shortened(tensor: Tensor, dim: int, old: Sequence[int], new: Sequence[int]) -> Tensor:
    if len(new) == len(old):
        return tensor
    if isinstance(new, range) and isinstance(old, range):
        return tensor.narrow(dim, 0, len(new))
    place = {position: at for at, position in enumerate(old)}
    kept = torch.tensor([place[position] for position in new], device=tensor.device)
    return tensor.index_select(dim, kept)


@cache
def _folded(axis: Axis, samples: int) -> tuple[Axis, int] | None:
    """Of an axis that holds the channels of so many samples: the axis of one, and whether it lies within the samples.

    1 if all channels of a sample are neighbours, 0 if all samples of a channel are; None for anything else.
    """
    ranks = [
        None if span.group is None else (span.group, span.start + index // span.repeat * span.step)
        for span in axis.spans
        for index in range(span.size)
    ]
    count, left = divmod(len(ranks), samples)
    if left:
        return None
    if ranks == ranks[:count] * samples:
        return Axis.from_ranks(ranks[:count]), 1
    if ranks == [rank for rank in ranks[::samples] for _ in range(samples)]:
        return Axis.from_ranks(ranks[::samples]), 0
    return None


# --- running -----------------------------------------------------------------------------------------------------


class _Keeping(_InOrder):  # type: ignore[no-untyped-call]
    """Keeps what is needed of a pass."""

    def __init__(
        self, reuse: Reuse, widths: Widths, needed: frozenset[int], recording: Recording | None = None
    ) -> None:
        super().__init__(reuse)
        self.kept, self.recording = Kept(widths, needed), recording

    def ran(self, index: int, func: Any, args: Any, kwargs: Any) -> Any:
        written = list(_written_to(func, args, kwargs)) if self.recording is not None else []
        result = func(*args, **kwargs)
        if self.recording is not None:
            self.recording.ran(func, args, kwargs, written, result)
        self.kept.plain[index] = _plain(func, args, kwargs)
        self.kept.looks[index] = tree_map(lambda leaf: _Look.of(leaf) if isinstance(leaf, Tensor) else leaf, result)
        if index in self.kept.needed:
            copied = index in self.reuse.overwritten
            self.kept.results[index] = [
                self._copy(leaf) if copied and isinstance(leaf, Tensor) else leaf for leaf in flat(result)
            ]
        return result

    def passed(self, source: Tensor, result: Tensor) -> Tensor:
        if self.recording is not None:
            self.recording.renamed(source, result)
        return result

    def _copy(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        if self.recording is not None:
            self.recording.ran(torch.ops.aten.clone.default, (tensor,), {}, [], copy)
        return copy


class _SizesRead(TorchFunctionMode):
    """Notices code that looks at sizes of tensors, that of the batch aside: it may do other things at other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.are_read = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func == _SHAPE or (func == torch.Tensor.size and isinstance(result, torch.Size)):
            return _WatchedSizes(result, self)
        if func == torch.Tensor.size:
            self.are_read |= (args[1] if len(args) > 1 else kwargs["dim"]) != 0
        elif func in _READ_SIZES:
            self.are_read = True
        return result


_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]  # a descriptor, whatever its stub says
_READ_SIZES = (torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.stride, torch.numel)


@contextmanager
def _watched_attributes(model: nn.Module, space: ChannelSpace, watcher: _SizesRead) -> Iterator[None]:
    """Numbers such as `out_channels` tell `watcher` when code computes with them, or compares them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = []
    try:
        for attribute in space.attributes:
            own = modules[attribute.module].__dict__
            value = own[attribute.name]
            if type(value) is int:
                replaced.append((own, attribute.name, value))
                own[attribute.name] = _WatchedNumber(value, watcher)
        yield
    finally:
        for own, name, value in replaced:
            own[name] = value


class _WatchedNumber(int):
    """A number that operators may take; but who computes with it is noticed."""

    watcher: _SizesRead

    def __new__(cls, value: int, watcher: _SizesRead) -> _WatchedNumber:
        new = super().__new__(cls, value)
        new.watcher = watcher
        return new


class _WatchedSizes(tuple[int, ...]):
    """Sizes of a tensor, which operators may take; but who looks at one of them, other than the first, is noticed."""

    watcher: _SizesRead

    def __new__(cls, sizes: torch.Size, watcher: _SizesRead) -> _WatchedSizes:
        new = super().__new__(cls, sizes)
        new.watcher = watcher
        return new

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__") and name != "watcher":
            self.watcher.are_read = True
            return getattr(torch.Size(tuple.__iter__(self)), name)  # numel, index ...
        return super().__getattribute__(name)

    def __getitem__(self, key: Any) -> Any:
        self.watcher.are_read |= key != 0
        return tuple.__getitem__(self, key)


def _watched(kind: type, name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        self.watcher.are_read = True
        return getattr(kind, name)(self, *args)

    return method


_COMPARED = ("eq", "ne", "lt", "le", "gt", "ge", "add", "mul", "rmul", "hash", "repr")
_COMPUTED = (
    "radd",
    "sub",
    "rsub",
    "floordiv",
    "rfloordiv",
    "truediv",
    "rtruediv",
    "mod",
    "rmod",
    "divmod",
    "pow",
    "rpow",
)
_OF_NUMBERS = ("neg", "abs", "bool", "float", "index", "int", "round", "and", "or", "xor", "lshift", "rshift", "str")
for _name in (*_COMPARED, "iter", "contains"):
    setattr(_WatchedSizes, f"__{_name}__", _watched(tuple, f"__{_name}__"))
for _name in (*_COMPARED, *_COMPUTED, *_OF_NUMBERS):
    setattr(_WatchedNumber, f"__{_name}__", _watched(int, f"__{_name}__"))


class _Reusing(_InOrder):  # type: ignore[no-untyped-call]
    """Runs only the operators of a plan; others give what was kept, or, if nobody reads it, anything of its shape."""

    def __init__(
        self,
        reuse: Reuse,
        kept: Kept,
        group: str,
        widths: Widths,
        recording: Recording | None = None,
        *,
        in_doubt: bool = False,  # what nobody should read is no number, so that it is seen if somebody does
    ) -> None:
        super().__init__(reuse)
        self.kept, self.group, self.widths, self.recording, self.in_doubt = kept, group, widths, recording, in_doubt
        self.plan = reuse._known(group)

    def ran(self, index: int, func: Any, args: Any, kwargs: Any) -> Any:
        recording, written = self.recording, list(_written_to(func, args, kwargs))
        if index not in self.plan.computed:
            changed = _changed(self.kept.plain[index], _plain(func, args, kwargs))
            if not changed <= self.plan.follows.get(index, frozenset()):
                raise Diverged(f"{func} as operator {index} with other arguments")
        if index in self.plan.computed or (func.is_view and index not in self.plan.needed):
            result = func(*args, **kwargs)
            if recording is not None:
                recording.ran(func, args, kwargs, written, result, index, self.kept.plain[index])
            return result
        looks = self.kept.looks[index]
        if recording is not None and not all(isinstance(look, _Look) for look in tree_leaves(looks)):
            recording.is_fixed = False  # a number that was read from a tensor: what follows may depend on it
        is_needed = index in self.plan.needed
        make = self._maker(index, is_needed)
        if len(written) == 1 and isinstance(looks, _Look):  # in place: the same tensor is returned
            if is_needed:
                written[0].copy_(make((self.kept, self.widths))[0])
                if recording is not None:
                    recording.filled(written[0], make)
            return written[0]
        _, structure = tree_flatten(looks)
        result = tree_unflatten(make((self.kept, self.widths)), structure)
        if recording is not None:
            recording.made(make, result)
        return result

    def passed(self, source: Tensor, result: Tensor) -> Tensor:
        if self.recording is not None:
            self.recording.renamed(source, result)
        return result

    def _maker(self, index: int, is_needed: bool) -> Make:
        """What gives the results of an operator for the narrower net: cut from those kept, or just as large."""
        group, samples, in_doubt = self.group, self.reuse.samples, self.in_doubt  # nothing of the pass may outlive it
        follows = self.reuse.results[index].axes

        def make(source: tuple[Kept, Widths]) -> list[Any]:
            kept, after = source
            made, axes = list[Any](), iter(follows)
            for number, look in enumerate(flat(kept.looks[index])):
                if not isinstance(look, _Look):
                    made.append(kept.results[index][number] if is_needed else look)
                    continue
                along = next(axes)
                if is_needed:
                    part = _cut_further(kept.results[index][number], along, kept.widths, after, samples)
                    assert part is not None, "the plan was proven for fewer samples"
                    made.append(look.blank(part.shape).copy_(part))
                else:
                    shape = [  # in proportion, where samples are folded into it
                        size if group not in axis.groups else size * axis.kept(after) // axis.kept(kept.widths)
                        for size, axis in zip(look.shape, along, strict=True)
                    ]
                    blank = look.blank(shape)
                    made.append(blank.fill_(nan) if in_doubt and blank.is_floating_point() else blank)
            return made

        return make
