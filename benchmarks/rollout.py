"""Multi-turn rollouts side by side: ours, and Hugging Face `generate` from scratch every turn.

    python benchmarks/rollout.py                            # the paper's lengths: 40 minutes
    python benchmarks/rollout.py --questions 4 --repeats 1 --json
    python benchmarks/rollout.py --turns 1 2 3 4 --no-peer  # what one more turn costs
    python benchmarks/rollout.py --tiny                     # the tiny preset's own lengths
    python benchmarks/rollout.py --profile                  # where our time goes

Both sample from the same small policy with random weights, for the same questions, the same number
of tokens. Such a policy calls no tools: its turns end by their budget, and observations are given.
The runs are interleaved (A B A B …); the medians and their ratio are printed.
"""

import ctypes
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# glibc gives every freed block of 32 MB or more back to the system. A cache that is concatenated
# anew for each token then costs `generate` a third of its time in page faults. Memory is kept
# here, for every system that is timed.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
if sys.platform == "linux":
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)

import numpy as np
import torch
from PIL import Image

from config import PRESETS, Config
from data import Question
from engine import shared_prompt
from engine.packing import pad_left, vision_inputs
from engine.samplers import SharedPromptSampler
from engine.text import closing_tokens, observation_ids
from model import Policy, load_policy
from retrieval import Hit
from rollout import CLOSING, Response, build_prompt, new_response, text_lines
from tiny.model import build_tiny

WORDS = [f"w{i}" for i in range(3000)]  # what questions and passages are made of


# fmt: off
@dataclass
class Args:
    """Time rollouts. The default lengths are the paper's: a prompt of about 1,300 tokens."""

    questions: int = 16
    group_size: int = 8
    turns: tuple[int, ...] = (4,)  # turns that search, before the one that answers; each is timed
    hidden: int = 256
    layers: int = 6
    image: tuple[int, int] = (896, 868)  # pixels: 992 merged tokens
    question_tokens: int = 300
    turn_tokens: int = 100
    observation_tokens: int = 500
    spread: float = 0.4       # observations are up to this much shorter or longer; 0: all the same
    repeats: int = 3
    device: str = "cpu"
    dtype: str = "float32"
    peer: bool = True         # --no-peer: time ours alone
    peer_rows: int = 8        # responses that `generate` gets at once; on a CPU 32 are slower
    tiny: bool = False        # the tiny preset's lengths and size instead of the above
    profile: bool = False     # only print the operations that ours spends its time in
    json: bool = False        # one JSON object as the last line
# fmt: on


# ------------------------------------------------------------------------ what both are given


def with_preset(args: Args) -> Args:
    """With the tiny preset's lengths and size, where they are asked for."""
    if not args.tiny:
        return args
    return replace(
        args,
        image=(56, 56),
        question_tokens=27,
        turn_tokens=12,
        observation_tokens=60,
        hidden=128,
        layers=4,
        peer_rows=32,
    )


def rollout_config(args: Args, turns: int) -> Config:
    return replace(
        PRESETS["tiny"],
        group_size=args.group_size,
        max_turns=turns,
        max_turn_tokens=args.turn_tokens,
        max_obs_tokens=args.observation_tokens,
        max_tokens=100_000,  # no response is ever cut
    )


def tokens_to_sample(args: Args, turns: int) -> int:
    """Every turn of every response spends its whole budget."""
    return args.questions * args.group_size * (turns + 1) * args.turn_tokens


def make(args: Args, folder: Path) -> tuple[Policy, list[Question]]:
    """A policy with random weights, written to `folder`, and its questions with their pictures."""
    policy = build_policy(args, folder)
    tokenizer = policy.tokenizer
    ids = tokenizer(" " + " ".join(WORDS))["input_ids"]
    text = tokenizer.decode(ids[: args.question_tokens])
    questions = []
    for n in range(args.questions):
        path = folder / f"{n}.png"
        save_noise(path, args.image, seed=n)
        question = Question(
            str(n), "<image>" + text, (path,), "x", ["x"], "String", "Bridge", None, None
        )
        questions.append(question)
    return policy, questions


