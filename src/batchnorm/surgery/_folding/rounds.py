"""Folding a model in rounds: in each, pairs that share no module are found, tried and, if they agree, folded.

What one round folds makes room for the next: a map between two norms takes in one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from batchnorm.surgery._folding.epilogue import remainder
from batchnorm.surgery._folding.observed import seen_in_run
from batchnorm.surgery._folding.pairs import Candidates, Pair
from batchnorm.surgery._folding.trials import (
    Difference,
    Trial,
    difference,
    rounding,
    try_in_run,
)
from batchnorm.surgery._folding.weights import fold_after, fold_before
from batchnorm.surgery._shared.example import Example, leaves
from batchnorm.surgery._shared.layers import Norm, plain_class
from batchnorm.surgery._shared.restoring import become
from batchnorm.surgery._shared.undisturbed import undisturbed

# A network that makes more of rounding than the bound allows is held to what rounding makes, up to these limits.
_MORE_THAN_ROUNDING = 4
_MORE_THAN_BOUND = 100
_AT_MOST = 0.1


class Rounds:
    """The folds of a model: those `done` with what they moved, and the reason of every norm that is left.

    `moved` is how far the model's outputs moved, None without a norm; `limit` is what bounds it; `rounding` is how far
    rounding alone moves them, where that decided.
    """

    def __init__(self, model: nn.Module, norms: tuple[Norm, ...], example: Example, bound: float | None) -> None:
        self.model, self.norms, self.example, self.bound = model, norms, example, bound
        self.kinds = {norm: plain_class(norm.layer).__name__ for norm in norms}
        self.done: list[tuple[Pair, Difference]] = []
        self.reasons: dict[Norm, str] = {}
        self.moved: Difference | None = None
        self.limit = math.inf
        self.rounding: float | None = None
        self._refused: dict[tuple[nn.Module, nn.Module], str] = {}
        self._undo: list[Callable[[], None]] = []

    def all(self) -> None:
        """Every round, and what they moved together: if that is too much, everything is taken back."""
        if not self.norms:
            return
        before = self._outputs()
        while self._round():
            pass
        moved = difference(before, self._outputs())
        assert moved is not None
        self.moved = moved
        self.limit = self.bound or max(moved.bound, *(each.bound for _, each in self.done), 0.0)
        if self.bound is None and moved.max > self.limit:
            self.rounding = self._rounding()
            most = min(_MORE_THAN_BOUND * self.limit, _AT_MOST)
            self.limit = max(self.limit, min(_MORE_THAN_ROUNDING * self.rounding, most))
        if not moved.max <= self.limit:
            self.take_back()
            why = f"taken back: the model's outputs differ by {moved.max:.1e}, over the bound of {self.limit:.1g}"
            self.reasons = {norm: self.reasons.get(norm, why) for norm in self.norms}

    def take_back(self) -> None:
        """The model is as it was."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self.done.clear()

    def _outputs(self) -> list[Tensor]:
        """On the example. Raises ValueError where there is nothing to compare in them."""
        with undisturbed(self.model):
            found = list(leaves(self._run()))
        if difference(found, found) is None:
            raise ValueError(
                "fold: the model returns no finite floating-point number on the example, so nothing can be compared: "
                "give another example, or see bn.check for what is not finite"
            )
        return found

    def _rounding(self) -> float:
        with undisturbed(self.model):
            return rounding([pair for pair, _ in self.done], lambda: leaves(self._run()))

    def _run(self) -> Any:
        return self.example.run("fold", self.model)

    def _round(self) -> bool:
        """Whether there was a pair to try."""
        if len(self.done) == len(self.norms):
            return False
        with undisturbed(self.model):
            trials = self._trials(Candidates(self.model, seen_in_run(self.model, self.norms, self._run)))
            if trials:
                try_in_run(trials, self._run)
        for trial in trials:
            pair, moved = trial.pair, trial.found
            if moved is None:
                why = "it gives no finite output to compare"
            elif not moved.max <= (bound := self.bound or moved.bound):
                why = f"its output would differ by {moved.max:.1e}, over the bound of {bound:.1g}"
            else:
                self._put(trial)
                self.done.append((pair, moved))
                self.reasons.pop(pair.norm, None)
                continue
            self._refused[pair.norm.layer, pair.map] = f"into {pair.place}: {why}"
        return bool(trials)

    def _trials(self, candidates: Candidates) -> list[Trial]:
        """For every norm that is left the first pair that can be folded, as long as no two share a map."""
        folded = {pair.norm for pair, _ in self.done}
        trials: list[Trial] = []
        for norm in self.norms:
            if norm in folded:
                continue
            reasons = []
            for option in candidates.of(norm):
                made = option if isinstance(option, str) else self._trial(option)
                if isinstance(made, Trial):
                    if all(made.pair.map is not other.pair.map for other in trials):
                        trials.append(made)
                    break
                reasons.append(made)
            self.reasons[norm] = reasons[0] if reasons else "its map takes in another norm"
        return trials

    def _trial(self, pair: Pair) -> Trial | str:
        layer = pair.norm.layer
        if (layer, pair.map) in self._refused:
            return self._refused[layer, pair.map]
        weights = fold_before(pair.map, layer) if pair.before else fold_after(pair.map, layer)
        if isinstance(weights, str):
            return f"into {pair.place}: {weights}"
        return Trial(pair, weights, remainder(layer, pair.residual))

    def _put(self, trial: Trial) -> None:
        norm, module = trial.pair.norm.layer, trial.pair.map
        parameters, cls, attributes = module._parameters, type(norm), norm.__dict__

        def undo() -> None:
            module._parameters = parameters
            become(norm, cls)
            object.__setattr__(norm, "__dict__", attributes)

        self._undo.append(undo)
        trial.weights.put(module)
        become(norm, type(trial.remainder))
        object.__setattr__(norm, "__dict__", vars(trial.remainder))
