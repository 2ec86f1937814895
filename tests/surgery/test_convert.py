"""A converted model against the same model as it was: numbers, state, identity, copies, and the way back."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from zoo import WITHOUT_NORMS, ZOO, BasicBlock, Bottleneck, Kind, NormAct, ResNet, plain_cnn

import batchnorm as bn
from batchnorm.surgery._fusing import runtime

MODELS = pytest.mark.parametrize("name", ZOO)
TYPES = {nn.BatchNorm1d: (6, 3, 4), nn.BatchNorm2d: (6, 3, 4, 2), nn.BatchNorm3d: (6, 3, 4, 2, 2)}
EVERY = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
OURS = {nn.BatchNorm1d: bn.BatchNorm1d, nn.BatchNorm2d: bn.BatchNorm2d, nn.BatchNorm3d: bn.BatchNorm3d}


def pair(kind: Kind) -> tuple[nn.Module, nn.Module, Tensor]:
    """Two equal models of a kind in float64, and an input."""
    torch.manual_seed(3)
    model = kind.make().double()
    x = torch.randn(kind.shape, dtype=torch.float64)
    model(x)
    return model, copy.deepcopy(model), x


def assert_same(model: nn.Module, stock: nn.Module, x: Tensor) -> None:
    """Outputs, the gradients of input and parameters, and what the state dicts hold, with the same random numbers."""
    found = []
    for one in (model, stock):
        torch.manual_seed(11)
        one.zero_grad()
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        y.square().sum().backward()
        found.append((y, leaf.grad, {n: p.grad for n, p in one.named_parameters()}, dict(one.state_dict())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)


def joined_at_run_time(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many transforms of one forward had a residual or an activation."""
    count = 0
    finish = runtime.Deferred.finish

    def counted(self: runtime.Deferred, activation=runtime.Activation(None)) -> Tensor:  # noqa: B008
        nonlocal count
        count += activation.act is not None or self.residual is not None
        return finish(self, activation)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.Deferred, "finish", counted)
        torch.manual_seed(7)
        model(x)
    return count


@WITHOUT_NORMS
@MODELS
def test_the_same_numbers_in_training_and_in_eval(name: str) -> None:
    model, stock, x = pair(ZOO[name])
    bn.convert(model)
    for training in (True, False, True):
        model.train(training)
        stock.train(training)
        assert_same(model, stock, x)


@WITHOUT_NORMS
@MODELS
def test_finds_the_layers_and_what_follows_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ZOO[name]
    model, _, x = pair(kind)
    record = bn.convert(model)
    assert (record.converted, record.fused) == (kind.converted, kind.fused), record
    assert joined_at_run_time(model, x, monkeypatch) == kind.fused, "what the record says is what runs"


