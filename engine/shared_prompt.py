"""Attention with a shared prompt: it is stored once, and read once, for all of its responses.

A prompt of 1,300 tokens, most of them its picture's, would otherwise stand in the cache of each of
its G responses, and decoding is bound by reading the cache. A new token attends to its prompt and
to its own response,

    softmax([q · K_prompt, q · K_own]) · [V_prompt, V_own]

where the scores against a prompt are one matrix product for all of its responses.

Sampling uses `SharedCache`; training packs a prompt and its responses into one sequence
(`packed_attention`), so that the prompt's forward and backward pass happens once there, too.
`attend` is what Qwen's layers call, through transformers' table of attention functions. Sizes: Q
prompts, N responses, H key heads, Hq query heads, D per head, T new tokens.
"""

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prompt"  # of this attention, in transformers' table
# cuDNN would make a plan for every new shape of a call, and hardly a shape comes twice here.
torch.backends.cuda.enable_cudnn_sdp(False)


class SharedCache:
    """Keys and values of a rollout, for every layer. With Q = 2 prompts and N = 2 responses:

        prompts[layer]  (Q, H, P, D)   . . p p p p     left-padded: `prompt_mask` is False at "."
                                       p p p p p p     written once, by the prefill

        own[layer]      (N, H, C, D)   a a a . . . x   what a response sampled and read: its first
                                       a a a a a . x   lengths[n] places. x: padding is written
                                                       there, to the last place, and never read

    They may have different lengths; no token is written or computed twice: a new token is written
    behind the response's last one. C grows by half when it is full.

    A chunk is fed to the first `fed` responses; the others wait (`put_first`).
    """

    def __init__(self, layers: int, prompt_mask: Tensor, group_size: int, max_own: int, block=1):
        """max_own: tokens that a response can have after its prompt. block: where one token is fed,
        `own` is read in blocks of so many places (engine/graph.py)."""
        device = prompt_mask.device
        self.max_own, self.block = max_own, block
        self.prompt_mask = prompt_mask.bool()
        self.prompts = [None] * layers
        self.own = [None] * layers
        self.prompt_of = torch.arange(len(prompt_mask), device=device).repeat_interleave(group_size)
        self.fed = len(self.prompt_of)
        self.lengths = torch.zeros(len(self.prompt_of), dtype=torch.long, device=device)
        self.longest = 0  # at least lengths.max(), known without asking the device
        self.read_width = 0  # so many places of `own` are read, at least `longest`
        self.capacity = 0  # C
        self.layout = 0  # changes where tensors are replaced by others
        self.places = None  # (N, T): where in `own` the chunk being fed is written
        self.row_index = None  # (N, 1): of the responses that are fed
        self.masks = {}  # of the chunk being fed, the same in every layer
        self.index_responses()

    def index_responses(self):
        """Which of the responses that are fed each prompt has: `rows_of_prompt` (Q, most), numbers.

        `filled` (Q, most) is False where a prompt has fewer than the most. `slot_of_row` (N,):
        where in them, flattened, a response stands.
        """
        self.layout += 1
        prompt_of = self.prompt_of[: self.fed]
        by_prompt = prompt_of.argsort(stable=True)
        counts = torch.bincount(prompt_of, minlength=len(self.prompt_mask))
        column = torch.arange(int(counts.max()), device=counts.device)
        first = counts.cumsum(0) - counts
        self.filled = column < counts[:, None]
        place = first[:, None] + torch.where(self.filled, column, 0)
        self.rows_of_prompt = by_prompt[place.clamp(max=self.fed - 1)]
        self.slot_of_row = torch.empty_like(prompt_of)
        self.slot_of_row[self.rows_of_prompt[self.filled]] = self.filled.flatten().nonzero()[:, 0]
        # as many responses per prompt, side by side: a view will do
        self.even = torch.equal(
            self.slot_of_row, torch.arange(self.filled.numel(), device=counts.device)
        )

    def begin_chunk(self, sizes: Tensor, width: int):
        """Say where the next chunk will be written, make room, and count its tokens as held.

        width: of the left-padded chunk, T. sizes: (N,) int64, how many of the T are a response's.
        N: the responses that are fed.
        To be called before each forward pass but the prefill.
        """
        self.make_room(width)
        self.place_chunk(sizes, width)

    def make_room(self, width: int):
        """For a chunk of this width. Python's numbers change here, tensors in `place_chunk`."""
        self.longest += width
        if self.longest >= self.capacity:
            grown = blocks(self.longest * 3 // 2 + 64, self.block)
            self.capacity = max(self.longest + 1, min(grown, self.max_own + 1))
            self.layout += 1
            for layer, pair in enumerate(self.own):
                if pair is not None:
                    self.own[layer] = tuple(self.widened(x) for x in pair)
        seen = blocks(self.longest, self.block) if width == 1 else self.longest
        self.read_width = min(self.capacity, seen)

    def place_chunk(self, sizes: Tensor, width: int):
        """Where each token of the chunk is written; `begin_chunk` says what the arguments are."""
        padding = width - sizes
        # (N, T): below 0 at padding
        offset = torch.arange(width, device=sizes.device) - padding[:, None]
        places = self.lengths[: self.fed, None] + offset
        self.places = places.masked_fill(offset < 0, self.capacity - 1)  # never read
        self.row_index = torch.arange(self.fed, device=sizes.device)[:, None]
        self.lengths[: self.fed] += sizes
        self.masks = {}

    def widened(self, x: Tensor) -> Tensor:
        return pad(x, (0, 0, 0, self.capacity - x.shape[2]))

    def keep(self, responses: Tensor):
        """Keep these responses, by number and in this order, and the prompts they belong to."""
        prompts, self.prompt_of = torch.unique(self.prompt_of[responses], return_inverse=True)
        if len(prompts) < len(self.prompt_mask):
            self.prompt_mask = self.prompt_mask[prompts]
            for layer, pair in enumerate(self.prompts):
                self.prompts[layer] = tuple(x[prompts] for x in pair)
        everyone = torch.arange(len(self.lengths), device=responses.device)
        if not torch.equal(responses, everyone):
            for layer, pair in enumerate(self.own):
                self.own[layer] = tuple(x[responses] for x in pair)
        self.lengths = self.lengths[responses]
        self.fed = len(responses)
        self.longest = int(self.lengths.max())
        self.index_responses()

    def put_first(self, order: Tensor, count: int):
        """Put the responses into this order, in place; from now on only `count` of them are fed."""
        moved = (order != torch.arange(len(order), device=order.device)).nonzero()[:, 0]
        whence = order[moved]
        for pair in self.own:
            for x in pair or ():  # nothing is stored before the first token is fed
                x[moved, :, : self.longest] = x[whence, :, : self.longest]
        self.lengths = self.lengths[order]
        self.prompt_of = self.prompt_of[order]
        self.fed = count
        self.longest = int(self.lengths[:count].max())
        self.index_responses()

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a chunk's keys and values (N, H, T, D); the layer's own, (N, H, read_width, D)."""
        if self.own[layer] is None:
            _, heads, _, d = keys.shape
            shape = len(self.lengths), heads, self.capacity, d  # of all, also those that wait
            self.own[layer] = tuple(x.new_zeros(shape) for x in (keys, values))
        for stored, new in zip(self.own[layer], (keys, values)):
            stored[self.row_index, :, self.places] = new.transpose(1, 2)
        return tuple(stored[: len(keys), :, : self.read_width] for stored in self.own[layer])

    def by_prompt(self, x: Tensor) -> Tensor:
        """(N, H, R, ·) → (Q, H, most·R, ·): a prompt's responses side by side."""
        grouped = (
            x.view(*self.rows_of_prompt.shape, *x.shape[1:])
            if self.even
            else x[self.rows_of_prompt]
        )
        return grouped.transpose(1, 2).flatten(2, 3)

    def by_response(self, x: Tensor, r: int) -> Tensor:
        """(Q, H, most·R, ·) → (N, H, R, ·): the way back."""
        grouped = x.unflatten(2, (self.rows_of_prompt.shape[1], r)).transpose(1, 2)
        grouped = grouped.flatten(0, 1)
        return grouped if self.even else grouped[self.slot_of_row]


def blocks(places: int, block: int) -> int:
    """So many places, in whole blocks.

    >>> blocks(5, 4), blocks(8, 4), blocks(5, 1)
    (8, 8, 5)
    """
    return -(-places // block) * block


def attend(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling: float | None = None,
    shared_cache: SharedCache | None = None,
    spans: list | None = None,
    **kwargs,
):
    """query (N, Hq, T, D), key and value (N, H, T, D) of the new tokens → ((N, T, Hq, D), None).

    With a shared_cache: sampling. With spans: a packed sequence. With neither: SDPA under
    transformers' own mask.
    """
    if spans is not None:
        return packed_attention(query, key, value, spans, scaling).transpose(1, 2), None
    if shared_cache is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    layer = module.layer_idx
    if shared_cache.prompts[layer] is None:
        out = prefill(shared_cache, layer, query, key, value, scaling)
    else:
        keys, values = shared_cache.append(layer, key, value)
        decode = attend_one if query.shape[2] == 1 else attend_chunk
        out = decode(shared_cache, layer, query, keys, values, scaling)
    return out.transpose(1, 2), None


def prefill(cache: SharedCache, layer: int, query, key, value, scaling) -> Tensor:
    """The prompts, each once: causal, without their padding. Returns (Q, Hq, P, D)."""
    cache.prompts[layer] = key.contiguous(), value.contiguous()  # read for every token
    size = query.shape[2]
    causal = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    # padding sees itself: a softmax needs something
    itself = torch.eye(size, dtype=torch.bool, device=query.device)
    mask = (cache.prompt_mask[:, None, None, :] & causal) | itself
    key, value = (repeated(x, query) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, mask, scale=scaling)


def repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values (N, H, R, D), each head as often as query heads use it: (N, Hq, R, D).

    SDPA can do that itself (`enable_gqa`), but on a GPU its memory-saving kernel cannot: with a
    mask, all scores would be in memory at once.
    """
    repeats = query.shape[1] // x.shape[1]
    return x.repeat_interleave(repeats, 1) if repeats > 1 else x


def attend_one(cache: SharedCache, layer: int, query, keys, values, scaling) -> Tensor:
    """Decoding: two matrix products, one per prompt and one per response, under one softmax.

    query (N, Hq, 1, D); keys, values (N, H, read_width, D). Returns (N, Hq, 1, D).
    """
    n, query_heads, _, d = query.shape
    prompt_keys, prompt_values = cache.prompts[layer]
    repeats = query_heads // keys.shape[1]  # query heads per key head
    q = query.view(n, keys.shape[1], repeats, d)
    if not cache.masks:
        place = torch.arange(keys.shape[2], device=q.device)
        # of a response that has ended all is seen: nobody uses what comes of it
        own_seen = place <= cache.places[:, :1]  # (N, read_width)
        seen = torch.cat([cache.prompt_mask[cache.prompt_of[:n]], own_seen], 1)
        nothing = torch.zeros(seen.shape, device=q.device)
        cache.masks["one"] = nothing.masked_fill(~seen, -torch.inf)[:, None, None]
    shared = products(cache.by_prompt(q), prompt_keys)  # (Q, H, most·repeats, P)
    own = products(q, keys)  # (N, H, repeats, read_width)
    scores = torch.cat([cache.by_response(shared, repeats), own], -1)
    scores = torch.add(cache.masks["one"], scores, alpha=scaling)  # one kernel for both
    weights = scores.softmax(-1).to(query.dtype)
    shared, own = weights.split([prompt_keys.shape[2], keys.shape[2]], -1)
    from_prompt = cache.by_prompt(shared) @ prompt_values
    out = cache.by_response(from_prompt, repeats) + own @ values
    return out.reshape(n, query_heads, 1, d)


def products(query: Tensor, keys: Tensor) -> Tensor:
    """query (N, H, T, D) times keys (N, H, R, D): (N, H, T, R), at least float32.

    Rounded to bfloat16, as `@` does, scores near 20 would be wrong by up to 1/16.
    """
    keys = keys.transpose(2, 3)
    if query.dtype == torch.bfloat16 and query.is_cuda:
        flat = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1), out_dtype=torch.float32)
        return flat.unflatten(0, query.shape[:2])
    exact = torch.promote_types(query.dtype, torch.float32)
    return query.to(exact) @ keys.to(exact)


def attend_chunk(cache: SharedCache, layer: int, query, keys, values, scaling) -> Tensor:
    """Observations: one prompt's responses at a time, so that only their copies of it are alive.

    query (N, Hq, T, D); keys, values (N, H, read_width, D). Returns (N, Hq, T, D).
    """
    out = torch.empty_like(query)
    prompt_keys, prompt_values = cache.prompts[layer]
    for prompt, members in enumerate(cache.rows_of_prompt):
        members = members[cache.filled[prompt]]
        first, last = int(members[0]), int(members[-1]) + 1  # side by side: the sampler sorts them
        count = last - first
        k, v = (
            torch.cat([shared[prompt].expand(count, -1, -1, -1), own[first:last]], 2)
            for shared, own in ((prompt_keys, keys), (prompt_values, values))
        )
        k, v = (repeated(x, query) for x in (k, v))
        if prompt not in cache.masks:
            place = torch.arange(keys.shape[2], device=query.device)
            own_seen = place <= cache.places[first:last, :, None]  # (count, T, read_width)
            prompt_seen = cache.prompt_mask[prompt].expand(count, query.shape[2], -1)
            seen = torch.cat([prompt_seen, own_seen], 2)[:, None]
            cache.masks[prompt] = torch.where(seen, 0.0, -torch.inf).to(query.dtype)
        out[first:last] = scaled_dot_product_attention(
            query[first:last], k, v, cache.masks[prompt], scale=scaling
        )
    return out


# --------------------------------------------------------------------- training: packed sequences


def packed_attention(query: Tensor, key: Tensor, value: Tensor, spans: list, scaling) -> Tensor:
    """One sequence of prompts, each followed by its responses: query (1, Hq, L, D) → (1, Hq, L, D).

    spans: [(prompt, [response, …]), …], each a pair (start, end) of places in the sequence. A
    response attends to its prompt and to itself.
    """
    key, value = (repeated(x, query) for x in (key, value))
    if query.device.type == "cpu":
        return PackedOnCpu.apply(query, key, value, spans, scaling)
    out = []
    for (first, last), responses in spans:
        q, k, v = (x[:, :, first:last] for x in (query, key, value))
        out.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        for start, end in responses:
            q = query[:, :, start:end]
            keys = torch.cat([k, key[:, :, start:end]], 2)
            values = torch.cat([v, value[:, :, start:end]], 2)
            # flash attention, aligned to the last key: no mask is made
            aligned = causal_lower_right(q.shape[2], keys.shape[2])
            out.append(scaled_dot_product_attention(q, keys, values, aligned, scale=scaling))
    return torch.cat(out, 2)


class PackedOnCpu(torch.autograd.Function):
    """`packed_attention` on a CPU.

    The CPU's flash kernel cannot align a causal mask to the last key: over prompt and response it
    would compute, and mask away, the half of a response that comes later.

    A response's attention is put together from two parts: over the prompt (all responses at once,
    no mask), and over itself (causal). With outputs o_1, o_2, their log-sum-exps l_1, l_2, and l =
    log(exp l_1 + exp l_2), it is

        o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2

    The kernel's backward pass computes weights as exp(score - l) and needs o only for a row's sum:
    given the joint o and l, the parts' gradients add up to the whole's.
    """

    @staticmethod
    def parts(spans):
        """(places of queries, places of keys, causal?) of each kernel call."""
        for prompt, responses in spans:
            yield prompt, prompt, True
            all_responses = responses[0][0], responses[-1][1]
            yield all_responses, prompt, False
            for response in responses:
                yield response, response, True

    @staticmethod
    def forward(ctx, query, key, value, spans, scaling):
        exact = torch.promote_types(query.dtype, torch.float32)  # added up without rounding
        out = torch.zeros_like(query, dtype=exact)
        lse = torch.full_like(query[..., 0], -torch.inf, dtype=exact)
        for queries, keys, causal in PackedOnCpu.parts(spans):
            at, seen = slice(*queries), slice(*keys)
            part, part_lse = flash(
                query[:, :, at], key[:, :, seen], value[:, :, seen], is_causal=causal, scale=scaling
            )
            before = lse[:, :, at]
            joint = torch.logaddexp(before, part_lse.to(lse.dtype))
            kept = out[:, :, at] * (before - joint).exp()[..., None]
            out[:, :, at] = kept + part * (part_lse - joint).exp()[..., None]
            lse[:, :, at] = joint
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.spans, ctx.scaling = spans, scaling
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x) for x in (query, key, value)]
        for queries, keys, causal in PackedOnCpu.parts(ctx.spans):
            at, seen = slice(*queries), slice(*keys)
            parts = flash_backward(
                grad[:, :, at],
                query[:, :, at],
                key[:, :, seen],
                value[:, :, seen],
                out[:, :, at],
                lse[:, :, at],
                0.0,
                causal,
                scale=ctx.scaling,
            )
            for total, place, part in zip(grads, (at, seen, seen), parts):
                total[:, :, place] += part
        return *grads, None, None


flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
