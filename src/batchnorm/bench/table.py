"""Show a record as tables, in a terminal and in Markdown for the README, with the same cells.

One table for each type, variant and mode; one line for each shape and layout. A ratio is the median of the ratios of
the rounds, with its quartiles in brackets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isclose
from typing import Any, NamedTuple

from rich.console import Console

from batchnorm.report.terminal import write, write_rows
from batchnorm.words import STEPS

OTHERS = {"in place": "in place", "compile": "compile", "autotune": "max-autotune", "jax": "JAX"}
NOTE = (
    "Times are medians in ms. x eager, x in place and so on: how many times ours that takes, as the median of each "
    "round's ratio, quartiles in brackets; fwd and bwd are eager's forward and backward apart. floor: our time in "
    "units of the memory traffic that the case cannot do without, measured as copies of x in the same rounds."
)
COLD_NOTE = (
    "Every call takes other copies of its tensors, so that none finds them in the caches. warm: our time if every call "
    "takes the same ones, and x warm how many times that eager takes; empty where the tensors exceed the caches."
)
WARM_NOTE = "Every call took the same tensors, so that the caches may hold those of smaller cases."
CONTENDERS = ("ours", "ours unfused", "compile", "ours compiled")
"""Contenders of a training step besides stock, in the order of the columns."""
MODELS_NOTE = (
    "stock: one step of training with torch.nn's layers, the median in ms. The other columns say how many times as "
    "fast a step is: ours (converted), ours unfused (each layer apart from its activation), compile (stock through "
    "torch.compile), ours compiled (converted, through torch.compile), bound (stock without its batch norms and "
    "activations); medians of each round's ratio, quartiles in brackets. reached: how much of the bound's gain ours "
    "has, empty if the bound may be 1. saved: what forward keeps for backward, stock's → ours, in MiB. –: left out, "
    "see below."
)
PARTS_NOTE = (
    "fused: layers that run as one with what follows them; forward and backward: how many times as fast ours is in "
    "each; loss: the largest difference between the losses of ours and stock over the steps, and in brackets what a "
    "change of the inputs' last digit makes."
)
INFERENCE_NOTE = (
    "The same networks in inference, medians in ms: folded, ours (converted) and stock; x ours and x stock: how many "
    "times folded's that takes; layers: how many are folded into others; moved: the largest difference of folded's "
    "outputs from stock's, relative to their largest."
)
_SAME = (("ours", "stock"), ("lean", "ours"), ("folded", "frozen"))
"""Contenders of the memory of steps that compute the same loss, up to rounding."""
_MOST_APART = 0.01
MEMORY_NOTE = (
    "In MiB. kept: what forward keeps for backward, each storage once, without parameters and buffers. peak: how far "
    "one step raises the memory in use, each in a fresh process: on a CPU the resident size, on a GPU the allocations. "
    "It holds what is kept, gradients and the workspaces of convolutions; parameters and the optimizer's "
    "state are there before. " + "; ".join(f"{name}: {words}" for name, words in STEPS.items()) + "."
)


class Table(NamedTuple):
    """A table of text: its title, its column names and its rows of cells."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(record: dict[str, Any]) -> list[Table]:
    """The record's cases in groups, its models, and what is red."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in record["results"]:
        if result["gate"]["passed"]:
            case = result["case"]
            mode = "training" if case["mode"] == "train" else "inference"
            groups.setdefault(f"{case['variant']}, {case['dtype']}, {mode}", []).append(result)
    shown = [_group(title, results) for title, results in groups.items()]
    if models := record["models"]:
        timed = [name for name in CONTENDERS if any(_is_shown(name, model) for model in models)]
        allocator = f"allocator: {record['allocator']}"
        shown.append(_table(f"Whole training steps, {allocator}", _models(timed), models))
        shown.append(_table("The same steps in detail", _PARTS, models))
    if inferring := _in_inference(record):
        shown.append(_table(f"Inference of networks, allocator: {record['allocator']}", _INFERENCE, inferring))
    return [*shown, *_memory(record["memory"])]


def red(record: dict[str, Any]) -> list[str]:
    """One line per failed check: outputs beyond the criterion, and losses that diverge."""
    lines = [f"{r['name']}: {error}" for r in record["results"] for error in r["gate"]["errors"]]
    for model in record["models"]:
        lines += [f"{_network(model)}, {name}: {why}" for name, why in _wrong(model).items()]
        errors = model.get("inference", {"gate": {"errors": []}})["gate"]["errors"]
        lines += [f"{_network(model)} in inference: {error}" for error in errors]
    for one in record["memory"]:
        losses = {name: found["loss"] for name, found in one["contenders"].items()}
        lines += [
            f"{_network(one)}: the loss of {name} is {losses[name]:.6g}, that of {other} {losses[other]:.6g}"
            for name, other in _SAME
            if name in losses and other in losses and not isclose(losses[name], losses[other], rel_tol=_MOST_APART)
        ]
    return lines


def _wrong(model: dict[str, Any]) -> dict[str, str]:
    """The contenders of ours whose losses are not stock's, and by how much.

    If torch.compile changes stock's losses as well, it is not our fault that it changes ours.
    """
    agree = model["loss"]["agree"]
    ours = ["ours", "ours unfused", *(["ours compiled"] if agree.get("compile", True) else [])]
    return {name: model["excluded"][name] for name in ours if agree.get(name) is False}


def notes(record: dict[str, Any]) -> list[str]:
    """What was not measured, and why."""
    excluded = [
        f"{r['name']}: {name} was not timed, it computes something else ({'; '.join(why)})"
        for r in record["results"]
        for name, why in r.get("excluded", {}).items()
    ]
    left_out = [
        f"{_network(model)}: {name} is left out: {why}"
        for model in record["models"]
        for name, why in model["excluded"].items()
        if name not in _wrong(model)
    ]
    failed = [
        f"{_network(one)}: {name} was not measured: {why}"
        for one in record["memory"]
        for name, why in one["failed"].items()
    ]
    return [*record["notes"], *excluded, *left_out, *failed]


def origin(record: dict[str, Any]) -> str:
    """One line that says where the numbers come from."""
    machine, versions, git = record["machine"], record["versions"], record["git"]
    threads = record["settings"]["threads"]
    commit = "" if git is None else f", commit {git['commit']}{' with changes' if git['dirty'] else ''}"
    jax = f", JAX {versions['jax']}" if "jax" in versions else ""
    ended = "" if record["status"] == "complete" else f" ({record['status']})"
    gpu = f"{machine['gpu']['name']}; " if "gpu" in machine else ""
    return (
        f"{gpu}{machine['processor']}, "
        f"{threads} thread{'s' if threads > 1 else ''} on {machine['cores']} cores; PyTorch "
        f"{versions['torch']}{jax}, batchnorm {versions['batchnorm']}{commit}; allocator: {record['allocator']}; "
        f"{record['date'][:10]}{ended}"
    )


def markdown(record: dict[str, Any]) -> str:
    """The record for a README: the command, the tables, where they come from."""
    blocks = [f"    {record['command']}"]
    for table in tables(record):
        lines = [f"**{table.title}**", "", _line(table.columns)]
        lines.append(_line([":--", *["--:"] * (len(table.columns) - 1)]))
        blocks.append("\n".join(lines + [_line(row) for row in table.rows]))
    blocks += [f"Red: {line}" for line in red(record)]
    blocks += _captions(record)
    return "\n\n".join([*blocks, *notes(record), origin(record) + "."])


def show(record: dict[str, Any]) -> None:
    """Print the same to the terminal; quartiles go on a line below the ratio."""
    console = Console()
    for table in tables(record):
        heads = [name.replace(" ", "\n") for name in table.columns]
        rows = ([cell.replace(" [", "\n[") for cell in row] for row in table.rows)
        write_rows(console, heads, rows, left=heads[:1], title=table.title)
        console.print()
    for line in (*red(record), *_captions(record), *notes(record), origin(record)):
        write(console, line)


def _captions(record: dict[str, Any]) -> Iterator[str]:
    if record["results"]:
        yield NOTE
        if record["schema"] == 1 and "gpu" not in record["machine"]:
            yield WARM_NOTE
        elif any("rotated" in result for result in record["results"]):
            yield COLD_NOTE
    if record["models"]:
        yield MODELS_NOTE
        yield PARTS_NOTE
    if _in_inference(record):
        yield INFERENCE_NOTE
    if record["memory"]:
        yield MEMORY_NOTE


def _network(model: dict[str, Any]) -> str:
    """A network, its layout, its type and the shape of its input, without what is usual."""
    dtype = "" if model["dtype"] == "float32" else model["dtype"]
    return " ".join(filter(None, (model["model"], _layout(model["layout"]), dtype, "x".join(map(str, model["shape"])))))


def _layout(layout: str) -> str:
    """The layout to show; nothing for the default, contiguous."""
    return {"channels_last": "channels_last", "channels_last_3d": "channels_last"}.get(layout, "")


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(quartiles: dict[str, float]) -> str:
    return f"{quartiles['median']:.2f} [{quartiles['q1']:.2f}..{quartiles['q3']:.2f}]"


def _median(quartiles: dict[str, float]) -> str:
    return f"{quartiles['median']:.2f}"


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _small(value: float | None) -> str:
    return "not finite" if value is None or value == float("inf") else f"{value:.0e}" if value else "0"


Columns = Mapping[str, Callable[[dict[str, Any]], str]]
"""Column name → the cell of a case or a model."""


def _table(title: str, columns: Columns, results: Sequence[dict[str, Any]]) -> Table:
    return Table(title, tuple(columns), [tuple(cell(one) for cell in columns.values()) for one in results])


def _time(name: str) -> Callable[[dict[str, Any]], str]:
    def milliseconds(one: dict[str, Any]) -> str:
        timed = one["contenders"].get(name)
        return "" if timed is None else _milliseconds(timed["whole"]["median"])

    return milliseconds


def _group(title: str, results: list[dict[str, Any]]) -> Table:
    def slower(name: str, part: str = "whole") -> Callable[[dict[str, Any]], str]:
        return lambda one: f"{one['ratios'][name][part]['median']:.2f}" if name in one["ratios"] else ""

    def called(one: dict[str, Any]) -> str:
        return f"{'x'.join(map(str, one['case']['shape']))} {_layout(one['case']['layout'])}".strip()

    def warm(cell: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
        return lambda one: cell(one["warm"]) if "warm" in one else ""

    apart = "forward" in results[0]["ratios"]["eager"]
    columns: Columns = {
        "case": called,
        "ours": _time("ours"),
        "eager": _time("eager"),
        "x eager": lambda one: _spread(one["ratios"]["eager"]["whole"]),
        **({"x fwd": slower("eager", "forward"), "x bwd": slower("eager", "backward")} if apart else {}),
        **{f"x {OTHERS[name]}": slower(name) for name in OTHERS if any(name in one["ratios"] for one in results)},
        "floor": lambda one: f"{one['floors']['whole']['median']:.2f}",
        "GB/s": lambda one: f"{one['gigabytes_per_second']['ours']:.1f}",
        **(
            {"warm": warm(_time("ours")), "x warm": warm(slower("eager"))}
            if any("warm" in one for one in results)
            else {}
        ),
    }
    return _table(title, columns, results)


def _is_shown(name: str, model: dict[str, Any]) -> bool:
    return name in model["ratios"] or name in model["excluded"]


def _models(timed: Sequence[str]) -> Columns:
    """The columns of the training steps, with one for each contender that is timed."""

    def faster(name: str) -> Callable[[dict[str, Any]], str]:
        show = _spread if name == "ours" else _median

        def cell(model: dict[str, Any]) -> str:
            return show(model["ratios"][name]["whole"]) if name in model["ratios"] else "–" * _is_shown(name, model)

        return cell

    return {
        "network": _network,
        "stock": _time("stock"),
        **{name: faster(name) for name in timed},
        "bound": lambda model: _median(model["at_most"]),
        "reached": lambda model: "" if model["gain_share"] is None else f"{model['gain_share']:.0%}",
        "saved MiB": _saved,
    }


def _saved(model: dict[str, Any]) -> str:
    stock, ours = (model["saved_bytes"][name] / 2**20 for name in ("stock", "ours"))
    return f"{stock:,.0f} → {ours:,.0f}"


def _ours(part: str) -> Callable[[dict[str, Any]], str]:
    return lambda model: _median(model["ratios"]["ours"][part]) if "ours" in model["ratios"] else "–"


_PARTS: Columns = {
    "network": _network,
    "fused": lambda model: f"{model['layers']['fused']} of {model['layers']['all']}",
    "forward": _ours("forward"),
    "backward": _ours("backward"),
    "loss": lambda model: f"{_small(model['loss']['difference']['ours'])} [{_small(model['loss']['noise'])}]",
}
_INFERENCE: Columns = {
    "network": _network,
    **{name: _time(name) for name in ("stock", "ours", "folded", "one primitive", "folded, compiled")},
    "x ours": lambda model: _spread(model["ratio"]["ours"]),
    "x stock": lambda model: _spread(model["ratio"]["stock"]),
    "layers": lambda model: f"{model['folded']} of {model['layers']['all']}",
    "moved": lambda model: _small(model["difference"]["folded"]),
}


def _in_inference(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The models with results in inference, which older records lack."""
    models = [model | model.get("inference", {"contenders": {}}) for model in record["models"]]
    return [model for model in models if "folded" in model["contenders"]]


def _memory(networks: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """What forward keeps and the peak of a step, a column for each contender; the contenders of one network by kind."""
    names = [name for name in STEPS if any(name in one["contenders"] for one in networks)]
    for title, key in (("What forward keeps, MiB", "kept"), ("The peak of a training step, MiB", "peak")):
        if any(found[key] is not None for one in networks for found in one["contenders"].values()):
            columns = {"network": _network, **{name: _mebibytes(name, key) for name in names}}
            yield _table(title, columns, networks)


def _mebibytes(name: str, key: str) -> Callable[[dict[str, Any]], str]:
    def cell(one: dict[str, Any]) -> str:
        size = one["contenders"].get(name, {}).get(key)
        return "–" if size is None else f"{size / 2**20:,.0f}"

    return cell
