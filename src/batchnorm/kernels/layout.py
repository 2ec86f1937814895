"""Dense memory layouts of the CPU and GPU kernels; and a kernel whose verbs share one prepared call: the GPU's."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from batchnorm.kernels.contract import Count, Epilogue, Forward, GradSums, InputGrads, Kernel
from batchnorm.moments import Moments
from batchnorm.running_stats import RunningUpdate

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of y and dx, as PyTorch's batch_norm returns them: channels_last if x is, else contiguous."""
    for candidate in (torch.contiguous_format, CHANNELS_LAST.get(x.dim())):
        if candidate is not None and x.is_contiguous(memory_format=candidate):
            return candidate
    return suggest_memory_format(x)  # for strides with gaps; its first call imports for a third of a second


def dense(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """The vector, contiguous and in this type. The check costs a tenth of a conversion that changes nothing."""
    return vector if vector.dtype == dtype and vector.is_contiguous() else vector.to(dtype).contiguous()


def why_not_dense(x: Tensor, types: Collection[torch.dtype], type_names: str, kernels: str) -> str | None:
    """Why `kernels`, which need dense memory and one of these types, cannot run x; None if they can."""
    if x.dtype not in types:
        return f"{kernels} are for {type_names}, not {x.dtype}"
    if x.layout != torch.strided or x.dim() < 2:
        return f"{kernels} are for dense tensors (N, C, *)"
    last = CHANNELS_LAST.get(x.dim())
    if not x.is_contiguous() and (last is None or not x.is_contiguous(memory_format=last)):
        return "the tensor is neither contiguous nor channels_last, and a copy would cost what the kernel saves"
    return None


class PreparedCall:
    """One call of a kernel: x dense, as `slices` × `channels` × `span` values, the span neighbours in memory."""

    def __init__(self, x: Tensor, epilogue: Epilogue) -> None:
        self.format = memory_format(x)
        self.x = x.contiguous(memory_format=self.format)
        self.epilogue = epilogue
        self.channels, span = x.shape[1], math.prod(x.shape[2:])
        self.count = x.shape[0] * span
        is_contiguous = self.format is torch.contiguous_format
        self.slices, self.span = (x.shape[0], span) if is_contiguous else (self.count, 1)

    def like_x(self, tensor: Tensor) -> Tensor:
        """The tensor in x's type and memory format; itself if it already is."""
        if tensor.dtype == self.x.dtype and tensor.is_contiguous(memory_format=self.format):
            return tensor
        return tensor.to(self.x.dtype).contiguous(memory_format=self.format)

    def empty_input_grads(self, grad_y: Tensor, y: Tensor | None) -> InputGrads:
        """Uninitialized dx, and dresidual: uninitialized where y is saved, else grad_y where there was a residual."""
        passed_on = None if self.epilogue.residual is None else grad_y
        return InputGrads(torch.empty_like(self.x), passed_on if y is None else torch.empty_like(self.x))


class ForwardCall(Protocol):
    """A prepared forward, for the verbs that read x alone."""

    def statistics(self) -> Moments: ...
    def normalize(self, mean: Tensor, rstd: Tensor) -> Tensor: ...
    def forward(self, eps: float, moving: RunningUpdate | None) -> Forward: ...


class BackwardCall(Protocol):
    """A prepared backward, for the verbs that read grad_y and x."""

    def reduce_grad(self) -> GradSums: ...
    def input_grad(self, sums: GradSums | None, m: Count) -> InputGrads: ...
    def backward(self, m: int) -> tuple[InputGrads, GradSums]: ...


class PreparedKernel(Kernel):
    """A kernel whose verbs are methods of a prepared call."""

    @abstractmethod
    def prepare_forward(self, x: Tensor, epilogue: Epilogue) -> ForwardCall: ...

    @abstractmethod
    def prepare_backward(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, energy: bool
    ) -> BackwardCall: ...

    def statistics(self, x: Tensor) -> Moments:
        return self.prepare_forward(x, Epilogue()).statistics()

    def normalize(self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
        return self.prepare_forward(x, epilogue).normalize(mean, rstd)

    def forward(self, x: Tensor, eps: float, epilogue: Epilogue, moving: RunningUpdate | None = None) -> Forward:
        return self.prepare_forward(x, epilogue).forward(eps, moving)

    def reduce_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, *, energy: bool
    ) -> GradSums:
        return self.prepare_backward(grad_y, x, mean, rstd, epilogue, energy).reduce_grad()

    def input_grad(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, sums: GradSums | None, m: Count
    ) -> InputGrads:
        return self.prepare_backward(grad_y, x, mean, rstd, epilogue, False).input_grad(sums, m)

    def backward(
        self, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, m: int, *, energy: bool
    ) -> tuple[InputGrads, GradSums]:
        return self.prepare_backward(grad_y, x, mean, rstd, epilogue, energy).backward(m)
