"""Frozen layers stay frozen, whatever is done to the model, and come back as they were."""

from __future__ import annotations

import copy
import io
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it
from zoo import BasicBlock, ResNet

import batchnorm as bn
from batchnorm.surgery._fusing import runtime
from batchnorm.surgery._shared.layers import (
    FROZEN,
    OURS,
    STOCK,
    find,
)
from batchnorm.surgery.freeze import _MEMORY as MEMORY
from batchnorm.surgery.freeze import freeze, frozen_class, unfreeze

FLAVOURS = pytest.mark.parametrize("flavour", ["stock", "ours", "converted"])
SHAPES = {"1d": (6, 3, 4), "2d": (6, 3, 4, 2), "3d": (6, 3, 4, 2, 2), "chNorm": (6, 3, 4)}


class Vouched(nn.BatchNorm2d):
    """Normalizes as torch.nn's does, and then does something of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class Functional(nn.BatchNorm2d):
    """Rewritten by convert; does not count batches."""

    def forward(self, input: Tensor) -> Tensor:
        by_batch, momentum = self.training, self.momentum
        z = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, by_batch, momentum, self.eps
        )
        return F.relu(z)


class Closed(nn.BatchNorm2d):
    def __init_subclass__(cls) -> None:
        raise AssertionError("no subclass is made behind its back")


def network(flavour: str = "stock") -> nn.Module:
    torch.manual_seed(0)
    norm = bn.BatchNorm2d if flavour == "ours" else nn.BatchNorm2d
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 1), norm(4), nn.Flatten(), nn.Linear(36, 2)
    )
    model(torch.randn(8, 3, 5, 5))
    if flavour == "converted":
        bn.convert(model)
    return model


def images() -> Tensor:
    return 3 + 2 * torch.randn(4, 3, 5, 5)


def statistics(model: nn.Module) -> dict[str, Tensor]:
    found = {name: value.clone() for name, value in model.named_buffers()}
    assert found
    return found


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()


def assert_frozen(model: nn.Module) -> None:
    """Training moves no statistic, and forward is that of eval mode."""
    before = statistics(model)
    train(model)
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)
    x = images()
    torch.testing.assert_close(model.train()(x), model.eval()(x), rtol=0, atol=0)


def assert_unfrozen(model: nn.Module) -> None:
    before = {name: value for name, value in statistics(model).items() if "running" in name}
    train(model)
    after = statistics(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)


@FLAVOURS
def test_story_5_train_unfreezes_what_eval_froze(flavour: str) -> None:
    """pytorch/pytorch#86590, #66073, lightly-ai/lightly#1438, keras-team/keras#9522."""
    model = network(flavour)
    for layer in (model[1], model[4]):
        layer.eval()
        layer.requires_grad_(False)
    assert_unfrozen(model)
    freeze(model)
    assert_frozen(model)


@pytest.mark.parametrize("cls", [*STOCK, *OURS], ids=lambda cls: f"{cls.__module__.split('.')[0]} {cls.__name__}")
def test_every_class_has_a_frozen_one(cls: type[nn.Module]) -> None:
    layer = cls(3, 2) if cls.__name__.startswith("Ghost") else cls(3)
    x = torch.randn(SHAPES.get(cls.__name__[-2:], (4, 3, 5, 5)))
    layer(x)
    expected = copy.deepcopy(layer).eval()(x)
    keys = list(layer.state_dict())
    freeze(layer)
    assert isinstance(layer, cls)
    assert type(layer).__name__ == f"Frozen{cls.__name__}"
    assert FROZEN[type(layer)] is cls
    torch.testing.assert_close(layer.train()(x), expected, rtol=0, atol=0)
    assert list(layer.state_dict()) == keys
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer)
    torch.testing.assert_close(again.train()(x), expected, rtol=0, atol=0)
    assert unfreeze(layer).layers[0].parts == ("statistics", "gamma", "beta")
    assert type(layer) is cls


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def toggled(model: nn.Module) -> nn.Module:
    for mode in (True, False, True):
        model.train(mode)
    for module in model.modules():
        module.training = True
    return model


def loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict(network().state_dict(), strict=True)
    return model


def reset(model: nn.Module) -> nn.Module:
    for norm in find("reset", model)[0]:
        norm.layer.reset_running_stats()
    return model