def build_policy(args: Args, folder: Path) -> Policy:
    """A small Qwen2.5-VL that takes pictures of args.image, and never ends a turn by itself."""
    # 1) write it
    build_tiny(
        folder,
        [" " + " ".join(WORDS)] * 3,
        vocab_size=4096,
        hidden=args.hidden,
        layers=args.layers,
        heads=args.hidden // 64,
        kv_heads=args.hidden // 128,
        mlp=3 * args.hidden,
    )
    # 2) larger pictures and longer texts than the tiny policy's
    width, height = args.image
    processing_file, config_file = folder / "preprocessor_config.json", folder / "config.json"
    processing = json.loads(processing_file.read_text())
    processing["min_pixels"] = processing["max_pixels"] = width * height
    processing_file.write_text(json.dumps(processing))
    config = json.loads(config_file.read_text())
    config["text_config"]["max_position_embeddings"] = 16_384
    config_file.write_text(json.dumps(config))
    # 3) load it; what could end a turn before its budget is forbidden
    policy = load_policy(folder, getattr(torch, args.dtype), "sdpa", args.device)
    policy.model.eval()
    closing = [token for token, closes in enumerate(closing_tokens(policy.tokenizer)) if closes]
    policy.bias[[policy.tokenizer.eos_token_id, *closing]] = -torch.inf
    return policy


def save_noise(path: Path, size: tuple[int, int], seed: int):
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def observation_lengths(args: Args) -> tuple[int, int]:
    """Tokens of the shortest and of the longest observation."""
    shortest = round(args.observation_tokens * (1 - args.spread))
    longest = round(args.observation_tokens * (1 + args.spread))
    return shortest, longest


def observation(args: Args, tokenizer, number: int, turn: int) -> list[int]:
    """Token ids that response `number` reads after turn 1, 2, …: the same for every system."""
    length = random.Random(f"{number} {turn}").randint(*observation_lengths(args))
    passage = Hit("Title", " ".join(WORDS[: args.observation_tokens]), 1.0, 0)
    return observation_ids(tokenizer, text_lines([passage]), length)


# ------------------------------------------------------------------------------------ the two


def sample_forced(args: Args, policy: Policy, questions, cfg: Config) -> list[Response]:
    """G responses per question, as rollout.sample; only what comes back after a turn is given."""
    # 1) as rollout.sample
    prompts = [build_prompt(policy, question, cfg) for question in questions]
    responses = [
        new_response(question, prompt)
        for question, prompt in zip(questions, prompts)
        for _ in range(cfg.group_size)
    ]
    generator = torch.Generator(policy.device).manual_seed(0)
    sampler = SharedPromptSampler(policy, responses, cfg, CLOSING, generator)
    # 2) as rollout.run_episodes, with given observations in the place of `act`
    for turn in range(cfg.max_turns + 1):
        sampler.read(responses)
        sampler.write(responses)
        if turn < cfg.max_turns:
            for number, response in enumerate(responses):
                response.append(observation(args, policy.tokenizer, number, turn + 1))
    return responses


def ours(args: Args, policy: Policy, questions, cfg: Config) -> int:
    """The number of sampled tokens."""
    responses = sample_forced(args, policy, questions, cfg)
    return sum(int(response.policy_mask.sum()) for response in responses)


