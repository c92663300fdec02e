"""Attention over what rows share: a prompt is stored once and read once for all of its responses.

A rollout has Q questions and N rows, each row a response. A prompt of 1,300 tokens, most of them its picture's, would stand in
the cache of each of its G responses, and decoding is bound by reading the cache. `Store` keeps

    prompt  keys, values  (Q, H, P, D)     written once, by the prefill
    own     keys, values  (N, H, C, D)     what each row sampled and observed; row n uses its first lengths[n] places of C

and a new token of row n attends to both: softmax([q·K_prompt, q·K_own]). The scores against a prompt are one matrix product for
all rows of the question. Rows may have different lengths, and nothing is ever moved or computed again: a new token is
written behind the row's last. Space grows by half when it is full.

The update packs the same way: one sequence holds a prompt, then its G responses, then the next prompt, without padding;
`spans` say where. A response attends to its prompt and to itself. The prompt's forward and backward pass happens once.

`attend` is what Qwen's layers call, by way of transformers' table of attention functions. Without a store or spans it is SDPA.
"""

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class Store:
    """Keys and values of a rollout. Rows are ordered by question; `owner` (N,) says which question is whose."""

    def __init__(self, layers: int, prompt_mask: Tensor, group_size: int, most: int):
        self.most = most  # tokens that a row can have, after its prompt
        self.prompt, self.own = [None] * layers, [None] * layers
        self.prompt_mask, device = (
            prompt_mask.bool(),
            prompt_mask.device,
        )  # (Q, P), False where padded
        self.owner = torch.arange(len(prompt_mask), device=device).repeat_interleave(group_size)
        self.lengths = torch.zeros(len(self.owner), dtype=torch.long, device=device)
        self.longest, self.capacity, self.places, self.masks = 0, 0, None, {}
        self.arrange()

    def arrange(self):
        """Which rows each question has: `slots` (Q, most rows) of row numbers, `filled` where there is one."""
        counts = torch.bincount(self.owner, minlength=len(self.prompt_mask))
        column = torch.arange(int(counts.max()), device=counts.device)
        self.filled = column < counts[:, None]
        self.slots = (counts.cumsum(0) - counts)[:, None] + torch.where(self.filled, column, 0)
        self.slots.clamp_(max=len(self.owner) - 1)
        self.even = bool(self.filled.all())

    def begin(self, sizes: Tensor, width: int):
        """Make room for a chunk of `width` left-padded tokens, of which row n has sizes[n]. Call it before each forward pass."""
        t = (
            torch.arange(width, device=sizes.device) - (width - sizes)[:, None]
        )  # (N, T); negative at padding
        self.longest += width  # an upper bound, known without asking the device
        if self.longest >= self.capacity:
            self.capacity = max(self.longest + 1, min(self.longest * 3 // 2 + 64, self.most + 1))
            for layer, pair in enumerate(self.own):
                if pair is not None:
                    self.own[layer] = tuple(
                        pad(x, (0, 0, 0, self.capacity - x.shape[2])) for x in pair
                    )
        # Padding is written to the last place, which is never read.
        self.places = torch.where(t < 0, self.capacity - 1, self.lengths[:, None] + t)
        self.lengths, self.masks = self.lengths + sizes, {}

    def select(self, rows: Tensor):
        """Keep these rows, in order, and the prompts of their questions."""
        questions, self.owner = torch.unique(self.owner[rows], return_inverse=True)
        if len(questions) < len(self.prompt_mask):
            self.prompt = [tuple(x[questions] for x in pair) for pair in self.prompt]
            self.prompt_mask = self.prompt_mask[questions]
        if len(rows) < len(self.lengths):
            self.own = [tuple(x[rows] for x in pair) for pair in self.own]
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())
        self.arrange()

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk's keys and values, (N, H, T, D); returns the layer's own keys and values up to the longest row."""
        if self.own[layer] is None:
            self.own[layer] = tuple(
                x.new_zeros(x.shape[0], x.shape[1], self.capacity, x.shape[3])
                for x in (keys, values)
            )
        row = torch.arange(len(keys), device=keys.device)[:, None]
        for stored, new in zip(self.own[layer], (keys, values)):
            stored[row, :, self.places] = new.transpose(1, 2)
        return tuple(stored[:, :, : self.longest] for stored in self.own[layer])

    def by_question(self, x: Tensor) -> Tensor:
        """(N, H, R, D) → (Q, H, rows·R, D)."""
        grouped = x.view(*self.slots.shape, *x.shape[1:]) if self.even else x[self.slots]
        return grouped.transpose(1, 2).flatten(2, 3)

    def by_row(self, x: Tensor, heads: int) -> Tensor:
        """(Q, H, rows·R, ·) → (N, H, R, ·)."""
        grouped = x.unflatten(2, (self.slots.shape[1], heads)).transpose(1, 2)
        return grouped.flatten(0, 1) if self.even else grouped[self.filled]


def attend(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling: float | None = None,
    store: Store | None = None,
    spans: list | None = None,
    **kwargs,
):
    """query (N, Hq, T, D), key and value (N, H, T, D) of the new tokens → ((N, T, Hq, D), None)."""
    if spans is not None:
        return packed(query, key, value, spans, scaling).transpose(1, 2), None
    if store is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    layer = module.layer_idx
    if store.prompt[layer] is None:  # the prefill, a row a question
        store.prompt[layer] = key, value
        causal = torch.ones(
            query.shape[2], query.shape[2], dtype=torch.bool, device=query.device
        ).tril()
        mask = (
            store.prompt_mask[:, None, None, :] & causal | causal.triu()
        )  # padding sees itself: a softmax needs something
        return scaled_dot_product_attention(
            query, key, value, mask, scale=scaling, enable_gqa=True
        ).transpose(1, 2), None
    keys, values = store.write(layer, key, value)
    out = (one_token if query.shape[2] == 1 else chunk)(store, layer, query, keys, values, scaling)
    return out.transpose(1, 2), None


def one_token(
    store: Store, layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> Tensor:
    """Decoding: two matrix products, one per question and one per row, under one softmax. Returns (N, Hq, 1, D)."""
    (n, heads, _, d), (prompt_keys, prompt_values) = query.shape, store.prompt[layer]
    rep = heads // keys.shape[1]
    q = query.view(n, keys.shape[1], rep, d) * scaling
    if not store.masks:  # the same in every layer
        own = torch.arange(keys.shape[2], device=q.device) > store.places[:, :1, None, None]
        store.masks = {"prompt": ~store.prompt_mask[:, None, None], "own": own}
    shared = (store.by_question(q) @ prompt_keys.transpose(2, 3)).masked_fill_(
        store.masks["prompt"], -torch.inf
    )
    own = (q @ keys.transpose(2, 3)).masked_fill_(store.masks["own"], -torch.inf)
    weights = (
        torch.cat([store.by_row(shared, rep), own], -1)
        .softmax(-1, dtype=torch.float32)
        .to(query.dtype)
    )
    shared, own = weights.split([prompt_keys.shape[2], keys.shape[2]], -1)
    out = store.by_row(store.by_question(shared) @ prompt_values, rep) + own @ values
    return out.reshape(n, heads, 1, d)


def chunk(
    store: Store, layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> Tensor:
    """Observations: the rows of a question at a time, so that the prompt is laid out once a question. Returns (N, Hq, T, D)."""
    out, (prompt_keys, prompt_values) = torch.empty_like(query), store.prompt[layer]
    for question, rows in enumerate(store.slots):
        rows = rows[store.filled[question]]
        first, last = int(rows[0]), int(rows[-1]) + 1
        k, v = (
            torch.cat([prompt[question].expand(last - first, -1, -1, -1), own[first:last]], 2)
            for prompt, own in ((prompt_keys, keys), (prompt_values, values))
        )
        if question not in store.masks:  # the same in every layer
            own = (
                torch.arange(keys.shape[2], device=query.device)
                <= store.places[first:last, :, None]
            )  # (rows, T, own)
            seen = torch.cat(
                [store.prompt_mask[question].expand(last - first, query.shape[2], -1), own], 2
            )[:, None]
            store.masks[question] = torch.where(seen, 0.0, -torch.inf).to(query.dtype)
        out[first:last] = scaled_dot_product_attention(
            query[first:last], k, v, store.masks[question], scale=scaling, enable_gqa=True
        )
    return out


def packed(query: Tensor, key: Tensor, value: Tensor, spans: list, scaling: float) -> Tensor:
    """One sequence of prompts and their responses, (1, Hq, L, D). spans: [((start, end) of a prompt, [(start, end) of a response])].

    A prompt's responses lie one after another behind it.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if query.device.type == "cpu":
        return SharedPrompts.apply(query, key, value, spans, scaling)
    out = []
    for (first, last), responses in spans:
        q, k, v = (x[:, :, first:last] for x in (query, key, value))
        out.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        for start, end in responses:  # flash attention, aligned to the last key; no mask is made
            q, keys, values = (
                query[:, :, start:end],
                torch.cat([k, key[:, :, start:end]], 2),
                torch.cat([v, value[:, :, start:end]], 2),
            )
            out.append(
                scaled_dot_product_attention(
                    q, keys, values, causal_lower_right(q.shape[2], keys.shape[2]), scale=scaling
                )
            )
    return torch.cat(out, 2)


class SharedPrompts(torch.autograd.Function):
    """`packed` on a CPU, whose kernel has no such alignment: it would compute, and mask away, the half of a response that comes later.

    A response's attention is put together from two: over the prompt (all responses at once, no mask), and over itself (causal).
    With o_1, o_2 and their log-sum-exps l_1, l_2, and l = log(exp l_1 + exp l_2), it is o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2.
    The kernel's backward pass computes weights as exp(score - l) and needs o only for the rows' sums: given the joint o and l,
    each part's gradients are those of the whole.
    """

    @staticmethod
    def pieces(spans):
        """(queries, keys, causal) as pairs of places; a response's two parts follow its prompt's own."""
        for prompt, responses in spans:
            yield prompt, prompt, True
            yield (responses[0][0], responses[-1][1]), prompt, False
            yield from ((response, response, True) for response in responses)

    @staticmethod
    def forward(ctx, query, key, value, spans, scaling):
        out, lse = torch.zeros_like(query), torch.full_like(query[..., 0], -torch.inf)
        for (q, r), (k, m), causal in SharedPrompts.pieces(spans):
            part, l = flash(
                query[:, :, q:r], key[:, :, k:m], value[:, :, k:m], is_causal=causal, scale=scaling
            )
            joint = torch.logaddexp(lse[:, :, q:r], l.to(lse.dtype))
            out[:, :, q:r] = (
                out[:, :, q:r] * (lse[:, :, q:r] - joint).exp()[..., None]
                + part * (l - joint).exp()[..., None]
            )
            lse[:, :, q:r] = joint
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.spans, ctx.scaling = spans, scaling
        return out

    @staticmethod
    def backward(ctx, grad):
        *inputs, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in inputs]
        for (q, r), (k, m), causal in SharedPrompts.pieces(ctx.spans):
            at = (slice(q, r), slice(k, m), slice(k, m))
            parts = flash_backward(
                grad[:, :, q:r],
                *(x[:, :, place] for x, place in zip(inputs, at)),
                out[:, :, q:r],
                lse[:, :, q:r],
                0.0,
                causal,
                scale=ctx.scaling,
            )
            for total, place, part in zip(grads, at, parts):
                total[:, :, place] += part
        return *grads, None, None


flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
AttentionInterface.register("shared_prompt", attend)
AttentionMaskInterface.register("shared_prompt", sdpa_mask)
