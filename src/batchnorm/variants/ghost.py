"""GhostBatchNorm: split a large batch into virtual batches and normalize each by its own statistics.

Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import layers as ours
from batchnorm.kernels.contract import Call
from batchnorm.layers import _BatchNorm
from batchnorm.running_stats import copied, move

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d"]


class _GhostBatchNorm(_BatchNorm):
    """Base of the layers, for any number of dimensions."""

    def __init__(self, num_features: int, virtual_batch_size: int, *arguments: Any, **options: Any) -> None:
        if isinstance(virtual_batch_size, bool) or not isinstance(virtual_batch_size, int) or virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size must be a whole number of samples, got {virtual_batch_size!r}")
        super().__init__(num_features, *arguments, **options)
        self.virtual_batch_size = virtual_batch_size

    def _transform(self, call: Call) -> Tensor:
        x, running, epilogue = call.x, call.running, call.epilogue
        ghosts = max(x.shape[0] // self.virtual_batch_size, 1)
        if not (call.training and self.training) or ghosts == 1:
            return super()._transform(call)
        residual = epilogue.residual
        residuals = [None] * ghosts if residual is None else residual.tensor_split(ghosts)
        outputs: list[Tensor] = []
        statistics: list[tuple[float, Any]] = []
        for part, part_residual in zip(x.tensor_split(ghosts), residuals, strict=True):
            batch = copied(running)
            fused = epilogue._replace(residual=part_residual)
            outputs.append(super()._transform(call._replace(x=part, running=batch, momentum=1.0, epilogue=fused)))
            statistics.append((part.shape[0] / x.shape[0], batch))
        for index, average in enumerate(running):
            if average is not None:
                wide = torch.promote_types(average.dtype, torch.float32)
                mean: Any = sum(batch[index].to(wide) * share for share, batch in statistics)
                move(average, mean, call.momentum)
        return torch.cat(outputs)

    def _masked(self, *_: object) -> Tensor:
        raise TypeError(
            f"{type(self).__name__} takes no mask and no lengths: virtual batches of padded samples would have "
            "different numbers of values; use BatchNorm"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "accumulate" and value != 1:
            raise ValueError(
                f"{type(self).__name__} takes no accumulate: it normalizes less than a batch on purpose; "
                "use BatchNorm for accumulated batches"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


@ours.with_all_arguments
class GhostBatchNorm1d(_GhostBatchNorm, ours.BatchNorm1d):
    """`BatchNorm1d` that normalizes each virtual batch, a part of the batch, by its own statistics.

    In training, the N samples of a batch are divided into N // virtual_batch_size virtual batches of consecutive
    samples, of nearly equal size, so the order of the samples matters. The running statistics are updated once per
    batch, by the average of the virtual batches' means and unbiased variances, weighted by size. With one virtual
    batch, and in eval mode, the layer equals `BatchNorm1d`. Each loads the other's checkpoints.

    Input: (N, C) or (N, C, L).

    Args:
        num_features: C, the number of channels.
        virtual_batch_size: number of samples; a batch smaller than twice this number is one virtual batch.
        arguments, options: those of `BatchNorm1d`, by position or by name:
            THE ARGUMENTS OF BATCHNORM1D

    Raises the errors of torch.nn.BatchNorm1d on the same input.

    Hoffer et al. 2017, Algorithm 1, which updates the running statistics once per virtual batch.
    """


@ours.documented_as(GhostBatchNorm1d, *ours.TO_2D)
class GhostBatchNorm2d(_GhostBatchNorm, ours.BatchNorm2d):
    """`GhostBatchNorm1d` over (N, C, H, W)."""


@ours.documented_as(GhostBatchNorm1d, *ours.TO_3D)
class GhostBatchNorm3d(_GhostBatchNorm, ours.BatchNorm3d):
    """`GhostBatchNorm1d` over (N, C, D, H, W)."""
