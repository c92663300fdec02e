"""Evaluation: what the figures say, going on after a kill, the other modes, the page, ablations."""

import fcntl
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WARMSTART
from PIL import Image

import evaluate
from config import PRESETS, saved_settings
from data import DataError, Hop, Question, load_questions
from engine import packing
from evaluation import ablate, baselines, caption, chat, official, partial, plot, report, summary
from files.records import write_jsonl
from retrieval import Hit
from reward import RewardConfig, reward
from rollout import ACTIONS, SEARCHES, Response, Turn, sample
from train import Group, update

HOPS = (
    Hop("image_search", "1", "", (3,), "Chad"),
    Hop("text_search", "Chad", "capital", (7, 8), "N'Djamena", "capital of Chad"),
)
BRIDGE = Question(
    id="q",
    problem="<image>What?",
    images=(),
    answer="N'Djamena",
    answer_eval=("N'Djamena",),
    problem_type="String",
    split="Bridge",
    num_steps=3,
    hops=HOPS,
)
COMPARE = replace(BRIDGE, split="Compare", num_steps=None)
LOOK = ("image_search", [3])
READ = ("text_search", [8])
INVALID = ("invalid", [], False)


def response(answer, *turns, to=BRIDGE):
    """turns: (action, rows found) or (action, rows found, valid)."""
    made = []
    for number, (action, rows, *valid) in enumerate(turns):
        hits = [Hit("T", "x", 1.0, row) for row in rows]
        made.append(Turn("", action, f"{action} {number}", valid != [False], hits=hits))
    if answer is not None:
        made.append(Turn("", "answer", answer, True))
    return Response(
        to,
        prompt=None,
        token_ids=None,
        policy_mask=None,
        logprobs=None,
        turns=made,
        answer=answer,
        stop="turns" if answer is None else "answer",
    )


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def sampled(policy, kb, questions, cfg, group_size):
    """Responses of the tiny policy, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return sample(policy, kb, questions, replace(cfg, group_size=group_size), generator)


# ------------------------------------------------------------------------------------ the figures


@pytest.mark.parametrize(
    "failed, reason, useless",
    [
        (response("Paris", LOOK, READ), "wrong reading", 0),
        (response("Paris", LOOK), "answered too early", 0),
        (response("Paris", ("image_search", [4]), READ), "wrong image hit", 1),
        (response("Paris", LOOK, ("text_search", [9])), "wrong query", 1),
        (response("Paris", LOOK, INVALID, INVALID), "malformed turn", 0),
        (response(None, LOOK, READ, READ), "no answer", 1),
        (response("Paris", LOOK, READ, to=COMPARE), "wrong comparison", 0),
        (response("Paris", to=replace(BRIDGE, hops=None)), "unknown", 0),
    ],
)
def test_where_it_failed(failed, reason, useless):
    assert summary.failure(failed) == reason
    assert summary.wasted(failed) == useless


@pytest.mark.parametrize(
    "made, is_early",
    [
        (response("N'Djamena", LOOK), True),  # a right guess is early, too
        (response("Paris"), True),
        (response("Paris", LOOK, INVALID), True),
        (response("Paris", LOOK, ("text_search", [9])), False),  # it searched, if in vain
        (response("N'Djamena", LOOK, READ), False),
        (response(None, LOOK), False),  # it never answered
    ],
)
def test_an_answer_is_early_when_it_has_fewer_searches_than_the_chain_has_hops(made, is_early):
    assert summary.early(made) is is_early
    assert summary.summarize([made])["early_rate"] == float(is_early)


def test_without_a_gold_chain_nobody_knows_what_is_early():
    unknown = replace(BRIDGE, hops=None)
    assert summary.early(response("Paris", to=unknown)) is False
    assert summary.summarize([response("Paris", to=unknown)])["early_rate"] is None
    half = summary.summarize([response("Paris", to=unknown), response("Paris", LOOK)])
    assert half["early_rate"] == 1.0


def test_several_responses_per_question():
    one, two = replace(BRIDGE, id="1"), replace(BRIDGE, id="2")
    right_twice = [
        response(answer, LOOK, READ, to=one) for answer in ("N'Djamena", "Paris", "n'djamena", None)
    ]
    right_once = [
        response(answer, LOOK, READ, to=two) for answer in ("Paris", "Paris", "N'Djamena", "Rome")
    ]
    result = summary.summarize(right_twice + right_once, samples=4)
    assert result["n"] == 2
    assert result["overall"] == 37.5
    assert result["majority"] == 50.0
    assert result["pass_at_k"] == {
        1: 37.5,
        2: pytest.approx(100 * (1 - 1 / 6 + 1 - 3 / 6) / 2, abs=0.01),
        4: 100.0,
    }
    assert result["turns_used"] == {2: 1, 3: 7}
    assert result["by_relation"]["capital"]["n"] == 2
    assert result["by_type"]["String"]["accuracy"] == 37.5
    assert result["chain_recall"]["bridge_3"] == [1.0, 1.0]
    two_hops = [replace(r, question=replace(r.question, num_steps=2)) for r in right_twice]
    assert "pass_at_k" not in summary.summarize(two_hops, samples=4)  # none counts as Overall


def test_accuracy_is_told_by_whether_the_searches_were_enough():
    result = summary.summarize(
        [
            response("N'Djamena", LOOK),
            response("Paris", LOOK, READ),
            response("N'Djamena", LOOK, (*READ, False)),
        ]
    )
    assert result["fewer_searches"] == {"n": 1, "accuracy": 100.0}
    assert result["enough_searches"] == {"n": 2, "accuracy": 50.0}


def test_questions_of_two_steps_count_in_their_own_row_only():
    result = summary.summarize(
        [
            response("N'Djamena", LOOK, READ),
            response("Paris", LOOK, READ, to=replace(BRIDGE, num_steps=2)),
        ]
    )
    assert (result["n"], result["n_overall"], result["n_bridge"], result["n_bridge_2"]) == (
        2,
        1,
        1,
        1,
    )
    assert (result["overall"], result["bridge"], result["bridge_2"]) == (100.0, 100.0, 0.0)


def test_the_ceiling_is_what_the_retrievers_allow():
    """The image search finds the one article, the text search only another passage."""

    class Retrievers:
        def image_search(self, images, k):
            return [[Hit("Chad", "", 1.0, 3)] for _ in images]

        def text_search(self, queries, k):
            return [[Hit("Chad", "x", 1.0, 9)] for _ in queries]

    cfg = PRESETS["tiny"]
    reads = replace(BRIDGE, images=("flag.png",))
    names = replace(COMPARE, images=("flag.png",), hops=HOPS[:1])
    limits = summary.limits_of(Retrievers(), [reads, names], cfg)
    wrong = [response("Paris", to=reads), response("Paris", to=names)]
    result = summary.summarize(wrong, limits=limits)
    assert result["ceiling_bridge"] == 0.0
    assert result["ceiling_compare"] == 100.0
    assert result["ceiling"] == result["ceiling_overall"] == 50.0
    assert result["compare_guess"] == 50.0


def test_the_interval_is_that_of_a_proportion():
    values = np.array([1.0] * 300 + [0.0] * 100)
    half = 196 * math.sqrt(0.75 * 0.25 / 400)
    low, high = summary.interval(values)
    assert low == pytest.approx(75 - half, abs=0.6)
    assert high == pytest.approx(75 + half, abs=0.6)


def test_the_paired_test_is_mcnemars():
    differences = np.array([1.0] * 14 + [-1.0] * 4 + [0.0] * 82)
    exact = 2 * sum(math.comb(18, k) for k in range(5)) / 2**18
    result = summary.paired(differences)
    assert result["difference"] == 10.0
    assert result["p"] == pytest.approx(exact, abs=0.01)
    assert result["ci95"][0] > 0


# ---------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "evaluations"


@pytest.fixture(scope="module")
def run(kb, kb_folder, data_folder, folders):
    """Evaluate the warm start in a folder; returns the folder, its results and predictions."""
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate, "connect", lambda *_: kb)  # opening it takes seconds
    yield evaluated(kb_folder, data_folder, folders)
    patch.undo()


def evaluated(kb_folder, data_folder, folders):

    def go(name="whole", **options):
        out = folders / name
        defaults = {"limit": 8, "batch": 4, "temperature": 1.0, "traces": 0}
        evaluate.main(
            evaluate.Args(
                ckpt=WARMSTART, data=data_folder, kb=kb_folder, out=out, **(defaults | options)
            )
        )
        result = json.loads((out / "results.json").read_text())
        return out, result, lines_of(out / "predictions.jsonl")

    return go


def test_a_killed_evaluation_goes_on_with_the_same_result(run, folders, monkeypatch):
    _, expected, lines = run(samples=2)  # 4 batches of 2 questions
    asked = []

    def counted(*args, **kwargs):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(baselines, "sample", counted)
    with pytest.raises(KeyboardInterrupt):
        run("cut", samples=2)
    (part,) = (folders / "cut").glob("predictions.part*")
    assert len(part.read_text().splitlines()) == 1 + 2 * 4  # the settings, two batches

    with open(part, "a") as file:
        file.write('{"id": "torn')
    _, result, again = run("cut", samples=2)
    assert result == expected
    assert again == lines
    assert len(asked) == 3 + 2
    assert not part.exists()

    _, _, other = run("cut", samples=2, seed=1)  # other settings start anew
    assert other != lines
    assert len(asked) == 3 + 2 + 4


def test_an_evaluation_goes_on_with_the_same_questions_and_knowledge_alone(tmp_path):
    for path in ("ckpt/checksums.json", "kb/manifest.json", "captions.jsonl"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("one")
    args = evaluate.Args(ckpt=WARMSTART, kb=tmp_path / "kb", captions=tmp_path / "captions.jsonl")
    cfg, _ = evaluate.settings(args)
    same = (args, tmp_path / "ckpt", cfg, [BRIDGE], SimpleNamespace(sizes=(9, 2)))
    marks = [partial.name_of(partial.conditions_of(*same))]
    for other in (
        (replace(args, kb=Path("other")), *same[1:]),
        (replace(args, captions=Path("some")), *same[1:]),
        (replace(args, base_url="http://elsewhere"), *same[1:]),
        (*same[:3], [replace(BRIDGE, problem="Another?")], same[4]),
        (*same[:4], SimpleNamespace(sizes=(8, 2))),
    ):
        marks.append(partial.name_of(partial.conditions_of(*other)))
    for path in ("ckpt/checksums.json", "kb/manifest.json", "captions.jsonl"):
        (tmp_path / path).write_text("another")  # under the same name
        marks.append(partial.name_of(partial.conditions_of(*same)))
    assert len(set(marks)) == len(marks)


def test_other_weights_in_the_same_folder_are_another_policy(tmp_path):
    marks = []
    for number in (1, 2):
        (tmp_path / "model.safetensors").write_bytes(bytes(number))
        marks.append(partial.weights_of(tmp_path))
    assert marks[0] != marks[1]
    (tmp_path / "checksums.json").write_text("{}")  # a checkpoint's own say what it holds
    assert partial.weights_of(tmp_path) == partial.digest(tmp_path / "checksums.json")
    assert partial.weights_of(None) == partial.weights_of(tmp_path / "none") == ""


def test_a_line_may_hold_what_ends_lines_elsewhere(tmp_path):
    part, record = tmp_path / "part.jsonl", {"id": "a", "text": "one\u2028two\x85three"}
    partial.resume(part, {"seed": 0}, ["a", "a"], 1)
    partial.append(part, [record, record])
    with open(part, "ab") as file:
        file.write('{"id": "tör'.encode()[:-2])  # killed inside a letter
    assert partial.resume(part, {"seed": 0}, ["a", "a"], 1) == [record, record]


def test_records_of_other_questions_are_not_taken_up_again(tmp_path):
    """Two evaluations may have written into one file."""
    part, asked = tmp_path / "part.jsonl", ["a", "a", "b", "b", "c", "c"]
    partial.resume(part, {"seed": 0}, asked, 2)
    partial.append(part, [{"id": name} for name in ("a", "a", "b", "a", "a", "b", "b")])
    part.write_text(part.read_text() + '{"id": "torn')
    assert partial.resume(part, {"seed": 0}, asked, 2) == [{"id": "a"}, {"id": "a"}]
    assert len(part.read_text().splitlines()) == 3


def test_the_default_folder_says_what_differs_from_a_plain_evaluation(tmp_path):
    plain = evaluate.Args(ckpt=tmp_path)
    other = replace(plain, mode="static", split="validation", data=Path("data/okvqa.jsonl"))
    other = replace(other, temperature=1.0, samples=8, oracle_image=True)
    endpoint = evaluate.Args(base_url="http://here", model="a/b", mode="direct", limit=20)
    names = [str(partial.default_folder(args)) for args in (plain, other, endpoint)]
    assert names[0] == f"{tmp_path}-eval"
    assert names[1] == (
        f"{tmp_path}-eval-static-okvqa-validation-temperature-1-samples-8-oracle-image"
    )
    assert names[2] == "runs/a-b/eval-direct-limit-20"


def test_one_folder_has_one_evaluation_at_a_time(run, folders):
    (folders / "taken").mkdir(parents=True)
    with open(folders / "taken" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is writing to .*taken"):
            run("taken")


def test_two_evaluations_are_compared(run, capsys):
    a, first, _ = run("greedy", temperature=0.0)
    b, second, _ = run("sampled")
    overall = summary.compare_results(a, b)["overall"]
    assert overall["a"] == first["overall"]
    difference = second["overall"] - first["overall"]
    assert overall["difference"] == pytest.approx(difference, abs=0.011)
    assert summary.compare_results(a, a)["overall"] == {
        "n": first["n_overall"],
        "a": first["overall"],
        "b": first["overall"],
        "difference": 0.0,
        "ci95": [0.0, 0.0],
        "p": 1.0,
    }
    evaluate.main(evaluate.Args(compare=(a, b)))
    assert "B - A" in capsys.readouterr().out
    with pytest.raises(DataError, match="writes one"):
        summary.compare_results(a, a / "nothing")
    lines = lines_of(b / "predictions.jsonl")
    lines[0]["trajectory"]["problem"] = "another question with the same id"
    write_jsonl(b.parent / "other.jsonl", lines)
    with pytest.raises(DataError, match="are of other questions"):
        summary.compare_results(a, b.parent / "other.jsonl")


def test_a_record_brings_back_what_is_counted(policy, kb, mixed, cfg):
    responses = sampled(policy, kb, mixed, cfg, group_size=1)
    records = [summary.record(r, RewardConfig(), policy.tokenizer) for r in responses]
    records = json.loads(json.dumps(records))
    revived = [summary.revive(line, r.question) for line, r in zip(records, responses)]
    assert summary.summarize(revived) == summary.summarize(responses)
    for line, r in zip(records, responses):
        trajectory = line["trajectory"]
        assert trajectory["reward"]["total"] == reward(r, RewardConfig())["total"]
        after_prompt = r.policy_mask[len(r.prompt.token_ids) :].tolist()
        assert [logprob is not None for logprob in trajectory["logprobs"]] == after_prompt
        observed = sum(bool(turn.hits) for turn in r.turns[:-1])
        assert "".join(trajectory["tokens"]).count("<information>") >= observed


def test_a_checkpoint_is_evaluated_with_the_settings_it_was_trained_with(tmp_path):
    trained = {"max_turns": 7, "gamma": 0.5, "lr": 1e-3}  # the last is no setting of a rollout
    (tmp_path / "recipe.json").write_text(json.dumps(trained))
    rollout_cfg, reward_cfg = saved_settings(tmp_path)
    assert (rollout_cfg.max_turns, reward_cfg.gamma) == (7, 0.5)
    cfg, _ = evaluate.settings(evaluate.Args(ckpt=tmp_path, max_turns=2, samples=3))
    assert (cfg.max_turns, cfg.group_size, cfg.temperature) == (2, 3, 0.0)
    with pytest.raises(ValueError, match="topk"):
        evaluate.settings(evaluate.Args(ckpt=tmp_path, topk=0))


def test_a_model_that_was_not_trained_here_is_evaluated_with_the_papers_settings():
    rollout_cfg, reward_cfg = saved_settings(Path("org/model"))
    for cfg in (rollout_cfg, reward_cfg):
        assert asdict(cfg).items() <= asdict(PRESETS["paper"]).items()


def test_with_oracle_images_a_search_finds_what_the_gold_chain_names(kb, questions):
    """Also where the picture is of something else."""
    chains = [q for q in questions if q.hops and q.split == "Bridge"]
    question = chains[0]
    hop = question.hops[0]
    other = next(q for q in chains if q.hops[0].result != hop.result)
    calls = [(replace(question, images=other.images), 1)]
    cfg = PRESETS["tiny"]
    (hits,) = SEARCHES["image_search"].run(kb, calls, cfg)
    assert not summary.found(hop, hits)
    (hits,) = SEARCHES["image_search"].run(kb, calls, replace(cfg, oracle_image=True))
    assert summary.found(hop, hits)
    assert SEARCHES["image_search"].lines(1, hits) == [f"Image 1: {hop.result}"]


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "say which checkpoint"),
        ({"base_url": "http://localhost:1/v1"}, "say which checkpoint"),
        ({"ckpt": WARMSTART, "base_url": "http://localhost:1/v1"}, "say which checkpoint"),
        ({"ckpt": WARMSTART, "samples": 2}, "--samples above 1 needs a --temperature above 0"),
        ({"score": WARMSTART}, "--score needs --references"),
    ],
)
def test_flags_that_do_not_say_what_to_evaluate_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        evaluate.main(evaluate.Args(**options))


# ------------------------------------------------------------------------------------- other modes


def in_mode(mode, policy, kb, questions, cfg):
    cfg = baselines.settings(mode, replace(cfg, group_size=2))
    generator = torch.Generator().manual_seed(0)
    return baselines.run(mode, policy, kb, questions, cfg, generator)


def actions(r):
    return [turn.action for turn in r.turns]


def test_direct_answers_without_tools(policy, kb, mixed, cfg):
    responses = in_mode("direct", policy, kb, mixed, cfg)
    assert len(responses) == 2 * len(mixed)
    for r in responses:
        assert r.answer is not None
        assert actions(r) == ["answer"]
        assert not summary.searches(r)
        assert "<information>" not in policy.tokenizer.decode(r.token_ids)


def test_static_looks_up_every_picture_and_searches_once(policy, kb, mixed, cfg):
    for r in in_mode("static", policy, kb, mixed, cfg):
        pictures = len(r.question.images)
        assert actions(r) == ["image_search"] * pictures + ["text_search", "answer"]
        assert r.answer is not None

        *looks, search, _ = r.turns
        titles = [turn.hits[0].title for turn in looks]
        assert search.argument.startswith(" ".join(titles))
        assert len(search.hits) == cfg.topk

        before = len(r.prompt.token_ids)
        prompt = policy.tokenizer.decode(r.token_ids[:before])
        assert prompt.count("<information>") == pictures + 1
        assert all(title in prompt for title in titles)
        assert not r.policy_mask[:before].any()


def test_text_only_is_blind(policy, kb, mixed, cfg):
    for r in in_mode("text-only", policy, kb, mixed, cfg):
        assert r.prompt.pixel_values is None
        assert not any(turn.valid for turn in r.turns if turn.action == "image_search")
        assert r.question in mixed
    blind = baselines.blind(mixed[0], {mixed[0].id: "a flag"})
    assert blind.images == ()
    assert blind.problem.startswith("The image shows: a flag\n")
    assert "<image>" not in blind.problem


def test_static_rerank_reads_the_pictured_articles_alone_best_first(policy, kb, mixed, cfg):
    for r in in_mode("static-rerank", policy, kb, mixed, cfg):
        *looks, search, _ = r.turns
        titles = {turn.hits[0].title for turn in looks}
        assert search.hits and {hit.title for hit in search.hits} <= titles
        scores = [hit.score for hit in search.hits]
        assert scores == sorted(scores, reverse=True)
        for hit in kb.text_search([search.argument], 20)[0]:  # none of theirs was left out
            if hit.title in titles and hit.score > scores[-1] + 1e-4:
                assert hit.row in {own.row for own in search.hits}
    with pytest.raises(ValueError, match="static-rerank needs the knowledge base's folder"):
        baselines.pipeline(Remote(kb), mixed[:1], cfg, rerank=True)


def test_a_picture_that_cannot_be_read_ends_no_evaluation(kb, mixed, cfg, tmp_path):
    """Neither where its question is not asked nor where the retrievers are judged."""
    (tmp_path / "page.png").write_text("<html>")
    pair = next(q for q in mixed if q.split == "Compare")
    broken = replace(mixed[0], images=(tmp_path / "page.png",))
    assert summary.ceiling(kb, [broken, mixed[0]], cfg)[0] == False  # noqa: E712 (of numpy)
    broken_pair = replace(pair, images=(tmp_path / "page.png", pair.images[1]))
    assert summary.coin_toss(kb, [broken_pair], cfg).tolist() == [0]
    turns = baselines.pipeline(kb, [broken, mixed[0]], cfg)
    assert turns[0][0][0].hits == [] and turns[1][0][0].hits != []


def test_naming_one_of_two_answers_no_question_for_a_number(kb, mixed, cfg):
    named = [q for q in mixed if q.split == "Compare"]
    assert summary.coin_toss(kb, named, cfg).sum() > 0
    numbers = [replace(q, problem_type="Numerical", answer_eval=("1", "2")) for q in named]
    assert not summary.coin_toss(kb, numbers, cfg).any()
    apart = [replace(q, hops=None) for q in named] + [q for q in mixed if q.split == "Bridge"]
    assert np.isnan(summary.coin_toss(kb, apart, cfg)).all()


def test_a_majority_of_numbers_is_one_of_values():
    number = replace(BRIDGE, problem_type="Numerical", answer_eval=("4", "5"))
    group = [response(text, to=number) for text in ("45", "4.5", "4.50 km")]
    assert summary.majority(group) == 1


def test_a_majority_reads_answers_as_the_benchmark_does():
    """INFOSEEK knows no number words; E-VQA's are all that it knows of numbers."""
    infoseek = replace(
        BRIDGE, problem_type="Numerical", answer_eval=("3.6", "4.4"), benchmark="infoseek"
    )
    assert official.is_right(infoseek, "4") and not official.is_right(infoseek, "four")
    assert summary.majority([response(text, to=infoseek) for text in ("four", "4", "4.0")]) == 1
    evqa = replace(BRIDGE, split="templated", reference="2", benchmark="evqa")
    assert summary.majority([response(text, to=evqa) for text in ("three", "two", "2")]) == 1


