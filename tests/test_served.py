"""Training on an inference server: what it is asked, what its answers must hold, its weights."""

import json
from dataclasses import replace

import pytest
import torch
from policy_server import serving

import train as train_module
from config import PRESETS, check_config, saved_settings
from engine import served
from engine.packing import rescore
from rollout import sample

CFG = replace(
    PRESETS["tiny"],
    group_size=2,
    questions_per_step=2,
    steps=3,
    eval_questions=2,
    eval_every=100,
    max_minutes=0,
    sampler="endpoint",
    recompute_logprobs=True,
    max_rollout_ratio=2.0,
    dynamic_sampling=False,
)


@pytest.fixture
def handed(policy, tmp_path):
    """(server, settings): a server that has the policy's weights."""
    with serving(tmp_path / "served") as (server, address):
        cfg = replace(CFG, out=tmp_path, endpoint=address)
        served.hand_over(policy, cfg, 0)
        yield server, cfg


def generator():
    return torch.Generator().manual_seed(0)


def test_the_server_samples_what_the_policy_would(handed, policy, kb, mixed):
    """Its log-probabilities are the training pass's, where it tokenised as the policy wrote."""
    server, cfg = handed
    responses = sample(policy, kb, mixed[1:5], cfg, generator())
    assert server.asked == sum(len(response.turns) for response in responses)
    assert any(len(response.turns) > 2 for response in responses)
    assert any(response.stop == "answer" for response in responses)
    scored, _ = policy.logprobs(responses)
    differences = [
        (row[: len(r.logprobs)] - r.logprobs).abs()[r.policy_mask].max().item()
        for row, r in zip(scored.detach(), responses)
    ]
    assert sorted(differences)[len(differences) // 2] < 1e-3
    weighted = rescore(policy, responses, None, cfg)
    assert len(weighted) == len(responses)
    assert all(r.weights.max() <= 2.0 for r in responses)


def test_greedy_turns_are_those_of_the_policy(handed, policy, kb, mixed):
    _, cfg = handed
    greedy = replace(cfg, group_size=1, temperature=0.0)
    theirs = sample(policy, kb, mixed[2:7], greedy, generator())
    ours = sample(policy, kb, mixed[2:7], replace(greedy, sampler="shared"), generator())
    same = [a.token_ids.tolist() == b.token_ids.tolist() for a, b in zip(theirs, ours)]
    assert sum(same) >= len(same) - 1  # one may have been tokenised in another way


def spoil(answer: dict, path: str, value):
    """The answer with something else at a place like "choices.0.token_ids"."""
    answer = json.loads(json.dumps(answer))
    *way, last = [int(name) if name.isdigit() else name for name in path.split(".")]
    inside = answer
    for name in way:
        inside = inside[name]
    inside[last] = value
    return answer


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("choices.0.token_ids", None, "returns no token ids"),
        ("choices.0.logprobs", None, "returns no token ids"),
        ("choices", [], "returns no token ids"),
        ("choices.0.token_ids", ["x"], "returns no token ids"),
        ("choices.0.token_ids", [], "0 tokens"),
        ("choices.0.token_ids", [5, 5], "log-probabilities"),
        ("choices.0.logprobs.content.0.logprob", "much", "returns no token ids"),
        ("choices.0.token_ids.0", 10**9, "a token that is none"),
        ("choices.0.token_ids.0", -1, "a token that is none"),
        ("prompt_token_ids", [1, 2, 3], "to a prompt of 3 tokens instead of"),
    ],
)
def test_a_bad_answer_is_one_sentence(handed, policy, kb, mixed, path, value, said):
    server, cfg = handed
    server.change = lambda answer: spoil(answer, path, value)
    with pytest.raises(served.ServerError, match=said):
        sample(policy, kb, mixed[:1], replace(cfg, group_size=1), generator())


def test_a_token_that_the_policy_must_not_write_is_refused(handed, policy, kb, mixed):
    server, cfg = handed
    pad = policy.model.config.image_token_id
    server.change = lambda answer: spoil(answer, "choices.0.token_ids.0", pad)
    with pytest.raises(served.ServerError, match="logit_bias"):
        sample(policy, kb, mixed[:1], replace(cfg, group_size=1), generator())


def test_weights_are_handed_over_every_so_many_steps(policy, tmp_path):
    with serving(tmp_path / "served") as (server, address):
        cfg = replace(CFG, out=tmp_path, endpoint=address, endpoint_every=2)
        loads = []
        for step in (5, 6, 7, 8, 9):  # a resumed run begins anywhere
            served.hand_over(policy, cfg, step)
            loads.append(server.loaded)
        assert loads == [1, 1, 2, 2, 3]
        theirs = dict(server.policy.model.named_parameters())
        assert all(
            torch.equal(value, theirs[name]) for name, value in policy.model.named_parameters()
        )
        with pytest.raises(served.ServerError, match="/nothing did not load the weights"):
            wrong = replace(cfg, endpoint_reload=("/nothing {",))
            served.hand_over(policy, wrong, 20)


def test_a_run_trains_on_a_server(kb_folder, data_folder, tmp_path):
    out = tmp_path / "run"
    with serving(out / "served") as (server, address):
        cfg = replace(CFG, kb=kb_folder, data=data_folder, out=out, endpoint=address)
        # by their lengths rewards always differ, so every step changes the weights
        always = {"dynamic_sampling": False, "overlong_buffer": cfg.max_tokens, "max_turns": 1}
        train_module.train(replace(cfg, endpoint_every=2, lr=1e-3, warmup_steps=0, **always))
        assert server.loaded == 2  # for steps 1 and 3
        assert server.asked >= 3 * 2 * 2
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "reward_mean" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert steps[0]["logprob_diff_mean"] < 1e-2  # what was tokenised again, alone
    assert steps[1]["logprob_diff_mean"] > steps[0]["logprob_diff_mean"]  # older weights
    assert records[-1]["eval_n"] == 2
    settings, _ = saved_settings(out / "latest")
    assert settings.sampler == "shared"  # an evaluation asks no server


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"endpoint": ""}, "needs --endpoint"),
        ({"recompute_logprobs": False}, "needs --endpoint, --recompute-logprobs"),
        ({"temperature": 0.7}, "and --temperature 1"),
        ({"lora_rank": 4}, "no adapters"),
        ({"gather_weights": False}, "no lockstep"),
    ],
)
def test_what_a_server_cannot_do_is_said_at_the_start(tmp_path, changes, said):
    cfg = replace(CFG, out=tmp_path, endpoint="http://127.0.0.1:9/v1")
    check_config(cfg, 1)
    with pytest.raises(ValueError, match=said):
        check_config(replace(cfg, **changes), 1)
