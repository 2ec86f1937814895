"""Time our layers against PyTorch's over many shapes: `python tools/sweep.py`.

200 cases from (2, 8) to 200 MB, the same in every run: layouts, types, variants and modes are mixed, and sizes grow by
equal factors. In each, our layer runs the kernel that `kernels.choose` selects, interleaved with PyTorch's layer and
activation, on cold tensors. Every fourth case is checked first, unless it is large.

A case is lost if ours is slower by more than 3 % and by more than 10 µs, or, from 50,000 values on, if it is not
faster: both in the median of the rounds and in the best time of each, since other processes disturb either. A case that
seems lost is measured again, three times at most and longer each time; its best attempt counts.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from batchnorm import kernels
from batchnorm.bench import cases, conduct, contenders, record, timing
from batchnorm.bench.cases import Case
from batchnorm.bench.record import BenchError
from batchnorm.bench.rotation import Room, Rotation
from batchnorm.words import plural

FORMAT = "batchnorm-sweep"
COUNT = 200
LARGEST = 200 << 20
SECONDS = 1.0
AGAIN = 3
_LONGER = 1.5

SLOWER, SECONDS_SLOWER = 0.03, 10e-6
"""Ours may be slower by one of them."""
LARGE = 50_000
"""The values of x from which on ours must be faster."""

CHECKED_EACH, CHECKED_BYTES = 4, 32 << 20

_SIDES = (8, 14, 28, 56, 112)
_WIDTHS = (8, 16, 24, 64, 100, 256, 512, 1024, 2048)
FAMILIES: dict[str, tuple[tuple[str, ...], list[tuple[int, ...]]]] = {
    "rows": (("rows",), [(width,) for width in (*_WIDTHS, 4096)]),
    "sequences": (("contiguous",), [(width, length) for width in _WIDTHS for length in (16, 50, 128, 1000)]),
    "images": (("contiguous",), [(width, side, side) for width in _WIDTHS for side in _SIDES]),
    "channels last": (("channels_last",), [(width, side, side) for width in _WIDTHS for side in (*_SIDES, 1, 7)]),
    "short slices": (("contiguous",), [(width, side, side) for width in _WIDTHS for side in (1, 2, 3, 5, 7)]),
    "few channels": (
        ("contiguous", "channels_last"),
        [(width, side, side) for width in (1, 2, 3, 4, 5) for side in (*_SIDES, 224)],
    ),
    "volumes": (
        ("contiguous", "channels_last_3d"),
        [(width, depth, side, side) for width in _WIDTHS for depth in (4, 16) for side in (7, 14, 28)],
    ),
}
"""Name → the layouts, and the shapes without N."""
_DTYPES = {"float32": 12, "bfloat16": 4, "float16": 2, "float64": 2}
_VARIANTS = {"bn+relu": 10, "bn": 5, "bn+silu": 3, "bn+add+relu": 2}
_MODES = {"train": 3, "eval": 1}


def chosen_cases(count: int = COUNT, largest: int = LARGEST) -> list[Case]:
    """The cases, the smallest first. The families take turns; everything else is drawn, always alike."""
    draw, families = random.Random(0), list(FAMILIES.values())
    smallest = Case((2, 8), "rows")
    found = {smallest: None}
    factor = (largest / smallest.tensor_bytes) ** (1 / (count - 1))
    while len(found) < count:
        size = smallest.tensor_bytes * factor ** len(found)
        layouts, shapes = families[len(found) % len(families)]
        dtype, variant, mode = (_drawn(draw, weights) for weights in (_DTYPES, _VARIANTS, _MODES))
        values = size / Case((2, 8), "rows", dtype).itemsize
        fitting = [shape for shape in shapes if 2 * math.prod(shape) <= values] or [min(shapes, key=math.prod)]
        shape = draw.choice(fitting)
        batch = max(2, round(values / math.prod(shape)))
        found[Case((batch, *shape), draw.choice(layouts), dtype, variant, mode)] = None
    return sorted(found, key=lambda case: case.tensor_bytes)


def _drawn(draw: random.Random, weights: dict[str, int]) -> str:
    return draw.choices(list(weights), list(weights.values()))[0]


def race(case: Case, room: Room, *, seconds: float, rounds: int | None = None) -> dict[str, timing.Samples]:
    """Time ours and eager on cold tensors."""
    call = case.make(0)
    rotation = Rotation(call, room.copies(call))
    timed = {"ours": contenders.ours(call), "eager": contenders.eager(call)}
    with torch.set_grad_enabled(case.train):
        return timing.interleaved(
            timed, seconds=seconds, rounds=rounds, seed=0, before=rotation.turn, keep=len(rotation)
        )


def figures(samples: dict[str, timing.Samples]) -> dict[str, Any]:
    """The ratios of eager to ours, how many seconds ours is slower, and both times: medians over the rounds.

    `best` has the ratio of both best times, and how many seconds ours is slower in them.
    """
    ours, eager = samples["ours"], samples["eager"]
    slower = [one - other for one, other in zip(ours.whole, eager.whole, strict=True)]
    return {
        "ratios": {part: found["median"] for part, found in timing.ratios(eager, ours).items()},
        "slower": median(slower),
        "seconds": {"ours": median(ours.whole), "eager": median(eager.whole)},
        "best": {"ratio": min(eager.whole) / min(ours.whole), "slower": min(ours.whole) - min(eager.whole)},
        "rounds": len(slower),
    }


def lost(case: Case, found: dict[str, Any]) -> str | None:
    """Why the case is lost, in the median and in the best times; None if it is not."""
    best = found["best"]
    ratio, slower = max(found["ratios"]["whole"], best["ratio"]), min(found["slower"], best["slower"])
    if slower > SECONDS_SLOWER and ratio < 1 / (1 + SLOWER):
        return f"slower by {100 / ratio - 100:.0f} % and {1e6 * slower:,.0f} µs"
    if math.prod(case.shape) >= LARGE and ratio <= 1:
        return f"not faster, x {ratio:.3f}"
    return None


def measure(case: Case, room: Room, seconds: float) -> dict[str, Any]:
    """Time the case, again if it seems lost; the best attempt's figures, and how many attempts there were."""
    best = figures(race(case, room, seconds=seconds))
    attempts = 1
    while lost(case, best) and attempts <= AGAIN:
        seconds *= _LONGER
        best = max(best, figures(race(case, room, seconds=seconds)), key=lambda found: found["ratios"]["whole"])
        attempts += 1
    return {**best, "attempts": attempts, "lost": lost(case, best)}


