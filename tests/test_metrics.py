"""Official scores: tricky predictions worked out by hand, whole files, no string that raises."""

import json

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from data import DataError
from evaluation import official
from evaluation.bem import Bem, convert
from reward import score_answer

MMHOPS = {  # (answer_eval, type): [(prediction, right by hand)]
    (("90", "110"), "Numerical"): [
        ("100", 1),
        ("90", 1),
        ("110", 1),
        ("89.999", 0),
        ("110.001", 0),
        ("100 km", 1),
        ("about 100", 1),
        ("$100", 1),
        ("100%", 1),
        ("100k", 1),
        ("1e2", 1),
        ("1E+2", 1),
        ("100.", 1),
        ("+100", 1),
        ("-100", 0),
        ("\u2212100", 1),
        ("1e999", 0),
        ("-1e999", 0),
        ("1e-5", 0),
        # ranges that are contained
        ("95-105", 1),
        ("95 - 105", 1),
        ("95 to 105", 1),
        ("95\u2013105", 1),
        # not contained: IoU 15/25, 20/30, 20/40, 20/41, 10/30
        ("85-105", 1),
        ("80-110", 1),
        ("70-110", 1),
        ("69-110", 0),
        ("80-100", 0),
        # descending: the first number alone
        ("105-95", 1),
        ("150-100", 0),
        ("100, 200", 0),
        ("100,200", 0),
        ("1,00", 0),
        ("100 200 300", 0),
        ("100/1", 1),
        ("100 (2020)", 0),
        ("2020: 100", 0),
        ("one hundred", 1),
        ("One Hundred", 1),
        ("a hundred", 1),
        ("ninety-five", 1),
        ("ninety five", 1),
        ("one hundred and five", 1),
        ("one hundred and eleven", 0),
        ("ninety point five", 1),
        ("two thousand", 0),
        ("twelve", 0),
        ("\uff11\uff10\uff10", 1),
        ("\u0661\u0660\u0660", 1),
        ("10\u00b2", 0),
        ("none", 0),
        ("", 0),
        ("  \n", 0),
        ("-.5.2", 0),
    ],
    # bounds in the wrong order
    (("110", "90"), "Numerical"): [("100", 1), ("80", 0)],
    # no number reads as [0, 0]
    (("-5", "5"), "Numerical"): [
        ("none", 1),
        ("unknown", 1),
        ("zero", 1),
        ("-5", 1),
        ("-5.1", 0),
        ("minus five", 1),
        ("\u22124", 1),
        ("3-4", 1),
        ("-3-4", 1),
        ("-20 - -10", 0),
        ("", 0),
        (",", 1),
    ],
    # "and six" becomes 6 and joins the 5
    (("50", "60"), "Numerical"): [("5 and six", 1)],
    # "3 million" becomes 31000000
    (("2700000", "3300000"), "Numerical"): [
        ("three million", 1),
        ("3,000,000", 1),
        ("3 million", 0),
        ("3000000.", 1),
    ],
    (("900", "1100"), "Numerical"): [("1,000", 1), ("1 000", 0), ("1.000", 0), ("1000.5", 1)],
    # the leading point is lost
    (("4.5", "5.5"), "Numerical"): [
        (".5", 1),
        ("5", 1),
        ("0.5", 0),
        ("1.0.0", 0),
    ],
    (("0.5", "1.5"), "Numerical"): [("1.0.0", 1), ("-.5", 0)],
    (("Berlin", "City of Berlin"), "String"): [
        ("berlin", 1),
        ("BERLIN", 1),
        ("Berlin.", 1),
        ("the Berlin", 1),
        ("  The  Berlin ", 1),
        ("Berlin, Germany", 0),
        ("the city of berlin!", 1),
        ("Ber-lin", 1),
        ("B e r l i n", 0),
        ("B\u00e9rlin", 0),
        ("\u201cBerlin\u201d", 0),
        ("'Berlin'", 1),
        ("A Berlin", 1),
        ("theBerlin", 0),
        ("", 0),
    ],
    (("4 July 1776", "July 4, 1776"), "Time"): [
        ("July 4 1776", 1),
        ("4 july, 1776", 1),
        ("1776", 0),
        ("4th July 1776", 0),
        ("1776-07-04", 0),
    ],
    (("AC/DC",), "String"): [("ACDC", 1), ("AC DC", 0)],
    # both are nothing once articles are gone
    (("A",), "String"): [("the", 1), ("b", 0)],
    (("\u0130stanbul",), "String"): [("\u0130stanbul", 1), ("istanbul", 0)],
}

