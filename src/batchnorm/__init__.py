"""Batch normalization for PyTorch: drop-in layers, and tools that measure what gamma and beta do.

`__init__.pyi` declares the public names for type checkers; `tests/test_public.py` compares it with the table here.
"""

from __future__ import annotations

from typing import Any

from batchnorm.importing import load_module as _load_module
from batchnorm.runs import VIEWS

__version__ = "0.2.0"

# Public names by module; a module without names is public itself. All are imported at first use: reports work where
# torch is not installed.
_PUBLIC = {
    "batchnorm.allocator": "FreedMemory keep_freed_memory",
    "batchnorm.checks.check": "Checkup Explanation check explain",
    "batchnorm.checks.findings": "Finding",
    "batchnorm.functional": "",
    "batchnorm.kernels": "",
    "batchnorm.layers": "BatchNorm1d BatchNorm2d BatchNorm3d LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d",
    "batchnorm.merging.average": "Averaging average",
    "batchnorm.merging.pool_states": "PooledStates pool_states",
    "batchnorm.merging.repair": "Repairing repair",
    "batchnorm.moments": "Moments",
    "batchnorm.recording.steps": "every log_spaced",
    "batchnorm.recording.watch": "watch",
    "batchnorm.report": "",
    "batchnorm.runs.run": "Run",
    "batchnorm.saved_tensors.lean": "Lean lean",
    "batchnorm.saved_tensors.memory": "Memory memory",
    "batchnorm.surgery.adapt": "Adapting adapt",
    "batchnorm.surgery.compare": "Comparison compare",
    "batchnorm.surgery.conventions": "",
    "batchnorm.surgery.convert": "Conversion Reversion convert revert",
    "batchnorm.surgery.fold": "Folding fold",
    "batchnorm.surgery.freeze": "Freezing freeze unfreeze",
    "batchnorm.surgery.keep_domain": "keep_domain",
    "batchnorm.surgery.param_groups": "param_groups",
    "batchnorm.surgery.pool_statistics": "Pooling pool_statistics",
    "batchnorm.surgery.recalibrate": "Recalibration recalibrate",
    "batchnorm.surgery.sync": "Syncing sync",
    "batchnorm.surgery.to_group_norm": "Replacing to_group_norm",
    "batchnorm.surgery.to_onednn": "Packing to_onednn",
    "batchnorm.surgery.to_torch": "to_torch",
    "batchnorm.surgery.undo": "Undoing undo",
    "batchnorm.variants.domains": "DomainBatchNorm1d DomainBatchNorm2d DomainBatchNorm3d domain",
    "batchnorm.variants.ghost": "GhostBatchNorm1d GhostBatchNorm2d GhostBatchNorm3d",
    "batchnorm.variants.renorm": "BatchRenorm1d BatchRenorm2d BatchRenorm3d",
    "batchnorm.variants.sync": "SyncBatchNorm",
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split() or [module.rpartition(".")[2]]}

__all__ = sorted(_HOME)

VIEWS |= {"card": "batchnorm.report:card", "frame": "batchnorm.runs.history:frame"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")
    module = _load_module(_HOME[name])
    return getattr(module, name) if _PUBLIC[_HOME[name]] else module


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
