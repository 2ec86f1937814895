"""SyncBatchNorm over gloo processes equals one process on the whole batch, and fails with them, clearly."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.runs.history import History
from batchnorm.variants.sync import SyncBatchNorm
from processes import launch, succeed

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")

HEAD = """
import copy, json, os, sys, time
from datetime import timedelta
import torch, batchnorm as bn
from torch import distributed as dist, nn
from torch.utils.checkpoint import checkpoint
from batchnorm.variants.sync import SyncBatchNorm
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", timeout=timedelta(seconds=float(os.environ.get("PATIENCE", 60))))
torch.manual_seed(0)

def error(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)) if found.numel() else 0.0

def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
                         nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 2)).double()
"""

# Every part in one launch: to start processes takes longer than to run them.
EQUAL = """
SIZES = {2: ([3, 5], [6, 0], [1, 1]), 4: ([5, 0, 9, 2], [1, 1, 1, 1], [0, 0, 0, 2])}[world]
worst = {}
for sizes in SIZES:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            for affine, act, fused in ((True, None, False), (False, "relu", True), (True, "silu", True)):
                x = (torch.randn(sum(sizes), 6, 5, 4, dtype=torch.float64) * 3 + 4).to(dtype)
                g, r = torch.randn_like(x), torch.randn_like(x) if fused else None
                if layout == "channels_last":
                    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
                first = sum(sizes[:rank])
                mine = slice(first, first + sizes[rank])
                wide = torch.float64 if dtype == torch.bfloat16 else dtype
                one = bn.BatchNorm2d(6, affine=affine, act=act)
                if affine:
                    nn.init.normal_(one.weight), nn.init.normal_(one.bias)
                layer = SyncBatchNorm(6, affine=affine, act=act)
                layer.load_state_dict(one.state_dict())
                if dtype == torch.float64:
                    layer = layer.double()
                one = one.to(wide)
                whole = x.to(wide).requires_grad_()
                y = one(whole, None if r is None else r.to(wide))
                y.backward(g.to(wide))
                part = x[mine].detach().requires_grad_()
                z = layer(part, None if r is None else r[mine])
                z.backward(g[mine])
                errors = [error(z.to(wide), y[mine]), error(part.grad.to(wide), whole.grad[mine]),
                          error(layer.running_mean.to(wide), one.running_mean),
                          error(layer.running_var.to(wide), one.running_var)]
                if affine:
                    for name in ("weight", "bias"):
                        total = getattr(layer, name).grad.to(torch.float64)
                        dist.all_reduce(total)
                        errors.append(error(total.to(wide), getattr(one, name).grad))
                key = str(dtype)
                worst[key] = max(worst.get(key, 0.0), *errors)
                assert layer.num_batches_tracked == 1
results["equal"] = worst
"""

# The same rows in every step, cut unevenly; losses and gradients weighed by what each process has.
TRAINED = """
alone, together = network(), network()
bn.sync(together)
parallel = nn.parallel.DistributedDataParallel(together, broadcast_buffers=False)
optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in (alone, together)]
cuts = [0, 9, 24] if world == 2 else [0, 9, 9, 20, 24]
worst = 0.0
for step in range(50):
    torch.manual_seed(100 + step)
    x, t = torch.randn(24, 3, 8, 8, dtype=torch.float64), torch.randint(2, (24,))
    loss = nn.functional.cross_entropy(alone(x), t)
    optimizers[0].zero_grad(), loss.backward(), optimizers[0].step()
    mine = slice(cuts[rank], cuts[rank + 1])
    own = nn.functional.cross_entropy(parallel(x[mine]), t[mine], reduction="sum") * world / 24
    optimizers[1].zero_grad(), own.backward(), optimizers[1].step()
    total = own.detach() / world
    dist.all_reduce(total)
    worst = max(worst, float((total - loss.detach()).abs()))
for a, b in zip(alone.state_dict().values(), together.state_dict().values()):
    worst = max(worst, float((a - b).abs().max()))
results["trained"] = worst
same = True
for buffer in together.buffers():
    others = [torch.empty_like(buffer) for _ in range(world)]
    dist.all_gather(others, buffer)
    same &= all(torch.equal(buffer, other) for other in others)
