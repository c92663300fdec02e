"""Responses laid out for a forward pass: without padding, in micro-batches of a bounded size.

    one sequence:  | prompt A | response A1 | response A2 | prompt B | response B1 | …

Every token, retrieved ones included, is attended to; only sampled ones are scored. A prompt, with
its pictures, is computed once for all of its responses (shared_prompt.py).

A micro-batch has a budget of tokens, not a number of responses, so none needs more memory than
planned. All ranks get equally many: the collectives of sharded weights would otherwise wait for
ever.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from engine.distributed import reduced


@dataclass
class Packed:
    """Responses as one sequence of L tokens, M of which the policy sampled."""

    inputs: dict  # what the model is called with
    chosen: Tensor  # (M,) int64, the sampled tokens
    predictors: Tensor  # (M,) int64, the places in the sequence whose scores predict them
    where: Tensor  # (M,) int64, their places in the flattened (N, longest response) layout


def pack(responses: list, device, share_prompt: bool = True) -> Packed:
    """Lay out N responses one after another, behind their prompts.

    share_prompt=False repeats the prompt for each response.
    """
    longest = max(len(response.token_ids) for response in responses)
    groups = {}  # {prompt: numbers of its responses}
    for number, response in enumerate(responses):
        key = id(response.prompt) if share_prompt else number
        groups.setdefault(key, []).append(number)

    ids, positions, spans, prompts = [], [], [], []
    chosen, predictors, where = [], [], []
    end = 0  # of what is laid out so far
    for numbers in groups.values():
        # 1) the prompt
        prompt = responses[numbers[0]].prompt
        size = len(prompt.token_ids)
        prompt_span = (end, end + size)
        ids.append(prompt.token_ids)
        positions.append(prompt.positions)
        prompts.append(prompt)
        end += size
        # 2) its responses; each counts on from the prompt's positions, whatever stands between
        response_spans = []
        for number in numbers:
            own = responses[number].token_ids[size:]
            sampled = responses[number].policy_mask[size:].nonzero()[:, 0]  # places in `own`
            ids.append(own)
            positions.append((prompt.next_position + torch.arange(len(own))).expand(3, -1))
            chosen.append(own[sampled])
            # a token is predicted at the place before it; the first one, at the prompt's last
            predictors.append(torch.where(sampled == 0, prompt_span[1] - 1, end + sampled - 1))
            where.append(number * longest + size + sampled)
            response_spans.append((end, end + len(own)))
            end += len(own)
        spans.append((prompt_span, response_spans))

    inputs = {
        "input_ids": torch.cat(ids)[None].to(device),  # (1, L)
        "position_ids": torch.cat(positions, 1)[:, None].to(device),  # (3, 1, L)
        "attention_mask": {"full_attention": None},  # `spans` say who sees whom
        "spans": spans,
        **vision_inputs(prompts, device),
    }
    return Packed(inputs, *(torch.cat(parts).to(device) for parts in (chosen, predictors, where)))


def unpack(values: Tensor, packed: Packed, responses: list) -> Tensor:
    """(M,) values of the sampled tokens → (N, L), aligned with the padded `token_ids`, else 0."""
    shape = len(responses), max(len(response.token_ids) for response in responses)
    flat = torch.zeros(shape[0] * shape[1], dtype=values.dtype, device=values.device)
    return flat.index_put((packed.where,), values).view(shape)


def vision_inputs(prompts: list, device) -> dict:
    """`pixel_values` and `image_grid_thw` of the prompts, in order; {} without pictures."""
    shown = [prompt for prompt in prompts if prompt.pixel_values is not None]
    if not shown:
        return {}
    return {
        "pixel_values": torch.cat([prompt.pixel_values for prompt in shown]).to(device),
        "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in shown]).to(device),
    }


def padded(tensors: list[Tensor], device) -> Tensor:
    """(N, longest), filled up with 0 or False."""
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)


def pad_left(sequences: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, (N, longest) int64 each; all sequences end together."""
    width = max(map(len, sequences))
    ids = [[pad_id] * (width - len(s)) + s for s in sequences]
    mask = [[0] * (width - len(s)) + [1] * len(s) for s in sequences]
    return torch.tensor(ids).to(device), torch.tensor(mask).to(device)


