"""Every rule on layers at rest finds what it is for, and is silent about what healthy networks have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batchnorm import quantities as q
from batchnorm.checks.findings import Finding, LayerData, apply_rules
from batchnorm.checks.rules import at_rest

UNITS = 20
START = {"running_mean": 0.0, "running_var": 1.0}


def layer(settings: dict[str, Any] | None = None, **changed: Any) -> LayerData:
    """A healthy layer of a PyTorch checkpoint but for what is changed: an array of (units,), or one number for all."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "gamma": 1 + 0.2 * rng.standard_normal(UNITS), "beta": 0.2 * rng.standard_normal(UNITS),
        "running_mean": rng.standard_normal(UNITS), "running_var": 1 + rng.random(UNITS), "dead": 0.0,
    }  # fmt: skip
    arrays |= changed
    full = {name: np.broadcast_to(np.asarray(value, np.float64), (1, UNITS)).copy() for name, value in arrays.items()}
    mean, var, gamma, beta = (full[name] for name in ("running_mean", "running_var", "gamma", "beta"))
    full |= {**q.undoing(mean, var, 1e-5, gamma, beta), "class": q.unit_class(mean, var, 1e-5, gamma, beta)}
    full["s"] = np.sqrt(np.maximum(var, 0) + 1e-5)
    known = {"eps": 1e-5, "eps_known": False, "affine": True, "framework": "PyTorch", "batches": 1000, "stored": True}
    return LayerData("bn", UNITS, full, None, known | (settings or {}))


def some(value: float, units: list[int], otherwise: Any = 1.5) -> np.ndarray:
    """`otherwise` in all units but these."""
    values = np.broadcast_to(np.asarray(otherwise, np.float64), UNITS).copy()
    values[units] = value
    return values


def found(rule: Any, of: LayerData) -> Finding:
    finding = rule(of)
    assert finding is not None
    return finding


def slugs(of: LayerData) -> set[str]:
    return {finding.kind.slug for finding in apply_rules(at_rest.RULES, of)}


def test_a_healthy_layer_has_no_findings() -> None:
    assert slugs(layer()) == set()


def test_what_is_in_networks_that_work_is_no_error() -> None:
    """Negative gammas, a few variances of 0, denormal or below eps, variances beyond float16: seen in real ones."""
    gamma = np.random.default_rng(1).standard_normal(40)[:UNITS]
    seen = layer(
        gamma=np.where(np.abs(gamma) < 0.05, 2.4, gamma), running_var=np.array([0.0, 1e-40, 3e-6, 1e5] + [1.0] * 16)
    )
    findings = apply_rules(at_rest.RULES, seen)
    assert {finding.kind.slug for finding in findings} == {"running-variance", "variance-below-eps", "float16-range"}
    assert {finding.severity for finding in findings} <= {"note", "warning"}


def test_tensors_of_different_sizes() -> None:
    finding = found(at_rest.mismatched_shapes, layer({"shapes": {"gamma": (3,), "running_var": (4,), "beta": None}}))
    assert finding.severity == "error"
    assert finding.text == "gamma [3], running_var [4], beta missing"


def test_learned_parameters_over_statistics_at_their_start() -> None:
    finding = found(at_rest.statistics_of_no_batch, layer(running_mean=0.0, running_var=1.0))
    assert finding.severity == "error"
    assert at_rest.statistics_of_no_batch(layer(running_mean=0.0, running_var=1.0, gamma=1.0, beta=0.0)) is None
    assert at_rest.statistics_of_no_batch(layer(running_mean=0.0)) is None


@pytest.mark.parametrize(
    ("batches", "momentum", "weight"), [(10, None, 0.9**10), (3, 0.5, 0.5**3), (100, 0.01, 0.99**100)]
)
def test_how_much_of_the_start_is_left_is_exact(batches: int, momentum: float | None, weight: float) -> None:
    settings: dict[str, Any] = {"batches": batches} | ({} if momentum is None else {"momentum": momentum})
    assert found(at_rest.hardly_trained, layer(settings)).number == pytest.approx(weight)


