"""Which kernel runs a tensor, and why.

>>> import torch, batchnorm as bn
>>> print(bn.kernels.choose(torch.randn(60, 100)).why)
PyTorch's own operators: no faster kernel is built in yet
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from batchnorm.kernels.aten import AtenKernel
from batchnorm.kernels.contract import Kernel

__all__ = ["Choice", "choose"]

_ATEN = AtenKernel()


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that runs a tensor, and the reason in words.

    `differentiable`: PyTorch differentiates the kernel's operators itself, so that `functional` need not.
    """

    kernel: Kernel
    why: str
    differentiable: bool

    @property
    def name(self) -> str:
        """'aten' is PyTorch's own operators."""
        return self.kernel.name


def choose(x: Tensor) -> Choice:
    """The kernel that `batchnorm.functional.batch_norm` runs on `x`, decided by device, type, layout and size."""
    return Choice(_ATEN, "PyTorch's own operators: no faster kernel is built in yet", differentiable=True)
