"""Bad calls: the error is of the type that PyTorch raises on the same call, in one line that names what to change."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

import batchnorm as bn
from batchnorm.kernels.contract import Tap

X = torch.linspace(-1, 1, 24).view(4, 3, 2)
C = torch.arange(1.0, 4.0)
TWO = torch.ones(2)
STATS = {"running_mean": C, "running_var": C}


def refused(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Exception:
    """The error that the call raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized and sparse tensors announce their own fate
        with pytest.raises(Exception) as caught:  # noqa: PT011 - its type is what is asked
            function(*args, **kwargs)
    return caught.value


def compressed() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ones(4, 3).to_sparse_csr()


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)


# (what is wrong, arguments over the good call's, the argument that the message must name, the remedy in it)
CALLS: dict[str, tuple[dict[str, Any], str, str]] = {
    "int8 input": ({"input": X.to(torch.int8)}, "input", r"input\.float\(\)"),
    "int64 input": ({"input": X.long()}, "input", r"input\.float\(\)"),
    "bool input": ({"input": X > 0}, "input", r"input\.float\(\)"),
    "complex input": ({"input": X.cfloat()}, "input", "view_as_real"),
    "float8 input": ({"input": X.to(torch.float8_e4m3fn)}, "input", r"input\.float\(\)"),
    "float8 everywhere": (
        {n: t.to(torch.float8_e5m2) for n, t in {"input": X, **STATS}.items()},
        "input",
        r"input\.float\(\)",
    ),
    "float64 input": ({"input": X.double()}, "input", "one type"),
    "float64 weight": ({"weight": C.double()}, "weight", "one type"),
    "float64 bias": ({"bias": C.double()}, "bias", "one type"),
    "float16 statistics": ({"running_mean": C.half(), "running_var": C.half()}, "running_mean", "one type"),
    "bfloat16 input, mixed rest": ({"input": X.bfloat16(), "weight": C.bfloat16()}, "weight", "one type"),
    "2 running_mean": ({"running_mean": TWO}, "running_mean", "num_features=3"),
    "2 running_var": ({"running_var": TWO}, "running_var", "num_features=3"),
    "2 weight": ({"weight": TWO}, "weight", "num_features=3"),
    "2 bias": ({"bias": TWO}, "bias", "num_features=3"),
    "channels last by shape": ({"input": X.transpose(1, 2)}, "running_mean", "channels second"),
    "no running_mean": ({"running_mean": None}, "running_mean", "both or neither|pass the running statistics"),
    "no running_var": ({"running_var": None}, "running_var", "both or neither|pass the running statistics"),
    "1-D input": ({"input": torch.ones(3)}, "input", "add the batch"),
    "0-D input": ({"input": torch.tensor(1.0)}, "input", "add the batch"),
    "NumPy input": ({"input": X.numpy()}, "input", "torch.as_tensor"),
    "list input": ({"input": X.tolist()}, "input", "torch.as_tensor"),
    "None input": ({"input": None}, "input", "torch.as_tensor"),
    "meta input": ({"input": X.to("meta")}, "input", r"\.to\('meta'\)"),
    "meta weight": ({"weight": C.to("meta")}, "weight", r"\.to\('cpu'\)"),
    "meta statistics": ({"running_mean": C.to("meta"), "running_var": C.to("meta")}, "running_mean", r"\.to\('cpu'\)"),
    "sparse input": ({"input": X.to_sparse()}, "input", "to_dense"),
    "compressed input": ({"input": compressed()}, "input", "to_dense"),
    "quantized input": ({"input": quantized()}, "input", "dequantize"),
    "momentum None": ({"momentum": None}, "momentum", "layer's option"),
    "momentum text": ({"momentum": "0.1"}, "momentum", "float"),
    "momentum complex": ({"momentum": 1j}, "momentum", "float"),
    "running_mean differentiated": ({"running_mean": C.clone().requires_grad_()}, "running_mean", r"detach\(\)"),
    "running_var differentiated": ({"running_var": C.clone().requires_grad_()}, "running_var", r"detach\(\)"),
}
TRAINING = {
    "one value per channel": ({"input": X[:1, :, :1]}, "input", "larger batch"),
    "one row": ({"input": X[:1, :, 0]}, "input", "drop_last"),
    "eps 0": ({"eps": 0.0}, "eps", "1e-5"),
    "eps negative": ({"eps": -1e-5}, "eps", "1e-5"),
    "training 1": ({"training": 1}, "training", "True or False"),
    "training text": ({"training": "yes"}, "training", "True or False"),
}
INFERENCE = {
    "eps negative": ({"eps": -1e-5}, "eps", "1e-5"),
    "training 0": ({"training": 0}, "training", "True or False"),
    "training None": ({"training": None}, "training", "True or False"),
    "no statistics": ({"running_mean": None, "running_var": None}, "running_mean and running_var", "training=True"),
}
ALL = [
    *[pytest.param(mode, call, id=f"{mode}-{name}") for mode in (True, False) for name, call in CALLS.items()],
    *[pytest.param(True, call, id=f"True-{name}") for name, call in TRAINING.items()],
    *[pytest.param(False, call, id=f"False-{name}") for name, call in INFERENCE.items()],
]


def harmless(training: bool, call: dict[str, Any]) -> bool:
    """Inference does not differentiate by the statistics in PyTorch unless the input wants a gradient."""
    return not training and any(isinstance(v, torch.Tensor) and v.requires_grad for v in call.values())


