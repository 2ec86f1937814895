"""Read a watched training run: per layer, arrays (snapshots, units) of measured columns and derived quantities.

Columns are read at first use, since a long run of a large network has millions of rows. Parts of several processes are
merged exactly: means and variances by their counts (`Moments`), gradient sums by addition. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchnorm import quantities as q
from batchnorm.moments import Moments
from batchnorm.runs.run import Run, RunError

Array = NDArray[np.float64]

KIND = "watch"
UNITS = "units"

# The measured columns of the table `units`, besides its keys step, layer and unit; and how processes are merged.
MEASURED = {
    "count": "sum",
    "batches": "sum",
    "mean": "moments",
    "var": "moments",
    "gamma": "first",
    "beta": "first",
    "running_mean": "first",
    "running_var": "first",
    "dgamma": "sum",
    "dbeta": "sum",
    "energy": "sum",
    "diverted": "sum",
    "noise_mean": "noise",
    "noise_log_scale": "noise",
    "weight_norm": "first",
    "lr": "first",
}


@dataclass(frozen=True)
class Layer:
    """A watched layer's history: `steps` (S,) are the recorded ones; every array is (S, units), NaN where unknown.

    `end` is the last step of the training, known once the recording was closed. If the schedule skipped it, its row has
    no batch: quantities of the input's distribution then use the running statistics, as inference does.
    """

    name: str
    facts: Mapping[str, Any]
    steps: NDArray[np.int64]
    _column: Callable[[str], Array] = field(repr=False)
    end: int | None = None

    @property
    def units(self) -> int:
        return int(self.facts["units"])

    def __getitem__(self, name: str) -> Array:
        """A measured column, or a quantity computed from measured columns, by its name in `MEASURED` or `DERIVED`."""
        return DERIVED[name](self) if name in DERIVED else self._column(name)

    @property
    def eps(self) -> float:
        return float(self.facts["eps"])


def _input(layer: Layer) -> tuple[Array, Array]:
    """mean and var of the batch; the running ones in a last step without a batch."""
    mean, var = layer["mean"], layer["var"]
    if layer.end is None:
        return mean, var
    no_batch = (layer.steps == layer.end)[:, None] & np.isnan(mean)
    return np.where(no_batch, layer["running_mean"], mean), np.where(no_batch, layer["running_var"], var)


def _of_distribution(function: Callable[..., Array]) -> Callable[[Layer], Array]:
    return lambda layer: function(*_input(layer), layer.eps, layer["gamma"], layer["beta"])


def _of_input(function: Callable[..., Array]) -> Callable[[Layer], Array]:
    return lambda layer: function(*_input(layer), layer.eps)


def _gradient_diverted(layer: Layer) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(layer["energy"] > 0, layer["diverted"] / layer["energy"], np.nan)


def _silent(layer: Layer) -> NDArray[np.bool_]:
    """Units whose ReLU or ReLU6 outputs only zeros in the step's batches, detected by their gradients.

    No gradient arrives at such a unit, while one arrives at other units of the layer. If the activation is not fused
    (`act` is None), only a ReLU can make a gradient exactly 0 over a whole batch. A last step recorded without a
    gradient repeats the flags of the last step that has one.
    """
    energy = layer["energy"]
    if layer.facts.get("act") not in (None, "relu", "relu6"):
        return np.zeros(energy.shape, bool)
    silent: NDArray[np.bool_] = (energy == 0) & (np.nansum(energy, axis=1, keepdims=True) > 0)
    with_gradient = np.flatnonzero(np.isfinite(energy).any(axis=1))
    if layer.end is not None and len(with_gradient):
        silent[(layer.steps == layer.end) & np.isnan(energy).all(axis=1)] = silent[with_gradient[-1]]
    return silent


def _drift(side: str, part: str) -> Callable[[Layer], Array]:
    """Drift per step since the previous snapshot, NaN in the first; `in` includes the noise of two batches."""

    def compute(layer: Layer) -> Array:
        if side == "in":
            location, deviation = layer["mean"], q.scale(layer["var"], layer.eps)
        else:
            location, deviation = layer["beta"], layer["gamma"]
        drift = q.drift(location[:-1], deviation[:-1], location[1:], deviation[1:])
        result = np.full(location.shape, np.nan)
        result[1:] = getattr(drift, part) / np.diff(layer.steps)[:, None]
        return result

    return compute


DERIVED: Mapping[str, Callable[[Layer], Array]] = {
    "input_mean": lambda layer: _input(layer)[0],
    "s": _of_input(lambda mean, var, eps: q.scale(var, eps)),
    "undo_distance": _of_distribution(q.undo_distance),
    "undo_index": _of_distribution(q.undo_index),
    "class": lambda layer: q.unit_class(*_input(layer), layer.eps, layer["gamma"], layer["beta"], _silent(layer)),
    "undo_angle": _of_distribution(q.undo_angle),
    "bare_angle": _of_input(q.bare_angle),
    "position_in": _of_input(q.position_in),
    "position_out": lambda layer: q.position_out(layer["gamma"], layer["beta"]),
    "gradient_diverted": _gradient_diverted,
    "eval_gap": lambda layer: q.eval_gap(
        layer["mean"], layer["var"], layer["running_mean"], layer["running_var"], layer.eps
    ),
    "effective_lr": lambda layer: q.effective_lr(layer["lr"], layer["weight_norm"]),
    "drift_in_location": _drift("in", "location"),
    "drift_in_log_scale": _drift("in", "log_scale"),
    "drift_out_location": _drift("out", "location"),
    "drift_out_log_scale": _drift("out", "log_scale"),
    # Dead by the deviation of y alone: y is close to beta for every input.
    "flat": lambda layer: q.dead(_input(layer)[1], layer.eps, layer["gamma"]),
    "dead": lambda layer: q.dead(_input(layer)[1], layer.eps, layer["gamma"], _silent(layer)),
}


class History:
    """Reads a Run of kind 'watch'."""

    def __init__(self, run: Run) -> None:
        if run.info.get("kind") != KIND:
            raise RunError(f"{run.path} is a Run of kind {run.info.get('kind')!r}, not a watched training")
        self.run = run
        self._columns: dict[str, Array] = {}

    @classmethod
    def read(cls, run: Run) -> Self:
        """Read a watched Run, which may have no snapshot yet. Raises RunError if a part is damaged."""
        history = cls(run)
        _ = history.steps
        return history

    @cached_property
    def facts(self) -> list[dict[str, Any]]:
        """The layers' entries in run.json: name, units, eps and more. Raises RunError if one is damaged."""
        entries = self.run.info.get("layers")
        facts = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        for entry in facts:
            kinds = type(entry.get("name")), type(entry.get("units")), type(entry.get("eps"))
            if kinds not in ((str, int, float), (str, int, int)):
                raise RunError(f"{self.run.path / 'run.json'} lists a layer without name, units or eps")
        return facts

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers in the model's order."""
        steps = self.run.info.get("steps")
        end = steps - 1 if type(steps) is int else None
        layers, first = [], 0
        for entry in self.facts:
            last = first + entry["units"]
            layers.append(Layer(entry["name"], entry, self.steps, partial(self._columns_of, first, last), end))
            first = last
        return layers

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """The steps recorded by any process."""
        return np.unique(np.concatenate([np.zeros(0, np.int64), *self._per_rank.values()]))

    @cached_property
    def _width(self) -> int:
        return sum(entry["units"] for entry in self.facts)

    @cached_property
    def _ranks(self) -> list[int]:
        return self.run.ranks(UNITS)

    @cached_property
    def _per_rank(self) -> dict[int, NDArray[np.int64]]:
        """The steps of each process in the order in which they were written."""
        steps_of = {}
        for rank in self._ranks:
            steps = self._read("step", rank)
            if (steps != steps[:, :1]).any():
                raise self._damaged()
            steps_of[rank] = steps[:, 0].astype(np.int64)
        return steps_of

    def _damaged(self) -> RunError:
        return RunError(f"the table {UNITS!r} in {self.run.path} has incomplete snapshots: it is damaged")

    def _read(self, column: str, rank: int) -> Array:
        table = self.run.table(UNITS, rank, [column])
        if column not in table.column_names:
            return np.full((self._per_rank[rank].size, max(self._width, 1)), np.nan)
        values = table[column].combine_chunks().to_numpy(zero_copy_only=False)
        if self._width == 0 or len(values) % self._width:
            raise self._damaged()
        grid: Array = values.reshape(-1, self._width)
        return grid

    def _columns_of(self, first: int, last: int, column: str) -> Array:
        """A column (snapshots, units `first` to `last`), merged over the processes."""
        if column not in MEASURED:
            raise KeyError(f"{column!r} is neither measured ({', '.join(MEASURED)}) nor derived ({', '.join(DERIVED)})")
        if column not in self._columns:
            if not self._ranks:
                self._columns[column] = np.zeros((0, self._width))
            elif len(self._ranks) == 1:
                self._columns[column] = self._by_step(column, self._ranks[0])
            elif MEASURED[column] == "moments":
                self._columns |= self._merge_moments()
            elif MEASURED[column] == "noise":
                self._columns |= self._merge_noise()
            else:
                grid = self._aligned(column)
                total, known = _sum_known(grid)
                first_known = np.take_along_axis(grid, (~np.isnan(grid)).argmax(axis=0)[None], axis=0)[0]
                self._columns[column] = np.where(known > 0, total, np.nan) if MEASURED[column] == "sum" else first_known
        return self._columns[column][:, first:last].astype(np.float64)

    def _by_step(self, column: str, rank: int) -> Array:
        """A process's column in the order of its steps; if a step was recorded twice, the later row."""
        steps = self._per_rank[rank]
        last_rows = len(steps) - 1 - np.unique(steps[::-1], return_index=True)[1]
        values = self._read(column, rank)
        return values if (np.diff(steps) > 0).all() else values[last_rows]

    def _aligned(self, column: str) -> Array:
        """A column (processes, snapshots, all units): NaN where a process did not record the step."""
        grid = np.full((len(self._ranks), len(self.steps), self._width), np.nan)
        for row, rank in enumerate(self._ranks):
            at = np.searchsorted(self.steps, np.unique(self._per_rank[rank]))
            grid[row, at] = self._by_step(column, rank)
        return grid

    def _merge_moments(self) -> dict[str, Array]:
        count, mean, var = (self._aligned(name) for name in ("count", "mean", "var"))
        count = np.where(np.isnan(count) | np.isnan(mean), 0, count)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts = [Moments.of_variance(n, m, v) for n, m, v in zip(count, mean, var, strict=True)]
            pooled = parts[0].merge(*parts[1:])
            unknown = pooled.count == 0
            return {"mean": np.where(unknown, np.nan, pooled.mean), "var": np.where(unknown, np.nan, pooled.var)}

    def _merge_noise(self) -> dict[str, Array]:
        """The noise between the processes' batches if each had one in the step, else the mean of theirs."""
        eps = np.repeat([float(entry["eps"]) for entry in self.facts], [entry["units"] for entry in self.facts])
        noise = q.batch_noise(self._aligned("mean"), self._aligned("var"), eps)
        single = (self._aligned("batches") == 1).all(axis=0)
        merged = {}
        for name, between in zip(("noise_mean", "noise_log_scale"), noise, strict=True):
            total, known = _sum_known(self._aligned(name))
            merged[name] = np.where(single, between, total / np.where(known > 0, known, np.nan))
        return merged


