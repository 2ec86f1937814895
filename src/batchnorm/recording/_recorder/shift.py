"""Internal covariate shift as Santurkar et al. (2018, Definition 2.1) define it, on one held batch.

    G_i  = ∇_{W_i} L(W_1^t, ..., W_k^t; x, y)
    G'_i = ∇_{W_i} L(W_1^{t+1}, ..., W_{i-1}^{t+1}, W_i^t, W_{i+1}^t, ..., W_k^t; x, y)
    shift_i = ||G_i - G'_i||_2

How much the update of the layers below changes a layer's gradient. W_i is the weight below the i-th batch norm layer;
"the layers below" are all parameters of modules that run before the one that holds it, gamma and beta included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.recording._recorder.attach import Watched
from batchnorm.recording._recorder.probe import buffers, call
from batchnorm.recording._recorder.producers import producer

Loss = Callable[[Any], Tensor]


class Shift(NamedTuple):
    """Of one layer: ||G - G'||, ||G||, and the cosine between the two (NaN where one of them is 0)."""

    layer: str
    shift: float
    gradient_norm: float
    cosine: float


class Before(NamedTuple):
    """Step t, held until the parameters have moved: the loss can be evaluated with any part of them moved."""

    model: nn.Module
    batch: Any
    loss: Loss
    parameters: dict[str, Tensor]
    buffers: Mapping[str, Tensor]
    random: Mapping[torch.device, Tensor]
    order: Mapping[str, int]
    weights: Mapping[str, str]
    gradients: Mapping[str, Tensor]


def before(model: nn.Module, layers: Sequence[Watched], batch: Any, loss: Loss) -> Before:
    """Evaluate G, and keep what G' needs: one more copy of the parameters."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    held = buffers(model)
    devices = {tensor.device for tensor in kept.values() if tensor.device.type == "cuda"}
    random = {device: torch.cuda.get_rng_state(device) for device in devices} | {
        torch.device("cpu"): torch.get_rng_state()
    }
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in kept.items()}
    names = {id(leaf): name for name, leaf in leaves.items()}
    order: dict[str, int] = {}
    weights: dict[str, str] = {}

    def began(prefix: str, module: nn.Module) -> Callable[..., None]:
        def hook(*_: object) -> None:
            for name, _parameter in module.named_parameters(prefix, recurse=False):
                order.setdefault(name, len(order))

        return hook

    def reached(watched: Watched) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            found = producer(args[0], watched.units, names)
            if found is not None:
                weights.setdefault(watched.name, found.name)

        return hook

    handles = [module.register_forward_pre_hook(began(name, module)) for name, module in model.named_modules()]
    handles += [watched.layer.register_forward_pre_hook(reached(watched)) for watched in layers]
    partial = Before(model, batch, loss, kept, held, random, order, weights, {})
    try:
        value = _value(partial, leaves)
    finally:
        for handle in handles:
            handle.remove()
    found = torch.autograd.grad(value, [leaves[name] for name in weights.values()], allow_unused=True)
    gradients = {layer: grad for layer, grad in zip(weights, found, strict=True) if grad is not None}
    return partial._replace(gradients=gradients)


def after(held: Before) -> list[Shift]:
    """Evaluate each G' with the parameters as they are now, and compare."""
    moved = {name: parameter.detach() for name, parameter in held.model.named_parameters()}
    found = []
    for layer, gradient in held.gradients.items():
        own = held.weights[layer]
        last = len(held.order)
        mixed = {
            name: moved[name] if held.order.get(name, last) < held.order[own] else kept
            for name, kept in held.parameters.items()
        }
        leaf = held.parameters[own].clone().requires_grad_()
        (again,) = torch.autograd.grad(_value(held, {**mixed, own: leaf}), [leaf])
        one, other = gradient.double().flatten(), again.double().flatten()
        norms = one.norm() * other.norm()
        cosine = float(one @ other / norms) if norms > 0 else float("nan")
        found.append(Shift(layer, float((one - other).norm()), float(one.norm()), cosine))
    return found


def _value(held: Before, parameters: dict[str, Tensor]) -> Tensor:
    """The loss at these parameters, with the same buffers and the same random numbers every time."""
    cuda = [device for device in held.random if device.type == "cuda"]
    with torch.random.fork_rng(cuda), torch.enable_grad():
        for device, state in held.random.items():
            torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
        fresh = {name: buffer.clone() for name, buffer in held.buffers.items()}
        value = held.loss(call(held.model, (parameters, fresh), held.batch))
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(f"the loss of a probe must be a tensor of one value, got {type(value).__name__}")
    return value
