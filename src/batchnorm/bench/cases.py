"""The calls that are timed: shape, layout, type, variant and mode, and the sets of the command.

shape    (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W)
layout   rows (of (N, C)), contiguous, channels_last or channels_last_3d
dtype    float32, bfloat16, float16 or float64, of the tensors; parameters and statistics are float32, or float64
variant  bn, bn+relu, bn+silu, or bn+add+relu, which adds a residual before the activation
mode     train: forward and backward; eval: forward alone, under no_grad
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from batchnorm.testing import Call

_MEMORY_FORMATS = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}


@dataclass(frozen=True, slots=True)
class Case:
    """One call to time; its fields are described above."""

    shape: tuple[int, ...]
    layout: str
    dtype: str = "float32"
    variant: str = "bn+relu"
    mode: str = "train"

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        """What `--filter` searches."""
        return " ".join((self.size, self.layout, self.dtype, self.variant, self.mode))

    @property
    def act(self) -> str | None:
        last = self.variant.rpartition("+")[2]
        return None if last == "bn" else last

    @property
    def residual(self) -> bool:
        return "add" in self.variant

    @property
    def train(self) -> bool:
        return self.mode == "train"

    @property
    def itemsize(self) -> int:
        return int(getattr(torch, self.dtype).itemsize)

    @property
    def values(self) -> int:
        """m, the values of one channel."""
        return math.prod(self.shape) // self.shape[1]

    @property
    def tensor_bytes(self) -> int:
        return self.itemsize * math.prod(self.shape)

    def empty(self, device: str = "cpu") -> torch.Tensor:
        """A tensor of the case without values."""
        memory_format = _MEMORY_FORMATS.get(self.layout, torch.contiguous_format)
        dtype = getattr(torch, self.dtype)
        return torch.empty(self.shape, dtype=dtype, device=device, memory_format=memory_format)

    def make(self, seed: int, device: str = "cpu") -> Call:
        """Random tensors for the call: x with a different mean and deviation per channel, the rest standard normal.

        In eval mode there is no gradient, and grad_y is x.
        """
        generator = torch.Generator(device).manual_seed(seed)
        precision = torch.float64 if self.dtype == "float64" else torch.float32
        normal, uniform = (
            partial(make, generator=generator, device=device, dtype=precision) for make in (torch.randn, torch.rand)
        )

        def tensor() -> torch.Tensor:
            return self.empty(device).normal_(generator=generator)

        channels = self.shape[1]
        vector = (1, channels, *[1] * (len(self.shape) - 2))
        x = tensor().mul_(0.5 + uniform(vector)).add_(normal(vector))
        return Call(
            x=x,
            grad_y=tensor() if self.train else x,
            gamma=1 + 0.1 * normal(channels),
            beta=0.1 * normal(channels),
            residual=tensor() if self.residual else None,
            running_mean=normal(channels),
            running_var=0.5 + uniform(channels),
            training=self.train,
            act=self.act,
        )


Place = tuple[tuple[int, ...], str]


def _of(places: Sequence[Place], dtypes: str, variants: str, modes: str) -> list[Case]:
    how = product(modes.split(), dtypes.split(), variants.split())
    return [Case(*place, dtype, variant, mode) for mode, dtype, variant in how for place in places]


_IMAGES = ((32, 64, 56, 56), (64, 64, 112, 112), (128, 256, 28, 28), (64, 512, 7, 7), (16, 960, 14, 14))
_ROWS = ((60, 100), (256, 512), (4096, 1024), (65536, 256))
_PLACES: list[Place] = [
    *product(_IMAGES, ("contiguous", "channels_last")),
    *product([(4, 32, 16, 56, 56)], ("contiguous", "channels_last_3d")),
    *product(_ROWS, ("rows",)),
]

EVERY = _of(_PLACES, "float32 bfloat16", "bn bn+relu bn+add+relu bn+silu", "train eval")
"""`--full`: every combination."""

DEFAULT = [
    *_of(_PLACES, "float32", "bn+relu", "train"),
    *_of(_PLACES, "float32", "bn", "train"),
    *_of([place for place in _PLACES if place[1] != "rows"], "float32", "bn+add+relu", "train"),
    *_of([place for place in _PLACES if place[0] == (128, 256, 28, 28)], "float32", "bn+silu", "train"),
    *_of(_PLACES, "float32", "bn+relu", "eval"),
    *_of(_PLACES, "bfloat16", "bn+relu", "train"),
]
"""Every shape and layout; the most used ones in all variants, the others once."""

_FIRST: list[Place] = [(_IMAGES[0], "contiguous")]
_FEW = (_IMAGES[0], *_IMAGES[3:], *_ROWS[1::2])
QUICK = [
    *_of([place for place in _PLACES if place[0] in _FEW], "float32", "bn+relu", "train"),
    *_of(_FIRST, "float32", "bn bn+add+relu", "train"),
    *_of(_FIRST, "float32", "bn+relu", "eval"),
    *_of(_FIRST, "bfloat16", "bn+relu", "train"),
]
"""`--quick`: under a minute."""

# On a GPU: batch norm as ResNet-50 has it at batch 256, and rows.
_GPU_SIZES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
_GPU_SHAPES = [(256, channels, side, side) for channels, side in _GPU_SIZES]
_GPU_IMAGES: list[Place] = [*product(_GPU_SHAPES, ("contiguous", "channels_last"))]
_GPU_ROWS: list[Place] = [*product([(4096, 1024), (65536, 256), (1048576, 64)], ("rows",))]
GPU_VARIANTS = ("bn", "bn+relu", "bn+add+relu")
_GPU_EVERY = _of([*_GPU_IMAGES, *_GPU_ROWS], "bfloat16 float32", "bn bn+relu bn+add+relu bn+silu", "train eval")
_GPU_DEFAULT = _of(_GPU_IMAGES, "bfloat16 float32", "bn bn+relu bn+add+relu", "train")
_GPU_QUICK = [case for case in _GPU_DEFAULT if case.shape[1:3] in ((64, 56), (512, 7)) and case.variant == "bn+relu"]

SETS = {
    "cpu": {"quick": QUICK, "default": DEFAULT, "full": EVERY},
    "cuda": {"quick": _GPU_QUICK, "default": _GPU_DEFAULT, "full": _GPU_EVERY},
}
"""The cases of `batchnorm bench`, by device and scope."""

_NOTHING: frozenset[Case] = frozenset()
_ONE_EACH = frozenset(_of(_PLACES, "float32", "bn+relu", "train"))
COMPILED = {(device, scope): _NOTHING for device in SETS for scope in SETS[device]}
COMPILED |= {("cpu", "default"): _ONE_EACH, ("cpu", "full"): _ONE_EACH}
"""The cases in which torch.compile is timed by default, by device and scope.

