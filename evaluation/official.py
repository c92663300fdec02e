"""Whole-file scores: the official metrics of MMhops, INFOSEEK and E-VQA, to the digit, from a file of predictions.

    python evaluate.py --score predictions.jsonl --references data/MMhops --benchmark mmhops
    python evaluate.py --score predictions.jsonl --references infoseek_val.jsonl --qtypes infoseek_val_qtype.jsonl --benchmark infoseek
    python evaluate.py --score predictions.jsonl --references evqa_test.csv --benchmark evqa --bem bem/

A prediction is a line {"id" or "data_id", "prediction"}; "prediction" is the answer alone, a string.

**MMhops** (the authors' evaluator v1.0.0): `reward.score_answer` of every reference; one without a prediction is wrong.

**INFOSEEK** (the authors' script): accuracy on questions unseen in training and on entities unseen in training, rounded to
two places; the final score is their harmonic mean. The script leaves out what was not predicted, so that answering only
the easy half is rewarded; `strict_final_score` counts it as wrong. It also reads "unknown" as the number 0. We keep that.

**E-VQA** (`evaluation_utils.py` of its authors): exact match after VQA-style normalisation, then, where it fails, BEM, a
BERT that judges whether two answers to a question are equivalent. Without a BEM folder the score is exact match only, and
says so. The official normalisation also writes "dont" as "don't" after it has removed every apostrophe from both sides:
that renames words one to one, changes no comparison, and is left out here.
"""

import json
import re
import string
from pathlib import Path

from data import DataError, read_records
from evaluation.bem import Bem
from reward import in_range, normalize, parse_numbers, score_answer

TYPES = ("String", "Numerical", "Time")


def read_predictions(path: Path) -> dict[str, str]:
    """{id: prediction}. Raises DataError, with the line's number, on anything but one string for one id."""
    predictions, lines = {}, {}
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist; --score takes a JSONL file of predictions")
    for number, line in enumerate(open(path, encoding="utf-8"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg})") from None
        key = "data_id" if isinstance(record, dict) and "data_id" in record else "id"
        if (
            not isinstance(record, dict)
            or not isinstance(record.get(key), str)
            or not record[key].strip()
        ):
            raise DataError(
                f'{path}:{number}: a line is an object with an "id" (or "data_id") that is a string'
            )
        if not isinstance(record.get("prediction"), str):
            raise DataError(f'{path}:{number}: "prediction" of {record[key]} is not a string')
        if record[key] in predictions:
            raise DataError(
                f"{path}:{number}: {record[key]} was already predicted in line {lines[record[key]]}"
            )
        predictions[record[key]], lines[record[key]] = record["prediction"], number
    return predictions


def count(scores: list[float]) -> dict:
    """{"correct", "total", "accuracy"}, the accuracy in percent, rounded to two places as the official scripts do."""
    return {
        "correct": int(sum(scores)),
        "total": len(scores),
        "accuracy": round(100 * sum(scores) / len(scores), 2) if scores else 0.0,
    }


def refuse_unknown(predictions: dict, references: dict, path):
    unknown = sorted(predictions.keys() - references.keys())
    if unknown:
        raise DataError(
            f"{len(unknown)} predicted ids are not in {path}: {', '.join(unknown[:5])}{' …' * (len(unknown) > 5)}"
        )


def by_id(path: Path, split: str, key: str) -> dict[str, dict]:
    """References by id. Raises DataError when one appears twice."""
    references = {}
    for where, record in read_records(path, split):
        if not isinstance(record.get(key), str):
            raise DataError(f'{where}: no "{key}" in this reference')
        if record[key] in references:
            raise DataError(f"{where}: the id {record[key]} appears twice")
        references[record[key]] = record
    return references


# ------------------------------------------------------------------------------------------------- MMhops


