"""keep_domain(): of a model with statistics for several domains, that for one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from batchnorm.records import Record
from batchnorm.surgery._fusing.classes import become
from batchnorm.surgery._shared.layers import warn_of_none
from batchnorm.variants import DOMAINS, PLAIN
from batchnorm.variants.domains import BUFFERS, suffix
from batchnorm.words import plural

__all__ = ["Kept", "keep_domain"]

_PLAIN: dict[type[nn.Module], type[nn.Module]] = dict(zip(DOMAINS, PLAIN, strict=True))


@dataclass(frozen=True, slots=True, repr=False)
class Kept(Record):
    """What `keep_domain` did: the layers that have the statistics of this domain now, and no others."""

    domain: int
    layers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{plural(len(self.layers), 'batch norm layer')} of domain {self.domain} alone"


def keep_domain(model: nn.Module, number: int) -> Kept:
    """Every DomainBatchNorm becomes the BatchNorm that it is `with domain(number)`, in place.

    The domain's running statistics become running_mean, running_var and num_batches_tracked; those of the others go.
    From there on the layer can be folded, recalibrated, exported and converted as any other.

    Raises TypeError if `model` is not a torch.nn.Module, and IndexError, with all layers as they were, where one of
    them has no such domain.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"keep_domain takes a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    found = [(name, module) for name, module in model.named_modules() if type(module) in _PLAIN]
    if not found:
        warn_of_none("keep_domain", "DomainBatchNorm layer")
    for name, layer in found:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < layer.domains:
            raise IndexError(f"{name or 'the layer'} has domains 0 to {layer.domains - 1}, not {number!r}")
    for _, layer in found:
        for name in BUFFERS:
            layer._buffers[name] = layer._buffers[name + suffix(number)]
            for other in range(1, layer.domains):
                del layer._buffers[name + suffix(other)]
        plain = _PLAIN[type(layer)]
        del layer.domains
        become(layer, plain)
    return Kept(number, tuple(name for name, _ in found))
