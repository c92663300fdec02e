"""Can a language model check the questions that it wrote? Measured where the truth is known.

python -m mmhops.judge --model gpt-4o --data data/mmhops --kb data/kb
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data import Question, load_questions
from files.records import FAULTS
from files.terminal import fail
from mmhops.expand import GOOD, Articles, Model, Rejected, mentions, verdict_on


@dataclass
class Args:
    """Say how often a model's verdict on a question is right."""

    model: str = "gpt-4o"
    base_url: str = "https://api.openai.com/v1"  # the key is read from OPENAI_API_KEY
    count: int = 100  # questions
    data: Path = Path("data/mmhops")  # with gold chains: those of mmhops/build.py
    split: str = "test"
    kb: Path = Path("data/kb")
    out: Path = Path("data/judge.calls.jsonl")  # its replies
    seed: int = 0


def judge(args: Args) -> dict:
    """How often the model's verdict is the truth, on our own relation questions.

    Each is shown twice: as it is, which is good, and with the answer of another one that asks for
    the same of another article: that does not follow. Returns and prints the shares in percent.
    """
    rng = random.Random(args.seed)
    articles = Articles(args.kb)
    asked = [q for q in load_questions(args.data, args.split) if q.split == "Bridge" and q.hops]
    asked = rng.sample(asked, min(args.count, len(asked)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    model = Model(args.base_url, args.model, args.out, temperature=0.0)
    counts = Counter()

    def ask(question: Question, answer: str) -> dict | None:
        hop = question.hops[-1]
        passages = articles.passages(list(hop.rows) + articles.draw(hop.about, rng, 3))
        text = question.problem.replace("<image>", "").strip()
        try:
            return verdict_on(model, hop.about, passages, hop.query, answer, text)
        except Rejected:
            return None

    for question in asked:
        relation = question.hops[-1].relation
        others = [q.answer for q in asked if q.hops[-1].relation == relation]
        wrong = [answer for answer in others if not is_alike(answer, question.answer)]
        verdict = ask(question, question.answer)
        counts["good"] += 1
        counts["no verdict"] += verdict is None
        for name, truth in GOOD.items():
            counts[name] += verdict is not None and verdict[name] == truth
        counts["accepted"] += verdict == GOOD
        if wrong:
            verdict = ask(question, rng.choice(wrong))
            counts["corrupted"] += 1
            counts["seen through"] += verdict is not None and verdict["follows"] == "no"

    def share(name: str, of: str) -> float:
        return round(100 * counts[name] / max(1, counts[of]), 1)

    report = {"good questions": counts["good"], "corrupted": counts["corrupted"]}
    report |= {name: share(name, "good") for name in (*GOOD, "accepted", "no verdict")}
    report["seen through"] = share("seen through", "corrupted")
    print(json.dumps(report, indent=1))
    return report


def is_alike(one: str, other: str) -> bool:
    return mentions(one, other) or mentions(other, one)


if __name__ == "__main__":
    import tyro

    try:
        judge(tyro.cli(Args))
    except FAULTS as error:
        fail(error)
