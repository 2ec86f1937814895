"""BatchNorm1d, 2d, 3d and lazy forms: torch.nn's layers with activation and residual fused in; one node in torch.fx.

Each is a subclass of the torch.nn class of the same name, and has the same state_dict. A lazy one is a subclass of the
class that it becomes. New are the keyword `act=` and `forward(x, residual)`. How a call runs is in `functional.py`:
autocast, torch.export and ONNX export.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.modules import batchnorm as torch_batchnorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from batchnorm import errors, masks
from batchnorm.activations import ACTIVATIONS, Act, check_act
from batchnorm.functional import check_residual, transform
from batchnorm.kernels.contract import Call, Epilogue, Merge, Tap
from batchnorm.moments import Moments
from batchnorm.running_stats import Buffers, plan_update

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]

# PyTorch's functions that would drop the activation, by module and qualified name: what to do. All of them read `eps`.
_NORM_ONLY_TOOLS = {
    ("torch.nn.modules.batchnorm", "SyncBatchNorm.convert_sync_batchnorm"): "batchnorm.sync(model) keeps it",
    ("torch.nn.utils.fusion", "fuse_conv_bn_eval"): "batchnorm.fold keeps it",
    ("torch.nn.utils.fusion", "fuse_linear_bn_eval"): "batchnorm.fold keeps it",
    ("torch.utils.mkldnn", "MkldnnBatchNorm.__init__"): (
        "use a layer with act=None followed by a separate activation module"
    ),
}


class _BatchNorm(torch_batchnorm._BatchNorm):
    """Base of all layers, for any number of dimensions."""

    _dims: tuple[int, ...]
    _shapes: str
    act: str | None = None
    negative_slope: float = 0.01
    accumulate: int = 1
    batch_of_one: str = "error"
    _tap: Tap | None = None
    _pending: dict[tuple[int, torch.device], list[Moments]] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: Act | None = None,
        negative_slope: float = 0.01,
        accumulate: int = 1,
        batch_of_one: str = "error",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._set_options(
            bias, act=act, negative_slope=negative_slope, accumulate=accumulate, batch_of_one=batch_of_one
        )

    def _set_options(self, bias: bool, **options: Any) -> None:
        if not bias:
            self.register_parameter("bias", None)
        for name, value in options.items():
            setattr(self, name, value)

    @property
    def eps(self) -> float:
        """The number that is added to the variance.

        Raises TypeError if one of `_NORM_ONLY_TOOLS` reads it from a layer with an activation.
        """
        if self.act is not None and not torch.compiler.is_compiling():
            caller = sys._getframe(1)
            name = caller.f_code.co_qualname
            instead = _NORM_ONLY_TOOLS.get((caller.f_globals.get("__name__", ""), name))
            if instead is not None:
                name = name.replace("MkldnnBatchNorm.__init__", "torch.utils.mkldnn.to_mkldnn")
                raise TypeError(f"{name} would drop the activation of this layer (act={self.act!r}): {instead}")
        return self.__dict__["eps"]  # type: ignore[no-any-return]

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Validate the options before they are set."""
        if name == "act":
            check_act(value)
        elif name == "negative_slope" and not isinstance(value, int | float):
            raise TypeError(f"negative_slope must be a number, got {type(value).__name__}")
        elif name == "accumulate" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"accumulate must be a whole number of batches, at least 1, got {value!r}")
        elif name == "batch_of_one" and value not in ("error", "running"):
            raise ValueError(f'batch_of_one must be "error" or "running", got {value!r}')
        super().__setattr__(name, value)
        if name == "accumulate" and value > 1 and self._pending is None:
            self._pending = {}  # here, not in forward: replicas of nn.DataParallel share it

    def reset_running_stats(self) -> None:
        """Set running_mean to 0, running_var to 1 and num_batches_tracked to 0, and drop accumulated batches."""
        super().reset_running_stats()
        if self._pending:
            self._pending.clear()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load, and drop accumulated batches: they belong to the replaced statistics."""
        super()._load_from_state_dict(*arguments)
        if self._pending:
            self._pending.clear()

    def reset_parameters(self) -> None:
        """Reset the running statistics, `weight` (gamma) to 1 and `bias` (beta) to 0, if the layer has them."""
        self.reset_running_stats()
        if self.affine:
            torch.nn.init.ones_(self.weight)
            if self.bias is not None:
                torch.nn.init.zeros_(self.bias)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Normalize the input, add the residual and apply the activation: y = act(BN(input) [+ residual]).

        `mask` is True at valid positions, or the first `lengths` positions of each sequence are valid; not both. The
        class describes them. Raises the same errors as torch.nn's layer on the same input.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._trace_as_leaf(input, residual=residual, mask=mask, lengths=lengths)
        if mask is not None or lengths is not None:
            masked = _masked_eagerly if torch.compiler.is_compiling() else type(self)._masked
            return masked(self, input, residual, mask, lengths)
        return self._fused(input, residual, self.act, self.negative_slope)

    def _masked(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, lengths: Tensor | Sequence[int] | None
    ) -> Tensor:
        """Normalize the valid positions, as rows of a matrix (M, C)."""
        self._check_input_dim(input)
        if residual is not None:
            check_residual(input, residual)
        valid = masks.valid_positions(input, mask, lengths)
        rows = masks.take(input, valid)
        added = None if residual is None else masks.take(residual, valid)
        return masks.scatter(self._normalize(rows, added, self.act, self.negative_slope), input, valid)

    def _fused(self, input: Tensor, residual: Tensor | None, act: str | None, slope: float) -> Tensor:
        """`forward` with another activation."""
        self._check_input_dim(input)
        return self._normalize(input, residual, act, slope)

    def _normalize(self, input: Tensor, residual: Tensor | None, act: str | None, slope: float) -> Tensor:
        """Normalize by the batch's statistics and update the running ones, or normalize by the running ones."""
        try:
            parameters = self._parameters  # a module's attributes take ten times as long to look up
            epilogue = Epilogue(parameters["weight"], parameters["bias"], residual, act, slope)
        except KeyError:  # parametrized
            epilogue = Epilogue(self.weight, self.bias, residual, act, slope)
        eps = self.__dict__["eps"]
        merge = self._merge() if self.training else None
        if not self.training or (self.batch_of_one == "running" and merge is None and input.numel() == input.shape[1]):
            mean, var, _ = self._buffers_in_use()
            return self._transform(Call(input, (mean, var), mean is None and var is None, 0.0, eps, epilogue))
        if not self.track_running_stats:
            return self._transform(Call(input, (None, None), True, 0.0, eps, epilogue, self._tap, merge))
        buffers = self._buffers_in_use()
        pending = None if self.accumulate == 1 else self._pending_batches(input.device)
        running, momentum, finish = plan_update(buffers, self.momentum, pending, self.accumulate)
        y = self._transform(Call(input, running, True, momentum, eps, epilogue, self._tap, merge))
        if finish is not None:
            finish(input.numel() // input.shape[1] if merge is None else merge.count)
        return y

    def _pending_batches(self, device: torch.device) -> list[Moments]:
        """The batches since the last update of the running statistics; each replica's device has a list."""
        if self._pending is None:
            self._pending = {}
        return self._pending.setdefault((self._domain_index(), device), [])

    def _domain_index(self) -> int:
        """The index of the running statistics in use, for layers that have several."""
        return 0

    def _buffers_in_use(self) -> Buffers:
        """The running statistics that this forward reads and updates."""
        buffers = self._buffers  # a module's attributes take ten times as long to look up
        try:
            return Buffers(buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"])
        except KeyError:  # parametrized
            return Buffers(self.running_mean, self.running_var, self.num_batches_tracked)

    def _transform(self, call: Call) -> Tensor:
        """Hook for the variants; the base layer runs the call unchanged."""
        return transform(call)

    def _merge(self) -> Merge | None:
        """Hook for synchronized layers; the base layer merges with no one."""
        return None

    def _trace_as_leaf(self, input: torch.fx.Proxy, **options: Any) -> Any:
        """Stay one node in a torch.fx graph, as torch.nn's layers do, so that train() and eval() still reach it."""
        tracer = input.tracer
        if tracer.root is self:  # type: ignore[attr-defined]
            raise torch.fx.proxy.TraceError(
                f"{type(self).__name__} cannot be traced by itself: trace the module that contains it, or "
                "torch.nn.Sequential(layer)"
            )
        keywords = {name: value for name, value in options.items() if value is not None}
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), keywords)  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """Refuse torch.jit.script, which calls this first: it would put compiled code into the caller's model."""
        raise TypeError(
            f"torch.jit.script does not compile {type(self).__module__}.{type(self).__name__}: "
            "use torch.export, torch.compile or torch.jit.trace"
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise errors.not_a_tensor("input", input)
        if input.dim() not in self._dims:
            expected = " or ".join(f"{dims}D" for dims in self._dims)
            raise ValueError(
                f"{type(self).__name__} expected {expected} input (got {input.dim()}D input) of shape {self._shapes}, "
                f"not {tuple(input.shape)}: reshape it, or use the layer for its dimensions"
            )

    def extra_repr(self) -> str:
        described = (
            f"{self.num_features}, eps={self.__dict__['eps']}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )
        for name, default in (("act", None), ("accumulate", 1), ("batch_of_one", "error")):
            if getattr(self, name) != default:
                described += f", {name}={getattr(self, name)}"
        if self.act is not None and ACTIVATIONS[self.act].slope:
            described += f", negative_slope={self.negative_slope}"
        if "_batchnorm_fused" in self.__dict__:
            described += f", fused with {self.__dict__['_batchnorm_fused']}"
        return described


@_disable_dynamo  # torch.compiler.disable, but for the import of the compiler
def _masked_eagerly(layer: _BatchNorm, *arguments: Any) -> Tensor:
    """Break the graph: the number of valid positions depends on the data."""
    return layer._masked(*arguments)


Layer = TypeVar("Layer", bound=type)


def documented_as(base: type, *changes: tuple[str, str]) -> Callable[[Layer], Layer]:
    """Class decorator: copy the docstring of `base`, with replacements."""

    def document(cls: Layer) -> Layer:
        text = inspect.cleandoc(base.__doc__ or "")
        for old, new in changes:
            text = text.replace(old, new)
        cls.__doc__ = text
        return cls

    return document


def with_all_arguments(cls: Layer) -> Layer:
    """Class decorator: replace THE ARGUMENTS OF BATCHNORM1D by BatchNorm1d's arguments, without the first."""
    listed = inspect.cleandoc(BatchNorm1d.__doc__ or "").partition("    num_features: ")[2].partition("\n\n")[0]
    arguments = "\n".join(f"    {line}" for line in listed.splitlines()[1:])
    text = inspect.cleandoc(cls.__doc__ or "")
    cls.__doc__ = text.replace("        THE ARGUMENTS OF BATCHNORM1D", arguments)
    return cls


_WORDS_1D = ("(N, C) or (N, C, L)", "m = N·L", "torch.nn.BatchNorm1d")
TO_2D = tuple(zip(_WORDS_1D, ("(N, C, H, W)", "m = N·H·W", "torch.nn.BatchNorm2d"), strict=True))
TO_3D = tuple(zip(_WORDS_1D, ("(N, C, D, H, W)", "m = N·D·H·W", "torch.nn.BatchNorm3d"), strict=True))


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of each channel, with a fused activation and residual; extends torch.nn.BatchNorm1d.

    y = act(gamma·(x - mean)/sqrt(var + eps) + beta [+ residual]) over (N, C) or (N, C, L), per channel.

    In training, mean and var are the batch's (var biased, divided by m = N·L), and the running statistics are updated:
    running ← (1 - momentum)·running + momentum·batch, with the unbiased variance (divided by m - 1). In eval mode mean
    and var are the running statistics, or the batch's where none are tracked.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance, so that no channel is divided by 0.
        momentum: the weight of the new batch in the running statistics; None for the mean over all batches so far.
        affine: learn gamma (`weight`, starts at 1) and beta (`bias`, starts at 0).
        track_running_stats: maintain `running_mean`, `running_var` and `num_batches_tracked`.
        device, dtype: of parameters and buffers.
        bias: with False, learn gamma but no beta.
        act: the activation: None, "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "sigmoid" or
            "tanh".
        negative_slope: the slope of leaky_relu below 0; no other activation has one.
        accumulate: update the running statistics once per this number of training batches, by the pooled moments of all
            their values, as one large batch would. The pending batches are not part of the state_dict.
        batch_of_one: training forward with a single value per channel, which has no variance: "error" raises
            ValueError, as PyTorch does; "running" normalizes by the running statistics and does not update them.

    `forward(input, residual=None, *, mask=None, lengths=None)` adds the residual, of the input's shape, before the
    activation. It is never saved for backward, and may change after the call. With `mask` (N, *spatial) of bool, or
    `lengths` (N,) of whole numbers along the last dimension, statistics and gradients use valid positions only, and y
    is 0 elsewhere.

    Activation checkpointing, which runs a forward twice, updates the running statistics once.

    Raises the errors that torch.nn.BatchNorm1d raises on the same input. Ioffe and Szegedy 2015, Algorithms 1 and 2.
    """

    _dims = (2, 3)
    _shapes = "(N, C) or (N, C, L)"


@documented_as(BatchNorm1d, *TO_2D)
class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    _dims = (4,)
    _shapes = "(N, C, H, W)"


@documented_as(BatchNorm1d, *TO_3D)
class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    _dims = (5,)
    _shapes = "(N, C, D, H, W)"


class _LazyBatchNorm(torch_batchnorm._LazyNormBase, _BatchNorm):
    """Base of the lazy layers: num_features comes from the first input."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: Act | None = None,
        negative_slope: float = 0.01,
        accumulate: int = 1,
        batch_of_one: str = "error",
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        self._set_options(
            bias, act=act, negative_slope=negative_slope, accumulate=accumulate, batch_of_one=batch_of_one
        )

    def initialize_parameters(self, input: Tensor, *_: object, **__: object) -> None:
        """Take num_features from the first input; torch.nn passes all arguments of forward."""
        if not isinstance(input, Tensor):
            raise errors.not_a_tensor("input", input)
        if input.dim() < 2:
            raise IndexError(errors.too_few_dimensions(input))
        if self.has_uninitialized_params():
            self.num_features = input.shape[1]
            for tensor in (self.weight, self.bias, self.running_mean, self.running_var):
                if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
                    tensor.materialize((self.num_features,))
            self.reset_parameters()


_LAZILY = "num_features, C, is taken from the first input. From then on the layer is of the class without Lazy."
LAZY = (("Args:\n    num_features: C, the number of channels.\n", f"{_LAZILY}\n\nArgs:\n"),)


@documented_as(BatchNorm1d, *LAZY)
class LazyBatchNorm1d(_LazyBatchNorm, BatchNorm1d):
    cls_to_become = BatchNorm1d


@documented_as(BatchNorm2d, *LAZY)
class LazyBatchNorm2d(_LazyBatchNorm, BatchNorm2d):
    cls_to_become = BatchNorm2d


@documented_as(BatchNorm3d, *LAZY)
class LazyBatchNorm3d(_LazyBatchNorm, BatchNorm3d):
    cls_to_become = BatchNorm3d
