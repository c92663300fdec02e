"""Building: passages, folders that are whole or not there, questions that keep their promises."""

import copy
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import build_kb
from build_kb import passages
from data import DataError, load_questions
from mmhops.build import World, leaks, query


def test_passages_are_short_and_lose_nothing():
    value = "One sentence here. " * 40 + "word " * 120
    cut = passages("A Title", [("Field", value)])
    assert all(
        len(f"A Title {text}".split()) <= 48 and text.startswith("Field: ") for _, text in cut
    )
    assert " ".join(text.removeprefix("Field: ") for _, text in cut).split() == value.split()


def test_a_second_build_does_nothing_and_a_killed_one_leaves_nothing(
    kb_folder, entities, tmp_path, monkeypatch
):
    said, before = [], (kb_folder / "manifest.json").stat().st_mtime_ns
    build_kb.build(kb_folder, copy.deepcopy(entities), say=said.append)
    assert "up to date" in said[0] and (kb_folder / "manifest.json").stat().st_mtime_ns == before

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_kb, "convert_e5", killed)
    with pytest.raises(KeyboardInterrupt):
        build_kb.build(tmp_path / "kb", copy.deepcopy(entities), say=said.append)
    assert not (tmp_path / "kb").exists()


def test_someone_elses_folder_is_not_overwritten(entities, tmp_path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(Exception, match="not built by this command"):
        build_kb.build(tmp_path / "thesis", copy.deepcopy(entities), say=lambda *_: None)


def test_the_layout_is_the_official_one(kb_folder):
    text = [json.loads(line) for line in open(kb_folder / "text" / "text_corpus.jsonl")]
    image = [json.loads(line) for line in open(kb_folder / "image" / "image_corpus.jsonl")]
    assert [r["id"] for r in text] == list(range(len(text))) and all(
        "\n" in r["contents"] for r in text
    )
    assert [r["id"] for r in image] == list(range(len(image)))
    assert all(set(r) == {"id", "title", "entity_id", "image_path"} for r in image)
    assert len({r["title"] for r in image}) == len(image)


def test_answers_stand_in_the_rows_that_the_gold_chain_names(kb, questions):
    for q in questions:
        for hop in q.hops:
            if hop.action == "text_search":
                assert hop.rows and all(
                    hop.result in kb.texts[row] and kb.texts[row].startswith(hop.about + "\n")
                    for row in hop.rows
                )
            else:
                assert kb.records[hop.rows[0]]["title"] == hop.result


def test_chains_hang_together(questions):
    for q in questions:
        text = [hop for hop in q.hops if hop.action == "text_search"]
        if q.split == "Bridge":
            assert len(q.hops) == q.num_steps and q.hops[0].action == "image_search"
            assert [hop.about for hop in text] == [
                hop.result for hop in q.hops[:-1]
            ]  # each hop reads what the last one found
            assert text[-1].result == q.answer and len({hop.about for hop in text}) == len(text)
        else:
            assert [hop.action for hop in q.hops] == ["image_search"] * 2 + ["text_search"] * 2
            assert q.answer in (q.hops[0].result, q.hops[1].result) and len(q.images) == 2


def test_the_larger_one_wins(kb_folder, questions):
    world = World(kb_folder)
    by_title = {e["title"]: e for e in world.entities.values()}
    compared = [q for q in questions if q.split == "Compare"]
    assert len(compared) >= 10
    for q in compared:
        name = q.hops[2].relation
        values = {hop.about: by_title[hop.about]["attributes"][name] for hop in q.hops[2:]}
        loser = next(title for title in values if title != q.answer)
        if name == "date of independence":
            assert int(values[q.answer]["text"][-4:]) < int(values[loser]["text"][-4:])
        else:
            assert values[q.answer]["value"] >= 1.1 * values[loser]["value"]


def test_splits_share_no_pictured_entity_and_questions_do_not_leak(data_folder):
    pictured = {}
    for split in ("train", "validation", "test"):
        for q in load_questions(data_folder, split):
            pictured.setdefault(split, set()).update(
                hop.result for hop in q.hops if hop.action == "image_search"
            )
            names = [q.answer] + [hop.result for hop in q.hops]
            assert not any(
                re.search(rf"(?<!\w){re.escape(n.lower())}(?!\w)", q.problem.lower()) for n in names
            ), q
            if q.problem_type == "Numerical":
                assert float(q.answer_eval[0]) < float(q.answer_eval[1])
    assert (
        not pictured["train"] & pictured["test"]
        and not pictured["train"] & pictured["validation"]
        and not pictured["validation"] & pictured["test"]
    )


def test_query_images_are_never_the_indexed_file(data_folder, kb_folder):
    own = {path.read_bytes() for path in (kb_folder / "images").iterdir()}
    assert not own & {path.read_bytes() for path in (data_folder / "images").iterdir()}


def test_leaks():
    hops = [{"result": "Chad"}]
    assert leaks("What is the capital of Chad?", "Lima", hops) and leaks(
        "Is it lima?", "Lima", hops
    )
    assert not leaks("What is chadwick's limit?", "Lima", hops)


def test_comparisons_that_ask_for_a_number(kb_folder):
    from mmhops.build import World, build_split, neighbours

    world = World(kb_folder)
    countries = [e for e in world.entities.values() if e["kind"] == "country" and e["image"]]
    near = neighbours(world, countries, 3)
    assert all(
        len(others) == 3 and e not in others
        for e, others in ((e, near[e["id"]]) for e in countries)
    )
    asked = [
        r
        for r in build_split(world, "train", countries, 200, 0, numeric=1.0, similar=3)
        if r["split"] == "Compare"
    ]
    assert len(asked) > 10 and all(
        r["problem_type"] == "Numerical" and r["starts"][1] in near[r["starts"][0]["id"]]
        for r in asked
    )
    for r in asked:  # the answer follows from what the last two hops find
        first, second = (h["result"] for h in r["hops"][2:])
        if "years" in r["problem"]:
            assert float(r["answer"]) == abs(int(first[-4:]) - int(second[-4:]))
        else:
            a, b = sorted(float(v.replace(",", "")) for v in (first, second))
            expected = b / a if "factor" in r["problem"] else b - a
            assert float(r["answer_eval"][0]) <= expected * 1.01 and expected * 0.99 <= float(
                r["answer_eval"][1]
            )


def test_queries_name_the_relation():
    assert query("largest export partner", "Chad") == "largest export partner of Chad"


def lines(tmp_path, *records):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


RECORD = {
    "id": "a",
    "problem": "What?",
    "images": [],
    "answer": "x",
    "answer_eval": ["x"],
    "problem_type": "String",
    "split": "Bridge",
}


@pytest.mark.parametrize(
    "records, message",
    [
        ([RECORD, RECORD], "id a was already used in .*:1"),
        ([RECORD | {"problem": "<image>What?"}], "1 <image> slots for 0 images"),
        (
            [RECORD | {"problem": "<image>What?", "images": ["none.png"]}],
            "question a names the image .*none.png",
        ),
        ([RECORD | {"problem_type": "Colour"}], "Colour"),
        ([{"id": "a"}], "not a question record"),
        ([], "holds no questions"),
    ],
)
def test_bad_question_files_name_the_fault(tmp_path, records, message):
    with pytest.raises(DataError, match=message):
        load_questions(lines(tmp_path, *records))


def run(*args):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "args, message",
    [
        (["train.py", "--no-such-flag", "1"], "no-such-flag"),
        (
            ["train.py", "--kb", "nowhere", "--data", "nowhere", "--out", "runs/never"],
            "error: nowhere is no knowledge base",
        ),
        (["train.py", "--group-size", "1", "--out", "runs/never"], "error: --group-size 1"),
        (
            ["evaluate.py", "--ckpt", "assets/never"],
            "error: assets/never is neither a model folder",
        ),
        (["-m", "mmhops.build", "--kb", "nowhere"], "error: nowhere/entities.jsonl does not exist"),
        (["-m", "knowledge.check", "--kb", "nowhere"], "error: nowhere is no knowledge base"),
    ],
)
def test_the_users_mistakes_end_the_command_with_one_sentence(args, message):
    done = run(*args)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_an_unreadable_image_is_named(policy, kb, tmp_path, cfg):
    from rollout import sample

    (tmp_path / "a.png").write_text("no image")
    question = load_questions(
        lines(tmp_path, RECORD | {"problem": "<image>What?", "images": ["a.png"]})
    )
    with pytest.raises(ValueError, match="cannot read the image .*a.png"):
        sample(*policy, kb, question, cfg)
