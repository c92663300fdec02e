"""Building: passages, folders that are whole or not there, questions that keep their promises."""

import copy
import html
import json
import re
import runpy
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from conftest import ROOT

import build_kb
from data import DataError, Hop, Question, load_questions
from knowledge.pieces import by_words
from mmhops import build
from mmhops.build import Graph, build_split, names_the_chain, neighbours
from mmhops.phrases import query
from mmhops.quality import given_away, hop_recall, vote
from mmhops.sheet import MARKS, read_marks, write_sheet
from retrieval import TEXT_CORPUS, KnowledgeBaseError


def test_passages_are_short_and_lose_nothing():
    value = "One sentence here. " * 40 + "word " * 120
    cut = by_words("A Title", [("Field", value)], max_words=48)
    assert all(len(f"A Title {text}".split()) <= 48 for _, text in cut)
    assert all(text.startswith("Field: ") for _, text in cut)
    assert " ".join(text.removeprefix("Field: ") for _, text in cut).split() == value.split()


def test_a_second_build_does_nothing_and_a_killed_one_gets_no_name(
    kb_folder, entities, tmp_path, monkeypatch
):
    said = []
    before = (kb_folder / "manifest.json").stat().st_mtime_ns
    build_kb.build(kb_folder, copy.deepcopy(entities), say=said.append)
    assert "up to date" in said[0]
    assert (kb_folder / "manifest.json").stat().st_mtime_ns == before

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_kb, "convert_e5", killed)
    few = copy.deepcopy([entity for entity in entities if entity["image"]][:4])
    with pytest.raises(KeyboardInterrupt):
        build_kb.build(tmp_path / "kb", few, say=said.append)
    assert not (tmp_path / "kb").exists()


