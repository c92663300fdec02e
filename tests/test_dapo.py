"""The loss and its parts, against numbers worked out by hand."""

import pytest
import torch

from dapo import (
    group_advantages,
    keep_group,
    overlong_penalty,
    policy_loss,
    response_level_weights,
)


def test_advantages_by_hand():
    # rewards 0, 1, 1, 2: mean 1, sample variance (1+0+0+1)/3, so the ends are ±1/0.8165 = ±1.2247
    advantages = group_advantages(torch.tensor([[0.0, 1.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]]))
    assert torch.allclose(advantages[0], torch.tensor([-1.2247, 0.0, 0.0, 1.2247]), atol=1e-4)
    # no deviation: no gradient, and no division by zero
    assert torch.equal(advantages[1], torch.zeros(4))


def test_a_group_of_one_is_an_error():
    with pytest.raises(ValueError, match="group-size"):
        group_advantages(torch.tensor([[1.0]]))


def test_groups_of_one_measured_against_the_step_have_the_advantages_of_one_group():
    rewards = torch.tensor([0.0, 1.0, 1.0, 2.0])
    alone = group_advantages(rewards[:, None], baseline=rewards[None])  # (4, 1)
    assert torch.equal(alone[:, 0], group_advantages(rewards[None])[0])
    # all equal: no gradient, and no division by zero
    assert torch.equal(group_advantages(torch.ones(1, 1), torch.ones(1, 4)), torch.zeros(1, 1))


def test_loss_by_hand():
    # Response 0, advantage +2: ratio 1.5 is clipped to 1.28, 0.5 is not (min takes the smaller).
    # Response 1, advantage -1: ratio 0.5 is clipped to 0.8 (-0.8 is smaller), 1.1 is not.
    # Their third tokens were retrieved.
    ratios = torch.tensor([[1.5, 0.5, 9.0], [0.5, 1.1, 9.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    logprobs = ratios.log().requires_grad_()
    loss, figures = policy_loss(logprobs, torch.zeros(2, 3), torch.tensor([2.0, -1.0]), mask)
    assert loss.item() == pytest.approx(-(1.28 * 2 + 0.5 * 2 - 0.8 - 1.1) / 4)
    assert figures == {"clip_fraction": 2 / 4}
    loss.backward()
    # Only unclipped sampled tokens have a gradient: -ratio · advantage / tokens.
    expected = torch.tensor([[0.0, -0.25, 0.0], [0.0, 0.275, 0.0]])
    assert torch.allclose(logprobs.grad, expected)


def test_micro_batches_add_up_to_the_whole():
    torch.manual_seed(0)
    logprobs, old = torch.randn(6, 9), torch.randn(6, 9)
    mask = torch.rand(6, 9) < 0.6
    advantages = torch.randn(6)
    whole, figures = policy_loss(logprobs, old, advantages, mask)
    losses, clipped = [], []
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        loss, found = policy_loss(
            logprobs[part], old[part], advantages[part], mask[part], num_tokens=mask.sum().item()
        )
        losses.append(loss.item())
        clipped.append(found["clip_fraction"])
    assert whole.item() == pytest.approx(sum(losses), rel=1e-6)
    assert figures["clip_fraction"] == pytest.approx(sum(clipped))


def test_a_masked_token_can_be_infinite():
    logprobs = torch.tensor([[0.0, -torch.inf]])
    mask = torch.tensor([[True, False]])
    loss, _ = policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([1.0]), mask)
    assert torch.isfinite(loss)


def test_response_level_weights_make_a_mean_of_means():
    # Ratios of response 0: 1.2, advantage 2, one token. Of response 1: 1.1 and 0.9, 1, advantage
    # -1, three tokens. The mean over tokens is (2.4 - 3.0) / 4, that of means (2.4 - 1.0) / 2.
    ratios = torch.tensor([[1.2, 9.0, 9.0], [1.1, 0.9, 1.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    advantages = torch.tensor([2.0, -1.0])
    by_token, _ = policy_loss(ratios.log(), torch.zeros(2, 3), advantages, mask)
    assert by_token.item() == pytest.approx(-(2.4 - 3.0) / 4)
    weights = response_level_weights(mask, num_tokens=4, num_responses=2)
    assert torch.allclose(weights, torch.tensor([[2.0], [2 / 3]]))
    by_response, _ = policy_loss(ratios.log(), torch.zeros(2, 3), advantages, mask, weights=weights)
    assert by_response.item() == pytest.approx(-(2.4 - 1.0) / 2)


def test_response_level_weights_of_a_part_are_those_of_the_whole():
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    whole = response_level_weights(mask, num_tokens=5, num_responses=3)
    parts = [response_level_weights(mask[i : i + 1], 5, 3) for i in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.isfinite().all(), "a response without sampled tokens divides by nothing"


def test_keep_group():
    outcomes = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1.0]])
    rewards = torch.tensor([[1, 0, 1], [2, 1, 0], [2, 2, 2], [2.25, 2.5, 2.5]])
    assert keep_group(outcomes, rewards).tolist() == [False, True, False, True]


def test_overlong_penalty_can_be_switched_off():
    assert overlong_penalty(torch.tensor([1, 1000]), 10, 0).tolist() == [0, 0]
