"""Facts about this machine: measured at first need, stored next to the compiled code, the same for later processes.

`probes` measures; this module decides when. It never fails and never measures in vain: where the result cannot be
stored or nothing can be compiled, it returns fixed defaults. What was measured while other processes used the cores is
measured again by the next two processes, and the least disturbed measurement counts. BATCHNORM_MACHINE overrides it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NoReturn

import torch

from batchnorm.kernels.contract import UnavailableError
from batchnorm.kernels.cpu import compiler, copying, probes, system, threads
from batchnorm.kernels.cpu.probes import Rate

VARIABLE = "BATCHNORM_MACHINE"
MEASURED, STORED = "measured now", "stored"

_DEFAULTS = "defaults"
_FIELDS = {"l2": "l2_bytes", "cached": "cached_bytes"}
_LEAST = {"l2": 64 << 10, "cached": 0}
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}
_LARGEST = 1 << 40
_DISTURBED = 1e-3  # seconds; a region takes microseconds, unless its threads wait for those of other processes
_UTILIZED = 0.75  # of the threads' time on the cores; it is half or less where they wait for another process
_MEASUREMENTS = 3  # where each was disturbed
_BUSY = "other processes use the cores; the next process measures again"
_SHARE = 8  # part of the free memory that a measurement may use
_MOST_TEXT = 64 << 10  # bytes of a stored file


@dataclass(frozen=True)
class Facts:
    """What calls and their choice need to know about the machine.

    Attributes:
        l2_bytes: what one thread can re-read clearly faster than from the next level, while all threads do.
        cached_bytes: the largest copy, source and target together, that is faster by ordinary stores than past the
            caches: the part of the last level that is really there.
        bandwidth: bytes per second of copies by all threads, by total size.
        read_bandwidth: pairs of a size and the bytes per second at which all threads read it again and again.
        region_seconds: what one call of `threads.run` costs besides its work.
        utilization: the part of the time of the measurement that the threads were running; the rest others took.
        measurements: how many there were. Of several, the one with the best utilization counts.
        origin: where the facts come from, in words.
    """

    l2_bytes: int
    cached_bytes: int
    bandwidth: tuple[Rate, ...]
    read_bandwidth: tuple[tuple[int, float], ...]
    region_seconds: float
    utilization: float = 1.0
    measurements: int = 1
    origin: str = field(default=_DEFAULTS, compare=False)

    def copy_speed(self, size: int) -> float:
        """Bytes per second of a copy of this size, source and target together: the nearest larger measured one's."""
        rate = next((rate for rate in self.bandwidth if rate.total >= size), self.bandwidth[-1])
        return max(rate.ordinary, rate.nontemporal)

    @property
    def is_final(self) -> bool:
        """Whether later processes measure no more."""
        return self.utilization >= _UTILIZED or self.measurements >= _MEASUREMENTS


DEFAULTS = Facts(
    l2_bytes=512 << 10,
    cached_bytes=32 << 20,
    bandwidth=(Rate(2 << 20, 100e9, 40e9), Rate(16 << 20, 60e9, 40e9), Rate(64 << 20, 25e9, 30e9)),
    read_bandwidth=((2 << 20, 120e9), (16 << 20, 80e9), (64 << 20, 25e9)),
    region_seconds=5e-6,
)
"""Cautious values for any processor of the last ten years."""

_known: dict[int, Facts] = {}


def facts() -> Facts:
    """The facts for PyTorch's present number of threads; at the first call in this process loaded, or measured.

    A forked child has those of its parent. Raises ValueError if BATCHNORM_MACHINE cannot be parsed.
    """
    count = torch.get_num_threads()
    return _known.get(count) or _learn(count)


def file(count: int) -> Path:
    """Where the facts for this number of threads are stored.

    One file for each processor, number of threads and limits of the container, of which neither the name of the
    container nor that of the job is part: a new job on the same machine does not measure again.
    """
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in (probes, copying))
    parts = (compiler.processor(), system.processors(), count, threads.can_share(), *system.limits())
    key = hashlib.sha256("|".join(map(str, parts)).encode() + sources).hexdigest()[:32]
    return compiler.folder() / f"machine-{key}.json"


def _learn(count: int) -> Facts:
    with compiler._lock:  # which fork() waits for
        if count not in _known:
            is_orphan = threads.is_forked() and _known
            _known[count] = next(reversed(_known.values())) if is_orphan else _found(count)
        return _known[count]


def _found(count: int) -> Facts:
    """The facts that the variable asks for, over those of the machine."""
    chosen, uses_defaults = parse(os.environ.get(VARIABLE, ""))
    base = DEFAULTS if uses_defaults else _of_machine(count)
    names = ", ".join(([_DEFAULTS] if uses_defaults else []) + [name for name in _FIELDS if _FIELDS[name] in chosen])
    if not names:
        return base
    others = "" if uses_defaults or len(chosen) == len(_FIELDS) else f"; the rest {base.origin}"
    return replace(base, **chosen, origin=f"{VARIABLE}: {names}{others}")


