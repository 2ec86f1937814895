"""Launches of the GPU kernels on a device, and the arguments that the launches of one call share.

tools/gpu_compile.py compiles the same launches without a device.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.contract import Epilogue, UnavailableError
from batchnorm.kernels.gpu import plan
from batchnorm.kernels.gpu.plan import OPTIONS, Tiling
from batchnorm.kernels.layout import PreparedCall


class Modules(NamedTuple):
    """The modules in Triton's language."""

    reductions: ModuleType
    passes: ModuleType
    fused: ModuleType


@cache
def load_modules() -> Modules:
    """Import Triton and the kernels. Raises UnavailableError."""
    try:
        return Modules(*(import_module(f"batchnorm.kernels.gpu._triton.{name}") for name in Modules._fields))
    except ImportError as error:
        raise UnavailableError(f"Triton cannot be imported ({error}): install it with pip install triton") from error


class Launch(NamedTuple):
    """One launch of a Triton kernel; a cooperative one where `registers` limits those of a thread."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    registers: int | None


class Launcher:
    """Launches kernels on the current stream of a device, and never waits for them.

    `can_cooperate`: whether cooperative launches are tried. After the first refusal they are not.
    """

    def __init__(self) -> None:
        self.can_cooperate = True

    def processors(self, device: torch.device) -> int:
        """The device's multiprocessors; for CPU tensors, which the interpreter runs, enough for several parts."""
        return _properties(device).multi_processor_count if device.type == "cuda" else 2

    def l2_bytes(self, device: torch.device) -> int:
        """The size of the device's L2; for CPU tensors, some small size."""
        return _properties(device).L2_cache_size if device.type == "cuda" else 1 << 16

    def launch(self, device: torch.device, launch: Launch) -> None:
        """Launch a kernel. Raises UnavailableError where it cannot be compiled or started."""
        options = {**OPTIONS, "num_warps": launch.warps, **cooperative_options(launch.registers)}
        # Triton launches on the current device, which may differ from the tensor's.
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        try:
            with on_device:
                launch.kernel[(launch.programs,)](*launch.arguments, **launch.constants, **options)
        except Exception as error:  # whatever Triton's compiler or the driver raises, before anything has run
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UnavailableError(f"Triton cannot run its kernels on this device ({reason})") from error


def cooperative_options(registers: int | None, hip: bool = torch.version.hip is not None) -> dict[str, int | bool]:
    """Options of a cooperative launch; none without a limit on registers. Triton limits registers on NVIDIA only."""
    if registers is None:
        return {}
    return {"launch_cooperative_grid": True, **({} if hip else {"maxnreg": registers})}


@cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


class GpuCall(PreparedCall):
    """One call: its tensor, and the arguments that its launches share."""

    def __init__(self, launcher: Launcher, x: Tensor, epilogue: Epilogue) -> None:
        super().__init__(x, epilogue)
        self.launcher = launcher
        self.slope, self.act = float(epilogue.slope), epilogue.act or ""
        self.gamma, self.beta = (None if v is None else v.contiguous() for v in (epilogue.gamma, epilogue.beta))
        self._shape = self.slices, self.channels, self.span, x.element_size(), launcher.processors(x.device)
        self.plan = plan.plan_passes(*self._shape)

    def empty(self, *shape: int) -> Tensor:
        """Uninitialized float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def launch_pass(self, kernel: Any, *arguments: object, **constants: object) -> None:
        """Launch one pass over the tensor."""
        self._launch(kernel, self.plan.programs, self.plan, arguments, constants | {"STAGES": plan.STAGES})

    def launch_merge(self, kernel: Any, *arguments: object, **constants: object) -> None:
        """Launch one pass over the channels, to merge the parts."""
        self._launch(kernel, self.plan.merging.blocks, self.plan.merging, arguments, constants)

    def try_resident(self, kernel: Any, tensors: int, sums: int, *arguments: object, **constants: object) -> bool:
        """Launch the kernel that holds `tensors` tensors in registers. False, with nothing done, if they do not fit."""
        tiling = plan.plan_resident(*self._shape, tensors, self.launcher.can_cooperate)
        return tiling is not None and self._try_sharing(kernel, tiling, sums, arguments, constants)

    def try_rounds(self, kernel: Any, tensors: int, sums: int, *arguments: object, **constants: object) -> bool:
        """Launch the kernel that reads `tensors` tensors again from the L2. False, with nothing done, if too small."""
        if not self.launcher.can_cooperate:
            return False
        tiling = plan.plan_rounds(*self._shape, self.launcher.l2_bytes(self.x.device), tensors)
        constants |= {"STAGES": plan.STAGES}
        return tiling is not None and self._try_sharing(kernel, tiling, sums, (tiling.groups, *arguments), constants)

    def _try_sharing(
        self, kernel: Any, tiling: Tiling, sums: int, arguments: tuple[object, ...], constants: dict[str, object]
    ) -> bool:
        """Launch, cooperatively where programs share a channel; False where the device refuses."""
        if tiling.parts == 1:
            self._launch(kernel, tiling.programs, tiling, (None, None, *arguments), constants)
            return True
        partials = self.empty(sums, tiling.parts, tiling.channels)
        counters = torch.zeros(tiling.blocks, dtype=torch.int32, device=self.x.device)
        arguments = partials, counters, *arguments
        try:
            self._launch(kernel, tiling.programs, tiling, arguments, constants, tiling.registers)
        except UnavailableError:
            self.launcher.can_cooperate = False
        return self.launcher.can_cooperate

    def _launch(
        self,
        kernel: Any,
        programs: int,
        tiling: Tiling,
        arguments: tuple[object, ...],
        constants: dict[str, object],
        registers: int | None = None,
    ) -> None:
        arguments, constants = (*arguments, *tiling.sizes), {**constants, **tiling.constants}
        launch = Launch(kernel, programs, arguments, constants, tiling.warps, registers)
        self.launcher.launch(self.x.device, launch)
