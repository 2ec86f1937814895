"""Forwards that must do what they did: one for each way in which fusing could go wrong."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it


class Base(nn.Module):
    """A convolution, a batch norm, a ReLU, and what else the forwards below use."""

    # Not where a forward changes what PyTorch keeps for its backward.
    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=0.5), nn.ReLU()
        self.bn2, self.extra = nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.Tanh())
        self.flag, self.slope = True, 0.3

    def double(self, x: Tensor) -> Tensor:
        return x.mul_(2.0)

    def branch(self, x: Tensor) -> Tensor:
        return self.bn(x) * 0.5


class PreActivationUsedToo(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        z = self.relu(y)
        return z - y


class PreActivationInTheSameStatement(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y) - y


class PreActivationInTheNextRound(Base):
    def forward(self, x):
        y = total = self.bn(x)
        for _ in range(2):
            total = total + y
            y = self.bn(self.conv(x))
        return self.relu(total)


class ReassignedUnread(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.flag:
            y = x
        return self.relu(y)


class ReturnedUnread(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.flag:
            return x
        return self.relu(y)


class DeletedUnread(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        del y
        return x


class NeverReturned(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if x is None:
            y = self.relu(y)


class OneArmDrops(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return x if self.flag else self.relu(y)


class LeavesALoop(Base):
    def forward(self, x):
        y = x
        for _ in range(2):
            y = self.bn(y)
            if self.flag:
                break
            y = self.relu(y)
        return y * 2


class ExceptionBetween(Base):
    def forward(self, x):
        y = x
        try:
            y = self.bn(self.conv(x))
            r = {}[0]
            y = self.relu(y + r)
        except KeyError:
            y = y * 2
        return y


class SuppressedBetween(Base):
    def forward(self, x):
        y = x
        with contextlib.suppress(KeyError):
            y = self.bn(self.conv(x))
            r = {}[0]
            y = self.relu(y + r)
        return y * 2


class ClosureReads(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        seen = [(lambda: y)() for _ in range(1)]
        y = self.relu(y)
        return y - seen[0]


class LocalsRead(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        r = locals()["y"] * 2
        y = self.relu(y)
        return y - r


class InputChangedBetween(Base):
    differentiable = False

    def forward(self, x):
        x = x * 1.0
        y = self.bn(x)
        r = self.double(x)
        y += r
        return self.relu(y)


class InputChangedInTheSum(Base):
    differentiable = False

    def forward(self, x):
        x = x * 1.0
        return self.relu(self.bn(x) + self.double(x))


class ConvolutionsOutputChangedBetween(Base):
    differentiable = False

    def forward(self, x):
        h = self.conv(x)
        y = self.bn(h)
        r = h.mul_(2.0)
        return self.relu(y + r)


class ConvolutionsOutputChangedInTheSum(Base):
    differentiable = False

    def forward(self, x):
        h = self.conv(x)
        h = self.bn(h) + h.mul_(2.0)
        return self.relu(h)


class ResidualChangedBetween(Base):
    differentiable = False

    def forward(self, x):
        x = x * 1.0
        y = self.bn(self.conv(x))
        y = y + x
        r = x.mul_(2.0)
        y = self.relu(y)
        return y - r


class SameLayerBetween(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        r = self.bn(x)
        y += r
        return self.relu(y)


class SameLayerInAMethodBetween(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        r = self.branch(x)
        y += r
        return self.relu(y)


class SameLayerByAnotherNameBetween(Base):
    def forward(self, x):
        norm = self.bn
        y = self.bn(self.conv(x))
        r = norm(x)
        y += r
        return self.relu(y)


class SameLayerInTheSum(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + self.bn(x * 3))


class SameLayerInAModuleBetween(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), self.bn)

    def forward(self, x):
        y = self.bn(self.conv(x))
        r = self.inner(x)
        y += r
        return self.relu(y)


class GradientsOffBetween(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        torch.set_grad_enabled(False)
        y = self.relu(y)
        torch.set_grad_enabled(True)
        return y


class ResidualBroadcasts(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))


class ResidualIsANumber(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        y += 0.5
        return self.relu(y)


class ResidualPromotes(Base):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x.double())


class ResidualOfLowerPrecisionInPlace(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        y += x.bfloat16()
        return self.relu(y)


class TheOtherOperandIsChanged(Base):
    differentiable = False

    def forward(self, x):
        x = seen = x * 1.0
        x += self.bn(self.conv(x))
        return self.relu(x) - seen


class AddedWithAFactor(Base):
    def forward(self, x):
        return self.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))


class GeluByTanh(Base):
    def forward(self, x):
        return F.gelu(self.bn(self.conv(x)), approximate="tanh")


class EluOfAnotherAlpha(Base):
    def forward(self, x):
        return F.elu(self.bn(self.conv(x)), 2.0)


class ModeDecides(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.training:  # noqa: SIM108 - two statements, as models have it
            y = self.relu(y)
        else:
            y = y.tanh()
        return F.dropout(y, 0.5, self.training)


class DataDecides(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        if x.sum() > 0:
            y = y + x
        return self.relu(y)


class Mangled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.__norm = nn.BatchNorm2d(3)

    def forward(self, x, *, scale: float = 2.0):
        assert super().extra_repr() == ""
        return self.relu(self.__norm(self.conv(x))) * scale


class RepeatedSum(Base):
    def forward(self, x):
        y = self.bn(self.conv(x))
        y = y + x
        y = y + x
        return self.relu(y)


class Residual(Base):
    """Not a hazard: what is fused here, the tests change afterwards."""

    def forward(self, x):
        y = self.conv(x)
        y = self.bn(y)
        r = self.extra(x)
        y += r
        return self.relu(y)


class WithoutGradients(nn.Module):
    """Ends in a batch norm that runs without gradients, and in one whose error it handles."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.bn, self.how = nn.BatchNorm2d(3), how

    def forward(self, x):
        if self.how == "with":
            with torch.no_grad():
                return self.bn(x)
        try:
            return self.bn(x[:, :2])
        except (RuntimeError, ValueError):
            return x


class TailWithoutGradients(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = WithoutGradients("with"), WithoutGradients("try")

    def forward(self, x):
        x = self.conv(x)
        return self.relu(self.first(x) + x) + self.relu(self.second(x))


class Switched(Base):
    """What is done under a condition that does not hold when it is converted."""

    differentiable = False

    def forward(self, x):
        x = x * 1.0
        y = self.bn(self.conv(x))
        if not self.flag:
            y = y + x
        r = x.mul_(2.0)
        y = self.relu(y)
        return y - r


HAZARDS: dict[str, type[Base]] = {
    cls.__name__: cls for cls in list(globals().values()) if isinstance(cls, type) and issubclass(cls, Base)
}
del HAZARDS["Base"], HAZARDS["Residual"], HAZARDS["Switched"]
