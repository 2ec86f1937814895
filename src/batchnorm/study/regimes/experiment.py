"""Training the arms of every case, and what they are worth afterwards.

Tables written, one row an arm:

    results   seed, part, case, arm: accuracy and loss on held-out data in eval mode, and statistics_error: of the first
              norm, the RMS over units of the running mean's distance from that of all training data, in deviations;
              over valid positions where there is padding
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

from batchnorm.runs.run import Run
from batchnorm.study.data import Data
from batchnorm.study.regimes.cases import CASES, REFERENCE, Case, drawn, norm_of, size_of, stretched
from batchnorm.study.regimes.networks import Images, Sequences
from batchnorm.study.rows import Rows
from batchnorm.study.sgd import sgd_step
from batchnorm.surgery._shared.layers import Norm, find
from batchnorm.surgery._shared.measuring import listening, moments_of
from batchnorm.surgery.freeze import freeze
from batchnorm.surgery.recalibrate import recalibrate
from batchnorm.variants.domains import domain

TRAINED_ALREADY = {"recalibrated": REFERENCE}
"""Arms that are another one, trained, with something done to it."""


@dataclass(frozen=True)
class Config:
    """What to run: seeds 0 … N-1, steps of SGD for each arm, and its rate."""

    seeds: int = 5
    steps: int = 400
    lr: float = 0.1


@dataclass(frozen=True)
class Inputs:
    """Images (N, 1, 8, 8) and labels, for training and held out."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def of(cls, data: Data) -> Inputs:
        side = round(data.inputs**0.5)
        images = [torch.from_numpy(x).view(-1, 1, side, side) for x in (data.train_x, data.test_x)]
        labels = [torch.from_numpy(y) for y in (data.train_y, data.test_y)]
        return cls(images[0], labels[0], images[1], labels[1])


def trained(config: Config) -> Iterator[tuple[int, Case, str]]:
    """Every training of the study."""
    for seed in range(config.seeds):
        for case in CASES:
            for arm in case.arms:
                if arm not in TRAINED_ALREADY:
                    yield seed, case, arm


def work(config: Config) -> int:
    """The study's length in steps of SGD."""
    return sum(1 for _ in trained(config)) * config.steps


def study(config: Config, data: Data, run: Run, advance: Callable[[int], None]) -> None:
    """Train and measure all; `advance(steps)` says how far it is, and may end it by raising KeyboardInterrupt."""
    inputs, rows = Inputs.of(data), Rows(run)
    try:
        for seed, case, arm in trained(config):
            model = _train(config, case, arm, seed, inputs, advance)
            _measure(rows, model, case, arm, seed, inputs)
            for after, before in TRAINED_ALREADY.items():
                if arm == before and after in case.arms:
                    again = copy.deepcopy(model)
                    recalibrate(again, _batches(case, inputs), _forward, progress=False)
                    _measure(rows, again, case, after, seed, inputs)
            rows.flush_now_and_then()
    finally:
        rows.flush()


def _train(
    config: Config, case: Case, arm: str, seed: int, inputs: Inputs, advance: Callable[[int], None]
) -> nn.Module:
    torch.manual_seed(seed)
    classes = int(inputs.train_y.max()) + 1
    features = inputs.train_x.shape[3]
    norm = norm_of(arm, case, config.steps)
    model = Sequences(features, classes, arm) if case.draw == "padded" else Images(classes, norm)
    parameters = list(model.parameters())
    batches = drawn(case, inputs.train_y, seed)
    for step in range(config.steps):
        if arm == "frozen after a fifth" and step == config.steps // 5:
            freeze(model, gamma=False, beta=False)
        rows, number = next(batches)
        rows = rows[: size_of(arm, case)]
        batch = _batch(case, inputs.train_x, rows, number, seed * config.steps + step)
        loss = F.cross_entropy(_forward(model, batch), inputs.train_y[rows])
        sgd_step(parameters, loss, config.lr * (1 - step / config.steps))
        advance(1)
    return model.eval()


Batch = dict[str, Any]


def _batch(case: Case, images: Tensor, rows: Tensor, number: int, seed: int) -> Batch:
    if case.draw == "padded":
        x, lengths = stretched(images[:, 0], rows, seed)
        return {"domain": 0, "inputs": (x, lengths)}
    x = images[rows]
    return {"domain": number, "inputs": (1 - x if number else x,)}


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    with domain(batch["domain"]):
        return model(*batch["inputs"])  # type: ignore[no-any-return]


def _batches(case: Case, inputs: Inputs) -> list[Batch]:
    """All training data, as this case brings them."""
    numbers = (0, 1) if case.draw == "domains" else (0,)
    parts = torch.split(torch.arange(len(inputs.train_x)), 200)
    return [_batch(case, inputs.train_x, rows, n, at) for n in numbers for at, rows in enumerate(parts)]


@torch.no_grad()
def _measure(rows: Rows, model: nn.Module, case: Case, arm: str, seed: int, inputs: Inputs) -> None:
    held_out = torch.arange(len(inputs.test_x))
    found: dict[str, list[Tensor]] = {"accuracy": [], "loss": []}
    for number in (0, 1) if case.draw == "domains" else (0,):
        logits = _forward(model, _batch(case, inputs.test_x, held_out, number, seed))
        found["accuracy"].append((logits.argmax(1) == inputs.test_y).double().mean())
        found["loss"].append(F.cross_entropy(logits.double(), inputs.test_y))
    key = {"seed": seed, "part": case.part, "case": case.name, "arm": arm}
    columns = {name: float(torch.stack(values).mean()) for name, values in found.items()}
    rows.add("results", key, {**columns, "statistics_error": _statistics_error(model, case, arm, inputs)})


def _statistics_error(model: nn.Module, case: Case, arm: str, inputs: Inputs) -> float:
    """Of the first norm alone: what it receives does not depend on any other."""
    norms = [norm for norm in find("study", model, may_be_empty=True).norms if norm.layer.running_mean is not None]
    if not norms or arm == "by domain":
        return float("nan")
    heard: list[Any] = []

    def hear(norm: Norm, x: Tensor) -> None:
        heard.append(moments_of(x))

    with listening(norms[:1], hear):
        for batch in _batches(case, inputs):
            if case.draw == "padded":  # over valid positions, whatever the arm does
                x, lengths = batch["inputs"]
                valid = torch.arange(x.shape[2]) < lengths[:, None]
                heard.append(moments_of(model.maps[0](x).transpose(1, 2)[valid]))  # type: ignore[index, operator]
            else:
                _forward(model, batch)
    whole = heard[0].merge(*heard[1:])
    layer = norms[0].layer
    assert layer.running_mean is not None
    away = (layer.running_mean.double().numpy() - whole.mean) / (whole.var + float(vars(layer)["eps"])) ** 0.5
    return float((away**2).mean() ** 0.5)
