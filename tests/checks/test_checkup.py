"""check() and explain(): all rules over a network, in order, as text, as data, and across layers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.checks import check, findings
from batchnorm.checks.findings import Kind
from batchnorm.checks.rules import at_rest, training
from batchnorm.quantities import undo_index

DOCS = Path(__file__).parents[2] / "docs" / "findings.md"


def trained(seed: int = 0) -> nn.Sequential:
    """A network whose statistics look trained."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
    )
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.num_batches_tracked.fill_(1000)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return model


def slugs(found: check.Checkup) -> list[str]:
    return [finding.kind.slug for finding in found.findings]


def test_a_healthy_network() -> None:
    found = bn.check(trained())
    assert found.healthy
    assert slugs(found) == []
    assert str(found).splitlines() == ["2 batch norm layers, 16 units: nothing found", "No findings."]


def test_the_gravest_come_first_and_words_say_why_and_what_to_do() -> None:
    model = trained()
    model[4].running_var[2] = float("nan")
    model[1].running_var[3] = 1e-7
    found = bn.check(model)
    assert not found.healthy
    assert slugs(found) == ["non-finite", "variance-below-eps"]
    lines = str(found).splitlines()
    assert lines[0] == "2 batch norm layers, 16 units: 1 error, 1 note"
    assert lines[1] == "error: values that are not finite (non-finite)"
    assert lines[2] == "  4: 1 of 8 units not finite"


