"""Watched trainings that never ran: Runs with units tables as documented, and numbers chosen by the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchnorm.runs.history import MEASURED
from batchnorm.runs.run import Run

EPS = 1e-5
WIDE = ("count", "energy", "diverted")
PROVENANCE = {
    "versions": {"batchnorm": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
    "machine": {"system": "Linux x86_64", "processor": "x86_64", "cores": 2},
}
Change = Callable[[dict[str, np.ndarray], np.ndarray], None]


@dataclass
class Made:
    """A layer: `undo` is how far gamma and beta have gone to the identity at the end (1: undone, 0: bare).

    `change(columns, steps)` may alter the columns (snapshots, units) in place.
    """

    name: str
    units: int = 16
    undo: float = 0.0
    wander: float = 0.2
    m: float = 4096.0
    facts: dict[str, Any] = field(default_factory=dict)
    change: Change | None = None

    def described(self) -> dict[str, Any]:
        facts = {"name": self.name, "aliases": [], "class": "BatchNorm2d", "units": self.units, "eps": EPS}
        return facts | {"momentum": 0.1, "affine": True, "act": None, "ours": True, "producer": None} | self.facts


def log_spaced(last: int, points: int = 40) -> np.ndarray:
    return np.unique(np.concatenate([[0], np.geomspace(1, last, points).round()])).astype(np.int64)


def watched(
    folder: Path,
    layers: Sequence[Made],
    *,
    steps: np.ndarray | None = None,
    status: str = "complete",
    parts: int = 2,
    logged: dict[str, np.ndarray] | None = None,
    seed: int = 0,
    **info: Any,
) -> Run:
    """The Run: a units table in `parts` parts, and a log of `logged` values a recorded step."""
    steps = log_spaced(5000) if steps is None else np.asarray(steps, np.int64)
    listed = [layer.described() for layer in layers]
    result = {"model": "Net", "schedule": "log_spaced()", "counted": "optimizer", "processes": 1, "skipped": []}
    run = Run.create(folder, "watch", **{**result, **PROVENANCE, "layers": listed, **info})
    rng = np.random.default_rng(seed)
    columns = [columns_of(rng, layer, steps) for layer in layers]
    for rows in np.array_split(np.arange(len(steps)), parts):
        if len(rows) and layers:
            run.append("units", units_table(layers, steps[rows], [{n: c[n][rows] for n in MEASURED} for c in columns]))
    for name, values in (logged or {}).items():
        run.append("log", log_table(name, steps, values))
    if status != "running":
        run.note(steps=int(steps[-1]) + 1 if len(steps) else 0, seconds=12.5)
        run.finish(status)
    return run


def columns_of(rng: np.random.Generator, layer: Made, steps: np.ndarray) -> dict[str, np.ndarray]:
    """Every measured column (snapshots, units) of a layer whose input grows to s about 2 with a mean about 1."""
    times, units = len(steps), layer.units
    shape = (times, units)
    done = (np.log1p(steps) / np.log1p(max(steps[-1], 1)))[:, None] if times else np.zeros((0, 1))
    sampling = 1 / np.sqrt(layer.m)
    s = np.exp(rng.normal(0.7, 0.15, units)) * np.exp(sampling / 2 * rng.standard_normal(shape))
    mean = rng.normal(1.0, 0.4, units) + s * sampling * rng.standard_normal(shape)
    off = layer.wander * done * rng.normal(0, 1, (2, 1, units))
    gamma = 1 + layer.undo * done * (s.mean(axis=0, keepdims=True) - 1 if times else 0) + (1 - layer.undo) * off[0]
    beta = layer.undo * done * (mean.mean(axis=0, keepdims=True) if times else 0) + (1 - layer.undo) * off[1]
    energy = np.exp(rng.normal(-9, 0.5, shape))
    columns = {
        "count": np.full(shape, layer.m), "batches": np.ones(shape), "mean": mean, "var": s**2 - EPS,
        "gamma": np.broadcast_to(gamma, shape).copy(), "beta": np.broadcast_to(beta, shape).copy(),
        "running_mean": mean + s * 0.01, "running_var": (s * 1.005) ** 2,
        "dgamma": rng.normal(0, 1e-3, shape), "dbeta": rng.normal(0, 1e-3, shape),
        "energy": energy, "diverted": energy * rng.uniform(0.02, 0.1, shape),
        "noise_mean": np.full(shape, np.nan), "noise_log_scale": np.full(shape, np.nan),
        "weight_norm": np.full(shape, 2.0), "lr": np.full(shape, 0.1),
    }  # fmt: skip
    if layer.change is not None:
        layer.change(columns, steps)
    return columns


def units_table(layers: Sequence[Made], steps: np.ndarray, columns: Sequence[dict[str, np.ndarray]]) -> pa.Table:
    """As the recorder writes it: float32, `layer` a dictionary column, snapshot by snapshot."""
    codes = np.repeat(np.arange(len(layers), dtype=np.int32), [layer.units for layer in layers])
    unit = np.concatenate([np.arange(layer.units, dtype=np.int32) for layer in layers])
    names = pa.array([layer.name for layer in layers])
    table: dict[str, Any] = {
        "step": np.repeat(steps, len(codes)),
        "layer": pa.DictionaryArray.from_arrays(pa.array(np.tile(codes, len(steps))), names),
        "unit": np.tile(unit, len(steps)),
    }
    for name in MEASURED:
        joined = np.concatenate([each[name] for each in columns], axis=1).ravel()
        table[name] = joined.astype(np.float64 if name in WIDE else np.float32)
    return pa.table(table)


def log_table(name: str, steps: np.ndarray, values: np.ndarray) -> pa.Table:
    return pa.table({
        "step": steps,
        "name": pa.array([name] * len(steps)).dictionary_encode(),
        "value": np.asarray(values, np.float64),
    })  # fmt: skip
