"""The task where undoing is optimal: gamma and beta go to sqrt(var + eps) and mean, and undo_index to 1."""

import numpy as np
import torch

from batchnorm.study import networks
from batchnorm.study.experiment import batches


def test_gamma_and_beta_go_to_the_inputs_own_scale_and_mean():
    x = torch.randn(600, 7, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.2, 3, 7) + torch.arange(7.0)
    seen = dict(networks.train_identity(x, batches(600, 60, (0,)), 1500, {0, 1500}))
    known = np.isfinite(seen[0]["undo_index"])
    assert known.sum() >= 6
    np.testing.assert_array_equal(seen[0]["undo_index"][known], 0)
    np.testing.assert_allclose(seen[1500]["gamma"], seen[1500]["s"], rtol=0.03)
    np.testing.assert_allclose(seen[1500]["beta"], x.mean(0), atol=0.03 * 3)
    assert (seen[1500]["undo_index"] > 0.95).all()
    assert set(seen[1500]["class"]) == {"undone"}
    np.testing.assert_allclose(seen[1500]["s"], (x.double().var(0, correction=0) + 1e-5).sqrt().numpy())


def test_a_single_step_is_a_task_too():
    found = networks.train_identity(torch.randn(60, 2), batches(60, 60, (0,)), 1, {0, 1})
    assert [step for step, _ in found] == [0, 1]
