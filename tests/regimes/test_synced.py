"""SyncBatchNorm over gloo processes equals one process on the whole batch, and fails with them, clearly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import launch, succeed
from torch import nn

from batchnorm.regimes.synced import SyncBatchNorm

HEAD = """
import json, os, sys
from datetime import timedelta
import torch, batchnorm as bn
from torch import distributed as dist, nn
from batchnorm.regimes.synced import SyncBatchNorm
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
torch.manual_seed(0)
"""

# Every case in one launch: to start processes takes longer than to run them.
EQUAL = (
    HEAD
    + """
SIZES = {2: ([3, 5], [6, 0], [1, 1]), 4: ([5, 0, 9, 2], [1, 1, 1, 1], [0, 0, 0, 2])}[world]

def error(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)) if found.numel() else 0.0

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
print(json.dumps(worst))
dist.destroy_process_group()
"""
)

# The 50 steps: the same rows, cut unevenly; losses and gradients weighed by what each process has.
TRAINED = (
    HEAD
    + """
def network(sync):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
                        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 2)).double()
    if sync:
        bn.sync(net)
    return net

alone, together = network(False), network(True)
parallel = nn.parallel.DistributedDataParallel(together)
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
print(json.dumps(worst))
dist.destroy_process_group()
"""
)

KILLED = (
    HEAD
    + """
layer = SyncBatchNorm(4)
x = torch.randn(8, 4, requires_grad=True)
layer(x).sum().backward()
before = [t.clone() for t in layer.state_dict().values()]
if rank == 1:
    os._exit(9)
try:
    layer(x)
except Exception as error:
    same = all(torch.equal(a, b) for a, b in zip(before, layer.state_dict().values()))
    print(json.dumps([type(error).__name__, str(error), same]), flush=True)
    os._exit(3)
"""
)

FEW = (
    HEAD
    + """
layer = SyncBatchNorm(4)
try:
    layer(torch.randn(1 if rank == 0 else 0, 4))
except ValueError as error:
    print(json.dumps(str(error)))
dist.destroy_process_group()
"""
)


TWICE = (
    HEAD
    + """
made = {"stock": nn.BatchNorm1d, "ours": bn.BatchNorm1d, "synced": SyncBatchNorm}[sys.argv[1]]
net = nn.Sequential(nn.Linear(4, 4), made(4), nn.ReLU(), nn.Linear(4, 2))
net[1].train(sys.argv[2] == "train")
told = []
for forward, broadcast in ((net, True), (nn.parallel.DistributedDataParallel(net), False)):
    try:
        first = forward(torch.randn(6, 4)).sum()
        if broadcast:  # as DDP does before a forward: in place, from the first process
            with torch.no_grad():
                for buffer in net.buffers():
                    buffer.copy_(buffer.clone())
        (first + forward(torch.randn(6, 4)).sum()).backward()
        told.append("fine")
    except RuntimeError as error:
        told.append(str(error))
print(json.dumps(told))
dist.destroy_process_group()
"""
)

REFUSED = """
try:
    nn.SyncBatchNorm(4)(torch.randn(3, 4))
except ValueError as error:
    print(json.dumps(str(error)))
SyncBatchNorm(4)(torch.randn(3, 4))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_process_on_the_whole_batch(ranks: int, tmp_path: Path) -> None:
    bounds = {"torch.float64": 1e-12, "torch.float32": 1e-6, "torch.bfloat16": 2**-7}
    for line in succeed(EQUAL, ranks, folder=tmp_path):
        worst = json.loads(line)
        assert worst.keys() == bounds.keys()
        assert all(worst[dtype] < bound for dtype, bound in bounds.items()), worst


@pytest.mark.parametrize("ranks", [2, 4])
def test_fifty_steps_under_ddp_follow_one_process(ranks: int, tmp_path: Path) -> None:
    for line in succeed(TRAINED, ranks, folder=tmp_path):
        assert json.loads(line) < 1e-9


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["stock", "ours", "synced"])
def test_two_forwards_before_one_backward_under_ddp(kind: str, mode: str, tmp_path: Path) -> None:
    """pytorch/pytorch#110363, #175024: DDP's broadcast of the buffers breaks the first forward's backward."""
    for line in succeed(TWICE, 2, kind, mode, folder=tmp_path):
        by_hand, by_ddp = json.loads(line)
        assert ("modified by an inplace operation" in by_hand) is (kind == "stock")
        assert kind == "stock" or by_ddp == "fine"


def test_a_killed_process_ends_the_others_with_an_error_and_their_statistics_whole(tmp_path: Path) -> None:
    first, second = launch(KILLED, 2, folder=tmp_path)
    assert second.returncode == 9
    assert first.returncode == 3, first.stderr[-2000:]
    name, words, same = json.loads(first.stdout.strip().splitlines()[-1])
    assert name in ("RuntimeError", "DistBackendError", "DistNetworkError")
    assert words
    assert same


def test_one_value_in_all_processes_is_refused_in_all_of_them(tmp_path: Path) -> None:
    for line in succeed(FEW, 2, folder=tmp_path):
        assert "got 1 in 2 processes together" in json.loads(line)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 2), (6, 4, 3, 2, 2)])
def test_without_a_group_it_is_batch_norm_on_the_cpu(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    layer, plain = SyncBatchNorm(4), nn.BatchNorm1d(4)
    torch.testing.assert_close(layer(x), plain(x.flatten(2) if len(shape) > 2 else x).view(shape))
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.state_dict().keys() == plain.state_dict().keys()


def test_pytorchs_own_refuses_the_cpu(tmp_path: Path) -> None:
    """pytorch/pytorch: SyncBatchNorm raises on CPU tensors as soon as torch.distributed runs."""
    script = HEAD + REFUSED
    for line in succeed(script, 2, folder=tmp_path):
        assert "expected input tensor to be on" in json.loads(line)
