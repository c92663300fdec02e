"""What a set of responses says: how often they are right, how sure one can be of it, how they
searched, and where they failed.

The accuracies are the benchmark's: Bridge (3 and 4 hops), Compare, and Overall, which is both. Our
2-hop questions are a row of their own and count in neither. An accuracy is the mean over questions
of the share of a question's responses that are right.

    summarize(responses)       what one evaluation says: results.json
    record, revive             a response to a line of predictions.jsonl, and back
    compare_results(a, b)      two evaluations, on the questions that both answered
"""

import json
from collections import Counter, defaultdict
from math import comb
from pathlib import Path

import numpy as np

from data import DataError, Hop, Question
from engine.text import token_texts
from evaluation.official import as_read, is_right, paper_targets
from retrieval import Hit
from reward import RewardConfig, format_reward, reward
from rollout import Response, RolloutConfig, Turn

TABLE_ROWS = {  # key in results.json: label
    "bridge_2": "Bridge, 2 hops",
    "bridge_3": "Bridge, 3 hops",
    "bridge_4": "Bridge, 4 hops",
    "bridge": "Bridge (3 and 4)",
    "compare": "Compare",
    "overall": "Overall",
}
RECALL_ROWS = ("compare", "bridge_2", "bridge_3", "bridge_4")  # all their chains are equally long


def correct(response: Response) -> int:
    """1 if the answer is right by its benchmark's metric, else 0."""
    return is_right(response.question, response.answer)


def searches(response: Response) -> list[Turn]:
    """The valid turns that searched."""
    return [turn for turn in response.turns if turn.valid and turn.action != "answer"]


def calls(response: Response, action: str) -> int:
    """Valid searches of one kind."""
    return sum(turn.action == action for turn in searches(response))


# ------------------------------------------------------------------------------ the table's rows


def rows_with(split: str, num_steps: int | None) -> list[str]:
    """The rows of the table that a question counts in; another benchmark's split is its own row.

    >>> rows_with("Bridge", 2), rows_with("Bridge", 3), rows_with("Compare", 4)
    (['bridge_2'], ['overall', 'bridge', 'bridge_3'], ['overall', 'compare'])
    """
    if split == "Compare":
        return ["overall", "compare"]
    if split != "Bridge":
        return ["overall", split]
    if num_steps is None:
        return ["overall", "bridge"]
    if num_steps == 2:  # the benchmark has none
        return ["bridge_2"]
    return ["overall", "bridge", f"bridge_{num_steps}"]


def rows_of(questions: list[Question]) -> dict[str, np.ndarray]:
    """{row of the table: (N,) bool, which questions count in it}."""
    rows = [rows_with(question.split, question.num_steps) for question in questions]
    always = ["overall", "bridge", "compare", "bridge_2", "bridge_3", "bridge_4"]
    others = sorted({name for names in rows for name in names})
    return {
        name: np.array([name in names for names in rows], dtype=bool)
        for name in dict.fromkeys([*always, *others])
    }


# ------------------------------------------------------------------------- along the gold chain


def found(hop: Hop, hits: list[Hit]) -> bool:
    """Did a search find what this hop of the gold chain looks for?"""
    return any(hit.row in hop.rows for hit in hits)


def reached(response: Response) -> list[bool]:
    """For each gold hop, whether the policy retrieved it."""

    def retrieved(hop):
        return any(turn.action == hop.action and found(hop, turn.hits) for turn in response.turns)

    return [retrieved(hop) for hop in response.question.hops or ()]


def early(response: Response) -> bool:
    """Did it answer, rightly or not, with fewer valid searches than its gold chain has hops?"""
    hops = response.question.hops or ()
    return response.answer is not None and len(searches(response)) < len(hops)


def wasted(response: Response) -> int:
    """Searches that brought nothing of the gold chain, or only what an earlier one had brought."""
    hops = response.question.hops or ()
    seen = set()  # numbers of hops
    useless = 0
    for turn in searches(response):
        brought = {
            number
            for number, hop in enumerate(hops)
            if turn.action == hop.action and found(hop, turn.hits)
        }
        if not brought - seen:
            useless += 1
        seen |= brought
    return useless


