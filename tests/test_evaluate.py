"""Evaluation: what the figures say, that a killed evaluation goes on, the other systems' modes, the page, the ablations' table."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import WARMSTART

import evaluate
from data import DataError, Hop, Question
from engine.packing import update
from evaluation import ablate, baselines, chat, plot, report, summary
from model import token_logprobs
from retrieval import Hit
from reward import RewardConfig, reward
from rollout import Response, Turn, sample
from train import PRESETS

HOPS = (
    Hop("image_search", "1", "", (3,), "Chad"),
    Hop("text_search", "Chad", "capital", (7, 8), "N'Djamena", "capital of Chad"),
)


def question(name="q", hops=HOPS, **changes):
    return replace(
        Question(
            name, "<image>What?", (), "N'Djamena", ("N'Djamena",), "String", "Bridge", 3, hops
        ),
        **changes,
    )


def episode(answer, *turns, asked=question()):
    """turns: (action, rows found) or (action, rows found, valid)."""
    made = [
        Turn(
            "",
            action,
            f"{action} {i}",
            valid[0] if valid else True,
            hits=[Hit("T", "x", 1.0, row) for row in rows],
        )
        for i, (action, rows, *valid) in enumerate(turns)
    ]
    return Response(
        asked,
        None,
        None,
        None,
        None,
        made + [Turn("", "answer", answer or "", True)] * (answer is not None),
        answer,
        "answer" if answer is not None else "turns",
    )


LOOK, READ = ("image_search", [3]), ("text_search", [8])


@pytest.mark.parametrize(
    "t, reason, useless",
    [
        (episode("Paris", LOOK, READ), "wrong reading", 0),
        (episode("Paris", LOOK), "answered too early", 0),
        (episode("Paris", ("image_search", [4]), READ), "wrong image hit", 1),
        (episode("Paris", LOOK, ("text_search", [9])), "wrong query", 1),
        (
            episode("Paris", LOOK, ("invalid", [], False), ("invalid", [], False)),
            "malformed turn",
            0,
        ),
        (episode(None, LOOK, READ, READ), "no answer", 1),
        (
            episode("Paris", LOOK, READ, asked=question(split="Compare", num_steps=None)),
            "wrong comparison",
            0,
        ),
        (episode("Paris", asked=question(hops=None)), "unknown", 0),
    ],
)
def test_where_it_failed(t, reason, useless):
    assert summary.failure(t) == reason and summary.wasted(t) == useless


def test_several_responses_a_question():
    one, two = question("1"), question("2")
    group = [
        episode(answer, LOOK, READ, asked=asked)
        for asked, answers in (
            (one, ("N'Djamena", "Paris", "n'djamena", None)),
            (two, ("Paris", "Paris", "N'Djamena", "Rome")),
        )
        for answer in answers
    ]
    result = summary.summarize(group, samples=4)
    assert result["n"] == 2 and result["overall"] == 37.5 and result["majority"] == 50.0
    assert result["pass_at_k"] == {
        1: 37.5,
        2: pytest.approx(100 * (1 - 1 / 6 + 1 - 3 / 6) / 2, abs=0.01),
        4: 100.0,
    }
    assert (
        result["turns_used"] == {2: 1, 3: 7}
        and result["by_relation"]["capital"]["n"] == 2
        and result["by_type"]["String"]["accuracy"] == 37.5
    )
    assert result["chain_recall"]["bridge_3"] == [1.0, 1.0]
    few = summary.summarize(
        [
            episode("N'Djamena", LOOK),
            episode("Paris", LOOK, READ),
            episode("N'Djamena", LOOK, (*READ, False)),
        ]
    )
    assert few["fewer_searches"] == {"n": 1, "accuracy": 100.0} and few["enough_searches"] == {
        "n": 2,
        "accuracy": 50.0,
    }


def test_the_interval_is_that_of_a_proportion():
    values = np.array([1.0] * 300 + [0.0] * 100)
    low, high = summary.interval(values)
    assert (low, high) == (
        pytest.approx(75 - 196 * math.sqrt(0.75 * 0.25 / 400), abs=0.6),
        pytest.approx(75 + 196 * math.sqrt(0.75 * 0.25 / 400), abs=0.6),
    )


def test_the_paired_test_is_mcnemars():
    differences = np.array([1.0] * 14 + [-1.0] * 4 + [0.0] * 82)
    exact = 2 * sum(math.comb(18, k) for k in range(5)) / 2**18
    result = summary.paired(differences)
    assert (
        result["difference"] == 10.0
        and result["p"] == pytest.approx(exact, abs=0.01)
        and result["ci95"][0] > 0
    )


@pytest.fixture(scope="module")
def run(kb_folder, data_folder, tmp_path_factory):
    """Evaluate the warm start in a folder; returns its results and predictions."""

    def go(name="whole", **options):
        out = tmp_path_factory.getbasetemp() / "evaluations" / name
        evaluate.main(
            evaluate.Args(
                ckpt=WARMSTART,
                data=data_folder,
                kb=kb_folder,
                out=out,
                **dict(limit=12, batch=4, temperature=1.0, traces=0) | options,
            )
        )
        return (
            out,
            json.loads((out / "results.json").read_text()),
            [json.loads(line) for line in open(out / "predictions.jsonl")],
        )

    return go


def test_a_killed_evaluation_goes_on_with_the_same_result(run, tmp_path_factory, monkeypatch):
    out, expected, lines = run(samples=2)
    part, asked = (
        tmp_path_factory.getbasetemp() / "evaluations" / "cut" / "predictions.part.jsonl",
        [],
    )

    def counted(*args, **kwargs):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(baselines, "sample", counted)
    with pytest.raises(KeyboardInterrupt):
        run("cut", samples=2)
    assert len(part.read_text().splitlines()) == 1 + 2 * 4
    with open(part, "a") as file:
        file.write('{"id": "torn')
    _, result, again = run("cut", samples=2)
    assert result == expected and again == lines and len(asked) == 3 + 4 and not part.exists()
    asked[:] = [1] * 10
    assert (
        run("cut", samples=2, seed=1)[2] != lines and len(asked) == 16
    )  # other settings start anew


def test_two_evaluations_are_compared(run, capsys):
    a, first, _ = run("greedy", temperature=0.0)
    b, second, _ = run("sampled")
    result = summary.compare(a, b)
    assert result["overall"]["a"] == first["overall"] and result["overall"][
        "difference"
    ] == pytest.approx(second["overall"] - first["overall"], abs=0.011)
    assert summary.compare(a, a)["overall"] == {
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
        summary.compare(a, a / "nothing")


def test_a_record_brings_back_what_is_counted(policy, kb, mixed, cfg):
    responses = sample(
        *policy, kb, mixed, replace(cfg, group_size=1), torch.Generator().manual_seed(0)
    )
    saved = [
        json.loads(json.dumps(summary.record(t, RewardConfig(), policy[1].tokenizer)))
        for t in responses
    ]
    assert summary.summarize(
        [summary.revive(line, t.question) for line, t in zip(saved, responses)]
    ) == summary.summarize(responses)
    for line, t in zip(saved, responses):
        assert line["trajectory"]["reward"]["total"] == reward(t, RewardConfig()).total
        assert [p is not None for p in line["trajectory"]["logprobs"]] == t.policy_mask[
            len(t.prompt.token_ids) :
        ].tolist()
        assert "".join(line["trajectory"]["tokens"]).count("<information>") >= sum(
            bool(turn.hits) for turn in t.turns[:-1]
        )


# ------------------------------------------------------------------------------------- other systems


def in_mode(mode, policy, kb, questions, cfg, **options):
    return baselines.run(
        mode,
        *policy,
        kb,
        questions,
        baselines.settings(mode, replace(cfg, group_size=2), **options),
        torch.Generator().manual_seed(0),
    )


def test_direct_answers_without_tools(policy, kb, mixed, cfg):
    responses = in_mode("direct", policy, kb, mixed, cfg)
    assert len(responses) == 2 * len(mixed)
    for t in responses:
        assert (
            t.answer is not None
            and [turn.action for turn in t.turns] == ["answer"]
            and not summary.searches(t)
        )
        assert "<information>" not in policy[1].tokenizer.decode(t.token_ids)


def test_static_looks_up_every_picture_and_searches_once(policy, kb, mixed, cfg):
    for t in in_mode("static", policy, kb, mixed, cfg):
        assert [turn.action for turn in t.turns] == ["image_search"] * len(t.question.images) + [
            "text_search",
            "answer",
        ] and t.answer is not None
        titles = [turn.hits[0].title for turn in t.turns[:-2]]
        assert (
            t.turns[-2].argument.startswith(" ".join(titles)) and len(t.turns[-2].hits) == cfg.topk
        )
        text = policy[1].tokenizer.decode(t.token_ids[: len(t.prompt.token_ids)])
        assert text.count("<information>") == len(t.turns) - 1 and all(
            title in text for title in titles
        )
        assert not t.policy_mask[: len(t.prompt.token_ids)].any()


def test_text_only_is_blind(policy, kb, mixed, cfg):
    for t in in_mode("text-only", policy, kb, mixed, cfg):
        assert (
            t.prompt.pixel_values is None
            and not any(turn.valid for turn in t.turns if turn.action == "image_search")
            and t.question in mixed
        )
    blind = baselines.blind(mixed[0], {mixed[0].id: "a flag"})
    assert (
        blind.images == ()
        and blind.problem.startswith("The image shows: a flag\n")
        and "<image>" not in blind.problem
    )


def test_prompted_explains_the_task(cfg):
    wording = baselines.settings("prompted", cfg, "<think>…</think>").instructions
    assert (
        "<text_search>query</text_search>" in wording
        and "Examples:\n<think>…</think>\nQuestion: " in wording
    )
    assert (
        baselines.settings("agent", cfg).instructions
        == ""
        == baselines.settings("direct", cfg).instructions
    )


def test_an_endpoint_plays_the_agent(endpoint, kb, mixed):
    """A scripted model that follows the gold chain; its server leaves out the tag at which it stopped, as servers do."""
    state, url = endpoint
    hops = {q.problem.replace("<image>", ""): q for q in mixed}

    def play(body):
        assert body["stop"] == baselines.STOPS
        parts = body["messages"][0]["content"]
        q = next(q for text, q in hops.items() if text in parts[-1]["text"])
        assert sum(part["type"] == "image_url" for part in parts) == len(q.images)
        done = len(body["messages"]) // 2
        if done < len(q.hops):
            assert done == 0 or "<information>" in body["messages"][-1]["content"]
            hop = q.hops[done]
            return f"<think>next</think><{hop.action}>" + (
                f"image {hop.about}" if hop.action == "image_search" else hop.query
            )
        return f"<think>done</think><answer>{q.answer}</answer> and more"

    state["chat"] = play
    cfg = replace(PRESETS["paper"], group_size=1)
    responses = baselines.Endpoint(url, "scripted").sample("agent", kb, mixed, cfg)
    assert all(
        summary.correct(t) and t.stop == "answer" and all(turn.valid for turn in t.turns)
        for t in responses
    )
    assert [len(summary.searches(t)) for t in responses] == [len(q.hops) for q in mixed]
    state["chat"] = lambda body: (
        "<answer>"
        + ("yes" if "<information>" in body["messages"][0]["content"][-1]["text"] else "no")
    )
    assert {
        t.answer
        for t in baselines.Endpoint(url, "scripted").sample(
            "static", kb, mixed[:2], baselines.settings("static", cfg)
        )
    } == {"yes"}


def test_chat_shows_the_search(kb_folder, mixed, capsys):
    chat.main(
        chat.Args(
            ckpt=WARMSTART,
            kb=kb_folder,
            image=mixed[0].images[:1],
            question=mixed[0].problem.replace("<image>", ""),
        )
    )
    shown = capsys.readouterr().out
    assert f"looks up {mixed[0].images[0].name}" in shown and "→ answer" in shown


# ------------------------------------------------------------------------------------- the page


def hostile(folder, copy):
    """An evaluation in which question, thought, passage and answer try to leave the data."""
    shutil.copytree(folder, copy)
    lines = [json.loads(line) for line in open(copy / "predictions.jsonl")]
    evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    lines[0]["prediction"] = lines[0]["trajectory"]["problem"] = evil
    lines[0]["trajectory"]["turns"] = [
        {
            "thought": evil,
            "action": "text_search",
            "argument": evil,
            "valid": True,
            "hits": [[evil, evil, 0.5, 0]],
        }
    ]
    (copy / "predictions.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines * 160)
    )
    return copy


def test_the_page_holds_all_as_data(run, kb_folder, tmp_path):
    folder, result, lines = run("sampled")
    page = (folder / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2 and not re.search(
        r"(src|href)=.?https?:", page
    )
    text = report.write(hostile(folder, tmp_path / "evil"), kb_folder).read_text()
    assert text.count("<script") == text.count("</script>") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    assert (
        len(data["traces"]) == 160 * len(lines) and data["result"]["overall"] == result["overall"]
    )
    assert all(
        picture.startswith("data:image/jpeg;base64,") for picture in data["pictures"].values()
    )
    assert {str(path) for line in lines for path in line["trajectory"]["images"]} <= set(
        data["pictures"]
    ) and any(name.startswith("#") for name in data["pictures"])


@pytest.mark.slow
def test_a_browser_shows_the_page(run, kb_folder, tmp_path):
    """Headless Chromium, about two thousand traces, one of them hostile."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("apt-get install chromium")
    page = report.write(hostile(run("sampled")[0], tmp_path / "evil"), kb_folder)
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=5000",
            "--dump-dom",
            f"file://{page}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    shown = done.stdout
    assert (
        shown.count('class="item') == 1920 and 'class="turn' in shown and "<polyline" not in shown
    )
    assert "<title>MMhops-R1: evaluation</title>" in shown and "owned'" in shown  # as text only


