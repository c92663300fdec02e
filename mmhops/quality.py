"""Is a question file any good? Histograms, duplicates, leaks, answerability, and what can be had without searching.

    python -m mmhops.quality --data data/mmhops --kb data/kb

A benchmark measures planning only if its answers cannot be had otherwise. Three guessers try, all by vote of the 50
training questions nearest to the one at hand, each neighbour voting for its answer (a number also for those it accepts):

- **question only**: near in the E5 embedding of the question's text;
- **image only**: near in the image encoder's embedding of the first picture;
- **images searched**: reads the titles of the pictured articles and nothing else. For a comparison it names one of them,
  with the question's vote between first and second; elsewhere it is the question-only guesser, told the title.

A guesser without tools that beats 10% has found a shortcut: a defect of the questions, not a skill.
"""

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from data import DataError, Question, load_questions
from evaluation.summary import ceiling, found, rows_of
from retrieval import KnowledgeBase, KnowledgeBaseError, open_image
from reward import normalize, score_answer
from rollout import RolloutConfig


def histograms(questions: list[Question]) -> dict[str, Counter]:
    """Counts by steps, split, answer type, images, and last relation where the chain is known."""
    return {
        "steps": Counter(q.num_steps for q in questions),
        "split": Counter(q.split for q in questions),
        "type": Counter(q.problem_type for q in questions),
        "images": Counter(len(q.images) for q in questions),
        "asked for": Counter(q.hops[-1].relation for q in questions if q.hops),
    }


def duplicates(questions: list[Question]) -> int:
    """Questions with the text and the pictures of an earlier one."""
    return len(questions) - len(
        {(q.problem, tuple(image.name for image in q.images)) for q in questions}
    )


def leaks(question: Question) -> list[str]:
    """What a question gives away: its answer, or the name of an entity of its chain."""
    text = f" {normalize(question.problem.replace('<image>', ' '))} "
    names = [question.answer] + [hop.result for hop in question.hops or ()]
    return [
        name for name in dict.fromkeys(names) if normalize(name) and f" {normalize(name)} " in text
    ]


def vote(question: Question, neighbours: list[Question]) -> str:
    """The neighbours' answer that most of them would accept."""
    same = [n for n in neighbours if n.problem_type == question.problem_type] or neighbours
    candidates = list(dict.fromkeys(n.answer for n in same))
    return max(
        candidates,
        key=lambda answer: sum(score_answer(answer, n.answer_eval, n.problem_type) for n in same),
    )


