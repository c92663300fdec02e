"""Whole-file scores: the official metrics of MMhops, INFOSEEK and E-VQA, to the digit.

    python evaluate.py --score predictions.jsonl --references data/MMhops --benchmark mmhops
    python evaluate.py --score predictions.jsonl --references infoseek_val.jsonl \\
        --qtypes infoseek_val_qtype.jsonl --benchmark infoseek
    python evaluate.py --score predictions.jsonl --references evqa_test.csv --benchmark evqa \\
        --bem bem/

A line of predictions.jsonl is {"id" or "data_id", "prediction"}; "prediction" is the answer alone.
Every `score_…` returns one JSON object; its accuracies are in percent, rounded to two places.
"""

import json
import re
import string
from dataclasses import dataclass
from pathlib import Path

from data import DataError, read_records
from evaluation.bem import Bem
from reward import in_range, normalize, parse_numbers, score_answer

TYPES = ("String", "Numerical", "Time")
TWO_HOPS = "Bridge, 2 hops"  # only our own question files have such questions
# What the paper's public summaries report of its 7B, by row of our table: on the released
# questions, with their own knowledge bases.
PAPER = {
    "mmhops": {"bridge": 51.35, "compare": 22.01},
    "infoseek": {"overall": 33.2},
    "evqa": {"2_hop": 23.3},
}


@dataclass
class Scored:
    """One reference and what was predicted for it."""

    split: str
    kind: str  # question type
    answered: bool
    right: int  # 0 or 1


def is_right(question, answer: str | None) -> int:
    """1 if right by the rule of the question's own benchmark, else 0.

    E-VQA's is its exact match; its BEM needs `--score` and `--bem`.
    """
    answer = answer or ""
    if question.benchmark == "infoseek":
        accepted = question.answer_eval
        if question.problem_type == "Numerical":
            accepted = [{"range": accepted}]
        return score_infoseek_answer(answer, accepted, question.problem_type)
    if question.benchmark == "evqa":
        references = question.reference.split("|")
        exact = (exact_match_evqa(known, answer, question.split) for known in references)
        return int(bool(answer.strip()) and any(exact))
    return score_answer(answer, question.answer_eval, question.problem_type)


def as_read(answer: str, question) -> str:
    """What that rule compares of an answer: equal texts are right or wrong together."""
    if question.benchmark == "evqa":
        return normalize_evqa(answer)
    if question.problem_type == "Numerical":
        return str(parse_numbers(answer, words=question.benchmark != "infoseek"))
    return normalize(answer)


def paper_targets(questions: list) -> dict[str, float]:
    """The paper's figures by row of the table; {} for questions that it did not ask: ours."""
    kinds = {question.benchmark for question in questions}
    if len(kinds) != 1 or any(question.hops for question in questions):
        return {}
    return PAPER[kinds.pop()]


# ---------------------------------------------------------------------------------------- the files


def read_predictions(path: Path) -> dict[str, str]:
    """{id: prediction}. Raises DataError, with the line's number, where a line is not one."""
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist; --score takes a JSONL file of predictions")
    predictions = {}
    lines = {}  # id: where it was predicted
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            name, prediction = parse_prediction(line, f"{path}:{number}")
            if name in predictions:
                raise DataError(
                    f"{path}:{number}: {name} was already predicted in line {lines[name]}"
                )
            predictions[name] = prediction
            lines[name] = number
    return predictions


