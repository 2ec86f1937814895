"""The brute-force twin of a recording: activations and gradients kept, and every number reduced from them in float64.

It listens with PyTorch's own hooks on torch.nn's own layers; nothing of the package computes anything here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn


@dataclass
class Kept:
    """One forward of one layer: x (m, C), and the gradients at its output that came back."""

    x: np.ndarray
    gradients: list[np.ndarray] = field(default_factory=list)


class Twin:
    """Keeps what a model's layers see, step by step; `columns(layer)` is what a recording of the step must hold."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        self.kept: dict[str, list[Kept]] = {}
        self.used: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._hook(name))

    def begin(self) -> None:
        self.kept = {name: [] for name in self.layers}

    def end(self) -> None:
        """Before the update: gamma and beta as they were used."""
        self.used = {name: (_vector(layer.weight, 1.0, layer), _vector(layer.bias, 0.0, layer))
                     for name, layer in self.layers.items()}  # fmt: skip

    def _hook(self, name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not module.training:
                return
            kept = Kept(_rows(args[0]))
            self.kept[name].append(kept)
            if output.requires_grad:
                output.register_hook(lambda grad: kept.gradients.append(_rows(grad)))

        return hook

    def columns(self, name: str) -> dict[str, np.ndarray]:
        layer, passes = self.layers[name], self.kept[name]
        if any(kept.gradients for kept in passes):
            passes = [kept for kept in passes if kept.gradients]
        eps = layer.eps
        gamma, beta = self.used[name]
        x = np.concatenate([kept.x for kept in passes])
        mean, var = x.mean(0), x.var(0)
        s = np.sqrt(var + eps)
        unit = (x - mean) / np.sqrt(var)
        found = {
            "count": np.full(len(mean), float(len(x))),
            "batches": np.full(len(mean), float(len(passes))),
            "mean": mean,
            "var": var,
            "gamma": gamma,
            "beta": beta,
            "s": s,
            "position_in": mean / s,
            # exact up to eps: y has the variance gamma², as if eps were in var
            "undo_distance": np.sqrt((((gamma - s) * unit + beta - mean) ** 2).mean(0)),
        }
        running = layer.running_mean, layer.running_var
        if running[0] is not None:
            found |= {"running_mean": _f64(running[0]), "running_var": _f64(running[1])}
            r = np.sqrt(found["running_var"] + eps)
            evaluated, trained = (s * unit + mean - found["running_mean"]) / r, unit
            found["eval_gap"] = np.sqrt(((evaluated - trained) ** 2).mean(0))
        if len(passes) > 1:
            means, variances = (np.stack([getattr(kept.x, f)(0) for kept in passes]) for f in ("mean", "var"))
            found["noise_mean"] = means.var(0, ddof=1) / variances.mean(0)
            found["noise_log_scale"] = (0.5 * np.log(variances + eps)).var(0, ddof=1)
        sums = [self._projected(kept.x, g, eps) for kept in passes for g in kept.gradients]
        if sums:
            for place, column in enumerate(("dgamma", "dbeta", "energy", "diverted")):
                found[column] = np.sum([each[place] for each in sums], axis=0)
            with np.errstate(invalid="ignore"):
                found["gradient_diverted"] = found["diverted"] / found["energy"]
        return found

    @staticmethod
    def _projected(x: np.ndarray, g: np.ndarray, eps: float) -> tuple[np.ndarray, ...]:
        """dgamma, dbeta, Σg², and the energy of g's projection on the span of 1 and x, by orthonormal vectors."""
        centred = x - x.mean(0)
        xhat = centred / np.sqrt(x.var(0) + eps)
        length = np.sqrt((centred**2).sum(0))
        along_one = g.sum(0) / np.sqrt(len(g))
        along_x = (g * centred).sum(0) / np.where(length > 0, length, 1)
        return (g * xhat).sum(0), g.sum(0), (g**2).sum(0), along_one**2 + along_x**2


def _rows(tensor: Tensor) -> np.ndarray:
    """(N, C, *) as (values, C), in float64."""
    wide = tensor.detach().double()
    return wide.movedim(1, -1).reshape(-1, wide.shape[1]).numpy().copy()


def _vector(tensor: Tensor | None, default: float, layer: nn.Module) -> np.ndarray:
    return np.full(layer.num_features, default) if tensor is None else _f64(tensor)


def _f64(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()
