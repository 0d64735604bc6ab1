"""The nouns: channel groups, widths, and which positions of which tensor belong to which group. Plain Python, no torch.

A subnet is the same model with some tensors cut shorter. Everything needed to cut, cost and check one is written here
as data: an `Axis` says for each position of a tensor axis which group it belongs to and at which rank; the position is
kept when `rank < width`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from numbers import Integral, Real
from typing import Any

from autoslim.errors import AutoSlimError, SpaceError, nearest


class Widths(Mapping[str, int]):
    """Group name -> number of channels kept; immutable and hashable. Whole numbers of any kind become an `int`."""

    __slots__ = ("_hash", "_items")

    def __init__(self, items: Mapping[str, int] | Iterable[tuple[str, int]] = ()):
        self._items = dict(items)
        if not _INT.issuperset(map(type, self._items.values())):
            self._items = {name: _whole(width) for name, width in self._items.items()}
        self._hash: int | None = None

    def __getitem__(self, name: str) -> int:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._items.items()))
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self._items == (other._items if isinstance(other, Widths) else other)

    def __repr__(self) -> str:
        return f"Widths({self._items})"

    def replaced(self, name: str, width: int) -> Widths:
        """The same widths with one group set to `width`."""
        return Widths({**self._items, name: width})

    def to_json(self) -> str:
        """A JSON object, group name -> width, in the order of the space."""
        return json.dumps(self._items, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Widths:
        """Read what `to_json` wrote; `SpaceError` if it is anything else."""
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpaceError(f"widths are not valid JSON: {error}") from error
        if not isinstance(items, dict) or not all(type(width) is int for width in items.values()):
            raise SpaceError("widths must be a JSON object of group name -> whole number")
        return cls(items)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are cut together: all tensors tied to them share one width.

    `name` is the first layer that produces them, `choices` the ascending widths that may be used, the last one `size`.
    """

    name: str
    size: int
    choices: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.choices or list(self.choices) != sorted(set(self.choices)) or self.choices[0] < 1:
            raise SpaceError(f"group {self.name!r}: choices must ascend from at least 1, got {self.choices}")
        if self.choices[-1] != self.size:
            raise SpaceError(f"group {self.name!r}: the last choice must be its size {self.size}, got {self.choices}")

    @property
    def is_slimmable(self) -> bool:
        """True when there is more than one width to choose from."""
        return len(self.choices) > 1