@pytest.mark.parametrize(("training", "bad"), ALL)
def test_a_bad_call_is_refused_as_by_pytorch_and_explained(training: bool, bad: tuple[dict, str, str]) -> None:
    call, culprit, remedy = bad
    arguments = {"input": X, **STATS, "training": training, **call}
    if harmless(training, call):
        arguments["input"] = X.clone().requires_grad_()
    theirs = type(refused(F.batch_norm, **_copies(arguments)))
    ours = refused(bn.functional.batch_norm, **_copies(arguments))
    assert isinstance(ours, theirs), f"{type(ours)} is no {theirs}: {ours}"
    message = str(ours)
    assert "\n" not in message
    assert culprit in message
    assert re.search(remedy, message), message


def _copies(arguments: dict[str, Any]) -> dict[str, Any]:
    """Statistics move in place: each call gets its own, where they can be copied."""
    return {
        name: value.clone() if name.startswith("running") and value is not None and not value.requires_grad else value
        for name, value in arguments.items()
    }


# Forward-mode differentiation compiles PyTorch's own decompositions with torch.jit.script, which PyTorch deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_with_a_forward_gradient_are_refused_in_inference(name: str) -> None:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, torch.ones_like(X))
        stats = {**STATS, name: forward_ad.make_dual(C.clone(), torch.ones(3))}
        theirs = refused(F.batch_norm, x, **stats)
        ours = refused(bn.functional.batch_norm, x, **stats)
    assert isinstance(ours, type(theirs))
    assert str(ours) == f"{name} carries a forward gradient, but it is a constant of the transform: pass its primal"


LAYER_CALLS = {
    "1d, 4-D": (torch.nn.BatchNorm1d, X[..., None], "2D or 3D"),
    "1d, 1-D": (torch.nn.BatchNorm1d, C, "2D or 3D"),
    "2d, 3-D": (torch.nn.BatchNorm2d, X, "4D"),
    "2d, 5-D": (torch.nn.BatchNorm2d, X[..., None, None], "4D"),
    "3d, 4-D": (torch.nn.BatchNorm3d, X[..., None], "5D"),
    "list": (torch.nn.BatchNorm1d, X.tolist(), "torch.Tensor"),
    "None": (torch.nn.BatchNorm2d, None, "torch.Tensor"),
    "numpy": (torch.nn.BatchNorm1d, X.numpy(), "torch.Tensor"),
    "channels": (torch.nn.BatchNorm1d, X.transpose(1, 2), "num_features=2"),
    "integer": (torch.nn.BatchNorm1d, X.int(), "float"),
    "float64": (torch.nn.BatchNorm1d, X.double(), "mixed dtype"),
    "one value": (torch.nn.BatchNorm1d, X[:1, :, :1], "more than 1 value"),
}


@pytest.mark.parametrize("tap", [False, True], ids=["", "tapped"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", LAYER_CALLS)
def test_a_layer_refuses_as_torch_nns_and_moves_no_more(call: str, training: bool, tap: bool) -> None:
    cls, x, words = LAYER_CALLS[call]
    ours, theirs = getattr(bn, cls.__name__)(3).train(training), cls(3).train(training)
    ours._tap = Tap() if tap else None
    if call == "one value" and not training:
        torch.testing.assert_close(ours(x), theirs(x))
        return
    expected, error = refused(theirs, x), refused(ours, x)
    assert isinstance(error, type(expected)), f"{error!r} is no {expected!r}"
    assert words in str(error)
    assert "\n" not in str(error)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("residual", "error", "words"),
    [
        (X.tolist(), TypeError, "residual must be a torch.Tensor, got list"),
        (X.numpy(), TypeError, "residual must be a torch.Tensor, got ndarray"),
        (X[:2], ValueError, r"residual must have the input's shape \(4, 3, 2\), got \(2, 3, 2\)"),
        (X[:1], ValueError, "expand it first"),
        (X.to("meta"), RuntimeError, "residual is on meta, the input on cpu"),
        (X.int(), TypeError, "residual must be dense and of a floating-point type, got torch.int32"),
        (X.cfloat(), TypeError, "floating-point"),
        (X.to_sparse(), TypeError, "dense"),
    ],
    ids=lambda v: "" if isinstance(v, torch.Tensor | list | np.ndarray) else getattr(v, "__name__", v),
)
def test_a_bad_residual_is_refused_before_anything_moves(residual: Any, error: type, words: str) -> None:
    layer = bn.BatchNorm1d(3, act="relu")
    with pytest.raises(error, match=words):
        layer(X, residual)
    assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        ("rleu", ValueError, "unknown act 'rleu': use None or one of 'elu', 'gelu'"),
        ("ReLU", ValueError, "unknown act"),
        ("", ValueError, "unknown act ''"),
        (torch.nn.ReLU(), TypeError, "got ReLU: pass the activation by its name"),
        (torch.relu, TypeError, "by its name"),
        (True, TypeError, "got bool"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda act: bn.BatchNorm2d(3, act=act),
        lambda act: bn.LazyBatchNorm2d(act=act),
        lambda act: bn.functional.batch_norm(X, C, C, act=act),
    ],
    ids=["layer", "lazy", "functional"],
)
def test_an_unknown_activation_is_refused_with_the_names(call: Callable, act: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        call(act)


def test_eps_0_is_fine_in_inference() -> None:
    ours, theirs = (f(X, C, C, eps=0.0) for f in (bn.functional.batch_norm, F.batch_norm))
    assert torch.equal(ours, theirs)
