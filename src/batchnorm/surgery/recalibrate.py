"""recalibrate(): measure the running statistics of a model again, as the exact moments of given data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.quantities import eval_gap
from batchnorm.records import Record, Skipped, abbreviate, format_names
from batchnorm.restoring import all_or_nothing, in_eval, measuring, unwrapped
from batchnorm.running_stats import store
from batchnorm.surgery._shared.calling import Feed, Follow, ForwardFn, show_progress
from batchnorm.surgery._shared.layers import find
from batchnorm.surgery._shared.measuring import Survey, on_host, survey
from batchnorm.surgery._shared.norm import Norm
from batchnorm.words import plural, quantile

__all__ = ["Recalibrated", "Recalibration", "recalibrate"]


@dataclass(frozen=True, slots=True)
class Recalibrated:
    """One layer of a `Recalibration`.

    Attributes:
        names: all its names in the model.
        kind: its class.
        values: the number of values per channel that were pooled.
        calls: the number of its calls in one forward.
        moved_median, moved_max: `eval_gap` from the old to the new statistics, in old standard deviations: median and
            maximum over its units; NaN if no unit had finite old statistics.
        healed: the number of units whose old statistics were not finite.
    """

    names: tuple[str, ...]
    kind: str
    values: int
    calls: int
    moved_median: float
    moved_max: float
    healed: int


@dataclass(frozen=True, slots=True, repr=False)
class Recalibration(Record):
    """What `recalibrate` did.

    Attributes:
        layers: one record for each layer, in the order of their calls.
        skipped: the layers that were not changed, each with the reason.
        batches: the number of batches used.
        left_out: the number of batches skipped for values that are not finite.
        passes: how many times the data was read.
        exact: whether one layer after the other was measured, in a pass each.
        converged: whether the statistics converged to the tolerance; None without a tolerance.
        metric_before, metric_after: what the metric returned before and after; None without a metric.
        kept: which statistics the model has now: "after", the new ones, or "before", the old ones.
    """

    layers: tuple[Recalibrated, ...]
    skipped: tuple[Skipped, ...] = ()
    batches: int = 0
    left_out: int = 0
    passes: int = 0
    exact: bool = True
    converged: bool | None = None
    metric_before: float | None = None
    metric_after: float | None = None
    kept: str = "after"

    def __str__(self) -> str:
        if not self.layers:
            return Record.__str__(self)
        verdict = "no metric was given: is this the kind of data that inference gets? metric= keeps the better ones"
        if self.metric_before is not None:
            verdict = f"metric {self.metric_before:.6g} → {self.metric_after:.6g}"
            verdict += "" if self.kept == "after" else ": worse, so the old statistics were restored"
        return f"{Record.__str__(self)}\n{verdict}"

    def _head(self) -> list[str]:
        counted = f"{plural(len(self.layers), 'batch norm layer')} recalibrated"
        if not self.layers:
            return [counted]
        head = f"{counted} on {plural(self.batches, 'batch', 'batches')} in {plural(self.passes, 'pass', 'passes')}"
        if self.left_out:
            head += f", {plural(self.left_out, 'batch', 'batches')} left out (not finite)"
        if self.converged is not None:
            head += ", converged" if self.converged else ", not converged: more data would move them further"
        return [head, *(self._kind_row(kind) for kind in dict.fromkeys(layer.kind for layer in self.layers))]

    def _rows(self) -> Iterable[tuple[str, str]]:
        words = "called several times in a forward, pooled over its calls"
        return [(words, format_names(*layer.names)) for layer in self.layers if layer.calls > 1]

    def _kind_row(self, kind: str) -> str:
        layers = [layer for layer in self.layers if layer.kind == kind]
        row = f"{len(layers):4}  {kind}"
        measured = [layer for layer in layers if not math.isnan(layer.moved_max)]
        if measured:
            largest = max(measured, key=lambda layer: layer.moved_max)
            median = float(np.nanmedian([layer.moved_median for layer in measured]))
            row += f"  moved by {median:.2g} deviations in the median, up to {largest.moved_max:.2g} "
            row += f"({format_names(*largest.names)})"
        healed = [layer for layer in layers if layer.healed]
        if healed:
            units = sum(layer.healed for layer in healed)
            row += f"; {plural(units, 'unit was', 'units were')} not finite: "
            row += abbreviate([format_names(*layer.names) for layer in healed])
        return row


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    forward_fn: ForwardFn | None = None,
    *,
    exact: bool = True,
    tolerance: float | None = None,
    metric: Callable[[Any], float] | None = None,
    higher_is_better: bool = True,
    device: torch.device | str | int | None = None,
    progress: bool | None = None,
    nonfinite: str = "raise",
    also: Sequence[type[nn.Module]] = (),
) -> Recalibration:
    """Measure the running statistics again on given data, in place.

    running_mean = Σx/n and running_var = Σ(x - mean)²/(n - 1), over all n values of a channel in all batches.

    The moments of the batches are merged exactly, in float64, in eval mode. num_batches_tracked becomes the number of
    batches. Use the kind of data that inference gets, preprocessed in the same way; a few thousand samples.

    With `exact` the layers are measured one after the other, in a pass each, while earlier layers normalize by their
    new statistics, as in inference: the result does not depend on the batch size. A layer that is called several times
    in a forward is pooled over its calls while it normalizes by the batch. With exact=False all layers normalize by the
    batch, in a single pass (PreciseBN: Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm").

    Skipped, and named in the record: layers frozen by `freeze`, layers in eval mode in a model in training mode, layers
    without running statistics, layers that are never called, subclasses that are not in `also`.

    Args:
        model: only its running statistics are changed, in place; nothing if an error is raised, KeyboardInterrupt
            included. Parallel and compiled wrappers are unwrapped; each process uses its own batches.
        batches: a list, DataLoader or other iterable of tensors, of tuples or lists whose first element is the input,
            of mappings (model(**batch)), or of anything that forward_fn accepts. Every pass should see the same data.
            An iterator can be read only once: enough for one layer, or for exact=False.
        forward_fn: forward_fn(model, batch) runs the model on a batch. By default the model is called with the batch,
            the first element of a tuple or list, or the named values of a mapping.
        exact: measure layer after layer; costs about half a forward per layer and batch.
        tolerance: in the first pass, stop once doubling the number of batches has moved no layer by more (RMS over
            units of `eval_gap`, in deviations); later passes read the same batches.
        metric: metric(model) returns a number. It is called in eval mode, before and after. If it is worse after, or
            NaN, the old statistics are restored.
        higher_is_better: False if the metric is a loss.
        device: where to move the batches; by default that of the model's first parameter or buffer.
        progress: whether to show a progress bar on stderr; by default only if it is a terminal.
        nonfinite: "raise", or "skip" the batches that give a layer NaN or infinity.
        also: subclasses that normalize as their base class does, to be included.

    Returns:
        How far each layer's statistics moved, and the skipped layers; `print` it.

    Raises TypeError on arguments of a wrong type. Raises ValueError, with the layer and the batch: one value per
    channel; values that are not finite; statistics beyond the range of a float16 buffer. Raises ValueError without
    batches, and with an iterator if several passes are needed. Errors of the model, batches and metric pass through.
    """
    _check(tolerance, metric, nonfinite)
    inner = unwrapped(model)
    norms, skipped = find("recalibrate", inner, also)
    feed = Feed("recalibrate", inner, batches, forward_fn, device)
    if exact and isinstance(batches, Iterator) and len(norms) > 1:
        raise ValueError(
            "recalibrate measures one layer after the other and has to read the batches again for each: pass a list "
            "or a DataLoader instead of an iterator, or exact=False"
        )
    if not norms:
        return Recalibration((), tuple(skipped))
    before = None if metric is None else _evaluate(model, metric)
    with measuring(inner), show_progress("recalibrate", progress) as follow:
        first, pools, calls = _measure(feed, norms, follow, exact, nonfinite, tolerance)
        new = {norm: statistics(norm, moments) for norm, moments in pools.items()}
    layers = tuple(_recalibrated(norm, new[norm], pools[norm], calls[norm]) for norm in new)
    skipped += [norm.skipped("never called") for norm in norms if norm not in pools]
    kept = "after"
    with all_or_nothing(inner, (buffer for norm in new for buffer in norm.layer.buffers(recurse=False))) as restore:
        for norm, tensors in new.items():
            store(norm.buffers(), tensors.values(), first.used)
        after = None if metric is None else _evaluate(model, metric)
        if before is not None and after is not None:
            worse = after < before if higher_is_better else after > before
            if worse or math.isnan(after):
                restore()
                kept = "before"
    return Recalibration(
        layers,
        tuple(skipped),
        batches=first.used,
        left_out=len(first.left_out),
        passes=len(new) if exact else 1,
        exact=exact,
        converged=None if tolerance is None else first.converged,
        metric_before=before,
        metric_after=after,
        kept=kept,
    )


def _measure(
    feed: Feed, norms: Sequence[Norm], follow: Follow, exact: bool, nonfinite: str, tolerance: float | None
) -> tuple[Survey, dict[Norm, Moments], dict[Norm, int]]:
    """Return the first pass, and per layer, in the order of calls, its moments and its number of calls."""
    for norm in norms:
        norm.normalize_by_batch()
    first = survey(feed, norms, follow, passes=len(norms) if exact else 1, nonfinite=nonfinite, tolerance=tolerance)
    pools = dict(first.moments)
    # The input of the first layer depends on no other layer: one pass is enough for it.
    for number, norm in enumerate(first.moments if exact else (), 1):
        if number > 1:
            passes = len(first.moments)
            later = survey(feed, [norm], follow, number=number, passes=passes, nonfinite=nonfinite, first=first)
            pools |= later.moments
        norm.use(**statistics(norm, pools[norm]))
    return first, pools, first.calls


def statistics(norm: Norm, moments: Moments) -> dict[str, Tensor]:
    """The moments as tensors, "mean" and "var". Raises ValueError if the buffer's type cannot represent them."""
    stored: dict[str, Tensor] = {}
    for role, wide in (("mean", moments.mean), ("var", moments.unbiased_var)):
        buffer: Any = norm.tensor(role)
        stored[role] = tensor = torch.from_numpy(wide).to(buffer.dtype).to(buffer.device)
        if tensor.shape != buffer.shape:
            raise ValueError(f"{norm} receives {tensor.numel()} channels but has {buffer.numel()}")
        if not bool(tensor.isfinite().all()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{norm.tensor_name(role)} of {norm} would be {np.abs(wide).max():.3g}, beyond the range of {dtype}: "
                "turn its running statistics into float32"
            )
    return stored


def _recalibrated(norm: Norm, new: dict[str, Tensor], moments: Moments, calls: int) -> Recalibrated:
    old: dict[str, Any] = {role: norm.tensor(role) for role in new}
    mean, var, old_mean, old_var = (on_host(state[role]) for state in (new, old) for role in ("mean", "var"))
    gaps = eval_gap(mean, var, old_mean, old_var, norm.eps)
    largest = float(np.fmax.reduce(gaps, initial=-math.inf))
    return Recalibrated(
        norm.names,
        type(norm.layer).__name__,
        int(moments.count),
        calls,
        quantile(gaps),
        largest if math.isfinite(largest) else math.nan,
        int(gaps.size - np.isfinite(gaps).sum()),
    )


def _evaluate(model: nn.Module, metric: Callable[[Any], float]) -> float:
    with in_eval(model), torch.no_grad():
        value = metric(model)
        try:
            return float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"recalibrate: metric must return a number, got {type(value).__name__}") from None


def _check(tolerance: object, metric: object, nonfinite: object) -> None:
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 < tolerance < math.inf):
        raise ValueError(f"recalibrate: tolerance must be a number above 0, such as 0.01, not {tolerance!r}")
    if metric is not None and not callable(metric):
        raise TypeError(f"recalibrate: metric must be a function of the model, got {type(metric).__name__}")
    if nonfinite not in ("raise", "skip"):
        raise ValueError(f"recalibrate: nonfinite must be 'raise' or 'skip', not {nonfinite!r}")
