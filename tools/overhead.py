"""Measure what recording costs a training step: `python tools/overhead.py`.

Four copies of one converted ResNet-18 take the same steps, interleaved: one unwatched, a second one unwatched (their
difference is noise), one watched with the default schedule, one recorded in every step. Ratios are within each round.
`--stem 7` is the published network, which shrinks images of 32² to 8² at once; `--stem 3`, usual for images that small,
begins with a 3x3 convolution and no pooling.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from batchnorm.bench import models, networks, record, timing
from batchnorm.bench.record import restart_with_policy
from batchnorm.recording.steps import log_spaced
from batchnorm.recording.watch import Recorder, watch
from batchnorm.surgery.convert import convert

BATCH, SIDE, STEPS = 64, 32, 400
_RESNET_18 = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
_WARM = 2  # calls of `timing` before its rounds


def measure(rounds: int, seed: int = 0, *, stem: int = 7, batch: int = BATCH, side: int = SIDE) -> dict[str, Any]:
    """Ratios of step times to the unwatched network's: median and quartiles, and of the totals.

    For `default`, recorded and other steps are also reported separately.
    """
    torch.manual_seed(seed)
    network = networks.from_transformers("ResNet", **_RESNET_18)()
    if stem == 3:
        _for_small_images(network)
    batches = [(torch.randn(batch, 3, side, side), torch.randint(networks.CLASSES, (batch,))) for _ in range(4)]
    convert(network)
    sides = {
        name: models.Training(copy.deepcopy(network), batches)
        for name in ("unwatched", "again", "default", "every step")
    }
    with tempfile.TemporaryDirectory() as folder:
        runs: list[Recorder] = []
        for name, schedule in (("default", log_spaced()), ("every step", lambda step: True)):
            runs.append(watch(sides[name].network, Path(folder) / name, schedule=schedule).start())
        try:
            samples = timing.interleaved(sides, seconds=0.0, rounds=rounds, seed=seed)
        finally:
            for run in runs:
                run.close()
    plain, stock = samples["unwatched"].whole, sides["unwatched"].losses
    measured: dict[str, Any] = {"stem": stem, "batch": batch, "side": side, "rounds": rounds}
    measured["seconds"] = timing.quartiles(plain)
    for name in ("again", "default", "every step"):
        times = samples[name].whole
        measured[name] = {"ratio": timing.ratio(times, plain), "total": sum(times) / sum(plain)}
    recorded = [log_spaced()(place + _WARM) for place in range(rounds)]
    parts = {}
    for name, wanted in (("recorded", True), ("not_recorded", False)):
        pairs = zip(samples["default"].whole, plain, recorded, strict=True)
        ratios = [ours / theirs for ours, theirs, flag in pairs if flag is wanted]
        parts[name] = {"steps": len(ratios), "ratio": statistics.median(ratios) if ratios else None}
    measured["default"] |= parts
    measured["loss_difference"] = max(
        abs(one - other) for side in sides.values() for one, other in zip(side.losses, stock, strict=True)
    )
    return measured


def _for_small_images(network: torch.nn.Module) -> None:
    for module in network.modules():
        if hasattr(module, "pooler") and hasattr(module, "num_channels"):  # transformers' stem
            module.embedder.convolution = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # type: ignore[union-attr]
            module.pooler = torch.nn.Identity()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python tools/overhead.py", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=STEPS, help="steps of each network")
    parser.add_argument("--stem", type=int, choices=(3, 7), default=7, help="the first convolution's size")
    parser.add_argument("--out", type=Path, help="the file for the result; by default it is only printed")
    options = parser.parse_args(arguments)
    restart_with_policy("tuned")
    result = record.begin([], {"rounds": options.rounds, "stem": options.stem})
    result["command"] = f"python tools/overhead.py --rounds {options.rounds} --stem {options.stem}"
    measured = result["overhead"] = measure(options.rounds, stem=options.stem)
    result["status"] = "complete"
    milliseconds = 1e3 * measured["seconds"]["median"]
    lines = [f"ResNet-18, {measured['batch']} images of {measured['side']}²: {milliseconds:.1f} ms per step"]
    for name in ("again", "default", "every step"):
        ratio = measured[name]["ratio"]
        quartiles = f"[{ratio['q1']:.4f}..{ratio['q3']:.4f}]"
        lines.append(f"{name:11}  {ratio['median']:.4f} {quartiles}  total {measured[name]['total']:.4f}")
    for name in ("recorded", "not_recorded"):
        part = measured["default"][name]
        ratio = "" if part["ratio"] is None else f": {part['ratio']:.4f}"
        lines.append(f"default, {part['steps']} steps {name.replace('_', ' ')}{ratio}")
    lines.append(f"losses differ by {measured['loss_difference']:.1e} at most")
    sys.stdout.write("\n".join(lines) + "\n")
    if options.out is not None:
        record.check_vacant(options.out, force=False)
        record.store(result, options.out)


if __name__ == "__main__":
    main()
