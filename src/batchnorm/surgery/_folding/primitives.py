"""Run a convolution, its bias and the activation after it as one oneDNN primitive, on a packed copy of the weights.

PyTorch's own operator for inference does it, `torch.ops.mkldnn._convolution_pointwise`. It is private: it is compared
with the ordinary operators before the first use, for each activation. Without it, or where it does not apply, the
ordinary operators run: with gradients, while a compiler, an exporter or another transformation traces, under autocast,
and on any tensor but a plain one on the CPU in float32, or bfloat16 where the CPU has it; and on a single small image,
where they are faster.

oneDNN packs weights into blocks, which takes about as long as one small convolution: the packed copy is kept until the
weight changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from batchnorm.kernels.aten import activate
from batchnorm.surgery._fusing.classes import subclass
from batchnorm.surgery._shared.activations import Activation

_SAMPLES = 61
# One image with fewer products: PyTorch itself takes a loop without oneDNN, whose primitives need some 30 µs to start.
_FEWEST_PRODUCTS = 500_000
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)

# By activation: the operator's name of it, its scalars (None is the slope), and its algorithm.
_ATTRIBUTES: dict[str | None, tuple[str, tuple[float | None, ...], str]] = {
    None: ("none", (), ""),
    "relu": ("relu", (), ""),
    "relu6": ("hardtanh", (0.0, 6.0), ""),
    "leaky_relu": ("leaky_relu", (None,), ""),
    "gelu": ("gelu", (), "none"),
    "silu": ("swish", (), ""),
    "hardswish": ("hardswish", (), ""),
    "sigmoid": ("sigmoid", (), ""),
    "tanh": ("tanh", (), ""),
}

FUSED = frozenset(act for act in _ATTRIBUTES if act is not None)
"""The activations that a primitive applies."""


@dataclass(slots=True)
class _Packed:
    """A packed copy of a weight, and what shows that the weight has not changed since.

    A write in place gives the weight a new version, another tensor has another address: `alias` keeps the old memory,
    so that no other tensor gets its address. Writes through `.data` or NumPy leave the version, so some values spread
    over the weight are compared as well, `sample` with `values`.
    """

    weight: Tensor
    source: Tensor
    alias: Tensor
    version: int
    sample: Tensor
    values: Tensor
    padding: tuple[int, int]
    shape: torch.Size
    settings: tuple[Any, ...]

    def is_of(self, weight: Tensor) -> bool:
        """Whether this is the weight, unchanged."""
        return (
            weight is self.source
            and weight._version == self.version
            and weight.data_ptr() == self.alias.data_ptr()
            and torch.equal(self.sample, self.values)
        )


# Not attributes of the modules: copies and pickles do without.
_PACKED: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def run(module: Any, forward: Any, activation: Activation, x: Any) -> Any:
    """act(conv(x)): one primitive, or `forward` of the convolution's class and the activation."""
    if not _is_eager(x) or (packed := _packed(module, activation.act, x)) is None:
        return activate(forward(module, x), *activation)
    return _call(x, packed.weight, module.bias, packed.padding, module, activation)


def _call(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int], module: Any, activation: Activation
) -> Tensor:
    name, scalars, algorithm = _ATTRIBUTES[activation.act]
    scalars = tuple(activation.slope if scalar is None else scalar for scalar in scalars)
    y: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
        x, weight, bias, padding, module.stride, module.dilation, module.groups, name, scalars, algorithm
    )
    return y