@WITHOUT_NORMS
@MODELS
def test_an_optimizer_from_before_trains_on(name: str) -> None:
    model, stock, x = pair(ZOO[name])
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (model, stock)]
    bn.convert(model)
    for step in range(5):
        for one, optimizer in zip((model, stock), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            one(x + 0.1 * step).square().mean().backward()
            optimizer.step()
    for (key, mine), theirs in zip(model.state_dict().items(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, key=key: f"{key}: {text}")
    assert_same(model.eval(), stock.eval(), x)


@WITHOUT_NORMS
@MODELS
def test_state_dicts_load_strictly_both_ways(name: str) -> None:
    model, stock, x = pair(ZOO[name])
    other = ZOO[name].make().double()
    other(x)
    bn.convert(other)
    assert list(other.state_dict()) == list(stock.state_dict())
    assert other.state_dict()._metadata == stock.state_dict()._metadata
    other.load_state_dict(stock.state_dict(), strict=True)
    assert_same(other.eval(), stock.eval(), x)
    model.load_state_dict(other.state_dict(), strict=True)
    assert_same(other, model.eval(), x)


@WITHOUT_NORMS
@MODELS
def test_no_tensor_and_no_module_is_exchanged(name: str) -> None:
    model, _, _ = pair(ZOO[name])
    before = dict(model.named_parameters()) | dict(model.named_buffers()) | dict(model.named_modules())
    bn.convert(model)
    after = dict(model.named_parameters()) | dict(model.named_buffers()) | dict(model.named_modules())
    assert list(before) == list(after)
    assert all(before[key] is after[key] for key in before)


@WITHOUT_NORMS
@MODELS
def test_revert_goes_back_exactly(name: str) -> None:
    model, stock, x = pair(ZOO[name])
    before = [dict(vars(module)) for module in model.modules()]
    bn.convert(model)
    bn.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    for module, attributes in zip(model.modules(), before, strict=True):
        assert list(vars(module)) == list(attributes)
        assert all(vars(module)[key] is value for key, value in attributes.items())
    assert_same(model, stock, x)
    bn.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


@WITHOUT_NORMS
@MODELS
def test_converting_twice_is_converting_once(name: str) -> None:
    model, stock, x = pair(ZOO[name])
    first = bn.convert(model)
    classes = [type(module) for module in model.modules()]
    assert bn.convert(model) == first
    assert [type(module) for module in model.modules()] == classes
    assert_same(model, stock, x)
    bn.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@WITHOUT_NORMS
@MODELS
def test_copies_are_converted_too_and_revert(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock, x = pair(ZOO[name])
    bn.convert(model)
    other = COPIES[how](model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert joined_at_run_time(other, x, monkeypatch) == joined_at_run_time(model, x, monkeypatch)
    torch.manual_seed(7)
    stock(x)
    assert_same(other, stock, x)
    bn.revert(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in stock.modules()]


def test_a_shallow_copy_runs_on_its_own_modules() -> None:
    model, stock, x = pair(ZOO["ResNet, basic"])
    bn.convert(model)
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.layer1 = nn.Identity()
    stock.layer1 = nn.Identity()
    other.fc = stock.fc = nn.Linear(8, 2).double()
    torch.testing.assert_close(other.eval()(x), stock.eval()(x))


def test_without_fuse_only_the_layers_change() -> None:
    model, stock, x = pair(ZOO["ResNet, basic"])
    record = bn.convert(model, fuse=False)
    assert (record.converted, record.fused) == (6, 0)
    assert {layer.why_not for layer in record.layers} == {"fuse=False"}
    changed = {type(m) for m in model.modules()} - {type(m) for m in stock.modules()}
    assert changed == {bn.BatchNorm2d}
    assert_same(model, stock, x)


def test_converting_again_follows_the_model() -> None:
    model, stock, _ = pair(ZOO["ResNet, nested"])
    bn.convert(model)
    assert bn.convert(model, fuse=False).fused == 0
    changed = {type(m) for m in model.modules()} - {type(m) for m in stock.modules()}
    assert changed == {bn.BatchNorm2d}
    assert bn.convert(model).fused == 5


@EVERY
def test_the_model_may_be_a_layer(kind: type[nn.Module]) -> None:
    layer = kind(3)
    record = bn.convert(layer)
    assert type(layer) is OURS[kind]
    assert [(entry.name, entry.kind, entry.converted) for entry in record.layers] == [("", kind.__name__, True)]
    stock = kind(3)
    x = torch.randn(TYPES[kind])
    torch.testing.assert_close(layer(x), stock(x))
    bn.revert(layer)
    assert type(layer) is kind


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 1e-2, "momentum": 0.7}],
    ids=str,
)
@EVERY
def test_settings_and_attributes_stay(kind: type[nn.Module], options: dict) -> None:
    layer, stock = kind(3, **options), kind(3, **options)
    layer.note = stock.note = ["mine"]
    if layer.affine:
        layer.bias.requires_grad_(False)
    model = nn.Sequential(layer, nn.ReLU())
    bn.convert(model)
    assert type(model[0]) is OURS[kind]
    assert repr(model).replace(", fused with relu", "") == repr(nn.Sequential(stock, nn.ReLU()))
    assert layer.note is not None
    assert [p.requires_grad for p in layer.parameters()] == ([True, False] if layer.affine else [])
    for _ in range(3):
        x = torch.randn(TYPES[kind]) + 1
        torch.testing.assert_close(model(x), stock(x).relu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(layer.state_dict()), dict(stock.state_dict()))


@pytest.mark.parametrize("frozen", ["eval", "requires_grad"])
def test_frozen_layers_stay_frozen(frozen: str) -> None:
    model, stock, x = pair(ZOO["ResNet, basic"])
    for one in (model, stock):
        for module in one.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval() if frozen == "eval" else module.requires_grad_(False)
    bn.convert(model)
    assert_same(model, stock, x)
    assert model.bn1.training is (frozen != "eval")


def test_layers_shared_between_places_stay_one_object() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU(), nn.Conv2d(3, 3, 1), norm, nn.Sigmoid())
    stock = copy.deepcopy(model)
    record = bn.convert(model)
    assert model[1] is model[4] is norm
    assert [layer.names for layer in record.layers] == [("1", "4")]
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        torch.testing.assert_close(model(x), stock(x))
    torch.testing.assert_close(dict(model.state_dict()), dict(stock.state_dict()))


