"""The reward: rule-based, gated, bounded.

    R = α·R_outcome + β·R_format + γ·R_action

- R_outcome ∈ {0, 1}: the answer is right by the benchmark's own metric (`score_answer`).
- R_format ∈ {0, 1}: every turn was one thought and one well-formed, executable action, and the last
  was an answer.
- R_action: the number of different searches, paid **only when the answer is right and the format
  valid**. A wrong answer earns nothing for its searches; a right one is paid for needless ones.

Only what the policy wrote is read here (`Response` and `Turn` are in rollout.py): a passage that
contains "<answer>" earns nothing. Each setting is a flag, so the paper's ablations are flags.
[D] marks what the first author's public development code does where the paper does not say.
"""

import re
import string
from contextlib import suppress
from dataclasses import dataclass

from word2number import w2n

from files.ranges import Amount, NotNegative

ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"[-+]?\.?\d+(?:,\d{3})*\.?\d*(?:[eE][-+]?\d+)?")
NUMBER_WORDS = re.compile(
    rf"\b(?:{'|'.join(w2n.american_number_system)}|trillion|and|[-\s])+\b", re.IGNORECASE
)


# fmt: off
@dataclass
class RewardConfig:
    # The paper does not publish α, β, γ: these are [D].
    alpha: NotNegative = 1.0      # weight of R_outcome
    beta: NotNegative = 1.0       # weight of R_format
    gamma: NotNegative = 0.25     # paid per search, when gated in
    # Identical calls are paid once ([D] pays each). A needless but different one is paid, too.
    count_distinct: bool = True
    gate_action: bool = True      # pay searches only when the answer is right and the format valid
    overlong_buffer: Amount = 0   # DAPO's soft length penalty, over the last so many tokens; 0: off
# fmt: on


def normalize(text: str) -> str:
    """Lower-case, without ASCII punctuation, articles and extra spaces; accents stay.

    >>> normalize("The  Lied der Deutschen!")
    'lied der deutschen'
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(ARTICLES.sub(" ", text).split())


def parse_numbers(text: str, words: bool = True) -> list[float]:
    """The first two numbers of a text, by the benchmark's rule, its quirks included.

    Spans of number words become digits first (INFOSEEK's rule, words=False, leaves them). A hyphen
    after a digit separates. No units are converted. As in the official scripts, ".5" is read as 5,
    and "3 million" as 31000000: " million" is a span of its own.

    >>> parse_numbers("49,474,805 (2025 est.)"), parse_numbers("10-20 km")
    ([49474805.0, 2025.0], [10.0, 20.0])
    >>> parse_numbers("twenty-one"), parse_numbers("3 million"), parse_numbers("x")
    ([21.0], [31000000.0], [])
    """
    if words:
        # where word2number stumbles the text stays as it is
        with suppress(IndexError, KeyError, TypeError):
            text = NUMBER_WORDS.sub(to_digits, text)
    after_digit = [False] + [character.isdigit() for character in text]
    text = "".join(" - " if c == "-" and after_digit[i] else c for i, c in enumerate(text))
    found = []
    for piece in NUMBER.findall(text)[:2]:
        piece = piece.replace(",", "").strip(".")
        try:
            found.append(float(piece.split(".")[0] if piece.count(".") > 1 else piece))
        except ValueError:  # "-.5.2"; the official script stops here
            continue
    return found


def to_digits(match: re.Match) -> str:
    """A span of number words as a number, where it is one."""
    try:
        return str(w2n.word_to_num(match.group()))
    except ValueError:
        return match.group()


def in_range(numbers: list[float], low: float, high: float) -> int:
    """1 if the first two numbers of an answer are right by the rule of MMhops and INFOSEEK, else 0.

    A single number, or the first of a descending pair, must lie in [low, high]. An ascending pair
    is a range, which must be contained in it or overlap it with IoU ≥ 0.5. No number at all counts
    as the range [0, 0]. The tiny constants are the official script's.

    >>> in_range([3.0, 4.0], 3.5, 5.0), in_range([4.0, 3.0], 3.5, 5.0), in_range([], -1.0, 1.0)
    (0, 1, 1)
    """
    if len(numbers) == 1 or (len(numbers) == 2 and numbers[0] > numbers[1]):
        return int(low <= numbers[0] <= high)
    first, second = numbers or (0.0, 0.0)
    if low <= first <= high and low <= second <= high:
        return 1
    overlap = max(0.0, min(second, high) - max(first, low))
    union = second - first + high - low + 2e-12 - overlap
    return int(union > 0 and overlap / union >= 0.5 - 1e-12)


def score_answer(prediction: str | None, answer_eval, problem_type: str) -> int:
    """1 if the prediction is right by the MMhops metric (the authors' evaluator v1.0.0), else 0.

    String and Time: equal to an alias after `normalize`. Numerical: `in_range` of the bounds in
    answer_eval.

    >>> score_answer("the Berlin", ["Berlin"], "String"), score_answer("", ["Berlin"], "String")
    (1, 0)
    >>> score_answer("3,700", ["3600", "4400"], "Numerical")
    1
    >>> score_answer("3,000 to 4,000", ["3600", "4400"], "Numerical")
    0
    """
    if not prediction or not prediction.strip():
        return 0
    if problem_type != "Numerical":
        return int(normalize(prediction) in {normalize(alias) for alias in answer_eval})
    bounds = [float(bound) for bound in answer_eval]
    return in_range(parse_numbers(prediction), min(bounds), max(bounds))


def format_reward(response) -> float:
    """1.0 if every turn was valid and the response ended in an answer."""
    return float(response.stop == "answer" and all(turn.valid for turn in response.turns))


def action_reward(response, count_distinct: bool = True) -> float:
    """How many searches were valid; of identical calls only the first counts when `count_distinct`.

    Which calls are identical is part of the table of searches (rollout.py): `turn.call`.
    """
    calls = [turn.call for turn in response.turns if turn.valid and turn.action != "answer"]
    return float(len(set(calls) if count_distinct else calls))


def reward(response, cfg: RewardConfig, length_penalty: float = 0.0) -> dict[str, float]:
    """The terms of a response's reward, by name, and their `total`.

    `action` is the number of paid searches, before γ. length_penalty: `dapo.overlong_penalty` of
    the response's sampled tokens, at most 0; it counts in the total and never changes `outcome`.
    """
    question = response.question
    right = score_answer(response.answer, question.answer_eval, question.problem_type)
    terms = {
        "outcome": float(right),
        "format": format_reward(response),
        "action": action_reward(response, cfg.count_distinct),
        "length": length_penalty,
    }
    if cfg.gate_action:
        terms["action"] *= terms["outcome"] * terms["format"]
    total = cfg.alpha * terms["outcome"] + cfg.beta * terms["format"] + cfg.gamma * terms["action"]
    return terms | {"total": total + length_penalty}