def traced(model: nn.Module) -> nn.Module:
    return torch.fx.symbolic_trace(model)


LIVES: list[Callable[[nn.Module], nn.Module]] = [
    copy.deepcopy,
    copy.copy,
    lambda model: pickle.loads(pickle.dumps(model)),
    through_torch_save,
    toggled,
    loaded,
    reset,
    traced,
    lambda model: model.double().float(),
    lambda model: torch.optim.swa_utils.AveragedModel(model).module,
]


@FLAVOURS
@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_it_survives(life: Callable[[nn.Module], nn.Module], flavour: str) -> None:
    model = network(flavour)
    freeze(model)
    model = life(model)
    assert_frozen(model)
    kept = [model.get_parameter(f"{name}.{kind}") for name in "14" for kind in ("weight", "bias")]
    assert not any(p.requires_grad for p in kept)
    unfreeze(model)
    assert all(p.requires_grad for p in kept)
    assert_unfrozen(model)


def test_it_survives_conversion_and_its_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ResNet(BasicBlock(8, 8), out=8)
    model(torch.randn(4, 3, 8, 8))
    plain = copy.deepcopy(model)
    before = {name: type(module) for name, module in model.named_modules()}
    freeze(model)
    record = bn.convert(model)
    assert record.converted == len(record.layers) == len(find("test", model)[0])
    assert record.fused == bn.convert(plain).fused > 1
    layers = [norm.layer for norm in find("test", model)[0]]
    assert all(isinstance(layer, bn.BatchNorm2d) and type(layer) in FROZEN for layer in layers)
    fused = []
    finish = runtime.Deferred.finish
    monkeypatch.setattr(runtime.Deferred, "finish", lambda *a: fused.append(a[1:]) or finish(*a))
    x = torch.randn(4, 3, 8, 8)
    y = model.train()(x)
    assert sum(len(each) > 0 for each in fused) == record.fused
    torch.testing.assert_close(y, plain.eval()(x))
    bn.revert(model)
    assert {type(layer) for layer in layers} == {frozen_class(nn.BatchNorm2d)}
    torch.testing.assert_close(model.train()(x), plain(x))
    unfreeze(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_layer_frozen_before_conversion_unfreezes_to_ours_and_reverts() -> None:
    model = network()
    freeze(model)
    bn.convert(model)
    unfreeze(model)
    assert type(model[1]) is bn.BatchNorm2d
    assert_unfrozen(model)
    bn.revert(model)
    assert type(model[1]) is nn.BatchNorm2d


@FLAVOURS
def test_compiled(flavour: str) -> None:
    model = network(flavour)
    freeze(model, gamma=False, beta=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_frozen(compiled)
    unfreeze(model)
    assert_unfrozen(compiled)
    freeze(model)
    assert_frozen(compiled)


def test_distributed() -> None:
    """broadcast_buffers sends the statistics to all at every forward."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        model = network()
        freeze(model)
        assert_frozen(nn.parallel.DistributedDataParallel(model))
        synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(network())
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            synchronized(images())
        freeze(synchronized)
        assert_frozen(synchronized)
    finally:
        torch.distributed.destroy_process_group()


@FLAVOURS
def test_update_bn_does_not_unfreeze(flavour: str) -> None:
    """What PyTorch does to layers that were only put in eval mode, and to frozen ones."""
    model = network(flavour)
    model[1].eval()
    before = statistics(model)
    torch.optim.swa_utils.update_bn([images()], model)
    assert not torch.equal(statistics(model)["1.running_mean"], before["1.running_mean"])
    freeze(model[1])
    before = statistics(model)
    torch.optim.swa_utils.update_bn([images()], model)
    after = statistics(model)
    assert {name for name in before if torch.equal(after[name], before[name])} == {
        *("1.running_mean", "1.running_var", "1.num_batches_tracked"),
        "4.num_batches_tracked",  # one batch before and after
    }
    assert model[1].momentum == 0.1


@FLAVOURS
def test_story_24_sync_conversion_refuses(flavour: str) -> None:
    """pytorch/pytorch#187298 is of dropped activations; a frozen layer would be unfrozen silently too."""
    model = nn.Sequential(network(flavour))
    freeze(model)
    with pytest.raises(TypeError, match="convert_sync_batchnorm would unfreeze this layer"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert_frozen(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_script_refuses() -> None:
    model = network()
    freeze(model)
    with pytest.raises(TypeError, match="would unfreeze FrozenBatchNorm2d"):
        torch.jit.script(model)
    assert_frozen(model)


@FLAVOURS
@pytest.mark.parametrize("parts", [{"statistics"}, {"gamma"}, {"beta"}, {"gamma", "beta"}, {"statistics", "beta"}])
def test_each_part_alone(parts: set[str], flavour: str) -> None:
    model = network(flavour)
    wanted = {part: part in parts for part in ("statistics", "gamma", "beta")}
    assert {part for layer in freeze(model, **wanted).layers for part in layer.parts} == parts
    before = copy.deepcopy(model.state_dict())
    train(model)
    after = model.state_dict()
    for name in ("1", "4"):
        kinds = {"statistics": "running_var", "gamma": "weight", "beta": "bias"}
        for part, kind in kinds.items():
            assert torch.equal(before[f"{name}.{kind}"], after[f"{name}.{kind}"]) is (part in parts)
    assert {part for layer in unfreeze(model).layers for part in layer.parts} == parts
    assert_unfrozen(model)


def test_the_gradient_from_before_moves_nothing() -> None:
    """An optimizer that holds all parameters takes its step with whatever gradient is there."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    model(images()).square().mean().backward()
    freeze(model)
    before = model[1].weight.clone()
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert torch.equal(model[1].weight, before)


def test_what_was_not_trained_before_is_not_trained_after() -> None:
    model = network()
    model[1].weight.requires_grad_(False)
    model.eval()
    freeze(model)
    freeze(model)
    model = copy.deepcopy(model)
    assert not any(module.training for module in model.modules())
    unfreeze(model)
    assert [p.requires_grad for p in (*model[1].parameters(), *model[4].parameters())] == [False, True, True, True]
    assert not any(module.training for module in model.modules()), "eval() was the last that was asked for"
    assert vars(model[1]).keys() == vars(nn.BatchNorm2d(4)).keys()


def test_a_part_is_unfrozen_alone_and_frozen_later() -> None:
    model = network()
    freeze(model, gamma=False)
    freeze(model, statistics=False, beta=False)
    assert unfreeze(model, statistics=False, beta=False).layers[0].parts == ("gamma",)
    assert model[1].weight.requires_grad
    assert not model[1].bias.requires_grad
    assert_frozen(model)


def test_a_gamma_that_two_layers_share() -> None:
    model = network()
    model[4].weight = model[1].weight
    freeze(model[1])
    freeze(model)
    assert not model[4].weight.requires_grad
    unfreeze(model)
    assert model[1].weight.requires_grad


def test_a_shared_layer_is_one() -> None:
    layer = nn.BatchNorm1d(3)
    record = freeze(nn.ModuleDict({"a": layer, "b": layer}))
    assert [each.names for each in record.layers] == [("a", "b")]
    assert "a, b" in str(record)


def test_what_cannot_be_frozen_is_named() -> None:
    model = nn.ModuleDict(
        {
            "batch": nn.BatchNorm1d(3, track_running_stats=False),
            "bare": nn.BatchNorm1d(3, affine=False),
            "gone": nn.BatchNorm1d(3, affine=False, track_running_stats=False),
            "lazy": nn.LazyBatchNorm1d(),
            "own": Vouched(3),
        }
    )
    record = freeze(model)
    assert {layer.names[0]: layer.parts for layer in record.layers} == {
        "batch": ("gamma", "beta"),
        "bare": ("statistics",),
    }
    reasons = {name: [each.why for each in record.skipped if each.name == name] for name in model}
    assert "no running statistics" in reasons["batch"][0]
    assert reasons["bare"] == ["it has no gamma", "it has no beta"]
    assert len(reasons["gone"]) == 3
    assert "lazy" in reasons["lazy"][0]
    assert "`also`" in reasons["own"][0]
    text = str(record)
    assert text.splitlines()[0] == "2 batch norm layers frozen"
    assert "BatchNorm1d  not frozen (it has no gamma): bare, gone" in text


def test_listed_subclasses_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Vouched(3))
    record = freeze(model, also=[Vouched])
    assert [layer.kind for layer in record.layers] == ["Vouched"]
    for again in (model, copy.deepcopy(model), through_torch_save(model)):
        assert_frozen(again)
        assert isinstance(again[1], Vouched)
        assert again[1](torch.randn(2, 3, 2, 2)).min() >= 0
        bn.convert(again)
        assert_frozen(again)
        unfreeze(again)
        assert type(again[1]) is Vouched
        assert_unfrozen(again)


def test_a_listed_subclass_that_convert_rewrote() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Functional(3))
    assert bn.convert(model).fused == 1
    record = freeze(model, also=[Functional, type(model[1])])
    assert [layer.kind for layer in record.layers] == ["Functional"]
    assert_frozen(through_torch_save(model))
    bn.convert(model)
    assert_frozen(through_torch_save(model))
    unfreeze(model)
    assert isinstance(model[1], Functional)
    assert_unfrozen(model)


def test_a_class_that_may_not_be_subclassed_is_named() -> None:
    record = freeze(nn.Sequential(Closed(3)), gamma=False, beta=False, also=[Closed])
    assert record.layers == ()
    assert "__init_subclass__" in record.skipped[0].why


@FLAVOURS
def test_a_watched_model(flavour: str, tmp_path: Path) -> None:
    model = network(flavour)
    freeze(model[1])
    with bn.watch(model, tmp_path / "run", schedule=bn.every(1)) as run:
        train(model)
    assert [layer["name"] for layer in run.info["layers"]] == ["4"]
    assert [(each["name"], each["why"].split(":")[0]) for each in run.info["skipped"]] == [("1", "frozen")]
    freeze(model)
    with pytest.raises(ValueError, match="no batch norm layer to watch in this Sequential; 1: frozen"):
        bn.watch(model, tmp_path / "other")


def test_frozen_while_watched(tmp_path: Path) -> None:
    model = network("ours")
    with bn.watch(model, tmp_path / "run", schedule=bn.every(1)) as run:
        train(model)
        freeze(model[1])
        train(model)
    assert run.step == 6
    freeze(model)
    assert_frozen(model)


def test_an_interrupt_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    model(images()).mean().backward()
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    setter = nn.Parameter.requires_grad_
    calls = []

    def interrupted(self: nn.Parameter, requires_grad: bool = True) -> nn.Parameter:
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return setter(self, requires_grad)

    for change in (freeze, unfreeze):
        if change is unfreeze:
            freeze(model)
        was = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
        state = [{**vars(layer), MEMORY: dict(vars(layer).get(MEMORY, {}))} for layer in (model[1], model[4])]
        classes = [type(layer) for layer in model]
        with monkeypatch.context() as patch:
            calls.clear()
            patch.setattr(nn.Parameter, "requires_grad_", interrupted)
            with pytest.raises(KeyboardInterrupt):
                change(model)
        assert len(calls) == 4
        now = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
        assert all(now[name][0] is was[name][0] and now[name][1] is was[name][1] for name in was)
        assert [type(layer) for layer in model] == classes
        assert [{MEMORY: {}, **vars(layer)} for layer in (model[1], model[4])] == state
    unfreeze(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {name: v[0] for name, v in before.items()}


def test_mistakes() -> None:
    with pytest.raises(TypeError, match=r"freeze takes a torch.nn.Module, got dict"):
        freeze({})
    with pytest.raises(TypeError, match=r"unfreeze takes a torch.nn.Module, got dict"):
        unfreeze({})
    with pytest.raises(ValueError, match="nothing to freeze: set statistics, gamma or beta to True"):
        freeze(network(), statistics=False, gamma=False, beta=False)
    with pytest.raises(TypeError, match="gamma must be True or False, got str"):
        freeze(network(), gamma="no")
    with pytest.warns(UserWarning, match="freeze found no batch norm layer in it"):
        assert str(freeze(nn.Linear(2, 2))) == "0 batch norm layers frozen"
    with pytest.warns(UserWarning, match="unfreeze found no batch norm layer in it"):
        unfreeze(nn.Linear(2, 2))
    assert str(freeze(nn.BatchNorm1d(2))).splitlines()[0] == "1 batch norm layer frozen"
    assert str(unfreeze(network())) == "0 batch norm layers unfrozen"
