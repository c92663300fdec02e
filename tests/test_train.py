"""Training: a step does what it should, and two processes train."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, WARMSTART, free_port

from config import PRESETS
from model import load_policy
from rollout import sample
from train import Group, rewards_of, train, update

CFG = replace(PRESETS["tiny"], group_size=4, updates_per_step=1, micro_tokens=2000)


@pytest.fixture(scope="module")
def groups(policy, kb, questions):
    """Sampled groups with rewards, made once; the tests train policies of their own."""
    responses = sample(policy, kb, questions[:6], CFG, torch.Generator().manual_seed(0))
    rewards = torch.tensor([terms["total"] for terms in rewards_of(responses, CFG)]).view(6, 4)
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))  # no group is all equal
    return [Group(responses[4 * i : 4 * i + 4], rewards[i] + noise[i]) for i in range(6)]


def first_step(groups, cfg):
    """The figures of one SGD step, and a weight after it."""
    policy = load_policy(WARMSTART, torch.float32)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
    figures = update(policy, optimizer, groups, cfg)
    weight = policy.model.get_parameter("model.language_model.layers.1.mlp.up_proj.weight")
    return figures, weight.detach()


def test_micro_batches_do_not_change_the_step(groups):
    figures, weight = first_step(groups, CFG)
    again, same = first_step(groups, replace(CFG, micro_tokens=50_000))
    assert again["loss"] == pytest.approx(figures["loss"], rel=1e-4)
    assert torch.allclose(weight, same, atol=1e-5)


def test_a_step_makes_good_responses_likelier(groups):
    policy = load_policy(WARMSTART, torch.float32)

    @torch.no_grad()
    def agreement() -> float:
        """How much likelier good responses are than bad ones."""
        total = 0.0
        for responses, rewards in groups:
            logprobs, _ = policy.logprobs(responses)  # (G, L)
            total += (logprobs.sum(1) @ (rewards - rewards.mean())).item()
        return total

    before = agreement()
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-5)
    update(policy, optimizer, groups, replace(CFG, lr=1e-5, warmup_steps=0))
    assert agreement() > before


def test_two_processes_train(kb_folder, data_folder, tmp_path):
    # fmt: off
    command = [
        sys.executable, "-m", "torch.distributed.run",
        "--nproc_per_node", 2, "--master_port", free_port(),
        "train.py", "tiny", "--kb", kb_folder, "--data", data_folder, "--out", tmp_path / "two",
        "--steps", 2, "--questions-per-step", 4, "--group-size", 4,
        "--eval-questions", 4, "--eval-every", 100, "--save-every", 100,
    ]
    # fmt: on
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "reward_mean" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert all(record["logprob_diff_max"] < 1e-3 for record in steps)
    assert records[-1]["eval_n"] == 4


def test_an_existing_run_is_not_overwritten(kb_folder, data_folder, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("{}\n")
    with pytest.raises(ValueError, match="holds a run already.*--resume"):
        train(replace(CFG, kb=kb_folder, data=data_folder, out=tmp_path))
    assert metrics.read_text() == "{}\n"


def test_the_training_pass_computes_in_bfloat16_too(groups):
    """Its gradients point where float32's do, as far as eight bits of precision tell."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = load_policy(WARMSTART, dtype)
        logprobs, _ = policy.logprobs(groups[0].responses)
        logprobs.sum().backward()
        weight = policy.model.get_parameter("model.language_model.layers.1.mlp.up_proj.weight")
        gradients.append(weight.grad.float().flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9
