"""torch.nn's batch norm layers while they are recorded: subclasses that report to the layer's tap.

They compute as torch.nn's do; beside it, one more pass over the input and one over the gradient give the same sums as
this package's layers. Copies and pickles of a layer have torch.nn's class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import kernels
from batchnorm.kernels.aten import ATEN
from batchnorm.kernels.contract import Epilogue, GradSums, Kernel, Pass, Tap
from batchnorm.moments import Moments


class _Observed:
    """A layer of torch.nn's that reports to its tap."""

    _stock: type[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = super().forward(input)  # type: ignore[misc]
        tap: Tap | None = self.__dict__.get("_tap")
        if tap is None or not self.training or input.numel() == 0:  # type: ignore[attr-defined]
            return output
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                return output
            return _observed(output, input, self.eps, tap.handle)[0]  # type: ignore[attr-defined, no-any-return]
        if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
            return output
        return _observe(output, input, self.eps, tap)  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a layer of torch.nn's: copies and stored models take nothing of the recording along."""
        made: Any = super().__reduce_ex__(protocol)
        return (_blank, (self._stock,), *made[2:])


def _blank(cls: type[nn.Module]) -> nn.Module:
    """A layer without its state, which copy and pickle put in."""
    return cls.__new__(cls)


OBSERVED: dict[type[nn.Module], type[nn.Module]] = {
    stock: type(stock.__name__, (_Observed, stock), {"__module__": __name__, "_stock": stock})
    for stock in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}
STOCK = {observed: stock for stock, observed in OBSERVED.items()}


def _observe(output: Tensor, input: Tensor, eps: float, tap: Tap) -> Tensor:
    """output itself; its gradient is summed when it comes.

    The input is held until then and no longer: so does the layer's own backward.
    """
    if tap.look is not None:
        tap.look(input)
    x = input.detach()
    moments = _statistics(x)
    passed = tap.add(moments.count, moments.mean, moments.var)
    if output.requires_grad:
        held = [x]

        def told(grad: Tensor) -> None:
            if held:
                passed.grads.append(_sums(grad, held.pop(), passed.mean, passed.var, eps))
            else:  # a second backward through one graph, when x is gone
                unknown = torch.full_like(passed.mean, torch.nan)
                passed.grads.append(GradSums(unknown, unknown, unknown))

        output.register_hook(told)  # type: ignore[no-untyped-call]
    return output


@torch.no_grad()
def _statistics(x: Tensor) -> Moments:
    return kernels.or_aten(kernels.choose(x, tapped=True).kernel, lambda by: by.statistics(x))


@torch.no_grad()
def _sums(grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> GradSums:
    rstd = torch.rsqrt(var + eps)

    def sums(by: Kernel) -> GradSums:
        dtype = ATEN.accumulation_dtype(x.dtype) if by is ATEN else mean.dtype
        return by.reduce_grad(grad, x, mean.to(dtype), rstd.to(dtype), Epilogue(), energy=True)

    return kernels.or_aten(kernels.choose(x, tapped=True).kernel, sums)


@torch.library.custom_op("batchnorm::observed", mutates_args=())
def _observed(output: Tensor, input: Tensor, eps: float, tap: int) -> tuple[Tensor, Tensor]:
    """output, and the pass's number, -1 for none: `_observe` in a compiled graph."""
    listening = Tap.of(tap)
    ticket = -1
    if listening is not None:
        moments = _statistics(input)
        ticket = listening.add(moments.count, moments.mean, moments.var).number
    return output.clone(), torch.tensor(ticket)


@_observed.register_fake
def _(output: Tensor, input: Tensor, eps: float, tap: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(output), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("batchnorm::observed_backward", mutates_args=())
def _observed_backward(grad: Tensor, x: Tensor, ticket: Tensor, eps: float, tap: int) -> Tensor:
    listening = Tap.of(tap)
    passed: Pass | None = None if listening is None else listening.find(int(ticket))
    if passed is not None:
        passed.grads.append(_sums(grad, x, passed.mean, passed.var, eps))
    return grad.clone()


@_observed_backward.register_fake
def _(grad: Tensor, x: Tensor, ticket: Tensor, eps: float, tap: int) -> Tensor:
    return torch.empty_like(grad)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, ctx.eps, ctx.tap = inputs
    ctx.save_for_backward(x, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, ticket = ctx.saved_tensors
    return _observed_backward(grad, x, ticket, ctx.eps, ctx.tap), None, None, None


_observed.register_autograd(_differentiate, setup_context=_keep)