def calls_of_hooks(convert: bool, after: bool) -> list[str]:
    """What hooks of every kind report, over a training step, a save and a load."""
    torch.manual_seed(4)
    model = ResNet(BasicBlock(8, 8), out=8)
    model.layer1[0].relu.inplace = False  # what a full backward hook's output does not allow
    if convert and not after:
        bn.convert(model)
    calls = []

    def report(what: str, tensors) -> None:
        known = [f"{float(t.detach().sum()):.3f}" for t in tensors if isinstance(t, Tensor)]
        calls.append(f"{what} {known}")

    for name, module in model.named_modules():
        if name in ("bn1", "relu", "layer1", "layer1.0", "layer1.0.bn1", "layer1.0.relu", "layer1.0.bn2"):
            module.register_forward_pre_hook(lambda m, a, n=name: report(f"{n} before", a))
            module.register_forward_hook(lambda m, a, k, y, n=name: report(f"{n} {k}", [y]), with_kwargs=True)
            module._register_load_state_dict_pre_hook(lambda *a, n=name: report(f"{n} load", []))
            module.register_state_dict_post_hook(lambda *a, n=name: report(f"{n} save", []))
        if name == "layer1.0.bn1":
            module.register_full_backward_hook(lambda m, a, b, n=name: report(f"{n} backward", [*a, *b]))
    if convert and after:
        bn.convert(model)
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    model.load_state_dict(model.state_dict())
    return calls


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("after", [True, False], ids=["before", "after"])
def test_hooks_see_the_same_values_whether_set_before_or_after(after: bool) -> None:
    stock = calls_of_hooks(convert=False, after=False)
    assert len(stock) > 30
    assert calls_of_hooks(convert=True, after=after) == stock


def test_a_hook_on_a_layer_is_in_the_record() -> None:
    model = ResNet(BasicBlock(8, 8), out=8)
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    why = {layer.name: layer.why_not for layer in bn.convert(model).layers}
    assert why == {"bn1": None, "layer1.0.bn1": "it has hooks", "layer1.0.bn2": None}


def test_global_hooks_see_every_module() -> None:
    seen: dict[bool, list[str]] = {}
    for converted in (False, True):
        model = ResNet(BasicBlock(8, 8), out=8)
        if converted:
            bn.convert(model)
        names = {module: name for name, module in model.named_modules()}
        seen[converted] = []
        hook = nn.modules.module.register_module_forward_hook(lambda m, *_, k=converted, n=names: seen[k].append(n[m]))
        model(torch.randn(2, 3, 6, 6))
        hook.remove()
    assert seen[True] == seen[False]


