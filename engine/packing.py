"""The optimizer step: micro-batches of whole pairs, one loss over all of them and all ranks, numbers that stay finite.

The loss of a step is a sum over its sampled tokens divided by their number on *all* ranks,

    L = - (1 / Σ_ranks Σ_i |o_i|) Σ_ranks Σ_i Σ_t  w_it · min(ρ_it A_i, clip(ρ_it) A_i)                     (dapo.py)

so N ranks, and any way of cutting the batch, compute the gradient that one process with one batch would.

**Micro-batches** have a budget of tokens, not a number of pairs: they are packed without padding, a prompt once for
all its pairs (engine/shared_prompt.py), and none needs more memory than planned. Every rank runs equally many, for FSDP's
collectives would otherwise wait for ever.

**Old log-probs** are the rollout's own, or recomputed by the training forward pass when several updates follow: sampling
with a cache and training without round differently in bfloat16. Then `max_rollout_ratio` C weights each token with
w = min(π_old(training) / π_old(rollout), C), which corrects for the difference (truncated importance sampling, Yao et al.
2025); otherwise w = 1. The difference itself is logged either way.

**Not finite?** The optimizer step is skipped on all ranks alike, counted, and what caused it is kept for inspection.
"""

import math

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from dapo import group_advantages, policy_loss
from distributed import reduced, world
from model import policy_tokens, token_logprobs
from rollout import Response


def micro_batches(pairs: list, budget: int, device="cpu", share_prompt: bool = True) -> list[list]:
    """[(response, advantage)] in batches of at most `budget` packed tokens, a group's pairs together; a longer one stands alone.

    All ranks get the same number of batches, some of them empty.
    """
    batches, size, inside = [], 0, set()
    for pair in pairs:
        prompt, whole = pair[0].prompt, len(pair[0].token_ids)
        cost = whole - len(prompt.token_ids) * (share_prompt and id(prompt) in inside)
        if not batches or size + cost > budget:
            batches.append([])
            size, cost, inside = 0, whole, set()
        batches[-1].append(pair)
        size += cost
        inside.add(id(prompt))
    return batches + [[]] * (int(reduced(len(batches), device, dist.ReduceOp.MAX)) - len(batches))


@torch.no_grad()
def rescore(model, responses: list[Response], spare: Response, cfg) -> float:
    """Replace the rollout's log-probs by those of the training forward pass. Returns their greatest difference on this rank.

    `weights` of each response become the truncated importance weights, where cfg asks for them.
    """
    device, worst = model.sampling_bias.device, 0.0
    for batch in micro_batches(
        [(t, 0.0) for t in responses], cfg.micro_tokens, device, cfg.share_prompt
    ):
        batch = [t for t, _ in batch]
        for t, logprobs in zip(
            batch or [spare],
            token_logprobs(model, batch or [spare], cfg.temperature, cfg.share_prompt)[0],
        ):
            if batch:
                logprobs = logprobs[: len(t.token_ids)].cpu()
                worst = max(worst, (logprobs - t.logprobs).abs().max().item())
                t.weights = (
                    (logprobs - t.logprobs).exp().clamp(max=cfg.max_rollout_ratio)
                    if cfg.max_rollout_ratio
                    else None
                )
                t.logprobs = logprobs
    return worst


