"""Warm start: teach a tiny policy, from nothing, to read, to copy and to act; then let RL teach it to plan.

    python warmstart.py --out assets/tiny-warmstart

The 7B can already read. A policy of a million parameters has to be taught, and taught *copying*, not facts. So every
example plays in a world of its own (`counterfactual.py`): the real retriever finds real passages, and then all names and
numbers in the episode are replaced by others. Supervised learning on two kinds of examples, in two stages:

1. **Reading drills.** One search turn, its passages, the answer; or two passages, two numbers, which is larger; or rows
   of numbers to compare.
2. **Scripted episodes**, with deliberate sloppiness: an honest one in `good`; one that answers before it has looked
   everything up in `early`; one with a broken tag in `malformed`; one that forgets a hop in `wrong`. The policy learns
   all the skills and a habit of using them badly. What is left is planning, and that is what RL has to find.

`--style good` trains on honest episodes alone, for comparison.
"""
from __future__ import annotations

import json
import math
import os
import random
import re
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning OpenMP threads stall shared machines

import torch

import rollout
from build_mmhops import ATTRIBUTES, COMPARISONS, PAIR, RELATIONS, World, query
from counterfactual import Counterfactual, Names
from data import Question, load_questions
from model import build_tiny, load_policy, token_logprobs
from retrieval import Hit, KnowledgeBase
from reward import normalize

MIXES = {"sloppy": {"good": 0.30, "early": 0.30, "malformed": 0.20, "wrong": 0.20}, "good": {"good": 1.0}}


def say(thought: str, action: str, argument: str) -> str:
    return f"<think> {thought}</think><{action}> {argument}</{action}>"


def broken(text: str, rng: random.Random) -> str:
    """The turn with one of its tags missing."""
    return rng.choice([lambda: text.replace("</think>", ""), lambda: text.replace("<think>", ""), lambda: re.sub(r"<think>.*</think>", "", text),
                       lambda: re.sub(r"</(image_search|text_search|answer)>", "", text)])()


