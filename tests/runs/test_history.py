"""History against brute force, row by row: one process, several with uneven counts, steps recorded twice, damage."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from batchnorm import quantities as q
from batchnorm.runs.history import DERIVED, MEASURED, History, frame
from batchnorm.runs.run import Run, RunError

LAYERS = (("stem.bn", 3, 1e-5), ("a/b 层", 2, 1e-3))
WIDTH = sum(units for _, units, _ in LAYERS)
WIDE = ("count", "energy", "diverted")
Snapshot = dict[str, np.ndarray]


def created(folder: Path, **info: object) -> Run:
    layers = [{"name": name, "units": units, "eps": eps, "affine": True} for name, units, eps in LAYERS]
    return Run.create(folder, "watch", **{"layers": layers, "processes": 1, **info})


def snapshot(rng: np.random.Generator, count: float = 64.0, batches: float = 1.0) -> Snapshot:
    """Every measured column of one step (all units), in the type that it is stored in."""
    columns = {name: rng.normal(1, 0.5, WIDTH) for name in MEASURED}
    positive = {name: np.exp(rng.normal(0, 0.5, WIDTH)) for name in ("var", "running_var", "energy", "diverted")}
    columns |= positive | {"count": np.full(WIDTH, count), "batches": np.full(WIDTH, batches)}
    columns |= {"weight_norm": np.full(WIDTH, 2.0), "lr": np.full(WIDTH, 0.1)}
    return {name: column.astype(np.float64 if name in WIDE else np.float32) for name, column in columns.items()}


def append(run: Run, snapshots: dict[int, Snapshot] | list[tuple[int, Snapshot]], rank: int = 0) -> None:
    """One part."""
    rows = list(snapshots.items()) if isinstance(snapshots, dict) else snapshots
    codes = np.repeat(np.arange(len(LAYERS), dtype=np.int32), [units for _, units, _ in LAYERS])
    unit = np.concatenate([np.arange(units, dtype=np.int32) for _, units, _ in LAYERS])
    table = {
        "step": np.repeat(np.array([step for step, _ in rows], np.int64), WIDTH),
        "layer": pa.DictionaryArray.from_arrays(pa.array(np.tile(codes, len(rows))), [name for name, *_ in LAYERS]),
        "unit": np.tile(unit, len(rows)),
    }
    table |= {name: np.concatenate([columns[name] for _, columns in rows]) for name in MEASURED}
    run.append("units", table, rank)


def brute(parts: list[Snapshot], eps: np.ndarray) -> dict[str, list[float]]:
    """A step's columns of several processes merged unit by unit, with Python's floats."""
    merged: dict[str, list[float]] = {name: [] for name in MEASURED}
    for unit in range(WIDTH):
        rows = [{name: float(part[name][unit]) for name in MEASURED} for part in parts]
        count = math.fsum(row["count"] for row in rows)
        mean = math.fsum(row["count"] * row["mean"] for row in rows) / count
        square = math.fsum(row["count"] * (row["var"] + (row["mean"] - mean) ** 2) for row in rows)
        merged["mean"].append(mean)
        merged["var"].append(square / count)
        for name in ("count", "batches", "dgamma", "dbeta", "energy", "diverted"):
            merged[name].append(math.fsum(row[name] for row in rows))
        for name in ("gamma", "beta", "running_mean", "running_var", "weight_norm", "lr"):
            merged[name].append(rows[0][name])
        if len(rows) > 1:
            means, logs = [row["mean"] for row in rows], [math.log(math.sqrt(row["var"] + eps[unit])) for row in rows]
            within = math.fsum(row["var"] for row in rows) / len(rows)
            merged["noise_mean"].append(float(np.var(means, ddof=1)) / within)
            merged["noise_log_scale"].append(float(np.var(logs, ddof=1)))
        else:
            merged["noise_mean"].append(rows[0]["noise_mean"])
            merged["noise_log_scale"].append(rows[0]["noise_log_scale"])
    return merged


EPS = np.repeat([eps for *_, eps in LAYERS], [units for _, units, _ in LAYERS])


def agrees(history: History, expected: dict[int, dict[str, list[float]]], *names: str) -> None:
    assert history.steps.tolist() == sorted(expected)
    first = 0
    for layer in history.layers:
        for name in names:
            wanted = np.array([expected[step][name][first : first + layer.units] for step in sorted(expected)])
            np.testing.assert_allclose(layer[name], wanted, rtol=1e-12, err_msg=f"{layer.name}: {name}")
        first += layer.units


def test_one_process_in_several_parts(tmp_path: Path) -> None:
    rng, run = np.random.default_rng(0), created(tmp_path / "run")
    taken = {step: snapshot(rng) for step in (0, 1, 5, 20)}
    append(run, {step: taken[step] for step in (0, 1)})
    append(run, {step: taken[step] for step in (5, 20)})
    history = History.read(run)
    assert [(layer.name, layer.units, layer.eps) for layer in history.layers] == list(LAYERS)
    agrees(history, {step: brute([found], EPS) for step, found in taken.items()}, *MEASURED)


def test_every_derived_quantity_is_its_definition(tmp_path: Path) -> None:
    rng, run = np.random.default_rng(1), created(tmp_path / "run")
    append(run, {step: snapshot(rng) for step in (0, 4, 9)})
    for layer in History.read(run).layers:
        mean, var, gamma, beta = (layer[name] for name in ("mean", "var", "gamma", "beta"))
        expected = {
            "s": np.sqrt(var + layer.eps),
            "undo_distance": q.undo_distance(mean, var, layer.eps, gamma, beta),
            "undo_index": q.undo_index(mean, var, layer.eps, gamma, beta),
            "input_mean": mean,
            "class": q.unit_class(mean, var, layer.eps, gamma, beta),
            "undo_angle": q.undo_angle(mean, var, layer.eps, gamma, beta),
            "bare_angle": q.bare_angle(mean, var, layer.eps),
            "flat": q.dead(var, layer.eps, gamma),
            "position_in": mean / np.sqrt(var + layer.eps),
            "position_out": beta / gamma,
            "gradient_diverted": layer["diverted"] / layer["energy"],
            "eval_gap": q.eval_gap(mean, var, layer["running_mean"], layer["running_var"], layer.eps),
            "effective_lr": layer["lr"] / layer["weight_norm"] ** 2,
            "dead": q.dead(var, layer.eps, gamma),
        }
        apart = np.array([[4.0], [5.0]])
        s = expected["s"]
        expected["drift_in_location"] = np.abs(np.diff(mean, axis=0)) / s[:-1] / apart
        expected["drift_in_log_scale"] = np.abs(np.diff(np.log(s), axis=0)) / apart
        expected["drift_out_location"] = np.abs(np.diff(beta, axis=0)) / np.abs(gamma[:-1]) / apart
        expected["drift_out_log_scale"] = np.abs(np.diff(np.log(np.abs(gamma)), axis=0)) / apart
        assert expected.keys() == DERIVED.keys()
        for name, values in expected.items():
            found = layer[name]
            if name.startswith("drift"):
                assert np.isnan(found[0]).all(), "nothing is before the first snapshot"
                found = found[1:]
            np.testing.assert_allclose(found, values, rtol=1e-12, err_msg=name)


def test_several_processes_merge_by_their_counts(tmp_path: Path) -> None:
    rng, run = np.random.default_rng(2), created(tmp_path / "run", processes=3)
    taken = {step: [snapshot(rng, count) for count in (64.0, 8.0, 17.0)] for step in (0, 3, 7)}
    for rank in range(3):
        append(run, {step: parts[rank] for step, parts in taken.items()}, rank)
    agrees(History.read(run), {step: brute(parts, EPS) for step, parts in taken.items()}, *MEASURED)


def test_a_step_that_a_process_misses_is_of_the_others(tmp_path: Path) -> None:
    rng, run = np.random.default_rng(3), created(tmp_path / "run", processes=2)
    there = {0: (0, 1), 2: (1,), 5: (0, 1), 8: (0,)}
    taken = {step: {rank: snapshot(rng, 10.0 + rank) for rank in ranks} for step, ranks in there.items()}
    for rank in (0, 1):
        append(run, {step: parts[rank] for step, parts in taken.items() if rank in parts}, rank)
    names = [name for name in MEASURED if not name.startswith("noise")]
    agrees(History.read(run), {step: brute(list(parts.values()), EPS) for step, parts in taken.items()}, *names)
    noise = History.read(run).layers[0]["noise_mean"]
    own = [float(taken[step][rank]["noise_mean"][0]) for step, rank in ((2, 1), (8, 0))]
    assert noise[[1, 3], 0].tolist() == own, "of one process: what it saw itself"


def test_a_layer_that_ran_in_one_process_only(tmp_path: Path) -> None:
    rng, run = np.random.default_rng(4), created(tmp_path / "run", processes=2)
    one, other = snapshot(rng), snapshot(rng)
    other["count"][:3], other["batches"][:3] = 0, 0
    for name in ("mean", "var", "dgamma", "dbeta", "energy", "diverted", "noise_mean", "noise_log_scale"):
        other[name][:3] = np.nan
    append(run, {0: one}, 0)
    append(run, {0: other}, 1)
    first, second = History.read(run).layers
    for name in ("mean", "var", "dgamma", "energy", "count"):
        np.testing.assert_allclose(first[name][0], one[name][:3], rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(second["count"][0], [128.0, 128.0])


def test_nobody_knows_a_layer_that_ran_nowhere(tmp_path: Path) -> None:
    run = created(tmp_path / "run", processes=2)
    for rank in (0, 1):
        idle = snapshot(np.random.default_rng(rank))
        idle["count"][:] = 0
        for name in ("mean", "var", "energy"):
            idle[name][:] = np.nan
        append(run, {0: idle}, rank)
    layer = History.read(run).layers[0]
    assert all(np.isnan(layer[name]).all() for name in ("mean", "var", "energy", "undo_index", "eval_gap"))


def test_of_a_step_recorded_twice_the_later_counts(tmp_path: Path) -> None:
    rng, run = np.random.default_rng(5), created(tmp_path / "run")
    first, again, last = (snapshot(rng) for _ in range(3))
    append(run, [(0, first), (3, first)])
    append(run, [(3, again), (4, last)])
    expected = {0: brute([first], EPS), 3: brute([again], EPS), 4: brute([last], EPS)}
    agrees(History.read(run), expected, *MEASURED)


def test_a_step_recorded_twice_by_one_of_two_processes(tmp_path: Path) -> None:
    rng, run = np.random.default_rng(6), created(tmp_path / "run", processes=2)
    other, first, again = (snapshot(rng, count) for count in (4.0, 9.0, 25.0))
    append(run, {3: other}, 0)
    append(run, [(3, first), (3, again)], 1)
    agrees(History.read(run), {3: brute([other, again], EPS)}, *MEASURED)


def test_dead_by_deviation_or_by_the_only_missing_gradient(tmp_path: Path) -> None:
    run, taken = created(tmp_path / "run"), snapshot(np.random.default_rng(7))
    taken["var"][:] = 1.0
    taken["gamma"][:] = [1.0, -5e-3, 1.0, 1.0, 1.0]
    taken["energy"][:] = [0.0, 1.0, 1.0, 0.0, 0.0]
    append(run, {0: taken})
    first, second = History.read(run).layers
    assert first["dead"].tolist() == [[1.0, 1.0, 0.0]]
    assert second["dead"].tolist() == [[0.0, 0.0]], "where no unit has a gradient, none is dead by that"
    assert first["flat"].tolist() == [[0.0, 1.0, 0.0]]
    assert first["class"][0, :2].tolist() == [q.CLASSES.index("dead")] * 2


@pytest.mark.parametrize(("act", "dead"), [(None, 1.0), ("relu", 1.0), ("relu6", 1.0), ("tanh", 0.0), ("silu", 0.0)])
def test_only_a_relu_makes_a_missing_gradient_a_dead_unit(tmp_path: Path, act: str | None, dead: float) -> None:
    run, taken = created(tmp_path / "run"), snapshot(np.random.default_rng(7))
    run.note(layers=[{**entry, "act": act} for entry in run.info["layers"]])
    taken["gamma"][:], taken["var"][:] = 1.0, 1.0
    taken["energy"][:] = [0.0, 1.0, 1.0, 1.0, 1.0]
    append(run, {0: taken})
    assert History.read(run).layers[0]["dead"].tolist() == [[dead, 0.0, 0.0]]


def test_the_last_step_without_a_batch_is_read_by_its_running_statistics(tmp_path: Path) -> None:
    rng, run = np.random.default_rng(11), created(tmp_path / "run")
    taken = {step: snapshot(rng) for step in (0, 4, 9)}
    taken[4]["energy"][0] = 0.0  # the first unit was silent in the last step with a gradient
    for name in ("mean", "var", "energy", "diverted", "dgamma", "dbeta"):
        taken[9][name][:] = np.nan
    append(run, taken)
    batches = History.read(run).layers[0]
    assert np.isnan(batches["undo_index"][2]).all(), "while it runs, that the layer did not run is all that is known"
    run.note(steps=10)
    layer = History.read(run).layers[0]
    last = {name: taken[9][name][:3] for name in ("running_mean", "running_var", "gamma", "beta")}
    np.testing.assert_allclose(layer["undo_index"][2], q.undo_index(*(last[n] for n in ("running_mean", "running_var")),
                               layer.eps, last["gamma"], last["beta"]))  # fmt: skip
    np.testing.assert_allclose(layer["input_mean"][2], last["running_mean"])
    assert layer["dead"][2].tolist() == [1.0, 0.0, 0.0]
    assert np.isnan(layer["eval_gap"][2]).all()
    assert np.isnan(layer["mean"][2]).all(), "what was measured stays as it was"
    np.testing.assert_array_equal(layer["undo_index"][:2], batches["undo_index"][:2])


def test_a_run_without_a_snapshot_has_layers_without_rows(tmp_path: Path) -> None:
    history = History.read(created(tmp_path / "run"))
    assert len(history.steps) == 0
    assert [layer["undo_index"].shape for layer in history.layers] == [(0, 3), (0, 2)]
    assert frame(history.run).num_rows == 0


def test_columns_that_an_older_run_lacks_are_unknown(tmp_path: Path) -> None:
    run, taken = created(tmp_path / "run"), snapshot(np.random.default_rng(8))
    append(run, {0: taken})
    table = run.table("units").drop_columns(["lr"])
    (tmp_path / "run" / "units-00001.parquet").unlink()
    run.append("units", table)
    layer = History.read(run).layers[0]
    assert np.isnan(layer["lr"]).all()
    assert np.isnan(layer["effective_lr"]).all()
    np.testing.assert_allclose(layer["mean"][0], taken["mean"][:3])


def test_the_frame_has_every_number_in_long_form(tmp_path: Path) -> None:
    rng, run = np.random.default_rng(9), created(tmp_path / "run")
    append(run, {step: snapshot(rng) for step in (0, 6)})
    history = History.read(run)
    long = frame(history.run)
    assert long.column_names == ["step", "layer", "unit", *MEASURED, *DERIVED]
    rows = long.to_pylist()
    assert len(rows) == 2 * WIDTH
    for layer in history.layers:
        for name in ("mean", "undo_index", "dead"):
            found = [row[name] for row in rows if row["layer"] == layer.name]
            np.testing.assert_allclose(np.reshape(found, (2, layer.units)), layer[name])
        words = [row["class"] for row in rows if row["layer"] == layer.name]
        assert words == q.class_names(layer["class"])
    assert [row["unit"] for row in rows if row["layer"] == LAYERS[1][0]] == [0, 1, 0, 1]


def test_an_unknown_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="undo_indx"):
        History.read(created(tmp_path / "run")).layers[0]["undo_indx"]


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="kind 'study'"):
        History.read(Run.create(tmp_path / "run", "study"))


@pytest.mark.parametrize("entry", [{"units": 3, "eps": 1e-5}, {"name": "a", "eps": 1e-5}, {"name": "a", "units": 3}])
def test_a_layer_without_its_facts_is_refused(tmp_path: Path, entry: dict[str, object]) -> None:
    run = Run.create(tmp_path / "run", "watch", layers=[entry])
    with pytest.raises(RunError, match=r"without name, units or eps"):
        _ = History.read(run).layers


def test_half_a_snapshot_is_damage(tmp_path: Path) -> None:
    run = created(tmp_path / "run")
    append(run, {0: snapshot(np.random.default_rng(0))})
    run.append("units", run.table("units").slice(0, WIDTH - 1))
    with pytest.raises(RunError, match="has incomplete snapshots"):
        History.read(run)


def test_rows_in_disorder_are_damage(tmp_path: Path) -> None:
    run = created(tmp_path / "run")
    append(run, {0: snapshot(np.random.default_rng(0)), 1: snapshot(np.random.default_rng(1))})
    table = run.table("units")
    (tmp_path / "run" / "units-00001.parquet").unlink()
    run.append("units", table.sort_by("unit"))
    with pytest.raises(RunError, match="has incomplete snapshots"):
        History.read(run)


def test_a_part_cut_short_is_named(tmp_path: Path) -> None:
    run = created(tmp_path / "run")
    append(run, {0: snapshot(np.random.default_rng(0))})
    part = tmp_path / "run" / "units-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(RunError, match=r"units-00001\.parquet is damaged"):
        History.read(run)
