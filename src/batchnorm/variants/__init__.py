"""Layers with other statistics in training: synchronized, renormalized, of virtual batches, per domain.

Below, this package's layers by their statistics.
"""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import layers
from batchnorm.variants import domains, ghost, renorm
from batchnorm.variants.sync import SyncBatchNorm

PLAIN: tuple[type[_BatchNorm], ...] = (layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d)

EVAL_ONLY: tuple[type[_BatchNorm], ...] = (
    *(renorm.BatchRenorm1d, renorm.BatchRenorm2d, renorm.BatchRenorm3d),
    *(ghost.GhostBatchNorm1d, ghost.GhostBatchNorm2d, ghost.GhostBatchNorm3d),
)
"""Layers that equal batch norm in eval mode and differ in training."""

ONE_SET: tuple[type[_BatchNorm], ...] = (*PLAIN, SyncBatchNorm, *EVAL_ONLY)
"""Layers with one set of running statistics: most tools support no others."""

DOMAINS: tuple[type[_BatchNorm], ...] = (
    domains.DomainBatchNorm1d,
    domains.DomainBatchNorm2d,
    domains.DomainBatchNorm3d,
)
