"""One call of the GPU kernels: how its tensor is cut, what its launches share, and the three kinds of launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.contract import Epilogue, UnavailableError
from batchnorm.kernels.gpu import plan
from batchnorm.kernels.gpu.launch import Launcher
from batchnorm.kernels.gpu.plan import Cut
from batchnorm.kernels.layout import alike, memory_format


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
