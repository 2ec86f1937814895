"""act(z) and g·act'(z) for the compiled CPU loops: scalar and without a call, so that LLVM vectorizes them.

Compiled without fast-math: what forward passes is what backward passes, and NaN stays NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from batchnorm.kernels.cpu_memory import bits, from_bits, like

_inlined = njit(forceinline=True, error_model="numpy")


def exponential(z):
    """exp(z) to about one last digit; z is clamped to where the result is a normal number.

    exp(z) = 2^k·exp(r) with k = round(z/ln 2), and exp(r), |r| <= ln 2/2, by its Taylor series. Adding
    1.5·2^(mantissa bits) rounds to an integer and leaves it in the lowest bits.
    """
    raise NotImplementedError("compiled code only")


@overload(exponential, jit_options={"forceinline": True, "error_model": "numpy"})
def _exponential(z):
    number: Any
    if z == types.float32:
        number, whole, integer, mantissa, bias, terms = np.float32, np.int32, types.int32, 23, 127, 8
        low, high, ln2_high, ln2_low = number(-87.3), number(88.3), number(0.693359375), number(-2.1219444e-4)
    else:
        number, whole, integer, mantissa, bias, terms = np.float64, np.int64, types.int64, 52, 1023, 14
        low, high, ln2_high, ln2_low = -708.0, 709.0, 0.6931471803691238, 1.9082149292705877e-10
    magic = number(1.5 * 2.0**mantissa)
    per_ln2 = number(1 / math.log(2))
    offset = int(magic.view(whole)) - bias
    first, *rest = (number(1 / math.factorial(k)) for k in reversed(range(terms)))
    coefficients = tuple(rest)

    def implementation(z):
        inside = low if z < low else (high if z > high else z)
        shifted = inside * per_ln2 + magic
        k = shifted - magic
        r = (inside - k * ln2_high) - k * ln2_low
        series = first
        for coefficient in coefficients:
            series = series * r + coefficient
        return series * from_bits(integer((bits(shifted) - integer(offset)) << integer(mantissa)))

    return implementation


@_inlined
def _sigmoid(z):
    return like(z, 1.0) / (like(z, 1.0) + exponential(-z))


# --- act(z) -----------------------------------------------------------------------------------------------------------


@_inlined
def _identity(z, slope):
    return z


@_inlined
def _relu(z, slope):
    return like(z, 0.0) if z <= like(z, 0.0) else z


@_inlined
def _relu6(z, slope):
    return like(z, 0.0) if z <= like(z, 0.0) else (like(z, 6.0) if z >= like(z, 6.0) else z)


@_inlined
def _leaky_relu(z, slope):
    return z if z > like(z, 0.0) else z * slope


@_inlined
def _silu(z, slope):
    return z * _sigmoid(z)


@_inlined
def _hardswish(z, slope):
    three = like(z, 3.0)
    return like(z, 0.0) if z <= -three else (z if z >= three else z * (z + three) * like(z, 1 / 6))


@_inlined
def _logistic(z, slope):
    return _sigmoid(z)


@_inlined
def _tanh(z, slope):
    return like(z, 2.0) * _sigmoid(z + z) - like(z, 1.0)


@_inlined
def _elu(z, slope):
    return z if z > like(z, 0.0) else exponential(z) - like(z, 1.0)


# --- g·act'(z): for relu, relu6 and leaky_relu act(z) may stand for z, since it keeps the side of each kink -----------


@_inlined
def _identity_gradient(g, z, slope):
    return g


@_inlined
def _relu_gradient(g, z, slope):
    return like(z, 0.0) if z <= like(z, 0.0) else g


@_inlined
def _relu6_gradient(g, z, slope):
    return like(z, 0.0) if (z <= like(z, 0.0)) | (z >= like(z, 6.0)) else g


@_inlined
def _leaky_relu_gradient(g, z, slope):
    return g if z > like(z, 0.0) else g * slope


@_inlined
def _silu_gradient(g, z, slope):
    s = _sigmoid(z)
    return g * (s * (like(z, 1.0) + z * (like(z, 1.0) - s)))


@_inlined
def _hardswish_gradient(g, z, slope):
    three = like(z, 3.0)
    return like(z, 0.0) if z <= -three else (g if z >= three else g * (z * like(z, 1 / 3) + like(z, 0.5)))


@_inlined
def _logistic_gradient(g, z, slope):
    s = _sigmoid(z)
    return g * (s * (like(z, 1.0) - s))


@_inlined
def _tanh_gradient(g, z, slope):
    s = _sigmoid(z + z)
    return g * (like(z, 4.0) * s * (like(z, 1.0) - s))


@_inlined
def _elu_gradient(g, z, slope):
    return g if z > like(z, 0.0) else g * exponential(z)


VALUES = {
    None: _identity,
    "relu": _relu,
    "relu6": _relu6,
    "leaky_relu": _leaky_relu,
    "silu": _silu,
    "hardswish": _hardswish,
    "sigmoid": _logistic,
    "tanh": _tanh,
    "elu": _elu,
}
GRADIENTS = {
    None: _identity_gradient,
    "relu": _relu_gradient,
    "relu6": _relu6_gradient,
    "leaky_relu": _leaky_relu_gradient,
    "silu": _silu_gradient,
    "hardswish": _hardswish_gradient,
    "sigmoid": _logistic_gradient,
    "tanh": _tanh_gradient,
    "elu": _elu_gradient,
}
