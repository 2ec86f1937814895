"""act(z) and g = grad_y·act'(z) in Triton, on tiles of float32. NaN stays NaN."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    """1/(1 + exp(-z)). For large -z the exponential overflows to infinity, and the result is 0."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def normal_cdf(z):
    """Phi(z), the cumulative distribution function of the normal distribution."""
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
def gradient(grad_y, z, slope, ACT: tl.constexpr):
    """g = grad_y·act'(z) from z."""
    if ACT == "relu":
        g = tl.where(z <= 0.0, 0.0, grad_y)
    elif ACT == "relu6":
        g = tl.where((z <= 0.0) | (z >= 6.0), 0.0, grad_y)
    elif ACT == "leaky_relu":
        g = tl.where(z > 0.0, grad_y, grad_y * slope)
    elif ACT == "elu":
        g = tl.where(z > 0.0, grad_y, grad_y * tl.exp(z))
    elif ACT == "gelu":
        g = grad_y * (normal_cdf(z) + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327))
    elif ACT == "silu":
        s = sigmoid(z)
        g = grad_y * (s * (1.0 + z * (1.0 - s)))
    elif ACT == "hardswish":
        g = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, grad_y, grad_y * (z * (1.0 / 3.0) + 0.5)))
    elif ACT == "sigmoid":
        s = sigmoid(z)
        g = grad_y * (s * (1.0 - s))
    elif ACT == "tanh":
        s = sigmoid(z + z)
        g = grad_y * (4.0 * s * (1.0 - s))
    else:
        tl.static_assert(ACT == "", "unknown activation")
        g = grad_y
    return g


@triton.jit
def gradient_by_y(grad_y, y, ACT: tl.constexpr):
    """g = grad_y·act'(z) from y = act(z)."""
    if ACT == "relu":
        g = tl.where(y <= 0.0, 0.0, grad_y)
    elif ACT == "sigmoid":
        g = grad_y * (y * (1.0 - y))
    else:
        tl.static_assert(ACT == "tanh", "this derivative does not follow from y")
        g = grad_y * (1.0 - y * y)
    return g
