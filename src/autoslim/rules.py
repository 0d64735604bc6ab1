"""What each ATen operator does to channel labels: rules in families, in one table. The only file that knows operators.

A rule is called after its operator ran on the meta device, with the operator's arguments and result, and says through
the `Recorder` which positions are tied, pinned or produced. An operator without a rule freezes whatever enters it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from autoslim.atoms import ANY, FIXED, Labels, Mismatch
from autoslim.recorder import Recorder, Unsupported
from autoslim.sizes import Size

Rule = Callable[[Recorder, Any, tuple[Any, ...], dict[str, Any], Any], None]

_TABLE: dict[str, Rule] = {}


def find_rule(func: Any) -> Rule | None:
    """The rule for an operator overload: by name, then by torch's own tag for pointwise operators."""
    name = func.overloadpacket.__name__
    rule = _TABLE.get(name) or _TABLE.get(name.removesuffix("_"))
    if rule is None and torch.Tag.pointwise in func.tags:
        return _pointwise
    return rule


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _TABLE.update(dict.fromkeys(names, rule))
        return rule

    return register


# --- layout: run the very operator on the labels -----------------------------------------------------------------


_CONSTANT_SIZE = "write -1 or a size taken from a tensor's shape, or keep the size as an attribute of the module"


@_rule(
    *("permute", "transpose", "t", "numpy_T", "movedim", "unsqueeze", "squeeze", "flip", "rot90", "swapaxes"),
    *("repeat_interleave", "unfold", "pixel_unshuffle"),
)
def _layout(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    _laid_out(rec, func, args, kwargs, out, None)


@_rule("roll")
def _roll(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, dims = _bind(func, args, kwargs, "self", "dims")
    # channels that wrap round would be others
    rec.pin_axes(source, [dim % source.ndim for dim in dims] or range(source.ndim))
    _same(rec, func, args, kwargs, out)


@_rule("pixel_shuffle")
def _pixel_shuffle(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, factor = args[:2]
    after = list(rec.labels(source))
    labels = after[source.ndim - 3]
    if labels is not None:  # all that becomes one channel lives or dies together
        after[source.ndim - 3] = rec.merge_rows(labels.reshape(-1, factor * factor))
    after[source.ndim - 2 :] = [None, None]
    rec.set(out, after)


@_rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    labels = rec.labels(args[0])[1]
    if labels is not None:
        rec.merge_rows(labels.reshape(args[1], -1).T)  # what a view into groups does
    _laid_out(rec, func, args, kwargs, out, None)


@_rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten", "view_as", "ravel")
def _view(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    if out.dtype != args[0].dtype:
        raise Unsupported("a view as another type")
    _laid_out(rec, func, args, kwargs, out, rec.call.given(out.shape), is_view=True)


@_rule("repeat", "tile")
def _repeat(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, given = args[0], rec.call.given(args[1])
    _laid_out(rec, func, args, kwargs, out, None)
    after = list(rec.labels(out))
    for axis in range(-out.ndim, 0):
        if given and after[axis] is None and (source.ndim < -axis or source.shape[axis] == 1):
            after[axis] = rec.made(given[axis], out.shape[axis])
    rec.set(out, after)


def _laid_out(
    rec: Recorder,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
    given: list[int | None] | None,
    *,
    is_view: bool = False,
) -> None:
    """Run the operator on a plane of labels for each axis. `given`: the sizes asked for, as far as they are known.

    Of a view, only the axes that are viewed together with the labelled one matter.
    """
    source = args[0]
    rec.inherit(source, out)
    before = rec.labels(source)
    after: list[Labels | None] = [None] * out.ndim
    at: dict[int, int] = {}  # which axis lies along an axis of the result
    loose = set[int]()  # axes of the result along which anything may lie
    sizes, new_sizes = _as_if_filled(source.shape, out.shape, is_view)
    dims = [dim for dim, labels in enumerate(before) if labels is not None and not (labels == FIXED).all()]
    of_any = {dim for dim in dims if np.all(before[dim] == ANY)}
    for dim in sorted(dims, key=of_any.__contains__):  # what is known of one axis comes first
        labels = before[dim]
        assert labels is not None
        old, new = _viewed_together(sizes, new_sizes, dim) if is_view else (range(source.ndim), range(out.ndim))
        shape = [1] * len(old)
        shape[dim - old.start] = -1
        plane = torch.from_numpy(rec.atoms.find(labels)).view(shape).expand(sizes[old.start : old.stop])
        moved = plane.reshape(new_sizes[new.start : new.stop]) if is_view else func(plane, *args[1:], **kwargs)
        found = _varying_axis(rec, moved, given and given[new.start : new.stop])
        found = found and (found[0] + new.start, found[1])
        if found and len(found[1]) != out.shape[found[0]]:
            rec.pin_labels(labels)  # flattened into an axis without elements: with other values there may be some
            continue
        if found is None:
            # a single class along the whole axis: it cannot be said which axis carries it now. A lone channel of the
            # whole net stays, and has no labels in the proof either; one that is left of several may be anywhere
            if rec.atoms.is_settled or of_any:
                loose.update(range(out.ndim) if rec.atoms.is_settled else new)
            elif len(labels) > 1:
                rec.pin_labels(labels, f"all of its channels are tied to each other by {rec.where}")
        elif after[found[0]] is None:
            at[found[0]], after[found[0]] = dim, found[1]
        elif dim in of_any:
            pass
        elif dim >= 2 and rec.is_weight(source):  # a kernel flattened together with the channels it applies to
            rec.pin_labels(labels)
        else:  # two labelled axes flattened into one, as heads and what each has: one stays, the longer may follow
            other = at[found[0]]
            is_longer = len(labels) > source.shape[other]
            rec.pin_labels(before[other] if is_longer else labels)
            if is_longer:
                at[found[0]], after[found[0]] = dim, found[1]
    for axis in loose:
        if after[axis] is None:
            after[axis] = np.full(out.shape[axis], ANY)
    rec.set(out, after)


def _as_if_filled(old: Sequence[int], new: Sequence[int], is_view: bool) -> tuple[list[int], list[int]]:
    """The shapes before and after an operator; where there are no elements (no region found, say) as if there were."""
    shapes = [size or 1 for size in old], [size or 1 for size in new]
    if not is_view:
        return shapes
    larger = math.lcm(*map(math.prod, shapes))
    for sizes, filled in zip((old, new), shapes, strict=True):
        if 0 in sizes:
            filled[list(sizes).index(0)] = larger // math.prod(filled)
    return shapes


def _viewed_together(old: Sequence[int], new: Sequence[int], dim: int) -> tuple[range, range]:
    """The smallest runs of axes of a view that hold the same elements and include axis `dim` of the old shape."""
    start_old = start_new = end_old = end_new = 0
    while end_old <= dim:
        start_old, start_new = end_old, end_new
        end_old, size_old, size_new = end_old + 1, old[end_old], 1
        while size_new != size_old or (end_old == len(old) and end_new < len(new)):
            if size_new < size_old or end_old == len(old):
                size_new, end_new = size_new * new[end_new], end_new + 1
            else:
                size_old, end_old = size_old * old[end_old], end_old + 1
    return range(start_old, end_old), range(start_new, end_new)


def _varying_axis(rec: Recorder, plane: Tensor, given: list[int | None] | None) -> tuple[int, Labels] | None:
    """The axis along which the labels of a plane vary, and its labels; None if they are all equal.

    Labels that vary along several axes (a channel axis broken apart by a view) are tied, so that they vary along the
    longest of them only whose size may follow: all parts then keep the same ranks.
    """
    for dim in range(plane.ndim):  # what does not vary is shrunk to one position
        if plane.shape[dim] > 1 and plane.stride(dim) == 0:
            plane = plane.narrow(dim, 0, 1)
    axes = [dim for dim in range(plane.ndim) if plane.shape[dim] > 1]
    if len(axes) > 1:
        for dim in axes:
            if bool((plane == plane.narrow(dim, 0, 1)).all()):
                plane = plane.narrow(dim, 0, 1)
        axes = [dim for dim in axes if plane.shape[dim] > 1]
    if not axes or (rec.atoms.is_settled and bool((plane == plane.flatten()[0]).all())):
        return None
    may_follow = [dim for dim in axes if given is None or given[dim] is None or isinstance(given[dim], Size)]
    longest = max(may_follow or axes, key=lambda dim: (plane.shape[dim], dim))
    rows = plane.movedim(longest, 0).reshape(plane.shape[longest], -1).numpy()
    labels = rec.merge_rows(rows)
    if given is not None and not rec.follow(given[longest], labels):
        rec.pin_labels(labels, f"{rec.where} has the constant size {given[longest]}", _CONSTANT_SIZE)
    return longest, labels


@_rule("expand", "expand_as", "broadcast_to")
def _expand(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source = args[0]
    rec.inherit(source, out)
    before = rec.labels(source)
    new = out.ndim - source.ndim
    given = rec.call.given(out.shape) or [None] * out.ndim
    after: list[Labels | None] = [None] * out.ndim
    for axis, size in enumerate(out.shape):
        labels = before[axis - new] if axis >= new else None
        if axis >= new and source.shape[axis - new] == size:
            if labels is not None and size > 1 and not rec.follow(given[axis], labels):
                rec.pin_labels(labels, f"{rec.where} has the constant size {size}", _CONSTANT_SIZE)
            after[axis] = labels
        elif size > 1:
            after[axis] = rec.made(given[axis], size)
    rec.set(out, after)


@_rule(
    *("clone", "contiguous", "detach", "alias", "_to_copy", "to", "lift_fresh", "lift", "positive"),
    *("_conj", "resolve_conj", "resolve_neg", "zero", "fill", "bernoulli", "uniform", "normal"),
    *("zeros_like", "ones_like", "empty_like", "full_like"),
    *("rand_like", "randn_like", "randint_like", "exponential", "random"),
)
def _same(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if source is None:  # `normal` of two numbers
        _factory(rec, func, args, kwargs, out)
    elif out is not source:
        if out.shape != source.shape:
            raise Unsupported("a result of another shape")
        rec.inherit(source, out)
        rec.set(out, rec.labels(source))


@_rule("view_as_real")
def _as_real(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    rec.inherit(args[0], out)
    rec.set(out, [*rec.labels(args[0]), None])


@_rule("view_as_complex")
def _as_complex(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    rec.pin_axes(args[0], [args[0].ndim - 1])
    rec.inherit(args[0], out)
    rec.set(out, rec.labels(args[0])[:-1])


@_rule("tril", "triu")
def _triangle(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    for labels in rec.labels(args[0])[-2:]:
        rec.tells_apart(labels)
    _same(rec, func, args, kwargs, out)


@_rule("cumsum", "_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "cumprod", "logcumsumexp")
def _along(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    (dim,) = _bind(func, args, kwargs, "dim")
    if args[0].ndim and _is_cuttable(rec.labels(args[0])[dim % args[0].ndim]):
        rec.mixes()
    _same(rec, func, args, kwargs, out)


def _is_cuttable(labels: Labels | None) -> bool:
    return False if labels is None else bool((labels >= 0).any())


@_rule("as_strided")
def _as_strided(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    before = rec.labels(args[0])
    sizes = [len(labels) if labels is not None else None for labels in before]
    if len(sizes) != out.ndim or any(n not in (None, size) for n, size in zip(sizes, out.shape, strict=True)):
        raise Unsupported("a change of shape")
    if out is not args[0]:  # in place, it only sets the memory format
        rec.set(out, before)


@_rule("glu")
def _glu(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, dim = _bind(func, args, kwargs, "self", "dim")
    after = list(rec.labels(source))
    labels = after[dim]
    if labels is not None:
        after[dim] = rec.parts(labels, 2)[0]
    rec.set(out, after)


@_rule("native_dropout")
def _native_dropout(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    rec.set(out[0], rec.labels(args[0]))
    rec.set(out[1], rec.labels(args[0]))


@_rule("slice")
def _slice(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, dim, start, end, step = _bind(func, args, kwargs, "self", "dim", "start", "end", "step")
    after = list(rec.labels(source))
    rec.inherit(source, out)
    labels = after[dim]
    if labels is not None:
        begin, stop, _ = slice(start, end, step).indices(len(labels))
        stop = max(begin, stop)
        after[dim] = labels[begin:stop:step]
        if step != 1:
            rec.pin_labels(labels)
        elif not rec.atoms.is_settled and _is_cuttable(labels):  # in the proof, it is seen where it is used
            after[dim] = _bounded(rec, labels, (start, begin), (end, stop))
    rec.set(out, after)


def _bounded(rec: Recorder, labels: Labels, start: tuple[Any, int], end: tuple[Any, int]) -> Labels:
    """Labels of a slice, each bound of which follows the widths, or else what it counts stays.

    `start` and `end`: as given, and the place they stand for.
    """
    size, begin, stop = len(labels), start[1], end[1]
    taken = labels[begin:stop]
    computed: list[tuple[int | None, Labels, Labels]] = []
    has_constant = False
    length = rec.call.argument(3, "length") if rec.call.name == "narrow" and stop == size else None
    if length is not None and (not isinstance(length, Size) or length.sources) and not rec.follow(length, taken):
        rec.pin_labels(taken, f"{rec.where} has the constant length {length}", _CONSTANT_SIZE)  # up to the end, no less
    for bound, place in (start, end):
        if not 0 < place < size:
            continue
        counted, others = (labels[place:], labels[:place]) if bound < 0 else (labels[:place], labels[place:])
        number = -1 if bound == -1 else rec.call.number(bound)  # among the arguments, -1 is "to be worked out"
        if rec.call.name == "narrow" and place == stop and begin > 0:
            number, counted = rec.call.argument(3, "length"), taken
        elif rec.call.name == "tensor_split" and rec.call.argument(1, "sections") is not None:
            number = None  # that is how many parts there are
        if number is None or (isinstance(number, Size) and not number.sources):
            computed.append((number, counted, others))
        elif not isinstance(number, Size) or not rec.follow(number, counted):
            # a constant number of leading channels stays in place, or what is left out after it could not be told
            rec.pin_labels(counted, f"{rec.where} has the constant bound {bound}", _CONSTANT_SIZE)
            has_constant = True
    if not computed or (taken == ANY).all():  # a place to be written into: what is written there is seen to fit
        return taken
    # computed somehow: equal parts are the usual case
    part = math.gcd(begin, stop, size) if begin > 0 and stop < size else len(taken)
    has_parts = part > 1 or len(set(rec.atoms.find(labels).tolist())) == 1  # parts of one channel would tie all of them
    if size % part == 0 and has_parts and not has_constant:
        return np.concatenate(rec.parts(labels, size // part)[begin // part : stop // part])
    for number, counted, others in computed:
        whole = number.whole if isinstance(number, Size) else None
        is_rest = whole is not None and whole == size and rec.follow(whole, labels)  # all channels but so many
        text = f"{rec.where} has a bound that is worked out, and its parts are not equal"
        rec.pin_labels(others if is_rest else counted, text, _CONSTANT_SIZE)
    return taken


@_rule("select")
def _select(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, dim = _bind(func, args, kwargs, "self", "dim")
    rec.inherit(source, out)
    after = list(rec.labels(source))
    rec.pin_labels(after.pop(dim % source.ndim))
    rec.set(out, after)


@_rule("unbind")
def _unbind(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    (source, dim) = _bind(func, args, kwargs, "self", "dim")
    after = list(rec.labels(source))
    rec.pin_labels(after.pop(dim % source.ndim))
    for part in out:
        rec.inherit(source, part)
        rec.set(part, after)


@_rule("split", "split_with_sizes", "chunk", "tensor_split", "split_with_sizes_copy", "split_copy", "unsafe_split")
def _split(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, dim = _bind(func, args, kwargs, "self", "dim")
    before = list(rec.labels(source))
    labels = before[dim]
    sizes = [part.shape[dim] for part in out]
    parts: list[Labels | None] = [None] * len(out)
    if labels is not None:
        parts = [*np.split(labels, np.cumsum(sizes)[:-1])]
        if len(parts) > 1 and not rec.atoms.is_settled:
            parts = [*_parted(rec, func, args[1], labels, sizes)]
        elif len(set(sizes)) == 1 and not _has_sizes(func):
            parts = [*rec.parts(labels, len(sizes))]
    for part, piece in zip(out, parts, strict=True):
        after = list(before)
        after[dim] = piece
        rec.inherit(source, part)
        rec.set(part, after)


def _has_sizes(func: Any) -> bool:
    name: str = func.overloadpacket.__name__
    return name.startswith("split_with_sizes")


def _parted(rec: Recorder, func: Any, asked: Any, labels: Labels, sizes: Sequence[int]) -> list[Labels]:
    """Labels of the parts of a split: each size follows its part, or equal parts stay equal."""
    parts = np.split(labels, np.cumsum(sizes)[:-1])
    constant = f"{rec.where} has a constant size"
    if _has_sizes(func):
        given = rec.call.given(asked) or [rec.call.number(size) for size in asked]
        if any(isinstance(number, int) for number in given):
            for number, part in zip(given, parts, strict=True):
                if isinstance(number, Size) and number.whole is not None and number.whole == len(labels):
                    rec.follow(number.whole, labels)  # the rest of all channels
                if not rec.follow(number, part):
                    rec.pin_labels(part, constant, _CONSTANT_SIZE)
            return parts
    if len(set(sizes)) > 1:
        for part in parts[1:]:  # the last part is shorter: all parts keep the same ranks as far as they have them
            rec.merge(parts[0][: len(part)], part)
        if rec.call.name == "chunk" and not _chunks_follow(sizes):
            rec.pin_labels(labels, f"{rec.where} splits {len(labels)} channels into parts of unlike sizes {sizes}")
    else:
        parts = rec.parts(labels, len(sizes))
    if rec.call.name != "chunk" and not rec.follow(rec.call.argument(1, "split_size"), parts[0]):
        rec.pin_labels(labels, constant, _CONSTANT_SIZE)
    return parts


def _chunks_follow(sizes: Sequence[int]) -> bool:
    """Does `chunk` find the parts again when each keeps the same number of channels, as far as it has them?"""
    return all(-(-sum(min(size, kept) for size in sizes) // len(sizes)) == kept for kept in range(1, max(sizes) + 1))


@_rule("cat", "concat", "concatenate")
def _cat(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensors, dim = _bind(func, args, kwargs, "tensors", "dim")
    tensors = [tensor for tensor in tensors if tensor.ndim == out.ndim]
    dim %= out.ndim
    after: list[Labels | None] = []
    for axis in range(out.ndim):
        if axis != dim:
            after.append(rec.tie([(tensor, axis) for tensor in tensors]))
            continue
        pieces = [rec.labels(tensor)[axis] for tensor in tensors]
        known = any(piece is not None for piece in pieces)
        sizes = [tensor.shape[axis] for tensor in tensors]
        full = [np.full(n, FIXED) if p is None else p for p, n in zip(pieces, sizes, strict=True)]
        after.append(np.concatenate(full) if known else None)
    for tensor in tensors:
        rec.inherit(tensor, out)
    rec.set(out, after)


@_rule("stack")
def _stack(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensors, dim = _bind(func, args, kwargs, "tensors", "dim")
    after = [rec.tie([(tensor, axis) for tensor in tensors]) for axis in range(out.ndim - 1)]
    after.insert(dim % out.ndim, None)
    rec.set(out, after)


@_rule("constant_pad_nd")
def _pad(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, pad = _bind(func, args, kwargs, "self", "pad")
    after = list(rec.labels(source))
    for index in range(len(pad) // 2):
        axis, (left, right) = source.ndim - 1 - index, pad[2 * index : 2 * index + 2]
        labels = after[axis]
        if labels is None or left == right == 0:
            continue
        if left < 0 or right < 0:
            raise Unsupported("negative padding of channels")
        after[axis] = np.concatenate([np.full(left, FIXED), labels, np.full(right, FIXED)])
    rec.set(out, after)


# --- elementwise -------------------------------------------------------------------------------------------------


@_rule(
    "hardswish",
    "gelu",
    "relu6",
    "rsub",
    "dropout",
    "copy",
    "where",
    "complex",
    "polar",
    "addcmul",
    "addcdiv",
    "lerp",
    "masked_fill",
    "_prelu_kernel",
    "rrelu_with_noise",
)
def _pointwise(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    if not isinstance(out, Tensor):
        raise Unsupported("several results")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    after: list[Labels | None] = []
    for axis in range(-out.ndim, 0):
        ends = [(t, t.ndim + axis) for t in tensors if t.ndim >= -axis and t.shape[axis] == out.shape[axis]]
        if out.shape[axis] == 1:  # a lone channel: it meets everything by broadcasting
            after.append(next((found for t, at in ends if (found := rec.labels(t)[at]) is not None), None))
        else:
            after.append(rec.tie(ends))
    if any(out is tensor for tensor in tensors):  # in place: what `out` shows may be seen through its base as well
        rec.overwrite(out, after)
        return
    for tensor in tensors:
        rec.inherit(tensor, out)
    rec.set(out, after)


@_rule("prelu")
def _prelu(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, weight = args[:2]
    channel = min(1, source.ndim - 1)
    if weight.shape[0] > 1:
        rec.tie([(source, channel), (weight, 0)])
    rec.attribute("num_parameters", rec.labels(source)[channel])
    rec.set(out, rec.labels(source))


# --- producers and consumers -------------------------------------------------------------------------------------


@_rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def _convolution(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, weight, bias = args[:3]
    transposed, groups = bool(args[6]), int(args[8])
    channel = source.ndim - weight.ndim + 1  # 0 for an unbatched input
    rec.pin_axes(weight, range(2, weight.ndim))
    after: list[Labels | None] = [None] * out.ndim
    for index, axis in enumerate(range(channel + 1, source.ndim)):
        stride, padding, dilation = (_entry(argument, index) for argument in args[3:6])
        if 2 * padding == dilation * (weight.shape[2 + index] - 1) and stride == 1:
            after[axis] = rec.labels(source)[axis]  # a convolution over channels, as in efficient channel attention
            if _is_cuttable(after[axis]) and weight.shape[2 + index] > 1:
                rec.mixes()
        else:
            rec.pin_axes(source, [axis])
    in_axis, out_axis = (0, 1) if transposed else (1, 0)
    if groups == 1 and not rec.is_grouped(weight):
        incoming = rec.tie([(source, channel), (weight, in_axis)])
        outgoing = rec.birth(weight, out_axis)
    else:
        incoming, outgoing = _grouped(rec, source, channel, weight, groups, transposed)
    if bias is not None:
        outgoing = rec.tie_labels((bias, 0), outgoing)
    rec.attribute("in_channels", incoming)
    rec.attribute("out_channels", outgoing)
    if channel == 1:
        after[0] = rec.labels(source)[0]
    after[channel] = outgoing
    rec.set(out, after)
    spatial = [(source if transposed else out, axis) for axis in range(channel + 1, out.ndim)]
    batch = (source, 0) if channel == 1 else 1
    outputs = (batch, outgoing, *((out, axis) for axis in range(channel + 1, out.ndim)))
    kernel = math.prod(weight.shape[2:])
    detail = _in_words(weight, args[3], groups, [out.shape[axis] for axis in range(channel + 1, out.ndim)])
    factors = (kernel, *spatial, batch, (weight, 0), (weight, 1))
    rec.operation("conv", weight, factors, outputs, outgoing, groups, detail)


@_rule("deform_conv2d")
def _deformable(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, weight, offset, mask, bias, *stride = args[:7]
    groups, offset_groups = args[11:13]
    if groups != 1 or offset_groups != 1:
        raise Unsupported("a convolution in groups")
    rec.pin_axes(source, [2, 3])
    rec.pin_axes(weight, [2, 3])
    for places in (offset, mask):
        rec.pin_axes(places, range(1, places.ndim))
    incoming = rec.tie([(source, 1), (weight, 1)])
    outgoing = rec.tie_labels((bias, 0), rec.birth(weight, 0))
    rec.attribute("in_channels", incoming)
    rec.attribute("out_channels", outgoing)
    rec.set(out, [rec.labels(source)[0], outgoing, None, None])
    outputs = ((source, 0), outgoing, (out, 2), (out, 3))
    factors = (math.prod(weight.shape[2:]), (out, 2), (out, 3), (source, 0), (weight, 0), (weight, 1))
    rec.operation("conv", weight, factors, outputs, outgoing, 1, _in_words(weight, stride, 1, out.shape[2:]))


def _in_words(weight: Tensor, stride: Any, groups: int, spatial: Sequence[int]) -> str:
    """Kernel, stride, kind of groups and output size of a convolution: 3x3/2 depthwise to 56x56."""
    steps = {int(step) for step in stride}
    strided = (
        "" if steps == {1} else f"/{'x'.join(str(int(step)) for step in stride) if len(steps) > 1 else max(steps)}"
    )
    grouped = "" if groups == 1 else " depthwise" if weight.shape[1] == 1 else " grouped"
    return f"{'x'.join(map(str, weight.shape[2:]))}{strided}{grouped} to {'x'.join(map(str, spatial))}"


def _entry(argument: Any, index: int) -> int:
    return int(argument[index if len(argument) > 1 else 0] if isinstance(argument, (tuple, list)) else argument)


def _grouped(
    rec: Recorder, source: Tensor, channel: int, weight: Tensor, groups: int, transposed: bool
) -> tuple[Labels, Labels]:
    """Ties of a grouped convolution: incoming and outgoing labels.

    Whole groups are cut, and the number of groups with them (a depthwise convolution is the plainest case). Where that
    left nothing to cut (groups mixed by a channel shuffle), every group keeps the same ranks instead.
    """
    incoming = rec.vector(source, channel)
    in_each = len(incoming) // groups
    if rec.is_grouped(weight, keeps_groups=True):
        ranks = rec.parts(incoming, groups)[0]
        if transposed:
            rec.pin_axes(weight, [0])
            rec.pin_labels(incoming)
            return incoming, np.tile(rec.birth(weight, 1), groups)
        rec.tie_labels((weight, 1), ranks)
        outgoing = rec.birth(weight, 0)
        rec.merge_rows(outgoing.reshape(groups, -1).T)
        return incoming, outgoing
    rec.pin_axes(weight, [1])
    each = rec.merge_rows(incoming.reshape(groups, in_each))
    if not rec.follow(rec.call.argument(6, "groups"), each):
        rec.pin_labels(each, f"{rec.where} has a constant number of groups", _CONSTANT_SIZE)
    out_each = weight.shape[1] if transposed else weight.shape[0] // groups
    outgoing = np.repeat(each, out_each)
    rec.tie_labels((weight, 0), incoming if transposed else outgoing)
    return incoming, outgoing


@_rule("mm", "addmm", "bmm", "baddbmm", "_addmm_activation")
def _matmul(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    left, right = [a for a in args if isinstance(a, Tensor)][-2:]
    bias = args[0] if len([a for a in args if isinstance(a, Tensor)]) == 3 else None
    inner = rec.tie([(left, left.ndim - 1), (right, right.ndim - 2)])
    weights = [t for t in (right, left) if rec.is_weight(t)]
    weight = next((t for t in weights if not rec.is_opaque(t)), weights[0] if weights else None)
    if rec.call.name == "scaled_dot_product_attention" and inner is not None and _is_cuttable(inner):
        rec.mixes("its scale follows from the width of a head")
    # a stack of one matrix comes from `einsum`
    is_linear = weight is not None and (out.ndim == 2 or (weight is right and weight.shape[0] == 1))
    rows, columns = rec.labels(left)[-2], rec.labels(right)[-1]
    outgoing = None
    if is_linear:
        outgoing = columns = rec.birth(weight, weight.ndim - 1) if weight is right else columns
        if weight is left:
            outgoing = rows = rec.birth(left, 0)
    after = [rows, columns]
    if out.ndim == 3:
        after.insert(0, rec.tie([(left, 0), (right, 0)]))
    if bias is not None:
        for axis in range(-bias.ndim, 0):
            if bias.shape[axis] == out.shape[axis] and bias.shape[axis] > 1:
                labels = after[axis]
                after[axis] = rec.tie_labels((bias, bias.ndim + axis), _filled(labels, out.shape[axis]))
    rec.set(out, after)
    batch = (left, 0) if out.ndim == 3 else 1
    factors = (batch, (left, left.ndim - 2), (left, left.ndim - 1), (right, right.ndim - 1))
    outputs = (batch, _filled(rows, out.shape[-2]), _filled(columns, out.shape[-1]))
    if is_linear or rec.call.name == "linear":  # of a weight computed in ways that hide where it comes from, too
        rec.attribute("in_features", inner)
        rec.attribute("out_features", columns if outgoing is None else outgoing)
    rec.operation("linear" if is_linear else "matmul", weight, factors, outputs, outgoing, 1)


@_rule(
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_fused_attention_overrideable"),
    *("_scaled_dot_product_cudnn_attention", "scaled_dot_product_attention"),
)
def _attention(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    query, key, value = args[:3]
    result = out[0] if isinstance(out, (tuple, list)) else out
    if _is_cuttable(rec.tie([(query, query.ndim - 1), (key, key.ndim - 1)])):
        rec.mixes("its scale follows from the width of a head")
    rec.tie([(key, key.ndim - 2), (value, value.ndim - 2)])
    after = [rec.tie([(t, axis) for t in (query, key, value)]) for axis in range(query.ndim - 2)]
    rec.set(result, [*after, rec.labels(query)[-2], rec.labels(value)[-1]])
    batch = tuple((query, axis) for axis in range(query.ndim - 2))
    tokens, keys = (query, query.ndim - 2), (key, key.ndim - 2)
    for depth in ((query, query.ndim - 1), (value, value.ndim - 1)):
        rec.operation("matmul", None, (*batch, tokens, keys, depth), (*batch, tokens, depth), None, 1)


@_rule("mv", "dot", "vdot")
def _vectors(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    left, right = args[:2]
    rec.tie([(left, left.ndim - 1), (right, 0)])
    rec.inherit(left, out)
    rec.set(out, rec.labels(left)[:-1])
    if any(_is_cuttable(labels) for labels in rec.labels(left)):
        rec.mixes()


@_rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    direction, length = args[:2]
    result, *norms = out if isinstance(out, (tuple, list)) else [out]
    after = list(rec.labels(direction))
    for axis, size in enumerate(length.shape):
        if size > 1:
            after[axis] = rec.tie([(direction, axis), (length, axis)])
    rec.inherit(direction, result)  # zeros add nothing to a length
    rec.set(result, after)
    for norm in norms:
        rec.set(norm, [labels if size > 1 else None for labels, size in zip(after, length.shape, strict=True)])


@_rule("embedding")
def _embedding(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    weight, indices = args[:2]
    rec.pin_axes(weight, [0])
    outgoing = rec.birth(weight, 1)
    rec.attribute("embedding_dim", outgoing)
    rec.set(out, [*rec.labels(indices), outgoing])


# --- normalisation -----------------------------------------------------------------------------------------------


@_rule(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("_batch_norm_impl_index", "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm", "miopen_batch_norm"),
)
def _batch_norm(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, *vectors = [arg for arg in args if isinstance(arg, Tensor)]
    labels = rec.tie([(source, 1), *((vector, 0) for vector in vectors)])
    rec.attribute("num_features", labels)
    if rec.is_weight(source):  # weight standardisation: statistics over the channels a weight applies to
        for axis in range(2, source.ndim):
            over = rec.labels(source)[axis]
            if over is not None and _is_cuttable(over):
                rec.mixes()
                if source.shape[0] == 1 and source.ndim == 3:
                    rec.needs.append((over, 2))  # torch refuses statistics of a single value
    results = out if isinstance(out, (tuple, list)) else [out]
    after = list(rec.labels(source))
    after[1] = labels
    rec.set(results[0], after)
    rec.inherit(source, results[0])
    for statistic in results[1:]:
        if isinstance(statistic, Tensor) and statistic.shape == source.shape[1:2]:
            rec.set(statistic, [labels])


@_rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, shape = args[0], args[1]
    vectors = [arg for arg in args[2:4] if isinstance(arg, Tensor)]
    after = list(rec.labels(source))
    first = source.ndim - len(shape)
    for index in range(len(shape)):
        after[first + index] = rec.tie([(source, first + index), *((vector, index) for vector in vectors)])
    _normalised(rec, shape, after[first:])
    results = out if isinstance(out, (tuple, list)) else [out]
    rec.set(results[0], after)
    for statistic in results[1:]:
        if statistic.ndim == source.ndim:
            rec.set(statistic, [*after[:first], *[None] * len(shape)])


def _normalised(rec: Recorder, shape: Sequence[int], labels: Sequence[Labels | None]) -> None:
    """The shape that is normalised follows what is kept of it."""
    given = rec.call.given(shape)
    for index, entry in enumerate(labels):
        if entry is not None and _is_cuttable(entry):
            rec.mixes()
            if given and not rec.follow(given[index], entry):
                rec.pin_labels(entry, f"{rec.where} has the constant shape {tuple(shape)}", _CONSTANT_SIZE)
    rec.attribute("normalized_shape", *labels, is_tuple=True)


@_rule("native_group_norm", "group_norm")
def _group_norm(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, weight, bias = args[:3]
    groups = args[6]
    labels = rec.vector(source, 1)
    for vector in (weight, bias):
        if vector is not None:
            labels = rec.tie_labels((vector, 0), labels)
    number = rec.call.argument(1, "num_groups")
    each = len(labels) // groups
    if groups > each and isinstance(number, Size) and number.sources and not rec.atoms.is_settled:
        # whole groups are cut: the others are normalised as before
        rec.follow(number, rec.merge_rows(labels.reshape(groups, each)))
    else:
        if _is_cuttable(labels):
            rec.mixes()
        if not rec.atoms.is_settled:
            rec.parts(labels, groups)
    rec.attribute("num_channels", labels)
    after = list(rec.labels(source))
    after[1] = labels
    rec.set(out[0] if isinstance(out, (tuple, list)) else out, after)


# --- spatial operators and reductions ----------------------------------------------------------------------------

_DIMENSIONS = re.compile(r"([123])d")


@_rule(
    *(
        f"{kind}_pool{n}d"
        for kind in ("avg", "max", "adaptive_avg", "_adaptive_avg", "adaptive_max")
        for n in (1, 2, 3)
    ),
    *(f"max_pool{n}d_with_indices" for n in (2, 3)),
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d"),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d", "grid_sampler_3d"),
)
def _spatial(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source = args[0]
    name = func.overloadpacket.__name__
    found = _DIMENSIONS.search(name)
    count = int(found.group(1) if found else name.rsplit("_", 1)[1][0])
    rec.pin_axes(source, range(source.ndim - count, source.ndim))
    after = [*rec.labels(source)[: source.ndim - count], *[None] * count]
    for result in out if isinstance(out, (tuple, list)) else [out]:
        rec.set(result, after)


@_rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "prod", "any", "all")
def _reduction(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    names = [argument.name for argument in func._schema.arguments]
    dims = _bind(func, args, kwargs, "dim")[0] if "dim" in names else None
    if rec.operator in ("var", "std"):
        _needs_two(rec, args[0], dims)
    _reduced(rec, args[0], dims, out)


@_rule("index", "_unsafe_index")
def _index(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, (taken, rest) = args[0], _indexed(args[0], args[1])
    rec.pin_axes(source, taken)
    labels = rec.labels(source)
    at = taken[0] if taken and taken == list(range(taken[0], taken[-1] + 1)) else 0  # apart, they come first
    after = [labels[axis] for axis in rest]
    rec.set(out, [*after[:at], *[None] * (out.ndim - len(rest)), *after[at:]])


@_rule("index_put", "_unsafe_index_put")
def _index_put(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    target, values = args[0], args[2]
    taken, rest = _indexed(target, args[1])
    rec.pin_axes(target, taken)
    after = list(rec.labels(target))
    if rest and rest == list(range(target.ndim - len(rest), target.ndim)):  # whole trailing axes are written
        for axis in rest:
            place = values.ndim - target.ndim + axis
            if place >= 0 and values.shape[place] == target.shape[axis]:
                after[axis] = rec.tie([(target, axis), (values, place)])
    elif any(_is_cuttable(labels) for tensor in (target, values) for labels in rec.labels(tensor)):
        raise Unsupported("an assignment to places along several axes")
    if out is target:
        rec.overwrite(out, after)
    else:
        rec.set(out, after)


def _indexed(source: Tensor, indices: Sequence[Tensor | None]) -> tuple[list[int], list[int]]:
    """Axes that are indexed, and the others. A mask takes as many axes as it has."""
    taken, axis = list[int](), 0
    for index in indices:
        length = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            taken += range(axis, axis + length)
        axis += length
    return taken, [axis for axis in range(source.ndim) if axis not in taken]


@_rule("index_select")
def _index_select(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, dim, index = _bind(func, args, kwargs, "self", "dim", "index")
    if source.ndim:
        after = list(rec.labels(source))
        rec.pin_axes(source, [dim % source.ndim])
        rec.pin_axes(index, range(index.ndim))
        after[dim] = None
        rec.set(out, after)


@_rule("gather")
def _gather(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, dim, index = _bind(func, args, kwargs, "self", "dim", "index")
    after = _beside(rec, [index, source], dim)
    for tensor in (source, index):
        rec.pin_axes(tensor, [dim % source.ndim])
    after[dim] = None
    rec.set(out, after)


def _beside(rec: Recorder, tensors: Sequence[Tensor], dim: int) -> list[Labels | None]:
    """Labels of the first of several tensors whose axes are tied, but for axis `dim`, which is left as it is.

    Where one is longer than another a part of it is used, and nothing is cut.
    """
    first = tensors[0]
    if not first.ndim or any(tensor.ndim != first.ndim for tensor in tensors):
        raise Unsupported("a single value")
    after = list(rec.labels(first))
    for axis in range(first.ndim):
        if axis == dim % first.ndim:
            continue
        if all(tensor.shape[axis] == first.shape[axis] for tensor in tensors):
            after[axis] = rec.tie([(tensor, axis) for tensor in tensors])
        else:
            for tensor in tensors:
                rec.pin_axes(tensor, [axis])
    return after


@_rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy")
def _scatter(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    target, dim, index, *values = args[:4]
    written = [value for value in values if isinstance(value, Tensor) and value.ndim]
    tensors = [target, *([] if rec.operator.startswith("index") else [index]), *written]
    after = _beside(rec, tensors, dim)
    for tensor in tensors:
        rec.pin_axes(tensor, [dim % target.ndim])
    if out is target:
        rec.overwrite(out, after)
    else:
        rec.set(out, after)


@_rule("sort", "topk", "kthvalue")
def _order(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, dim = _bind(func, args, kwargs, "self", "dim")
    if not source.ndim:
        return
    after = list(rec.labels(source))
    rec.pin_labels(after[dim])
    if rec.operator != "sort":
        after[dim] = None
    if out[0].ndim < source.ndim:
        del after[dim]
    for result in out:  # values and their places
        rec.set(result, after)
    rec.inherit(source, out[0])


@_rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _fourier(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, dims = args[:2]
    after = list(rec.labels(source))
    for dim in dims:
        rec.pin_labels(after[dim])
        after[dim] = None
    rec.inherit(source, out)
    rec.set(out, after)


@_rule("max_unpool2d", "max_unpool3d")
def _unpool(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source, indices = args[:2]
    count = 2 if rec.operator == "max_unpool2d" else 3
    rec.pin_axes(source, range(source.ndim - count, source.ndim))
    channels = [rec.tie([(source, axis), (indices, axis)]) for axis in range(source.ndim - count)]
    rec.set(out, [*channels, *[None] * count])


@_rule("col2im")
def _col2im(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source = args[0]
    rec.pin_axes(source, [source.ndim - 1])
    *before, rows = rec.labels(source)[:-1]
    channels = None if rows is None else rec.merge_rows(rows.reshape(out.shape[-3], -1))
    rec.set(out, [*before, channels, None, None])


@_rule("log_sigmoid_forward")
def _log_sigmoid(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    rec.set(out[0], rec.labels(args[0]))


@_rule("im2col")
def _im2col(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    source = args[0]
    rec.pin_axes(source, [source.ndim - 2, source.ndim - 1])
    *before, channels = rec.labels(source)[:-2]
    places = out.shape[-2] // source.shape[-3]
    rec.set(out, [*before, None if channels is None else np.repeat(channels, places), None])


@_rule("fake_quantize_per_tensor_affine_cachemask", "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams")
def _fake_quantize(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    for result in out:
        rec.set(result, rec.labels(args[0]))


@_rule("roi_align", "roi_pool")
def _regions(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    for result in out if isinstance(out, (tuple, list)) else [out]:
        rec.set(result, [None, rec.labels(args[0])[1], None, None])


@_rule("max", "min", "median", "nanmedian", "mode", "var_mean", "std_mean", "aminmax", "argmax", "argmin")
def _reduction_with_index(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if len(tensors) == 2:  # the elementwise overloads `max.other` and `min.other`
        _pointwise(rec, func, args, kwargs, out)
        return
    names = [argument.name for argument in func._schema.arguments]
    dims = _bind(func, args, kwargs, "dim")[0] if "dim" in names else None
    if rec.operator in ("var_mean", "std_mean"):
        _needs_two(rec, args[0], dims)
    results = out if isinstance(out, (tuple, list)) else [out]
    for result in results:
        _reduced(rec, args[0], dims, result)
    has_index = dims is not None and rec.operator not in ("var_mean", "std_mean", "aminmax")
    if rec.operator in ("argmax", "argmin") or has_index:
        labels = rec.labels(args[0])
        over = labels if dims is None else labels[dims:][:1]
        rec.indexes(results[-1], [each for each in over if each is not None])


def _needs_two(rec: Recorder, source: Tensor, dims: int | Sequence[int] | None) -> None:
    """The variance of a single value is no number."""
    if dims is not None:
        for axis in [dims] if isinstance(dims, int) else dims:
            labels = rec.labels(source)[axis]
            if labels is not None and _is_cuttable(labels):
                rec.needs.append((labels, 2))


_ZERO_ADDS_NOTHING = ("sum", "linalg_vector_norm", "norm", "any")


def _reduced(rec: Recorder, source: Tensor, dims: int | Sequence[int] | None, out: Tensor) -> None:
    if isinstance(dims, int):
        dims = [dims]
    if source.ndim == 0:  # of which torch takes axis 0
        return
    gone = {dim % source.ndim for dim in dims} if dims else set(range(source.ndim))
    labels = rec.labels(source)
    if rec.call.name == "rms_norm" and not rec.atoms.is_settled:  # most versions of torch compute it from a mean
        _normalised(rec, [source.shape[axis] for axis in sorted(gone)], [labels[axis] for axis in sorted(gone)])
    if rec.operator not in _ZERO_ADDS_NOTHING and any(_is_cuttable(labels[axis]) for axis in gone):
        rec.mixes()
    if out.ndim == source.ndim:  # keepdim
        rec.set(out, [None if axis in gone else labels[axis] for axis in range(source.ndim)])
    else:
        rec.set(out, [labels[axis] for axis in range(source.ndim) if axis not in gone])
    rec.inherit(source, out)


# --- made from nothing: sizes follow the other side, which the proof then checks -----------------------------------


@_rule(
    *("zeros", "ones", "full", "empty", "rand", "randn", "randint", "scalar_tensor"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "empty_strided", "new_empty_strided"),
)
def _factory(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    given = rec.call.given(out.shape) or [None] * out.ndim
    rec.set(out, [rec.made(number, size) for number, size in zip(given, out.shape, strict=True)])


@_rule("eye")
def _identity(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    given = rec.call.given(out.shape) or [rec.call.number(size) for size in out.shape]  # one number for both axes
    rec.set(out, [rec.made(number, size) for number, size in zip(given, out.shape, strict=True)])


@_rule("arange", "linspace", "logspace", "randperm")
def _progression(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    (number,) = rec.call.given(out.shape) or [None]
    labels = rec.made(number, out.shape[0])
    is_computed = (labels == ANY).all() and any(isinstance(each, Size) for each in rec.call.numbers)
    if is_computed and not rec.atoms.is_settled:
        labels = rec.atoms.fresh(out.shape[0])  # `arange(1, c + 1)`: whose numbers they are shows where they are used
    rec.tells_apart(labels)
    rec.set(out, [labels])


@_rule("_assert_async", "_assert_tensor_metadata", "_local_scalar_dense", "equal", "is_same_size", "sym_size")
def _nothing(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Checks and scalars: no channel leaves the operator."""


# --- no rule, but the user's word ----------------------------------------------------------------------------------


def pass_freely(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """An operator without a rule that is said to treat channels one by one: they keep their places.

    In the proof this is tried out: the operator must give the same numbers for some channels as for all of them.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if rec.atoms.is_settled:
        for tensor in tensors:
            for axis, labels in enumerate(rec.labels(tensor)):
                if _is_cuttable(labels) and not _treats_one_by_one(func, args, kwargs, axis, tensor.shape[axis]):
                    raise Mismatch(f"{rec.where} does not treat channels one by one", rec.known(tensor))
    placed: set[tuple[int, int]] = set()
    for result in tree_leaves(out):
        if isinstance(result, Tensor):
            after: list[Labels | None] = []
            for axis, size in enumerate(result.shape):
                ends = [(t, axis) for t in tensors if t.ndim == result.ndim and t.shape[axis] == size]
                placed.update((id(tensor), axis) for tensor, _ in ends)
                after.append(rec.tie(ends))
            rec.set(result, after)
    for tensor in tensors:
        rec.pin_axes(tensor, [axis for axis in range(tensor.ndim) if (id(tensor), axis) not in placed])


def _treats_one_by_one(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int, size: int) -> bool:
    """Does the operator give the same for every other channel along an axis, whether or not the rest is there?"""
    generator = torch.Generator().manual_seed(0)

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dtype.is_floating_point:
            return torch.rand(leaf.shape, generator=generator, dtype=leaf.dtype)
        return torch.zeros(leaf.shape, dtype=leaf.dtype)

    def every_other(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] == size:
            return leaf.index_select(axis, torch.arange(0, size, 2))
        return leaf

    arguments = tree_map(real, (args, kwargs))
    expected = tree_map(every_other, func(*arguments[0], **arguments[1]))
    fewer = tree_map(every_other, arguments)
    try:
        actual = func(*fewer[0], **fewer[1])
    except Exception:  # an operator that does not run on fewer channels does not treat them one by one
        return False
    pairs = zip(tree_leaves(expected), tree_leaves(actual), strict=True)
    return all(
        a.shape == b.shape and torch.allclose(a.double(), b.double()) if isinstance(a, Tensor) else bool(a == b)
        for a, b in pairs
    )


# --- arguments ---------------------------------------------------------------------------------------------------


def _bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """Arguments by name, defaults filled in from the operator's schema."""
    bound = {}
    for index, argument in enumerate(func._schema.arguments):
        if index < len(args):
            bound[argument.name] = args[index]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return [bound[name] for name in names]


def _filled(labels: Labels | None, size: int) -> Labels:
    return np.full(size, FIXED) if labels is None else labels
