"""Interleaved rounds: each times every contender once, in random order, so that disturbances affect all alike.

A sample is the mean of enough calls to be well above the clock's resolution, the same number in every round. Results
are freed after the clock was stopped, or some calls later, so that the next calls write to other memory. Reported are
the median and the quartiles over the rounds, and ratios as the median of the ratios within each round.

A GPU runs asynchronously, so CUDA events are read instead of the host's clock: a time passes on its stream between two
events, and includes waiting for a slower host. Nothing waits for the device within a sample. Before each call the L2 is
overwritten: in a network, too, a layer's inputs are not left there by its last step.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from batchnorm.bench.contenders import Contender, ForwardOnly

MIN_ROUNDS = 7
MAX_ROUNDS = 301
SAMPLE_SECONDS = 0.5e-3
_MAX_CALLS = 1000
_TOO_LONG = 8

Clock = Callable[[], Any]
"""Returns a time stamp; the difference of two is in nanoseconds, and may wait for a device."""

Before = Callable[[Contender], object]
"""Runs before every call of a contender."""


@dataclass
class Samples:
    """Seconds per call, one number for each round; `backward` is empty where forward is the whole call."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    @property
    def whole(self) -> list[float]:
        return [sum(pair) for pair in zip(self.forward, self.backward, strict=True)] if self.backward else self.forward

    @property
    def parts(self) -> tuple[str, ...]:
        return ("whole", "forward", "backward") if self.backward else ("whole",)


def interleaved(
    contenders: Mapping[str, Contender],
    *,
    seconds: float,
    rounds: int | None,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    clock: Clock = time.perf_counter_ns,
    before: Before = lambda contender: None,
    keep: int = 0,
    calls: int | None = None,
) -> dict[str, Samples]:
    """Time every contender: `rounds` rounds, or an odd number from 7 on until about `seconds` have been spent.

    If 7 rounds would take eight times as long, 3 or 5 are enough. The caller sets the mode of autograd. `before` runs
    before every call and is not timed. The results of the last `keep` calls stay alive. `calls` in a sample are by
    default as many as make it well above the clock's resolution. Raises KeyboardInterrupt after the round in which
    `stop` returns True.
    """
    samples = {name: Samples() for name in contenders}
    kept: deque[Any] = deque(maxlen=keep)
    counts = {}
    for name, contender in contenders.items():
        _sample(contender, 1, clock, before, kept)  # lazy initialization happens here
        once = sum(_sample(contender, 1, clock, before, kept))
        counts[name] = calls or max(1, min(_MAX_CALLS, math.ceil(SAMPLE_SECONDS / max(once, 1e-9))))
    order, draw = list(contenders), random.Random(seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, done = clock(), 0
        while not enough(done, (clock() - start) * 1e-9, seconds, rounds):
            if stop():
                raise KeyboardInterrupt
            draw.shuffle(order)
            for name in order:
                forward, backward = _sample(contenders[name], counts[name], clock, before, kept)
                samples[name].forward.append(forward)
                if contenders[name].backward is not None:
                    samples[name].backward.append(backward)
            done += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def enough(done: int, spent: float, seconds: float, rounds: int | None) -> bool:
    """Whether `done` rounds in `spent` seconds are enough."""
    if rounds is not None:
        return done >= rounds
    if done % 2 == 0:
        return False
    if done < MIN_ROUNDS:
        return done >= 3 and spent > _TOO_LONG * seconds
    return spent >= seconds or done >= MAX_ROUNDS


def _sample(contender: Contender, calls: int, clock: Clock, before: Before, kept: deque[Any]) -> tuple[float, float]:
    """Seconds of forward and of backward, the mean of `calls`. Results go into `kept`, which frees the oldest ones."""
    marks = []
    for _ in range(calls):
        before(contender)
        start = clock()
        y = contender.forward()
        middle = clock()
        grads = None if contender.backward is None else contender.backward(y)
        end = clock()
        marks.append((start, middle, end))
        kept.append((y, grads))
        del y, grads
    forward = sum(middle - start for start, middle, _ in marks)
    backward = sum(end - middle for _, middle, end in marks)
    return forward * 1e-9 / calls, backward * 1e-9 / calls


QUARTILES = {"median": 0.5, "q1": 0.25, "q3": 0.75, "min": 0.0, "max": 1.0}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.quantile(values, q)) for name, q in QUARTILES.items()}


def ratio(above: Sequence[float], below: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """The quartiles of above/(scale·below), round by round."""
    return quartiles([a / (scale * b) for a, b in zip(above, below, strict=True)])


def ratios(above: Samples, below: Samples) -> dict[str, Any]:
    """The `ratio` of each part that both have."""
    parts = [part for part in above.parts if part in below.parts]
    return {part: ratio(getattr(above, part), getattr(below, part)) for part in parts}


def summary(samples: Samples) -> dict[str, Any]:
    """The stored numbers of one contender: the rounds, and the quartiles of each part."""
    return {"rounds": len(samples.forward), **{part: quartiles(getattr(samples, part)) for part in samples.parts}}


WARM = 3
"""Calls before the recording, which compile kernels and allocate memory."""


def replayed(contender: Contender) -> Contender:
    """The contender's forward and backward, recorded once as a CUDA graph, then replayed.

    A small case then shows the GPU's work without the host's calls: in a training step that keeps the GPU busy, the
    host is ahead and costs nothing. Autograd is in the caller's mode.
    """

    def call() -> None:
        y = contender.forward()
        if contender.backward is not None:
            contender.backward(y)

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return ForwardOnly(graph.replay)


class Mark:
    """A time stamp on the current stream of the GPU; the difference of two, in nanoseconds, waits for both."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def __sub__(self, earlier: Mark) -> int:
        self.event.synchronize()
        return int(1e6 * earlier.event.elapsed_time(self.event))


def clock_of(device: str) -> Clock:
    return Mark if device == "cuda" else time.perf_counter_ns


def cold_cache(device: str) -> Before:
    """A function to run before each call that overwrites the GPU's L2; does nothing on the CPU."""
    if device != "cuda":
        return lambda contender: None
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    overwritten = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")
    return lambda contender: overwritten.zero_()


def why_no_device(device: str) -> str | None:
    """One line that says why the device cannot be measured; None if it can."""
    if device not in ("cpu", "cuda"):
        return f"unknown device={device!r}: use cpu or cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return f"device='cuda': PyTorch {torch.__version__} sees no GPU here"
    return None


def gpu_facts(device: str) -> dict[str, Any] | None:
    """The GPU's name, multiprocessors, bytes of memory and L2, and versions of CUDA and HIP; None for the CPU."""
    if device != "cuda":
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "L2": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
