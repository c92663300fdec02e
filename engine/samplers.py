"""How a policy writes its turns. The loop in rollout.py calls a sampler's methods alternately:

    sampler.read(active)     what the active responses hold and the sampler has not seen yet: their
                             prompts, later the observations
    sampler.write(active)    one turn each: appends tokens and log-probabilities, sets `turn_text`

It knows nothing of actions, observations or rewards: it is given token ids, and a rule that says
when a turn ends.

- `SharedPromptSampler` keeps a cache over all turns, in which a prompt is stored once for its G
  responses. The default.
- `GenerateSampler` calls Hugging Face's `generate` on everything so far, every turn: the textbook,
  and the reference that tests compare the other one with.
- `ServedSampler` (engine/served.py) asks an inference server.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.distributed import alone, call_sharded
from engine.graph import BLOCK, RecordedStep, recorder
from engine.packing import pad_left, vision_inputs
from engine.served import ServedSampler
from engine.shared_prompt import SharedCache
from engine.text import turn_end
from engine.turns import add_turn, is_greedy, turn_room
from model import Policy, blank_image, sampled_distribution

CHUNK_TOKENS = 16_384  # of observations that are fed at once
GENERATE_LOGITS = 2**30  # scores that `generate` keeps at once: 4 GiB in float32


@dataclass
class Row:
    """A response in the batch, and its turn in the making."""

    response: object
    number: int  # among all responses
    start: int  # the position (M-RoPE coordinate) of the first token after its prompt
    greedy: bool
    cached: int = 0  # how many of its own tokens the cache holds
    turn: list[int] = field(default_factory=list)  # token ids
    logprobs: list[float] = field(default_factory=list)
    room: int = 0  # tokens that the turn may have
    writes: bool = False  # the turn has not ended


class SharedPromptSampler:
    """Feeds every token once: prompts, then each sampled token, then an observation as one chunk.

    Rank and cache details that the loop need not know live here: left-padded chunks, positions,
    responses that wait for longer ones, and, where ranks run in lockstep (engine/distributed.py),
    the dummy response of a rank that has none left.
    """

    def __init__(
        self, policy: Policy, responses: list, cfg, closing, generator=None, any_left=alone
    ):
        """
        responses: question-major, group_size per prompt, nothing written yet
        closing: the texts that end a turn
        generator: a torch.Generator on the policy's device; None is the global one
        any_left: asked, before a pass that another rank may not need, whether any has one left
        """
        self.policy, self.cfg = policy, cfg
        self.tokenizer = policy.tokenizer
        self.closing, self.generator, self.any_left = closing, generator, any_left
        self.rows = [
            Row(response, number, response.prompt.next_position, is_greedy(response, cfg))
            for number, response in enumerate(responses)
        ]  # in the cache's order
        record = recorder(policy.model, policy.device, cfg.graph)
        self.recorded = RecordedStep(record)
        self.block = 1 if record is None else BLOCK  # of the cache's places
        self.cache = None
        self.logits = None  # (N, V): of what follows the last token fed
        self.finished = False  # no rank has a response left

    @torch.no_grad()
    def read(self, active: list):
        """Feed what the active responses hold and the cache does not: prompts, observations.

        Raises FloatingPointError where the logits are not finite.
        """
        if self.cache is None:
            self.read_prompts()
        elif not self.finished and self.any_left(bool(active)):
            self.read_observations(active)
        else:
            self.finished = True

    def read_prompts(self):
        """Prefill each prompt once, left-padded so that all end together."""
        prompts = list({id(row.response.prompt): row.response.prompt for row in self.rows}.values())
        group_size = len(self.rows) // len(prompts)
        model, device = self.policy.model, self.policy.device
        ids, mask = pad_left(
            [prompt.token_ids.tolist() for prompt in prompts], self.tokenizer.pad_token_id, device
        )
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = SharedCache(layers, mask, group_size, self.cfg.max_tokens, self.block)
        positions = pad_sequence(
            [prompt.positions.T for prompt in prompts], batch_first=True, padding_side="left"
        ).permute(2, 0, 1)  # (3, Q, P)
        images = vision_inputs(prompts, device)
        if not images:
            call_sharded(model, blank_image, device)  # sharded: all ranks run the vision tower
        logits = self.forward(ids, positions.to(device), **images)
        check_finite(logits)
        self.logits = logits.repeat_interleave(group_size, 0)

    def read_observations(self, active: list):
        """Feed one chunk each: the token that ended the turn, and what came back."""
        device = self.policy.device
        # 1) The others leave. In lockstep a rank without responses keeps one, as a dummy.
        going = {id(response) for response in active}
        places = [i for i, row in enumerate(self.rows) if id(row.response) in going] or [0]
        places.sort(key=lambda i: self.rows[i].number)  # a prompt's responses side by side again
        self.rows = [self.rows[i] for i in places]
        self.cache.keep(torch.tensor(places, device=device))
        # 2) One left-padded chunk of what has not been fed.
        unread = [row.response.own_ids()[row.cached :].tolist() for row in self.rows]
        # the dummy may have nothing unread
        chunks = [ids or [self.tokenizer.pad_token_id] for ids in unread]
        ids, mask = pad_left(chunks, self.tokenizer.pad_token_id, device)
        sizes, width = mask.sum(1), ids.shape[1]
        offset = torch.arange(width, device=device) - (width - sizes)[:, None]
        positions = (self.positions()[:, None] + offset).clamp(min=0)  # (N, T)
        # 3) Some columns at a time: a whole chunk may need more memory than the cache.
        columns = max(1, CHUNK_TOKENS // len(ids))
        start = 0
        while self.any_left(start < width):
            part = slice(start, start + columns)
            held = mask[:, part].sum(1)
            if start >= width:  # in lockstep, others have more columns: the last one, to no place
                part, held = slice(width - 1, width), torch.zeros_like(sizes)
            self.cache.begin_chunk(held, ids[:, part].shape[1])
            logits = self.forward(ids[:, part], positions[None, :, part].expand(3, -1, -1))
            self.logits = logits if start < width else self.logits
            start += columns
        for row, chunk in zip(self.rows, chunks):
            row.cached += len(chunk)

    def positions(self) -> Tensor:
        """(N,) of each row's next token; text counts on from the prompt."""
        return torch.tensor(
            [row.start + row.cached for row in self.rows], device=self.policy.device
        )

    @torch.no_grad()
    def write(self, active: list):
        """Token by token, all responses at once; one whose turn has ended waits for the others."""
        if self.finished:
            return
        ends_turn = turn_end(self.tokenizer, self.closing)
        wanted = {id(response) for response in active}
        for row in self.rows:
            row.turn, row.logprobs = [], []
            row.room = turn_room(row.response, self.cfg)
            row.writes = id(row.response) in wanted
        logits, position = self.logits, self.positions()
        batch = self.rows  # those that are fed: the first ones in the cache
        while True:
            # 1) sample a token for everyone, keep it where the turn goes on
            distribution = sampled_distribution(logits, self.policy.bias, self.cfg.temperature)
            greedy = [row.greedy for row in batch]
            tokens = choose(distribution, greedy, self.cfg.top_p, self.generator)
            chosen = distribution.gather(1, tokens[:, None])[:, 0]
            for row, token, logprob in zip(batch, tokens.tolist(), chosen.tolist()):
                if row.writes:
                    row.turn.append(token)
                    row.logprobs.append(logprob)
                    row.writes = not ends_turn(row.turn) and len(row.turn) < row.room
            writing = [i for i, row in enumerate(batch) if row.writes]
            if not self.any_left(bool(writing)):
                break
            # 2) where at most half of them still write, they go on alone
            if writing and 2 * len(writing) <= len(batch):
                order = self.put_first(writing)
                batch = self.rows[: len(writing)]
                tokens, position = tokens[order], position[order]
            # 3) feed it; one whose turn has ended is fed, too, into the place that is never read
            is_real = torch.tensor([row.writes for row in batch], device=logits.device)
            logits = self.feed_one(tokens, position, is_real)
            position = position + is_real
        for row in self.rows:
            if row.turn:
                add_turn(row.response, row.turn, row.logprobs, self.tokenizer)
                row.cached += len(row.turn) - 1  # its last token has not been fed

    def put_first(self, writing: list[int]) -> Tensor:
        """Swap these rows with the first ones; from now on only they are fed.

        Returns their numbers, in their new order.
        """
        count = len(writing)
        order = list(range(len(self.rows)))
        to_leave = [i for i in range(count) if not self.rows[i].writes]
        to_come = [i for i in writing if i >= count]
        for i, j in zip(to_leave, to_come):
            order[i], order[j] = j, i
        self.rows = [self.rows[i] for i in order]
        order = torch.tensor(order, device=self.policy.device)
        self.cache.put_first(order, count)
        return order[:count]

    def feed_one(self, tokens: Tensor, positions: Tensor, is_real: Tensor) -> Tensor:
        """A token (N,) per row, at these positions (N,); the scores (N, V) of what follows.

        is_real: (N,) bool, False where the token is not the response's. Where steps are recorded,
        the next call overwrites the scores.
        """
        self.cache.make_room(1)
        kind = self.cache.layout, self.cache.read_width
        return self.recorded(self.compute_one, kind, tokens, positions, is_real)

    def compute_one(self, tokens: Tensor, positions: Tensor, is_real: Tensor) -> Tensor:
        """The part of `feed_one` that a GPU may record: nothing here asks the GPU for a number, or
        uses one of Python's that changes from token to token."""
        self.cache.place_chunk(is_real.long(), 1)
        return self.forward(tokens[:, None], positions[None, :, None].expand(3, -1, -1))

    def forward(self, input_ids: Tensor, position_ids: Tensor, **images) -> Tensor:
        """Feed (N, T) left-padded tokens at (3, N, T); the scores (N, V) of what follows."""
        return self.policy.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask={"full_attention": None},  # shared_prompt.py masks by the cache
            use_cache=False,
            logits_to_keep=1,
            shared_cache=self.cache,
            **images,
        ).logits[:, -1]