The compiler starts in ten seconds and takes two or three for each case.
"""


def matches(name: str, text: str) -> bool:
    """Whether each word of `text` is a word of the name, or part of one if it is no whole word of any case."""
    words, wanted = name.lower().split(), text.lower().split()
    return all(word in words if word in _WORDS else any(word in other for other in words) for word in wanted)


_WORDS = {word for case in EVERY for word in case.name.lower().split()}


# --- the floor: the least memory traffic that a call needs, in copies of x -------------------------------------------
#
# A copy of x reads one tensor of x's size and writes another. So each tensor that is read or written is half a copy:
#
#     eval                  x, y                           1
#     train, forward        x, y                           1
#     train, backward       x, g, dx                       1.5   (g the gradient at y)
#     with a residual       the residual in the forward    0.5
#                           in the backward, its gradient, and y or the residual for the activation's derivative  1
#
# In training, the forward reads x for the statistics and again to normalize; the backward reads x and g for the sums
# and again for dx. The second read is free if one tile, of x or of x and g, stays in the L2 of the core that read it. A
# tile has the fewest channels that can be read without others: one channel if contiguous, those of one cache line if
# channels_last. A larger tile is read again: 0.5 more in the forward, 1 more in the backward. (With a residual, the
# second pass reads the residual's gradient instead of g. It includes the activation's derivative, so y is read once.)

CACHE_LINE = 64


class Copies(NamedTuple):
    """The traffic of forward and backward in copies of x."""

    forward: float
    backward: float

    @property
    def whole(self) -> float:
        return self.forward + self.backward


def copies(case: Case, cache_bytes: int) -> Copies:
    """The floor of a case on a machine whose L2 has `cache_bytes`."""
    forward = 1.5 if case.residual else 1.0
    if not case.train:
        return Copies(forward, 0.0)
    # Without an activation, g is also the residual's gradient, and no derivative needs y.
    backward = 2.5 if case.residual and case.act is not None else 1.5
    tile = tile_bytes(case)
    return Copies(forward + 0.5 * (tile > cache_bytes), backward + (2 * tile > cache_bytes))


def tile_bytes(case: Case) -> int:
    """Bytes of one tile of x: the fewest channels that can be read without others."""
    return case.values * (case.itemsize if case.layout == "contiguous" else CACHE_LINE)


def gigabytes_per_second(case: Case, amount: float, seconds: float) -> float:
    """The memory traffic in 10⁹ bytes per second of a call that moves `amount` copies of x in `seconds`."""
    return 2 * amount * case.tensor_bytes / seconds / 1e9
