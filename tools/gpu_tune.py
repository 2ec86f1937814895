"""Tune tile sizes of the GPU kernels on the installed GPU: `python tools/gpu_tune.py`.

Each variant sets constants of `batchnorm.kernels.gpu.plan`, which are not yet measured on a GPU, or selects other
kernels. Its outputs are compared with PyTorch's before it is timed, by replays of a CUDA graph, all variants of a case
in the same interleaved rounds. The result is each variant's time over that of the default constants: below 1 is faster.
A variant whose cooperative launch a GPU refuses is timed with two passes, and listed as refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from batchnorm.bench import conduct, contenders, record, timing
from batchnorm.bench.cases import Case
from batchnorm.bench.contenders import Contender
from batchnorm.bench.record import BenchError
from batchnorm.kernels import _GPU
from batchnorm.kernels.gpu import plan

FORMAT = "batchnorm-gpu-tune"
DEFAULT = "as it is"
_NOWHERE = 1 << 62

VARIANTS: dict[str, dict[str, int]] = {
    DEFAULT: {},
    "in rounds": {"VALUES_PER_THREAD": 0},
    "two passes": {"VALUES_PER_THREAD": 0, "L2_DIVISOR": _NOWHERE},
    "half of the L2": {"L2_DIVISOR": 2},
    "an eighth of the L2": {"L2_DIVISOR": 8},
    "tiles of 1024": {"TILE_SIZE": 1024},
    "tiles of 4096": {"TILE_SIZE": 4096},
    "8 warps, tiles of 4096": {"WARPS": 8, "TILE_SIZE": 4096, "COOPERATIVE_PROGRAMS_PER_SM": 2, "PROGRAMS_PER_SM": 3},
    "3 stages": {"STAGES": 3},
    "2 programs": {"COOPERATIVE_PROGRAMS_PER_SM": 2, "PROGRAMS_PER_SM": 2},
    "4 and 8 programs": {"COOPERATIVE_PROGRAMS_PER_SM": 4, "PROGRAMS_PER_SM": 8},
    "runs of 128 bytes": {"RUN_BYTES": 128},
}
"""Name → the constants that differ."""

CASES = [
    Case(shape, layout, dtype, variant)
    for shape, layout in (
        ((256, 64, 56, 56), "contiguous"),
        ((256, 256, 14, 14), "contiguous"),
        ((256, 512, 7, 7), "contiguous"),
        ((32, 128, 14, 14), "contiguous"),
        ((256, 64, 56, 56), "channels_last"),
        ((256, 256, 14, 14), "channels_last"),
        ((32, 128, 14, 14), "channels_last"),
    )
    for dtype, variant in (("bfloat16", "bn+relu"), ("float32", "bn+relu"), ("bfloat16", "bn+add+relu"))
]


@contextmanager
def constants(values: Mapping[str, int]) -> Iterator[None]:
    """Plan with these constants inside the context."""
    before = {name: getattr(plan, name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, int]) -> None:
    for name, value in values.items():
        setattr(plan, name, value)
    _GPU.launcher.can_cooperate = True
    for planned in (plan.plan_passes, plan.plan_resident, plan.plan_rounds):
        planned.cache_clear()


def measure(
    case: Case,
    make: Callable[[Contender], Contender],
    clock: Callable[[], Any],
    before: timing.Before,
    device: str,
) -> dict[str, Any]:
    """The ratios of one case's variants, and the errors of those without. `make` records a contender."""
    call = case.make(0, device)
    channels = conduct.compared_channels(call, 0)
    conduct.zero_grad_near_kinks(call, channels)
    theirs = contenders.eager(call).outputs()
    timed: dict[str, Contender] = {"floor": make(contenders.floor(call))}
    wrong: dict[str, list[str]] = {}
    refused: list[str] = []
    for name, different in VARIANTS.items():
        with constants(different):
            ours = contenders.ours(call)
            errors = conduct.errors(ours.outputs(), theirs, call, channels)
            if errors:
                wrong[name] = errors
            else:
                timed[name] = make(ours)
            if not _GPU.launcher.can_cooperate:
                refused.append(name)
    result: dict[str, Any] = {"case": case.name, "wrong": wrong, "refused": refused, "ratios": {}}
    if DEFAULT in timed:
        samples = timing.interleaved(timed, seconds=0.5, rounds=None, seed=0, clock=clock, before=before)
        base = samples[DEFAULT].whole
        result["ratios"] = {name: timing.ratio(one.whole, base) for name, one in samples.items()}
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and store a table per case; exit status 1 if a variant is wrong, 2 if nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python tools/gpu_tune.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="the file for the result; by default it is only printed")
    options = parser.parse_args(arguments)
    if why := timing.why_no_device("cuda"):
        sys.stdout.write(why.removeprefix("device='cuda': ") + "\n")
        return 2
    plan.ENABLED = True
    origin = {
        "format": FORMAT,
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python tools/gpu_tune.py",
        "gpu": timing.gpu_facts("cuda"),
        "versions": {"torch": torch.__version__},
        "git": record.git(),
        "variants": VARIANTS,
    }
    results: list[dict[str, Any]] = []
    try:
        if options.out is not None:
            record.check_vacant(options.out, force=False)
        for case in CASES:
            results.append(measure(case, timing.replayed, timing.clock_of("cuda"), timing.cold_cache("cuda"), "cuda"))
            _show(results[-1])
            if options.out is not None:
                record.store({**origin, "cases": results}, options.out)
    except BenchError as error:
        sys.stdout.write(f"{error}\n")
        return 2
    return int(any(result["wrong"] for result in results))


def _show(result: dict[str, Any]) -> None:
    lines = [result["case"]]
    for name, ratio in sorted(result["ratios"].items(), key=lambda item: float(item[1]["median"])):
        lines.append(f"  {ratio['median']:6.3f} [{ratio['q1']:.3f}..{ratio['q3']:.3f}]  {name}")
    lines += [f"  {name}: refused, timed with two passes" for name in result["refused"]]
    lines += [f"  {name}: {error}" for name, errors in result["wrong"].items() for error in errors]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