def parse_prediction(line: str, where: str) -> tuple[str, str]:
    """(id, prediction) of a line. Raises DataError.

    >>> parse_prediction('{"data_id": "infoseek_val_1", "prediction": "an oak"}', "p.jsonl:1")
    ('infoseek_val_1', 'an oak')
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg})") from None
    name = None
    if isinstance(record, dict):
        name = record["data_id"] if "data_id" in record else record.get("id")
    if not isinstance(name, str) or not name.strip():
        raise DataError(
            f'{where}: a line is an object with an "id" (or "data_id") that is a string'
        )
    if not isinstance(record.get("prediction"), str):
        raise DataError(f'{where}: "prediction" of {name} is not a string')
    return name, record["prediction"]


def read_references(path: Path, split: str, key: str, *needed: str) -> dict[str, dict]:
    """References by the id that they keep under `key`. Raises DataError when one appears twice, or
    lacks what is needed.
    """
    references = {}
    for where, record in read_records(path, split):
        for field in (key, *needed):
            if field not in record:
                raise DataError(f'{where}: no "{field}" in this reference')
        name = record[key]
        if not isinstance(name, str):
            raise DataError(f'{where}: "{key}" is no text in this reference')
        if name in references:
            raise DataError(f"{where}: the id {name} appears twice")
        references[name] = record
    return references


def refuse_unknown(predictions: dict, references: dict, path):
    """Raises DataError when something was predicted that is not among the references."""
    unknown = sorted(predictions.keys() - references.keys())
    if unknown:
        shown = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
        raise DataError(f"{len(unknown)} predicted ids are not in {path}: {shown}")


def tally(scores: list) -> dict:
    """Of scores of 0 and 1: {"correct", "total", "accuracy"}, rounded as the official scripts do.

    >>> tally([1, 0, 1])
    {'correct': 2, 'total': 3, 'accuracy': 66.67}
    """
    return {
        "correct": int(sum(scores)),
        "total": len(scores),
        "accuracy": round(100 * sum(scores) / len(scores), 2) if scores else 0.0,
    }


# ------------------------------------------------------------------------------------------- MMhops


def score_mmhops(predictions_file: Path, references_file: Path, split: str = "test") -> dict:
    """The table of the authors' evaluator v1.0.0: `reward.score_answer` of every reference.

    Predictions of unknown ids are refused. A missing or empty prediction is wrong;
    "answered_only" leaves those out. Raises DataError.

    Our own question files also have Bridge questions of two hops. Those (num_steps 2, a field that
    the released files do not have) are in neither Bridge nor micro nor "answered_only", as in the
    table of evaluate.py; they have a row of their own, "Bridge, 2 hops".
    """
    # 1) every reference, scored
    predictions = read_predictions(predictions_file)
    references = read_references(references_file, split, "id", "answer_eval")
    refuse_unknown(predictions, references, references_file)
    scored = []
    for name, record in references.items():
        row = str(record.get("split")).capitalize()
        kind = str(record.get("problem_type")).capitalize()
        if kind not in TYPES or row not in ("Bridge", "Compare"):
            raise DataError(
                f"{references_file}: reference {name} has problem_type "
                f"{record.get('problem_type')!r} and split {record.get('split')!r}"
            )
        if row == "Bridge" and record.get("num_steps") == 2:
            row = TWO_HOPS
        prediction = predictions.get(name, "")
        right = score_answer(prediction, record["answer_eval"], kind)
        scored.append(Scored(row, kind, bool(prediction.strip()), right))
    official = [s for s in scored if s.split != TWO_HOPS]

    # 2) the table: all of them, by split, by split and type
    result = {"benchmark": "mmhops", "micro": tally([s.right for s in official])}
    rows = ["Bridge", "Compare"]
    if len(official) < len(scored):
        rows.append(TWO_HOPS)
    for row in rows:
        inside = [s for s in scored if s.split == row]
        result[row] = tally([s.right for s in inside])
        for kind in TYPES:
            result[row][kind] = tally([s.right for s in inside if s.kind == kind])
    result["missing"] = sum(not s.answered for s in scored)
    result["answered_only"] = tally([s.right for s in official if s.answered])
    return result


# ----------------------------------------------------------------------------------------- INFOSEEK


def score_infoseek(
    predictions_file: Path, references_file: Path, qtypes_file: Path | None = None
) -> dict:
    """The authors' script: accuracy on questions unseen in training and on entities unseen in
    training; the final score is their harmonic mean.

    Their script leaves out what was not predicted, so that answering only the easy half is
    rewarded; "strict_final_score" counts it as wrong. Predictions of other questions are ignored,
    as there. Raises DataError when a question has no type.
    """
    # 1) every reference, scored; its type stands in the file of types, or in the reference
    predictions = read_predictions(predictions_file)
    references = read_references(references_file, "val", "data_id", "data_split", "answer_eval")
    types = read_references(qtypes_file, "val", "data_id") if qtypes_file else {}
    splits = {"unseen_question": [], "unseen_entity": []}
    for name, record in references.items():
        kind = types.get(name, record).get("question_type")
        if kind is None:
            raise DataError(
                f"{references_file}: no question type of {name}; "
                "give the file of types with --qtypes"
            )
        of_questions = record["data_split"].endswith("unseen_question")
        split = "unseen_question" if of_questions else "unseen_entity"
        answered = name in predictions
        right = 0
        if answered:
            right = score_infoseek_answer(predictions[name], record["answer_eval"], kind)
        splits[split].append(Scored(split, kind.lower(), answered, right))

    # 2) the authors' table, of what was predicted
    result = {"benchmark": "infoseek", "final_score": 0.0}
    for split, scored in splits.items():
        result[split] = infoseek_row([s for s in scored if s.answered])
    result["final_score"] = harmonic_mean(*(result[split]["score"] for split in splits))

    # 3) the strict one, of every reference
    strict = (infoseek_row(scored)["score"] for scored in splits.values())
    result["strict_final_score"] = harmonic_mean(*strict)
    result["missing"] = sum(not s.answered for scored in splits.values() for s in scored)
    return result


def infoseek_row(scored: list[Scored]) -> dict[str, float]:
    """Accuracies of a split: of all, and by type. A type that has no column counts as a string."""

    def accuracy(of: list[Scored]) -> float:
        return tally([s.right for s in of])["accuracy"]

    return {
        "score": accuracy(scored),
        "score_time": accuracy([s for s in scored if s.kind == "time"]),
        "score_num": accuracy([s for s in scored if s.kind == "numerical"]),
        "score_string": accuracy([s for s in scored if s.kind not in ("time", "numerical")]),
    }


def score_infoseek_answer(prediction: str, answer_eval, question_type: str) -> int:
    """1 if right by the authors' rule, else 0. "unknown" is read as the number 0, as there.

    answer_eval: aliases; of a numerical question [{"range": [low, high]}] or {"range": …}.

    >>> score_infoseek_answer("about 3.5", [{"range": [3.0, 4.0]}], "Numerical")
    1
    """
    if question_type.lower() != "numerical":
        return int(normalize(prediction) in {normalize(alias) for alias in answer_eval})
    accepted = answer_eval[0] if isinstance(answer_eval, list) else answer_eval
    low, high = accepted["range"][:2]
    return in_range(parse_numbers(prediction, words=False), float(low), float(high))


def harmonic_mean(a: float, b: float) -> float:
    """Rounded to two places; 0 where one of them is.

    >>> harmonic_mean(66.67, 100.0), harmonic_mean(0.0, 50.0)
    (80.0, 0.0)
    """
    a, b = max(a, 1e-12), max(b, 1e-12)
    return round(2 / (1 / a + 1 / b), 2)


# -------------------------------------------------------------------------------------------- E-VQA

PUNCTUATION = str.maketrans("", "", string.punctuation + "‘’´`_")
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SAME = {word: str(i) for i, word in enumerate(NUMBERS)} | {
    "none": "0",
    "entailment": "yes",
    "true": "yes",
    "contradiction": "no",
    "false": "no",
}


def score_evqa(predictions_file: Path, references_file: Path, bem: Path | None = None) -> dict:
    """The metric of `evaluation_utils.py` of its authors: exact match after VQA-style
    normalisation, then, where it fails, BEM: a BERT that judges whether two answers to a question
    are equivalent. The best of a question's `|`-separated references counts.

    Without a BEM folder the score is exact match only, and says so. Ids are those that `data.py`
    gives the rows of the official CSV. Raises DataError.
    """
    # 1) exact match
    predictions = read_predictions(predictions_file)
    references = read_references(references_file, "test", "id", "question_type", "answer")
    refuse_unknown(predictions, references, references_file)
    exact = {}  # id: bool
    for name, record in references.items():
        candidate = predictions.get(name, "")
        exact[name] = bool(candidate.strip()) and any(
            exact_match_evqa(answer, candidate, record["question_type"])
            for answer in record["answer"].split("|")
        )

    # 2) BEM, of what is answered and not an exact match
    final = dict(exact)
    if bem:
        names, triples = [], []
        for name, record in references.items():
            candidate = predictions.get(name, "")
            if exact[name] or not candidate.strip():
                continue
            for answer in record["answer"].split("|"):
                if record["question_type"] == "multi_answer":
                    answer = answer.replace("&&", ",")
                names.append(name)
                triples.append((candidate, answer, record["question"]))
        for name, score in zip(names, Bem(bem).scores(triples)):
            final[name] |= score >= 0.5

    # 3) the table
    kinds = {name: record["question_type"] for name, record in references.items()}
    accuracy = tally(list(final.values()))["accuracy"]
    metric = "exact match only; the official score needs --bem"
    return {
        "benchmark": "evqa",
        "metric": f"exact match, then BEM ({bem})" if bem else metric,
        "accuracy": accuracy,
        "exact_match": tally(list(exact.values()))["accuracy"],
        "bem": accuracy if bem else None,
        "by_type": {
            kind: tally([final[name] for name in references if kinds[name] == kind])
            for kind in sorted(set(kinds.values()))
        },
        "missing": sum(name not in predictions for name in references),
    }


def exact_match_evqa(reference: str, candidate: str, question_type: str) -> bool:
    """Equal after normalisation; a multi_answer's parts (`a && b`) must overlap the candidate's
    with IoU ≥ 0.5.

    >>> exact_match_evqa("oak&&beech&&fir", "the oak and a beech", "multi_answer")
    True
    >>> exact_match_evqa("oak", "beech", "automatic")
    False
    """
    if question_type != "multi_answer":
        return normalize_evqa(reference) == normalize_evqa(candidate)
    gold = normalized_parts(reference.split("&&"))
    said = normalized_parts(re.sub(" and | & ", ",", candidate).split(","))
    return bool(gold) and len(gold & said) / len(gold | said) >= 0.5


def normalized_parts(parts: list[str]) -> set[str]:
    return {normalize_evqa(part) for part in parts} - {""}


def normalize_evqa(text: str) -> str:
    """Lower case, no punctuation, no articles and no "the answer is", small numbers as digits, true
    and false as yes and no.

    The official normalisation also writes "dont" as "don't" after it has removed every apostrophe
    from both sides: that renames words one to one, changes no comparison, and is left out here.

    >>> normalize_evqa("The answer is: an Oak, three of them"), normalize_evqa("True.")
    ('oak 3 of them', 'yes')
    """
    text = text.lower().replace("\n", " ").replace("\t", " ").strip()
    if text.startswith("<extra_id_0> "):
        text = text.replace("<extra_id_0> ", "")
    text = text.translate(PUNCTUATION)
    text = re.sub(r"\b(the answer is|a|an|the)\b", " ", text)
    return " ".join(SAME.get(word, word) for word in text.split())


# ----------------------------------------------------------------------------------------- printing


def print_scores(result: dict):
    """The table for people; the JSON object follows as the last line."""
    from rich.table import Table

    from files.terminal import console, data

    title = result["benchmark"]
    if "metric" in result:
        title += ": " + result["metric"]
    table = Table(title=data(title))
    table.add_column("")
    for column in ("correct", "of", "accuracy %"):
        table.add_column(column, justify="right")
    for row in table_rows(result):
        table.add_row(*map(data, row))
    console(width=100, highlight=True).print(table)
    print(f"without a prediction: {result['missing']}")
    print(json.dumps(result))


def table_rows(result: dict, above: str = ""):
    """Yield (label, correct, of, accuracy), as text, of every tally and accuracy in a result.

    >>> list(table_rows({"Bridge": {"correct": 1, "total": 2, "accuracy": 50.0}, "score": 0.25}))
    [('Bridge', '1', '2', '50.00'), ('score', '', '', '0.25')]
    """
    for name, value in result.items():
        label = f"{above} {name}".strip()
        if isinstance(value, float):
            yield label, "", "", f"{value:.2f}"
        elif isinstance(value, dict):
            if "accuracy" in value:
                yield label, str(value["correct"]), str(value["total"]), f"{value['accuracy']:.2f}"
            inner = {key: part for key, part in value.items() if key != "accuracy"}
            yield from table_rows(inner, label)
