"""repair: each unit has the mean and the deviation of the endpoints; nothing else changes, and nothing on an error."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.restoring import eager
from randomness import SEED


def linear(norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (5, 12, 12):
        layers += [nn.Linear(inputs, 12, bias=inputs == 5 or norm), *([nn.BatchNorm1d(12)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(12, 3))


def images(norm: bool) -> nn.Module:
    def of(channels: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(channels)] if norm else []

    return nn.Sequential(
        nn.Unflatten(1, (1, 5, 1)),
        nn.Conv2d(1, 6, (3, 1), padding=(1, 0), bias=False),
        *of(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1, groups=3),
        *of(6),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, (2, 1), groups=2),
        *of(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def tokens(norm: bool) -> nn.Module:
    """Linear layers on (N, L, C), whose units are the last axis."""
    return nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.GELU(), nn.Linear(4, 3), nn.Flatten())


def converted(norm: bool) -> nn.Module:
    model = linear(norm)
    bn.convert(model)
    return model


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: linear(False),
    "linear, norms": lambda: linear(True),
    "convolutions": lambda: images(False),
    "convolutions, norms": lambda: images(True),
    "tokens": lambda: tokens(False),
    "fused": lambda: converted(True),
}


def made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(SEED + seed)
    model = make().double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, *((0.5, 1.5) if "var" in name else (-1, 1)))
    return model


def data(seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(SEED + seed)
    return [torch.randn(n, 5, dtype=torch.float64, generator=generator) * 2 + 1 for n in (30, 9, 64)]


def outputs(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The mean and the deviation of every layer's units, (2, C): by hooks, apart from the tool."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):

            def hook(layer: nn.Module, args: Any, y: Tensor, name: str = name) -> None:
                y = y if isinstance(layer, nn.Linear) else y.movedim(1, -1)
                seen.setdefault(name, []).append(y.detach().reshape(-1, y.shape[-1]))

            hooks.append(layer.register_forward_hook(hook))
    with torch.no_grad(), eager():
        for x in batches:
            model(x)
    for handle in hooks:
        handle.remove()
    return {name: torch.stack(torch.std_mean(torch.cat(parts), 0, correction=0)[::-1]) for name, parts in seen.items()}


def interpolated(one: nn.Module, other: nn.Module, shares: list[float]) -> nn.Module:
    model = copy.deepcopy(one)
    bn.average(model, [one, other], weights=shares)
    return model


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.75, 0.25]])
@pytest.mark.parametrize("kind", MAKERS)
def test_each_unit_has_the_mean_and_the_deviation_of_the_endpoints(kind: str, shares: list[float]) -> None:
    ends = [made(MAKERS[kind], seed) for seed in (1, 2)]
    model = interpolated(*ends, shares)
    record = bn.repair(model, ends, data(), weights=shares)
    first, second, now = (outputs(net, data()) for net in (*ends, model))
    assert record.layers
    if kind != "fused":  # the output of a fused layer is after its activation
        for layer in record.layers:
            goal = shares[0] * first[layer.name] + shares[1] * second[layer.name]
            torch.testing.assert_close(now[layer.name], goal, rtol=1e-9, atol=1e-9)
    for layer in record.layers:
        assert layer.scale_after == pytest.approx(1, abs=1e-9)
        assert layer.gap_after == pytest.approx(0, abs=1e-9)
    repaired = {layer.name for layer in record.layers}
    maps = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)}
    norms = {name for name, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}
    last = max(maps, key=int)
    assert repaired == ({*norms, last} if norms else maps)
    assert str(record).startswith(f"{len(repaired)} layers repaired on 3 batches: deviations were ")


@pytest.mark.parametrize("kind", ["linear", "linear, norms", "convolutions"])
def test_weights_are_those_of_the_interpolation_up_to_a_factor_for_each_unit(kind: str) -> None:
    """An endpoint in the place of the model would have the right means and deviations, too."""
    ends = [made(MAKERS[kind], seed) for seed in (1, 2)]
    model = interpolated(*ends, [0.5, 0.5])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dim() == 2}
    bn.repair(model, ends, data())
    for name, old in before.items():
        new = model.state_dict()[name]
        torch.testing.assert_close(nn.functional.cosine_similarity(old, new), torch.ones_like(new[:, 0]), msg=name)


def test_statistics_of_norms_are_measured() -> None:
    ends = [made(MAKERS["linear, norms"], seed) for seed in (1, 2)]
    model = interpolated(*ends, [0.5, 0.5])
    bn.repair(model, ends, data())
    own = copy.deepcopy(model)
    bn.recalibrate(own, data())
    torch.testing.assert_close(dict(model.named_buffers()), dict(own.named_buffers()), rtol=1e-9, atol=1e-9)


def test_an_endpoint_repaired_to_itself_stays() -> None:
    model = made(MAKERS["convolutions"], 1)
    x = torch.cat(data())
    before = model(x)
    bn.repair(model, [copy.deepcopy(model)], data())
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)


def test_parameters_stay_the_same_objects_and_a_missing_bias_is_new() -> None:
    ends = [made(MAKERS["linear"], seed) for seed in (1, 2)]
    model = interpolated(*ends, [0.5, 0.5])
    model[2].weight.requires_grad_(False)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    bn.repair(model, [end.state_dict() for end in ends], data())
    after = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"2.bias", "4.bias"}
    assert not model[2].bias.requires_grad
    assert model[4].bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    ends = [made(MAKERS["linear, norms"], seed).to(dtype) for seed in (1, 2)]
    model = interpolated(*ends, [0.5, 0.5])
    record = bn.repair(model, ends, [x.to(dtype) for x in data()])
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    bound = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert all(abs(layer.scale_after - 1) < bound for layer in record.layers)


def test_a_unit_that_is_constant_has_the_mean_alone() -> None:
    ends = [made(MAKERS["linear"], seed) for seed in (1, 2)]
    model = interpolated(*ends, [0.5, 0.5])
    with torch.no_grad():
        model[0].weight[3] = 0
    record = bn.repair(model, ends, data())
    assert [layer.constant for layer in record.layers] == [1, 0, 0, 0]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    goal = sum(outputs(end, data())["0"] for end in ends) / 2
    torch.testing.assert_close(outputs(model, data())["0"][0], goal[0])


def test_units_that_are_constant_in_all_endpoints_become_constant() -> None:
    ends = [made(MAKERS["linear"], seed) for seed in (1, 2)]
    model = interpolated(*ends, [0.5, 0.5])
    for end in ends:
        nn.init.zeros_(end[0].weight)
    record = bn.repair(model, ends, data())
    assert float(outputs(model, data())["0"][1].max()) < 1e-12
    assert np.isnan(record.layers[0].scale_after)
    assert "deviations were" in str(record)


class Shared(nn.Module):
    """One layer called twice, one never, one whose weight another layer uses, and one that is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.tied, self.other = (nn.Linear(5, 5) for _ in range(4))
        self.other.weight = self.tied.weight
        self.pruned = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
        self.fine = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = torch.tanh(self.pruned(self.other(torch.tanh(self.tied(x)))))
        return self.fine(x) + self.norm(x)


