"""Choose the kernel that runs a tensor, and say why: the conditions are `why_unsupported` in `cpu.cost`, `gpu.plan`.

>>> import torch, batchnorm as bn
>>> print(bn.kernels.choose(torch.randn(60, 100)).why)
PyTorch's own operators: so small that the call would cost more than the loops save
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from batchnorm.kernels.aten import ATEN
from batchnorm.kernels.contract import Kernel, UnavailableError
from batchnorm.kernels.cpu.cost import NOT_SHARED, is_shared, why_not_possible, why_unsupported
from batchnorm.kernels.cpu.kernel import CpuKernel
from batchnorm.kernels.gpu.kernel import GpuKernel
from batchnorm.kernels.gpu.plan import why_unsupported as why_unsupported_on_gpu

__all__ = ["Choice", "choose"]

Result = TypeVar("Result")

_MOVED = {"cpu_code": "cpu.compiler", "cpu_plan": "cpu.plan", "team": "cpu.threads", "gpu_plan": "gpu.plan"}
"""Modules that had another name in 0.1, which works until 0.4."""
_CPU, _GPU = CpuKernel(), GpuKernel()
disabled: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that runs a tensor, and the reason.

    Attributes:
        kernel: the implementation.
        why: the reason, in words.
        differentiable: whether PyTorch differentiates the kernel's operators itself, so that `functional` need not.
    """

    kernel: Kernel
    why: str
    differentiable: bool

    @property
    def name(self) -> str:
        """The kernel's name: 'cpu' and 'gpu' are this package's own kernels, 'aten' is PyTorch's operators."""
        return self.kernel.name


_BY_CPU = Choice(_CPU, "compiled loops: a CPU tensor of a type and layout that they support", differentiable=False)
_BY_CPU_ALONE = Choice(_CPU, f"{_BY_CPU.why}; on one thread, since {NOT_SHARED}", differentiable=False)
_BY_GPU = Choice(_GPU, "Triton: a CUDA tensor of a type and layout that the GPU kernels support", differentiable=False)


def choose(x: Tensor, training: bool = True, fused: bool = True, tapped: bool = False) -> Choice:
    """Say which kernel `batchnorm.functional.batch_norm` runs on `x`, by its device, type, layout and size.

    Args:
        x: the input.
        training: whether the batch's statistics are used; with running statistics there is less to gain.
        fused: whether an activation or a residual follows, the only gain in inference.
        tapped: whether `batchnorm.watch` records sums that this package's kernels compute anyway.

    Returns:
        The kernel and the reason. Under torch.compile, training steps call the kernel for large tensors (`compiled`),
        and all else is 'aten', whose operators the compiler fuses. Under torch.func, forward-mode differentiation and
        tracing it is always 'aten'.
    """
    if x.is_cuda:
        why, choice = why_unsupported_on_gpu(x, training, fused, tapped), _BY_GPU
    else:
        why, choice = why_unsupported(x, training, fused, tapped), _BY_CPU if is_shared() else _BY_CPU_ALONE
    if why is None and disabled:
        why = disabled.get(choice.name)
    return choice if why is None else _by_aten(why)


def compiled(x: Tensor) -> bool:
    """Whether a compiled training step calls our kernel for x, and does not fuse PyTorch's operators itself.

    Never in torch.export, whose programs run elsewhere, nor under torch.func, which transforms PyTorch's operators.
    """
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
        return False
    if x.device.type == "cuda":
        return _GPU.name not in disabled and why_unsupported_on_gpu(x, True, True) is None
    return x.numel() >= _COMPILED_VALUES and _may_be_called_on_cpu() and why_not_possible(x) is None


_COMPILED_VALUES = 1 << 17
"""Of smaller tensors the compiler's own loops are as fast."""


def _may_be_called_on_cpu() -> bool:
    return is_shared() and _CPU.name not in disabled


# As torch.compiler.assume_constant_result, which imports the compiler: torch.compile calls it and stores the answer.
_may_be_called_on_cpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _by_aten(why: str) -> Choice:
    return Choice(ATEN, f"PyTorch's own operators: {why}", differentiable=True)


def or_aten(kernel: Kernel, run: Callable[[Kernel], Result]) -> Result:
    """Call `run` with this kernel, or with PyTorch's operators if the machine cannot run it."""
    try:
        return run(kernel)
    except UnavailableError as error:
        disable(kernel, error)
        return run(ATEN)


def disable(kernel: Kernel, error: UnavailableError) -> None:
    """Use PyTorch's operators in place of this kernel from now on, with one warning that says why."""
    if kernel.name not in disabled:
        disabled[kernel.name] = str(error)
        warnings.warn(
            f"batchnorm runs on PyTorch's own operators, slower but right: {error}", RuntimeWarning, stacklevel=2
        )


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = f"{__name__}.{_MOVED[name]}"
    warnings.warn(f"{__name__}.{name} is {new} since 0.2", DeprecationWarning, stacklevel=2)
    return importlib.import_module(new)
