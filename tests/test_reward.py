"""The reward's gates, and the metric's corners."""

import pytest

from data import Question
from reward import RewardConfig, normalize, reward, score_answer
from rollout import Response, Turn

BERLIN = Question("q", "?", (), "Berlin", ("Berlin",), "String", "Bridge")


def turn(action: str, argument: str, valid: bool = True, observation: str = "") -> Turn:
    return Turn("", action, argument, valid, observation)


def response(*turns, answer="Berlin", stop="answer") -> Response:
    return Response(BERLIN, None, None, None, None, list(turns), answer, stop)


IMAGE = turn("image_search", "image 1")
TEXT = turn("text_search", "capital of Germany")
ANSWER = turn("answer", "Berlin")


def test_the_sum():
    terms = reward(response(IMAGE, TEXT, ANSWER), RewardConfig(alpha=1, beta=0.5, gamma=0.25))
    total = 1 + 0.5 * 1 + 0.25 * 2
    assert terms == {"outcome": 1, "format": 1, "action": 2, "length": 0, "total": total}


def test_a_wrong_answer_keeps_its_format():
    terms = reward(response(TEXT, ANSWER, answer="Bonn"), RewardConfig(), length_penalty=-0.25)
    assert terms == {"outcome": 0, "format": 1, "action": 0, "length": -0.25, "total": 0.75}


def test_action_is_gated_by_outcome_and_by_format():
    assert reward(response(IMAGE, TEXT, ANSWER, answer="Bonn"), RewardConfig())["action"] == 0
    bad = [turn("image_search", "image 9", valid=False), TEXT, ANSWER]
    assert reward(response(*bad), RewardConfig())["action"] == 0
    assert reward(response(*bad), RewardConfig(gate_action=False))["action"] == 1
    unanswered = response(IMAGE, TEXT, ANSWER, answer=None, stop="turns")
    assert reward(unanswered, RewardConfig())["total"] == 0


def test_identical_calls_are_paid_once():
    twice = response(IMAGE, TEXT, TEXT, ANSWER)
    assert reward(twice, RewardConfig())["action"] == 2
    assert reward(twice, RewardConfig(count_distinct=False))["action"] == 3
    two_images = response(IMAGE, turn("image_search", "image 2"), ANSWER)
    terms = reward(two_images, RewardConfig())
    assert terms["format"] == 1  # two searches of one kind in a row are fine
    assert terms["action"] == 2


def test_what_a_call_is_decides_not_how_it_was_written():
    again = turn("text_search", "CAPITAL of Germany")
    assert reward(response(TEXT, again, ANSWER), RewardConfig())["action"] == 1
    spellings = [turn("image_search", name) for name in ("image 1", "1", "Image  1")]
    assert reward(response(*spellings, ANSWER), RewardConfig())["action"] == 1


def test_every_ablation_is_a_field():
    full = response(IMAGE, TEXT, ANSWER)
    assert reward(full, RewardConfig(gamma=0))["total"] == 2
    assert reward(full, RewardConfig(beta=0))["total"] == 1.5
    assert reward(full, RewardConfig(), length_penalty=-0.5)["total"] == 2


def test_retrieved_text_earns_nothing():
    tempting = turn("text_search", "x", observation="<answer>Berlin</answer>")
    assert reward(response(tempting, answer=None, stop="turns"), RewardConfig())["total"] == 0


@pytest.mark.parametrize(
    "prediction, accepted, kind, right",
    [
        ("berlin", ["Berlin"], "String", 1),
        ("The Berlin.", ["Berlin"], "String", 1),
        ("Berlin, Germany", ["Berlin"], "String", 0),
        ("Nuku'alofa", ["Nukualofa"], "String", 1),
        ("São Tomé", ["Sao Tome"], "String", 0),
        ("  ", ["Berlin"], "String", 0),
        (None, ["x"], "String", 0),
        ("4 July 1776", ["4 July 1776", "July 4, 1776"], "Time", 1),
        ("July 4 1776", ["4 July 1776", "July 4, 1776"], "Time", 1),
        ("1776", ["4 July 1776"], "Time", 0),
        ("3,600", ["3600", "4400"], "Numerical", 1),
        ("3599", ["3600", "4400"], "Numerical", 0),
        ("about 4,000 km", ["3600", "4400"], "Numerical", 1),
        ("3700-4300", ["3600", "4400"], "Numerical", 1),
        ("3400 to 4400", ["3600", "4400"], "Numerical", 1),
        ("1000-9000", ["3600", "4400"], "Numerical", 0),
        ("4000 (2024)", ["3600", "4400"], "Numerical", 1),
        ("-12", ["-13.2", "-10.8"], "Numerical", 1),
        ("\u221212", ["-13.2", "-10.8"], "Numerical", 0),
        ("forty-two", ["40", "44"], "Numerical", 1),
        ("one hundred", ["90", "110"], "Numerical", 1),
        ("none", ["0", "1"], "Numerical", 1),
        ("none", ["1", "2"], "Numerical", 0),
        (".5", ["4.5", "5.5"], "Numerical", 1),
        ("0.5", ["0.45", "0.55"], "Numerical", 1),
        ("1.2.3", ["1", "2"], "Numerical", 0),
        ("-.5.2", ["1", "2"], "Numerical", 0),
    ],
)
def test_metric(prediction, accepted, kind, right):
    assert score_answer(prediction, accepted, kind) == right


def test_normalize_keeps_accents_and_drops_articles():
    assert normalize("An  apple, a Pear & THE café") == "apple pear café"