INFOSEEK = {  # ((low, high),) or aliases, and type: [(prediction, right by hand)]
    (((90, 110),), "numerical"): [
        ("100", 1),
        ("90", 1),
        ("110.0", 1),
        ("89", 0),
        ("111", 0),
        ("100 km", 1),
        ("ca. 100", 1),
        ("1e2", 1),
        ("-100", 0),
        ("\u2212100", 1),
        # words are not read
        ("one hundred", 0),
        ("ninety-five", 0),
        ("a hundred", 0),
        ("100 million", 1),
        ("95-105", 1),
        ("95 - 105", 1),
        ("95\u2013105", 1),
        ("85-105", 1),
        ("70-110", 1),
        ("69-110", 0),
        ("80-100", 0),
        ("105-95", 1),
        ("150-100", 0),
        ("100, 200", 0),
        ("100,200", 0),
        ("100 200 300", 0),
        ("100 (2020)", 0),
        ("2020: 100", 0),
        ("1.0e+2", 1),
        ("+100", 1),
        ("100.", 1),
        ("100/1", 1),
        ("1,00", 0),
        ("unknown", 0),
        ("", 0),
        ("\uff11\uff10\uff10", 1),
        ("10\u00b2", 0),
        ("1e999", 0),
        ("$ 100", 1),
    ],
    (((-5, 5),), "numerical"): [
        ("unknown", 1),
        ("", 1),
        ("zero", 1),
        ("-5", 1),
        ("-5.1", 0),
        ("-3-4", 1),
        ("3-4", 1),
        ("-20 - -10", 0),
        ("...", 1),
    ],
    (((1000, 1000),), "numerical"): [("1,000", 1), ("1 000", 0), ("1000", 1), ("999.999", 0)],
    (("oak", "oaks", "Quercus"), "string"): [
        ("oak", 1),
        ("Oak.", 1),
        ("an oak", 1),
        ("THE OAKS", 1),
        ("quercus!", 1),
        ("oak tree", 0),
        ("o\u00e4k", 0),
        ("", 0),
        ("o-a-k", 1),
        ("oak, oaks", 0),
    ],
    (("1889", "31 March 1889"), "time"): [
        ("1889", 1),
        ("in 1889", 0),
        ("31 march, 1889", 1),
        ("March 31 1889", 0),
        ("the 1889", 1),
    ],
}

EVQA = {  # (reference, question type): [(candidate, right by hand)]
    ("oak", "automatic"): [
        ("oak", 1),
        ("Oak", 1),
        ("an oak", 1),
        ("the oak.", 1),
        ("The answer is oak", 1),
        ("the answer is: oak", 1),
        ("answer is oak", 0),
        ("oaks", 0),
        ("o'ak", 1),
        ("oak tree", 0),
        ("\u2018oak\u2019", 1),
        ("\u201coak\u201d", 0),
        ("\toak\n", 1),
        ("<extra_id_0> oak", 1),
        ("_oak_", 1),
        ("o a k", 0),
        ("\u00f6ak", 0),
        ("o ak", 0),
    ],
    ("3", "templated"): [
        ("three", 1),
        ("Three.", 1),
        ("3", 1),
        ("3.0", 0),
        ("thirteen", 0),
        ("the three", 1),
        ("03", 0),
        ("3 3", 0),
    ],
    ("0", "templated"): [("none", 1), ("zero", 1), ("no", 0), ("0", 1), ("nothing", 0)],
    ("yes", "automatic"): [("true", 1), ("Yes!", 1), ("entailment", 1), ("false", 0), ("y", 0)],
    ("no", "automatic"): [("false", 1), ("contradiction", 1), ("No", 1), ("none", 0)],
    ("don't", "automatic"): [("dont", 1)],
    ("1,000 m", "templated"): [("1000 m", 1)],
    ("1.5", "templated"): [("15", 1)],
    ("ten feet", "2_hop"): [("10 feet", 1)],
    ("eleven", "templated"): [("11", 0)],
    ("the a an oak", "2_hop"): [("oak", 1)],
    ("S\u00e3o Tom\u00e9", "2_hop"): [("Sao Tome", 0)],
    ("oak&&beech&&fir", "multi_answer"): [
        ("oak, beech, fir", 1),
        ("oak and beech and fir", 1),
        ("fir & oak", 1),
        ("oak", 0),
        ("oak, beech", 1),
        ("oak, pine", 0),
        ("the oak, a beech, pine", 1),
        ("oak beech fir", 0),
        ("oak, oak, oak", 0),
        ("oak,beech,pine,elm,ash", 0),
        ("oak;beech", 0),
        ("", 0),
        (" and ", 0),
    ],
    ("oak && beech", "multi_answer"): [("beech", 1)],
    ("oak&&", "multi_answer"): [("oak", 1)],
    ("three&&four", "multi_answer"): [("3 and 4", 1)],
}


