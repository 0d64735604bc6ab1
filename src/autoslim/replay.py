"""Operators of one pass written down, to be run again on other inputs of the same shapes without the model's own code.

A pass that computes only a part of a network spends much of its time in Python: in the model's code, and in everything
around operators that are not computed. What is written down here holds only the operators whose results are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Make = Callable[[Any], Sequence[Any]]


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor of the pass in the arguments of an operator."""

    number: int


@dataclass(frozen=True)
class _Named:
    """Stands for a tensor of the model."""

    name: str


@dataclass(frozen=True)
class _Plain:
    """A number or the like among the arguments of an operator: the `place`-th of those that are no tensors."""

    place: int
    value: Any


@dataclass(frozen=True)
class _Action:
    """Something a pass does: an operator is run, or tensors are made in another way and, perhaps, written somewhere."""

    run: Callable[..., Any] | None
    make: Make | None
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    results: tuple[int, ...]  # slots
    reads: frozenset[int]  # places in memory
    writes: frozenset[int]
    keeps: bool = False  # writes into a tensor from outside of the pass
    over: tuple[int, ...] = ()  # slots that are read here for the last time
    index: int | None = None  # place of the operator in the pass
    plain: tuple[Any, ...] = ()  # its arguments that are no tensors
    like: tuple[Any, ...] = ()  # those that the pass it was compared with has there


