"""Kernels per decoded token, counted: the exact model on tensors without numbers.

    python -m benchmarks.kernels                  # the paper's 7B, 128 responses
    python -m benchmarks.kernels --layers 4       # the same widths, fewer layers: in seconds

A decode step of a large model on a fast GPU waits for the CPU that launches its kernels: at some
10 µs each, a thousand of them take longer than reading all the weights. Counted is every operation
that computes or copies, not those that only look at a tensor in another way.
"""

from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from benchmarks.memory import FAKE, fake_policy, fake_prompt, fake_response
from config import PRESETS
from engine import distributed, samplers, shared_prompt
from model import sampled_distribution

WITHOUT_A_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}


@dataclass
class Args:
    """Count the kernels of one decode step."""

    rows: int = 128
    layers: int | None = None  # of the language model; None: all


class Counting(TorchDispatchMode):
    """{operation: how often it was run}, without views."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returned)
        library, _, name = func._schema.name.partition("::")
        if library == "aten" and not is_view and name not in WITHOUT_A_KERNEL:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def counts_of(work) -> Counter:
    with Counting() as counting:
        work()
    return counting.counts


def ours(policy, rows: int) -> dict[str, Counter]:
    """Of the cache that all responses of a question share: the forward pass, and choosing."""
    cfg = PRESETS["paper"]
    prompts = [fake_prompt(policy.model.config) for _ in range(rows // cfg.group_size)]
    responses = [fake_response(p, 0) for p in prompts for _ in range(cfg.group_size)]
    sampler = samplers.SharedPromptSampler(policy, responses, cfg, ())
    with mock.patch.object(samplers, "check_finite", lambda logits: None):
        sampler.read_prompts()
    ids = torch.zeros(rows, dtype=torch.long)

    def forward():
        return sampler.feed_one(ids, ids, ids == 0)

    def products(query, keys):  # as on a GPU
        flat = torch.bmm(query.flatten(0, 1), keys.transpose(2, 3).flatten(0, 1))
        with FAKE:
            exact = torch.empty(flat.shape, dtype=torch.float32)
        return exact.unflatten(0, query.shape[:2])

    logits = forward()  # the first step makes room in the caches

    def choose():
        distribution = sampled_distribution(logits, policy.bias, 1.0)
        probabilities = distribution.exp()
        drawn = samplers.draw(probabilities)
        likelier = probabilities > probabilities.gather(1, drawn)
        (probabilities * likelier).sum(-1, keepdim=True)
        distribution.gather(1, drawn)

    with mock.patch.object(shared_prompt, "products", products):
        return {
            "ours: forward pass": counts_of(forward),
            "ours: a token is drawn": counts_of(choose),
        }


def plain(policy, rows: int) -> dict[str, Counter]:
    """Of transformers' own cache and attention, as its `generate` runs them."""
    text = policy.model.config.get_text_config()
    size = text.num_key_value_heads, 1000, text.hidden_size // text.num_attention_heads
    cache = DynamicCache()
    for layer in range(text.num_hidden_layers):
        with FAKE:
            pair = [torch.empty(rows, *size, dtype=torch.bfloat16) for _ in range(2)]
        cache.update(*pair, layer)
    ids = torch.zeros(rows, 1, dtype=torch.long)
    mask = torch.ones(rows, size[1] + 1, dtype=torch.long)

    def forward():
        policy.model(
            input_ids=ids,
            position_ids=ids.expand(3, -1, -1),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    text._attn_implementation, own = "sdpa", text._attn_implementation
    try:
        return {"transformers: forward pass": counts_of(forward)}
    finally:
        text._attn_implementation = own


def measure(args: Args) -> dict[str, Counter]:
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        policy = fake_policy(PRESETS["paper"], args.layers)
        policy.model.eval()
        with distributed.gathered(policy.model), torch.no_grad():
            return plain(policy, args.rows) | ours(policy, args.rows)
    finally:
        dist.destroy_process_group()


def main(args: Args):
    for name, counts in measure(args).items():
        most = ", ".join(f"{count} {operation}" for operation, count in counts.most_common(8))
        print(f"{name}: {sum(counts.values())} kernels ({most}, …)")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
