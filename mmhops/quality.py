"""Is a question file any good? Histograms, leaks, and what can be had without searching.

    python -m mmhops.quality --data data/mmhops --kb data/kb
    python -m mmhops.quality --sheet 100                 # for a person's eyes: mmhops/sheet.py

A benchmark measures planning only if its answers cannot be had otherwise. Three guessers try, each
by vote of the 50 training questions nearest to the one at hand:

- **question only**: near in the E5 embedding of the question's text;
- **image only**: near in the image encoder's embedding of the first picture;
- **images searched**: the first again, told the titles of the pictured articles; of a comparison it
  names one of the two.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads stall others

import numpy as np

from data import Question, load_questions
from engine.pictures import readable
from evaluation.summary import ceiling, found, percent, rows_of
from files.images import open_image
from files.records import FAULTS
from files.terminal import console, data, fail
from mmhops.expand import mentions
from mmhops.sheet import read_marks, write_sheet
from retrieval import KnowledgeBase
from reward import score_answer
from rollout import RolloutConfig

NEIGHBOURS = 50  # training questions that vote
SHORTCUT = 10  # percent: a guesser without tools that beats it has found a defect of the questions


# ------------------------------------------------------------------------------ the file itself


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
    """How many questions have the text and the pictures of an earlier one."""
    distinct = {(q.problem, tuple(image.name for image in q.images)) for q in questions}
    return len(questions) - len(distinct)


def given_away(question: Question) -> list[str]:
    """What a question says of what is to be found: its answer, or a name of its chain.

    Names are compared without case, punctuation and articles, as answers are: a file of another
    source may spell them otherwise. (`build.names_the_chain` compares them as they are spelled.)
    What this costs: the country code ".in" reads as the word "in", a false alarm.
    """
    text = question.problem.replace("<image>", " ")
    names = [question.answer] + [hop.result for hop in question.hops or ()]
    return [name for name in dict.fromkeys(names) if mentions(text, name)]


# ------------------------------------------------------------------------------ guessers


def vote(question: Question, neighbours: list[Question]) -> str:
    """The neighbours' answer that most of them would accept; a number also within their bounds.

    Neighbours whose answers are of another type vote only where there are no others.
    """
    voters = [n for n in neighbours if n.problem_type == question.problem_type] or neighbours

    def votes(answer):
        return sum(score_answer(answer, n.answer_eval, n.problem_type) for n in voters)

    return max(dict.fromkeys(n.answer for n in voters), key=votes)


def nearest(queries: np.ndarray, keys: np.ndarray, k: int) -> np.ndarray:
    """(N, k) rows of the keys (M, d) nearest to each query (N, d), by inner product."""
    return np.argsort(-(queries @ keys.T), axis=1)[:, :k]


def is_right(guess: str, question: Question) -> int:
    return score_answer(guess, question.answer_eval, question.problem_type)


def voted(questions: list[Question], known: list[Question], rows: np.ndarray) -> np.ndarray:
    """(N,) 0 or 1: is the vote right? rows: (N, k), each question's voters among the known ones."""
    guesses = [vote(q, [known[i] for i in row]) for q, row in zip(questions, rows)]
    return np.array([is_right(guess, q) for guess, q in zip(guesses, questions)])


def text_vectors(kb: KnowledgeBase, questions: list[Question], titles=None) -> np.ndarray:
    """(N, d) E5 vectors of the questions' texts. titles: [[title]] to add at the end."""
    texts = [q.problem.replace("<image>", "") for q in questions]
    if titles is not None:
        texts = [f"{text} {' '.join(shown)}" for text, shown in zip(texts, titles)]
    return kb.text_encoder.encode_queries(texts)


def pictured(kb: KnowledgeBase, questions: list[Question]) -> list[list[str]]:
    """What an image search says of every picture of every question."""
    return [[hits[0].title for hits in kb.image_search(list(q.images), 1)] for q in questions]


def name_one(titles: list[str], voters: list[Question], voters_titles: list[list[str]]) -> str:
    """The first or second title, as the answers of the nearest comparisons mostly were."""
    places = [
        shown.index(voter.answer)
        for voter, shown in zip(voters, voters_titles)
        if voter.answer in shown
    ]
    return titles[round(float(np.mean(places))) if places else 0]


def guessers(
    kb: KnowledgeBase, train: list[Question], questions: list[Question], k: int = NEIGHBOURS
) -> dict[str, np.ndarray]:
    """{guesser: (N,) 0 or 1, is its answer right?}; only the first where there are no pictures."""
    # 1) The question only.
    by_text = nearest(text_vectors(kb, questions), text_vectors(kb, train), k)  # (N, k)
    question_only = voted(questions, train, by_text)
    with_picture = [q for q in train if q.images]
    if not with_picture or not all(q.images for q in questions):
        return {"question only": question_only}

    # 2) The first picture only.
    pictures = [open_image(q.images[0]) for q in questions + with_picture]
    vectors = kb.image_encoder.encode_images(pictures)
    by_image = nearest(vectors[: len(questions)], vectors[len(questions) :], k)
    image_only = voted(questions, with_picture, by_image)

    # 3) The question, and what image searches say.
    titles, train_titles = pictured(kb, questions), pictured(kb, train)
    by_both = nearest(text_vectors(kb, questions, titles), text_vectors(kb, train, train_titles), k)
    images_searched = voted(questions, train, by_both)
    for i, question in enumerate(questions):
        if question.split == "Compare" and question.problem_type == "String":
            voters = [train[n] for n in by_text[i]]
            voters_titles = [train_titles[n] for n in by_text[i]]
            images_searched[i] = is_right(name_one(titles[i], voters, voters_titles), question)
    return {
        "question only": question_only,
        "image only": image_only,
        "images searched": images_searched,
    }


