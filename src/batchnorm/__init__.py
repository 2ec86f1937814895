"""Batch normalization for PyTorch: drop-in layers, and instruments that show what gamma and beta do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchnorm.importing import imported as _imported
from batchnorm.runs import VIEWS

if TYPE_CHECKING:
    from batchnorm import functional, kernels, report
    from batchnorm.checks.check import Checkup, Explanation, check, explain
    from batchnorm.checks.findings import Finding
    from batchnorm.layers import (
        BatchNorm1d,
        BatchNorm2d,
        BatchNorm3d,
        LazyBatchNorm1d,
        LazyBatchNorm2d,
        LazyBatchNorm3d,
    )
    from batchnorm.moments import Moments
    from batchnorm.recording.steps import every, log_spaced
    from batchnorm.recording.watch import watch
    from batchnorm.runs.run import Run
    from batchnorm.surgery import conventions
    from batchnorm.surgery.adapt import Adapting, adapt
    from batchnorm.surgery.average import Averaging, average
    from batchnorm.surgery.compare import Comparison, compare
    from batchnorm.surgery.convert import Conversion, Reversion, convert, revert
    from batchnorm.surgery.fold import Folding, fold
    from batchnorm.surgery.freeze import Freezing, freeze, unfreeze
    from batchnorm.surgery.keep_domain import keep_domain
    from batchnorm.surgery.param_groups import param_groups
    from batchnorm.surgery.pool_statistics import Pooling, pool_statistics
    from batchnorm.surgery.recalibrate import Recalibration, recalibrate
    from batchnorm.surgery.sync import Syncing, sync
    from batchnorm.surgery.to_group_norm import Replacing, to_group_norm
    from batchnorm.surgery.to_torch import to_torch
    from batchnorm.surgery.undo import Undoing, undo
    from batchnorm.variants.domains import DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d, domain
    from batchnorm.variants.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
    from batchnorm.variants.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
    from batchnorm.variants.sync import SyncBatchNorm

__version__ = "0.1.0"

__all__ = [
    "Adapting",
    "Averaging",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "Checkup",
    "Comparison",
    "Conversion",
    "DomainBatchNorm1d",
    "DomainBatchNorm2d",
    "DomainBatchNorm3d",
    "Explanation",
    "Finding",
    "Folding",
    "Freezing",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "Pooling",
    "Recalibration",
    "Replacing",
    "Reversion",
    "Run",
    "SyncBatchNorm",
    "Syncing",
    "Undoing",
    "adapt",
    "average",
    "check",
    "compare",
    "conventions",
    "convert",
    "domain",
    "every",
    "explain",
    "fold",
    "freeze",
    "functional",
    "keep_domain",
    "kernels",
    "log_spaced",
    "param_groups",
    "pool_statistics",
    "recalibrate",
    "report",
    "revert",
    "sync",
    "to_group_norm",
    "to_torch",
    "undo",
    "unfreeze",
    "watch",
]

# Names are loaded when first used: a report is rendered where torch would only cost time, or is not installed.
_HOME = {
    "Adapting": "batchnorm.surgery.adapt",
    "Averaging": "batchnorm.surgery.average",
    "Checkup": "batchnorm.checks.check",
    "Comparison": "batchnorm.surgery.compare",
    "Conversion": "batchnorm.surgery.convert",
    "Explanation": "batchnorm.checks.check",
    "Finding": "batchnorm.checks.findings",
    "Folding": "batchnorm.surgery.fold",
    "Freezing": "batchnorm.surgery.freeze",
    "Pooling": "batchnorm.surgery.pool_statistics",
    "Recalibration": "batchnorm.surgery.recalibrate",
    "Replacing": "batchnorm.surgery.to_group_norm",
    "Reversion": "batchnorm.surgery.convert",
    "Syncing": "batchnorm.surgery.sync",
    "Undoing": "batchnorm.surgery.undo",
    "Moments": "batchnorm.moments",
    "Run": "batchnorm.runs.run",
    "check": "batchnorm.checks.check",
    "explain": "batchnorm.checks.check",
    "convert": "batchnorm.surgery.convert",
    "revert": "batchnorm.surgery.convert",
    "every": "batchnorm.recording.steps",
    "log_spaced": "batchnorm.recording.steps",
    "watch": "batchnorm.recording.watch",
    "freeze": "batchnorm.surgery.freeze",
    "unfreeze": "batchnorm.surgery.freeze",
    "param_groups": "batchnorm.surgery.param_groups",
    "to_group_norm": "batchnorm.surgery.to_group_norm",
    "to_torch": "batchnorm.surgery.to_torch",
    "recalibrate": "batchnorm.surgery.recalibrate",
    "undo": "batchnorm.surgery.undo",
    "adapt": "batchnorm.surgery.adapt",
    "average": "batchnorm.surgery.average",
    "compare": "batchnorm.surgery.compare",
    "fold": "batchnorm.surgery.fold",
    **{name: "batchnorm.layers" for name in __all__ if name.removeprefix("Lazy").startswith("BatchNorm")},
    "keep_domain": "batchnorm.surgery.keep_domain",
    "pool_statistics": "batchnorm.surgery.pool_statistics",
    "sync": "batchnorm.surgery.sync",
    "SyncBatchNorm": "batchnorm.variants.sync",
    "domain": "batchnorm.variants.domains",
    **{name: "batchnorm.variants.renorm" for name in __all__ if name.startswith("BatchRenorm")},
    **{name: "batchnorm.variants.ghost" for name in __all__ if name.startswith("Ghost")},
    **{name: "batchnorm.variants.domains" for name in __all__ if name.startswith("Domain")},
}

VIEWS |= {"card": "batchnorm.report:card", "frame": "batchnorm.runs.history:frame"}

_MODULES = {
    "conventions": "surgery.conventions", "functional": "functional", "kernels": "kernels", "report": "report",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(_imported(_HOME[name]), name)
    if name in __all__:
        return _imported(f"batchnorm.{_MODULES[name]}")
    raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
