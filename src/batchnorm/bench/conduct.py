"""All of `batchnorm bench` in order: each case is made, gated, timed and stored before the next one begins."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from batchnorm import kernels
from batchnorm.bench import cases, contenders, device, gate, gpu_cases, models, timing, traffic
from batchnorm.bench.cases import Case
from batchnorm.bench.contenders import Contender
from batchnorm.bench.models import Convert, Workload
from batchnorm.bench.record import BenchError, begin, check_vacant, default_path, last_level, store
from batchnorm.bench.replay import Replayed
from batchnorm.interrupts import noting_interrupts
from batchnorm.kernels.gpu import scope as gpu_scope

_SECONDS = {"quick": 0.6, "default": 1.5, "full": 1.5}
_PARTS = ("whole", "forward", "backward")


@dataclass(frozen=True)
class Settings:
    """What to measure. scope is quick, default or full; repeats the number of rounds, None for as many as it takes.

    called: on a GPU, calls are timed as Python makes them.
    """

    scope: str = "default"
    models: bool = False
    filter: str = ""
    compile: bool = False
    threads: int | None = None
    repeats: int | None = None
    seed: int = 0
    device: str = "cpu"
    called: bool = False

    @property
    def replayed(self) -> bool:
        """Whether calls are recorded and replayed, without the host."""
        return self.device == "cuda" and not self.called


def check(settings: Settings) -> None:
    """Raise BenchError where this cannot be measured: numbers out of range, or a filter that leaves nothing."""
    for name, value in (("--threads", settings.threads), ("--repeats", settings.repeats)):
        if value is not None and value < 1:
            raise BenchError(f"{name} must be at least 1, got {value}")
    if why := device.why_no_device(settings.device):
        raise BenchError(why)
    if settings.called and settings.device == "cpu":
        raise BenchError("--called is for --device cuda: on the CPU calls are never timed in another way")
    if not chosen(settings):
        there = (
            0 if settings.models else sum(cases.matches(case.name, settings.filter) for case in _set(settings).EVERY)
        )
        hint = (
            f"--full has {there} that do" if there else "a case is named like '32x64x56x56 channels_last float32 train'"
        )
        raise BenchError(f"no case matches --filter {settings.filter!r}: {hint}")


def chosen(settings: Settings) -> Sequence[Case | Workload]:
    """The cases, or with `models` the workloads, that are measured."""
    if settings.models:
        offered = models.workloads(settings.scope == "quick", settings.device)
        return [workload for workload in offered if cases.matches(workload.name, settings.filter)]
    sets = _set(settings)
    scope = {"quick": sets.QUICK, "default": sets.DEFAULT, "full": sets.EVERY}[settings.scope]
    return [case for case in scope if cases.matches(case.name, settings.filter)]


def _set(settings: Settings) -> ModuleType:
    return gpu_cases if settings.device == "cuda" else cases


def conduct(
    settings: Settings,
    out: Path | None,
    *,
    force: bool = False,
    arguments: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], Path]:
    """Measure, and store after every case; returns the record and its file.

    Ctrl-C ends it early with the status "interrupted". Raises BenchError.
    """
    check(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    record = begin(arguments, {**asdict(settings), "threads": torch.get_num_threads()}, device.gpu_facts(settings.device))
    path = default_path(record) if out is None else out
    check_vacant(path, force=force)
    if settings.device == "cuda":
        gpu_scope.ASKED_FOR = True  # who measures them asks for them
    convert = None
    if settings.models:
        convert = models.converter()
        for workload in chosen(settings):
            assert isinstance(workload, Workload)
            models.NETWORKS[workload.model]()  # before anything is stored: is the package there?
    elif settings.compile and (why := contenders.why_not_compile(settings.device)):
        raise BenchError(why)
    if not settings.models and settings.device == "cpu":
        there = "JAX runs on threads of its own, as many as there are cores"
        record["notes"].append(there if contenders.jax_is_there() else "JAX is not installed and was not timed")
    if settings.replayed and not settings.models:
        record["notes"].append("calls were recorded as CUDA graphs and replayed; the L2 was written over before each")
    store(record, path)
    try:
        with noting_interrupts() as stop:
            _measure(record, path, settings, convert, progress, stop)
        record["status"] = "complete"
    except KeyboardInterrupt:
        record["status"] = "interrupted"
        tell("interrupted: storing what was measured ...")
    except BaseException:
        record["status"] = "failed"
        raise
    finally:
        store(record, path)
    return record, path


def _measure(
    record: dict[str, Any],
    path: Path,
    settings: Settings,
    convert: Convert | None,
    progress: Callable[[int, int], None],
    stop: Callable[[], bool],
) -> None:
    todo = chosen(settings)
    progress(0, len(todo))
    cache = last_level(record["machine"])
    for done, what in enumerate(todo, start=1):
        if isinstance(what, Case):
            record["results"].append(measure(what, settings, cache, stop))
        else:
            assert convert is not None
            rounds = settings.repeats or (5 if settings.scope == "quick" else models.STEPS)
            record["models"].append(models.measure(what, convert, rounds=rounds, seed=settings.seed, stop=stop))
        store(record, path)
        progress(done, len(todo))


def measure(
    case: Case, settings: Settings, cache_bytes: int, stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """One case: its gate, and where that is green its times. Raises KeyboardInterrupt where `stop` says so."""
    gc.collect()
    call = case.make(settings.seed, settings.device)
    channels = gate.compared_channels(call, settings.seed)
    gate.clear_of_kinks(call, channels)
    ours, eager = contenders.ours(call), contenders.eager(call)
    theirs = eager.outputs()
    wrong = gate.errors(ours.outputs(), theirs, call, channels)
    result: dict[str, Any] = {
        "case": {**asdict(case), "shape": list(case.shape)},
        "name": case.name,
        "kernel": kernels.choose(call.x, call.training, bool(call.act or call.residual is not None)).name,
        "gate": {"passed": not wrong, "channels": len(channels), "errors": wrong},
    }
    if wrong:
        return result
    others: dict[str, Contender] = {"floor": contenders.Floor(call)}
    excluded = {}
    for name, make in _others(case, settings).items():
        other = make(call)
        with torch.set_grad_enabled(case.train):
            differs = gate.differences(other.outputs(), theirs)
        if differs:
            excluded[name] = differs
        else:
            others[name] = other
    del theirs
    timed: dict[str, Contender] = {"ours": ours, "eager": eager, **others}
    with torch.set_grad_enabled(case.train):
        if settings.replayed:
            timed = {name: Replayed(contender, case.train) for name, contender in timed.items()}
        samples = timing.interleaved(
            timed,
            train=case.train,
            seconds=_SECONDS[settings.scope],
            rounds=settings.repeats,
            seed=settings.seed,
            stop=stop,
            clock=device.clock_of(settings.device),
            before=device.cold_cache(settings.device),
        )
    if excluded:
        result["excluded"] = excluded
    return result | figures(case, samples, {name: timed[name].apart for name in timed}, cache_bytes)


def _others(case: Case, settings: Settings) -> dict[str, Callable[..., Any]]:
    """Who is timed besides ours, eager and the floor."""
    others: dict[str, Callable[..., Any]] = {}
    if case.variant != "bn":
        others["in place"] = lambda call: contenders.eager(call, inplace=True)
    if settings.compile:
        others["compile"] = contenders.compiled
        if settings.device == "cuda":  # whose graphs are recorded here, or else by the compiler
            mode = "max-autotune-no-cudagraphs" if settings.replayed else "max-autotune"
            others["autotune"] = lambda call: contenders.compiled(call, mode)
    if settings.device == "cpu" and contenders.jax_is_there():
        others["jax"] = lambda call: contenders.Jax(call, case.layout.startswith("channels_last"))
    return others


def figures(case: Case, samples: dict[str, timing.Samples], apart: dict[str, bool], cache_bytes: int) -> dict[str, Any]:
    """What is stored of a case's samples.

    ratios     each contender's time over ours, round by round; of eager also forward and backward
    floors     our time over that of the copies that `traffic` counts, round by round
    """
    floor = traffic.copies(case, cache_bytes)
    ours, copy = samples["ours"], samples["floor"].whole
    parts = _PARTS if case.train and apart["ours"] else _PARTS[:1]
    amounts = {"whole": floor.whole, "forward": floor.forward, "backward": floor.backward}
    ratios: dict[str, Any] = {
        name: {
            part: timing.ratio(getattr(other, part), getattr(ours, part))
            for part in (parts if apart[name] else _PARTS[:1])
        }
        for name, other in samples.items()
        if name not in ("ours", "floor")
    }
    speed = traffic.gigabytes_per_second
    return {
        "copies": {part: amounts[part] for part in parts},
        "contenders": {name: timing.summary(one, apart[name] and case.train) for name, one in samples.items()},
        "ratios": ratios,
        "floors": {part: timing.ratio(getattr(ours, part), copy, amounts[part]) for part in parts},
        "gigabytes_per_second": {
            name: speed(case, amount, timing.quartiles(samples[name].whole)["median"])
            for name, amount in ((name, 1.0 if name == "floor" else floor.whole) for name in samples)
        },
    }
