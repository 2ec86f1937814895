"""What surgery changes of a model: for a while, and taken back in any case; or for good, and taken back on an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.restoring import Snapshot, compiled_class, unchanged

_NARROWER = ("tf32", "bf16")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients and full float32 precision inside; afterwards the model and the random numbers are as before."""
    with torch.inference_mode(False), torch.no_grad(), _full_precision(), unchanged(model):
        yield


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """The generators go on afterwards as if nothing had been drawn."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 is multiplied as float32: in TF32 or bfloat16 two right answers differ in the fourth digit."""
    backends: Any = torch.backends
    operators = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [(operator, operator.fp32_precision) for operator in operators]
    narrow = [(operator, precision) for operator, precision in before if precision in _NARROWER]
    try:
        for operator, _ in narrow:
            operator.fp32_precision = "ieee"
        yield
    finally:
        for operator, precision in narrow:
            operator.fp32_precision = precision


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, and in its own mode afterwards.

    The modes are set one by one: a model's own train() may do more (merge weights, wake a layer).
    """
    modes = [(module, vars(module).get("training", module.training)) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def by_batch(layer: _BatchNorm) -> None:
    """The layer normalizes by each batch's own statistics, without other processes, and moves nothing."""
    layer.training, layer.track_running_stats = True, False
    vars(layer)["_merge"] = _nobody


def _nobody() -> None:
    """In the place of SyncBatchNorm's `_merge`: a forward that is left halfway must keep no other process waiting."""


def stand_in(layer: _BatchNorm, **tensors: Tensor) -> None:
    """The layer is in eval mode and has these parameters and buffers in place of its own."""
    layer.training = False
    for kind in ("_parameters", "_buffers"):
        own = vars(layer)[kind]
        vars(layer)[kind] = own | {name: tensor for name, tensor in tensors.items() if name in own}


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """All in eval mode, no gradients, nothing compiled; afterwards the model is as before.

    Inside, layers may be set up otherwise: `by_batch`, `stand_in`.
    """
    with undisturbed(model), in_eval(model), eager():
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Nothing runs compiled: compiled code does not see hooks that come later."""
    with nullcontext() if compiled_class() is None else torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def all_or_nothing(model: nn.Module, writes: Iterable[Tensor] = ()) -> Iterator[Snapshot]:
    """Where anything is raised inside, the model is what it was: every change for good is made in here.

    Put back are the module tree, classes, attributes, hooks, modes, which parameters need gradients and the gradients
    themselves; the values of those tensors that are in `writes`.
    """
    snapshot = Snapshot(model, values=False)
    snapshot.keep(writes)
    try:
        yield snapshot
    except BaseException:
        snapshot.restore()
        raise
