"""Multi-turn rollouts side by side: ours, and Hugging Face `generate` from scratch every turn.

    python benchmarks/rollout.py                            # the paper's lengths, a small policy, two CPU cores: 40 minutes
    python benchmarks/rollout.py --questions 4 --repeats 1 --json
    python benchmarks/rollout.py --turns 1 2 3 4 --no-peer  # what one more turn costs
    python benchmarks/rollout.py --tiny                     # the tiny preset's own lengths
    python benchmarks/rollout.py --profile                  # where our time goes

Both sample from the same policy, for the same questions, the same number of tokens: a prompt of about 1,300 tokens, of which 992
are a picture's; per turn 100 sampled tokens, then an observation of 300 to 700; four of them, and an answer turn. A policy
with random weights calls no tools, so turns end by their budget and the observations are given. The runs are interleaved
(A B A B …); medians and their ratio are printed, with `--json` one JSON object as the last line.

`generate` is used as its documentation recommends for batches: left padding, a cache inside the turn, SDPA, no gradients.
What it cannot do is keep the cache between turns of a batch, or share a prompt's among its responses.
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
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    # glibc gives every freed block of 32 MB or more back to the system. A cache that is concatenated anew for each token
    # then costs `generate` a third of its time in page faults. Memory is kept here, for every system that is timed.
    libc.mallopt(-4, 0), libc.mallopt(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD

import numpy as np
import torch
from PIL import Image

import rollout
from config import PRESETS
from data import Question
from model import load_policy
from retrieval import Hit
from rollout import observation_ids
from tiny.model import build_tiny


@dataclass
class Args:
    """Time rollouts."""

    questions: int = 16
    group_size: int = 8
    turns: tuple[int, ...] = (4,)  # tool turns; each number is timed
    hidden: int = 256
    layers: int = 6
    image: tuple[int, int] = (896, 868)  # pixels: 992 merged tokens
    question_tokens: int = 300
    turn_tokens: int = 100
    observation_tokens: int = 500
    spread: float = (
        0.4  # lengths of observations vary by this much around the mean; 0: all the same
    )
    repeats: int = 3
    device: str = "cpu"
    dtype: str = "float32"
    peer: bool = True  # --no-peer: time ours alone
    peer_rows: int = 8  # rows that `generate` gets at once; on a CPU it is slower with 32
    tiny: bool = False  # the tiny preset's lengths and size instead of the above
    profile: bool = False
    json: bool = False


class Shelf:
    """A knowledge base that always finds a passage of the wanted length."""

    seconds = 0.0

    def __init__(self, text: str):
        self.hit = Hit("Title", text, 1.0, 0)

    def text_search(self, queries, k):
        return [[self.hit] for _ in queries]

    def image_search(self, images, k):
        return [[self.hit] for _ in images]


def make(args: Args, folder: Path):
    """A policy with random weights, its questions and a knowledge base."""
    words = "".join(f" w{i}" for i in range(3000))
    build_tiny(
        folder,
        [words] * 3,
        vocab_size=4096,
        hidden=args.hidden,
        layers=args.layers,
        heads=args.hidden // 64,
        kv_heads=args.hidden // 128,
        mlp=3 * args.hidden,
    )
    processing, pixels = (
        json.loads((folder / "preprocessor_config.json").read_text()),
        args.image[0] * args.image[1],
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps(processing | {"min_pixels": pixels, "max_pixels": pixels})
    )
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["max_position_embeddings"] = 16_384
    (folder / "config.json").write_text(json.dumps(settings))
    model, processor = load_policy(folder, getattr(torch, args.dtype), "sdpa", args.device)
    tokenizer = processor.tokenizer
    model.sampling_bias[tokenizer.eos_token_id] = -torch.inf
    model.sampling_bias[
        rollout.closing_tokens(model, tokenizer)
    ] = -torch.inf  # no turn ends before its budget
    text = tokenizer.decode(tokenizer(words)["input_ids"][: args.question_tokens])
    questions = []
    for n in range(args.questions):
        path = folder / f"{n}.png"
        Image.fromarray(
            np.random.default_rng(n).integers(
                0, 255, (args.image[1], args.image[0], 3), dtype=np.uint8
            )
        ).save(path)
        questions.append(
            Question(str(n), "<image>" + text, (path,), "x", ["x"], "String", "Bridge", None, None)
        )
    return (
        model.eval(),
        processor,
        questions,
        Shelf(" ".join(words.split()[: args.observation_tokens])),
    )


def observation(args: Args, tokenizer, kb, row: int, turn: int) -> list[int]:
    """What row number `row` reads after a turn: the same in every run and for every system."""
    low, high = (round(args.observation_tokens * (1 + sign * args.spread)) for sign in (-1, 1))
    return observation_ids(
        tokenizer, rollout.text_lines([kb.hit]), random.Random(f"{row} {turn}").randint(low, high)
    )


def sampled(args: Args, model, processor, kb, questions, cfg) -> list:
    """Responses, sampled as train.py does, every turn a text search."""

    def act(live, kb, cfg, last_turn):
        for number, row in enumerate(live):
            row.turns.append(rollout.Turn("", "text_search", "q", True))
            row.lines, row.stop = (
                observation(args, processor.tokenizer, kb, number, len(row.turns)),
                "turns" if last_turn else "",
            )

    with patch.multiple(rollout, act=act, observation_ids=lambda tokenizer, ids, most: ids):
        return rollout.sample(
            model,
            processor,
            kb,
            questions,
            cfg,
            torch.Generator(model.sampling_bias.device).manual_seed(0),
        )


def ours(args: Args, model, processor, kb, questions, cfg) -> int:
    """The number of sampled tokens."""
    return sum(
        int(t.policy_mask.sum()) for t in sampled(args, model, processor, kb, questions, cfg)
    )


@torch.no_grad()
def from_scratch(args: Args, model, processor, kb, questions, cfg) -> int:
    """Every turn: the whole text so far, with its picture, through `generate`."""
    tokenizer, device, sampled = processor.tokenizer, model.sampling_bias.device, 0
    model.config.get_text_config()._attn_implementation = "sdpa"
    prompts = [
        rollout.build_prompt(model, processor, question, cfg)
        for question in questions
        for _ in range(cfg.group_size)
    ]
    texts = [prompt.token_ids.tolist() for prompt in prompts]
    bad = torch.isinf(model.sampling_bias)

    def allowed(_, scores):
        return scores.masked_fill(bad, -torch.inf)

    for turn in range(cfg.max_turns + 1):
        new = []
        for start in range(0, len(texts), args.peer_rows):
            chunk = rollout.pad_left(
                texts[start : start + args.peer_rows], tokenizer.pad_token_id, device
            )
            model.model.rope_deltas = None
            images = rollout.vision_inputs(prompts[start : start + args.peer_rows], device)
            kinds = (chunk["input_ids"] == model.config.image_token_id).int()
            out = model.generate(
                **chunk,
                **images,
                mm_token_type_ids=kinds,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                min_new_tokens=cfg.max_turn_tokens,
                max_new_tokens=cfg.max_turn_tokens,
                logits_processor=[allowed],
            )
            new += out[:, chunk["input_ids"].shape[1] :].tolist()
        sampled += sum(map(len, new))
        if turn < cfg.max_turns:
            texts = [
                text + ids + observation(args, tokenizer, kb, row, turn + 1)
                for row, (text, ids) in enumerate(zip(texts, new))
            ]
    model.config.get_text_config()._attn_implementation = "shared_prompt"
    return sampled


def profile(args: Args, model, processor, kb, questions):
    """Print which operations a rollout of ours spends its time in."""
    from torch.profiler import ProfilerActivity

    cuda = args.device.startswith("cuda")
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    ) as run:
        ours(args, model, processor, kb, questions, config(args, args.turns[-1]))
    print(
        run.key_averages().table(
            sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total",
            row_limit=12,
            max_name_column_width=45,
        )
    )


def chosen(args: Args) -> Args:
    """With the tiny preset's lengths and size, where they are asked for."""
    small = dict(
        image=(56, 56),
        question_tokens=27,
        turn_tokens=12,
        observation_tokens=60,
        hidden=128,
        layers=4,
        peer_rows=32,
    )
    return replace(args, **small) if args.tiny else args


