"""What only the activations can tell, on one held batch: the distribution of each unit before and after the norm.

The model's inner module is run as it stands, in the mode that it is in, on copies of its buffers and without gradients;
nothing of it moves. What follows a layer is seen as it is called: an activation, with the sum it is given.

With a loss also the internal covariate shift as Santurkar et al. (2018, Definition 2.1) define it:

    G_i  = ∇_{W_i} L(W_1^t, ..., W_k^t; x, y)
    G'_i = ∇_{W_i} L(W_1^{t+1}, ..., W_{i-1}^{t+1}, W_i^t, W_{i+1}^t, ..., W_k^t; x, y)
    shift_i = ||G_i - G'_i||_2

How much the update of the layers below changes a layer's gradient. W_i is the weight below the i-th batch norm layer;
"the layers below" are all parameters of modules that run before the one that holds it, gamma and beta included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from batchnorm import quantities as q
from batchnorm.activations import ACTIVATIONS
from batchnorm.recording._recorder.attach import Array, Columns, Watched, producer
from batchnorm.restoring import unchanged

_CHUNK = 4_000_000
"""Values that are looked at together: what an activation is widened to must not be as large as the activation."""

_ACTIVATIONS = {path.rpartition(".")[2]: act for act, row in ACTIVATIONS.items() for path in row.functions}
_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_NOTE = "_batchnorm_watched"


def call(model: nn.Module, state: tuple[dict[str, Tensor], dict[str, Tensor]], batch: Any) -> Any:
    """model(batch), model(*batch) of a tuple or model(**batch) of a mapping, on these parameters and buffers."""
    arguments: tuple[Any, ...] = batch if isinstance(batch, tuple) else () if isinstance(batch, Mapping) else (batch,)
    named = dict(batch) if isinstance(batch, Mapping) else {}
    return torch.func.functional_call(model, state, arguments, named)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies, for a forward that must leave none behind."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def look(model: nn.Module, layers: Sequence[Watched], batches: Sequence[Any]) -> dict[str, Columns]:
    """Every layer's columns of the table `probe`, by its name: of the first batch, and the noise between all of them.

    A layer that the forward does not run is left out; of one that it runs twice, the last time counts.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    columns: dict[str, Columns] = {}
    moments: dict[str, list[tuple[Array, Array]]] = {}

    def hear(watched: Watched, layer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        if len(batches) > 1:
            wide = args[0].double()
            axes = [axis for axis in range(wide.dim()) if axis != 1]
            mean, var = wide.mean(axes), wide.var(axes, correction=0)
            moments.setdefault(watched.name, []).append((mean.cpu().numpy(), var.cpu().numpy()))
        if number > 0:
            return
        act, slope, z = getattr(layer, "act", None), 0.0, output
        if act is not None:
            z, slope = _recomputed(layer, *args, **kwargs), float(layer.negative_slope)  # type: ignore[arg-type]
        else:
            setattr(output, _NOTE, watched.name)
        columns[watched.name] = _of_input(args[0]) | _of_preactivation(z, act, slope)

    with unchanged(model), ExitStack() as hooks:
        for watched in layers:
            handle = watched.layer.register_forward_hook(partial(hear, watched), with_kwargs=True)
            hooks.callback(handle.remove)
        for number, batch in enumerate(batches):
            with nullcontext() if number else _Following(columns):
                call(model, (parameters, buffers(model)), batch)
    for watched in layers:
        seen = moments.get(watched.name, [])[: len(batches)]
        if watched.name in columns:
            nothing = np.zeros((0, watched.units))
            means, variances = zip(*seen, strict=True) if seen else (nothing, nothing)
            noise = q.batch_noise(np.array(means), np.array(variances), watched.eps)
            columns[watched.name] |= {"noise_mean": noise.mean, "noise_log_scale": noise.log_scale}
    return columns


class _Following(TorchFunctionMode):
    """Follows what layers return, over additions, to the activation that it goes into."""

    def __init__(self, columns: dict[str, Columns]) -> None:
        super().__init__()
        self._columns = columns

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
        layer = next((found for t in tensors if (found := getattr(t, _NOTE, None)) is not None), None)
        if layer is not None and name in _ACTIVATIONS:
            slope = (
                kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01)
                if ACTIVATIONS[_ACTIVATIONS[name]].slope
                else 0.0
            )
            self._columns[layer] |= _of_preactivation(tensors[0], _ACTIVATIONS[name], float(slope))
        result = func(*args, **kwargs)
        if layer is not None and name in _ADDITIONS and isinstance(result, Tensor):
            setattr(result, _NOTE, layer)
        return result


