"""Folded frozen layers: what stays, what counts later, the way back, what is kept, and the other tools."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folds import perturbed
from frozen_folds import FLAVOURS, assert_same, folded, frozen_and_folded, images, network
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

import batchnorm as bn
from batchnorm.surgery._folding.on_the_fly import is_folded
from batchnorm.surgery._shared.layers import FROZEN
from batchnorm.surgery.freeze import frozen_class
from randomness import SEED

# --- what stays, and what counts later --------------------------------------------------------------------------------


@FLAVOURS
def test_parameters_and_the_state_dict_stay(flavour: str) -> None:
    model = network(nn.ReLU6(), flavour)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    modules = dict(model.named_modules())
    folded(model, flavour=flavour)
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(module is modules[name] for name, module in model.named_modules())


def test_what_changes_later_counts() -> None:
    model, other = frozen_and_folded(network)
    torch.manual_seed(SEED + 1)
    state = perturbed(network(), SEED + 1).state_dict()
    for each in (model, other):
        each.load_state_dict(state)
        with torch.no_grad():
            each[4].running_var.mul_(2)
        each[1].weight = nn.Parameter(torch.full((6,), 0.5, dtype=torch.float64), requires_grad=False)
        each[1].eps = 0.1
    assert_same(model, other, images())


def test_it_trains_as_the_frozen_model_does() -> None:
    model, other = frozen_and_folded(lambda: network(nn.ReLU6()))
    for each in (model, other):
        optimizer = torch.optim.SGD(each.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            each(images()).square().mean().backward()
            optimizer.step()
    for old, new in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-10, atol=1e-10)


def test_a_gamma_that_learns_again_gets_its_gradient() -> None:
    model, other = frozen_and_folded(network)
    for each in (model, other):
        each[1].requires_grad_(True)
    assert_same(model, other, images())


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def converted_and_reverted(model: nn.Module) -> nn.Module:
    assert bn.convert(model).converted == 2
    assert sum(map(is_folded, model.modules())) == 2
    bn.revert(model)
    return model


LIVES: list[Callable[[nn.Module], nn.Module]] = [
    copy.deepcopy,
    copy.copy,
    lambda model: pickle.loads(pickle.dumps(model)),
    through_torch_save,
    converted_and_reverted,
    lambda model: model.train().eval().train(),
    lambda model: model.float().double(),
    lambda model: torch.optim.swa_utils.AveragedModel(model).module,
    torch.fx.symbolic_trace,
]


@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_it_survives(life: Callable[[nn.Module], nn.Module]) -> None:
    model, other = frozen_and_folded(lambda: network(nn.ReLU6()))
    again = life(other)
    assert sum(map(is_folded, again.modules())) == 2
    assert_same(model, again, images(), tolerance=1e-6 if "float" in str(life.__code__.co_names) else 1e-10)
    bn.unfreeze(again)
    assert not any(map(is_folded, again.modules()))


def test_a_copy_has_its_own_norms() -> None:
    other = network()
    folded(other)
    again, before = copy.deepcopy(other), other(images())
    with torch.no_grad():
        again[1].running_mean.add_(1)
    assert torch.equal(other(images()), before)
    assert not torch.equal(again(images()), before)


# --- and back ---------------------------------------------------------------------------------------------------------


@FLAVOURS
def test_unfreeze_reverts_all(flavour: str) -> None:
    model = network(nn.ReLU6(), flavour)
    untouched = copy.deepcopy(model)
    if flavour == "converted later":
        bn.convert(untouched)
    folded(model, flavour=flavour)
    bn.unfreeze(model)
    for (name, old), (_, new) in zip(untouched.named_modules(), model.named_modules(), strict=True):
        if name or flavour != "converted later":  # convert does not fuse with a ReLU6 that saves its output
            assert type(old) is type(new), name
        assert vars(old).keys() - {"_batchnorm_fused"} == vars(new).keys() - {"_batchnorm_fused"}, name
    assert all(p.requires_grad for p in model.parameters())
    assert_same(untouched.eval(), model.eval(), images())


@pytest.mark.parametrize("part", ["statistics", "gamma", "beta"])
def test_a_part_that_is_unfrozen_ends_the_fold(part: str) -> None:
    model = network()
    frozen = {name: name == part for name in ("statistics", "gamma", "beta")}
    folded(model)
    bn.unfreeze(model, **frozen)
    assert not any(map(is_folded, model.modules()))
    assert type(model[0]) is nn.Conv2d
    assert (type(model[1]) in FROZEN) is (part != "statistics")
    plain = network()
    bn.freeze(plain, **{name: not value for name, value in frozen.items()})
    assert_same(plain.eval(), model.eval(), images())


def test_a_norm_that_is_unfrozen_alone() -> None:
    """The map outside of the part sees it, and runs as usual."""
    model, other = frozen_and_folded(network)
    bn.unfreeze(other[1])
    bn.unfreeze(model[1])
    assert is_folded(other[4])
    assert_same(model.eval(), other.eval(), images())
    bn.unfreeze(other)
    assert type(other[0]) is nn.Conv2d
    assert vars(other[0]).keys() == vars(nn.Conv2d(1, 1, 1)).keys()


def test_freezing_again() -> None:
    model = network()
    assert folded(model) == folded(model)
    assert bn.freeze(model).folding is None
    assert sum(map(is_folded, model.modules())) == 2
    bn.unfreeze(model)
    assert type(model[1]) is nn.BatchNorm2d


# --- what is kept -----------------------------------------------------------------------------------------------------


class Padded(nn.Module):
    """The activation's output is padded before the next convolution keeps it."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm, self.act, self.conv2 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), act, nn.Conv2d(8, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.pad(self.act(self.norm(self.conv1(x))), (1, 1, 1, 1)))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True), nn.LeakyReLU()])
