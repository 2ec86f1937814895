"""The seed of all random tests: 0, so that two runs are equal; BATCHNORM_SEED=random draws one, as `make fuzz` does."""

from __future__ import annotations

import os
import random

_GIVEN = os.environ.get("BATCHNORM_SEED", "0")
SEED = random.SystemRandom().randrange(1, 2**31) if _GIVEN == "random" else int(_GIVEN)
os.environ["BATCHNORM_SEED"] = str(SEED)  # for the processes that tests start
