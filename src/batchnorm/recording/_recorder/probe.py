"""Measure the activations of one batch: the distribution of each unit before and after the norm.

The inner module runs in its current mode, on copies of its buffers and without gradients, so the model does not change.
The activation that follows a layer is found when it is called on the layer's output, or on a sum with it.

With a loss, `Shift` measures the internal covariate shift of Santurkar et al. (2018, Definition 2.1):

    G_i  = ∇_{W_i} L(W_1^t, ..., W_k^t; x, y)
    G'_i = ∇_{W_i} L(W_1^{t+1}, ..., W_{i-1}^{t+1}, W_i^t, W_{i+1}^t, ..., W_k^t; x, y)
    shift_i = ||G_i - G'_i||_2

It is how much the update of the layers below changes a layer's gradient. W_i is the weight below the i-th batch norm
layer. The layers below are all parameters of modules that run earlier than the module of W_i, gamma and beta included.
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
from batchnorm.recording._recorder.attach import Array, Columns, WatchedLayer, find_producer
from batchnorm.restoring import unchanged

_CHUNK = 4_000_000
"""Values processed together, so that no float32 copy of a whole activation is made."""

_ACTIVATIONS = {path.rpartition(".")[2]: act for act, row in ACTIVATIONS.items() for path in row.functions}
_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_LAYER_NAME = "_batchnorm_watched"


def call(model: nn.Module, state: tuple[dict[str, Tensor], dict[str, Tensor]], batch: Any) -> Any:
    """model(batch), model(*batch) for a tuple or model(**batch) for a mapping, with these parameters and buffers."""
    arguments: tuple[Any, ...] = batch if isinstance(batch, tuple) else () if isinstance(batch, Mapping) else (batch,)
    named = dict(batch) if isinstance(batch, Mapping) else {}
    return torch.func.functional_call(model, state, arguments, named)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers, so that a forward does not change the model's."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def measure(model: nn.Module, layers: Sequence[WatchedLayer], batches: Sequence[Any]) -> dict[str, Columns]:
    """The columns of the table `probe` by layer name: for the first batch, and the noise between all batches.

    Layers that the forward does not run are omitted. If a layer runs twice, the last run counts.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    columns: dict[str, Columns] = {}
    moments: dict[str, list[tuple[Array, Array]]] = {}

    inputs: dict[WatchedLayer, Tensor] = {}

    def before_norm(watched: WatchedLayer, layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[watched] = args[0].clone()

    def after_norm(watched: WatchedLayer, layer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        if len(batches) > 1:
            x = inputs.get(watched, args[0]).double()
            axes = [axis for axis in range(x.dim()) if axis != 1]
            mean, var = x.mean(axes), x.var(axes, correction=0)
            moments.setdefault(watched.name, []).append((mean.cpu().numpy(), var.cpu().numpy()))
        if number > 0:
            return
        (act, slope), x, z = watched.act, inputs.pop(watched, args[0]), output
        if watched.kind.follows(layer):
            z = watched.kind.normalize(layer, x, alone=layer.training)
        elif act is not None:
            z = _preactivation(layer, *args, **kwargs)
        else:
            setattr(output, _LAYER_NAME, watched.name)
        columns[watched.name] = _input_columns(x) | _output_columns(z, act, slope)

    with unchanged(model), ExitStack() as hooks:
        for watched in layers:
            handle = watched.layer.register_forward_hook(partial(after_norm, watched), with_kwargs=True)
            hooks.callback(handle.remove)
            if watched.kind.magnitude:  # these layers write to their input
                hooks.callback(watched.layer.register_forward_pre_hook(partial(before_norm, watched)).remove)
        for number, batch in enumerate(batches):
            with nullcontext() if number else _ActivationFinder(columns):
                call(model, (parameters, buffers(model)), batch)
    for watched in layers:
        if watched.name in columns:
            of_layer = moments.get(watched.name, [])[: len(batches)]
            means, variances = zip(*of_layer, strict=True) if of_layer else np.zeros((2, 0, watched.units))
            noise = q.batch_noise(np.array(means), np.array(variances), watched.eps)
            columns[watched.name] |= {"noise_mean": noise.mean, "noise_log_scale": noise.log_scale}
    return columns


class _ActivationFinder(TorchFunctionMode):
    """Follows the outputs of layers, through additions, to the activation applied to them."""

    def __init__(self, columns: dict[str, Columns]) -> None:
        super().__init__()
        self._columns = columns

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        function = getattr(func, "__name__", "")
        tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
        layer = next((name for t in tensors if (name := getattr(t, _LAYER_NAME, None)) is not None), None)
        if layer is not None and function in _ACTIVATIONS:
            act, slope = _ACTIVATIONS[function], 0.0
            if ACTIVATIONS[act].slope:
                slope = float(kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01))
            self._columns[layer] |= _output_columns(tensors[0], act, slope)
        result = func(*args, **kwargs)
        if layer is not None and function in _ADDITIONS and isinstance(result, Tensor):
            setattr(result, _LAYER_NAME, layer)
        return result


def _preactivation(layer: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
    """gamma·xhat + beta [+ residual] of a layer with a fused activation."""
    by_batch = layer.training or layer.running_mean is None
    mean, var = (None, None) if by_batch else (layer.running_mean, layer.running_var)
    eps = layer.__dict__["eps"]
    z = nn.functional.batch_norm(input, mean, var, layer.weight, layer.bias, by_batch, 0.0, eps)
    return z if residual is None else z + residual


def _input_columns(x: Tensor) -> Columns:
    parts = [(q.percentiles(values), q.positive_share(values)) for values in _by_units(x)]
    percentiles = np.concatenate([part[0] for part in parts], axis=1)
    columns = {f"in_p{percent}": row for percent, row in zip(q.PERCENTILES, percentiles, strict=True)}
    return columns | {"positive_in": np.concatenate([part[1] for part in parts])}


def _output_columns(z: Tensor, act: str | None, slope: float) -> Columns:
    positive, linear = [], []
    for values in _by_units(z):
        positive.append(q.positive_share(values))
        linear.append(np.full(values.shape[1], np.nan) if act is None else q.linear_share(values, act, slope))
    return {"positive_out": np.concatenate(positive), "linear_share": np.concatenate(linear)}


def _by_units(x: Tensor) -> Iterator[NDArray[np.floating]]:
    """x (N, C, *) in arrays (m, some units)."""
    rows = x.detach().movedim(1, -1).reshape(-1, x.shape[1])
    width = max(1, _CHUNK // max(1, len(rows)))
    for part in torch.split(rows, width, dim=1):
        yield part.to("cpu", torch.promote_types(part.dtype, torch.float32)).numpy()


class Shift:
    """The covariate shift of one update: `__init__` evaluates G before it, `measure` evaluates G' after it.

    It stores a copy of the old parameters, so that the loss can be evaluated with any part of them updated.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[WatchedLayer], batch: Any, loss: Callable[[Any], Tensor]
    ) -> None:
        self._model, self._batch, self._loss = model, batch, loss
        self._old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._buffers = buffers(model)
        self._devices = {tensor.device for tensor in self._old.values() if tensor.device.type == "cuda"}
        self._random = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in self._devices}
        self._order: dict[str, int] = {}
        """The position of each parameter in the order in which modules run."""
        self._weights: dict[str, str] = {}
        """The name of the weight below each layer."""
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in self._old.items()}
        names = {id(leaf): name for name, leaf in leaves.items()}

        def before_module(prefix: str, module: nn.Module, *_: object) -> None:
            for name, _parameter in module.named_parameters(prefix, recurse=False):
                self._order.setdefault(name, len(self._order))

        def before_norm(watched: WatchedLayer, _: nn.Module, args: tuple[Any, ...]) -> None:
            producer = find_producer(args[0], watched.units, names)
            if producer is not None:
                self._weights.setdefault(watched.name, producer.name)

        with ExitStack() as hooks:
            for name, module in model.named_modules():
                hooks.callback(module.register_forward_pre_hook(partial(before_module, name)).remove)
            for watched in layers:
                hooks.callback(watched.layer.register_forward_pre_hook(partial(before_norm, watched)).remove)
            loss_value = self._evaluate(leaves)
        grads = torch.autograd.grad(loss_value, [leaves[name] for name in self._weights.values()], allow_unused=True)
        self._gradients = {layer: grad for layer, grad in zip(self._weights, grads, strict=True) if grad is not None}

    def measure(self) -> tuple[list[str], Columns]:
        """Evaluate each G' with the current parameters; return the layers and the columns of the table `shift`.

        shift is ||G - G'||, gradient_norm is ||G||, cosine is that of G and G' (NaN if one of them is 0).
        """
        new = {name: parameter.detach() for name, parameter in self._model.named_parameters()}
        last = len(self._order)
        rows = []
        for layer, gradient in self._gradients.items():
            weight = self._weights[layer]
            mixed = {
                name: new[name] if self._order.get(name, last) < self._order[weight] else old
                for name, old in self._old.items()
            }
            leaf = self._old[weight].clone().requires_grad_()
            (new_gradient,) = torch.autograd.grad(self._evaluate({**mixed, weight: leaf}), [leaf])
            g, new_g = gradient.double().flatten(), new_gradient.double().flatten()
            rows.append((float((g - new_g).norm()), float(g.norm()), float(g @ new_g / (g.norm() * new_g.norm()))))
        columns = np.array(rows).reshape(-1, 3).T
        return list(self._gradients), dict(zip(("shift", "gradient_norm", "cosine"), columns, strict=True))

    def _evaluate(self, parameters: dict[str, Tensor]) -> Tensor:
        """The loss at these parameters, with the same buffers and the same random numbers each time."""
        with torch.random.fork_rng(self._devices), torch.enable_grad():
            torch.set_rng_state(self._random[0])
            for device, state in self._random[1].items():
                torch.cuda.set_rng_state(state, device)
            copies = {name: buffer.clone() for name, buffer in self._buffers.items()}
            value = self._loss(call(self._model, (parameters, copies), self._batch))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"the loss of a probe must be a tensor of one value, got {type(value).__name__}")
        return value
