"""How the GPU kernels had best cut tensors, on the GPU that is here: `python tools/gpu_tune.py`.

Each variant sets constants of `batchnorm.kernels.gpu.plan` that are guesses until a GPU has told, or turns to another
of the kernels' ways. It is held to PyTorch's outputs before it is timed, by replays of a CUDA graph, all variants of a
case in the same interleaved rounds. Told is each one's time over that of the constants as they are: below 1 it is
faster. A variant whose programs a GPU does not run together is timed by two passes, and named as refused.
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
AS_IT_IS = "as it is"
_NOWHERE = 1 << 62

VARIANTS: dict[str, dict[str, int]] = {
    AS_IT_IS: {},
    "in rounds": {"HELD": 0},
    "two passes": {"HELD": 0, "CACHED": _NOWHERE},
    "half of the L2": {"CACHED": 2},
    "an eighth of the L2": {"CACHED": 8},
    "tiles of 1024": {"TILE": 1024},
    "tiles of 4096": {"TILE": 4096},
    "8 warps, tiles of 4096": {"WARPS": 8, "TILE": 4096, "PROGRAMS_TOGETHER": 2, "PROGRAMS_EACH": 3},
    "3 stages": {"STAGES": 3},
    "2 programs": {"PROGRAMS_TOGETHER": 2, "PROGRAMS_EACH": 2},
    "4 and 8 programs": {"PROGRAMS_TOGETHER": 4, "PROGRAMS_EACH": 8},
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
def constants(of: Mapping[str, int]) -> Iterator[None]:
    """Cut tensors by these for a while."""
    before = {name: getattr(plan, name) for name in of}
    _set(of)
    try:
        yield
    finally:
        _set(before)


def _set(of: Mapping[str, int]) -> None:
    for name, value in of.items():
        setattr(plan, name, value)
    _GPU.launcher.together = True
    for planned in (plan.plan, plan.resident, plan.rounds):
        planned.cache_clear()


def measure(
    case: Case, make: Callable[[Contender], Contender], clock: Callable[[], Any], before: Callable[[], object], on: str
) -> dict[str, Any]:
    """The ratios of one case's variants, and what was wrong with those that have none. `make` records a contender."""
    call = case.make(0, on)
    channels = conduct.compared_channels(call, 0)
    conduct.clear_of_kinks(call, channels)
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
            if not _GPU.launcher.together:
                refused.append(name)
    told: dict[str, Any] = {"case": case.name, "wrong": wrong, "refused": refused, "ratios": {}}
    if AS_IT_IS in timed:
        samples = timing.interleaved(timed, seconds=0.5, rounds=None, seed=0, clock=clock, before=before)
        base = samples[AS_IT_IS].whole
        told["ratios"] = {name: timing.ratio(one.whole, base) for name, one in samples.items()}
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table a case, store all of it; status 1 where a variant is wrong, 2 where nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python tools/gpu_tune.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="the file for the result; by default it is only printed")
    given = parser.parse_args(arguments)
    if why := timing.why_no_device("cuda"):
        sys.stdout.write(why.removeprefix("device='cuda': ") + "\n")
        return 2
    plan.ASKED_FOR = True
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
    found: list[dict[str, Any]] = []
    try:
        if given.out is not None:
            record.check_vacant(given.out, force=False)
        for case in CASES:
            found.append(measure(case, timing.replayed, timing.clock_of("cuda"), timing.cold_cache("cuda"), "cuda"))
            _show(found[-1])
            if given.out is not None:
                record.store({**origin, "cases": found}, given.out)
    except BenchError as error:
        sys.stdout.write(f"{error}\n")
        return 2
    return int(any(told["wrong"] for told in found))


def _show(told: dict[str, Any]) -> None:
    lines = [told["case"]]
    for name, ratio in sorted(told["ratios"].items(), key=lambda item: float(item[1]["median"])):
        lines.append(f"  {ratio['median']:6.3f} [{ratio['q1']:.3f}..{ratio['q3']:.3f}]  {name}")
    lines += [f"  {name}: refused, by two passes" for name in told["refused"]]
    lines += [f"  {name}: {error}" for name, errors in told["wrong"].items() for error in errors]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
