"""Union-find over channel atoms, the ground of tracing. An atom is one channel of one producer.

A vector of labels stands beside an axis of an activation: for each position the atom it belongs to. Atoms that must
live or die together are merged. Two labels are no atoms: FIXED (always kept) and ANY (a position whose number follows
the other side, as after `expand`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from autoslim.space import Reason

FIXED = -1
ANY = -2

Labels = npt.NDArray[np.int64]
Why = Callable[[], Reason]  # called when something cannot be cut for it; most never are


class Mismatch(Exception):
    """A cut network does not line up with its labels; carries the labels that disagree."""

    def __init__(self, text: str, labels: Labels | None = None) -> None:
        super().__init__(text)
        self.labels = np.array([], dtype=np.int64) if labels is None else labels


class Atoms:
    """Merges atoms, and remembers why some of them can never be cut."""

    is_settled = False

    def __init__(self) -> None:
        self._parent: Labels = np.arange(1024, dtype=np.int64)
        self._count = 0
        self._pins: list[tuple[Labels, Reason]] = []

    def __len__(self) -> int:
        return self._count

    def fresh(self, count: int) -> Labels:
        """Labels of `count` new atoms."""
        first, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * self._count, dtype=np.int64)])
        return np.arange(first, self._count, dtype=np.int64)

    def find(self, labels: Labels) -> Labels:
        """The representative of each label's class; FIXED and ANY stand for themselves."""
        roots = np.where(labels >= 0, self._parent[labels], labels)
        while True:
            above = np.where(roots >= 0, self._parent[roots], roots)
            if np.array_equal(above, roots):
                return roots
            roots = above

    def merge(self, left: Labels, right: Labels, why: Why) -> Labels:
        """Tie `left` and `right` position by position; `why` says where, for what meets a FIXED position."""
        if len(left) != len(right):
            raise Mismatch(f"{why().operator}: {len(left)} channels meet {len(right)}")
        left_roots, right_roots = self.find(left), self.find(right)
        both = (left_roots >= 0) & (right_roots >= 0) & (left_roots != right_roots)
        if both.any():
            self._unite(left_roots[both], right_roots[both])
        for meets_fixed in (left[right == FIXED], right[left == FIXED]):
            self.pin(meets_fixed, why)
        return np.where(left_roots == ANY, right_roots, left_roots)

    def pin(self, labels: Labels, why: Why) -> None:
        """Atoms that must always be kept."""
        labels = labels[labels >= 0]
        if len(labels):
            self._pins.append((labels, why()))

    def pinned(self) -> dict[int, Reason]:
        """Class representative -> the first reason it can never be cut for."""
        reasons: dict[int, Reason] = {}
        for labels, reason in self._pins:
            for root in np.unique(self.find(labels)).tolist():
                reasons.setdefault(root, reason)
        return reasons

    def _unite(self, left: Labels, right: Labels) -> None:
        """Make one class of each pair of classes."""
        older, newer = np.minimum(left, right), np.maximum(left, right)
        found, first = np.unique(newer, return_index=True)
        if (older == older[first][np.searchsorted(found, newer)]).all() and not np.isin(older, found).any():
            self._parent[found] = older[first]  # each class meets one older one: all at once
            return
        for one, other in set(zip(older.tolist(), newer.tolist(), strict=True)):
            self._union(one, other)

    def _union(self, one: int, other: int) -> None:
        parent = self._parent
        while parent[one] != one:
            one = int(parent[one])
        while parent[other] != other:
            other = int(parent[other])
        # the older atom represents the class, so that a group is named after its first producer
        parent[max(one, other)] = min(one, other)


class SettledAtoms(Atoms):
    """The checking twin: labels are final, and whatever would merge or pin them is a `Mismatch`."""

    is_settled = True

    def __init__(self, describe: Callable[[int], str]) -> None:
        super().__init__()
        self._describe = describe

    def find(self, labels: Labels) -> Labels:
        """Every label is its own class."""
        return labels

    def merge(self, left: Labels, right: Labels, why: Why) -> Labels:
        """Raise `Mismatch` unless both sides agree."""
        if len(left) != len(right):
            both = np.concatenate([left, right])
            raise Mismatch(f"{why().operator}: {len(left)} channels meet {len(right)}", both[both >= 0])
        wrong = (left != right) & (left != ANY) & (right != ANY)
        if wrong.any() and len(wrong) > 1:  # a lone channel meets everything by broadcasting
            first = int(np.argmax(wrong))
            sides = f"{self._describe(int(left[first]))} meets {self._describe(int(right[first]))}"
            both = np.concatenate([left[wrong], right[wrong]])
            raise Mismatch(f"{why().operator}: {sides} at position {first}", both[both >= 0])
        return np.where(left == ANY, right, left)

    def pin(self, labels: Labels, why: Why) -> None:
        """Raise `Mismatch` if something that can be cut would have to stay."""
        cuttable = labels[labels >= 0]
        if len(cuttable) and len(labels) > 1:
            raise Mismatch(f"{why().text}: {self._describe(int(cuttable[0]))} cannot be cut here", cuttable)


class CarriedAtoms(SettledAtoms):
    """Final labels that are only carried along: what does not agree is not complained about."""

    def __init__(self) -> None:
        super().__init__(str)

    def merge(self, left: Labels, right: Labels, why: Why) -> Labels:
        """Those of `left`, where they are known."""
        return np.where(left == ANY, right, left) if len(left) == len(right) else left

    def pin(self, labels: Labels, why: Why) -> None:
        """Nothing."""
