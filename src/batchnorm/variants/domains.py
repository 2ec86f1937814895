"""DomainBatchNorm: separate statistics per kind of data (adversarial, generated), shared gamma and beta."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchnorm import layers as ours
from batchnorm.layers import _BatchNorm
from batchnorm.running_stats import NAMES, Buffers

__all__ = ["DomainBatchNorm1d", "DomainBatchNorm2d", "DomainBatchNorm3d", "domain"]

# Global, so that the threads of DataParallel and backward use it too.
_domain = 0


@contextmanager
def domain(number: int) -> Iterator[None]:
    """Make every DomainBatchNorm of this process use and update the running statistics of one domain.

    >>> with domain(1):
    ...     fake = discriminator(generated)

    Args:
        number: the domain, counted from 0.

    Backward needs no domain, but a forward repeated by activation checkpointing does: put the `with` inside the
    checkpointed function. All threads share the domain.

    Raises TypeError if it is not an integer; a layer raises IndexError if it has fewer domains.
    """
    global _domain
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"domain needs an integer, counted from 0, got {number!r}")
    before, _domain = _domain, number
    try:
        yield
    finally:
        _domain = before


def suffix(number: int) -> str:
    """The suffix of a domain's buffer names; empty for domain 0, which has the names of BatchNorm."""
    return f"_{number}" if number else ""


class _DomainBatchNorm(_BatchNorm):
    """Base of the layers, for any number of dimensions."""

    def __init__(self, num_features: int, domains: int, *arguments: Any, **options: Any) -> None:
        if isinstance(domains, bool) or not isinstance(domains, int) or domains < 1:
            raise ValueError(f"domains must be an integer >= 1, got {domains!r}")
        self.domains = 1
        super().__init__(num_features, *arguments, **options)
        self.domains = domains
        for number in range(1, domains):
            for name in NAMES:
                value = getattr(self, name)
                self.register_buffer(f"{name}_{number}", None if value is None else value.clone())

    def reset_running_stats(self) -> None:
        """Reset the running statistics of every domain to mean 0 and variance 1."""
        super().reset_running_stats()
        for number in range(1, self.domains):
            for buffer, first in zip(Buffers.of(self, suffix(number)), Buffers.of(self), strict=True):
                if buffer is not None and first is not None:
                    buffer.copy_(first)

    def _domain_index(self) -> int:
        if not 0 <= _domain < self.domains:
            raise IndexError(f"domain {_domain} is out of range: this layer has {self.domains}, counted from 0")
        return _domain

    def _buffers_in_use(self) -> Buffers:
        return Buffers.of(self, suffix(self._domain_index()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load a checkpoint; the statistics of one without domains are copied to every domain."""
        if not any(f"{prefix}{name}_{n}" in state_dict for n in range(1, self.domains) for name in NAMES):
            for number in range(1, self.domains):
                for name in NAMES:
                    if f"{prefix}{name}" in state_dict:
                        state_dict[f"{prefix}{name}_{number}"] = state_dict[f"{prefix}{name}"]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, domains={self.domains}"


@ours.with_all_arguments
class DomainBatchNorm1d(_DomainBatchNorm, ours.BatchNorm1d):
    """`BatchNorm1d` with separate running statistics for each of several domains; gamma and beta are shared.

    A domain is a kind of data, such as real and generated images, or clean and adversarial ones. `with
    batchnorm.domain(k):` around a forward sets the domain of its batch; the default is domain 0. A batch contains data
    of one domain, so training normalizes each domain by its own statistics. The keys of domain 0 in the state dict are
    BatchNorm's: BatchNorm loads them, and loading a checkpoint of BatchNorm sets the statistics of every domain.

    Input: (N, C) or (N, C, L).

    Args:
        num_features: C, the number of channels.
        domains: the number of domains.
        arguments, options: those of `BatchNorm1d`, by position or by name:
            THE ARGUMENTS OF BATCHNORM1D

    Raises the errors of torch.nn.BatchNorm1d on the same input; IndexError if the layer has fewer domains.

    Xie et al. 2020 (AdvProp, "auxiliary batch norms"); Chang et al. 2019 (domain-specific batch normalization).
    """


@ours.documented_as(DomainBatchNorm1d, *ours.TO_2D)
class DomainBatchNorm2d(_DomainBatchNorm, ours.BatchNorm2d):
    """`DomainBatchNorm1d` over (N, C, H, W)."""


@ours.documented_as(DomainBatchNorm1d, *ours.TO_3D)
class DomainBatchNorm3d(_DomainBatchNorm, ours.BatchNorm3d):
    """`DomainBatchNorm1d` over (N, C, D, H, W)."""