def failure(response: Response) -> str:
    """Why a wrong answer is wrong: the first thing that went wrong along the gold chain."""
    if response.answer is None:
        return "no answer"
    hops = response.question.hops
    if not hops:
        return "unknown"
    retrieved = reached(response)
    if all(retrieved):
        return "wrong comparison" if response.question.split == "Compare" else "wrong reading"
    if len(searches(response)) < len(hops):
        # The answer takes a turn, too: with more turns than hops, one that should search did not.
        return "answered too early" if len(response.turns) <= len(hops) else "malformed turn"
    first_missed = hops[retrieved.index(False)]
    return "wrong image hit" if first_missed.action == "image_search" else "wrong query"


def ceiling(kb, questions: list[Question], cfg: RolloutConfig) -> np.ndarray:
    """(N,) 0 or 1: would a perfect policy with these retrievers reach the answer?

    It would if every image search of the gold chain hits, and every text search with the gold query
    shows the passage. What is missing to 100% the retrievers cannot find. nan without a chain.
    """
    possible = np.array([1.0 if question.hops else np.nan for question in questions])
    hops = [(i, hop) for i, question in enumerate(questions) for hop in question.hops or ()]

    text_hops = [(i, hop) for i, hop in hops if hop.action == "text_search"]
    queries = [hop.query for _, hop in text_hops]
    for (i, hop), hits in zip(text_hops, kb.text_search(queries, cfg.topk)):
        possible[i] *= found(hop, hits)

    image_hops = [(i, hop) for i, hop in hops if hop.action == "image_search"]
    pictures = [questions[i].images[int(hop.about) - 1] for i, hop in image_hops]
    for (i, hop), hits in zip(image_hops, image_hits(kb, pictures, cfg.image_topk)):
        possible[i] *= cfg.oracle_image or found(hop, hits)
    return possible


def image_hits(kb, pictures: list, k: int) -> list[list]:
    """The hits of each picture; none of one that cannot be read, whose question is not asked."""
    try:
        return kb.image_search(pictures, k)
    except ValueError:
        if len(pictures) == 1:
            return [[]]
        half = len(pictures) // 2
        return image_hits(kb, pictures[:half], k) + image_hits(kb, pictures[half:], k)


def coin_toss(kb, questions: list[Question], cfg: RolloutConfig) -> np.ndarray:
    """(N,) float: the chance of being right by identifying both pictures and naming one at random.

    It is a chance of 0 where a number is asked for, and nan where nothing is compared, or without a
    gold chain.
    """
    chances = np.full(len(questions), np.nan)
    for i, question in enumerate(questions):
        if question.split == "Compare" and question.hops:
            hits = image_hits(kb, list(question.images), 1)
            known = cfg.oracle_image or all(map(found, question.hops[:2], hits))
            chances[i] = (known and question.problem_type == "String") / 2
    return chances


def limits_of(kb, questions: list[Question], cfg: RolloutConfig) -> list[tuple[float, float]]:
    """[(ceiling, coin toss)], one per question: what these retrievers allow. For `summarize`."""
    possible = ceiling(kb, questions, cfg).tolist()
    return list(zip(possible, coin_toss(kb, questions, cfg).tolist()))


# ---------------------------------------------------------------------- accuracies and intervals


