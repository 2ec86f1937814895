"""Whole models folded, stock and converted: what is left, what the record says, what is undone."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from folds import moved, norms, perturbed
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from zoo import WITHOUT_NORMS, ZOO, BasicBlock, NormAct, ResNet

import batchnorm as bn
from batchnorm.surgery._folding.weights import Epilogue
from batchnorm.surgery.fold import Folding, fold
from batchnorm.surgery.freeze import freeze, unfreeze
from batchnorm.surgery.to_torch import to_torch

# What is left of each model, with the reason: norms of sums and of concatenations, and subclasses.
LEFT = {"plain CNN": 1, "norm-act": 4, "DenseNet": 4}


def trained(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model, x = ZOO[name].make().to(dtype), torch.randn(ZOO[name].shape, dtype=dtype)
    model(x)
    return perturbed(model, seed), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
@WITHOUT_NORMS
@pytest.mark.parametrize("name", ZOO)
def test_folded_models_compute_what_they_did(name: str, converted: bool, dtype: torch.dtype) -> None:
    model, x = trained(name, dtype)
    expected, count = model(x), len(norms(model))
    if converted:
        bn.convert(model)
    record = fold(model, x)
    assert len(norms(model)) == len(record.skipped) == LEFT.get(name, 0)
    assert len(record.layers) == count - LEFT.get(name, 0)
    error = moved(expected, model(x))
    assert error < (1e-12 if dtype == torch.float64 else 1e-5)
    assert all(layer.max_error < 1e-5 and layer.rms_error <= layer.max_error for layer in record.layers)
    assert error <= record.max_error * 2 + 1e-15
    assert 0 <= record.rms_error <= record.max_error <= record.bound


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_a_folded_model(how: Any) -> None:
    model, x = trained("MobileNetV2")
    bn.convert(model)
    fold(model, x)
    other = how(model)
    assert torch.equal(other(x), model(x))
    bn.revert(other)
    assert norms(other) == []
    assert torch.equal(other(x), model(x))
    with pytest.warns(UserWarning, match="convert found no batch norm layer in it"):
        assert bn.convert(other).layers == ()


def test_a_folded_stock_model_is_of_torchs_classes_alone_and_folding_again_does_nothing() -> None:
    model, x = trained("ResNet, basic")
    fold(model, x)
    assert not any(type(m).__module__.startswith("batchnorm") for m in model.modules())
    weights = dict(model.named_parameters())
    with pytest.warns(UserWarning, match="fold found no batch norm layer in it"):
        assert fold(model, x) == Folding((), ())
    assert all(weights[name] is p for name, p in model.named_parameters())


class OurBlock(nn.Module):
    """This package's layers as one writes them by hand: activations and a residual inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1), bn.BatchNorm2d(4, act="leaky_relu", negative_slope=0.2)
        self.conv2, self.bn2 = nn.Conv2d(4, 3, 3, 1, 1), bn.BatchNorm2d(3, act="silu")
        self.conv3, self.bn3 = nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x))), x)), residual=x)


def test_activations_and_residuals_stay() -> None:
    model, x = perturbed(OurBlock().double()), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    before = model(x)
    assert len(fold(model, x).layers) == 3
    assert moved(before, model(x)) < 1e-12
    assert [repr(m) for m in (model.bn1, model.bn2, model.bn3)] == [
        "LeakyReLU(negative_slope=0.2)",
        "Epilogue(act=silu)",
        "Epilogue(act=None)",
    ]
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize(
    "act", [None, "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "sigmoid", "tanh"]
)
def test_every_activation(act: str | None) -> None:
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model = perturbed(nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, act=act)).double())
    before = model(x)
    assert len(fold(model, x).layers) == 1
    assert moved(before, model(x)) < 1e-12
    assert type(model[1]).__module__.startswith("torch.nn")
    assert torch.equal(Epilogue(act)(x, x), Epilogue(act)(2 * x))


