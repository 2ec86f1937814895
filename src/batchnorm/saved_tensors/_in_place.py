"""PyTorch's error of a saved tensor that was changed in place; where hooks are active, PyTorch does not raise it.

Its wording differs between versions of PyTorch: it is read from an error that PyTorch raises.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_SAMPLE = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: "
    "[torch.FloatTensor [1]], which is output 0 of Exp, is at version 1; expected version 0 instead."
)


def message(tensor: Tensor, origin: tuple[int, str] | None, version: int) -> str:
    """The message for a tensor of another version; `origin` is the number of the output and the node's name."""
    sample = _sample()
    described = ""
    if origin is not None:
        number, name = origin
        described = f", which is output {number} of {_name(name, sample)},"
    sample = sample.replace("[torch.FloatTensor [1]]", f"[{tensor.type()} {list(tensor.shape)}]")
    sample = re.sub(r", which is output 0 of Exp\w*,", described, sample)
    return sample.replace(
        "is at version 1; expected version 0 instead",
        f"is at version {tensor._version}; expected version {version} instead",
    )


def _name(name: str, sample: str) -> str:
    """A node's name as the message has it: some versions leave Backward0 out."""
    return re.sub(r"Backward\d*$", "", name) if " of Exp," in sample else name


def _sample() -> str:
    """The message for the result of exp(), of one float32 number, after one change."""
    with torch.enable_grad(), torch._C.DisableTorchFunction():
        result = torch.zeros(1, dtype=torch.float32, device="cpu", requires_grad=True).exp()
        result.detach().add_(1)
        try:
            result.grad_fn._saved_result  # type: ignore[union-attr]  # noqa: B018 - reading it checks the version
        except RuntimeError as error:
            return str(error)
    return _SAMPLE  # the backward runs inside of other hooks, where no version is checked