def percent(values) -> float | None:
    """The mean of values of 0 to 1, in percent; None without any. What is nan does not count."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    return round(100 * float(np.mean(values)), 2) if len(values) else None


def interval(values: np.ndarray, draws: int = 2000) -> list[float]:
    """95% percentile bootstrap, over questions, of the mean of (N,) values; in percent."""
    n = len(values)
    if n == 0:
        return [0.0, 0.0]
    rng = np.random.default_rng(0)
    means = [values[rng.integers(n, size=(100, n))].mean(1) for _ in range(draws // 100)]
    return [round(100 * float(bound), 2) for bound in np.percentile(means, [2.5, 97.5])]


def accuracy_of(values) -> dict:
    """{"n", "accuracy"} of values of 0 to 1, one per question or response."""
    return {"n": len(values), "accuracy": percent(values)}


def pass_at_k(right: np.ndarray, k: int) -> float:
    """The chance that one of k responses is right: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).

    right: (questions, n) of 0 and 1; c is a question's sum.

    >>> pass_at_k(np.array([[1, 0], [0, 0]]), 1), pass_at_k(np.array([[1, 0], [0, 0]]), 2)
    (0.25, 0.5)
    """
    n = right.shape[1]
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in right.sum(1)]))


def majority(group: list[Response]) -> int:
    """Is a group's most frequent answer right? A response without an answer does not vote.

    Answers are the same that the metric reads as the same: "4.5" and "45" are not, as numbers.
    """
    answered = [response for response in group if response.answer]
    if not answered:
        return 0
    votes = [as_read(response.answer, response.question) for response in answered]
    winner, _ = Counter(votes).most_common(1)[0]  # of equally frequent ones the first
    return correct(answered[votes.index(winner)])


# ---------------------------------------------------------------------- what results.json says


def summarize(
    responses: list[Response], samples: int = 1, limits: list[tuple[float, float]] | None = None
) -> dict:
    """All figures of an evaluation: accuracies in percent, rates from 0 to 1.

    responses: `samples` per question, question-major. limits: of each question, by `limits_of`;
    with them also what the retrievers allow.
    """
    questions = [response.question for response in responses[::samples]]
    rows = rows_of(questions)
    right = np.array([correct(r) for r in responses]).reshape(-1, samples)  # (N, samples), 0 and 1
    accuracy = right.mean(1)  # (N,)

    result = {"n": len(questions), "samples": samples, "paper": paper_targets(questions)}
    result |= by_row(accuracy, rows)
    if samples > 1 and rows["overall"].any():
        result |= of_several(responses, right, rows["overall"])
    result |= conduct(responses)
    result |= by_kind(questions, accuracy)
    result |= use_of_searches(responses)
    result |= along_the_chain(responses, rows, samples)
    result |= failures(responses)
    if limits is not None and any(question.hops for question in questions):
        result |= what_retrieval_allows(limits, rows)
    return result


def by_row(accuracy: np.ndarray, rows: dict[str, np.ndarray]) -> dict:
    """Accuracy (N,) by row of the table, each with its number of questions and its interval."""
    result = {}
    for name, mask in rows.items():
        result[name] = percent(accuracy[mask])
        result[f"n_{name}"] = int(mask.sum())
        result[f"ci95_{name}"] = interval(accuracy[mask])
    return result | {"ci95": result["ci95_overall"]}


def of_several(responses: list[Response], right: np.ndarray, overall: np.ndarray) -> dict:
    """Several responses per question: pass@k for powers of two, and the majority's answer."""
    samples = right.shape[1]
    powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    groups = [responses[i * samples : (i + 1) * samples] for i in np.flatnonzero(overall)]
    return {
        "pass_at_k": {k: round(100 * pass_at_k(right[overall], k), 2) for k in [*powers, samples]},
        "majority": percent([majority(group) for group in groups]),
    }


def conduct(responses: list[Response]) -> dict:
    """How the policy went about it: valid format, searches and turns per response."""
    turns_used = Counter(len(response.turns) for response in responses)
    return {
        "format_rate": mean([format_reward(response) for response in responses], 4),
        "tool_calls_mean": mean([len(searches(response)) for response in responses], 3),
        "image_calls_mean": mean([calls(response, "image_search") for response in responses], 3),
        "text_calls_mean": mean([calls(response, "text_search") for response in responses], 3),
        "turns_used": dict(sorted(turns_used.items())),
    }


def mean(values: list[float], digits: int) -> float:
    return round(float(np.mean(values)), digits)