results["same statistics"] = same
"""

ACCUMULATED = """
x = torch.randn(22, 4, dtype=torch.float64) * torch.arange(22)[:, None]
layer, whole = SyncBatchNorm(4, accumulate=2).double(), nn.BatchNorm1d(4).double()
whole(x)
for rows in (x[:9], x[9:]):
    layer(rows[:2] if rank == 0 else rows[2:])
results["accumulated"] = max(error(layer.running_mean, whole.running_mean), error(layer.running_var, whole.running_var))
"""

FEW = """
try:
    SyncBatchNorm(4)(torch.randn(1 if rank == 0 else 0, 4))
except ValueError as failure:
    results["few"] = str(failure)
"""

COUNTED = """
calls = []
def counting(function):
    def counted(*arguments, **options):
        calls.append(function.__name__)
        return function(*arguments, **options)
    return counted
whole = {name: getattr(dist, name) for name in ("all_gather", "all_reduce", "broadcast", "all_gather_into_tensor")}
for name, function in whole.items():
    setattr(dist, name, counting(function))
layer = SyncBatchNorm(4)
layer(torch.randn(3, 4, requires_grad=True)).sum().backward()
results["training"], calls = calls, []
layer.eval()(torch.randn(3, 4, requires_grad=True)).sum().backward()
results["inference"], calls = calls, []
bn.freeze(layer.train())
layer(torch.randn(3, 4, requires_grad=True)).sum().backward()
results["frozen"] = calls
for name, function in whole.items():
    setattr(dist, name, function)
"""

STOCK = """
try:
    nn.SyncBatchNorm(4)(torch.randn(3, 4))
except ValueError as failure:
    results["stock"] = str(failure)
"""

TWICE = """
results["twice"] = {}
for kind, made in (("stock", nn.BatchNorm1d), ("ours", bn.BatchNorm1d), ("synced", SyncBatchNorm)):
    for mode in (True, False):
        net = nn.Sequential(nn.Linear(4, 4), made(4), nn.ReLU(), nn.Linear(4, 2))
        net[1].train(mode)
        found = []
        for forward, by_hand in ((net, True), (nn.parallel.DistributedDataParallel(net), False)):
            try:
                first = forward(torch.randn(6, 4)).sum()
                if by_hand:  # as DDP does before a forward: in place, from the first process
                    with torch.no_grad():
                        for buffer in net.buffers():
                            buffer.copy_(buffer.clone())
                (first + forward(torch.randn(6, 4)).sum()).backward()
                found.append("fine")
            except RuntimeError as failure:
                found.append(str(failure))
        results["twice"][f"{kind} {mode}"] = found
"""

# Eager, compiled without a break, checkpointed both ways: the same step.
WAYS = """
plain = network()
bn.sync(plain)
start = copy.deepcopy(plain.state_dict())
x = torch.randn(3 + rank, 3, 8, 8, dtype=torch.float64)

def step(forward, net):
    net.load_state_dict(start)
    net.zero_grad()
    y = forward(x.clone().requires_grad_())
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in net.parameters()), *(b.clone() for b in net.buffers())]

wanted = step(plain, plain)
results["ways"] = {}
for way in ("compiled", "reentrant", "not reentrant", "momentum None"):
    net = copy.deepcopy(plain)
    forward = net
    if way == "compiled":
        forward = torch.compile(net, fullgraph=True, backend="aot_eager")
    elif way.endswith("reentrant"):
        forward = lambda x: checkpoint(net, x, use_reentrant=way == "reentrant")
    else:
        for norm in (net[1], net[4], plain[1], plain[4]):
            norm.momentum = None
        wanted = step(plain, plain)
        forward = torch.compile(net, fullgraph=True, backend="aot_eager")
    found = step(forward, net)
    results["ways"][way] = max(error(a.double(), b.double()) for a, b in zip(found, wanted, strict=True))
