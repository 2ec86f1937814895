"""adapt(): for a while, layers in eval mode normalize by statistics that lean towards the batch they are given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import kernels
from batchnorm.records import Record, Skipped
from batchnorm.restoring import eager, unwrapped
from batchnorm.running_stats import NAMES, copied, move_all
from batchnorm.surgery._shared.layers import find
from batchnorm.surgery._shared.measuring import only_valid
from batchnorm.words import plural

__all__ = ["Adapting", "adapt"]


@dataclass(frozen=True, slots=True, repr=False)
class Adapting(Record):
    """What `adapt` does, for as long as its `with` block lasts.

    Attributes:
        prior: how many samples the running statistics count as.
        layers: the names of the layers that adapt.
        skipped: the layers that normalize as before, each with the reason.
    """

    prior: float
    layers: tuple[str, ...]
    skipped: tuple[Skipped, ...]

    _left = "not adapted"

    def _head(self) -> list[str]:
        counted = plural(len(self.layers), "batch norm layer")
        prior = f"{self.prior:g} {'sample' if self.prior == 1 else 'samples'}"
        return [f"{counted} adapted, the running statistics counting {prior}"]


@contextmanager
def adapt(model: nn.Module, prior: float = 16.0, also: Sequence[type[nn.Module]] = ()) -> Iterator[Adapting]:
    """Inside, batch norm layers in eval mode mix the batch's statistics into their running statistics.

    mean = (N·running_mean + n·mean_B)/(N + n) and var = (N·running_var + n·var_B)/(N + n), with N = prior.

    n is the number of samples in the batch that a layer is given, mean_B and var_B (biased) are the batch's moments.
    This is for data that have shifted since training: corrupted images, another camera.

    >>> with bn.adapt(model, prior=16):
    ...     logits = model(images)

    Nothing is learned or stored: buffers, parameters and state_dict are the model's own all the time, bit by bit, and
    so is what it gives afterwards. The batch's statistics are constants of backward: no gradient flows through them.

    Args:
        model: in eval mode. Parallel wrappers are looked through; compiled models run eagerly inside.
        prior: how many samples the running statistics are worth: 0 normalizes by the batch alone, infinity not at all
            by it. The smaller the batch, the larger it should be.
        also: subclasses of torch.nn's layers that normalize as these do, which the caller vouches for.

    Yields:
        The layers that adapt, and those left alone with the reason: frozen ones, those without running statistics.

    Raises TypeError if `model` is not a torch.nn.Module, ValueError if prior is no number >= 0 or a layer is in
    training mode.

    Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation", section 3;
    Nado et al. 2020 (prior 0).
    """
    if isinstance(prior, bool) or not isinstance(prior, int | float) or not prior >= 0:
        raise ValueError(f"prior must be a number of samples >= 0, got {prior!r}")
    norms, skipped = find("adapt", unwrapped(model) if isinstance(model, nn.Module) else model, also)
    training = [norm.name or "the layer" for norm in norms if norm.layer.training]
    if training:
        raise ValueError(
            f"{training[0]} is in training mode, where it normalizes by the batch: call model.eval() first"
        )
    with eager(), ExitStack() as stack:
        for norm in norms:
            own = norm.layer._buffers
            stack.callback(_straighten, own, norm.layer)
            before, after = partial(_lean, prior, own), partial(_straighten, own)
            stack.callback(norm.layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(norm.layer.register_forward_hook(after, always_call=True).remove)
        yield Adapting(float(prior), tuple(norm.name for norm in norms), tuple(skipped))


# Not inside `adapt`: a copy of a layer takes copies of its hooks along, which must be about the copy.
@torch.no_grad()
def _lean(
    prior: float, own: dict[str, Tensor | None], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """For this forward the layer normalizes by statistics that lean towards the batch."""
    given: Any = args[0] if args else kwargs.get("input")
    x = only_valid(given, kwargs) if isinstance(given, Tensor) else given
    if isinstance(x, Tensor) and x.dim() > 1 and x.numel() and not math.isinf(prior):
        batch = kernels.or_aten(kernels.choose(x).kernel, lambda by: by.statistics(x))
        leaning = copied((own["running_mean"], own["running_var"]))
        move_all(leaning, (batch.mean, batch.var), len(given) / (prior + len(given)))
        vars(layer)["_buffers"] = own | dict(zip(NAMES, leaning, strict=False))


def _straighten(own: dict[str, Tensor | None], layer: nn.Module, *_: object) -> None:
    vars(layer)["_buffers"] = own
