"""Draw docs/mnist/barrier.png: accuracy between two networks, before and after `repair`.

python tools/barrier.py [--data-dir FOLDER] [--out FILE] [--points N] trains two networks without and two with batch
norm on MNIST (FOLDER has the four .gz files as published), on scikit-learn's digits without a folder, interpolates
between them, as trained and with the units of one permuted to match those of the other, and prints the accuracies.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import vl_convert
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.report import charts
from batchnorm.report.study.pictures import CONFIG, PIXEL_RATIO
from batchnorm.study.data import Data, load

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "mnist" / "barrier.png"
WIDTH, DEPTH, EPOCHS, BATCH = 256, 5, 5, 250
MEASURED = 5000
"""Training images on which units are matched, recalibrated and repaired."""
Row = dict[str, str | float]


def network(inputs: int, norm: bool) -> nn.Sequential:
    """DEPTH hidden layers of WIDTH units."""
    layers: list[nn.Module] = []
    for features in [inputs] + [WIDTH] * (DEPTH - 1):
        layers += [nn.Linear(features, WIDTH), *([nn.BatchNorm1d(WIDTH)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def train(data: Data, norm: bool, seed: int, epochs: int) -> nn.Sequential:
    """Train one network; the seed sets its weights and the order of the images."""
    torch.manual_seed(seed)
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    model, steps = network(data.inputs, norm), len(x) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=epochs * steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x))[: steps * BATCH].view(steps, BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def matched(one: nn.Sequential, other: nn.Sequential, x: Tensor) -> nn.Sequential:
    """A copy of the other network with its hidden units in the order that correlates most with those of the first."""
    permuted = copy.deepcopy(other)
    a, b = x, x
    waiting: list[nn.Module] = []
    layers = list(permuted)
    for index, (mine, theirs) in enumerate(zip(one, layers, strict=True)):
        a, b = mine(a), theirs(b)
        waiting.append(theirs)
        if isinstance(theirs, nn.ReLU):
            products = (_standardized(a).T @ _standardized(b)).numpy()
            order = torch.from_numpy(linear_sum_assignment(products, maximize=True)[1])
            for tensor in (t for layer in waiting for t in layer.state_dict().values() if t.dim()):
                tensor.copy_(tensor[order].clone())
            following = next(layer for layer in layers[index + 1 :] if isinstance(layer, nn.Linear))
            following.weight.copy_(following.weight[:, order].clone())
            waiting, b = [], b[:, order]
    return permuted


def _standardized(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.std(0) + 1e-6)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """In percent of the test images."""
    right = model(torch.from_numpy(data.test_x)).argmax(1) == torch.from_numpy(data.test_y)
    return 100 * float(right.double().mean())


def curves(
    one: nn.Sequential, other: nn.Sequential, data: Data, points: int, norm: bool
) -> Iterator[tuple[str, float, float]]:
    """What was done, the share of the other network and the accuracy, along the line between two networks."""
    batches = list(torch.from_numpy(data.train_x[:MEASURED]).split(1000))  # type: ignore[no-untyped-call]
    for share in np.linspace(0, 1, points):
        weights = [1 - float(share), float(share)]
        model = copy.deepcopy(one)
        bn.average(model, [one, other], weights=weights)
        yield "interpolated", float(share), accuracy(model, data)
        if norm:
            bn.recalibrate(model, batches)
            yield "recalibrated", float(share), accuracy(model, data)
        bn.repair(model, [one, other], batches, weights=weights)
        yield "repaired", float(share), accuracy(model, data)


def rows(data: Data, points: int, epochs: int) -> Iterator[Row]:
    """The accuracies of all panels."""
    for norm in (False, True):
        one, other = (train(data, norm, seed, epochs) for seed in (1, 2))
        permuted = matched(one, other, torch.from_numpy(data.train_x[:MEASURED]))
        for order, end in (("units as trained", other), ("units permuted to match", permuted)):
            for line, share, value in curves(one, end, data, points, norm):
                network = "with batch norm" if norm else "without batch norm"
                yield {"network": network, "order": order, "line": line, "share": share, "accuracy": value}


def draw(records: list[Row], out: Path) -> None:
    """A panel for each kind of network and order, a line for what was done."""
    names, colours = ["interpolated", "recalibrated", "repaired"], ["#d55e00", "#56b4e9", "#0072b2"]

    def panel(network: str, order: str) -> charts.Spec:
        title = {"text": f"{network}, {order}", "fontSize": 11}
        return {
            "title": title,
            "width": 300,
            "height": 170,
            "transform": [{"filter": f"datum.network == '{network}' && datum.order == '{order}'"}],
            "mark": {"type": "line", "point": {"size": 18}},
            "encoding": {
                "x": {"field": "share", "type": "quantitative", "title": "share of the second network"},
                "y": {
                    "field": "accuracy",
                    "type": "quantitative",
                    "title": "accuracy, %",
                    "scale": {"domain": [0, 100]},
                },
                "color": {
                    "field": "line",
                    "type": "nominal",
                    "title": None,
                    "scale": {"domain": names, "range": colours},
                    "legend": {"orient": "bottom"},
                },
            },
        }

    networks, orders = (list(dict.fromkeys(str(row[key]) for row in records)) for key in ("network", "order"))
    spec = {
        "data": {"values": records},
        "vconcat": [{"hconcat": [panel(network, order) for order in orders]} for network in networks],
    }
    picture = vl_convert.vegalite_to_png(spec, charts.vega_lite_version(), scale=PIXEL_RATIO, config=CONFIG)
    out.write_bytes(picture)


def table(records: list[Row]) -> str:
    """A line for each panel and kind of line: the accuracy at both ends, and the least between."""
    lines = ["| network | units | line | ends | least |", "| :-- | :-- | :-- | --: | --: |"]
    for key in dict.fromkeys((row["network"], row["order"], row["line"]) for row in records):
        values = [float(row["accuracy"]) for row in records if (row["network"], row["order"], row["line"]) == key]
        lines.append(f"| {' | '.join(map(str, key))} | {values[0]:.1f}, {values[-1]:.1f} | {min(values):.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the folder with MNIST's files; without it the digits are used")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--points", type=int, default=11)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    given = parser.parse_args(arguments)
    data = load("digits") if given.data_dir is None else load("mnist", given.data_dir)
    records = list(rows(data, given.points, given.epochs))
    draw(records, given.out)
    print(table(records))


if __name__ == "__main__":
    main()
