"""Which positions of a batch count: padded sequences and masked pixels as rows of a matrix, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def valid(x: Tensor, mask: Tensor | None, lengths: Tensor | Sequence[int] | None) -> Tensor:
    """The positions (N, *spatial) of x (N, C, *spatial) that count, as a tensor of bool on x's device.

    Raises ValueError where both or none are given, or they do not fit x; TypeError where a mask is not of type bool.
    """
    if (mask is None) is (lengths is None):
        raise ValueError("give mask or lengths, not both")
    positions = (x.shape[0], *x.shape[2:])
    if lengths is not None:
        return _from_lengths(x, lengths).expand(positions)
    assert mask is not None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a tensor of bool, True where a position counts, got {kind}: use mask.bool()")
    if tuple(mask.shape) != positions:
        raise ValueError(f"mask must have the input's shape without channels, {positions}, got {tuple(mask.shape)}")
    return mask.to(x.device)


def taken(x: Tensor, positions: Tensor) -> Tensor:
    """The rows (M, C) of x (N, C, *spatial) at M positions."""
    return x.movedim(1, -1)[positions]


def put_back(rows: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    """The rows (M, C) at their positions in a tensor of x's shape and memory format, 0 elsewhere."""
    whole = rows.new_zeros(x.shape).to(memory_format=torch.preserve_format)
    filled = torch.index_put(whole.movedim(1, -1), torch.nonzero(positions, as_tuple=True), rows)
    return filled.movedim(-1, 1)


def _from_lengths(x: Tensor, lengths: Tensor | Sequence[int]) -> Tensor:
    if x.dim() < 3:
        raise ValueError(f"lengths need an input (N, C, L), got {x.dim()}D: use mask")
    given = torch.as_tensor(lengths)
    if given.dtype.is_floating_point or given.dtype == torch.bool or tuple(given.shape) != (x.shape[0],):
        raise ValueError(f"lengths must be {x.shape[0]} whole numbers, got {given.dtype} of shape {tuple(given.shape)}")
    # A device is not asked: there, what lies outside counts as all positions, or as no position.
    if given.device.type == "cpu" and bool(((given < 0) | (given > x.shape[-1])).any()):
        raise ValueError(f"lengths must lie between 0 and {x.shape[-1]}, got {given.tolist()}")
    inside = torch.arange(x.shape[-1], device=x.device) < given.to(x.device)[:, None]
    return inside.view(x.shape[0], *[1] * (x.dim() - 3), x.shape[-1])