class GenerateSampler:
    """Hugging Face `generate`, with its own `DynamicCache` inside a turn.

    Needs whole weights on every rank.
    """

    def __init__(
        self, policy: Policy, responses: list, cfg, closing, generator=None, any_left=alone
    ):
        self.policy, self.cfg = policy, cfg
        self.tokenizer = policy.tokenizer
        self.closing, self.generator, self.any_left = closing, generator, any_left

    def read(self, active: list):
        """Nothing to do: `generate` is given everything again, every turn."""

    @torch.no_grad()
    def write(self, active: list):
        vocabulary = len(self.policy.bias)
        at_once = max(1, GENERATE_LOGITS // (vocabulary * self.cfg.max_turn_tokens))
        greedy = [response for response in active if is_greedy(response, self.cfg)]
        sampled = [response for response in active if not is_greedy(response, self.cfg)]
        with seeded_from(self.generator):
            for responses in (greedy, sampled):
                for start in range(0, len(responses), at_once):
                    self.any_left(True)  # raises where the process was asked to stop
                    self.write_some(responses[start : start + at_once], responses is greedy)

    def write_some(self, responses: list, greedy: bool):
        model, device = self.policy.model, self.policy.device
        ids, mask = pad_left(
            [response.token_ids.tolist() for response in responses],
            self.tokenizer.pad_token_id,
            device,
        )
        width = ids.shape[1]
        room = [turn_room(response, self.cfg) for response in responses]
        ends_turn = turn_end(self.tokenizer, self.closing)

        def ended(i: int, turn: list[int]) -> bool:
            return ends_turn(turn) or len(turn) >= room[i]

        def stop(sequences: Tensor, scores, **kwargs) -> Tensor:
            turns = sequences[:, width:].tolist()
            done = [ended(i, turn) for i, turn in enumerate(turns)]
            return torch.tensor(done, device=device)

        def forbid(sequences, scores: Tensor) -> Tensor:
            if sequences.shape[1] == width:
                check_finite(scores)
            return scores + self.policy.bias

        sampling = {"temperature": self.cfg.temperature, "top_p": self.cfg.top_p, "top_k": 0}
        model.model.rope_deltas = None  # hidden state of an earlier call
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            **vision_inputs([response.prompt for response in responses], device),
            do_sample=not greedy,
            **({} if greedy else sampling),
            max_new_tokens=max(room),
            logits_processor=[forbid],
            stopping_criteria=[stop],
            synced_gpus=False,  # every rank works alone, also under torchrun
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[:, width:]  # (N, T)
        scores = []
        for t, logits in enumerate(out.logits):  # (N, V) each; all at once would be three copies
            distribution = sampled_distribution(logits, self.policy.bias, self.cfg.temperature)
            scores.append(distribution.gather(1, new[:, t : t + 1])[:, 0])
        scores = torch.stack(scores, 1)  # (N, T)
        for i, response in enumerate(responses):
            turn = new[i].tolist()
            length = next(n for n in range(1, len(turn) + 1) if ended(i, turn[:n]))
            add_turn(response, turn[:length], scores[i, :length].tolist(), self.tokenizer)


SAMPLERS = {
    "shared": SharedPromptSampler,
    "generate": GenerateSampler,
    "endpoint": ServedSampler,
}


def check_finite(scores: Tensor):
    """Raises FloatingPointError where what follows a prompt has no finite scores."""
    if not scores.isfinite().all():
        raise FloatingPointError(
            "the policy's scores are not finite: its weights are broken. Go on from an older "
            "checkpoint"
        )


def choose(distribution: Tensor, greedy: list[bool], top_p: float, generator=None) -> Tensor:
    """Tokens (N,) from log-probabilities (N, V): the likeliest in greedy rows, drawn in others.

    Where top_p < 1, from the nucleus (Holtzman et al. 2020): the tokens whose likelier ones have
    less than top_p together; so the likeliest is always one of them.
    """
    if all(greedy):
        return distribution.argmax(-1)
    probabilities = distribution.exp()
    drawn = draw(probabilities, generator)
    while top_p < 1:  # one that is not of the nucleus is drawn again, which needs no sorting
        likelier = probabilities > probabilities.gather(1, drawn)
        outside = (probabilities * likelier).sum(-1, keepdim=True) >= top_p
        if not outside.any():
            break
        drawn = torch.where(outside, draw(probabilities, generator), drawn)
    drawn = drawn[:, 0]
    if not any(greedy):
        return drawn
    return torch.where(torch.tensor(greedy, device=drawn.device), distribution.argmax(-1), drawn)


def draw(weights: Tensor, generator=None) -> Tensor:
    """A number (N, 1) per row of weights (N, V), each as often as its weight says.

    The weights laid end to end, a random point hits one of them. `torch.multinomial` draws a random
    number per weight, ten times slower on a CPU.
    """
    # float64: rounding must not give a weight of zero a share
    ends = weights.cumsum(-1, dtype=torch.float64)  # (N, V)
    point = torch.rand(len(weights), 1, dtype=ends.dtype, device=ends.device, generator=generator)
    return torch.searchsorted(ends, point * ends[:, -1:], right=True)


@contextmanager
def seeded_from(generator):
    """Inside, the global random state is seeded from a generator: `generate` takes none.

    Afterwards it is as before.
    """
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    devices = [generator.device] if generator.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
