"""Follow one forward: which tensors are batch norms' outputs, what is computed from them, and what is saved of it.

A TorchFunctionMode sees each call of PyTorch's functions, and `autograd.on_made` the results of this package's kernels.
A result is known by its storage, version, shape and strides: a tensor that was changed since, or a view, is not it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, reduce
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it
from torch.overrides import TorchFunctionMode

from batchnorm.autograd import Made
from batchnorm.saved_tensors import _norms
from batchnorm.saved_tensors._operations import CONVERTED, COPIES, EXPOSING, OVERWRITING, REPLAYED, out_of_place
from batchnorm.saved_tensors._recipes import Kept, Layer, Recipe, Run, Slot, Source

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_SMALL = 16
"""A tensor that is this many times smaller than the result is kept for its recipe."""

NOT_SAVED = "nothing saves it for backward, or a copy is saved that is not followed"
_TOO_DEEP = "too many tensors would have to be made for it at the same time"
_OTHER_BITS = "its output cannot be computed again with the same bits"
_NO_RESIDUAL = "what is added to it, or multiplied with it, is not kept otherwise"
_CHANGED = "it was changed in place"
_VIEW = "a view of it is saved"
_AUTOCAST = "an operation after it converted its argument, as autocast does"
_EXPOSED = "its memory was passed on, as by .data or .numpy()"


class _Known(NamedTuple):
    """A tensor that is known: its identity, and how it is made again; or in `why`, why it is not."""

    storage: StorageWeakRef  # its address is not used again while this exists
    version: int
    form: tuple[Any, ...]
    recipe: Recipe | None
    layer: Layer
    why: str | None = None


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN and value.layout is torch.strided and not value.is_inference()


class Following(TorchFunctionMode):
    """The mode and the `pack` of one forward."""

    def __init__(self, count: Callable[[Tensor], None] | None) -> None:
        """`count`: of `_counter`."""
        super().__init__()
        self.saved: dict[Layer, int] = {}
        self.why: dict[Layer, str] = {}
        self._count = count
        self._known: dict[int, _Known] = {}
        self._kept: WeakValueDictionary[int, Kept] = WeakValueDictionary()
        self._running: list[tuple[Slot, Kept]] | None = None
        self._args: tuple[Any, ...] = ()
        self.hook = self.pack  # one object, to be recognized

    def close(self) -> None:
        """Forget all tensors: the graph may keep this object's `pack` alive."""
        self._known.clear()
        self._kept.clear()
        self._args = ()

    # --- what is saved

    def pack(self, tensor: Tensor) -> Source | Slot:
        """The hook that autograd calls with each tensor that it saves."""
        with torch._C.DisableTorchFunction():  # the backward of a function of the user's saves under the mode
            if tensor.dim() < 2:  # vectors of channels: small, and never made again
                if self._count is not None:
                    self._count(tensor)
                return Kept(tensor)
            if not _is_plain(tensor):
                return self._keep(tensor)
            key = _key(tensor)
            recipe = None if key in self._kept else self._find(tensor, key) or self._converted(tensor)
            if recipe is None:
                return self._keep(tensor)
            self._use(recipe, tensor)
            return recipe

    def _keep(self, tensor: Tensor) -> Source | Slot:
        kept = Kept(tensor)
        if self._running is None:
            self._is_kept(kept)
            return kept
        slot = Slot(kept)
        self._running.append((slot, kept))
        return slot

    def _is_kept(self, kept: Kept) -> None:
        tensor = kept.tensor
        if self._count is not None:
            self._count(tensor)
        if _is_plain(tensor):
            key = _key(tensor)
            self._kept[key] = kept
            known = self._known.get(key)
            if known is not None:
                changed = _CHANGED if known.version != tensor._version else _VIEW
                self._explain(known.layer, known.why or changed)

    def _explain(self, layer: Layer, why: str) -> None:
        """The first reason is the one that is reported."""
        if self.why.get(layer, NOT_SAVED) == NOT_SAVED:
            self.why[layer] = why

    def _use(self, recipe: Recipe, tensor: Tensor) -> None:
        if not recipe.is_used:
            name = recipe.layer
            self.saved[name] = self.saved.get(name, 0) + tensor.numel() * tensor.element_size()
            if self._count is not None:
                for source in recipe.tensors():
                    self._count(source)
        recipe.add_reader()

    def _converted(self, tensor: Tensor) -> Recipe | None:
        """The recipe of a copy in another type that autocast made of an argument of the running function."""
        node = tensor.grad_fn
        if not self._args or node is None or node.name() != "ToCopyBackward0":
            return None
        before = node.next_functions[0][0]
        for value in self._args:
            if _is_plain(value) and value.grad_fn is before and value.shape == tensor.shape:
                recipe = self._find(value)
                if recipe is not None:
                    return self._know(tensor, partial(_convert, tensor.dtype), [recipe], recipe.layer)
        return None

    # --- what is computed

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call the function, and follow its result."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        follow = _FOLLOWED.get(func)
        if follow is None or not torch.is_grad_enabled() or not self._is_on_top():
            return func(*args, **kwargs)
        return follow(self, func, args, kwargs)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of which autocast converts the arguments."""
        self._args = args
        try:
            return func(*args, **kwargs)
        finally:
            self._args = ()

    def _forget(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function whose result may be changed without a new version."""
        if args and _is_plain(args[0]):
            known = self._known.pop(_key(args[0]), None)
            if known is not None:
                self._explain(known.layer, _EXPOSED)
        return func(*args, **kwargs)

    def _is_on_top(self) -> bool:
        """Whether tensors are saved by `pack`: inside, another pair of hooks may be active, as of checkpointing."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] is self.hook

    def _find(self, tensor: Tensor, key: int | None = None) -> Recipe | None:
        """The recipe of a tensor; None if it is not known, or not what it was.

        A detached one has none: its graph does not keep the batch norm's input.
        """
        return self._look_up(tensor, _key(tensor) if key is None else key) if tensor.requires_grad else None

    def _look_up(self, tensor: Tensor, key: int) -> Recipe | None:
        known = self._known.get(key)
        if known is None or known.version != tensor._version or known.form != _form(tensor):
            return None
        return known.recipe

    def _know(
        self,
        tensor: Tensor,
        run: Run,
        sources: list[Source],
        layer: Layer,
        norm: bool = False,
        overwrite: Run | None = None,
    ) -> Recipe | None:
        recipe = Recipe(run, sources, tensor, layer, norm, overwrite)
        if not recipe.is_short:
            self._remember(tensor, None, layer, _TOO_DEEP)
            return None
        self._remember(tensor, recipe, layer, None)
        return recipe

    def _remember(self, tensor: Tensor, recipe: Recipe | None, layer: Layer, why: str | None) -> None:
        storage: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._known[storage.cdata] = _Known(storage, tensor._version, _form(tensor), recipe, layer, why)

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recipes: dict[int, Recipe | None] = {}
        found = False
        for n, value in enumerate(args):
            if isinstance(value, Tensor):
                if not _is_plain(value):
                    return func(*args, **kwargs)
                recipe = recipes[n] = self._find(value)
                found = found or recipe is not None
        call = out_of_place(func, args, kwargs) if found else None
        if call is None:
            return func(*args, **kwargs)
        sources: dict[int, Source] = {n: recipe or Kept(args[n]) for n, recipe in recipes.items()}
        versions = {n: args[n]._version for n in recipes}
        running: list[tuple[Slot, Kept]] = []
        self._running = running
        try:
            result = func(*args, **kwargs)
        finally:
            self._running = None
        self._learn(func, call, sources, versions, args, result, running)
        for slot, saved in running:
            tensor = saved.tensor
            key = _key(tensor) if _is_plain(tensor) else None
            recipe = None if key is None or key in self._kept else self._look_up(tensor, key)
            if recipe is None:
                self._is_kept(saved)
            else:
                self._use(recipe, tensor)
                slot.source = recipe
        return result

    def _learn(
        self,
        func: Any,
        call: tuple[list[Any], dict[str, Any]],
        sources: dict[int, Source],
        versions: dict[int, int],
        args: tuple[Any, ...],
        result: Any,
        running: list[tuple[Slot, Kept]],
    ) -> None:
        """Remember the result of a followed function, if all that it was computed from is kept or has a recipe."""
        if not _is_plain(result) or not result.requires_grad:
            return
        key, device = _key(result), result.device
        for n, version in versions.items():
            value = args[n]
            if value.device != device or (_key(value) == key and value._version == version):
                return  # a copy to another device; or the argument itself, such as of contiguous(), or a view
        layer = next(source.layer for source in sources.values() if isinstance(source, Recipe))
        if func not in COPIES and result.dtype is not _promoted(args[n] for n in sources):
            self._explain(layer, _AUTOCAST)
            return
        kept = {_key(saved.tensor) for _, saved in running if _is_plain(saved.tensor)}
        for n, source in sources.items():
            if isinstance(source, Kept):
                other = _key(args[n])
                is_small = args[n].numel() * _SMALL <= result.numel()
                if other == key or not (is_small or other in kept or other in self._kept):
                    self._remember(result, None, layer, _NO_RESIDUAL)
                    return
        given, kwargs = call
        template = [_HOLE if n in sources else value for n, value in enumerate(given)]
        run = partial(_replay, REPLAYED[func], template, kwargs)
        overwrite = None
        first = args[0]
        if (
            func in OVERWRITING
            and 0 in sources
            and _form(first)[:2] == _form(result)[:2]
            and first.dtype is result.dtype
        ):
            overwrite = partial(_replay, OVERWRITING[func], template, kwargs)
        self._know(result, run, list(sources.values()), layer, overwrite=overwrite)

    def _normalize(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call PyTorch's batch norm, and remember its result."""
        call = _BATCH_NORMS[func](*args, **kwargs)
        if not _is_plain(call.x):
            return func(*args, **kwargs)
        source = self._find(call.x) or Kept(call.x)
        y = func(*args, **kwargs)
        if _is_plain(y) and y.requires_grad:
            layer = _layer(call.running_mean, call.running_var, call.gamma, call.beta)
            self._know_norm(y, _norms.of_torch(call, y), [source], layer)
        return y

    def made(self, made: Made) -> None:
        """Remember a result of this package's kernels."""
        if not self._is_on_top():
            return
        x, y, epilogue = made.x, made.y, made.epilogue
        layer = _layer(*made.call.running, epilogue.gamma, epilogue.beta)
        sources: list[Source] = [self._find(x) or Kept(x)]
        residual = epilogue.residual
        if residual is not None:
            recipe = self._find(residual)
            if recipe is None and _key(residual) not in self._kept:
                self._remember(y, None, layer, _NO_RESIDUAL)
                return
            sources.append(recipe or Kept(residual))
        run = _norms.of_kernel(made.kernel, x, made.statistics, epilogue, made.call.training, y)
        self._know_norm(y, run, sources, layer)

    def _know_norm(self, y: Tensor, run: Run | None, sources: list[Source], layer: Layer) -> None:
        self.why.setdefault(layer, NOT_SAVED)
        if run is None:
            self._remember(y, None, layer, _OTHER_BITS)
        else:
            self._know(y, run, sources, layer, norm=True)


def _layer(*tensors: Tensor | None) -> Layer:
    return tuple(id(tensor) for tensor in tensors if tensor is not None)


_HOLE = object()


def _promoted(tensors: Iterable[Tensor]) -> torch.dtype:
    """The type of an operation's result, if nothing but promotion changes it."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _replay(function: Run, template: list[Any], kwargs: dict[str, Any], *tensors: Tensor) -> Tensor:
    left = iter(tensors)
    return function(*(next(left) if value is _HOLE else value for value in template), **kwargs)


def _convert(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype)


def _functional(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _norms.StockCall:
    return _norms.StockCall(input, running_mean, running_var, weight, bias, training, eps)


def _operator(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> _norms.StockCall:
    return _norms.StockCall(input, running_mean, running_var, weight, bias, training, eps)


_BATCH_NORMS: dict[Any, Callable[..., _norms.StockCall]] = {F.batch_norm: _functional, torch.batch_norm: _operator}


_FOLLOWED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(REPLAYED, Following._follow),
    **dict.fromkeys(_BATCH_NORMS, Following._normalize),
    **dict.fromkeys(CONVERTED, Following._call),
    **dict.fromkeys(EXPOSING, Following._forget),
}
"""What the mode does with a function; it only calls all others."""
