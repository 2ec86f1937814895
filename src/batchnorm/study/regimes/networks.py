"""The small networks that the study of regimes trains: two convolutions, each with a norm and a ReLU, a mean, a map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from batchnorm.layers import BatchNorm1d

CHANNELS = (16, 32)
MakeNorm = Callable[[int], nn.Module]


class Images(nn.Module):
    """Images (N, 1, 8, 8) to logits (N, classes)."""

    def __init__(self, classes: int, norm: MakeNorm) -> None:
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
        self.output = nn.Linear(second, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.body(images).mean((2, 3)))  # type: ignore[no-any-return]


class Sequences(nn.Module):
    """Padded sequences (N, features, L) of the given lengths to logits; the mean is over valid positions in any case.

    how: "padding counted" normalizes over all positions, "outputs masked" too and sets padded ones to 0 afterwards;
    "lengths" normalizes over valid positions. "no norm" sets padded positions to 0.
    """

    def __init__(self, features: int, classes: int, how: str) -> None:
        super().__init__()
        first, second = CHANNELS
        self.how = how
        self.maps = nn.ModuleList([nn.Conv1d(features, first, 3, padding=1), nn.Conv1d(first, second, 3, padding=1)])
        made = [nn.Identity(), nn.Identity()] if how == "no norm" else [BatchNorm1d(first), BatchNorm1d(second)]
        self.norms = nn.ModuleList(made)
        self.output = nn.Linear(second, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        valid = (torch.arange(x.shape[2]) < lengths[:, None])[:, None]
        for convolution, norm in zip(self.maps, self.norms, strict=True):
            x = convolution(x)
            x = norm(x, lengths=lengths) if self.how == "lengths" else norm(x)
            x = torch.relu(x if self.how == "padding counted" else x * valid)
        return self.output((x * valid).sum(2) / lengths[:, None])  # type: ignore[no-any-return]
