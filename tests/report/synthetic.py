"""Studies that never ran: Runs on disk with the tables a study writes, and numbers chosen by the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from batchnorm import quantities as q
from batchnorm.runs.run import Run

ARMS = ("none", "learned", "fixed", "undone")
LAYERS = ("hidden1", "hidden2", "hidden3")
EPS = 1e-5
SPEED = {"none": 1500.0, "learned": 40.0, "fixed": 45.0, "undone": 120.0}


def log_spaced(steps: int, points: int = 45) -> np.ndarray:
    return np.unique(np.concatenate([[0, steps], np.geomspace(1, steps, points).round()])).astype(np.int64)


def study(
    folder: Path,
    *,
    steps: int = 5000,
    measured: np.ndarray | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    arms: tuple[str, ...] = ARMS,
    layers: tuple[str, ...] = LAYERS,
    width: int = 100,
    undo: dict[str, float] | None = None,
    identity: float = 3e-6,
    status: str = "complete",
    diverged: tuple[dict[str, Any], ...] = (),
    tables: tuple[str, ...] = ("curves", "units", "start", "parting", "optimal"),
    act: str = "sigmoid",
    speed: dict[str, float] | None = None,
    seed_noise: float = 0.01,
) -> Run:
    """A study's Run. `undo` says which share of the way to the identity each arm's units have gone at the end."""
    measured = log_spaced(steps) if measured is None else np.asarray(measured, np.int64)
    undo = {"learned": 0.05, "undone": 0.6, **(undo or {})}
    speed = {**SPEED, **(speed or {})}
    run = Run.create(folder, "study", config=_config(steps, seeds, arms, layers, width, act), **_provenance())
    makers = {"start": _start, "parting": _parting, "optimal": _optimal}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        if "curves" in tables:
            for arm in arms:
                run.append("curves", _curves(seed, arm, measured, speed[arm], seed_noise))
        if "units" in tables:
            for arm in arms:
                for place, layer in enumerate(layers):
                    final = undo.get(arm, 0.0)
                    run.append("units", _units(rng, seed, arm, layer, place, measured, width, final))
        for name, make in makers.items():
            if name in tables:
                run.append(name, make(rng, seed, measured, identity))
    run.note(diverged=list(diverged), seconds=71.25)
    if status != "running":
        run.finish(status)
    return run


def _config(
    steps: int, seeds: tuple[int, ...], arms: tuple[str, ...], layers: tuple[str, ...], width: int, act: str
) -> dict[str, Any]:
    return {
        "data": "digits", "train": 1437, "test": 360, "inputs": 64, "classes": 10, "act": act, "seeds": list(seeds),
        "steps": steps, "lr": 0.1, "batch": 60, "hidden": [width] * len(layers), "eps": EPS, "momentum": 0.1,
        "arms": list(arms),
    }  # fmt: skip


def _provenance() -> dict[str, Any]:
    return {
        "command": "batchnorm study --data digits",
        "versions": {"batchnorm": "0.1.0", "torch": "2.13.0", "numpy": "2.2.0", "python": "3.11.9"},
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2},
    }


def _words(text: str, rows: int) -> list[str]:
    return [text] * rows


def _curves(seed: int, arm: str, steps: np.ndarray, speed: float, seed_noise: float) -> dict[str, Any]:
    learned = steps / (steps + speed)
    wobble = seed_noise * np.sin(seed + steps / 7) * (steps > 0)
    return {
        "seed": np.full(len(steps), seed, np.int32),
        "arm": _words(arm, len(steps)),
        "step": steps,
        "loss": 2.4 - 2.3 * learned + 2 * wobble,
        "accuracy": np.clip(0.1 + 0.88 * learned + wobble, 0, 1),
    }


def _units(
    rng: np.random.Generator, seed: int, arm: str, layer: str, place: int, steps: np.ndarray, width: int, final: float
) -> dict[str, Any]:
    """Every unit of a layer at every step; rows are (steps, width), flattened."""
    time = (np.log1p(steps) / np.log1p(max(steps.max(), 1)))[:, None]
    mean = rng.normal(0, 1.5, width) * (0.3 + 2 * time) + 0.05 * rng.normal(size=(len(steps), width))
    s = np.exp(rng.normal(0.3, 0.4, width)) * (0.4 + 1.5 * time)
    var = s**2 - EPS
    if arm == "none":
        gamma = beta = np.full(s.shape, np.nan)
    elif arm == "fixed":
        gamma, beta = np.ones_like(s), np.zeros_like(mean)
    else:
        start = 1.0 if arm == "undone" else 0.0
        way = start + (final - start) * time
        gamma = 1 + way * (s - 1) + 0.05 * time * rng.normal(size=s.shape)
        beta = way * mean + 0.05 * time * rng.normal(size=s.shape)
    normalized = arm != "none"
    nothing = np.full(s.shape, np.nan)
    out_mean, out_s = (beta, gamma) if normalized else (mean, s)
    z = np.array([-1.036, 0.0, 1.036])
    drift_in = 0.3 / (1 + steps[:, None]) * np.exp(rng.normal(0, 0.2, s.shape))
    diverted = np.clip(0.2 - 0.1 * time + 0.02 * rng.normal(size=s.shape), 0, 1)
    drift_out = drift_in if arm in ("learned", "undone") else nothing
    columns = {
        "mean": mean, "s": s, "gamma": gamma, "beta": beta,
        **q.undoing(mean, var, EPS, gamma, beta),
        "class": np.reshape(q.class_names(q.unit_class(mean, var, EPS, gamma, beta)), s.shape),
        "position_in": mean / s, "position_out": beta / gamma,
        "positive_in": 1 / (1 + np.exp(-1.7 * mean / s)), "positive_out": 1 / (1 + np.exp(-1.7 * out_mean / out_s)),
        "gradient_diverted": diverted if normalized else nothing,
        "noise_mean": 0.0165 * np.exp(rng.normal(0, 0.1, s.shape)) if normalized else nothing,
        "noise_log_scale": 0.0083 * np.exp(rng.normal(0, 0.1, s.shape)) if normalized else nothing,
        "drift_in_location": drift_in, "drift_in_log_scale": drift_in / 3,
        "drift_out_location": drift_out / 8, "drift_out_log_scale": drift_out / 20,
        "linear_share": np.clip(0.6 - 0.3 * time + 0.05 * rng.normal(size=s.shape), 0, 1),
        "dead": (rng.random(s.shape) < 0.02 * time).astype(float),
        **{f"in_p{p}": mean + k * s for p, k in zip((15, 50, 85), z, strict=True)},
        **{f"out_p{p}": out_mean + k * out_s for p, k in zip((15, 50, 85), z, strict=True)},
    }  # fmt: skip
    rows = len(steps) * width
    return {
        "seed": np.full(rows, seed, np.int32),
        "arm": _words(arm, rows),
        "step": np.repeat(steps, width),
        "layer": _words(layer, rows),
        "unit": np.tile(np.arange(width, dtype=np.int32), len(steps)),
        **{name: np.broadcast_to(values, s.shape).ravel() for name, values in columns.items()},
    }


def _start(rng: np.random.Generator, seed: int, steps: np.ndarray, identity: float) -> dict[str, Any]:
    batches = 8
    modes = ["inference", *_words("training", batches)]
    rms = np.concatenate([[identity / 4], 0.12 + 0.01 * rng.normal(size=batches)])
    return {
        "seed": np.full(len(modes), seed, np.int32),
        "mode": modes,
        "batch": np.arange(len(modes), dtype=np.int32),
        "rms": rms,
        "max": rms * 4,
        "logit_std": np.full(len(modes), 0.6),
    }


def _parting(rng: np.random.Generator, seed: int, steps: np.ndarray, identity: float) -> dict[str, Any]:
    rms = 2.5 * steps / (steps + 200) * np.exp(rng.normal(0, 0.05, len(steps))) + identity / 4
    return {
        "seed": np.full(len(steps), seed, np.int32),
        "step": steps,
        "rms": rms,
        "logit_std": np.full(len(steps), 1.8),
    }


def _optimal(rng: np.random.Generator, seed: int, steps: np.ndarray, identity: float) -> dict[str, Any]:
    width = 32
    time = 1 - np.exp(-steps / 300)[:, None]
    mean = np.broadcast_to(rng.normal(0, 2, width), (len(steps), width))
    s = np.broadcast_to(np.exp(rng.normal(0, 0.5, width)), mean.shape)
    gamma, beta = 1 + time * (s - 1), time * mean
    columns = {
        "gamma": gamma, "beta": beta, "mean": mean, "s": s,
        **q.undoing(mean, s**2 - EPS, EPS, gamma, beta),
        "class": np.reshape(q.class_names(q.unit_class(mean, s**2 - EPS, EPS, gamma, beta)), s.shape),
    }  # fmt: skip
    return {
        "seed": np.full(mean.size, seed, np.int32),
        "step": np.repeat(steps, width),
        "unit": np.tile(np.arange(width, dtype=np.int32), len(steps)),
        **{name: values.ravel() for name, values in columns.items()},
    }
