"""What is known while a model runs on labels: the labels of every tensor, and what was produced, tied and counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from autoslim.atoms import ANY, FIXED, Atoms, Labels

End = tuple[Tensor, int]  # an axis of a tensor
Factor = Labels | End | int


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


@dataclass
class Recorder:
    """Filled by the rules in `rules.py`. `presets`: labels of parameters and buffers that are final (the proof)."""

    atoms: Atoms
    names: Mapping[int, str]  # id of a parameter or buffer -> its name
    # weights of grouped convolutions: True if all groups keep the same ranks, False if whole groups are cut
    grouped: dict[str, bool] = field(default_factory=dict)
    axes: dict[str, list[Labels | None]] = field(default_factory=dict)
    operations: list[RawOperation] = field(default_factory=list)
    attributes: dict[tuple[str, str], tuple[tuple[Labels, ...], bool]] = field(default_factory=dict)
    modules: list[tuple[str, nn.Module]] = field(default_factory=list)  # the stack of modules being called
    used: set[str] = field(default_factory=set)  # parameters and buffers that were read
    operator: str = ""
    _labels: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    _origins: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    # --- where we are ---

    @property
    def where(self) -> str:
        """The operator and the module being called, for reasons."""
        path = self.modules[-1][0] if self.modules else ""
        return f"{self.operator} in {path!r}" if path else f"{self.operator} in the model's forward"

    # --- labels of tensors ---

    def labels(self, tensor: Tensor) -> Sequence[Labels | None]:
        """Labels per axis; None: nothing to cut. Axes of a parameter are born when first asked for."""
        name = self.names.get(id(tensor))
        if name is None:
            return self._labels[tensor] if tensor in self._labels else [None] * tensor.ndim
        known = self.axes.get(name) or [None] * tensor.ndim
        return [
            self._born(name, tensor, axis) if size > 1 or known[axis] is not None else None
            for axis, size in enumerate(tensor.shape)
        ]

    def vector(self, tensor: Tensor, axis: int) -> Labels:
        """Labels of one axis, FIXED where there are none."""
        labels = self.labels(tensor)[axis]
        return np.full(tensor.shape[axis], FIXED) if labels is None else labels

    def set(self, tensor: Tensor, labels: Sequence[Labels | None]) -> None:
        """Give a result its labels."""
        assert len(labels) == tensor.ndim, (self.where, len(labels), tensor.shape)
        if any(entry is not None for entry in labels):
            self._labels[tensor] = list(labels)

    def overwrite(self, tensor: Tensor, labels: Sequence[Labels | None]) -> None:
        """Labels of a tensor changed in place: what it did not carry before is frozen if a base sees it too."""
        before = self.labels(tensor)
        for axis, after in enumerate(labels):
            old = before[axis]
            if after is not None and (old is None or (old == ANY).any()) and tensor._is_view():
                self.pin_labels(after, f"written in place into a part of another tensor by {self.where}")
        if id(tensor) not in self.names:
            self._labels[tensor] = list(labels)

    def inherit(self, source: Tensor, out: Tensor) -> None:
        """`out` is computed from the parameter that `source` is, or was computed from."""
        origin = self._origin(source)
        if origin and out is not source:
            self._origins[out] = origin

    def _origin(self, tensor: Tensor) -> str:
        """The name of the parameter that a tensor is, or was computed from; else empty."""
        name = self.names.get(id(tensor), "")
        if not name and tensor in self._origins:
            name = self._origins[tensor]
        return name

    def is_weight(self, tensor: Tensor) -> bool:
        """Is the tensor a parameter, or computed from parameters alone?"""
        return id(tensor) in self.names or tensor in self._origins

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
            labels = axes[axis] = self.atoms.fresh(tensor.shape[axis])
        return labels

    # --- what rules say ---

    def birth(self, weight: Tensor, axis: int) -> Labels:
        """Labels of the output channels of a weight; new atoms if it is met for the first time."""
        name = self.names.get(id(weight))
        if name is not None:
            return self._born(name, weight, axis)
        return self.vector(weight, axis)

    def merge(self, left: Labels, right: Labels) -> Labels:
        """Tie two vectors of labels position by position."""
        return self.atoms.merge(left, right, self.where)

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

    def pin_labels(self, labels: Labels | None, reason: str | None = None) -> None:
        """These channels can never be cut."""
        if labels is not None:
            self.atoms.pin(labels, reason or f"{self.where} cannot follow the widths")

    def pin_axes(self, tensor: Tensor, axes: Iterable[int], reason: str | None = None) -> None:
        """Nothing along these axes can ever be cut."""
        for axis in axes:
            if self._unborn(tensor, axis) is None:
                self.pin_labels(self.labels(tensor)[axis], reason)
            else:
                self.tie_labels((tensor, axis), np.full(tensor.shape[axis], FIXED))

    def pin(self, tensor: Tensor, reason: str) -> None:
        """Nothing of this tensor can ever be cut."""
        self.pin_axes(tensor, range(tensor.ndim), reason)

    def is_grouped(self, weight: Tensor, *, keeps_groups: bool = False) -> bool:
        """Is it the weight of a grouped convolution (also when a single group is left of it)?

        With `keeps_groups`: one whose groups all keep the same ranks, instead of whole groups being cut.
        """
        name = self._origin(weight)
        return self.grouped.get(name, False) if keeps_groups else name in self.grouped

    def has_attribute(self, name: str, value: Any) -> bool:
        """Does the module being called hold this value under this name?"""
        return bool(self.modules) and getattr(self.modules[-1][1], name, None) == value

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
    ) -> None:
        """A convolution or product happened: its MACs are the product of `factors`."""
        scale, follows = self._split(factors)
        output_scale, output_follows = self._split(outputs)
        source = "" if weight is None else self._origin(weight)
        path = self.modules[-1][0] if self.modules else ""
        name = path or source.removesuffix(".weight") or self.operator
        if groups > 1:
            self.grouped.setdefault(source, False)
        incoming = weight.shape[1] if weight is not None else 0
        self.operations.append(
            RawOperation(name, kind, scale, follows, output_scale, output_follows, produced, source, incoming)
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
