"""The loss and its parts, against numbers worked out by hand."""

import pytest
import torch

from dapo import group_advantages, keep_group, overlong_penalty, policy_loss


def test_advantages_by_hand():
    # rewards 0, 1, 1, 2: mean 1, sample variance (1+0+0+1)/3, so the ends are ±1/0.8165 = ±1.2247
    advantages = group_advantages(torch.tensor([[0.0, 1.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]]))
    assert torch.allclose(advantages[0], torch.tensor([-1.2247, 0.0, 0.0, 1.2247]), atol=1e-4)
    assert torch.equal(
        advantages[1], torch.zeros(4)
    )  # no deviation, no gradient, and no division by zero


def test_a_group_of_one_is_an_error():
    with pytest.raises(ValueError, match="group-size"):
        group_advantages(torch.tensor([[1.0]]))


def test_loss_by_hand():
    # Response 0, advantage +2: ratios 1.5 (clipped to 1.28) and 0.5 (not clipped: min takes the smaller).
    # Response 1, advantage -1: ratios 0.5 (clipped to 0.8: -0.8 is smaller) and 1.1; its third token was retrieved.
    ratios = torch.tensor([[1.5, 0.5, 9.0], [0.5, 1.1, 9.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    logprobs = ratios.log().requires_grad_()
    loss, stats = policy_loss(logprobs, torch.zeros(2, 3), torch.tensor([2.0, -1.0]), mask)
    assert loss.item() == pytest.approx(-(1.28 * 2 + 0.5 * 2 - 0.8 - 1.1) / 4)
    assert stats == {"clipped": 2.0, "tokens": 4.0}
    loss.backward()
    # Only unclipped policy tokens have a gradient: -ratio · advantage / tokens.
    assert torch.allclose(logprobs.grad, torch.tensor([[0.0, -0.25, 0.0], [0.0, 0.275, 0.0]]))


def test_micro_batches_add_up_to_the_whole():
    torch.manual_seed(0)
    logprobs, old = torch.randn(6, 9), torch.randn(6, 9)
    mask, advantages = torch.rand(6, 9) < 0.6, torch.randn(6)
    whole, _ = policy_loss(logprobs, old, advantages, mask)
    parts = sum(
        policy_loss(
            logprobs[i : i + 2],
            old[i : i + 2],
            advantages[i : i + 2],
            mask[i : i + 2],
            num_tokens=mask.sum(),
        )[0]
        for i in (0, 2, 4)
    )
    assert whole.item() == pytest.approx(parts.item(), rel=1e-6)


def test_a_masked_token_can_be_infinite():
    loss, _ = policy_loss(
        torch.tensor([[0.0, -torch.inf]]),
        torch.zeros(1, 2),
        torch.tensor([1.0]),
        torch.tensor([[True, False]]),
    )
    assert torch.isfinite(loss)


def test_keep_group():
    outcomes = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1.0]])
    rewards = torch.tensor([[1, 0, 1], [2, 1, 0], [2, 2, 2], [2.25, 2.5, 2.5]])
    assert keep_group(outcomes, rewards).tolist() == [False, True, False, True]


def test_overlong_penalty_can_be_switched_off():
    assert overlong_penalty(torch.tensor([1, 1000]), 10, 0).tolist() == [0, 0]