def test_what_has_no_chain_is_left_out_of_the_ceiling(kb, mixed, cfg):
    """Not taken to be impossible."""
    apart = [replace(q, hops=None) for q in mixed]
    chains = [q for q in mixed if q.hops]
    assert np.isnan(summary.ceiling(kb, apart, cfg)).all()
    written = [response("?", to=q) for q in chains + apart]
    limits = summary.limits_of(kb, chains + apart, cfg)
    both = summary.summarize(written, limits=limits)
    alone = summary.summarize(written[: len(chains)], limits=limits[: len(chains)])
    assert both["ceiling"] == alone["ceiling"] > 0


def test_the_fixed_pipeline_is_shown_oracle_images_too(kb, mixed, cfg):
    first, second = [q for q in mixed if q.hops and len(q.images) == 1][:2]
    wrong = replace(first, images=second.images)
    (turns,) = baselines.pipeline(kb, [wrong], replace(cfg, oracle_image=True))
    assert turns[0][1] == [f"Image 1: {first.hops[0].result}"]
    assert first.hops[0].result in turns[1][0].argument


def test_a_caption_shows_no_picture(text_only):
    """Nor does a tag in it become one."""
    asked = baselines.blind(text_only, {text_only.id: "a <image> of a flag"})
    assert "<image>" not in asked.problem and "of a flag" in asked.problem


