"""Subclasses of torch.nn's and other libraries' layers that report to a tap; a recorded layer has such a class.

They compute what the layers compute. One more pass over the input and one over the gradient compute the sums of
this package's layers. Copies and pickles of a layer have its own class.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import kernels
from batchnorm.kernels.aten import ATEN
from batchnorm.kernels.contract import Epilogue, GradSums, Kernel, Pass, Tap
from batchnorm.moments import Moments
from batchnorm.variants.libraries import TORCH, Kind


class _Observed:
    """Mixin for a layer of torch.nn that reports to its tap."""

    _stock: type[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        return self._report(super().forward(input), input)  # type: ignore[misc]

    def _report(self, output: Tensor, input: Tensor) -> Tensor:
        """The output, after the tap got what it needs of both."""
        tap: Tap | None = self.__dict__.get("_tap")
        if tap is None or not self.training or input.numel() == 0:  # type: ignore[attr-defined]
            return output
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                return output
            return _observe_compiled(output, input, self._eps(), tap.handle)[0]  # type: ignore[no-any-return]
        if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
            return output
        return _observe(output, input, self._eps(), tap)

    def _eps(self) -> float:
        return TORCH.eps_of(self)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle as the layer's own class, without the recording."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (self._stock,), *reduced[2:])


class _ObservedOther(_Observed):
    """Mixin for a layer of another library: it reports before the layer's activation."""

    _kind: Kind
    # `convert` may have made a forward that defers the normalization: a recorded layer computes it itself.
    _batchnorm_tail = None

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        return self._kind.finish(layer, self._report(self._kind.normalize(layer, input), input))

    def _eps(self) -> float:
        return self._kind.eps_of(self)  # type: ignore[arg-type]


@cache
def observed_class(cls: type[Any], kind: Kind) -> type[nn.Module]:
    """The subclass of a layer's class that reports to a tap."""
    mixin, members = (_Observed, {}) if kind is TORCH else (_ObservedOther, {"_kind": kind})
    return type(cls.__name__, (mixin, cls), {"__module__": __name__, "_stock": cls, **members})


def _new(cls: type[nn.Module]) -> nn.Module:
    """A layer without state, which copy and pickle then set."""
    return cls.__new__(cls)


OBSERVED: dict[type[nn.Module], type[nn.Module]] = {
    stock: observed_class(stock, TORCH) for stock in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}
STOCK = {observed: stock for stock, observed in OBSERVED.items()}


def _observe(output: Tensor, input: Tensor, eps: float, tap: Tap) -> Tensor:
    """Add a pass to the tap and return `output`, with a hook that adds the gradient's sums in backward.

    The hook refers to the input until backward, as the layer's own backward does.
    """
    if tap.look is not None:
        tap.look(input)
    x = input.detach()
    moments = _statistics(x)
    passed = tap.add(moments.count, moments.mean, moments.var)
    if output.requires_grad:
        inputs = [x]

        def add_grad_sums(grad_y: Tensor) -> None:
            if inputs:
                passed.grads.append(_grad_sums(grad_y, inputs.pop(), passed, eps))
            else:  # a second backward through one graph, after x was freed
                unknown = torch.full_like(passed.mean, torch.nan)
                passed.grads.append(GradSums(unknown, unknown, unknown))

        output.register_hook(add_grad_sums)  # type: ignore[no-untyped-call]
    return output


@torch.no_grad()
def _statistics(x: Tensor) -> Moments:
    return kernels.or_aten(kernels.choose(x, tapped=True).kernel, lambda kernel: kernel.statistics(x))


@torch.no_grad()
def _grad_sums(grad_y: Tensor, x: Tensor, passed: Pass, eps: float) -> GradSums:
    mean, rstd = passed.mean, torch.rsqrt(passed.var + eps)

    def reduce(kernel: Kernel) -> GradSums:
        dtype = ATEN.accumulation_dtype(x.dtype) if kernel is ATEN else mean.dtype
        return kernel.reduce_grad(grad_y, x, mean.to(dtype), rstd.to(dtype), Epilogue(), energy=True)

    return kernels.or_aten(kernels.choose(x, tapped=True).kernel, reduce)


@torch.library.custom_op("batchnorm::observed", mutates_args=())
def _observe_compiled(output: Tensor, input: Tensor, eps: float, handle: int) -> tuple[Tensor, Tensor]:
    """`_observe` in a compiled graph: output, and the pass's number, -1 without a tap."""
    tap = Tap.of(handle)
    number = -1
    if tap is not None:
        moments = _statistics(input)
        number = tap.add(moments.count, moments.mean, moments.var).number
    return output.clone(), torch.tensor(number)


@_observe_compiled.register_fake
def _(output: Tensor, input: Tensor, eps: float, handle: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("batchnorm::observed_backward", mutates_args=())
def _backward_compiled(grad_y: Tensor, x: Tensor, number: Tensor, eps: float, handle: int) -> Tensor:
    tap = Tap.of(handle)
    passed = None if tap is None else tap.find(int(number))
    if passed is not None:
        passed.grads.append(_grad_sums(grad_y, x, passed, eps))
    return grad_y.clone()


@_backward_compiled.register_fake
def _(grad_y: Tensor, x: Tensor, number: Tensor, eps: float, handle: int) -> Tensor:
    return torch.empty_like(grad_y)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, ctx.eps, ctx.handle = inputs
    ctx.save_for_backward(x, output[1])


def _backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, number = ctx.saved_tensors
    return _backward_compiled(grad_y, x, number, ctx.eps, ctx.handle), None, None, None


_observe_compiled.register_autograd(_backward, setup_context=_setup_context)