def test_someone_elses_folder_is_not_overwritten(entities, tmp_path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(Exception, match="not built by this command"):
        build_kb.build(tmp_path / "thesis", copy.deepcopy(entities), say=lambda *_: None)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_layout_is_the_official_one(kb_folder):
    text = read_jsonl(kb_folder / "text" / "text_corpus.jsonl")
    image = read_jsonl(kb_folder / "image" / "image_corpus.jsonl")
    assert [record["id"] for record in text] == list(range(len(text)))
    assert all("\n" in record["contents"] for record in text)
    assert [record["id"] for record in image] == list(range(len(image)))
    assert all(set(record) == {"id", "title", "entity_id", "image_path"} for record in image)
    assert len({record["title"] for record in image}) == len(image)


# ------------------------------------------------------------------------------ the questions


def hops_of(question, action):
    return [hop for hop in question.hops if hop.action == action]


def test_results_stand_in_the_rows_that_the_gold_chain_names(kb, questions):
    for question in questions:
        for hop in hops_of(question, "image_search"):
            assert kb.records[hop.rows[0]]["title"] == hop.result
        for hop in hops_of(question, "text_search"):
            assert hop.rows
            for row in hop.rows:
                assert kb.texts[row].startswith(hop.about + "\n")
                assert hop.result in kb.texts[row]


def test_each_hop_of_a_bridge_reads_what_the_last_one_found(questions):
    for question in [q for q in questions if q.split == "Bridge"]:
        image, *text = question.hops
        assert image.action == "image_search" and text == hops_of(question, "text_search")
        assert len(question.hops) == question.num_steps
        assert [hop.about for hop in text] == [hop.result for hop in question.hops[:-1]]
        assert text[-1].result == question.answer
        assert len({hop.about for hop in text}) == len(text)  # no entity comes twice


def test_a_comparison_looks_up_two_images_then_two_articles(questions):
    for question in [q for q in questions if q.split == "Compare"]:
        actions = [hop.action for hop in question.hops]
        assert actions == ["image_search"] * 2 + ["text_search"] * 2
        assert question.answer in (question.hops[0].result, question.hops[1].result)
        assert len(question.images) == 2


def test_the_larger_one_wins(kb_folder, questions):
    by_title = {entity["title"]: entity for entity in Graph(kb_folder).entities.values()}
    compared = [q for q in questions if q.split == "Compare"]
    assert len(compared) >= 10
    for question in compared:
        name = question.hops[2].relation
        titles = [hop.about for hop in question.hops[2:]]
        [loser] = [title for title in titles if title != question.answer]
        won = by_title[question.answer]["attributes"][name]
        lost = by_title[loser]["attributes"][name]
        if name == "date of independence":
            assert int(won["text"][-4:]) < int(lost["text"][-4:])
        else:
            assert won["value"] >= 1.1 * lost["value"]


def test_splits_share_no_pictured_entity(data_folder):
    pictured = {}
    for split in ("train", "validation", "test"):
        asked = load_questions(data_folder, split)
        pictured[split] = {hop.result for q in asked for hop in hops_of(q, "image_search")}
    assert not pictured["train"] & pictured["test"]
    assert not pictured["train"] & pictured["validation"]
    assert not pictured["validation"] & pictured["test"]


def test_no_question_says_its_answer_or_names_its_chain(data_folder):
    for split in ("train", "validation", "test"):
        for question in load_questions(data_folder, split):
            for name in [question.answer] + [hop.result for hop in question.hops]:
                whole_words = rf"(?<!\w){re.escape(name.lower())}(?!\w)"
                assert not re.search(whole_words, question.problem.lower()), question


def test_no_answer_is_frequent_enough_to_be_guessed(questions):
    for (kind, steps), share in build.MIXES["tiny"].shares.items():
        asked = [q for q in questions if (q.split, q.num_steps) == (kind, steps)]
        wanted = share * 200  # the training questions of these tests
        assert max(Counter(q.answer for q in asked).values()) <= max(5, 0.015 * wanted)


def test_numbers_have_bounds(questions):
    numerical = [q for q in questions if q.problem_type == "Numerical"]
    assert numerical
    for question in numerical:
        low, high = map(float, question.answer_eval)
        assert low < high


def test_query_images_are_never_the_indexed_file(data_folder, kb_folder):
    indexed = {path.read_bytes() for path in (kb_folder / "images").iterdir()}
    assert not indexed & {path.read_bytes() for path in (data_folder / "images").iterdir()}


def test_questions_are_built_again_only_where_rules_or_arguments_changed(
    kb_folder, data_folder, monkeypatch
):
    said = []
    build.build(kb_folder, data_folder, say=said.append)
    assert said == [f"{data_folder} is up to date"]

    def another_build(*args):
        raise InterruptedError

    monkeypatch.setattr(build, "split_entities", another_build)
    with pytest.raises(InterruptedError):
        build.build(kb_folder, data_folder, seed=1, say=said.append)
    monkeypatch.setattr(build, "RULES", build.RULES + 1)
    with pytest.raises(InterruptedError):
        build.build(kb_folder, data_folder, say=said.append)


def test_a_name_counts_where_it_stands_as_whole_words():
    hops = [{"result": "Chad"}]
    assert names_the_chain("What is the capital of Chad?", "Lima", hops)
    assert names_the_chain("Is it lima?", "Lima", hops)
    assert not names_the_chain("What is chadwick's limit?", "Lima", hops)


def test_comparisons_that_ask_for_a_number(kb_folder):
    graph = Graph(kb_folder)
    countries = [e for e in graph.entities.values() if e["kind"] == "country" and e["image"]]
    near = neighbours(graph, countries, 3)
    for country in countries:
        assert len(near[country["id"]]) == 3 and country not in near[country["id"]]

    mix = replace(build.MIXES["tiny"], numeric_compare=1.0, similar=3)
    records = build_split(graph, "train", countries, 200, 0, mix)
    compared = [record for record in records if record["split"] == "Compare"]
    assert len(compared) > 10
    for record in compared:
        first, second = record["starts"]
        assert record["problem_type"] == "Numerical" and second in near[first["id"]]
        # the answer follows from what the last two hops find
        values = [hop["result"] for hop in record["hops"][2:]]
        if "years" in record["problem"]:
            years = [int(value[-4:]) for value in values]
            assert float(record["answer"]) == abs(years[0] - years[1])
        else:
            small, large = sorted(float(value.replace(",", "")) for value in values)
            expected = large / small if "factor" in record["problem"] else large - small
            low, high = map(float, record["answer_eval"])
            assert low <= 1.01 * expected and 0.99 * expected <= high


def test_the_papers_mix_has_the_papers_shape(kb_folder):
    """70.8 : 29.2 steps over both kinds, 85 : 15, numbers mostly, and texts that differ."""
    graph = Graph(kb_folder)
    starts = [e for e in graph.entities.values() if e["image"]]
    records = build_split(graph, "train", starts, 250, 0, build.MIXES["paper"])
    assert len(records) > 200
    steps = Counter(record["num_steps"] for record in records)
    assert set(steps) == {3, 4}
    # A little more have three: the small atlas has few chains of four.
    assert 0.68 < steps[3] / len(records) < 0.80
    numbers = sum(record["problem_type"] == "Numerical" for record in records) / len(records)
    assert numbers == pytest.approx(0.649, abs=0.06)
    texts = {record["problem"] for record in records}
    assert len(texts) > 0.8 * len(records)


def test_queries_name_the_relation():
    assert query("largest export partner", "Chad") == "largest export partner of Chad"


# ------------------------------------------------------------------------------ their quality


def asked(**fields):
    known = {"id": "a", "problem": "What?", "images": (), "answer": "x", "answer_eval": ("x",)}
    return Question(**known | {"problem_type": "String", "split": "Bridge"} | fields)


def test_the_quality_report_sees_names_however_they_are_spelled():
    hops = (Hop("image_search", "1", "", (0,), "Gambia, The"),)
    leaky = asked(problem="<image>What is the capital of the Gambia?", hops=hops)
    assert given_away(leaky) == ["Gambia, The"]
    assert given_away(asked(problem="<image>What is X?", answer="X")) == ["X"]
    assert given_away(asked(problem="<image>Which Gambian river?", hops=hops)) == []


def test_neighbours_vote_for_the_answer_that_most_of_them_accept():
    def number(answer, low, high):
        return asked(answer=answer, answer_eval=(low, high), problem_type="Numerical")

    numbers = [number("10", "9", "11"), number("75", "70", "80"), number("78", "71", "85")]
    lima = asked(answer="Lima", answer_eval=("Lima",))
    assert vote(number("1", "0", "2"), [lima, lima, *numbers]) == "75"
    assert vote(asked(), [*numbers, lima]) == "Lima"
    assert vote(asked(), numbers) == "75"  # nobody else may vote


# ------------------------------------------------------------------------------ the user's mistakes


def question_file(tmp_path, *records):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
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
        load_questions(question_file(tmp_path, *records))


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
        (["build_kb.py", "--limit", "5"], "error: --source atlas takes --out alone"),
        (["-m", "mmhops.build", "--kb", "nowhere"], "error: nowhere/entities.jsonl does not exist"),
        (["-m", "knowledge.check", "--kb", "nowhere"], "error: nowhere is no knowledge base"),
        (["-m", "engine.gpu_check", "--data", "nowhere"], "error: nowhere does not exist"),
        (["-m", "tiny.warmstart", "--kb", "nowhere"], "error: nowhere/entities.jsonl"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # of runpy
def test_the_users_mistakes_end_the_command_with_one_sentence(args, message, monkeypatch, capsys):
    """Run in this process: nothing but SystemExit may come out of it."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    monkeypatch.chdir(ROOT)
    module = args[0] == "-m"
    monkeypatch.setattr(sys, "argv", args[1:] if module else args)
    try:
        with pytest.raises(SystemExit) as ended:
            if module:
                runpy.run_module(args[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(args[0], run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    code = ended.value.code
    said = code if isinstance(code, str) else capsys.readouterr().err
    assert code not in (0, None) and message in said


def test_a_command_ends_with_a_sentence_and_a_status(tmp_path):
    command = [sys.executable, "-m", "mmhops.build", "--kb", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_damaged_record_of_a_knowledge_base_is_named(tmp_path):
    (tmp_path / "entities.jsonl").write_text('{"id": "a"}\n{"title": "b"}\n')
    with pytest.raises(DataError, match=r"entities.jsonl:2: no 'id'"):
        Graph(tmp_path)
    (tmp_path / "entities.jsonl").write_text('{"id": "a"\n')
    with pytest.raises(DataError, match=r"entities.jsonl:1: not JSON"):
        Graph(tmp_path)


def test_an_unreadable_image_is_named(policy, kb, tmp_path, cfg):
    from rollout import sample

    (tmp_path / "a.png").write_text("no image")
    record = RECORD | {"problem": "<image>What?", "images": ["a.png"]}
    question = load_questions(question_file(tmp_path, record))
    with pytest.raises(ValueError, match="cannot read the image .*a.png"):
        sample(policy, kb, question, cfg)


def test_a_sheet_shows_all_as_text_and_holds_its_pictures(questions, kb_folder, tmp_path):
    evil = "<script>alert('x')</script>"
    hostile = replace(questions[0], id=f'"{evil}', problem=f"<image>{evil}", answer=evil)
    asked = [hostile, *questions[1:5]]
    write_sheet(asked, kb_folder, tmp_path / "sheet.html", evil)
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<script>") == 1 and evil not in page
    assert page.count('src="data:image/jpeg;base64,') == sum(len(q.images) for q in asked)
    assert page.count('type="radio"') == len(asked) * len(MARKS)
    for question in asked[1:]:
        assert all(html.escape(hop.result) in page for hop in question.hops)


def test_a_sheet_needs_the_questions_own_knowledge_base(questions, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / TEXT_CORPUS).write_text('{"id": 0, "contents": "A\\nb"}\n')
    with pytest.raises(KnowledgeBaseError, match="and .* has 1; name the knowledge base"):
        write_sheet(questions[:5], tmp_path, tmp_path / "sheet.html", "")


def test_a_hop_may_be_of_either_kind_in_a_row_of_the_table(kb, mixed):
    """Four searches for one entity, or two each for two."""
    bridge = [q for q in mixed if len(q.hops) == 4 and q.split == "Bridge"]
    compare = [q for q in mixed if q.split == "Compare"]
    recall = hop_recall(kb, bridge + compare, 2)
    assert len(recall["overall"]) == 4
    assert recall == hop_recall(kb, compare + bridge, 2)


def test_the_marks_of_a_sheet_are_read_back_as_a_rate(tmp_path):
    marks = {f"q{i}": "right" for i in range(95)} | {f"x{i}": "wrong" for i in range(5)}
    path = tmp_path / "marks.json"
    path.write_text(json.dumps({"marks": marks | {"y": "unsure"}}))
    found = read_marks(path)
    assert (found["right"], found["wrong"], found["unsure"]) == (95, 5, 1)
    assert (found["rate"], found["interval"]) == (95.0, [88.8, 97.8])
    for bad in ("[]", "{", '{"marks": {"a": "maybe"}}', '{"marks": {}}'):
        path.write_text(bad)
        with pytest.raises(DataError, match="marks.json"):
            read_marks(path)