# ------------------------------------------------------------------------------------- ablations


def test_the_table_of_ablations(tmp_path, capsys):
    """Made-up evaluations: one row loses a fifth of Bridge and gains on Compare."""

    def put(name, seed, right):
        folder = tmp_path / f"{name}-{seed}" / "eval"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(
            json.dumps({"format_rate": 0.9, "tool_calls_mean": 3.0})
        )
        (folder / "predictions.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        "id": str(i),
                        "prediction": "",
                        "trajectory": {
                            "split": "Bridge" if i < 100 else "Compare",
                            "num_steps": 3,
                            "problem_type": "String",
                            "correct": value,
                        },
                    }
                )
                + "\n"
                for i, value in enumerate(right)
            )
        )

    for seed in (0, 1):
        put("full", seed, [1] * 80 + [0] * 20 + [1] * 25 + [0] * 25)
        put("no_action", seed, [1] * 60 + [0] * 40 + [1] * 40 + [0] * 10)
    args = ablate.Args(rows=("full", "no_action", "neither"), out=tmp_path, table=True)
    ablate.main(args)
    table = json.loads((tmp_path / "table.json").read_text())
    assert (
        set(table) == {"full", "no_action"}
        and table["full"]["bridge"] == 80.0
        and table["no_action"]["compare"] == 80.0
    )
    change, low, high = table["no_action"]["bridge_change"]
    assert (
        change == -20.0
        and low < -20 < high < 0
        and table["no_action"]["bridge_sign_agrees"] is True
        and table["no_action"]["compare_sign_agrees"] is False
    )
    assert "-3.8 ✓" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no row is called nothing"):
        ablate.main(ablate.Args(rows=("nothing",), out=tmp_path))