class Teacher:
    """Writes episodes: [(policy's text, lines that come back or None)]. It reads what the retriever really finds."""

    def __init__(self, kb: KnowledgeBase, world: World, topk: int, seed: int = 0):
        self.kb, self.world, self.topk, self.rng, self.names = kb, world, topk, random.Random(seed), Names(world)
        self.by_title = {entity["title"]: entity for entity in world.entities.values()}
        self.pairs = [(entity, name) for entity in world.entities.values() for name in {**entity["relations"], **entity["attributes"]}
                      if name in RELATIONS or name in ATTRIBUTES]
        self.found = dict(zip([(entity["title"], name) for entity, name in self.pairs],
                              kb.text_search([query(name, entity["title"]) for entity, name in self.pairs], topk)))

    def hits(self, title: str, name: str) -> list[Hit]:
        if (title, name) not in self.found:
            self.found[title, name] = self.kb.text_search([query(name, title)], self.topk)[0]
        return self.found[title, name]

    def look_up(self, title: str, name: str, w: Counterfactual):
        """(lines, result as it is written there or None) of searching for a relation or attribute of a real title."""
        hits, entity = self.hits(title, name), self.by_title.get(title, {"relations": {}, "attributes": {}})
        lines = rollout.text_lines([Hit(w(hit.title), w(hit.text), hit.score, hit.row) for hit in hits])
        if name not in entity["relations"] and name not in entity["attributes"]:
            return lines, None, None
        hop = self.world.text_hop(entity, name)
        shown = any(hit.row in hop["rows"] and w(hop["result"]) in line for hit, line in zip(hits, lines))
        return lines, (w(hop["result"]) if shown else None), hop["result"]

    def guess(self, question: Question, w: Counterfactual) -> str:
        """An answer of the right kind, from nowhere."""
        if question.split == "Compare":
            return w(self.rng.choice(self.names.pools["country"]))
        name = question.hops[-1].relation
        return w(self.rng.choice([entity["attributes"][name]["text"] for entity, other in self.pairs if other == name]))

    def steps(self, question: Question, style: str, w: Counterfactual):
        """Yield (thought, action, argument, lines, result); the answer step has no lines. None where a reading fails."""
        if question.split == "Compare":
            yield from self.compare_steps(question, style, w)
            return
        hops = list(question.hops)
        if style == "wrong" and len(hops) > 2:
            hops.pop(self.rng.randrange(1, len(hops) - 1))
        real, read = hops[0].result, w(hops[0].result)
        yield "identify image 1", "image_search", "image 1", rollout.image_lines(1, [Hit(read, "", 0.0, 0)])
        for hop in hops[1:]:
            lines, result, next_real = self.look_up(real, hop.relation, w)
            yield f"it is {read}", "text_search", query(hop.relation, read), lines
            if result is None:
                yield "I will guess", "answer", self.guess(question, w), None
                return
            real, read = next_real, result
        yield f"it is {read}", "answer", read, None

    def compare_steps(self, question: Question, style: str, w: Counterfactual):
        first, second, name = question.hops[0].result, question.hops[1].result, question.hops[2].relation
        yield "identify image 1", "image_search", "image 1", rollout.image_lines(1, [Hit(w(first), "", 0.0, 0)])
        yield f"image 1 is {w(first)}", "image_search", "image 2", rollout.image_lines(2, [Hit(w(second), "", 0.0, 0)])
        (lines1, value1, _), (lines2, value2, _) = self.look_up(first, name, w), self.look_up(second, name, w)
        if style == "wrong":
            yield f"image 2 is {w(second)}", "answer", self.rng.choice([w(first), w(second)]), None
            return
        yield f"image 2 is {w(second)}", "text_search", query(name, w(first)), lines1
        if value1 is None or value2 is None:
            yield "I will guess", "answer", self.rng.choice([w(first), w(second)]), None
            return
        yield f"{name} of {w(first)} is {value1}", "text_search", query(name, w(second)), lines2
        yield from self.verdict(name, w(first), value1, w(second), value2)

    def verdict(self, name, first, value1, second, value2):
        """The comparison, in the thought; nothing where the numbers are closer than the questions' are."""
        if "date" in name:
            value1, value2 = value1[-4:], value2[-4:]
        a, b = (float(re.sub(r"[^\d.]", "", value)) for value in (value1, value2))
        if a != b and ("date" in name or max(a, b) >= 1.1 * min(a, b)):
            winner = first if (a > b) != ("date" in name) else second
            yield f"{first} {value1} and {second} {value2} so {winner}", "answer", winner, None

    def number_drill(self, count: int = 6):
        """[(text, is it scored)]: verdicts one after the other, of which only the winner is scored. Cheap practice in
        comparing numbers: larger for quantities, smaller (older) for years, as in the questions."""
        out, rng = [], self.rng
        while len(out) < 2 * count:
            w, date = Counterfactual(self.names, rng), rng.random() < 0.15
            digits = rng.randint(1, 10)
            values = [str(rng.randint(1500, 2030)) if date else f"{rng.randint(10 ** (d - 1), 10 ** d - 1):,}" + rng.choice(["", f".{rng.randint(0, 9)}"])
                      for d in (digits, max(1, digits + rng.choice([-1, 0, 0, 1])))]
            names = [w(rng.choice(self.names.pools["country"])) for _ in range(2)]
            for thought, _, winner, _ in self.verdict("date" if date else "", names[0], values[0], names[1], values[1]):
                out += [("<think> " + thought.removesuffix(winner).rstrip(), False), (f" {winner}</think>", True)]
        return out

    def episode(self, question: Question, style: str, max_turns: int) -> list | None:
        """A whole episode in a world of its own, at most max_turns + 1 turns; None where it came to nothing."""
        w, rng, out = Counterfactual(self.names, self.rng), self.rng, []
        stop_at = rng.randrange(question.num_steps) if style == "early" else None
        break_at = rng.randrange(question.num_steps + 1) if style == "malformed" else None
        for phase, (thought, action, argument, lines) in enumerate(self.steps(question, style, w)):
            if phase == stop_at or len(out) == max_turns and action != "answer":
                thought, action, argument, lines = "I will guess", "answer", self.guess(question, w), None
            text = say(thought, action, argument)
            if phase == break_at and len(out) < max_turns:
                bad = broken(text, rng)
                if rollout.parse_turn(bad).kind == "invalid":
                    out.append((bad, ["No action was found. Think, then search or answer, each in its tags."]))
                    if len(out) == max_turns and action != "answer":
                        thought, action, argument, lines = "I will guess", "answer", self.guess(question, w), None
                        text = say(thought, action, argument)
                else:
                    text = bad
            out.append((text, lines))
            if action == "answer":
                return out
        return None

    def drill(self) -> tuple[str, list] | None:
        """(question, episode) of one look-up, text only; every fourth is a comparison."""
        w, rng = Counterfactual(self.names, self.rng), self.rng
        if rng.random() < 0.25:
            name = rng.choice(sorted(COMPARISONS))
            first, second = rng.sample([entity["title"] for entity, other in self.pairs if other == name and entity["kind"] == "country"], 2)
            (lines1, value1, _), (lines2, value2, _) = self.look_up(first, name, w), self.look_up(second, name, w)
            if value1 is None or value2 is None:
                return None
            end = list(self.verdict(name, w(first), value1, w(second), value2))
            return end and (rng.choice(PAIR).format(COMPARISONS[name]), [
                (say(f"image 2 is {w(second)}", "text_search", query(name, w(first))), lines1),
                (say(f"{name} of {w(first)} is {value1}", "text_search", query(name, w(second))), lines2),
                (say(*end[0][:3]), None)])
        entity, name = rng.choice(self.pairs)
        lines, result, _ = self.look_up(entity["title"], name, w)
        if result is None:
            return None
        title = w(entity["title"])
        text = f"What is {rng.choice(RELATIONS[name]).format(title)}?" if name in RELATIONS else rng.choice(ATTRIBUTES[name]).format(title)
        return text, [(say(f"it is {title}", "text_search", query(name, title)), lines), (say(f"it is {result}", "answer", result), None)]


