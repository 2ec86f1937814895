"""act(z) and g·act'(z) for the compiled CPU loops: scalar and without a call, so that LLVM vectorizes them.

Compiled without fast-math: what forward passes is what backward passes, and NaN stays NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.cpu._codegen.memory import COMPILED, bits, from_bits, fused, inlined, like


def exponential(z):
    """exp(z) to about one last digit; z is clamped to where the result is a normal number.

    exp(z) = 2^k·exp(r) with k = round(z/ln 2), and exp(r), |r| <= ln 2/2, by its Taylor series. Adding
    1.5·2^(mantissa bits) rounds to an integer and leaves it in the lowest bits.
    """
    raise NotImplementedError("compiled code only")


def _taylor(number: Any, terms: int) -> list[Any]:
    """The coefficients 1/k! from the highest power down."""
    return [number(1 / math.factorial(k)) for k in reversed(range(terms))]


@overload(exponential, jit_options=COMPILED)
def _exponential(z):
    # Horner's rule is written out: LLVM vectorizes no loop within the loop.
    if z == types.float32:
        a, b, c, d, e, f, g, h = _taylor(np.float32, 8)
        low, high, per_ln2 = np.float32(-87.3), np.float32(88.3), np.float32(1 / math.log(2))
        ln2_high, ln2_low, magic = np.float32(0.693359375), np.float32(-2.1219444e-4), np.float32(1.5 * 2**23)
        offset = int(magic.view(np.int32)) - 127

        def single(z):
            inside = low if z < low else (high if z > high else z)
            shifted = fused(inside, per_ln2, magic)
            k = shifted - magic
            r = fused(k, -ln2_low, fused(k, -ln2_high, inside))
            series = fused(fused(fused(fused(fused(fused(fused(a, r, b), r, c), r, d), r, e), r, f), r, g), r, h)
            return series * from_bits(types.int32((bits(shifted) - types.int32(offset)) << types.int32(23)))

        return single
    a, b, c, d, e, f, g, h, i, j, l, m, n, o = _taylor(np.float64, 14)  # noqa: E741 - k is the exponent
    low, high, per_ln2 = -708.0, 709.0, 1 / math.log(2)
    ln2_high, ln2_low, magic = 0.6931471803691238, 1.9082149292705877e-10, 1.5 * 2.0**52
    offset = int(np.float64(magic).view(np.int64)) - 1023

    def double(z):
        inside = low if z < low else (high if z > high else z)
        shifted = fused(inside, per_ln2, magic)
        k = shifted - magic
        r = fused(k, -ln2_low, fused(k, -ln2_high, inside))
        upper = fused(fused(fused(fused(fused(fused(fused(a, r, b), r, c), r, d), r, e), r, f), r, g), r, h)
        series = fused(fused(fused(fused(fused(fused(upper, r, i), r, j), r, l), r, m), r, n), r, o)
        return series * from_bits((bits(shifted) - offset) << 52)

    return double


@inlined
def _logistic(z):
    return like(z, 1.0) / (like(z, 1.0) + exponential(-z))


# --- act(z) -----------------------------------------------------------------------------------------------------------


@inlined
def _identity(z, slope):
    return z


@inlined
def _relu(z, slope):
    return like(z, 0.0) if z <= like(z, 0.0) else z


@inlined
def _relu6(z, slope):
    return like(z, 0.0) if z <= like(z, 0.0) else (like(z, 6.0) if z >= like(z, 6.0) else z)


@inlined
def _leaky_relu(z, slope):
    return z if z > like(z, 0.0) else z * slope


@inlined
def _silu(z, slope):
    return z * _logistic(z)


@inlined
def _hardswish(z, slope):
    three = like(z, 3.0)
    return like(z, 0.0) if z <= -three else (z if z >= three else z * (z + three) * like(z, 1 / 6))


@inlined
def _sigmoid(z, slope):
    return _logistic(z)


@inlined
def _tanh(z, slope):
    return like(z, 2.0) * _logistic(z + z) - like(z, 1.0)


@inlined
def _elu(z, slope):
    return z if z > like(z, 0.0) else exponential(z) - like(z, 1.0)


# --- g·act'(z), by z --------------------------------------------------------------------------------------------------


@inlined
def _identity_gradient(g, z, slope):
    return g


@inlined
def _relu_gradient(g, z, slope):
    return like(z, 0.0) if z <= like(z, 0.0) else g


@inlined
def _relu6_gradient(g, z, slope):
    return like(z, 0.0) if (z <= like(z, 0.0)) | (z >= like(z, 6.0)) else g


@inlined
def _leaky_relu_gradient(g, z, slope):
    return g if z > like(z, 0.0) else g * slope


@inlined
def _silu_gradient(g, z, slope):
    s = _logistic(z)
    return g * (s * fused(z, like(z, 1.0) - s, like(z, 1.0)))


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


@inlined
def _elu_gradient(g, z, slope):
    return g if z > like(z, 0.0) else g * exponential(z)


# --- g·act'(z), by y = act(z) -----------------------------------------------------------------------------------------


@inlined
def _relu_gradient_by_y(g, y, slope):
    return like(y, 0.0) if y <= like(y, 0.0) else g


@inlined
def _sigmoid_gradient_by_y(g, y, slope):
    return g * (y * (like(y, 1.0) - y))


@inlined
def _tanh_gradient_by_y(g, y, slope):
    return g * fused(-y, y, like(y, 1.0))


VALUES = {None: _identity}
GRADIENTS = {None: _identity_gradient}
GRADIENTS_BY_Y = {}
for _act, _row in ACTIVATIONS.items():
    if _row.on_cpu:
        VALUES[_act], GRADIENTS[_act] = globals()[f"_{_act}"], globals()[f"_{_act}_gradient"]
        if _row.by_y:
            GRADIENTS_BY_Y[_act] = globals()[f"_{_act}_gradient_by_y"]
