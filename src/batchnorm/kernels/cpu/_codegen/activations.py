"""act(z) and g = grad_y·act'(z) for the compiled CPU loops.

They are compiled without fast-math. So forward and backward compute the same z, and NaN stays NaN.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

from batchnorm.kernels.cpu._codegen.values import F64, Value, scalar_of

Activation: TypeAlias = Callable[[Value, Value], Value]
"""act(z, slope)."""

Gradient: TypeAlias = Callable[[Value, Value, Value], Value]
"""g = grad_y·act'(z): gradient(grad_y, z, slope), or gradient(grad_y, y, slope) in `GRADIENTS_BY_Y`."""


def _is_wide(z: Value) -> bool:
    return bool(scalar_of(z.kind) == F64)


def _polynomial(x: Value, coefficients: Sequence[float]) -> Value:
    """The polynomial with these coefficients, from the highest power down, by Horner's rule."""
    total = x.constant(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total.fma(x, coefficient)
    return total


def _taylor(terms: int) -> list[float]:
    return [1 / math.factorial(k) for k in reversed(range(terms))]


def exponential(z: Value) -> Value:
    """exp(z), accurate to about one unit in the last place; z is clamped so that the result is a normal number.

    exp(z) = 2^k·exp(r) with k = round(z/ln 2), and exp(r), |r| <= ln 2/2, by its Taylor series. Adding
    1.5·2^(mantissa bits) rounds to an integer and leaves it in the lowest bits.
    """
    if _is_wide(z):
        low, high, ln2_high, ln2_low, magic = -708.0, 709.0, 0.6931471803691238, 1.9082149292705877e-10, 1.5 * 2.0**52
        (bits,), mantissa, bias, terms = struct.unpack("<q", struct.pack("<d", magic)), 52, 1023, 14
    else:
        low, high, ln2_high, ln2_low, magic = -87.3, 88.3, 0.693359375, -2.1219444e-4, 1.5 * 2**23
        (bits,), mantissa, bias, terms = struct.unpack("<i", struct.pack("<f", magic)), 23, 127, 8
    clamped = (z < low).select(low, (z > high).select(high, z))
    shifted = clamped.fma(1 / math.log(2), magic)
    k = shifted - magic
    r = k.fma(-ln2_low, k.fma(-ln2_high, clamped))
    return _polynomial(r, _taylor(terms)) * ((shifted.bits() - (bits - bias)) << mantissa).from_bits()


def _logistic(z: Value) -> Value:
    return 1.0 / (exponential(-z) + 1.0)


_TAIL = 0.2316419
# The normal distribution's tail at -a is exp(-a²/2)·t·Q(2t - 1), t = 1/(1 + _TAIL·a), a form of Abramowitz and Stegun's
# 26.2.17. Q interpolates at Chebyshev's nodes, in 60 digits; its relative error is 1.2e-8, and 2.8e-16 with 23 terms.
_Q = (
    0.17618522326726566, 0.14579014793072656, 0.09869414063214352, 0.05314007643171861, 0.021351989950344857,
    0.005328412081542791, 8.433294065079557e-05, -0.000497440671458355, -0.00012861463797326852, 3.5430205744862185e-05,
    2.1698796343148367e-05, -2.798774359587923e-06, -3.3637028711107885e-06, 3.661926456886001e-07,
    5.442878338318238e-07, -8.573144714554493e-08, -8.991902349747767e-08, 2.2552790124307322e-08,
    1.3891540432790967e-08, -4.638805288550537e-09, -1.7166156087092373e-09, 5.09641445080501e-10,
    1.2162156916255845e-10,
)  # fmt: skip
_Q_SINGLE = (
    0.17618522326726566, 0.14579012553719925, 0.09869411680679326, 0.053140526574689664, 0.02135247025071654,
    0.005325858101116565, 8.1587998776909e-05, -0.0004914441477199618, -0.00012207768011506052, 2.9061884882426693e-05,
    1.4555138372190237e-05,
)  # fmt: skip


def _normal(z: Value) -> tuple[Value, Value]:
    """The standard normal distribution function at z, and exp(-z²/2)."""
    density = exponential(z * z * -0.5)
    t = 1.0 / z.abs().fma(_TAIL, 1.0)
    tail = density * t * _polynomial(t + t - 1.0, (_Q if _is_wide(z) else _Q_SINGLE)[::-1])
    return (z < 0.0).select(tail, 1.0 - tail), density


def _gelu(z: Value, slope: Value) -> Value:
    return z * _normal(z)[0]


def _gelu_gradient(g: Value, z: Value, slope: Value) -> Value:
    distribution, density = _normal(z)
    return g * (z * density).fma(1 / math.sqrt(2 * math.pi), distribution)


def _silu_gradient(g: Value, z: Value, slope: Value) -> Value:
    s = _logistic(z)
    return g * (s * z.fma(1.0 - s, 1.0))


def _hardswish(z: Value, slope: Value) -> Value:
    return (z <= -3.0).select(0.0, (z >= 3.0).select(z, z * (z + 3.0) * (1 / 6)))


def _hardswish_gradient(g: Value, z: Value, slope: Value) -> Value:
    return (z <= -3.0).select(0.0, (z >= 3.0).select(g, g * (z * (1 / 3) + 0.5)))


def _sigmoid_gradient(g: Value, z: Value, slope: Value) -> Value:
    s = _logistic(z)
    return g * (s * (1.0 - s))


def _tanh_gradient(g: Value, z: Value, slope: Value) -> Value:
    s = _logistic(z + z)
    return g * (4.0 * s * (1.0 - s))


VALUES: dict[str | None, Activation] = {
    None: lambda z, slope: z,
    "relu": lambda z, slope: (z <= 0.0).select(0.0, z),
    "relu6": lambda z, slope: (z <= 0.0).select(0.0, (z >= 6.0).select(6.0, z)),
    "leaky_relu": lambda z, slope: (z > 0.0).select(z, z * slope),
    "elu": lambda z, slope: (z > 0.0).select(z, exponential(z) - 1.0),
    "gelu": _gelu,
    "silu": lambda z, slope: z * _logistic(z),
    "hardswish": _hardswish,
    "sigmoid": lambda z, slope: _logistic(z),
    "tanh": lambda z, slope: 2.0 * _logistic(z + z) - 1.0,
}
"""act(z) by the name of the activation."""

GRADIENTS: dict[str | None, Gradient] = {
    None: lambda g, z, slope: g,
    "relu": lambda g, z, slope: (z <= 0.0).select(0.0, g),
    "relu6": lambda g, z, slope: ((z <= 0.0) | (z >= 6.0)).select(0.0, g),
    "leaky_relu": lambda g, z, slope: (z > 0.0).select(g, g * slope),
    "elu": lambda g, z, slope: (z > 0.0).select(g, g * exponential(z)),
    "gelu": _gelu_gradient,
    "silu": _silu_gradient,
    "hardswish": _hardswish_gradient,
    "sigmoid": _sigmoid_gradient,
    "tanh": _tanh_gradient,
}
"""g·act'(z) from z, g being grad_y."""

GRADIENTS_BY_Y: dict[str | None, Gradient] = {
    "relu": lambda g, y, slope: (y <= 0.0).select(0.0, g),
    "sigmoid": lambda g, y, slope: g * (y * (1.0 - y)),
    "tanh": lambda g, y, slope: g * (-y).fma(y, 1.0),
}
"""g·act'(z) from y = act(z), g being grad_y."""