def test_story_24_a_fused_activation_is_kept() -> None:
    """pytorch/pytorch#187298, huggingface/pytorch-image-models#1254: tools that see a norm drop its activation."""
    model = perturbed(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4, nn.ReLU())))
    x = torch.randn(2, 3, 5, 5)
    dropped = fuse_conv_bn_eval(model[0], model[1])(x)
    assert dropped.min() < 0 <= model(x).min()
    assert "a subclass of BatchNorm2d, which may compute something else" in fold(model, x).skipped[0].why
    mine = perturbed(nn.Sequential(nn.Conv2d(3, 4, 1), bn.BatchNorm2d(4, act="relu")))
    with pytest.raises(TypeError, match="would drop the activation"):
        fuse_conv_bn_eval(mine[0], mine[1])
    before = mine(x)
    assert len(fold(mine, x).layers) == 1
    assert moved(before, mine(x)) < 1e-5
    assert type(mine[1]) is nn.ReLU


def test_story_15_an_exported_model_has_no_batch_norm_left() -> None:
    """pytorch/pytorch#75252, #49229: what an exporter does with a batch norm is no question where there is none."""
    model, x = trained("ResNet, basic", torch.float32)

    def operators() -> set[str]:
        graph = torch.export.export(model, (x,)).graph
        return {str(node.target) for node in graph.nodes if node.op == "call_function"}

    assert any("batch_norm" in name for name in operators())
    fold(model, x)
    assert not any("batch_norm" in name for name in operators())


def test_story_21_what_is_folded_has_no_statistics_to_drift() -> None:
    """distiller#166, nncf#88: in a fold nothing is left for training mode to move; it computes as in eval mode."""
    model, x = trained("MobileNetV2")
    fold(model, x)
    expected = model(x)
    assert list(model.buffers()) == []
    assert torch.equal(model.train()(x), expected)
    assert [m.training for m in model.modules()] == [True] * len(list(model.modules()))


def test_training_goes_on_with_the_new_parameters() -> None:
    model, x = trained("ResNet, basic")
    fold(model, x)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_after_freezing_and_to_torch() -> None:
    model = perturbed(OurBlock())
    freeze(model)
    fold(model, torch.randn(2, 3, 5, 5))
    with pytest.warns(UserWarning, match="unfreeze found no batch norm layer in it"):
        assert unfreeze(model).layers == ()
    with pytest.raises(ValueError, match="Epilogue"):
        to_torch(model)


def state(model: nn.Module) -> list[Any]:
    """All that a module is: its class, its dictionaries, and what is in them, by identity; and every tensor's bits."""
    everything: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        attributes = vars(module)
        everything.append((name, id(module), type(module), id(attributes)))
        for key, value in attributes.items():
            everything.append((name, key, id(value) if isinstance(value, dict | list) else repr(value)))
            if isinstance(value, dict):
                everything += [(name, key, k, id(v)) for k, v in value.items()]
    everything += [(key, tensor.clone()) for key, tensor in model.state_dict().items()]
    return everything


def assert_as_it_was(model: nn.Module, before: list[Any]) -> None:
    now = state(model)
    assert len(now) == len(before)
    for new, old in zip(now, before, strict=True):
        assert new[:-1] == old[:-1]
        assert torch.equal(new[-1], old[-1]) if isinstance(new[-1], Tensor) else new[-1] == old[-1]