class Recording:
    """What a pass on `inputs` does, told by the mode under which it runs; `written` is what leads to its output.

    `names`: the tensors of the model by their id.
    """

    def __init__(self, inputs: Any, names: Mapping[int, str] | None = None) -> None:
        self._names = names or {}
        self._actions: list[_Action] = []
        self._alive: list[Any] = []  # so that no tensor takes the place of another in memory, nor its id
        self._slots: dict[int, int] = {}  # by id
        self._made = set[int]()  # places in memory of tensors that are made in the pass
        # does it run the same operators on any values, and is it known what goes in and out?
        self.is_fixed = all(_is_plain(leaf) for leaf in tree_leaves(inputs))
        self._inputs = self._new(tree_leaves(inputs))  # whose memory is the user's: not made here
        self.shapes = shapes_of(inputs)

    def ran(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        written: Iterable[Tensor],
        result: Any,
        index: int | None = None,
        like: tuple[Any, ...] = (),
    ) -> None:
        """An operator was run, the `index`-th of the pass; `like`: what `plain_of` its arguments is in another pass."""
        leaves = flat(result)
        if torch.Tag.dynamic_output_shape in func.tags or not all(isinstance(leaf, Tensor) for leaf in leaves):
            self.is_fixed = False
        plain = list[Any]()
        arguments = tuple(self._template(arg, plain) for arg in args)
        named = {name: self._template(value, plain) for name, value in kwargs.items()}
        reads = frozenset(_place(leaf) for leaf in flat((args, kwargs)) if isinstance(leaf, Tensor))
        writes = {_place(leaf) for leaf in written}
        places = {_place(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        keeps = not writes <= self._made
        self._made |= places - reads
        slots, written_to = self._new(leaves), frozenset(writes | places)
        self._actions.append(
            _Action(
                func,
                None,
                arguments,
                named,
                slots,
                reads,
                written_to,
                keeps,
                index=index,
                plain=tuple(plain),
                like=like,
            )
        )

    def made(self, make: Make, result: Any) -> None:
        """Tensors came into being without an operator: `make(source)` gives such again."""
        leaves = tree_leaves(result)
        writes = frozenset(_place(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        self._made |= writes
        self._actions.append(_Action(None, make, (), {}, self._new(leaves), frozenset(), writes))

    def filled(self, target: Tensor, make: Make) -> None:
        """A tensor was overwritten by what `make(source)` gives."""
        place = frozenset([_place(target)])
        keeps = _place(target) not in self._made
        self._actions.append(_Action(None, make, (self._template(target, []),), {}, (), place, place, keeps))

    def renamed(self, source: Tensor, result: Tensor) -> None:
        """A tensor was given another handle."""
        self._alive.append(result)
        if id(source) in self._slots:
            self._slots[id(result)] = self._slots[id(source)]

    def written(self, output: Any) -> Written | None:
        """What leads to the output; None if it may be something else for other values."""
        leaves, structure = tree_flatten(output)
        live = {_place(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        outputs = [self._template(leaf, []) for leaf in leaves]
        last_used = {leaf.number for leaf in outputs if isinstance(leaf, _Slot)}
        kept: list[_Action] = []
        for action in reversed(self._actions):
            if live.isdisjoint(action.writes):
                continue
            if action.keeps:
                return None
            live |= action.reads
            used = {leaf.number for leaf in _leaves((action.arguments, action.named)) if isinstance(leaf, _Slot)}
            used |= set(action.results)
            over = tuple(used - last_used)
            last_used |= used
            kept.append(replace(action, over=over))
        if not self.is_fixed or not all(_is_plain(leaf) for leaf in leaves):
            return None
        return Written(tuple(reversed(kept)), self._inputs, self.shapes, outputs, structure, len(self._alive) + 1)

    def _new(self, leaves: Sequence[Any]) -> tuple[int, ...]:
        """Slots of tensors; those that were known before, results of operators in place, keep theirs."""
        slots = []
        for leaf in leaves:
            number = self._slots.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if number is None:
                number = len(self._alive)
                self._alive.append(leaf)
                if isinstance(leaf, Tensor):
                    self._slots[id(leaf)] = number
            slots.append(number)
        return tuple(slots)

    def _template(self, value: Any, plain: list[Any]) -> Any:
        if isinstance(value, Tensor):
            number = self._slots.get(id(value))
            if number is not None:
                return _Slot(number)
            self._alive.append(value)
            name = self._names.get(id(value))
            return value if name is None else _Named(name)
        if isinstance(value, (list, tuple)):
            return [self._template(each, plain) for each in value]
        plain.append(value)
        return _Plain(len(plain) - 1, value)


@dataclass(frozen=True)
class Written:
    """A part of a pass, written down: what it does at any widths of the other groups, once it is bound to them."""

    actions: tuple[_Action, ...]
    inputs: tuple[int, ...]
    shapes: Any
    outputs: list[Any]
    structure: Any
    size: int

    @property
    def is_general(self) -> bool:
        """Is every tensor it reads known by name? Another one may belong to the widths it was written down at."""
        actions = [(action.arguments, action.named) for action in self.actions]
        return not any(isinstance(leaf, Tensor) for leaf in _leaves((actions, self.outputs)))

    def bound(
        self, named: Callable[[str], Tensor] | None = None, like: Mapping[int, tuple[Any, ...]] | None = None
    ) -> Program | None:
        """The program with the tensors of these names.

        `like`: arguments that are no tensors in a pass like the one it was compared with when it was written down, by
        the place of the operator. Where the arguments were the same, they are again; where not, and these are others
        now, it is not known what they ought to be: None.
        """
        actions = []
        for action in self.actions:
            now: tuple[Any, ...] | None = None
            if like is not None and action.index is not None and like[action.index] != action.like:
                now = like[action.index]
                if action.plain != action.like or len(now) != len(action.plain):
                    return None
            arguments = tuple(_with(each, named, now) for each in action.arguments)
            by_name = {name: _with(each, named, now) for name, each in action.named.items()}
            actions.append(replace(action, arguments=arguments, named=by_name, plain=(), like=()))
        outputs = [_with(leaf, named, None) for leaf in self.outputs]
        return Program(tuple(actions), self.inputs, self.shapes, outputs, self.structure, self.size)


@dataclass(frozen=True)
class Program:
    """A part of a pass, ready to be run on other inputs of the same shapes."""

    actions: tuple[_Action, ...]
    inputs: tuple[int, ...]
    shapes: Any
    outputs: list[Any]
    structure: Any
    size: int

    def run(self, inputs: Any, source: Any) -> Any:
        """The output for `inputs`; `source` is what tensors that were made, not computed, come from."""
        values: list[Any] = [None] * self.size
        for slot, leaf in zip(self.inputs, tree_leaves(inputs), strict=True):
            values[slot] = leaf
        with torch.no_grad():
            for action in self.actions:
                if action.run is not None:
                    arguments = [_filled(each, values) for each in action.arguments]
                    named = {name: _filled(each, values) for name, each in action.named.items()}
                    result = action.run(*arguments, **named)
                    results: Sequence[Any] = (result,) if isinstance(result, Tensor) else flat(result)
                else:
                    assert action.make is not None
                    results = action.make(source)
                    if action.arguments:
                        _filled(action.arguments[0], values).copy_(results[0])
                for slot, value in zip(action.results, results, strict=False):
                    values[slot] = value
                for slot in action.over:
                    values[slot] = None
        return tree_unflatten([_filled(each, values) for each in self.outputs], self.structure)


def shapes_of(inputs: Any) -> list[Any]:
    """What inputs have to look like for a program: shapes and types of tensors, and everything else."""
    return [
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in tree_leaves(inputs)
    ]


def flat(value: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dictionaries, quickly: what operators take and give holds nothing else."""
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in flat(each)]
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in flat(each)]
    return [value]


def plain_of(args: Any, kwargs: Any) -> tuple[Any, ...]:
    """The arguments of an operator that are no tensors."""
    return tuple(leaf for leaf in flat((args, kwargs)) if not isinstance(leaf, Tensor))


def _with(template: Any, named: Callable[[str], Tensor] | None, plain: tuple[Any, ...] | None) -> Any:
    if isinstance(template, _Plain):
        return template.value if plain is None else plain[template.place]
    if isinstance(template, _Named):
        assert named is not None, "tensors have names where they were named"
        return named(template.name)
    if isinstance(template, list):
        return [_with(each, named, plain) for each in template]
    return template


def _filled(template: Any, values: Sequence[Any]) -> Any:
    if isinstance(template, _Slot):
        return values[template.number]
    if isinstance(template, list):
        return [_filled(each, values) for each in template]
    return template


def _leaves(templates: Any) -> Iterable[Any]:
    if isinstance(templates, dict):
        templates = templates.values()
    elif not isinstance(templates, (list, tuple)):
        yield templates
        return
    for each in templates:
        yield from _leaves(each)


def _is_plain(leaf: Any) -> bool:
    """Is it what it seems, and no container that is unknown here?"""
    return leaf is None or isinstance(leaf, (Tensor, int, float, str))


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