class Remote:
    """A knowledge base behind a server: searches, and no more."""

    def __init__(self, kb):
        self.image_search, self.text_search = kb.image_search, kb.text_search


def test_captions_are_written_by_the_policy_and_go_on_where_they_stopped(data_folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    args = caption.Args(out=out, ckpt=WARMSTART, data=data_folder, limit=3, max_tokens=8)
    caption.main(args)
    first = out.read_text()
    out.write_text(first + '{"id": "torn')  # by a kill
    asked = load_questions(data_folder, "test", 5)
    caption.main(replace(args, limit=5))
    assert out.read_text().startswith(first)
    assert list(baselines.read_captions(out)) == [question.id for question in asked]


def test_a_picture_that_cannot_be_read_keeps_no_other_from_its_caption(
    endpoint, data_folder, tmp_path
):
    state, url = endpoint
    folder = shutil.copytree(data_folder, tmp_path / "questions")
    first, second = load_questions(folder, "test", 2)
    first.images[0].write_text("<html>")
    out = tmp_path / "captions.jsonl"
    caption.main(caption.Args(out=out, base_url=url, model="scripted", data=folder, limit=2))
    assert list(baselines.read_captions(out)) == [second.id]


def test_captions_are_written_by_an_endpoint(endpoint, data_folder, tmp_path):
    state, url = endpoint

    def see(body):
        text, picture = body["messages"][0]["content"]
        assert "what this image shows" in text["text"] and picture["type"] == "image_url"
        return " A flag\nwith stripes. "

    state["chat"] = see
    out = tmp_path / "captions.jsonl"
    given = {"base_url": url, "model": "scripted", "data": data_folder}
    caption.main(caption.Args(out=out, limit=4, **given))
    captions = list(baselines.read_captions(out).values())
    assert len(captions) == 4
    assert set(captions) <= {
        "A flag with stripes.",
        "image 1: A flag with stripes.; image 2: A flag with stripes.",
    }
    with pytest.raises(ValueError, match="say who describes"):
        caption.main(caption.Args(out=out, data=data_folder))


def test_each_benchmark_is_judged_by_its_own_rule():
    """INFOSEEK reads no number words, E-VQA counts the parts of a list, MMhops neither."""
    number = replace(BRIDGE, problem_type="Numerical", answer_eval=("3.6", "4.4"))
    assert official.is_right(number, "four") == 1
    assert official.is_right(replace(number, benchmark="infoseek"), "four") == 0
    assert official.is_right(replace(number, benchmark="infoseek"), "about 4") == 1
    listed = replace(BRIDGE, benchmark="evqa", split="multi_answer", reference="oak&&beech&&fir")
    assert official.is_right(listed, "the fir, an oak") == 1
    assert official.is_right(replace(listed, split="automatic"), "the fir, an oak") == 0
    assert official.is_right(listed, None) == official.is_right(number, None) == 0


def test_the_papers_figures_stand_beside_its_own_questions_only():
    released = replace(BRIDGE, hops=None)
    assert official.paper_targets([released]) == {"bridge": 51.35, "compare": 22.01}
    assert official.paper_targets([BRIDGE]) == {}  # ours
    assert official.paper_targets([replace(released, benchmark="evqa")]) == {"2_hop": 23.3}
    mixture = [released, replace(released, benchmark="infoseek")]
    assert official.paper_targets(mixture) == {}


def test_image_and_text_searches_are_counted_apart(policy, kb, mixed, cfg):
    result = summary.summarize(in_mode("static", policy, kb, mixed, cfg))
    pictures = sum(len(question.images) for question in mixed) / len(mixed)
    assert result["image_calls_mean"] == pytest.approx(pictures, abs=1e-3)
    assert result["text_calls_mean"] == 1
    assert result["tool_calls_mean"] == pytest.approx(pictures + 1, abs=1e-3)


def test_text_only_offers_no_image_search():
    cfg = baselines.settings("text-only", PRESETS["paper"])
    assert "<text_search>" in cfg.instructions and "image_search" not in cfg.instructions


def test_prompted_explains_the_task(cfg):
    wording = baselines.settings("prompted", cfg, "<think>…</think>").instructions
    assert "<text_search>query</text_search>" in wording
    assert "Examples:\n<think>…</think>\nQuestion: " in wording
    assert baselines.settings("agent", cfg).instructions == ""
    assert baselines.settings("direct", cfg).instructions == ""


def test_an_endpoint_plays_the_agent(endpoint, kb, mixed):
    """A scripted model that follows the gold chain.

    Its server leaves out the tag at which it stopped, as servers do.
    """
    state, url = endpoint

    def play(body):
        assert body["stop"] == [f"</{name}>" for name in ACTIONS]
        instructions, *pictures, text = body["messages"][0]["content"]
        assert instructions["text"] == cfg.instructions
        q = next(q for q in mixed if q.problem.replace("<image>", "") in text["text"])
        assert [part["type"] for part in pictures] == ["image_url"] * len(q.images)
        done = len(body["messages"]) // 2
        if done == len(q.hops):
            return f"<think>done</think><answer>{q.answer}</answer> and more"
        assert done == 0 or "<information>" in body["messages"][-1]["content"]
        hop = q.hops[done]
        argument = f"image {hop.about}" if hop.action == "image_search" else hop.query
        return f"<think>next</think><{hop.action}>{argument}"

    state["chat"] = play
    cfg = replace(PRESETS["paper"], group_size=1)
    responses = baselines.run_endpoint("agent", baselines.Endpoint(url, "scripted"), kb, mixed, cfg)
    assert len(responses) == len(mixed)
    for r in responses:
        assert summary.correct(r)
        assert r.stop == "answer"
        assert all(turn.valid for turn in r.turns)
        assert len(summary.searches(r)) == len(r.question.hops)


def test_an_endpoint_is_shown_pictures_where_the_question_names_them(mixed):
    first, second = next(q for q in mixed if len(q.images) == 2).images
    problem = "How far is <image> from <image>?"
    asked = replace(mixed[0], images=(first, second), problem=problem)
    cfg = replace(PRESETS["paper"], instructions="Question: ")
    content = baselines.first_message(asked, cfg, turns=[])
    assert [part.get("text") for part in content] == [
        "Question: How far is ",
        None,
        " from ",
        None,
        "?",
    ]
    assert [content[1], content[3]] == [baselines.shown(first), baselines.shown(second)]


def test_an_endpoint_is_shown_what_the_fixed_pipeline_found(endpoint, kb, mixed):
    state, url = endpoint

    def is_anything_found(body):
        text = body["messages"][0]["content"][-1]["text"]
        return "<answer>" + ("yes" if "<information>" in text else "no")

    state["chat"] = is_anything_found
    cfg = baselines.settings("static", replace(PRESETS["paper"], group_size=1))
    responses = baselines.run_endpoint(
        "static", baselines.Endpoint(url, "scripted"), kb, mixed[:2], cfg
    )
    assert [r.answer for r in responses] == ["yes", "yes"]


def test_chat_shows_the_search(kb_folder, mixed, capsys):
    picture = mixed[0].images[0]
    text = mixed[0].problem.replace("<image>", "")
    chat.main(chat.Args(ckpt=WARMSTART, kb=kb_folder, image=(picture,), question=text))
    shown = capsys.readouterr().out
    assert f"looks up {picture.name}" in shown
    assert "→ answer" in shown


# ------------------------------------------------------------------------------------- the page


def hostile(folder, copy):
    """160 copies of an evaluation: question, thought, passage and answer try to leave the data."""
    shutil.copytree(folder, copy)
    lines = lines_of(copy / "predictions.jsonl")
    own = "document.title='owned'"
    evil = f'</script><script>{own}</script><img src=x onerror="{own}">'
    turn = {
        "thought": evil,
        "action": "text_search",
        "argument": evil,
        "valid": True,
        "hits": [[evil, evil, 0.5, 0]],
    }
    lines[0]["prediction"] = evil
    lines[0]["trajectory"]["problem"] = evil
    lines[0]["trajectory"]["turns"] = [turn]
    lines[0]["trajectory"]["reward"]["total"] = float("nan")
    for line, name in zip(lines, ("__proto__", "constructor", "toString")):
        line["id"] = line["trajectory"]["split"] = name
        line["trajectory"]["images"] += [name]
    result = json.loads((copy / "results.json").read_text())
    figures = {"n_constructor": 1, "constructor": 50.0, "ci95_constructor": [0.0, 100.0]}
    (copy / "results.json").write_text(json.dumps(result | figures))
    text = "".join(json.dumps(line) + "\n" for line in lines * 160)
    (copy / "predictions.jsonl").write_text(text)
    return copy


def test_the_page_holds_all_as_data(run, kb_folder, tmp_path):
    folder, result, lines = run("sampled")
    page = page_of_the_run = (folder / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(r"(src|href)=.?https?:", page)

    page = report.write(hostile(folder, tmp_path / "evil"), kb_folder).read_text()
    assert page.count("<script") == page.count("</script>") == 2
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1)
    data = json.loads(data, parse_constant=pytest.fail)  # a browser reads no NaN
    assert len(data["traces"]) == 160 * len(lines)
    assert data["result"]["overall"] == result["overall"]

    report.write(folder)  # again, from the knowledge base that was searched
    assert (folder / "report.html").read_text() == page_of_the_run
    result["kb"][4] = "http://server"  # it may have other articles
    (folder / "results.json").write_text(json.dumps(result))
    assert '"#' not in re.search(r'"pictures".*', report.write(folder).read_text()).group()

    pictures = data["pictures"]
    assert all(address.startswith("data:image/jpeg;base64,") for address in pictures.values())
    assert {path for line in lines for path in line["trajectory"]["images"]} <= set(pictures)
    assert any(name.startswith("#") for name in pictures)  # an article's


def test_a_page_shows_whole_groups_of_questions_evenly_drawn(tmp_path, monkeypatch):
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, ({"id": number // 2} for number in range(20)))
    monkeypatch.setattr(report, "MOST", 8)
    records, count = report.read_some(path, samples=2)
    assert count == 20
    assert [record["id"] for record in records] == [0, 0, 3, 3, 6, 6, 9, 9]
    monkeypatch.setattr(report, "MOST", 20)
    assert len(report.read_some(path, samples=2)[0]) == 20


def test_a_picture_that_cannot_be_shown_is_left_out(tmp_path):
    bomb, program = tmp_path / "bomb.png", tmp_path / "program.png"
    Image.new("1", (20_000, 20_000)).save(bomb)  # 400 megapixels in 49 kB
    program.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert [report.thumbnail(path) for path in (bomb, program, tmp_path / "none")] == [None] * 3


@pytest.mark.slow
def test_a_browser_shows_the_page(run, kb_folder, tmp_path):
    """Headless Chromium, 160 times eight responses, one of eight hostile."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("apt-get install chromium")
    folder, _, _ = run("sampled")
    page = report.write(hostile(folder, tmp_path / "evil"), kb_folder)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [browser, *options, "--dump-dom", f"file://{page}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    shown = done.stdout
    assert shown.count('class="item') == 160 * 8
    assert 'class="turn' in shown
    assert "<polyline" not in shown
    assert "<title>MMhops-R1: evaluation</title>" in shown
    assert "owned'" in shown  # as text only


# ------------------------------------------------------------------------------------- the curves


def made_up_run(folder, landmarks=None, without=()):
    """A run of three steps, evaluated before and after them."""
    folder.mkdir()
    names = [name for name, *_ in plot.TRAINING if name not in without]
    held_out = [name for name, *_ in plot.HELD_OUT]
    lines = [{"step": 0} | landmarks] if landmarks else []
    lines += [{"step": step, "eval_n": 9} | dict.fromkeys(held_out, 20 + step) for step in (0, 3)]
    lines += [{"step": step} | dict.fromkeys(names, step / 3) for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def texts_of(figure):
    """What is written into a figure's panels, their titles included."""
    texts = [text for axis in figure.axes for text in axis.texts]
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    return [text.get_text().replace("\n", " ") for text in texts] + titles


def test_the_picture_of_a_run_says_in_words_where_it_began_where_it_ends_and_what_is_possible(
    tmp_path,
):
    landmarks = {"ceiling": 95.3, "honest": {"greedy": 87.6, "sampled": 85.0}}
    folder = made_up_run(tmp_path / "a", landmarks)
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 99, "torn')  # by a full disk, say
    run = plot.read_metrics(folder)
    written = texts_of(plot.draw_story(run))
    assert "before RL: greedy 20%, sampled 20%" in written
    assert {"greedy 23%", "sampled 23%"} <= set(written)
    assert "ceiling: a perfect policy with these retrievers 95%" in written
    assert "imitation of an honest teacher 88%" in written
    assert any("answer before all hops are searched" in text for text in written)


def test_an_older_run_without_landmarks_and_chains_is_drawn_without_them(tmp_path):
    older = made_up_run(tmp_path / "a", without=("early_rate", "wasted_calls_mean"))
    figure = plot.draw_story(plot.read_metrics(older))
    assert len(figure.axes) == 1
    assert not [text for text in texts_of(figure) if "ceiling" in text or "honest" in text]
    assert plot.plot_curves((older,)).exists()


def test_labels_beside_a_picture_do_not_overlap():
    values, heights = [88.0, 87.0, 87.5, 20.0], [5.0, 10.0, 5.0, 5.0]
    places = plot.spread(values, heights)
    assert places[3] == 20.0
    order = sorted(range(4), key=lambda i: values[i])
    for below, above in zip(order, order[1:]):
        assert places[above] - places[below] >= (heights[below] + heights[above]) / 2 - 0.1


def test_curves_of_several_runs_leave_those_of_each_alone(tmp_path):
    runs = made_up_run(tmp_path / "a"), made_up_run(tmp_path / "b")
    assert plot.plot_curves(runs) == tmp_path / "curves.png"
    assert not (runs[0] / "curves.png").exists()
    assert plot.plot_curves(runs[:1]) == runs[0] / "curves.png"
    assert (runs[0] / "curves.png").stat().st_size > 10_000
    assert (runs[0] / "diagnostics.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="say which runs"):
        plot.plot_curves(())


# ------------------------------------------------------------------------------------- ablations


def made_up_evaluation(folder, right):
    """100 Bridge questions, the others Compare."""
    folder.mkdir(parents=True)
    result = {"format_rate": 0.9, "tool_calls_mean": 3.0}
    (folder / "results.json").write_text(json.dumps(result))
    lines = [
        {
            "id": str(number),
            "prediction": "",
            "trajectory": {
                "split": "Bridge" if number < 100 else "Compare",
                "num_steps": 3,
                "problem_type": "String",
                "correct": value,
            },
        }
        for number, value in enumerate(right)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "predictions.jsonl").write_text(text)


def test_the_table_of_ablations(tmp_path, capsys):
    """One variant loses a fifth of Bridge and gains on Compare."""
    for seed in (0, 1):
        full = [1] * 80 + [0] * 20 + [1] * 25 + [0] * 25
        made_up_evaluation(tmp_path / f"full-{seed}" / "eval", full)
        other = [1] * 60 + [0] * 40 + [1] * 40 + [0] * 10
        made_up_evaluation(tmp_path / f"no_action-{seed}" / "eval", other)
    rows = ("full", "no_action", "neither")
    ablate.main(ablate.Args(rows=rows, out=tmp_path, table=True))
    table = json.loads((tmp_path / "table.json").read_text())
    assert set(table) == {"full", "no_action"}
    assert table["full"]["bridge"] == 80.0
    assert table["no_action"]["compare"] == 80.0
    change, low, high = table["no_action"]["bridge_change"]
    assert change == -20.0
    assert low < -20 < high < 0
    assert table["no_action"]["bridge_sign_agrees"] is True
    assert table["no_action"]["compare_sign_agrees"] is False
    assert "-3.8 ✓" in capsys.readouterr().out


def test_rows_may_have_different_seeds_and_are_compared_over_those_that_both_have(tmp_path, capsys):
    """Seed 2 of the row, which the full method has not, would turn the change around."""
    for seed in (0, 1, 3):
        made_up_evaluation(tmp_path / f"full-{seed}" / "eval", [1] * 80 + [0] * 20 + [1] * 50)
    for seed, right in ((0, 70), (1, 70), (2, 100)):
        made_up = [1] * right + [0] * (100 - right) + [1] * 50
        made_up_evaluation(tmp_path / f"no_action-{seed}" / "eval", made_up)
    ablate.main(ablate.Args(rows=("full", "no_action"), seeds=(0,), out=tmp_path, table=True))
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["no_action"]["seeds"] == [0, 1, 2]
    assert table["no_action"]["seeds_compared"] == [0, 1]
    assert table["no_action"]["bridge"] == 80.0
    assert table["no_action"]["bridge_change"][0] == -10.0
    shown = capsys.readouterr().out
    assert "3 (2)" in shown
    assert "wider than ±2 points: no_action; add seeds with --rows no_action --seeds 3 4" in shown


def test_a_row_that_the_paper_fills_with_another_system_names_it_and_has_no_sign(tmp_path, capsys):
    for name in ("full", "direct"):
        right = [1] * 80 + [0] * 20 if name == "full" else [0] * 100
        made_up_evaluation(tmp_path / f"{name}-0" / "eval", right + [1] * 50)
    ablate.main(ablate.Args(rows=("full", "direct"), out=tmp_path, table=True))
    shown = capsys.readouterr().out
    assert "Qwen2.5-VL-72B" in shown
    assert "✓" not in shown and "✗" not in shown
    assert "bridge_paper" not in json.loads((tmp_path / "table.json").read_text())["direct"]


def test_the_papers_changes_are_those_of_the_same_comparison():
    compared = {
        (name, split)
        for name in ablate.VARIANTS
        for split in ("bridge", "compare")
        if ablate.paper_change(name, split)
    }
    assert compared == {
        ("no_action", "bridge"),
        ("no_action", "compare"),
        ("no_format", "compare"),
        ("neither", "bridge"),
        ("neither", "compare"),
        ("T2", "bridge"),
    }


def test_a_variant_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no row is called nothing"):
        ablate.main(ablate.Args(rows=("nothing",), out=tmp_path))


def test_a_variant_that_trains_nothing_evaluates_the_full_methods_policy(tmp_path):
    args = ablate.Args(out=tmp_path, init="start")
    direct = ablate.evaluate_command(args, "direct", 1)
    assert direct[direct.index("--ckpt") + 1] == str(tmp_path / "full-1" / "latest")
    assert direct[-2:] == ["--mode", "direct"]
    before = ablate.evaluate_command(args, "before", 1)
    assert before[-2:] == ["--ckpt", "start"]  # of a flag given twice the last counts


def test_runs_made_with_other_settings_are_not_added_to_a_table(tmp_path):
    names = ("init", "limit", "steps")
    ablate.check_settings(ablate.Args(out=tmp_path, limit=300), names)
    more = ablate.Args(out=tmp_path, limit=300, seeds=(0, 1, 2, 3), rows=("full", "T5"), jobs=1)
    ablate.check_settings(more, names)
    differs = "made with --init assets/tiny-warmstart, not other, --limit 300, not None; give"
    with pytest.raises(SystemExit, match=differs):
        ablate.check_settings(ablate.Args(out=tmp_path, init="other"), names)


@pytest.fixture
def groups(policy, kb, mixed, cfg):
    """Two groups of four responses."""
    responses = sampled(policy, kb, mixed[:2], cfg, group_size=4)
    return [
        Group(responses[:4], torch.tensor([2.0, 1.0, 0.0, 0.5])),
        Group(responses[4:], torch.tensor([0.0, 1.0, 1.0, 2.0])),
    ]


def no_step(policy, groups, **options):
    """The figures of an optimizer step with a learning rate of 0."""
    cfg = replace(PRESETS["tiny"], group_size=4, updates_per_step=1, lr=0.0, **options)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)
    return update(policy, optimizer, groups, cfg, filler=groups[0].responses[0])


def test_sequence_level_loss_is_a_mean_of_means(policy, groups):
    """At the policy that sampled, the loss is -Σ_i A_i mean_t(ρ) / N, whatever the lengths.

    That of tokens is weighted by length.
    """
    responses = [r for group in groups for r in group.responses]
    lengths = torch.tensor([int(r.policy_mask.sum()) for r in responses])
    assert len(set(lengths.tolist())) > 1
    advantages = torch.cat([(x - x.mean()) / (x.std() + 1e-6) for _, x in groups])

    by_response = -advantages.mean().item()
    by_token = -(advantages * lengths).sum().item() / lengths.sum().item()
    loss = no_step(policy, groups, token_level_loss=False)["loss"]
    assert loss == pytest.approx(by_response, abs=2e-4)
    loss = no_step(policy, groups)["loss"]
    assert loss == pytest.approx(by_token, abs=2e-4)


def test_without_the_mask_retrieved_tokens_are_trained_on(policy, groups):
    """Their weights are 1: the rollout has no log-probabilities that could be compared."""
    responses = [r for group in groups for r in group.responses]
    masks = [r.policy_mask.clone() for r in responses]
    options = {"mask_retrieved": False, "recompute_logprobs": True}
    stats = no_step(policy, groups, **options)
    assert stats["clip_fraction"] == 0
    assert stats["logprob_diff_max"] < 5e-3
    cfg = replace(PRESETS["tiny"], max_rollout_ratio=2.0, **options)
    opened = packing.unmasked(responses)
    packing.rescore(policy, opened, responses[0], cfg)
    logprobs, _ = policy.logprobs(opened)  # (N, L)
    for r, mask, mine, scored in zip(responses, masks, opened, logprobs):
        assert r.policy_mask.equal(mask)  # the responses themselves stay as they are
        trained = mine.policy_mask
        assert int(trained.sum()) == len(r.token_ids) - len(r.prompt.token_ids)
        assert int(trained.sum()) >= int(mask.sum())
        torch.testing.assert_close(mine.weights, torch.ones(len(mask)), atol=5e-3, rtol=0)
        torch.testing.assert_close(
            mine.logprobs[trained],
            scored[: len(mask)][trained].detach(),
            atol=5e-3,  # improbable tokens round most
            rtol=0,
        )
