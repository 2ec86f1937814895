"""A record as tables: of a terminal, and in Markdown for the README. Both show the same cells.

One table for each type, variant and mode; a line for each shape and layout. A ratio is the median of the rounds' own
ratios, with its quartiles in brackets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

OTHERS = {"in place": "in place", "compile": "compile", "autotune": "max-autotune", "jax": "JAX"}
NOTE = (
    "Times are medians in ms. x eager, x in place and so on: how many times ours that takes, as the median of each "
    "round's ratio, quartiles in brackets; fwd and bwd are eager's forward and backward apart. floor: our time in "
    "units of the memory traffic that the case cannot do without, measured as copies of x in the same rounds."
)
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


@dataclass(frozen=True)
class Table:
    """A title, the columns' names and the cells."""

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
    found = [_group(title, results) for title, results in groups.items()]
    if record["models"]:
        found.append(_models(record["models"]))
    if any(_timed_in_inference(model) for model in record["models"]):
        found.append(_inference(record["models"]))
    return found


def red(record: dict[str, Any]) -> list[str]:
    """What was wrong, a line each: outputs beyond the criterion, and losses that part."""
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
    """What is missing, and why."""
    excluded = [
        f"{r['name']}: {name} was not timed, it computes something else ({'; '.join(why)})"
        for r in record["results"]
        for name, why in r.get("excluded", {}).items()
    ]
    return [*record["notes"], *excluded]


def origin(record: dict[str, Any]) -> str:
    """Where the figures come from, in a line."""
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
    """Print the same to the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    from batchnorm.report.terminal import write_table

    console = Console()
    for table in tables(record):
        drawn = Drawn(box=box.SIMPLE_HEAD, padding=0, show_edge=False, title=table.title, title_justify="left")
        for index, name in enumerate(table.columns):
            # The case is told in whole words; what is compared stands under each other, its quartiles below it.
            words = [len(word) for row in table.rows for word in row[index].split()]
            justify: Literal["left", "right"] = "right" if index else "left"
            drawn.add_column(name.replace(" ", "\n"), justify=justify, min_width=max(words, default=0))
        for row in table.rows:
            drawn.add_row(*(Text(cell.replace(" [", "\n[")) for cell in row))
        write_table(console, drawn)
        console.print()
    for line in (*red(record), *_captions(record), *notes(record), origin(record)):
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _captions(record: dict[str, Any]) -> Iterator[str]:
    if record["results"]:
        yield NOTE
    if record["models"]:
        yield MODELS_NOTE
    if any(_timed_in_inference(model) for model in record["models"]):
        yield INFERENCE_NOTE


def _group(title: str, results: list[dict[str, Any]]) -> Table:
    others = [name for name in OTHERS if any(name in result["ratios"] for result in results)]
    apart = "forward" in results[0]["ratios"]["eager"]
    columns = ["case", "ours", "eager", "x eager", *(["x fwd", "x bwd"] if apart else [])]
    columns += [*(f"x {OTHERS[name]}" for name in others), "floor", "GB/s"]
    rows = []
    for result in results:
        ratios, times = result["ratios"], result["contenders"]
        eager = ratios["eager"]
        cells = [f"{'x'.join(map(str, result['case']['shape']))} {_layout(result['case']['layout'])}".strip()]
        cells += [_milliseconds(times[name]["whole"]["median"]) for name in ("ours", "eager")]
        cells += [_spread(eager["whole"])]
        cells += [f"{eager[part]['median']:.2f}" for part in ("forward", "backward") if apart]
        cells += [f"{ratios[name]['whole']['median']:.2f}" if name in ratios else "" for name in others]
        cells += [f"{result['floors']['whole']['median']:.2f}", f"{result['gigabytes_per_second']['ours']:.1f}"]
        rows.append(tuple(cells))
    return Table(title, tuple(columns), rows)


def _models(found: list[dict[str, Any]]) -> Table:
    columns = ("model", "ours", "stock", "x stock", "x fwd", "x bwd", "at most")
    more = ("fused", "loss", "saved ours", "saved stock")
    rows = []
    for model in found:
        if not model["loss"]["agree"]:
            continue
        saved, ratio = model["saved_bytes"], model["ratio"]
        rows.append(
            (
                _workload(model),
                *(_milliseconds(model["contenders"][name]["whole"]["median"]) for name in ("ours", "stock")),
                _spread(ratio["whole"]),
                *(f"{ratio[part]['median']:.2f}" for part in ("forward", "backward")),
                f"{model['at_most']['median']:.2f}",
                f"{model['layers']['fused']} of {model['layers']['all']}",
                f"{_small(model['loss']['difference'])} [{_small(model['loss']['noise'])}]",
                *(f"{saved[name] / 2**20:,.0f} MiB" for name in ("ours", "stock")),
            )
        )
    return Table("Whole training steps", columns + more, rows)


def _timed_in_inference(model: dict[str, Any]) -> bool:
    """Whether it was timed, which older records do not know, and was right."""
    return "contenders" in model.get("inference", {})


def _inference(found: list[dict[str, Any]]) -> Table:
    rows = []
    for model in filter(_timed_in_inference, found):
        told = model["inference"]
        rows.append(
            (
                _workload(model),
                *(_milliseconds(told["contenders"][name]["whole"]["median"]) for name in ("folded", "ours", "stock")),
                *(_spread(told["ratio"][name]) for name in ("ours", "stock")),
                f"{told['folded']} of {model['layers']['all']}",
                _small(told["difference"]["folded"]),
            )
        )
    return Table("Inference", ("model", "folded", "ours", "stock", "x ours", "x stock", "layers", "moved"), rows)


def _workload(model: dict[str, Any]) -> str:
    size = f"{model['batch']}x3x{model['side']}x{model['side']}"
    dtype = model.get("dtype", "float32")  # which older records do not know
    return " ".join(filter(None, (model["model"], _layout(model["layout"]), "" if dtype == "float32" else dtype, size)))


def _layout(layout: str) -> str:
    """Contiguous is what a tensor is unless something else is said."""
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
