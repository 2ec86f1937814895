"""Which device is measured, and by which clock. A GPU works on while the host goes ahead, so its own events are read.

On a GPU a time is what passes on its stream between two events: the work, and where the host is slower than the work,
waiting for the host. Nothing is waited for within a sample. Before each call its L2 is written over: in a network, too,
what a layer reads was not left there by the same layer's last step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

DEVICES = ("cpu", "cuda")


class Mark:
    """A moment on the current stream of the GPU; the difference of two, in nanoseconds, waits until both are past."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def __sub__(self, earlier: Mark) -> int:
        self.event.synchronize()
        return int(1e6 * earlier.event.elapsed_time(self.event))


def clock_of(device: str) -> Callable[[], Any]:
    """Tells moments whose differences are nanoseconds."""
    return Mark if device == "cuda" else time.perf_counter_ns


def cold_cache(device: str) -> Callable[[], object]:
    """Something to do before each call, so that none finds in the cache what another has left there."""
    if device != "cuda":
        return lambda: None
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(2 * cache, dtype=torch.uint8, device="cuda").zero_


def why_no_device(device: str) -> str | None:
    """Why it cannot be measured here, in a line; None where it can."""
    if device not in DEVICES:
        return f"unknown --device {device!r}: use {' or '.join(DEVICES)}"
    if device == "cuda" and not torch.cuda.is_available():
        return f"--device cuda: PyTorch {torch.__version__} sees no GPU here"
    return None


def gpu_facts(device: str) -> dict[str, Any] | None:
    """The GPU's name, multiprocessors, bytes of memory and of the L2 cache, and what drives it; None for the CPU."""
    if device != "cuda":
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "processors": found.multi_processor_count,
        "memory": found.total_memory,
        "L2": found.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