def test_runs_made_with_other_settings_are_not_added_to_a_table(tmp_path):
    ablate.check_settings(ablate.Args(out=tmp_path, limit=300))
    ablate.check_settings(
        ablate.Args(out=tmp_path, limit=300, seeds=(0, 1, 2, 3), rows=("full", "T5"), jobs=1)
    )
    with pytest.raises(
        SystemExit,
        match="made with --init assets/tiny-warmstart, not other, --limit 300, not None; give",
    ):
        ablate.check_settings(ablate.Args(out=tmp_path, init="other"))


@pytest.fixture
def group(policy, kb, mixed, cfg):
    responses = sample(
        *policy, kb, mixed[:2], replace(cfg, group_size=4), torch.Generator().manual_seed(0)
    )
    return [
        (responses[:4], torch.tensor([2.0, 1.0, 0.0, 0.5])),
        (responses[4:], torch.tensor([0.0, 1.0, 1.0, 2.0])),
    ]


def no_step(policy, groups, **options):
    cfg = replace(PRESETS["tiny"], group_size=4, updates_per_step=1, **options)
    return update(
        policy[0],
        torch.optim.SGD(policy[0].parameters(), lr=0.0),
        groups,
        cfg,
        spare=groups[0][0][0],
    )


def test_sequence_level_loss_is_a_mean_of_means(policy, group):
    """At the policy that sampled, the loss is -Σ_i A_i mean_t(ρ) / N, whatever the lengths; that of tokens is weighted by length."""
    responses = [t for responses, _ in group for t in responses]
    advantages = torch.cat(
        [(totals - totals.mean()) / (totals.std() + 1e-6) for _, totals in group]
    )
    lengths = torch.tensor([int(t.policy_mask.sum()) for t in responses])
    assert len(set(lengths.tolist())) > 1
    assert no_step(policy, group, token_level_loss=False)["loss"] == pytest.approx(
        -advantages.mean().item(), abs=2e-4
    )
    assert no_step(policy, group)["loss"] == pytest.approx(
        -(advantages * lengths).sum().item() / lengths.sum().item(), abs=2e-4
    )


