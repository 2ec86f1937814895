"""A tensor as elements at regular distances in a run of bytes: how every binary format stores them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchnorm.checks.readers._parsing.elements import SIZES, float64, raw_type
from batchnorm.checks.readers._parsing.files import Bytes
from batchnorm.checks.readers._parsing.stored import CheckpointError, Stored

MAX_READS = 2**16
"""Reads for one tensor: a second's worth. Only a view across a much larger tensor needs more."""
MAX_SIZE = 2**62
"""No count of elements or bytes in a file is larger; products stay in 64 bits."""


@dataclass(frozen=True, slots=True)
class Strided(Stored):
    """Element (i, j, ...) lies at element `offset + i·strides[0] + j·strides[1] + ...` of the bytes.

    Without strides the last dimension runs fastest. `order` is "<" for little-endian, ">" for big-endian.
    """

    source: Bytes
    offset: int = 0
    strides: tuple[int, ...] | None = None
    order: str = "<"

    def memory(self) -> Hashable:
        return self.source, self.offset, self.strides, self.shape, self.dtype

    def _read(self) -> npt.NDArray[np.float64]:
        if 0 in self.shape:
            return np.empty(self.shape)
        strides = contiguous(self.shape) if self.strides is None else self.strides
        size = SIZES[self.dtype]
        # The outer dimensions are walked while what lies inside one step is spread too thin to be read as a whole.
        order = sorted(range(len(self.shape)), key=lambda axis: -strides[axis])
        outer: list[int] = []
        while _span(self.shape, strides, order) * size > max(self.source.dense, 4 * size * _count(self.shape, order)):
            outer.append(order.pop(0))
        if math.prod(self.shape[axis] for axis in outer) > MAX_READS:
            raise CheckpointError("a tensor whose elements lie scattered over a much larger one is not read")
        inner = sorted(order)
        shape = tuple(self.shape[axis] for axis in inner)
        span = _span(self.shape, strides, inner)
        steps = tuple(strides[axis] * size for axis in inner)
        result = np.empty(self.shape)
        for at in itertools.product(*(range(self.shape[axis]) for axis in outer)):
            begin = self.offset + sum(index * strides[axis] for index, axis in zip(at, outer, strict=True))
            raw = np.frombuffer(self.source.read(begin * size, span * size), dtype=raw_type(self.dtype, self.order))
            where: list[int | slice] = [slice(None)] * len(self.shape)
            for index, axis in zip(at, outer, strict=True):
                where[axis] = index
            view = np.lib.stride_tricks.as_strided(raw, shape, steps, writeable=False)
            result[tuple(where)] = float64(view, self.dtype)
        return result


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor whose last dimension runs fastest."""
    strides = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements lie from its first to its last, both included; 0 for an empty tensor."""
    return 0 if 0 in shape else _span(shape, strides, range(len(shape)))


def plausible(shape: tuple[int, ...]) -> bool:
    """Whether sizes can be those of a tensor."""
    return len(shape) <= 32 and all(0 <= length < MAX_SIZE for length in shape) and math.prod(shape) < MAX_SIZE


def _span(shape: tuple[int, ...], strides: tuple[int, ...], axes: list[int] | range) -> int:
    return 1 + sum((shape[axis] - 1) * strides[axis] for axis in axes)


def _count(shape: tuple[int, ...], axes: list[int]) -> int:
    return math.prod(shape[axis] for axis in axes)