def corpus(world: World, train: list[Question]):
    """Texts for the tokenizer: what is asked, what is read, and every name many times, so that most are few tokens."""
    asked = sorted({e["field"] for entity in world.entities.values() for e in {**entity["relations"], **entity["attributes"]}.values()})
    yield from (question.problem.replace("<image>", "") for question in train[:2000])
    for entity in world.entities.values():
        for field in asked:
            for row in entity["rows"].get(field, ()):
                yield from [" " + world.texts[row].replace("\n", " ")] * 4
    for name in Names(world).kind:
        yield from [f" {name}"] * 8
    for name in {**RELATIONS, **ATTRIBUTES}:
        yield from [say("it is", "text_search", query(name, "")), "identify image 1 I will guess image 2 is", "Image 1: Doc 1(Title: ) Doc 2(Title: )"] * 20


def number_trajectory(model, processor, teacher: Teacher, cfg) -> rollout.Trajectory:
    question = Question("numbers", "Which is larger?", (), "", (), "String", "Compare")
    row = rollout.Row(question, rollout.build_prompt(model, processor, question, cfg))
    for text, scored in teacher.number_drill():
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        row.add(ids, [0.0] * len(ids) if scored else None)
    return row.trajectory()


def trajectory(model, processor, question: Question, prompt, turns: list, cfg) -> rollout.Trajectory:
    """A scripted episode as a trajectory, laid out exactly as a rollout is."""
    row, tokenizer = rollout.Row(question, prompt), processor.tokenizer
    for text, lines in turns:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not text.endswith(("_search>", "answer>")):
            ids.append(tokenizer.eos_token_id)  # a turn whose action was not closed ends like this
        row.add(ids, [0.0] * len(ids))
        if lines:
            row.add(rollout.observation_ids(tokenizer, lines, cfg.max_obs_tokens))
    return row.trajectory()


@dataclass
class Args:
    """Write a warm-started tiny policy."""
    kb: Path = Path("data/kb")
    data: Path = Path("data/mmhops")
    out: Path = Path("assets/tiny-warmstart")
    style: Literal["sloppy", "good"] = "sloppy"  # which scripted episodes
    drill_steps: int = 600    # steps on reading drills alone
    steps: int = 1400         # steps on episodes and drills
    batch: int = 64           # drills a step; half as many episodes
    lr: float = 3e-3          # AdamW, cosine to 5%
    drill_share: float = 0.3  # of the second stage's steps
    seed: int = 0


def prepare(args: Args, cfg):
    """(kb, teacher, train questions, model, processor): an untrained policy written to args.out, and what it will learn from."""
    world, kb, train = World(args.kb), KnowledgeBase.open(args.kb), load_questions(args.data, "train")
    build_tiny(args.out, corpus(world, train), seed=args.seed)
    model, processor = load_policy(args.out, dtype=torch.float32)
    return kb, Teacher(kb, world, cfg.topk, args.seed), train, model, processor