def score_mmhops(predictions_file: Path, references_file: Path, split: str = "test") -> dict:
    """The official table. Unknown ids are refused, missing and empty predictions are wrong; `answered_only` leaves them out."""
    predictions, references = (
        read_predictions(predictions_file),
        by_id(references_file, split, "id"),
    )
    refuse_unknown(predictions, references, references_file)
    scored = []
    for name, record in references.items():
        kind, row = (
            str(record.get("problem_type")).capitalize(),
            str(record.get("split")).capitalize(),
        )
        if kind not in TYPES or row not in ("Bridge", "Compare"):
            raise DataError(
                f"{references_file}: reference {name} has problem_type {record.get('problem_type')!r} and split {record.get('split')!r}"
            )
        prediction = predictions.get(name, "")
        scored.append(
            (
                row,
                kind,
                bool(prediction.strip()),
                score_answer(prediction, record["answer_eval"], kind),
            )
        )
    result = {"benchmark": "mmhops", "micro": count([s for *_, s in scored])}
    for row in ("Bridge", "Compare"):
        result[row] = count([s for r, *_, s in scored if r == row]) | {
            kind: count([s for r, k, _, s in scored if (r, k) == (row, kind)]) for kind in TYPES
        }
    return result | {
        "missing": sum(not answered for *_, answered, _ in scored),
        "answered_only": count([s for *_, answered, s in scored if answered]),
    }


# ----------------------------------------------------------------------------------------------- INFOSEEK


def score_infoseek_answer(prediction: str, answer_eval, question_type: str) -> int:
    """The authors' rule. Numerical: answer_eval is [{"range": [low, high]}] or {"range": …}."""
    if question_type.lower() != "numerical":
        return int(normalize(prediction) in {normalize(alias) for alias in answer_eval})
    low, high = map(
        float, (answer_eval[0] if isinstance(answer_eval, list) else answer_eval)["range"][:2]
    )
    return in_range(parse_numbers(prediction, words=False), low, high)


def harmonic_mean(a: float, b: float) -> float:
    return 2 / (1 / (a or 1e-12) + 1 / (b or 1e-12))


def score_infoseek(
    predictions_file: Path, references_file: Path, qtypes_file: Path | None = None
) -> dict:
    """Both splits by type and their harmonic mean; beside it the strict one. Predictions of other questions are ignored, as there."""
    predictions, references = (
        read_predictions(predictions_file),
        by_id(references_file, "val", "data_id"),
    )
    types = (
        {
            name: record["question_type"]
            for name, record in by_id(qtypes_file, "val", "data_id").items()
        }
        if qtypes_file
        else {}
    )
    scores = {"unseen_question": [], "unseen_entity": []}
    for name, record in references.items():
        kind = types.get(name, record.get("question_type"))
        if kind is None:
            raise DataError(
                f"{references_file}: no question type of {name}; give the file of types with --qtypes"
            )
        split = (
            "unseen_question"
            if record["data_split"].endswith("unseen_question")
            else "unseen_entity"
        )
        answered = name in predictions
        scores[split].append(
            (
                kind.lower(),
                answered,
                score_infoseek_answer(predictions[name], record["answer_eval"], kind)
                if answered
                else 0,
            )
        )
    result, strict = {"benchmark": "infoseek", "final_score": 0.0}, []
    for split, rows in scores.items():
        result[split] = {"score": count([s for _, answered, s in rows if answered])["accuracy"]} | {
            f"score_{short}": count(
                [
                    s
                    for kind, answered, s in rows
                    if answered
                    and (kind == full or full == "string" and kind not in ("time", "numerical"))
                ]
            )["accuracy"]
            for short, full in (("time", "time"), ("num", "numerical"), ("string", "string"))
        }
        strict.append(count([s for *_, s in rows])["accuracy"])
    result["final_score"] = round(
        harmonic_mean(result["unseen_question"]["score"], result["unseen_entity"]["score"]), 2
    )
    return result | {
        "strict_final_score": round(harmonic_mean(*strict), 2),
        "missing": sum(not answered for rows in scores.values() for _, answered, _ in rows),
    }


# -------------------------------------------------------------------------------------------------- E-VQA

PUNCTUATION = str.maketrans("", "", string.punctuation + "‘’´`_")
SAME = {"none": "0", "entailment": "yes", "true": "yes", "contradiction": "no", "false": "no"} | {
    word: str(i)
    for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}


