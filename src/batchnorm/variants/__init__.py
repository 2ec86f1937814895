"""Layers that see the batch otherwise in training: synchronized, renormalized, in ghost batches, per domain.

Below, this package's layers by what they do with a batch.
"""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import layers
from batchnorm.variants import domains, ghost, renorm
from batchnorm.variants.sync import SyncBatchNorm

PLAIN: tuple[type[_BatchNorm], ...] = (layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d)

OTHERWISE: tuple[type[_BatchNorm], ...] = (
    *(renorm.BatchRenorm1d, renorm.BatchRenorm2d, renorm.BatchRenorm3d),
    *(ghost.GhostBatchNorm1d, ghost.GhostBatchNorm2d, ghost.GhostBatchNorm3d),
)
"""In eval mode batch norms; in training they see a batch otherwise."""

ONE_SET: tuple[type[_BatchNorm], ...] = (*PLAIN, SyncBatchNorm, *OTHERWISE)
"""Those with one set of running statistics: most tools know no others."""

DOMAINS: tuple[type[_BatchNorm], ...] = (
    domains.DomainBatchNorm1d,
    domains.DomainBatchNorm2d,
    domains.DomainBatchNorm3d,
)
