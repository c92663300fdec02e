"""What a set of episodes says: how often the answer is right, how sure one can be of it, how the policy searched, where it failed.

Accuracies follow the benchmark: Bridge (3- and 4-step), Compare, and Overall, which is both. Our 2-step questions are a
row of their own. With n responses a question the accuracy is their mean; beside it stand **pass@k**, the chance that one of
k is right (1 - C(n-c, k) / C(n, k) for c right ones, Chen et al. 2021), and the majority's answer.

Beside the policy's figures stand two that need no policy:

- **ceiling**: a perfect policy with the same retrievers: every image search of the gold chain hits, and every text search
  with a well-put query shows the passage. What is missing to 100% the retriever cannot find.
- **recall along the chain**: for each gold hop, how often its passage (or image) was among what the policy retrieved.

**Intervals** are 95% percentile bootstraps over questions, 2,000 draws. **Two result files** are compared on the questions both answered:
a bootstrap of the paired difference, and a sign-flip permutation test of it (10,000 flips), which for one response a question is McNemar's.
"""

import json
from collections import Counter, defaultdict
from math import comb
from pathlib import Path

import numpy as np

from data import DataError, Question
from retrieval import Hit
from reward import RewardConfig, format_reward, normalize, reward, score_answer
from rollout import Response, RolloutConfig, Turn

ROWS = {
    "bridge_2": "Bridge, 2 steps",
    "bridge_3": "Bridge, 3 steps",
    "bridge_4": "Bridge, 4 steps",
    "bridge": "Bridge (3 and 4)",
    "compare": "Compare",
    "overall": "Overall",
}


def correct(t: Response) -> int:
    return score_answer(t.answer, t.question.answer_eval, t.question.problem_type)


def rows_with(split: str, num_steps: int | None) -> list[str]:
    """The rows of the table that a question counts in; other benchmarks' splits are rows of their own.

    >>> rows_with("Bridge", 2), rows_with("Bridge", 3), rows_with("Compare", 4)
    (['bridge_2'], ['overall', 'bridge', 'bridge_3'], ['overall', 'compare'])
    """
    if split != "Bridge":
        return ["overall", "compare" if split == "Compare" else split]
    return ["overall", "bridge"] * (num_steps != 2) + [f"bridge_{num_steps}"] * (
        num_steps is not None
    )


def rows_of(questions: list[Question]) -> dict[str, np.ndarray]:
    """The rows of the table, as (N,) boolean masks over the questions."""
    rows = [rows_with(q.split, q.num_steps) for q in questions]
    others = sorted({name for row in rows for name in row})
    names = dict.fromkeys(
        ["overall", "bridge", "compare", "bridge_2", "bridge_3", "bridge_4", *others]
    )
    return {name: np.array([name in row for row in rows], dtype=bool) for name in names}


# ------------------------------------------------------------------------------------ along the gold chain


def found(hop, hits) -> bool:
    return any(hit.row in hop.rows for hit in hits)


def reached(t: Response) -> list[bool]:
    """For each gold hop, whether the policy retrieved it."""
    return [
        any(turn.action == hop.action and found(hop, turn.hits) for turn in t.turns)
        for hop in t.question.hops or ()
    ]


def ceiling(kb, questions: list[Question], cfg: RolloutConfig) -> np.ndarray:
    """(N,) bool: would a perfect policy with these retrievers reach the answer? All False where there are no gold chains."""
    possible = np.array([q.hops is not None for q in questions])
    text = [
        (i, hop)
        for i, q in enumerate(questions)
        for hop in q.hops or ()
        if hop.action == "text_search"
    ]
    image = [
        (i, hop)
        for i, q in enumerate(questions)
        for hop in q.hops or ()
        if hop.action == "image_search"
    ]
    for (i, hop), hits in zip(text, kb.text_search([hop.query for _, hop in text], cfg.topk)):
        possible[i] &= found(hop, hits)
    for (i, hop), hits in zip(
        image,
        kb.image_search(
            [questions[i].images[int(hop.about) - 1] for i, hop in image], cfg.image_topk
        ),
    ):
        possible[i] &= cfg.oracle_image or found(hop, hits)
    return possible


def searches(t: Response) -> list[Turn]:
    return [turn for turn in t.turns if turn.valid and turn.action != "answer"]


def wasted(t: Response) -> int:
    """Searches that brought nothing of the gold chain, or only what an earlier one had brought."""
    seen, useless = set(), 0
    for turn in searches(t):
        new = {
            i
            for i, hop in enumerate(t.question.hops or ())
            if turn.action == hop.action and found(hop, turn.hits)
        } - seen
        seen |= new
        useless += not new
    return useless


def failure(t: Response) -> str:
    """Why a wrong answer is wrong, by the first thing that went wrong along the gold chain."""
    if t.answer is None:
        return "no answer"
    hops, hit = t.question.hops or (), reached(t)
    if not hops:
        return "unknown"
    if all(hit):
        return "wrong comparison" if t.question.split == "Compare" else "wrong reading"
    if len(searches(t)) < len(hops):
        return "answered too early" if len(t.turns) <= len(hops) else "malformed turn"
    first = hops[hit.index(False)]
    return "wrong image hit" if first.action == "image_search" else "wrong query"


