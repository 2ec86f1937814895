"""Copies of a call's tensors that calls take in turn, so that each call finds its tensors cold.

A case that always reads the same tensors finds them in the last-level cache if they fit. A layer of a network does
not: other layers ran since its tensors were last used. So calls rotate through copies that together exceed the cache.
As many results stay alive, so that new results are written to memory that has left the cache, too.

    cold    every call takes the next copy; the usual state of a layer in a network
    warm    every call takes the first copy, and its results replace the last ones
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from batchnorm.testing import Call

LEAST_BYTES = 64 << 20
MOST_BYTES = 1 << 30
MOST_COPIES = 4096
"""Copies of very small tensors cost more to make than to miss."""


@dataclass(frozen=True, slots=True)
class Room:
    """How many bytes of copies a machine needs, and how many it has room for."""

    wanted: int
    most: int

    @classmethod
    def of(cls, last_level: int, memory: int | None) -> Room:
        """At least 64 MiB and twice the last level; at most 1 GiB and an eighth of the memory.

        The results that stay alive take about as much again, a quarter of the memory in all.
        """
        most = MOST_BYTES if memory is None else min(MOST_BYTES, memory // 8)
        return cls(min(max(2 * last_level, LEAST_BYTES), most), most)

    def holds(self, call: Call) -> bool:
        """Whether caches may keep the call's tensors until the next call, if it takes the same ones."""
        return tensor_bytes(call) < self.wanted

    def copies(self, call: Call) -> int:
        """How many copies of the call's tensors make every call cold: two at least, if there is room for them."""
        size = max(tensor_bytes(call), 1)
        return max(1, min(max(2, -(-self.wanted // size)), self.most // size, MOST_COPIES))


def tensor_bytes(call: Call) -> int:
    """Bytes of x, of the gradient at y in training, and of the residual."""
    tensors = (call.x, call.grad_y if call.training else None, call.residual)
    return sum(one.numel() * one.element_size() for one in tensors if one is not None)


class Rotation:
    """A call and its copies, `count` in all, with equal values in other memory."""

    def __init__(self, call: Call, count: int = 1) -> None:
        self.calls = [call, *(_copy(call) for _ in range(count - 1))]
        self._place = 0

    def __len__(self) -> int:
        return len(self.calls)

    def turn(self, contender: Any) -> None:
        """Let the contender use the next copy."""
        self._place = (self._place + 1) % len(self.calls)
        contender.take(self.calls[self._place])

    def stop(self, contenders: Iterable[Any]) -> None:
        """Let all contenders use the first copy, and free the others."""
        del self.calls[1:]
        for contender in contenders:
            contender.take(self.calls[0])


def _copy(call: Call) -> Call:
    x = call.x.clone()
    residual: Tensor | None = None if call.residual is None else call.residual.clone()
    return replace(call, x=x, grad_y=call.grad_y.clone() if call.training else x, residual=residual)