def _recomputed(layer: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
    """gamma·xhat + beta [+ residual] of a layer that has its activation inside."""
    by_batch = layer.training or layer.running_mean is None
    mean, var = (None, None) if by_batch else (layer.running_mean, layer.running_var)
    eps = layer.__dict__["eps"]
    z = nn.functional.batch_norm(input, mean, var, layer.weight, layer.bias, by_batch, 0.0, eps)
    return z if residual is None else z + residual


def _of_input(x: Tensor) -> Columns:
    parts = [(q.percentiles(values), q.positive_share(values)) for values in _by_units(x)]
    low, middle, high = np.concatenate([part[0] for part in parts], axis=1)
    names = [f"in_p{percent}" for percent in q.PERCENTILES]
    found = dict(zip(names, (low, middle, high), strict=True))
    return found | {"positive_in": np.concatenate([part[1] for part in parts])}


def _of_preactivation(z: Tensor, act: str | None, slope: float) -> Columns:
    positive, linear = [], []
    for values in _by_units(z):
        positive.append(q.positive_share(values))
        linear.append(np.full(values.shape[1], np.nan) if act is None else q.linear_share(values, act, slope))
    return {"positive_out": np.concatenate(positive), "linear_share": np.concatenate(linear)}


def _by_units(x: Tensor) -> Iterator[NDArray[np.floating]]:
    """x (N, C, *) as arrays (m, some units), one after the other."""
    rows = x.detach().movedim(1, -1).reshape(-1, x.shape[1])
    together = max(1, _CHUNK // max(1, len(rows)))
    for part in torch.split(rows, together, dim=1):
        yield part.to("cpu", torch.promote_types(part.dtype, torch.float32)).numpy()


class Shift:
    """The covariate shift of one update: step t, held until the parameters have moved.

    G is evaluated when this is made; for G' one more copy of the parameters is kept, so that the loss can be evaluated
    with any part of them moved.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Watched], batch: Any, loss: Callable[[Any], Tensor]) -> None:
        self._model, self._batch, self._loss = model, batch, loss
        self._kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._buffers = buffers(model)
        self._devices = {tensor.device for tensor in self._kept.values() if tensor.device.type == "cuda"}
        self._random = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in self._devices}
        self._order: dict[str, int] = {}
        """The parameters as their modules run."""
        self._weights: dict[str, str] = {}
        """The weight below each layer, by the names of both."""
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in self._kept.items()}
        names = {id(leaf): name for name, leaf in leaves.items()}

        def began(prefix: str, module: nn.Module, *_: object) -> None:
            for name, _parameter in module.named_parameters(prefix, recurse=False):
                self._order.setdefault(name, len(self._order))

        def reached(watched: Watched, _: nn.Module, args: tuple[Any, ...]) -> None:
            found = producer(args[0], watched.units, names)
            if found is not None:
                self._weights.setdefault(watched.name, found.name)

        with ExitStack() as hooks:
            for name, module in model.named_modules():
                hooks.callback(module.register_forward_pre_hook(partial(began, name)).remove)
            for watched in layers:
                hooks.callback(watched.layer.register_forward_pre_hook(partial(reached, watched)).remove)
            value = self._value(leaves)
        grads = torch.autograd.grad(value, [leaves[name] for name in self._weights.values()], allow_unused=True)
        self._gradients = {layer: grad for layer, grad in zip(self._weights, grads, strict=True) if grad is not None}

    def measured(self) -> tuple[list[str], Columns]:
        """Evaluate each G' with the parameters as they are now: the layers, and the columns of the table `shift`.

        shift is ||G - G'||, gradient_norm ||G||, cosine that between the two (NaN where one of them is 0).
        """
        moved = {name: parameter.detach() for name, parameter in self._model.named_parameters()}
        last = len(self._order)
        rows = []
        for layer, gradient in self._gradients.items():
            own = self._weights[layer]
            mixed = {
                name: moved[name] if self._order.get(name, last) < self._order[own] else kept
                for name, kept in self._kept.items()
            }
            leaf = self._kept[own].clone().requires_grad_()
            (again,) = torch.autograd.grad(self._value({**mixed, own: leaf}), [leaf])
            one, other = gradient.double().flatten(), again.double().flatten()
            norms = one.norm() * other.norm()
            rows.append((float((one - other).norm()), float(one.norm()), float(one @ other / norms)))
        columns = np.array(rows).reshape(-1, 3).T
        return list(self._gradients), dict(zip(("shift", "gradient_norm", "cosine"), columns, strict=True))

    def _value(self, parameters: dict[str, Tensor]) -> Tensor:
        """The loss at these parameters, with the same buffers and the same random numbers every time."""
        with torch.random.fork_rng(self._devices), torch.enable_grad():
            torch.set_rng_state(self._random[0])
            for device, state in self._random[1].items():
                torch.cuda.set_rng_state(state, device)
            fresh = {name: buffer.clone() for name, buffer in self._buffers.items()}
            value = self._loss(call(self._model, (parameters, fresh), self._batch))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"the loss of a probe must be a tensor of one value, got {type(value).__name__}")
        return value
