"""What the JSON files of a run hold, checked when they are read: a damaged one is named before it does harm. No torch.

Keys that are not listed are left alone; a value that is read stays as it was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from autoslim.errors import AutoSlimError, RunError
from autoslim.files import read_json, read_records
from autoslim.space import ChannelSpace, Widths

_PLAIN = ConfigDict(extra="allow", strict=True)

_Count = Annotated[int, Ge(0), Le(2**63 - 1)]
_Real = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Ge(0), Field(allow_inf_nan=False)]
_Share = Annotated[float, Ge(0), Le(1)]  # of images, as accuracies are
_Widths = dict[str, Annotated[int, Ge(1), Le(2**31)]]


class _Figures(TypedDict):
    """What a net costs."""

    __pydantic_config__ = _PLAIN  # type: ignore[misc]  # as pydantic wants it
    macs: _Count
    params: _Count
    memory: NotRequired[_Count]
    peak_memory: NotRequired[_Count]
    latency_ms: NotRequired[_Positive]
    latency_spread_ms: NotRequired[_Positive]
    latency_predicted_ms: NotRequired[_Positive]


class _FullMetrics(_Figures):
    accuracy: _Share | None


class _Uniform(TypedDict):
    __pydantic_config__ = _PLAIN  # type: ignore[misc]  # as pydantic wants it
    macs: _Count
    ratio: _Share


class _Move(TypedDict):
    __pydantic_config__ = _PLAIN  # type: ignore[misc]  # as pydantic wants it
    wider: str
    narrower: str | None
    widths: _Widths
    score: _Real


class _NetMetrics(_Figures):
    budget: str
    accuracy: dict[str, _Share | None]
    ratio: NotRequired[_Share]
    uniform: NotRequired[_Uniform]
    exchanges: NotRequired[list[_Move]]


class _SeedMetrics(TypedDict):
    """Of a net retrained by another seed than that of the run."""

    __pydantic_config__ = _PLAIN  # type: ignore[misc]  # as pydantic wants it
    seed: int
    accuracy: dict[str, _Share | None]


class _Step(TypedDict):
    __pydantic_config__ = _PLAIN  # type: ignore[misc]  # as pydantic wants it
    group: str
    width: _Count
    score: _Real
    accuracy: NotRequired[_Share | None]
    images: NotRequired[_Count]
    rule: NotRequired[str]


class _Epoch(TypedDict):
    __pydantic_config__ = _PLAIN  # type: ignore[misc]  # as pydantic wants it
    stage: str
    epoch: Annotated[int, Ge(1)]
    losses: dict[str, float]
    seconds: _Positive
    accuracy: NotRequired[_Share | None]
    switches: NotRequired[dict[str, _Share]]


class _Data(TypedDict):
    __pydantic_config__ = _PLAIN  # type: ignore[misc]  # as pydantic wants it
    images: dict[str, _Count]
    digest: dict[str, str]


class _Batches(TypedDict):
    __pydantic_config__ = _PLAIN  # type: ignore[misc]  # as pydantic wants it
    batch_size: Annotated[int, Ge(1), Le(2**31)]
    keep_bytes: _Count


FULL_METRICS: TypeAdapter[Any] = TypeAdapter(_FullMetrics)
NET_METRICS: TypeAdapter[Any] = TypeAdapter(_NetMetrics)
SEED_METRICS: TypeAdapter[Any] = TypeAdapter(_SeedMetrics)
STEP: TypeAdapter[Any] = TypeAdapter(_Step)
MOVE: TypeAdapter[Any] = TypeAdapter(_Move)
EPOCH: TypeAdapter[Any] = TypeAdapter(_Epoch)
DATA: TypeAdapter[Any] = TypeAdapter(_Data)
BATCHES: TypeAdapter[Any] = TypeAdapter(_Batches)


def read_checked(path: Path, kind: TypeAdapter[Any]) -> dict[str, Any]:
    """A JSON object of a kind; `RunError` naming the file and what is wrong in it."""
    value: dict[str, Any] = read_json(path)
    if (problem := _problem(value, kind)) is not None:
        raise RunError(f"{path} is damaged: {problem}; delete it to compute it again")
    return value


def read_lines(path: Path, kind: TypeAdapter[Any]) -> list[dict[str, Any]]:
    """JSON lines of a kind; `RunError` naming the file and the line. A last line cut short by a kill is dropped."""
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        if (problem := _problem(record, kind)) is not None:
            raise RunError(f"{path}, line {number} is damaged: {problem}; delete the file to start its stage again")
    return records


def read_widths(path: Path, space: ChannelSpace) -> Widths:
    """Widths that the space allows; `RunError` naming the file if it holds anything else."""
    with naming(path):
        widths = Widths.from_json(_text(path))
        space.check(widths)
    return widths


def read_space(path: Path) -> ChannelSpace:
    """The channel space of a file; `RunError` naming it if it holds anything else."""
    with naming(path):
        return ChannelSpace.from_json(_text(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A mistake in what a file holds, found while something is made of it, names the file."""
    try:
        yield
    except AutoSlimError as error:
        if str(path) in str(error):
            raise
        raise RunError(f"{path} cannot be used: {error}; delete it to compute it again") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _problem(value: Any, kind: TypeAdapter[Any]) -> str | None:
    try:
        kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        return f"{_place(first['loc'])}{first['msg'][0].lower()}{first['msg'][1:]}"
    return None


def _place(parts: Iterable[str | int]) -> str:
    path = ".".join(str(part)[:40] for part in parts)
    return f"{path!r}: " if path else ""