def nearest(queries: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    """(N, k) rows of the keys nearest to each query, by inner product."""
    return np.argsort(-(queries @ keys.T), axis=1)[:, :k]


def guessers(
    kb: KnowledgeBase, train: list[Question], questions: list[Question], k: int = 50
) -> dict[str, np.ndarray]:
    """{guesser: (N,) is its answer right}."""

    def text_vectors(some, titles=None):
        return kb.text_encoder.encode_queries(
            [
                q.problem.replace("<image>", "") + (f" {title}" if titles else "")
                for q, title in zip(some, titles or some)
            ]
        )

    def pictured(some):
        return [[hits[0].title for hits in kb.image_search(list(q.images), 1)] for q in some]

    def right(rows):
        return np.array(
            [
                score_answer(vote(q, [train[i] for i in row]), q.answer_eval, q.problem_type)
                for q, row in zip(questions, rows)
            ]
        )

    by_text = nearest(text_vectors(questions), text_vectors(train), k)
    shown = [q for q in train if q.images]
    if not shown or not all(q.images for q in questions):
        return {"question only": right(by_text)}
    pictures = kb.image_encoder.encode_images([open_image(q.images[0]) for q in questions + shown])
    by_image = nearest(pictures[: len(questions)], pictures[len(questions) :], k)
    titles, train_titles = pictured(questions), pictured(train)
    by_both = right(
        nearest(
            text_vectors(questions, [" ".join(t) for t in titles]),
            text_vectors(train, [" ".join(t) for t in train_titles]),
            k,
        )
    )
    for i, q in enumerate(questions):
        if q.split == "Compare":  # first or second, as the answers of the nearest comparisons were
            places = [
                train_titles[n].index(train[n].answer)
                for n in by_text[i]
                if train[n].answer in train_titles[n]
            ]
            by_both[i] = score_answer(
                titles[i][round(float(np.mean(places))) if places else 0],
                q.answer_eval,
                q.problem_type,
            )
    return {
        "question only": right(by_text),
        "image only": np.array(
            [
                score_answer(vote(q, [shown[i] for i in row]), q.answer_eval, q.problem_type)
                for q, row in zip(questions, by_image)
            ]
        ),
        "images searched": by_both,
    }


def hop_recall(kb, questions: list[Question], topk: int) -> dict[str, list[float]]:
    """{row of the table: how often our retriever finds each gold hop, when asked well}."""
    cfg, out = RolloutConfig(topk=topk), {}
    for name, mask in rows_of(questions).items():
        chosen = [q for q, inside in zip(questions, mask) if inside and q.hops]
        if chosen and len({len(q.hops) for q in chosen}) == 1:
            out[name] = []
            for step in range(len(chosen[0].hops)):
                hops = [(q, q.hops[step]) for q in chosen]
                if hops[0][1].action == "image_search":
                    hits = kb.image_search([q.images[int(hop.about) - 1] for q, hop in hops], 1)
                else:
                    hits = kb.text_search([hop.query for _, hop in hops], cfg.topk)
                out[name].append(
                    round(float(np.mean([found(hop, h) for (_, hop), h in zip(hops, hits)])), 3)
                )
    return out


@dataclass
class Args:
    """Report on a question file."""

    data: Path = Path("data/mmhops")
    kb: Path = Path("data/kb")
    split: str = "test"
    limit: int | None = 500  # questions looked at
    train_limit: int = 2000  # training questions the guessers learn from
    topk: int = 2
    images: Path | None = None
    qtypes: Path | None = None


def report(args: Args) -> dict:
    """Print the report; returns {guesser: {row: accuracy}} and counts."""
    from rich.console import Console
    from rich.table import Table

    console, kb = Console(width=110), KnowledgeBase.open(args.kb)
    questions = load_questions(args.data, args.split, args.limit, 0, args.images, args.qtypes)
    train = load_questions(args.data, "train", args.train_limit, 0, args.images, args.qtypes)
    for name, counts in histograms(questions).items():
        console.print(
            f"[bold]{name}[/]: "
            + ", ".join(f"{key} {count}" for key, count in counts.most_common())
        )
    leaky, twice = [q for q in questions if leaks(q)], duplicates(questions)
    words = np.array([len(re.sub("<image>", "", q.problem).split()) for q in questions])
    console.print(
        f"[bold]words a question[/]: {words.mean():.1f} (longest {words.max()})    [bold]duplicates[/]: {twice}    "
        f"[bold]leaks[/]: {len(leaky)}"
        + (f", e.g. {leaky[0].id} ({leaks(leaky[0])[0]})" if leaky else "")
    )
    rows, guesses = rows_of(questions), guessers(kb, train, questions)
    possible, recall = (
        ceiling(kb, questions, RolloutConfig(topk=args.topk)),
        hop_recall(kb, questions, args.topk),
    )
    table = Table(
        "",
        "questions",
        *[f"{name} %" for name in guesses],
        "answerable %",
        "found at each hop",
        title=f"{args.data}, {args.split}: what guessers reach, and what our retriever (top-{args.topk}) can",
    )
    result = {name: {} for name in guesses} | {"duplicates": twice, "leaks": len(leaky)}
    for row, mask in rows.items():
        if mask.any():
            for name, right in guesses.items():
                result[name][row] = round(100 * float(right[mask].mean()), 2)
            table.add_row(
                row,
                str(int(mask.sum())),
                *[f"{result[name][row]:.1f}" for name in guesses],
                f"{100 * possible[mask].mean():.1f}"
                if any(q.hops for q in questions)
                else "unknown",
                "  ".join(map(str, recall.get(row, []))),
            )
    console.print(table)
    for name in ("question only", "image only"):
        if result.get(name, {}).get("overall", 0) > 10:
            console.print(
                f"[red]the {name} guesser is right in {result[name]['overall']}%: there is a shortcut in these questions[/]"
            )
    return result


if __name__ == "__main__":
    import tyro

    try:
        report(tyro.cli(Args))
    except (DataError, KnowledgeBaseError) as error:
        sys.exit(f"error: {error}")
