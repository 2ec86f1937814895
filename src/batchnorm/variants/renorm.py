"""BatchRenorm: training agrees with inference, for small batches and batches not drawn at random.

Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm import layers as ours
from batchnorm.kernels.aten import ATEN
from batchnorm.kernels.contract import Call
from batchnorm.layers import _BatchNorm
from batchnorm.running_stats import is_recomputing

__all__ = ["BatchRenorm1d", "BatchRenorm2d", "BatchRenorm3d"]

# The paper's schedule for Inception-v3 (section 3): (first, last) step of the linear growth of the limits from 1 and 0.
RMAX_STEPS = (5_000, 40_000)
DMAX_STEPS = (5_000, 25_000)


class _BatchRenorm(_BatchNorm):
    """Base of the layers, for any number of dimensions."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        rmax: float = 3.0,
        dmax: float = 5.0,
        rmax_steps: tuple[int, int] = RMAX_STEPS,
        dmax_steps: tuple[int, int] = DMAX_STEPS,
        **options: Any,
    ) -> None:
        if rmax < 1 or dmax < 0:
            raise ValueError(f"rmax must be at least 1 and dmax at least 0, got {rmax} and {dmax}")
        for name, (first, last) in (("rmax_steps", rmax_steps), ("dmax_steps", dmax_steps)):
            if not 0 <= first <= last:
                raise ValueError(f"{name} must be (first, last) with 0 <= first <= last, got ({first}, {last})")
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, **options)
        self.rmax, self.dmax, self.rmax_steps, self.dmax_steps = rmax, dmax, rmax_steps, dmax_steps

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return the limits of r and d at step num_batches_tracked, as tensors on its device."""
        assert self.num_batches_tracked is not None
        step = self.num_batches_tracked.to(torch.float64)
        return _ramp(step, 1.0, self.rmax, self.rmax_steps), _ramp(step, 0.0, self.dmax, self.dmax_steps)

    @torch.no_grad()
    def correction(self, x: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
        """Return r = sigma_B/sigma and d = (mean_B - mean)/sigma, clipped, as constants in float64.

        Args:
            x: the layer's input.
            running_mean, running_var: (C,), before this batch.
        """
        correct = _as_operator if torch.compiler.is_compiling() else _correction
        return correct(x.detach(), running_mean, running_var, *self.limits(), self.__dict__["eps"])

    def _transform(self, call: Call) -> Tensor:
        """gamma·(xhat·r + d) + beta is a batch norm with gamma·r and beta + gamma·d."""
        mean, var = call.running
        if not call.training or mean is None or var is None:
            return super()._transform(call)
        if is_recomputing():
            raise RuntimeError(
                "BatchRenorm cannot be run again in backward (activation checkpointing): the running statistics that "
                "its correction uses have changed since; leave it outside of the checkpointed function"
            )
        r, d = (vector.to(mean.dtype) for vector in self.correction(call.x, mean, var))
        gamma = r if self.weight is None else self.weight * r
        shift = d if self.weight is None else self.weight * d
        beta = shift if self.bias is None else self.bias + shift
        return super()._transform(call._replace(epilogue=call.epilogue._replace(gamma=gamma, beta=beta)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rmax={self.rmax}, dmax={self.dmax}"


class BatchRenorm1d(_BatchRenorm, ours.BatchNorm1d):
    """Batch renormalization: the batch's statistics, corrected towards the running ones that inference uses.

    y = act(gamma·(xhat·r + d) + beta [+ residual]) over (N, C) or (N, C, L), per channel, with
    xhat = (x - mean_B)/sigma_B, r = sigma_B/sigma and d = (mean_B - mean)/sigma.

    mean_B and sigma_B are the batch's mean and standard deviation; mean and sigma = sqrt(running_var + eps) are the
    running ones before this batch. No gradient flows through r and d. Without clipping, training would normalize
    exactly as inference does. r is clipped to [1/rmax, rmax] and d to [-dmax, dmax]. These limits begin at 1 and 0,
    which is batch normalization, and grow with the steps.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: the weight of the new batch in the running statistics. The paper uses 0.01.
        affine: learn gamma (`weight`, starts at 1) and beta (`bias`, starts at 0).
        device, dtype: of parameters and buffers.
        rmax, dmax: the limits of r and d at the end of their growth. rmax = 1 and dmax = 0 is batch normalization.
        rmax_steps, dmax_steps: (first, last) step of the linear growth; by default the paper's, for a long training.
        options: bias, act and negative_slope, as of `BatchNorm1d`.

    This layer and `BatchNorm1d` load each other's checkpoints.

    Raises the errors of torch.nn.BatchNorm1d on the same input; ValueError for invalid limits and steps; RuntimeError
    if backward runs a forward again (activation checkpointing).

    Ioffe 2017, Algorithm 1.
    """


@ours.documented_as(BatchRenorm1d, *ours.TO_2D)
class BatchRenorm2d(_BatchRenorm, ours.BatchNorm2d):
    """`BatchRenorm1d` over (N, C, H, W)."""


@ours.documented_as(BatchRenorm1d, *ours.TO_3D)
class BatchRenorm3d(_BatchRenorm, ours.BatchNorm3d):
    """`BatchRenorm1d` over (N, C, D, H, W)."""


def _correction(
    x: Tensor, running_mean: Tensor, running_var: Tensor, rmax: Tensor, dmax: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    kernel = kernels.choose(x, tapped=True).kernel if x.numel() else ATEN
    moments = kernels.or_aten(kernel, lambda by: by.statistics(x))
    sigma = (running_var.double() + eps).sqrt()
    r = ((moments.var.double() + eps).sqrt() / sigma).clamp(1 / rmax, rmax)
    d = ((moments.mean.double() - running_mean.double()) / sigma).clamp(-dmax, dmax)
    return r, d


# A custom operator: torch.compile may recompute r and d in backward, from running statistics that have changed since.
_as_operator = torch.library.custom_op("batchnorm::renorm_correction", _correction, mutates_args=())


@_as_operator.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1], dtype=torch.float64), x.new_empty(x.shape[1], dtype=torch.float64)


def _ramp(step: Tensor, start: float, end: float, steps: tuple[int, int]) -> Tensor:
    first, last = steps
    share = (step - first) / (last - first) if last > first else (step >= last).to(step.dtype)
    return start + (end - start) * share.clamp(0, 1)
