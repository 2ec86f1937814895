"""`batchnorm bench --machine`: what the CPU kernels know about this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from batchnorm.bench.record import BenchError
from batchnorm.kernels.cpu import machine
from batchnorm.report.terminal import write, write_rows

NOTE = (
    "L2: what one thread re-reads at the speed of its L2 cache; cached: copies up to this size, source and target "
    "together, keep their result in the caches, larger ones store past them; region: one start of all threads."
)


def describe(threads: int | None = None) -> dict[str, Any]:
    """The facts for JSON, with this number of PyTorch's threads: sizes in bytes, times in seconds, rates in bytes/s.

    Raises BenchError for a number below 1, and ValueError if BATCHNORM_MACHINE cannot be parsed.
    """
    if threads is not None:
        if threads < 1:
            raise BenchError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    facts = machine.facts()
    described = asdict(facts) | {"threads": torch.get_num_threads()}
    described["bandwidth"] = [rate._asdict() for rate in facts.bandwidth]
    described["read_bandwidth"] = [{"total": total, "read": rate} for total, rate in facts.read_bandwidth]
    return described


def show(described: dict[str, Any]) -> None:
    """Print the facts as tables."""
    console = Console()
    facts = [
        ("L2 of a core", _size(described["l2_bytes"])),
        ("cached", _size(described["cached_bytes"])),
        ("region", f"{described['region_seconds'] * 1e6:.1f} µs"),
        ("threads", f"{described['threads']}, {described['utilization']:.0%} on the cores"),
        ("origin", described["origin"]),
    ]
    write_rows(console, ["machine", "value"], facts, left=["machine", "value"])
    console.print()
    reading = {rate["total"]: _gigabytes(rate["read"]) for rate in described["read_bandwidth"]}
    rows = [
        (_size(total), _gigabytes(rate["ordinary"]), _gigabytes(rate["nontemporal"]), reading.get(total, ""))
        for rate in described["bandwidth"]
        for total in (rate["total"],)
    ]
    heads = ["total", "copy\nGB/s", "past caches\nGB/s", "read\nGB/s"]
    write_rows(console, heads, rows, title="All threads")
    console.print()
    write(console, NOTE)


def _size(size: int) -> str:
    unit, name = (1 << 20, "MiB") if size >= 1 << 20 else (1 << 10, "KiB")
    return f"{size / unit:.4g} {name}"


def _gigabytes(rate: float) -> str:
    return f"{rate / 1e9:.0f}" if rate >= 1e10 else f"{rate / 1e9:.1f}"
