"""Run `batchnorm bench`: create, check, time and store one case after the other."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels
from batchnorm.bench import cases, contenders, memory, models, networks, timing
from batchnorm.bench.cases import Case, copies, gigabytes_per_second
from batchnorm.bench.contenders import Contender
from batchnorm.bench.models import Workload
from batchnorm.bench.record import BenchError, begin, check_vacant, default_path, last_level, second_level, store
from batchnorm.bench.rotation import Room, Rotation
from batchnorm.kernels.gpu import plan as gpu_plan
from batchnorm.runs.interrupts import noting_interrupts
from batchnorm.testing import Call, Outputs, select, truth, verdicts

_SECONDS = {"quick": 0.6, "default": 1.2, "full": 1.5}
_COLD = 0.6
"""The share of the time that the cold rounds get, where warm ones follow."""


@dataclass(frozen=True)
class Settings:
    """What to measure: the options of the command. scope is quick, default or full.

    memory: measure no time, but the memory of steps, of these networks or of all, with this batch or each one's own.
    compile: time torch.compile in every case, or in none. None: where a compiler works, in the cases of
    `cases.COMPILED`, and in networks on the CPU unless the scope is quick.
    """

    scope: str = "default"
    models: bool = False
    filter: str = ""
    compile: bool | None = None
    threads: int | None = None
    repeats: int | None = None
    seed: int = 0
    device: str = "cpu"
    called: bool = False
    memory: bool = False
    networks: tuple[str, ...] = ()
    batch: int | None = None

    @property
    def replayed(self) -> bool:
        """Whether calls are recorded as CUDA graphs and replayed, which leaves out the time of Python."""
        return self.device == "cuda" and not self.called

    @property
    def rotates(self) -> bool:
        """Whether calls take copies of their tensors in turn. On a GPU the L2 is overwritten before each call."""
        return self.device == "cpu"


def check(settings: Settings) -> None:
    """Raise BenchError for settings that cannot be measured: numbers out of range, or a filter without matches."""
    for name, value in (("threads", settings.threads), ("repeats", settings.repeats), ("batch", settings.batch)):
        if value is not None and value < 1:
            raise BenchError(f"{name} must be at least 1, got {value}")
    if why := timing.why_no_device(settings.device):
        raise BenchError(why)
    if settings.called and settings.device == "cpu":
        raise BenchError("called=True needs device='cuda': on the CPU, calls are always timed from Python")
    if not chosen_cases(settings):
        all_cases = [] if settings.models or settings.memory else cases.SETS[settings.device]["full"]
        matching = sum(cases.matches(case.name, settings.filter) for case in all_cases)
        example = "a case is named like '32x64x56x56 channels_last float32 train'"
        hint = f"scope='full' has {matching} that do" if matching else example
        raise BenchError(f"no case matches filter={settings.filter!r}: {hint}")


def chosen_cases(settings: Settings) -> Sequence[Case | Workload]:
    """The cases to measure; with `settings.models` or `settings.memory`, the workloads."""
    quick = settings.scope == "quick"
    if settings.models or settings.memory:
        offered = (
            memory.workloads(settings.networks, quick, settings.device, settings.batch)
            if settings.memory
            else models.workloads(quick, settings.device)
        )
        return [workload for workload in offered if cases.matches(workload.name, settings.filter)]
    return [case for case in cases.SETS[settings.device][settings.scope] if cases.matches(case.name, settings.filter)]


def conduct(
    settings: Settings,
    out: Path | None,
    *,
    force: bool = False,
    arguments: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    print_line: Callable[[str], None] = lambda line: None,
    announce: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], Path]:
    """Measure all cases and store the record after each; return the record and its path.

    `announce` receives a line for each network that is measured next.
    Ctrl-C stops early with the status "interrupted". Raises BenchError.
    """
    check(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    record = begin(
        arguments, {**asdict(settings), "threads": torch.get_num_threads()}, timing.gpu_facts(settings.device)
    )
    path = default_path(record) if out is None else out
    check_vacant(path, force=force)
    if settings.device == "cuda":
        gpu_plan.ENABLED = True  # off by default
    todo = chosen_cases(settings)
    if settings.models or settings.memory:
        for model in {workload.model for workload in todo if isinstance(workload, Workload)}:
            with torch.device("meta"):
                networks.MODELS[model].build()  # raises now if the package is missing, before anything is stored
    compiled = _compiled(settings, todo, record["notes"])
    timed = not settings.models and not settings.memory
    if timed and settings.device == "cpu":
        note = "JAX runs on its own threads, one per core"
        record["notes"].append(note if contenders.has_jax() else "JAX is not installed and was not timed")
    if settings.memory and settings.device == "cpu":
        record["notes"].append("each step was measured in a process in which glibc returns freed blocks at once")
    if settings.replayed and timed:
        record["notes"].append("calls were recorded as CUDA graphs and replayed; the L2 was overwritten before each")
    store(record, path)
    try:
        with noting_interrupts() as stop:
            progress(0, len(todo))
            begun = time.monotonic()
            for done, case in enumerate(todo, start=1):
                if isinstance(case, Case):
                    chosen = replace(settings, compile=case in compiled)
                    record["results"].append(measure(case, chosen, record["machine"], stop))
                elif settings.memory:
                    announce(_next(case, done, len(todo), time.monotonic() - begun))
                    threads = torch.get_num_threads()
                    record["memory"].append(memory.measure(case, seed=settings.seed, threads=threads, stop=stop))
                else:
                    rounds = settings.repeats or (3 if settings.scope == "quick" else models.STEPS)
                    announce(_next(case, done, len(todo), time.monotonic() - begun))
                    options: dict[str, Any] = {"rounds": rounds, "seed": settings.seed, "stop": stop}
                    gc.collect()  # networks have cycles: the last ones would stay beside the next
                    record["models"].append(models.measure(case, compile=case in compiled, **options))
                store(record, path)
                progress(done, len(todo))
        record["status"] = "complete"
    except KeyboardInterrupt:
        record["status"] = "interrupted"
        print_line("interrupted: storing what was measured ...")
    except BaseException:
        record["status"] = "failed"
        raise
    finally:
        store(record, path)
    return record, path


def _next(workload: Workload, number: int, count: int, seconds: float) -> str:
    """The line that announces a network, after `seconds` for those before it."""
    left = f", about {math.ceil(seconds / (number - 1) * (count - number + 1) / 60)} min left" if number > 1 else ""
    return f"{number} of {count}: {workload.name}{left}"


def _compiled(settings: Settings, todo: Sequence[Case | Workload], notes: list[str]) -> set[Case | Workload]:
    """The cases in which torch.compile is timed: none without a compiler. A note or a BenchError then says why."""
    if settings.memory:
        default = set()
    elif settings.models:
        default = set(todo) if settings.device == "cpu" and settings.scope != "quick" else set()
    else:
        default = set(todo) & cases.COMPILED[settings.device, settings.scope]
    chosen = {None: default, True: set(todo), False: set()}[settings.compile]
    why = contenders.why_not_compile(settings.device) if chosen else None
    if why is None:
        return chosen
    if settings.compile:
        raise BenchError(why)
    notes.append(f"torch.compile was not timed: {why}")
    return set()


def measure(
    case: Case, settings: Settings, machine: dict[str, Any], stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Check one case, and time it if its results are correct. Raises KeyboardInterrupt when `stop` returns True.

    On a CPU it is timed cold (`rotation`), and warm, too, if the caches may keep its tensors.
    """
    gc.collect()
    call = case.make(settings.seed, settings.device)
    channels = compared_channels(call, settings.seed)
    zero_grad_near_kinks(call, channels)
    ours, eager = contenders.ours(call), contenders.eager(call)
    theirs = eager.outputs()
    wrong = errors(ours.outputs(), theirs, call, channels)
    result: dict[str, Any] = {
        "case": {**asdict(case), "shape": list(case.shape)},
        "name": case.name,
        "kernel": kernels.choose(call.x, call.training, bool(call.act or call.residual is not None)).name,
        "gate": {"passed": not wrong, "channels": len(channels), "errors": wrong},
    }
    if wrong:
        return result
    timed: dict[str, Contender] = {"ours": ours, "eager": eager, "floor": contenders.floor(call)}
    excluded = {}
    for name, make in _others(case, settings).items():
        other = make(call)
        with torch.set_grad_enabled(case.train):
            differs = differences(other.outputs(), theirs)
        if differs:
            excluded[name] = differs
        else:
            timed[name] = other
    del theirs
    if excluded:
        result["excluded"] = excluded
    with torch.set_grad_enabled(case.train):
        return result | _times(case, call, timed, settings, machine, stop)