def micro_batches(batch: list, budget: int, device="cpu", share_prompt: bool = True) -> list[list]:
    """Cut [(response, advantage)], in order, into micro-batches of at most `budget` packed tokens.

    A longer response stands alone. All ranks get the same number of micro-batches, some of them
    empty.
    """
    cut, used, prompts = [], 0, set()  # of the latest micro-batch: tokens used, prompts there
    for pair in batch:
        prompt, whole = pair[0].prompt, len(pair[0].token_ids)
        known = share_prompt and id(prompt) in prompts
        cost = whole - len(prompt.token_ids) if known else whole
        if not cut or used + cost > budget:
            cut.append([])
            used, prompts = 0, set()
            cost = whole  # a new micro-batch pays for the prompt again
        cut[-1].append(pair)
        used += cost
        prompts.add(id(prompt))
    most = int(reduced(len(cut), device, dist.ReduceOp.MAX))
    return cut + [[]] * (most - len(cut))


def unmasked(responses: list) -> list:
    """An ablation: the responses as if the policy had written what was retrieved, too."""
    masks = [torch.arange(len(r.token_ids)) >= len(r.prompt.token_ids) for r in responses]
    return [replace(r, policy_mask=mask) for r, mask in zip(responses, masks)]


@torch.no_grad()
def rescore(policy, responses: list, filler, cfg) -> list[Tensor]:
    """Replace the rollout's log-probs by the training forward pass's; returns each response's
    changes, without sign, where the policy wrote.

    Sampling with a cache and training without round differently in bfloat16. Where
    cfg.max_rollout_ratio C is set, each token gets the weight min(π_old(training) / π_old(rollout),
    C): truncated importance sampling, Yao et al. 2025. filler: any response, scored where this rank
    has none left and others have.
    """
    changes = []
    pairs = [(response, 0.0) for response in responses]
    for batch in micro_batches(pairs, cfg.micro_tokens, policy.device, cfg.share_prompt):
        scored = [response for response, _ in batch] or [filler]
        logprobs, _ = policy.logprobs(scored, cfg.temperature, cfg.share_prompt)
        for (response, _), new in zip(batch, logprobs.cpu()):
            new = new[: len(response.token_ids)]
            difference = new - response.logprobs
            sampled = response.policy_mask
            if not cfg.mask_retrieved:  # of what was retrieved the rollout has none: 0
                sampled = response.logprobs != 0
                difference = difference * sampled
            changes.append(difference[sampled].abs())
            if cfg.max_rollout_ratio:
                response.weights = difference.exp().clamp(max=cfg.max_rollout_ratio)
            response.logprobs = new
    return changes


def difference_figures(differences: list[Tensor], device) -> dict[str, float]:
    """Mean, 99th percentile and maximum of |rollout's log-prob - training's| over sampled tokens.

    A mean that is high is a bug; a maximum alone may be rounding. differences: of this rank's
    responses. The percentile is the highest of the ranks'.
    """
    # quantile takes at most 16 million numbers
    values = torch.cat([torch.zeros(0), *(d.float().cpu() for d in differences)])[: 2**24]
    total, count = (reduced(x, device) for x in (values.sum().item(), len(values)))
    percentile = values.quantile(0.99).item() if len(values) else 0.0
    most = values.max().item() if len(values) else 0.0
    return {
        "logprob_diff_mean": total / max(1.0, count),
        "logprob_diff_p99": reduced(percentile, device, dist.ReduceOp.MAX),
        "logprob_diff_max": reduced(most, device, dist.ReduceOp.MAX),
    }


def save_batch(batch: list, out: Path, name: str):
    """What a skipped optimizer step was made of: read it with safetensors.torch.load_file."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {"advantages": torch.tensor([advantage for _, advantage in batch])}
    for i, (response, _) in enumerate(batch):
        for part in ("token_ids", "policy_mask", "logprobs"):
            tensors[f"{i}.{part}"] = getattr(response, part).contiguous()
    questions = {str(i): str(response.question.id) for i, (response, _) in enumerate(batch)}
    save_file(tensors, out / f"bad-step-{name}.safetensors", questions)


def not_finite(run, cfg) -> str:
    """Why a run gives up."""
    return (
        f"{run.bad} steps in a row had a loss or gradient that is not finite; their batches are "
        f"{cfg.out}/bad-step-*. Lower --lr, or resume an older checkpoint"
    )
