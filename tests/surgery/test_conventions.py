"""Batch norms between PyTorch, Keras and Flax: against the formulas of each by hand, and the frameworks themselves."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.surgery.conventions import from_flax, from_keras, settings, to_flax, to_keras

SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


def keras_weights(seed: int = 0, channels: int = 3) -> dict[str, np.ndarray]:
    """Of a trained layer with a dense layer before and a layer norm after it."""
    rng = np.random.default_rng(seed)
    return {
        "net/dense/kernel:0": rng.normal(size=(4, channels)),
        "net/bn/gamma:0": rng.normal(size=channels),
        "net/bn/beta:0": rng.normal(size=channels),
        "net/bn/moving_mean:0": rng.normal(size=channels),
        "net/bn/moving_variance:0": rng.uniform(1e-3, 1e-2, size=channels),
        "net/norm/gamma:0": rng.normal(size=channels),
        "net/norm/beta:0": rng.normal(size=channels),
    }


def keras_inference(x: np.ndarray, weights: dict[str, np.ndarray], eps: float = 1e-3) -> np.ndarray:
    mean, var = weights["net/bn/moving_mean:0"], weights["net/bn/moving_variance:0"]
    return weights["net/bn/gamma:0"] * (x - mean) / np.sqrt(var + eps) + weights["net/bn/beta:0"]


def loaded(state: dict[str, torch.Tensor], prefix: str, **arguments: float) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(len(state[f"{prefix}running_var"]), dtype=torch.float64, **arguments)
    layer.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()}, strict=True)
    return layer


def test_story_22_eps_is_not_in_the_weights() -> None:
    """gzuidhof/nn-transfer PR#3, tensorflow/tensorflow#42605: right weights, wrong eps, wrong outputs."""
    weights = keras_weights()
    x = np.random.default_rng(1).normal(size=(5, 3))
    expected = torch.from_numpy(keras_inference(x, weights))
    record = from_keras(weights)
    wrong = loaded(record.state, "net.bn.").eval()(torch.from_numpy(x))
    assert (wrong - expected).abs().max() > 0.1
    layer = loaded(record.state, "net.bn.", **settings("keras", "torch"))
    torch.testing.assert_close(layer.eval()(torch.from_numpy(x)), expected)
    assert record.left == ("net/dense/kernel:0", "net/norm/gamma:0", "net/norm/beta:0")


