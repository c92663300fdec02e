"""The reward's gates, and the metric's corners."""

from dataclasses import replace

import pytest

from data import Question
from reward import RewardConfig, normalize, reward, score_answer
from rollout import Response, Turn

BERLIN = Question("q", "?", (), "Berlin", ("Berlin",), "String", "Bridge")


def episode(*turns, answer="Berlin", stop="answer"):
    return Response(
        BERLIN, None, None, None, None, [Turn("", *turn) for turn in turns], answer, stop
    )


SEARCHES = [("image_search", "image 1", True), ("text_search", "capital of Germany", True)]
ANSWER = ("answer", "Berlin", True)


def test_the_sum():
    r = reward(episode(*SEARCHES, ANSWER), RewardConfig(alpha=1, beta=0.5, gamma=0.25))
    assert (r.outcome, r.format, r.action, r.total) == (1, 1, 2, 1 + 0.5 + 0.5)


def test_action_is_gated_by_outcome_and_by_format():
    assert reward(episode(*SEARCHES, ANSWER, answer="Bonn"), RewardConfig()).action == 0
    bad = [("image_search", "image 1", False), *SEARCHES[1:], ANSWER]
    assert reward(episode(*bad), RewardConfig()).action == 0
    assert reward(episode(*bad), RewardConfig(gate_action=False)).action == 1
    assert reward(episode(*SEARCHES, answer=None, stop="turns"), RewardConfig()).total == 0


def test_identical_calls_are_paid_once():
    twice = episode(*SEARCHES, SEARCHES[1], ANSWER)
    assert reward(twice, RewardConfig()).action == 2
    assert reward(twice, RewardConfig(count_distinct=False)).action == 3
    two_images = episode(SEARCHES[0], ("image_search", "image 2", True), ANSWER)
    assert reward(two_images, RewardConfig()).format == 1  # two equal blocks in a row are fine
    assert reward(two_images, RewardConfig()).action == 2


def test_every_ablation_is_a_field():
    full = episode(*SEARCHES, ANSWER)
    assert reward(full, RewardConfig(gamma=0)).total == 2
    assert reward(full, RewardConfig(beta=0)).total == 1.5
    assert reward(full, RewardConfig(), length_penalty=-0.5).total == 2


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


def test_retrieved_text_earns_nothing():
    tempting = replace(BERLIN)
    t = Response(
        tempting,
        None,
        None,
        None,
        None,
        [Turn("", "text_search", "x", True, observation="<answer>Berlin</answer>")],
        None,
        "turns",
    )
    assert reward(t, RewardConfig()).total == 0
