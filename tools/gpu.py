"""Everything that needs a GPU, in one go: `make gpu`, or `python tools/gpu.py` from a checkout.

    contract    the contract suite and the GPU kernel's own tests, on the GPU
    memcheck    a part of them under NVIDIA's compute-sanitizer: accesses out of bounds
    racecheck   hazards between threads in shared memory
    synccheck   barriers that not all threads reach
    bench       `batchnorm bench --device cuda --compile`, which stores a result of its own
    called      the same of a few cases as Python calls them, likewise
    models      `batchnorm bench --device cuda --models`, likewise
    tune        tools/gpu_tune.py, likewise: what the kernels' constants had best be

Each is a program of its own; one that fails keeps none of the others from running, but without a green contract
nothing is timed. What came of each is stored under benchmarks/ with the GPU's name; without a GPU nothing is.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchnorm.bench import record, timing
from batchnorm.bench.record import BenchError

FORMAT = "batchnorm-gpu"
TOOLS = ("memcheck", "racecheck", "synccheck")
TIMED = ("bench", "called", "models", "tune")
_TAIL = 4000
_HOME = Path(__file__).parents[1]
_TESTS = ("tests/kernels/test_contract.py", "tests/kernels/test_gpu_kernel.py")
_SANITIZED = "every_layout or same_bits or held_in_registers or share_a_channel or in_turn"
_SANITIZER_FAILED = 86  # no status of pytest's


@dataclass(frozen=True)
class Step:
    """One program to run, and what it adds to the environment."""

    name: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)


Run = Callable[[Step], tuple[int, str]]


def steps(scope: Sequence[str] = (), tuned: str = "tune.json") -> list[Step]:
    """All of them; `scope` goes to the bench: nothing, --quick or --full. The result of tune goes to `tuned`."""
    python = sys.executable
    ours = {"BATCHNORM_KERNELS": "gpu", "BATCHNORM_GPU_KERNELS": "1", "TRITON_INTERPRET": "0"}
    bench = [python, "-m", "batchnorm", "bench", "--device", "cuda"]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_TESTS]
    # Every tensor a block of memory of its own: what lies behind it is nobody's.
    apart = {**ours, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = ["compute-sanitizer", "--error-exitcode", str(_SANITIZER_FAILED), "--target-processes", "all"]
    return [
        Step("contract", tests, ours),
        *(Step(tool, [*sanitizer, "--tool", tool, *tests, "-k", _SANITIZED], apart) for tool in TOOLS),
        Step("bench", [*bench, "--compile", *scope]),
        Step("called", [*bench, "--compile", "--called", "--quick"]),
        Step("models", [*bench, "--models", *scope]),
        Step("tune", [python, "tools/gpu_tune.py", "--out", tuned]),
    ]


def run(step: Step) -> tuple[int, str]:
    """The program's status and the end of what it printed; 127 where there is no such program."""
    if shutil.which(step.command[0]) is None:
        return 127, f"{step.command[0]} is not installed: it comes with the CUDA toolkit"
    done = subprocess.run(
        step.command,
        env={**os.environ, **step.environment},
        cwd=_HOME,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout[-_TAIL:]


def conduct(todo: Sequence[Step], run: Run, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run them in order; what came of each: name, command, status, seconds and the end of its output."""
    told: list[dict[str, Any]] = []
    for step in todo:
        if step.name in TIMED and any(one["name"] == "contract" and one["status"] != 0 for one in told):
            tell(f"{step.name}: not run, since the contract is not kept")
            continue
        tell(f"{step.name} ...")
        begun = time.monotonic()
        status, output = run(step)
        seconds = round(time.monotonic() - begun, 1)
        tell(f"{step.name}: {'green' if status == 0 else f'status {status}'}\n{output}".rstrip())
        command = ["python" if part == sys.executable else part for part in step.command]
        output = output.replace(str(_HOME), ".")
        told.append({"name": step.name, "command": command, "status": status, "seconds": seconds, "output": output})
    return told


def main(arguments: Sequence[str] | None = None, run: Run = run) -> int:
    """Status 0 where all is green, 1 where something is not, 2 where nothing can be run."""
    parser = argparse.ArgumentParser(prog="python tools/gpu.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--quick", action="append_const", dest="scope", const="--quick", help="fewer cases in the bench"
    )
    parser.add_argument("--full", action="append_const", dest="scope", const="--full", help="all cases in the bench")
    names = [step.name for step in steps()]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the steps; by default all")
    given = parser.parse_args(arguments)

    def tell(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    why = timing.why_no_device("cuda")
    if why is None and not all((_HOME / name).exists() for name in _TESTS):
        why = "the tests are not here: run it from a checkout, with the package installed from there (make gpu)"
    if why is not None:
        tell(why.removeprefix("device='cuda': "))
        return 2
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    gpu = timing.gpu_facts("cuda") or {}
    name = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-")
    stem = f"{begun[:19].replace(':', '')}-{name}"
    todo = [step for step in steps(given.scope or (), f"benchmarks/{stem}-tune.json") if step.name in given.only]
    told = conduct(todo, run, tell)
    path = _HOME / "benchmarks" / f"{stem}-checks.json"
    result = {"format": FORMAT, "schema": 1, "date": begun, "gpu": gpu, "git": record.git(), "steps": told}
    try:
        record.store(result, path)
    except BenchError as error:
        tell(str(error))
        return 2
    tell(f"result  {path}")
    return 0 if all(step["status"] == 0 for step in told) else 1


if __name__ == "__main__":
    sys.exit(main())