def learn(args: Args, cfg, teacher: Teacher, train: list[Question], model, processor):
    """Train the model; yields the loss of every step. Twice the same on the same machine."""
    rng = random.Random(args.seed)
    prompt_of = cache(lambda question: rollout.build_prompt(model, processor, question, cfg))

    def drills(n):
        made = [number_trajectory(model, processor, teacher, cfg) for _ in range(n // 4)]
        while len(made) < n:
            drill = teacher.drill()
            if drill:
                question = Question("drill", drill[0], (), "", (), "String", "Bridge")
                made.append(trajectory(model, processor, question, rollout.build_prompt(model, processor, question, cfg), drill[1], cfg))
        return made

    def episodes(n):
        made = []
        while len(made) < n:
            question = rng.choice(train)
            style = rng.choices(*zip(*MIXES[args.style].items()))[0]
            turns = teacher.episode(question, style, cfg.max_turns)
            if turns:
                made.append(trajectory(model, processor, question, prompt_of(question), turns, cfg))
        return made

    total = args.drill_steps + args.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 30, 1) * max(0.05, 0.5 * (1 + math.cos(math.pi * s / total))))
    for step in range(total):
        model.train()
        batch = drills(args.batch) if step < args.drill_steps or rng.random() < args.drill_share else episodes(args.batch // 2)
        tokens, loss = sum(int(t.policy_mask.sum()) for t in batch), 0.0
        batch.sort(key=lambda t: len(t.token_ids))
        for start in range(0, len(batch), len(batch) // 4):  # short with short: padding costs as much as text
            part = -token_logprobs(model, batch[start:start + len(batch) // 4])[0].sum() / tokens
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss


def main(args: Args):
    from evaluate import evaluate
    from train import PRESETS
    cfg, validation = PRESETS["tiny"], load_questions(args.data, "validation")
    kb, teacher, train, model, processor = prepare(args, cfg)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens")
    started, losses = time.time(), []
    for loss in learn(args, cfg, teacher, train, model, processor):
        step = len(losses)
        losses.append(round(loss, 4))
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss:.3f}  {time.time() - started:.0f} s", flush=True)
        if (step + 1) % 300 == 0 and step >= args.drill_steps:
            print(json.dumps(evaluate(model, processor, kb, validation[:160], cfg, temperature=1.0)[0]), flush=True)
    model.half().save_pretrained(args.out)
    recipe = {f.name: getattr(cfg, f.name) for f in fields(rollout.RolloutConfig)} | {"warmstart": {**asdict(args), "losses": losses}}
    (args.out / "recipe.json").write_text(json.dumps(recipe, default=str))
    model, processor = load_policy(args.out, dtype=torch.float32)
    print("copied rightly, by field:", json.dumps(copy_accuracy(model, processor, kb, teacher, cfg)))
    pairs = [question for question in validation if question.split == "Compare"]
    print("compared rightly:", comparison_accuracy(model, processor, teacher, pairs, cfg))


def copy_accuracy(model, processor, kb, teacher: Teacher, cfg, each: int = 40) -> dict:
    """Of look-ups of real facts whose passage was found: how often the answer copied is the one that stands there, by field."""
    rng, out = random.Random(1), {}
    greedy = replace(cfg, group_size=1, temperature=0.0)
    for name in {**RELATIONS, **ATTRIBUTES}:
        pairs = rng.sample(pool := [entity for entity, other in teacher.pairs if other == name], min(each, len(pool)))
        questions = [Question(str(i), f"What is {RELATIONS[name][0].format(e['title'])}?" if name in RELATIONS else ATTRIBUTES[name][0].format(e["title"]),
                              (), "", (), "String", "Bridge") for i, e in enumerate(pairs)]
        right = []
        for entity, t in zip(pairs, rollout.sample(model, processor, kb, questions, greedy)):
            hop = teacher.world.text_hop(entity, name)
            if any(hit.row in hop["rows"] for turn in t.turns for hit in turn.hits):
                right.append(normalize(t.answer or "") == normalize(hop["result"]))
        out[name] = (round(sum(right) / max(1, len(right)), 3), len(right))
    return out


@torch.no_grad()
def comparison_accuracy(model, processor, teacher: Teacher, questions: list[Question], cfg) -> tuple[float, int]:
    """Of honest comparisons, both values read: how often the right one of the two names is the likelier verdict; their number."""
    right = []
    for question in questions:
        prompt, w = rollout.build_prompt(model, processor, question, cfg), Counterfactual(teacher.names, teacher.rng)
        *turns, (thought, action, winner, _) = teacher.compare_steps(question, "good", w)
        if " so " not in thought:
            continue
        before = [(say(*turn[:3]), turn[3]) for turn in turns]
        loser = next(name for name in (w(hop.result) for hop in question.hops[:2]) if name != winner)
        both = [trajectory(model, processor, question, prompt, [*before, (say(thought.removesuffix(winner) + name, action, name), None)], cfg)
                for name in (winner, loser)]
        scores = token_logprobs(model, both)[0].sum(1)
        right.append(bool(scores[0] > scores[1]))
    return round(sum(right) / max(1, len(right)), 3), len(right)


if __name__ == "__main__":
    import tyro
    main(tyro.cli(Args))
