"""Latency from tables: what each operator takes at the widths it was measured at. Arithmetic on a CSV; no torch.

An operator is a convolution or matrix product with whatever runs until the next one (its normalisation, activation,
the sum it enters), so that the operators of a network add up to the whole forward pass.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autoslim.errors import LatencyError, nearest
from autoslim.files import write_whole
from autoslim.space import Axis, ChannelSpace, a_space

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LatencyOperator:
    """A layer and what runs after it: `signature` is what its time depends on besides the kept sizes of `axes`."""

    name: str
    signature: str
    axes: tuple[Axis, ...]
    scale: int  # its MACs are this times the kept sizes

    def widths(self, widths: Mapping[str, int]) -> tuple[int, ...]:
        """The sizes that a table is asked for."""
        return tuple(axis.kept(widths) for axis in self.axes)


def latency_operators(space: ChannelSpace) -> list[LatencyOperator]:
    """The operators of a network, in the order they run. What no module of its own runs belongs to the one before."""
    found: list[LatencyOperator] = []
    for op in space.operations:
        if not found or op.starts:
            found.append(LatencyOperator(op.name, op.signature, op.factors, op.scale))
        else:
            last = found[-1]
            axes = tuple(dict.fromkeys((*last.axes, *op.factors)))
            found[-1] = LatencyOperator(last.name, f"{last.signature} + {op.signature}", axes, last.scale + op.scale)
    return found


@dataclass(frozen=True)
class LatencyRow:
    """An operator took `ms` milliseconds at `widths`; `spread` is the interquartile range of its repeats."""

    operator: str
    widths: tuple[int, ...]
    ms: float
    spread: float = 0.0


@dataclass(frozen=True)
class LatencyTable:
    """Measured rows, with what they were measured on (`about`: runtime, threads, machine, versions)."""

    rows: tuple[LatencyRow, ...]
    about: Mapping[str, str] = field(default_factory=dict)

    def predict(self, operator: str, widths: tuple[int, ...]) -> float:
        """Milliseconds of an operator at any widths between those measured; `LatencyError` outside."""
        fit = self._fits.get(operator)
        if fit is None:
            raise LatencyError(
                f"the latency table has no operator {operator!r}; {nearest(operator, self._fits)} Every operator of "
                "the network needs rows: `autoslim latency MODEL --csv FILE` writes a table with all of them"
            )
        return fit(widths)

    @cached_property
    def _fits(self) -> dict[str, _Fit]:
        found: dict[str, list[LatencyRow]] = {}
        for row in self.rows:
            found.setdefault(row.operator, []).append(row)
        return {operator: _Fit(operator, rows) for operator, rows in found.items()}

    def to_csv(self) -> str:
        """Columns operator, widths, ms, spread; lines that begin with # say what was measured on."""
        text = io.StringIO()
        for key, value in self.about.items():
            text.write(f"# {key}: {' '.join(str(value).split())}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["operator", "widths", "ms", "spread"])
        for row in self.rows:
            writer.writerow([row.operator, " ".join(map(str, row.widths)), f"{row.ms:.6g}", f"{row.spread:.3g}"])
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str, where: str = "the latency table") -> LatencyTable:
        """Read what `to_csv` wrote, or a table measured elsewhere; `spread` may be left out. Raises `LatencyError`."""
        lines = [(n, line) for n, line in enumerate(text.lstrip("\ufeff").splitlines(), start=1) if line.strip(" \t,;")]
        notes = [line.lstrip("# ").partition(":") for _, line in lines if line.startswith("#") and ":" in line]
        about = {key.strip(): value.strip() for key, _, value in notes}
        content = [(number, line) for number, line in lines if not line.startswith("#")]
        head = [name.strip().lower() for name in _cells(content[0][1], where)] if content else []
        if not {"operator", "widths", "ms"} <= set(head):
            separator = "; columns are separated by commas" if ";" in "".join(head) or "\t" in "".join(head) else ""
            shown = str(head)[:80] if head else ""
            raise LatencyError(
                f"{where}: the first line must name the columns operator,widths,ms{separator}; it is {shown}"
            )
        rows = []
        for number, line in content[1:]:
            cells = _cells(line, f"{where}, line {number}")
            if len(cells) > len(head):
                raise LatencyError(
                    f"{where}, line {number}: {len(cells)} cells for {len(head)} columns; quote a cell with "
                    "a comma, and write times with a point"
                )
            rows.append(
                _row({k: cell.strip() for k, cell in zip(head, cells, strict=False)}, f"{where}, line {number}")
            )
        if not rows:
            raise LatencyError(f"{where} has no rows")
        if not any(row.ms > 0 for row in rows):
            raise LatencyError(f"{where}: all times are 0; give the milliseconds that each operator takes")
        return cls(tuple(rows), about)

    def save(self, path: str | Path) -> None:
        """Write the CSV; it appears whole or not at all."""
        write_whole(Path(path), self.to_csv())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a CSV file; `LatencyError` if it cannot be read."""
        try:
            return cls.from_csv(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, ValueError, TypeError) as error:  # of the path too: one with a null byte is none
            raise LatencyError(f"the latency table {path} cannot be read: {error}") from error


def _cells(line: str, where: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error as error:  # a cell without an end
        raise LatencyError(f"{where}: {error}") from error


def _row(cells: Mapping[str, str], where: str) -> LatencyRow:
    try:
        widths = tuple(int(part) for part in cells["widths"].split())
        row = LatencyRow(cells["operator"], widths, float(cells["ms"]), float(cells.get("spread") or 0.0))
    except (KeyError, ValueError) as error:
        raise LatencyError(f"{where}: expected operator,widths,ms as in 'conv 1x1 ...,16 96,0.21': {error}") from None
    is_time = 0 <= row.ms <= _LONGEST and 0 <= row.spread <= _LONGEST
    if not row.operator or not is_time or not all(1 <= width <= _WIDEST for width in widths):
        raise LatencyError(
            f"{where}: an operator needs a name, widths of at least 1 and a time in milliseconds that is not negative"
        )
    return row


class _Fit:
    """Interpolates the rows of one operator: a trend (products of widths), and what the nearest rows differ from it.

    Exact at a row. On a full grid the trend is bilinear, as a convolution's time is but for the steps of its kernels.
    """

    def __init__(self, operator: str, rows: Iterable[LatencyRow]) -> None:
        times: dict[tuple[int, ...], list[float]] = {}
        for row in rows:
            times.setdefault(row.widths, []).append(row.ms)
        if len({len(widths) for widths in times}) > 1:
            raise LatencyError(f"rows of {operator!r} in the latency table have different numbers of widths")
        self.operator = operator
        self.points = np.array(list(times), dtype=np.float64).reshape(len(times), -1)
        self.values = np.array([np.median(each) for each in times.values()])
        self.low, self.high = self.points.min(0), self.points.max(0)
        self.range = np.maximum(self.high - self.low, 1.0)
        design = self._basis(self.points)
        weights = 1 / np.sqrt(np.maximum(self.values, 1e-6))  # small times count too, but not as much as their share
        self.trend = np.linalg.lstsq(design * weights[:, None], self.values * weights, rcond=1e-9)[0]
        self.rest = self.values - design @ self.trend

    def __call__(self, widths: tuple[int, ...]) -> float:
        at = np.array(widths, dtype=np.float64)
        if len(at) != len(self.low) or (at < self.low).any() or (at > self.high).any():
            measured = " x ".join(f"{int(low)}-{int(high)}" for low, high in zip(self.low, self.high, strict=True))
            raise LatencyError(
                f"the latency table lacks {self.operator!r} at widths {' '.join(map(str, widths))}: it was measured at "
                f"{measured or 'no widths'}, and nothing is guessed outside; add rows"
            )
        distances = (((self.points - at) / self.range) ** 2).sum(1)
        near = np.argsort(distances, kind="stable")[:_NEAREST]
        closeness = 1 / (distances[near] + 1e-12)
        value = float(self._basis(at[None])[0] @ self.trend + closeness @ self.rest[near] / closeness.sum())
        return max(value, 0.5 * float(self.values.min()))

    def _basis(self, points: Floats) -> Floats:
        scaled = (points - self.low) / self.range
        columns = [np.ones(len(points)), *scaled.T]
        columns += [scaled[:, i] * scaled[:, j] for i, j in combinations(range(scaled.shape[1]), 2)]
        return np.stack(columns, axis=1)


_NEAREST = 4
_LONGEST = 1e9  # milliseconds: above, sums of squares are no numbers
_WIDEST = 10**9  # and their products too


class LatencyCost:
    """Milliseconds of one forward pass, as a table of its operators predicts them; a cost for `greedy_slim`.

    `table` is measured by `measure_latency_table`, or read from a CSV (`LatencyTable.load`), which may be given itself.
    Raises `LatencyError` at once if the table does not cover the space, naming the operator and the widths.
    """

    unit = "ms"

    def __init__(self, space: ChannelSpace, table: LatencyTable | str | Path) -> None:
        self.operators = latency_operators(a_space(space))
        self.space = space
        self.table = table if isinstance(table, LatencyTable) else LatencyTable.load(table)
        self._known: dict[tuple[str, tuple[int, ...]], float] = {}
        if not self.operators or not all(operator.signature for operator in self.operators):
            raise LatencyError("the operators of this space are not known; trace the model again")
        for widths in (space.full(), space.smallest()):
            self(widths)

    def __call__(self, widths: Mapping[str, int]) -> float:
        """Milliseconds of the net of these widths."""
        return sum(self.times(widths))

    def times(self, widths: Mapping[str, int]) -> list[float]:
        """Milliseconds of each of `operators`."""
        self.space.check_sizes(widths)
        return [self._time(operator.signature, operator.widths(widths)) for operator in self.operators]

    def _time(self, signature: str, widths: tuple[int, ...]) -> float:
        key = signature, widths
        if key not in self._known:
            self._known[key] = self.table.predict(signature, widths)
        return self._known[key]


def hot_operators(cost: LatencyCost, widths: Mapping[str, int]) -> list[dict[str, object]]:
    """Every operator of a net with its time, the slowest first."""
    times = cost.times(widths)
    total = sum(times) or 1.0
    facts = [
        {
            "layer": operator.name,
            "operator": operator.signature,
            "widths": list(operator.widths(widths)),
            "ms": ms,
            "share": ms / total,
        }
        for operator, ms in zip(cost.operators, times, strict=True)
    ]
    return [facts[index] for index in sorted(range(len(facts)), key=lambda index: -times[index])]