"""

# Parameters in shards, as they are and as bfloat16: as the same layers of that type, each process's gradient added up.
SHARDED = """
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
results["sharded"] = {}
for dtype in (torch.float64, torch.bfloat16):
    plain = network().to(torch.float64 if dtype == torch.float64 else torch.float32)
    bn.sync(plain)
    net = copy.deepcopy(plain)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.promote_types(dtype, torch.float32))
    for layer in (net[0], net[1], net[3], net[4]):
        fully_shard(layer, mp_policy=policy)
    fully_shard(net, mp_policy=policy)
    for layer in (plain[0], plain[3], plain[7]):
        layer.to(dtype)
    x = torch.randn(3 + rank, 3, 8, 8, dtype=dtype)
    outputs = []
    for model in (net, plain):
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    pairs = [(outputs[0].detach(), outputs[1].detach()), *zip(net.buffers(), plain.buffers())]
    for found, own in zip(net.parameters(), plain.parameters()):
        added = own.grad.to(policy.reduce_dtype)
        dist.all_reduce(added)
        pairs.append((found.grad.full_tensor() * world, added))
    results["sharded"][str(dtype)] = max(error(a.double(), b.double()) for a, b in pairs)
"""

# What is recorded is the whole batch, once.
WATCHED = """
from batchnorm.runs.history import History
for way in ("eager", "compiled"):
    net = network()
    bn.sync(net)
    forward = net if way == "eager" else torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    x = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    folder = f"{sys.argv[1]}-{way}"
    with bn.watch(net, folder, schedule=bn.every(1)):
        forward(x[:2] if rank == 0 else x[2:]).square().sum().backward()
        torch.optim.SGD(net.parameters(), lr=0.0).step()
    dist.barrier()
    layer = History.read(bn.Run.open(folder)).layers[0]
    whole, dbeta = net[0](x), net[1].bias.grad.clone()
    dist.all_reduce(dbeta)
    wanted = {"mean": whole.mean((0, 2, 3)), "var": whole.var((0, 2, 3), correction=0), "dbeta": dbeta,
              "count": torch.full((8,), 7.0 * 36)}
    results[f"watched {way}"] = {name: error(torch.tensor(layer[name][0]), value) for name, value in wanted.items()}
"""

PARTS = {2: [EQUAL, TRAINED, ACCUMULATED, FEW, COUNTED, STOCK, TWICE, WAYS, SHARDED, WATCHED], 4: [EQUAL, TRAINED, FEW]}


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each of two or four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    parts = "".join([HEAD, "results = {}\n", *PARTS[request.param], "print(json.dumps(results))\n"])
    return [json.loads(line) for line in succeed(parts, request.param, str(folder / "run"), folder=folder)]


def part(results: list[dict[str, Any]], name: str) -> list[Any]:
    if name not in results[0]:
        pytest.skip("seen in two processes")
    return [result[name] for result in results]


@pytest.mark.slow
def test_equals_one_process_on_the_whole_batch(results: list[dict[str, Any]]) -> None:
    """pytorch/pytorch#22192, #36530: uneven and empty batches were wrong, or stuck."""
    bounds = {"torch.float64": 1e-12, "torch.float32": 1e-6, "torch.bfloat16": 2**-7}
    for worst in part(results, "equal"):
        assert worst.keys() == bounds.keys()
        assert all(worst[dtype] < bound for dtype, bound in bounds.items()), worst


def test_fifty_steps_under_ddp_follow_one_process(results: list[dict[str, Any]]) -> None:
    assert max(part(results, "trained")) < 1e-9


def test_every_process_has_the_same_bits_of_the_statistics(results: list[dict[str, Any]]) -> None:
    """mmdetection#2539: statistics differ from process to process, and those of process 0 are saved."""
    assert part(results, "same statistics") == [True] * len(results)


def test_batches_accumulate_over_all_processes(results: list[dict[str, Any]]) -> None:
    assert max(part(results, "accumulated")) < 1e-12


def test_one_value_in_all_processes_is_refused_in_all_of_them(results: list[dict[str, Any]]) -> None:
    for line in part(results, "few"):
        assert f"got 1 in {len(results)} processes together" in line


