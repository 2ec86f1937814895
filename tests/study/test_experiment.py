"""A small study: shared weights and batches, measured tables, and errors."""

import numpy as np
import pytest
import torch

from batchnorm import quantities
from batchnorm.report import render
from batchnorm.runs.run import Run
from batchnorm.study import experiment
from batchnorm.study.experiment import Config, batches, describe, difference, log_spaced, study, work
from batchnorm.study.networks import ARMS, HIDDEN


def column(run, table, name, **where):
    rows = run.table(table)
    keep = np.ones(rows.num_rows, bool)
    for key, value in where.items():
        keep &= np.array(rows[key].to_pylist()) == value
    return rows[name].to_numpy()[keep]


def run_study(blobs, path, **options):
    config = Config(**options)
    run = Run.create(path, "study", config=describe(config, blobs))
    return config, run


def test_steps_are_log_spaced_and_hold_both_ends():
    for steps in (1, 2, 7, 100, 5000, 50_000):
        spaced = log_spaced(steps)
        assert spaced[0] == 0
        assert spaced[-1] == steps
        assert spaced == sorted(set(spaced))
        assert len(spaced) <= 47
    assert log_spaced(5000)[:6] == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_every_arm_is_measured_at_every_step_in_every_unit(small_run):
    steps = log_spaced(40)
    for seed in (0, 1):
        for arm in ARMS:
            np.testing.assert_array_equal(column(small_run, "curves", "step", seed=seed, arm=arm), steps)
            assert len(column(small_run, "units", "mean", seed=seed, arm=arm)) == len(steps) * sum(HIDDEN)
    assert set(small_run.table("units")["layer"].to_pylist()) == {"hidden1", "hidden2", "hidden3"}


def test_undone_and_none_are_the_same_function_at_step_0_and_then_part(small_run):
    assert column(small_run, "start", "max", mode="inference").max() < 1e-4
    inference, training = (column(small_run, "start", "rms", mode=mode) for mode in ("inference", "training"))
    assert training.min() > 10 * inference.max()
    parted = column(small_run, "parting", "rms", seed=0)
    assert parted[0] < 1e-4
    assert parted[-1] > 100 * parted[0]
    for seed in (0, 1):
        none, undone = (column(small_run, "curves", "loss", seed=seed, arm=arm, step=0) for arm in ("none", "undone"))
        np.testing.assert_allclose(none, undone, atol=1e-5)


@pytest.mark.slow
def test_undone_starts_at_undo_index_1_and_learned_at_0(small_run):
    at_start = {arm: column(small_run, "units", "undo_index", arm=arm, step=0) for arm in ARMS}
    # The probe is here the whole training set, whose statistics `undone` was given.
    np.testing.assert_allclose(at_start["undone"], 1, atol=1e-3)
    np.testing.assert_allclose(at_start["learned"], 0, atol=1e-12)
    np.testing.assert_allclose(at_start["fixed"], 0, atol=1e-12)
    assert np.isnan(at_start["none"]).all()


def test_the_gradients_share_is_measured_with_and_without_learned_gamma(small_run):
    for arm in ("learned", "fixed", "undone"):
        share = column(small_run, "units", "gradient_diverted", arm=arm)
        assert np.isfinite(share).all()
        assert share.min() >= 0
        assert share.max() <= 1 + 1e-6
    assert np.isnan(column(small_run, "units", "gradient_diverted", arm="none")).all()


def test_the_optimal_task_ends_nearer_to_undone(small_run):
    end = column(small_run, "optimal", "undo_index", step=40)
    assert np.median(end) > 0.5
    assert np.median(end) > np.median(column(small_run, "optimal", "undo_index", step=0))


def test_taps_are_removed(blobs, tmp_path):
    config, run = run_study(blobs, tmp_path / "run", seeds=1, steps=3)
    seed = experiment._Seed(config, blobs, run, experiment.Rows(run), 0)
    seed.train(lambda _: None)
    assert all(norm._tap is None for network in seed.networks.values() for norm in network.batch_norms())


@pytest.mark.slow
def test_two_studies_with_the_same_seeds_are_the_same_to_the_last_bit(blobs, tmp_path):
    tables = []
    for name in ("a", "b"):
        config, run = run_study(blobs, tmp_path / name, seeds=1, steps=20)
        study(config, blobs, run)
        tables.append(run.table("units"))
    for name in tables[0].column_names:
        if name not in ("arm", "layer"):
            np.testing.assert_array_equal(tables[0][name].to_numpy(), tables[1][name].to_numpy())


