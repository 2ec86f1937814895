"""The study: the paper's network trained in four arms that share everything they can, measured at log-spaced steps.

All arms of a seed go step by step together, on the same batches, so that whatever was measured when the study is
interrupted compares like with like. A measured step runs through the kernel that hands out its sums, the others through
PyTorch's operators: the same step up to rounding. Tables written, one row for each unit where a unit is named:

    curves   seed, arm, step: loss and accuracy on held-out data, in inference mode
    units    seed, arm, step, layer, unit: every quantity of `batchnorm.quantities`, and percentiles
    start    seed, mode, batch: how far the logits of `undone` and `none` are apart at step 0
    parting  seed, step: how far they are apart later, on held-out data in inference mode
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
    """Collects blocks of rows; a killed process loses at most the last SECONDS_BETWEEN_PARTS of them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._blocks: dict[str, list[pa.Table]] = defaultdict(list)
        self._written = time.monotonic()

    def add(self, table: str, key: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        """A block of rows: single values of `key` and `columns` stand for all rows, arrays give one value a row."""
        values = np.broadcast_arrays(np.zeros(1), *key.values(), *columns.values())[1:]
        arrays = {}
        for name, value in zip((*key, *columns), values, strict=True):
            if value.dtype.kind == "U":
                arrays[name] = pa.array(value.tolist()).dictionary_encode()
            else:
                arrays[name] = pa.array(value, pa.float64() if name in columns else _TYPES[name])
        self._blocks[table].append(pa.table(arrays))

    def flush_now_and_then(self) -> None:
        """Write what has gathered if the last part is old enough."""
        if time.monotonic() - self._written > SECONDS_BETWEEN_PARTS:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered, one part a table."""
        for table, blocks in self._blocks.items():
            self.run.append(table, pa.concat_tables(blocks, promote_options="default").combine_chunks())
        self._blocks.clear()
        self._written = time.monotonic()


PROBE_ROWS = 1000
NOISE_BATCHES = 16
START_BATCHES = 50
TASK_STEPS = 2000
SNAPSHOT_COST = 60
"""What measuring all arms once costs, in training steps of all arms: for the estimate of the time left."""


@dataclass(frozen=True)
class Config:
    """What to run. lr is SGD's rate, batch the number of rows a step, seeds the numbers 0 … N-1."""

    act: str = "sigmoid"
    seeds: int = 3
    steps: int = 5000
    lr: float = 0.1
    batch: int = 60


def log_spaced(steps: int, count: int = 45) -> list[int]:
    """0, 1, 2, 3, … `steps`: about `count` steps, evenly spread in their logarithm."""
    spread = np.geomspace(1, max(steps, 1), count).round().astype(int)
    return sorted({0, steps, *(int(step) for step in spread if step <= steps)})


def work(config: Config) -> int:
    """The study's length in training steps of all arms, a measurement counting as SNAPSHOT_COST."""
    return config.seeds * (config.steps + len(log_spaced(config.steps)) * SNAPSHOT_COST)


def describe(config: Config, data: Data) -> dict[str, Any]:
    """The configuration as run.json keeps it."""
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
    """Train and measure everything into `run`; `advance` is told of work done, in the units of `work`.

    An arm whose loss is no longer finite is noted in run.json under "diverged" and leaves; the others go on. An
    exception, KeyboardInterrupt among them, leaves everything measured until then in the Run.
    """
    rows = Rows(run)
    try:
        for seed in range(config.seeds):
            _Seed(config, data, run, rows, seed).train(advance)
    finally:
        rows.flush()


class _Seed:
    """One seed's four arms and the task beside them."""

    def __init__(self, config: Config, data: Data, run: Run, rows: Rows, seed: int) -> None:
        self.config, self.run, self.rows, self.seed = config, run, rows, seed
        self.x, self.y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
        self.test_x, self.test_y = torch.from_numpy(data.test_x), torch.from_numpy(data.test_y)
        self.probe = self.x[next(batches(len(self.x), min(PROBE_ROWS, len(self.x)), (seed, 1)))]
        self.noise_batches = self._some_batches(NOISE_BATCHES, 2)
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
        """One step of SGD, w ← w - lr·∂loss/∂w; False where the loss is not finite, and then the arm is out."""
        network = self.networks[arm]
        loss = F.cross_entropy(network(x), y)
        if not math.isfinite(loss.item()):
            del self.networks[arm]
            self.run.note(diverged=[*self.run.info.get("diverged", []), self._key(arm, step)])
            return False
        sgd_step(list(network.parameters()), loss, self.config.lr)
        return True

    def _measured_step(self, step: int, x: Tensor, y: Tensor) -> None:
        """Measure every arm, then take the step that its gradient and its drift are of."""
        logits = {}
        for arm in list(self.networks):
            loss, accuracy, logits[arm] = measure.score(self.networks[arm], self.test_x, self.test_y)
            self.rows.add("curves", self._key(arm, step), {"loss": loss, "accuracy": accuracy})
            self._measure_units(arm, step, x, y)
        if "none" in logits and "undone" in logits:
            self.rows.add("parting", {"seed": self.seed, "step": step}, apart(logits["undone"], logits["none"]))
        self.rows.flush_now_and_then()

    def _measure_units(self, arm: str, step: int, x: Tensor, y: Tensor) -> None:
        network = self.networks[arm]
        before, noises = measure.states(network, self.probe), measure.noise(network, self.noise_batches)
        columns = [measure.state_columns(*layer, self.config.act) for layer in zip(before, noises, strict=True)]
        taps = [Tap() for _ in network.batch_norms()]
        for norm, tap in zip(network.batch_norms(), taps, strict=True):
            norm._tap = tap
        try:
            finite = self._step(arm, step, x, y)
        finally:
            for norm in network.batch_norms():
                norm._tap = None
        if finite:
            for found, old, new in zip(columns, before, measure.states(network, self.probe), strict=True):
                found |= measure.drift_columns(old, new)
            for found, tap in zip(columns, taps, strict=bool(taps)):
                found |= measure.step_columns(tap)
        for number, found in enumerate(columns, start=1):
            key = {**self._key(arm, step), "layer": f"hidden{number}", "unit": np.arange(len(found["mean"]))}
            self.rows.add("units", key, found)

    @torch.no_grad()
    def _start(self) -> None:
        """How far `undone` is from `none` before the first step: in inference mode, and batch by batch in training."""
        none, undone = self.networks["none"], self.networks["undone"]
        whole = apart(measure.score(undone, self.test_x, self.test_y).logits, none(self.test_x))
        self.rows.add("start", {"seed": self.seed, "mode": "inference", "batch": 0}, whole)
        for number, rows in enumerate(self._some_batches(START_BATCHES, 0)):
            difference = apart(undone.look(rows)[1], none(rows))
            self.rows.add("start", {"seed": self.seed, "mode": "training", "batch": number}, difference)

    def _task(self) -> None:
        """The task where undoing is optimal, on the first layer's input in this seed's network."""
        with torch.no_grad():
            x = self.networks["none"].linears[0](self.x)
        steps = min(TASK_STEPS, self.config.steps)
        order = batches(len(x), self.config.batch, (self.seed, 3))
        for step, columns in networks.train(x, order, steps, set(log_spaced(steps))):
            self.rows.add("optimal", {"seed": self.seed, "step": step, "unit": np.arange(x.shape[1])}, columns)

    def _some_batches(self, count: int, stream: int) -> Sequence[Tensor]:
        """The first batches of a stream, at most one pass over the data."""
        count = min(count, max(len(self.x) // self.config.batch, 1))
        return [self.x[i] for i in islice(batches(len(self.x), self.config.batch, (self.seed, stream)), count)]

    def _key(self, arm: str, step: int) -> dict[str, Any]:
        return {"seed": self.seed, "arm": arm, "step": step}


def batches(rows: int, size: int, seed: tuple[int, ...]) -> Iterator[Tensor]:
    """Row numbers in batches of `size`, shuffled anew for each pass; what is left over at a pass's end is dropped."""
    if not 2 <= size <= rows:
        raise ValueError(f"the batch size must be between 2 and the {rows} rows there are, got {size}")
    random = np.random.default_rng(seed)
    while True:
        order = torch.from_numpy(random.permutation(rows))
        yield from order[: rows // size * size].view(-1, size)


def apart(logits: Tensor, reference: Tensor) -> dict[str, float]:
    """RMS and largest difference of two arms' logits; and `logit_std`, the reference's own deviation over rows."""
    difference = (logits - reference).double()
    return {
        "rms": float(difference.square().mean().sqrt()),
        "max": float(difference.abs().max()),
        "logit_std": float(reference.double().var(0, correction=0).mean().sqrt()),
    }
