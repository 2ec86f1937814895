"""No speed without correctness: what is asked of each contender before its time is taken.

Ours is held to `criterion` against float64: y, all gradients and the running statistics, on as many channels as take
little time, the first and the last among them. All channels of all contenders, ours too, must resemble PyTorch's: that
finds what was left unwritten, and that a contender computes the same thing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.testing import (
    Call,
    Outputs,
    select,
    verdicts,
)

COMPARED = 1 << 20
"""How many values of x are compared in float64; at least two channels."""

_ASTRAY = 0.02


def compared_channels(call: Call, seed: int, values: int = COMPARED) -> Tensor:
    """The channels to compare with float64, in order: all if they are few, else the first, the last and random ones."""
    count = call.x.shape[1]
    wanted = min(count, max(2, values * count // max(call.x.numel(), 1)))
    if wanted == count:
        return torch.arange(count)
    inner = 1 + torch.randperm(count - 2, generator=torch.Generator().manual_seed(seed))[: wanted - 2]
    return torch.cat([torch.tensor([0, count - 1]), inner]).sort().values


def clear_of_kinks(call: Call, chosen: Tensor) -> None:
    """In training, remove from grad_y, in place, what would meet a derivative that is anyone's guess."""
    if call.training:
        call.grad_y.index_copy_(1, chosen.to(call.grad_y.device), call.channels(chosen).away_from_kinks().grad_y)


def errors(ours: Outputs, theirs: Outputs, call: Call, chosen: Tensor) -> list[str]:
    """What is wrong with ours beside PyTorch's: nothing, or a line for each tensor."""
    part = {name: select(value, chosen) for name, value in ours.items() if value is not None}
    other = {name: select(value, chosen) for name, value in theirs.items() if value is not None}
    wrong = [verdict.worst() for verdict in verdicts(part, other, call.channels(chosen)) if not verdict.good]
    return wrong + differences(ours, theirs)


def differences(ours: Outputs, theirs: Outputs) -> list[str]:
    """Where one differs from PyTorch's beyond rounding: a line for each tensor of which a channel is astray.

    A channel is where more than 2% of its values differ by more than a twentieth (a tenth in 16 bits) of the tensor's
    mean magnitude. Fewer may: at a kink of the activation, rounding decides between two derivatives.
    """
    found = []
    for name, mine in ours.items():
        other = theirs.get(name)
        if mine is None or other is None:
            continue
        tolerance = (0.1 if mine.element_size() < 4 else 0.05) * float(other.abs().mean(dtype=torch.float32)) + 1e-6
        astray = (mine - other).abs() <= tolerance
        if mine.dim() == 1:
            # A sum over a channel moves with every rounding in it; only a lost part of it is seen here.
            spread = 0.25 * float(other.std(correction=0)) + tolerance
            astray = (mine - other).abs() <= spread
        share = 1 - astray.float().mean([d for d in range(astray.dim()) if d != 1]) if mine.dim() > 1 else ~astray
        count = int((share > _ASTRAY).sum())
        if count:
            found.append(f"{name}: {count} of {share.numel()} channels are not PyTorch's")
    return found
