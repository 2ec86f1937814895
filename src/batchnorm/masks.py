"""Masks and lengths: select the valid positions of a batch as rows of a matrix, and scatter rows back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def valid_positions(x: Tensor, mask: Tensor | None, lengths: Tensor | Sequence[int] | None) -> Tensor:
    """The valid positions (N, *spatial) of x (N, C, *spatial), as a tensor of bool on x's device.

    Raises ValueError if both or neither are counts, or they do not fit x; TypeError if a mask is not of type bool.
    """
    if (mask is None) is (lengths is None):
        raise ValueError("pass mask or lengths, not both")
    positions = (x.shape[0], *x.shape[2:])
    if lengths is not None:
        return _from_lengths(x, lengths).expand(positions)
    assert mask is not None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a tensor of bool, True at valid positions, got {kind}: use mask.bool()")
    if tuple(mask.shape) != positions:
        raise ValueError(f"mask must have the input's shape without channels, {positions}, got {tuple(mask.shape)}")
    return mask.to(x.device)


def take(x: Tensor, positions: Tensor) -> Tensor:
    """The rows (M, C) of x (N, C, *spatial) at M positions."""
    return x.movedim(1, -1)[positions]


def scatter(rows: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    """The rows (M, C) at their positions in a tensor of x's shape and memory format, 0 elsewhere."""
    y = rows.new_zeros(x.shape).to(memory_format=torch.preserve_format)
    filled = torch.index_put(y.movedim(1, -1), torch.nonzero(positions, as_tuple=True), rows)
    return filled.movedim(-1, 1)


def _from_lengths(x: Tensor, lengths: Tensor | Sequence[int]) -> Tensor:
    if x.dim() < 3:
        raise ValueError(f"lengths need an input (N, C, L), got {x.dim()}D: use mask")
    counts = torch.as_tensor(lengths)
    if counts.dtype.is_floating_point or counts.dtype == torch.bool or tuple(counts.shape) != (x.shape[0],):
        raise ValueError(
            f"lengths must be {x.shape[0]} whole numbers, got {counts.dtype} of shape {tuple(counts.shape)}"
        )
    # Checked on the CPU only, to avoid a synchronization; elsewhere lengths out of range are clipped.
    if counts.device.type == "cpu" and bool(((counts < 0) | (counts > x.shape[-1])).any()):
        raise ValueError(f"lengths must lie between 0 and {x.shape[-1]}, got {counts.tolist()}")
    inside = torch.arange(x.shape[-1], device=x.device) < counts.to(x.device)[:, None]
    return inside.view(x.shape[0], *[1] * (x.dim() - 3), x.shape[-1])
