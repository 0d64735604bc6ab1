"""What is known while a model runs on labels: the labels of every tensor, and what was produced, tied and counted."""

from __future__ import annotations

import itertools
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoslim.atoms import ANY, FIXED, Atoms, Labels
from autoslim.sizes import AttributeSource, AxisSource, Call, Size, Source
from autoslim.space import Reason

End = tuple[Tensor, int]  # an axis of a tensor
Factor = Labels | End | int
Made = tuple[tuple[int, ...], Sequence[Labels | None]]  # shape and labels of a tensor


_LONGEST = 32768


class Unsupported(Exception):
    """A rule met a use of its operator that it does not cover; what enters is frozen."""


@dataclass(frozen=True)
class RawOperation:
    """A convolution or matrix product as it was met: sizes that follow labels, and those that never change."""

    name: str
    kind: str
    scale: int
    factors: tuple[Labels, ...]
    output_scale: int
    outputs: tuple[Labels, ...]
    produced: Labels | None
    weight: str  # name of its parameter, "" if both sides are activations
    incoming: int  # channels that each output channel sees
    signature: str  # what it is, but for the sizes that follow
    number: int  # of operators before it
    starts: bool  # the module was called just before, and nothing else in between


_Known = TypeVar("_Known")


class TensorTable(Generic[_Known]):
    """What is known of tensors, kept on them: it goes when they go, and is found quickly."""

    _serial = itertools.count()

    def __init__(self) -> None:
        self._key = f"_autoslim_{next(self._serial)}"

    def get(self, tensor: Tensor) -> _Known | None:
        """What is known of a tensor, or None."""
        return tensor.__dict__.get(self._key)

    def __setitem__(self, tensor: Tensor, known: _Known) -> None:
        tensor.__dict__[self._key] = known