def update(
    model,
    optimizer,
    groups: list,
    cfg,
    step: int = 0,
    spare: Response | None = None,
    stale: int = 0,
) -> dict:
    """`updates_per_step` optimizer steps on this rank's groups. Returns means over them, the same on all ranks.

    A group is (G responses, (G,) rewards). spare: any response, for a rank that has nothing to do while others have.
    stale: how many of the groups, the first ones, were sampled by an earlier policy: they keep its log-probs, and
    `logprob_diff_max` (rollout against training forward) leaves them out. `updates_skipped` counts the steps not taken
    because the loss or the gradient was not finite.
    """
    device, (rank, ranks) = model.sampling_bias.device, world()
    model.train()
    pairs = [
        (t, a)
        for responses, totals in groups
        for t, a in zip(responses, group_advantages(totals[None])[0].tolist())
    ]
    if not cfg.mask_retrieved:
        for t, _ in pairs:
            t.policy_mask = torch.arange(len(t.token_ids)) >= len(t.prompt.token_ids)
    fresh = {
        id(t) for responses, _ in groups[stale if cfg.mask_retrieved else 0 :] for t in responses
    }
    worst = (
        rescore(model, [t for t, _ in pairs if id(t) in fresh], spare, cfg)
        if cfg.recompute_logprobs
        else 0.0
    )
    totals, done, skipped = (
        dict.fromkeys(("loss", "grad_norm", "entropy", "clip_fraction"), 0.0),
        0,
        0,
    )
    for number in range(cfg.updates_per_step):
        part = [
            pair
            for g in range(number, len(groups), cfg.updates_per_step)
            for pair in pairs[g * cfg.group_size : (g + 1) * cfg.group_size]
        ]
        tokens, count = (
            reduced(sum(int(t.policy_mask.sum()) for t, _ in part), device),
            reduced(len(part), device),
        )
        if tokens == 0:
            continue
        stats = dict.fromkeys(("loss", "entropy", "clip_fraction"), 0.0)
        for batch in micro_batches(part, cfg.micro_tokens, device, cfg.share_prompt):
            responses = [t for t, _ in batch] or [
                spare
            ]  # an empty batch scores the spare response, and adds nothing
            advantages = torch.tensor([a for _, a in batch] or [0.0], device=device)
            logprobs, entropy = token_logprobs(model, responses, cfg.temperature, cfg.share_prompt)
            mask = policy_tokens(responses, device) & bool(batch)
            old, weights = (
                torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
                for rows in (
                    [t.logprobs for t in responses],
                    [
                        torch.ones_like(t.logprobs) if t.weights is None else t.weights
                        for t in responses
                    ],
                )
            )
            if not cfg.token_level_loss:
                weights = weights * tokens / count / mask.sum(1, keepdim=True).clamp(min=1)
            loss, sums = policy_loss(
                logprobs,
                old,
                advantages,
                mask,
                cfg.eps_low,
                cfg.eps_high,
                num_tokens=tokens,
                weights=weights,
            )
            (
                loss * ranks
            ).backward()  # gradients are averaged over ranks; the loss is a part of one global sum
            stats["loss"] += loss.item()
            stats["entropy"] += (entropy * mask).sum().item() / tokens
            stats["clip_fraction"] += sums["clipped"] / tokens
            if number == 0 and not cfg.recompute_logprobs:
                compared = mask & torch.tensor([[id(t) in fresh] for t in responses], device=device)
                worst = max(worst, ((logprobs - old).abs() * compared).max().item())
        stats = {name: reduced(value, device) for name, value in stats.items()}
        stats["grad_norm"] = clip_gradients(model, cfg.max_grad_norm)
        if all(map(math.isfinite, stats.values())):
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps))
            optimizer.step()
            totals, done = {name: totals[name] + value for name, value in stats.items()}, done + 1
        else:
            skipped += 1
            save_batch(cfg.out / f"bad-step-{step + 1:06d}-{number}-rank{rank}.safetensors", part)
        optimizer.zero_grad()
    return {name: value / max(1, done) for name, value in totals.items()} | {
        "logprob_diff_max": reduced(worst, device, dist.ReduceOp.MAX),
        "updates_skipped": skipped,
    }


def clip_gradients(model, max_norm: float) -> float:
    """Scale the global gradient to at most max_norm; returns its norm before. Replicated adapters are averaged first."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if world()[1] > 1 and not isinstance(parameters[0], DTensor):
        for parameter in parameters:
            parameter.grad = (
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
            dist.all_reduce(parameter.grad)
            parameter.grad /= world()[1]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def save_batch(path, pairs: list):
    """What a skipped step was made of: read it with safetensors.torch.load_file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{i}.{name}": getattr(t, name).contiguous()
        for i, (t, _) in enumerate(pairs)
        for name in ("token_ids", "policy_mask", "logprobs")
    }
    save_file(
        tensors | {"advantages": torch.tensor([a for _, a in pairs])},
        path,
        {str(i): t.question.id for i, (t, _) in enumerate(pairs)},
    )