def residual(seed: int = 0) -> nn.Sequential:
    """A network with a zero-initialized last gamma, as residual blocks often have."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                          nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16))  # fmt: skip
    nn.init.zeros_(model[4].weight)
    return model


@pytest.mark.parametrize("batches", [0, 1, 3], ids=lambda count: f"{count} batches")
def test_zero_initialized_gammas_of_a_fresh_network_are_no_error(batches: int, tmp_path: Path) -> None:
    """Also after a few batches in training mode, which tools run to infer shapes."""
    model = residual()
    for _ in range(batches):
        model(torch.randn(4, 3, 8, 8))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for given in (model, model.state_dict(), tmp_path / "a.pt"):
        found = bn.check(given)
        assert found.healthy
        assert slugs(found) == ["untrained-statistics"] * 2


def test_a_trained_layer_with_half_of_its_gammas_at_0_is_an_error() -> None:
    model = trained()
    with torch.no_grad():
        model[4].weight[:4] = 0
    found = {f.kind.slug: f.severity for f in bn.check(model).findings}
    assert found == {"dead-units": "error", "constant-channels": "error"}, "betas are not all near 0"
    with torch.no_grad():
        model[4].bias.zero_()
    assert {f.kind.slug: f.severity for f in bn.check(model).findings} == {"dead-units": "error"}
    with torch.no_grad():
        model[4].weight[3] = 1
    assert {f.kind.slug: f.severity for f in bn.check(model).findings} == {"dead-units": "warning"}
    long = residual()  # trained, but its gammas never left 0
    for _ in range(60):
        long(torch.randn(4, 3, 8, 8))
    assert [(f.severity, f.kind.slug, f.layer) for f in bn.check(long).findings] == [("error", "dead-units", "4")]


def test_gammas_of_0_under_learned_betas_are_an_error_though_no_batch_was_counted() -> None:
    model = residual()
    nn.init.normal_(model[4].bias)
    found = bn.check(model)
    assert not found.healthy
    assert ("never-updated", "error") in [(f.kind.slug, f.severity) for f in found.findings if f.layer == "4"]


def test_identical_statistics_are_reported_for_the_second_layer() -> None:
    model = trained()
    model[4].running_mean, model[4].running_var = model[1].running_mean, model[1].running_var
    (finding,) = [f for f in bn.check(model).findings if f.kind is at_rest.IDENTICAL]
    assert (finding.layer, finding.severity) == ("4", "warning")
    assert finding.text.endswith("those of 1")


def test_copies_in_one_file_are_not_held_against_each_other() -> None:
    state = trained().state_dict()
    assert "identical-statistics" not in slugs(bn.check({"model": state, "ema": dict(state)}))
    fresh = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    assert "identical-statistics" not in slugs(bn.check(fresh))


def test_an_eps_unlike_the_others() -> None:
    model = trained()
    model[4].eps = 1e-3
    assert slugs(bn.check(model)) == ["mixed-eps"]
    assert slugs(bn.check(model.state_dict())) == []


def test_a_bias_under_a_norm() -> None:
    model = trained()
    model[0].bias = nn.Parameter(torch.ones(8))
    (finding,) = bn.check(model).findings
    assert (finding.kind.slug, finding.text) == ("bias-under-norm", "0.bias is right before it, up to 1")


def test_no_norm_left() -> None:
    (finding,) = bn.check(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(3, 4))).findings
    assert (finding.kind.slug, finding.severity) == ("no-norms", "note")
    assert finding.text == "none among 4 tensors, of which 2 are biases"


def test_as_data_it_is_json_and_names_the_docs() -> None:
    model = trained()
    model[1].running_var[0] = -1.0
    described = bn.check(model).as_dict()
    assert not described["healthy"]
    (finding,) = described["findings"]
    assert finding["docs"] == "docs/findings.md#running-variance"
    assert finding["units"] == [0]
    json.dumps(described)


def test_explain_gives_the_index_of_the_running_statistics() -> None:
    model = trained()
    result = bn.explain(model)
    layer = model[1]
    expected = undo_index(*(t.detach().double().numpy() for t in (layer.running_mean, layer.running_var)), layer.eps,
                          layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())  # fmt: skip
    assert result.rows[0].undo_index[1] == pytest.approx(float(np.median(expected)))
    assert [row.layer for row in result.rows] == ["1", "4"]
    assert str(result).splitlines()[-2:] == [result.headline, result.scale_free]


def test_explain_an_undone_network_and_a_bare_one() -> None:
    model = trained()
    with torch.no_grad():
        for layer in (model[1], model[4]):
            layer.weight.copy_((layer.running_var + layer.eps).sqrt())
            layer.bias.copy_(layer.running_mean)
    undone = bn.explain(model)
    assert undone.classes["undone"] == undone.classes.units == 16
    assert undone.verdict == "yes"
    assert undone.undo_angle == pytest.approx(0, abs=1e-4)
    assert undone.index == pytest.approx(1, abs=1e-6)
    assert "gamma and beta undo it" in undone.headline
    with torch.no_grad():
        for layer in (model[1], model[4]):
            layer.weight.fill_(1)
            layer.bias.fill_(0)
    bare = bn.explain(model)
    assert (bare.verdict, bare.classes["undone"]) == ("no", 0)
    assert bare.undo_angle == bare.bare_angle > 0
    assert bn.explain(nn.BatchNorm2d(4, affine=False)).headline.startswith("Unknown: gamma and beta")
    poisoned = nn.BatchNorm2d(4)
    poisoned.running_var.fill_(math.nan)
    assert bn.explain(poisoned).headline.endswith("missing or not finite.")
    assert bn.explain(nn.Linear(2, 2)).headline == "There is no batch norm layer."


def test_dead_and_negative_gammas_are_counted() -> None:
    model = trained()
    with torch.no_grad():
        model[1].weight[:2] = 1e-4
        model[1].weight[2:4] *= -1
    row = bn.explain(model).rows[0]
    assert (row.classes["dead"], row.negative) == (2, 0.25)


def shaped(gamma: float, beta: float, units: int = 8) -> nn.BatchNorm1d:
    """Over an input of mean 3 and deviation 4: the identity is (4, 3), bare normalization (1, 0)."""
    layer = nn.BatchNorm1d(units)
    with torch.no_grad():
        layer.running_mean.fill_(3)
        layer.running_var.fill_(16)
        layer.weight.fill_(gamma)
        layer.bias.fill_(beta)
    layer.num_batches_tracked.fill_(1000)
    return layer


@pytest.mark.parametrize(
    ("layers", "verdict", "words"),
    [
        ([shaped(4, 3)], "yes", "gamma and beta undo it: of 8 units, 100% are undone"),
        ([shaped(-2, -3)], "no", "gamma and beta do not undo it: of 8 units, 100% moved away from it"),
        ([shaped(0, 3)], "dead", "most units are dead"),
        ([shaped(4, 3), shaped(1, 0)], "partly", "undo it in part: of 16 units, 50% are undone and 50% did neither"),
        ([shaped(11, 10)], "no", "100% moved away from it"),
        ([shaped(float("nan"), 0)], "unknown", "statistics are missing"),
        ([shaped(4, 3), shaped(float("nan"), 0, 16)], "unknown", "is unknown"),
    ],
)
def test_each_state_has_its_verdict(layers: list[nn.Module], verdict: str, words: str) -> None:
    result = bn.explain(nn.Sequential(*layers))
    assert result.verdict == verdict
    assert words in result.headline
    described = bn.check(nn.Sequential(*layers)).as_dict()
    assert described["classes"] == result.classes.as_dict()
    assert sum(described["classes"].values()) == sum(layer.num_features for layer in layers)
    assert [sum(row["classes"].values()) for row in described["layers"]] == [layer.num_features for layer in layers]
    json.dumps(described)


def test_a_layer_whose_input_is_normalized_already_has_nothing_to_undo() -> None:
    layer = nn.BatchNorm1d(8)
    nn.init.constant_(layer.weight, 50.0)
    result = bn.explain(layer)
    assert result.verdict == "nothing to undo"
    assert "there is little to undo" in result.headline
    assert "undo_index" not in result.headline, "it is not defined there"
    assert result.rows[0].cells()[2] == ""


def kinds() -> list[Kind]:
    modules = (findings, training, at_rest)
    found = {value.slug: value for module in modules for value in vars(module).values() if isinstance(value, Kind)}
    return list(found.values())


def test_slugs_are_unique() -> None:
    everywhere = [v for m in (findings, training, at_rest) for v in vars(m).values() if isinstance(v, Kind)]
    assert len({kind.slug for kind in everywhere}) == len({id(kind) for kind in everywhere})


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.slug)
def test_every_kind_of_finding_has_its_section_in_the_docs(kind: Kind) -> None:
    assert f"\n## {kind.slug}\n" in DOCS.read_text(encoding="utf-8")