@SEEDS
def test_story_13_training_goes_on_as_it_would_have(seed: int) -> None:
    """pytorch/vision#8250: momentum 0.99 taken over as it is. The moving averages after 20 steps."""
    rng = np.random.default_rng(seed)
    weights = keras_weights(seed)
    mean, var = weights["net/bn/moving_mean:0"].copy(), weights["net/bn/moving_variance:0"].copy()
    layer = loaded(from_keras(weights, 7).state, "net.bn.", **settings("keras", "torch"))
    wrong = loaded(from_keras(weights, 7).state, "net.bn.", momentum=0.99)
    for _ in range(20):
        x = 2 + 3 * rng.normal(size=(7, 3))
        mean = 0.99 * mean + 0.01 * x.mean(0)
        var = 0.99 * var + 0.01 * x.var(0)
        for each in (layer, wrong):
            each(torch.from_numpy(x))
    moved = to_keras(layer.state_dict(), 7).state
    np.testing.assert_allclose(moved["moving_mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(moved["moving_variance"], var, rtol=1e-12)
    assert np.abs(wrong.running_mean.numpy() - mean).max() > 1


def test_story_23_no_key_is_missing() -> None:
    """pytorch/pytorch#8481: strict loading of a state without num_batches_tracked."""
    state = {key.removeprefix("net.bn."): value for key, value in from_keras(keras_weights()).state.items()}
    old = OrderedDict((key, value) for key, value in state.items() if key != "num_batches_tracked")
    layer = nn.BatchNorm1d(3)
    old._metadata = layer.state_dict()._metadata
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"num_batches_tracked\""):
        layer.load_state_dict(old)
    new = OrderedDict(state)
    new._metadata = old._metadata
    layer.load_state_dict(new)
    assert layer.num_batches_tracked == 0


@SEEDS
@pytest.mark.parametrize("count", [None, 2, 48, {"a.0": 5}])
def test_round_trips(seed: int, count: int | dict[str, int] | None) -> None:
    torch.manual_seed(seed)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)),
            "b": nn.BatchNorm1d(5),
            "c": nn.BatchNorm1d(5, track_running_stats=False),
        }
    ).double()
    for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 3)
    state = model.state_dict()
    before = copy.deepcopy(state)
    norms = {key for key in state if key.startswith(("a.0.", "a.2.", "b."))}
    for there, back in (
        (to_keras, from_keras),
        (to_flax, from_flax),
        (lambda *given: to_flax(*given, nnx=True), from_flax),
    ):
        record = there(state, count)
        again = back(record.state, count)
        assert again.state.keys() == norms
        assert {layer.name: layer.count for layer in again.layers} == {
            name: count.get(name) if isinstance(count, dict) else count for name in ("a.0", "a.2", "b")
        }
        assert set(record.left) == state.keys() - norms
        assert again.left == again.filled == ()
        for key in norms:
            torch.testing.assert_close(again.state[key], state[key], rtol=5e-16, atol=0)
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    given = to_keras(state).state
    taken = from_keras(given).state
    for tensor in state.values():
        tensor.fill_(9)
    assert all(9 not in value for value in given.values()), "nothing shares memory with what was given"
    for array in given.values():
        array.fill(9)
    assert all(9 not in value for value in taken.values()), "nothing shares memory with what was given"


def test_names_of_each() -> None:
    layer = {"m.0.bn": nn.BatchNorm1d(2), "": nn.BatchNorm1d(2)}
    for name, norm in layer.items():
        dotted = f"{name}." if name else ""
        state = {dotted + key: value for key, value in norm.state_dict().items()}
        slashed = dotted.replace(".", "/")
        assert list(to_keras(state).state) == [
            slashed + part for part in ("gamma", "beta", "moving_mean", "moving_variance")
        ]
        assert list(to_flax(state, nnx=True).state) == [dotted + part for part in ("scale", "bias", "mean", "var")]
        assert from_keras(to_keras(state).state).state.keys() == state.keys()
        assert from_flax(to_flax(state).state).state.keys() == state.keys()
    linen = to_flax({f"m.0.bn.{key}": value for key, value in nn.BatchNorm1d(2).state_dict().items()}).state
    assert linen["params"]["m"]["0"]["bn"].keys() == {"scale", "bias"}
    assert linen["batch_stats"]["m"]["0"]["bn"].keys() == {"mean", "var"}


def test_all_input_formats() -> None:
    weights = keras_weights()
    flat = from_keras(weights).state
    nested = {"net": MappingProxyType({"bn": {k[7:-2]: v for k, v in weights.items() if "/bn/" in k}})}
    as_tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    big_endian = {key: value.astype(">f8") for key, value in weights.items()}
    for other in (nested, as_tensors, big_endian):
        torch.testing.assert_close(from_keras(other).state, flat, rtol=0, atol=0)
    names = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
    nnx = {("net", "bn", names[key[7:-2]]): value for key, value in weights.items() if "/bn/" in key}
    torch.testing.assert_close(from_flax(nnx).state, flat, rtol=0, atol=0)
    dotted = {".".join(key): value for key, value in nnx.items()}
    torch.testing.assert_close(from_flax(dotted).state, flat, rtol=0, atol=0)


