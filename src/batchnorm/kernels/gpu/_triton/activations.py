"""act(z) and g·act'(z) in Triton, on tiles of float32. NaN stays NaN."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    """1/(1 + exp(-z)): for large -z the exponential is infinite and the quotient 0."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def normal_cdf(z):
    """The normal distribution's Phi(z) by erf."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def value(z, slope, ACT: tl.constexpr):
    """act(z); ACT is the activation's name, empty for none."""
    if ACT == "relu":
        y = tl.where(z <= 0.0, 0.0, z)
    elif ACT == "relu6":
        y = tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))
    elif ACT == "leaky_relu":
        y = tl.where(z > 0.0, z, z * slope)
    elif ACT == "elu":
        y = tl.where(z > 0.0, z, tl.exp(z) - 1.0)
    elif ACT == "gelu":
        y = z * normal_cdf(z)
    elif ACT == "silu":
        y = z * sigmoid(z)
    elif ACT == "hardswish":
        y = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, z, z * (z + 3.0) * (1.0 / 6.0)))
    elif ACT == "sigmoid":
        y = sigmoid(z)
    elif ACT == "tanh":
        y = 2.0 * sigmoid(z + z) - 1.0
    else:
        tl.static_assert(ACT == "", "unknown activation")
        y = z
    return y


@triton.jit
def gradient(g, z, slope, ACT: tl.constexpr):
    """g·act'(z), by z."""
    if ACT == "relu":
        below = tl.where(z <= 0.0, 0.0, g)
    elif ACT == "relu6":
        below = tl.where((z <= 0.0) | (z >= 6.0), 0.0, g)
    elif ACT == "leaky_relu":
        below = tl.where(z > 0.0, g, g * slope)
    elif ACT == "elu":
        below = tl.where(z > 0.0, g, g * tl.exp(z))
    elif ACT == "gelu":
        below = g * (normal_cdf(z) + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327))
    elif ACT == "silu":
        s = sigmoid(z)
        below = g * (s * (1.0 + z * (1.0 - s)))
    elif ACT == "hardswish":
        below = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, g, g * (z * (1.0 / 3.0) + 0.5)))
    elif ACT == "sigmoid":
        s = sigmoid(z)
        below = g * (s * (1.0 - s))
    elif ACT == "tanh":
        s = sigmoid(z + z)
        below = g * (4.0 * s * (1.0 - s))
    else:
        tl.static_assert(ACT == "", "unknown activation")
        below = g
    return below


@triton.jit
def gradient_by_y(g, y, ACT: tl.constexpr):
    """g·act'(z), by y = act(z)."""
    if ACT == "relu":
        below = tl.where(y <= 0.0, 0.0, g)
    elif ACT == "sigmoid":
        below = g * (y * (1.0 - y))
    else:
        tl.static_assert(ACT == "tanh", "no derivative by y")
        below = g * (1.0 - y * y)
    return below
