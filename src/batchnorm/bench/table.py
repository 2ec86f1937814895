"""Show a record as tables, in a terminal and in Markdown for the README, with the same cells.

One table for each type, variant and mode; one line for each shape and layout. A ratio is the median of the ratios of
the rounds, with its quartiles in brackets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from batchnorm.report.terminal import write, write_rows

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
MODELS_NOTE = (
    "One step of training, medians in ms; at most: how many times as long as the network without its batch norm and "
    "activations the stock one takes; fused: layers that run as one with what follows them; loss: the largest "
    "difference between both losses over the steps, and in brackets what a change of the images' last digit makes; "
    "saved: what forward keeps for backward."
)
INFERENCE_NOTE = (
    "The same networks in inference, medians in ms: folded (no batch norm layer is left), ours (converted) and stock; "
    "x ours and x stock: how many times folded's that takes; moved: the largest difference of folded's outputs from "
    "stock's, relative to their largest."
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
    models = record["models"]
    if models:
        shown.append(_table("Whole training steps", _MODELS, [model for model in models if model["loss"]["agree"]]))
    if inferring := _in_inference(record):
        shown.append(_table("Inference", _INFERENCE, inferring))
    return shown


def red(record: dict[str, Any]) -> list[str]:
    """One line per failed check: outputs beyond the criterion, and losses that diverge."""
    lines = [f"{r['name']}: {error}" for r in record["results"] for error in r["gate"]["errors"]]
    for model in record["models"]:
        loss = model["loss"]
        if not loss["agree"]:
            lines.append(
                f"{model['model']} {model['layout']}: the losses differ by {_small(loss['difference'])}, "
                f"and by {_small(loss['noise'])} from rounding"
            )
        errors = model.get("inference", {"gate": {"errors": []}})["gate"]["errors"]
        lines += [f"{model['model']} {model['layout']} in inference: {error}" for error in errors]
    return lines


def notes(record: dict[str, Any]) -> list[str]:
    """What was not measured, and why."""
    excluded = [
        f"{r['name']}: {name} was not timed, it computes something else ({'; '.join(why)})"
        for r in record["results"]
        for name, why in r.get("excluded", {}).items()
    ]
    return [*record["notes"], *excluded]


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
    if _in_inference(record):
        yield INFERENCE_NOTE


def _workload(model: dict[str, Any]) -> str:
    size = f"{model['batch']}x3x{model['side']}x{model['side']}"
    dtype = model.get("dtype", "float32")  # missing in older records
    return " ".join(filter(None, (model["model"], _layout(model["layout"]), "" if dtype == "float32" else dtype, size)))


def _layout(layout: str) -> str:
    """The layout to show; nothing for the default, contiguous."""
    return {"channels_last": "channels_last", "channels_last_3d": "channels_last"}.get(layout, "")


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(quartiles: dict[str, float]) -> str:
    return f"{quartiles['median']:.2f} [{quartiles['q1']:.2f}..{quartiles['q3']:.2f}]"


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
    return lambda one: _milliseconds(one["contenders"][name]["whole"]["median"])


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


_MODELS: Columns = {
    "model": _workload,
    "ours": _time("ours"),
    "stock": _time("stock"),
    "x stock": lambda model: _spread(model["ratio"]["whole"]),
    "x fwd": lambda model: f"{model['ratio']['forward']['median']:.2f}",
    "x bwd": lambda model: f"{model['ratio']['backward']['median']:.2f}",
    "at most": lambda model: f"{model['at_most']['median']:.2f}",
    "fused": lambda model: f"{model['layers']['fused']} of {model['layers']['all']}",
    "loss": lambda model: f"{_small(model['loss']['difference'])} [{_small(model['loss']['noise'])}]",
    "saved ours": lambda model: f"{model['saved_bytes']['ours'] / 2**20:,.0f} MiB",
    "saved stock": lambda model: f"{model['saved_bytes']['stock'] / 2**20:,.0f} MiB",
}
_INFERENCE: Columns = {
    "model": _workload,
    **{name: _time(name) for name in ("folded", "ours", "stock")},
    "x ours": lambda model: _spread(model["ratio"]["ours"]),
    "x stock": lambda model: _spread(model["ratio"]["stock"]),
    "layers": lambda model: f"{model['folded']} of {model['layers']['all']}",
    "moved": lambda model: _small(model["difference"]["folded"]),
}


def _in_inference(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The models with results in inference, which older records lack."""
    models = [model | model.get("inference", {"contenders": {}}) for model in record["models"]]
    return [model for model in models if "folded" in model["contenders"]]
