"""Measure what training steps need of memory: each contender in a fresh process, one after the other.

    stock    torch.nn's layers
    ours     the converted network
    lean     the converted network, whose forward keeps less (`batchnorm.lean`)
    frozen   stock with frozen batch norm (`batchnorm.freeze`), for fine-tuning
    folded   the same, applied through the weights (`fold=True`)

`peak` measures one of them. In these processes glibc returns freed blocks to the system at once, so that the peak is
what the step needs. By default it keeps some, and a peak can be 1.6 times as large. A variable MALLOC_... of the
environment goes first.
A network that does not fit, or that fails, has a reason in place of numbers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from batchnorm.bench.models import Workload
from batchnorm.bench.networks import MODELS
from batchnorm.bench.peak import CONTENDERS
from batchnorm.bench.record import BenchError

_EVERY = 0.2
"""Seconds between two looks at whether to stop."""
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
"""glibc's static threshold, without its adjustment: larger blocks are mapped, and unmapped when they are freed."""
PROGRAM = (sys.executable, "-m", "batchnorm.bench.peak")


def workloads(names: Sequence[str], quick: bool, device: str = "cpu", batch: int | None = None) -> list[Workload]:
    """The networks of these names, or all, in the layout that suits convolutions; bfloat16 on a GPU.

    Raises BenchError for a name that no network has.
    """
    by_name = {name.lower(): name for name in MODELS}
    if unknown := [name for name in names if name.lower() not in by_name]:
        raise BenchError(f"there is no network {unknown[0]!r}: use {', '.join(MODELS)}")
    chosen = [by_name[name.lower()] for name in names] or MODELS
    found = []
    for name in dict.fromkeys(chosen):
        model = MODELS[name]
        shape = model.quick if quick else model.shape
        if batch is not None:
            shape = (batch, *shape[1:])
        dtype = "bfloat16" if device == "cuda" else "float32"
        found.append(Workload(name, model.layouts[-1], shape, dtype, device))
    return found


def measure(
    workload: Workload,
    *,
    seed: int,
    threads: int,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Memory of a network's contenders. Raises KeyboardInterrupt when `stop` returns True.

    contenders  what `peak.measure` returns, by contender
    failed      one line for each contender that has no numbers
    """
    contenders: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name in CONTENDERS:
        options = {"workload": asdict(workload), "contender": name, "seed": seed, "threads": threads}
        found = _in_fresh_process(json.dumps(options), stop)
        if "error" in found:
            failed[name] = found["error"]
        else:
            contenders[name] = found
    return {**asdict(workload), "shape": list(workload.shape), "contenders": contenders, "failed": failed}


def _in_fresh_process(text: str, stop: Callable[[], bool], program: Sequence[str] = PROGRAM) -> dict[str, Any]:
    """What the program prints for `text`; an error in one line if it ends without."""
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*program, text], env={**RETURNING, **os.environ}, text=True, **streams)
    try:
        while True:
            if stop():
                raise KeyboardInterrupt
            try:
                output, errors = process.communicate(timeout=_EVERY)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    if stop():  # Ctrl-C reaches both processes
        raise KeyboardInterrupt
    found = None
    with suppress(ValueError):
        found = json.loads(output)
    return found if isinstance(found, dict) else {"error": _why(process.returncode, errors)}


def _why(status: int, errors: str) -> str:
    """Why a process ended without a result."""
    if status == -signal.SIGKILL:
        return "the system ended the process: most likely the memory ran out"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"the process ended with status {status}"