@torch.no_grad()
def from_scratch(args: Args, policy: Policy, questions, cfg: Config) -> int:
    """The number of sampled tokens. Every turn gives `generate` the whole text so far, with its
    picture.

    It is used as its documentation recommends for batches: left padding, a cache inside the turn,
    SDPA, no gradients. It cannot keep a batch's cache between turns, or share a prompt's among its
    responses.
    """
    text_config = policy.model.config.get_text_config()
    text_config._attn_implementation = "sdpa"
    prompts = [
        build_prompt(policy, question, cfg) for question in questions for _ in range(cfg.group_size)
    ]
    texts = [prompt.token_ids.tolist() for prompt in prompts]
    sampled = 0
    for turn in range(cfg.max_turns + 1):
        written = []  # the turn's token ids, per response
        for start in range(0, len(texts), args.peer_rows):
            some = slice(start, start + args.peer_rows)
            written += generate_turn(policy, prompts[some], texts[some], cfg)
        sampled += sum(map(len, written))
        if turn < cfg.max_turns:
            for number, ids in enumerate(written):
                texts[number] += ids + observation(args, policy.tokenizer, number, turn + 1)
    text_config._attn_implementation = shared_prompt.NAME
    return sampled


def generate_turn(policy: Policy, prompts: list, texts: list[list[int]], cfg) -> list[list[int]]:
    """The token ids that `generate` adds to each text."""
    model = policy.model
    ids, mask = pad_left(texts, policy.tokenizer.pad_token_id, policy.device)  # (N, L)
    forbidden = torch.isinf(policy.bias)

    def forbid(_, scores):
        return scores.masked_fill(forbidden, -torch.inf)

    model.model.rope_deltas = None  # hidden state of an earlier call
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        **vision_inputs(prompts, policy.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        min_new_tokens=cfg.max_turn_tokens,
        max_new_tokens=cfg.max_turn_tokens,
        logits_processor=[forbid],
    )
    return out[:, ids.shape[1] :].tolist()


# ---------------------------------------------------------------------------------- the clock


def compare(args: Args, policy: Policy, questions, turns: int) -> dict[str, float]:
    """{system: its median seconds}, and their "ratio" where both are timed."""
    cfg = rollout_config(args, turns)
    systems = (ours, from_scratch) if args.peer else (ours,)
    seconds = {system.__name__: [] for system in systems}
    for _ in range(args.repeats):
        for system in systems:
            started = now(args)
            count = system(args, policy, questions, cfg)
            took = now(args) - started
            assert count == tokens_to_sample(args, turns), (system.__name__, count)
            seconds[system.__name__].append(took)
            print(f"  {turns} tool turns, {system.__name__}: {took:.1f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    if args.peer:
        medians["ratio"] = medians["from_scratch"] / medians["ours"]
    return {name: round(value, 3) for name, value in medians.items()}


def now(args: Args) -> float:
    """Seconds, once the device has done all it was asked to."""
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def profile(args: Args, policy: Policy, questions):
    """Print which operations a rollout of ours spends its time in."""
    from torch.profiler import ProfilerActivity

    activities, clock = [ProfilerActivity.CPU], "cpu"
    if args.device.startswith("cuda"):
        activities, clock = [*activities, ProfilerActivity.CUDA], "cuda"
    with torch.profiler.profile(activities=activities) as run:
        ours(args, policy, questions, rollout_config(args, args.turns[-1]))
    averages = run.key_averages()
    order = f"self_{clock}_time_total"
    print(averages.table(sort_by=order, row_limit=12, max_name_column_width=45))


def main(args: Args):
    from rich.console import Console
    from rich.table import Table

    args = with_preset(args)
    table = Table("tool turns", "sampled tokens", "ours, s", "from scratch, s", "ratio")
    result = {"by_turns": {}}
    with tempfile.TemporaryDirectory() as folder:
        policy, questions = make(args, Path(folder))
        if args.profile:
            profile(args, policy, questions)
            return
        for turns in args.turns:
            times = compare(args, policy, questions, turns)
            result["by_turns"][turns] = times
            cells = [str(turns), str(tokens_to_sample(args, turns)), f"{times['ours']:.1f}"]
            if args.peer:
                result["ratio_vs_hf"] = times["ratio"]
                cells += [f"{times['from_scratch']:.1f}", f"{times['ratio']:.2f}×"]
            table.add_row(*cells)
    Console().print(table)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
