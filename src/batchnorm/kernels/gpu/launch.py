"""How a GPU kernel gets onto its device, and what the launches of one call share.

tools/gpu_compile.py compiles the same launches without a device.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.contract import Epilogue, UnavailableError
from batchnorm.kernels.gpu import plan
from batchnorm.kernels.gpu.plan import OPTIONS, WARPS, Cut
from batchnorm.kernels.layout import alike, memory_format


class Code(NamedTuple):
    """The modules in Triton's language."""

    reductions: ModuleType
    passes: ModuleType
    resident: ModuleType
    rounds: ModuleType


@cache
def loaded() -> Code:
    """Import Triton and what is written in it. Raises UnavailableError."""
    try:
        return Code(*(import_module(f"batchnorm.kernels.gpu._triton.{part}") for part in Code._fields))
    except ImportError as error:
        raise UnavailableError(f"Triton cannot be imported ({error}): install it with pip install triton") from error


class Launcher:
    """Launches kernels on the current stream of a device, and waits for none of them.

    `together`: whether all programs of a launch run at once where that is asked for. One refusal, and nobody asks.
    """

    def __init__(self) -> None:
        self.together = True

    def processors(self, device: torch.device) -> int:
        """The device's multiprocessors; of a CPU tensor, which the interpreter takes, enough for several parts."""
        return _properties(device).multi_processor_count if device.type == "cuda" else 2

    def cache_bytes(self, device: torch.device) -> int:
        """The device's L2; of a CPU tensor, enough for something."""
        return _properties(device).L2_cache_size if device.type == "cuda" else 1 << 16

    def launch(
        self,
        kernel: Any,
        programs: int,
        device: torch.device,
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        warps: int = WARPS,
        registers: int | None = None,
    ) -> None:
        """Start so many programs of a kernel; where a thread's `registers` are limited, such that all run at once.

        Raises UnavailableError where it cannot be compiled or started.
        """
        options = {**OPTIONS, "num_warps": warps, **at_once(registers)}
        try:
            with _current(device):
                kernel[(programs,)](*arguments, **constants, **options)
        except Exception as error:  # whatever Triton's compiler or the driver says, before anything has run
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UnavailableError(f"Triton cannot run its kernels on this device ({reason})") from error


def at_once(registers: int | None, hip: bool = torch.version.hip is not None) -> dict[str, int | bool]:
    """Options of a launch all of whose programs run at once, where registers are limited. Triton does so for NVIDIA."""
    if registers is None:
        return {}
    return {"launch_cooperative_grid": True, **({} if hip else {"maxnreg": registers})}


@cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Work:
    """One call: its tensor, and the arguments that its launches share."""

    def __init__(self, launcher: Launcher, x: Tensor, epilogue: Epilogue) -> None:
        self.launcher = launcher
        self.format = memory_format(x)
        self.x = x.contiguous(memory_format=self.format)
        self.epilogue = epilogue
        self.slope, self.act = float(epilogue.slope), epilogue.act or ""
        self.gamma, self.beta = (None if v is None else v.contiguous() for v in (epilogue.gamma, epilogue.beta))
        self.channels, span = x.shape[1], math.prod(x.shape[2:])
        side_by_side = self.format is not torch.contiguous_format
        slices, span = (x.shape[0] * span, 1) if side_by_side else (x.shape[0], span)
        self._shape = slices, self.channels, span, x.element_size(), launcher.processors(x.device)
        self.plan = plan.plan(*self._shape)

    def alike(self, tensor: Tensor) -> Tensor:
        """A tensor of x's shape, laid out in memory as x."""
        return alike(tensor, self.x.dtype, self.format)

    def room(self, *shape: int) -> Tensor:
        """Uninitialized float32 for sums."""
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def over_x(self, kernel: Any, *arguments: object, **constants: object) -> None:
        """Launch one pass over the tensor."""
        self._launch(kernel, self.plan.programs, self.plan, arguments, constants | {"STAGES": plan.STAGES})

    def over_channels(self, kernel: Any, *arguments: object, **constants: object) -> None:
        """Launch one pass over the channels, to merge the parts."""
        cut = self.plan.merging
        self._launch(kernel, cut.blocks, cut, arguments, constants)

    def held(self, kernel: Any, tensors: int, sums: int, *arguments: object, **constants: object) -> bool:
        """Launch the one that holds so many tensors in registers. False where they are too large: nothing was done."""
        cut = plan.resident(*self._shape, tensors, self.launcher.together)
        return cut is not None and self._together(kernel, cut, sums, arguments, constants)

    def in_rounds(self, kernel: Any, tensors: int, sums: int, *arguments: object, **constants: object) -> bool:
        """Launch the one that reads so many tensors twice, the second time from the L2. False where it is too small."""
        if not self.launcher.together:
            return False
        cut = plan.rounds(*self._shape, self.launcher.cache_bytes(self.x.device), tensors)
        if cut is None:
            return False
        constants |= {"STAGES": plan.STAGES}
        return self._together(kernel, cut, sums, (cut.groups, *arguments), constants)

    def _together(
        self, kernel: Any, cut: Cut, sums: int, arguments: tuple[object, ...], constants: dict[str, object]
    ) -> bool:
        """Launch a kernel with room for the sums of its parts; False where its programs cannot run at once."""
        if cut.parts == 1:
            self._launch(kernel, cut.programs, cut, (None, None, *arguments), constants)
            return True
        partials = self.room(sums, cut.parts, cut.channels)
        counters = torch.zeros(cut.blocks, dtype=torch.int32, device=self.x.device)
        try:
            self._launch(kernel, cut.programs, cut, (partials, counters, *arguments), constants, cut.registers)
        except UnavailableError:
            self.launcher.together = False
            return False
        return True

    def _launch(
        self,
        kernel: Any,
        programs: int,
        cut: Cut,
        arguments: tuple[object, ...],
        constants: dict[str, object],
        registers: int | None = None,
    ) -> None:
        given, compiled_for = (*arguments, *cut.sizes), {**constants, **cut.constants}
        self.launcher.launch(kernel, programs, self.x.device, given, compiled_for, cut.warps, registers)