@dataclass(frozen=True)
class Span:
    """`count * repeat` neighbouring positions of an axis: position i has rank `start + (i // repeat) * step`.

    `group` None marks positions that are always kept.
    """

    group: str | None
    count: int
    start: int = 0
    repeat: int = 1
    step: int = 1

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.count * self.repeat

    def kept(self, widths: Mapping[str, int]) -> int:
        """How many of the positions remain; they are always the first ones of the span."""
        if self.group is None:
            return self.size
        below = -((self.start - widths[self.group]) // self.step)  # ceil((width - start) / step)
        return max(0, min(self.count, int(below))) * self.repeat  # a dict of widths may have whole numbers of any kind


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor as consecutive spans. Kept positions keep their order."""

    spans: tuple[Span, ...]

    @classmethod
    def fixed(cls, size: int) -> Axis:
        """An axis of which nothing is ever cut."""
        return cls((Span(None, size),))

    @classmethod
    def from_ranks(cls, ranks: Iterable[tuple[str, int] | None]) -> Axis:
        """Compress one (group, rank) or None (always kept) per position into spans."""
        runs: list[tuple[str | None, int, int]] = []  # group, rank, repeat
        for entry in ranks:
            group, rank = entry if entry is not None else (None, 0)
            if runs and runs[-1][:2] == (group, rank):
                runs[-1] = (group, rank, runs[-1][2] + 1)
            else:
                runs.append((group, rank, 1))
        spans: list[Span] = []
        index = 0
        while index < len(runs):
            group, start, repeat = runs[index]
            count, step = 1, 1
            if group is None:
                spans.append(Span(None, repeat))
            else:
                following = runs[index + 1] if index + 1 < len(runs) else (None, 0, 0)
                if (following[0], following[2]) == (group, repeat) and following[1] > start:
                    step = following[1] - start
                    while index + count < len(runs) and runs[index + count] == (group, start + count * step, repeat):
                        count += 1
                spans.append(Span(group, count, start, repeat, step))
            index += count
        return cls(tuple(spans))

    @cached_property
    def size(self) -> int:
        """Number of positions when nothing is cut."""
        return sum(span.size for span in self.spans)

    @cached_property
    def groups(self) -> frozenset[str]:
        """Names of the groups that cut this axis."""
        return frozenset(span.group for span in self.spans if span.group is not None)

    def kept(self, widths: Mapping[str, int]) -> int:
        """Number of positions that remain."""
        return sum(span.kept(widths) for span in self.spans)

    def positions(self, widths: Mapping[str, int]) -> range | tuple[int, ...]:
        """The positions that remain, ascending; a `range` from 0 when they are a prefix."""
        if len(self.spans) == 1:  # most axes, in every pass
            return range(self.spans[0].kept(widths))
        pieces, offset = [], 0
        for span in self.spans:
            pieces.append(range(offset, offset + span.kept(widths)))
            offset += span.size
        total = sum(map(len, pieces))
        last = max((piece.stop for piece in pieces if len(piece)), default=0)
        return range(total) if last == total else tuple(chain(*pieces))

    def without(self, groups: Iterable[str]) -> Axis:
        """The axis with the positions of `groups` always kept."""
        frozen = set(groups)
        if not self.groups & frozen:
            return self
        spans: list[Span] = []
        for span in self.spans:
            kept = span.group is None or span.group in frozen
            if kept and spans and spans[-1].group is None:
                spans[-1] = Span(None, spans[-1].size + span.size)
            else:
                spans.append(Span(None, span.size) if kept else span)
        return Axis(tuple(spans))

    def to_list(self) -> list[Any]:
        """Spans as short lists for JSON; a plain number is a fixed span."""
        return [s.size if s.group is None else [s.group, s.count, s.start, s.repeat, s.step] for s in self.spans]

    @classmethod
    def from_list(cls, spans: list[Any]) -> Axis:
        """Read what `to_list` wrote."""
        read = [Span(None, s) if isinstance(s, int) else Span(*s) for s in spans]
        for span in read:
            numbers = (span.count, span.start, span.repeat, span.step)
            if not all(type(number) is int for number in numbers) or not isinstance(span.group, (str, type(None))):
                raise SpaceError(f"a span of an axis is [group, count, start, repeat, step], got {span}")
            if min(numbers) < 0 or span.step < 1:
                raise SpaceError(f"a span of an axis counts from 0 in steps of at least 1, got {span}")
        return cls(tuple(read))


@dataclass(frozen=True)
class Operation:
    """A convolution, linear layer or matrix product: its MACs are `scale` times the kept sizes of `factors`.

    `outputs` and `output_scale` give the number of elements of its result in the same way. `name` is the module that
    runs it.
    """

    name: str
    kind: str  # "conv", "linear" (its weight is a parameter) or "matmul" (both sides are activations)
    scale: int
    factors: tuple[Axis, ...]
    output_scale: int
    outputs: tuple[Axis, ...]
    is_cuttable: bool = False  # its output channels can be cut
    signature: str = ""  # what its latency depends on besides the sizes of `factors`, what runs after it included
    starts: bool = False  # it is the first thing that the module `name` runs, which is called by itself


@dataclass(frozen=True)
class Activation:
    """A tensor of a forward pass with memory of its own: `scale` times the kept sizes of `axes` elements.

    It is alive while the operators number `first` to `last` run, in the order of the pass.
    """

    scale: int
    axes: tuple[Axis, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Attribute:
    """A number stored in a module that follows the widths, such as `groups` of a depthwise convolution.

    With one axis and `is_tuple` False the value is a number, else a tuple with a number for each axis.
    """

    module: str
    name: str
    axes: tuple[Axis, ...]
    is_tuple: bool = False

    def value(self, widths: Mapping[str, int]) -> int | tuple[int, ...]:
        """What the attribute must be for `widths`."""
        values = tuple(axis.kept(widths) for axis in self.axes)
        return values if self.is_tuple else values[0]


@dataclass(frozen=True)
class Reason:
    """Why channels cannot be cut: in words, the operator and its module, the user's line, and what would help."""

    text: str
    operator: str = ""
    line: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Note:
    """A layer that cannot be slimmed, and why.

    `operator` names the operator at fault and the module it ran in, `line` the line of code that called it, `remedy`
    what would make the layer slimmable; each may be empty.
    """

    name: str
    reason: str
    operator: str = ""
    line: str = ""
    remedy: str = ""

    @classmethod
    def of(cls, name: str, reason: Reason) -> Note:
        """A note on a layer, from the reason met while tracing."""
        return cls(name, reason.text, reason.operator, reason.line, reason.remedy)


@dataclass(frozen=True)
class ChannelSpace:
    """All channel groups of a model, the tensors they cut, and what could not be slimmed.

    `groups` may be given as a mapping or as an iterable of `ChannelGroup`. `parameters` and `buffers` hold the axes of
    every tensor of the model, under its first name when it is shared. `activations`: what lives how long in a forward
    pass in evaluation mode, the input included; empty where that could not be told. `remarks` says how the model had to
    be traced, if not in the usual way. `mixing` lists the operators that see all channels at once (layer normalisation,
    a channel shuffle): there, a narrow net computes something else than the full net with the missing channels set to
    zero; and those that tell channels apart by their numbers, whose order matters then. `uniform` takes no width below
    the share `never_below` of what a ratio asks for.
    """

    groups: Mapping[str, ChannelGroup]
    parameters: Mapping[str, tuple[Axis, ...]] = field(default_factory=dict, repr=False)
    buffers: Mapping[str, tuple[Axis, ...]] = field(default_factory=dict, repr=False)
    operations: tuple[Operation, ...] = field(default=(), repr=False)
    attributes: tuple[Attribute, ...] = field(default=(), repr=False)
    activations: tuple[Activation, ...] = field(default=(), repr=False)
    notes: tuple[Note, ...] = ()
    remarks: tuple[str, ...] = ()
    mixing: tuple[str, ...] = ()
    never_below: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.groups, Mapping):
            object.__setattr__(self, "groups", {group.name: group for group in self.groups})

    def full(self) -> Widths:
        """Every group at its size: the user's own network."""
        return Widths((name, group.size) for name, group in self.groups.items())

    def smallest(self) -> Widths:
        """Every group at its smallest choice."""
        return Widths((name, group.choices[0]) for name, group in self.groups.items())

    def uniform(self, ratio: float) -> Widths:
        """Every group at the choice nearest to `ratio` times its size; of two equally near the wider.

        Where that is less than `never_below` of it, at the next wider one (`make_divisible`).
        """
        if not isinstance(ratio, Real) or not 0 < ratio <= 1:
            raise SpaceError(f"a width ratio must lie in (0, 1], got {ratio!r}")

        def width(group: ChannelGroup) -> int:
            wanted = ratio * group.size
            enough = [choice for choice in group.choices if choice >= self.never_below * wanted]
            return min(reversed(enough), key=lambda choice: abs(choice - wanted))

        return Widths((name, width(group)) for name, group in self.groups.items())

    def sample(self, rng: random.Random) -> Widths:
        """An independent, uniformly drawn choice for each group."""
        return Widths((name, rng.choice(group.choices)) for name, group in self.groups.items())

    def narrowed(self, widths: Mapping[str, int], group: str) -> Widths | None:
        """`widths` with `group` at its next lower choice, or None when it is at the lowest."""
        widths = self._known(widths, (group,))
        lower = [choice for choice in self.groups[group].choices if choice < widths[group]]
        return widths.replaced(group, lower[-1]) if lower else None

    def widened(self, widths: Mapping[str, int], group: str) -> Widths | None:
        """`widths` with `group` at its next higher choice, or None when it is at the highest."""
        widths = self._known(widths, (group,))
        higher = [choice for choice in self.groups[group].choices if choice > widths[group]]
        return widths.replaced(group, higher[0]) if higher else None

    def check(self, widths: Mapping[str, int]) -> None:
        """Raise `SpaceError`, naming group and choices, unless every width is a choice of its group."""
        widths = as_widths(widths)
        choices = self._choices
        with suppress(TypeError):  # of what cannot even be looked for
            if len(widths) == len(choices) and all(widths.get(name) in each for name, each in choices.items()):
                return  # as nearly always, before each pass of a subnet
        self._known(widths, chain(widths, self.groups))
        for name, group in self.groups.items():
            if widths[name] not in group.choices:
                raise SpaceError(f"group {name!r} cannot have width {widths[name]}; choices: {_short(group.choices)}")

    def _known(self, widths: Mapping[str, int], names: Iterable[str]) -> Widths:
        """The widths, if there are groups of these names and each has one."""
        widths = as_widths(widths)
        for name in names:
            if name not in self.groups:
                raise SpaceError(f"no channel group {name!r}; {nearest(str(name), self.groups)}")
            if name not in widths:
                raise SpaceError(f"the width of group {name!r} is missing")
        return widths

    def check_sizes(self, widths: Mapping[str, int]) -> None:
        """Raise `SpaceError` unless each group has a width from 1 to its size, be it a choice or not.

        So every cost looks at widths, tens of thousands of times in a search.
        """
        sizes = self._sizes
        try:
            if len(widths) == len(sizes) and all(widths[name] in size for name, size in sizes.items()):
                return
        except (KeyError, TypeError):
            pass
        groups = {name: replace(group, choices=tuple(sizes[name])) for name, group in self.groups.items()}
        replace(self, groups=groups).check(widths)

    @cached_property
    def _choices(self) -> dict[str, frozenset[int]]:
        return {name: frozenset(group.choices) for name, group in self.groups.items()}

    @cached_property
    def _sizes(self) -> dict[str, range]:
        return {name: range(1, group.size + 1) for name, group in self.groups.items()}

    def with_choices(self, bins: int | str = 12, divisor: int = 8, min_ratio: float = 1 / 6) -> ChannelSpace:
        """Thin the choices out to about `bins` multiples of `divisor`, none below `min_ratio` of the size.

        A bin is `max(divisor, divisor * round(size / bins / divisor))` channels, counted down from the size. "size:32"
        gives bins of so many channels (rounded to a multiple of `divisor`) whatever the size. "paper" is 12 bins of
        multiples of 8, which the published lists of the mobile networks obey; "paper-from-zero" counts such bins up
        from nothing, so that the first cut takes what is left over, as in the lists of ResNet-50. "multiples" are all
        multiples of `divisor`, at which `uniform` then rounds as the papers do (`make_divisible`). Hardware may like a
        `divisor` of 16 or 32 better. Where the model allows fewer widths (a grouped convolution), the nearest allowed
        ones are taken.
        """
        if bins in ("paper", "paper-from-zero"):
            divisor = 8
        from_zero = bins in ("paper-from-zero", "multiples")
        count, size = parse_bins(bins)
        is_number = isinstance(divisor, int) and isinstance(min_ratio, (int, float))
        if not is_number or divisor < 1 or not 0 < min_ratio <= 1:
            raise SpaceError(
                f"divisor must be a whole number of at least 1 and min_ratio in (0, 1], got divisor={divisor!r}, "
                f"min_ratio={min_ratio!r}"
            )

        def bin_size(full: int) -> int:
            return max(divisor, divisor * round((full / count if size is None else size) / divisor))

        def thinned(group: ChannelGroup) -> ChannelGroup:
            size, lowest = bin_size(group.size), min_ratio * group.size
            if bins == "multiples":
                lowest = min(lowest, make_divisible(lowest, divisor))
            targets = range(size, group.size, size) if from_zero else range(group.size - size, 0, -size)
            return _binned(group, targets, divisor, lowest)

        groups = {name: thinned(group) for name, group in self.groups.items()}
        return replace(self, groups=groups, never_below=0.9 if bins == "multiples" else 0.0)

    def with_steps(self, cost: Callable[[Widths], float], least: float = 0.5) -> ChannelSpace:
        """Only the widths at which a measured `cost` (a `LatencyCost`, say) steps down, with all else at full width.

        Counted down from the size, a width stays if it saves at least `least` of what so many channels of its group
        save on average; the size and the smallest choice always do.
        """
        full = self.full()
        if not callable(cost) or not as_number(least) >= 0:
            raise SpaceError(
                "with_steps needs a cost, a callable Widths -> float, and a share of at least 0; got "
                f"{_kind(cost)} and {least!r}"
            )

        def stepped(group: ChannelGroup) -> ChannelGroup:
            costs = {choice: as_number(cost(full.replaced(group.name, choice))) for choice in group.choices}
            for choice, value in costs.items():
                if not math.isfinite(value):
                    raise SpaceError(f"the cost of {group.name!r} at width {choice} is no number that can be compared")
            narrowest, kept = group.choices[0], [group.size]
            per_channel = (costs[group.size] - costs[narrowest]) / max(1, group.size - narrowest)
            for choice in reversed(group.choices[1:-1]):
                saved = costs[kept[-1]] - costs[choice]
                if saved > 0 and saved >= least * per_channel * (kept[-1] - choice):
                    kept.append(choice)
            return replace(group, choices=tuple(sorted({*kept, narrowest})))

        return replace(self, groups={name: stepped(group) for name, group in self.groups.items()})

    def restricted(self, lowest: Mapping[str, int]) -> ChannelSpace:
        """The space without the choices of some groups that lie below the widths given."""
        groups = {
            name: replace(group, choices=tuple(choice for choice in group.choices if choice >= lowest.get(name, 1)))
            for name, group in self.groups.items()
        }
        return replace(self, groups=groups)

    def frozen(self, names: Mapping[str, Reason]) -> ChannelSpace:
        """The space without the groups in `names`; their layers are noted with the reason given for the group."""
        notes = list(self.notes)
        noted = {note.name for note in notes}
        cache: dict[int, Axis] = {}  # many tensors have the same axis: once each

        def without(axis: Axis) -> Axis:
            if id(axis) not in cache:
                cache[id(axis)] = axis.without(names)
            return cache[id(axis)]

        operations = []
        for operation in self.operations:
            reasons = [names[g] for axis in operation.outputs for g in sorted(axis.groups) if g in names]
            if reasons and operation.name not in noted and operation.kind != "matmul":
                noted.add(operation.name)
                notes.append(Note.of(operation.name, reasons[0]))
            outputs = tuple(map(without, operation.outputs))
            operations.append(
                replace(
                    operation,
                    factors=tuple(map(without, operation.factors)),
                    outputs=outputs,
                    is_cuttable=operation.is_cuttable and any(axis.groups for axis in outputs),
                )
            )

        def thawed(tensors: Mapping[str, tuple[Axis, ...]]) -> dict[str, tuple[Axis, ...]]:
            return {key: tuple(map(without, axes)) for key, axes in tensors.items()}

        attributes = (replace(a, axes=tuple(map(without, a.axes))) for a in self.attributes)
        return ChannelSpace(
            groups={name: group for name, group in self.groups.items() if name not in names},
            parameters=thawed(self.parameters),
            buffers=thawed(self.buffers),
            operations=tuple(operations),
            attributes=tuple(a for a in attributes if any(axis.groups for axis in a.axes)),
            activations=tuple(replace(a, axes=tuple(map(without, a.axes))) for a in self.activations),
            notes=tuple(notes),
            remarks=self.remarks,
            mixing=self.mixing,
            never_below=self.never_below,
        )

    def to_json(self) -> str:
        """Everything, as JSON; `from_json` gives back an equal space."""
        tensors = {
            kind: {key: [axis.to_list() for axis in axes] for key, axes in getattr(self, kind).items()}
            for kind in ("parameters", "buffers")
        }
        record = {
            "format": 1,
            "groups": [{"name": g.name, "size": g.size, "choices": list(g.choices)} for g in self.groups.values()],
            **tensors,
            "operations": [
                {
                    "name": o.name,
                    "kind": o.kind,
                    "scale": o.scale,
                    "factors": [axis.to_list() for axis in o.factors],
                    "output_scale": o.output_scale,
                    "outputs": [axis.to_list() for axis in o.outputs],
                    "is_cuttable": o.is_cuttable,
                    "signature": o.signature,
                    "starts": o.starts,
                }
                for o in self.operations
            ],
            "attributes": [
                {"module": a.module, "name": a.name, "axes": [x.to_list() for x in a.axes], "is_tuple": a.is_tuple}
                for a in self.attributes
            ],
            "activations": [[a.scale, a.first, a.last, *(axis.to_list() for axis in a.axes)] for a in self.activations],
            "notes": [asdict(note) for note in self.notes],
            "remarks": list(self.remarks),
            "mixing": list(self.mixing),
            **({"never_below": self.never_below} if self.never_below else {}),
        }
        return json.dumps(record) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ChannelSpace:
        """Read what `to_json` wrote; `SpaceError` if it is anything else."""
        try:
            record = json.loads(text)
            if record["format"] != 1:
                raise SpaceError(f"a space file of format {record['format']!r}; this version reads format 1")
            groups = [ChannelGroup(g["name"], g["size"], tuple(g["choices"])) for g in record["groups"]]
            if not all(isinstance(g.name, str) and all(type(n) is int for n in g.choices) for g in groups):
                raise SpaceError("not a channel space: a group has a name, a size and choices, which are whole numbers")
            tensors = {
                kind: {key: _axes(axes) for key, axes in record[kind].items()} for kind in ("parameters", "buffers")
            }
            operations = tuple(
                Operation(**{**o, "factors": _axes(o["factors"]), "outputs": _axes(o["outputs"])})
                for o in record["operations"]
            )
            attributes = tuple(Attribute(**{**a, "axes": _axes(a["axes"])}) for a in record["attributes"])
            activations = tuple(
                Activation(scale, _axes(axes), first, last)
                for scale, first, last, *axes in record.get("activations", ())
            )
            notes = tuple(Note(**note) for note in record["notes"])
            remarks, mixing = (tuple(record.get(key, ())) for key in ("remarks", "mixing"))
            space = cls(
                groups={g.name: g for g in groups},
                parameters=tensors["parameters"],
                buffers=tensors["buffers"],
                operations=operations,
                attributes=attributes,
                activations=activations,
                notes=notes,
                remarks=remarks,
                mixing=mixing,
                never_below=record.get("never_below", 0.0),
            )
            _check_plain(space)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SpaceError(f"not a channel space: {type(error).__name__}: {error}") from error
        return space


