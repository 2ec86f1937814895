"""One call of the GPU kernels: its plan, what its launches share, and the three kinds of launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.contract import Epilogue
from batchnorm.kernels.gpu_launch import Launcher
from batchnorm.kernels.gpu_plan import Resident, plan, resident
from batchnorm.kernels.layout import alike, memory_format


class Work:
    """One call: its plan, and the arguments that its launches share."""

    def __init__(self, launcher: Launcher, x: Tensor, epilogue: Epilogue) -> None:
        self.launcher = launcher
        self.format = memory_format(x)
        self.x = x.contiguous(memory_format=self.format)
        self.epilogue = epilogue
        self.slope, self.act = float(epilogue.slope), epilogue.act or ""
        self.gamma, self.beta = (None if v is None else v.contiguous() for v in (epilogue.gamma, epilogue.beta))
        slice_values = math.prod(x.shape[2:])
        values, span = x.shape[0] * slice_values, slice_values if self.format is torch.contiguous_format else 1
        self.plan = plan(values, x.shape[1], span, x.element_size(), launcher.processors(x.device))

    def alike(self, tensor: Tensor) -> Tensor:
        """A tensor of x's shape, laid out in memory as x."""
        return alike(tensor, self.x.dtype, self.format)

    def room(self, *shape: int) -> Tensor:
        """Uninitialized float32 for sums."""
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def resident(self, tensors: int) -> Resident | None:
        """The tiles that hold whole channels of so many tensors, where registers do."""
        cut, processors = self.plan, self.launcher.processors(self.x.device)
        return resident(cut.values, cut.channels, cut.span, self.x.element_size(), processors, tensors)

    def at_once(self, kernel: Any, held: Resident, *arguments: object, **constants: object) -> None:
        """Launch one program for each tile of whole channels."""
        cut = self.plan
        constants |= {"TILE_VALUES": held.tile_values, "TILE_CHANNELS": held.tile_channels}
        given = *arguments, cut.values, cut.channels, cut.span
        self.launcher.launch(kernel, held.blocks, self.x.device, given, constants, held.warps)

    def partials(self, sums: int) -> Tensor:
        return self.room(sums, self.plan.parts, self.plan.channels)

    def over_x(self, kernel: Any, *arguments: object, **constants: object) -> None:
        """Launch one pass over the tensor."""
        cut = self.plan
        sizes = cut.values, cut.channels, cut.span, cut.parts, cut.part_values
        constants |= {"TILE_VALUES": cut.tile_values, "TILE_CHANNELS": cut.tile_channels, "WIDE": cut.wide}
        self.launcher.launch(kernel, cut.programs, self.x.device, (*arguments, *sizes), constants)

    def over_channels(self, kernel: Any, *arguments: object, **constants: object) -> None:
        """Launch one pass over the channels."""
        constants |= {"PARTS": self.plan.padded_parts, "TILE_CHANNELS": self.plan.tile_channels}
        self.launcher.launch(kernel, self.plan.blocks, self.x.device, arguments, constants)
