"""What the study of regimes compares: cases, each a way in which batches come, and the arms that are trained on them.

The arms of a case and seed start at the same weights and see the same batches, in the same number of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.layers import BatchNorm2d
from batchnorm.study.regimes.networks import MakeNorm
from batchnorm.variants.domains import DomainBatchNorm2d
from batchnorm.variants.ghost import GhostBatchNorm2d
from batchnorm.variants.renorm import BatchRenorm2d

REFERENCE = "batch norm"
LARGE = 32
GROUPS = 4
GHOST = 16


@dataclass(frozen=True)
class Case:
    """One situation: its part of the study, its name, the batches' size and how they are drawn, and its arms.

    draw: "iid"; "sorted", two classes a batch; "domains", images and their negatives by turns; "padded".
    """

    part: str
    name: str
    size: int
    draw: str
    arms: tuple[str, ...]


SMALL = ("no norm", "group norm", REFERENCE, "recalibrated", "renorm", "accumulate", "synchronized")
CASES: tuple[Case, ...] = (
    *(Case("small batches", f"batches of {size}", size, "iid", SMALL) for size in (2, 4, 8, LARGE)),
    Case("small batches", "batches of 128", 128, "iid", (REFERENCE, "ghost")),
    Case(
        "batches not drawn at random",
        "two classes a batch",
        LARGE,
        "sorted",
        ("no norm", "group norm", REFERENCE, "recalibrated", "renorm", "frozen after a fifth"),
    ),
    Case(
        "batches not drawn at random",
        "images and negatives by turns",
        LARGE,
        "domains",
        ("no norm", "group norm", REFERENCE, "recalibrated", "renorm", "by domain"),
    ),
    Case(
        "padded sequences",
        "padded to the longest of 16",
        16,
        "padded",
        ("no norm", "padding counted", "outputs masked", "lengths"),
    ),
)


def norm_of(arm: str, case: Case, steps: int) -> MakeNorm:
    """What makes an arm's norms. The limits of renorm grow over the first half of the steps, after a tenth of them."""
    growth = (steps // 10, max(steps // 2, steps // 10))
    made: dict[str, MakeNorm] = {
        "no norm": lambda channels: nn.Identity(),
        "group norm": lambda channels: nn.GroupNorm(GROUPS, channels),
        "renorm": lambda channels: BatchRenorm2d(channels, rmax_steps=growth, dmax_steps=growth),
        "accumulate": lambda channels: BatchNorm2d(channels, accumulate=max(LARGE // case.size, 1)),
        "ghost": lambda channels: GhostBatchNorm2d(channels, GHOST),
        "by domain": lambda channels: DomainBatchNorm2d(channels, 2),
    }
    return made.get(arm, BatchNorm2d)


def size_of(arm: str, case: Case) -> int:
    """The samples that an arm normalizes together. Processes that synchronize are one batch by definition."""
    return max(case.size, LARGE) if arm == "synchronized" else case.size


def drawn(case: Case, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, int]]:
    """Without end: the rows of the next batch of LARGE or more, of which an arm takes its part, and its domain."""
    generator = torch.Generator().manual_seed(seed)
    many = max(case.size, LARGE)
    classes = int(labels.max()) + 1
    by_class = [torch.nonzero(labels == number).view(-1) for number in range(classes)]
    step = 0
    while True:
        if case.draw == "sorted":
            known = torch.cat([by_class[(2 * step + i) % classes] for i in range(2)])
            picked = known[torch.randint(len(known), (many,), generator=generator)]
        else:
            picked = torch.randint(len(labels), (many,), generator=generator)
        yield picked, step % 2 if case.draw == "domains" else 0
        step += 1


def stretched(images: Tensor, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 8, 8) as padded sequences of their rows, each image at a pace of its own: (N, 8, L) and lengths (N,).

    Every row is repeated 1 to 4 times, so that sequences have 8 to 32 positions; padding is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    pace = torch.randint(1, 5, (len(rows),), generator=generator)
    lengths = images.shape[1] * pace
    longest = int(lengths.max())
    at = torch.arange(longest)[None] // pace[:, None]
    valid = torch.arange(longest)[None] < lengths[:, None]
    picked = images[rows[:, None], at.clamp(max=images.shape[1] - 1)] * valid[..., None]
    return picked.transpose(1, 2), lengths