def config(args: Args, turns: int):
    return replace(
        PRESETS["tiny"],
        group_size=args.group_size,
        max_turns=turns,
        max_turn_tokens=args.turn_tokens,
        max_obs_tokens=args.observation_tokens,
        max_tokens=100_000,
    )


def main(args: Args):
    from rich.console import Console
    from rich.table import Table

    args = chosen(args)
    sync = torch.cuda.synchronize if args.device.startswith("cuda") else (lambda: None)
    with tempfile.TemporaryDirectory() as folder:
        model, processor, questions, kb = make(args, Path(folder))
        table, result = (
            Table("tool turns", "sampled tokens", "ours, s", "from scratch, s", "ratio"),
            {"by_turns": {}},
        )
        if args.profile:
            return profile(args, model, processor, kb, questions)
        for turns in args.turns:
            cfg = config(args, turns)
            times, counts = {ours: [], from_scratch: []}, {}
            for _ in range(args.repeats):
                for how in (ours, from_scratch)[: 1 + args.peer]:
                    sync()
                    started = time.perf_counter()
                    counts[how] = how(args, model, processor, kb, questions, cfg)
                    sync()
                    times[how].append(time.perf_counter() - started)
                    print(
                        f"  {turns} tool turns, {how.__name__}: {times[how][-1]:.1f} s", flush=True
                    )
            assert set(counts.values()) == {
                args.questions * args.group_size * args.turn_tokens * (turns + 1)
            }, counts
            mine, theirs = (
                statistics.median(times[how] or [float("nan")]) for how in (ours, from_scratch)
            )
            table.add_row(
                str(turns),
                str(counts[ours]),
                f"{mine:.1f}",
                f"{theirs:.1f}",
                f"{theirs / mine:.2f}×",
            )
            result["by_turns"][turns] = {"ours": round(mine, 3)}
            if args.peer:
                result["by_turns"][turns] |= {
                    "from_scratch": round(theirs, 3),
                    "ratio": round(theirs / mine, 3),
                }
                result["ratio_vs_hf"] = round(theirs / mine, 3)
    Console().print(table)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
