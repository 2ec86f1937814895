"""The kernels that a run of the contract suite is about, and the device that they run on.

By default those of this machine's processor. `BATCHNORM_KERNELS=gpu` makes it the GPU kernel: on a GPU, or with
`TRITON_INTERPRET=1` on CPU tensors by Triton's interpreter. Then tiles are small, so that small tensors have several
parts, each of several tiles.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import pytest
import torch

from batchnorm.kernels.aten import AtenKernel
from batchnorm.kernels.contract import Kernel
from batchnorm.kernels.cpu.kernel import CpuKernel
from batchnorm.kernels.gpu import plan
from batchnorm.kernels.gpu.kernel import GpuKernel

Case = TypeVar("Case")

ON_GPU = os.environ.get("BATCHNORM_KERNELS") == "gpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS: list[Kernel] = [GpuKernel()] if ON_GPU else [AtenKernel(), CpuKernel()]
# An interpreter computes with NumPy, which warns of what a GPU does in silence.
QUIET = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
DEVICE = torch.device("cuda" if ON_GPU and not INTERPRETED else "cpu")


def some(cases: Iterable[Case], rest: int = 0) -> list[Case]:
    """All cases; by an interpreter, which is slow, every third."""
    return list(cases)[rest::3] if INTERPRETED else list(cases)


if INTERPRETED:
    plan.TILE_SIZE, plan.PROGRAMS_PER_SM, plan.MERGE_TILE_SIZE = 32, 4, 16
    # Two passes only: `test_gpu_kernel` tests the kernels that use registers and the L2.
    plan.VALUES_PER_THREAD, plan.L2_DIVISOR = 0, 1 << 62
