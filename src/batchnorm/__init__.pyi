"""The public names of batchnorm for type checkers, as __init__.py loads them."""

from batchnorm import functional as functional
from batchnorm import kernels as kernels
from batchnorm import report as report
from batchnorm.allocator import FreedMemory as FreedMemory
from batchnorm.allocator import keep_freed_memory as keep_freed_memory
from batchnorm.checks.check import Checkup as Checkup
from batchnorm.checks.check import Explanation as Explanation
from batchnorm.checks.check import check as check
from batchnorm.checks.check import explain as explain
from batchnorm.checks.findings import Finding as Finding
from batchnorm.layers import BatchNorm1d as BatchNorm1d
from batchnorm.layers import BatchNorm2d as BatchNorm2d
from batchnorm.layers import BatchNorm3d as BatchNorm3d
from batchnorm.layers import LazyBatchNorm1d as LazyBatchNorm1d
from batchnorm.layers import LazyBatchNorm2d as LazyBatchNorm2d
from batchnorm.layers import LazyBatchNorm3d as LazyBatchNorm3d
from batchnorm.merging.average import Averaging as Averaging
from batchnorm.merging.average import average as average
from batchnorm.merging.pool_states import PooledStates as PooledStates
from batchnorm.merging.pool_states import pool_states as pool_states
from batchnorm.merging.repair import Repairing as Repairing
from batchnorm.merging.repair import repair as repair
from batchnorm.moments import Moments as Moments
from batchnorm.recording.steps import every as every
from batchnorm.recording.steps import log_spaced as log_spaced
from batchnorm.recording.watch import watch as watch
from batchnorm.runs.run import Run as Run
from batchnorm.saved_tensors.lean import Lean as Lean
from batchnorm.saved_tensors.lean import lean as lean
from batchnorm.saved_tensors.memory import Memory as Memory
from batchnorm.saved_tensors.memory import memory as memory
from batchnorm.surgery import conventions as conventions
from batchnorm.surgery.adapt import Adapting as Adapting
from batchnorm.surgery.adapt import adapt as adapt
from batchnorm.surgery.compare import Comparison as Comparison
from batchnorm.surgery.compare import compare as compare
from batchnorm.surgery.convert import Conversion as Conversion
from batchnorm.surgery.convert import Reversion as Reversion
from batchnorm.surgery.convert import convert as convert
from batchnorm.surgery.convert import revert as revert
from batchnorm.surgery.fold import Folding as Folding
from batchnorm.surgery.fold import fold as fold
from batchnorm.surgery.freeze import Freezing as Freezing
from batchnorm.surgery.freeze import freeze as freeze
from batchnorm.surgery.freeze import unfreeze as unfreeze
from batchnorm.surgery.keep_domain import keep_domain as keep_domain
from batchnorm.surgery.param_groups import param_groups as param_groups
from batchnorm.surgery.pool_statistics import Pooling as Pooling
from batchnorm.surgery.pool_statistics import pool_statistics as pool_statistics
from batchnorm.surgery.recalibrate import Recalibration as Recalibration
from batchnorm.surgery.recalibrate import recalibrate as recalibrate
from batchnorm.surgery.sync import Syncing as Syncing
from batchnorm.surgery.sync import sync as sync
from batchnorm.surgery.to_group_norm import Replacing as Replacing
from batchnorm.surgery.to_group_norm import to_group_norm as to_group_norm
from batchnorm.surgery.to_onednn import Packing as Packing
from batchnorm.surgery.to_onednn import to_onednn as to_onednn
from batchnorm.surgery.to_torch import to_torch as to_torch
from batchnorm.surgery.undo import Undoing as Undoing
from batchnorm.surgery.undo import undo as undo
from batchnorm.variants.domains import DomainBatchNorm1d as DomainBatchNorm1d
from batchnorm.variants.domains import DomainBatchNorm2d as DomainBatchNorm2d
from batchnorm.variants.domains import DomainBatchNorm3d as DomainBatchNorm3d
from batchnorm.variants.domains import domain as domain
from batchnorm.variants.ghost import GhostBatchNorm1d as GhostBatchNorm1d
from batchnorm.variants.ghost import GhostBatchNorm2d as GhostBatchNorm2d
from batchnorm.variants.ghost import GhostBatchNorm3d as GhostBatchNorm3d
from batchnorm.variants.renorm import BatchRenorm1d as BatchRenorm1d
from batchnorm.variants.renorm import BatchRenorm2d as BatchRenorm2d
from batchnorm.variants.renorm import BatchRenorm3d as BatchRenorm3d
from batchnorm.variants.sync import SyncBatchNorm as SyncBatchNorm

__version__: str
__all__: list[str]

def __dir__() -> list[str]: ...
