"""DomainBatchNorm: statistics for each kind of data (adversarial, generated, another domain), gamma and beta shared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchnorm import layers as ours
from batchnorm.layers import _BatchNorm
from batchnorm.running_stats import Buffers

__all__ = ["DomainBatchNorm1d", "DomainBatchNorm2d", "DomainBatchNorm3d", "domain"]

# One for all threads: those that DataParallel and backward start are in the domain, too.
_domain = 0
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def domain(number: int) -> Iterator[None]:
    """Inside, every DomainBatchNorm of this process normalizes by, and moves, the statistics of this domain.

    >>> with domain(1):
    ...     fake = discriminator(generated)

    Backward needs no domain; a forward that activation checkpointing runs again does: put the `with` inside of what is
    checkpointed. Threads share it: two that train at once share their domains.

    Raises TypeError where it is no whole number; a layer raises IndexError where it has fewer.
    """
    global _domain
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"domain takes the number of a domain, from 0, got {number!r}")
    before, _domain = _domain, number
    try:
        yield
    finally:
        _domain = before


def suffix(number: int) -> str:
    """What the names of a domain's buffers end in: domain 0 has BatchNorm's own."""
    return f"_{number}" if number else ""


class _DomainBatchNorm(_BatchNorm):
    """The layer of any dimensions."""

    def __init__(self, num_features: int, domains: int, *arguments: Any, **options: Any) -> None:
        if isinstance(domains, bool) or not isinstance(domains, int) or domains < 1:
            raise ValueError(f"domains must be a whole number, at least 1, got {domains!r}")
        self.domains = 1
        super().__init__(num_features, *arguments, **options)
        self.domains = domains
        for number in range(1, domains):
            for name in BUFFERS:
                value = getattr(self, name)
                self.register_buffer(f"{name}_{number}", None if value is None else value.clone())

    def reset_running_stats(self) -> None:
        """Of every domain."""
        super().reset_running_stats()
        for number in range(1, self.domains):
            for name in BUFFERS:
                own, first = getattr(self, f"{name}_{number}"), getattr(self, name)
                if own is not None:
                    own.copy_(first)

    def _which(self) -> int:
        if not 0 <= _domain < self.domains:
            raise IndexError(f"domain {_domain} of a layer with {self.domains}: they are numbered from 0")
        return _domain

    def _buffers_in_use(self) -> Buffers:
        end = suffix(self._which())
        return Buffers(*(getattr(self, name + end) for name in BUFFERS))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """A checkpoint of one domain, as BatchNorm's is, gives every domain its statistics."""
        if not any(f"{prefix}{name}_{n}" in state_dict for n in range(1, self.domains) for name in BUFFERS):
            for number in range(1, self.domains):
                for name in BUFFERS:
                    if f"{prefix}{name}" in state_dict:
                        state_dict[f"{prefix}{name}_{number}"] = state_dict[f"{prefix}{name}"]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, domains={self.domains}"


class DomainBatchNorm1d(_DomainBatchNorm, ours.BatchNorm1d):
    """`BatchNorm1d` with running statistics for each of `domains` kinds of data; gamma and beta are shared.

    `with batchnorm.domain(k):` around a forward says whose batch it is; without, domain 0's. A batch holds one domain:
    its own statistics are then the domain's, too. The keys of domain 0 are BatchNorm's, so that a network trained with
    one loads it; a BatchNorm checkpoint gives its statistics to every domain.

    Args:
        num_features: C.
        domains: how many.
        and those of `BatchNorm1d`.

    Xie et al. 2020 (AdvProp, "auxiliary batch norms"); Chang et al. 2019 (domain-specific batch normalization).
    """


@ours.documented_as(DomainBatchNorm1d, *ours.TO_2D)
class DomainBatchNorm2d(_DomainBatchNorm, ours.BatchNorm2d):
    """`DomainBatchNorm1d` over (N, C, H, W)."""


@ours.documented_as(DomainBatchNorm1d, *ours.TO_3D)
class DomainBatchNorm3d(_DomainBatchNorm, ours.BatchNorm3d):
    """`DomainBatchNorm1d` over (N, C, D, H, W)."""