def normalize_evqa(text: str) -> str:
    """Lower case, no punctuation, no articles and no "the answer is", small numbers as digits, true and false as yes and no.

    >>> normalize_evqa("The answer is: an Oak, three of them"), normalize_evqa("True.")
    ('oak 3 of them', 'yes')
    """
    text = text.lower().replace("\n", " ").replace("\t", " ").strip()
    if text.startswith("<extra_id_0> "):
        text = text.replace("<extra_id_0> ", "")
    text = re.sub(r"\b(the answer is|a|an|the)\b", " ", text.translate(PUNCTUATION))
    return " ".join(SAME.get(word, word) for word in text.split())


def exact_match_evqa(reference: str, candidate: str, question_type: str) -> bool:
    """Equal after normalisation; a multi_answer's parts (`a && b`) must overlap the candidate's with IoU ≥ 0.5.

    >>> exact_match_evqa("oak&&beech&&fir", "the oak and a beech", "multi_answer"), exact_match_evqa("oak", "beech", "automatic")
    (True, False)
    """
    if question_type != "multi_answer":
        return normalize_evqa(reference) == normalize_evqa(candidate)
    gold = {part for part in map(normalize_evqa, reference.split("&&")) if part}
    said = {
        part for part in map(normalize_evqa, re.sub(" and | & ", ",", candidate).split(",")) if part
    }
    return bool(gold) and len(gold & said) / len(gold | said) >= 0.5


def score_evqa(predictions_file: Path, references_file: Path, bem: Path | None = None) -> dict:
    """Best over a question's `|`-separated references. Ids are those `data.py` gives the rows of the official CSV."""
    predictions, references = (
        read_predictions(predictions_file),
        by_id(references_file, "test", "id"),
    )
    refuse_unknown(predictions, references, references_file)
    exact, kinds, pairs = {}, {}, []
    for name, record in references.items():
        candidate, kinds[name] = predictions.get(name, ""), record["question_type"]
        answers = record["answer"].split("|")
        exact[name] = bool(candidate.strip()) and any(
            exact_match_evqa(answer, candidate, kinds[name]) for answer in answers
        )
        if candidate.strip() and not exact[name]:
            pairs += [
                (
                    name,
                    (
                        candidate,
                        answer.replace("&&", ",") if kinds[name] == "multi_answer" else answer,
                        record["question"],
                    ),
                )
                for answer in answers
            ]
    final = dict(exact)
    if bem:
        for (name, _), score in zip(pairs, Bem(bem).scores([triple for _, triple in pairs])):
            final[name] |= score >= 0.5
    accuracy, matched = (
        count(list(final.values()))["accuracy"],
        count(list(exact.values()))["accuracy"],
    )
    return {
        "benchmark": "evqa",
        "metric": f"exact match, then BEM ({bem})"
        if bem
        else "exact match only; the official score needs --bem",
        "accuracy": accuracy,
        "exact_match": matched,
        "bem": accuracy if bem else None,
        "by_type": {
            kind: count([final[name] for name in final if kinds[name] == kind])
            for kind in sorted(set(kinds.values()))
        },
        "missing": sum(name not in predictions for name in references),
    }


def print_scores(result: dict):
    """The table for people; the JSON object follows as the last line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result['benchmark']}{': ' + result['metric'] if 'metric' in result else ''}"
    )
    for column in ("", "correct", "of", "accuracy %"):
        table.add_column(column, justify="right" if column else "left")

    def add(label: str, value):
        if isinstance(value, dict) and "accuracy" in value:
            table.add_row(
                label, str(value["correct"]), str(value["total"]), f"{value['accuracy']:.2f}"
            )
        if isinstance(value, dict):
            for name, part in value.items():
                add(f"{label} {name}", part)
        elif isinstance(value, float) and not label.endswith("accuracy") or label == "accuracy":
            table.add_row(label, "", "", f"{value:.2f}")

    for name, value in result.items():
        add(name, value)
    Console(width=100).print(table)
    print(f"without a prediction: {result['missing']}")
    print(json.dumps(result))