def test_a_mask_where_nothing_else_keeps_the_output(act: nn.Module) -> None:
    torch.manual_seed(SEED)
    plain = perturbed(Padded(act).double(), SEED).train()
    model, other = copy.deepcopy(plain), copy.deepcopy(plain)
    bn.freeze(model)
    (layer,) = folded(other).layers
    assert (layer.name, layer.through, layer.activation, layer.keeps) == ("norm", "conv1", type(act).__name__, "mask")
    assert_same(model, other, images())
    values = 4 * 8 * 25
    padded, weights = 8 * 4 * 8 * 49, 8 * (3 * 8 + 8)
    assert bn.memory(other, images()).total == 8 * images().numel() + values + padded + weights
    bn.unfreeze(other)
    assert vars(other.act).keys() == vars(act).keys()


@pytest.mark.parametrize(
    ("act", "keeps"),
    [
        *((act, "output") for act in (nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.Tanh(), nn.Sigmoid())),
        *((act, "input") for act in (nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.LeakyReLU(-0.1))),
    ],
    ids=str,
)
def test_what_an_activation_keeps(act: nn.Module, keeps: str) -> None:
    model = network(act)
    record = folded(model)
    assert {layer.keeps for layer in record.layers} == {keeps}
    assert (", the next map its output: batchnorm.lean" in str(record)) is (keeps == "input")
    maps = 8 * sum(4 * n for n in (75, 6 * 25, 4 * 9, 36)) if keeps == "output" else 8 * 4 * (75 + 300 + 72 + 36)
    weights = 8 * (6 * 27 + 6 + 4 * 27 + 4)
    assert bn.memory(model, images()).total == maps + weights
    frozen = network(act)
    bn.freeze(frozen)
    assert bn.memory(model, images(64, 3, 5, 5)).total < bn.memory(frozen, images(64, 3, 5, 5)).total


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("ResNet-50", 53), ("MobileNetV2", 52)])
def test_networks_keep_a_third_less(name: str, count: int) -> None:
    pytest.importorskip("transformers")
    from batchnorm.bench.networks import MODELS

    torch.manual_seed(SEED)
    plain, x = perturbed(MODELS[name].build(), SEED).train(), torch.randn(2, 3, 64, 64)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model, other = copy.deepcopy(plain), copy.deepcopy(plain)
    bn.freeze(model)
    bn.convert(model)
    record = folded(other, x)
    assert len(record.layers) == count
    assert record.max_error < 1e-5
    assert record.gradient_error < 1e-4
    many = torch.randn(8, 3, 128, 128)
    parameters = sum(p.nbytes for p in other.parameters())  # kept once more, whatever the number of images
    assert bn.memory(other, many).total - parameters < 0.65 * bn.memory(model, many).total
    bn.revert(model)
    assert_same(model.double(), other.double(), x.double())


# --- with the other tools ---------------------------------------------------------------------------------------------


def test_watch_names_the_reason(tmp_path: Path) -> None:
    model = nn.Sequential(network(), nn.BatchNorm1d(2).double())
    record = bn.freeze(model[0], fold=True, example=images()).folding
    assert len(record.layers) == 2
    with bn.watch(model, tmp_path / "run", schedule=bn.every(1)) as run:
        model(images())
    assert [layer["name"] for layer in run.info["layers"]] == ["1"]
    reasons = {each["name"]: each["why"] for each in run.info["skipped"]}
    assert reasons.keys() == {"0.1", "0.4"}
    assert set(reasons.values()) == {
        "frozen and folded: the convolution or linear layer before it applies it through its weights"
    }


def test_fold_names_the_reason() -> None:
    model = network().eval()
    folded(model)
    record = bn.fold(model, images())
    assert {layer.why for layer in record.skipped} == {"frozen, and applied by the map before it: unfreeze it first"}
    bn.unfreeze(model)
    assert len(bn.fold(model, images()).layers) == 2


def test_the_class_is_listed() -> None:
    model = network()
    folded(model)
    assert FROZEN[type(model[1])] is nn.BatchNorm2d
    assert type(model[1]).__name__ == "FoldedBatchNorm2d"
    assert type(model[1]) is not frozen_class(nn.BatchNorm2d)