def test_without_the_mask_retrieved_tokens_are_trained_on(policy, group):
    before = [int(t.policy_mask.sum()) for responses, _ in group for t in responses]
    stats = no_step(policy, group, mask_retrieved=False, recompute_logprobs=True)
    after = [t for responses, _ in group for t in responses]
    assert (
        all(
            int(t.policy_mask.sum()) == len(t.token_ids) - len(t.prompt.token_ids) >= n
            for t, n in zip(after, before)
        )
        and stats["clip_fraction"] == 0
    )
    plain = token_logprobs(policy[0], after)[0]
    for t, row in zip(after, plain):
        torch.testing.assert_close(
            t.logprobs[t.policy_mask],
            row[: len(t.token_ids)][t.policy_mask].detach(),
            atol=5e-3,
            rtol=0,
        )  # improbable tokens round most


def test_curves_of_several_runs_leave_those_of_each_alone(tmp_path):
    runs = tmp_path / "a", tmp_path / "b"
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"step": i} | {name: i for name, *_ in plot.PANELS if name}) + "\n"
                for i in range(3)
            )
        )
    assert (
        plot.plot_curves(runs) == tmp_path / "curves.png" and not (runs[0] / "curves.png").exists()
    )
    assert (
        plot.plot_curves(runs[:1]) == runs[0] / "curves.png"
        and (runs[0] / "curves.png").stat().st_size > 10_000
    )
    with pytest.raises(ValueError, match="say which runs"):
        plot.plot_curves(())