class Subclass(nn.BatchNorm2d):
    """Only its name is its own."""


def not_converted() -> dict[str, tuple[nn.Module, str]]:
    taken = nn.BatchNorm2d(3)
    taken.act = nn.ReLU()
    replaced = nn.BatchNorm2d(3)
    replaced.forward = lambda x: x
    parametrized = nn.BatchNorm2d(3)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    return {
        "subclass": (Subclass(3), "a subclass of BatchNorm2d"),
        "lazy": (nn.LazyBatchNorm2d(), "lazy: run a batch through the model first"),
        "synchronized": (nn.SyncBatchNorm(3), "SyncBatchNorm: convert it with batchnorm.sync(model)"),
        "instance": (nn.InstanceNorm2d(3), "InstanceNorm: no batch statistics"),
        "attribute": (taken, "the instance has a custom attribute 'act'"),
        "method": (replaced, "the instance has a custom attribute 'forward'"),
        "parametrized": (parametrized, "parametrized: its class is made by torch.nn.utils.parametrize"),
    }


@pytest.mark.parametrize("which", not_converted())
def test_unconverted_layers_are_named_and_unchanged(which: str) -> None:
    layer, why = not_converted()[which]
    model = nn.Sequential(layer, nn.ReLU())
    cls = type(layer)
    record = bn.convert(model)
    assert [(entry.name, entry.converted, entry.why_not) for entry in record.layers] == [("0", False, why)]
    assert type(layer) is cls
    assert type(model) is nn.Sequential
    assert "not converted" in str(record)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_torchscript_is_named_and_unchanged() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), scripted)
    stock = copy.deepcopy(model)
    record = bn.convert(model)
    assert [(entry.name, entry.converted) for entry in record.layers] == [("0", True), ("2.0", False)]
    assert record.layers[1].why_not == "TorchScript runs its own compiled code"
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(model(x), stock(x))


def test_a_subclass_that_calls_the_function_is_rewritten_and_stays_that_subclass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4, nn.Tanh()))
    record = bn.convert(model)
    assert isinstance(model[1], NormAct)
    assert [(entry.kind, entry.act, entry.converted) for entry in record.layers] == [("NormAct", "tanh", True)]


def test_our_own_layers_are_fused_and_stay_ours_after_revert() -> None:
    model = nn.Sequential(bn.BatchNorm1d(3), nn.ReLU(), bn.BatchNorm1d(3, act="tanh"), nn.Sigmoid())
    stock = copy.deepcopy(model)
    record = bn.convert(model)
    assert [entry.act for entry in record.layers] == ["relu", None]
    x = torch.randn(6, 3)
    torch.testing.assert_close(model(x), stock(x))
    bn.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert model[2].act == "tanh"


def test_revert_refuses_to_drop_an_activation_set_since() -> None:
    model = plain_cnn()
    bn.convert(model)
    model[8].act = "relu"
    with pytest.raises(ValueError, match="8 has act='relu', set after the conversion"):
        bn.revert(model)
    assert type(model[1]) is bn.BatchNorm2d, "nothing has changed"
    model[8].act = None
    bn.revert(model)
    assert type(model[8]) is nn.BatchNorm2d


def test_revert_does_not_change_a_model_that_was_never_converted() -> None:
    model = nn.Sequential(bn.BatchNorm2d(3, act="relu"), nn.BatchNorm2d(3), BasicBlock(3, 3))
    types = [type(m) for m in model.modules()]
    bn.revert(model)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize("function", [bn.convert, bn.revert])
def test_non_modules_are_refused_in_one_line(function) -> None:
    for wrong in (None, {"weight": torch.ones(3)}, [nn.BatchNorm1d(3)], BasicBlock):
        with pytest.raises(TypeError, match=r"^(convert|revert) takes a torch.nn.Module, got \w+: pass the model"):
            function(wrong)


