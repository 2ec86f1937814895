"""The memory of training steps as a page and in the terminal, from the record of `batchnorm bench --memory`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import altair as alt
from markupsafe import Markup
from rich.console import Console

from batchnorm.report.charts import RECORDS, Records, Spec, panel
from batchnorm.report.definitions import Definition
from batchnorm.report.page import Lead, Page, Panel, provenance
from batchnorm.report.terminal import write, write_rows
from batchnorm.words import KEPT_BY, STEPS, plural, shortened

TITLE = "The memory of training steps"
QUESTION = "How much less does forward keep?"
COLOURS = {
    "norm": "#2f88d0",
    "convolution": "#dd6a1f",
    "activation": "#159b76",
    "mask": "#b06fc4",
    "other": "#8c8c8c",
}
BAR = 26
"""The height of a contender's bar with its margin."""
PEAK = "currentColor"
NETWORKS = 60
"""The most networks on a page."""

DEFINITIONS = (
    Definition(
        "kept",
        "the sum over the distinct storages that autograd saves in one forward, without parameters and buffers",
        "What forward keeps for backward. Each storage counts under the first layer that saves it, and by the kind of "
        "that layer: an activation's output that the next convolution saves as its input, too, counts as the "
        "activation's. `batchnorm.memory(model, batch)` measures it for any model.",
        "0 or more, in MiB (2²⁰ bytes)",
    ),
    Definition(
        "peak",
        "the highest memory in use during a training step - the memory in use before it",
        "On a CPU the resident size of a fresh process (VmHWM and VmRSS of Linux), on a GPU PyTorch's allocations. It "
        "holds what is kept, gradients and the workspaces of convolutions. Where glibc keeps freed memory, as it does "
        "by default, a process is larger. Parameters, the optimizer's state and the batch are there before and do not "
        "count.",
        "0 or more, in MiB; it varies by some MiB from run to run",
    ),
    Definition(
        "contenders",
        "; ".join(f"{name}: {words}" for name, words in STEPS.items()),
        "The same network, each in a fresh process. Live batch norm (stock, ours, lean) and frozen batch norm (frozen, "
        "folded) compute different functions: compare lean with stock, and folded with frozen.",
        "one of these words",
        tuple(STEPS.items()),
    ),
)


@dataclass(frozen=True)
class Row:
    """One contender of one network; sizes in MiB, None if unknown."""

    network: str
    contender: str
    kept: float
    by_kind: Mapping[str, float]
    peak: float | None
    loss: float

    def cells(self, kinds: Sequence[str]) -> list[str]:
        """The cells of the table."""
        sizes = [self.by_kind.get(kind, 0.0) for kind in kinds]
        return [self.network, self.contender, *map(mebibytes, (self.kept, *sizes, self.peak))]


@dataclass(frozen=True)
class Summary:
    """What the page and the terminal show: the rows of each network, and where they come from."""

    rows: Mapping[str, tuple[Row, ...]]
    failed: tuple[str, ...]
    record: Mapping[str, Any]

    @property
    def kinds(self) -> list[str]:
        """The kinds that occur."""
        return [kind for kind in KEPT_BY if any(row.by_kind.get(kind) for rows in self.rows.values() for row in rows)]

    def gain(self) -> tuple[str, str, float] | None:
        """A contender, what it is compared with, and the median over the networks of the share of kept bytes."""
        for best, base in (("lean", "stock"), ("ours", "stock"), ("folded", "frozen")):
            shares = []
            for rows in self.rows.values():
                kept = {row.contender: row.kept for row in rows}
                if kept.get(base) and best in kept:
                    shares.append(kept[best] / kept[base])
            if shares:
                return best, base, median(shares)
        return None


@dataclass(frozen=True, kw_only=True)
class MemoryPage(Page):
    """The page of the memory of steps: a chart for each network, and all numbers."""

    template = "memory"
    scripts = ("units",)
    links = (("networks", "The networks"), ("numbers", "All numbers"))

    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    has_peaks: bool

    def data(self) -> dict[str, Any]:
        return {"charts": {panel.id: panel.chart for panel in self.panels}}