def _sum_known(grid: Array) -> tuple[Array, Array]:
    """The sum over processes and its number of terms, without NaN."""
    known = ~np.isnan(grid)
    return np.where(known, grid, 0).sum(axis=0), known.sum(axis=0)


def frame(run: Run) -> pa.Table:
    """The table of `Run.to_polars()` for a watched training: a row per step, layer and unit. Raises RunError."""
    tables = []
    for layer in History.read(run).layers:
        shape = (len(layer.steps), layer.units)
        index = pa.array(np.zeros(shape[0] * shape[1], np.int32))
        columns: dict[str, Any] = {
            "step": np.repeat(layer.steps, layer.units),
            "layer": pa.DictionaryArray.from_arrays(index, [layer.name.encode("utf-8", "replace").decode()]),
            "unit": np.tile(np.arange(layer.units, dtype=np.int32), shape[0]),
        }
        columns |= {name: np.broadcast_to(layer[name], shape).ravel() for name in (*MEASURED, *DERIVED)}
        columns["class"] = pa.DictionaryArray.from_arrays(pa.array(columns["class"].astype(np.int8)), q.CLASSES)
        tables.append(pa.table(columns))
    if not tables:
        raise RunError(f"the Run {run.path} watched no layer")
    return pa.concat_tables(tables).unify_dictionaries()
