"""GhostBatchNorm: a large batch normalized in virtual batches, each by its own statistics.

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
    """The layer of any dimensions."""

    def __init__(self, num_features: int, virtual_batch_size: int, *arguments: Any, **options: Any) -> None:
        if isinstance(virtual_batch_size, bool) or not isinstance(virtual_batch_size, int) or virtual_batch_size < 1:
            raise ValueError(f"virtual_batch_size must be a whole number of samples, got {virtual_batch_size!r}")
        super().__init__(num_features, *arguments, **options)
        self.virtual_batch_size = virtual_batch_size

    def _normalized(self, call: Call) -> Tensor:
        x, running, epilogue = call.x, call.running, call.epilogue
        ghosts = max(x.shape[0] // self.virtual_batch_size, 1)
        if not (call.training and self.training) or ghosts == 1:
            return super()._normalized(call)
        residual = epilogue.residual
        added = [None] * ghosts if residual is None else residual.tensor_split(ghosts)
        outputs: list[Tensor] = []
        seen: list[tuple[float, Any]] = []
        for part, of_part in zip(x.tensor_split(ghosts), added, strict=True):
            own = copied(running)
            of_its_own = epilogue._replace(residual=of_part)
            outputs.append(super()._normalized(call._replace(x=part, running=own, momentum=1.0, epilogue=of_its_own)))
            seen.append((part.shape[0] / x.shape[0], own))
        for at, average in enumerate(running):
            if average is not None:
                wide = torch.promote_types(average.dtype, torch.float32)
                batch: Any = sum(own[at].to(wide) * share for share, own in seen)
                move(average, batch, call.momentum)
        return torch.cat(outputs)

    def _masked(self, *_: object) -> Tensor:
        raise TypeError(
            f"{type(self).__name__} takes no mask and no lengths: virtual batches of padded samples would have "
            "different numbers of values; use BatchNorm"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "accumulate" and value != 1:
            raise ValueError(
                f"{type(self).__name__} takes no accumulate: it exists to normalize less than a batch together; "
                "use BatchNorm for accumulated batches"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


@ours.with_all_arguments
class GhostBatchNorm1d(_GhostBatchNorm, ours.BatchNorm1d):
    """`BatchNorm1d` that normalizes each virtual batch, a part of the batch, by its own statistics.

    In training, the N samples of a batch are divided into N // virtual_batch_size virtual batches of consecutive
    samples, as equal in size as possible. So the order of the samples in the batch counts. The running statistics move
    once a batch, by the mean over the virtual batches of their means and unbiased variances, each weighted by its size.
    With one virtual batch, and in eval mode, the layer is `BatchNorm1d`. Either loads the other's checkpoints.

    Input: (N, C) or (N, C, L).

    Args:
        num_features: C, the number of channels.
        virtual_batch_size: in samples; a batch of fewer than two times as many is one virtual batch.
        arguments, options: the others of `BatchNorm1d`, by place or by name:
            THE ARGUMENTS OF BATCHNORM1D

    Raises what torch.nn.BatchNorm1d raises on the same input.

    Hoffer et al. 2017, Algorithm 1, which moves the running statistics once for each virtual batch.
    """


@ours.documented_as(GhostBatchNorm1d, *ours.TO_2D)
class GhostBatchNorm2d(_GhostBatchNorm, ours.BatchNorm2d):
    """`GhostBatchNorm1d` over (N, C, H, W)."""


@ours.documented_as(GhostBatchNorm1d, *ours.TO_3D)
class GhostBatchNorm3d(_GhostBatchNorm, ours.BatchNorm3d):
    """`GhostBatchNorm1d` over (N, C, D, H, W)."""
