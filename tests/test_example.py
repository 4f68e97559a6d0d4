"""The worked example of results/README.md, two tokens long: every number in it."""

import torch

import ppo
from conftest import assert_close

K1 = torch.tensor([[0.5, -0.2], [-0.1, 0.3]])
SCORES = torch.tensor([1.0, -0.5])
VALUES = torch.tensor([[0.2, 0.6], [0.2, -0.2]])


def test_the_worked_example_of_the_second_chapter():
    """Rewards, rewards-to-go, own penalty alone, advantages and their whitening, by the text."""
    rewards = ppo.kl_penalised_rewards(SCORES, K1, torch.zeros(2, 2), beta=0.2)
    assert_close(rewards, torch.tensor([[-0.10, 1.04], [0.02, -0.56]]), "rewards")
    to_go = ppo.rewards_to_go(rewards)
    assert_close(to_go, torch.tensor([[0.94, 1.04], [-0.54, -0.56]]), "rewards-to-go")
    own = SCORES[:, None] - 0.2 * K1
    assert_close(own, torch.tensor([[0.90, 1.04], [-0.48, -0.56]]), "own penalty alone")
    advantages, _ = ppo.gae(rewards, VALUES, lam=0.8)
    assert_close(advantages, torch.tensor([[0.652, 0.44], [-0.668, -0.36]]), "advantages")
    expected = torch.tensor([[1.164, 0.776], [-1.252, -0.688]])
    assert_close(ppo.whiten(advantages), expected, "whitened", atol=1e-3, rtol=0)
