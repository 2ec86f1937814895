"""Check that our layers did not become slower: `python tools/perf.py`.

Ten cases, each interleaved with PyTorch's layer and activation on cold tensors. A ratio of both times varies little
where times do: a busy machine slows both. benchmarks/perf.json has the ratios of known machines, which `--store`
measures. A case fails if in none of three attempts its ratio reaches 0.6 of the stored one, or 0.8 on a machine without
an entry. So a disturbed measurement passes, and a kernel that lost its speed does not.

Run it by `make perf`, and `make perf PERF=--store`: threads that wait must not take the processor from others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

import batchnorm
from batchnorm.bench import record
from batchnorm.bench.cases import Case
from batchnorm.bench.record import BenchError
from batchnorm.bench.rotation import Room
from sweep import figures, race

FILE = Path(__file__).parents[1] / "benchmarks" / "perf.json"
FORMAT = "batchnorm-perf"
ATTEMPTS = 3
SECONDS = 0.5
OF_STORED, ALONE = 0.6, 0.8

CASES = [
    Case((32, 64, 56, 56), "contiguous"),
    Case((32, 64, 56, 56), "channels_last"),
    Case((16, 256, 28, 28), "contiguous", variant="bn+add+relu"),
    Case((16, 256, 28, 28), "channels_last", variant="bn+silu"),
    Case((64, 512, 7, 7), "contiguous"),
    Case((32, 64, 56, 56), "contiguous", "bfloat16"),
    Case((32, 64, 56, 56), "channels_last", "bfloat16", "bn"),
    Case((32, 64, 56, 56), "contiguous", mode="eval"),
    Case((16384, 256), "rows"),
    Case((60, 100), "rows", variant="bn"),
]


def machine_name(machine: Mapping[str, Any], threads: int) -> str:
    """The processor, PyTorch's threads and the caches: a cloud gives one name to several processors."""
    caches = [f"{name} {size >> 10} KiB" for name, size in machine["caches"].items()]
    return ", ".join((machine["processor"], f"{threads} thread{'s' if threads > 1 else ''}", *caches))


def load(path: Path) -> dict[str, Any]:
    """The stored machines: name → date, versions and ratios. Raises BenchError if the file cannot be read."""
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise BenchError(f"{path} is not a file of this tool")
        for entry in stored["machines"].values():
            if not all(ratio > 0 for ratio in entry["ratios"].values()):
                raise BenchError(f"{path} has a ratio that is not more than 0")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BenchError(f"cannot read {path}: {error or type(error).__name__}") from error
    return dict(stored["machines"])


def attempt(case: Case, room: Room) -> float:
    """The ratio of eager's time to ours: of both best times or the median over the rounds, whichever is larger.

    Other processes make either too small, a slower kernel both.
    """
    found = figures(race(case, room, seconds=SECONDS))
    return float(max(found["ratios"]["whole"], found["best"]["ratio"]))


def best_ratio(case: Case, room: Room, limit: float) -> float:
    """The best of several attempts, which end when one reaches the limit."""
    best = 0.0
    for _ in range(ATTEMPTS):
        best = max(best, attempt(case, room))
        if best >= limit:
            break
    return best


def check(ratios: Mapping[str, float], room: Room) -> list[str]:
    """Print each case's ratio and limit; the names of the cases that are below."""
    below = []
    for case in CASES:
        limit = OF_STORED * ratios[case.name] if case.name in ratios else ALONE
        ratio = best_ratio(case, room, limit)
        print(f"{case.name:52} x {ratio:.2f}, at least {limit:.2f}{' BELOW' if ratio < limit else ''}", flush=True)
        if ratio < limit:
            below.append(case.name)
    return below


def entry(room: Room) -> dict[str, Any]:
    """What is stored of a machine: each case's ratio, the median of several attempts."""
    ratios = {}
    for case in CASES:
        ratios[case.name] = round(median(attempt(case, room) for _ in range(ATTEMPTS)), 3)
        print(f"{case.name:52} x {ratios[case.name]:.2f}", flush=True)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"batchnorm": batchnorm.__version__, "torch": torch.__version__},
        "ratios": ratios,
    }


def main(arguments: Sequence[str] | None = None, path: Path = FILE) -> int:
    """Print each case's ratio and limit; exit status 1 if one is below, 2 if nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python tools/perf.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", action="store_true", help="store the ratios of this machine")
    options = parser.parse_args(arguments)
    try:
        machines = load(path)
        record.restart_with_policy("tuned")
        origin = record.begin([], {})
        name = machine_name(origin["machine"], torch.get_num_threads())
        room = Room.of(record.last_level(origin["machine"]), origin["machine"]["memory"])
        if options.store:
            print(name)
            machines[name] = entry(room)
            record.store({"format": FORMAT, "machines": machines}, path)
            return 0
        ratios = machines[name]["ratios"] if name in machines else {}
        print(name if ratios else f"{name}: nothing is stored, so ours must reach {ALONE} of eager's speed")
        below = check(ratios, room)
    except BenchError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if below:
        print(f"{len(below)} of {len(CASES)} cases became slower. If this is intended, store the new ratios: --store")
    return int(bool(below))


if __name__ == "__main__":
    sys.exit(main())