@dataclass(frozen=True)
class SlimStep:
    """One greedy decision: `group` lost a bin, which gave `widths` of this `cost` and `score` (higher is better)."""

    group: str
    widths: Widths
    cost: float
    score: float


def _check_plain(space: ChannelSpace) -> None:
    """`SpaceError` unless fields have their types, and axes name groups that there are: what JSON does not promise."""
    if type(space.never_below) is not float or not 0 <= space.never_below <= 1:
        raise SpaceError(f"not a channel space: never_below is a share, got {space.never_below!r}")
    nouns: tuple[Any, ...] = (*space.operations, *space.attributes, *space.activations, *space.notes)
    for noun in nouns:
        for each in fields(noun):
            kind = _TYPES.get(str(each.type))
            if kind is not None and type(getattr(noun, each.name)) is not kind:
                raise SpaceError(f"not a channel space: {each.name} of {type(noun).__name__} must be {each.type}")
    axes = [*space.parameters.values(), *space.buffers.values()]
    axes += [axes for op in space.operations for axes in (op.factors, op.outputs)]
    axes += [*(each.axes for each in space.attributes), *(each.axes for each in space.activations)]
    for axis in chain(*axes):
        for group in axis.groups:
            if group not in space.groups:
                raise SpaceError(f"not a channel space: an axis is cut by {group!r}, which is no group of it")
    for text in (*space.remarks, *space.mixing):
        if not isinstance(text, str):
            raise SpaceError("not a channel space: remarks must be text")


