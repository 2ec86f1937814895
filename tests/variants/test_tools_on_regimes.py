"""Every tool on every layer that sees a batch otherwise: it does what it does on BatchNorm, or says why not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.runs.history import History
from batchnorm.variants import DOMAINS, ONE_SET

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "sync": lambda: bn.SyncBatchNorm(6, act="relu"),
    "renorm": lambda: bn.BatchRenorm2d(6, act="relu", rmax_steps=(0, 0), dmax_steps=(0, 0)),
    "ghost": lambda: bn.GhostBatchNorm2d(6, 2, act="relu"),
    "domain": lambda: bn.DomainBatchNorm2d(6, 2, act="relu"),
    "accumulate": lambda: bn.BatchNorm2d(6, act="relu", accumulate=2),
    "batch of one": lambda: bn.BatchNorm2d(6, act="relu", batch_of_one="running"),
}
EVERY = pytest.mark.parametrize("name", LAYERS)
OF_ONE_SET = pytest.mark.parametrize("name", [name for name in LAYERS if name != "domain"])


def network(norm: nn.Module) -> nn.Sequential:
    """In eval mode, with statistics, gamma and beta that are not their start."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 2, 3))
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return net.eval()


def pair(name: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A network with this layer, and the same with BatchNorm2d."""
    net = network(LAYERS[name]())
    plain = network(bn.BatchNorm2d(6, act="relu"))
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.endswith("_1")})
    return net, plain


def images(seed: int = 1, n: int = 8) -> Tensor:
    return torch.randn(n, 3, 7, 7, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def test_all_classes_are_covered() -> None:
    tried = {type(make()).__name__[:-2] for make in LAYERS.values()}
    assert {cls.__name__[:-2] for cls in (*ONE_SET, *DOMAINS)} == tried


@OF_ONE_SET
def test_recalibrate(name: str) -> None:
    net, plain = pair(name)
    batches = [images(seed) for seed in range(3)]
    for model in (net, plain):
        assert len(bn.recalibrate(model, batches).layers) == 1
    torch.testing.assert_close(net[1].state_dict(), plain[1].state_dict())
    assert "_merge" not in vars(net[1])


@OF_ONE_SET
def test_undo_and_explain(name: str) -> None:
    net, plain = pair(name)
    for model in (net, plain):
        bn.undo(model, [images()])
    torch.testing.assert_close(net[1].state_dict(), plain[1].state_dict())
    assert bn.explain(net).index == pytest.approx(bn.explain(plain).index)


@EVERY
def test_check_finds_it_by_its_keys(name: str) -> None:
    net, _ = pair(name)
    with torch.no_grad():
        net[1].running_var[2] = math.nan
    for given in (net, net.state_dict()):
        assert any(finding.kind.slug == "non-finite" for finding in bn.check(given).findings)


@OF_ONE_SET
def test_fold_and_to_torch_give_the_same_function(name: str) -> None:
    net, plain = pair(name)
    wanted = plain(images())
    folded = copy.deepcopy(net)
    bn.fold(folded, images())
    torch.testing.assert_close(folded(images()), wanted, rtol=1e-4, atol=1e-5)
    bn.to_torch(net)
    torch.testing.assert_close(net(images()), wanted)
    assert not any(type(module).__module__.startswith("batchnorm") for module in net.modules())


@OF_ONE_SET
def test_to_torch_accepts_variants_in_eval_mode_only(name: str) -> None:
    net, _ = pair(name)
    net.train()
    if name == "sync":
        bn.to_torch(net)
        assert type(net[1][0]) is nn.SyncBatchNorm
        return
    with pytest.raises(ValueError, match=r"1 trains differently from all layers of torch\.nn: call \.eval\(\) first"):
        bn.to_torch(net)


@EVERY
def test_freeze_and_unfreeze(name: str) -> None:
    net, plain = pair(name)
    record = bn.freeze(net)
    if name == "domain":
        assert "batchnorm.keep_domain" in record.skipped[0].why
        return
    net.train()
    before = copy.deepcopy(net.state_dict())
    torch.testing.assert_close(net(images()), plain(images()))
    torch.testing.assert_close(dict(net.state_dict()), dict(before))
    bn.unfreeze(net)
    for _ in range(2):
        net.train()(images())
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


@EVERY
def test_records_of_compare_convert_revert_and_group_norm(name: str) -> None:
    net, _ = pair(name)
    compared = bn.compare(net, images())
    assert ("batchnorm.keep_domain" in str(compared)) is (name == "domain")
    converted = bn.convert(net)
    plain = name in ("accumulate", "batch of one")
    assert ("already of this package" in str(converted)) is not plain
    kind = type(net[1])
    bn.revert(net)
    assert plain or type(net[1]) is kind
    if name != "domain":
        bn.to_group_norm(network(LAYERS[name]()))


@EVERY
def test_param_groups_know_gamma_and_beta(name: str) -> None:
    net, _ = pair(name)
    groups = {group["name"]: group["params"] for group in bn.param_groups(net, weight_decay=0.1)}
    assert groups["gamma"] == [net[1].weight]
    assert groups["beta"] == [net[1].bias]


@EVERY
def test_sync_skips_layers_with_other_statistics(name: str) -> None:
    net, _ = pair(name)
    record = bn.sync(net)
    assert (type(net[1]) is bn.SyncBatchNorm) is (name in ("sync", "accumulate", "batch of one"))
    assert len(record.layers) + len(record.skipped) == 1


@EVERY
def test_watch_records_it_or_explains_why_not(name: str, tmp_path: Path) -> None:
    net, plain = pair(name)
    if name == "domain":
        with pytest.raises(ValueError, match="statistics for several domains"):
            bn.watch(net, tmp_path / "run")
        return
    for model, folder in ((net, "run"), (plain, "plain")):
        with bn.watch(model.train(), tmp_path / folder, schedule=bn.every(1)):
            model(images()).square().sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.0).step()
    (found,), (wanted,) = (History.read(bn.Run.open(tmp_path / folder)).layers for folder in ("run", "plain"))
    # Virtual batches pool to the batch. What comes back to gamma and beta depends on how each is normalized.
    for column in ("count", "mean", "var", "gamma", "beta"):
        torch.testing.assert_close(torch.tensor(found[column]), torch.tensor(wanted[column]), rtol=1e-5, atol=1e-5)
    assert torch.tensor(found["dgamma"]).isfinite().all()
    if name not in ("renorm", "ghost"):
        torch.testing.assert_close(torch.tensor(found["dgamma"]), torch.tensor(wanted["dgamma"]), rtol=1e-4, atol=1e-4)


def test_keep_domain_makes_it_a_batch_norm_of_one() -> None:
    net, _ = pair("domain")
    with bn.domain(1):
        wanted = net(images())
        net.train()(images())
        net.eval()
        moved = net(images())
    assert not torch.equal(wanted, moved)
    with pytest.raises(IndexError, match="1 has domains 0 to 1, not 2"):
        bn.keep_domain(net, 2)
    record = bn.keep_domain(net, 1)
    assert str(record) == "1 batch norm layer of domain 1 alone"
    assert type(net[1]) is bn.BatchNorm2d
    assert net[1].state_dict().keys() == bn.BatchNorm2d(6).state_dict().keys()
    assert net[1].num_batches_tracked == 1
    torch.testing.assert_close(net(images()), moved)
    assert len(bn.recalibrate(net, [images()]).layers) == 1
    copy.deepcopy(net)
    with pytest.raises(TypeError, match="keep_domain takes"):
        bn.keep_domain(net.state_dict(), 1)  # type: ignore[arg-type]


class Padded(nn.Module):
    """Sequences with their lengths, as a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 1), bn.BatchNorm1d(4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.norm(self.conv(x), lengths=lengths)


@pytest.mark.parametrize("exact", [True, False])
def test_recalibrate_and_undo_see_valid_positions_alone(exact: bool) -> None:
    torch.manual_seed(0)
    net = Padded()
    batches = [{"x": torch.randn(3, 3, 5) + 2, "lengths": torch.tensor([5, 2, 1])} for _ in range(3)]
    valid = torch.arange(5) < batches[0]["lengths"][:, None]
    rows = torch.cat([net.conv(batch["x"]).movedim(1, -1)[valid] for batch in batches]).double()
    bn.recalibrate(net, batches, exact=exact)
    torch.testing.assert_close(net.norm.running_mean.double(), rows.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.norm.running_var.double(), rows.var(0), rtol=1e-5, atol=1e-5)
    bn.undo(net, batches)
    x = net.conv(batches[0]["x"])
    torch.testing.assert_close(net.eval()(**batches[0]).movedim(1, -1)[valid], x.movedim(1, -1)[valid])


def test_fold_skips_a_masked_layer() -> None:
    """What it gives at padded positions is 0, which no convolution gives."""
    net = Padded().eval()
    net.norm.running_mean.fill_(3.0)
    example = (torch.randn(3, 3, 5), torch.tensor([5, 2, 1]))
    wanted = net(*example)
    bn.fold(net, example)
    torch.testing.assert_close(net(*example), wanted)
    assert isinstance(net.norm, bn.BatchNorm1d)
