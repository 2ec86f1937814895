"""What is timed: our layer, PyTorch's in several ways, JAX if installed, and a copy of x as the floor.

Each makes the same call on the same tensors, and `take` changes to those of another call, between two calls. In
training, forward also updates the running statistics, and backward returns all gradients: of x, gamma, beta and the
residual.

    ours      batchnorm's layer, with the residual and the activation fused
    eager     torch.nn's layer, then `+ residual`, then the activation
    in place  the same, with `+=` and the activation in place, as networks often write it
    compile   eager through torch.compile
    autotune  the same with mode="max-autotune", on a GPU; without CUDA graphs of the compiler if calls are replayed
    jax       the same in jax.numpy, forward and backward in one jitted function
    floor     a copy of x into a new tensor; on the CPU written past the caches, unless x is there already
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from batchnorm import layers
from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.cpu import copying
from batchnorm.testing import Call, Outputs


class Contender(Protocol):
    """What is timed: forward, then backward on its result. If backward is None, forward is the whole call."""

    def forward(self) -> Any: ...

    @property
    def backward(self) -> Callable[[Any], object] | None: ...


class ForwardOnly(NamedTuple):
    """A contender whose forward is the whole call."""

    forward: Callable[[], Any]
    backward: None = None


_KINDS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


class Stock(torch.nn.Module):
    """torch.nn's layer, the addition and the activation, one after the other."""

    def __init__(self, channels: int, dims: int, act: str | None, inplace: bool) -> None:
        super().__init__()
        self.norm = getattr(torch.nn, _KINDS[dims])(channels)
        self.act = torch.nn.Identity() if act is None else getattr(torch.nn, ACTIVATIONS[act].module)(inplace=inplace)
        self.inplace = inplace

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z: Tensor = self.norm(x)
        if residual is not None:
            z = z.add_(residual) if self.inplace else z + residual
        return self.act(z)  # type: ignore[no-any-return]


class Layer:
    """The contender of a torch layer and a call's tensors; its gradients have the names in `spec`."""

    def __init__(self, call: Call, norm: torch.nn.modules.batchnorm._BatchNorm, run: Callable[..., Tensor]) -> None:
        state: dict[str, Any] = {"weight": call.gamma, "bias": call.beta}
        state |= {"running_mean": call.running_mean, "running_var": call.running_var}
        norm.load_state_dict(state, strict=False)
        norm.train(call.training)
        norm.to(call.x.device, torch.float64 if call.x.dtype == torch.float64 else torch.float32)
        self.norm, self.run = norm, run
        self.backward = self._gradients if call.training else None
        self.take(call)

    def take(self, call: Call) -> None:
        """Use the tensors of this call from now on; the layer keeps its parameters and statistics."""
        self.grad_y = call.grad_y
        x = call.x.detach().requires_grad_(call.training)
        residual = None if call.residual is None else call.residual.detach().requires_grad_(call.training)
        self.inputs = (x,) if residual is None else (x, residual)
        self.leaf_by_gradient = {"dx": x, "dgamma": self.norm.weight, "dbeta": self.norm.bias}
        if residual is not None:
            self.leaf_by_gradient["dresidual"] = residual
        self.leaves = tuple(self.leaf_by_gradient.values())

    def forward(self) -> Tensor:
        return self.run(*self.inputs)

    def _gradients(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.grad_y)

    def outputs(self) -> Outputs:
        """y, the gradients in training, and the updated running statistics."""
        with torch.set_grad_enabled(self.backward is not None):
            y = self.forward()
            grads = {} if self.backward is None else dict(zip(self.leaf_by_gradient, self.backward(y), strict=True))
        running = {name: getattr(self.norm, name).clone() for name in ("running_mean", "running_var")}
        return {"y": y.detach(), **grads, **running}


class Copy:
    """The contender that copies x into a new tensor by `copy(target, source)`."""

    backward = None

    def __init__(self, call: Call, copy: Callable[[Tensor, Tensor], object]) -> None:
        self.copy = copy
        self.take(call)

    def take(self, call: Call) -> None:
        self.x = call.x

    def forward(self) -> Tensor:
        target = torch.empty_like(self.x)
        self.copy(target, self.x)
        return target


def floor(call: Call, *, cold: bool = True) -> Copy:
    """The copy that is the unit of memory traffic: past the caches if x is cold, as a plain copy if x is in them."""
    if call.x.device.type != "cpu":
        return Copy(call, Tensor.copy_)

    def copy(target: Tensor, source: Tensor) -> None:
        size = source.numel() * source.element_size()  # a case's tensors are dense, and empty_like keeps the strides
        copying.copy(source.data_ptr(), target.data_ptr(), size, cold)

    return Copy(call, copy)


