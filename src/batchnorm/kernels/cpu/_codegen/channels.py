"""What the compiled work does a channel at a time, between reducing x and applying the result to it.

A channel has one cell or several: each with partial sums and constants of its own, one a column or one a channel.
Fields of the job and partial sums are as `plan` and `tiles` describe them.
"""

from __future__ import annotations

import math

from numba import types

from batchnorm.kernels.cpu._codegen.loops import (
    ALONG,
    HIGH,
    LEVEL,
    SCALE,
    SHIFT,
)
from batchnorm.kernels.cpu._codegen.memory import (
    FLOAT64,
    array,
    behind,
    inlined,
    integer,
    like,
    load,
    number,
    store,
)
from batchnorm.kernels.cpu.plan import FIELDS

_wide = types.float64

_ROWS, _CHANNELS, _FOLD = FIELDS["rows"], FIELDS["channels"], FIELDS["fold"]
_CELL_SPAN, _WEIGHT, _PARTS, _PART_ROWS = (FIELDS[name] for name in ("cell_span", "weight", "parts", "part_rows"))
_GAMMA, _BETA, _MEAN, _VAR, _RSTD = (FIELDS[name] for name in ("gamma", "beta", "mean", "var", "rstd"))
_SUMS, _EPS, _COUNT = FIELDS["sums"], FIELDS["eps"], FIELDS["count"]


@inlined
def _cell(channel, nth, channels, span):
    """A channel's nth cell."""
    return (nth // span * channels + channel) * span + nth % span


@inlined
def _sum(partials, at):
    return _wide(load(partials, at))


@inlined
def gather_moments(job, partials, start, stop):
    """Merge the moments of all tiles of these channels into those of the first, cell by cell (Chan et al. 1983)."""
    span, channels, part_rows = integer(job, _CELL_SPAN), integer(job, _CHANNELS), integer(job, _PART_ROWS)
    cells = channels * span * integer(job, _FOLD)
    for part in range(1, integer(job, _PARTS)):
        before, here = part * part_rows, min(part_rows, integer(job, _ROWS) - part * part_rows)
        share = here / _wide(before + here)
        spread = _wide(before) * share * integer(job, _WEIGHT)
        other = behind(partials, 3 * part * cells)
        for nth in range(integer(job, _FOLD)):
            for cell in range((nth * channels + start) * span, (nth * channels + stop) * span):
                mean, squares = _sum(partials, cell), _sum(partials, cells + cell)
                off = _sum(other, cell) - mean
                store(partials, cell, mean + off * share)
                store(partials, cells + cell, squares + (_sum(other, cells + cell) + off * off * spread))


@inlined
def merge_moments(job, partials, channel):
    """mean, var and rstd of a channel from the moments of its cells."""
    span, channels, rows = (
        integer(job, _CELL_SPAN),
        integer(job, _CHANNELS),
        integer(job, _ROWS) * integer(job, _WEIGHT),
    )
    each = span * integer(job, _FOLD)
    origin = _sum(partials, channel * span)
    total, squares = 0.0, 0.0
    for nth in range(each):
        total += _sum(partials, _cell(channel, nth, channels, span)) - origin
    mean = origin + total / each
    for nth in range(each):
        cell = _cell(channel, nth, channels, span)
        off = _sum(partials, cell) - mean
        squares += _sum(partials, each * channels + cell) + rows * off * off
    var = squares / _wide(rows * each)
    store(array(job, _MEAN, FLOAT64), channel, mean)
    store(array(job, _VAR, FLOAT64), channel, var)
    store(array(job, _RSTD, FLOAT64), channel, 1.0 / math.sqrt(var + number(job, _EPS)))


@inlined
def gather_sums(job, partials, start, stop):
    """Add the sums of all tiles of these channels to those of the first, cell by cell."""
    span, channels, fold = integer(job, _CELL_SPAN), integer(job, _CHANNELS), integer(job, _FOLD)
    for part in range(1, integer(job, _PARTS)):
        other = behind(partials, 3 * part * channels * span * fold)
        for nth in range(3 * fold):
            for cell in range((nth * channels + start) * span, (nth * channels + stop) * span):
                store(partials, cell, _sum(partials, cell) + _sum(other, cell))


@inlined
def merge_sums(job, partials, channel, constants):
    """dbeta = Σg, dgamma = Σg·xhat and Σg² of a channel from Σg, Σg·(x - HIGH) and Σg² of its cells."""
    span, channels, sums = integer(job, _CELL_SPAN), integer(job, _CHANNELS), array(job, _SUMS, FLOAT64)
    each = span * integer(job, _FOLD)
    cells = each * channels
    dbeta, along, energy = 0.0, 0.0, 0.0
    for nth in range(each):
        cell = _cell(channel, nth, channels, span)
        dbeta += _sum(partials, cell)
        along += _sum(partials, cells + cell)
        energy += _sum(partials, 2 * cells + cell)
    mean, rstd = load(array(job, _MEAN, FLOAT64), channel), load(array(job, _RSTD, FLOAT64), channel)
    store(sums, channel, dbeta)
    store(sums, channels + channel, (along - (mean - _wide(like(load(constants, 0), mean))) * dbeta) * rstd)
    store(sums, 2 * channels + channel, energy)


@inlined
def prepare(job, channel, gamma, beta, constants):
    """z = (x - HIGH)·SCALE + SHIFT is gamma·(x - mean)·rstd + beta: HIGH the rounded mean, the rest of it in SHIFT."""
    mean, scale = load(array(job, _MEAN, FLOAT64), channel), load(array(job, _RSTD, FLOAT64), channel)
    shift = 0.0
    if integer(job, _GAMMA) != 0:
        scale *= load(gamma, channel)
    if integer(job, _BETA) != 0:
        shift = _wide(load(beta, channel))
    high = _wide(like(load(constants, 0), mean))
    span, channels = integer(job, _CELL_SPAN), integer(job, _CHANNELS)
    cells = channels * span * integer(job, _FOLD)
    for nth in range(span * integer(job, _FOLD)):
        cell = _cell(channel, nth, channels, span)
        store(constants, HIGH * cells + cell, high)
        store(constants, SCALE * cells + cell, scale)
        store(constants, SHIFT * cells + cell, shift - (mean - high) * scale)


@inlined
def slopes(job, channel, gamma, constants):
    """dx = SCALE·g + (x - HIGH)·ALONG + LEVEL is gamma·rstd·(g - dbeta/m - xhat·dgamma/m)."""
    mean, rstd = load(array(job, _MEAN, FLOAT64), channel), load(array(job, _RSTD, FLOAT64), channel)
    sums = array(job, _SUMS, FLOAT64)
    scale = rstd / number(job, _COUNT)
    if integer(job, _GAMMA) != 0:
        scale *= load(gamma, channel)
    along = -scale * rstd * load(sums, integer(job, _CHANNELS) + channel)
    level = -scale * load(sums, channel) - along * (mean - _wide(like(load(constants, 0), mean)))
    span, channels = integer(job, _CELL_SPAN), integer(job, _CHANNELS)
    cells = channels * span * integer(job, _FOLD)
    for nth in range(span * integer(job, _FOLD)):
        cell = _cell(channel, nth, channels, span)
        store(constants, ALONG * cells + cell, along)
        store(constants, LEVEL * cells + cell, level)
