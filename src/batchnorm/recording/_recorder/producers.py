"""Which weight produces a layer's input, as autograd tells: the convolution or linear map right below the norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# What stands between a parameter and the operator that uses it, or between that operator and the norm, unit by unit.
_PASSED_THROUGH = frozenset(
    {"ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0"}
)
_PRODUCERS = ("ConvolutionBackward", "AddmmBackward", "MmBackward", "LinearBackward")
_DEPTH = 6
_NARROWEST = torch.float32


class Producer(NamedTuple):
    """The weight below a norm: the model's parameter, its name, and the axis of it that counts the units."""

    weight: nn.Parameter
    name: str
    axis: int

    @torch.no_grad()
    def unit_norms(self) -> Tensor:
        """||w|| of each unit, in float32 at least."""
        weight = self.weight.detach()
        others = [axis for axis in range(weight.dim()) if axis != self.axis]
        norms: Tensor = torch.linalg.vector_norm(
            weight, dim=others, dtype=torch.promote_types(weight.dtype, _NARROWEST)
        )
        return norms


def producer(x: Tensor, units: int, parameters: Mapping[int, str]) -> Producer | None:
    """What made x (N, units, *), where that is one operator with one of the parameters (names by id); else None."""
    node = _through(x.grad_fn)
    if node is None or not node.name().startswith(_PRODUCERS):
        return None
    found = []
    for above, _ in node.next_functions:
        leaf = _through(above)
        variable = getattr(leaf, "variable", None)
        if variable is not None and id(variable) in parameters and variable.dim() >= 2:
            found.append(variable)
    axis = 1 if getattr(node, "_saved_transposed", False) else 0
    if len(found) != 1 or found[0].shape[axis] != units:  # a grouped transposed convolution counts units otherwise
        return None
    return Producer(found[0], parameters[id(found[0])], axis)


def _through(node: Any) -> Any:
    """Past what only copies or turns a tensor."""
    for _ in range(_DEPTH):
        if node is None or node.name() not in _PASSED_THROUGH:
            return node
        node = node.next_functions[0][0]
    return node
