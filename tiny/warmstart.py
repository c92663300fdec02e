"""Warm start: teach a tiny policy, from nothing, to read, to copy and to act; then let RL teach it to plan.

    python -m mmhops.build --guessable 1 --out data/warmstart      # more questions alike: no harm where all facts are made up
    python -m tiny.warmstart --data data/warmstart --out assets/tiny-warmstart

The 7B can already read. A policy of a million parameters has to be taught, and taught *copying*, not facts. So every
example plays in a world of its own (`tiny/counterfactual.py`): the real retriever finds real passages, and then all names and
numbers in the episode are replaced by others. Supervised learning on two kinds of examples:

- **Reading drills.** One search turn, its passages, the answer; or two passages, two numbers, which is larger; or rows
  of numbers to compare.
- **Scripted episodes**, with deliberate sloppiness: an honest one in `good`; one that answers before it has looked
  everything up in `early`; one with a broken tag in `malformed`; one that forgets a hop in `wrong`. The policy learns
  all the skills and a habit of using them badly. What is left is planning, and that is what RL has to find.

Three stages. "read" is drills, then episodes and drills. "compare", twice, goes on with numbers weighted up: which of two
is larger hangs on one token among hundreds, and is learned only when that token counts.

A fourth, "remember", is for an ablation: the policy learns the answers to some training questions by heart, as a large one
knows much of what it is asked, and answers them from memory half of the time. It can then be tempted not to search:

    mkdir -p runs && cp -r assets/tiny-warmstart runs/remembers
    python -m tiny.warmstart --out runs/remembers --stages read compare compare remember

`--style good` trains on honest episodes alone, for comparison.
"""

import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Literal

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: spinning OpenMP threads stall shared machines

import torch

import rollout
from data import Question, load_questions
from mmhops.build import ATTRIBUTES, RELATIONS, World, query
from model import load_policy, token_logprobs
from retrieval import KnowledgeBase
from reward import normalize
from tiny.counterfactual import Counterfactual, Names
from tiny.model import build_tiny
from tiny.teacher import Teacher, say

MIXES = {
    "sloppy": {"good": 0.30, "early": 0.30, "malformed": 0.20, "wrong": 0.20},
    "good": {"good": 1.0},
}


def corpus(world: World, train: list[Question]):
    """Texts for the tokenizer: what is asked, what is read, and every name many times, so that most are few tokens."""
    asked = sorted(
        {
            e["field"]
            for entity in world.entities.values()
            for e in {**entity["relations"], **entity["attributes"]}.values()
        }
    )
    yield from (question.problem.replace("<image>", "") for question in train[:2000])
    for entity in world.entities.values():
        for field in asked:
            for row in entity["rows"].get(field, ()):
                yield from [" " + world.texts[row].replace("\n", " ")] * 4
    for name in Names(world).kind:
        yield from [f" {name}"] * 8
    for name in {**RELATIONS, **ATTRIBUTES}:
        yield from [
            say("it is", "text_search", query(name, "")),
            "identify image 1 I will guess image 2 is",
            "Image 1: Doc 1(Title: ) Doc 2(Title: )",
        ] * 20


def number_response(model, processor, teacher: Teacher, cfg) -> rollout.Response:
    question = Question("numbers", "Which is larger?", (), "", (), "String", "Compare")
    row = rollout.Row(question, rollout.build_prompt(model, processor, question, cfg))
    for text, scored in teacher.number_drill():
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        row.add(ids, [0.0] * len(ids) if scored else None)
    return row.response()


def response(processor, question: Question, prompt, turns: list, cfg) -> rollout.Response:
    """A scripted episode as a response, laid out exactly as a rollout is."""
    row, tokenizer = rollout.Row(question, prompt), processor.tokenizer
    for text, lines in turns:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not text.endswith(("_search>", "answer>")):
            ids.append(tokenizer.eos_token_id)  # a turn whose action was not closed ends like this
        row.add(ids, [0.0] * len(ids))
        if lines:
            row.add(rollout.observation_ids(tokenizer, lines, cfg.max_obs_tokens))
    return row.response()


