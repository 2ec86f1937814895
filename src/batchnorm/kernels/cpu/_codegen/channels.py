"""The work per channel between reducing and applying, in float64: merge partial sums, update averages, make constants.

A channel has one cell or several: one per channel where the loops run along slices, one per column where they run along
rows. Each cell has partial sums in every part, and constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from batchnorm.kernels.cpu._codegen.builder import Array, Code
from batchnorm.kernels.cpu._codegen.reductions import DX_SHIFT, DX_SLOPE, MEAN, SCALE, SHIFT, Tensors
from batchnorm.kernels.cpu._codegen.values import F64, Value
from batchnorm.kernels.cpu.plan import FLOAT64


class Group(NamedTuple):
    """Channels that are computed together: a vector of them if each has one cell, else one."""

    first: Value
    lanes: int
    mask: Value | None

    def load(self, array: Array, start: Value | None = None) -> Value:
        """The group's values of an array whose first channel is at `start`."""
        return array.load(self.first if start is None else start + self.first, self.lanes, self.mask)

    def store(self, array: Array, value: Value, start: Value | None = None) -> None:
        array.store(self.first if start is None else start + self.first, value, self.mask)


class Channels:
    """The per-channel code of a job; `kind` is the type of its vectors (gamma, beta, running statistics)."""

    def __init__(self, code: Code, t: Tensors, kind: int) -> None:
        self.code, self.t, self.kind = code, t, kind
        self.channels, self.fold = code.field("channels"), code.field("fold")
        self.cell_span, self.weight = code.field("cell_span"), code.field("weight")
        self.mean, self.rstd = code.array("mean", FLOAT64), code.array("rstd", FLOAT64)
        self.gamma, self.beta = code.array("gamma", kind), code.array("beta", kind)
        self.sums = code.array("sums", FLOAT64)

    def each(self, first_channel: Value, end_channel: Value, *bodies: Callable[[Group], None]) -> None:
        """Call the bodies for all groups of these channels."""

        def vector(channel: Value, _: int, mask: Value | None) -> None:
            for body in bodies:
                body(Group(channel, self.t.lanes, mask))

        with self.code.when_else((self.fold * self.cell_span).equals(1)) as (one_cell, several):
            with one_cell:
                self.code.vectors(first_channel, end_channel, self.t.lanes, vector)
            with several, self.code.loop(first_channel, end_channel) as channel:
                for body in bodies:
                    body(Group(channel, 1, None))

    def _scalar(self, value: Value, group: Group) -> Value:
        """A number for every channel of the group."""
        return value if group.lanes == 1 else value.splat(group.lanes)

    def _constant(self, number: float, group: Group) -> Value:
        return self.code.number(F64, number, group.lanes)

    def _optional(self, name: str, array: Array, group: Group, default: float) -> Value:
        """The group's values in float64, or the default where the job has no such array."""
        chosen = self.code.variable(self._constant(default, group))
        with self.code.when(self.code.field(name).differs(0)):
            chosen.set(group.load(array).to(F64))
        return chosen.get()

    def _each_cell(self, group: Group, body: Callable[[Value], None]) -> None:
        """Call body(cell) for each cell of a channel, in order; a vector of channels has one cell each."""
        if group.lanes > 1:
            body(group.first)
            return
        with self.code.loop(0, self.fold) as fold, self.code.loop(0, self.cell_span) as nth:
            body((fold * self.channels + group.first) * self.cell_span + nth)

    def _partial(self, group: Group, k: int, cell: Value) -> Value:
        return self.t.partials.load(self.t.cells * k + cell, group.lanes, group.mask)

    def _gather(self, first_channel: Value, end_channel: Value, merge: Any) -> None:
        """Merge the partial sums of all parts into those of the first, cell by cell."""
        code, t, parts = self.code, self.t, self.code.field("parts")

        def vector(cell: Value, _: int, mask: Value | None) -> None:
            merge(lambda part, k: t.partials.load((part * 3 + k) * t.cells + cell, t.lanes, mask),
                  lambda k, value: t.partials.store(t.cells * k + cell, value, mask))  # fmt: skip

        with code.when(parts > 1), code.loop(0, self.fold) as fold:
            base = fold * self.channels
            first, end = (base + first_channel) * self.cell_span, (base + end_channel) * self.cell_span
            code.vectors(first, end, t.lanes, vector)

    def gather_moments(self, first_channel: Value, end_channel: Value) -> None:
        """The mean of all parts, then m2 about it."""
        code, lanes = self.code, self.t.lanes
        parts, part_rows, rows = code.field("parts"), code.field("part_rows"), code.field("rows")

        def merge(load: Any, store: Any) -> None:
            zero = code.number(F64, 0.0, lanes)
            total, m2 = code.variable(zero), code.variable(zero)
            origin = load(code.integer(0), 0)
            with code.loop(1, parts) as part:
                share = ((rows - part * part_rows).min(part_rows)).to(F64) / rows.to(F64)
                total.set((load(part, 0) - origin).fma(share.splat(lanes), total.get()))
            mean = origin + total.get()
            with code.loop(0, parts) as part:
                values = ((rows - part * part_rows).min(part_rows) * self.weight).to(F64).splat(lanes)
                delta = load(part, 0) - mean
                m2.set(m2.get() + (load(part, 1) + delta * delta * values))
            store(0, mean)
            store(1, m2.get())

        self._gather(first_channel, end_channel, merge)

    def gather_sums(self, first_channel: Value, end_channel: Value, count: int) -> None:
        """The sums of all parts."""
        code, parts = self.code, self.code.field("parts")

        def merge(load: Any, store: Any) -> None:
            for k in range(count):
                total = code.variable(load(code.integer(0), k))
                with code.loop(1, parts) as part:
                    total.set(total.get() + load(part, k))
                store(k, total.get())

        self._gather(first_channel, end_channel, merge)

    def finish_moments(self, group: Group) -> None:
        """mean, m2 and rstd from the moments of the cells; updates the running statistics, where given."""
        code = self.code
        cells = self.fold * self.cell_span
        cell_count = (code.field("rows") * self.weight).to(F64)
        count = cell_count * cells.to(F64)
        if group.lanes > 1:
            mean, m2 = (self._partial(group, k, group.first) for k in range(2))
        else:
            mean, m2 = self._merge_cells(group, cells, cell_count)
        group.store(self.mean, mean)
        group.store(code.array("m2", FLOAT64), m2)
        var = m2 * self._scalar(1.0 / count, group)
        group.store(self.rstd, 1.0 / (var + self._scalar(code.real("eps"), group)).sqrt())
        with code.when(code.field("running_mean").differs(0)):
            self._update_running("running_mean", group, mean)
            self._update_running("running_var", group, m2 * self._scalar(1.0 / (count - 1.0), group))

    def _merge_cells(self, group: Group, cells: Value, cell_count: Value) -> tuple[Value, Value]:
        """The mean of all cells of a channel, and m2 about it."""
        code = self.code
        origin = self._partial(group, 0, group.first * self.cell_span)
        total, m2 = code.variable(code.number(F64, 0.0)), code.variable(code.number(F64, 0.0))
        self._each_cell(group, lambda cell: total.set(total.get() + (self._partial(group, 0, cell) - origin)))
        mean = origin + total.get() / cells.to(F64)

        def add(cell: Value) -> None:
            delta = self._partial(group, 0, cell) - mean
            m2.set(m2.get() + self._partial(group, 1, cell) + cell_count * delta * delta)

        self._each_cell(group, add)
        return mean, m2.get()

    def _update_running(self, name: str, group: Group, batch: Value) -> None:
        """running ← (1 - momentum)·running + momentum·batch, exact for 0 and for 1, as torch.lerp is."""
        running, momentum = self.code.array(name, self.kind), self.code.real("momentum")
        old = group.load(running).to(F64)
        delta = batch - old
        from_old, from_batch = (self._scalar(one, group) for one in (momentum, 1.0 - momentum))
        is_small = self._scalar(momentum, group) < 0.5
        group.store(running, is_small.select(old + from_old * delta, batch - delta * from_batch))

    def finish_sums(self, group: Group, count: int) -> None:
        """dbeta = Σg, dgamma = Σg·xhat and grad_energy = Σg² from Σg, Σg·(x - MEAN) and Σg² of the cells."""
        code = self.code
        totals = [code.variable(self._constant(0.0, group)) for _ in range(count)]

        def add(cell: Value) -> None:
            for k, total in enumerate(totals):
                total.set(total.get() + self._partial(group, k, cell))

        self._each_cell(group, add)
        mean, rstd = group.load(self.mean), group.load(self.rstd)
        dbeta, sum_g_xmu = totals[0].get(), totals[1].get()
        dgamma = (sum_g_xmu - (mean - mean.to(self.t.scalar).to(F64)) * dbeta) * rstd
        group.store(self.sums, dbeta)
        group.store(self.sums, dgamma, self.channels)
        if count == 3:
            group.store(self.sums, totals[2].get(), self.channels * 2)
        for name, value in (("grad_gamma", dgamma), ("grad_beta", dbeta)):
            with code.when(code.field(name).differs(0)):
                group.store(code.array(name, self.kind), value)

    def prepare(self, group: Group) -> None:
        """Store MEAN, SCALE, SHIFT: z = gamma·(x - mean)·rstd + beta. SHIFT corrects for the rounding of MEAN."""
        mean = group.load(self.mean)
        scale = group.load(self.rstd) * self._optional("gamma", self.gamma, group, 1.0)
        rounded = mean.to(self.t.scalar).to(F64)
        shift = self._optional("beta", self.beta, group, 0.0) - (mean - rounded) * scale
        self._store_constants(group, {MEAN: rounded, SCALE: scale, SHIFT: shift})

    def slopes(self, group: Group) -> None:
        """Store DX_SLOPE and DX_SHIFT, with which dx is gamma·rstd·(g - dbeta/m - xhat·dgamma/m)."""
        mean, rstd = group.load(self.mean), group.load(self.rstd)
        inverse = self._scalar(1.0 / self.code.real("count"), group)
        scale = rstd * inverse * self._optional("gamma", self.gamma, group, 1.0)
        dx_slope = -scale * rstd * group.load(self.sums, self.channels)
        dx_shift = -scale * group.load(self.sums) - dx_slope * (mean - mean.to(self.t.scalar).to(F64))
        self._store_constants(group, {DX_SLOPE: dx_slope, DX_SHIFT: dx_shift})

    def _store_constants(self, group: Group, values: dict[int, Value]) -> None:
        def store(cell: Value) -> None:
            for k, value in values.items():
                self.t.constants.store(self.t.cells * k + cell, value, group.mask)

        self._each_cell(group, store)