def test_variances_that_no_average_from_1_can_reach_were_recalibrated() -> None:
    assert at_rest.hardly_trained(layer({"batches": 10}, running_var=some(0.34, [3]))) is None
    assert found(at_rest.hardly_trained, layer({"batches": 10}, running_var=some(0.35, [3]))).severity == "warning"


def test_enough_batches_or_a_cumulative_average_are_trained() -> None:
    assert at_rest.hardly_trained(layer({"batches": 40})) is None
    assert at_rest.hardly_trained(layer({"batches": 2, "stored": False})) is None  # a model with momentum=None
    assert at_rest.hardly_trained(layer({"batches": None})) is None


def test_statistics_without_a_count_are_converted_and_not_untrained() -> None:
    assert slugs(layer({"batches": 0})) == {"converted"}
    assert "converted" not in slugs(layer({"batches": 0}, running_mean=0.0, running_var=1.0))


def test_a_missing_count_is_reported_only_for_files_with_pytorch_names() -> None:
    assert slugs(layer({"batches": None})) == {"no-batch-count"}
    assert slugs(layer({"batches": None, "framework": "Keras"})) == set()
    assert slugs(layer({"batches": None, "stored": False})) == set()


def test_variances_below_eps_are_reported_with_the_smallest() -> None:
    few = found(at_rest.variance_below_eps, layer(running_var=some(2e-6, [3, 7])))
    assert (few.severity, few.units, few.number) == ("note", (3, 7), 0.1)
    assert "below eps 1e-05 (eps assumed), the smallest 2e-06" in few.text
    most = found(at_rest.variance_below_eps, layer({"eps_known": True}, running_var=2e-6))
    assert most.severity == "warning"
    assert "assumed" not in most.text


def test_eps_is_asked_for_where_it_changes_the_output_and_by_how_much() -> None:
    small = some(1e-3, [0, 1, 2])
    for batches in (0, 5000, None):
        finding = found(at_rest.eps_sensitive, layer({"batches": batches}, running_var=small))
        assert finding.units == (0, 1, 2)
        assert f"3 of {UNITS} units differs by 10% or more" in finding.text
        # sqrt((1e-3 + 1e-3)/(1e-3 + 1e-5)) = 1.407
        assert finding.text.endswith("typically by 41%, at most by 41%")
    assert at_rest.eps_sensitive(layer({"batches": 0, "eps_known": True}, running_var=small)) is None
    assert at_rest.eps_sensitive(layer(running_var=some(1e-3, []))) is None
    assert at_rest.eps_sensitive(layer(running_var=some(float("nan"), [0], small))) is None


def test_statistics_that_float16_cannot_hold() -> None:
    finding = found(at_rest.outside_float16, layer(running_var=some(7e4, [5], some(1e-9, [2]))))
    assert (finding.severity, finding.units) == ("note", (2, 5))
    assert "1 above 65,504 and 1 below the smallest float16" in finding.text
    assert found(at_rest.outside_float16, layer(running_mean=some(-7e4, [1]))).units == (1,)


def test_a_huge_variance() -> None:
    assert found(at_rest.huge_variance, layer(running_var=some(1e20, [4]))).severity == "warning"
    assert at_rest.huge_variance(layer(running_var=1e9)) is None


def test_negative_variances_are_errors_and_zero_ones_by_their_share() -> None:
    from batchnorm.checks.findings import running_variance

    assert found(running_variance, layer(running_var=some(-1e-9, [4], some(0.0, [5])))).severity == "error"
    assert found(running_variance, layer(running_var=some(0.0, [4]))).severity == "warning"
    assert found(running_variance, layer(running_var=0.0)).severity == "error"