# ------------------------------------------------------------------------------ what can be found


def hop_recall(kb: KnowledgeBase, questions: list[Question], topk: int) -> dict[str, list[float]]:
    """{row of the table: for each gold hop, how often our retriever finds it, when asked well}.

    Only rows whose questions all have chains of one length.
    """
    recall = {}
    for name, mask in rows_of(questions).items():
        chosen = [q for q, inside in zip(questions, mask) if inside and q.hops]
        lengths = {len(q.hops) for q in chosen}
        if len(lengths) != 1:
            continue
        recall[name] = []
        for step in range(lengths.pop()):
            hops = [(q, q.hops[step]) for q in chosen]
            images = [(q, hop) for q, hop in hops if hop.action == "image_search"]
            texts = [hop for _, hop in hops if hop.action == "text_search"]
            pictures = [q.images[int(hop.about) - 1] for q, hop in images]
            results = list(zip([hop for _, hop in images], kb.image_search(pictures, 1)))
            results += zip(texts, kb.text_search([hop.query for hop in texts], topk))
            recall[name].append(round(float(np.mean([found(*pair) for pair in results])), 3))
    return recall


# ------------------------------------------------------------------------------ the report


@dataclass
class Args:
    """Report on a question file."""

    data: Path = Path("data/mmhops")
    kb: Path = Path("data/kb")
    split: str = "test"
    limit: int | None = 500  # questions looked at
    train_limit: int = 2000  # training questions the guessers learn from
    topk: int = 2
    sheet: int = 0  # instead: a page with so many questions, on which a person marks the good ones
    out: Path = Path("sheet.html")  # …the page
    read_sheet: Path | None = None  # instead: the rate that comes of what the page saved
    images: Path | None = None
    qtypes: Path | None = None


def report(args: Args) -> dict:
    """Print the report; returns {guesser: {row of the table: percent right}} and counts."""
    from rich.table import Table

    screen = console(width=110, highlight=True)
    kb = KnowledgeBase.open(args.kb)
    questions = load_questions(args.data, args.split, args.limit, 0, args.images, args.qtypes)
    train = load_questions(args.data, "train", args.train_limit, 0, args.images, args.qtypes)
    questions, train = ([q for q in asked if readable(q)] for asked in (questions, train))

    # 1) The questions as they stand.
    for name, counts in histograms(questions).items():
        parts = [f"{data(key)} {count}" for key, count in counts.most_common()]
        screen.print(f"[bold]{name}[/]: " + ", ".join(parts))
    words = np.array([len(q.problem.replace("<image>", "").split()) for q in questions])
    twice = duplicates(questions)
    leaky = [q for q in questions if given_away(q)]
    example = f", e.g. {data(leaky[0].id)} ({data(given_away(leaky[0])[0])})" if leaky else ""
    screen.print(
        f"[bold]words per question[/]: {words.mean():.1f} (longest {words.max()})    "
        f"[bold]duplicates[/]: {twice}    [bold]leaks[/]: {len(leaky)}{example}"
    )

    # 2) What guessers reach, and what a perfect policy could with our retriever.
    guesses = guessers(kb, train, questions)  # {guesser: (N,)}
    answerable = ceiling(kb, questions, RolloutConfig(topk=args.topk))  # (N,)
    recall = hop_recall(kb, questions, args.topk)

    # 3) The table, a line per row that has questions.
    result = {name: {} for name in guesses} | {"duplicates": twice, "leaks": len(leaky)}
    table = Table(
        "",
        "questions",
        *[f"{name} %" for name in guesses],
        "answerable %",
        "found at each hop",
        title=f"{args.data}, {args.split}: what guessers reach, "
        f"and what our retriever (top-{args.topk}) can",
    )
    for row, mask in rows_of(questions).items():
        if not mask.any():
            continue
        for name, right in guesses.items():
            result[name][row] = round(100 * float(right[mask].mean()), 2)
        possible = percent(answerable[mask])
        table.add_row(
            row,
            str(int(mask.sum())),
            *[f"{result[name][row]:.1f}" for name in guesses],
            "unknown" if possible is None else f"{possible:.1f}",
            "  ".join(map(str, recall.get(row, []))),
        )
    screen.print(table)

    # 4) Shortcuts.
    for name in ("question only", "image only"):
        share = result.get(name, {}).get("overall", 0)
        if share > SHORTCUT:
            screen.print(
                f"[red]the {name} guesser is right in {share}%: "
                "there is a shortcut in these questions[/]"
            )
    return result


def main(args: Args):
    if args.read_sheet:
        print(json.dumps(read_marks(args.read_sheet)))
    elif args.sheet:
        questions = load_questions(args.data, args.split, args.sheet, 0, args.images, args.qtypes)
        questions = list(filter(readable, questions))
        write_sheet(questions, args.kb, args.out, f"{args.data}, {args.split}")
        print(f"wrote {args.out}: {len(questions)} questions; open it in a browser")
    else:
        report(args)


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except FAULTS as error:
        fail(error)
