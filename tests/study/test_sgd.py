"""The SGD step equals torch.optim's."""

import torch

from batchnorm.study.networks import sgd_step


def test_the_step_is_that_of_torch_optim():
    ours = torch.nn.Linear(5, 3)
    theirs = torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.3)
    x = torch.randn(7, 5)
    for _ in range(3):
        sgd_step(list(ours.parameters()), ours(x).square().mean(), 0.3)
        optimizer.zero_grad()
        theirs(x).square().mean().backward()
        optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
