"""Programs of torch.export and graphs of torch.fx: the nodes say the mode, eps, momentum and what is left unfused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torch.nn import functional

import batchnorm as bn
from batchnorm.checks import sources
from randomness import SEED

# PyTorch itself warns when it copies a program, before 2.10.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
EXAMPLE = (torch.zeros(2, 3, 6, 6),)


def network(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """A norm behind a convolution, and one behind an activation, with statistics as after a training."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(4), nn.ReLU(), norm(4, momentum=0.2))
    for layer in (model[1], model[3]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.num_batches_tracked.fill_(1000)
        nn.init.uniform_(layer.weight, 0.5, 1.5)
    return model.eval()


def program(model: nn.Module) -> Any:
    return torch.export.export(model, EXAMPLE)


def reloaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.export.save(program(model), file)
    file.seek(0)
    return torch.export.load(file)


def saved(model: nn.Module, folder: Path) -> Path:
    path = folder / "model.pt2"
    torch.export.save(program(model), path)
    return path


class Functional(nn.Module):
    """Norms by F.batch_norm, without modules, as in a GraphModule of functions."""

    def __init__(self, model: nn.Sequential, is_training: bool) -> None:
        super().__init__()
        self.conv, self.first, _, self.second = model
        self.is_training = is_training

    def norm(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        statistics = layer.running_mean, layer.running_var
        return functional.batch_norm(
            x, *statistics, layer.weight, layer.bias, self.is_training, layer.momentum, layer.eps
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.relu(self.norm(self.conv(x), self.first)), self.second)


FORMS: dict[str, Callable[[Any, Path], Any]] = {
    "program": lambda model, _: program(model),
    "reloaded": lambda model, _: reloaded(model),
    "file": saved,
    "decomposed": lambda model, _: program(model).run_decompositions(),
    "unlifted": lambda model, _: program(model).module(),
    "functional": lambda model, _: symbolic_trace(Functional(model, model.training)),
}


def slugs(given: object) -> list[tuple[str, str]]:
    return [(finding.layer, finding.kind.slug) for finding in bn.check(given).findings]


@pytest.mark.parametrize("form", FORMS)
def test_a_program_in_eval_mode_has_its_unfused_norm_and_nothing_else(form: str, tmp_path: Path) -> None:
    found = bn.check(FORMS[form](network(), tmp_path))
    first = found.network.layers[0].name
    assert [(finding.layer, finding.kind.slug) for finding in found.findings] == [(first, "unfused-norm")]
    assert found.findings[0].severity == "note"
    assert found.findings[0].text == f"follows {'conv' if form == 'functional' else '0'} directly"
    assert "momentum" not in found.network.layers[0].settings, "a node in eval mode has one that means nothing"


@pytest.mark.parametrize("form", FORMS)
def test_nodes_in_training_mode_are_errors(form: str, tmp_path: Path) -> None:
    found = bn.check(FORMS[form](network().train(), tmp_path))
    assert [(finding.kind.slug, finding.severity) for finding in found.findings] == [("training-mode", "error")] * 2
    operator = "_native_batch_norm_legit_functional" if form == "decomposed" else "batch_norm"
    assert {finding.text for finding in found.findings} == {f"{operator} has training=True"}
    assert [layer.settings["momentum"] for layer in found.network.layers] == [0.1, 0.2]


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_with_another_eps_is_found(form: str, tmp_path: Path) -> None:
    model = network()
    model[3].eps = 1e-3
    found = bn.check(FORMS[form](model, tmp_path))
    assert [layer.settings["eps"] for layer in found.network.layers] == [1e-5, 1e-3]
    (finding,) = [finding for finding in found.findings if finding.kind.slug == "mixed-eps"]
    assert (finding.layer, finding.text) == (found.network.layers[1].name, "eps 0.001, others have 1e-05")


def test_diff_of_a_model_and_its_program_is_the_settings_that_differ() -> None:
    model = network()
    exported = program(model)
    assert not bn.diff(model, exported).changes
    model[1].eps = 1e-3
    assert [(change.layer, change.aspect) for change in bn.diff(model, exported).changes] == [("1", "eps")]


def test_a_traced_model_has_the_settings_of_its_modules_and_its_unfused_norm() -> None:
    traced = symbolic_trace(network())
    assert slugs(traced) == [("1", "unfused-norm")]
    assert [layer.settings["momentum"] for layer in bn.check(traced).network.layers] == [0.1, 0.2]
    assert slugs(traced.train()) == []  # a model that is trained on, not an export


def test_own_layers_export_as_nodes_with_eps() -> None:
    found = bn.check(program(network(bn.BatchNorm2d)))
    assert [layer.settings["eps"] for layer in found.network.layers] == [1e-5, 1e-5]
    assert [finding.kind.slug for finding in found.findings] == ["unfused-norm"]


def test_a_folded_program_has_the_norm_that_could_not_be_folded() -> None:
    model = network()
    bn.fold(model, EXAMPLE[0] + torch.rand(2, 3, 6, 6))
    found = bn.check(program(model))
    assert [layer.name for layer in found.network.layers] == ["3"]
    assert [finding.kind.slug for finding in found.findings] == ["bias-under-norm"], "the bias that fold made"


class Several(nn.Module):
    """A norm that runs twice, one that never runs, an instance norm, and a linear map with its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice, self.never = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.linear, self.positions = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.instance(self.twice(self.conv(self.twice(self.conv(x))[:, :3])))
        return self.positions(self.linear(x[:, 0]))


@pytest.mark.parametrize("form", ["program", "file", "decomposed", "unlifted"])
def test_only_the_batch_norms_that_run_count_and_one_that_runs_twice_is_not_foldable(form: str, tmp_path: Path) -> None:
    found = bn.check(FORMS[form](Several().eval(), tmp_path))
    assert [layer.name for layer in found.network.layers] == ["twice", "positions"]
    assert not any(finding.kind.slug == "unfused-norm" for finding in found.findings)


def test_an_output_that_something_else_reads_too_is_not_foldable() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body[0](x)
            return self.body[1](x) + x

    assert slugs(program(Shared().eval())) == []


def test_a_builtin_function_has_its_arguments_in_order() -> None:
    class Builtin(Functional):
        def norm(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
            tensors = layer.weight, layer.bias, layer.running_mean, layer.running_var
            return torch.batch_norm(x, *tensors, self.is_training, layer.momentum, layer.eps, False)

    traced = symbolic_trace(Builtin(network(), True))
    assert slugs(traced) == [("first", "training-mode"), ("second", "training-mode")]


def test_a_program_without_norms_says_so_and_other_objects_are_refused() -> None:
    assert slugs(program(nn.Sequential(nn.Conv2d(3, 4, 1)))) == [("", "no-norms")]
    with pytest.raises(sources.SourceError, match="expected a model, a program, a state dict or a path, got Graph"):
        bn.check(program(network()).graph)
