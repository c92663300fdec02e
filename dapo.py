"""DAPO (Yu et al. 2025): the policy gradient, as pure functions of tensors. No model, no text.

For a question the policy writes G responses with rewards r_1 … r_G. Their advantages are relative to the group,

    A_i = (r_i - mean(r)) / (std(r) + 1e-6),                                    sample std (GRPO, Shao et al. 2024)

and every token t that response i *sampled* (retrieved tokens are masked out) contributes

    ρ_it = π(token | before) / π_old(token | before)
    J    = Σ_i Σ_t min(ρ_it·A_i, clip(ρ_it, 1 - ε_low, 1 + ε_high)·A_i) / number of sampled tokens

What DAPO adds to GRPO: ε_high > ε_low (clip-higher: unlikely tokens may grow), one average over all tokens of the batch
rather than over responses (long responses are not diluted), and dynamic sampling: a group whose rewards are all equal
has no gradient and is replaced. There is no KL penalty. The paper additionally requires a correct response in a group.
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """Rewards (P, G) of P questions to advantages (P, G). Raises ValueError for a group of one, which has no deviation.

    >>> group_advantages(torch.tensor([[0., 1., 1., 2.]]))
    tensor([[-1.2247,  0.0000,  0.0000,  1.2247]])
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            "a group needs at least two responses to have an advantage; raise --group-size"
        )
    centered = rewards - rewards.mean(1, keepdim=True)
    return centered / (rewards.std(1, keepdim=True) + eps)


def keep_group(outcomes: Tensor, rewards: Tensor) -> Tensor:
    """Dynamic sampling. outcomes, rewards (P, G) -> (P,) bool: at least one correct response, rewards not all equal.

    >>> keep_group(torch.tensor([[0., 0.], [1., 0.], [1., 1.]]), torch.tensor([[1., 0.], [2., 1.], [2., 2.]]))
    tensor([False,  True, False])
    """
    return (outcomes > 0).any(1) & (rewards.max(1).values - rewards.min(1).values > 1e-6)


def overlong_penalty(lengths: Tensor, max_len: int, buffer: int) -> Tensor:
    """Soft overlong punishment: 0 up to max_len - buffer sampled tokens, then down to -1 at max_len, linearly.

    >>> overlong_penalty(torch.tensor([70, 80, 90, 120]), max_len=90, buffer=20)
    tensor([ 0.0000, -0.5000, -1.0000, -1.0000])
    """
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float)
    return ((max_len - buffer - lengths) / buffer).clamp(-1, 0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    num_tokens: Tensor | float | None = None,
    weights: Tensor | float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """Clipped token-level loss, to be minimised.

    logprobs, old_logprobs: (N, L); advantages: (N,); mask: (N, L) bool, True at sampled tokens.
    num_tokens divides the sum: the tokens of the whole optimizer step, over all micro-batches and ranks, where this is
    one part of it; by default those of this mask. weights: (N, L), a factor for each token. Returns the loss and sums over
    tokens, to be divided by the caller: `clipped` (tokens whose gradient the clip removed) and `tokens`.

    Two tokens with ratio 1.5 and 1, advantages 1 and -1: the first is clipped to 1.28, so loss = -(1.28 - 1)/2.

    >>> old = torch.zeros(2, 1)
    >>> loss, stats = policy_loss(torch.tensor([[0.4055], [0.0]]), old, torch.tensor([1., -1.]), torch.ones(2, 1, dtype=bool))
    >>> round(loss.item(), 4), stats
    (-0.14, {'clipped': 1.0, 'tokens': 2.0})
    """
    mask = mask.bool()
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))
    advantages = advantages[:, None]
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    tokens = mask.sum()
    loss = -(torch.minimum(unclipped, clipped) * weights * mask).sum() / (
        tokens if num_tokens is None else num_tokens
    )
    return loss, {
        "clipped": ((clipped < unclipped) & mask).sum().item() * 1.0,
        "tokens": tokens.item() * 1.0,
    }
