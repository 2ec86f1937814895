"""The CPU kernels: one compiled job per call, on PyTorch's own threads, one pass over memory where the cache allows it.

A contiguous channel's values (x in forward; x and the gradient in backward) are reduced, then normalized while a core's
cache still has them. Other layouts take two passes, the second in the opposite order. Long rows are cut into groups of
channels that the caches hold, one after the other.

Statistics, rstd and sums per channel are float64. In backward four values at a time are added in float32 (in float64
for float64 tensors), and all else in float64.

What calls of one kind have in common (shape, layout, type, activation) is prepared once: the plan and most of the job.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.contract import Count, Epilogue, Forward, GradSums, InputGrads, Kernel
from batchnorm.kernels.cpu import compiler, threads
from batchnorm.kernels.cpu.machine import facts
from batchnorm.kernels.cpu.plan import (
    APPLY,
    COMPUTED,
    KEPT,
    KINDS,
    MERGE,
    PREPARE,
    REDUCE,
    SLOPES,
    Job,
    Variant,
    job_of,
    plan,
)
from batchnorm.kernels.layout import dense, memory_format
from batchnorm.moments import Moments
from batchnorm.running_stats import RunningUpdate

_FORWARD = REDUCE | MERGE | PREPARE | APPLY
_BACKWARD = PREPARE | REDUCE | MERGE | SLOPES | APPLY
_MOST_KINDS = 4096
_WORKSPACE_BYTES = 16 << 20
_VECTOR = 16  # values, of the widest vectors
# How far ahead loops along rows prefetch: the processor's own prefetchers begin anew in every piece and page.
_AHEAD_BYTES, _AHEAD_ROWS = 1024, 16
_local = threading.local()


class _Prepared:
    """What all calls of one kind share: code, the constant fields of the job, and the sizes of its buffers."""

    __slots__ = (
        "channels",
        "code",
        "computed",
        "constants",
        "count",
        "dtype",
        "job",
        "layout",
        "partials",
        "scratch",
        "signs_bytes",
        "size",
        "tickets",
        "workers",
    )  # fmt: skip

    def __init__(
        self, x: Tensor, phases: int, act: str | None, source: str, backward: bool, energy: bool, layout: Any
    ) -> None:
        self.layout, self.dtype = layout, x.dtype
        channels, span = x.shape[1], math.prod(x.shape[2:])
        self.channels, self.count = channels, x.shape[0] * span
        rows, span = (x.shape[0], span) if layout is torch.contiguous_format else (self.count, 1)
        count_threads, kind = torch.get_num_threads(), KINDS[x.dtype]
        self.computed = COMPUTED[kind]
        self.signs_bytes = x.numel() // 8 + 64  # loops load the bits of whole groups of vectors
        width = self.computed.itemsize
        planned = plan(rows, channels, span, x.element_size(), count_threads)
        m = planned.matrix
        inputs = 1 + backward + (source != "x" and not (backward and source == "signs"))
        known = facts()
        l2_bytes = known.l2_bytes
        planned_steps = planned.steps(phases, inputs, backward, l2_bytes)
        steps, group_channels, groups, tiles = planned_steps
        self.code = code_of(Variant(backward, kind, act, source, m.by_columns, energy))
        self.workers = min(count_threads, tiles)
        slab = m.rows * steps[0].tile_channels * m.span
        one_pass = len(steps) == 1 and not m.by_columns
        kept = phases == _BACKWARD and act in KEPT
        if m.by_columns:  # in dx, with x and grad_y
            kept &= 3 * m.rows * m.fold * group_channels * m.span * m.size <= known.cached_bytes // 2
            kept &= self.computed is x.dtype
        else:
            kept &= one_pass and slab * width <= l2_bytes
        worker_scratch = -(-(slab if kept and not m.by_columns else 0) // 16) * 16
        # 64 bytes are a cache line.
        self.constants = -(-5 * m.cells * width // 64) * 64
        self.partials = -(-3 * planned.parts * m.cells * 8 // 64) * 64
        self.scratch = self.workers * worker_scratch * width
        self.tickets = groups * len(steps) * self.workers * 64
        self.size = self.constants + self.partials + self.scratch + self.tickets + 3 * channels * 8
        self.job = job_of(
            planned,
            planned_steps,
            ahead=_AHEAD_BYTES // m.size if planned_steps.groups == 1 else _AHEAD_ROWS * m.columns,
            workers=self.workers,
            thread_number=threads.number_address(),
            yield_thread=threads.yield_address(),
            stream=planned.streams(known.cached_bytes) and not (kept and m.by_columns),
            prefetch=one_pass and inputs * slab * m.size <= 2 * l2_bytes,
            kept=kept,
            scratch_size=worker_scratch,
        )


def code_of(variant: Variant) -> int:
    """The address of a variant's machine code."""

    def assembly() -> str:
        from batchnorm.kernels.cpu._codegen import tiles

        return tiles.assembly(variant)

    return compiler.address_of(str(tuple(variant)), assembly)