def test_one_collective_forward_and_one_backward_in_training_alone(results: list[dict[str, Any]]) -> None:
    assert part(results, "training") == [["all_gather", "all_reduce"]] * 2
    assert part(results, "inference") == part(results, "frozen") == [[]] * 2


def test_pytorchs_own_refuses_the_cpu(results: list[dict[str, Any]]) -> None:
    """torch.nn.SyncBatchNorm raises on CPU tensors as soon as torch.distributed runs."""
    for line in part(results, "stock"):
        assert "expected input tensor to be on" in line


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["stock", "ours", "synced"])
def test_two_forwards_before_one_backward_under_ddp(kind: str, training: bool, results: list[dict[str, Any]]) -> None:
    """pytorch/pytorch#110363, #175024: DDP's broadcast of the buffers breaks the first forward's backward."""
    for found in part(results, "twice"):
        by_hand, by_ddp = found[f"{kind} {training}"]
        assert ("modified by an inplace operation" in by_hand) is (kind == "stock")
        assert kind == "stock" or by_ddp == "fine"


@pytest.mark.parametrize("way", ["compiled", "reentrant", "not reentrant", "momentum None"])
def test_each_way_of_running_it_is_the_same_step(way: str, results: list[dict[str, Any]]) -> None:
    """pytorch/pytorch#161302: under torch.compile the graph breaks at SyncBatchNorm; here fullgraph=True compiles."""
    assert all(found[way] < 1e-12 for found in part(results, "ways"))


@pytest.mark.parametrize(("dtype", "bound"), [("torch.float64", 1e-12), ("torch.bfloat16", 2**-8)])
def test_fully_sharded_it_is_the_same_step(dtype: str, bound: float, results: list[dict[str, Any]]) -> None:
    """In bfloat16 `fully_shard` narrows gamma, beta and their gradients, not the statistics."""
    worst = max(found[dtype] for found in part(results, "sharded"))
    assert worst < bound


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_recording_is_of_the_whole_batch(way: str, results: list[dict[str, Any]]) -> None:
    for found in part(results, f"watched {way}"):
        assert found["count"] == 0
        assert all(value < 1e-6 for value in found.values()), found


DYING = (
    HEAD
    + """
net = network()
bn.sync(net)
with bn.watch(net, sys.argv[1], schedule=bn.every(1)) as run:
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    for step in range(3):
        net(x).square().sum().backward()
        optimizer.step()
    before = copy.deepcopy(net.state_dict())
    torch.save(before, f"{sys.argv[1]}-{rank}.pt")
    if rank == 1:
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), 9)
        time.sleep(60)
    started = time.monotonic()
    try:
        net(x)
    except RuntimeError as failure:
        same = all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
        print(json.dumps([str(failure), same, time.monotonic() - started]), flush=True)
        raise
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "stuck"])
def test_a_process_that_dies_in_a_step_ends_the_others_and_spoils_nothing(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATIENCE", "60" if end == "killed" else "3")
    first, second = launch(DYING, 2, str(tmp_path / "run"), end, folder=tmp_path, grace=2)
    assert second.returncode == -9
    assert first.returncode == 1, first.stderr[-2000:]
    words, same, seconds = json.loads(first.stdout.strip().splitlines()[-1])
    assert words
    assert same, "the running statistics are those of before the step"
    assert seconds < 20
    run = bn.Run.open(tmp_path / "run")
    assert run.info["status"] == "failed"
    layer = History.read(run).layers[0]
    assert layer.steps.tolist() == [0, 1, 2]
    torch.load(tmp_path / "run-0.pt")


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 2), (6, 4, 3, 2, 2)])
def test_without_a_group_it_is_batch_norm_on_the_cpu(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    layer, plain = SyncBatchNorm(4), nn.BatchNorm1d(4)
    torch.testing.assert_close(layer(x), plain(x.flatten(2) if len(shape) > 2 else x).view(shape))
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.state_dict().keys() == plain.state_dict().keys()


def test_copies_and_pickles_are_layers_of_all_processes() -> None:
    layer = SyncBatchNorm(4, act="relu")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.process_group is None
        assert other.act == "relu"
        other(torch.randn(5, 4))
