"""BatchNorm1d, 2d, 3d and their lazy forms: torch.nn's layers, with the activation and the residual fused in.

Each is a subclass of the torch.nn class of its name (a lazy one of the class that it becomes), so whatever looks for
that class finds it, and it loads and stores the same state. New are the keyword `act=` and `forward(x, residual)`.
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
from batchnorm.running_stats import Buffers, movement

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]

# PyTorch's functions that build something new from a batch norm layer's numbers alone, by module and name, and what
# their callers know them as, and what to do instead: they would drop its activation. All of them read `eps`.
_NORM_ONLY_TOOLS = {
    ("torch.nn.modules.batchnorm", "SyncBatchNorm.convert_sync_batchnorm"): (
        "SyncBatchNorm.convert_sync_batchnorm",
        "batchnorm.sync(model) keeps it",
    ),
    ("torch.nn.utils.fusion", "fuse_conv_bn_eval"): ("fuse_conv_bn_eval", "batchnorm.fold keeps it"),
    ("torch.nn.utils.fusion", "fuse_linear_bn_eval"): (
        "fuse_linear_bn_eval",
        "batchnorm.fold keeps it",
    ),
    ("torch.utils.mkldnn", "MkldnnBatchNorm.__init__"): (
        "torch.utils.mkldnn.to_mkldnn",
        "use a layer with act=None followed by the activation as a module of its own",
    ),
}


class _BatchNorm(torch_batchnorm._BatchNorm):
    """The layer of any dimension: torch.nn's attributes, buffers and keys, and `act` and `negative_slope`."""

    _dims: tuple[int, ...]
    _shapes: str
    act: str | None = None
    negative_slope: float = 0.01
    accumulate: int = 1
    batch_of_one: str = "error"
    _tap: Tap | None = None
    _gathered: dict[tuple[int, torch.device], list[Moments]] | None = None

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
        if not bias:
            self.register_parameter("bias", None)
        self.act = act
        self.negative_slope = negative_slope
        self.accumulate = accumulate
        self.batch_of_one = batch_of_one

    @property
    def eps(self) -> float:
        """The number that is added to the variance.

        Raises TypeError where a function of PyTorch that rebuilds the layer, such as convert_sync_batchnorm, asks for
        it and the layer has an activation, which that function would drop.
        """
        if self.act is not None and not torch.compiler.is_compiling():
            caller = sys._getframe(1)
            tool = _NORM_ONLY_TOOLS.get((caller.f_globals.get("__name__", ""), caller.f_code.co_qualname))
            if tool is not None:
                name, instead = tool
                raise TypeError(f"{name} would drop the activation of this layer (act={self.act!r}): {instead}")
        return self.__dict__["eps"]  # type: ignore[no-any-return]

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse an activation or a slope that forward could not use, before it is set."""
        if name == "act":
            check_act(value)
        elif name == "negative_slope" and not isinstance(value, int | float):
            raise TypeError(f"negative_slope must be a number, got {type(value).__name__}")
        elif name == "accumulate" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"accumulate must be a whole number of batches, at least 1, got {value!r}")
        elif name == "batch_of_one" and value not in ("error", "running"):
            raise ValueError(f'batch_of_one must be "error" or "running", got {value!r}')
        super().__setattr__(name, value)
        if name == "accumulate" and value > 1 and self._gathered is None:
            self._gathered = {}  # here, and not in forward: replicas of nn.DataParallel share it

    def reset_running_stats(self) -> None:
        """Set running_mean to 0, running_var to 1 and num_batches_tracked to 0, and forget what was gathered."""
        super().reset_running_stats()
        self._forget()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """What was gathered belongs to the statistics that go."""
        super()._load_from_state_dict(*arguments)
        self._forget()

    def _forget(self) -> None:
        """Drop the batches that wait to move the statistics."""
        if self._gathered:
            self._gathered.clear()

    def reset_parameters(self) -> None:
        """Start anew: `reset_running_stats`, `weight` (gamma) 1 and `bias` (beta) 0, where the layer has them."""
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

        Args:
            input: x, with the channels in the second dimension.
            residual: added before the activation; of the input's shape.
            mask: (N, *spatial), bool; True where a position counts. Statistics and gradients are those of the positions
                that count; y is 0 elsewhere.
            lengths: (N,), whole numbers: the same for sequences, of which the first `lengths` positions count. Give
                `mask` or `lengths`, not both.

        Returns:
            y, of the input's shape. In training the batch's statistics normalize and the running ones move; in eval
            mode the running ones normalize.

        Raises what the layer of torch.nn raises on the same input.
        """
        if isinstance(input, torch.fx.Proxy):
            return self._as_leaf(input, residual=residual, mask=mask, lengths=lengths)
        if mask is not None or lengths is not None:
            masked = _masked_outside_of_graphs if torch.compiler.is_compiling() else type(self)._masked
            return masked(self, input, residual, mask, lengths)
        return self._fused(input, residual, self.act, self.negative_slope)

    def _masked(
        self, input: Tensor, residual: Tensor | None, mask: Tensor | None, lengths: Tensor | Sequence[int] | None
    ) -> Tensor:
        """The valid positions are rows of a matrix (M, C), which is normalized as any other."""
        self._check_input_dim(input)
        if residual is not None:
            check_residual(input, residual)
        valid = masks.valid(input, mask, lengths)
        rows = masks.taken(input, valid)
        added = None if residual is None else masks.taken(residual, valid)
        return masks.put_back(self._by_channel(rows, added, self.act, self.negative_slope), input, valid)

    def _fused(self, input: Tensor, residual: Tensor | None, act: str | None, slope: float) -> Tensor:
        """`forward` with the activation of the caller's choice."""
        self._check_input_dim(input)
        return self._by_channel(input, residual, act, slope)

    def _by_channel(self, input: Tensor, residual: Tensor | None, act: str | None, slope: float) -> Tensor:
        """Of any dimensions, channels second: by the batch's statistics, which move the running ones, or by those."""
        try:
            parameters = self._parameters  # a module's attributes take ten times as long to look up
            epilogue = Epilogue(parameters["weight"], parameters["bias"], residual, act, slope)
        except KeyError:  # parametrized
            epilogue = Epilogue(self.weight, self.bias, residual, act, slope)
        eps = self.__dict__["eps"]
        merge = self._merge() if self.training else None
        if not self.training or (self.batch_of_one == "running" and merge is None and _of_one_value(input)):
            mean, var, _ = self._buffers_in_use()
            return self._normalized(Call(input, (mean, var), mean is None and var is None, 0.0, eps, epilogue))
        if not self.track_running_stats:
            return self._normalized(Call(input, (None, None), True, 0.0, eps, epilogue, self._tap, merge))
        buffers = self._buffers_in_use()
        gathered = None if self.accumulate == 1 else self._waiting(input.device)
        running, momentum, finish = movement(buffers, self.momentum, gathered, self.accumulate)
        y = self._normalized(Call(input, running, True, momentum, eps, epilogue, self._tap, merge))
        if finish is not None:
            finish(input.numel() // input.shape[1] if merge is None else merge.count)
        return y

    def _waiting(self, device: torch.device) -> list[Moments]:
        """The batches since these running statistics last moved. Replicas on other devices gather for themselves."""
        if self._gathered is None:
            self._gathered = {}
        return self._gathered.setdefault((self._which(), device), [])

    def _which(self) -> int:
        """The number of the running statistics in use, for layers that have several."""
        return 0

    def _buffers_in_use(self) -> Buffers:
        """The running statistics that this forward reads and moves."""
        held = self._buffers  # a module's attributes take ten times as long to look up
        try:
            return Buffers(held["running_mean"], held["running_var"], held["num_batches_tracked"])
        except KeyError:  # parametrized
            return Buffers(self.running_mean, self.running_var, self.num_batches_tracked)

    def _normalized(self, call: Call) -> Tensor:
        """Layers that see the batch otherwise override it."""
        return transform(call)

    def _merge(self) -> Merge | None:
        """Hook for synchronized layers; the base layer merges with no one."""
        return None

    def _as_leaf(self, input: torch.fx.Proxy, **others: Any) -> Any:
        """Stay one node in a torch.fx graph, as torch.nn's own layers do, so that train() and eval() still reach it."""
        tracer = input.tracer
        if tracer.root is self:  # type: ignore[attr-defined]
            raise torch.fx.proxy.TraceError(
                f"{type(self).__name__} cannot be traced by itself: trace the module that holds it, or "
                "torch.nn.Sequential(layer)"
            )
        given = {name: value for name, value in others.items() if value is not None}
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), given)  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script asks this first. It would put what it compiles into the caller's own model, so: refused."""
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
        if self.act is not None:
            described += f", act={self.act}"
        if self.accumulate > 1:
            described += f", accumulate={self.accumulate}"
        if self.batch_of_one != "error":
            described += f", batch_of_one={self.batch_of_one}"
        if self.act is not None and ACTIVATIONS[self.act].slope:
            described += f", negative_slope={self.negative_slope}"
        if "_batchnorm_fused" in self.__dict__:
            described += f", fused with {self.__dict__['_batchnorm_fused']}"
        return described