def cases_of(table: dict) -> list[tuple]:
    return [(*gold, *case) for gold, cases in table.items() for case in cases]


def test_there_are_enough_predictions_worked_out_by_hand():
    for table in (MMHOPS, INFOSEEK, EVQA):
        assert sum(len(cases) for cases in table.values()) >= 60


@pytest.mark.parametrize(
    "accepted, kind, prediction, right",
    cases_of(MMHOPS),
)
def test_an_mmhops_answer_is_scored_as_by_hand(accepted, kind, prediction, right):
    assert score_answer(prediction, accepted, kind) == right


@pytest.mark.parametrize(
    "accepted, kind, prediction, right",
    cases_of(INFOSEEK),
)
def test_an_infoseek_answer_is_scored_as_by_hand(accepted, kind, prediction, right):
    accepted = [{"range": list(accepted[0])}] if kind == "numerical" else list(accepted)
    assert official.score_infoseek_answer(prediction, accepted, kind) == right


@pytest.mark.parametrize("reference, kind, candidate, right", cases_of(EVQA))
def test_an_evqa_answer_is_scored_as_by_hand(reference, kind, candidate, right):
    assert official.exact_match_evqa(reference, candidate, kind) == right


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.text("0123456789.,-+eE and onehundredpoint"),
        st.lists(
            st.sampled_from(["one", "hundred", "point", "and", "-", " ", "million", "5", ".", "e9"])
        ).map("".join),
    )
)
def test_no_prediction_raises(text):
    for kind, accepted in (("Numerical", ["-1", "5"]), ("String", ["x"]), ("Time", ["1999"])):
        assert score_answer(text, accepted, kind) in (0, 1)
    assert official.score_infoseek_answer(text, [{"range": [-1, 5]}], "numerical") in (0, 1)
    for kind in ("automatic", "multi_answer"):
        assert official.exact_match_evqa("oak&&fir", text, kind) in (True, False)


# ------------------------------------------------------------------------------------ whole files


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def reference(name, split, kind, accepted):
    return {
        "id": name,
        "problem": "?",
        "answer": "",
        "answer_eval": accepted,
        "split": split,
        "problem_type": kind,
    }


def test_an_mmhops_file_gives_the_official_table(tmp_path):
    references = jsonl(
        tmp_path / "test.jsonl",
        [
            reference("1", "Bridge", "String", ["oak"]),
            reference("2", "Bridge", "Numerical", ["9", "11"]),
            reference("3", "Bridge", "Time", ["1999"]),
            reference("4", "Compare", "String", ["fir"]),
            reference("5", "Compare", "Numerical", ["1", "2"]),
            reference("6", "Bridge", "String", ["elm"]),
        ],
    )
    predictions = jsonl(
        tmp_path / "p.jsonl",
        [
            {"id": "1", "prediction": "Oak"},
            {"id": "2", "prediction": "12"},
            {"id": "3", "prediction": "1999"},
            {"id": "4", "prediction": ""},
            {"id": "5", "prediction": "1.5"},
        ],
    )
    result = official.score_mmhops(predictions, tmp_path)
    assert result == official.score_mmhops(predictions, references)
    assert result["micro"] == {"correct": 3, "total": 6, "accuracy": 50.0}
    assert result["missing"] == 2
    assert result["Bridge"]["correct"] == 2 and result["Bridge"]["total"] == 4
    assert result["Bridge"]["String"] == {"correct": 1, "total": 2, "accuracy": 50.0}
    assert result["Compare"]["accuracy"] == 50.0
    assert result["Compare"]["Numerical"]["correct"] == 1
    assert result["Compare"]["Time"]["total"] == 0
    assert result["answered_only"] == {"correct": 3, "total": 4, "accuracy": 75.0}


