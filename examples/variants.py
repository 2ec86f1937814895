"""When is each layer for unusual batches worth it? Trains small networks on scikit-learn's digits and compares.

    python examples/variants.py                      # 5 seeds, 400 steps: about 12 minutes on 2 cores
    python examples/variants.py --seeds 1 --steps 50

A case is a way of drawing batches; its arms are the networks compared on it. All arms of a case and seed start with the
same weights and train on the same batches for the same number of steps. An arm is better (worse) than its reference if
at least 3 seeds were run, all agree, and the median difference in accuracy is at least one point.

mean off: in the first norm, the distance between running mean and the mean over all training data (over valid
positions of padded sequences), in standard deviations, as an RMS over units.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

import batchnorm as bn
from batchnorm.study.data import load

REFERENCE = "batch norm"
LARGE = 32
GHOST = 16
CHANNELS = (16, 32)
CLASSES, SIDE = 10, 8
RECALIBRATED = "recalibrated"  # the reference, trained, then recalibrated
MakeNorm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Case:
    """A name, the batch size, how batches are drawn, the arms, and the arm that the others are compared with.

    draw: "iid"; "sorted", two classes per batch; "domains", images and their negatives alternately; "padded".
    """

    name: str
    size: int
    draw: str
    arms: tuple[str, ...]
    reference: str = REFERENCE


_SMALL = ("no norm", "group norm", REFERENCE, RECALIBRATED, "renorm", "accumulate", "synchronized")
_COMMON = ("no norm", "group norm", REFERENCE, RECALIBRATED, "renorm")
CASES = (
    *(Case(f"batches of {size}", size, "iid", _SMALL) for size in (2, 4, 8, LARGE)),
    Case("batches of 128", 128, "iid", (REFERENCE, "ghost")),
    Case("two classes a batch", LARGE, "sorted", (*_COMMON, "frozen after a fifth")),
    Case("images and negatives by turns", LARGE, "domains", (*_COMMON, "by domain")),
    Case(
        "padded to the longest of 16",
        16,
        "padded",
        ("no norm", "padding counted", "outputs masked", "lengths"),
        "padding counted",
    ),
)


@dataclass(frozen=True)
class Result:
    """One arm of one case and seed. accuracy, loss: on held-out images, in eval mode."""

    case: str
    arm: str
    seed: int
    accuracy: float
    loss: float
    mean_off: float


class Images(nn.Module):
    """Images (N, 1, 8, 8) to logits (N, 10): two convolutions with a norm and a ReLU each, a mean, a linear layer."""

    def __init__(self, norm: MakeNorm) -> None:
        super().__init__()
        first, second = CHANNELS
        self.body = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1),
            norm(first),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            norm(second),
            nn.ReLU(),
        )
        self.output = nn.Linear(second, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.body(images).mean((2, 3)))


class Sequences(nn.Module):
    """Padded sequences (N, 8, L) of the given lengths to logits; the mean is over valid positions in any case.

    arm: "padding counted" normalizes over all positions; "outputs masked" does too, then sets padded ones to 0;
    "lengths" normalizes over valid positions. "no norm" sets padded positions to 0.
    """

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.arm = arm
        sizes = (SIDE, *CHANNELS)
        self.maps = nn.ModuleList(nn.Conv1d(i, o, 3, padding=1) for i, o in pairwise(sizes))
        self.norms = nn.ModuleList(nn.Identity() if arm == "no norm" else bn.BatchNorm1d(c) for c in CHANNELS)
        self.output = nn.Linear(CHANNELS[-1], CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        valid = (torch.arange(x.shape[2]) < lengths[:, None])[:, None]
        for convolution, norm in zip(self.maps, self.norms, strict=True):
            x = convolution(x)
            x = norm(x, lengths=lengths) if self.arm == "lengths" else norm(x)
            x = torch.relu(x if self.arm == "padding counted" else x * valid)
        return self.output((x * valid).sum(2) / lengths[:, None])


def network(arm: str, case: Case, steps: int) -> nn.Module:
    """The network of an arm. The limits of renorm grow over the first half of the steps, after a tenth of them."""
    if case.draw == "padded":
        return Sequences(arm)
    growth = (steps // 10, max(steps // 2, steps // 10))
    norms: dict[str, MakeNorm] = {
        "no norm": lambda channels: nn.Identity(),
        "group norm": lambda channels: nn.GroupNorm(4, channels),
        "renorm": lambda channels: bn.BatchRenorm2d(channels, rmax_steps=growth, dmax_steps=growth),
        "accumulate": lambda channels: bn.BatchNorm2d(channels, accumulate=max(LARGE // case.size, 1)),
        "ghost": lambda channels: bn.GhostBatchNorm2d(channels, GHOST),
        "by domain": lambda channels: bn.DomainBatchNorm2d(channels, 2),
    }
    return Images(norms.get(arm, bn.BatchNorm2d))


def size_of(arm: str, case: Case) -> int:
    """Samples that an arm normalizes together: synchronized processes are one large batch by definition."""
    return max(case.size, LARGE) if arm == "synchronized" else case.size


def drawn(case: Case, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, int]]:
    """Endless: the rows of the next batch of LARGE or more, of which an arm takes its first part, and the domain."""
    generator = torch.Generator().manual_seed(seed)
    count = max(case.size, LARGE)
    by_class = [torch.nonzero(labels == number).view(-1) for number in range(CLASSES)]
    step = 0
    while True:
        pool = torch.arange(len(labels))
        if case.draw == "sorted":
            pool = torch.cat([by_class[(2 * step + i) % CLASSES] for i in range(2)])
        picked = pool[torch.randint(len(pool), (count,), generator=generator)]
        yield picked, step % 2 if case.draw == "domains" else 0
        step += 1


def stretched(images: Tensor, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 8, 8) as padded sequences of their rows: (N, 8, L) and lengths (N,).

    Each image has its own pace: every row is repeated 1 to 4 times. Padding is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    pace = torch.randint(1, 5, (len(rows),), generator=generator)
    lengths = images.shape[1] * pace
    positions = torch.arange(int(lengths.max()))[None]
    picked = images[rows[:, None], (positions // pace[:, None]).clamp(max=images.shape[1] - 1)]
    return (picked * (positions < lengths[:, None])[..., None]).transpose(1, 2), lengths


def batch_of(case: Case, images: Tensor, rows: Tensor, domain: int, seed: int) -> tuple[int, tuple[Tensor, ...]]:
    """The domain and the network's arguments."""
    if case.draw == "padded":
        return 0, stretched(images[:, 0], rows, seed)
    x = images[rows]
    return domain, (1 - x if domain else x,)