def _times(
    case: Case,
    call: Call,
    timed: dict[str, Contender],
    settings: Settings,
    machine: dict[str, Any],
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """The stored numbers of the contenders in the rounds of a case, cold, and in `warm` those of the warm rounds."""
    cache, seconds = second_level(machine), _SECONDS[settings.scope]
    options: dict[str, Any] = {"rounds": settings.repeats, "seed": settings.seed, "stop": stop}
    if settings.replayed:
        timed = {name: timing.replayed(contender) for name, contender in timed.items()}
    if not settings.rotates:
        options |= {"clock": timing.clock_of(settings.device), "before": timing.cold_cache(settings.device)}
        return figures(case, timing.interleaved(timed, seconds=seconds, **options), cache)
    room = Room.of(last_level(machine), machine["memory"])
    may_be_warm = room.holds(call)
    rotation = Rotation(call, room.copies(call))
    cold_seconds = _COLD * seconds if may_be_warm else seconds
    cold = timing.interleaved(timed, seconds=cold_seconds, before=rotation.turn, keep=len(rotation), **options)
    result = {"rotated": len(rotation), **figures(case, cold, cache)}
    if may_be_warm:
        timed = {**timed, "floor": contenders.floor(call, cold=False)}
        rotation.stop(timed.values())
        warm = timing.interleaved(timed, seconds=seconds - cold_seconds, **options)
        result["warm"] = figures(case, warm, cache)
    return result


def _others(case: Case, settings: Settings) -> dict[str, Callable[..., Any]]:
    """The contenders besides ours, eager and the floor."""
    others: dict[str, Callable[..., Any]] = {}
    if case.variant != "bn":
        others["in place"] = lambda call: contenders.eager(call, inplace=True)
    if settings.compile:
        others["compile"] = contenders.compiled
        if settings.device == "cuda":  # CUDA graphs are recorded by the compiler or by `timing.replayed`, not by both
            mode = "max-autotune-no-cudagraphs" if settings.replayed else "max-autotune"
            others["autotune"] = lambda call: contenders.compiled(call, mode)
    if settings.device == "cpu" and contenders.has_jax():
        others["jax"] = lambda call: contenders.Jax(call, case.layout.startswith("channels_last"))
    return others


def figures(case: Case, samples: dict[str, timing.Samples], cache_bytes: int) -> dict[str, Any]:
    """The stored numbers of a case, cold or warm.

    ratios     each contender's time divided by ours, per round; forward and backward too, where timed
    floors     our time divided by the time of `copies` copies of x, per round
    """
    floor = copies(case, cache_bytes)
    ours, copy = samples["ours"], samples["floor"].whole
    amounts = {part: getattr(floor, part) for part in ours.parts}
    others = {name: other for name, other in samples.items() if name not in ("ours", "floor")}
    return {
        "copies": amounts,
        "contenders": {name: timing.summary(one) for name, one in samples.items()},
        "ratios": {name: timing.ratios(other, ours) for name, other in others.items()},
        "floors": {part: timing.ratio(getattr(ours, part), copy, amount) for part, amount in amounts.items()},
        "gigabytes_per_second": {
            name: gigabytes_per_second(case, 1.0 if name == "floor" else floor.whole, median(one.whole))
            for name, one in samples.items()
        },
    }


# --- the gate: checks of each contender before it is timed -----------------------------------------------------------
#
# `batchnorm.testing` compares our outputs with float64: y, all gradients and the running statistics, on a few channels
# including the first and the last. All channels of every contender, ours included, must be close to PyTorch's. This
# finds values that were never written, and contenders that compute something else.

COMPARED = 1 << 20
"""The number of values of x that are compared with float64; at least two channels."""

_MAX_WRONG_SHARE = 0.02


def compared_channels(call: Call, seed: int, values: int = COMPARED) -> Tensor:
    """The sorted channels to compare with float64: all if they are few, else the first, the last and random ones."""
    count = call.x.shape[1]
    wanted = min(count, max(2, values * count // max(call.x.numel(), 1)))
    if wanted == count:
        return torch.arange(count)
    inner = 1 + torch.randperm(count - 2, generator=torch.Generator().manual_seed(seed))[: wanted - 2]
    return torch.cat([torch.tensor([0, count - 1]), inner]).sort().values


def zero_grad_near_kinks(call: Call, chosen: Tensor) -> None:
    """In training, zero grad_y in place near kinks of the activation, where the derivative is ambiguous."""
    if call.training:
        call.grad_y.index_copy_(1, chosen.to(call.grad_y.device), call.channels(chosen).away_from_kinks().grad_y)


def errors(ours: Outputs, theirs: Outputs, call: Call, chosen: Tensor) -> list[str]:
    """The errors of our outputs, one line per wrong tensor."""
    mine, others = (
        {name: select(value, chosen) for name, value in outputs.items() if value is not None}
        for outputs in (ours, theirs)
    )
    wrong = [verdict.worst() for verdict in verdicts(mine, others, truth(call.channels(chosen))) if not verdict.good]
    return wrong + differences(ours, theirs)


def differences(ours: Outputs, theirs: Outputs) -> list[str]:
    """Differences from PyTorch's outputs beyond rounding: one line per tensor with a wrong channel.

    A channel is wrong if more than 2% of its values differ by more than a twentieth (a tenth in 16 bits) of the
    tensor's mean magnitude. The 2% allow for kinks of the activation, where rounding decides between two derivatives.
    """
    lines = []
    for name, mine in ours.items():
        other = theirs.get(name)
        if mine is None or other is None:
            continue
        tolerance = (0.1 if mine.element_size() < 4 else 0.05) * float(other.abs().mean(dtype=torch.float32)) + 1e-6
        if mine.dim() == 1:
            # Every rounding error in a channel changes its sum. This tolerance finds only missing parts of a sum.
            tolerance += 0.25 * float(other.std(correction=0))
        is_wrong = ~((mine - other).abs() <= tolerance)  # true for NaN
        share = is_wrong.float().mean([d for d in range(mine.dim()) if d != 1]) if mine.dim() > 1 else is_wrong.float()
        count = int((share > _MAX_WRONG_SHARE).sum())
        if count:
            lines.append(f"{name}: {count} of {share.numel()} channels differ from PyTorch's")
    return lines