@pytest.mark.slow
def test_measuring_changes_nothing_in_the_training_beyond_rounding(blobs, tmp_path, monkeypatch):
    ends = []
    for name, spaced in (("many", log_spaced), ("few", lambda steps, count=0: [0, steps])):
        monkeypatch.setattr(experiment, "log_spaced", spaced)
        config, run = run_study(blobs, tmp_path / name, seeds=1, steps=30)
        study(config, blobs, run)
        ends.append([column(run, "curves", "loss", arm=arm, step=30) for arm in ARMS])
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5)


def test_an_arm_that_diverges_is_noted_and_the_rest_goes_on(blobs, tmp_path, monkeypatch):
    build = experiment.build

    def broken(arm, *args):
        network = build(arm, *args)
        if arm == "none":
            with torch.no_grad():
                network.output.weight[0, 0] = float("nan")
        return network

    monkeypatch.setattr(experiment, "build", broken)
    config, run = run_study(blobs, tmp_path / "run", seeds=2, steps=5)
    study(config, blobs, run)
    assert run.info["diverged"] == [{"seed": s, "arm": "none", "step": 0} for s in (0, 1)]
    for arm in ("learned", "fixed", "undone"):
        assert column(run, "curves", "step", arm=arm, seed=1).max() == 5


@pytest.mark.slow
def test_a_rate_that_drives_weights_to_infinity_is_measured_and_reported_without_a_warning(blobs, tmp_path):
    config, run = run_study(blobs, tmp_path / "run", seeds=2, steps=30, act="relu", lr=1e4)
    study(config, blobs, run)
    run.finish("complete")
    assert {entry["arm"] for entry in run.info["diverged"]} >= {"none"}
    page = render(run).read_text(encoding="utf-8")
    assert "diverged" in page


def test_an_interrupted_study_keeps_what_was_measured(blobs, tmp_path):
    config, run = run_study(blobs, tmp_path / "run", seeds=2, steps=20)

    def interrupt(units, done=[0]):  # noqa: B006 - counts over the calls
        done[0] += units
        if done[0] > 0.7 * work(config):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(config, blobs, run, interrupt)
    steps = column(run, "curves", "step", seed=0)
    assert steps.max() == 20
    assert 0 <= column(run, "curves", "step", seed=1).max() < 20


def test_progress_adds_up_to_the_work(blobs, tmp_path):
    config, run = run_study(blobs, tmp_path / "run", seeds=2, steps=7)
    done = []
    study(config, blobs, run, done.append)
    assert sum(done) == work(config)


def test_batches_pass_over_the_data_and_depend_on_the_seed_alone():
    order = batches(10, 3, (1, 2))
    first_pass = torch.cat([next(order) for _ in range(3)])
    assert len(set(first_pass.tolist())) == 9
    again = batches(10, 3, (1, 2))
    assert torch.equal(next(again), first_pass[:3])
    assert not torch.equal(torch.cat([next(batches(10, 3, (1, s))) for s in range(4)]), first_pass.repeat(2)[:12])
    with pytest.raises(ValueError, match="batch size must be between 2 and the number of rows, 10"):
        next(batches(10, 11, (0,)))


def test_difference_has_rms_maximum_and_the_references_deviation():
    reference = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    found = difference(reference + torch.tensor([[0.0, 3.0], [0.0, -4.0]]), reference)
    assert found == {"rms": 2.5, "max": 4.0, "logit_std": pytest.approx(np.sqrt((1 + 4) / 2))}


def test_every_quantity_of_the_module_is_in_the_table(small_run):
    """A quantity that is defined but not measured would be missed by nobody else."""
    names = set(small_run.table("units").column_names)
    own = {n for n, f in vars(quantities).items() if getattr(f, "__module__", "") == quantities.__name__}
    public = {n for n in own if n[0].islower()}
    measured = {
        "scale": {"s"},
        "bare_distance": set(),  # the denominator of undo_index
        "angle_ratio": set(),  # of two columns
        "output_deviation": set(),  # what dead goes by
        "silent": set(),  # another
        "unit_class": {"class"},
        "class_names": set(),
        "undoing": {"undo_distance", "undo_index", "undo_angle", "bare_angle"},
        "positive_share": {"positive_in", "positive_out"},
        "batch_noise": {"noise_mean", "noise_log_scale"},
        "drift": {"drift_in_location", "drift_in_log_scale", "drift_out_location", "drift_out_log_scale"},
        "percentiles": {"in_p15", "in_p50", "in_p85"},
        "eval_gap": set(),  # of watched trainings: here inference has a curve of its own
        "effective_lr": set(),  # likewise
    }
    assert {"undo_index", "dead", "linear_share"} < public
    for name in public:
        assert measured.get(name, {name}) <= names, name