def by_kind(questions: list[Question], accuracy: np.ndarray) -> dict:
    """Accuracy (N,) by type of answer, and by the relation of the last hop where it is known."""
    types, relations = defaultdict(list), defaultdict(list)
    for question, value in zip(questions, accuracy):
        types[question.problem_type].append(value)
        if question.hops:
            relations[question.hops[-1].relation].append(value)

    def table(kinds: dict[str, list]) -> dict:
        return {
            name: accuracy_of(values) | {"ci95": interval(np.array(values))}
            for name, values in sorted(kinds.items())
        }

    return {"by_type": table(types), "by_relation": table(relations)}


def use_of_searches(responses: list[Response]) -> dict:
    """Of responses with a gold chain: early answers, wasted searches, and whether searching pays.

    `enough_searches` are those with as many searches that brought something as the chain has hops.
    """
    chains = [response for response in responses if response.question.hops]
    enough, fewer = [], []
    for response in chains:
        fruitful = sum(bool(turn.hits) for turn in response.turns)
        side = enough if fruitful >= len(response.question.hops) else fewer
        side.append(correct(response))
    return {
        "early_rate": mean([early(r) for r in chains], 4) if chains else None,
        "wasted_calls_mean": mean([wasted(r) for r in chains], 3) if chains else None,
        "enough_searches": accuracy_of(enough),
        "fewer_searches": accuracy_of(fewer),
    }


def along_the_chain(responses: list[Response], rows: dict[str, np.ndarray], samples: int) -> dict:
    """How often the policy retrieved each gold hop, by row of the table.

    Beside it the accuracy on Compare of those responses that retrieved both values.
    """
    recall = {}
    for name in RECALL_ROWS:
        mask = np.repeat(rows[name], samples)  # (N * samples,)
        inside = [response for response, chosen in zip(responses, mask) if chosen]
        hits = [reached(response) for response in inside if response.question.hops]
        recall[name] = [round(float(x), 3) for x in np.mean(hits, 0)] if hits else []
    compared = [r for r in responses if r.question.split == "Compare" and r.question.hops]
    both = [correct(response) for response in compared if all(reached(response))]
    return {"chain_recall": recall, "compare_both_retrieved": accuracy_of(both)}


def failures(responses: list[Response]) -> dict:
    """Why the wrong answers are wrong, the most frequent reason first."""
    reasons = Counter(failure(response) for response in responses if not correct(response))
    return {"failures": dict(reasons.most_common())}


def what_retrieval_allows(limits: list[tuple[float, float]], rows: dict[str, np.ndarray]) -> dict:
    """What needs no policy: the ceiling by row of the table, and Compare by a coin toss."""
    possible, tosses = np.array(limits, dtype=float).T  # (N,) each
    result = {"ceiling": percent(possible[rows["overall"]])}
    for name, mask in rows.items():
        result[f"ceiling_{name}"] = percent(possible[mask])
    if rows["compare"].any():
        result["compare_guess"] = percent(tosses)
    return result


# -------------------------------------------------------------------------------------- files


def record(response: Response, cfg: RewardConfig, tokenizer=None) -> dict:
    """A response as a line of predictions.jsonl: what it did, and its reward.

    With a tokenizer also its tokens and their log-probabilities (null: retrieved).
    """
    question = response.question
    right = correct(response)
    trajectory = {
        "problem": question.problem,
        "images": [str(path) for path in question.images],
        "answer": question.answer,
        "split": question.split,
        "problem_type": question.problem_type,
        "num_steps": question.num_steps,
        "correct": right,
        "failure": "" if right else failure(response),
        "stop": response.stop,
        "answered": response.answer is not None,
        "reward": reward(response, cfg),
        "turns": [turn_record(turn) for turn in response.turns],
    }
    if tokenizer is not None and response.token_ids is not None:
        start = len(response.prompt.token_ids)
        ids = response.token_ids[start:].tolist()
        logprobs = response.logprobs[start:].tolist()
        sampled = response.policy_mask[start:].tolist()
        texts = token_texts(tokenizer)
        trajectory["tokens"] = [texts[token] for token in ids]
        trajectory["logprobs"] = [
            round(logprob, 3) if own else None for logprob, own in zip(logprobs, sampled)
        ]
    return {
        "id": question.id,
        "prediction": response.answer or "",
        "trajectory": trajectory,
    }