def forward(model: nn.Module, batch: tuple[int, tuple[Tensor, ...]]) -> Tensor:
    with bn.domain(batch[0]):
        return model(*batch[1])


def all_batches(case: Case, images: Tensor) -> list[Any]:
    """All training images, as this case presents them."""
    parts = torch.split(torch.arange(len(images)), 200)
    domains = (0, 1) if case.draw == "domains" else (0,)
    return [batch_of(case, images, rows, domain, at) for domain in domains for at, rows in enumerate(parts)]


def train(case: Case, arm: str, seed: int, steps: int, lr: float, images: Tensor, labels: Tensor) -> nn.Module:
    """A trained network in eval mode."""
    torch.manual_seed(seed)
    model = network(arm, case, steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    batches = drawn(case, labels, seed)
    for step in range(steps):
        if arm == "frozen after a fifth" and step == steps // 5:
            bn.freeze(model, gamma=False, beta=False)
        rows, domain = next(batches)
        rows = rows[: size_of(arm, case)]
        loss = F.cross_entropy(forward(model, batch_of(case, images, rows, domain, seed * steps + step)), labels[rows])
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def mean_off(model: nn.Module, case: Case, images: Tensor) -> float:
    """How far the first norm's running mean is from the mean of what it receives; NaN without one."""
    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    if not norms or isinstance(norms[0], bn.DomainBatchNorm2d):
        return float("nan")
    inputs: list[Tensor] = []
    if isinstance(model, Sequences):
        for _, (x, lengths) in all_batches(case, images):
            inputs.append(model.maps[0](x).transpose(1, 2)[torch.arange(x.shape[2]) < lengths[:, None]])
    else:
        hook = norms[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].movedim(1, -1).flatten(0, -2)))
        for batch in all_batches(case, images):
            forward(model, batch)
        hook.remove()
    whole = torch.cat(inputs).double()
    away = (norms[0].running_mean.double() - whole.mean(0)) / (whole.var(0, correction=0) + norms[0].eps).sqrt()
    return float(away.square().mean().sqrt())