@_disable_dynamo  # torch.compiler.disable, but for the import of the compiler
def _masked_outside_of_graphs(layer: _BatchNorm, *given: Any) -> Tensor:
    """How many positions are valid is in the data: a graph would break here in any case."""
    return layer._masked(*given)


Layer = TypeVar("Layer", bound=type)


def documented_as(base: type, *changes: tuple[str, str]) -> Callable[[Layer], Layer]:
    """The docstring of `base` with these changes: help() of every layer is complete by itself."""

    def put(cls: Layer) -> Layer:
        text = inspect.cleandoc(base.__doc__ or "")
        for old, new in changes:
            text = text.replace(old, new)
        cls.__doc__ = text
        return cls

    return put


def with_all_arguments(cls: Layer) -> Layer:
    """A docstring with THE ARGUMENTS OF BATCHNORM1D but the first, in the place of these words."""
    listed = inspect.cleandoc(BatchNorm1d.__doc__ or "").partition("    num_features: ")[2].partition("\n\n")[0]
    arguments = "\n".join(f"    {line}" for line in listed.splitlines()[1:])
    text = inspect.cleandoc(cls.__doc__ or "")
    cls.__doc__ = text.replace("        THE ARGUMENTS OF BATCHNORM1D", arguments)
    return cls


TO_2D = (
    ("(N, C) or (N, C, L)", "(N, C, H, W)"),
    ("m = N·L", "m = N·H·W"),
    ("torch.nn.BatchNorm1d", "torch.nn.BatchNorm2d"),
)
TO_3D = (
    ("(N, C) or (N, C, L)", "(N, C, D, H, W)"),
    ("m = N·L", "m = N·D·H·W"),
    ("torch.nn.BatchNorm1d", "torch.nn.BatchNorm3d"),
)


