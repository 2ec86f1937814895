"""Every rule finds what it is for, says since when, and is silent about healthy layers that look alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batchnorm.checks import findings as state
from batchnorm.checks.findings import Finding, Kind, LayerData, apply_rules, by_severity
from batchnorm.checks.rules import training

UNITS = 20
STEPS = np.array([0, 1, 3, 10, 30, 100, 300, 1000], np.int64)
ROWS = len(STEPS)


def layer(steps: np.ndarray | None = STEPS, settings: dict[str, Any] | None = None, **changed: Any) -> LayerData:
    """A healthy layer but for what is changed: arrays of (rows, units), or numbers for all."""
    rows = 1 if steps is None else len(steps)
    rng = np.random.default_rng(0)
    shape = (rows, UNITS)
    arrays: dict[str, Any] = {
        "gamma": 1 + 0.2 * rng.standard_normal(shape), "beta": 0.2 * rng.standard_normal(shape),
        "mean": rng.standard_normal(shape), "var": 1 + rng.random(shape), "s": 1 + 0.4 * rng.random(shape),
        "running_mean": rng.standard_normal(shape), "running_var": 1 + rng.random(shape), "dead": 0.0, "flat": 0.0,
        "count": 4096.0, "batches": 1.0, "energy": 1 + rng.random(shape), "gradient_diverted": 0.1 * rng.random(shape),
        "eval_gap": 0.1 * rng.random(shape), "noise_mean": 1e-3,
    }  # fmt: skip
    arrays |= changed
    full = {name: np.broadcast_to(np.asarray(value, np.float64), shape).copy() for name, value in arrays.items()}
    return LayerData("bn", UNITS, full, steps, {"eps": 1e-5, "momentum": 0.1, "affine": True} | (settings or {}))


def from_row(row: int, units: slice | list[int], value: float, otherwise: np.ndarray | float) -> np.ndarray:
    """(rows, units): `value` in these units from a row on."""
    grid = np.broadcast_to(np.asarray(otherwise, np.float64), (ROWS, UNITS)).copy()
    grid[row:, units] = value
    return grid


def found(rule: Any, of: LayerData) -> Finding:
    finding = rule(of)
    assert finding is not None
    return finding


def test_a_healthy_layer_has_no_findings() -> None:
    assert apply_rules(training.RULES, layer()) == []
    assert apply_rules(state.RULES, layer(steps=None)) == []


def test_a_layer_of_which_nothing_is_known_has_no_findings() -> None:
    assert apply_rules(state.RULES, LayerData("bn", UNITS, {})) == []
    assert apply_rules(training.RULES, LayerData("bn", UNITS, {}, np.zeros(0, np.int64))) == []


def test_dead_units_are_counted_with_the_step_from_which_they_stay_dead() -> None:
    dead = from_row(4, [2, 5], 1.0, 0.0)
    dead[2, 2] = 1.0  # once before, alive again after
    finding = found(state.dead_units, layer(dead=dead))
    assert (finding.units, finding.since, finding.number) == ((2, 5), 30, 0.1)
    assert finding.text == "2 of 20 units dead since step 30"
    assert finding.severity == "warning"


def test_units_that_die_one_by_one_are_reported_with_both_steps() -> None:
    dead = from_row(3, [1], 1.0, from_row(5, [7], 1.0, 0.0))
    assert found(state.dead_units, layer(dead=dead)).text == (
        "2 of 20 units dead since step 100, the first since step 10"
    )


@pytest.mark.parametrize(("many", "severity"), [(1, "warning"), (9, "warning"), (10, "error")])
def test_the_more_units_are_dead_the_graver(many: int, severity: str) -> None:
    dead = from_row(0, slice(many), 1.0, 0.0)
    finding = found(state.dead_units, layer(dead=dead))
    assert finding.severity == severity
    assert len(finding.units) == many


def test_one_or_two_odd_snapshots_are_no_dead_unit() -> None:
    assert state.dead_units(layer(dead=from_row(ROWS - 2, [3], 1.0, 0.0))) is None
    assert state.dead_units(layer(dead=from_row(ROWS - 3, [3], 1.0, 0.0))) is not None


def test_gammas_that_start_at_zero_and_grow_are_not_dead() -> None:
    gamma = np.linspace(0, 0.008, ROWS)[:, None]
    assert state.dead_units(layer(gamma=gamma, beta=0.0, dead=1.0, flat=1.0)) is None
    assert state.constant_channels(layer(gamma=gamma, beta=0.5, dead=1.0, flat=1.0)) is None
    stuck = found(state.dead_units, layer(gamma=0.0, beta=0.0, dead=1.0, flat=1.0))
    assert stuck.text == "20 of 20 units dead from the first recorded step on"


def test_steps_in_which_the_layer_did_not_run_neither_begin_nor_end_anything() -> None:
    dead = from_row(3, [4], 1.0, 0.0)
    dead[[5, ROWS - 1]] = np.nan
    assert found(state.dead_units, layer(dead=dead)).since == 10


def test_a_few_steps_are_no_state_however_many_of_them_were_recorded() -> None:
    """A gamma that passes through zero, every step being recorded."""
    steps = np.arange(1000, 1008)
    assert state.dead_units(layer(steps=steps, dead=1.0)) is None
    assert state.dead_units(layer(steps=10 * steps, dead=1.0)) is not None


def test_a_checkpoint_needs_no_history() -> None:
    finding = found(state.dead_units, layer(steps=None, gamma=1e-3, beta=0.0, dead=1.0))
    assert finding.text == "20 of 20 units dead"
    assert finding.since is None


def test_constant_channels_are_distinguished_from_dead_units() -> None:
    gamma, beta = from_row(2, [0, 1, 2], 1e-4, 1.0), from_row(2, [0, 1], 0.7, 0.0)
    dead = from_row(2, [0, 1, 2], 1.0, 0.0)
    of = layer(gamma=gamma, beta=beta, dead=dead, flat=dead)
    assert found(state.constant_channels, of).units == (0, 1)
    assert found(state.constant_channels, of).since == 3
    assert found(state.dead_units, of).units == (2,)


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var", "mean", "var"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_at_the_end_are_errors(name: str, value: float) -> None:
    grid = layer().arrays[name]
    grid[5:, 3] = value
    finding = found(state.non_finite, layer(**{name: grid}))
    assert (finding.severity, finding.units, finding.since) == ("error", (3,), 100)


def test_values_that_are_finite_again_are_a_note() -> None:
    grid = layer().arrays["var"]
    grid[2] = np.inf
    finding = found(state.non_finite, layer(var=grid))
    assert finding.severity == "note"
    assert "finite again" in finding.text


def test_nan_of_what_is_not_there_is_no_finding() -> None:
    nothing = {"running_mean": np.nan, "running_var": np.nan, "eval_gap": np.nan}
    assert apply_rules(training.RULES, layer(**nothing)) == []
    late = {name: layer().arrays[name] for name in ("mean", "var", "count")}
    for grid in late.values():
        grid[4] = np.nan
    assert state.non_finite(layer(**late)) is None


def test_gradients_that_overflow_once_are_mixed_precision() -> None:
    energy = layer().arrays["energy"]
    energy[3] = np.inf
    assert apply_rules(training.RULES, layer(energy=energy)) == []


@pytest.mark.parametrize(("value", "severity"), [(0.0, "warning"), (-1e-3, "error")])
def test_running_variances_at_or_below_zero(value: float, severity: str) -> None:
    grid = layer().arrays["running_var"]
    grid[-1, [4, 6]] = value
    finding = found(state.running_variance, layer(running_var=grid))
    assert (finding.severity, finding.units, finding.number) == (severity, (4, 6), value)


def test_statistics_that_never_moved() -> None:
    finding = found(state.untrained_statistics, layer(running_mean=0.0, running_var=1.0))
    assert (finding.severity, finding.number) == ("warning", 1.0)
    assert state.untrained_statistics(layer(running_mean=0.0)) is None


def test_statistics_that_are_still_their_start_by_momentum() -> None:
    few = layer(steps=STEPS[:4])  # 11 steps
    finding = found(state.untrained_statistics, few)
    assert finding.number == pytest.approx(0.9**11)
    assert finding.severity == "note"
    assert state.untrained_statistics(layer(steps=STEPS[:4], batches=4.0)) is None
    assert state.untrained_statistics(layer(settings={"momentum": None}, steps=STEPS[:4])) is None


@pytest.mark.parametrize(
    ("momentum", "found_there"), [(0.99, True), (0.5, True), (0, True), (0.1, False), (None, False)]
)
def test_momentum_of_another_convention(momentum: float | None, found_there: bool) -> None:
    assert (state.momentum_convention(layer(settings={"momentum": momentum})) is not None) is found_there


def test_momentum_without_running_statistics_means_nothing() -> None:
    assert state.momentum_convention(layer(settings={"momentum": 0.9}, running_mean=np.nan)) is None


def test_a_lasting_gap_between_training_and_inference() -> None:
    finding = found(training.eval_gap, layer(eval_gap=from_row(ROWS - 3, slice(None), 0.8, 0.7)))
    assert (finding.severity, finding.number) == ("warning", 0.8)
    assert "growing" not in finding.text
    assert found(training.eval_gap, layer(eval_gap=3.0)).severity == "error"


def test_a_growing_gap_is_reported_as_growing() -> None:
    assert "growing" in found(training.eval_gap, layer(eval_gap=from_row(ROWS - 3, slice(None), 0.9, 0.2))).text


def test_a_gap_is_no_finding_when_it_passes_or_is_early_or_is_noise() -> None:
    assert training.eval_gap(layer(eval_gap=from_row(ROWS - 2, slice(None), 5.0, 0.1))) is None
    assert training.eval_gap(layer(steps=STEPS[:4], eval_gap=5.0)) is None
    assert training.eval_gap(layer(eval_gap=0.9, count=8.0)) is None  # 5·sqrt(1.5/8) = 2.2
    assert training.eval_gap(layer(eval_gap=from_row(0, [1, 2], 5.0, 0.1))) is None, "the typical unit is well"


def test_a_gradient_that_is_nearly_all_diverted() -> None:
    assert found(training.gradient_diverted, layer(gradient_diverted=0.97)).number == pytest.approx(0.97)
    assert training.gradient_diverted(layer(gradient_diverted=from_row(ROWS - 2, slice(None), 0.97, 0.1))) is None
    assert training.gradient_diverted(layer(gradient_diverted=0.97, count=4.0)) is None, "so few values divert it"


def test_a_gradient_that_no_longer_arrives() -> None:
    finding = found(training.no_gradient, layer(energy=from_row(4, slice(None), 0.0, 1.0)))
    assert (finding.severity, finding.since, finding.text) == ("warning", 30, "no gradient since step 30")
    assert found(training.no_gradient, layer(energy=np.nan)).severity == "note"
    assert training.no_gradient(layer(energy=from_row(ROWS - 2, slice(None), 0.0, 1.0))) is None
    assert training.no_gradient(layer(energy=np.nan, count=0.0)) is None, "it did not even run"


def test_a_layer_that_never_ran() -> None:
    idle = {"count": 0.0, "mean": np.nan, "var": np.nan, "energy": np.nan, "eval_gap": np.nan}
    assert found(training.not_recorded, layer(**idle)).text == "not run in any of 8 recorded steps"
    assert training.not_recorded(layer()) is None


@pytest.mark.parametrize(
    ("count", "batches", "severity"), [(8.0, 1.0, "warning"), (32.0, 4.0, "warning"), (1.0, 1.0, "error")]
)
def test_tiny_batches(count: float, batches: float, severity: str) -> None:
    finding = found(training.tiny_batches, layer(count=count, batches=batches))
    assert (finding.severity, finding.number) == (severity, count / batches)
    assert training.tiny_batches(layer(count=16.0)) is None


def test_noisy_batches() -> None:
    assert found(training.batch_noise, layer(noise_mean=0.4)).number == pytest.approx(0.4)
    assert training.batch_noise(layer(noise_mean=from_row(ROWS - 2, slice(None), 0.4, 0.01))) is None


def test_findings_are_sorted_by_severity_then_kind() -> None:
    kinds = [Kind(slug, slug, "", "") for slug in "ab"]
    made = [Finding(kinds[k], severity, "bn", "", 0.0) for k, severity in ((0, "note"), (1, "error"), (0, "error"))]  # type: ignore[arg-type]
    assert [(f.severity, f.kind.slug) for f in by_severity(made)] == [("error", "a"), ("error", "b"), ("note", "a")]


def test_a_finding_says_all_there_is_for_json() -> None:
    result = found(state.dead_units, layer(dead=from_row(4, [2], 1.0, 0.0))).as_dict()
    assert {"slug", "severity", "layer", "text", "number", "units", "since", "why", "advice", "docs"} == result.keys()
    assert all(result[name] for name in ("why", "advice", "text"))


@pytest.mark.parametrize(
    ("settings", "changed", "expected"),
    [
        ({}, {"running_mean": 0.0, "running_var": 1.0, "eval_gap": 3.0}, [("untrained-statistics", "error")]),
        (
            {"momentum": 0},
            {"running_mean": 0.0, "running_var": 1.0, "eval_gap": 0.8},
            [("untrained-statistics", "warning")],
        ),
        ({"momentum": 0.99}, {"eval_gap": 3.0}, [("momentum", "error")]),
        ({}, {"running_mean": np.inf, "eval_gap": np.inf}, [("non-finite", "error")]),
        ({}, {"running_mean": np.inf, "energy": np.nan}, [("non-finite", "error")]),
        ({}, {"count": 8.0, "noise_mean": 0.4}, [("tiny-batches", "warning")]),
        ({}, {"running_var": 0.0, "dead": 1.0, "flat": 1.0, "beta": 0.0}, [("running-variance", "error")]),
        ({}, {"noise_mean": 0.4, "running_mean": np.inf}, [("non-finite", "error"), ("batch-noise", "note")]),
    ],
)
def test_one_cause_is_reported_once_and_other_causes_too(
    settings: dict[str, Any], changed: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    found = apply_rules(training.RULES, layer(settings=settings, **changed))
    assert [(finding.kind.slug, finding.severity) for finding in found] == expected


def test_what_a_kind_may_follow_from_exists() -> None:
    from batchnorm.checks.rules import at_rest

    kinds = {
        value.slug: value for m in (state, training, at_rest) for value in vars(m).values() if isinstance(value, Kind)
    }
    assert {cause for kind in kinds.values() for cause in kind.causes} <= set(kinds)
