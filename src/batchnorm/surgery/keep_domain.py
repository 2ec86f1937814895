"""keep_domain(): of a model with statistics for several domains, that for one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from batchnorm.records import Record
from batchnorm.restoring import all_or_nothing, become
from batchnorm.running_stats import NAMES
from batchnorm.surgery._shared.layers import check_module, warn_of_none
from batchnorm.variants import DOMAINS, PLAIN
from batchnorm.variants.domains import suffix
from batchnorm.words import plural

__all__ = ["Kept", "keep_domain"]

_PLAIN: dict[type[nn.Module], type[nn.Module]] = dict(zip(DOMAINS, PLAIN, strict=True))


@dataclass(frozen=True, slots=True, repr=False)
class Kept(Record):
    """What `keep_domain` did.

    Attributes:
        domain: the number of the domain whose statistics were kept.
        layers: the names of the layers that have these statistics now, and no others.
    """

    domain: int
    layers: tuple[str, ...]

    def _head(self) -> list[str]:
        return [f"{plural(len(self.layers), 'batch norm layer')} of domain {self.domain} alone"]


def keep_domain(model: nn.Module, number: int) -> Kept:
    """Turn every DomainBatchNorm into a BatchNorm with the statistics of one domain, in place.

    The domain's running statistics become running_mean, running_var and num_batches_tracked; those of the others go.
    From there on the layer can be folded, recalibrated, exported and converted as any other.

    Args:
        model: changed in place.
        number: of the domain, from 0.

    Returns:
        Which layers have the statistics of that domain now; `print` it.

    Raises TypeError if `model` is not a torch.nn.Module, and IndexError, with all layers as they were, where one of
    them has no such domain.
    """
    check_module("keep_domain", model)
    found = [(name, module) for name, module in model.named_modules() if type(module) in _PLAIN]
    if not found:
        warn_of_none("DomainBatchNorm layer")
    for name, layer in found:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < layer.domains:
            raise IndexError(f"{name or 'the layer'} has domains 0 to {layer.domains - 1}, not {number!r}")
    with all_or_nothing(model):
        for _, layer in found:
            for name in NAMES:
                layer._buffers[name] = layer._buffers[name + suffix(number)]
                for other in range(1, layer.domains):
                    del layer._buffers[name + suffix(other)]
            plain = _PLAIN[type(layer)]
            del layer.domains
            become(layer, plain)
    return Kept(number, tuple(name for name, _ in found))
