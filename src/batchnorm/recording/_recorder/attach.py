"""The layers of a model that can be watched, and a tap on each: put on for a recorded step, taken off after it.

A step that is not recorded runs as if nobody watched: no hook, no class, no tap is on any layer.

torch.nn's own layers compute as they always do; beside it, one more pass over their input and one over their gradient
give the same sums as ours. While a step is recorded, their class is a subclass that reports to the tap. Copies and
pickles of a layer are of its own class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm import kernels
from batchnorm.kernels.aten import ATEN
from batchnorm.kernels.contract import Epilogue, GradSums, Pass, Tap, UnavailableError
from batchnorm.moments import Moments
from batchnorm.restoring import unwrapped
from batchnorm.runs.run import RunError
from batchnorm.variants import DOMAINS, ONE_SET

# What stands between a parameter and the operator that uses it, or between that operator and the norm, unit by unit.
_PASSED_THROUGH = frozenset(
    {"ToCopyBackward0", "TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsafeViewBackward0"}
)
_PRODUCERS = ("ConvolutionBackward", "AddmmBackward", "MmBackward", "LinearBackward")
_DEPTH = 6
_NARROWEST = torch.float32


class Producer(NamedTuple):
    """The weight below a norm: the model's parameter, its name, and the axis of it that counts the units."""

    weight: nn.Parameter
    name: str
    axis: int

    @torch.no_grad()
    def unit_norms(self) -> Tensor:
        """||w|| of each unit, in float32 at least."""
        weight = self.weight.detach()
        others = [axis for axis in range(weight.dim()) if axis != self.axis]
        norms: Tensor = torch.linalg.vector_norm(
            weight, dim=others, dtype=torch.promote_types(weight.dtype, _NARROWEST)
        )
        return norms


def producer(x: Tensor, units: int, parameters: Mapping[int, str]) -> Producer | None:
    """What made x (N, units, *), where that is one operator with one of the parameters (names by id); else None."""
    node = _through(x.grad_fn)
    if node is None or not node.name().startswith(_PRODUCERS):
        return None
    found = []
    for above, _ in node.next_functions:
        leaf = _through(above)
        variable = getattr(leaf, "variable", None)
        if variable is not None and id(variable) in parameters and variable.dim() >= 2:
            found.append(variable)
    axis = 1 if getattr(node, "_saved_transposed", False) else 0
    if len(found) != 1 or found[0].shape[axis] != units:  # a grouped transposed convolution counts units otherwise
        return None
    return Producer(found[0], parameters[id(found[0])], axis)


def _through(node: Any) -> Any:
    """Past what only copies or turns a tensor."""
    for _ in range(_DEPTH):
        if node is None or node.name() not in _PASSED_THROUGH:
            return node
        node = node.next_functions[0][0]
    return node


class _Observed:
    """A layer of torch.nn's that tells its tap."""

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
        """As a layer of torch.nn's: who copies or stores the model does not want the recording with it."""
        made: Any = super().__reduce_ex__(protocol)
        return (_blank, (self._stock,), *made[2:])


def _blank(cls: type[nn.Module]) -> nn.Module:
    """A layer without its state, which copy and pickle put in."""
    return cls.__new__(cls)


class _Observed1d(_Observed, nn.BatchNorm1d):
    _stock = nn.BatchNorm1d


class _Observed2d(_Observed, nn.BatchNorm2d):
    _stock = nn.BatchNorm2d


class _Observed3d(_Observed, nn.BatchNorm3d):
    _stock = nn.BatchNorm3d


for _class in (_Observed1d, _Observed2d, _Observed3d):
    _class.__name__ = _class.__qualname__ = _class._stock.__name__

OBSERVED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _Observed1d,
    nn.BatchNorm2d: _Observed2d,
    nn.BatchNorm3d: _Observed3d,
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
    kernel = kernels.choose(x, tapped=True).kernel
    try:
        return kernel.statistics(x)
    except UnavailableError as error:
        kernels.give_up(kernel, error)
        return ATEN.statistics(x)


