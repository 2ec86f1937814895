"""act(z) and g = grad_y·act'(z) for the compiled CPU loops: scalar and inlined, so that LLVM vectorizes them.

They are compiled without fast-math. So forward and backward compute the same z, and NaN stays NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from batchnorm.kernels.cpu._codegen.memory import COMPILED, fma, inlined, like, reinterpret


def exponential(z):
    """exp(z), accurate to about one unit in the last place; z is clamped so that the result is a normal number.

    exp(z) = 2^k·exp(r) with k = round(z/ln 2), and exp(r), |r| <= ln 2/2, by its Taylor series. Adding
    1.5·2^(mantissa bits) rounds to an integer and leaves it in the lowest bits.
    """
    raise NotImplementedError("exponential runs in compiled code only")


def _taylor(number: Any, terms: int) -> list[Any]:
    """The coefficients 1/k! from the highest power down."""
    return [number(1 / math.factorial(k)) for k in reversed(range(terms))]


@overload(exponential, jit_options=COMPILED)
def _exponential(z):
    # Horner's rule is unrolled: LLVM does not vectorize a loop inside of the loop over values.
    if z == types.float32:
        a, b, c, d, e, f, g, h = _taylor(np.float32, 8)
        low, high, per_ln2 = np.float32(-87.3), np.float32(88.3), np.float32(1 / math.log(2))
        ln2_high, ln2_low, magic = np.float32(0.693359375), np.float32(-2.1219444e-4), np.float32(1.5 * 2**23)
        bias = int(magic.view(np.int32)) - 127

        def single(z):
            clamped = low if z < low else (high if z > high else z)
            shifted = fma(clamped, per_ln2, magic)
            k = shifted - magic
            r = fma(k, -ln2_low, fma(k, -ln2_high, clamped))
            series = fma(fma(fma(fma(fma(fma(fma(a, r, b), r, c), r, d), r, e), r, f), r, g), r, h)
            return series * reinterpret(types.int32((reinterpret(shifted) - types.int32(bias)) << types.int32(23)))

        return single
    a, b, c, d, e, f, g, h, i, j, l, m, n, o = _taylor(np.float64, 14)  # noqa: E741 - k is the exponent
    low, high, per_ln2 = -708.0, 709.0, 1 / math.log(2)
    ln2_high, ln2_low, magic = 0.6931471803691238, 1.9082149292705877e-10, 1.5 * 2.0**52
    bias = int(np.float64(magic).view(np.int64)) - 1023

    def double(z):
        clamped = low if z < low else (high if z > high else z)
        shifted = fma(clamped, per_ln2, magic)
        k = shifted - magic
        r = fma(k, -ln2_low, fma(k, -ln2_high, clamped))
        upper = fma(fma(fma(fma(fma(fma(fma(a, r, b), r, c), r, d), r, e), r, f), r, g), r, h)
        series = fma(fma(fma(fma(fma(fma(upper, r, i), r, j), r, l), r, m), r, n), r, o)
        return series * reinterpret((reinterpret(shifted) - bias) << 52)

    return double


@inlined
def _logistic(z):
    return like(z, 1.0) / (like(z, 1.0) + exponential(-z))


@inlined
def _silu_gradient(g, z, slope):
    s = _logistic(z)
    return g * (s * fma(z, like(z, 1.0) - s, like(z, 1.0)))


@inlined
def _hardswish(z, slope):
    three = like(z, 3.0)
    return like(z, 0.0) if z <= -three else (z if z >= three else z * (z + three) * like(z, 1 / 6))


@inlined
def _hardswish_gradient(g, z, slope):
    three = like(z, 3.0)
    return like(z, 0.0) if z <= -three else (g if z >= three else g * (z * like(z, 1 / 3) + like(z, 0.5)))


@inlined
def _sigmoid_gradient(g, z, slope):
    s = _logistic(z)
    return g * (s * (like(z, 1.0) - s))


@inlined
def _tanh_gradient(g, z, slope):
    s = _logistic(z + z)
    return g * (like(z, 4.0) * s * (like(z, 1.0) - s))


VALUES = {
    None: inlined(lambda z, slope: z),
    "relu": inlined(lambda z, slope: like(z, 0.0) if z <= like(z, 0.0) else z),
    "relu6": inlined(
        lambda z, slope: like(z, 0.0) if z <= like(z, 0.0) else (like(z, 6.0) if z >= like(z, 6.0) else z)
    ),
    "leaky_relu": inlined(lambda z, slope: z if z > like(z, 0.0) else z * slope),
    "elu": inlined(lambda z, slope: z if z > like(z, 0.0) else exponential(z) - like(z, 1.0)),
    "silu": inlined(lambda z, slope: z * _logistic(z)),
    "hardswish": _hardswish,
    "sigmoid": inlined(lambda z, slope: _logistic(z)),
    "tanh": inlined(lambda z, slope: like(z, 2.0) * _logistic(z + z) - like(z, 1.0)),
}
"""act(z) by the name of the activation."""

GRADIENTS = {
    None: inlined(lambda g, z, slope: g),
    "relu": inlined(lambda g, z, slope: like(z, 0.0) if z <= like(z, 0.0) else g),
    "relu6": inlined(lambda g, z, slope: like(z, 0.0) if (z <= like(z, 0.0)) | (z >= like(z, 6.0)) else g),
    "leaky_relu": inlined(lambda g, z, slope: g if z > like(z, 0.0) else g * slope),
    "elu": inlined(lambda g, z, slope: g if z > like(z, 0.0) else g * exponential(z)),
    "silu": _silu_gradient,
    "hardswish": _hardswish_gradient,
    "sigmoid": _sigmoid_gradient,
    "tanh": _tanh_gradient,
}
"""g·act'(z) from z, g being grad_y."""

GRADIENTS_BY_Y = {
    "relu": inlined(lambda g, y, slope: like(y, 0.0) if y <= like(y, 0.0) else g),
    "sigmoid": inlined(lambda g, y, slope: g * (y * (like(y, 1.0) - y))),
    "tanh": inlined(lambda g, y, slope: g * fma(-y, y, like(y, 1.0))),
}
"""g·act'(z) from y = act(z), g being grad_y."""