def mebibytes(size: float | None) -> str:
    """A size in MiB as a cell."""
    if size is None:
        return ""
    return "0" if not size else f"{size:,.0f}" if size >= 10 else f"{size:.1f}"


def summarize(records: Sequence[Mapping[str, Any]]) -> Summary:
    """Read a record. Raises ValueError if it is damaged."""
    record = records[0]
    rows: dict[str, tuple[Row, ...]] = {}
    failed: list[str] = []
    try:
        for entry in record["memory"]:
            name = f"{entry['model']}, {'x'.join(map(str, entry['shape']))}"
            found = entry["contenders"]
            known = [*(one for one in STEPS if one in found), *(one for one in found if one not in STEPS)]
            rows[name] = tuple(_row(name, contender, found[contender]) for contender in known)
            failed += [f"{name}, {contender}: {why}" for contender, why in entry["failed"].items()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the record of the memory is damaged: {type(error).__name__} {error}") from error
    return Summary({name: group for name, group in rows.items() if group}, tuple(failed), record)


def _row(network: str, contender: str, found: Mapping[str, Any]) -> Row:
    def size(value: Any) -> float:
        return float(value) / 2**20

    by_kind = {str(kind): size(value) for kind, value in found["by_kind"].items()}
    peak = None if found["peak"] is None else size(found["peak"])
    return Row(network, contender, size(found["kept"]), by_kind, peak, float(found["loss"]))


def build(summary: Summary) -> MemoryPage:
    """Build the page."""
    record, kinds = summary.record, summary.kinds
    rows = [row for group in summary.rows.values() for row in group]
    shown = list(summary.rows.items())[:NETWORKS]
    settings = {key: record.get(key) for key in ("date", "command", "allocator", "status")}
    threads = record.get("settings")
    if isinstance(threads, Mapping):
        settings |= {key: threads.get(key) for key in ("threads", "device", "seed")}
    known = {key: value for key, value in dict(record.get("machine") or {}).items() if isinstance(value, str | int)}
    return MemoryPage(
        title=TITLE,
        subtitle=f"{plural(len(summary.rows), 'network')}, {_device(record)}",
        notices=tuple(f"Not measured: {shortened(line, 300)}." for line in summary.failed),
        lead=_lead(summary),
        headline=_headline(summary),
        parts=(),
        definitions=DEFINITIONS,
        provenance=provenance({"versions": record.get("versions"), "machine": known}, {"Measured": settings}),
        panels=tuple(_panel(number, name, group) for number, (name, group) in enumerate(shown)),
        legend=tuple((COLOURS[kind], KEPT_BY[kind]) for kind in kinds),
        columns=("network", "contender", "kept", *(KEPT_BY[kind] for kind in kinds), "peak"),
        rows=tuple(tuple(row.cells(kinds)) for row in rows),
        has_peaks=any(row.peak is not None for row in rows),
    )


def _device(record: Mapping[str, Any]) -> str:
    machine = dict(record.get("machine") or {})
    gpu = machine.get("gpu")
    return str(gpu["name"] if isinstance(gpu, Mapping) and "name" in gpu else machine.get("processor", "a CPU"))


def _lead(summary: Summary) -> Lead:
    gain = summary.gain()
    if gain is None:
        return Lead(QUESTION, "?", "", "nothing to compare was measured")
    best, base, share = gain
    label = f"of what {base} keeps is kept by {best}" + (", the median" if len(summary.rows) > 1 else "")
    return Lead(QUESTION, f"{share - 1:+.0%}".replace("-", "−"), f"{share:.0%}", label)


def _headline(summary: Summary) -> str:
    parts = []
    for base, best in (("stock", "lean"), ("frozen", "folded")):
        for name, rows in summary.rows.items():
            kept = {row.contender: row.kept for row in rows}
            if base in kept and best in kept:
                parts.append((kept[best] / max(kept[base], 1e-9), name, base, best, kept))
    if not parts:
        return "What forward keeps for backward, by the kind of layer that saves it, and the peak of a step."
    _, name, base, best, kept = min(parts)
    return f"Most is gained in {name}: {base} keeps {mebibytes(kept[base])} MiB, {best} {mebibytes(kept[best])} MiB."


def _panel(number: int, name: str, rows: Sequence[Row]) -> Panel:
    words = [
        f"{row.contender} keeps {mebibytes(row.kept)} MiB"
        + ("" if row.peak is None else f" of a peak of {mebibytes(row.peak)} MiB")
        for row in rows
    ]
    return Panel(f"network-{number}", shortened(name, 80), f"{name}: {'; '.join(words)}.", _chart(rows))


def _chart(rows: Sequence[Row]) -> Spec:
    """A bar for each contender, in parts by kind, and a mark at the peak."""
    order = [row.contender for row in rows]
    kinds = [kind for kind in COLOURS if any(row.by_kind.get(kind) for row in rows)]
    records: Records = [
        {
            "contender": row.contender,
            "kind": KEPT_BY[kind],
            "place": place,
            "size": round(row.by_kind[kind], 3),
        }
        for row in rows
        for place, kind in enumerate(kinds)
        if row.by_kind.get(kind)
    ]
    peaks = [{"contender": row.contender, "peak": round(row.peak, 3)} for row in rows if row.peak is not None]
    y = alt.Y("contender:N", title=None, sort=order, axis=alt.Axis(ticks=False, labelFontSize=12))
    title = "MiB"
    x_axis = alt.Axis(tickCount=5, format=",d")
    colour = alt.Color(
        "kind:N",
        legend=None,
        scale=alt.Scale(domain=[KEPT_BY[kind] for kind in kinds], range=[COLOURS[kind] for kind in kinds]),
    )
    tips = [alt.Tooltip("contender:N"), alt.Tooltip("kind:N"), alt.Tooltip("size:Q", title="MiB", format=",.1f")]
    bars = (
        alt.Chart(alt.NamedData(RECORDS))
        .mark_bar(height={"band": 0.7})
        .encode(y=y, x=alt.X("size:Q", title=title, axis=x_axis), color=colour, order="place:Q", tooltip=tips)
    )
    marks = (
        alt.Chart(alt.InlineData(values=peaks))
        .mark_tick(thickness=3, bandSize=22, color=PEAK)
        .encode(
            y=y,
            x=alt.X("peak:Q", title=title, axis=x_axis),
            tooltip=[alt.Tooltip("contender:N"), alt.Tooltip("peak:Q", title="peak, MiB", format=",.1f")],
        )
    )
    return panel(alt.layer(bars, *([marks] if peaks else [])), records, BAR * len(rows) + 10)


def show(summary: Summary, console: Console) -> None:
    """Print the answer and the numbers."""
    write(console, _headline(summary) + "\n")
    kinds = summary.kinds
    heads = ["network", "contender", "kept", *kinds, "peak"]
    rows = [row.cells(kinds) for group in summary.rows.values() for row in group]
    write_rows(console, heads, rows, "In MiB.", [f"{row[0]}, {row[1]}" for row in rows], left=heads[:2])
    for line in summary.failed:
        write(console, f"Not measured: {line}")


def describe(summary: Summary) -> dict[str, Any]:
    """The networks as JSON values; sizes in MiB."""
    return {
        "networks": {
            name: {row.contender: {"kept": row.kept, "by_kind": dict(row.by_kind), "peak": row.peak} for row in rows}
            for name, rows in summary.rows.items()
        },
        "failed": list(summary.failed),
    }


def card(summary: Summary) -> str:
    """HTML for a notebook: the headline."""
    return str(Markup("<p>{}</p>").format(_headline(summary)))