def turn_record(turn: Turn) -> dict:
    return {
        "thought": turn.thought,
        "action": turn.action,
        "argument": turn.argument,
        "valid": turn.valid,
        "hits": [[hit.title, hit.text, round(hit.score, 4), hit.row] for hit in turn.hits],
    }


def revive(saved: dict, question: Question) -> Response:
    """The response of a record, without its tensors: all that `summarize` looks at."""
    trajectory = saved["trajectory"]
    turns = [
        Turn(**turn | {"hits": [Hit(*hit) for hit in turn["hits"]]}) for turn in trajectory["turns"]
    ]
    return Response(
        question,
        prompt=None,
        token_ids=None,
        policy_mask=None,
        logprobs=None,
        turns=turns,
        answer=saved["prediction"] if trajectory["answered"] else None,
        stop=trajectory["stop"],
    )


def read_results(path: Path) -> dict[str, dict]:
    """{question id: {"right": 0 or 1 per response, "rows": those it counts in}}.

    path: a predictions.jsonl, or the folder that holds it. Raises DataError where there is none, or
    where a line is not one of ours.
    """
    file = path / "predictions.jsonl" if path.is_dir() else path
    if not file.exists():
        raise DataError(f"{file} does not exist; python evaluate.py --ckpt … --out DIR writes one")
    results = {}
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                saved = json.loads(line)
                body = saved["trajectory"]
                rows = rows_with(body["split"], body["num_steps"])
                pictures = [Path(image).name for image in body.get("images", ())]
                asked = body.get("problem"), pictures
                result = results.setdefault(saved["id"], {"asked": asked, "right": [], "rows": ()})
                result["right"].append(body["correct"])
                result["rows"] = (*rows, body["problem_type"])
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise DataError(
                    f"{file}:{number}: not a line that evaluate.py wrote ({error})"
                ) from None
    return results


# ---------------------------------------------------------------------- is a difference real?


def compare_results(a: Path, b: Path) -> dict[str, dict]:
    """{row: n, accuracy of a and of b, their difference with its interval and its p}.

    Over the questions that both answered, so that each is its own control. The rows are those of
    the table, and the types of answer. Raises DataError when a and b have no question in common.
    """
    first, second = read_results(a), read_results(b)
    shared = [name for name in first if name in second]
    if not shared:
        raise DataError(f"{a} and {b} have no question in common")
    other = [name for name in shared if first[name]["asked"] != second[name]["asked"]]
    if other:
        raise DataError(f"{a} and {b} are of other questions: {other[0]} is not the same in both")
    pairs = defaultdict(list)  # {row: (accuracy of a, of b) per question}
    for name in shared:
        pair = np.mean(first[name]["right"]), np.mean(second[name]["right"])
        for row in first[name]["rows"]:
            pairs[row].append(pair)
    result = {}
    for row, values in pairs.items():
        of_a, of_b = np.array(values).T  # (n,) each
        result[row] = {
            "n": len(values),
            "a": percent(of_a),
            "b": percent(of_b),
            **paired(of_b - of_a),
        }
    return result


def paired(differences: np.ndarray) -> dict:
    """Mean difference in points, its bootstrap interval, and p of a sign-flip permutation test.

    Two-sided, 10,000 flips; for one response per question it is McNemar's test.

    >>> paired(np.array([1.0] * 20 + [0.0] * 80))["difference"], paired(np.zeros(9))["p"]
    (20.0, 1.0)
    """
    rng = np.random.default_rng(0)
    moved = differences[differences != 0]  # flipping the sign of 0 changes nothing
    sums = [(moved * rng.choice([-1.0, 1.0], (100, len(moved)))).sum(1) for _ in range(100)]
    extreme = int((np.abs(sums) >= abs(moved.sum()) - 1e-9).sum())
    p = (extreme + 1) / (10_000 + 1) if len(moved) else 1.0
    return {"difference": percent(differences), "ci95": interval(differences), "p": round(p, 4)}