def test_layers_that_cannot_be_set_are_skipped_with_the_reason() -> None:
    ends = [made(Shared, seed) for seed in (1, 2)]
    model = interpolated(*ends, [0.5, 0.5])
    bn.freeze(model.norm)
    record = bn.repair(model, ends, data())
    reasons = {layer.name: layer.why for layer in record.skipped}
    assert [layer.name for layer in record.layers] == ["fine"]
    assert reasons["twice"] == "it is called 2 times"
    assert reasons["never"] == "it is never called"
    assert reasons["tied"] == "its weight is shared with another module"
    assert reasons["norm"] == "frozen: unfreeze it first"
    assert "1  Linear  left alone (it is called 2 times): twice" in str(record)


def picture(model: nn.Module) -> list[Any]:
    state = [(name, id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return [state, modes, hooks, torch.get_rng_state(), random.getstate(), np.random.get_state()[1]]  # noqa: NPY002


def assert_same(one: list[Any], other: list[Any]) -> None:
    for (name, identity, value), (name_now, identity_now, value_now) in zip(one[0], other[0], strict=True):
        assert (name, identity) == (name_now, identity_now)
        assert torch.equal(value, value_now), name
    assert one[1:3] == other[1:3]
    assert torch.equal(one[3], other[3])
    assert one[4] == other[4]
    assert (one[5] == other[5]).all()


class Failing(list[Tensor]):
    """Batches that end with an error in a later pass."""

    def __init__(self, batches: list[Tensor], passes: int, error: BaseException) -> None:
        super().__init__(batches)
        self.passes, self.error = passes, error

    def __iter__(self) -> Iterator[Tensor]:
        self.passes -= 1
        if self.passes < 0:
            raise self.error
        return super().__iter__()


@pytest.mark.parametrize("kind", ["linear", "convolutions, norms"])
@pytest.mark.parametrize("passes", range(9))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("of the data")])
def test_an_error_in_any_pass_leaves_all_unchanged(kind: str, passes: int, error: BaseException) -> None:
    """With norms there are nine passes: the search for layers, two endpoints, before, one for each layer, after."""
    ends = [made(MAKERS[kind], seed) for seed in (1, 2)]
    model = interpolated(*ends, [0.5, 0.5])
    model.train()
    model[3].eval()
    before = [picture(net) for net in (model, *ends)]
    with pytest.raises(type(error)):
        bn.repair(model, ends, Failing(data(), min(passes, 8 if "norms" in kind else 7), error))
    for net, state in zip((model, *ends), before, strict=True):
        assert_same(state, picture(net))