_TYPES = {"str": str, "int": int, "bool": bool}


def _axes(lists: list[Any]) -> tuple[Axis, ...]:
    return tuple(Axis.from_list(spans) for spans in lists)


def a_space(space: object) -> ChannelSpace:
    """The space; `SpaceError` for anything else, such as the model."""
    if not isinstance(space, ChannelSpace):
        raise SpaceError(f"expected a ChannelSpace, as trace(model, example_input) gives one, got {_kind(space)}")
    return space


def as_widths(widths: object) -> Widths:
    """Widths, or any mapping of groups to whole numbers, as widths; `SpaceError` for anything else."""
    if isinstance(widths, Widths):
        return widths
    if isinstance(widths, Mapping):
        return Widths(widths)
    of_step = "; give its widths: step.widths" if isinstance(widths, SlimStep) else ""
    raise SpaceError(
        f"widths give each channel group a whole number, as Widths or a dict; got {_kind(widths)}{of_step}"
    )


def as_number(value: object) -> float:
    """What is, or counts as, one number (of numpy and torch too); not a number for anything else."""
    if isinstance(value, str):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


_INT = frozenset((int,))


def _whole(width: Any) -> Any:
    """A whole number of numpy, or 8.0, as an int; anything else as it is, for `ChannelSpace.check` to name."""
    number = as_number(width)
    return int(number) if number.is_integer() else width