def test_types_stay() -> None:
    weights = {key: value.astype(np.float16) for key, value in keras_weights().items()}
    state = from_keras(weights, 10).state
    assert {value.dtype for value in state.values()} == {torch.float16, torch.int64}
    large = from_keras(weights | {"net/bn/moving_variance:0": np.full(3, 3e4, np.float16)}, 10**5).state
    assert large["net.bn.running_var"].tolist() == [3e4] * 3
    narrow = {key: value.bfloat16() for key, value in nn.BatchNorm1d(2).state_dict().items()}
    assert {value.dtype for value in to_keras(narrow).state.values()} == {np.dtype(np.float32)}
    types = pytest.importorskip("ml_dtypes")
    flax = {f"bn.{part}": np.ones(2, types.bfloat16) for part in ("scale", "bias", "mean", "var")}
    assert from_flax(flax).state["bn.running_var"].dtype == torch.bfloat16


def test_a_gamma_or_a_beta_alone() -> None:
    """scale=False in Keras: PyTorch's layer has both or neither."""
    weights = keras_weights()
    del weights["net/bn/gamma:0"]
    record = from_keras(weights)
    assert record.filled == ("net.bn.weight",)
    assert torch.equal(record.state["net.bn.weight"], torch.ones(3, dtype=torch.float64))
    assert "1  filled in: net.bn.weight" in str(record)
    del weights["net/bn/beta:0"]
    record = from_keras(weights)
    assert record.filled == ()
    assert "net.bn.weight" not in record.state


def test_the_record() -> None:
    text = str(from_keras(keras_weights(), 8))
    assert text.splitlines() == [
        "1 batch norm layer for PyTorch",
        "   1  variance scaled with n = 8, to continue training: net.bn",
        "   3  other keys left unchanged: net/dense/kernel:0, net/norm/gamma:0, net/norm/beta:0",
    ]
    assert "variance unchanged, for equal outputs in eval mode: net.bn" in str(from_keras(keras_weights()))
    with pytest.warns(UserWarning, match="from_keras found no batch norm layer in it"):
        nothing = from_keras({"a/kernel": np.ones(2)})
    assert str(nothing) == "no batch norm layer among 1 key"
    for convert in (from_keras, from_flax, to_keras, to_flax):
        with pytest.warns(UserWarning, match=f"^{convert.__name__} found no batch norm layer in it$") as caught:
            assert convert({}).layers == ()
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("source", "target", "given", "expected"),
    [
        ("keras", "torch", {}, (1e-3, 0.01)),
        ("flax", "torch", {}, (1e-5, 0.01)),
        ("torch", "keras", {}, (1e-5, 0.9)),
        ("keras", "flax", {}, (1e-3, 0.99)),
        ("torch", "torch", {}, (1e-5, 0.1)),
        ("flax", "torch", {"momentum": 0.9, "eps": 1e-6}, (1e-6, 0.1)),
        ("torch", "flax", {"momentum": 0.0}, (1e-5, 1.0)),
    ],
)
def test_settings(source: str, target: str, given: dict, expected: tuple[float, float]) -> None:
    assert tuple(settings(source, target, **given).values()) == expected