class Interrupted(nn.Module):
    """Raises at its nth call."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.at, self.error = at, error

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        if CALLS[0] == self.at:
            raise self.error
        return x


CALLS = [0]


@pytest.mark.slow
@pytest.mark.parametrize("converted", [False, True], ids=["stock", "converted"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory")], ids=["interrupt", "error"])
def test_an_error_at_any_point_changes_nothing(error: BaseException, converted: bool) -> None:
    model, x = trained("ResNet, basic")
    if converted:
        bn.convert(model)
    for at in range(1, 6):
        model.layer1.append(Interrupted(at, error))
        before, CALLS[0] = state(model), 0
        if at > 4:
            assert len(fold(model, x).layers) == 6, "four runs: before, the look, the trial and after"
            break
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ValueError
        with pytest.raises(expected, match=r"^$|^fold: the model does not run on the example: no memory$"):
            fold(model, x)
        assert_as_it_was(model, before)
        del model.layer1[-1]


def test_an_error_while_folding_restores_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.surgery import fold as rounds

    set_class, calls = rounds.set_class, []

    def failing(module: nn.Module, cls: type, attributes: dict[str, Any]) -> None:
        calls.append(module)
        if len(calls) == 4:
            raise KeyboardInterrupt
        set_class(module, cls, attributes)

    model, x = trained("ResNet, basic")
    before = state(model)
    monkeypatch.setattr(rounds, "set_class", failing)
    with pytest.raises(KeyboardInterrupt):
        fold(model, x)
    assert len(calls) == 4
    assert_as_it_was(model, before)


class Chaotic(nn.Module):
    """Amplifies rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 1e9).sin()


class Hidden(nn.Module):
    """Reads what lies between the pair by its address, where nothing of PyTorch's sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.bn(z) * (1 + ctypes.c_float.from_address(z.data_ptr()).value)


@pytest.mark.parametrize("kind", [Chaotic, Hidden])
def test_the_model_is_restored_if_the_outputs_change_too_much(kind: type[nn.Module]) -> None:
    """Each pair agrees, the whole does not."""
    torch.manual_seed(0)
    model = Hidden() if kind is Hidden else nn.Sequential(ResNet(BasicBlock(8, 8), out=8), Chaotic())
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model(x)
    perturbed(model)
    before = state(model)
    record = fold(model, x)
    assert_as_it_was(model, before)
    assert record.taken_back
    assert record.layers == ()
    assert record.max_error > 1e-2 > record.bound
    assert record.bound == (pytest.approx(1e-3) if kind is Chaotic else 1e-5)
    assert (record.rounding > 1e-2) == (kind is Chaotic)
    assert {skipped.why for skipped in record.skipped} == {
        f"restored: the model's outputs differ by {record.max_error:.1e}, over the bound of {record.bound:.1g}"
    }
    assert "; rounding alone moves them by " in str(record)


def test_no_bound_is_wider_than_a_tenth() -> None:
    model = perturbed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Chaotic())).bfloat16()
    record = fold(model, torch.randn(2, 3, 6, 6, dtype=torch.bfloat16))
    assert record.taken_back
    assert record.bound == 0.1


def test_a_pair_over_the_bound_is_left_and_the_others_are_folded() -> None:
    """A mean of 1e6 deviations: in float32 neither way of computing that channel has digits to spare."""
    model = perturbed(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model[0].bias.fill_(1e3)
        model[1].running_mean.fill_(1e3)
        model[1].running_var.fill_(1e-6)
    left = model[:2]
    before = state(left)
    record = fold(model, x)
    assert_as_it_was(left, before)
    assert [layer.name for layer in record.layers] == ["3"]
    assert [skipped.name for skipped in record.skipped] == ["1"]
    assert record.skipped[0].why.startswith("into the Conv2d before it: its output would differ by ")
    assert len(fold(model, x, bound=1.0).layers) == 1, "the caller may think otherwise"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_types_have_wider_bounds(dtype: torch.dtype) -> None:
    model, x = trained("MobileNetV2", torch.float32)
    model.to(dtype)
    record = fold(model, x.to(dtype))
    assert len(record.layers) == 7
    assert 1e-5 < record.max_error < record.bound


def test_outputs_of_any_structure_are_compared() -> None:
    @dataclasses.dataclass
    class Output:
        logits: Tensor
        ids: Tensor
        more: dict[str, Any]

    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, batch: dict[str, Any], scale: float) -> Output:
            y = self.body(batch["images"]) * scale
            return Output(y, y.argmax(1), {"hidden": [y.mean(), None, y.masked_fill(y < 0, -torch.inf)]})

    model = perturbed(Structured())
    batch = {"images": torch.randn(2, 3, 6, 6), "names": ["a", "b"]}
    record = fold(model, (batch, 2.0))
    assert len(record.layers) == 1
    assert 0 < record.max_error < 1e-5


def test_the_example_is_not_written_to() -> None:
    model = perturbed(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 6, 6)
    kept = x.clone()
    fold(model, x)
    assert torch.equal(x, kept)
    model = perturbed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.inference_mode():
        assert len(fold(model, x).layers) == 1
    assert not any(p.is_inference() for p in model.parameters())


def test_random_numbers_and_gradients_do_not_change() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    model = perturbed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Noisy()))
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    state = torch.get_rng_state()
    assert fold(model, x).max_error < 1e-5, "the same noise before and after"
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None
    assert torch.is_grad_enabled()


def test_float32_is_multiplied_as_float32_while_it_is_compared() -> None:
    """cuDNN's convolutions are in TF32 by default: two right answers would differ in the fourth digit."""

    class PrecisionProbe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            PRECISIONS.append(torch.backends.cudnn.conv.fp32_precision)
            return x

    PRECISIONS.clear()
    before = torch.backends.cudnn.conv.fp32_precision
    assert before == "tf32"
    fold(perturbed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), PrecisionProbe())), torch.randn(2, 3, 6, 6))
    assert set(PRECISIONS) == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == before


