"""GhostBatchNorm: a large batch normalized in virtual batches, each by its own statistics.

Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import layers as ours
from batchnorm.functional import transform
from batchnorm.kernels.contract import Epilogue, Merge
from batchnorm.layers import _BatchNorm

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]


class _GhostBatchNorm(_BatchNorm):
    """The layer of any dimensions."""

    def __init__(self, num_features: int, virtual_batch_size: int, *arguments: Any, **options: Any) -> None:
        if isinstance(virtual_batch_size, bool) or not isinstance(virtual_batch_size, int) or virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size must be a whole number of samples, got {virtual_batch_size!r}")
        super().__init__(num_features, *arguments, **options)
        self.virtual_batch_size = virtual_batch_size

    def _normalized(
        self,
        input: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        by_batch: bool,
        momentum: float | Tensor,
        residual: Tensor | None,
        act: str | None,
        slope: float,
        merge: Merge | None,
    ) -> Tensor:
        ghosts = max(input.shape[0] // self.virtual_batch_size, 1)
        if not (by_batch and self.training) or ghosts == 1:
            return super()._normalized(input, running, by_batch, momentum, residual, act, slope, merge)
        parts = input.tensor_split(ghosts)
        added = [None] * ghosts if residual is None else residual.tensor_split(ghosts)
        outputs, seen = [], []
        for part, of_part in zip(parts, added, strict=True):
            own = tuple(None if each is None else each.clone() for each in running)
            epilogue = Epilogue(self.weight, self.bias, of_part, act, slope)
            outputs.append(transform(part, *own, True, 1.0, self.__dict__["eps"], epilogue))
            seen.append(own)
        self._move(running, seen, [part.shape[0] for part in parts], momentum)
        return torch.cat(outputs)

    @torch.no_grad()
    def _move(
        self,
        running: tuple[Tensor | None, Tensor | None],
        seen: list[tuple[Tensor | None, ...]],
        sizes: list[int],
        momentum: float | Tensor,
    ) -> None:
        """running ← (1 - momentum)·running + momentum·(the virtual batches' mean, each by its size)."""
        for average, values in zip(running, zip(*seen, strict=True), strict=True):
            if average is not None:
                wide = torch.promote_types(average.dtype, torch.float32)
                batch = sum(value.to(wide) * (size / sum(sizes)) for value, size in zip(values, sizes, strict=True))
                average.copy_(average.to(wide) + (batch - average.to(wide)) * momentum)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


class GhostBatchNorm1d(_GhostBatchNorm, ours.BatchNorm1d):
    """`BatchNorm1d` over each of N // virtual_batch_size virtual batches, as even as they go; the batch's order counts.

    The running statistics move once a batch, by the mean over the virtual batches of their means and unbiased
    variances, each by its size. One virtual batch is batch normalization. In eval mode it is `BatchNorm1d`.

    Args:
        num_features: C.
        virtual_batch_size: samples; a batch of fewer than two times as many is one virtual batch.
        and those of `BatchNorm1d`, whose checkpoints it loads and which loads its own.

    Hoffer et al. 2017, Algorithm 1, which moves the running statistics a virtual batch at a time.
    """


class GhostBatchNorm2d(_GhostBatchNorm, ours.BatchNorm2d):
    """`GhostBatchNorm1d` over (N, C, H, W)."""


class GhostBatchNorm3d(_GhostBatchNorm, ours.BatchNorm3d):
    """`GhostBatchNorm1d` over (N, C, D, H, W)."""
