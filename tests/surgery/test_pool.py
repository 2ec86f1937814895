"""pool_statistics over gloo processes: the law of total variance, the same bits everywhere, all or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from processes import succeed

WORKER = """
import copy, json, os
import torch, batchnorm as bn
from torch import distributed as dist, nn
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
torch.manual_seed(0)
results = {}
x = torch.randn(40, 4, dtype=torch.float64) * 3 + torch.linspace(0, 5, 40, dtype=torch.float64)[:, None]
mine = x[:30] if rank == 0 else x[30:]

def network(width=4):
    return nn.Sequential(nn.BatchNorm1d(width, momentum=1.0), nn.BatchNorm1d(width, track_running_stats=False)).double()

def seen(net):
    net[0].load_state_dict({"running_mean": mine.mean(0), "running_var": mine.var(0, correction=0)}, strict=False)
    return net

net = seen(network())
net[0].num_batches_tracked.fill_(7 + rank)
record = bn.pool_statistics(net, weight=len(mine))
results["mean"] = float((net[0].running_mean - x.mean(0)).abs().max())
results["var"] = float((net[0].running_var - x.var(0, correction=0)).abs().max())
results["batches"] = int(net[0].num_batches_tracked)
results["record"] = [record.processes, len(record.layers), [str(each) for each in record.skipped], str(record)]
apart = (x[30:].mean(0) - x.mean(0)).abs() / (x.var(0, correction=0) + 1e-5).sqrt()
results["apart"] = abs(record.layers[0].mean - float(apart.max()))
net = seen(network())
bn.pool_statistics(net, weight=1 - rank)
results["only the first"] = float((net[0].running_mean - x[:30].mean(0)).abs().max())

def refused(net, **options):
    before = copy.deepcopy(net.state_dict())
    try:
        bn.pool_statistics(net, **options)
    except ValueError as failure:
        same = all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
                   for a, b in zip(before.values(), net.state_dict().values()))
        return [str(failure), same]

results["other layers"] = refused(network(4 + rank))
results["fewer layers"] = refused(network() if rank == 0 else nn.Sequential(nn.Linear(2, 2)))
results["weights"] = refused(network(), weight=0)
results["nan weight"] = refused(network(), weight=float("nan") if rank else 1.0)
poisoned = network()
if rank == 1:
    poisoned[0].running_var[2] = float("nan")
results["poisoned"] = refused(poisoned)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("pool")
    return [json.loads(line) for line in succeed(WORKER, 2, folder=folder)]


@pytest.mark.slow
def test_pooled_statistics_are_those_of_all_values(results: list[dict[str, Any]]) -> None:
    """mmdetection#2539: DistributedDataParallel keeps what process 0 saw."""
    for result in results:
        assert result["mean"] < 1e-12
        assert result["var"] < 1e-12
        assert result["batches"] == 8
        assert result["only the first"] == 0


def test_record_shows_the_gaps(results: list[dict[str, Any]]) -> None:
    for result in results:
        processes, layers, skipped, text = result["record"]
        assert (processes, layers, len(skipped)) == (2, 1, 1)
        assert "1 batch norm layer pooled over 2 processes" in text
        assert "0: means up to" in text
        assert "   1  BatchNorm1d  not pooled (no running statistics): 1" in text
        assert result["apart"] < 1e-12


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other layers", "different batch norm layers"),
        ("fewer layers", "different batch norm layers"),
        ("weights", "not 0 in all processes"),
        ("nan weight", "weight must be a number"),
        ("poisoned", "0: a process has statistics that are not finite"),
    ],
)
def test_mismatches_raise_in_every_process_and_change_nothing(
    case: str, words: str, results: list[dict[str, Any]]
) -> None:
    for result in results:
        message, same = result[case]
        assert words in message
        assert same


def test_one_process_changes_nothing() -> None:
    layer = bn.BatchNorm1d(4)
    layer(torch.randn(5, 4))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    record = bn.pool_statistics(nn.Sequential(layer))
    assert (record.processes, [each.name for each in record.layers]) == (1, ["0"])
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
