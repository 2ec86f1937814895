"""The sums of a product over each channel of each sample: the gradient of a factor per sample and channel.

It is the pass over memory that reduces gradients, with a part of the tensor for each sample or channel, whose sums are
the result.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

import torch
from torch import Tensor

from batchnorm.kernels.cpu import threads
from batchnorm.kernels.cpu.cost import why_not_possible
from batchnorm.kernels.cpu.kernel import code_of
from batchnorm.kernels.cpu.plan import (
    COMPUTED,
    KINDS,
    REDUCE,
    SHORT_SLICE,
    Job,
    Matrix,
    Plan,
    Step,
    Steps,
    Variant,
    job_of,
)

_AHEAD_BYTES = 1024
_TILE_BYTES = 256 << 10


def why_unsupported(x: Tensor) -> str | None:
    """Why `sums_of_products` cannot run tensors like x; None if it can."""
    if x.dim() < 3 or (x.is_contiguous() and math.prod(x.shape[2:]) < SHORT_SLICE):
        return "short slices"
    return why_not_possible(x)


def sums_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b over the positions of each sample and channel, (N, C) in float64.

    a and b (N, C, *) have one shape, type and layout, contiguous or channels_last (`why_unsupported`).
    """
    job, code, parts, cells = _prepare(a.shape, a.is_contiguous(), a.dtype, torch.get_num_threads())
    job = Job.from_buffer_copy(job)
    partials = torch.empty((parts, 3, cells), dtype=torch.float64)
    # Of the constants MEAN is 0, and the others have no effect on these sums.
    constants = torch.zeros(5 * cells, dtype=COMPUTED[KINDS[a.dtype]])
    tickets = torch.zeros(job.workers * 8, dtype=torch.int64)
    job.x, job.grad_y = b.data_ptr(), a.data_ptr()
    job.partials, job.constants, job.tickets = partials.data_ptr(), constants.data_ptr(), tickets.data_ptr()
    threads.run(code, ctypes.addressof(job), job.workers)
    return partials[:, 1].reshape(a.shape[:2])


@lru_cache(maxsize=1024)
def _prepare(shape: torch.Size, contiguous: bool, dtype: torch.dtype, count_threads: int) -> tuple[Job, int, int, int]:
    samples, channels, span = shape[0], shape[1], math.prod(shape[2:])
    size = dtype.itemsize
    if contiguous:  # a slice is a channel
        planned = Plan(Matrix(1, samples * channels, span, 1, size, False), count_threads, 1)
    else:  # a sample is a part
        planned = Plan(Matrix(samples * span, channels, 1, 1, size, True), count_threads, span)
    m = planned.matrix
    if contiguous:
        across = max(1, min(_TILE_BYTES // (span * size), -(-m.channels // count_threads)))
    else:
        across = -(-channels // -(-count_threads // samples))
    tiles = planned.parts * -(-m.channels // across)
    steps = Steps((Step(REDUCE, planned.part_rows, across),), m.channels, 1, tiles)
    workers = min(count_threads, steps.tiles)
    job = job_of(
        planned,
        steps,
        ahead=_AHEAD_BYTES // size,
        workers=workers,
        thread_number=threads.number_address(),
        yield_thread=threads.yield_address(),
    )
    return job, code_of(Variant(True, KINDS[dtype], None, "x", m.by_columns)), planned.parts, m.cells