def test_our_own_two_step_questions_stand_apart_from_the_official_table(tmp_path):
    released = [
        reference("1", "Bridge", "String", ["oak"]),
        reference("2", "Bridge", "String", ["fir"]),
        reference("3", "Compare", "String", ["elm"]),
    ]
    ours = [record | {"num_steps": 4} for record in released]
    two_steps = [
        reference("4", "Bridge", "Time", ["1999"]) | {"num_steps": 2},
        reference("5", "Bridge", "String", ["ash"]) | {"num_steps": 2},
    ]
    answers = {"1": "oak", "2": "oak", "3": "elm", "4": "1999"}
    predictions = jsonl(
        tmp_path / "p.jsonl", [{"id": name, "prediction": text} for name, text in answers.items()]
    )
    three = jsonl(tmp_path / "p3.jsonl", [{"id": i, "prediction": answers[i]} for i in "123"])

    plain = official.score_mmhops(three, jsonl(tmp_path / "released.jsonl", released))
    assert official.TWO_HOPS not in plain and plain["micro"]["total"] == 3
    assert official.score_mmhops(three, jsonl(tmp_path / "ours.jsonl", ours)) == plain

    whole = official.score_mmhops(predictions, jsonl(tmp_path / "all.jsonl", ours + two_steps))
    apart = whole.pop("Bridge, 2 hops")
    assert (apart["correct"], apart["total"]) == (1, 2)
    assert apart["Time"] == {"correct": 1, "total": 1, "accuracy": 100.0}
    assert whole == plain | {"missing": 1}  # "5"; every other figure is the released files'


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": "1", "prediction": 5}', 'p.jsonl:2: "prediction" of 1 is not a string'),
        ('{"id": "0", "prediction": "x"}', "p.jsonl:2: 0 was already predicted in line 1"),
        ("{", "p.jsonl:2: not JSON"),
        ('["x"]', "p.jsonl:2: a line is an object"),
        ('{"id": 3, "prediction": "x"}', "p.jsonl:2: a line is an object"),
        ('{"id": "9", "prediction": "x"}', "1 predicted ids are not in .*: 9"),
        ('{"prediction": "x"}', "p.jsonl:2: a line"),
    ],
)
def test_bad_predictions_are_refused_with_their_line(tmp_path, line, message):
    references = jsonl(
        tmp_path / "test.jsonl", [reference(str(i), "Bridge", "String", ["oak"]) for i in range(3)]
    )
    predictions = tmp_path / "p.jsonl"
    predictions.write_text('{"id": "0", "prediction": "oak"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        official.score_mmhops(predictions, references)


def test_an_infoseek_file_gives_the_official_scores_and_the_strict_one(tmp_path):
    records = [
        ("q1", "val_unseen_question", "String", ["oak"]),
        ("q2", "val_unseen_question", "Numerical", [{"wikidata": 1.0, "range": [0.9, 1.1]}]),
        ("q3", "val_unseen_question", "Time", ["1999"]),
        ("e1", "val_unseen_entity", "String", ["fir"]),
        ("e2", "val_unseen_entity", "String", ["elm"]),
    ]
    references = jsonl(
        tmp_path / "val.jsonl",
        [
            {
                "data_id": n,
                "image_id": "oven_1",
                "question": "?",
                "answer": ["x"],
                "answer_eval": a,
                "data_split": s,
            }
            for n, s, _, a in records
        ],
    )
    types = jsonl(
        tmp_path / "types.jsonl", [{"data_id": n, "question_type": k} for n, _, k, _ in records]
    )
    predictions = jsonl(
        tmp_path / "p.jsonl",
        [
            {"data_id": "q1", "prediction": "oak"},
            {"data_id": "q2", "prediction": "2"},
            {"data_id": "q3", "prediction": "1999"},
            {"data_id": "e1", "prediction": "fir"},
            {"data_id": "other", "prediction": "x"},
        ],
    )
    with pytest.raises(DataError, match='no "answer_eval" in this reference'):
        bad = jsonl(tmp_path / "bad.jsonl", [{"data_id": "q1", "data_split": "x"}])
        official.score_infoseek(predictions, bad, types)
    result = official.score_infoseek(predictions, references, types)
    assert result["unseen_question"] == {
        "score": 66.67,
        "score_time": 100.0,
        "score_num": 0.0,
        "score_string": 100.0,
    }
    assert result["unseen_entity"]["score"] == 100.0
    assert result["final_score"] == 80.0  # 2 / (1/66.67 + 1/100) = 80.0024
    assert result["missing"] == 1
    assert result["strict_final_score"] == 57.14  # with e2 wrong: 2 / (1/66.67 + 1/50) = 57.1441


def test_an_evqa_file_takes_the_best_of_its_references(tmp_path):
    rows = [
        ("Which tree?", "oak|fir", "automatic"),
        ("Which trees?", "oak&&fir", "multi_answer"),
        ("How many?", "3", "templated"),
        ("Where?", "Rome", "2_hop"),
    ]
    references = tmp_path / "test.csv"
    references.write_text(
        "question,answer,question_type,dataset_image_ids\n"
        + "".join(f'"{q}",{a},{k},1\n' for q, a, k in rows)
    )
    predictions = jsonl(
        tmp_path / "p.jsonl",
        [
            {"id": "test_0", "prediction": "the fir"},
            {"id": "test_1", "prediction": "fir"},
            {"id": "test_2", "prediction": "four"},
        ],
    )
    result = official.score_evqa(predictions, references)
    assert (result["accuracy"], result["exact_match"], result["bem"], result["missing"]) == (
        50.0,
        50.0,
        None,
        1,
    )
    assert (
        "exact match only" in result["metric"] and result["by_type"]["multi_answer"]["correct"] == 1
    )


def test_bem_judges_what_is_not_equal(tmp_path):
    """A BERT small enough to write here; its verdict must be that of a forward pass of the
    published input layout."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "oak", "fir", "which", "tree", "?", "3"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            type_vocab_size=3,
        )
    ).eval()
    torch.nn.init.normal_(model.classifier.weight, std=5.0)
    model.save_pretrained(tmp_path / "bem")
    tokenizer.save_pretrained(tmp_path / "bem")
    # [CLS] fir [SEP] oak [SEP] which tree ? [SEP]
    ids = torch.tensor([[2, 6, 3, 5, 3, 7, 8, 9, 3]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    with torch.no_grad():
        logits = model(input_ids=ids, token_type_ids=segments).logits
    expected = logits.softmax(-1)[0, 1].item()
    scores = Bem(tmp_path / "bem").scores(
        [("fir", "oak", "Which tree?"), ("oak fir oak", "3", "tree")]
    )
    assert scores[0] == pytest.approx(expected, abs=1e-5) and len(scores) == 2
    references = tmp_path / "test.csv"
    references.write_text(
        "question,answer,question_type,dataset_image_ids\nWhich tree?,oak,automatic,1\n"
    )
    predictions = jsonl(tmp_path / "p.jsonl", [{"id": "test_0", "prediction": "fir"}])
    result = official.score_evqa(predictions, references, tmp_path / "bem")
    assert result["exact_match"] == 0.0 and result["bem"] == result["accuracy"] == (
        100.0 if expected >= 0.5 else 0.0
    )


@pytest.mark.parametrize("style", ["first", "garden"])
def test_a_bem_from_tensorflow_computes_what_tensorflow_computed(tmp_path, style):
    folder = ROOT / "tests" / "fixtures" / f"bem-{style}"  # made by make_bem_fixture.py
    convert(folder, folder / "vocab.txt", tmp_path)
    expected = json.loads((folder / "expected.json").read_text())
    ids = torch.tensor(expected["ids"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            token_type_ids=torch.tensor(expected["segments"]),
            attention_mask=(ids != 0).long(),
        ).logits
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)
    # the first row again, from its words
    triple = ("Paris", "the city of Paris", "What is the capital of France?")
    score = Bem(tmp_path).scores([triple])[0]
    first = torch.tensor(expected["logits"][0]).softmax(-1)
    assert score == pytest.approx(first[1].item(), abs=1e-4)


def test_what_is_no_saved_model_is_named(tmp_path):
    with pytest.raises(DataError, match="no variables/variables.index"):
        convert(tmp_path, tmp_path / "vocab.txt", tmp_path / "out")
    (tmp_path / "variables").mkdir()
    (tmp_path / "variables" / "variables.index").write_bytes(b"x" * 100)
    (tmp_path / "variables" / "variables.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(DataError, match="not a TensorFlow variables index"):
        convert(tmp_path, tmp_path / "vocab.txt", tmp_path / "out")
