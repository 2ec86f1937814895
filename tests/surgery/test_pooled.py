"""The moments of what layers receive, and batches of any structure."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.restoring import unwrapped
from batchnorm.surgery._shared.calling import Feed, copy_to, show_progress
from batchnorm.surgery._shared.layers import find
from batchnorm.surgery._shared.measuring import moments_of, survey

Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 3), (64, 5, 9), (3, 4, 5, 6), (2, 3, 4, 5, 6)])
def test_moments_are_those_of_float64(shape: tuple[int, ...], dtype: torch.dtype, seed: int, kernel_route: str) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(shape) * 3 + 100).to(dtype)
    found = moments_of(x)
    values = x.double().transpose(0, 1).flatten(1).numpy()
    assert found.count == values.shape[1]
    narrow = dtype == torch.bfloat16  # whose sums within a block the compiled loops take in float32
    np.testing.assert_allclose(found.mean, values.mean(1), rtol=1e-7 if narrow else 1e-12)
    np.testing.assert_allclose(found.var, values.var(1), rtol=1e-5 if narrow else 1e-9)
    assert found.mean.dtype == found.m2.dtype == np.float64


def test_moments_of_large_inputs_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.surgery._shared.measuring.AT_ONCE", 50)
    x = torch.randn(33, 4, 5, dtype=torch.float64)
    found = moments_of(x)
    np.testing.assert_allclose(found.var, x.transpose(0, 1).flatten(1).numpy().var(1), rtol=1e-12)
    assert moments_of(x.new_ones(1, 60)).count == 1


class Keyword(nn.Module):
    """Calls its norm by keyword, and twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = x if scale is None else x * scale
        return self.norm(input=self.norm(input=x))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d])
def test_every_call_is_recorded(kind: type[nn.Module]) -> None:
    model = Keyword().eval()
    model.norm = kind(3).eval()
    x = torch.randn(10, 3)
    norms, _ = find("recalibrate", model)
    with show_progress("test", False) as follow, torch.no_grad():
        found = survey(Feed("test", model, x.split(5), None), norms, follow)
    (norm,) = norms
    assert (found.moments[norm].count, found.calls[norm], found.used) == (20, 2, 2)
    both = torch.cat([x, model.norm(x)])
    np.testing.assert_allclose(found.moments[norm].mean, both.mean(0).detach(), rtol=1e-5, atol=1e-6)
    assert not model.norm._forward_pre_hooks


X = torch.arange(12.0).view(4, 3)


@pytest.mark.parametrize(
    ("batch", "forward_fn"),
    [
        (X, None),
        ((X, "label"), None),
        ([X], None),
        (Pair(X, 1), None),
        ({"x": X}, None),
        (UserDict(x=X / 2, scale=torch.tensor(2.0)), None),
        ("four", lambda model, batch: model({"four": X}[batch])),
        ({"image": [X]}, lambda model, batch: model(batch["image"][0])),
    ],
    ids=["tensor", "tuple", "list", "named tuple", "dict", "mapping", "other", "nested"],
)
def test_a_batch_of_any_structure(batch: Any, forward_fn: Any) -> None:
    model = Keyword().eval()
    norms, _ = find("recalibrate", model)
    with show_progress("test", None) as follow:
        found = survey(Feed("test", model, [batch], forward_fn), norms, follow)
    assert found.moments[norms[0]].count == 8


@pytest.mark.parametrize("batch", [3, "text", (), [], None])
def test_a_batch_that_no_model_takes(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"test: a batch is a tensor.*: pass forward_fn\(model, batch\) for any other"):
        Feed("test", Keyword(), [batch], None).run(batch)


@pytest.mark.parametrize("batches", [X, {"x": X}, 3, "text", None])
def test_invalid_batches(batches: Any) -> None:
    with pytest.raises(TypeError, match=r"test: batches must be a list .* for a single batch pass \[batch\]"):
        Feed("test", Keyword(), batches, None)


def test_tensors_move_wherever_they_are() -> None:
    class Own:
        def to(self, device: torch.device) -> tuple[str, torch.device]:
            return "moved", device

    meta = torch.device("meta")
    packed = nn.utils.rnn.pack_sequence([X])
    given = {
        "list": [X, (X, 1)],
        "named": Pair(X, "a"),
        "ordered": OrderedDict(a=X),
        "default": defaultdict(list, a=X),
        "own": Own(),
        "packed": packed,
        "text": "text",
    }
    found = copy_to(given, meta)
    assert found["list"][0].is_meta
    assert found["list"][1][0].is_meta
    assert found["list"][1][1] == 1
    assert type(found["named"]) is Pair
    assert found["named"].image.is_meta
    assert type(found["ordered"]) is OrderedDict
    assert found["ordered"]["a"].is_meta
    assert found["default"].default_factory is list
    assert found["default"]["a"].is_meta
    assert found["own"] == ("moved", meta)
    assert found["packed"].data.is_meta
    assert found["text"] == "text"
    assert given["list"][0] is X


def test_batches_are_copied_since_a_model_may_write_to_them() -> None:
    (copied,) = Feed("test", nn.Identity(), [X], None).read()
    assert copied is not X
    copied.zero_()
    assert X.any()


def test_wrappers_are_unwrapped() -> None:
    model = Keyword()
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(torch.compile(model, backend="eager")) is model
    assert unwrapped(model) is model