def test_an_error_midway_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.surgery import convert as module

    set_class, calls = module.set_class, []

    def failing(target: nn.Module, cls: type) -> None:
        calls.append(cls)
        if len(calls) == 4:
            raise RuntimeError("no room")
        set_class(target, cls)

    model = ResNet(BasicBlock(8, 8), out=8)
    types = [type(m) for m in model.modules()]
    attributes = [list(vars(m)) for m in model.modules()]
    monkeypatch.setattr(module, "set_class", failing)
    with pytest.raises(RuntimeError, match="no room"):
        bn.convert(model)
    assert [type(m) for m in model.modules()] == types
    assert [list(vars(m)) for m in model.modules()] == attributes


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["ResNet, basic", "ResNet, nested", "norm-act", "plain CNN"])
def test_compiled_models_give_the_same_numbers(name: str, backend: str) -> None:
    torch._dynamo.reset()
    model, stock, x = pair(ZOO[name])
    bn.convert(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), stock(x))
    torch.testing.assert_close(dict(model.state_dict()), dict(stock.state_dict()))
    torch._dynamo.reset()


def test_a_traced_converted_model_keeps_its_layers_as_leaves() -> None:
    model, stock, x = pair(ZOO["ResNet, basic"])
    bn.convert(model)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), stock(x))


LARGE = (4, 3, 80, 80)


def operators_of(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The batch norm operators that a compiled training step calls."""
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        found.extend(str(node.target) for node in graph.graph.nodes if "batch" in str(node.target).lower())
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x)
    return [name for name in found if "batchnorm.forward" in name or "batch_norm" in name]


@pytest.mark.skipif(bn.kernels.choose(torch.empty(64, 16, 64, 64)).name != "cpu", reason="without the CPU kernels")
def test_a_compiled_training_step_calls_the_kernels_with_what_is_fused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    stock = copy.deepcopy(model)
    bn.convert(model)
    large = torch.randn(LARGE)
    assert operators_of(model, large) == ["batchnorm.forward"]
    assert all("batch_norm" in name for name in operators_of(model, large[:2, :, :9, :9]))
    assert all("batch_norm" in name for name in operators_of(copy.deepcopy(model).eval(), large))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = [net(large).square().mean() for net in (compiled, stock)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for mine, its in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_a_compiled_transform_of_torch_func_is_the_eager_one(transform: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), bn.BatchNorm2d(8, track_running_stats=False, act="relu"))
    x = torch.randn(LARGE)
    calls = {
        "vmap": lambda x: torch.func.vmap(net)(x.expand(2, *LARGE)),
        "grad": torch.func.grad(lambda x: net(x).square().sum()),
    }
    torch._dynamo.reset()
    compiled = torch.compile(calls[transform], backend="aot_eager")
    torch.testing.assert_close(compiled(x), calls[transform](x), rtol=1e-3, atol=1e-4)


def test_the_record_counts_and_reads_as_a_table() -> None:
    record = bn.convert(ResNet(Bottleneck(8, 4, 10), Bottleneck(10, 4, 10), out=10))
    assert dataclasses.is_dataclass(record)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.layers = ()
    assert str(record).splitlines() == [
        "8 of 8 batch norm layers converted, 7 fused",
        "   5  BatchNorm2d  with relu: bn1, layer1.0.bn1 … layer1.1.bn2",
        "   2  BatchNorm2d  with residual and relu: layer1.0.bn3, layer1.1.bn3",
        "   1  BatchNorm2d  alone (read by shortcut = self.downsample(shortcut)): layer1.0.downsample.1",
    ]


def test_a_model_without_batch_norm() -> None:
    with pytest.warns(UserWarning, match="convert found no batch norm layer in it"):
        record = bn.convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert (record.layers, record.converted, record.fused, str(record)) == ((), 0, 0, "no batch norm layers")
