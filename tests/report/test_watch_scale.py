"""A ResNet-50's run: 53 layers, 26,560 units. Its page is made in seconds, small enough to send, and quick to open.

The suite has a short run of it. BATCHNORM_SCALE=300 makes it as many snapshots long (8 million rows, 20 s to write).
"""

from __future__ import annotations

import os
import time

import numpy as np
import pyarrow as pa
import pytest
from chromium import Chromium
from pages import write
from watched import EPS, Made

from batchnorm.runs.history import MEASURED
from batchnorm.runs.run import Run

SNAPSHOTS = int(os.environ.get("BATCHNORM_SCALE", "30"))
BLOCKS = ((3, 64), (4, 128), (6, 256), (3, 512))
LONGEST_SECONDS = 10.0
LARGEST_BYTES = 8e6


def resnet50() -> list[Made]:
    layers = [Made("bn1", 64)]
    for stage, (blocks, width) in enumerate(BLOCKS, 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            layers += [Made(f"{name}.bn1", width), Made(f"{name}.bn2", width), Made(f"{name}.bn3", 4 * width)]
            if block == 0:
                layers.append(Made(f"{name}.downsample.1", 4 * width))
    return layers


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Written in parts of 10 snapshots, from one set of random numbers: what matters is how many there are."""
    layers = resnet50()
    width = sum(layer.units for layer in layers)
    assert (len(layers), width) == (53, 26_560)
    listed = [layer.described() for layer in layers]
    made = Run.create(tmp_path_factory.mktemp("scale") / "r50", "watch", layers=listed, skipped=[])
    rng = np.random.default_rng(0)
    rows = 10
    steps = np.arange(SNAPSHOTS, dtype=np.int64) ** 2
    codes = np.repeat(np.arange(53, dtype=np.int32), [layer.units for layer in layers])
    unit = np.concatenate([np.arange(layer.units, dtype=np.int32) for layer in layers])
    noise = {name: rng.standard_normal(rows * width).astype(np.float32) * 0.1 for name in MEASURED}
    noise["count"][:], noise["batches"][:] = 4096, 1
    for name in ("var", "running_var", "energy", "weight_norm"):
        noise[name] = np.exp(noise[name]) + np.float32(EPS)
    noise["diverted"], noise["gamma"] = 0.1 * noise["energy"], 1 + noise["gamma"]
    for first in range(0, SNAPSHOTS, rows):
        part = steps[first : first + rows]
        table = {"step": np.repeat(part, width), "unit": np.tile(unit, len(part))}
        index = pa.array(np.tile(codes, len(part)))
        table["layer"] = pa.DictionaryArray.from_arrays(index, [layer.name for layer in layers])
        columns = {name: np.roll(values, first)[: len(part) * width] for name, values in noise.items()}
        wide = {name: columns[name].astype(np.float64) for name in ("count", "energy", "diverted")}
        made.append("units", pa.table(table | columns | wide))
    return made


def test_a_large_run_is_rendered_in_seconds_to_a_page_that_can_be_sent(run: Run) -> None:
    start = time.perf_counter()
    page = write([run])
    took = time.perf_counter() - start
    assert took < LONGEST_SECONDS, f"{took:.1f} s"
    assert page.stat().st_size < LARGEST_BYTES


@pytest.mark.slow
@pytest.mark.browser
def test_its_page_opens_and_changes_layers_at_once(browser: Chromium, run: Run) -> None:
    page = write([run])
    start = time.perf_counter()
    browser.open(page)
    opened = time.perf_counter() - start
    assert browser.complaints == []
    browser.evaluate("location.hash = 'layer=52'")
    browser.wait("document.documentElement.dataset.drawn === '52'")
    changed = time.perf_counter() - start - opened
    redrawn: float = browser.evaluate(
        "(() => { const s = document.querySelector('#map-choices select'), t = performance.now();"
        " s.value = 'eval_gap'; s.dispatchEvent(new Event('change')); return performance.now() - t; })()"
    )
    assert opened < 6, f"{opened:.1f} s"
    assert changed < 3, f"{changed:.1f} s"
    assert redrawn < 500, f"{redrawn:.0f} ms"
