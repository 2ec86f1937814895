"""Run all checks that need a GPU: `make gpu`, or `python tools/gpu.py` from a checkout.

    contract    the contract suite and the GPU kernel's own tests, on the GPU
    memcheck    a part of them under NVIDIA's compute-sanitizer: accesses out of bounds
    racecheck   hazards between threads in shared memory
    synccheck   barriers that not all threads reach
    bench       `batchnorm bench --device cuda --compile`, which stores a result of its own
    called      the same of a few cases as Python calls them, likewise
    models      `batchnorm bench --device cuda --models`, likewise
    tune        tools/gpu_tune.py, likewise: the best constants of the kernels

Each step is a separate program. If one fails, the others still run, but nothing is timed unless the contract passes.
The results are stored under benchmarks/ with the GPU's name. Without a GPU nothing runs.
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
_SANITIZED = "every_layout or same_bits or in_registers or share_a_channel or in_turn"
_SANITIZER_FAILED = 86  # no status of pytest's


@dataclass(frozen=True)
class Step:
    """One program to run, and what it adds to the environment."""

    name: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)


Run = Callable[[Step], tuple[int, str]]


def steps(scope: Sequence[str] = (), tuned: str = "tune.json") -> list[Step]:
    """All steps; `scope` is the bench's: nothing, --quick or --full. tune writes its result to `tuned`."""
    python = sys.executable
    ours = {"BATCHNORM_KERNELS": "gpu", "BATCHNORM_GPU_KERNELS": "1", "TRITON_INTERPRET": "0"}
    bench = [python, "-m", "batchnorm", "bench", "--device", "cuda"]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_TESTS]
    # One block of memory per tensor, so that an access past its end is found.
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
    """The program's exit status and the end of its output; 127 if the program is missing."""
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


def conduct(todo: Sequence[Step], run: Run, print_line: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run the steps in order; returns name, command, status, seconds and the end of the output of each."""
    results: list[dict[str, Any]] = []
    for step in todo:
        if step.name in TIMED and any(done["name"] == "contract" and done["status"] != 0 for done in results):
            print_line(f"{step.name}: not run, because the contract step failed")
            continue
        print_line(f"{step.name} ...")
        begun = time.monotonic()
        status, output = run(step)
        seconds = round(time.monotonic() - begun, 1)
        print_line(f"{step.name}: {'green' if status == 0 else f'status {status}'}\n{output}".rstrip())
        command = ["python" if part == sys.executable else part for part in step.command]
        output = output.replace(str(_HOME), ".")
        results.append({"name": step.name, "command": command, "status": status, "seconds": seconds, "output": output})
    return results


def main(arguments: Sequence[str] | None = None, run: Run = run) -> int:
    """Exit status 0 if all steps pass, 1 if one does not, 2 if nothing can run."""
    parser = argparse.ArgumentParser(prog="python tools/gpu.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--quick", action="append_const", dest="scope", const="--quick", help="fewer cases in the bench"
    )
    parser.add_argument("--full", action="append_const", dest="scope", const="--full", help="all cases in the bench")
    names = [step.name for step in steps()]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the steps; by default all")
    options = parser.parse_args(arguments)

    def print_line(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    why = timing.why_no_device("cuda")
    if why is None and not all((_HOME / name).exists() for name in _TESTS):
        why = "the tests are missing: run this from a checkout, with the package installed from there (make gpu)"
    if why is not None:
        print_line(why.removeprefix("device='cuda': "))
        return 2
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    gpu = timing.gpu_facts("cuda") or {}
    name = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-")
    stem = f"{begun[:19].replace(':', '')}-{name}"
    todo = [step for step in steps(options.scope or (), f"benchmarks/{stem}-tune.json") if step.name in options.only]
    results = conduct(todo, run, print_line)
    path = _HOME / "benchmarks" / f"{stem}-checks.json"
    result = {"format": FORMAT, "schema": 1, "date": begun, "gpu": gpu, "git": record.git(), "steps": results}
    try:
        record.store(result, path)
    except BenchError as error:
        print_line(str(error))
        return 2
    print_line(f"result  {path}")
    return 0 if all(step["status"] == 0 for step in results) else 1


if __name__ == "__main__":
    sys.exit(main())
