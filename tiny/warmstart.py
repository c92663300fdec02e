"""Warm start: teach a tiny policy, from nothing, to read, to copy, to act, and then to be lazy.

    python -m tiny.warmstart                                       # assets/tiny-warmstart
    python -m tiny.warmstart --stages read compare titles sharpen --out runs/honest  # no laziness

The 7B can read already. A policy of a million parameters is taught *copying*, not facts: every
example plays in a counterfactual world (tiny/counterfactual.py). The loss is the cross-entropy of
what a scripted policy wrote (tiny/teacher.py). First reading drills and honest episodes: what this
policy reaches is what imitation could do, and recipe.json says it. Then episodes of a lazy teacher
that mostly guesses before its last search. RL starts from there: a policy that reads well and
guesses too early, as a large one does unprompted. What is left is planning.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

# before torch: spinning OpenMP threads stall shared machines
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import rollout
from config import PRESETS
from data import Question, load_questions
from engine.text import observation_ids, trusted_ids
from evaluation.ask import evaluate_both_ways
from files.records import FAULTS
from files.terminal import fail
from mmhops.build import Graph
from mmhops.phrases import ATTRIBUTES, RELATIONS, query, single_hop_questions
from model import Policy, load_policy
from retrieval import KnowledgeBase
from reward import normalize
from tiny.counterfactual import Counterfactual, Names
from tiny.model import build_tiny
from tiny.teacher import HONEST, LAZY, Habits, ScriptedTurn, Teacher, turn_text


@dataclass
class Args:
    """Write a warm-started tiny policy. A command that was stopped begins its stage again."""

    kb: Path = Path("data/kb")
    data: Path = Path("data/mmhops")
    out: Path = Path("assets/tiny-warmstart")
    drill_steps: int = 500  # "read": steps on drills alone
    steps: int = 1000  # "read": steps on episodes and drills
    compare_steps: int = 400  # "compare": steps half of whose loss is comparisons
    title_steps: int = 350  # "titles"
    sharpen_steps: int = 600  # "sharpen"
    lazy_steps: int = 200  # "lazy"
    remember_steps: int = 600  # "remember"
    by_heart: int = 300  # …the answers to the first of the training questions, this many
    # see draw_batches; lazy twice: the shipped policy was sharpened when it was lazy already
    stages: tuple[str, ...] = ("read", "compare", "titles", "lazy", "sharpen", "lazy")
    batch: int = 48  # drills per step; half as many episodes
    lr: float = 3e-3  # AdamW, cosine to 5%; after "read" a third of it, in "lazy" a sixth
    drill_share: float = 0.3  # of the steps on episodes and drills
    seed: int = 0


def corpus(graph: Graph, train: list[Question]) -> Iterator[str]:
    """Texts for the tokenizer: what is asked, what is read, and every name many times.

    The repetitions are weights: most names become few tokens.
    """
    asked = sorted(
        {
            entry["field"]
            for entity in graph.entities.values()
            for entry in {**entity["relations"], **entity["attributes"]}.values()
        }
    )
    for question in train[:2000]:
        yield question.problem.replace("<image>", "")
    for entity in graph.entities.values():
        for field in asked:
            for row in entity["rows"].get(field, ()):
                yield from [" " + graph.texts[row].replace("\n", " ")] * 4
    for name in Names(graph).kind:
        yield from [f" {name}"] * 8
    for name in {**RELATIONS, **ATTRIBUTES}:
        yield from [
            turn_text("it is", "text_search", query(name, "")),
            "identify image 1 I will guess image 2 is",
            "Image 1: Doc 1(Title: ) Doc 2(Title: )",
        ] * 20


# ------------------------------------------------------------------------------ examples


def text_question(problem: str, split: str = "Bridge") -> Question:
    """A question without images, and without an answer to score."""
    return Question("drill", problem, (), "", (), "String", split)


def assemble(question: Question, prompt, pieces: list[tuple[list[int], bool]]) -> rollout.Response:
    """A response of [(token ids, are they scored)] after a prompt, as if a rollout had made it.

    Scored is what the policy has to learn to write. What it has to read is not.
    """
    response = rollout.new_response(question, prompt)
    for ids, scored in pieces:
        response.append(ids, [0.0] * len(ids) if scored else None)
    return response


def scripted_response(
    tokenizer, question: Question, prompt, turns: list[ScriptedTurn], cfg
) -> rollout.Response:
    """A scripted episode as a response, laid out exactly as a rollout is."""
    pieces = []
    for turn in turns:
        ids = trusted_ids(tokenizer, turn.text)
        if not any(tag in turn.text for tag in rollout.CLOSING):
            ids.append(tokenizer.eos_token_id)  # a turn whose action was not closed ends like this
        pieces.append((ids, True))
        if turn.lines:
            observed = observation_ids(tokenizer, turn.lines, cfg.max_obs_tokens)
            pieces.append((observed, False))
    return assemble(question, prompt, pieces)


def number_response(policy: Policy, teacher: Teacher, cfg) -> rollout.Response:
    """A number drill as a response: only the winners are scored."""
    question = text_question("Which is larger?", "Compare")
    prompt = rollout.build_prompt(policy, question, cfg)
    pieces = [
        (trusted_ids(policy.tokenizer, text), scored) for text, scored in teacher.number_drill()
    ]
    return assemble(question, prompt, pieces)


class Examples:
    """Makes training examples of each kind, n at a time, as lists of responses."""

    def __init__(self, args: Args, cfg, teacher: Teacher, train: list[Question], policy: Policy):
        self.cfg = cfg
        self.teacher = teacher
        self.train = train
        self.comparisons = [question for question in train if question.split == "Compare"]
        self.known = train[: args.by_heart]
        self.policy = policy
        self.rng = random.Random(args.seed)  # draws questions; the teacher has its own
        self.prompt_once = cache(self.prompt)  # a question's picture is preprocessed once

    def prompt(self, question: Question):
        return rollout.build_prompt(self.policy, question, self.cfg)

    def numbers(self, n: int) -> list[rollout.Response]:
        return [number_response(self.policy, self.teacher, self.cfg) for _ in range(n)]

    def drills(self, n: int) -> list[rollout.Response]:
        return self.looked_up(n, self.teacher.drill)

    def title_drills(self, n: int) -> list[rollout.Response]:
        return self.looked_up(n, self.teacher.title_drill)

    def looked_up(self, n: int, draw: Callable) -> list[rollout.Response]:
        made = []
        while len(made) < n:
            drill = draw()
            if drill:
                problem, turns = drill
                question = text_question(problem)
                prompt = self.prompt(question)
                made.append(
                    scripted_response(self.policy.tokenizer, question, prompt, turns, self.cfg)
                )
        return made

    def episodes(
        self, n: int, questions: list[Question], habits: Habits = HONEST
    ) -> list[rollout.Response]:
        made = []
        while len(made) < n:
            question = self.rng.choice(questions)
            turns = self.teacher.episode(question, habits, self.cfg.max_turns)
            if turns:
                prompt = self.prompt_once(question)
                made.append(
                    scripted_response(self.policy.tokenizer, question, prompt, turns, self.cfg)
                )
        return made

    def remembered(self, n: int) -> list[rollout.Response]:
        """Known questions, answered at once."""
        made = []
        for question in self.rng.choices(self.known, k=n):
            turn = remembered_turn(question)
            prompt = self.prompt_once(question)
            made.append(
                scripted_response(self.policy.tokenizer, question, prompt, [turn], self.cfg)
            )
        return made


def remembered_turn(question: Question) -> ScriptedTurn:
    return ScriptedTurn(turn_text("I remember", "answer", question.answer), None)


# ------------------------------------------------------------------------------ learning


def draw_batches(
    stage: str, step: int, args: Args, examples: Examples
) -> list[list[rollout.Response]]:
    """The batches of one optimizer step; their losses weigh the same, whatever their tokens.

    "read" is drills, then honest episodes and drills. Half of the loss of "compare" is comparisons:
    which of two is larger hangs on few tokens among hundreds, and is learned only when they count.
    "titles" goes on with look-ups that find another article first: "Turkmenistan" for "Turkey".
    "sharpen" is whole honest episodes above all: a policy that samples each token has to be sure of
    all that it copies. "lazy" is episodes of the lazy teacher, and some of the rest, so that it is
    not forgotten.

    "remember" is for an ablation: the policy learns the answers to some training questions by
    heart, as a large one knows much of what it is asked, and answers them from memory half of the
    time. It can then be tempted not to search:

        mkdir -p runs && cp -r assets/tiny-warmstart runs/remembers
        python -m tiny.warmstart --out runs/remembers \\
            --stages read compare titles lazy sharpen lazy remember
    """
    n = args.batch
    if stage == "compare":
        comparisons = examples.numbers(n // 4) + examples.episodes(n // 4, examples.comparisons)
        others = examples.drills(n // 4) + examples.episodes(n // 4, examples.train)
        return [comparisons, others]
    if stage == "titles":
        comparisons = examples.numbers(n // 8) + examples.episodes(n // 8, examples.comparisons)
        drills = examples.title_drills(n // 4) + examples.drills(n // 4)
        return [drills + examples.episodes(n // 4, examples.train) + comparisons]
    if stage == "lazy":
        others = examples.numbers(n // 8) + examples.drills(n // 8)
        return [examples.episodes(n // 2, examples.train, LAZY) + others]
    if stage == "sharpen":
        drills = examples.title_drills(n // 8) + examples.drills(n // 8)
        comparisons = examples.numbers(n // 8) + examples.episodes(n // 8, examples.comparisons)
        return [examples.episodes(n // 2, examples.train) + drills + comparisons]
    if stage == "remember":
        memory = examples.remembered(n // 2)
        searched = examples.episodes(n // 2, examples.known)
        others = examples.episodes(n // 4, examples.train)
        return [memory + searched + others]
    if step < args.drill_steps or examples.rng.random() < args.drill_share:
        return [examples.numbers(n // 4) + examples.drills(n * 3 // 4)]
    return [examples.episodes(n // 2, examples.train)]


def backward(policy: Policy, batch: list[rollout.Response], weight: float) -> float:
    """Add the gradient of `weight` times a batch's loss per scored token; returns that product."""
    tokens = sum(int(response.policy_mask.sum()) for response in batch)
    ordered = sorted(batch, key=lambda response: len(response.token_ids))
    size = max(1, len(ordered) // 4)
    total = 0.0
    for start in range(0, len(ordered), size):  # short with short: padding costs as much as text
        logprobs, _ = policy.logprobs(ordered[start : start + size])  # (size, L)
        loss = -logprobs.sum() / tokens * weight
        loss.backward()
        total += loss.item()
    return total


def learn(
    stage: str, args: Args, cfg, teacher: Teacher, train: list[Question], policy: Policy
) -> Iterator[float]:
    """Train the model through a stage; yields the loss of every step.

    Twice the same on the same machine.
    """
    # 1) Examples, optimizer, learning rate: 30 steps of warm-up, then a cosine to 5%.
    examples = Examples(args, cfg, teacher, train, policy)
    total = {
        "read": args.drill_steps + args.steps,
        "compare": args.compare_steps,
        "titles": args.title_steps,
        "sharpen": args.sharpen_steps,
        "lazy": args.lazy_steps,
        "remember": args.remember_steps,
    }[stage]
    lr = args.lr * {"read": 1, "lazy": 1 / 6}.get(stage, 1 / 3)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )

    def factor(step):
        warmup = min((step + 1) / 30, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * step / total))
        return warmup * max(0.05, cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    # 2) Steps.
    for step in range(total):
        policy.model.train()
        batches = draw_batches(stage, step, args, examples)
        loss = 0.0
        for batch in batches:
            loss += backward(policy, batch, weight=1 / len(batches))
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss


# ------------------------------------------------------------------------------ what was learned


def copy_accuracy(
    policy: Policy, kb: KnowledgeBase, teacher: Teacher, cfg, each: int = 40
) -> dict[str, tuple[float, int]]:
    """{relation or attribute: (share right, number)} of look-ups of real facts, greedily decoded.

    Only those whose passage was found count; right is an answer that is what stands there. each: at
    most so many look-ups.
    """
    rng = random.Random(1)
    greedy = replace(cfg, group_size=1, temperature=0.0)
    accuracy = {}
    for name in {**RELATIONS, **ATTRIBUTES}:
        pool = [entity for entity, other in teacher.pairs if other == name]
        entities = rng.sample(pool, min(each, len(pool)))
        wording = single_hop_questions(name)[0]
        questions = [text_question(wording.format(entity["title"])) for entity in entities]
        right = []
        for entity, answered in zip(entities, rollout.sample(policy, kb, questions, greedy)):
            hop = teacher.graph.text_hop(entity, name)
            hits = [hit for turn in answered.turns for hit in turn.hits]
            if any(hit.row in hop["rows"] for hit in hits):
                right.append(normalize(answered.answer or "") == normalize(hop["result"]))
        accuracy[name] = (share(right), len(right))
    return accuracy


def comparison_accuracy(
    policy: Policy, kb: KnowledgeBase, teacher: Teacher, questions: list[Question], cfg
) -> tuple[float, int]:
    """(share right, number) of comparisons both of whose values were read, greedily decoded.

    The teacher searches, each time in another world; the policy only answers.
    """
    asked, winners = [], []
    for question in questions:
        prompt = rollout.build_prompt(policy, question, cfg)
        world = Counterfactual(teacher.names, teacher.rng)
        *searches, last = teacher.compare_steps(question, world)
        if " so " not in last.thought:  # a guess, or no verdict at all
            continue
        turns = [ScriptedTurn(step.text, step.lines) for step in searches]
        written = scripted_response(policy.tokenizer, question, prompt, turns, cfg)
        asked.append(replace(question, opening=tuple(written.own_ids().tolist())))
        winners.append(last.argument)
    once = replace(cfg, group_size=1, temperature=0.0, max_turns=0)
    answers = [response.answer or "" for response in rollout.sample(policy, kb, asked, once)]
    right = [normalize(answer) == normalize(winner) for answer, winner in zip(answers, winners)]
    return share(right), len(right)


def share(right: list[bool]) -> float:
    return round(sum(right) / max(1, len(right)), 3)


# ------------------------------------------------------------------------------ the command


def main(args: Args):
    cfg = PRESETS["tiny"]
    graph = Graph(args.kb)
    kb = KnowledgeBase.open(args.kb)
    train = load_questions(args.data, "train")
    validation = load_questions(args.data, "validation")

    # 1) Begin, or go on: recipe.json holds the losses of the stages that are done.
    path = args.out / "recipe.json"
    recipe = {field.name: getattr(cfg, field.name) for field in fields(rollout.RolloutConfig)}
    recipe["warmstart"] = asdict(args) | {"losses": {}}
    losses_of = recipe["warmstart"]["losses"]
    if path.exists():
        saved = json.loads(path.read_text())
        losses_of |= saved["warmstart"]["losses"]
        recipe["honest"] = saved.get("honest")
    else:
        build_tiny(args.out, corpus(graph, train), seed=args.seed)

    # 2) The stages. One that is repeated has another seed, and so other examples.
    teacher = Teacher(kb, graph, cfg.topk)
    for number, stage in enumerate(args.stages):
        if f"{number} {stage}" in losses_of:
            continue
        if stage == "lazy":
            recipe["honest"] = held_out_accuracy(args.out, kb, validation, cfg)
        seed = args.seed + args.stages[:number].count(stage)
        started = time.time()
        policy = load_policy(args.out, dtype=torch.float32)
        parameters = sum(p.numel() for p in policy.model.parameters())
        print(f"{stage}: {parameters:,} parameters, {len(policy.tokenizer)} tokens")
        teacher.rng.seed(seed)
        losses = []
        for loss in learn(stage, replace(args, seed=seed), cfg, teacher, train, policy):
            if len(losses) % 50 == 0:
                seconds = time.time() - started
                print(f"step {len(losses):4d}  loss {loss:.3f}  {seconds:.0f} s", flush=True)
            losses.append(round(loss, 4))
        policy.model.half().save_pretrained(args.out)
        losses_of[f"{number} {stage}"] = losses
        path.write_text(json.dumps(recipe, default=str))

    # 3) What was learned.
    policy = load_policy(args.out, dtype=torch.float32)
    policy.model.eval()
    teacher.rng.seed(args.seed)
    copied = copy_accuracy(policy, kb, teacher, cfg)
    print("copied rightly, by field:", json.dumps(copied))
    comparisons = [question for question in validation if question.split == "Compare"]
    compared = comparison_accuracy(policy, kb, teacher, comparisons, cfg)
    print("compared rightly:", compared)
    print("held-out accuracy:", held_out_accuracy(args.out, kb, validation, cfg))


def held_out_accuracy(folder: Path, kb: KnowledgeBase, questions: list[Question], cfg) -> dict:
    """{"sampled", "greedy"}: percent of the questions that train.py's curve is made of."""
    policy = load_policy(folder, dtype=torch.float32)
    result = evaluate_both_ways(policy, kb, questions[: cfg.eval_questions], cfg)
    return {way: result[f"eval_{way}_overall"] for way in ("sampled", "greedy")}


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except FAULTS as error:
        fail(error)
