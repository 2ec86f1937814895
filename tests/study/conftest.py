"""A small data set, and a study of it that takes seconds."""

import numpy as np
import pytest

from batchnorm.runs.run import Run
from batchnorm.study.data import Data
from batchnorm.study.experiment import Config, describe, study


@pytest.fixture(scope="session")
def blobs() -> Data:
    """Four overlapping clouds in 12 dimensions: 240 training rows and 80 held out."""
    random = np.random.default_rng(7)
    y = random.integers(0, 4, 320)
    x = (random.normal(size=(4, 12))[y] + 0.7 * random.normal(size=(320, 12))).astype(np.float32)
    return Data("blobs", x[:240], y[:240], x[240:], y[240:])


@pytest.fixture(scope="session")
def small_run(blobs, tmp_path_factory) -> Run:
    """Two seeds of 40 steps."""
    config = Config(seeds=2, steps=40)
    run = Run.create(tmp_path_factory.mktemp("study") / "run", "study", config=describe(config, blobs))
    study(config, blobs, run)
    run.finish("complete")
    return run
