"""The cases of `batchnorm bench --device cuda`: batch norm as ResNet-50 has it at batch 256, and rows.

Fields are those of `batchnorm.bench.cases`.
"""

from __future__ import annotations

from itertools import product

from batchnorm.bench.cases import Case

IMAGES = (
    (256, 64, 112, 112),
    (256, 64, 56, 56),
    (256, 256, 56, 56),
    (256, 128, 28, 28),
    (256, 512, 28, 28),
    (256, 256, 14, 14),
    (256, 1024, 14, 14),
    (256, 512, 7, 7),
    (256, 2048, 7, 7),
)
ROWS = ((4096, 1024), (65536, 256), (1048576, 64))
VARIANTS = ("bn", "bn+relu", "bn+add+relu")
_PLACES = (*product(IMAGES, ("contiguous", "channels_last")), *product(ROWS, ("rows",)))

EVERY = [
    Case(*place, dtype, variant, mode)
    for mode, dtype, variant in product(("train", "eval"), ("bfloat16", "float32"), (*VARIANTS, "bn+silu"))
    for place in _PLACES
]
"""`--full`."""

DEFAULT = [case for case in EVERY if case.train and case.variant in VARIANTS and case.layout != "rows"]
"""Training of every image shape in both layouts and types."""

QUICK = [case for case in DEFAULT if case.shape in ((256, 64, 56, 56), (256, 512, 7, 7)) and case.variant == "bn+relu"]
"""`--quick`: a large and a small shape, BN+ReLU."""