_prepared: dict[Any, _Prepared] = {}


def _prepare(
    x: Tensor, phases: int, act: str | None, source: str, backward: bool = False, energy: bool = False
) -> _Prepared:
    layout = torch.contiguous_format if x.is_contiguous() else memory_format(x)
    key = (x.shape, layout, x.dtype, phases, act, source, backward, energy, torch.get_num_threads())
    found = _prepared.get(key)
    if found is None:
        if len(_prepared) >= _MOST_KINDS:
            _prepared.clear()
        found = _prepared[key] = _Prepared(x, phases, act, source, backward, energy, layout)
    return found


class _Call:
    """One call: the job, and the tensors that it points to."""

    __slots__ = ("converted", "job", "prepared", "x")

    def __init__(self, prepared: _Prepared, x: Tensor, epilogue: Epilogue) -> None:
        self.prepared = prepared
        self.converted: list[Tensor] = []
        job = self.job = Job.from_buffer_copy(prepared.job)
        self.x = x if x.is_contiguous(memory_format=prepared.layout) else self.like_x(x)
        job.x, job.slope = self.x.data_ptr(), epilogue.slope
        gamma, beta = epilogue.gamma, epilogue.beta
        if gamma is not None:
            job.gamma = self.address(gamma, prepared.computed)
        if beta is not None:
            job.beta = self.address(beta, prepared.computed)

    def address(self, vector: Tensor, dtype: torch.dtype) -> int:
        """The address of a vector, or of a copy of this type that lives as long as this call."""
        if vector.dtype is not dtype or not vector.is_contiguous():
            vector = dense(vector, dtype)
            self.converted.append(vector)
        return vector.data_ptr()

    def like_x(self, tensor: Tensor) -> Tensor:
        """The tensor in x's type and memory format, itself or a copy that lives as long as this call."""
        prepared = self.prepared
        if tensor.dtype is prepared.dtype and tensor.is_contiguous(memory_format=prepared.layout):
            return tensor
        copy = tensor.to(prepared.dtype).contiguous(memory_format=prepared.layout)
        self.converted.append(copy)
        return copy

    def set_statistics(self, mean: Tensor, rstd: Tensor) -> None:
        """Normalize with these."""
        self.job.mean, self.job.rstd = self.address(mean, torch.float64), self.address(rstd, torch.float64)

    def set_rows(self, rows: Tensor) -> None:
        """Use a vector of mean, m2 and rstd, one after the other."""
        channels, job = self.prepared.channels, self.job
        job.mean = address = rows.data_ptr()
        job.m2, job.rstd = address + 8 * channels, address + 16 * channels

    def run(self) -> None:
        job, prepared = self.job, self.prepared
        workspace = _workspace(prepared.size)
        job.constants = address = workspace.data_ptr()
        job.partials = address = address + prepared.constants
        job.scratch = address = address + prepared.partials
        job.tickets = address = address + prepared.scratch
        ctypes.memset(address, 0, prepared.tickets)
        if not job.sums:
            job.sums = address + prepared.tickets
        threads.run(prepared.code, ctypes.addressof(job), prepared.workers)