def check_whole(error: type[AutoSlimError], least: int = 1, **numbers: object) -> None:
    """Raise `error`, with the name, for what is no whole number of at least `least`."""
    for name, number in numbers.items():
        if not isinstance(number, Integral) or isinstance(number, bool) or number < least:
            raise error(f"{name} must be a whole number of at least {least}, got {number!r}")


def _kind(thing: object) -> str:
    """What something is, in an error: a network's text has a hundred lines."""
    if isinstance(thing, (str, int, float, type(None))):
        return repr(thing)
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"a {type(thing).__name__}"


def _short(choices: tuple[int, ...]) -> str:
    if len(choices) <= 16:
        return ", ".join(map(str, choices))
    return f"{', '.join(map(str, choices[:4]))}, ..., {choices[-1]} ({len(choices)} in all)"


def name_of_ratio(ratio: float | str) -> str:
    """What a run calls the net at a width ratio: its switch, and, with a hyphen, its directory."""
    return f"width {ratio if isinstance(ratio, str) else f'{ratio:g}'}"


def parse_bins(bins: int | str) -> tuple[int, int | None]:
    """How many bins a group is to have, and how many channels a bin, if that was asked for; `SpaceError` otherwise."""
    if isinstance(bins, str) and bins in _NAMED_BINS:
        return _NAMED_BINS[bins]
    kind, _, number = str(bins).rpartition(":")
    if kind in ("", "size") and number.isdigit() and int(number) > 0:
        return (int(number), None) if not kind else (1, int(number))
    raise SpaceError(
        f"bins must be a number of at least 1, 'size:16', {', '.join(map(repr, _NAMED_BINS))}, got {bins!r}"
    )


_NAMED_BINS: Mapping[int | str, tuple[int, int | None]] = {
    "paper": (12, None),
    "paper-from-zero": (12, None),
    "multiples": (1, 1),  # of the divisor, whatever that is
}


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, but never less than 90 % of `channels` (MobileNet v2)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _binned(group: ChannelGroup, targets: Iterable[int], divisor: int, lowest: float) -> ChannelGroup:
    """The group with the choices nearest to `targets`, none of those below `lowest`."""
    allowed = [choice for choice in group.choices if choice >= lowest]
    multiples = [choice for choice in allowed if choice % divisor == 0 and choice < group.size]
    allowed = multiples or allowed[:-1]  # a group without multiples of the divisor keeps the widths it has
    wanted = [target for target in targets if target >= lowest]
    # ties go to the narrower width, so that a size that is no multiple of the divisor is first cut down to one
    chosen = {min(allowed, key=lambda choice: (abs(choice - target), choice)) for target in wanted if allowed}
    return replace(group, choices=(*sorted(chosen), group.size))
