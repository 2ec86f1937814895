"""What surgery changes of a model: for a while, and taken back in any case; or for good, and taken back on an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.surgery.undisturbed import undisturbed
from batchnorm.wrappers import compiled_class


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
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(in_eval(model))
        stack.enter_context(eager())
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Nothing runs compiled: compiled code does not see hooks that come later."""
    with ExitStack() as stack:
        if compiled_class() is not None:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class Saved:
    """The values of tensors, to be put back into the same tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def restore(self) -> None:
        for tensor, values in self._values:
            put(tensor, values)


@contextmanager
def all_or_nothing(tensors: Iterable[Tensor]) -> Iterator[Saved]:
    """Where anything is raised inside, the tensors hold what they held, bit by bit."""
    saved = Saved(tensors)
    try:
        yield saved
    except BaseException:
        saved.restore()
        raise


def put(tensor: Tensor, values: Tensor | int) -> None:
    """Write in place, whatever mode the tensor was made in."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(values) if isinstance(values, Tensor) else tensor.fill_(values)