def errors(case: Case) -> list[str]:
    """The errors of our outputs, as the bench checks them."""
    call = case.make(0)
    channels = conduct.compared_channels(call, 0)
    conduct.zero_grad_near_kinks(call, channels)
    return conduct.errors(contenders.ours(call).outputs(), contenders.eager(call).outputs(), call, channels)


def choice(case: Case) -> kernels.Choice:
    """The kernel of our layer in this case."""
    return kernels.choose(case.empty(), case.train, bool(case.act or case.residual))


_HEAD = f"{'case':58} kernel   x fwd   x bwd  x both    ours, µs   eager, µs  why"


def row(result: dict[str, Any]) -> str:
    """The line of one case in the table."""
    ratios = [f"{result['ratios'][part]:7.2f}" if part in result["ratios"] else 7 * " " for part in _PARTS]
    times = [f"{1e6 * result['seconds'][name]:11,.1f}" for name in ("ours", "eager")]
    return " ".join((f"{result['name']:58} {result['kernel']:6}", *ratios, *times, f" {result['why']}"))


_PARTS = ("forward", "backward", "whole")


def verdict(results: Sequence[dict[str, Any]]) -> list[str]:
    """The worst cases, those that are wrong or lost, and one line that sums up."""
    if not results:
        return ["no case was measured"]
    worst = sorted(results, key=lambda result: float(result["ratios"]["whole"]))[:5]
    lines = ["", "the worst ratios:", *(f"  {result['ratios']['whole']:.3f}  {result['name']}" for result in worst)]
    wrong = [result for result in results if result["errors"]]
    lines += [f"wrong: {result['name']}: {error}" for result in wrong for error in result["errors"]]
    lost = [result for result in results if result["lost"]]
    lines += [f"lost: {result['name']}: {result['lost']}" for result in lost]
    slower = sum(result["lost"].startswith("slower") for result in lost)
    checked = sum(result["errors"] is not None for result in results)
    middle = median(result["ratios"]["whole"] for result in results)
    return [
        *lines,
        f"{plural(len(results), 'case')}, x {middle:.2f} in the median: "
        f"{len(lost)} lost ({slower} slower, {len(lost) - slower} not faster), {len(wrong)} of {checked} wrong",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 if a case is lost or wrong, 2 if nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python tools/sweep.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases with these words")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for each case, about")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures in this new file")
    options = parser.parse_args(arguments)
    everything = chosen_cases()
    todo = [case for case in everything if cases.matches(case.name, options.filter)]
    try:
        if not options.seconds > 0:
            raise BenchError(f"--seconds must be more than 0, got {options.seconds}")
        if not todo:
            raise BenchError(
                f"no case matches --filter {options.filter!r}: a case is named like {everything[0].name!r}"
            )
        if options.json is not None and options.json.exists():
            raise BenchError(f"{options.json} exists: choose another file")
        record.restart_with_policy("tuned")
        stored = record.begin([], {"seconds": options.seconds, "filter": options.filter}) | {"format": FORMAT}
        results: list[dict[str, Any]] = stored["results"]
        room = Room.of(record.last_level(stored["machine"]), stored["machine"]["memory"])
        stored["command"] = "python tools/sweep.py"
        print(_HEAD, flush=True)
        stored["status"] = "complete" if _run(todo, everything, options.seconds, room, results) else "interrupted"
        print("\n".join(verdict(results)))
        if options.json is not None:
            record.store(stored, options.json)
    except BenchError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if stored["status"] == "interrupted":
        return 130
    return int(any(result["lost"] or result["errors"] for result in results))


def _run(
    todo: Sequence[Case], everything: Sequence[Case], seconds: float, room: Room, results: list[dict[str, Any]]
) -> bool:
    """Measure and print one case after the other, into `results`; False if Ctrl-C stopped it."""
    try:
        for case in todo:
            checked = everything.index(case) % CHECKED_EACH == 0 and case.tensor_bytes <= CHECKED_BYTES
            chosen = choice(case)
            result = {
                "case": {**asdict(case), "shape": list(case.shape)},
                "name": case.name,
                "kernel": chosen.name,
                "why": chosen.why,
                "errors": errors(case) if checked else None,
                **measure(case, room, seconds),
            }
            results.append(result)
            print(row(result), flush=True)
    except KeyboardInterrupt:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