def _workspace(size: int) -> Tensor:
    """Memory of this thread for one call, kept for the next."""
    kept: Tensor | None = getattr(_local, "workspace", None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8)
        if size <= _WORKSPACE_BYTES:
            _local.workspace = kept
    return kept


class CpuKernel(Kernel):
    """The contract in compiled loops (`_codegen`), on PyTorch's own threads."""

    name: ClassVar[str] = "cpu"
    types: ClassVar[frozenset[torch.dtype]] = frozenset(KINDS)
    activations: ClassVar[frozenset[str | None]] = frozenset({None, *ACTIVATIONS})

    def accumulation_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float64: the type in which partial sums merge and rstd is computed."""
        return torch.float64

    def statistics(self, x: Tensor) -> Moments:
        call = _Call(_prepare(x, REDUCE | MERGE, None, "x"), x, Epilogue())
        rows = torch.empty(3 * call.prepared.channels, dtype=torch.float64)
        call.set_rows(rows)
        call.run()
        mean, m2, _ = rows.view(3, -1).unbind()
        return Moments(call.prepared.count, mean, m2)

    def normalize(self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
        call = _forward_call(x, PREPARE | APPLY, epilogue)
        call.set_statistics(mean, rstd)
        y = _empty_y(call, epilogue)
        call.run()
        return y

    def forward(self, x: Tensor, eps: float, epilogue: Epilogue, moving: RunningUpdate | None = None) -> Forward:
        signs = _has_signs(x, epilogue)
        call = _forward_call(x, _FORWARD, epilogue, "signs" if signs else "residual")
        job, computed = call.job, call.prepared.computed
        rows = torch.empty(3 * call.prepared.channels, dtype=torch.float64)
        call.set_rows(rows)
        job.eps = eps
        y = _empty_y(call, epilogue)
        bits = torch.empty(call.prepared.signs_bytes, dtype=torch.uint8) if signs else None
        job.signs = 0 if bits is None else bits.data_ptr()
        is_moved = False
        if moving is not None:
            mean, var, momentum = moving
            is_moved = mean.dtype is computed and var.dtype is computed and mean.is_contiguous() and var.is_contiguous()
            if is_moved:
                job.running_mean, job.running_var, job.momentum = mean.data_ptr(), var.data_ptr(), momentum
        call.run()
        result = Forward(y, call.prepared.count, (rows,), bits)
        if moving is not None:
            moving.moved_in_place() if is_moved else moving.move(result.moments)
        return result

    def reduce_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, *, energy: bool
    ) -> GradSums:
        call = _backward_call(grad_y, x, PREPARE | REDUCE | MERGE, epilogue, energy)
        call.set_statistics(mean, rstd)
        sums = _empty_sums(call)
        call.run()
        return GradSums(sums[0], sums[1], sums[2] if energy else None)

    def input_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, sums: GradSums | None, m: Count
    ) -> InputGrads:
        call = _backward_call(grad_y, x, PREPARE | SLOPES | APPLY, epilogue, False)
        call.set_statistics(mean, rstd)
        if sums is None:
            totals = torch.zeros(2, call.prepared.channels, dtype=torch.float64)
        else:
            totals = torch.stack((sums.dbeta, sums.dgamma)).double()
        call.job.sums, call.job.count = totals.data_ptr(), int(m)
        grads = _empty_grads(call, grad_y, epilogue)
        call.run()
        return grads

    def backward(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, m: int, *, energy: bool
    ) -> tuple[InputGrads, GradSums]:
        call = _backward_call(grad_y, x, _BACKWARD, epilogue, energy)
        call.set_statistics(mean, rstd)
        return _run_backward(call, grad_y, epilogue, m, energy)

    def backward_of(
        self, grad_y: Tensor, x: Tensor, statistics: Sequence[Tensor], epilogue: Epilogue, m: int, *, energy: bool
    ) -> tuple[InputGrads, GradSums]:
        if len(statistics) != 1:
            return super().backward_of(grad_y, x, statistics, epilogue, m, energy=energy)
        call = _backward_call(grad_y, x, _BACKWARD, epilogue, energy)
        call.set_rows(statistics[0])
        return _run_backward(call, grad_y, epilogue, m, energy)


def _forward_call(x: Tensor, phases: int, epilogue: Epilogue, added: str = "residual") -> _Call:
    source = "x" if epilogue.residual is None else added
    return _Call(_prepare(x, phases, epilogue.act, source), x, epilogue)


def _has_signs(x: Tensor, epilogue: Epilogue) -> bool:
    """Whether forward stores the signs of y for backward.

    Types that are not rounded, and rows or slices of whole vectors, whose masks are whole bytes.
    """
    if epilogue.residual is None or epilogue.act != "relu" or x.dtype not in (torch.float32, torch.float64):
        return False
    run = math.prod(x.shape[2:]) if x.is_contiguous() and x.dim() > 2 else x.shape[1]
    return run % _VECTOR == 0


def _empty_y(call: _Call, epilogue: Epilogue) -> Tensor:
    y = torch.empty_like(call.x)
    call.job.y = y.data_ptr()
    if epilogue.residual is not None:
        call.job.other = call.like_x(epilogue.residual).data_ptr()
    return y


def _backward_call(grad_y: Tensor, x: Tensor, phases: int, epilogue: Epilogue, energy: bool) -> _Call:
    y, signs = epilogue.y, epilogue.signs
    source = "x" if y is None else "y" if signs is None else "signs"
    call = _Call(_prepare(x, phases, epilogue.act, source, True, energy), x, epilogue)
    call.job.grad_y = call.like_x(grad_y).data_ptr()
    if signs is not None:
        call.job.signs = signs.data_ptr()
    elif y is not None:
        call.job.other = call.like_x(y).data_ptr()
    return call


def _run_backward(call: _Call, grad_y: Tensor, epilogue: Epilogue, m: int, energy: bool) -> tuple[InputGrads, GradSums]:
    """Gradients and sums. The sums are float64 with the energy, else of gamma's type, as the layer returns them."""
    job, prepared = call.job, call.prepared
    job.count = m
    grads = _empty_grads(call, grad_y, epilogue)
    if energy:
        sums = _empty_sums(call)
        call.run()
        return grads, GradSums(*sums.unbind())
    dgamma = torch.empty(prepared.channels, dtype=prepared.computed)
    dbeta = torch.empty(prepared.channels, dtype=prepared.computed)
    job.grad_gamma, job.grad_beta = dgamma.data_ptr(), dbeta.data_ptr()
    call.run()
    return grads, GradSums(dbeta, dgamma, None)


def _empty_sums(call: _Call) -> Tensor:
    """Rows for dbeta, dgamma and the energy."""
    sums = torch.empty((3, call.prepared.channels), dtype=torch.float64)
    call.job.sums = sums.data_ptr()
    return sums


def _empty_grads(call: _Call, grad_y: Tensor, epilogue: Epilogue) -> InputGrads:
    """dx, and dresidual: a new tensor where y is saved, else grad_y where there was a residual."""
    dx = torch.empty_like(call.x)
    call.job.dx = dx.data_ptr()
    if epilogue.y is None:
        return InputGrads(dx, None if epilogue.residual is None else grad_y)
    dresidual = torch.empty_like(call.x)
    call.job.dresidual = dresidual.data_ptr()
    return InputGrads(dx, dresidual)