@torch.no_grad()
def measured(model: nn.Module, case: Case, arm: str, seed: int, data: tuple[Tensor, ...]) -> Result:
    """Accuracy and loss on held-out images, over both domains where there are two."""
    images, _, test_images, test_labels = data
    domains = (0, 1) if case.draw == "domains" else (0,)
    rows = torch.arange(len(test_images))
    logits = torch.stack([forward(model, batch_of(case, test_images, rows, d, seed)).double() for d in domains])
    accuracy = float((logits.argmax(2) == test_labels).double().mean())
    loss = float(torch.stack([F.cross_entropy(each, test_labels) for each in logits]).mean())
    return Result(case.name, arm, seed, accuracy, loss, mean_off(model, case, images))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 1, 8, 8) in 0..1 and labels, then held-out ones."""
    data = load("digits")
    images = [torch.from_numpy(x).view(-1, 1, SIDE, SIDE) for x in (data.train_x, data.test_x)]
    labels = [torch.from_numpy(y) for y in (data.train_y, data.test_y)]
    return images[0], labels[0], images[1], labels[1]


def results(seeds: int, steps: int, lr: float) -> Iterator[Result]:
    """Train and measure every arm of every case."""
    data = digits()
    for seed in range(seeds):
        for case in CASES:
            for arm in (arm for arm in case.arms if arm != RECALIBRATED):
                model = train(case, arm, seed, steps, lr, data[0], data[1])
                yield measured(model, case, arm, seed, data)
                if arm == REFERENCE and RECALIBRATED in case.arms:
                    again = copy.deepcopy(model)
                    bn.recalibrate(again, all_batches(case, data[0]), forward, progress=False)
                    yield measured(again, case, RECALIBRATED, seed, data)


def verdict(gains: list[float]) -> str:
    """gains: differences in accuracy to the reference, in points, one per seed."""
    if len(gains) < 3:
        return "too few seeds"
    if abs(np.median(gains)) >= 1.0 and (min(gains) > 0 or max(gains) < 0):
        return "better" if np.median(gains) > 0 else "worse"
    return "no difference seen"


def summary(found: list[Result]) -> list[dict[str, Any]]:
    """One row per case and arm, over the seeds."""
    rows = []
    for case in CASES:
        against = {r.seed: r.accuracy for r in found if (r.case, r.arm) == (case.name, case.reference)}
        for arm in case.arms:
            mine = [r for r in found if (r.case, r.arm) == (case.name, arm)]
            if not mine:
                continue
            gains = [100 * (r.accuracy - against[r.seed]) for r in mine if arm != case.reference and r.seed in against]
            accuracies = [100 * r.accuracy for r in mine]
            rows.append(
                {
                    "case": case.name,
                    "arm": arm,
                    "accuracy": float(np.median(accuracies)),
                    "lowest": min(accuracies),
                    "highest": max(accuracies),
                    "mean_off": float(np.median([r.mean_off for r in mine])),
                    "points": float(np.median(gains)) if gains else None,
                    "verdict": verdict(gains) if gains else "",
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="steps of SGD for each arm")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    options = parser.parse_args()
    if options.seeds < 1 or options.steps < 1 or not options.lr > 0:
        parser.error("--seeds, --steps and --lr must be positive")
    found: list[Result] = []
    total = options.seeds * sum(len(case.arms) for case in CASES)
    try:
        for result in results(options.seeds, options.steps, options.lr):
            found.append(result)
            print(f"\r{len(found)} of {total}: {result.case}, {result.arm}\033[K", end="", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted: this is what was measured", file=sys.stderr)
    print(file=sys.stderr)
    rows = summary(found)
    if options.json:
        print(json.dumps([{k: None if v != v else v for k, v in row.items()} for row in rows], indent=2))
        return
    shown = None
    for row in rows:
        if row["case"] != shown:
            shown = row["case"]
            print(f"\n{shown}\n  {'':22}{'accuracy':>9}  {'over seeds':12} {'mean off':>8}  points")
        off = "" if row["mean_off"] != row["mean_off"] else f"{row['mean_off']:.2g}"
        points = "" if row["points"] is None else f"{row['points']:+6.1f}  {row['verdict']}"
        over = f"{row['lowest']:.1f}..{row['highest']:.1f}"
        print(f"  {row['arm']:22}{row['accuracy']:8.1f}%  {over:12} {off:>8}  {points}")


if __name__ == "__main__":
    main()
