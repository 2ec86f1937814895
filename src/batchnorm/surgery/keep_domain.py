"""keep_domain(): reduce a model with the statistics of several domains to one domain."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from batchnorm.records import Record
from batchnorm.restoring import all_or_nothing, set_class
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
        layers: the names of the layers that now have only these statistics.
    """

    domain: int
    layers: tuple[str, ...]

    def _head(self) -> list[str]:
        return [f"{plural(len(self.layers), 'batch norm layer')} of domain {self.domain} alone"]


def keep_domain(model: nn.Module, number: int) -> Kept:
    """Turn every DomainBatchNorm into a BatchNorm with the statistics of one domain, in place.

    The domain's running statistics become running_mean, running_var and num_batches_tracked; all others are removed.
    The layers can then be folded, recalibrated, exported and converted.

    Args:
        model: changed in place.
        number: of the domain, from 0.

    Returns:
        The layers that were changed; `print` it.

    Raises TypeError if `model` is not a torch.nn.Module; IndexError, without changes, if a layer has no such domain.
    """
    check_module("keep_domain", model)
    layers = [(name, module) for name, module in model.named_modules() if type(module) in _PLAIN]
    if not layers:
        warn_of_none("DomainBatchNorm layer")
    for name, layer in layers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < layer.domains:
            raise IndexError(f"{name or 'the layer'} has domains 0 to {layer.domains - 1}, not {number!r}")
    with all_or_nothing(model):
        for _, layer in layers:
            for name in NAMES:
                layer._buffers[name] = layer._buffers[name + suffix(number)]
                for other in range(1, layer.domains):
                    del layer._buffers[name + suffix(other)]
            plain = _PLAIN[type(layer)]
            del layer.domains
            set_class(layer, plain)
    return Kept(number, tuple(name for name, _ in layers))
