"""Classes of frozen batch norms: they normalize by their running statistics and keep them, whatever train() says.

A layer is frozen by changing its class to a subclass of its own, for which `training` is False. What train(), eval() or
an assignment asks for is kept beside it, for the day it is thawed. Copies and pickles of it are frozen too.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from batchnorm.surgery._fusing import runtime
from batchnorm.surgery._shared.layers import FROZEN, OURS, STOCK
from batchnorm.surgery._shared.restoring import become

# It reads `training` of every batch norm, to build a SyncBatchNorm in its place that the next train() would set going.
_CONVERT_SYNC = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__  # type: ignore[attr-defined]


class _Frozen:
    """What a layer of any class does differently once its statistics are frozen."""

    # Seen by those who must not import this module, such as the recording.
    _batchnorm_frozen = True

    @property
    def training(self) -> bool:
        """False: it normalizes by its running statistics and leaves them alone."""
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is _CONVERT_SYNC:
            raise TypeError(
                "SyncBatchNorm.convert_sync_batchnorm would thaw this layer, whose statistics are frozen: a frozen "
                "layer has nothing to synchronize; convert first and freeze then, or unfreeze it"
            )
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode

    def reset_running_stats(self) -> None:
        """Nothing: they are frozen. `torch.optim.swa_utils.update_bn` calls this."""

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script asks this first. What it compiles has a `training` of its own, which train() sets."""
        raise TypeError(
            f"torch.jit.script would thaw {type(self).__name__}, whose statistics are frozen: "
            "use torch.export, torch.compile or torch.jit.trace, or unfreeze it"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        frozen: Any = type(self)
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        plain = FROZEN[frozen]
        return (_rebuilt, (plain, make, tuple(plain if each is frozen else each for each in arguments)), *rest)


# The other way round than `FROZEN`.
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def frozen_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a batch norm's class whose statistics do not move: one for each class, listed in `FROZEN`."""
    if cls in _CLASSES:
        return _CLASSES[cls]
    namespace: dict[str, Any] = {"__slots__": (), "__module__": cls.__module__, "__doc__": cls.__doc__}
    if cls in runtime.LAYERS:
        namespace[runtime.TAIL] = _held_back
    frozen = type(f"Frozen{cls.__name__}", (_Frozen, cls), namespace)
    FROZEN[frozen], _CLASSES[cls] = cls, frozen
    return frozen


def _rebuilt(plain: type[nn.Module], make: Any, arguments: tuple[Any, ...]) -> Any:
    """A copied or unpickled layer, still without its state."""
    layer = make(*arguments)
    become(layer, frozen_class(plain))
    return layer


def _held_back(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """A frozen layer of ours in a converted model: what follows it is computed with it, as with one that trains."""
    x = args[0] if len(args) == 1 and not kwargs else None
    if layer.act is None and isinstance(x, Tensor) and x.dim() in layer._dims and x.is_floating_point():
        return runtime.Deferred(layer._fused, x, alone=False)
    return layer(*args, **kwargs)


for _cls in (*STOCK, *OURS):
    frozen_class(_cls)