def test_mistakes() -> None:
    weights = keras_weights()
    with pytest.raises(TypeError, match="from_keras takes a mapping of arrays by name, got list"):
        from_keras([np.ones(3)])
    with pytest.raises(ValueError, match=r"net.bn has arrays of shapes \[\(2,\), \(3,\)\]"):
        from_keras(weights | {"net/bn/gamma:0": np.ones(2)})
    with pytest.raises(ValueError, match="one number per channel"):
        from_flax({"mean": np.ones((2, 2)), "var": np.ones((2, 2))})
    for wrong in (np.ones(3, int), ["a", "b", "c"], object(), torch.ones(3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="net/bn/gamma:0 must be an array of floats"):
            from_keras(weights | {"net/bn/gamma:0": wrong})
    for count in (1, 0, -3, 2.5, True, {"net.bn": 1}):
        with pytest.raises(ValueError, match="an int of at least 2"):
            from_keras(weights, count)
    with pytest.raises(ValueError, match=r"count has 'bn', which is not one of the batch norms: net\.bn"):
        from_keras(weights, {"bn": 7})
    with pytest.raises(ValueError, match="are one name"):
        from_keras(weights | {"net/bn/gamma": np.ones(3)})
    with pytest.raises(ValueError, match="unknown framework 'jax'"):
        settings("jax", "torch")
    with pytest.raises(ValueError, match="momentum=None is the average over all batches"):
        settings("torch", "keras", momentum=None)
    with pytest.raises(ValueError, match="momentum must be between 0 and 1"):
        settings("torch", "keras", momentum=float("nan"))
    with pytest.raises(ValueError, match="eps must be at least 0"):
        settings("torch", "keras", eps=-1.0)


def test_nan_and_infinity_are_carried_over() -> None:
    weights = keras_weights()
    weights["net/bn/moving_variance:0"] = np.array([np.nan, np.inf, -1.0])
    var = from_keras(weights, 2).state["net.bn.running_var"]
    torch.testing.assert_close(var, torch.tensor([np.nan, np.inf, -2.0]).double(), equal_nan=True)


@pytest.mark.filterwarnings("ignore")
def test_keras_itself() -> None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((4, 4, 3)),
            layers.Conv2D(5, 1),
            layers.BatchNormalization(name="bn"),
            layers.BatchNormalization(),
        ]
    )
    rng = np.random.default_rng(0)
    for _ in range(5):
        model(rng.normal(size=(6, 4, 4, 3)).astype(np.float32), training=True)
    given = {w.path: w for w in model.weights}
    record = from_keras(given)
    assert [layer.name.rpartition(".")[2] for layer in record.layers] == ["bn", "batch_normalization"]
    assert len(record.left) == 2
    first = nn.BatchNorm2d(5, **settings("keras", "torch"))
    prefix = f"{record.layers[0].name}."
    first.load_state_dict({k.removeprefix(prefix): v for k, v in record.state.items() if k.startswith(prefix)})
    x = rng.normal(size=(6, 4, 4, 5)).astype(np.float32)
    bn = model.get_layer("bn")
    for training in (False, True, True):
        if training:
            state = from_keras(given, 6 * 4 * 4).state
            first.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        expected = keras.ops.convert_to_numpy(bn(x, training=training))
        y = first.train(training)(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1)
        np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    back = to_keras({f"bn.{key}": value for key, value in first.state_dict().items()}, 6 * 4 * 4).state
    for part in ("gamma", "beta", "moving_mean", "moving_variance"):
        np.testing.assert_allclose(back[f"bn/{part}"], getattr(bn, part).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_flax_itself() -> None:
    pytest.importorskip("flax")
    import jax.numpy as jnp
    from flax import linen, nnx

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 4, 5)).astype(np.float32))
    module = linen.BatchNorm(use_running_average=False, name="bn")
    net = linen.Sequential([linen.Dense(5), module])
    import jax

    variables = net.init(jax.random.key(0), x)
    layer = nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    ours = nn.BatchNorm1d(5, **settings("flax", "torch"))
    for _ in range(4):
        layer(x)
        ours(torch.from_numpy(np.array(x)).movedim(-1, 1))
    state = from_flax(nnx.state(layer), 24).state
    torch.testing.assert_close(state["running_mean"], ours.running_mean)
    # Both began with a variance of 1: of the 0.99^4 left of it, PyTorch's is not n/(n - 1) times Flax's.
    torch.testing.assert_close(state["running_var"] - 0.99**4 / 23, ours.running_var)
    record = from_flax(variables)
    assert len(record.layers) == 1
    assert set(record.left) == {"params.layers_0.kernel", "params.layers_0.bias"}
    again = to_flax(record.state).state
    restored = copy.deepcopy(dict(variables))
    name = record.layers[0].name
    restored["params"][name], restored["batch_stats"][name] = again["params"][name], again["batch_stats"][name]
    first, _ = net.apply(variables, x, mutable=["batch_stats"])
    second, _ = net.apply(restored, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(first, second)