def test_modes_random_state_and_endpoints_stay() -> None:
    ends = [made(MAKERS["linear, norms"], seed) for seed in (1, 2)]
    model = interpolated(*ends, [0.5, 0.5]).train()
    before = [picture(net) for net in (model, *ends)]
    bn.repair(model, ends, data())
    after = [picture(net) for net in (model, *ends)]
    for one, other in zip(before[1:], after[1:], strict=True):
        assert_same(one, other)
    before[0][0] = after[0][0]
    assert_same(before[0], after[0])


def test_wrappers_mappings_and_a_forward_fn() -> None:
    ends = [made(MAKERS["linear"], seed) for seed in (1, 2)]
    expected, model, other = (interpolated(*ends, [0.5, 0.5]) for _ in range(3))
    bn.repair(expected, ends, data())
    bn.repair(nn.DataParallel(model), ends, [{"input": x} for x in data()])
    bn.repair(other, ends, [(x, 3) for x in data()], lambda net, batch: net(batch[0]))
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    torch.testing.assert_close(other.state_dict(), expected.state_dict())


def test_a_network_without_any_layer_to_repair_warns() -> None:
    with pytest.warns(UserWarning, match="repair found no convolution, linear or batch norm layer in it") as caught:
        record = bn.repair(nn.ReLU(), [nn.ReLU()], data())
    assert caught[0].filename == __file__
    assert str(record) == "0 layers repaired on 0 batches"


def broken(value: float) -> nn.Module:
    model = made(MAKERS["linear, norms"], 1)
    with torch.no_grad():
        model[4].running_var[0] = value
    return model


ENDS = [made(MAKERS["linear, norms"], seed) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("ends", "batches", "options", "error", "words"),
    [
        ([], data(), {}, ValueError, "repair needs at least one state"),
        (ENDS[0], data(), {}, TypeError, "repair: states must be a list"),
        ([3], data(), {}, TypeError, "state 0 must be a state dict"),
        ([made(MAKERS["linear"], 1)], data(), {}, ValueError, r"state 0 is of another network"),
        (ENDS, data(), {"weights": [1]}, ValueError, "weights must be 2 numbers"),
        (ENDS, data(), {"weights": [0.5, -0.5]}, ValueError, "weights must be 2 numbers"),
        (ENDS, [], {}, ValueError, "repair: there are no batches"),
        (ENDS, iter(data()), {}, ValueError, "read the batches again"),
        (ENDS, data()[0], {}, TypeError, "for a single batch pass"),
        (ENDS, [data()[0] * float("nan")], {}, ValueError, "batch 0 gives layer '1' values that are not finite"),
        (ENDS, [torch.zeros(3, 4, dtype=torch.float64)], {}, RuntimeError, "shapes cannot be multiplied"),
        ([broken(float("nan"))], data(), {}, ValueError, "not finite"),
        ([broken(-1.0)], data(), {}, ValueError, "not finite"),
    ],
)
def test_bad_input_leaves_the_model_unchanged(
    ends: Any, batches: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = made(MAKERS["linear, norms"], 3)
    before = picture(model)
    with pytest.raises(error, match=words):
        bn.repair(model, ends, batches, **options)
    assert_same(before, picture(model))


def test_the_model_and_its_endpoints_are_apart() -> None:
    ends = [made(MAKERS["linear"], seed) for seed in (1, 2)]
    with pytest.raises(ValueError, match="endpoint 1 has tensors of the model"):
        bn.repair(ends[1], ends, data())
    with pytest.raises(TypeError, match=r"repair takes a torch\.nn\.Module, got dict"):
        bn.repair({}, ends, data())  # type: ignore[arg-type]
