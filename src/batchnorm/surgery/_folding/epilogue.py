"""What stands where a batch norm was once its scale and shift are in other weights: its activation, its addition."""

from __future__ import annotations

from torch import Tensor, nn

from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.aten import activate
from batchnorm.surgery._shared.activations import Activation, module_of
from batchnorm.surgery._shared.layers import act_of

__all__ = ["Epilogue", "remainder"]


class Epilogue(nn.Module):
    """y = act(x [+ residual]): what is left of a layer of this package that is called with a residual."""

    def __init__(self, act: str | None = None, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.act = act
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The residual, of the input's shape, is added before the activation."""
        return activate(input if residual is None else input + residual, self.act, self.negative_slope)

    def extra_repr(self) -> str:
        slope = (
            f", negative_slope={self.negative_slope}" if self.act is not None and ACTIVATIONS[self.act].slope else ""
        )
        return f"act={self.act}{slope}"


def remainder(norm: nn.Module, residual: bool) -> nn.Module:
    """A module that does what the norm does besides scaling and shifting: torch.nn's own where there is one for it."""
    activation = Activation(act_of(norm), vars(norm).get("negative_slope", 0.01))
    made = Epilogue(activation.act, activation.slope) if residual else module_of(activation)
    return made.eval()
