"""run.log stores the value at the time of the call and refuses values that are not numbers."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.runs.run import RunError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def step(model: nn.Module) -> torch.Tensor:
    loss = model(torch.randn(6, 4)).square().mean() + model[0].weight.square().sum()
    loss.backward()
    return loss


def test_a_logged_tensor_may_be_updated_in_place(tmp_path: Path) -> None:
    model = network()
    total, average, array = torch.zeros(()), torch.zeros(1), np.zeros(())
    view = average[0]
    want = []
    with bn.watch(model, tmp_path) as run:
        for _ in range(6):
            loss = step(model).detach()
            total += loss
            average.mul_(0.9).add_(loss, alpha=0.1)
            array += float(loss)
            run.log(total=total, average=average, view=view, array=array)
            want.append([float(total), float(average), float(view), float(array)])
    assert run.table("log")["value"].to_pylist() == np.ravel(want).tolist()
    assert len(set(np.ravel(want))) > 12, "the values moved"


class Unwilling:
    def __float__(self) -> float:
        raise KeyError("no")


NOT_NUMBERS: dict[str, Any] = {
    "array of 2": np.array([1.0, 2.0]),
    "tensor of 2": torch.ones(2),
    "empty tensor": torch.ones(0),
    "complex": 1 + 1j,
    "complex tensor": torch.tensor(1 + 1j),
    "complex array": np.array(1 + 1j),
    "numpy complex": np.complex64(1 + 1j),
    "meta tensor": torch.empty((), device="meta"),
    "too large": 10**400,
    "too large to print": 10**5000,
    "text": "0.5",
    "numpy text": np.str_("0.5"),
    "None": None,
    "signaling NaN": Decimal("sNaN"),
    "raises": Unwilling(),
    "list": [1.0],
}


@pytest.mark.parametrize("name", NOT_NUMBERS)
def test_values_that_are_not_numbers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = network()
    with bn.watch(model, tmp_path, schedule=bn.every(1)) as run:
        for number in range(4):
            step(model)
            with pytest.raises(TypeError, match=r"^run\.log takes numbers and tensors of one value, got bad of type "):
                run.log(good=1.0, bad=NOT_NUMBERS[name])
            run.log(loss=float(number))
    assert run.info["status"] == "complete"
    assert run.info["errors"] == []
    rows = run.table("log").to_pylist()
    assert [(row["name"], row["value"]) for row in rows] == [("loss", float(number)) for number in range(4)]


@pytest.mark.parametrize("at", [float("nan"), 2**63, -(2**70), "x", torch.ones(2), object()])
def test_invalid_steps_are_refused(at: Any, tmp_path: Path) -> None:
    with bn.watch(network(), tmp_path) as run:
        with pytest.raises(TypeError, match=r"run\.log takes a 64-bit integer for step"):
            run.log(step=at, loss=1.0)
        run.log(step=2**63 - 1, loss=1.0)
        run.log(step=torch.tensor(3), loss=2.0)
    assert run.table("log")["step"].to_pylist() == [2**63 - 1, 3]


def test_every_kind_of_number_is_one(tmp_path: Path) -> None:
    values = {
        "bool": True,
        "decimal": Decimal("0.5"),
        "fraction": Fraction(1, 4),
        "numpy": np.float32(0.25),
        "array": np.array([[2]]),
        "bfloat16": torch.tensor(0.5, dtype=torch.bfloat16),
        "truth": torch.tensor([[True]]),
        "parameter": nn.Parameter(torch.tensor(3.0)),
        "nan": float("nan"),
    }
    with bn.watch(network(), tmp_path) as run:
        run.log(**values)
    np.testing.assert_array_equal(run.table("log")["value"], [1, 0.5, 0.25, 0.25, 2, 0.5, 1, 3, np.nan])


def test_a_value_on_a_device_that_fails_later_is_noted_and_takes_no_other_row_along(tmp_path: Path) -> None:
    with bn.watch(network(), tmp_path) as run:
        run.log(before=1.0)
        assert run._writer is not None
        run._writer.log(0, "lost", Unwilling())
        run.log(after=2.0)
        with pytest.warns(RuntimeWarning, match="lost could not be read from its device: KeyError"):
            run.flush()
    np.testing.assert_array_equal(run.table("log")["value"], [1.0, np.nan, 2.0])
    assert len(run.info["errors"]) == 1


def test_log_needs_a_start_and_does_nothing_after_close(tmp_path: Path) -> None:
    run = bn.watch(network(), tmp_path)
    with pytest.raises(RunError, match="has not been started: use watch"):
        run.log(loss=1.0)
    run.start()
    run.log(loss=1.0)
    run.close()
    run.log(loss=2.0)
    assert run.table("log")["value"].to_pylist() == [1.0]