def parse(text: str) -> tuple[dict[str, Any], bool]:
    """The fields that a value of BATCHNORM_MACHINE sets, and whether the others have their defaults.

    Raises ValueError, which shows right values, for any other.
    """
    chosen: dict[str, Any] = {}
    uses_defaults = False
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = item.partition("=")
        number = re.fullmatch(r"([0-9]{1,12})([KMG]?)", size)
        if item == _DEFAULTS:
            uses_defaults = True
        elif name in _FIELDS and number and _LEAST[name] <= int(number[1]) << _UNITS[number[2]] <= _LARGEST:
            chosen[_FIELDS[name]] = int(number[1]) << _UNITS[number[2]]
        else:
            raise ValueError(
                f"{VARIABLE}={text!r} has {item!r}: it may have l2=SIZE, cached=SIZE and defaults, with commas "
                "between them; a SIZE is a number of bytes, or of K, M or G, as in l2=1M,cached=32M; l2 is 64K or more"
            )
    return chosen, uses_defaults


def _of_machine(count: int) -> Facts:
    """Stored facts, or measured and stored ones, or the defaults."""
    try:
        path = compiler._private(compiler.folder()) / file(count).name
        stored = _read(path)
        if stored is not None and (stored.is_final or threads.is_forked()):
            return stored
        if threads.is_forked():
            _give_up("a forked process has one thread to measure with")
        with tempfile.TemporaryFile(dir=path.parent) as trial:  # before time is spent on what cannot be stored
            trial.write(bytes(4096))
        measured = _measure(count) if stored is None else _measured_again(count, stored)
        compiler.write_atomically(path, (json.dumps(asdict(measured), indent=1) + "\n").encode())
        return measured
    except Exception as error:  # whatever is wrong with this machine, layers go on
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return replace(DEFAULTS, origin=f"{_DEFAULTS} ({reason})")


def _measured_again(count: int, stored: Facts) -> Facts:
    try:
        best = max(stored, _measure(count), key=lambda found: found.utilization)
    except UnavailableError:
        best = stored
    return replace(best, measurements=stored.measurements + 1)


def _give_up(reason: str) -> NoReturn:
    raise UnavailableError(reason)


def _measure(count: int) -> Facts:
    _undisturbed_region(count)
    free = system.memory()
    size = probes.MOST_MEMORY if free is None else min(probes.MOST_MEMORY, free // _SHARE) >> 20 << 20
    if size < probes.LEAST_MEMORY:
        _give_up("too little memory is free to measure")
    with probes.touched(size) as address:
        prober = probes.Prober(address, size, count)
        start, used = perf_counter(), process_time()
        l2 = prober.l2_bytes(system.caches().get("L2", DEFAULTS.l2_bytes))
        copies, reading = prober.bandwidths(l2)
        used, elapsed = process_time() - used, perf_counter() - start
    if not copies:
        _give_up(_BUSY)
    cached = probes.cached_bytes(copies, l2, count)
    utilization = _utilization(used, elapsed, count)
    measured = Facts(l2, cached, copies, reading, _undisturbed_region(count), utilization, origin=MEASURED)
    return measured if _is_plausible(measured) else DEFAULTS  # stored as well: a broken clock stays broken


def _utilization(used: float, elapsed: float, count: int) -> float:
    """The part of `elapsed` seconds that `count` threads were running, with `used` seconds on the processors."""
    cores = min(count, system.processors()) if threads.can_share() else 1
    return min(1.0, used / (cores * elapsed)) if elapsed > 0 else 0.0


def _undisturbed_region(count: int) -> float:
    seconds = probes.region_seconds(count)
    if seconds > _DISTURBED:
        _give_up(_BUSY)
    return seconds


def _read(path: Path) -> Facts | None:
    """Stored facts; None if the file is missing or damaged."""
    try:
        with path.open("rb") as opened:
            stored = json.loads(opened.read(_MOST_TEXT))
        found = Facts(
            stored["l2_bytes"],
            stored["cached_bytes"],
            tuple(Rate(*rate) for rate in stored["bandwidth"]),
            tuple((size, rate) for size, rate in stored["read_bandwidth"]),
            stored["region_seconds"],
            stored["utilization"],
            stored["measurements"],
            STORED,
        )
        return found if _is_plausible(found) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _is_plausible(found: Facts) -> bool:
    """Whether all values have their types, and no more than the factor that processors differ by is between them."""

    def conditions() -> Iterator[bool]:
        yield _is_size(found.l2_bytes) and probes.L2_LIMITS[0] <= found.l2_bytes <= probes.L2_LIMITS[1]
        yield _is_size(found.cached_bytes) and found.l2_bytes <= found.cached_bytes <= probes.CACHED_LIMIT
        yield _is_number(found.region_seconds, 1e-9, _DISTURBED)
        yield _is_number(found.utilization, 0.0, 1.0) and _is_size(found.measurements)
        for rates in (found.bandwidth, found.read_bandwidth):
            totals = [rate[0] for rate in rates]
            yield 0 < len(totals) == len(set(totals))
            yield all(map(_is_size, totals)) and totals == sorted(totals)
            yield all(_is_number(value, 1e7, 1e15) for rate in rates for value in rate[1:])

    return all(conditions())


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST


def _is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and isfinite(value) and least <= value <= most
