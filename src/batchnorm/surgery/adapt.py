"""adapt(): in a `with` block, layers in eval mode mix the batch's statistics into the running statistics."""

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
from batchnorm.running_stats import copied, move_all
from batchnorm.surgery._shared.layers import find
from batchnorm.surgery._shared.measuring import valid_input
from batchnorm.words import plural

__all__ = ["Adapting", "adapt"]


@dataclass(frozen=True, slots=True, repr=False)
class Adapting(Record):
    """What `adapt` changes while its `with` block runs.

    Attributes:
        prior: the weight of the running statistics, in samples.
        layers: the names of the layers that adapt.
        skipped: the layers that do not, each with the reason.
    """

    prior: float
    layers: tuple[str, ...]
    skipped: tuple[Skipped, ...]

    _left = "not adapted"

    def _head(self) -> list[str]:
        counted = plural(len(self.layers), "batch norm layer")
        prior = f"{self.prior:g} {'sample' if self.prior == 1 else 'samples'}"
        return [f"{counted} adapted, the running statistics weigh as much as {prior}"]


@contextmanager
def adapt(model: nn.Module, prior: float = 16.0, also: Sequence[type[nn.Module]] = ()) -> Iterator[Adapting]:
    """Mix the batch's statistics into the running statistics of layers in eval mode, inside a `with` block.

    mean = (N·running_mean + n·mean_B)/(N + n) and var = (N·running_var + n·var_B)/(N + n), with N = prior.

    n is the number of samples in the batch, mean_B and var_B (biased) are its moments. This helps with data that
    differs from the training data: corrupted images, another camera.

    >>> with bn.adapt(model, prior=16):
    ...     logits = model(images)

    Nothing is learned or stored: buffers, parameters, state_dict and later outputs do not change. No gradient flows
    through the batch's statistics.

    Args:
        model: in eval mode. Parallel wrappers are unwrapped; compiled models run eagerly inside.
        prior: the weight of the running statistics, in samples: 0 uses the batch only, infinity the running statistics
            only. Use a larger prior for smaller batches.
        also: subclasses to include, which must normalize as their base class does.

    Yields:
        The layers that adapt, and the skipped ones with the reason: frozen, or without running statistics.

    Raises TypeError if `model` is not a torch.nn.Module, ValueError if prior is not a number >= 0 or a layer is
    in training mode.

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
            buffers = norm.layer._buffers
            stack.callback(_restore_buffers, buffers, norm.layer)
            names = norm.tensor_name("mean"), norm.tensor_name("var")
            before, after = partial(_mix_buffers, prior, buffers, names), partial(_restore_buffers, buffers)
            stack.callback(norm.layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(norm.layer.register_forward_hook(after, always_call=True).remove)
        yield Adapting(float(prior), tuple(norm.name for norm in norms), tuple(skipped))


# Module level, not closures: the hooks of a copied layer are copied too, and must act on the copy.
@torch.no_grad()
def _mix_buffers(
    prior: float,
    buffers: dict[str, Tensor | None],
    names: tuple[str, str],
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    first: Any = args[0] if args else kwargs.get("input")
    x = valid_input(first, kwargs) if isinstance(first, Tensor) else first
    if isinstance(x, Tensor) and x.dim() > 1 and x.numel() and not math.isinf(prior):
        batch = kernels.or_aten(kernels.choose(x).kernel, lambda kernel: kernel.statistics(x))
        mixed = copied((buffers[names[0]], buffers[names[1]]))
        move_all(mixed, (batch.mean, batch.var), len(first) / (prior + len(first)))
        vars(layer)["_buffers"] = buffers | dict(zip(names, mixed, strict=True))


def _restore_buffers(buffers: dict[str, Tensor | None], layer: nn.Module, *_: object) -> None:
    vars(layer)["_buffers"] = buffers
