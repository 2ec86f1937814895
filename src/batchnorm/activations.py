"""The table of activations that a layer can fuse, one row each.

A new activation is one row here (its definition, and what PyTorch calls it), its two formulas for the CPU kernels
(`kernels/cpu/_codegen/activations.py`) and its two branches for the GPU kernels
(`kernels/gpu/_triton/activations.py`). Works without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

Act = Literal["relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "sigmoid", "tanh"]
"""The activations by name, for type checkers: the keys of `ACTIVATIONS`."""


@dataclass(frozen=True)
class Activation:
    """One activation: y = act(z).

    Attributes:
        value, derivative: act(z) and act'(z) in float64, of z and the negative slope.
        module: the class in torch.nn.
        functions: PyTorch's functions by their path in torch, the main one first, with the names of the arguments
            after the input.
        backward: PyTorch's operator for g·act', and its arguments after g: "z", "y" and "slope" are placeholders.
        kinks: where the derivative jumps.
        requires: values that settings of PyTorch's module and functions must have.
        slope: the name of the setting that is the negative slope.
    """

    value: Callable[[Array, float], Array]
    derivative: Callable[[Array, float], Array]
    module: str
    functions: Mapping[str, tuple[str, ...]]
    backward: tuple[str | float | bool, ...]
    kinks: tuple[float, ...] = ()
    requires: Mapping[str, object] = field(default_factory=dict)
    slope: str | None = None


def _sigmoid(z: Array) -> Array:
    small = np.exp(-np.abs(z))
    return np.asarray(np.where(z >= 0, 1.0, small) / (1 + small))


def _normal_cdf(z: Array) -> Array:
    return np.asarray(0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(z / math.sqrt(2))))


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(
        value=lambda z, _: np.maximum(z, 0),
        derivative=lambda z, _: np.where(z > 0, 1.0, 0.0),
        module="ReLU",
        functions={"relu": (), "relu_": (), "nn.functional.relu": ("inplace",)},
        backward=("threshold_backward", "y", 0),
        kinks=(0.0,),
    ),
    "relu6": Activation(
        value=lambda z, _: np.clip(z, 0, 6),
        derivative=lambda z, _: np.where((z > 0) & (z < 6), 1.0, 0.0),
        module="ReLU6",
        functions={"nn.functional.relu6": ("inplace",)},
        backward=("hardtanh_backward", "z", 0, 6),
        kinks=(0.0, 6.0),
    ),
    "leaky_relu": Activation(
        value=lambda z, slope: np.where(z > 0, z, slope * z),
        derivative=lambda z, slope: np.where(z > 0, 1.0, slope),
        module="LeakyReLU",
        functions={
            "nn.functional.leaky_relu": ("negative_slope", "inplace"),
            "nn.functional.leaky_relu_": ("negative_slope",),
        },
        backward=("leaky_relu_backward", "z", "slope", False),
        kinks=(0.0,),
        slope="negative_slope",
    ),
    "elu": Activation(
        value=lambda z, _: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
        derivative=lambda z, _: np.where(z > 0, 1.0, np.exp(np.minimum(z, 0))),
        module="ELU",
        functions={"nn.functional.elu": ("alpha", "inplace"), "nn.functional.elu_": ("alpha",)},
        backward=("elu_backward", 1, 1, 1, False, "z"),
        requires={"alpha": 1.0},
    ),
    "gelu": Activation(
        value=lambda z, _: z * _normal_cdf(z),
        derivative=lambda z, _: _normal_cdf(z) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi),
        module="GELU",
        functions={"nn.functional.gelu": ("approximate",)},
        backward=("gelu_backward", "z"),
        requires={"approximate": "none"},
    ),
    "silu": Activation(
        value=lambda z, _: z * _sigmoid(z),
        derivative=lambda z, _: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))),
        module="SiLU",
        functions={"nn.functional.silu": ("inplace",)},
        backward=("silu_backward", "z"),
    ),
    "hardswish": Activation(
        value=lambda z, _: z * np.clip(z + 3, 0, 6) / 6,
        derivative=lambda z, _: np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, z / 3 + 0.5)),
        module="Hardswish",
        functions={"nn.functional.hardswish": ("inplace",)},
        backward=("hardswish_backward", "z"),
        kinks=(-3.0, 3.0),
    ),
    "sigmoid": Activation(
        value=lambda z, _: _sigmoid(z),
        derivative=lambda z, _: _sigmoid(z) * (1 - _sigmoid(z)),
        module="Sigmoid",
        functions={"sigmoid": (), "sigmoid_": (), "nn.functional.sigmoid": ()},
        backward=("sigmoid_backward", "y"),
    ),
    "tanh": Activation(
        value=lambda z, _: np.tanh(z),
        derivative=lambda z, _: 1 - np.tanh(z) ** 2,
        module="Tanh",
        functions={"tanh": (), "tanh_": (), "nn.functional.tanh": ()},
        backward=("tanh_backward", "y"),
    ),
}

BY_Y = frozenset(name for name, row in ACTIVATIONS.items() if "y" in row.backward)
"""The activations whose derivative can be computed from y = act(z), which PyTorch then saves for backward."""


def check_act(act: object) -> None:
    """Raise TypeError or ValueError, with the names, if `act` is not None or the name of an activation."""
    if act is None or (isinstance(act, str) and act in ACTIVATIONS):
        return
    names = ", ".join(repr(name) for name in sorted(ACTIVATIONS))
    if not isinstance(act, str):
        raise TypeError(
            f"act must be None or one of {names}, got {type(act).__name__}: pass the activation by its name"
        )
    raise ValueError(f"unknown act {act!r}: use None or one of {names}")
