"""Replace batch norms that no convolution or linear layer can absorb by what exporters accept: a factor and a shift."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchnorm.surgery._folding.pairs import RunTrace
from batchnorm.surgery._folding.trials import Difference, difference
from batchnorm.surgery._folding.weights import remainder, scale_and_shift
from batchnorm.surgery._shared.norm import Norm

Leftover = Literal["affine", "depthwise"]

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Affine(nn.Module):
    """A batch norm in eval mode as a factor and a shift, as `fold` leaves it with leftover="affine".

    y = weight·x + bias for each channel.

    Args:
        channels: C, the number of channels of the input (N, C, *).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift an input (N, C, *)."""
        shape = (-1, *[1] * (input.dim() - 2))
        return input * self.weight.to(input.dtype).reshape(shape) + self.bias.to(input.dtype).reshape(shape)

    def extra_repr(self) -> str:
        return str(self.weight.numel())


@dataclass(eq=False)
class Replacement:
    """A norm, and the module that replaces it; `difference` is the change of its output."""

    norm: Norm
    module: nn.Module
    difference: Difference | None = None

    @property
    def second(self) -> nn.Module:
        """The module whose output changes."""
        return self.norm.layer


def replacement(norm: Norm, how: Leftover, trace: RunTrace) -> Replacement | str:
    """The module that replaces a norm; or why that is impossible."""
    why = trace.why_not_alone(norm)
    if why is not None:
        return why
    linear = scale_and_shift(norm)
    if isinstance(linear, str):
        return linear
    inputs = trace.inputs[norm.layer]
    rank, dtype = next(iter(inputs))
    new: Any = Affine(0)
    if how == "depthwise":
        if len(inputs) > 1 or rank not in _CONVOLUTIONS:
            return 'a depthwise convolution does not take its inputs: use leftover="affine"'
        new = _CONVOLUTIONS[rank](norm.channels, norm.channels, 1, groups=norm.channels, device="meta")
    gamma, mean = norm.tensor("gamma"), norm.tensor("mean")
    assert mean is not None
    kind = dtype if how == "depthwise" else mean.dtype
    shape = (-1, *[1] * (rank - 1)) if how == "depthwise" else (-1,)
    for name, value in zip(("weight", "bias"), linear, strict=True):
        cast = value.detach().to(kind)
        if not bool(cast.isfinite().all()):
            return f"its scale and shift are not finite in {str(kind).removeprefix('torch.')}"
        grads = gamma is not None and gamma.requires_grad
        new._parameters[name] = nn.Parameter(cast.reshape(shape if name == "weight" else (-1,)), grads)
    rest = norm.follows or {"rest": remainder(norm, residual=False)}
    rest = {name: module for name, module in rest.items() if type(module) is not nn.Identity}
    new.training = False
    if rest:
        new = nn.Sequential(OrderedDict({how: new, **rest}))
        new.training = False  # the modules that follow keep their modes
    return Replacement(norm, new)


def try_replacements(replacements: Sequence[Replacement], run: Callable[[], Any]) -> None:
    """Measure the `difference` of every replacement, on its inputs while the model runs."""
    inputs: dict[Replacement, list[Tensor]] = {}

    def before(one: Replacement, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs["input"]
        inputs.setdefault(one, []).append(value.clone())  # the norm may write to it

    def after(one: Replacement, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        old = one.difference
        new = difference([output], [one.module(inputs[one].pop())])
        one.difference = max((part for part in (old, new) if part is not None), key=lambda part: part.max, default=None)

    with ExitStack() as stack:
        for one in replacements:
            layer = one.norm.layer
            stack.callback(layer.register_forward_pre_hook(partial(before, one), with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(partial(after, one)).remove)
        run()