@dataclass
class Args:
    """Write a warm-started tiny policy. A command that was stopped goes on with the stage it was in."""

    kb: Path = Path("data/kb")
    data: Path = Path("data/mmhops")
    out: Path = Path("assets/tiny-warmstart")
    style: Literal["sloppy", "good"] = "sloppy"  # which scripted episodes
    drill_steps: int = 600  # "read": steps on drills alone
    steps: int = 1400  # "read": steps on episodes and drills
    compare_steps: int = 400  # "compare": steps half of whose loss is numbers
    remember_steps: int = 600  # "remember"
    by_heart: int = 300  # …the answers to the first of the training questions, this many
    stages: tuple[str, ...] = ("read", "compare", "compare")
    batch: int = 64  # drills a step; half as many episodes
    lr: float = 3e-3  # AdamW, cosine to 5%; a third of it after "read"
    drill_share: float = 0.3  # of the steps on episodes and drills
    seed: int = 0


def learn(stage: str, args: Args, cfg, teacher: Teacher, train: list[Question], model, processor):
    """Train the model through a stage; yields the loss of every step. Twice the same on the same machine."""
    rng = random.Random(args.seed)
    prompt_of = cache(lambda question: rollout.build_prompt(model, processor, question, cfg))

    def numbers(n):
        return [number_response(model, processor, teacher, cfg) for _ in range(n)]

    def drills(n):
        made = []
        while len(made) < n:
            drill = teacher.drill()
            if drill:
                question = Question("drill", drill[0], (), "", (), "String", "Bridge")
                made.append(
                    response(
                        processor,
                        question,
                        rollout.build_prompt(model, processor, question, cfg),
                        drill[1],
                        cfg,
                    )
                )
        return made

    def episodes(n, questions=train):
        made = []
        while len(made) < n:
            question = rng.choice(questions)
            style = rng.choices(*zip(*MIXES[args.style].items()))[0]
            turns = teacher.episode(question, style, cfg.max_turns)
            if turns:
                made.append(response(processor, question, prompt_of(question), turns, cfg))
        return made

    def remembered(n):
        return [
            response(
                processor, q, prompt_of(q), [(say("I remember", "answer", q.answer), None)], cfg
            )
            for q in rng.choices(known, k=n)
        ]

    known, lr = train[: args.by_heart], args.lr if stage == "read" else args.lr / 3
    total = {
        "read": args.drill_steps + args.steps,
        "compare": args.compare_steps,
        "remember": args.remember_steps,
    }[stage]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / 30, 1) * max(0.05, 0.5 * (1 + math.cos(math.pi * s / total))),
    )
    for step in range(total):
        model.train()
        if stage == "compare":  # two losses of equal weight: a verdict is few tokens among many
            batches = [
                numbers(args.batch * 3 // 4),
                drills(args.batch // 4) + episodes(args.batch // 4),
            ]
        elif (
            stage == "remember"
        ):  # of what is asked about a known question, half is answered from memory
            batches = [
                remembered(args.batch // 2)
                + episodes(args.batch // 2, known)
                + episodes(args.batch // 4)
            ]
        elif step < args.drill_steps or rng.random() < args.drill_share:
            batches = [numbers(args.batch // 4) + drills(args.batch * 3 // 4)]
        else:
            batches = [episodes(args.batch // 2)]
        loss = 0.0
        for batch in batches:
            batch.sort(key=lambda t: len(t.token_ids))
            tokens, quarter = sum(int(t.policy_mask.sum()) for t in batch), max(1, len(batch) // 4)
            for start in range(
                0, len(batch), quarter
            ):  # short with short: padding costs as much as text
                part = (
                    -token_logprobs(model, batch[start : start + quarter])[0].sum()
                    / tokens
                    / len(batches)
                )
                part.backward()
                loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss


def main(args: Args):
    from evaluation.ask import ask_all
    from evaluation.summary import summarize
    from train import PRESETS

    cfg, world, kb, train = (
        PRESETS["tiny"],
        World(args.kb),
        KnowledgeBase.open(args.kb),
        load_questions(args.data, "train"),
    )
    validation, path = load_questions(args.data, "validation"), args.out / "recipe.json"
    recipe = {f.name: getattr(cfg, f.name) for f in fields(rollout.RolloutConfig)} | {
        "warmstart": asdict(args) | {"losses": {}}
    }
    if path.exists():
        recipe["warmstart"]["losses"] = json.loads(path.read_text())["warmstart"]["losses"]
    else:
        build_tiny(args.out, corpus(world, train), seed=args.seed)
    for number, stage in enumerate(args.stages):
        if f"{number} {stage}" in recipe["warmstart"]["losses"]:
            continue
        losses, started, again = [], time.time(), args.stages[:number].count(stage)
        model, processor = load_policy(args.out, dtype=torch.float32)
        print(
            f"{stage}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens"
        )
        teacher = Teacher(kb, world, cfg.topk, args.seed + again)
        for loss in learn(
            stage, replace(args, seed=args.seed + again), cfg, teacher, train, model, processor
        ):
            losses.append(round(loss, 4))
            if len(losses) % 50 == 1:
                print(
                    f"step {len(losses) - 1:4d}  loss {loss:.3f}  {time.time() - started:.0f} s",
                    flush=True,
                )
        model.half().save_pretrained(args.out)
        recipe["warmstart"]["losses"][f"{number} {stage}"] = losses
        path.write_text(json.dumps(recipe, default=str))
    model, processor = load_policy(args.out, dtype=torch.float32)
    teacher = Teacher(kb, world, cfg.topk, args.seed)
    print(
        "copied rightly, by field:", json.dumps(copy_accuracy(model, processor, kb, teacher, cfg))
    )
    print(
        "compared rightly:",
        comparison_accuracy(
            model, processor, teacher, [q for q in validation if q.split == "Compare"], cfg
        ),
    )
    model.eval()
    sampled = ask_all(
        lambda questions, generator: rollout.sample(
            model, processor, kb, questions, replace(cfg, group_size=1), generator
        ),
        validation,
    )
    print("held-out accuracy, sampled:", summarize(sampled)["overall"])


def copy_accuracy(model, processor, kb, teacher: Teacher, cfg, each: int = 40) -> dict:
    """Of look-ups of real facts whose passage was found: how often the answer copied is the one that stands there, by field."""
    rng, out = random.Random(1), {}
    greedy = replace(cfg, group_size=1, temperature=0.0)
    for name in {**RELATIONS, **ATTRIBUTES}:
        pairs = rng.sample(
            pool := [entity for entity, other in teacher.pairs if other == name],
            min(each, len(pool)),
        )
        questions = [
            Question(
                str(i),
                f"What is {RELATIONS[name][0].format(e['title'])}?"
                if name in RELATIONS
                else ATTRIBUTES[name][0].format(e["title"]),
                (),
                "",
                (),
                "String",
                "Bridge",
            )
            for i, e in enumerate(pairs)
        ]
        right = []
        for entity, t in zip(pairs, rollout.sample(model, processor, kb, questions, greedy)):
            hop = teacher.world.text_hop(entity, name)
            if any(hit.row in hop["rows"] for turn in t.turns for hit in turn.hits):
                right.append(normalize(t.answer or "") == normalize(hop["result"]))
        out[name] = (round(sum(right) / max(1, len(right)), 3), len(right))
    return out


@torch.no_grad()
def comparison_accuracy(
    model, processor, teacher: Teacher, questions: list[Question], cfg
) -> tuple[float, int]:
    """Of honest comparisons, both values read: how often the right one of the two names is the likelier verdict; their number."""
    right = []
    for question in questions:
        prompt, w = (
            rollout.build_prompt(model, processor, question, cfg),
            Counterfactual(teacher.names, teacher.rng),
        )
        *turns, (thought, action, winner, _) = teacher.compare_steps(question, "good", w)
        if " so " not in thought:
            continue
        before = [(say(*turn[:3]), turn[3]) for turn in turns]
        loser = next(
            name for name in (w(hop.result) for hop in question.hops[:2]) if name != winner
        )
        both = [
            response(
                processor,
                question,
                prompt,
                [*before, (say(thought.removesuffix(winner) + name, action, name), None)],
                cfg,
            )
            for name in (winner, loser)
        ]
        scores = token_logprobs(model, both)[0].sum(1)
        right.append(bool(scores[0] > scores[1]))
    return round(sum(right) / max(1, len(right)), 3), len(right)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args))