# ------------------------------------------------------------------------------------ accuracies and intervals


def percent(values) -> float | None:
    return round(100 * float(np.mean(values)), 2) if len(values) else None


def interval(values: np.ndarray, draws: int = 2000) -> list[float]:
    """95% bootstrap interval, in percent, of the mean of (questions,) values."""
    if not len(values):
        return [0.0, 0.0]
    rng, n = np.random.default_rng(0), len(values)
    means = np.concatenate(
        [values[rng.integers(n, size=(100, n))].mean(1) for _ in range(draws // 100)]
    )
    return [round(100 * float(bound), 2) for bound in np.percentile(means, [2.5, 97.5])]


def pass_at_k(right: np.ndarray, k: int) -> float:
    """right (questions, n) of 0 and 1.

    >>> pass_at_k(np.array([[1, 0], [0, 0]]), 1), pass_at_k(np.array([[1, 0], [0, 0]]), 2)
    (0.25, 0.5)
    """
    n = right.shape[1]
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in right.sum(1)]))


def majority(group: list[Response]) -> int:
    """Is the most frequent answer right? Of equally frequent ones the first counts; episodes without an answer do not vote."""
    votes = Counter(normalize(t.answer) for t in group if t.answer)
    return (
        correct(
            next(t for t in group if t.answer and normalize(t.answer) == votes.most_common(1)[0][0])
        )
        if votes
        else 0
    )


def summarize(
    responses: list[Response], kb=None, cfg: RolloutConfig | None = None, samples: int = 1
) -> dict:
    """Accuracies in percent, rates in 0–1. `samples` responses a question, question-major. With a KB, the ceiling, too."""
    questions = [t.question for t in responses[::samples]]
    right = np.array([correct(t) for t in responses]).reshape(-1, samples)
    each, rows, result = (
        right.mean(1),
        rows_of(questions),
        {"n": len(questions), "samples": samples},
    )
    for name, mask in rows.items():
        result |= {
            name: percent(each[mask]),
            f"n_{name}": int(mask.sum()),
            f"ci95_{name}": interval(each[mask]),
        }
    result["ci95"] = result["ci95_overall"]
    if samples > 1:
        inside = rows["overall"]
        powers = [k for k in range(1, samples + 1) if k & (k - 1) == 0 or k == samples]
        result["pass_at_k"] = {k: round(100 * pass_at_k(right[inside], k), 2) for k in powers}
        result["majority"] = percent(
            [majority(responses[i * samples : (i + 1) * samples]) for i in np.flatnonzero(inside)]
        )
    result["format_rate"] = round(float(np.mean([format_reward(t) for t in responses])), 4)
    result["tool_calls_mean"] = round(float(np.mean([len(searches(t)) for t in responses])), 3)
    result["turns_used"] = dict(sorted(Counter(len(t.turns) for t in responses).items()))
    kinds, relations = defaultdict(list), defaultdict(list)
    for q, value in zip(questions, each):
        kinds[q.problem_type].append(value)
        if q.hops:
            relations[q.hops[-1].relation].append(value)
    for key, groups in (("by_type", kinds), ("by_relation", relations)):
        result[key] = {
            name: {
                "n": len(values),
                "accuracy": percent(values),
                "ci95": interval(np.array(values)),
            }
            for name, values in sorted(groups.items())
        }
    chains = [t for t in responses if t.question.hops]
    result["wasted_calls_mean"] = (
        round(float(np.mean([wasted(t) for t in chains])), 3) if chains else None
    )
    answered = [
        (sum(bool(turn.hits) for turn in t.turns) >= len(t.question.hops), correct(t))
        for t in chains
    ]
    for name, wanted in (
        ("enough", True),
        ("fewer", False),
    ):  # searches that brought something, against the steps of the chain
        some = [ok for enough, ok in answered if enough == wanted]
        result[f"{name}_searches"] = {"n": len(some), "accuracy": percent(some)}
    result["chain_recall"] = {}
    for name, mask in rows.items():
        if name in ("compare", "bridge_2", "bridge_3", "bridge_4"):
            hits = [
                reached(t)
                for t, chosen in zip(responses, np.repeat(mask, samples))
                if chosen and t.question.hops
            ]
            result["chain_recall"][name] = (
                [round(float(x), 3) for x in np.mean(hits, 0)] if hits else []
            )
    both = [correct(t) for t in chains if t.question.split == "Compare" and all(reached(t))]
    result["compare_both_retrieved"] = {"n": len(both), "accuracy": percent(both)}
    result["failures"] = dict(
        Counter(failure(t) for t, ok in zip(responses, right.flat) if not ok).most_common()
    )
    if kb is not None and chains:
        possible = ceiling(kb, questions, cfg)
        result["ceiling"] = percent(possible[rows["overall"]])
        for name, mask in rows.items():
            result[f"ceiling_{name}"] = percent(possible[mask])
        pairs = [q for q in questions if q.split == "Compare"]
        if pairs:  # identify both, toss a coin
            shown = [kb.image_search(list(q.images), 1) for q in pairs]
            result["compare_guess"] = percent(
                [all(map(found, q.hops[:2], hits)) / 2 for q, hits in zip(pairs, shown)]
            )
    return result