def ours(call: Call) -> Layer:
    layer = getattr(layers, _KINDS[call.x.dim()])(call.x.shape[1], act=call.act)
    return Layer(call, layer, layer)


def eager(call: Call, *, inplace: bool = False) -> Layer:
    stock = Stock(call.x.shape[1], call.x.dim(), call.act, inplace).train(call.training)
    return Layer(call, stock.norm, stock)


def compiled(call: Call, mode: str | None = None) -> Layer:
    """eager through torch.compile. Its cache is emptied first, so that cases do not share guards."""
    torch._dynamo.reset()
    stock = Stock(call.x.shape[1], call.x.dim(), call.act, False).train(call.training)
    return Layer(call, stock.norm, torch.compile(stock, fullgraph=True, mode=mode))


def why_not_compile(device: str = "cpu") -> str | None:
    """One line that says why torch.compile cannot run on the device; None if it can."""
    try:
        torch.compile(lambda x: torch.relu(x) + 1, fullgraph=True)(torch.ones(64, device=device))
    except Exception as error:  # anything from a missing compiler to a full disk; the caller shows it
        remedy = "install a C++ compiler such as g++, or time without torch.compile"
        return f"torch.compile cannot compile here ({first_line(error)}): {remedy}"
    return None


def first_line(error: Exception) -> str:
    """The first line of the error's message; its class if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Jax:
    """The same call in jax.numpy, on the same memory and layout; one jitted function computes both directions."""

    backward = None

    def __init__(self, call: Call, channels_last: bool) -> None:
        jax, jnp = import_module("jax"), import_module("jax.numpy")
        self.wait = jax.block_until_ready
        dims = call.x.dim()
        last = channels_last and dims > 2
        order = (0, *range(2, dims), 1)
        self.order = (0, dims - 1, *range(1, dims - 1)) if last else tuple(range(dims))
        axis = dims - 1 if last else 1
        axes = tuple(a for a in range(dims) if a != axis)
        shape = tuple(-1 if a == axis else 1 for a in range(dims))
        act = {None: lambda z: z, "relu": jax.nn.relu, "silu": jax.nn.silu}[call.act]
        m = call.x.numel() // call.x.shape[1]

        def to_jax(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            return jnp.from_dlpack(tensor.detach().permute(order) if last and tensor.dim() == dims else tensor.detach())

        def transform(mean: Any, var: Any, x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
            wide = x.astype(jnp.float32)
            if call.training:
                mean, var = wide.mean(axes), wide.var(axes)
            rstd = gamma / jnp.sqrt(var + call.eps)
            z = ((wide - mean.reshape(shape)) * rstd.reshape(shape) + beta.reshape(shape)).astype(x.dtype)
            return act(z if residual is None else z + residual), (mean, var)

        def step(x: Any, gamma: Any, beta: Any, residual: Any, mean: Any, var: Any, grad_y: Any) -> Any:
            if not call.training:
                return transform(mean, var, x, gamma, beta, residual)[0]
            forward = partial(transform, mean, var)
            y, pull_back, (batch_mean, batch_var) = jax.vjp(forward, x, gamma, beta, residual, has_aux=True)
            running = [
                (1 - call.momentum) * old + call.momentum * new
                for old, new in ((mean, batch_mean), (var, batch_var * m / (m - 1)))
            ]
            return y, pull_back(grad_y), running

        self.step = jax.jit(step)
        self.to_jax, self.training = to_jax, call.training
        self.vectors = [to_jax(vector) for vector in (call.gamma, call.beta, call.running_mean, call.running_var)]
        self.take(call)

    def take(self, call: Call) -> None:
        x, residual, grad_y = (self.to_jax(tensor) for tensor in (call.x, call.residual, call.grad_y))
        gamma, beta, *running = self.vectors
        self.arguments = (x, gamma, beta, residual, *running, grad_y)

    def forward(self) -> Any:
        return self.wait(self.step(*self.arguments))

    def outputs(self) -> Outputs:
        """y and, in training, dx as torch tensors, with the dimensions in torch's order."""
        result = self.forward()
        outputs = {"y": result[0], "dx": result[1][0]} if self.training else {"y": result}
        return {name: torch.utils.dlpack.from_dlpack(value).permute(self.order) for name, value in outputs.items()}


def has_jax() -> bool:
    return find_spec("jax") is not None and find_spec("jaxlib") is not None