def _of_one_value(x: Tensor) -> bool:
    """Whether a channel has one value, and so no variance."""
    return x.dim() > 1 and x.numel() == x.shape[1]


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of each channel, with an activation and a residual fused in: torch.nn.BatchNorm1d and more.

    y = act(gamma·(x - mean)/sqrt(var + eps) + beta [+ residual]) over (N, C) or (N, C, L), per channel.

    In training, mean and var are the batch's (var biased, divided by m = N·L), and the running statistics move by
    running ← (1 - momentum)·running + momentum·batch, with the unbiased variance (divided by m - 1). In eval mode they
    are the running statistics, or the batch's where none are tracked.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance, so that no channel is divided by 0.
        momentum: the weight of the new batch in the running statistics; None for the mean over all batches so far.
        affine: learn gamma (`weight`, starts at 1) and beta (`bias`, starts at 0).
        track_running_stats: keep `running_mean`, `running_var` and `num_batches_tracked`.
        device, dtype: of parameters and buffers.
        bias: with False, learn gamma but no beta.
        act: the activation: None, "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "sigmoid" or
            "tanh".
        negative_slope: the slope of leaky_relu below 0; no other activation has one.
        accumulate: move the running statistics once every so many training batches, by the moments of all their values
            together, as one batch of them would. Batches gathered since the last move are in no state_dict.
        batch_of_one: what a training forward does where a channel has a single value, and so no variance: "error"
            raises ValueError, as PyTorch does; "running" normalizes by the running statistics and moves none of them.

    `forward(input, residual=None, *, mask=None, lengths=None)` adds the residual, of the input's shape, before the
    activation. It is never saved for backward, and may change after the call. With `mask` (N, *spatial) of bool, or
    `lengths` (N,) of whole numbers along the last dimension, only valid positions count: statistics and gradients are
    theirs, and y is 0 elsewhere.

    Where backward runs a forward again (activation checkpointing), the running statistics move once.

    Raises what torch.nn.BatchNorm1d raises on the same input. Ioffe and Szegedy 2015, Algorithms 1 and 2.
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
    """A layer that takes num_features from its first input, and then becomes an ordinary one."""

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
        if not bias:
            self.register_parameter("bias", None)
        self.act = act
        self.negative_slope = negative_slope
        self.accumulate = accumulate
        self.batch_of_one = batch_of_one

    def initialize_parameters(self, input: Tensor, *_: object, **__: object) -> None:
        """Take num_features from the first input. torch.nn hands over what forward was given, all of it."""
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