# ------------------------------------------------------------------------------------ files


def record(t: Response, cfg: RewardConfig, tokenizer=None) -> dict:
    """A response as JSON, for predictions.jsonl: what it did, its reward, and, with a tokenizer, its tokens with their
    log-probabilities (null: retrieved)."""
    out = {
        "id": t.question.id,
        "prediction": t.answer or "",
        "trajectory": {
            "problem": t.question.problem,
            "images": [str(path) for path in t.question.images],
            "answer": t.question.answer,
            "split": t.question.split,
            "problem_type": t.question.problem_type,
            "num_steps": t.question.num_steps,
            "correct": correct(t),
            "failure": "" if correct(t) else failure(t),
            "stop": t.stop,
            "answered": t.answer is not None,
            "reward": reward(t, cfg),
            "turns": [
                {
                    "thought": turn.thought,
                    "action": turn.action,
                    "argument": turn.argument,
                    "valid": turn.valid,
                    "hits": [
                        [hit.title, hit.text, round(hit.score, 4), hit.row] for hit in turn.hits
                    ],
                }
                for turn in t.turns
            ],
        },
    }
    if tokenizer is not None and t.token_ids is not None:
        start = len(t.prompt.token_ids)
        out["trajectory"]["tokens"] = tokenizer.batch_decode(
            [[i] for i in t.token_ids[start:].tolist()]
        )
        written = zip(t.logprobs[start:].tolist(), t.policy_mask[start:].tolist())
        out["trajectory"]["logprobs"] = [round(value, 3) if own else None for value, own in written]
    return out


def revive(saved: dict, question: Question) -> Response:
    """The response of a record, without its tensors: all that `summarize` looks at."""
    body = saved["trajectory"]
    turns = [
        Turn(
            turn["thought"],
            turn["action"],
            turn["argument"],
            turn["valid"],
            hits=[Hit(*hit) for hit in turn["hits"]],
        )
        for turn in body["turns"]
    ]
    return Response(
        question,
        None,
        None,
        None,
        None,
        turns,
        saved["prediction"] if body["answered"] else None,
        body["stop"],
    )


def read_results(path: Path) -> dict[str, dict]:
    """{question id: {"right": for each response, "rows": those it counts in}} of a predictions.jsonl, or of the folder that holds it."""
    file, out = (
        path / "predictions.jsonl" if path.is_dir() else path,
        defaultdict(lambda: {"right": [], "rows": ()}),
    )
    if not file.exists():
        raise DataError(f"{file} does not exist; python evaluate.py --ckpt … --out DIR writes one")
    for number, line in enumerate(open(file, encoding="utf-8"), 1):
        try:
            saved = json.loads(line)
            body = saved["trajectory"]
            out[saved["id"]]["right"].append(body["correct"])
            out[saved["id"]]["rows"] = (
                *rows_with(body["split"], body["num_steps"]),
                body["problem_type"],
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise DataError(
                f"{file}:{number}: not a line that evaluate.py wrote ({error})"
            ) from None
    return dict(out)


def compare(a: Path, b: Path) -> dict[str, dict]:
    """{row: n, accuracy of a and of b, their difference with its interval, p} over the questions that both answered."""
    first, second = read_results(a), read_results(b)
    shared = [name for name in first if name in second]
    if not shared:
        raise DataError(f"{a} and {b} have no question in common")
    out = {}
    for row in dict.fromkeys(row for name in shared for row in first[name]["rows"]):
        pairs = np.array(
            [
                [np.mean(side[name]["right"]) for side in (first, second)]
                for name in shared
                if row in first[name]["rows"]
            ]
        )
        out[row] = {
            "n": len(pairs),
            "a": percent(pairs[:, 0]),
            "b": percent(pairs[:, 1]),
            **paired(pairs[:, 1] - pairs[:, 0]),
        }
    return out


def paired(differences: np.ndarray) -> dict:
    """Mean difference in points, its bootstrap interval, and the two-sided p of a sign-flip permutation test.

    >>> paired(np.array([1.0] * 20 + [0.0] * 80))["difference"], paired(np.zeros(9))["p"]
    (20.0, 1.0)
    """
    rng, moved = np.random.default_rng(0), differences[differences != 0]
    flips = np.concatenate(
        [(moved * rng.choice([-1.0, 1.0], (100, len(moved)))).sum(1) for _ in range(100)]
    )
    extreme = int((np.abs(flips) >= abs(moved.sum()) - 1e-9).sum())
    p = round((extreme + 1) / (len(flips) + 1), 4) if len(moved) else 1.0
    return {"difference": percent(differences), "ci95": interval(differences), "p": p}
