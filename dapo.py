"""DAPO (Yu et al. 2025): the policy gradient, as pure functions of tensors. No model, no text.

For a question the policy writes G responses with rewards r_1 … r_G. Their advantages are relative
to the group. J sums over the responses i of all groups of an optimizer step, and over the tokens t
that they *sampled* (retrieved tokens are masked out):

    A_i  = (r_i - mean(r)) / (std(r) + 1e-6)     std with n - 1 (GRPO, Shao et al. 2024)
    ρ_it = π(token | before) / π_old(token | before)
    J    = Σ_i Σ_t min(ρ_it·A_i, clip(ρ_it, 1 - ε_low, 1 + ε_high)·A_i) / number of sampled tokens

What DAPO adds to GRPO: ε_high > ε_low (clip-higher: unlikely tokens may grow), one average over all
tokens of the batch rather than over responses (long responses are not diluted), and dynamic
sampling (a group whose rewards are all equal has no gradient and is dropped). There is no KL
penalty.
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, baseline: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Rewards (P, G) of P questions to advantages (P, G).

    baseline: rewards (1, N) whose mean and std are used; by default each group's own. Raises
    ValueError where that is a single reward, whose std is undefined.

    >>> group_advantages(torch.tensor([[0., 1., 1., 2.]]))
    tensor([[-1.2247,  0.0000,  0.0000,  1.2247]])

    Groups of one are measured against all rewards of the step (REINFORCE with a baseline):

    >>> group_advantages(torch.tensor([[0.], [1.]]), baseline=torch.tensor([[0., 1., 1., 2.]]))
    tensor([[-1.2247],
            [ 0.0000]])
    """
    baseline = rewards if baseline is None else baseline
    if baseline.shape[1] < 2:
        raise ValueError(
            "a group needs at least two responses to have an advantage; raise --group-size"
        )
    centered = rewards - baseline.mean(1, keepdim=True)
    return centered / (baseline.std(1, keepdim=True) + eps)


def keep_group(outcomes: Tensor, rewards: Tensor) -> Tensor:
    """Dynamic sampling: which groups teach something. outcomes, rewards (P, G) → (P,) bool.

    At least one response is right (MMhops-R1), and the rewards are not all equal (DAPO).

    >>> outcomes = torch.tensor([[0., 0.], [1., 0.], [1., 1.]])
    >>> rewards = torch.tensor([[1., 0.], [2., 1.], [2., 2.]])
    >>> keep_group(outcomes, rewards)
    tensor([False,  True, False])
    """
    return (outcomes > 0).any(1) & (rewards.max(1).values - rewards.min(1).values > 1e-6)


def overlong_penalty(lengths: Tensor, max_len: int, buffer: int) -> Tensor:
    """Soft overlong punishment (Yu et al. 2025), of lengths (N,) in sampled tokens → (N,).

    0 up to max_len - buffer, then linearly down to -1 at max_len.

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
    dual_clip: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """Clipped token-level loss, to be minimised, and figures about it, by name.

    logprobs, old_logprobs: (N, L); advantages: (N,); mask: (N, L) bool, True at sampled tokens.
    num_tokens divides all sums. Where this is a micro-batch, pass the sampled tokens of the whole
    optimizer step, on all ranks; by default it is those of this mask. weights: (N, L), a factor
    per token: the rollout's correction (engine/packing.py) times `response_level_weights`.
    dual_clip: c > 1; a token of negative advantage A costs at most -c·A, however much likelier it
    has become (Ye et al. 2020); 0: no such bound. `clip_fraction`: the share of tokens whose
    gradient a clip removed. Losses and figures of the parts add up to those of the whole.

    Two tokens with ratio 1.5 and 1, advantages 1 and -1. The first is clipped to 1.28, so the loss
    is -(1.28 - 1)/2:

    >>> old, mask = torch.zeros(2, 1), torch.ones(2, 1, dtype=bool)
    >>> new, advantages = torch.tensor([[0.4055], [0.0]]), torch.tensor([1., -1.])
    >>> loss, figures = policy_loss(new, old, advantages, mask)
    >>> round(loss.item(), 4), figures
    (-0.14, {'clip_fraction': 0.5})

    A token that was to become rarer, and has become ten times as likely, with and without the
    bound:

    >>> worse = [torch.full((1, 1), 2.302585), old[:1], advantages[1:], mask[:1]]
    >>> [round(policy_loss(*worse, dual_clip=c)[0].item(), 2) for c in (0, 3)]
    [10.0, 3.0]
    """
    mask = mask.bool()
    if num_tokens is None:
        num_tokens = mask.sum().item()
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))
    unclipped = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages[:, None]
    objective = torch.minimum(unclipped, clipped)
    no_gradient = clipped < unclipped
    if dual_clip:
        floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)[:, None]  # (N, 1)
        no_gradient = no_gradient | (objective < floor)
        objective = torch.maximum(objective, floor)
    loss = -(objective * weights * mask).sum() / num_tokens
    no_gradient = no_gradient & mask
    return loss, {"clip_fraction": no_gradient.sum().item() / num_tokens}


def response_level_weights(mask: Tensor, num_tokens: float, num_responses: float) -> Tensor:
    """(N, 1) weights that turn `policy_loss` into GRPO's: each response's mean first, then theirs.

    mask: (N, L) bool. num_tokens, num_responses: of the whole optimizer step. A response of 1 token
    and one of 3 then count the same:

    >>> response_level_weights(torch.tensor([[1, 0, 0], [1, 1, 1]]).bool(), 4, 2)
    tensor([[2.0000],
            [0.6667]])
    """
    own = mask.sum(1, keepdim=True).clamp(min=1)
    return num_tokens / num_responses / own
