"""Networks of transformers that never ran: every tool leaves them as they were, or changes what it documents.

transformers 5 registers hooks in a model's first forward and notes that it has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own

ATOL = 2e-5
"""Fused and folded layers add in another order; outputs are of the order of 1."""


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def dpt() -> nn.Module:
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, num_labels=3,
        use_batch_norm_in_fusion_residual=True, reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False,
    )  # fmt: skip
    return transformers.DPTForSemanticSegmentation(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def mobilenet_v2() -> nn.Module:
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.25, min_depth=4, image_size=32, num_labels=3, finegrained_output=False
    )
    return transformers.MobileNetV2ForImageClassification(config)


NETWORKS = (segformer, dpt, resnet, mobilenet_v2)


@cache
def made(network: Callable[[], nn.Module]) -> nn.Module:
    """Never run, with statistics and parameters as of a training; in eval mode."""
    torch.manual_seed(0)
    model = network()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
            layer.num_batches_tracked.fill_(100)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
    return model.eval()


def batch() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


def hooks(model: nn.Module) -> dict[str, int]:
    return {
        f"{name}.{kind}": len(held)
        for name, module in model.named_modules()
        for kind, held in vars(module).items()
        if kind.endswith("_hooks") and held
    }


def watched(model: nn.Module, folder: Path) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with bn.watch(model, folder / "run") as run:
        run.probe(batch())
        model(**batch()).logits.square().mean().backward()
        optimizer.step()
        run.probe(batch())


def there_and_back(there: Callable[[nn.Module], object], back: Callable[[nn.Module], object]) -> Callable[..., None]:
    def tool(model: nn.Module, folder: Path) -> None:
        there(model)
        back(model)

    return tool


# Tools after which nothing is different.
UNCHANGED: dict[str, Callable[[nn.Module, Path], object]] = {
    "compare": lambda model, _: bn.compare(model, batch()),
    "check": lambda model, _: bn.check(model),
    "explain": lambda model, _: bn.explain(model),
    "param_groups": lambda model, _: bn.param_groups(model, weight_decay=0.1),
    "convert, revert": there_and_back(bn.convert, bn.revert),
    "freeze, unfreeze": there_and_back(bn.freeze, bn.unfreeze),
    "sync, to_torch": there_and_back(bn.sync, bn.to_torch),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("tool", UNCHANGED)
def test_it_changes_nothing(network: Callable[[], nn.Module], tool: str, tmp_path: Path) -> None:
    model, reference = copy.deepcopy(made(network)), copy.deepcopy(made(network))
    UNCHANGED[tool](model, tmp_path)
    assert hooks(model) == {}
    for (name, value), (other, expected) in zip(
        model.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(value, expected), name
    assert torch.equal(output(model), output(reference))
    assert hooks(model) == hooks(reference)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in reference.parameters()]


# Tools that change statistics, or gamma and beta too, and nothing else: the keys that may differ.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
CHANGED: dict[str, tuple[Callable[[nn.Module], object], tuple[str, ...]]] = {
    "recalibrate": (lambda model: bn.recalibrate(model, [batch()]), STATISTICS),
    "undo": (lambda model: bn.undo(model, [batch()]), (*STATISTICS, "weight", "bias")),
    "average": (lambda model: bn.average(model, [model.state_dict()], [batch()]), STATISTICS),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("tool", CHANGED)
def test_it_changes_what_it_documents(network: Callable[[], nn.Module], tool: str) -> None:
    model, reference = copy.deepcopy(made(network)), copy.deepcopy(made(network))
    norms = {name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    change, leaves = CHANGED[tool]
    change(model)
    assert hooks(model) == {}
    state = reference.state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed
    assert changed <= {f"{norm}.{leaf}" for norm in norms for leaf in leaves}
    state |= {name: model.state_dict()[name].clone() for name in changed}
    reference.load_state_dict(state)
    torch.testing.assert_close(output(model), output(reference), rtol=0, atol=0)
    assert hooks(model) == hooks(reference)


SAME_OUTPUT: dict[str, Callable[[nn.Module, Path], object]] = {
    "convert": lambda model, _: bn.convert(model),
    "fold": lambda model, _: bn.fold(model, batch()),
    "freeze": lambda model, _: bn.freeze(model),
    "sync": lambda model, _: bn.sync(model),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("tool", SAME_OUTPUT)
def test_it_computes_the_same(network: Callable[[], nn.Module], tool: str, tmp_path: Path) -> None:
    model, reference = copy.deepcopy(made(network)), copy.deepcopy(made(network))
    done = SAME_OUTPUT[tool](model, tmp_path)
    assert hooks(model) == {}
    assert len(done.layers) > 0  # type: ignore[attr-defined]
    torch.testing.assert_close(output(model), output(reference), rtol=0, atol=ATOL)
    assert hooks(model) == hooks(reference)


@pytest.mark.parametrize("network", NETWORKS)
def test_recording_leaves_no_trace_but_what_training_leaves(network: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, reference = copy.deepcopy(made(network)), copy.deepcopy(made(network))
    torch.manual_seed(2)
    watched(model, tmp_path)
    torch.manual_seed(2)
    reference.train()(**batch())
    torch.testing.assert_close(output(model), output(reference))
    assert hooks(model) == hooks(reference)
    assert bn.Run.open(tmp_path / "run").info["status"] == "complete"


@pytest.mark.parametrize("network", NETWORKS)
def test_adapt_ends_with_its_block(network: Callable[[], nn.Module]) -> None:
    model, reference = copy.deepcopy(made(network)), copy.deepcopy(made(network))
    expected = output(reference)
    with bn.adapt(model, prior=8):
        adapted = output(model)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    assert torch.equal(output(model), expected)
    assert hooks(model) == hooks(reference)
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name


@pytest.mark.parametrize("network", NETWORKS)
def test_group_norm_in_its_place_runs(network: Callable[[], nn.Module]) -> None:
    model, reference = copy.deepcopy(made(network)), copy.deepcopy(made(network))
    bn.to_group_norm(model, groups=1)
    assert hooks(model) == {}
    assert output(model).shape == output(reference).shape
    assert hooks(model) == hooks(reference)
