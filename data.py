"""Questions: what the policy is asked, and what counts as a right answer.

The records are MMhops records (`id`, `problem` with one "<image>" per image, `answer`, `answer_eval`, `split`,
`problem_type`) plus `images`, paths relative to the file, and, where we built the question ourselves, `num_steps`
and `hops`, the gold chain. The policy never sees the gold chain: only the warm start and the diagnostics do.
"""
from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """A question file that cannot be used; the message names the file, the line and what is wrong."""


@dataclass(frozen=True)
class Hop:
    """One step of a gold chain: the action, what it is about, the corpus rows that hold the result, and the result."""
    action: str              # image_search | text_search
    about: str               # title of the article that is read; for image_search "1" or "2", which image
    relation: str            # the relation or attribute looked up; "" for image_search
    rows: tuple[int, ...]    # rows of the text corpus, or of the image corpus for image_search
    result: str              # the next entity's title, or the answer's text
    query: str = ""          # a query that a perfect policy could write; "" for image_search


@dataclass(frozen=True)
class Question:
    id: str
    problem: str                # text with one "<image>" per image
    images: tuple[Path, ...]
    answer: str                 # what to show a person
    answer_eval: tuple[str, ...]  # aliases, or (min, max) when problem_type is Numerical
    problem_type: str           # String | Numerical | Time
    split: str                  # Bridge | Compare
    num_steps: int | None = None  # tool calls that a perfect policy needs
    hops: tuple[Hop, ...] | None = None


def parse_question(record: dict, folder: Path, where: str) -> Question:
    """One JSON record to a Question. Raises DataError, naming `where` and the fault."""
    try:
        question = Question(
            id=record["id"], problem=record["problem"], images=tuple(folder / image for image in record.get("images", [])),
            answer=str(record["answer"]), answer_eval=tuple(map(str, record["answer_eval"])), problem_type=record["problem_type"],
            split=record["split"], num_steps=record.get("num_steps"),
            hops=tuple(Hop(**(hop | {"rows": tuple(hop["rows"])})) for hop in record["hops"]) if record.get("hops") else None)
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: not a question record ({type(error).__name__}: {error})") from None
    if question.problem.count("<image>") != len(question.images):
        raise DataError(f"{where}: question {question.id} has {question.problem.count('<image>')} <image> slots "
                        f"for {len(question.images)} images")
    if question.problem_type not in ("String", "Numerical", "Time"):
        raise DataError(f"{where}: question {question.id} has problem_type {question.problem_type!r}, not String, Numerical or Time")
    for image in question.images:
        if not image.exists():
            raise DataError(f"{where}: question {question.id} names the image {image}, which does not exist")
    return question


def load_questions(path: Path | str, split: str = "test", limit: int | None = None, seed: int | None = None) -> list[Question]:
    """Read a JSONL file, or `{split}.jsonl` of a folder. seed shuffles, limit cuts. Raises DataError on bad input."""
    path = Path(path)
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if not file.exists():
        raise DataError(f"{file} does not exist; build the questions with: python build_mmhops.py --kb data/kb --out data/mmhops")
    questions, seen = [], {}
    for number, line in enumerate(open(file, encoding="utf-8"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{number}: not JSON ({error})") from None
        question = parse_question(record, file.parent, f"{file}:{number}")
        if question.id in seen:
            raise DataError(f"{file}:{number}: the id {question.id} was already used in line {seen[question.id]}; ids must be unique")
        seen[question.id] = number
        questions.append(question)
    if not questions:
        raise DataError(f"{file} holds no questions")
    if seed is not None:
        random.Random(seed).shuffle(questions)
    return questions[:limit]