@torch.no_grad()
def _sums(grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> GradSums:
    kernel = kernels.choose(x, tapped=True).kernel
    rstd = torch.rsqrt(var + eps)
    try:
        return kernel.reduce_grad(grad, x, mean, rstd, Epilogue(), energy=True)
    except UnavailableError as error:
        kernels.give_up(kernel, error)
        narrow = ATEN.accumulation_dtype(x.dtype)
        return ATEN.reduce_grad(grad, x, mean.to(narrow), rstd.to(narrow), Epilogue(), energy=True)


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


_TAKEN: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
"""The layers that are watched, each with a mark of the attachment that watches it."""


@dataclass(slots=True, eq=False)
class Watched:
    """A layer, the class that listens where the layer's own does not, and the weight below it where known."""

    name: str
    aliases: tuple[str, ...]
    layer: _BatchNorm
    stock: type[nn.Module]
    observed: type[nn.Module] | None
    tap: Tap
    producer: Producer | None = None

    @property
    def units(self) -> int:
        return int(self.layer.num_features)

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""
        layer = self.layer
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "class": self.stock.__name__,
            "units": self.units,
            "eps": float(layer.__dict__["eps"]),
            "momentum": None if layer.momentum is None else float(layer.momentum),
            "affine": layer.weight is not None,
            "act": getattr(layer, "act", None),
            "ours": self.observed is None,
            "producer": None if self.producer is None else self.producer.name,
        }


class Attachment:
    """Every layer of a model that can be watched; `skipped` are those that cannot, with the reason."""

    def __init__(self, model: nn.Module) -> None:
        self.watched: list[Watched] = []
        self.skipped: list[dict[str, str]] = []
        names: dict[nn.Module, list[str]] = {}
        inner = unwrapped(model)
        for name, module in inner.named_modules(remove_duplicate=False):
            if isinstance(module, _BatchNorm):
                names.setdefault(module, []).append(name)
        for module, found in names.items():
            why = _why_not(module)
            if why is None:
                stock = STOCK.get(type(module), type(module))
                watched = Watched(found[0], tuple(found[1:]), module, stock, OBSERVED.get(stock), Tap())  # type: ignore[arg-type]
                self.watched.append(watched)
            else:
                self.skipped.append({"name": found[0], "class": type(module).__name__, "why": why})
        self._parameters = {id(p): name for name, p in inner.named_parameters()}
        for watched in self.watched:
            watched.tap.look = self._looker(watched)
        self.armed = False
        self._mark = object()

    def arm(self, wanted: bool) -> None:
        """Listen, or do not."""
        if wanted is self.armed:
            return
        for watched in self.watched:
            layer = watched.layer
            if wanted:
                layer.__dict__["_tap"] = watched.tap
            else:
                layer.__dict__.pop("_tap", None)
            now, then = (watched.stock, watched.observed) if wanted else (watched.observed, watched.stock)
            if watched.observed is not None and type(layer) is now:
                layer.__class__ = then  # type: ignore[assignment]
        self.armed = wanted

    def take(self) -> None:
        """Mark the layers as watched. Raises RunError where another recording watches one of them.

        Other threads do the same with their layers: setdefault is one step, and nothing here iterates over `_TAKEN`.
        """
        for watched in self.watched:
            if _TAKEN.setdefault(watched.layer, self._mark) is not self._mark:
                self._give_back()
                raise RunError("this model is being watched already: close the other Run first")

    def release(self) -> None:
        """Leave the layers as they were."""
        self.arm(False)
        self._give_back()

    def _give_back(self) -> None:
        for watched in self.watched:
            if _TAKEN.get(watched.layer) is self._mark:
                del _TAKEN[watched.layer]

    def _looker(self, watched: Watched) -> Any:
        """Look where the layer's input comes from, once, in the first forward that knows."""

        def look(x: Tensor) -> None:
            if x.grad_fn is not None:
                watched.tap.look = None
                watched.producer = producer(x, watched.units, self._parameters)

        return look


def _why_not(module: nn.Module) -> str | None:
    cls = type(module)
    if cls in OBSERVED or cls in STOCK or cls in ONE_SET:
        return None
    if isinstance(module, LazyModuleMixin):
        return "lazy: run a batch through the model first"
    if getattr(cls, "_batchnorm_frozen", False):
        return "frozen: it does not normalize by the batch's statistics"
    if isinstance(module, nn.SyncBatchNorm):
        return "torch.nn.SyncBatchNorm does not tell: batchnorm.sync(model) makes it one that does"
    if cls in DOMAINS:
        return "it has statistics for each of several domains, and a recording has room for one"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript runs its own compiled code"
    return f"a subclass of {next(b.__name__ for b in cls.__mro__[1:] if b.__module__.startswith('torch.'))}"