@dataclass
class Recorder:
    """Filled by the rules in `rules.py`. `presets`: labels of parameters and buffers that are final (the proof)."""

    atoms: Atoms
    names: Mapping[int, str] = field(default_factory=dict)  # id of a parameter or buffer -> its name
    held: list[Tensor] = field(default_factory=list)  # those, so that no other tensor gets the id of one let go of
    # weights of grouped convolutions: True if all groups keep the same ranks, False if whole groups are cut
    grouped: dict[str, bool] = field(default_factory=dict)
    # where channels are split into equal parts: may they change their places, rather than be tied across the parts?
    renumbers: bool = False
    could_renumber: bool = False
    mixing: dict[str, None] = field(default_factory=dict)  # operators that see all channels at once, in the order met
    arithmetic: list[tuple[str, AttributeSource]] = field(default_factory=list)  # numbers that are computed with
    ordered: list[tuple[str, Labels]] = field(default_factory=list)  # operators for which the order of these matters
    is_free: Callable[[str], bool] = lambda name: False  # layers whose channels pass through what has no rule
    freed: list[Labels] = field(default_factory=list)
    passed: set[str] = field(default_factory=set)  # where they did
    call: Call = field(default_factory=Call)
    counted: list[Labels] = field(default_factory=list)  # what each number kept in an attribute counts
    needs: list[tuple[Labels, int]] = field(default_factory=list)  # so many of these must be kept
    trail: list[tuple[str, str]] = field(default_factory=list)  # operators that saw channels, and their modules
    trains_alike: bool = False  # channels go through the same operators in training and in evaluation
    outputs: list[tuple[str, list[Made]]] = field(default_factory=list)  # operators, and the results of each
    # in the proof, what operators gave in the capture: name, shape and labels, in order
    expected: Iterator[tuple[str, tuple[int, ...], Sequence[Labels | None]]] = field(default_factory=lambda: iter(()))
    axes: dict[str, list[Labels | None]] = field(default_factory=dict)
    operations: list[RawOperation] = field(default_factory=list)
    attributes: dict[tuple[str, str], tuple[tuple[Labels, ...], bool]] = field(default_factory=dict)
    modules: list[tuple[str, nn.Module]] = field(default_factory=list)  # the stack of modules being called
    used: set[str] = field(default_factory=set)  # parameters and buffers that were read
    originals: Mapping[int, str] = field(default_factory=dict)  # id -> name, for the model this one is a copy of
    strange: set[str] = field(default_factory=set)  # of those, the ones that were read
    stays: dict[str, Reason] = field(default_factory=dict)  # parameters that entered an operator which keeps them whole
    flat: set[str] = field(default_factory=set)  # parameters that are one long row
    entered: str = ""  # the module called last, if nothing was multiplied since
    operator: str = ""  # the last one that was run, or is being run, and the module it is in
    path: str = ""
    results: deque[Any] = field(default_factory=lambda: deque(maxlen=8))  # of the last operators
    _labels: TensorTable[list[Labels | None]] = field(default_factory=TensorTable)
    _origins: TensorTable[str] = field(default_factory=TensorTable)
    _opaque: TensorTable[bool] = field(default_factory=TensorTable)  # computed from parameters in a way not understood
    _indices: TensorTable[list[Labels]] = field(default_factory=TensorTable)
    _written: TensorTable[bool] = field(default_factory=TensorTable)  # tensors whose parts were written into
    _has_written: bool = False

    def begin(self, model: nn.Module) -> None:
        """Know the parameters and buffers of a model that is run next."""
        named = [*model.named_parameters(), *model.named_buffers()]
        self.names = {id(tensor): name for name, tensor in named}
        self.held = [tensor for _, tensor in named]

    # --- where we are ---

    @property
    def where(self) -> str:
        """The operator and the module being called, for reasons."""
        return f"{self.operator} in {self.path!r}" if self.path else f"{self.operator} in the model's forward"

    def reached(self, func: Any) -> None:
        """The next operator is run."""
        self.operator = func.overloadpacket.__name__
        self.path = self.modules[-1][0] if self.modules else ""

    def reason(self, text: str = "", remedy: str = "") -> Reason:
        """Why something cannot be cut, with the place."""
        return Reason(text or f"{self.where} cannot follow the widths", self.where, line_of_the_user(), remedy)

    def mixes(self, text: str = "each result depends on all channels") -> None:
        """Cutting channels is not the same as setting them to zero, for the operator being run."""
        self.mixing.setdefault(f"{self.where}: {text}")

    def tells_apart(self, labels: Labels | None) -> None:
        """The operator being run gives each channel something by its number: their order matters, if they are cut."""
        if labels is not None and not self.atoms.is_settled:
            self.ordered.append((f"{self.where}: channels are told apart by their numbers", labels))

    # --- labels of tensors ---

    def labels(self, tensor: Tensor) -> Sequence[Labels | None]:
        """Labels per axis; None: nothing to cut. Axes of a parameter are born when first asked for."""
        name = self.names.get(id(tensor))
        if name is None:
            return self._carried(tensor) or [None] * tensor.ndim
        known = self.axes.get(name) or [None] * tensor.ndim
        return [
            self._born(name, tensor, axis) if size > 1 or known[axis] is not None else None
            for axis, size in enumerate(tensor.shape)
        ]

    def vector(self, tensor: Tensor, axis: int) -> Labels:
        """Labels of one axis, FIXED where there are none."""
        labels = self.labels(tensor)[axis]
        return np.full(tensor.shape[axis], FIXED) if labels is None else labels

    def seen_last(self) -> Labels:
        """Labels of what the last operators gave, the latest first."""
        leaves = [leaf for result in reversed(self.results) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return np.concatenate([*map(self.known, leaves), np.array([], dtype=np.int64)])

    def known(self, tensor: Tensor) -> Labels:
        """All labels of a tensor, of any axis."""
        found = [labels for labels in self.labels(tensor) if labels is not None]
        return np.concatenate([*found, np.array([], dtype=np.int64)])

    def leave_trail(self, args: Sequence[object]) -> None:
        """Note the operator if it sees channels. Batch normalisation has many names."""
        first = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if first is not None and any(self.is_labelled(first, axis) for axis in range(first.ndim)):
            name = "batch_norm" if "batch_norm" in self.operator else self.operator
            self.trail.append((name, self.modules[-1][0] if self.modules else ""))

    def set(self, tensor: Tensor, labels: Sequence[Labels | None]) -> None:
        """Give a result its labels."""
        assert len(labels) == tensor.ndim, (self.where, len(labels), tensor.shape)
        if any(entry is not None for entry in labels):
            self._labels[tensor] = [
                entry if entry is None or len(entry) == size else self.merge(np.full(size, ANY), entry)  # no rule's aim
                for entry, size in zip(labels, tensor.shape, strict=True)
            ]

    def overwrite(self, tensor: Tensor, labels: Sequence[Labels | None]) -> None:
        """Labels of a tensor changed in place. What it did not carry before, the tensor that it is a part of gets too.

        Where that cannot be told it is frozen.
        """
        before = self.labels(tensor)
        new = {
            axis: after
            for axis, after in enumerate(labels)
            if after is not None and (after != ANY).any() and ((old := before[axis]) is None or (old == ANY).any())
        }
        if new and not tensor._is_view():
            self._written[tensor] = self._has_written = True
        elif new and not self._write_through(tensor, new) and not self.atoms.is_settled:
            for after in new.values():
                text = f"written in place into a part of another tensor by {self.where}"
                self.pin_labels(after, text, "compute the result out of place")
        if id(tensor) not in self.names:
            self._labels[tensor] = list(labels)

    def _write_through(self, part: Tensor, new: Mapping[int, Labels]) -> bool:
        """Give what was written into a part of a tensor to the whole; False if it cannot be told where it lies."""
        whole = part._base
        known = None if whole is None or id(whole) in self.names else self._labels.get(whole)
        if whole is None or known is None:
            return False
        places, after = _places(part, whole), list(known)
        for axis, labels in new.items():
            place = places[axis]
            old = None if place is None else after[place[0]]
            if place is None or old is None:
                return False
            after[place[0]] = row = old.copy()
            row[place[1]] = np.where(row[place[1]] == ANY, labels, row[place[1]])
        self._labels[whole] = after
        self._written[whole] = self._has_written = True
        return True

    def _carried(self, tensor: Tensor) -> list[Labels | None] | None:
        """What an activation carries: a part of a tensor that was written into has what the whole got."""
        known = self._labels.get(tensor)
        whole = tensor._base if self._has_written and known is not None and tensor._is_view() else None
        if whole is not None and known is not None and self._written.get(whole):
            after = self._labels.get(whole)
            for axis, place in enumerate(_places(tensor, whole)):
                labels, seen = known[axis], after[place[0]] if after is not None and place is not None else None
                if labels is not None and seen is not None and place is not None and (labels == ANY).any():
                    known[axis] = np.where(labels == ANY, seen[place[1]], labels)
        return known

    def inherit(self, source: Tensor, out: Tensor) -> None:
        """`out` is computed from the parameter that `source` is, or was computed from."""
        origin = self._origin(source)
        if origin and out is not source:
            self._origins[out] = origin
            if self.is_opaque(source):
                self._opaque[out] = True

    def _origin(self, tensor: Tensor) -> str:
        """The name of the parameter that a tensor is, or was computed from; else empty."""
        return self.names.get(id(tensor)) or self._origins.get(tensor) or ""

    def is_weight(self, tensor: Tensor) -> bool:
        """Is the tensor a parameter, or computed from parameters alone?"""
        return id(tensor) in self.names or self._origins.get(tensor) is not None

    def is_opaque(self, tensor: Tensor) -> bool:
        """Was it computed from parameters by an operator that is not understood?"""
        return bool(self._opaque.get(tensor))

    def obscure(self, sources: Sequence[Tensor], out: Tensor) -> None:
        """`out` is computed from `sources` by an operator that is not understood: if those are parameters, so is it."""
        if sources and all(map(self.is_weight, sources)):
            self.inherit(sources[0], out)
            self._opaque[out] = True

    def _unborn(self, tensor: Tensor, axis: int) -> tuple[str, list[Labels | None]] | None:
        name = self.names.get(id(tensor))
        if name is None:
            return None
        self.used.add(name)
        axes = self.axes.setdefault(name, [None] * tensor.ndim)
        return (name, axes) if axes[axis] is None else None

    def _born(self, name: str, tensor: Tensor, axis: int) -> Labels:
        self.used.add(name)
        axes = self.axes.setdefault(name, [None] * tensor.ndim)
        labels = axes[axis]
        if labels is None:
            size = tensor.shape[axis]
            # no layer has so many channels: whole weights flattened into a row, which cannot be told apart
            labels = axes[axis] = self.atoms.fresh(size) if size <= _LONGEST else np.full(size, FIXED)
            if size > _LONGEST:
                self.flat.add(name)
        return labels

    def reads(self, tensor: Tensor) -> None:
        """An operator is given this tensor."""
        name = self.names.get(id(tensor))
        if name is not None:
            self.used.add(name)
        elif id(tensor) in self.originals:
            self.strange.add(self.originals[id(tensor)])
        else:
            for labels in self.indexed(tensor):
                self.pin_labels(labels, "an index into channels is taken")

    def indexes(self, tensor: Tensor, labels: list[Labels]) -> None:
        """A tensor says which of these channels something is: should anybody read it, they stay."""
        if labels:
            self._indices[tensor] = labels

    def indexed(self, tensor: Tensor) -> list[Labels]:
        """The channels of which it says which."""
        return self._indices.get(tensor) or []

    # --- what rules say ---

    def birth(self, weight: Tensor, axis: int) -> Labels:
        """Labels of the output channels of a weight; new atoms if it is met for the first time."""
        name = self.names.get(id(weight))
        if name is not None:
            return self._born(name, weight, axis)
        return self.vector(weight, axis)

    def merge(self, left: Labels, right: Labels) -> Labels:
        """Tie two vectors of labels position by position."""
        if left is right:
            return left
        return self.atoms.merge(left, right, lambda: self.reason(f"it is tied to channels that stay by {self.where}"))

    def merge_rows(self, rows: Labels) -> Labels:
        """Tie all labels within each row of a matrix; gives one label per row."""
        first = np.ascontiguousarray(rows[:, 0])
        if rows.shape[1] == 1:
            return first
        if (first == ANY).any():
            for column in rows.T[1:]:
                first = self.merge(first, column)
            return first
        return self.merge(np.repeat(first, rows.shape[1] - 1), rows[:, 1:].reshape(-1))[:: rows.shape[1] - 1]

    def tie_labels(self, end: End, labels: Labels) -> Labels:
        """Tie an axis to labels. The unborn axis of a parameter adopts them: no merging is needed."""
        unborn = self._unborn(*end)
        if unborn is not None:
            unborn[1][end[1]] = labels
            return labels
        return self.merge(labels, self.vector(*end))

    def tie(self, ends: Sequence[End]) -> Labels | None:
        """Tie axes of equal size. None if none of them carries labels, nor is a parameter's."""
        unborn = [end for end in ends if self._unborn(*end) is not None]
        known = [end for end in ends if self._unborn(*end) is None]
        labels: Labels | None = None
        if any(self.labels(tensor)[axis] is not None for tensor, axis in known):
            for end in known:
                labels = self.vector(*end) if labels is None else self.merge(labels, self.vector(*end))
        elif known and unborn:
            labels = np.full(known[0][0].shape[known[0][1]], FIXED)  # parameters that meet data
        elif unborn:
            labels = self.birth(*unborn[0])
        for end in unborn:
            if labels is not None:
                labels = self.tie_labels(end, labels)
        return labels

    def pin_labels(self, labels: Labels | None, text: str = "", remedy: str = "") -> None:
        """These channels can never be cut."""
        if labels is not None:
            self.atoms.pin(labels, lambda: self.reason(text, remedy))

    def pin_axes(self, tensor: Tensor, axes: Iterable[int], text: str = "", remedy: str = "") -> None:
        """Nothing along these axes can ever be cut."""
        for axis in axes:
            if self._unborn(tensor, axis) is None:
                self.pin_labels(self.labels(tensor)[axis], text, remedy)
            else:
                self.tie_labels((tensor, axis), np.full(tensor.shape[axis], FIXED))

    def pin(self, tensor: Tensor, text: str, remedy: str = "") -> None:
        """Nothing of this tensor can ever be cut."""
        origin = self._origin(tensor)
        if origin and origin not in self.stays:
            self.stays[origin] = self.reason(text, remedy)
        if id(tensor) in self.names or self._labels.get(tensor) is not None:
            self.pin_axes(tensor, range(tensor.ndim), text, remedy)

    def passes_freely(self, *arguments: Any) -> bool:
        """May channels pass through an operator without a rule, since the user said so of the layers they come from?"""
        if self.atoms.is_settled:
            return self.where in self.passed
        seen = [self.known(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        entering = {root for labels in seen for root in self.atoms.find(labels).tolist() if root >= 0}
        if not entering or not entering <= {root for labels in self.freed for root in self.atoms.find(labels).tolist()}:
            return False
        self.passed.add(self.where)
        return True

    # --- sizes that follow ---

    def is_labelled(self, tensor: Tensor, axis: int) -> bool:
        """May the length of this axis follow the widths?"""
        if id(tensor) in self.names:
            return True
        known = self._carried(tensor)
        labels = None if known is None else known[axis]
        return labels is not None and bool((labels >= 0).any())

    def follow(self, number: int | None, labels: Labels) -> bool:
        """A number given to the operator is to be the number of `labels` that are kept; False if it is a constant.

        The length of another tensor's axis is tied to the labels; a number kept in an attribute is set to follow them.
        What was computed in some other way is left to the proof.
        """
        if self.atoms.is_settled or number is None or not (labels >= 0).any():
            return True
        if not isinstance(number, Size):
            return False
        candidates = [(source, factor) for source, factor in number.sources if self._can_vary(source)]
        for source, factor in candidates:
            known, wanted = self.counted_by(source), self._scaled(labels, factor)
            if known is not None and wanted is not None and self._same_classes(known, wanted):
                return True
        # of several factors of a product, the one that is known to follow already is the likelier
        for source, factor in sorted(candidates, key=lambda pair: self.counted_by(pair[0]) is None):
            wanted = self._scaled(labels, factor)
            if wanted is not None and len(wanted) == self._length(source):
                self._follows(source, wanted)
                return True
        return not number.sources

    def found_equal(self, one: Size, other: Size) -> None:
        """What the code insists on, `assert x.shape[1] == self.channels`, is to stay true: the number follows."""
        for number, axes in ((one, other), (other, one)):
            for source, factor in axes.sources:
                if isinstance(source, AxisSource) and factor == 1 and not self._counts_an_axis(number):
                    self.follow(number, self.vector(source.tensor, source.axis))

    def made_a_number(self, size: Size) -> None:
        """What is computed from a number of channels differs when some are cut from when they are zero."""
        if size.sources:
            text = f"the number of channels enters the arithmetic at {line_of_the_user()}"
            if self._counts_an_axis(size):
                self.mixing.setdefault(text)
            else:  # whether a number kept in an attribute follows is known at the end
                kept = [source for source, _ in size.sources if isinstance(source, AttributeSource)]
                self.arithmetic += [(text, source) for source in kept]

    def _counts_an_axis(self, number: Size) -> bool:
        return any(isinstance(source, AxisSource) and self._can_vary(source) for source, _ in number.sources)

    def made(self, number: int | None, size: int) -> Labels:
        """Labels of an axis made with a given size: if the size has a source, it is to follow."""
        if isinstance(number, Size) and number.sources and not self.atoms.is_settled:
            labels = self.atoms.fresh(size)
            if self.follow(number, labels):
                return labels
        return np.full(size, ANY)

    def parts(self, labels: Labels, count: int) -> list[Labels]:
        """Labels of `count` equal parts, which must all keep the same number of channels.

        Position by position they are tied to each other. Where every class has the same share in each part already,
        they may be numbered anew instead: each part then is said to hold its share of every class, in order.
        """
        roots = self.atoms.find(labels)
        parts = np.split(labels, count)
        if all(np.array_equal(part, first) for first, *others in [np.split(roots, count)] for part in others):
            return parts
        share = self._fewer(labels, count)
        if share is not None:
            self.could_renumber = True
            if self.renumbers:
                self.mixes("channels change their places when some are cut")
                return [share] * count
        self.merge_rows(np.stack(parts).T)
        return parts

    def _can_vary(self, source: Source) -> bool:
        return isinstance(source, AttributeSource) or self.is_labelled(source.tensor, source.axis)

    def counted_by(self, source: Source) -> Labels | None:
        """Labels that a source follows, if it is known to follow any."""
        if isinstance(source, AxisSource):
            return self.vector(source.tensor, source.axis)
        labels, _ = self.attributes.get((source.path, source.name), ((), False))
        found = labels[source.index or 0] if labels else None
        return found if found is not None and (found >= 0).any() else None

    def _length(self, source: Source) -> int:
        if isinstance(source, AxisSource):
            return int(source.tensor.shape[source.axis])
        value = getattr(source.module, source.name)
        return int(value if source.index is None else value[source.index])

    def _follows(self, source: Source, labels: Labels) -> None:
        if isinstance(source, AxisSource):
            self.tie_labels((source.tensor, source.axis), labels)
            return
        known = self.counted_by(source)
        if known is not None:
            self.merge(known, labels)
            return
        value = getattr(source.module, source.name)
        sizes = [value] if source.index is None else list(value)
        before, _ = self.attributes.get((source.path, source.name), ((), False))
        after = list(before) or [np.full(size, FIXED) for size in sizes]
        after[source.index or 0] = labels
        self.counted.append(labels)
        self.attributes[source.path, source.name] = (tuple(after), source.index is not None)

    def _scaled(self, labels: Labels, factor: Fraction) -> Labels | None:
        """Labels of a size of which `factor` times as many as `labels` are kept; None if there are no such."""
        factor = abs(factor)
        fewer = self._fewer(labels, factor.numerator)
        return None if fewer is None else np.tile(fewer, factor.denominator)

    def _fewer(self, labels: Labels, copies: int) -> Labels | None:
        """Each class with one in `copies` of its positions, in order; None if they do not divide."""
        if copies == 1:
            return labels
        counts = Counter(self.atoms.find(labels).tolist())
        if any(count % copies for count in counts.values()):
            return None
        return np.array([root for root, count in counts.items() for _ in range(count // copies)], dtype=np.int64)

    def _same_classes(self, one: Labels, other: Labels) -> bool:
        return Counter(self.atoms.find(one).tolist()) == Counter(self.atoms.find(other).tolist())

    # --- modules and operations ---

    def is_grouped(self, weight: Tensor, *, keeps_groups: bool = False) -> bool:
        """Is it the weight of a grouped convolution (also when a single group is left of it)?

        With `keeps_groups`: one whose groups all keep the same ranks, instead of whole groups being cut.
        """
        name = self._origin(weight)
        return self.grouped.get(name, False) if keeps_groups else name in self.grouped

    def attribute(self, name: str, *labels: Labels | None, is_tuple: bool = False) -> None:
        """The module being called holds a size that follows `labels`, if it has an attribute of this name and value."""
        if not self.modules or all(entry is None for entry in labels):
            return
        path, module = self.modules[-1]
        before = getattr(module, name, None)
        if isinstance(before, (int, tuple)) and len(labels) == (len(before) if isinstance(before, tuple) else 1):
            sizes = before if isinstance(before, tuple) else (before,)
            full = tuple(np.full(n, FIXED) if e is None else e for n, e in zip(sizes, labels, strict=True))
            if all(len(entry) == size for entry, size in zip(full, sizes, strict=True)):
                self.attributes.setdefault((path, name), (full, is_tuple))

    def operation(
        self,
        kind: str,
        weight: Tensor | None,
        factors: Sequence[Factor],
        outputs: Sequence[Factor],
        produced: Labels | None,
        groups: int,
        detail: str = "",
    ) -> None:
        """A convolution or product happened: its MACs are the product of `factors`. `detail`: kernel, stride ..."""
        scale, follows = self._split(factors)
        output_scale, output_follows = self._split(outputs)
        source = "" if weight is None else self._origin(weight)
        path = self.modules[-1][0] if self.modules else ""
        name = path or source.removesuffix(".weight") or self.operator
        if groups > 1:
            self.grouped.setdefault(source, False)
        if produced is not None and self.is_free(name):
            self.freed.append(produced)
        incoming = weight.shape[1] if weight is not None else 0
        signature = f"{kind} {detail}".rstrip() + f" x{scale}>{output_scale}"
        starts, self.entered = bool(path) and path == self.entered, ""
        self.operations.append(
            RawOperation(
                name=name,
                kind=kind,
                scale=scale,
                factors=follows,
                output_scale=output_scale,
                outputs=output_follows,
                produced=produced,
                weight=source,
                incoming=incoming,
                signature=signature,
                number=len(self.outputs),
                starts=starts,
            )
        )

    def _split(self, factors: Sequence[Factor]) -> tuple[int, tuple[Labels, ...]]:
        scale, follows = 1, list[Labels]()
        for factor in factors:
            labels = self.vector(*factor) if isinstance(factor, tuple) else factor
            if isinstance(labels, int):
                scale *= labels
            elif (labels >= 0).any():
                follows.append(labels)
            else:
                scale *= len(labels)
        return scale, tuple(follows)


def _places(part: Tensor, whole: Tensor) -> list[tuple[int, slice] | None]:
    """For each axis of a view the axis of its base along which it runs, and how far; None where it is none alone."""
    sizes, steps = whole.shape, whole.stride()
    axes = sorted((axis for axis, size in enumerate(sizes) if size > 1), key=lambda axis: -steps[axis])  # outer first
    if any(steps[outer] < steps[inner] * sizes[inner] or not steps[inner] for outer, inner in itertools.pairwise(axes)):
        return [None] * part.ndim  # elements of the base lie upon each other
    left, starts = int(part.storage_offset() - whole.storage_offset()), dict[int, int]()
    for axis in axes:
        starts[axis], left = divmod(left, steps[axis])
    found: list[tuple[int, slice] | None] = []
    for size, stride in zip(part.shape, part.stride(), strict=True):
        along = next((axis for axis in axes if stride >= steps[axis]), None)
        if along is None or size == 1 or stride % steps[along]:
            found.append(None)
            continue
        step = stride // steps[along]
        last = starts[along] + (size - 1) * step
        found.append((along, slice(starts[along], last + 1, step)) if last < sizes[along] else None)
    runs = Counter(place[0] for place in found if place is not None)
    return [place if place is not None and runs[place[0]] == 1 else None for place in found]


_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def line_of_the_user(error: BaseException | None = None) -> str:
    """The innermost line of code that is neither torch's nor ours, being run or raised from, as `file:line`; or ""."""
    if error is not None:
        frames = [(frame, number) for frame, number in traceback.walk_tb(error.__traceback__)][::-1]
    else:
        frames = list(traceback.walk_stack(sys._getframe(1)))
    for frame, number in frames:
        name = frame.f_code.co_filename
        if frame.f_code.co_name == "run_labelled" and frame.f_globals.get("__name__") == "autoslim.tracing":
            return ""
        if not name.startswith((*_LIBRARIES, "<")) and "/contextlib.py" not in name:
            return f"{_short_path(name)}:{number}"
    return ""


def _short_path(name: str) -> str:
    path = Path(name)
    if path.is_relative_to(Path.cwd()) and "site-packages" not in name:
        return str(path.relative_to(Path.cwd()))
    bases = [Path(entry) for entry in sys.path if entry]
    return min((str(path.relative_to(base)) for base in bases if path.is_relative_to(base)), key=len, default=name)