PRECISIONS: list[str] = []


def test_the_record_reads_as_a_table() -> None:
    model, x = trained("DenseNet")
    record = fold(model, x)
    assert dataclasses.is_dataclass(record)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.layers = ()
    first, *rows = str(record).splitlines()
    assert first.startswith("3 of 7 batch norm layers folded; outputs differ by ")
    assert first.endswith(" of their largest magnitude, bound 1e-12")
    between = "the Conv2d after it cannot absorb it: the tensor between them has another use (ReLU)"
    assert rows == [
        "   3  BatchNorm2d  into the map before it: layers.0.norm2 → layers.0.conv1, layers.1.norm2 → layers.1.conv1, "
        "layers.2.norm2 → layers.2.conv1",
        f"   3  BatchNorm2d  not folded ({between}): layers.0.norm1, layers.1.norm1, layers.2.norm1",
        "   1  BatchNorm2d  not folded (no convolution or linear layer comes directly before or after it): norm",
    ]
    with pytest.warns(UserWarning, match="fold found no batch norm layer in it"):
        assert str(fold(nn.Sequential(nn.ReLU()).eval(), x)) == "no batch norm layers"


X = torch.ones(1, 3, 5, 5)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no module": ((None,), {}, TypeError, "fold takes a torch.nn.Module, got NoneType: pass the model itself"),
    "a list": (
        ([torch.ones(1)],),
        {},
        TypeError,
        r"got list: pass forward_fn\(model, example\) for any other, or \(list,\) to a model that takes a list",
    ),
    "a string": (("x",), {}, TypeError, "the example must be a tensor, a tuple of the model's arguments or a mapping"),
    "bound 0": ((X,), {"bound": 0}, ValueError, "the bound must be a positive number, got 0"),
    "bound NaN": (
        (torch.ones(1, 3, 5, 5),),
        {"bound": float("nan")},
        ValueError,
        "the bound must be a positive number, got nan",
    ),
    "a word": (
        (torch.ones(1, 3, 5, 5),),
        {"bound": "1e-5"},
        ValueError,
        "the bound must be a positive number, got '1e-5'",
    ),
    "too large": ((torch.ones(1, 5, 3, 3),), {}, ValueError, "fold: the model does not run on the example: "),
    "empty": ((torch.ones(0, 3, 6, 6),), {}, ValueError, "no finite floating-point number on the example"),
    "NaN": ((torch.full((1, 3, 6, 6), torch.nan),), {}, ValueError, "no finite floating-point number on the example"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_folded_is_refused_in_one_line(name: str) -> None:
    arguments, options, error, words = WRONG[name]
    model = perturbed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    before = state(model)
    with pytest.raises(error, match=words) as raised:
        fold(*(None,) if name == "no module" else (model, *arguments), **options)
    assert "\n" not in str(raised.value)
    assert_as_it_was(model, before)


MADE = {
    "1-d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 5), nn.BatchNorm1d(6)), (2, 4, 32)),
    "2-d": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (2, 3, 32, 32)),
    "large": (lambda: nn.Sequential(nn.Conv2d(3, 4, 40), nn.BatchNorm2d(4)), (2, 3, 64, 64)),
    "3-d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2)), (2, 1, 32, 32, 32)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), (2, 5)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4)), (2, 3, 32, 32)),
    "float64": (lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).double(), (2, 5)),
}