def test_a_pickled_model_in_training_mode() -> None:
    assert found(at_rest.training_mode, layer({"training": True})).severity == "note"
    assert at_rest.training_mode(layer({"training": False})) is None
    assert at_rest.training_mode(layer({})) is None


def test_onnx_in_training_mode() -> None:
    assert found(at_rest.training_mode, layer({"training_mode": 1})).severity == "error"
    assert at_rest.training_mode(layer({"training_mode": 0})) is None


def test_undone_units_are_reported_with_their_index() -> None:
    of = layer()
    undone = layer(gamma=of["s"][0], beta=of["running_mean"][0])
    finding = found(at_rest.undone_units, undone)
    assert finding.severity == "note"
    assert finding.number == pytest.approx(1.0)
    assert finding.units == tuple(range(UNITS))
    assert at_rest.undone_units(layer(gamma=1.0, beta=0.0)) is None
    assert at_rest.undone_units(layer(gamma=1.0, beta=0.0, running_mean=0.0, running_var=1.0)) is None


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_error(name: str, bad: float) -> None:
    assert "non-finite" in slugs(layer(**{name: some(bad, [2])}))


@pytest.mark.parametrize(
    ("settings", "changed", "expected"),
    [
        ({"batches": 5}, START, {"never-updated"}),
        ({"batches": 0}, START, {"never-updated"}),
        ({"momentum": 0.0}, START, {"never-updated"}),
        (
            {"momentum": 0.0},
            START | {"gamma": 1.0, "beta": 0.0},
            {"untrained-statistics"},
        ),
        (
            {"batches": 3},
            START | {"gamma": 1.0, "beta": 0.0},
            {"untrained-statistics"},
        ),
        ({}, {"running_var": -np.inf}, {"non-finite"}),
        ({"batches": 3}, {"running_var": np.nan}, {"non-finite"}),
        ({"batches": 0}, {"running_mean": np.nan}, {"non-finite"}),
        ({}, {"running_var": 0.0, "dead": 1.0, "flat": 1.0, "beta": 0.0}, {"running-variance"}),
        ({}, {"running_var": 0.0, "dead": 1.0, "flat": 1.0, "beta": 1.0}, {"running-variance"}),
        ({}, {"running_var": 1e-9}, {"variance-below-eps"}),
        ({}, {"running_var": 1e-9, "dead": 1.0, "flat": 1.0, "beta": 0.0}, {"dead-units"}),
        ({}, {"running_var": 1e13}, {"huge-variance"}),
        ({"batches": 0}, {"running_var": 1e-3}, {"eps-sensitive"}),
        ({}, {"running_var": 1e-3}, {"eps-sensitive"}),
        ({"eps": 1e-12, "eps_known": True}, {"running_var": 1e-9}, {"float16-range"}),
    ],
)
def test_one_cause_is_reported_once(settings: dict[str, Any], changed: dict[str, Any], expected: set[str]) -> None:
    of = layer(settings, **changed)
    findings = apply_rules(at_rest.RULES, of)
    assert [finding.kind.slug for finding in findings] == list(expected)


def test_momentum_0_is_named_as_the_reason() -> None:
    (finding,) = apply_rules(at_rest.RULES, layer({"momentum": 0.0}, running_mean=0.0, running_var=1.0))
    assert finding.text == "running mean 0 and variance 1, as momentum is 0, gamma and beta learned"


def test_a_cause_is_as_severe_as_what_follows_from_it() -> None:
    of = layer(running_var=some(0.0, [4]), dead=some(1.0, [4], 0.0), beta=0.0)
    assert [(f.kind.slug, f.severity) for f in apply_rules(at_rest.RULES, of)] == [("running-variance", "warning")]
    of = layer(running_var=some(0.0, [4]), dead=some(1.0, list(range(10)), 0.0), beta=0.0)
    both = [(f.kind.slug, f.severity) for f in apply_rules(at_rest.RULES, of)]
    assert both == [("running-variance", "warning"), ("dead-units", "error")], "nine are dead for another reason"
