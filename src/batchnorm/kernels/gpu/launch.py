"""How a GPU kernel gets onto its device. `batchnorm.bench.gpu_compile` compiles instead."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from batchnorm.kernels.contract import UnavailableError
from batchnorm.kernels.gpu.plan import OPTIONS, WARPS


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
