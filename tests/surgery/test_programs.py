"""Random programs give the same numbers and the same running statistics, converted or not."""

from __future__ import annotations

import copy

import pytest
import torch
from programs import Program
from torch import Tensor, nn

import batchnorm as bn
from randomness import SEED

GROUPS, EACH = 8, 60


def outcome(model: nn.Module, x: Tensor) -> tuple[object, dict[str, Tensor]]:
    """What two calls return, or the kind of error, and the state after them."""
    found: list[object] = []
    with torch.no_grad():
        for step in range(2):
            try:
                found.append(model(x.clone() + step))
            except (RuntimeError, ValueError) as error:
                found.append(type(error).__name__)
                break
    return found, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("group", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in range(1, GROUPS))])
def test_random_programs(group: int) -> None:
    fused = 0
    for seed in range(SEED + group * EACH, SEED + (group + 1) * EACH):
        program = Program(seed)
        torch.manual_seed(seed)
        stock = program.model(f"<program {seed}>").double().train(seed % 5 != 0)
        model = copy.deepcopy(stock)
        record = bn.convert(model)
        fused += record.fused
        x = torch.randn(4, 3, 5, dtype=torch.float64)
        expected, found = outcome(stock, x), outcome(model, x)
        if isinstance(expected[0][-1], str):
            assert isinstance(found[0][-1], str), f"{seed=}\n{program.source}"
            continue
        torch.testing.assert_close(
            found,
            expected,
            rtol=1e-8,
            atol=1e-9,
            equal_nan=True,
            msg=lambda text, seed=seed, program=program, model=model: (
                f"{seed=}: {text}\n{program.source}\n{rewritten(model)}"
            ),
        )
    assert fused > EACH // 4, "the programs are such that there is something to fuse"


def rewritten(model: nn.Module) -> str:
    return "\n".join(text for _, text, _, _ in getattr(type(model), "_batchnorm_recipe", None) or ())
