"""The study: train the paper's network in four arms and measure them at log-spaced steps.

The arms of a seed share weights and batches and train in lockstep, so an interrupted study compares equal steps. A
measured step runs with taps on the layers; it equals an unmeasured one up to rounding. Tables and their keys:

    curves   seed, arm, step: loss and accuracy on held-out data, in inference mode
    units    seed, arm, step, layer, unit: every quantity of `batchnorm.quantities`, and percentiles
    start    seed, mode, batch: the difference between the logits of `undone` and `none` at step 0
    parting  seed, step: their difference later, on held-out data in inference mode
    optimal  seed, step, unit: the task where undoing is optimal
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm.kernels.contract import Tap
from batchnorm.runs.run import Run
from batchnorm.study import measure, networks
from batchnorm.study.data import Data
from batchnorm.study.networks import ARMS, EPS, HIDDEN, build, sgd_step

SECONDS_BETWEEN_PARTS = 20.0
_TYPES = {"seed": pa.int32(), "step": pa.int64(), "unit": pa.int32(), "batch": pa.int32()}


class Rows:
    """Buffers rows; a killed process loses those of the last SECONDS_BETWEEN_PARTS at most."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._blocks: dict[str, list[pa.Table]] = defaultdict(list)
        self._written = time.monotonic()

    def add(self, table: str, key: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        """Add rows. Arrays in `key` and `columns` have a value per row; single values are repeated."""
        values = np.broadcast_arrays(np.zeros(1), *key.values(), *columns.values())[1:]
        arrays = {}
        for name, value in zip((*key, *columns), values, strict=True):
            if value.dtype.kind == "U":
                arrays[name] = pa.array(value.tolist()).dictionary_encode()
            else:
                arrays[name] = pa.array(value, pa.float64() if name in columns else _TYPES[name])
        self._blocks[table].append(pa.table(arrays))

    def flush_if_due(self) -> None:
        """Write the rows if the last part is old enough."""
        if time.monotonic() - self._written > SECONDS_BETWEEN_PARTS:
            self.flush()

    def flush(self) -> None:
        """Write all rows, one part per table."""
        for table, blocks in self._blocks.items():
            self.run.append(table, pa.concat_tables(blocks, promote_options="default").combine_chunks())
        self._blocks.clear()
        self._written = time.monotonic()


PROBE_ROWS = 1000
NOISE_BATCHES = 16
START_BATCHES = 50
TASK_STEPS = 2000
SNAPSHOT_COST = 60
"""The cost of measuring all arms once, in training steps of all arms; used to estimate the time left."""


@dataclass(frozen=True)
class Config:
    """Settings of a study. lr is SGD's rate, batch the number of rows per step, seeds N means 0 … N-1."""

    act: str = "sigmoid"
    seeds: int = 3
    steps: int = 5000
    lr: float = 0.1
    batch: int = 60


def log_spaced(steps: int, count: int = 45) -> list[int]:
    """0, 1, 2, 3, … `steps`: about `count` steps, evenly spaced on a logarithmic scale."""
    spaced = np.geomspace(1, max(steps, 1), count).round().astype(int)
    return sorted({0, steps, *(int(step) for step in spaced if step <= steps)})


def work(config: Config) -> int:
    """The study's length in training steps of all arms; a measurement counts as SNAPSHOT_COST."""
    return config.seeds * (config.steps + len(log_spaced(config.steps)) * SNAPSHOT_COST)


def describe(config: Config, data: Data) -> dict[str, Any]:
    """The configuration in run.json."""
    return {
        "data": data.name,
        "train": len(data.train_x),
        "test": len(data.test_x),
        "inputs": data.inputs,
        "classes": data.classes,
        **asdict(config),
        "seeds": list(range(config.seeds)),
        "probe": min(PROBE_ROWS, len(data.train_x)),
        "hidden": list(HIDDEN),
        "eps": EPS,
        "momentum": 0.1,
        "arms": list(ARMS),
    }


def study(config: Config, data: Data, run: Run, advance: Callable[[int], None] = lambda _: None) -> None:
    """Train, measure and write everything into `run`; `advance` is called with the work done, in units of `work`.

    An arm whose loss is not finite is noted in run.json under "diverged" and stops; the others go on. If an exception
    is raised, such as KeyboardInterrupt, all rows measured so far are written.
    """
    rows = Rows(run)
    try:
        for seed in range(config.seeds):
            _Seed(config, data, run, rows, seed).train(advance)
    finally:
        rows.flush()


class _Seed:
    """One seed's four arms, and the task where undoing is optimal."""

    def __init__(self, config: Config, data: Data, run: Run, rows: Rows, seed: int) -> None:
        self.config, self.run, self.rows, self.seed = config, run, rows, seed
        self.x, self.y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
        self.test_x, self.test_y = torch.from_numpy(data.test_x), torch.from_numpy(data.test_y)
        self.probe = self.x[next(batches(len(self.x), min(PROBE_ROWS, len(self.x)), (seed, 1)))]
        self.noise_batches = self._take_batches(NOISE_BATCHES, 2)
        self.networks = {name: build(name, data.inputs, data.classes, config.act, seed, self.x) for name in ARMS}

    def train(self, advance: Callable[[int], None]) -> None:
        self._start()
        self._task()
        snapshots = set(log_spaced(self.config.steps))
        order = batches(len(self.x), self.config.batch, (self.seed, 0))
        for step in range(self.config.steps + 1):
            chosen = next(order)
            x, y = self.x[chosen], self.y[chosen]
            if step in snapshots:
                self._measured_step(step, x, y)
                advance(SNAPSHOT_COST)
            elif step < self.config.steps:
                for arm in list(self.networks):
                    self._step(arm, step, x, y)
            if step < self.config.steps:
                advance(1)

    def _step(self, arm: str, step: int, x: Tensor, y: Tensor) -> bool:
        """One step of SGD, w ← w - lr·∂loss/∂w; if the loss is not finite, drop the arm and return False."""
        network = self.networks[arm]
        loss = F.cross_entropy(network(x), y)
        if not math.isfinite(loss.item()):
            del self.networks[arm]
            self.run.note(diverged=[*self.run.info.get("diverged", []), self._key(arm, step)])
            return False
        sgd_step(list(network.parameters()), loss, self.config.lr)
        return True

    def _measured_step(self, step: int, x: Tensor, y: Tensor) -> None:
        """Measure every arm and take its step, whose gradient and drift are measured as well."""
        logits = {}
        for arm in list(self.networks):
            loss, accuracy, logits[arm] = measure.score(self.networks[arm], self.test_x, self.test_y)
            self.rows.add("curves", self._key(arm, step), {"loss": loss, "accuracy": accuracy})
            self._measure_units(arm, step, x, y)
        if "none" in logits and "undone" in logits:
            self.rows.add("parting", {"seed": self.seed, "step": step}, difference(logits["undone"], logits["none"]))
        self.rows.flush_if_due()

    def _measure_units(self, arm: str, step: int, x: Tensor, y: Tensor) -> None:
        network = self.networks[arm]
        states, noises = measure.states(network, self.probe), measure.noise(network, self.noise_batches)
        columns = [measure.state_columns(*layer, self.config.act) for layer in zip(states, noises, strict=True)]
        taps = [Tap() for _ in network.batch_norms()]
        for norm, tap in zip(network.batch_norms(), taps, strict=True):
            norm._tap = tap
        try:
            is_finite = self._step(arm, step, x, y)
        finally:
            for norm in network.batch_norms():
                norm._tap = None
        if is_finite:
            for layer, old, new in zip(columns, states, measure.states(network, self.probe), strict=True):
                layer |= measure.drift_columns(old, new)
            for layer, tap in zip(columns, taps, strict=bool(taps)):
                layer |= measure.step_columns(tap)
        for number, layer in enumerate(columns, start=1):
            key = {**self._key(arm, step), "layer": f"hidden{number}", "unit": np.arange(len(layer["mean"]))}
            self.rows.add("units", key, layer)

    @torch.no_grad()
    def _start(self) -> None:
        """Compare `undone` with `none` before the first step: in inference mode, and per batch in training mode."""
        none, undone = self.networks["none"], self.networks["undone"]
        inference = difference(measure.score(undone, self.test_x, self.test_y).logits, none(self.test_x))
        self.rows.add("start", {"seed": self.seed, "mode": "inference", "batch": 0}, inference)
        for number, rows in enumerate(self._take_batches(START_BATCHES, 0)):
            training = difference(undone.hidden(rows)[1], none(rows))
            self.rows.add("start", {"seed": self.seed, "mode": "training", "batch": number}, training)

    def _task(self) -> None:
        """The task where undoing is optimal, on the first layer's input in this seed's network."""
        with torch.no_grad():
            x = self.networks["none"].linears[0](self.x)
        steps = min(TASK_STEPS, self.config.steps)
        order = batches(len(x), self.config.batch, (self.seed, 3))
        for step, columns in networks.train_identity(x, order, steps, set(log_spaced(steps))):
            self.rows.add("optimal", {"seed": self.seed, "step": step, "unit": np.arange(x.shape[1])}, columns)

    def _take_batches(self, count: int, stream: int) -> Sequence[Tensor]:
        """The first batches of a stream, at most one pass over the data."""
        count = min(count, max(len(self.x) // self.config.batch, 1))
        return [self.x[i] for i in islice(batches(len(self.x), self.config.batch, (self.seed, stream)), count)]

    def _key(self, arm: str, step: int) -> dict[str, Any]:
        return {"seed": self.seed, "arm": arm, "step": step}


def batches(rows: int, size: int, seed: tuple[int, ...]) -> Iterator[Tensor]:
    """Shuffled row numbers, pass after pass, in batches of `size` without the incomplete ones. Raises ValueError."""
    if not 2 <= size <= rows:
        raise ValueError(f"the batch size must be between 2 and the number of rows, {rows}, got {size}")
    random = np.random.default_rng(seed)
    while True:
        order = torch.from_numpy(random.permutation(rows))
        yield from order[: rows // size * size].view(-1, size)


def difference(logits: Tensor, reference: Tensor) -> dict[str, float]:
    """RMS and maximum of the difference of two arms' logits, and `logit_std`, the reference's deviation over rows."""
    delta = (logits - reference).double()
    return {
        "rms": float(delta.square().mean().sqrt()),
        "max": float(delta.abs().max()),
        "logit_std": float(reference.double().var(0, correction=0).mean().sqrt()),
    }
