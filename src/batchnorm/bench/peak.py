"""The memory of one training step in this process, which should be fresh: `python -m batchnorm.bench.peak WORKLOAD`.

    kept     bytes that forward keeps for backward, by `batchnorm.memory`; by_kind, the same by kind
    peak     how far the step raises the process's resident size, or PyTorch's allocations on a GPU; None where neither
             is known: outside of Linux, on a CPU
    loss     of the step

On a CPU the peak is the kernel's VmHWM (the highest resident size) after the step minus VmRSS before it, in
/proc/self/status. A first step on two samples loads libraries, compiles kernels and creates the optimizer's state;
then freed memory is returned to the system and VmHWM is reset. So the peak contains what forward keeps, the gradients,
the workspaces of convolutions and what the allocator does not return (see `memory`), and not the parameters, their
optimizer's state and the batch. It is in pages that were written to, and varies by some MiB.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench.contenders import first_line
from batchnorm.bench.models import Training, Workload
from batchnorm.bench.networks import LAYOUTS, MODELS, Model
from batchnorm.bench.record import BenchError, has_glibc
from batchnorm.kernels.gpu import plan as gpu_plan
from batchnorm.saved_tensors.lean import lean
from batchnorm.saved_tensors.memory import memory
from batchnorm.surgery.convert import convert
from batchnorm.surgery.freeze import freeze

_SAMPLES = 2
"""Of the first step: batch norm needs more than one value per channel."""
_PROCESS = Path("/proc/self")
_MEMORY = Path("/proc/meminfo")


def _converted(network: nn.Module, example: Tensor) -> None:
    convert(network)


def _lean(network: nn.Module, example: Tensor) -> None:
    convert(network)
    lean(network)


def _frozen(network: nn.Module, example: Tensor) -> None:
    freeze(network)


def _folded(network: nn.Module, example: Tensor) -> None:
    freeze(network, fold=True, example=example)


CONTENDERS: Mapping[str, Callable[[nn.Module, Tensor], object]] = {
    "stock": lambda network, example: None,
    "ours": _converted,
    "lean": _lean,
    "frozen": _frozen,
    "folded": _folded,
}
"""What each contender does to a network of torch.nn's layers."""


def measure(
    workload: Workload, contender: str, *, seed: int, threads: int, networks: Mapping[str, Model] = MODELS
) -> dict[str, Any]:
    """Prepare the contender and measure one step. Raises BenchError if the step does not fit into memory."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    if workload.device == "cuda":
        gpu_plan.ENABLED = True  # off by default
    model, layout, device = networks[workload.model], LAYOUTS[workload.layout], workload.device
    network = model.build().to(device=device, memory_format=layout).train()  # type: ignore[call-overload]
    inputs = torch.randn(workload.shape).to(memory_format=layout).to(device)
    few = inputs[:_SAMPLES].clone(memory_format=torch.preserve_format)
    CONTENDERS[contender](network, few)
    with workload.autocast():
        places = checked_places(network, few, len(inputs) / len(few), device)
    labels = torch.randint(model.classes, (len(inputs), *places)).to(device)
    step(network, few, labels[:_SAMPLES], workload)
    before = _resident(device)
    loss = step(network, inputs, labels, workload)
    peak = _highest(device)
    with workload.autocast():
        kept = memory(network, inputs)
    return {
        "kept": kept.total,
        "by_kind": kept.by_kind,
        "peak": None if before is None or peak is None else peak - before,
        "loss": loss,
    }


def checked_places(network: nn.Module, few: Tensor, times: float, device: str) -> tuple[int, ...]:
    """The places of the output behind its channels, from a forward of a few samples.

    Raises BenchError if `times` of what that keeps exceeds the free memory: the system would end this process, or
    another one.
    """
    shape: list[int] = []

    def forward(network: nn.Module, few: Tensor) -> Tensor:
        output: Tensor = network(few)
        shape.extend(output.shape)
        return output

    needed, free = times * memory(network, few, forward).total, _free(device)
    if free is not None and needed > free:
        raise BenchError(f"forward keeps some {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free")
    return tuple(shape[2:])


def step(network: nn.Module, inputs: Tensor, labels: Tensor, workload: Workload) -> float:
    """One step of training; return its loss and free the gradients."""
    training = Training(network, [(inputs, labels)], workload.autocast)
    training.backward(training.forward())
    training.optimizer.zero_grad()
    return training.losses[0]


def _resident(device: str) -> int | None:
    """The memory in use, after freed memory was returned; the highest size starts again from here."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if has_glibc():
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # man page proc(5): resets VmHWM
        return _status("VmRSS")
    return None


def _highest(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int | None:
    """A size of this process in bytes; None where the system does not say."""
    return _size(_PROCESS / "status", name)


def _size(file: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return None if found is None else int(found[1]) << 10


def _free(device: str) -> int | None:
    """Bytes that a process can still use; None if unknown."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else _size(_MEMORY, "MemAvailable")


def main(text: str) -> dict[str, Any]:
    """Measure what `text` describes as JSON; {"error": one line} if that fails."""
    with suppress(OSError):  # if memory runs out, the system ends this process first
        (_PROCESS / "oom_score_adj").write_text("1000", encoding="ascii")
    options = json.loads(text)
    described = options.pop("workload")
    workload = Workload(**{**described, "shape": tuple(described["shape"])})
    try:
        return measure(workload, **options)
    except Exception as error:  # a network can fail in any way
        return {"error": first_line(error)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # teardown of large networks takes seconds