def _is_eager(x: Any) -> bool:
    """Whether the operator may run: no gradient, no tracing, no transformation, a plain CPU tensor."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and torch._C._get_mkldnn_enabled()
    )


def _packed(module: Any, act: str | None, x: Tensor) -> _Packed | None:
    """The packed weight for this input; None if the operator cannot take it."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return None
    if x.dim() != 4 or (
        x.shape[0] == 1
        and module.groups == 1
        and weight.numel() * (x.shape[2] * x.shape[3]) < _FEWEST_PRODUCTS * math.prod(module.stride)
    ):
        return None
    settings = (module.padding, module.stride, module.dilation, module.groups, module.padding_mode)
    found = _PACKED.get(module)
    if found is not None and found.shape == x.shape and found.settings == settings and found.is_of(weight):
        return found
    padding = padding_of(module)
    if why_not(module) is not None or why_unavailable(act, x.dtype) is not None or padding is None:
        return None
    if not _fits(module, x, padding):
        return None
    if found is not None and found.settings == settings and found.is_of(weight):
        found.shape = x.shape  # the operator takes any input of the weight
        return found
    alias = weight.detach()
    sample = alias.as_strided((min(_SAMPLES, weight.numel()),), (max(1, weight.numel() // _SAMPLES),))
    version, values = weight._version, sample.clone()
    # torch.no_grad: a packed weight made in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            alias, padding, module.stride, module.dilation, module.groups, list(x.shape)
        )
    made = _Packed(packed, weight, alias, version, sample, values, padding, x.shape, settings)
    _PACKED[module] = made
    return made


def _fits(module: Any, x: Tensor, padding: tuple[int, int]) -> bool:
    """Whether the input is one that the convolution accepts; of any other PyTorch's own error is raised."""
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return (
        x.numel() > 0
        and x.shape[1] == module.in_channels
        and all(size + 2 * p >= r for size, p, r in zip(x.shape[2:], padding, reach, strict=True))
    )


def padding_of(module: Any) -> tuple[int, int] | None:
    """A Conv2d's padding as two numbers; None if the sides differ, or are not padded with zeros."""
    if module.padding == "valid":
        return 0, 0
    if module.padding_mode != "zeros":
        return None
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(number % 2 for number in total) else (total[0] // 2, total[1] // 2)
    return module.padding[0], module.padding[1]


def why_not(module: nn.Module) -> str | None:
    """Why the weights of a Conv2d cannot be packed; None if they can."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter"
    for name in ("weight", "bias"):
        tensor = module._parameters.get(name)
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.layout != torch.strided or tensor.is_inference():
            return f"its {name} is not a plain tensor"
        if tensor.device.type != "cpu":
            return "it is not on the CPU"
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"oneDNN packs float32 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
    if not weight.numel() or not torch.ops.aten.is_non_overlapping_and_dense(weight):
        return "its weight is empty, or a view with gaps"
    if padding_of(module) is None:
        return "its padding is not the same number of zeros on both sides"
    return None


@cache
def why_unavailable(act: str | None, dtype: torch.dtype) -> str | None:
    """Why the primitive with this activation cannot run in this process, or computes something else; None if it can."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this PyTorch is built without oneDNN"
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2, device="meta").to_empty(device="cpu")
    activation = Activation(act, 0.25)
    try:
        with torch.inference_mode(False), torch.no_grad():
            if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return "this CPU has no bfloat16"
            for parameter in conv.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            x = 3 * torch.randn((2, 16, 9, 7), generator=generator)
            before = activate(conv(x), *activation)
            cast = conv.to(dtype)
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                cast.weight.detach(), (1, 1), cast.stride, cast.dilation, cast.groups, list(x.shape)
            )
            after = _call(x.to(dtype), packed, cast.bias, (1, 1), cast, activation).float()
            error = (
                math.inf if after.shape != before.shape else float((after - before).abs().max() / before.abs().max())
            )
    except Exception as failure:  # a private operator may be missing, or have other arguments
        return f"PyTorch {torch.__version__} has no such operator: {failure}"
    limit = 1e-5 if dtype == torch.float32 else 6e-2
    return None if error <= limit else f"PyTorch's operator is off by {error:.1e} in a trial"


@cache
def packed_class(cls: Any, act: str | None, slope: float) -> type:
    """The subclass of a Conv2d class that runs the primitive; copies and pickles have it too."""
    activation = Activation(act, slope)

    def forward(self: Any, input: Tensor) -> Any:
        return run(self, cls.forward, activation, input)

    def extra_repr(self: Any) -> str:
        return f"{cls.extra_repr(self)}, oneDNN{'' if act is None else f', act={act}'}"

    forward.__qualname__ = f"{cls.__qualname__}.forward"
    members = {"forward": forward, "extra_repr": extra_repr, "_batchnorm_packed": True}
    return subclass(cls, (), members, packed_class, act, slope)