@pytest.mark.parametrize("name", MADE)
def test_without_an_example_a_random_input_is_made(name: str) -> None:
    make, sizes = MADE[name]
    model = perturbed(make())
    random = torch.get_rng_state()
    done = fold(model)
    assert done.made == sizes
    assert f"on a random input of shape {[*sizes]}" in str(done)
    assert [layer.into for layer in done.layers]
    assert torch.equal(torch.get_rng_state(), random)


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.map, self.norm = nn.Embedding(9, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(self.map(self.embedding(tokens)))


@pytest.mark.parametrize("model", [_Tokens(), nn.Sequential(nn.BatchNorm1d(3))], ids=["tokens", "no map"])
def test_a_model_that_runs_on_no_random_input_needs_an_example(model: nn.Module) -> None:
    before = state(model.eval())
    with pytest.raises(TypeError, match="fold needs an example of the model's input, to run it on: a tensor, a tuple"):
        fold(model)
    assert_as_it_was(model, before)
    with pytest.raises(TypeError, match="fold needs an example"):
        fold(model, forward_fn=lambda model, example: model(example))


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model is in training mode: call model.eval\(\) first"):
        fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.ones(1, 3, 5, 5))


def test_compiled_and_lazy_models_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    for compiled in (torch.compile(model, backend="eager"), in_place):
        with pytest.raises(ValueError, match="the model is compiled: fold it first, then compile it"):
            fold(compiled, torch.ones(1, 3, 5, 5))
    with pytest.raises(ValueError, match="the model has lazy layers: run a batch through it first"):
        fold(nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)).eval(), torch.ones(1, 3, 5, 5))


def test_a_recorded_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4)).eval()
    model[1]._tap = object()
    assert fold(model, torch.ones(1, 3, 5, 5)).skipped[0].why == "it is being recorded: end the recording first"


class ConvNorm(nn.Module):
    """As nnU-Net's and MONAI's blocks: the same modules once more in a Sequential, which is what runs."""

    def __init__(self, inside: int, outside: int, both: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(inside, outside, 3), nn.BatchNorm2d(outside), nn.ReLU()
        self.all_modules = nn.Sequential(self.conv, self.norm, self.act)
        self.both = both

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.all_modules(x)
        return y + self.norm(self.conv(x)) if self.both else y


@pytest.mark.parametrize("converted", [False, True])
def test_a_module_under_several_names_that_is_called_once(converted: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(ConvNorm(3, 8), ConvNorm(8, 8)), torch.randn(4, 3, 12, 12)
    for _ in range(3):
        model(x)
    if converted:
        bn.convert(model)
    model.eval()
    expected = model(x)
    done = bn.fold(model, x)
    assert [layer.name for layer in done.layers] == ["0.norm", "1.norm"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert model[0].norm is model[0].all_modules[1]


def test_a_module_under_several_names_that_is_called_by_both() -> None:
    model, x = ConvNorm(3, 8, both=True).eval(), torch.randn(4, 3, 12, 12)
    expected = model(x)
    done = bn.fold(model, x)
    assert done.layers == ()
    assert "called 2 times" in done.skipped[0].why
    assert torch.equal(model(x), expected)
